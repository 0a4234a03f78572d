"""Encode the training clips of an experiment once: ``python -m experiments.cache_latents NAME out=FOLDER [key=value ...]``.

    out        the folder of the cache; default: data.latent_cache.path, where the experiment names it
    views      how many times each clip is encoded, each with another window and crop: the first so many epochs; default 1
    dtype      float16 (default) or float32: of the latents in the files
    shard_mb   size of a file, about; what is being encoded when the command is stopped is lost up to this; default 256

Everything else is an override of the experiment. The same command goes on where it stopped, and adds views to a cache that has
fewer. Several processes share the work: ``torchrun --nproc-per-node 8 -m experiments.cache_latents NAME out=FOLDER`` (RANK,
WORLD_SIZE and LOCAL_RANK of the environment; the folder must be the same for all). Then: ``make exp=NAME
data.latent_cache.path=FOLDER``. Clips that cannot be read are written down, and another one's record takes their place.
"""

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from tqdm import tqdm

from datamodules.batch import VideoBatch
from datamodules.cached import Record, ShardWriter, look_of, remove_left
from datamodules.faults import Unreachable
from datamodules.latent_cache import (
    CacheError,
    Manifest,
    Shard,
    StreamPart,
    differences,
    has_pixels,
    is_there,
    load_manifest,
    protocol_of,
)
from datamodules.loaders import read_singly
from datamodules.quarantine import TooManyBadFiles
from datamodules.reader import ClipRequest
from datamodules.sources import SourceError
from datamodules.streams import StreamError
from decoders.base import VideoDecoder
from experiments.compose import ConfigError, run_cli
from experiments.config import (
    Experiment,
    build_decoder,
    build_space,
    check_decoder,
    check_own,
    load,
    locate,
    require_paths,
)
from experiments.given_latents import KEY, about_encoder, check_encoder
from experiments.train import quiet

GIB = 2**30
LARGEST_SHARD_MB = 4096
SPARE = 1.02  # of the estimated size: tables, keys, manifest


@dataclass
class CacheOptions:
    """The command's own options."""

    out: str = ""
    views: int = 1
    dtype: Literal["float16", "float32"] = "float16"
    shard_mb: float = 256.0

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ValueError(f"views={self.views} must be 1 or more")
        if not 0 < self.shard_mb <= LARGEST_SHARD_MB:
            raise ValueError(
                f"shard_mb={self.shard_mb:g} must lie above 0 and at or below {LARGEST_SHARD_MB}: a file is held in memory"
            )


@dataclass(frozen=True)
class Process:
    """Which of how many processes this is, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def of_environment(cls, accelerator: str) -> "Process":
        """As torchrun says it; alone where nothing is said. Raises ConfigError."""
        said = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        try:
            rank, world_size, local = (
                int(said[name] or default) for name, default in zip(said, (0, 1, 0), strict=True)
            )
        except ValueError:
            raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, got {said}") from None
        if not 0 <= rank < world_size:
            raise ConfigError(f"RANK={rank} must lie in 0 to WORLD_SIZE - 1 = {world_size - 1}")
        cuda = accelerator != "cpu" and torch.cuda.is_available()
        return cls(rank, world_size, torch.device("cuda", local) if cuda else torch.device("cpu"))


@dataclass
class Rounding:
    """What storing values in fewer bits costs: squares of values and of errors, and the largest error."""

    values: float = 0.0
    errors: float = 0.0
    largest: float = 0.0
    num: int = 0

    def add(self, mean: Tensor, dtype: str) -> None:
        error = (mean - mean.to(getattr(torch, dtype)).float()).abs()
        self.values += mean.double().square().sum().item()
        self.errors += error.double().square().sum().item()
        self.largest = max(self.largest, error.max().item())
        self.num += mean.numel()

    def __str__(self) -> str:
        if not self.num:
            return "nothing was encoded"
        rms, error = ((total / self.num) ** 0.5 for total in (self.values, self.errors))
        return f"rounding error {error:.1e} (largest {self.largest:.1e}) at values of {rms:.2f}, root mean squares"


@dataclass
class Work:
    """What a process needs to encode its share."""

    decoder: VideoDecoder
    data: Any
    folder: Path
    manifest: Manifest
    process: Process
    show: bool
    rounding: Rounding = field(default_factory=Rounding)
    num: int = 0
    bad: int = 0

    def mine(self) -> list[Shard]:
        """This process's files that are not there yet."""
        p = self.process
        every = self.manifest.shards()[p.rank :: p.world_size]
        return [shard for shard in every if not is_there(self.folder, shard, self.manifest.sizes)]


