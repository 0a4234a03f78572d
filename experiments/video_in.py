"""Videos as the command line reads them: a file, upright, with the times of its frames, or a folder of images.

A video whose frame rate varies (phones, screen recordings) keeps the time of every frame: what is made of it is shown at the
same times. Without the trainer's libraries."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
from torch import Tensor

from datamodules.faults import BadFile
from datamodules.probe import inspect_image, inspect_video
from datamodules.replay import read_film
from datamodules.stills import load_image
from datamodules.transforms import to_video
from experiments.video_kinds import IMAGE_SUFFIXES

UNEVEN, UNEVEN_S = (
    0.3,
    2e-3,
)  # a gap is uneven if it differs from the mean by more than both: containers round times to 1 ms


@dataclass(frozen=True)
class Film:
    """A video that can be read: size in pixels as displayed, number of frames, and when they are shown.

    ``seconds`` are counted from the first frame; None: evenly spaced, ``fps`` to a second. ``images``: a folder's, in order of
    their names, numbers in them as numbers: 2.png before 10.png.
    """

    path: str
    height: int
    width: int
    num_frames: int
    fps: float
    seconds: list[float] | None = None
    images: tuple[str, ...] = ()
    pixel: Fraction = Fraction(1)  # a pixel's width over its height, as the file says

    def frames(self) -> Iterator[np.ndarray]:
        """All frames, uint8 [h, w, 3], upright. Raises BadFile, perhaps after some frames."""
        found = 0
        for frame in self._images() if self.images else read_film(self.path):
            if frame.shape[:2] != (self.height, self.width):
                raise BadFile(
                    f"frame {found} is {frame.shape[0]}x{frame.shape[1]}, the first {self.height}x{self.width}: cut it where "
                    "its size changes"
                )
            found += 1
            if found > self.num_frames:
                raise BadFile(
                    f"more than the {self.num_frames} frames that it announces come out of it; remux it to mp4"
                )
            yield frame
        if found < self.num_frames:
            raise BadFile(f"damaged or cut short: {self.num_frames} frames are announced, {found} can be decoded")

    def _images(self) -> Iterator[np.ndarray]:
        return (load_image(path)[0] for path in self.images)


def open_film(path: str | Path, fps: float | None = None) -> Film:
    """A video file, or a folder of images, which needs ``fps``. ``fps`` replaces what a file says of its frames' times.

    Raises BadFile.
    """
    path = Path(path)
    if path.is_dir():
        return _open_images(path, fps)
    info = inspect_video(str(path))
    times = shown_times(str(path))
    seconds = None if fps or even(times) else times.tolist()
    return Film(str(path), info.height, info.width, len(times), fps or info.fps, seconds, pixel=_pixel(str(path)))


def shown_times(path: str) -> np.ndarray:
    """When the frames of a sound file (``inspect_video``) are shown, in seconds from the first, ascending; reads all packets and
    decodes none. Frames that an edit list cuts off, as phones' trimming does, are not shown."""
    with av.open(path) as container:
        stream = container.streams.best("video")
        stamps = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        times = np.sort(np.array(stamps, dtype=np.float64)) * float(stream.time_base)
    if not len(times):
        raise BadFile("its edit list leaves no frame to be shown")
    return times - times[0]


def _pixel(path: str) -> Fraction:
    with av.open(path) as container:
        return container.streams.best("video").sample_aspect_ratio or Fraction(1)


def even(times: np.ndarray) -> bool:
    """Whether frames at these times have one rate, as far as containers' rounding lets one see."""
    if len(times) < 3:
        return True
    gaps = np.diff(times)
    return bool(np.abs(gaps - gaps.mean()).max() <= max(UNEVEN * gaps.mean(), UNEVEN_S))


def _open_images(folder: Path, fps: float | None) -> Film:
    found = [
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    ]
    images = tuple(str(path) for path in sorted(found, key=_by_number))
    if not images:
        raise BadFile("a folder without images")
    if not fps:
        raise BadFile("a folder of images has no frame rate: give one, such as --fps 24")
    first = inspect_image(images[0])
    return Film(str(folder), first.height, first.width, len(images), fps, images=images)


def _by_number(path: Path) -> tuple[list[tuple[int, str]], str]:
    parts = re.findall(r"[0-9]+|[^0-9]+", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name


def pieces(frames: Iterable[np.ndarray], chunk: int) -> Iterator[Tensor]:
    """A film's frames, uint8 [h, w, 3], as clips "1 3 t h w" in [-1, 1] of ``chunk`` frames, the last perhaps shorter."""
    frames = iter(frames)
    while some := list(islice(frames, chunk)):
        yield to_video(np.stack(some))[None]


def frames_at(frames: Iterable[np.ndarray], numbers: list[int]) -> Tensor | int:
    """The frames of these numbers as references "1 3 r h w"; the number of the first that does not come, if one does not."""
    found = {}
    for number, frame in enumerate(frames):
        if number in numbers:
            found[number] = frame
        if number >= max(numbers):
            break
    if lost := [number for number in numbers if number not in found]:
        return lost[0]
    return to_video(np.stack([found[number] for number in numbers]))[None]
