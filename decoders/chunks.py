"""A clip of any length, encoded and decoded a few frames at a time."""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from decoders.base import VideoDecoder
from decoders.latent_spaces.base import LatentSpace


def default_chunk(space: LatentSpace, longest: int = 17) -> int:
    """The longest video of at most ``longest`` frames that ``space`` encodes, else the shortest: 17 or, not causal, 16."""
    lengths = itertools.chain(range(longest, 1, -1), itertools.count(longest + 1))
    return next(t for t in lengths if _encodes(space, t))


def _encodes(space: LatentSpace, t: int) -> bool:
    try:
        space.latent_frames(t)
    except ValueError:
        return False
    return True


@torch.no_grad()
def reconstruct(
    decoder: VideoDecoder,
    video: Float[Tensor, "b 3 t h w"],
    reference: Float[Tensor, "b 3 r h w"] | None = None,
    *,
    chunk: int = 17,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b 3 t h w"]:
    """Encode and decode ``chunk`` frames at a time, each chunk by itself and all with the same references, as RefDecoder's
    released inference does. The last chunk is filled with its last frame, which is cut off again. RGB in [-1, 1].

    Raises:
        ValueError: the space cannot encode ``chunk`` frames; names the nearest that it can.
    """
    decoder.latent_space.latent_frames(chunk)
    parts = []
    for piece in video.split(chunk, dim=2):
        size = tuple(piece.shape[2:])
        if size[0] < chunk:
            piece = torch.cat([piece, piece[:, :, -1:].expand(-1, -1, chunk - size[0], -1, -1)], dim=2)
        parts.append(decoder.decode(decoder.encode(piece), size=size, reference=reference, generator=generator))
    return torch.cat(parts, dim=2)
