"""Temporal stability: does the prediction flicker, and does it hold together along the truth's motion.

RefDecoder (arXiv, appendix C) names these measures and gives no formulas; the readings here are public definitions at
RGB in [0, 1] whose values fit those that it prints. Scores stand at the later frame of a pair.
"""

from typing import Any

import torch
from torch import Tensor

from metrics.base import Metric, TargetCache, counted_in_both, masked_mean
from metrics.flow import Flow, visible, warp


class Flicker(Metric):
    """Mean absolute change since the frame before, ``|p[t] - p[t-1]|``, RGB in [0, 1] (VBench's is 1 minus this).

    Of the prediction alone, so motion counts as well: a value means something beside the truth's own, which is
    ``metric(target, target)``. A frozen picture has 0. Papers call less better. With a mask the pixels that count in
    both frames are averaged over.
    """

    name, higher_is_better, pairs = "flicker", False, True

    @property
    def protocol(self) -> dict[str, Any]:
        return {"range": "[0, 1]", "per": "frame, against the one before; of the prediction alone; the first has none"}

    def _frames(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        change = prediction.diff(dim=0).abs() / 2  # half: [-1, 1] is twice as wide as [0, 1]
        return masked_mean(change, counted_in_both(mask))


class WarpingError(Metric):
    """How far a frame is from the next one warped back onto it along the motion (Lai et al. 2018), RGB in [0, 1].

    Pixels that are occluded, on a motion boundary or move out of the frame are left out (:func:`metrics.flow.visible`),
    and what a mask does not count in either frame. A pair's value is the **root** of the mean squared error over RGB
    and pixels; Lai et al. sum the squares. The root is what RefDecoder's 0.0327 can be: as a mean square it would be
    15 dB between neighbours.

    The motion is that of the truth: every method is then warped by one flow (its own flow would follow, and so forgive,
    what it does wrong), and the flow of a batch is found once. The truth's own value, ``metric(target, target)``, is
    the floor: change of light, noise and the flow's own error. The name says whose flow it is: ``warp_dis`` needs no
    weights, ``warp_raft`` is what papers use; the two are not comparable.
    """

    higher_is_better, pairs = False, True

    def __init__(self, flow: Flow):
        self._flow, self._kept = flow, TargetCache()
        self.name = f"warp_{flow.name}"

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "range": "[0, 1]",
            "per": "frame, against the one before; the first has none",
            "value": "root of the mean squared error over RGB and the pixels that count",
            "warp": "the later frame back onto the earlier, bilinear",
            "flow": f"of the truth: {self._flow.definition}",
            "occluded": "|A + B|^2 > 0.01 (|A|^2 + |B|^2) + 0.5, B forward flow, A backward flow at p + B",
            "boundary": "squared gradient of B > 0.01 |B|^2 + 0.002",
            "outside": "p + B not in the frame",
        }

    def _frames(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        forward, counts = self._kept.get(target, self._motion)
        if mask is not None:
            counts = torch.minimum(counts * mask[:-1], warp(mask[1:], forward))
        error = (prediction[:-1] - warp(prediction[1:], forward)).square() / 4  # [-1, 1] is twice as wide as [0, 1]
        return masked_mean(error, counts).sqrt()

    def _motion(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Frames -> the flow of each to the next, and 1 where a pixel is seen in both."""
        forward, backward = self._flow(target)
        return forward, visible(forward, backward)
