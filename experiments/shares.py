"""What a training step's time goes to: encoder, forward pass, backward pass, LPIPS, discriminator, optimiser, average.

A step is cut where one part ends and the next begins; on a GPU by events in the step's own stream, which nothing waits for, so
that a measured step is as fast as any other. The backward passes of the losses end where the gradient of what they read is
there: autograd goes through a step in the reverse of its order.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from decoders.base import VideoDecoder
from losses.perceptual import Lpips

PARTS = (
    "encoder",
    "teacher",
    "forward",
    "backward",
    "lpips",
    "discriminator",
    "losses",
    "clip",
    "optimiser",
    "ema",
    "rest",
)
METHODS = {  # of a decoder, where it has them; a discriminator is called as a module
    "with_latent": "encoder",
    "_taught": "teacher",
    "configure_gradient_clipping": "clip",
}


class Timeline:
    """Seconds by part, between :meth:`begin` and :meth:`end`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self.running = False

    def begin(self) -> None:
        self._marks, self.running = [], True
        self.mark("rest")

    def mark(self, part: str) -> None:
        """From here on time is ``part``'s."""
        if self.running:
            self._marks.append((part, self._now()))

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Time inside is ``part``'s, and afterwards again that of whoever had it."""
        before = self._marks[-1][0] if self._marks else "rest"
        self.mark(part)
        try:
            yield
        finally:
            self.mark(before)

    def end(self) -> list[tuple[str, Any]]:
        """The marks of what has been measured, for :meth:`seconds`; nothing is waited for."""
        self.mark("end")
        self.running = False
        return self._marks

    def seconds(self, marks: list[tuple[str, Any]]) -> dict[str, float]:
        """Part -> seconds. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (part, start), (_, stop) in zip(marks, marks[1:], strict=False):
            passed = start.elapsed_time(stop) / 1000 if self._cuda else stop - start
            found[part] = found.get(part, 0.0) + passed
        return found

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Shares(Callback):
    """Marks the parts of every step of a decoder on ``timeline``."""

    def __init__(self) -> None:
        self.timeline: Timeline | None = None

    def on_train_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        timeline = self.timeline = Timeline(pl_module.device)
        for name, part in METHODS.items():
            if hasattr(pl_module, name):
                setattr(pl_module, name, _timed(timeline, part, getattr(pl_module, name)))
        if pl_module.ema is not None:
            pl_module.ema.update = _timed(timeline, "ema", pl_module.ema.update)
        for module in pl_module.modules():
            if isinstance(module, Lpips):
                module.per_frame = _timed(timeline, "lpips", module.per_frame, backward=True)
        _watch(timeline, "forward", "backward", pl_module.model)
        for name in pl_module.discriminators:
            _watch(timeline, "discriminator", "discriminator", getattr(pl_module, name))

    def on_train_batch_start(self, trainer: Trainer, pl_module: VideoDecoder, batch: Any, batch_idx: int) -> None:
        self.timeline.begin()

    def on_before_backward(self, trainer: Trainer, pl_module: VideoDecoder, loss: Tensor) -> None:
        self.timeline.mark("losses")

    def on_after_backward(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self.timeline.mark("optimiser")


def _watch(timeline: Timeline, part: str, backward: str, module: torch.nn.Module) -> None:
    """A module's calls are ``part``; from the gradient of its result on, time is ``backward``'s."""
    before: list[str] = []

    @torch._dynamo.disable
    def enter(*_: Any) -> None:
        before.append(timeline._marks[-1][0] if timeline._marks else "rest")
        timeline.mark(part)

    @torch._dynamo.disable
    def leave(_: Any, __: Any, output: Any) -> None:
        _note_backward(timeline, backward, output)
        timeline.mark(before.pop())

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _note_backward(timeline: Timeline, part: str, values: Any) -> None:
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(lambda _: timeline.mark(part))


def _timed(timeline: Timeline, part: str, function: Callable[..., Any], backward: bool = False) -> Callable[..., Any]:
    """``function``, whose time is ``part``'s; with ``backward`` that of its gradient too."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if backward:  # its part of the backward pass ends where its inputs' gradients are there
            _note_backward(timeline, "losses", (args, kwargs))
        with timeline.within(part):
            result = function(*args, **kwargs)
        if backward:
            _note_backward(timeline, part, result)
        return result

    return call
