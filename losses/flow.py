"""The objective of diffusion decoders: noisy clips, what to predict of them, and how levels of noise are drawn.

A noisy clip is a clean + b noise; ``coefficients`` gives a and b of a level, 1 for noise and 0 for the clean clip. By default
they are rectified flow's, (1 - level, level) (Liu et al. 2023).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from losses.pixel import check_pair, mse

Coefficients = Callable[[Tensor], tuple[Tensor, Tensor]]


def straight(level: Tensor) -> tuple[Tensor, Tensor]:
    """Rectified flow's a and b."""
    return 1 - level, level


def noised(
    clean: Float[Tensor, "b 3 t h w"],
    noise: Float[Tensor, "b 3 t h w"],
    level: Float[Tensor, " b"],
    coefficients: Coefficients = straight,
) -> Float[Tensor, "b 3 t h w"]:
    """``clean`` at each clip's ``level`` of noise, in float32. Raises ValueError where shapes differ."""
    check_pair(clean, noise)
    if level.shape != clean.shape[:1]:
        raise ValueError(f"level is {tuple(level.shape)}; expected one number for each of {len(clean)} clips")
    a, b = (part.float().view(-1, 1, 1, 1, 1) for part in coefficients(level))
    return a * clean.float() + b * noise.float()


def velocity_target(clean: Float[Tensor, "b 3 t h w"], noise: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 3 t h w"]:
    """Rectified flow's constant velocity, noise - clean, in float32."""
    check_pair(clean, noise)
    return noise.float() - clean.float()


def denoising(
    prediction: Float[Tensor, "b 3 t h w"],
    clean: Float[Tensor, "b 3 t h w"],
    noise: Float[Tensor, "b 3 t h w"],
    mask: Float[Tensor, "b 1 t h w"] | None = None,
    *,
    predicts: str = "velocity",
) -> Float[Tensor, ""]:
    """Mean squared error of a predicted velocity, or of predicted noise (``epsilon``; eq. 4 of arXiv 2503.08665).

    ``mask`` as in :func:`losses.pixel.mse`. A network that predicts the clean clip's mean scores the noise's variance, so the
    value does not go to 0. Raises ValueError for another ``predicts``, or shapes that differ.
    """
    if predicts not in ("velocity", "epsilon"):
        raise ValueError(f"predicts={predicts!r} is neither velocity nor epsilon")
    check_pair(clean, noise)
    return mse(prediction, velocity_target(clean, noise) if predicts == "velocity" else noise, mask)


def draw_levels(
    batch_size: int,
    *,
    distribution: str = "uniform",
    at_one: float = 0.1,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " b"]:
    """A level of noise for every clip.

    Args:
        distribution: uniform on [0, 1), or logit_normal (Esser et al. 2024: the sigmoid of a standard normal number).
        at_one: probability that a clip gets level 1 instead, where decoding in one step looks.

    Raises:
        ValueError: another distribution, or a probability that is none.
    """
    if distribution not in ("uniform", "logit_normal"):
        raise ValueError(f"distribution={distribution!r} is neither uniform nor logit_normal")
    if not 0 <= at_one <= 1:
        raise ValueError(f"at_one={at_one} must be a probability, 0 to 1")
    draw = torch.rand if distribution == "uniform" else torch.randn
    level = draw(batch_size, device=device, generator=generator)
    if distribution == "logit_normal":
        level = level.sigmoid()
    one = torch.rand(batch_size, device=device, generator=generator) < at_one
    return torch.where(one, 1.0, level)
