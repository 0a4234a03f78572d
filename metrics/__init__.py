"""Metrics: ``(prediction, target) -> score of each frame``, no gradient, with the protocol they were measured under.

The same signatures as the losses. :func:`build` makes them by name; :mod:`metrics.protocol` says when two numbers may
stand in one column. Importing this loads no weights and downloads nothing.
"""

import difflib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metrics.base import Metric

NAMES = ("psnr", "ssim", "lpips_alex", "lpips_vgg", "jump")
LOWER_IS_BETTER = ("lpips_alex", "lpips_vgg", "jump")


def build(
    names: Iterable[str] = ("psnr", "ssim", "lpips_alex"), *, weights: str | os.PathLike | None = None
) -> "list[Metric]":
    """The metrics of these names, in this order.

    ``weights``: file or folder with the LPIPS backbones (a folder serves both); None looks in the usual places
    (:mod:`losses.pretrained`). Raises ValueError for an unknown or repeated name, WeightsNotFound without weights.
    """
    names = list(names)
    for i, name in enumerate(names):
        if name not in NAMES:
            nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
            raise ValueError(f"no metric {name!r}; nearest is {nearest!r}, all are {list(NAMES)}")
        if name in names[:i]:
            raise ValueError(f"metric {name!r} is listed twice")
    return [_build(name, weights) for name in names]


def _build(name: str, weights: str | os.PathLike | None) -> "Metric":
    if name.startswith("lpips_"):
        from metrics.perceptual import LpipsMetric

        return LpipsMetric(name.removeprefix("lpips_"), weights)
    from metrics.image import Psnr, Ssim
    from metrics.motion import Jump

    return {"psnr": Psnr, "ssim": Ssim, "jump": Jump}[name]()
