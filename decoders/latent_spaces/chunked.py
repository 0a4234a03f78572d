"""The space of an encoder that works chunk by chunk, as REGEN's does (arXiv 2503.08665, section 3.1).

A chunk is ``stride_t + 1`` frames and has two latent frames: content, of its first frame, and motion, of the rest. Chunks
do not overlap: a video of ``j`` chunks has ``t = j * (stride_t + 1)`` frames and ``n = 2 * j`` latent frames, and an image is
content alone, ``t = n = 1``. As in ``learned.py`` only the shape is here: the encoder belongs to the decoder that trains it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from decoders.latent_spaces.base import LatentSpace, hash_parts


@dataclass
class ChunkedConfig:
    """Shape of the space; the defaults are REGEN's at its lowest compression."""

    channels: int = 8
    stride_t: int = 4  # k: frames of a chunk after its first
    stride_hw: int = 8  # pixels per latent pixel, in height and in width

    def __post_init__(self) -> None:
        for name in ("channels", "stride_t", "stride_hw"):
            if getattr(self, name) < 1:
                raise ValueError(f"chunked space: {name} is {getattr(self, name)}; it must be at least 1")


class Chunked(LatentSpace):
    """The shape of a chunked space whose encoder belongs to the decoder. It checks sizes and cannot encode.

    Attributes:
        chunk: frames of a chunk.
    """

    Config = ChunkedConfig
    name = "chunked"
    causal = True  # an image is a clip of one frame

    def __init__(self, config: ChunkedConfig | None = None) -> None:
        self.config = config or ChunkedConfig()
        self.channels = self.config.channels
        self.stride_t = self.config.stride_t
        self.stride_hw = self.config.stride_hw
        self.chunk = self.stride_t + 1

    @property
    def fingerprint(self) -> str:
        """Hash of the shape, marked ``chunked``: two spaces of one shape cannot be told apart by it."""
        shape = {"channels": self.channels, "stride_t": self.stride_t, "stride_hw": self.stride_hw}
        return f"chunked-{hash_parts('chunked', shape)}"

    def latent_frames(self, t: int) -> int:
        if t == 1:
            return 1
        if t < 1 or t % self.chunk:
            raise ValueError(self._length_error(t))
        return 2 * (t // self.chunk)

    def pixel_frames(self, n: int) -> int:
        if n == 1:
            return 1
        if n < 1 or n % 2:
            raise ValueError(
                f"{n} latent frames: a video has content and motion in turn, so an even number; an image has 1"
            )
        return n // 2 * self.chunk

    def padded_frames(self, t: int) -> int:
        return t if t == 1 else -(-t // self.chunk) * self.chunk

    def _encode(
        self, video: Float[Tensor, "b 3 t h w"], sample: bool, generator: torch.Generator | None
    ) -> Float[Tensor, "b c n y x"]:
        raise ValueError(
            "the chunked space has no encoder of its own: it needs a family that trains one, such as decoders.regen.Regen "
            "with decoder.encoder set"
        )

    def _length_error(self, t: int) -> str:
        t = max(t, 0)
        below = t // self.chunk * self.chunk or 1
        return (
            f"{t} frames: the chunked space encodes whole chunks of {self.chunk} frames, or an image of 1; the nearest are "
            f"{below} and {(t // self.chunk + 1) * self.chunk}. pad=replicate repeats the last frame and cuts the output back"
        )
