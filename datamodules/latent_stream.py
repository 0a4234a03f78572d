"""Latent files of any length in bounded memory: written as they are encoded, read a few latent frames at a time.

The format is that of ``latents.py``, with these strings more in the metadata, all optional:

    frames    pixel frames of the video; fewer than the latent stands for where its last frame was repeated to fill it
    seconds   when every frame is shown, a JSON list, for a video whose frame rate varies
    piece     latent frames after which coding starts anew (an encoder without a stream); the last piece may be shorter

Height and width are the video's, and may be less than the latent's: the rest is padding, to be cut off again.
"""

import json
import os
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from datamodules.faults import BadFile
from datamodules.latents import read_header
from datamodules.whole import whole

LOOKED_AT = 64  # latent frames, evenly spread, of which mean and standard deviation are measured
LATEST = 1e7  # seconds, four months: what a container's clock can tell
COPIED = 1 << 24  # bytes that are brought into their final order at once

Assumed = Literal["normalised", "raw"]
Statistics = tuple[Sequence[float], Sequence[float]]  # mean and std of raw latents, per channel


class LatentReader:
    """An open file of latents; gives them normalised, float32.

    Args:
        path: .safetensors or .pt.
        assume: what the latents are, whatever the file says; None: what it says, and where it says nothing, normalised. Their
            values are not judged here: who knows the space does (``sample``).
        statistics: of the latent space, for raw latents of a file that does not state them.

    Attributes:
        header: the tensor's shape and what the file says (``LatentHeader``).
        num_frames: pixel frames, 0 where the file does not say.
        seconds: times of the frames, None where they are evenly spaced.
        piece: latent frames after which coding starts anew, 0: never.
        said: "true", "false" or "", what the file says of being normalised.

    Raises:
        BadFile: not a readable latent; or raw, and nobody knows the statistics.
    """

    def __init__(self, path: str | Path, assume: Assumed | None = None, statistics: Statistics | None = None) -> None:
        self.path = str(path)
        self.header, entries, self.said = read_header(self.path, assume, statistics)
        self.num_frames = _count(entries, "frames")
        self.piece = _count(entries, "piece")
        self.seconds = _seconds(entries, self.num_frames)
        self._values = self._open()

    def _open(self) -> Any:
        """What slices of the tensor are taken from; by memory map where the format allows it."""
        if not self.path.lower().endswith(".pt"):
            return safe_open(self.path, framework="pt").get_slice("latent")
        content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path))
        return content if isinstance(content, Tensor) else content.get("latents", content.get("latent"))

    def read(self, start: int, stop: int) -> Float[Tensor, "c n y x"]:
        """Latent frames ``start`` to ``stop``, normalised. Raises BadFile: not finite."""
        h = self.header
        shape = list(self._values.get_shape() if hasattr(self._values, "get_shape") else self._values.shape)
        cut = self._values[:, :, start:stop] if len(shape) == 5 else self._values[:, start:stop]
        latent = cut.reshape(h.channels, -1, h.rows, h.columns).float()
        if h.mean is not None:
            mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (h.mean, h.std))
            latent = (latent - mean) / std
        if not latent.isfinite().all():
            raise BadFile(f"holds values that are not finite, in latent frames {start} to {stop - 1}")
        return latent

    def __iter__(self) -> Iterator[Float[Tensor, "c 1 y x"]]:
        for number in range(self.header.frames):
            yield self.read(number, number + 1)

    def sample(self) -> Float[Tensor, "c n y x"]:
        """At most ``LOOKED_AT`` latent frames, evenly spread: what statistics are measured on. Raises BadFile."""
        n = self.header.frames
        chosen = sorted({round(i) for i in np.linspace(0, n - 1, min(n, LOOKED_AT))})
        return torch.cat([self.read(number, number + 1) for number in chosen], 1)


class LatentWriter:
    """Writes a .safetensors file of latents part by part, whole or not at all: a context manager.

    Parts are kept in a temporary file beside ``path``, in the order of time, and are put into the format's order, channels first,
    on leaving; so the file system needs room for the file twice.

    Args:
        path: to be written.
        metadata: strings, as ``latents.py`` and the top of this file have them; more may be added until leaving.
    """

    def __init__(self, path: str | Path, metadata: Mapping[str, str]) -> None:
        self.path, self.metadata = Path(path), dict(metadata)
        self.num_latent_frames = 0
        self._shape: tuple[int, int, int] | None = None  # c, y, x
        self._spool: BinaryIO | None = None

    def __enter__(self) -> "LatentWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._spool = tempfile.TemporaryFile(dir=self.path.parent, prefix=".encoding-")
        return self

    def write(self, latent: Float[Tensor, "c n y x"]) -> None:
        """The next latent frames; stored as float32."""
        shape = (latent.shape[0], *latent.shape[2:])
        if self._shape not in (None, shape):
            raise ValueError(f"latent frames of {shape} (c y x) after some of {self._shape}")
        self._shape = shape
        self._spool.write(latent.detach().float().cpu().transpose(0, 1).contiguous().numpy().tobytes())
        self.num_latent_frames += latent.shape[1]

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        with self._spool:
            if kind is None:
                self._assemble()

    def _assemble(self) -> None:
        if not self.num_latent_frames:
            raise ValueError("no latents were written")
        channels, rows, columns = self._shape
        n, each = self.num_latent_frames, rows * columns * 4
        shape = [channels, n, rows, columns]
        about = {"dtype": "F32", "shape": shape, "data_offsets": [0, channels * n * each]}
        header = json.dumps({"__metadata__": self.metadata, "latent": about}).encode()
        header += b" " * (-len(header) % 8)  # as the format wants it: the values begin at a multiple of 8
        self._spool.flush()
        with whole(self.path) as temporary, open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for channel in range(channels):
                for data in self._channel(channel, n, channels, each):
                    file.write(data)

    def _channel(self, channel: int, n: int, channels: int, each: int) -> Iterator[bytes]:
        """A channel's values over all latent frames, some frames at a time."""
        parts: list[bytes] = []
        held = 0
        for number in range(n):
            parts.append(os.pread(self._spool.fileno(), each, (number * channels + channel) * each))
            held += each
            if held >= COPIED or number == n - 1:
                yield b"".join(parts)
                parts, held = [], 0


def _count(entries: Mapping[str, Any], key: str) -> int:
    value = entries.get(key)
    if value in (None, ""):
        return 0
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if number < 1:
        raise BadFile(f"its metadata's {key} is {str(value)[:40]!r}, which is no number of frames")
    return number


def _seconds(entries: Mapping[str, Any], num_frames: int) -> list[float] | None:
    value = entries.get("seconds")
    if not value:
        return None
    try:
        times = [float(time) for time in json.loads(value)]
    except (TypeError, ValueError):
        raise BadFile("its metadata's seconds are no list of times") from None
    bounded = all(0 <= time <= LATEST for time in times)
    if len(times) != num_frames or not bounded or not all(a < b for a, b in zip(times, times[1:], strict=False)):
        raise BadFile(f"its metadata's seconds are not {num_frames} ascending times, the first 0 or later")
    return times
