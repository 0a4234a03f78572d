"""FlashDecoder's block and head as its optimised inference runs them (fast.py); weights are shared with the model."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.flashdecoder import attention, rope
from decoders.flashdecoder.blocks import HEAD_DIM, Block, RMSNorm
from decoders.flashdecoder.stack import Grid
from decoders.layers import products
from decoders.layers.deployed import to_uint8

WHOLE_MLP = 16_384  # more tokens than this go through the MLPs in pieces: 1080p's hidden layer alone would take 1.2 GB
PIECE = 8_192  # tokens of a piece; products of this height still run at the full rate


class Tables(NamedTuple):
    """Rotations, each "tokens 1 64": queries of the current frame, keys of the frames in the window."""

    query: rope.Table
    key: rope.Table


def shared(linear: nn.Linear) -> nn.Linear:
    """The same weights in a layer of its own, which may be replaced by an 8-bit one."""
    twin = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    twin.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
    return twin


def gain_of(norm: nn.Module) -> nn.Parameter | None:
    return nn.Parameter(norm.gain.detach(), requires_grad=False) if isinstance(norm, RMSNorm) else None


def normalise(x: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(x, gain.shape, gain, eps)


def rotate(x: Tensor, table: rope.Table) -> Tensor:
    """As rope.rotate, with tables over the whole head, the sine's first half negated."""
    cos, sin = table
    swapped = x.unflatten(-1, (2, HEAD_DIM // 2)).flip(-2).flatten(-2)
    return (x.float() * cos + swapped.float() * sin).to(x.dtype)


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of single tokens "b s D", over pieces of the sequence where the whole would need much memory."""
    tokens = x.shape[0] * x.shape[1]
    if tokens <= WHOLE_MLP:
        return function(x)
    return torch.cat([function(piece) for piece in x.chunk(-(-tokens // PIECE), dim=1)], dim=1)


class FastBlock(nn.Module):
    """A block between two residual sums: the sum with the branch before it comes first, its own last branch is left open."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        source = block.attention
        self.splits = source.splits
        self.qkv, self.out = shared(source.qkv), shared(source.out)
        self.gate_up, self.down = shared(block.gate_up), shared(block.down)
        self.attention_gain, self.mlp_gain = gain_of(block.attention_norm), gain_of(block.mlp_norm)
        self.q_gain, self.k_gain, self.v_gain = (
            gain_of(norm) for norm in (source.q_norm, source.k_norm, source.v_norm)
        )
        self.attention_scales = None  # of the FP8 kernel, set by calibration
        self.observe: Callable[[Tensor, Tensor, Tensor], None] | None = None  # sees queries, keys and values

    def mlp(self, x: Tensor) -> Tensor:
        return products.mlp(self.gate_up, self.down, x, self.mlp_gain)

    def forward(
        self, x: Tensor, branch: Tensor, cache: tuple[Tensor, Tensor], past: int, tables: Tables, last: int, kernel: str
    ) -> tuple[Tensor, Tensor]:
        """One step; ``cache`` (keys, values) takes in the current frame in place.

        Args:
            x, branch: "b s D", their sum is the input.
            past: tokens of earlier frames, at the caches' end.
            last: how many of the tokens, from the end, go on.
            kernel: the attention's name.

        Returns:
            x and branch of the next block.
        """
        x = x + branch
        parts = products.linear(self.qkv, x, self.attention_gain).split(self.splits, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, HEAD_DIM)) for part in parts)
        keys, values = normalise(k, self.k_gain), normalise(v, self.v_gain)
        if past:
            keys, values = (torch.cat([old[:, -past:], new], 1) for old, new in zip(cache, (keys, values), strict=True))
        for old, new in zip(cache, (keys, values), strict=True):
            kept = min(old.shape[1], new.shape[1])
            if kept:
                old[:, -kept:].copy_(new[:, -kept:])
        x, q = x[:, -last:], q[:, -last:]
        if self.q_gain is not None:
            q = normalise(q, self.q_gain)
        q, keys = rotate(q, rope.last_frames(tables.query, last)), rotate(keys, tables.key)
        if self.observe is not None:
            self.observe(q, keys, values)
        mixed = attention.attend(kernel, q, keys, values, self.attention_scales)
        x = products.linear(self.out, mixed.flatten(2), residual=x)
        return x, in_pieces(self.mlp, x)


class FastHead(nn.Module):
    """Tokens to pixels, as float "b 3 t h w" or, quantised in the same pass, as uint8 "b t h w 3"."""

    def __init__(self, head: nn.Module, uint8: bool) -> None:
        super().__init__()
        self.patch, self.uint8 = head.patch, uint8
        self.gain = gain_of(head.norm)
        self.up = shared(head.up) if head.up is not None else None
        self.down = shared(head.down) if head.down is not None else None
        self.pixels = shared(head.pixels)
        if uint8:  # rows in the order of the bytes of a pixel row, so that these are written in one run
            weight = rearrange(head.pixels.weight.detach(), "(c p) d -> (p c) d", c=3).contiguous()
            self.pixels.weight = nn.Parameter(weight, requires_grad=False)

    def tokens(self, x: Tensor) -> Tensor:
        gain = self.gain
        if self.up is not None:
            x, gain = products.mlp(self.up, self.down, x, gain, "silu"), None
        x = products.linear(self.pixels, x, gain)
        if self.uint8:
            x = to_uint8(x)
        return x

    def forward(self, x: Tensor, branch: Tensor, grid: Grid) -> Tensor:
        x = in_pieces(self.tokens, x + branch)
        layout = "b (t y x) (p q c) -> b t (y p) (x q) c" if self.uint8 else "b (t y x) (c p q) -> b c t (y p) (x q)"
        return rearrange(x, layout, y=grid.rows, x=grid.columns, p=self.patch, q=self.patch).contiguous()
