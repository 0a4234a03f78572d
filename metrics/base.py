"""What every metric here shares: checked and clamped inputs, exact float32, frames in chunks, scores "b t"."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from losses.pixel import check_pair

_PIXELS_PER_CHUNK = 1 << 21  # one 1080p frame, eight of 480 x 480: bounds memory, changes no value


class Metric(ABC):
    """Scores frames: ``metric(prediction, target) -> "b t"``. Frames are scored alone, so any grouping gives the same.

    ``name`` is the column's and TensorBoard's (``val/<name>``); ``higher_is_better`` says which way is up;
    ``protocol`` is the metric's part of :class:`metrics.protocol.Protocol`.
    """

    name: str
    higher_is_better: bool

    @property
    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """Range, constants and weights that define the number; plain values."""

    @abstractmethod
    def _frames(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        """(frames, 3, h, w) twice and (frames, 1, h, w) or None, float32 in [-1, 1] -> (frames,)."""

    @torch.no_grad()
    def __call__(
        self,
        prediction: Float[Tensor, "b 3 t h w"],
        target: Float[Tensor, "b 3 t h w"],
        mask: Float[Tensor, "b 1 t h w"] | None = None,
    ) -> Float[Tensor, "b t"]:
        """Score of each frame in float32, without gradient; the prediction is clamped to [-1, 1] first.

        What ``mask`` does not count (0) cannot touch the score: there the prediction is replaced by the target, and
        averages run over what counts. Raises ValueError for shapes that differ, a target outside [-1, 1] (uint8?
        [0, 255]?) and a frame in which nothing counts.
        """
        check_pair(prediction, target, mask)
        _check_range(target if mask is None else torch.where(mask > 0, target, 0.0))
        _check_counts(mask)
        b, _, t, h, w = prediction.shape
        folded = [x if x is None else x.transpose(1, 2).flatten(0, 1) for x in (prediction, target, mask)]
        size = max(1, _PIXELS_PER_CHUNK // (h * w))
        scores = []
        with exact_fp32(prediction.device):
            for start in range(0, b * t, size):
                chunk = [x if x is None else x[start : start + size].float() for x in folded]
                scores.append(self._frames(*_prepared(*chunk)))
        return torch.cat(scores).unflatten(0, (b, t))


@contextlib.contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """Float32 that is float32: no autocast, no TF32 in convolutions (SSIM's variances would lose most digits)."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            cudnn = torch.backends.cudnn
            stack.enter_context(cudnn.flags(cudnn.enabled, deterministic=cudnn.deterministic, allow_tf32=False))
        yield


def masked_mean(values: Float[Tensor, "frames c h w"], mask: Tensor | None) -> Float[Tensor, " frames"]:
    """Mean over channels and the pixels that count."""
    values = values.mean(dim=1)
    if mask is None:
        return values.mean(dim=(1, 2))
    return (values * mask[:, 0]).sum(dim=(1, 2)) / mask.sum(dim=(1, 2, 3))


def _prepared(prediction: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    prediction, target = prediction.clamp(-1, 1), target.clamp(-1, 1)
    if mask is not None:
        target = torch.where(mask > 0, target, target.nan_to_num())
        prediction = torch.where(mask > 0, prediction, target)
    return prediction, target, mask


def _check_range(target: Tensor) -> None:
    low, high = (value.item() for value in target.aminmax())
    if not (low >= -1.01 and high <= 1.01):  # room for a resize filter's overshoot before rounding; `not` catches NaN
        raise ValueError(f"the target must be RGB in [-1, 1], got values from {low:.4g} to {high:.4g}")


def _check_counts(mask: Tensor | None) -> None:
    if mask is None:
        return
    empty = (mask.sum(dim=(1, 3, 4)) <= 0).nonzero()
    if len(empty):
        clip, frame = empty[0].tolist()
        raise ValueError(
            f"the mask counts nothing in frame {frame} of clip {clip} ({len(empty)} such frames): leave them out"
        )
