"""PSNR and SSIM of RGB frames in [-1, 1]."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from metrics.base import Metric, masked_mean

PEAK = 2.0  # width of [-1, 1]
CAP_DB = 100.0  # an exact copy has no finite PSNR; a mean over frames must stay a number


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
        return decibels(masked_mean((prediction - target).square(), mask))


def decibels(mse: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Mean squared error of values in [-1, 1] -> PSNR in dB, at most 100. NaN stays NaN."""
    return (10 * torch.log10(PEAK**2 / mse)).clamp(max=CAP_DB)


def psnr_per_video(
    prediction: Float[Tensor, "b 3 t h w"],
    target: Float[Tensor, "b 3 t h w"],
    mask: Float[Tensor, "b 1 t h w"] | None = None,
) -> Float[Tensor, " b"]:
    """PSNR of the error over a whole clip (frames weigh by what counts in them).

    At most the mean of the frames' PSNRs. Papers differ in which of the two they print; the suite's ``psnr`` is per
    frame.
    """
    mse = _Mse()(prediction, target, mask)
    if mask is None:
        return decibels(mse.mean(dim=1))
    weight = mask.float().sum(dim=(1, 3, 4))
    return decibels((mse * weight).sum(dim=1) / weight.sum(dim=1))


class Ssim(Metric):
    """Structural similarity (Wang et al. 2004): Gaussian window 11, sigma 1.5, K1 0.01, K2 0.03, mean over RGB.

    torchmetrics' computation: borders are reflected, so the map has the frame's size. With a mask the map is
    averaged over the pixels that count. Frames need 6 pixels or more a side.
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
        _, full = structural_similarity_index_measure(
            prediction, target, sigma=1.5, kernel_size=11, data_range=PEAK, k1=0.01, k2=0.03,
            reduction="none", return_full_image=True,
        )  # fmt: skip
        return masked_mean(full, mask)


class _Mse(Metric):
    name, higher_is_better, protocol = "mse", False, {}

    def _frames(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        return masked_mean((prediction - target).square(), mask)
