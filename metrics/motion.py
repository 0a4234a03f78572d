"""How well a decoder moves: the change from one frame to the next, held against the truth's."""

from typing import Any

from torch import Tensor

from metrics.base import Metric, counted_in_both, masked_mean


class Jump(Metric):
    """Mean absolute error of the change since the frame before, ``|(p[t] - p[t-1]) - (g[t] - g[t-1])|``, RGB in [0, 1].

    A decoder that works chunk by chunk jumps where two chunks meet: the mean over those frames against the mean over the
    others (``frame_groups`` of the decoder) says by how much. With a mask the pixels that count in both frames are
    averaged over.
    """

    name, higher_is_better, pairs = "jump", False, True

    @property
    def protocol(self) -> dict[str, Any]:
        return {"range": "[0, 1]", "per": "frame, of the change since the one before; the first has none"}

    def _frames(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        error = (prediction.diff(dim=0) - target.diff(dim=0)).abs() / 2  # half: [-1, 1] is twice as wide as [0, 1]
        return masked_mean(error, counted_in_both(mask))
