"""Losses between what a student's stages give and what its teacher's give.

Features are "b c n y x" of any stage. The two must have the same channels: a student that keeps a part of the
teacher's channels is compared with those, and choosing them is the caller's business.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FLOOR = 1e-2  # of the mean square: features that hardly vary (a black clip) are not divided by nearly nothing


def feature_mse(
    student: Float[Tensor, "b c n y x"],
    teacher: Float[Tensor, "b c n y x"],
    mask: Float[Tensor, "b 1 t h w"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error over the teacher's variance within its channels, in float32: 1 - R^2 over the whole layer.

    0 is perfect, 1 is what each channel's mean scores, whatever the scale of the layer's features. The variance is of
    this batch, one number per layer, at least 1 % of the features' mean square. No gradient reaches the teacher.

    Args:
        mask: pixels that count, at the size of the clip that was encoded (padding included); pooled to the features' size (:func:`pool_mask`). Error and
            variance are those of the positions that count.

    Raises:
        ValueError: the shapes differ, or the mask counts nothing.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student features {tuple(student.shape)} and teacher's {tuple(teacher.shape)} must be alike")
    teacher = teacher.detach().float()
    difference = student.float() - teacher
    if mask is None:
        square = teacher.square().mean()
        variance = teacher.var(dim=(0, 2, 3, 4), correction=0).mean()
        return difference.square().mean() / _floored(variance, square)
    weight = pool_mask(mask, tuple(teacher.shape[2:]))
    counted = weight.sum()
    if not counted > 0:  # `not >` catches NaN too
        raise ValueError("the mask counts no pixel: drop the clip, or leave the term out of this step")
    difference, teacher = (torch.where(weight > 0, x, 0.0) for x in (difference, teacher))
    weight = weight / counted
    centre = (teacher * weight).sum(dim=(0, 2, 3, 4), keepdim=True)
    variance = ((teacher - centre).square() * weight).sum(dim=(0, 2, 3, 4)).mean()
    square = (teacher.square() * weight).sum(dim=(0, 2, 3, 4)).mean()
    error = (difference.square() * weight).sum(dim=(0, 2, 3, 4)).mean()
    return error / _floored(variance, square)


def _floored(variance: Tensor, square: Tensor) -> Tensor:
    return torch.maximum(variance, FLOOR * square).clamp_min(1e-12)


def pool_mask(mask: Float[Tensor, "b 1 t h w"], size: tuple[int, int, int]) -> Float[Tensor, "b 1 n y x"]:
    """The share of every feature's pixels that count, for features of ``size`` (n, y, x) of a causal decoder.

    The first feature frame is the first frame's, and each later one that of an equal group of frames.

    Raises:
        ValueError: the features' frames are no such groups of the clip's.
    """
    (t, h, w), (n, y, x) = mask.shape[2:], size
    if (t - 1) % max(1, n - 1) or (n == 1) != (t == 1):
        raise ValueError(f"features of {n} frames do not belong to a clip of {t} frames: it is not 1 + {n - 1}k")
    frames = mask.float()
    if 1 < n < t:
        later = frames[:, :, 1:].unflatten(2, (n - 1, -1)).mean(3)
        frames = torch.cat([frames[:, :, :1], later], dim=2)
    if (y, x) == (h, w):
        return frames
    return F.adaptive_avg_pool2d(frames.flatten(0, 1), (y, x)).unflatten(0, frames.shape[:2])


@dataclass
class RunningScaleConfig:
    """How far :class:`RunningScale` looks back."""

    decay: float = 0.99  # of the running means: about 100 steps

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must lie in [0, 1); 0 divides every loss by itself")


class RunningScale:
    """Divides each layer's loss by its running mean, so that all layers weigh equally, however fast each learns.

    The mean is exponential, without a bias towards its start (after one step it is that step's loss), includes the
    step's own loss and carries no gradient: normalised losses are about 1 throughout, and how much guidance there is
    altogether is decided by the term's weight alone.

    Under DDP the losses are averaged over the ranks before they enter the mean, so that all ranks divide by the same
    numbers: every rank has to call this, with the same layers, in the same steps. No ``nn.Module``: like the EMA it is
    no parameter and no part of the exported weights; the owner keeps :meth:`state_dict` in its checkpoint
    (``on_save_checkpoint``), and a resumed run goes on to the bit.
    """

    def __init__(self, config: RunningScaleConfig | None = None) -> None:
        self.config = config or RunningScaleConfig()
        self._sum: dict[str, Tensor] = {}  # decayed sums of losses
        self._weight: dict[str, float] = {}  # and of the weights 1 - decay

    def __call__(self, losses: Mapping[str, Float[Tensor, ""]], *, update: bool = True) -> dict[str, Tensor]:
        """``losses`` by layer, each over its running mean; ``update=False`` leaves the means as they are.

        Raises:
            ValueError: there are no losses, or without ``update`` a layer has no mean yet.
        """
        if not losses:
            raise ValueError("there are no losses to scale")
        if update:
            self._update(losses)
        if missing := losses.keys() - self._sum.keys():
            raise ValueError(f"no loss of {', '.join(sorted(missing))} was seen yet: there is no mean to divide by")
        return {name: loss / self.mean(name).to(loss.device).clamp_min(1e-12) for name, loss in losses.items()}

    def mean(self, name: str) -> Float[Tensor, ""]:
        """The running mean of a layer's loss, float32, without gradient."""
        return self._sum[name] / self._weight[name]

    @torch.no_grad()
    def _update(self, losses: Mapping[str, Tensor]) -> None:
        names = sorted(losses)
        now = torch.stack([losses[name].detach().float() for name in names])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(now)
            now = now / torch.distributed.get_world_size()
        decay = self.config.decay
        for name, value in zip(names, now, strict=True):
            before = self._sum.get(name, torch.zeros(())).to(now.device)
            self._sum[name] = decay * before + (1 - decay) * value
            self._weight[name] = decay * self._weight.get(name, 0.0) + (1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, so that it loads with ``weights_only=True``."""
        return {"sum": {name: value.clone() for name, value in self._sum.items()}, "weight": dict(self._weight)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken; means follow the next losses to their device."""
        if state["sum"].keys() != state["weight"].keys():
            raise ValueError("this is no state of a RunningScale: its sums and weights have different layers")
        self._sum = {name: value.clone() for name, value in state["sum"].items()}
        self._weight = dict(state["weight"])
