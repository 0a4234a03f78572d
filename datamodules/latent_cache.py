"""A folder of cached latents: which record belongs to which clip, what the cache was made for, and whether it is whole.

    FOLDER/manifest.json                          all that decides the records' values; sizes of the shards once all are there
    FOLDER/<stream>/view000-00000.safetensors     records of that stream's draws, in order: ``datamodules/cached.py``

Record j of a stream is draw j of the plan: for j below views * N (N clips), so view v holds what epoch v hands out. Whoever uses
the cache reads the window of a record and no other, so that latent and pixels belong together. In the first ``views`` epochs
draw d takes record d, which is what it would have taken without a cache; in epoch e after them, clip by clip, that of view
e mod views, in that epoch's order.

What decides the records (the *protocol*): the encoder by its fingerprint and precision, padding, the seed, and of each stream
its config and its films, by name, size, length and rate. Where films lie, shares, batch sizes and loaders decide nothing.
A cache of more streams or views than are used is fine.
"""

import dataclasses
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.cached import CachedClip, inspect_shard, put_in_place
from datamodules.probe import BadFile

if TYPE_CHECKING:  # streams.py imports the reader, which imports cached.py
    from datamodules.streams import Stream

MANIFEST = "manifest.json"
FORMAT = 1
PLAN = 1  # raise it when the plan draws other windows from the same seed
# Fields of a stream that say how often and how many at once, not what its windows are; ``window`` is for validation.
UNDECIDING = ("sources", "share", "batch_size", "window", "buckets")


class CacheError(ValueError):
    """A cache of latents that cannot be used, or not for this."""


@dataclass(frozen=True)
class Shard:
    """A file of the cache, and the records of ``stream`` that it holds: ``first`` to ``first + num`` - 1."""

    stream: str
    name: str  # below the cache's folder
    first: int
    num: int


@dataclass
class StreamPart:
    """A stream's part of the manifest."""

    protocol: dict[str, Any]
    clips: int
    per_shard: int  # records

    def shards(self, stream: str, views: int) -> Iterator[Shard]:
        """All its files, in order. A view begins a new one, so that views can be added."""
        for view in range(views):
            for number in range(math.ceil(self.clips / self.per_shard)):
                first = number * self.per_shard
                num = min(self.per_shard, self.clips - first)
                yield Shard(stream, shard_name(stream, view, number), view * self.clips + first, num)

    def place(self, record: int) -> tuple[int, int, int]:
        """(view, number of the shard, row) of a record."""
        view, place = divmod(record, self.clips)
        return view, *divmod(place, self.per_shard)


def shard_name(stream: str, view: int, number: int) -> str:
    """Safe on any file system, and another for every stream."""
    safe = re.sub(r"[^\w-]", "_", stream)
    folder = safe if safe == stream else f"{safe}-{zlib.crc32(stream.encode()):08x}"
    return f"{folder}/view{view:03d}-{number:05d}.safetensors"


@dataclass
class Manifest:
    """What a cache holds. ``about``: the encoder and the seed; ``dtype``: of the values in the shards."""

    about: dict[str, Any]
    dtype: str
    views: int
    streams: dict[str, StreamPart]
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of every shard; empty until all are there

    def shards(self) -> list[Shard]:
        """All files that it has, or will have."""
        return [shard for name, part in self.streams.items() for shard in part.shards(name, self.views)]

    def decided(self) -> dict[str, Any]:
        """All that must agree with who uses it, or goes on with it."""
        return {"about": self.about, "streams": {name: part.protocol for name, part in self.streams.items()}}

    def save(self, folder: Path) -> None:
        """Write it to ``folder``. Raises OSError."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        put_in_place(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def load_manifest(folder: Path) -> Manifest | None:
    """None where there is no cache. Raises CacheError."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
        if content.pop("format") != FORMAT:
            raise CacheError(f"{folder / MANIFEST} was written by another version of this code: make the cache anew")
        parts = {name: StreamPart(**part) for name, part in content.pop("streams").items()}
        if min([content["views"], *(min(part.clips, part.per_shard) for part in parts.values())]) < 1:
            raise ValueError("a count is below 1")
        return Manifest(streams=parts, **content)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from None
    except CacheError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(
            f"{folder / MANIFEST} is no manifest of cached latents ({error}): name another folder"
        ) from None


def protocol_of(stream: "Stream") -> dict[str, Any]:
    """All that decides which windows a stream has, short; only what is not the default, so that new options change none."""
    sources = {index.name: _chosen(index.config, ("path", "exclude")) for index in stream.sources}
    said = {"config": _chosen(stream.config, UNDECIDING), "sources": sources}
    return json.loads(json.dumps({**said, "clips": len(stream), "films": stream.digest(), "plan": PLAN}))


