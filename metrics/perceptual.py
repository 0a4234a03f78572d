"""LPIPS as a metric: the network of ``losses.perceptual`` in exact float32, with the backbone in the name."""

import os
from typing import Any

from torch import Tensor

from losses.perceptual import Lpips, Net
from metrics.base import Metric, TargetCache, counted_in_both


class LpipsMetric(Metric):
    """LPIPS v0.1 per frame, lower is better: ``lpips_alex`` is what papers report, ``lpips_vgg`` what training lowers.

    ``weights``: as for :class:`losses.perceptual.Lpips`; they are found and loaded here, so that what is missing is
    missing before any work. With a mask each layer's distances are averaged over the cells by the mask's share of each.
    Frames need 31 x 31 (alex) or 16 x 16 (vgg). The target's features are kept for the next method on the same batch.
    """

    higher_is_better = False

    def __init__(self, net: Net = "alex", weights: str | os.PathLike | None = None):
        self.lpips, self._kept = Lpips(net, weights), TargetCache()
        self.name = f"lpips_{net}"

    @property
    def protocol(self) -> dict[str, Any]:
        return {"range": "[-1, 1]", "version": "0.1", "backbone": self.lpips.fingerprint, "per": "frame"}

    def _frames(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        theirs = self._kept.get(target, self.lpips.features)
        return self.lpips.distance(self.lpips.features(prediction), theirs, mask)


class TemporalLpips(Metric):
    """LPIPS between a frame of the prediction and the one before it, ``tlpips_alex``: how much the eye sees change.

    Of the prediction alone: film that moves has more of it than film that stands still, and a blurred one has less than
    the truth. So a value means something beside the truth's own, which is ``metric(target, target)``; papers call less
    better. With a mask the cells are averaged by their share of what counts in both frames. Weights and sizes as
    :class:`LpipsMetric`.
    """

    higher_is_better, pairs = False, True

    def __init__(self, net: Net = "alex", weights: str | os.PathLike | None = None):
        self.lpips = Lpips(net, weights)
        self.name = f"tlpips_{net}"

    @property
    def protocol(self) -> dict[str, Any]:
        per = "frame, against the one before; of the prediction alone; the first has none"
        return {"range": "[-1, 1]", "version": "0.1", "backbone": self.lpips.fingerprint, "per": per}

    def _frames(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        layers = self.lpips.features(prediction)
        later, earlier = ([layer[cut] for layer in layers] for cut in (slice(1, None), slice(-1)))
        return self.lpips.distance(later, earlier, counted_in_both(mask))
