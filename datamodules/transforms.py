"""From decoded frames to pixels of the right size: geometry as plain functions of numbers, resizing by PIL.

PIL's bicubic is used because it is antialiased, and because the papers' numbers were made with it: a bicubic without
antialiasing (OpenCV's, torch's default) gives other, more aliased frames, and decoders are compared at hundredths of dB.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

Size = int | np.ndarray


class TooSmall(ValueError):
    """The frame would have to be enlarged."""


@dataclass(frozen=True)
class Geometry:
    """Resize a frame to ``resized``, then cut ``size`` out of it at ``offset``. All (vertical, horizontal), pixels."""

    resized: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]

    def __str__(self) -> str:
        """Compact and unique, for a clip's key."""
        return f"{self.offset[0]},{self.offset[1]},{self.size[0]}x{self.size[1]}of{self.resized[0]}x{self.resized[1]}"


def cover(frame: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest (height, width) of ``frame``'s aspect ratio that covers ``size``; one side matches exactly.

    Raises TooSmall where that is larger than the frame.
    """
    (h, w), (height, width) = frame, size
    if h < height or w < width:
        raise TooSmall(f"{h}x{w} is smaller than {height}x{width}")
    if height * w >= width * h:  # height decides: integers, so that equal ratios are exactly equal
        return height, max(width, round(w * height / h))
    return max(height, round(h * width / w)), width


def plan_geometry(
    frame: tuple[int, int],
    size: tuple[int, int],
    mode: str = "crop",
    crop: str = "center",
    position: tuple[float, float] = (0.5, 0.5),
    multiple: int = 16,
    via: tuple[int, int] | None = None,
) -> Geometry:
    """How a frame of (height, width) ``frame`` becomes ``size``.

    ``mode`` and ``via`` are StreamConfig's resize and via, ``crop`` one of center, random, resize, and ``position`` says where
    a random crop lies, each in [0, 1). Raises TooSmall instead of enlarging.
    """
    if mode in ("stretch", "enlarge") or (mode == "crop" and crop == "resize"):
        if mode != "enlarge":
            cover(frame, size)
        return Geometry(resized=size, offset=(0, 0), size=size)
    if mode == "keep":
        short = min(size)
        scaled = cover(frame, (short, short))
        size = tuple(side // multiple * multiple for side in scaled)
    elif mode == "none":
        cover(frame, size)
        scaled = frame
    else:
        scaled = cover(frame, via or size)
    room = tuple(have - want for have, want in zip(scaled, size, strict=True))
    if crop == "random":
        offset = tuple(int(u * (r + 1)) for u, r in zip(position, room, strict=True))
    else:
        offset = tuple(r // 2 for r in room)
    return Geometry(resized=scaled, offset=offset, size=size)


def fits(height: Size, width: Size, size: tuple[int, int], mode: str) -> bool | np.ndarray:
    """Whether frames of these heights and widths, numbers or arrays, can become ``size`` as ``mode`` resizes them."""
    if mode == "enlarge":
        return np.minimum(height, width) > 0
    if mode == "keep":
        return np.minimum(height, width) >= min(size)
    return (height >= size[0]) & (width >= size[1])


def resize_frames(frames: UInt8[np.ndarray, "t h w 3"], size: tuple[int, int]) -> np.ndarray:
    """Antialiased PIL bicubic to (height, width) ``size``; uint8 in, uint8 out."""
    if frames.shape[1:3] == tuple(size):
        return frames
    height, width = size
    out = np.empty((len(frames), height, width, 3), np.uint8)
    for i, frame in enumerate(frames):
        out[i] = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    return out


def crop_frames(frames: UInt8[np.ndarray, "t h w 3"], geometry: Geometry) -> np.ndarray:
    """The part of resized frames that ``geometry`` keeps (a view)."""
    (top, left), (height, width) = geometry.offset, geometry.size
    return frames[:, top : top + height, left : left + width]


def to_video(frames: UInt8[np.ndarray, "t h w 3"]) -> Float[Tensor, "3 t h w"]:
    """uint8 in [0, 255] to float32 in [-1, 1], channels first."""
    video = torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2)))
    return video.to(torch.float32).div_(127.5).sub_(1.0)
