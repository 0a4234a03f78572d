"""Buckets: one training stream whose films differ in shape and length, split into parts of one size each.

    train:
      video: {sources: [web], share: 0.8, batch_size: 1,
              buckets: {sizes: [[480, 832], [832, 480], [640, 640]], num_frames: [17, 33]}}

makes six streams, ``video/480x832x17`` to ``video/640x640x33``, in the place of one. A batch comes from one of them, the same
on all ranks, so it has one size.

Which film goes where. Of the sizes that a film can fill (``resize`` says what that means), those nearest to it in aspect
ratio, by |log(h / w) - log(H / W)|; of several that differ by less than ``tolerance`` in this, the largest. Of the lengths, the
longest that its usable part can fill at the stream's frame rate, or every one (``lengths: all``). What can fill none is left
out and counted, as in any stream.

How often a bucket comes. The stream's share of the steps is split over its buckets in proportion to clips / batch_size, so that
on average every clip of the stream comes equally often, whatever its bucket. Buckets without a film get no steps, with a warning.

How many clips a step has. ``batch: tokens``: ``batch_size`` is that of the costliest bucket, and the others get as many clips as
cost no more: max(1, floor(batch_size * largest cost / own cost)), where a clip costs latent frames x height x width and t frames
are 1 + ceil((t - 1) / stride_t) latent frames. ``batch: equal``: ``batch_size`` everywhere. ``batch_sizes`` says it for single ones.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

Config = TypeVar("Config")  # StreamConfig, which has a field of the class below


@dataclass
class BucketsConfig:
    """The sizes and lengths of one stream. See the module's docstring for the rules."""

    sizes: list[list[int]] = field(default_factory=list)
    """[height, width] of each, in pixels. Empty: the stream's ``size`` alone; given, that is not used."""
    num_frames: list[int] = field(default_factory=list)
    """Lengths in frames. Empty: the stream's ``num_frames`` alone; given, that is not used."""
    lengths: Literal["longest", "all"] = "longest"
    """longest: a film goes to the longest length that it fills. all: to each, and so comes several times in an epoch."""
    batch: Literal["tokens", "equal"] = "tokens"
    """tokens: ``batch_size`` is that of the costliest bucket, cheaper ones get more clips. equal: ``batch_size`` in all."""
    batch_sizes: dict[str, int] = field(default_factory=dict)
    """Clips per process and step of single buckets, {480x832x17: 2}; of the others ``batch`` decides."""
    stride_t: int = 4
    """Frames per latent frame, for the cost of a clip; 1 counts pixels."""
    tolerance: float = 0.05
    """Aspect ratios whose logarithms differ by less count as equally near: 0.05 is 5 %."""

    def __post_init__(self) -> None:
        if any(len(size) != 2 or min(size) < 1 for size in self.sizes):
            raise ValueError(f"sizes must be [height, width] in pixels, each at least 1, got {self.sizes}")
        if any(length < 1 for length in self.num_frames):
            raise ValueError(f"num_frames must be at least 1, got {self.num_frames}")
        for name, values in (("sizes", [tuple(size) for size in self.sizes]), ("num_frames", self.num_frames)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has an entry twice: {getattr(self, name)}")
        if not self.sizes and not self.num_frames:
            raise ValueError("buckets need sizes: [[height, width], ...], num_frames: [...], or both")
        if self.stride_t < 1 or self.tolerance < 0 or any(size < 1 for size in self.batch_sizes.values()):
            raise ValueError(
                f"stride_t and batch_sizes must be at least 1 and tolerance not negative, got {self.stride_t}, "
                f"{self.batch_sizes}, {self.tolerance}"
            )


def expand(stream: Config) -> dict[str, Config]:
    """``/HxWxT`` -> the config of that bucket, for a StreamConfig with buckets; {"": stream} for one without.

    Every one has the stream's whole share: how it is split is known when the films are (``streams.build_streams``). Raises
    ValueError for settings that no bucket can have, and for a batch size of a bucket that is not there.
    """
    buckets = stream.buckets
    if buckets is None:
        return {"": stream}
    if stream.via is not None or stream.resize == "keep" or stream.num_clips is not None:
        raise ValueError(
            "buckets say which sizes there are and use every clip: no via, resize: keep or num_clips with them"
        )
    sizes = [tuple(size) for size in buckets.sizes] or [stream.size]
    shapes = [(*size, length) for size in sizes for length in buckets.num_frames or [stream.num_frames]]
    names = {shape: "x".join(map(str, shape)) for shape in shapes}
    if unknown := sorted(buckets.batch_sizes.keys() - names.values()):
        raise ValueError(f"buckets.batch_sizes: there is no bucket {unknown[0]!r}, only {', '.join(names.values())}")
    beside = sum(stream.extend)  # frames of extend are decoded and encoded too
    costs = {(h, w, t): h * w * (1 + math.ceil((t + beside - 1) / buckets.stride_t)) for h, w, t in shapes}
    largest, parts = max(costs.values()), {}
    for (height, width, length), name in names.items():
        size = stream.batch_size
        if buckets.batch == "tokens":
            size = max(1, size * largest // costs[height, width, length])
        parts[f"/{name}"] = dataclasses.replace(
            stream,
            size=(height, width),
            num_frames=length,
            batch_size=buckets.batch_sizes.get(name, size),
            buckets=None,
        )
    return parts


def nearest_size(
    height: np.ndarray, width: np.ndarray, sizes: list[tuple[int, int]], filled: list[np.ndarray], tolerance: float
) -> np.ndarray:
    """Which of ``sizes`` each film of these heights and widths goes to; -1 where it can fill none.

    ``filled`` says for every size which films can fill it. Size by size, as there may be millions of films.
    """
    shape = np.log(height / width)

    def distance(i: int) -> np.ndarray:
        return np.where(filled[i], np.abs(shape - math.log(sizes[i][0] / sizes[i][1])), np.inf)

    least = np.full(len(shape), np.inf)
    for i in range(len(sizes)):
        np.minimum(least, distance(i), out=least)
    chosen, area_of, distance_of = np.full(len(shape), -1, np.int16), np.zeros(len(shape)), np.full(len(shape), np.inf)
    for i, (h, w) in enumerate(
        sizes
    ):  # the largest of those that are near; of equally large ones the nearest, then the first
        own = distance(i)
        better = (h * w > area_of) | ((h * w == area_of) & (own < distance_of))
        better &= filled[i] & (own <= least + tolerance)
        chosen[better], area_of[better], distance_of[better] = i, h * w, own[better]
    return chosen


def longest_only(long: list[np.ndarray], lengths: list[int]) -> list[np.ndarray]:
    """``long`` says for every length which films can fill it; what is left has nothing but the longest of each film."""
    kept, taken = list(long), np.zeros_like(long[0])
    for i in np.argsort(lengths)[::-1]:
        kept[i] = long[i] & ~taken
        taken = taken | long[i]
    return kept
