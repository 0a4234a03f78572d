"""A picture decoded in overlapping tiles, for convolutional decoders that cannot stream: activations are those of one tile."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def decode_in_tiles(
    decode: Callable[[Tensor], Tensor],
    latent: Float[Tensor, "b c n y x"],
    stride_hw: int,
    tile: tuple[int, int],
    step: tuple[int, int],
) -> Float[Tensor, "b 3 t h w"]:
    """``decode`` on tiles of at most ``tile`` (height, width) pixels, ``step`` pixels apart, with linear blending between them.

    Whatever reaches further than a tile's overlap differs from the whole picture; what fits one tile is decoded whole.

    Raises:
        ValueError: tiles that do not overlap or touch, or that are no whole number of latent pixels.
    """
    for side, apart in zip(tile, step, strict=True):
        if side < 1 or side % stride_hw or apart % stride_hw or not 0 < apart <= side:
            raise ValueError(
                f"tiles of {tile[0]}x{tile[1]} pixels, {step[0]}x{step[1]} apart: both are multiples of {stride_hw}, and "
                "the distance is no more than the tile"
            )
    rows, columns = latent.shape[3:]
    if rows * stride_hw <= tile[0] and columns * stride_hw <= tile[1]:
        return decode(latent)
    video, weight = None, torch.zeros(rows * stride_hw, columns * stride_hw, device=latent.device)
    sides = [side // stride_hw for side in tile]
    for top in _starts(rows, sides[0], step[0] // stride_hw):
        for left in _starts(columns, sides[1], step[1] // stride_hw):
            piece = decode(latent[..., top : top + sides[0], left : left + sides[1]]).float()
            ramps = [_ramp(piece.shape[3 + axis], tile[axis] - step[axis], piece.device) for axis in (0, 1)]
            mask = ramps[0][:, None] * ramps[1][None]
            if video is None:
                video = piece.new_zeros(*piece.shape[:3], *weight.shape)
            y, x = (slice(at * stride_hw, at * stride_hw + n) for at, n in zip((top, left), mask.shape, strict=True))
            video[..., y, x] += piece * mask
            weight[y, x] += mask
    return video.div_(weight)


def _starts(length: int, side: int, step: int) -> list[int]:
    """Where tiles begin: ``step`` apart, the last one at the end."""
    return [0] if length <= side else [*range(0, length - side, step), length - side]


def _ramp(length: int, overlap: int, device: torch.device) -> Float[Tensor, " length"]:
    """Weights of a tile's pixels: they rise over the overlap, and are never zero."""
    up = torch.arange(1, length + 1, device=device, dtype=torch.float32) / (overlap + 1)
    return torch.minimum(up, up.flip(0)).clamp(max=1)
