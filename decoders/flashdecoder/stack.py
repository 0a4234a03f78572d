"""A stack of blocks with a rolling window over latent frames, run frame by frame or over a whole clip."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from decoders.flashdecoder import rope
from decoders.flashdecoder.blocks import Block, KeyValue
from decoders.layers.tables import kept

Cache = list[tuple[KeyValue, ...]]  # for each layer the frames that later steps may see, oldest first


class Grid(NamedTuple):
    """Tokens of one latent frame."""

    rows: int
    columns: int


@kept(32)
def _table(times: range, grid: Grid, split: tuple[int, int, int], theta: float, device: torch.device) -> rope.Table:
    return rope.table(times, *grid, split, theta, device)


class RollingStack(nn.Module):
    """Blocks that see the current latent frame and at most ``window - 1`` earlier ones (paper section 3.3, Algorithm 1).

    Args:
        depth: number of blocks.
        window: latent frames in the window, the current one included; None keeps them all (the paper's full-context
            baseline, whose state grows with the clip).
        times_per_frame: temporal positions within one latent frame: 1 in the backbone, stride_t in the refinement.
        split, theta: of the rotary embedding.
        checkpointing: recompute each block in the backward pass.
        detach_cache: stop gradients at the frame boundary (saves memory, loses the past's training signal).
        block: arguments of every ``Block``.
    """

    def __init__(
        self,
        depth: int,
        window: int | None,
        times_per_frame: int,
        split: tuple[int, int, int],
        theta: float,
        checkpointing: bool,
        detach_cache: bool,
        block: dict,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(**block) for _ in range(depth))
        self.window = window
        self.times_per_frame = times_per_frame
        self.split, self.theta = tuple(split), theta
        self.checkpointing = checkpointing
        self.detach_cache = detach_cache

    def empty_cache(self) -> Cache:
        return [() for _ in self.blocks]

    def _tables(self, frames: int, grid: Grid, device: torch.device) -> tuple[rope.Table, rope.Table]:
        """Rotations of the current frame's queries, and of the keys of the last ``frames`` frames."""
        per_frame = self.times_per_frame
        keys = _table(range(-(frames - 1) * per_frame, per_frame), grid, self.split, self.theta, device)
        # Not the last rows of the keys' table: a view with an offset is an input that torch.compile cannot make dynamic.
        return _table(range(per_frame), grid, self.split, self.theta, device), keys

    def _run(self, function, *inputs):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    def _kept(self, past: tuple[KeyValue, ...], new: KeyValue) -> tuple[KeyValue, ...]:
        if self.detach_cache:
            new = (new[0].detach(), new[1].detach())
        frames = (*past, new)
        return frames if self.window is None else frames[max(0, len(frames) - (self.window - 1)) :]

    def step(self, x: Tensor, cache: Cache, grid: Grid, last: int | None = None) -> tuple[Tensor, Cache]:
        """Tokens "b s D" of one latent frame and the cache before it -> the same after it. Nothing changes in place.

        ``last``: only so many tokens, from the end, are asked for, which spares the last block the others; None: all.
        """
        frames = len(cache[0]) + 1 if self.window is None else self.window
        tables = self._tables(frames, grid, x.device)
        kept = []
        for block, past in zip(self.blocks, cache, strict=True):
            x, new = self._run(block, x, past, *tables, last if block is self.blocks[-1] else None)
            kept.append(self._kept(past, new))
        return x, kept

    def forward_masked(self, x: Tensor, frames: int, grid: Grid) -> Tensor:
        """Tokens "b (frames s) D" of a whole clip, with the window as a mask."""
        table = _table(range(frames * self.times_per_frame), grid, self.split, self.theta, x.device)
        frame = torch.arange(x.shape[1], device=x.device) // (x.shape[1] // frames)
        age = frame[:, None] - frame[None, :]
        mask = (age >= 0) & (age < (self.window or frames))
        for block in self.blocks:
            x = self._run(block.forward_masked, x, table, mask)
        return x

    def forward_parallel(self, x: Tensor, frames: int, grid: Grid) -> Tensor:
        """Tokens "b (frames s) D" of a whole clip, layer by layer, without a mask."""
        window = min(self.window or frames, frames)
        tables = self._tables(window, grid, x.device)
        for block in self.blocks:
            x = self._run(block.forward_parallel, x, frames, window, *tables)
        return x
