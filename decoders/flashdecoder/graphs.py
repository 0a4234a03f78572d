"""CUDA graphs of a decoder's steps: tensors at fixed addresses, and streams that take turns in them."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from decoders.layers import cuda_graphs


class Resident:
    """The one stream whose caches lie in a graph's own tensors at the moment.

    The caller owns a stream's state, a graph its addresses: when another stream steps, the one before it is copied out
    (``state.caches``), the new one in.  A stream that steps alone is never copied.
    """

    def __init__(self, buffers: list[Tensor]) -> None:
        self.buffers = buffers
        self._holder = lambda: None  # a weak reference: a stream that the caller dropped need not be saved

    @torch.no_grad()
    def enter(self, state) -> None:
        """Make ``state`` (with ``caches``: list of tensors or None, ``resident``) the one that the buffers hold."""
        if self._holder() is state:
            return
        self.leave()
        for buffer, kept in zip(self.buffers, state.caches or [None] * len(self.buffers), strict=True):
            buffer.zero_() if kept is None else buffer.copy_(kept)
        state.caches, state.resident = None, self
        self._holder = weakref.ref(state)

    def leave(self) -> None:
        """Give the holder its caches back as tensors of its own."""
        state = self._holder()
        if state is not None:
            state.caches, state.resident = [buffer.clone() for buffer in self.buffers], None
        self._holder = lambda: None

    def forget(self) -> None:
        """The holder has ended: its caches need not be saved."""
        self._holder = lambda: None


class GraphedSteps:
    """The steps of one size: static input and caches, one graph per phase (first frame, warm-up, full window).

    Args:
        step: (latent, caches, phase) -> frames; changes the caches in place.
        latent, caches: tensors of the right shapes, whose memory the graphs will use.
        pool: of memory, shared with the model's other graphs (they run one at a time, and outputs are copied out).
    """

    def __init__(self, step: Callable, latent: Tensor, caches: list[Tensor], pool) -> None:
        self.step = step
        self.latent = latent
        self.resident = Resident(caches)
        self.pool = pool
        self.captured: dict = {}

    @torch.no_grad()
    def __call__(self, latent: Tensor, state, phase) -> Tensor:
        """The frames of this step, in memory that the next step overwrites."""
        if phase not in self.captured:
            self.resident.leave()  # the calls before a capture change the buffers
            self.latent.copy_(latent)
            run = lambda: self.step(self.latent, self.resident.buffers, phase)  # noqa: E731
            self.captured[phase] = cuda_graphs.capture(run, latent.device, self.pool)
        self.resident.enter(state)
        self.latent.copy_(latent)
        return self.captured[phase].replay()
