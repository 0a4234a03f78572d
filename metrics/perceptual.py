"""LPIPS as a metric: the network of ``losses.perceptual`` in exact float32, with the backbone in the name."""

import os
from typing import Any

from torch import Tensor

from losses.perceptual import Lpips, Net
from metrics.base import Metric


class LpipsMetric(Metric):
    """LPIPS v0.1 per frame, lower is better: ``lpips_alex`` is what papers report, ``lpips_vgg`` what training lowers.

    ``weights``: as for :class:`losses.perceptual.Lpips`; they are found and loaded here, so that what is missing is
    missing before any work. With a mask each layer's distances are averaged over the cells by the mask's share of each.
    Frames need 31 x 31 (alex) or 16 x 16 (vgg).
    """

    higher_is_better = False

    def __init__(self, net: Net = "alex", weights: str | os.PathLike | None = None):
        self.lpips = Lpips(net, weights)
        self.name = f"lpips_{net}"

    @property
    def protocol(self) -> dict[str, Any]:
        return {"range": "[-1, 1]", "version": "0.1", "backbone": self.lpips.fingerprint, "per": "frame"}

    def _frames(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        clips = [x if x is None else x.unsqueeze(2) for x in (prediction, target, mask)]  # each frame a clip of one
        return self.lpips.per_frame(*clips).squeeze(1)
