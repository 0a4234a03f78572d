"""Shards of cached latents: what the encoder gave of a clip, written once, read by the loader's workers.

A shard is a safetensors file of four tensors, so it is also readable without us:

    values  float16 or float32 [...]   record after record: the mean "c n y x", then the log-variance, where the space has one
    table   int64 [records, 9]         of every record the columns of COLUMNS; ``good`` is 0 where the clip could not be read
    looks   float32 [records, 96]      mean colours of 4 x 4 fields of the first and of the last frame: what was encoded
    texts   uint8 [...]                UTF-8: the clip's key (source, first frame, crop box, resize); of a bad one why, as JSON

Which draw of which view a record is follows from its place: ``datamodules/latent_cache.py``. The log-variance is that of the
normalised latent. A record is read by four small reads at known places: nothing stays open or mapped, so a file system that
goes away is an error and no crash.
"""

import contextlib
import json
import math
import os
import struct
import time
import uuid
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from datamodules.probe import OUR_FAULT, BadFile

COLUMNS = ("begin", "c", "n", "y", "x", "has_variance", "check_mean", "check_variance", "text_end")
BAD = -1  # begin of a record without values
NUM_LOOKS = 96
LOOK_TOLERANCE = 0.02  # mean difference of looks, of RGB in [-1, 1]; decoders differ by up to a grey level, 0.008
HEADERS_KEPT = 4096
LEFT_S = 600.0  # a temporary file that nobody writes to any more
TYPES = {"F16": np.float16, "F32": np.float32, "I64": np.int64, "U8": np.uint8}


@dataclass(frozen=True)
class CachedClip:
    """Where a clip's latent lies, as a request takes it to the workers.

    ``seed``: of a draw from the posterior; None: its mean is taken.
    """

    shard: str
    row: int
    seed: int | None = None


@dataclass(frozen=True)
class Record:
    """What a shard holds of a clip."""

    key: str
    mean: Float[Tensor, "c n y x"]
    log_variance: Float[Tensor, "c n y x"] | None
    look: Float[Tensor, " 96"]


def look_of(video: Float[Tensor, "3 t h w"]) -> Float[Tensor, " 96"]:
    """What clip this is, roughly: mean colours of 4 x 4 fields of its first and of its last frame."""
    ends = torch.stack([video[:, 0], video[:, -1]]).float()
    return F.adaptive_avg_pool2d(ends, 4).flatten().cpu()


def cached_latent(cached: CachedClip, key: str, encoded: Float[Tensor, "3 t h w"]) -> Float[Tensor, "c n y x"]:
    """The latent of a clip that was just read: normalised, float32; the posterior's mean or a draw of it.

    ``key`` and ``encoded``, the pixels that the encoder would get, must be those of the record. Raises BadFile, without a path where it is
    the film that is to blame: whoever read it names it.
    """
    record = read_record(cached.shard, cached.row, variance=cached.seed is not None)
    if record.key != key:
        raise BadFile(f"record {cached.row} is of {record.key}, but the clip that was read is {key}")
    difference = (record.look - look_of(encoded)).abs().mean().item()
    if difference > LOOK_TOLERANCE:
        raise BadFile(
            f"the pixels of {key} are not those that were encoded: mean colours differ by {difference:.2f} of 2; the file was replaced"
        )
    if cached.seed is None or record.log_variance is None:
        return record.mean
    noise = torch.randn(record.mean.shape, generator=torch.Generator().manual_seed(cached.seed))
    return record.mean + (0.5 * record.log_variance).exp() * noise


def read_record(shard: str, row: int, variance: bool = True) -> Record:
    """One record, in float32. ``variance``: with its log-variance. Raises BadFile, also for a clip that was bad when encoded."""
    header = _header(shard)
    try:
        file = os.open(shard, os.O_RDONLY)
    except OSError as error:
        raise _bad(shard, error) from None
    try:
        return _read(file, shard, header, row, variance)
    except OSError as error:
        raise _bad(shard, error) from None
    finally:
        os.close(file)


def _read(file: int, shard: str, header: dict[str, "_Place"], row: int, variance: bool) -> Record:
    rows = header["table"].shape[0]
    if not 0 <= row < rows:
        raise BadFile(f"has {rows} records, and number {row} is asked for", shard)
    before = max(row - 1, 0)  # where the row before ends, this one's text begins
    table = (
        header["table"].read(file, before * len(COLUMNS), (row - before + 1) * len(COLUMNS)).reshape(-1, len(COLUMNS))
    )
    entry = dict(zip(COLUMNS, table[-1].tolist(), strict=True))
    text_begin = int(table[0, -1]) if row else 0
    text = header["texts"].read(file, text_begin, entry["text_end"] - text_begin).tobytes()
    text = text.decode(errors="surrogateescape")
    if entry["begin"] == BAD:
        path, reason = _what_was_wrong(text, shard)
        raise BadFile(f"could not be read when its latent was to be cached: {reason}", path)
    shape = tuple(entry[name] for name in ("c", "n", "y", "x"))
    parts, size = [], math.prod(shape)
    if min(shape) < 1 or size != int(np.prod(shape)):  # not a number more than 64 bits
        raise BadFile(f"record {row} is damaged: its size is {'x'.join(map(str, shape))}", shard)
    for number, check in enumerate(("check_mean", "check_variance")[: 1 + (variance and entry["has_variance"])]):
        values = header["values"].read(file, entry["begin"] + number * size, size)
        if zlib.crc32(values.tobytes()) != entry[check]:
            raise BadFile(f"record {row} is damaged: its checksum is another", shard)
        part = torch.from_numpy(values.astype(np.float32)).reshape(shape)
        if not part.isfinite().all():
            raise BadFile(f"record {row} has values that are not finite", shard)
        parts.append(part)
    look = torch.from_numpy(header["looks"].read(file, row * NUM_LOOKS, NUM_LOOKS).copy())
    return Record(text, parts[0], parts[1] if len(parts) > 1 else None, look)


