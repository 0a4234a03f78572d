"""What the optimised forms of several families are made with: copies that share weights, compiled functions."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import wraps
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Part = TypeVar("Part", bound=nn.Module)
RECOMPILES = 64  # of one function: sizes, the first frame, stages; torch's 8 are soon spent


def shared_copy(module: Part) -> Part:
    """``module`` once more, in eval mode and without gradients, over the same numbers in memory.

    Moving or converting the one does not move the other. Training the one in place does reach the other.
    """
    memo: dict[int, Any] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        own = tensor.detach()
        memo[id(tensor)] = nn.Parameter(own, requires_grad=False) if isinstance(tensor, nn.Parameter) else own
    return deepcopy(module, memo).eval()


def compiled(function: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
    """``function`` through torch.compile as one graph; one that cannot be traced whole is an error, not a slower answer.

    Of a copy of it: torch counts variants by code, and those of another model, or of another size, shall not count.
    """
    inner = torch.compile(_copied(function), fullgraph=True, dynamic=dynamic)

    def call(*arguments: Any, **named: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
            return inner(*arguments, **named)

    return call


def _copied(function: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(function, types.MethodType):
        return types.MethodType(_copied(function.__func__), function.__self__)
    code, name = function.__code__.replace(), function.__name__
    copy = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@contextmanager
def at_rest(device: torch.device) -> Iterator[None]:
    """Neither gradients nor the caller's autocast or inference mode, whose tensors nothing outside it may change."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def inference(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a module's method run :func:`at_rest`."""

    @wraps(method)
    def run(module: nn.Module, *arguments: Any, **named: Any) -> Any:
        with at_rest(next(module.parameters()).device):
            return method(module, *arguments, **named)

    return run


def check_latent(latent: Tensor, channels: int) -> None:
    """Raise ValueError for what is no batch of latents "b c n y x"."""
    if latent.ndim != 5 or latent.shape[1] != channels or 0 in latent.shape:
        raise ValueError(
            f"latent of shape {tuple(latent.shape)}; this decoder reads (b, {channels}, n, y, x), all of them 1 or more"
        )


def to_uint8(video: Tensor) -> Tensor:
    """Values in [-1, 1], others clamped, as whole numbers from 0 to 255, rounded to the nearest. NaN is 0: what is wrong
    with frames is seen in floats."""
    return video.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
