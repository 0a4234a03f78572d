"""Attention that begins at the same place of every frame, for runs too short to find it.

Queries and keys get equal biases in the dimensions that turn with height and width, so that before any training a token
sees the tokens at and around its own place, in all frames alike. Ours. The released code knows the wish: it has a schedule,
off by default, that begins with attention to the same place of the reference alone.
"""

import torch
from torch import Tensor, nn

from decoders.refdecoder.transformer import THETA, Block

FALL = 4.0  # how much lower the score of the next token to the side is
SLOWEST = 0.1  # radians a token: slower pairs of dimensions hardly tell neighbours apart
TILT = 0.75  # slower pairs weigh more, which keeps the fast ones' repetitions (6 tokens on) far below the middle
WEIGHT = 4.0  # of the bias against what random weights make of a token


@torch.no_grad()
def begin_local(blocks: nn.Module, split: tuple[int, int, int]) -> None:
    """Set the biases and gains of queries and keys in every ``Block`` of ``blocks``, in place.

    Args:
        split: dimensions of a head that turn with time, height and width.
    """
    for block in blocks.modules():
        if isinstance(block, Block):
            head = wanted(block.head_dim, split)
            size = head.square().mean().sqrt()
            whole = (head / size * WEIGHT).repeat(block.q.out_features // block.head_dim)
            for layer, norm in ((block.q, block.q_norm), (block.k, block.k_norm)):
                layer.bias.copy_(whole)
                norm.gain.copy_(size)  # a number of its own would need values, which `make show` has none of


def wanted(head_dim: int, split: tuple[int, int, int]) -> Tensor:
    """A head's query and key: their score falls by ``FALL`` from a token to its neighbour in height or width."""
    time, *sides = split
    head, start = torch.zeros(head_dim), time
    for dims in sides:
        turn = THETA ** (-torch.arange(0, dims, 2) / dims)
        weight = torch.where(turn >= SLOWEST, turn**-TILT, 0.0)
        weight = weight * FALL / (weight * (1 - turn.cos())).sum()
        head[start : start + dims : 2] = (weight * head_dim**0.5).sqrt()  # scores are divided by the root of head_dim
        start += dims
    return head