def _what_was_wrong(text: str, shard: str) -> tuple[str, str]:
    try:
        path, reason = json.loads(text)
    except ValueError:
        return shard, "the reason cannot be read"
    return path, reason


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a file."""

    kind: type
    shape: tuple[int, ...]
    begin: int  # bytes

    def read(self, file: int, first: int, num: int) -> np.ndarray:
        """``num`` of its numbers from number ``first`` on."""
        width = np.dtype(self.kind).itemsize
        if first < 0 or num < 0 or first + num > int(np.prod(self.shape)):
            raise BadFile("its table points beyond its values")
        data = os.pread(file, num * width, self.begin + first * width)
        if len(data) != num * width:
            raise BadFile("ends early")
        return np.frombuffer(data, self.kind)


_headers: OrderedDict[str, dict[str, _Place]] = OrderedDict()


def _header(shard: str) -> dict[str, _Place]:
    if shard not in _headers:
        _headers[shard] = inspect_shard(shard)
        if len(_headers) > HEADERS_KEPT:
            _headers.popitem(last=False)
    return _headers[shard]


def inspect_shard(shard: str) -> dict[str, _Place]:
    """Where its tensors lie. Raises BadFile: missing, no shard of ours, or cut short."""
    try:
        with open(shard, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length + 8 > size:
                raise BadFile("is no shard of cached latents, or ends early", shard)
            header = json.loads(file.read(length))
    except OSError as error:
        raise _bad(shard, error) from None
    except ValueError:
        raise BadFile("is no shard of cached latents: its header cannot be read", shard) from None
    try:
        header.pop("__metadata__", None)
        places = {
            name: _Place(TYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        }
        end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
        fits = places.keys() == {"values", "table", "looks", "texts"} and places["table"].shape[1:] == (len(COLUMNS),)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        fits = False
    if not fits:
        raise BadFile("is no shard of cached latents", shard)
    if end != size:
        raise BadFile(f"has {size} bytes, and its header says {end}", shard)
    return places


def _bad(shard: str, error: OSError) -> Exception:
    if error.errno in OUR_FAULT:
        return error
    return BadFile(f"cannot be read: {error.strerror or error}", shard)


@dataclass
class ShardWriter:
    """Collects records in memory and writes them as one file. ``dtype``: of the values."""

    dtype: type
    values: list[np.ndarray] = field(default_factory=list)
    table: list[tuple[int, ...]] = field(default_factory=list)
    looks: list[Tensor] = field(default_factory=list)
    texts: list[bytes] = field(default_factory=list)
    bad: int = 0
    _size: int = 0  # numbers in values
    _text: int = 0  # bytes in texts

    def __len__(self) -> int:
        return len(self.table)

    def add(self, record: Record) -> None:
        """Raises ValueError for values that the type cannot hold."""
        parts = [record.mean] if record.log_variance is None else [record.mean, record.log_variance]
        with np.errstate(over="ignore"):
            arrays = [np.ascontiguousarray(part.detach().cpu().numpy().astype(self.dtype)).ravel() for part in parts]
        if not all(np.isfinite(array).all() for array in arrays):
            largest = max(part.abs().max().item() for part in parts)
            raise ValueError(
                f"{record.key}: its latent has values that are not finite as {np.dtype(self.dtype).name} (largest {largest:g})"
            )
        checks = [zlib.crc32(array.tobytes()) for array in arrays] + [0]
        self._entry((self._size, *record.mean.shape, len(parts) - 1, checks[0], checks[1]), record.key, record.look)
        self.values += arrays
        self._size += sum(map(len, arrays))

    def add_bad(self, path: str, reason: str) -> None:
        """A clip that could not be read."""
        self._entry((BAD, *[0] * (len(COLUMNS) - 2)), json.dumps([path, reason]), torch.zeros(NUM_LOOKS))
        self.bad += 1

    def _entry(self, columns: tuple[int, ...], text: str, look: Tensor) -> None:
        self.texts.append(text.encode(errors="surrogateescape"))
        self._text += len(self.texts[-1])
        self.table.append((*columns, self._text))
        self.looks.append(look)

    def write(self, path: Path, about: str = "") -> None:
        """Whole or not at all. ``about`` goes into the file's metadata. Raises OSError."""
        empty = np.zeros(0, self.dtype)
        tensors = {
            "values": torch.from_numpy(np.concatenate([empty, *self.values])),
            "table": torch.tensor(self.table, dtype=torch.int64).reshape(-1, len(COLUMNS)),
            "looks": torch.stack(self.looks),
            "texts": torch.from_numpy(np.frombuffer(b"".join(self.texts), np.uint8).copy()),
        }
        put_in_place(path, save(tensors, {"about": about}))  # one entry: safetensors writes several in any order


def put_in_place(path: Path, data: bytes) -> None:
    """Write a file so that a kill leaves the old one or the new one, also where several processes write it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")  # its own: of two writers the last one wins
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_left(folder: Path) -> None:
    """Remove what killed writers left in a cache: temporary files that nobody has written to for LEFT_S."""
    for path in folder.glob("**/.*.tmp"):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - path.stat().st_mtime > LEFT_S:
                path.unlink()
