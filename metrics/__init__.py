"""Metrics: ``(prediction, target) -> score of each frame``, no gradient, with the protocol they were measured under.

The same signatures as the losses; a few score a set of clips instead (:class:`metrics.base.SetMetric`). :func:`build`
makes them by name; :mod:`metrics.protocol` says when two numbers may stand in one column. Importing this loads no
weights and downloads nothing.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metrics.base import Metric, SetMetric

_HIGHER = {  # name -> higher is better
    "psnr": True,
    "psnr_video": True,
    "ssim": True,
    "lpips_alex": False,
    "lpips_vgg": False,
    "jump": False,
    "flicker": False,
    "tlpips_alex": False,
    "warp_dis": False,
    "warp_raft": False,
    "clip_consistency": True,
}
NAMES = tuple(_HIGHER)
FVD_NAMES = ("fvd_i3d_16f", "fvd_videomae_16f")  # examples: any number of frames stands for 16
WEIGHTS = ("lpips", "i3d", "videomae", "raft", "clip")  # keys of ``weights``
_FVD = re.compile(r"fvd_(i3d|videomae)_([1-9]\d*)f")

_Path = str | os.PathLike


def build(
    names: Iterable[str] = ("psnr", "ssim", "lpips_alex"), *, weights: Mapping[str, _Path] | _Path | None = None
) -> "list[Metric | SetMetric]":
    """The metrics of these names, in this order.

    ``weights``: network -> file or folder. ``lpips``: the backbones (a folder serves both), ``i3d``, ``videomae``,
    ``raft``: a file, ``clip``: a folder as transformers saves it. A path alone is LPIPS's. None looks in the usual
    places (:mod:`losses.pretrained`) for what has one. Raises ValueError for an unknown or repeated name and an
    unknown network, WeightsNotFound without weights.
    """
    names, files = list(names), _files(weights)
    for i, name in enumerate(names):
        _known(name)
        if name in names[:i]:
            raise ValueError(f"metric {name!r} is listed twice")
    return [_build(name, files) for name in names]


_OF_TRUTH = ("flicker", "tlpips_alex", "warp_dis", "warp_raft", "clip_consistency")


def higher_is_better(column: str) -> bool:
    """Which way is up in a column: a metric's name, or one with a suffix (``psnr_others``, ``fvd_i3d_16f_n120``).

    Raises ValueError if no metric has this column.
    """
    if re.fullmatch(f"{_FVD.pattern}(_.*)?", column):
        return False
    for name in sorted(_HIGHER, key=len, reverse=True):
        if column == name or column.startswith(f"{name}_"):
            return _HIGHER[name]
    raise ValueError(f"no metric has the column {column!r}; metrics are {[*NAMES, *FVD_NAMES]}")


def truth_has_value(column: str) -> bool:
    """Whether the truth itself has a score worth a row: of what looks at the prediction's own change over time, less is not
    better but by leave of the truth's."""
    return any(column == name or column.startswith(f"{name}_") for name in _OF_TRUTH)


def _files(weights: Mapping[str, _Path] | _Path | None) -> dict[str, _Path]:
    if weights is None:
        return {}
    if not isinstance(weights, Mapping):
        return {"lpips": weights}
    for key in weights:
        if key not in WEIGHTS:
            nearest = difflib.get_close_matches(key, WEIGHTS, n=1, cutoff=0.0)[0]
            raise ValueError(f"no metric has weights {key!r}; nearest is {nearest!r}, all are {list(WEIGHTS)}")
    return dict(weights)


def _known(name: str) -> None:
    if name in _HIGHER or _FVD.fullmatch(name):
        return
    every = [*NAMES, *FVD_NAMES]
    nearest = difflib.get_close_matches(name, every, n=1, cutoff=0.0)[0]
    raise ValueError(f"no metric {name!r}; nearest is {nearest!r}, all are {every} (any number of frames for 16)")


def _build(name: str, files: Mapping[str, _Path]) -> "Metric | SetMetric":
    if fvd := _FVD.fullmatch(name):
        from metrics.frechet import Fvd

        backbone, frames = fvd.groups()
        return Fvd(backbone, int(frames), files.get(backbone))
    if "lpips_" in name:
        from metrics.perceptual import LpipsMetric, TemporalLpips

        kind = TemporalLpips if name.startswith("t") else LpipsMetric
        return kind(name.split("_")[1], files.get("lpips"))
    if name.startswith("warp_"):
        from metrics.flow import DisFlow, RaftFlow
        from metrics.temporal import WarpingError

        return WarpingError(DisFlow() if name == "warp_dis" else RaftFlow(files.get("raft")))
    if name == "clip_consistency":
        from metrics.clip import ClipConsistency

        return ClipConsistency(files.get("clip"))
    from metrics.image import Psnr, PsnrVideo, Ssim
    from metrics.motion import Jump
    from metrics.temporal import Flicker

    return {"psnr": Psnr, "psnr_video": PsnrVideo, "ssim": Ssim, "jump": Jump, "flicker": Flicker}[name]()
