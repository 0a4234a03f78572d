"""What a latent space is to the rest of the project: a frozen encoder with strides, a frame rule and a fingerprint.

A latent space is a plain object, not an ``nn.Module``: held by a decoder it adds nothing to ``parameters()``, to a
checkpoint or to an optimiser. Axis letters are those of ``datamodules/batch.py``.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class LatentSpace(ABC):
    """A frozen map from RGB video to normalised latents.

    Attributes:
        channels: latent channels, ``c``.
        stride_t: pixel frames per latent frame after the first.
        stride_hw: pixels per latent pixel, in height and in width.
        causal: whether the first frame has a latent of its own, so that ``t = 1 + (n - 1) * stride_t`` and an image is
            a clip of one frame. Otherwise ``t = n * stride_t``.
        gaussian: whether ``encode(sample=True)`` is one draw from the Gaussian that :meth:`moments` describes, or its mean
            where that has no variance. Otherwise moments cannot stand for the posterior.
    """

    name: str = "latent space"
    channels: int
    stride_t: int
    stride_hw: int
    causal: bool = True
    gaussian: bool = True

    @property
    def statistics(self) -> tuple[list[float], list[float]] | None:
        """Mean and std per channel of what the encoder gives before it is normalised: attributes ``mean`` and ``std`` of a space
        that has both. None: it has none, or they are no two numbers per channel."""
        mean, std = getattr(self, "mean", None), getattr(self, "std", None)
        if mean is None or std is None:
            return None
        return tuple(torch.as_tensor(values, dtype=torch.float32).flatten().tolist() for values in (mean, std))

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Short hash of everything that decides the latents' values. Latents on disk carry it."""

    @abstractmethod
    def _encode(
        self, video: Float[Tensor, "b 3 t h w"], sample: bool, generator: torch.Generator | None
    ) -> Float[Tensor, "b c n y x"]:
        """Encode a checked clip. Called without gradients and outside autocast."""

    @torch.no_grad()
    def encode(
        self, video: Float[Tensor, "b 3 t h w"], *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c n y x"]:
        """Encode RGB in [-1, 1] to normalised latents, float32, on the video's device, without gradients.

        Args:
            video: clips whose length and size pass :meth:`check`.
            sample: draw from the posterior in place of its mean, where the space has one.
            generator: source of that draw.

        Raises:
            ValueError: the space cannot encode this length or size; names the nearest that it can.
        """
        self._check_clip(video)
        with torch.autocast(video.device.type, enabled=False):
            return self._encode(video, sample, generator).float()

    @torch.no_grad()
    def moments(
        self, video: Float[Tensor, "b 3 t h w"]
    ) -> tuple[Float[Tensor, "b c n y x"], Float[Tensor, "b c n y x"] | None]:
        """Mean and log-variance of the posterior of *normalised* latents, float32: what a cache of latents holds.

        The mean is ``encode(video)``, bit for bit. No log-variance: the space gives one latent, or a sample of it is no
        draw from one Gaussian (``gaussian``).

        Raises:
            ValueError: as :meth:`encode`.
        """
        self._check_clip(video)
        with torch.autocast(video.device.type, enabled=False):
            mean, log_variance = self._moments(video)
        return mean.float(), None if log_variance is None else log_variance.float()

    def _moments(self, video: Float[Tensor, "b 3 t h w"]) -> tuple[Tensor, Tensor | None]:
        """Of a checked clip, as :meth:`_encode`. A space that draws from a Gaussian overrides this."""
        return self._encode(video, False, None), None

    def _check_clip(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video is {tuple(video.shape)}; expected RGB clips as (b, 3, t, h, w)")
        self.check(*video.shape[2:])

    def latent_frames(self, t: int) -> int:
        """Latent frames of a clip of ``t`` pixel frames. Raises ValueError for a length the space cannot encode."""
        if t < self._first or (t - self._first) % self.stride_t:
            raise ValueError(self._length_error(t))
        return 1 + (t - self._first) // self.stride_t

    def pixel_frames(self, n: int) -> int:
        """Pixel frames of ``n`` latent frames, ``n >= 1``."""
        if n < 1:
            raise ValueError(f"{n} latent frames: at least one is needed")
        return 1 + (n - 1) * self.stride_t if self.causal else n * self.stride_t

    def padded_frames(self, t: int) -> int:
        """The shortest length, ``t`` or longer, that the space can encode: what ``pad: replicate`` makes of a clip."""
        return t + (int(self.causal) - t) % self.stride_t

    @property
    def compression(self) -> float:
        """Numbers of a long video for every one of its latent: 3 t h w / (c n y x)."""
        n = 1 << 20
        return 3 * self.pixel_frames(n) * self.stride_hw**2 / (self.channels * n)

    def check(self, t: int, h: int, w: int) -> None:
        """Raise ValueError, naming the nearest valid values below and above, unless ``t`` frames of h x w fit."""
        self.latent_frames(t)
        bad = [f"{axis} {size}" for axis, size in (("height", h), ("width", w)) if size < 1 or size % self.stride_hw]
        if bad:
            sizes = " or ".join(
                dict.fromkeys(f"{y}x{x}" for y, x in zip(self._around(h), self._around(w), strict=True))
            )
            raise ValueError(
                f"{' and '.join(bad)}: the {self.name} space encodes multiples of {self.stride_hw} pixels; "
                f"the nearest to {h}x{w} is {sizes}"
            )

    def require(self) -> None:  # noqa: B027
        """Raise FileNotFoundError, naming what is missing and how to get it, unless the encoder's files are there."""

    @property
    def _first(self) -> int:
        """The shortest clip, in frames."""
        return 1 if self.causal else self.stride_t

    def _around(self, size: int) -> tuple[int, int]:
        """The nearest encodable sizes, at or below and at or above ``size``, both at least one latent pixel."""
        below = max(size // self.stride_hw, 1) * self.stride_hw
        return below, max(-(-size // self.stride_hw), 1) * self.stride_hw

    def _length_error(self, t: int) -> str:
        below = self._first + max(t - self._first, 0) // self.stride_t * self.stride_t
        near = str(below) if t < self._first else f"{below} or {below + self.stride_t}"
        rule = f"1 + {self.stride_t}k" if self.causal else f"{self.stride_t}k"
        return f"{t} frames: the {self.name} space encodes clips of {rule} frames; the nearest is {near}"


def pad_to_valid(
    video: Float[Tensor, "b 3 t h w"], space: LatentSpace, multiple: int | None = None
) -> Float[Tensor, "b 3 t2 h2 w2"]:
    """Repeat the last frame, the bottom row and the right column until ``space`` can encode the clip.

    Args:
        video: any range.
        space: says which lengths are valid.
        multiple: height and width become multiples of this many pixels; None: of the space's.
    """
    t, h, w = video.shape[2:]
    multiple = multiple or space.stride_hw
    extra = (space.padded_frames(t) - t, -h % multiple, -w % multiple)
    if not any(extra):
        return video
    return F.pad(video, (0, extra[2], 0, extra[1], 0, extra[0]), mode="replicate")


def hash_parts(*parts: str | Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> str:
    """First 16 hex digits of the sha256 of some text and settings and of named tensors (name, type, shape, bytes)."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name, tensor in sorted((tensors or {}).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
