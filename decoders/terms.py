"""Loss terms that several families share, as their ``losses`` hooks use them."""

from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from losses.adversarial import discriminator_loss, generator_loss, r1_penalty
from losses.perceptual import Lpips, Precision, distance_of_layer, random_crop_pair


@runtime_checkable
class PerceptualOptions(Protocol):
    """What an ``Objective`` says about LPIPS."""

    lpips_net: str
    lpips_weights: str | None
    lpips_frames_per_chunk: int | None


def build_lpips(objective: PerceptualOptions) -> Lpips:
    """The frozen network of an objective. Raises FileNotFoundError, saying how to get them, without its weights."""
    return Lpips(objective.lpips_net, objective.lpips_weights, frames_per_chunk=objective.lpips_frames_per_chunk)


def hasten_lpips(decoder: nn.Module, precision: Precision, compiled: bool) -> None:
    """Let the LPIPS networks of ``decoder`` convolve in ``precision``, and compare features in compiled kernels.

    Their layers are frozen, so nothing of it is trained, and the metrics' networks are others.
    """
    for module in decoder.modules():
        if isinstance(module, Lpips):
            module.precision, module.fused = precision, _compiled_distance() if compiled else None


@cache
def _compiled_distance() -> Any:
    return torch.compile(distance_of_layer, dynamic=True)  # one for all five layers and every size of frames


def crops(
    prediction: Tensor, target: Tensor, mask: Tensor | None, size: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One random window of ``size`` per clip, the same in all three; drawn from this step's seed. None: whole frames."""
    if size is None:
        return prediction, target, mask
    generator = torch.Generator().manual_seed(torch.initial_seed())  # of this step and rank, see decoders/base.py
    cut = random_crop_pair(prediction, target, size, generator, mask)
    return cut if mask is not None else (*cut, None)


def lpips(network: Lpips, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean LPIPS over frames in which something counts."""
    if mask is None:
        return network(prediction, target)
    scores = network.per_frame(prediction, target, mask)
    frames = mask.amax(dim=(1, 3, 4)) > 0
    return torch.where(frames, scores, 0.0).sum() / frames.sum().clamp(min=1)


def adversarial(discriminator: nn.Module, fake: Tensor, real: Tensor, step: int, r1_interval: int) -> dict[str, Tensor]:
    """``gan_g``, ``gan_d`` and, every so many steps, ``r1``, as much stronger (lazy R1: StyleGAN2, appendix B)."""
    terms = {
        "gan_g": generator_loss(discriminator, fake),
        "gan_d": discriminator_loss(discriminator, real, fake),
    }
    if step % r1_interval == 0:
        terms["r1"] = r1_interval * r1_penalty(discriminator, real)
    return terms
