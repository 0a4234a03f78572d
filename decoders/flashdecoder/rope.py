"""3D rotary position embedding, relative to the current frame.

The paper applies RoPE to queries and keys "separately" along time, height and width (section 3.2) and assigns temporal
positions relative to the current window (section 4.3). Scores depend on differences of positions only, so we count time
from the current frame: it is 0, the frame before it is -1. Keys are cached *before* rotation; then nothing in a stream's
state knows how long the stream has run, and the tables are the same at every step.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Table = tuple[Tensor, Tensor]  # cos and sin, each "s 1 d/2": one row for each token of the sequence


def inverse_frequencies(dim: int, theta: float) -> Float[Tensor, " pairs"]:
    """``theta ** (-2 i / dim)`` for i below dim / 2, in float64 so that long positions keep their phase."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def table(times: range, rows: int, columns: int, split: tuple[int, int, int], theta: float, device) -> Table:
    """Cosines and sines for tokens in (time, row, column) order.

    Args:
        times: temporal positions, e.g. ``range(-1, 1)`` for the previous and the current frame.
        rows, columns: the token grid; positions are plain integers, without rescaling to the grid's size, so that a
            size that was never trained on sees the same local geometry.
        split: how many of the head's dimensions rotate with time, height and width.
        theta: base of the frequencies.
    """
    axes = (torch.arange(times.start, times.stop), torch.arange(rows), torch.arange(columns))
    angles = [
        torch.outer(axis.double(), inverse_frequencies(dim, theta)) for axis, dim in zip(axes, split, strict=True)
    ]
    time, row, column = angles
    shape = (len(times), rows, columns)
    grid = torch.cat(
        [
            time[:, None, None].expand(*shape, -1),
            row[None, :, None].expand(*shape, -1),
            column[None, None, :].expand(*shape, -1),
        ],
        dim=-1,
    )
    flat = grid.reshape(-1, 1, sum(split) // 2).to(torch.float32)
    return flat.cos().to(device), flat.sin().to(device)


def rotate(x: Float[Tensor, "b s heads d"], cos_sin: Table) -> Float[Tensor, "b s heads d"]:
    """Rotate dimension pairs (i, i + d/2) of every head; in float32, back in the dtype of ``x``."""
    cos, sin = cos_sin
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


def last_frames(cos_sin: Table, tokens: int) -> Table:
    """The rows of the newest ``tokens`` tokens (a stream that has just begun holds fewer frames than its window)."""
    cos, sin = cos_sin
    return cos[-tokens:], sin[-tokens:]