def _chosen(config: Any, without: tuple[str, ...]) -> dict[str, Any]:
    """Fields of a dataclass that are not at their default. ``size`` and ``num_frames`` always."""
    kept = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        if item.name not in without and (value != default or item.name in ("size", "num_frames")):
            kept[item.name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    return kept


def differences(cached: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What separates two protocols, one ``key: cached -> now`` a line. Streams that only the cache has are none."""
    before, after = _flat(cached), _flat(now)
    used = tuple(f"streams.{name}." for name in now["streams"])
    keys = sorted(key for key in before.keys() | after.keys() if key.startswith((*used, "about.")))
    shown = [{key: json.dumps(side[key]) if key in side else "(default)" for key in keys} for side in (before, after)]
    return [f"{key}: {shown[0][key]} -> {shown[1][key]}" for key in keys if shown[0][key] != shown[1][key]]


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {path: tree}
    return {k: v for key, child in tree.items() for k, v in _flat(child, f"{path}.{key}".lstrip(".")).items()}


def has_pixels(stream: "Stream") -> bool:
    """Whether clips of this stream are to be encoded: saved latents, and edits that bring theirs, are not."""
    return all(index.config.kind != "latent" and index.latents is None for index in stream.sources)


def is_there(folder: Path, shard: Shard, sizes: Mapping[str, int]) -> bool:
    """Whether a shard is whole: of the size that is known, else of the size and the records that its header says."""
    path = folder / shard.name
    if shard.name in sizes:
        return path.is_file() and path.stat().st_size == sizes[shard.name]
    try:
        return inspect_shard(str(path))["table"].shape[0] == shard.num
    except BadFile:
        return False


class LatentCache:
    """A whole cache, for the plan of a run.

    Args:
        folder: the cache's.
        streams: the run's training streams.
        about: as in the manifest.
        seed: the run's; of draws from the posterior.
        sample: draw from the posterior, anew in every epoch, in place of its mean.
        command: makes the cache, for messages.

    Raises:
        CacheError: there is none, it was made for something else (with the differences), or not all of it is there.
    """

    def __init__(
        self,
        folder: Path,
        streams: Mapping[str, "Stream"],
        about: dict[str, Any],
        seed: int,
        sample: bool,
        command: str,
    ):
        self.folder, self.seed, self.sample = folder, seed, sample
        manifest = load_manifest(folder)
        if manifest is None:
            raise CacheError(f"there are no cached latents in {folder}: make them with\n  {command}")
        wanted = {name: stream for name, stream in streams.items() if has_pixels(stream)}
        if absent := sorted(wanted.keys() - manifest.streams.keys()):
            raise CacheError(
                f"{folder} has no latents of data.train.{absent[0]}; it has {', '.join(manifest.streams)}. Make them, in another "
                f"folder, with\n  {elsewhere(command, folder)}"
            )
        now = {"about": about, "streams": {name: protocol_of(stream) for name, stream in wanted.items()}}
        if changes := differences(manifest.decided(), now):
            listed = "\n  ".join(changes)
            raise CacheError(
                f"the latents in {folder} are of other clips or of another encoder (cached -> now):\n  {listed}\nundo the change, or "
                f"make another cache, in another folder, with\n  {elsewhere(command, folder)}"
            )
        self.views = manifest.views
        self._parts = {name: manifest.streams[name] for name in wanted}
        shards = [shard for name, part in self._parts.items() for shard in part.shards(name, self.views)]
        if missing := [shard for shard in shards if not is_there(folder, shard, manifest.sizes)]:
            records, total = (sum(shard.num for shard in some) for some in (missing, shards))
            raise CacheError(
                f"{folder} lacks {records} of {total} latents ({len(missing)} of {len(shards)} files are missing or not whole, such as "
                f"{missing[0].name}): make the rest with\n  {command}"
            )

    def __contains__(self, stream: str) -> bool:
        return stream in self._parts

    def clip(self, stream: str, record: int, noise: tuple[int, ...]) -> CachedClip:
        """Where a record lies. ``noise``: numbers that a draw from its posterior is seeded by."""
        view, number, row = self._parts[stream].place(record)
        seed = int(np.random.default_rng([self.seed, *noise]).integers(2**62)) if self.sample else None
        return CachedClip(str(self.folder / shard_name(stream, view, number)), row, seed)


def elsewhere(command: str, folder: Path) -> str:
    """The command that makes a cache in ``folder``, with a free folder beside it."""
    number = next(i for i in count(2) if not folder.with_name(f"{folder.name}-{i}").exists())
    return command.replace(f"out={folder}", f"out={folder}-{number}")


def digest_of(*arrays: np.ndarray, texts: bytes = b"") -> str:
    """First 16 hex digits of the sha256 of arrays, of their types, and of some bytes."""
    digest = hashlib.sha256(texts)
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