def prepare(name: str, options: CacheOptions, overrides: Sequence[str]) -> Work:
    """Everything is checked, one clip of every size is encoded, and the manifest is written. Raises ConfigError."""
    experiment = load(name, overrides)
    folder = options.out or experiment.data.latent_cache.path if hasattr(experiment.data, "latent_cache") else None
    if folder is None:
        raise ConfigError(
            f"out=FOLDER is needed: make cache-latents exp={name} out=..."
            if hasattr(experiment.data, "latent_cache")
            else f"datamodule: {experiment.datamodule} has no latent_cache; datamodules.clips.ClipData has"
        )
    folder = Path(folder).expanduser()
    experiment.data.latent_cache.path, experiment.data.val = None, {}
    require_paths(experiment)
    process = Process.of_environment(experiment.trainer.accelerator)
    decoder = _decoder(experiment)
    data = locate(experiment.datamodule, "datamodule")(
        experiment.data, run_dir=folder, seed=experiment.seed, world_size=1, rank=process.rank
    )
    streams = {stream: some for stream, some in data.streams("train").items() if has_pixels(some)}
    if not streams:
        raise ConfigError(f"{name}: all its training streams bring latents of their own, so there is nothing to encode")
    parts, record_bytes = {}, {}
    for stream, some in streams.items():
        size = (some.config.total_frames, *some.config.size)
        record_bytes[stream] = _numbers(decoder, size, process.device) * np.dtype(options.dtype).itemsize
        per_shard = max(1, min(len(some), int(options.shard_mb * 2**20 / record_bytes[stream])))
        parts[stream] = StreamPart(protocol_of(some), len(some), per_shard)
    wanted = Manifest(about_encoder(experiment, decoder), options.dtype, options.views, parts)
    try:
        manifest = agree(folder, wanted)
    except OSError as error:
        raise ConfigError(f"out: {folder} cannot be written to: {error.strerror or error}") from None
    remove_left(folder)
    check_room(folder, manifest, record_bytes)
    return Work(decoder, data, folder, manifest, process, experiment.trainer.progress_bar and process.rank == 0)


def _decoder(experiment: Experiment) -> VideoDecoder:
    """The experiment's decoder without memory for its weights: it says how clips are padded, and brings the encoder."""
    try:
        space = build_space(experiment)
        space.require()
        with torch.device("meta"):
            decoder = build_decoder(experiment, space)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from None
    check_decoder(experiment, decoder)
    check_encoder(decoder)
    return decoder


def _numbers(decoder: VideoDecoder, size: tuple[int, int, int], device: torch.device) -> int:
    """Numbers in a record of a clip of (t, h, w): a black one is encoded, which also shows whether memory suffices."""
    mean, log_variance = decoder.latent_space.moments(decoder.fitted(torch.zeros(1, 3, *size, device=device)))
    return mean.numel() * (1 if log_variance is None else 2)


def agree(folder: Path, wanted: Manifest) -> Manifest:
    """The manifest to go on with: the folder's, with views added, or a new one. Raises ConfigError: it is another cache's."""
    found = load_manifest(folder)
    if found is None:
        wanted.save(folder)
        return wanted
    changes = differences(found.decided(), wanted.decided())
    if found.dtype != wanted.dtype:
        changes.append(f"dtype: {found.dtype} -> {wanted.dtype}")
    if found.streams.keys() != wanted.streams.keys():
        changes.append(f"streams: {', '.join(found.streams)} -> {', '.join(wanted.streams)}")
    if changes:
        listed = "\n  ".join(changes)
        raise ConfigError(
            f"{folder} has latents of other clips or of another encoder (cached -> now):\n  {listed}\nundo the change, or name another "
            "folder: out=..."
        )
    if wanted.views > found.views:
        found = replace(found, views=wanted.views)
        found.save(folder)
    return found


def check_room(folder: Path, manifest: Manifest, record_bytes: dict[str, int]) -> None:
    """Raise ConfigError where what is missing, of all processes together, does not fit on the disk."""
    missing = [shard for shard in manifest.shards() if not is_there(folder, shard, manifest.sizes)]
    needed = sum(shard.num * record_bytes[shard.stream] for shard in missing) * SPARE
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{folder} has {free / GIB:.1f} GiB free, and {needed / GIB:.1f} GiB of latents are still to be written: name another "
            "folder (out=...), or use fewer views or clips"
        )


def requests(work: Work, shards: list[Shard]) -> Iterator[ClipRequest]:
    """The clips of these files, in order, each without what could replace it."""
    for shard in shards:
        for draw in range(shard.first, shard.first + shard.num):
            yield replace(work.data.plan.request_at(shard.stream, draw), alternates=())


