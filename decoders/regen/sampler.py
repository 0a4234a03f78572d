"""From noise to video by a network that predicts velocity or noise (section 3.2 of arXiv 2503.08665, eqs. 2 to 4).

A noisy video is x = a clean + b noise, where a and b depend on the level: 1 is noise, 0 is the clean video. Either
prediction gives both parts, and every step mixes them anew for the next level. With velocities this is Euler's method,
with noise it is DDIM.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import log1p

import torch
from jaxtyping import Float
from torch import Tensor

Coefficients = Callable[[Tensor], tuple[Tensor, Tensor]]
STEPS = 1000  # of the schedule of betas
BETAS = (
    0.00085,
    0.012,
)  # its ends, linear in their roots: Stable Diffusion's, which InstaFlow, the paper's [24], starts from


def rectified(level: Tensor) -> tuple[Tensor, Tensor]:
    """A straight line from the clean video to noise; at level 1 nothing of the video is left."""
    return 1 - level, level


def variance_preserving(level: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's eq. 3, a^2 + b^2 = 1, after ``STEPS * level`` of the schedule's steps; between them, log(a) is linear."""
    table = torch.tensor(LOG_SIGNAL, dtype=torch.float64, device=level.device)
    position = level.double().clamp(0, 1) * STEPS
    below = position.floor().clamp(max=STEPS - 1).long()
    log_signal = torch.lerp(table[below], table[below + 1], position - below)
    return log_signal.mul(0.5).exp().to(level.dtype), log_signal.expm1().neg().sqrt().to(level.dtype)


def _log_signal() -> list[float]:
    """log(a^2) at the ends of all steps, 0 first. Numbers, not a tensor that would be kept: see ``decoders/layers/tables.py``."""
    first, last = (beta**0.5 for beta in BETAS)
    betas = ((first + (last - first) * step / (STEPS - 1)) ** 2 for step in range(STEPS))
    return [0.0, *accumulate(log1p(-beta) for beta in betas)]


LOG_SIGNAL = _log_signal()


def coefficients_of(prediction: str) -> Coefficients:
    """The process that goes with a prediction: rectified flow with velocity, variance-preserving with epsilon."""
    return rectified if prediction == "velocity" else variance_preserving


def skip_factors(level: Tensor, prediction: str, spread: float) -> tuple[Tensor, Tensor]:
    """Factors of the noisy video and of the clean video's mean in the best linear estimate of what is predicted, where
    pixels lie about that mean with standard deviation ``spread``, independent of one another."""
    a, b = coefficients_of(prediction)(level)
    clean = -1 if prediction == "velocity" else 0  # the target is noise - clean, or noise
    total = a**2 * spread**2 + b**2
    return (clean * a * spread**2 + b) / total, -b * (a - clean * b) / total


def split(x: Tensor, predicted: Tensor, a: Tensor, b: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """The clean video and the noise that a prediction sees in ``x`` = a clean + b noise."""
    if prediction == "velocity":  # noise - clean, on the straight line: a + b = 1
        return x - b * predicted, x + a * predicted
    return (x - b * predicted) / a, predicted


def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Float[Tensor, "b 3 t h w"],
    steps: int,
    *,
    prediction: str = "velocity",
    guide: Sequence[Float[Tensor, "b 3 1 h w"]] | None = None,
    keep: bool = False,
) -> tuple[Float[Tensor, "b 3 t h w"], list[Float[Tensor, "b 3 1 h w"]]]:
    """The clean video that ``predict(x, level "b")`` finds in ``steps`` even steps from level 1 to 0, not clamped.

    Args:
        guide: latent extension (B.4): before every step the first frame is set to this step's entry.
        keep: return what the last frame was before every step, a ``guide`` for what follows; else an empty list.

    Raises:
        ValueError: ``steps`` below 1, or a guide made with another number of steps.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one step leads from noise to a video")
    if guide is not None and len(guide) != steps:
        raise ValueError(f"a guide of {len(guide)} steps cannot lead {steps} steps")
    coefficients = coefficients_of(prediction)
    levels = torch.linspace(1, 0, steps + 1, device=noise.device)
    x, kept = noise, []
    for index, (level, following) in enumerate(pairwise(levels.unbind())):
        if guide is not None:
            x = torch.cat([guide[index].to(x.dtype), x[:, :, 1:]], 2)
        if keep:
            kept.append(x[:, :, -1:].clone())
        predicted = predict(x, level.expand(len(x))).to(x.dtype)
        clean, residue = split(x, predicted, *coefficients(level), prediction)
        if index == steps - 1:
            return clean, kept
        a, b = coefficients(following)
        x = a * clean + b * residue
    raise AssertionError("unreachable: there is at least one step")
