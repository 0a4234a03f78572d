"""PSNR and SSIM of RGB frames in [-1, 1]."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from metrics.base import Metric, masked_mean

PEAK = 2.0  # width of [-1, 1]
CAP_DB = 100.0  # an exact copy has no finite PSNR; a mean over frames must stay a number
_K1, _K2, _SIGMA, _REACH = 0.01, 0.03, 1.5, 5  # SSIM's constants; a window of 2 * 5 + 1


class Psnr(Metric):
    """``10 log10(peak^2 / mse)`` in dB per frame, mse over the RGB values that count, peak 2.

    At most 100 dB (mse 4e-10), which is what identical frames get. Nothing is rounded to 8 bits (which alone would
    cost a perfect prediction all above 58.9 dB).
    """

    name, higher_is_better = "psnr", True

    @property
    def protocol(self) -> dict[str, Any]:
        return {"range": "[-1, 1]", "peak": PEAK, "cap_db": CAP_DB, "per": "frame", "rounded_to_8_bits": False}

    def _frames(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        return _psnr(prediction, target, mask)


class PsnrVideo(Metric):
    """PSNR of a clip's mean squared error: the frames' scores are :class:`Psnr`'s, only the clip's differs.

    At most the mean of the frames' PSNRs; every frame weighs the same, whatever a mask leaves of it. Papers differ in
    which of the two they print; the suite's ``psnr`` is the mean over frames.
    """

    name, higher_is_better = "psnr_video", True

    @property
    def protocol(self) -> dict[str, Any]:
        return {"range": "[-1, 1]", "peak": PEAK, "cap_db": CAP_DB, "per": "clip", "rounded_to_8_bits": False}

    def clip_score(self, frames: Float[Tensor, " t"]) -> float:
        """PSNR of the mean of the frames' errors."""
        mse = PEAK**2 * 10 ** (-frames.double() / 10)
        return decibels(mse.mean()).item()

    def _frames(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        return _psnr(prediction, target, mask)


def decibels(mse: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Mean squared error of values in [-1, 1] -> PSNR in dB, at most 100. NaN stays NaN."""
    return (10 * torch.log10(PEAK**2 / mse)).clamp(max=CAP_DB)


class Ssim(Metric):
    """Structural similarity (Wang et al. 2004): Gaussian window 11, sigma 1.5, K1 0.01, K2 0.03, mean over RGB.

    Borders are reflected, so the map has the frame's size; torchmetrics' numbers at a tenth of its time. With a mask
    the map is averaged over the pixels that count. Frames need 6 pixels or more a side.
    """

    name, higher_is_better = "ssim", True
    _smallest = 6  # reflecting 5 pixels takes 6

    @property
    def protocol(self) -> dict[str, Any]:
        window = {"window": "gaussian 11, sigma 1.5", "k1": 0.01, "k2": 0.03, "border": "reflect"}
        return {"range": "[-1, 1]", "peak": PEAK, "channels": "mean over RGB", "per": "frame"} | window

    def _frames(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        if min(prediction.shape[-2:]) < self._smallest:
            raise ValueError(f"SSIM needs frames of 6x6 or more, got {'x'.join(map(str, prediction.shape[-2:]))}")
        masks = [None] * len(target) if mask is None else mask.split(1)
        frames = zip(prediction.split(1), target.split(1), masks, strict=True)  # a frame's maps fit into a CPU's cache
        return torch.cat([masked_mean(_ssim_map(ours, theirs), counts) for ours, theirs, counts in frames])


def _psnr(prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    return decibels(masked_mean((prediction - target).square(), mask))


def _ssim_map(one: Float[Tensor, "frames 3 h w"], other: Float[Tensor, "frames 3 h w"]) -> Tensor:
    """Equation 13 of Wang et al. 2004 at every pixel. The window is separable: two passes of 11 taps instead of 121."""
    means = _blur(torch.cat([one, other, one.square(), other.square(), one * other], dim=1)).chunk(5, dim=1)
    mean_one, mean_other, square_one, square_other, product = means
    of_means, of_both = mean_one * mean_other, mean_one.square() + mean_other.square()
    c1, c2 = (_K1 * PEAK) ** 2, (_K2 * PEAK) ** 2
    numerator = (2 * of_means + c1) * (2 * (product - of_means) + c2)
    return numerator / ((of_both + c1) * (square_one + square_other - of_both + c2))


def _blur(maps: Float[Tensor, "frames c h w"]) -> Float[Tensor, "frames c h w"]:
    offsets = torch.arange(-_REACH, _REACH + 1, dtype=maps.dtype, device=maps.device)
    taps = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    taps, channels = (taps / taps.sum()).expand(maps.shape[1], 1, 1, -1), maps.shape[1]
    padded = F.pad(maps, (_REACH,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, taps, groups=channels), taps.transpose(2, 3), groups=channels)