def encode(work: Work) -> None:
    """Encode this process's share, file by file. Raises TooManyBadFiles, OSError, ConfigError."""
    shards = work.mine()
    bar = tqdm(total=sum(shard.num for shard in shards), unit="clip", disable=not work.show, file=sys.stderr)
    samples = read_singly(work.data.config, requests(work, shards))
    for shard in shards:
        writer = ShardWriter(np.dtype(work.manifest.dtype).type)
        for draw in range(shard.first, shard.first + shard.num):
            item = next(samples)
            if "error" in item:
                _note_bad(work, writer, work.data.plan.request_at(shard.stream, draw).path, item["error"])
            else:
                _encode_one(work, writer, item["batch"])
            bar.update()
        about = {"stream": shard.stream, "first": shard.first, "bad": writer.bad}
        writer.write(work.folder / shard.name, json.dumps(about))
    bar.close()


def _note_bad(work: Work, writer: ShardWriter, path: str, error: str) -> None:
    reason = error.removeprefix(f"cannot be read: {path}: ")
    writer.add_bad(path, reason)
    work.num, work.bad = work.num + 1, work.bad + 1
    work.data.quarantine.update(1, [(path, reason)], 1)


def _encode_one(work: Work, writer: ShardWriter, batch: VideoBatch) -> None:
    work.num += 1
    work.data.quarantine.update(1, [], 0)
    clip = batch.get("source", batch["video"])
    mean, log_variance = work.decoder.latent_space.moments(work.decoder.fitted(clip.to(work.process.device)))
    work.rounding.add(mean, work.manifest.dtype)
    variance = None if log_variance is None else log_variance[0].cpu()
    try:
        writer.add(Record(batch["key"][0], mean[0].cpu(), variance, look_of(clip[0])))
    except ValueError as error:
        raise ConfigError(
            f"{error}: dtype=float32 holds larger ones; where they are not finite, the encoder is broken"
        ) from None


def finish(work: Work) -> str:
    """What was done; and where all files are there, of all processes, their sizes go into the manifest."""
    shards = work.manifest.shards()
    missing = [shard for shard in shards if not is_there(work.folder, shard, {})]
    done = f"{work.num} clips encoded, {work.bad} of them unreadable; {work.manifest.dtype}: {work.rounding}"
    if missing:
        left = sum(shard.num for shard in missing)
        return f"{done}\nprocess {work.process.rank} is done; {left} clips are left to the other processes, or to the next command"
    work.manifest.sizes = {shard.name: (work.folder / shard.name).stat().st_size for shard in shards}
    work.manifest.save(work.folder)
    total = sum(shard.num for shard in shards)
    drawn = f" {KEY}.sample=true" if work.decoder.samples_latents and work.decoder.latent_space.gaussian else ""
    return (
        f"{done}\n{work.folder} is complete: {total} latents, {work.manifest.views} of each clip, "
        f"{sum(work.manifest.sizes.values()) / GIB:.3g} GiB. To train on them: {KEY}.path={work.folder}{drawn}"
    )


def cache_latents(name: str, options: CacheOptions, overrides: Sequence[str] = ()) -> Manifest:
    """Encode what is not there yet. Raises ConfigError; what was written by then is whole and stays."""
    try:
        work = prepare(name, options, overrides)
        encode(work)
        print(finish(work), flush=True)
    except (CacheError, SourceError, StreamError, Unreachable) as error:
        raise ConfigError(str(error)) from None
    except TooManyBadFiles as error:
        raise ConfigError(f"too many clips cannot be read: {error}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(
            f"no room left in {options.out}; what is in it is whole: free some space, then run the same command"
        ) from None
    return work.manifest


def split_options(arguments: Sequence[str]) -> tuple[CacheOptions, list[str]]:
    """The command's own options, and the overrides of the experiment. Raises ConfigError."""
    own = {item.name for item in fields(CacheOptions)}
    check_own(arguments, own)
    values = {key: text for key, equals, text in (a.partition("=") for a in arguments) if equals and key in own}
    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CacheOptions), values))
    except (OmegaConfBaseException, ValueError) as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}" if key else str(error).splitlines()[0]) from None
    return options, [text for text in arguments if text.partition("=")[0] not in own]


def main(arguments: list[str]) -> int:
    if not arguments or "=" in arguments[0]:
        raise ConfigError("name an experiment: make cache-latents exp=NAME out=FOLDER (make list shows them)")
    name, *rest = arguments
    quiet()
    options, overrides = split_options(rest)
    try:
        cache_latents(name, options, overrides)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the file that was being made", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    run_cli(main)
