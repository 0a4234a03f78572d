"""How well a decoder moves: the change from one frame to the next, held against the truth's."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from losses.pixel import check_pair
from metrics.base import Metric, masked_mean


class Jump(Metric):
    """Mean absolute error of the change since the frame before, ``|(p[t] - p[t-1]) - (g[t] - g[t-1])|``, RGB in [0, 1].

    A decoder that works chunk by chunk jumps where two chunks meet: the mean over those frames against the mean over the
    others (``frame_groups`` of the decoder) says by how much. The first frame of a clip has no frame before it; its score is 0.
    """

    name, higher_is_better = "jump", False

    @property
    def protocol(self) -> dict[str, Any]:
        return {"range": "[0, 1]", "per": "frame, of the change since the one before; 0 at the first"}

    @torch.no_grad()
    def __call__(
        self,
        prediction: Float[Tensor, "b 3 t h w"],
        target: Float[Tensor, "b 3 t h w"],
        mask: Float[Tensor, "b 1 t h w"] | None = None,
    ) -> Float[Tensor, "b t"]:
        """As in the base. With a mask the pixels that count in the later frame are averaged over."""
        check_pair(prediction, target, mask)
        return super().__call__(_change(prediction.clamp(-1, 1)), _change(target), mask)

    def _frames(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        return masked_mean((prediction - target).abs(), mask)


def _change(video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 3 t h w"]:
    """Half the change since the frame before, so in [-1, 1] for RGB in [-1, 1]: the change of RGB in [0, 1]."""
    return torch.diff(video.float(), dim=2, prepend=video[:, :, :1].float()) / 2
