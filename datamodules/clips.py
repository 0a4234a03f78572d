"""ClipData: clips of films and images as a LightningDataModule. How to configure it: ``datamodules/config.py``.

config.py      what a user writes              sources.py     which files there are
probe.py       what a file says about itself   index.py       the same for all files, remembered
streams.py     which clips fit a size          buckets.py     several sizes in one stream
plan.py        which clips make up which batch
reader.py      from a request to pixels        transforms.py  resizing and cropping
films.py       films by decord, PyAV, torchcodec   replay.py  films by PyAV, as a second opinion
loaders.py     batches for the trainer         workers.py     who decodes them, begun again after a fault
watch.py       what every worker is reading    quarantine.py  files that could not be read
procedural.py  films without files             samples.py     the real clips that a Python package ships
latents.py     saved latents, their formats    triples.py     input, style image, target
latent_cache.py  what the encoder gave, kept    cached.py      its files
stills.py      images, and references          masks.py       edited films, what of them counts
named.py       evaluation sets by name         shards*.py     clips in tars, here and on servers (remote.py)
"""

import logging
from collections.abc import Callable
from pathlib import Path

from jaxtyping import Float
from lightning import LightningDataModule
from torch import Tensor

from datamodules.config import ClipDataConfig
from datamodules.index import SourceIndex, build_index
from datamodules.latent_cache import CacheError, LatentCache
from datamodules.loaders import TrainLoader, ValLoader, ValWorkers
from datamodules.plan import MixturePlan, Position, validation_batches
from datamodules.quarantine import Quarantine
from datamodules.reader import ClipReader, ClipRequest
from datamodules.streams import Stream, build_streams

log = logging.getLogger(__name__)

FrameRule = Callable[[int, int, int], object]
"""(t, h, w) of a clip, in pixels; raises ValueError for what the latent space cannot encode."""


class NoOtherClip(ValueError):
    """All validation clips are of one film."""


