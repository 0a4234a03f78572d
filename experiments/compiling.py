"""``trainer.compile``: torch.compile in training, on the network as a whole or on each of its repeated blocks.

Blocks are compiled in place of the network because a network in a loop over latent frames becomes one graph of all frames
times all blocks, which takes minutes to compile, and again for every number of frames. Blocks of one class share their
kernels, which take any size once a second one is there, and further sizes compile nothing. Activation checkpointing
and DDP lie outside of blocks and see none of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from decoders.base import VideoDecoder
from experiments.strategy import compile_network

# Kernels of one block: with and without a past, with and without gradients, in training and in validation, of one size and of
# any, images apart. Above the limit torch would go on without compiling, in silence: it raises FailOnRecompileLimitHit in place.
MOST_KERNELS = 64


def compile_decoder(decoder: VideoDecoder, what: bool | str, sharded: bool, many_sizes: bool) -> list[nn.Module]:
    """What ``trainer.compile`` asks for, on ``decoder``'s network; the modules that are compiled.

    ``sharded``: weights are spread over processes; then what is gathered by itself is compiled, whatever is asked for.
    ``many_sizes``: training has batches of several shapes, so that kernels of any size are made at once.

    Raises ConfigError: weights are sharded, and nothing is gathered by itself.
    """
    if what == "blocks":
        decoder.training_config.compile_losses = True
    units = repeated_blocks(decoder.model)
    if what != "blocks" or sharded or not units:
        compile_network(decoder, sharded)
        return decoder.shard_units() if sharded else [decoder.model]
    limit_kernels()
    for unit in units:
        switch(unit, on=True, many_sizes=many_sizes)
    return units


def switch(unit: nn.Module, on: bool, many_sizes: bool = True, backend: str = "inductor") -> None:
    """Let calls of ``unit`` and of its other ways forward (``forward_parallel``) go through kernels, or through its own code
    again. The first leaves torch's limits raised."""
    limit_kernels()

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return _with_own_memory(torch.compile(function, backend=backend, dynamic=True if many_sizes else None))

    unit._compiled_call_impl = compiled(unit._call_impl) if on else None  # as nn.Module.compile sets it
    for name in (name for name in vars(type(unit)) if name.startswith("forward_")):
        unit.__dict__.pop(name, None)
        if on:
            setattr(unit, name, compiled(getattr(unit, name)))


def _with_own_memory(function: Callable[..., Any]) -> Callable[..., Any]:
    """Constants that lie in the middle of another tensor are copied: torch 2.14 cannot compile for any size with such
    arguments (AssertionError: sources must not be empty). They are tables of a few rows."""

    def own(value: Any) -> Any:
        inside = isinstance(value, Tensor) and not value.requires_grad and value._is_view() and value.storage_offset()
        return value.clone() if inside else value

    return lambda *args, **kwargs: function(*tree_map(own, args), **tree_map(own, kwargs))


def limit_kernels() -> None:
    """Room for a block's kernels, and an error where there is none, in place of the eager code."""
    torch._dynamo.config.recompile_limit = MOST_KERNELS
    torch._dynamo.config.accumulated_recompile_limit = 8 * MOST_KERNELS
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """What the lists of layers in ``network`` hold, the outermost that are no lists themselves and no single layers."""
    found: list[nn.Module] = []

    def look(module: nn.Module, listed: bool) -> None:
        children = list(module.children())
        lists = [child for child in children if isinstance(child, nn.ModuleList | nn.Sequential)]
        if listed and children and not lists:
            found.append(module)
            return
        for child in children:
            look(child, isinstance(module, nn.ModuleList | nn.Sequential) and child not in lists)

    look(network, False)
    return [module for module in found if any(True for _ in module.parameters())]
