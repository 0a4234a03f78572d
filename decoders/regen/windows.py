"""Which frames are decoded together: whole pairs of latent frames, or the times that were asked for.

A pair of latent frames, content and motion, stands for k + 1 frames at times i / k, i = 0 .. k, where k = stride_t.

- A chunked space (REGEN's own encoder) has pairs (0, 1), (2, 3), ...; each has k + 1 frames of its own.
- A causal space has pairs (0, 1), (1, 2), ...; the first frame of a pair is the last of the pair before, where it is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor


@dataclass(frozen=True)
class Window:
    """Frames that are decoded together, all of one pair of latent frames.

    Attributes:
        pair: number of the pair.
        times: of the frames, in chunks: 0 is the pair's first frame, 1 its last.
        frames: those that are wanted; the others are only context.
        outputs: where they go in the video, one for each of ``frames``.
        guided: the first frame is the last of the window before (latent extension).
    """

    pair: int
    times: tuple[float, ...]
    frames: tuple[int, ...]
    outputs: tuple[int, ...]
    guided: bool = False


def num_pairs(n: int, chunked: bool) -> int:
    """Pairs of ``n`` latent frames; 0 for an image.

    Raises:
        ValueError: chunks of two latent frames each do not add up to ``n``.
    """
    if n < 1:
        raise ValueError("a latent without frames")
    if n == 1:
        return 0
    if chunked and n % 2:
        raise ValueError(
            f"{n} latent frames: chunks have two each, content and motion, so a video has an even number and an image one"
        )
    return n // 2 if chunked else n - 1


def num_frames(n: int, k: int, chunked: bool) -> int:
    """Pixel frames of ``n`` latent frames."""
    pairs = num_pairs(n, chunked)
    return pairs * (k + 1) if chunked and pairs else 1 + pairs * k


def latents_of(pair: int, chunked: bool) -> slice:
    """The two latent frames of a pair."""
    first = 2 * pair if chunked else pair
    return slice(first, first + 2)


def whole_pair(pair: int, k: int, chunked: bool, extension: bool) -> Window:
    """All frames of a pair. With ``extension`` a chunk is decoded from the frame before it on (2.6 of section B.4)."""
    later = pair > 0
    if chunked:
        before = int(later and extension)
        times = range(-before, k + 1)
        outputs = range(pair * (k + 1), (pair + 1) * (k + 1))
    else:
        before = int(later)  # the frame that two pairs share comes from the first of them
        times = range(k + 1)
        outputs = range(pair * k + before, (pair + 1) * k + 1)
    frames = range(before, len(times))
    return Window(pair, tuple(i / k for i in times), tuple(frames), tuple(outputs), guided=later and extension)


def asked(times: Sequence[float | int], n: int, k: int, chunked: bool) -> list[Window]:
    """Windows for ``times``, in frames of the decoded clip and in any order: every pair's in order of time, at most k + 1
    together, as in training. Between two chunks the nearer one answers; before and after the clip its ends do.

    Asked for every frame of the clip, they are the windows of all whole pairs.
    """
    pairs, step = num_pairs(n, chunked), k + chunked
    wanted: dict[int, dict[float, list[int]]] = {}
    for output, time in enumerate(times):
        pair = floor(time / step) if chunked else ceil(time / step) - 1
        if chunked and time - pair * step > k + 0.5:
            pair += 1
        pair = min(max(pair, 0), pairs - 1)
        wanted.setdefault(pair, {}).setdefault((time - pair * step) / k, []).append(output)
    windows = []
    for pair in sorted(wanted):
        local = sorted(wanted[pair])
        if not chunked and pair and local[0] > 0:
            local = [0.0, *local]  # the shared frame as context, as in a whole pair
        for start in range(0, len(local), k + 1):
            part = local[start : start + k + 1]
            places = [(frame, output) for frame, t in enumerate(part) for output in wanted[pair].get(t, ())]
            if places:
                windows.append(Window(pair, tuple(part), *map(tuple, zip(*places, strict=True))))
    return windows
