"""What a training step asks for: which frames of a clip are encoded, which are wanted, and when those are.

Section 3.2 and B.2.2 of arXiv 2503.08665: one scenario per step, drawn with probabilities that move during training. With
``k + 1`` frames in a chunk, whose times are 0 to 1 in steps of ``1 / k``:

reconstruct   the encoded frames themselves.
interpolate   every second frame of a window of ``2 k + 1`` is encoded; ``k + 1`` frames in a row of the window are wanted,
              in half steps of time.
extrapolate   frames ``d`` later or earlier than those encoded; where ``d`` is -1, sometimes the encoded ones besides:
              ``k + 2`` frames, which is what latent extension decodes (B.4).

The probabilities, ``d`` and the windows are ours; the paper gives none.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

Task = Literal["reconstruct", "interpolate", "extrapolate"]
NEAR = 0.5  # share of the extrapolations that go one frame; the others go 1 to k
EXTENDED = 0.5  # share of the extrapolations by one frame back that want the encoded frames too


@dataclass(frozen=True)
class Wanted:
    """Frames of a clip, by their distance from the first that is encoded.

    Attributes:
        encoded: k + 1 frames of one chunk, or one of an image.
        frames: those that are wanted.
        times: when they are; 0 is the first encoded frame, 1 the last.
        length: of the clip.
    """

    encoded: tuple[int, ...]
    frames: tuple[int, ...]
    times: tuple[float, ...]
    length: int

    @property
    def stride(self) -> int:
        """Distance of neighbouring encoded frames."""
        return self.encoded[1] - self.encoded[0] if len(self.encoded) > 1 else 1

    def draw_start(self, generator: torch.Generator) -> int:
        """A place for the first encoded frame, such that all are within the clip."""
        both = (*self.encoded, *self.frames)
        return _integer(-min(both), self.length - 1 - max(both), generator)

    def starts(self, pairs: Iterable[int]) -> dict[int, int]:
        """Of pairs that lie end to end from the clip's first frame: the first frames of those whose wanted frames the clip
        has."""
        span = self.encoded[-1]
        found = {pair: pair * span for pair in pairs}
        low, high = min(self.frames), max(self.frames)
        return {pair: start for pair, start in found.items() if start + low >= 0 and start + high < self.length}


def draw_task(interpolation: float, extrapolation: float, generator: torch.Generator) -> Task:
    """The scenario of a step; what the two probabilities leave is reconstruction."""
    drawn = torch.rand((), generator=generator).item()
    if drawn < interpolation:
        return "interpolate"
    return "extrapolate" if drawn < interpolation + extrapolation else "reconstruct"


def needed_frames(task: Task, k: int) -> int:
    """The shortest clip that has frames for ``task``."""
    return {"reconstruct": k + 1, "interpolate": 2 * k + 1, "extrapolate": k + 2}[task]


def draw_wanted(task: Task, length: int, k: int, generator: torch.Generator) -> Wanted:
    """What ``task`` wants of a clip of ``length`` frames. A lone frame is an image and is reconstructed.

    Raises:
        ValueError: the clip is too short for the task.
    """
    if length == 1:
        return Wanted((0,), (0,), (0.0,), length)
    if length < needed_frames(task, k):
        raise ValueError(
            f"a clip of {length} frames: to {task} with k = {k} takes {needed_frames(task, k)} or more; lengthen the streams "
            "of data.train, or set the probability of the task to 0"
        )
    chunk = range(k + 1)
    if task == "interpolate":
        first = _integer(0, k, generator)
        frames = range(first, first + k + 1)
        return Wanted(tuple(2 * i for i in chunk), tuple(frames), tuple(i / (2 * k) for i in frames), length)
    frames = chunk
    if task == "extrapolate":
        near = torch.rand((), generator=generator).item() < NEAR
        shift = 1 if near else _integer(1, min(k, length - k - 1), generator)
        shift *= -1 if torch.rand((), generator=generator).item() < 0.5 else 1
        frames = range(shift, shift + k + 1)
        if shift == -1 and torch.rand((), generator=generator).item() < EXTENDED:
            frames = range(-1, k + 1)
    return Wanted(tuple(chunk), tuple(frames), tuple(i / k for i in frames), length)


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """One of ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