class ClipData(LightningDataModule):
    """Training batches from a mixture of sources and sizes, and fixed validation clips, as VideoBatch.

    Training is one endless epoch. Whoever trains calls ``batch_consumed`` once per finished batch; the position that it
    moves on is what ``state_dict`` stores, so batches that workers decoded ahead are decoded again after a resume and
    none is lost or seen twice, with any number of workers.

    ``frame_rule`` is called with every stream's (t, h, w) at construction, so a length that cannot be encoded is refused
    before any work. ``run_dir`` receives quarantine.jsonl. ``world_size`` and ``rank`` default to the trainer's.
    """

    Config = ClipDataConfig

    def __init__(
        self,
        config: ClipDataConfig,
        *,
        frame_rule: FrameRule | None = None,
        run_dir: str | Path | None = None,
        seed: int = 0,
        world_size: int | None = None,
        rank: int | None = None,
    ):
        super().__init__()
        # A stream may have fewer clips than there are processes; validation_batches sees to it that each gets some.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.config, self.run_dir, self.seed = config, run_dir, seed
        self._world_size, self._rank = world_size, rank
        self._position = Position()
        self._clips_at_save: dict[str, int] = {}
        self._indexes: dict[str, SourceIndex] = {}
        self._streams: dict[str, dict[str, Stream]] = {}
        self._quarantine: Quarantine | None = None
        self._plan: MixturePlan | None = None
        self._cache: LatentCache | None = None
        self._val_loaders: list[ValLoader] | None = None
        self._val_requests: list[list[ClipRequest]] | None = None
        # (stream, beginning of a key, "name#start") of a validation clip -> whether it is wanted. Batches without any are not read;
        # of others all is. Set before val_dataloader.
        self.wanted: Callable[[str, str], bool] | None = None
        if frame_rule is not None:
            self._check_shapes(frame_rule)

    def _check_shapes(self, frame_rule: FrameRule) -> None:
        for split, streams in (("train", self.config.train_streams), ("val", self.config.val)):
            for name, stream in streams.items():
                size = stream.size
                if stream.resize == "keep":  # the other side depends on the film, but is a multiple of this
                    size = (min(size) // stream.multiple * stream.multiple, stream.multiple)
                try:
                    frame_rule(stream.total_frames, *size)
                except ValueError as error:
                    raise ValueError(f"data.{split}.{name}: {error}") from None

    @property
    def world_size(self) -> int:
        """Number of processes that share a batch."""
        if self._world_size is not None:
            return self._world_size
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def rank(self) -> int:
        """This process's number among them."""
        if self._rank is not None:
            return self._rank
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def quarantine(self) -> Quarantine:
        """The files that could not be read so far."""
        if self._quarantine is None:
            self._quarantine = Quarantine(self.config.max_bad_share, self.run_dir, self.rank)
        return self._quarantine

    @property
    def num_clips_seen(self) -> int:
        """Training clips consumed so far, on all ranks together."""
        return sum(self._position.draws.values())

    def prepare_data(self) -> None:
        """Look at files that are not in the index yet: one process per machine, while the others wait."""
        for split in ("train", "val"):
            self.streams(split)

    def setup(self, stage: str | None = None) -> None:
        """Build the streams. Raises SourceError, EmptyStream, TooManyBadFiles."""
        splits = ("train", "val") if stage in (None, "fit") else ("val",)
        for split in splits:
            self.streams(split)

    def streams(self, split: str) -> dict[str, Stream]:
        """The streams of ``train`` or ``val`` by name, buckets as streams of their own, built at first use. Decodes nothing."""
        if split not in self._streams:
            built: dict[str, Stream] = {}
            for name, config in getattr(self.config, split).items():
                indexes = [self._index(source) for source in config.sources]
                built |= build_streams(name, config, indexes, f"data.{split}.{name}")
            self._streams[split] = built
        return self._streams[split]

    def _index(self, source: str) -> SourceIndex:
        if source not in self._indexes:
            index = build_index(source, self.config.sources[source], self.config.cache_dir)
            self.quarantine.add_indexed(index.bad, index.num_bad, index.num_found, f"data.sources.{source}")
            self._indexes[source] = index
        return self._indexes[source]

    @property
    def latent_spaces(self) -> dict[str, dict[str, int]]:
        """Which latent spaces the files of streams with saved latents name, and how many files name each.

        ``data.sources.<name>`` -> {fingerprint or name: files}; "" stands for files that name none. Who trains on them
        compares this with the space of the run, before any step.
        """
        streams = [*self.streams("train").values(), *self.streams("val").values()]
        indexes = {index.name: index for stream in streams for index in stream.sources}
        return {f"data.sources.{name}": dict(index.spaces) for name, index in indexes.items() if index.spaces}

    @property
    def plan(self) -> MixturePlan:
        """Which clips make up which training batch."""
        if self._plan is None:
            streams = self.streams("train")
            if not streams:
                raise ValueError("data.train has no streams: nothing to train on")
            now = {name: len(streams[name]) if name in streams else 0 for name in self._clips_at_save}
            for name, num in self._clips_at_save.items():
                if now[name] != num:
                    log.warning(
                        "data.train.%s has %d clips, but had %d when this run was saved: files came or went, so "
                        "from here on its order is another one", name, now[name], num,
                    )  # fmt: skip
            given = (self.world_size, self.config.max_bad_share, self.config.order, self._cache)
            self._plan = MixturePlan(streams, self.seed, *given)
        return self._plan

    def use_cache(self, about: dict, command: str) -> None:
        """Take the latents of training clips from ``latent_cache.path``: once, before the first training batch.

        ``about`` says which encoder they must be of, ``command`` how they are made. Raises CacheError.
        """
        wanted = self.config.latent_cache
        folder = Path(wanted.path).expanduser()
        self._cache = LatentCache(folder, self.streams("train"), about, self.seed, wanted.sample, command)
        self._plan = None

    def train_dataloader(self) -> TrainLoader:
        """Endless batches from the present position on."""
        if self.config.latent_cache.path is not None and self._cache is None:
            raise CacheError("data.latent_cache is set, but nobody has checked the cache: call use_cache first")
        return TrainLoader(self.config, self.plan, self._position, self.rank, self.quarantine)

    @property
    def val_names(self) -> list[str]:
        """Names of the validation streams, in the order of ``val_dataloader``."""
        return list(self.config.val)

    def val_dataloader(self) -> list[ValLoader]:
        """A loader per validation stream with this rank's share of its fixed clips. They share their workers."""
        if self._val_loaders is None:
            streams = self.streams("val")
            batches = validation_batches(streams, self.rank, self.world_size) if streams else {}
            batches = self._wanted(batches) if self.wanted else batches
            workers = ValWorkers(self.config)
            self._val_loaders = [ValLoader(workers, streams[name], batches[name]) for name in batches]
        return self._val_loaders

    def _wanted(self, batches: dict[str, list[list[ClipRequest]]]) -> dict[str, list[list[ClipRequest]]]:
        """Without those that nobody wants; one stays in any case, as Lightning leaves out a process that has none.

        Where the beginning of a key cannot be told before reading (another frame rate, triples), all stay.
        """
        last = next(batch for some in reversed(batches.values()) for batch in reversed(some))
        kept = {}
        for name, some in batches.items():
            exact = self.config.val[name].fps is None and all(r.kind != "triple" for batch in some for r in batch)
            kept[name] = [b for b in some if not exact or any(self.wanted(name, f"{r.name}#{r.start}") for r in b)]
        if not any(kept.values()):
            kept[next(name for name in batches if last in batches[name])] = [last]
        return kept

    def category(self, stream: str, key: str) -> str | None:
        """The category of a validation clip, where its list says one."""
        return self.streams("val")[stream].categories.get(key.rpartition("#")[0])

    @property
    def num_val_files(self) -> int:
        """Different films among the validation clips. Opens files that are not in the index yet, decodes none."""
        return len({s.request(i, None).path for s in self.streams("val").values() for i in range(len(s))})

    def another_clip(self, key: str) -> Float[Tensor, "3 t h w"]:
        """A validation clip of another file than the one of ``key``, RGB in [-1, 1]: a wrong reference, as a control.

        The next file of the same stream, else of the others; the same on every rank and in every run. Two edits of a film are
        of one file. Raises NoOtherClip where all validation clips are of one.
        """
        if self._val_requests is None:
            streams = self.streams("val").values()
            self._val_requests = [[stream.request(i, None) for i in range(len(stream))] for stream in streams]
        own = key.rpartition("#")[0]
        films = {request.path for requests in self._val_requests for request in requests if request.name == own}
        for requests in sorted(self._val_requests, key=lambda some: all(request.name != own for request in some)):
            others = {request.name: request for request in reversed(requests) if request.path not in films}
            if others:
                after = sorted(others, key=lambda name: (name < own, name))  # in turn, so that not all get the same
                return ClipReader(self.config.verify, reader=self.config.reader).read(others[after[0]]).tensors["video"]
        raise NoOtherClip(
            f"data.val: all clips are of one file, {own}: there is no other to take a wrong reference from; add a source, or "
            "leave that control out (objective.controls)"
        )

    def batch_consumed(self) -> None:
        """Move the position on by one training batch. Called once per batch that training has finished."""
        self.plan.advance(self._position)

    def state_dict(self) -> dict:
        """The position, for Lightning's checkpoints: it does not depend on workers, and allows another world size."""
        clips = {name: len(stream) for name, stream in self._streams.get("train", {}).items()}
        position = {"step": self._position.step, "draws": dict(self._position.draws)}
        return {**position, "clips": clips, "seed": self.seed, "world_size": self.world_size}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go to a stored position; takes effect at the next ``iter()`` of a training loader."""
        if state_dict["seed"] != self.seed:
            raise ValueError(
                f"this run's data order was drawn with seed {state_dict['seed']}, now it is {self.seed}: resume with the "
                "same seed, or start another run"
            )
        before = state_dict.get("world_size", self.world_size)
        if before != self.world_size and self.rank == 0:
            log.warning(
                "this run was saved by %d processes and goes on with %d: no clip is lost or comes twice, but a step now has "
                "%g times as many clips, at the same learning rate (batch_size is per process)",
                before, self.world_size, self.world_size / before,
            )  # fmt: skip
        self._clips_at_save = dict(state_dict["clips"])
        self._position.step = state_dict["step"]
        self._position.draws = dict(state_dict["draws"])

    def describe(self) -> dict:
        """Per split and stream: files found and used, clips, and what was left out and why. Decodes nothing."""
        return {
            split: {name: stream.describe() for name, stream in self.streams(split).items()}
            for split in ("train", "val")
        }
