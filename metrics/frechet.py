"""Fréchet video distance: how far a set of decoded clips is from the set of true ones, in a video network's features.

Unterthiner et al. 2018 ("Towards Accurate Generative Models of Video", I3D) and Ge et al. 2024 (content-debiased,
VideoMAE). Both sets are taken as Gaussians; the number is the squared Wasserstein-2 distance between them.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metrics.base import SetMetric, exact_fp32
from metrics.i3d import RESIZE, SIZE, I3d
from metrics.videomae import VideoMae

Backbone = Literal["i3d", "videomae"]
_RANGES = {"i3d": "[-1, 1]", "videomae": "[0, 1], no mean or deviation taken off"}
_LOOKS_LIKE_BYTES = 32.0  # clamping would hide [0, 255]; what a decoder overshoots stays allowed


class Fvd(SetMetric):
    """``fvd_<backbone>_<frames>f``, lower is better.

    Each clip is cut from its first frame into windows of ``frames`` that do not overlap; frames that fill no window
    are not used. All windows of all clips are scored, none twice: nothing is drawn at random. The distance falls with
    their number (a covariance of few points is a bad one), so results carry it in their name, and only equal ones
    compare. ``frames``: 10 or more for I3D, 16 for VideoMAE. ``weights``: file or folder; None looks in the usual
    places. They are found and loaded here, so that what is missing is missing before any work.
    """

    higher_is_better = False

    def __init__(self, backbone: Backbone, frames: int, weights: str | os.PathLike | None = None):
        kinds: dict[str, Any] = {"i3d": I3d, "videomae": VideoMae}
        if backbone not in kinds:
            raise ValueError(f"no Fréchet distance in the features of {backbone!r}; there are {sorted(kinds)}")
        kinds[backbone].check(frames)
        self.name, self.frames, self._range = f"fvd_{backbone}_{frames}f", frames, _RANGES[backbone]
        with torch.inference_mode(False):  # weights made in inference mode could not move out of it again
            self.network: nn.Module = kinds[backbone].load(weights)

    @property
    def protocol(self) -> dict[str, Any]:
        """What defines the number; plain values."""
        return {
            "range": self._range,
            "backbone": self.network.fingerprint,
            "features": self.network.layer,
            "window": f"{self.frames} frames from the first on, without overlap; the rest is not used",
            "resize": f"{SIZE}x{SIZE}, {RESIZE}",
            "rounded_to_8_bits": False,
            "covariance": "unbiased",
            "sampling": "all windows, once",
            "per": "set",
        }

    @torch.no_grad()
    def features(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b windows d"]:
        """Of each window, float32 on the CPU. RGB in [-1, 1], clamped; the network follows it to its device.

        A window goes through the network alone, so memory is bounded and batch size changes no bit. A window that is not
        finite gets NaN. Nothing is kept: who scores several methods asks for the truth's once. Raises ValueError for a
        clip shorter than a window, and for bytes or [0, 255].
        """
        self._check(video)
        starts = range(0, video.shape[2] - self.frames + 1, self.frames)
        with torch.inference_mode(False):
            self.network.to(video.device)
        with exact_fp32(video.device), _exact_matmul():
            windows = [[self._window(clip[None, :, start : start + self.frames]) for start in starts] for clip in video]
        return torch.stack([torch.cat(clip) for clip in windows])

    def score(self, real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"]) -> float:
        """:func:`frechet_distance` of all windows' features. NaN if a decoded window was not finite."""
        if not fake.isfinite().all():
            return float("nan")
        try:
            return frechet_distance(real, fake)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def _check(self, video: Tensor) -> None:
        length = video.shape[2]
        if length < self.frames:
            raise ValueError(
                f"{self.name} needs clips of {self.frames} frames or more, got {length}: score longer clips, or ask for a "
                "metric of shorter windows"
            )
        if not video.is_floating_point():
            raise ValueError(f"{self.name} needs float RGB in [-1, 1], got {video.dtype}: divide by 127.5, less 1")
        low, high = (value.item() for value in video.aminmax())
        if low >= 0 and high > _LOOKS_LIKE_BYTES:
            raise ValueError(f"{self.name} needs RGB in [-1, 1], got values from {low:.4g} to {high:.4g}")

    def _window(self, window: Tensor) -> Tensor:
        """(1, 3, frames, h, w) -> (1, d) on the CPU."""
        if not window.isfinite().all():  # resizing may step over one pixel, and clamping makes infinity white
            window = torch.full_like(window, torch.nan)
        window = window.float().clamp(-1, 1)
        return self.network(self.network.prepare(window)).float().cpu()


def frechet_distance(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"]) -> float:
    """``|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` of two sets of features, in float64; never below 0.

    Covariances are unbiased (divided by the number less one, as in the first FVD; StyleGAN-V and cd-fvd divide by the
    number). A set of one has no covariance: it is taken as 0, so that two single features are their squared distance
    apart. With centred features A and B, ``S1 = A'A/(n-1)`` and ``S2 = B'B/(m-1)``, the trace of the root is the sum of
    the singular values of ``AB'`` over ``sqrt((n-1)(m-1))``: no root of a matrix is taken, nothing turns complex, and
    features that span less than their space (always, with few windows) cost no precision. Raises ValueError for an
    empty set, widths that differ and values that are not finite.
    """
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"features of widths {real.shape[1]} and {fake.shape[1]} do not compare")
    for which, features in (("real", real), ("fake", fake)):
        if len(features) == 0:
            raise ValueError(f"there is no {which} window to score")
        if not features.isfinite().all():
            raise ValueError(
                f"{int((~features.isfinite().all(dim=1)).sum())} {which} windows have features that are not finite"
            )
    (mean1, root1), (mean2, root2) = (_moments(features.detach().cpu().double()) for features in (real, fake))
    traces = root1.square().sum() + root2.square().sum()
    shared = torch.linalg.svdvals(root1 @ root2.T).sum()
    return max(0.0, ((mean1 - mean2).square().sum() + traces - 2 * shared).item())


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and R of at most d rows with ``R'R`` the covariance."""
    mean = features.mean(dim=0)
    root = (features - mean) / max(1, len(features) - 1) ** 0.5
    return mean, root if len(root) <= root.shape[1] else torch.linalg.qr(root, mode="r").R


@contextlib.contextmanager
def _exact_matmul() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
