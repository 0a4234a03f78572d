"""``trainer.checkpointing=auto``: blocks are computed again in the backward pass only at the sizes that need it.

What a forward pass keeps is counted before training, size by size, over tensors without memory (:mod:`experiments.show`). A
step whose activations fit beside the weights, gradients, moments and average keeps them: it is spared a second forward pass,
about a quarter of its operations. The numbers of a step are the same either way.
"""

import dataclasses
import os
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import nn

from decoders.base import VideoDecoder
from experiments import cost, show
from experiments.compose import ConfigError
from experiments.config import Experiment, build_decoder
from experiments.states import states

# Of what a device has beside states, for the network's own activations: the rest is for what is not counted, the losses'
# networks and the encoder at work, and for what the allocator cannot use.
FOR_ACTIVATIONS = 0.6


class Recompute(Callback):
    """Turns checkpointing on and off by the shape of a batch.

    Raises ConfigError for a decoder that cannot checkpoint.
    """

    def __init__(self, experiment: Experiment) -> None:
        if not hasattr(experiment.decoder, "checkpointing"):
            raise ConfigError("trainer.checkpointing=auto: this decoder has no checkpointing; leave it out")
        self._experiment = experiment
        self.keeps: dict[cost.Shape, bool] = {}  # shape of a batch -> whether its activations are kept

    def on_fit_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        room = device_memory_gib(pl_module.device, self._experiment.trainer.memory_gib)
        self.keeps, words = plan(count(self._experiment, pl_module.latent_space), room)
        if trainer.is_global_zero:
            print(words)

    def on_train_batch_start(self, trainer: Trainer, pl_module: VideoDecoder, batch: Any, batch_idx: int) -> None:
        set_checkpointing(pl_module.model, not self.keeps.get(cost.batch_shape(batch), False))


@dataclasses.dataclass(frozen=True)
class Counted:
    """GiB of what a device holds whatever the size, and by training stream of what a forward pass keeps for the backward pass,
    when nothing is computed again; and the shapes of the streams' batches."""

    states: float
    saved: dict[str, float]
    shapes: dict[str, cost.Shape]


def count(experiment: Experiment, space: Any) -> Counted:
    """Over tensors without memory, on a second decoder that is thrown away. Seconds for the largest decoders."""
    plain = dataclasses.replace(experiment, decoder=dataclasses.replace(experiment.decoder, checkpointing=False))
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            decoder = build_decoder(plain, space)
        shapes = cost.stream_shapes(plain, decoder)
        held = states(experiment, decoder).gib
        autocast = experiment.trainer.precision != "32-true"
        latents = {name: latent for name, (_, latent) in shapes.items()}
        saved = show.fake_steps(decoder.model, latents, autocast, decoder.step_inputs)[0] if latents else {}
    batches = {name: batch for name, (batch, _) in shapes.items()}
    return Counted(held, {name: size / show.GIB for name, size in saved.items()}, batches)


def plan(counted: Counted, memory_gib: float) -> tuple[dict[cost.Shape, bool], str]:
    """Shape of a batch -> whether its activations fit into a device of so much memory; and a line that says so."""
    room = FOR_ACTIVATIONS * max(0.0, memory_gib - counted.states)
    told, keeps = [], {}
    for name, saved in counted.saved.items():
        fits, batch = saved <= room, counted.shapes[name]
        keeps[batch] = keeps.get(batch, True) and fits
        told.append(f"{name} {saved:.3g} GiB {'kept' if fits else 'again'}")
    known = ", ".join(told) or "no stream of one size"
    return keeps, f"checkpointing=auto: {room:.3g} GiB for activations; {known}; other sizes again"


def device_memory_gib(device: torch.device, given: float | None) -> float:
    """All memory of a GPU, or of this machine; ``given`` in place of it."""
    if given is not None:
        return given
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / show.GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / show.GIB


def set_checkpointing(network: nn.Module, enabled: bool) -> None:
    """Whether the blocks of ``network`` are computed again. Every part that can be says so by an attribute of this name."""
    for module in network.modules():
        if hasattr(module, "checkpointing"):
            module.checkpointing = enabled
    config = getattr(network, "config", None)
    if getattr(config, "checkpointing", enabled) != enabled:  # a copy: the run's configuration says what it said
        network.config = dataclasses.replace(config, checkpointing=enabled)
