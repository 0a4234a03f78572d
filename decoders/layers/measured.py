"""Which of several ways to compute the same is the fastest on CUDA: measured once for each kind of arguments, then remembered."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

_fastest: dict[Hashable, int] = {}


def fastest(key: Hashable, ways: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """The fastest of ``ways`` for ``key``; they are run some times if nobody has asked before. While a CUDA graph is being
    captured nothing can be timed: a key that was not met before gets the first."""
    if key not in _fastest:
        if torch.cuda.is_current_stream_capturing():
            return ways[0]
        times = [_time(way) for way in ways]
        _fastest[key] = times.index(min(times))
    return ways[_fastest[key]]


def kind(*arguments: Any) -> tuple:
    """A key that tells arguments apart as far as speed goes: tensors by shape, strides, type and device."""
    return tuple(
        (tuple(part.shape), part.stride(), part.dtype, part.device) if isinstance(part, torch.Tensor) else part
        for part in arguments
    )


def _time(way: Callable[[], Any], rounds: int = 5) -> float:
    """The shortest of some runs, in milliseconds, after two that compile and warm up."""
    way(), way()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        way()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)
