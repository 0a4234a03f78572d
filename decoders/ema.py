"""An exponential moving average of named parameters, in fp32 beside them.

Only what was trained and is needed at inference is averaged, never a frozen encoder, a teacher or a discriminator.
Copies of a whole module (timm's, Lightning's) would drag those along and fail once parameters are sharded; plain tensors
made like the parameters are sharded as they are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from decoders.sharding import slice_like
from decoders.training import EmaConfig


class Ema:
    """``average <- decay * average + (1 - decay) * weights`` after every optimiser step.

    During the first ``warmup_steps`` steps the average is the weights themselves, so that it does not remember the
    initial ones.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: EmaConfig) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self.average = {name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step number ``step`` (the first is 1)."""
        weight = 1.0 if step <= self.config.warmup_steps else 1.0 - self.config.decay
        averages, current = list(self.average.values()), list(self.parameters.values())
        torch._foreach_lerp_(averages, [p.detach().float() for p in current], weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages themselves, by name; sharded as the parameters are (``sharding.gathered`` makes them whole)."""
        return dict(self.average)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take whole tensors, however this average is sharded."""
        if state.keys() != self.average.keys():
            odd = sorted(state.keys() ^ self.average.keys())
            raise ValueError(f"the checkpoint's EMA does not fit this model: {len(odd)} names differ, first {odd[0]}")
        for name, value in state.items():
            self.average[name].copy_(slice_like(value, self.average[name]))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in place of the weights, and the weights back afterwards, whatever happens."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._set(self.average)
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
