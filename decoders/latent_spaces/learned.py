"""A latent space in the making: its encoder is trained by the decoder that uses it.

Here are only its shape and, for the end of the training, the statistics of its latents. Until those are frozen its
latents have mean 0 and std 1 by decree: they are what the encoder gives.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from decoders.latent_spaces.base import LatentSpace, hash_parts

# Of a posterior; that of losses/kl.py, which inference does not import.
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclass
class LearnedConfig:
    """Shape of the space."""

    channels: int = 16
    stride_t: int = 4  # pixel frames per latent frame after the first
    stride_hw: int = 8  # pixels per latent pixel, in height and in width
    chunk: int | None = None  # frames after which coding starts anew, as REGEN's paper has it of MAGVIT-v2; null: never

    def __post_init__(self) -> None:
        for name in ("channels", "stride_t", "stride_hw"):
            if getattr(self, name) < 1:
                raise ValueError(f"learned space: {name} is {getattr(self, name)}; it must be at least 1")
        if self.chunk is not None and (self.chunk < 1 or (self.chunk - 1) % self.stride_t):
            below = 1 + max(self.chunk - 1, 0) // self.stride_t * self.stride_t
            raise ValueError(
                f"learned space: a chunk of {self.chunk} frames; with stride_t={self.stride_t} it has 1 + a multiple of it, such as "
                f"{below} or {below + self.stride_t}"
            )


class Learned(LatentSpace):
    """The shape of a causal space whose encoder belongs to the decoder. It checks sizes and cannot encode.

    With ``config.chunk`` a video is coded in chunks of so many frames, each by itself as if it were a clip: ``t = 17`` frames are
    ``n = 5`` latent frames with ``stride_t = 4``, and 34 are 10. The last chunk may be any shorter clip, so 1 + 4 k and 18 + 4 k frames
    are coded too.

    Attributes:
        chunk: frames of a chunk; there only where coding starts anew.
    """

    Config = LearnedConfig
    name = "learned"
    causal = True

    def __init__(self, config: LearnedConfig | None = None) -> None:
        self.config = config or LearnedConfig()
        self.channels = self.config.channels
        self.stride_t = self.config.stride_t
        self.stride_hw = self.config.stride_hw
        if self.config.chunk is not None:
            self.chunk = self.config.chunk

    @property
    def fingerprint(self) -> str:
        """Hash of the shape, marked ``learned``: two spaces of one shape cannot be told apart, for both are unfinished."""
        shape = {"channels": self.channels, "stride_t": self.stride_t, "stride_hw": self.stride_hw}
        if self.config.chunk is not None:
            shape["chunk"] = self.config.chunk
        return f"learned-{hash_parts('learned', shape)}"

    def latent_frames(self, t: int) -> int:
        if self.config.chunk is None or t < 1:
            return super().latent_frames(t)
        chunks, rest = divmod(t, self.chunk)
        if rest and (rest - 1) % self.stride_t:
            raise ValueError(self._length_error(t))
        whole = 1 + (self.chunk - 1) // self.stride_t
        return chunks * whole + (1 + (rest - 1) // self.stride_t if rest else 0)

    def pixel_frames(self, n: int) -> int:
        if self.config.chunk is None or n < 1:
            return super().pixel_frames(n)
        chunks, rest = divmod(n, 1 + (self.chunk - 1) // self.stride_t)
        return chunks * self.chunk + (1 + (rest - 1) * self.stride_t if rest else 0)

    def padded_frames(self, t: int) -> int:
        if self.config.chunk is None:
            return super().padded_frames(t)
        return t + (1 - t % self.chunk) % self.stride_t if t % self.chunk else t

    def _length_error(self, t: int) -> str:
        if self.config.chunk is None or t < 1:
            return super()._length_error(t)
        start = t // self.chunk * self.chunk
        below = start + 1 + (t - start - 1) // self.stride_t * self.stride_t
        return (
            f"{t} frames: the learned space codes chunks of {self.chunk} frames, each by itself, and after them one of "
            f"1 + {self.stride_t}k; the nearest are {below} and {self.padded_frames(t)}"
        )

    def _encode(
        self, video: Float[Tensor, "b 3 t h w"], sample: bool, generator: torch.Generator | None
    ) -> Float[Tensor, "b c n y x"]:
        raise ValueError(
            "the learned space has no encoder of its own: it needs a family that trains one (decoders.baseline.Baseline "
            "with decoder.train_encoder=true); to use a trained one, name the frozen space that was made of it"
        )


def draw(
    mean: Float[Tensor, "b c n y x"], log_variance: Float[Tensor, "b c n y x"], generator: torch.Generator | None = None
) -> Float[Tensor, "b c n y x"]:
    """A sample of the diagonal Gaussian, float32; differentiable in both (reparameterised). ``generator`` decides it."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return mean.float() + (0.5 * log_variance.float()).exp() * noise


@torch.no_grad()
def measure_statistics(
    encode: Callable[[Tensor], Tensor], clips: Iterable[Tensor]
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Mean and standard deviation of every latent channel over ``clips`` "b 3 t h w" of any sizes, float64 on the CPU.

    Every latent element weighs the same. One clip is held at a time. For the statistics of a space, ``encode`` should
    draw from the posterior, as what a diffusion model learns from is drawn; the mean alone has a smaller spread.

    Raises:
        ValueError: there are no clips, or a channel is constant (a std of 0 cannot normalise) or not finite.
    """
    count, mean, squares = 0, 0.0, 0.0  # merged as in Chan, Golub and LeVeque (1983): no difference of large sums
    for clip in clips:
        latent = encode(clip).detach().double().cpu().transpose(0, 1).flatten(1)
        size, here = latent.shape[1], latent.mean(1)
        shift = here - mean
        squares = squares + (latent - here[:, None]).square().sum(1) + shift.square() * (count * size / (count + size))
        mean = mean + shift * (size / (count + size))
        count += size
    if not count:
        raise ValueError("there are no clips to measure the latents of")
    std = (squares / count).sqrt()
    bad = [str(channel) for channel, value in enumerate(std.tolist()) if not 0 < value < float("inf")]
    if bad:
        raise ValueError(f"latent channels {', '.join(bad)} are constant or not finite over {count} positions")
    return mean, std
