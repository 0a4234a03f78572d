"""Losses on pixels: L1, mean squared error, Charbonnier. Each is a mean over the pixels that count, in float32."""

import torch
from jaxtyping import Float
from torch import Tensor


def l1(
    prediction: Float[Tensor, "b 3 t h w"],
    target: Float[Tensor, "b 3 t h w"],
    mask: Float[Tensor, "b 1 t h w"] | None = None,
) -> Float[Tensor, ""]:
    """Mean absolute difference, in units of the [-1, 1] range (so at most 2).

    With a ``mask`` the mean runs over the pixels that count (1; a value between 0 and 1 weighs), all three channels
    of each: a half empty mask does not halve the loss, and what is masked out may hold anything, NaN included.
    Raises ValueError if shapes differ or the mask counts nothing.
    """
    return _mean(_difference(prediction, target, mask).abs(), mask)


def mse(
    prediction: Float[Tensor, "b 3 t h w"],
    target: Float[Tensor, "b 3 t h w"],
    mask: Float[Tensor, "b 1 t h w"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference over the pixels that count; ``mask`` and errors as in :func:`l1`."""
    return _mean(_difference(prediction, target, mask).square(), mask)


def charbonnier(
    prediction: Float[Tensor, "b 3 t h w"],
    target: Float[Tensor, "b 3 t h w"],
    mask: Float[Tensor, "b 1 t h w"] | None = None,
    *,
    eps: float = 1e-3,
) -> Float[Tensor, ""]:
    """Mean of ``sqrt(d^2 + eps^2)``: L1 with a smooth foot (Lai et al. 2017, LapSRN). Perfect prediction gives ``eps``.

    ``mask`` and errors as in :func:`l1`.
    """
    return _mean((_difference(prediction, target, mask).square() + eps**2).sqrt(), mask)


def check_pair(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
    """ValueError unless both are "b 3 t h w" of one shape (nothing is ever broadcast) and the mask fits them."""
    if prediction.shape != target.shape or prediction.ndim != 5 or prediction.shape[1] != 3:
        shapes = f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)}"
        raise ValueError(f"{shapes} must have one shape, (b, 3, t, h, w)")
    if mask is not None:
        expected = (prediction.shape[0], 1, *prediction.shape[2:])
        if mask.shape != expected:
            raise ValueError(f"mask {tuple(mask.shape)} does not fit the clip: expected {expected}")


def _difference(prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    check_pair(prediction, target, mask)
    difference = prediction.float() - target.float()
    # Zeroed here rather than multiplied away later: NaN times 0 is NaN, in the value and in the gradient.
    return difference if mask is None else torch.where(mask > 0, difference, 0.0)


def _mean(error: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return error.mean()
    weight = mask.to(error.dtype)
    counted = weight.sum() * error.shape[1]
    if not counted > 0:  # `not >` catches NaN too
        raise ValueError("the mask counts no pixel: drop the clip, or leave the term out of this step")
    return (error * weight).sum() / counted
