"""The decoders that are measured, with random weights: of an experiment, of diffusers, of our own backbones, and the tiny one.

Random weights cost as much as trained ones. Our backbones get those of diffusers' decoder as it is made with the same seed in
another process, so that both must give the same frames.
"""

from typing import Any

from torch import nn

from decoders.base import VideoDecoder
from decoders.latent_spaces.base import LatentSpace
from decoders.latent_spaces.learned import Learned, LearnedConfig


def build(job: Any) -> tuple[nn.Module, LatentSpace, int]:
    """The decoder of a job, float32 on the CPU, the shape of its space, and the pixels its sizes are multiples of.

    Raises:
        ValueError: no such kind or layout.
    """
    if job.experiment:
        return _of_experiment(*job.experiment)
    kinds = {"diffusers": _of_diffusers, "backbone": _backbone, "taehv": _tiny}
    if job.kind not in kinds:
        raise ValueError(f"no kind {job.kind!r} of decoder; there are {', '.join(kinds)}")
    model, shape = kinds[job.kind](job.release)
    return model, Learned(LearnedConfig(shape.channels, shape.stride_t, shape.stride_hw)), shape.stride_hw


def _of_diffusers(release: str) -> tuple[nn.Module, Any]:
    from decoders.baseline.model import DiffusersDecoder

    model = DiffusersDecoder.random(release)
    return model, model.layout


def _tiny(release: str) -> tuple[nn.Module, Any]:
    from decoders.baseline.taehv import TaehvDecoder

    model = TaehvDecoder(release)
    return model, model


def _backbone(release: str) -> tuple[nn.Module, Any]:
    """Ours, on the weights that diffusers' decoder has after the same seed."""
    theirs, _ = _of_diffusers(release)
    mean, std = (values.flatten().tolist() for values in (theirs.mean, theirs.std))
    state = {name: value for name, value in theirs.vae.state_dict().items() if "encoder" not in name}
    if release == "ltx":
        from decoders.backbones import ltx_weights
        from decoders.backbones.ltx import LTXDecoder

        model = LTXDecoder(ltx_weights.config_of(theirs.vae.config, mean, std))
        return ltx_weights.fill(model, state, "diffusers"), model
    from decoders.backbones import wan_weights
    from decoders.backbones.wan import WanDecoder

    model = WanDecoder(wan_weights.config_of(theirs.vae.config))
    return wan_weights.fill(model, state, "diffusers"), model


def _of_experiment(name: str, overrides: tuple[str, ...]) -> tuple[nn.Module, LatentSpace, int]:
    from experiments.config import build_decoder, build_space, load

    experiment = load(name, overrides)
    space = build_space(experiment)
    decoder = build_decoder(experiment, space)
    # The plain network where that is what decodes: no Lightning, no discriminator.
    model = getattr(decoder, "model", None)
    model = model if hasattr(model, "decode") else decoder
    for attribute in decoder.discriminators if model is decoder else ():
        setattr(decoder, attribute, None)
    return model, space, decoder.size_multiple


def has_own_stream(model: Any) -> bool:
    """Whether ``model`` steps by itself; the base class of the modules only hands a stream on."""
    own = getattr(type(model), "step_stream", None)
    return own is not None and own is not VideoDecoder.step_stream
