"""What the optimised forms of several families are made with: copies that share weights, compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Part = TypeVar("Part", bound=nn.Module)
RECOMPILES = (
    64  # of one function: sizes, dtypes, the first frame; torch's 8 are soon spent in a process with several models
)


def shared_copy(module: Part) -> Part:
    """``module`` once more, in eval mode and without gradients, over the same numbers in memory.

    Moving or converting the one does not move the other. Training the one in place does reach the other.
    """
    memo: dict[int, Any] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        own = tensor.detach()
        memo[id(tensor)] = nn.Parameter(own, requires_grad=False) if isinstance(tensor, nn.Parameter) else own
    return deepcopy(module, memo).eval()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` through torch.compile as one graph; one that cannot be traced whole is an error, not a slower answer."""
    inner = torch.compile(function, fullgraph=True)

    def call(*arguments: Any, **named: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
            return inner(*arguments, **named)

    return call


def to_uint8(video: Tensor) -> Tensor:
    """Values in [-1, 1], others clamped, as whole numbers from 0 to 255, rounded to the nearest."""
    return video.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
