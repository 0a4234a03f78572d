"""Whether an optimised decoder gives the frames that its plain form gives: errors, and the bounds above which it is refused.

At one small size every plain decoder also runs in float32 on the same weights and latents. Its own error against that is what
its dtype costs, and the measure for all others: an optimised form that only rounds may have a tenth more of it.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.bench_rows import is_lossless

ROUNDING = 1.1  # of the plain decoder's error, that a lossless form may have against float32
OTHER_CODE = 1.5  # that our backbone may have of diffusers' on the same weights: norms are computed in another order
WINOGRAD = 6.0  # that convolutions with fewer products may have
EIGHT_BITS = 0.2  # of the frames' own deviation, root mean square: what a broken scale exceeds many times over
PAIR = 3.0  # of the plain decoder's error, that two forms may differ by: each has its own, and sizes differ
FLOOR = 2e-6  # of values around 1, root mean square: what remains of float32 itself
PEAK = 20.0  # a largest error of so many times the bound says that some pixels are wrong, not rounded
UINT8 = 1 / 127.5 / math.sqrt(12)  # root mean square of rounding to 256 levels of [-1, 1]


@dataclass(frozen=True)
class Difference:
    """Of frames from other frames, in units of [-1, 1]; ``deviation`` is of the frames they are held against."""

    rms: float
    largest: float
    deviation: float

    @property
    def db(self) -> float | None:
        """PSNR over the peak-to-peak range of 2; None where there is no difference."""
        return 20 * math.log10(2 / self.rms) if self.rms else None

    def content(self) -> dict[str, Any]:
        return asdict(self) | {"db": self.db}


def difference(frames: np.ndarray, truth: np.ndarray) -> Difference:
    """Between arrays "b t h w 3" of one shape, both clamped to [-1, 1], to which uint8 is brought: some decoders clamp their
    frames and some leave that to whoever shows them.

    Raises:
        ValueError: other shapes, or frames that are not finite.
    """
    if frames.shape != truth.shape:
        raise ValueError(f"frames of shape {frames.shape} in place of {truth.shape}")
    a, b = (each.astype(np.float32) / 127.5 - 1 if each.dtype == np.uint8 else each for each in (frames, truth))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("some frames are not finite")
    a, b = a.astype(np.float64).clip(-1, 1), b.astype(np.float64).clip(-1, 1)
    error = np.abs(a - b)
    return Difference(float(np.sqrt((error**2).mean())), float(error.max()), float(b.std()))


def against_exact(found: Difference, plain: Difference, way: str, other_code: bool = False) -> str:
    """Why a form is refused for its error against float32, given the plain form's; empty: it is not."""
    return _judge(found, _bound(plain, way, OTHER_CODE if other_code else ROUNDING, found.deviation), "float32")


def against_plain(found: Difference, plain: Difference, way: str) -> str:
    """Why a form is refused for what it differs by from the plain form at a measured size; empty: it is not."""
    return _judge(found, _bound(plain, way, PAIR, found.deviation), "the plain form")


def _bound(plain: Difference, way: str, factor: float, deviation: float) -> float:
    words = way.split("+")
    bound = factor * plain.rms + FLOOR
    if not is_lossless(way):
        bound = max(bound, WINOGRAD * plain.rms + FLOOR)
        if "fast" not in words:
            bound = max(bound, EIGHT_BITS * deviation)
    return math.hypot(bound, UINT8) if "uint8" in words else bound


def _judge(found: Difference, bound: float, what: str) -> str:
    if found.rms > bound:
        return f"differs from {what} by {found.rms:.2g} (root mean square), more than {bound:.2g}"
    if found.largest > PEAK * bound:
        return f"differs from {what} by up to {found.largest:.2g}, more than {PEAK:g} times {bound:.2g}"
    return ""
