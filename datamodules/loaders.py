"""Batches out of requests: the workers' side, and the wrappers that the trainer iterates."""

import logging
import multiprocessing
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.batch import VideoBatch
from datamodules.config import ClipDataConfig
from datamodules.plan import MixturePlan, Position
from datamodules.quarantine import Quarantine, TooManyBadFiles
from datamodules.reader import ClipReader, ClipRequest, NoneReadable, decord_ran
from datamodules.streams import Stream

log = logging.getLogger(__name__)


class UnreadableClip(RuntimeError):
    """A validation clip that cannot be read."""


class _Clips(Dataset):
    """Workers' side: a request in, a sample or the reason why not out."""

    def __init__(self, reader: ClipReader):
        self.reader = reader

    def __getitem__(self, request: ClipRequest):
        try:
            return self.reader.read(request)
        except NoneReadable as error:  # raised again in the main process: there the message stands alone, once
            return error


def _collate(samples: list) -> dict:
    """Stack a batch, and carry the workers' bookkeeping beside it."""
    for sample in samples:
        if isinstance(sample, NoneReadable):
            return {"error": str(sample)}
    batch = {name: torch.stack([s.tensors[name] for s in samples]) for name in samples[0].tensors}
    return {
        "batch": batch | {"key": [s.key for s in samples]},
        "failures": [failure for s in samples for failure in s.failures],
        "num_replaced": sum(bool(s.failures) for s in samples),
    }


def _start_method(configured: str) -> str:
    if configured != "auto":
        return configured
    if decord_ran():
        log.info("decord already ran in this process, so workers are started by forkserver: forked ones would hang")
        # Imported once, by the server; the workers that it forks then start at once.
        multiprocessing.get_context("forkserver").set_forkserver_preload(["datamodules.clips"])
        return "forkserver"
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"


def _data_loader(config: ClipDataConfig, num_workers: int, batches) -> DataLoader:
    reader = ClipReader(config.verify, config.film_cache_gib)
    options = {}
    if num_workers:
        options = {
            "multiprocessing_context": _start_method(config.start_method),
            "persistent_workers": True,
            "prefetch_factor": config.prefetch,
            "timeout": config.timeout_s,
        }
    return DataLoader(
        _Clips(reader),
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: taking the workers' seeds from torch's would disturb an exact resume.
        generator=torch.Generator(),
        **options,
    )


def _mark_extension(batch: VideoBatch, extend: tuple[int, int]) -> VideoBatch:
    """Frames of ``extend`` are delivered but are not part of the window: ``supervised`` is false for them."""
    before, after = extend
    if before or after:
        b, _, t = batch["video"].shape[:3]
        batch["supervised"] = torch.zeros(b, t, dtype=torch.bool)
        batch["supervised"][:, before : t - after] = True
    return batch


def _survive(loader: DataLoader, config: ClipDataConfig) -> Iterator[dict]:
    """Iterate, and turn torch's messages for dead and hung workers into ones that say what to do."""
    try:
        yield from loader
    except RuntimeError as error:
        text = str(error)
        if "exited unexpectedly" in text or "killed by signal" in text:
            advice = (
                "A decoding worker died, mostly for lack of memory (host or /dev/shm). Lower data.num_workers, "
                "data.prefetch, data.film_cache_gib or the batch size; data.num_workers=0 shows errors in place."
            )
        elif "timed out" in text:
            advice = (
                f"A decoding worker delivered nothing for data.timeout_s = {config.timeout_s} s: a disk that hangs, or, "
                "with data.start_method=fork, a process in which decord ran before (use data.start_method=forkserver)."
            )
        else:
            raise
        raise RuntimeError(f"{advice} ({text})") from error


class _Planned:
    """The batch sampler: endless lists of requests from where training stands when iteration starts."""

    def __init__(self, plan: MixturePlan, position: Position, rank: int):
        self.plan, self.position, self.rank = plan, position, rank

    def __iter__(self) -> Iterator[list[ClipRequest]]:
        return self.plan.batches(self.position, self.rank)


class TrainLoader:
    """Endless training batches; every ``iter()`` starts at ``position``, which whoever consumes the batches moves on.

    Not a DataLoader, on purpose: Lightning would put a sampler of its own into one. Raises TooManyBadFiles, and
    RuntimeError for a worker that died or hangs.
    """

    def __init__(
        self, config: ClipDataConfig, plan: MixturePlan, position: Position, rank: int, quarantine: Quarantine
    ):
        self.config, self.plan, self.position, self.quarantine = config, plan, position, quarantine
        self._loader = _data_loader(config, config.num_workers, _Planned(plan, position, rank))

    def __iter__(self) -> Iterator[VideoBatch]:
        ahead = self.position.copy()
        for item in _survive(self._loader, self.config):
            if "error" in item:
                raise TooManyBadFiles(item["error"])
            stream = self.plan.streams[self.plan.stream_at(ahead.step)].config
            self.plan.advance(ahead)
            self.quarantine.update(len(item["batch"]["key"]), item["failures"], item["num_replaced"])
            yield _mark_extension(item["batch"], stream.extend)


class ValWorkers:
    """Workers that all validation loaders of a process share: streams are gone through one after the other."""

    def __init__(self, config: ClipDataConfig):
        self.config = config
        self._batches: list[list[ClipRequest]] = []  # of this run; the DataLoader's batch sampler
        self._turn = 0
        self._loader = _data_loader(config, min(config.num_workers, 2), self._batches)

    def run(self, batches: list[list[ClipRequest]]) -> Iterator[VideoBatch]:
        """Read these batches. Another run ends this one."""
        self._batches[:] = batches
        turn = self._turn = self._turn + 1
        for item in _survive(self._loader, self.config):
            if "error" in item:
                raise UnreadableClip(f"data.val: a validation clip, which nothing may replace, {item['error']}")
            yield item["batch"]
            if self._turn != turn:
                raise RuntimeError("two validation loaders are iterated at once, but they share their workers")


class ValLoader:
    """One stream's fixed validation clips, as far as they are this rank's.

    Raises UnreadableClip if one cannot be read: were another clip to take its place, the numbers would change in silence.
    """

    def __init__(self, workers: ValWorkers, stream: Stream, batches: list[list[ClipRequest]]):
        self._workers, self._extend, self._batches = workers, stream.config.extend, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[VideoBatch]:
        for batch in self._workers.run(self._batches):
            yield _mark_extension(batch, self._extend)
