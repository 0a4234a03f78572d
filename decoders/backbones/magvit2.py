"""MAGVIT-v2's autoencoder with continuous latents, as REGEN uses it (arXiv 2503.08665, sections 3.1, B.2.1 and B.3).

The encoder is REGEN's own; with the decoder, its mirror image, it is the baseline that REGEN is compared with. No code or
weights of either are public. What the paper leaves open is marked here as ours.

A video is encoded and decoded in two parts, the first frame and the rest, which sees the first. Its first latent frame
is then the latent of that frame as an image, bit for bit. With ``chunk`` this starts anew after every so many frames, and
nothing passes from one chunk to the next.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decoders.backbones.magvit2_layers import (
    NORMS,
    CausalConv3d,
    Head,
    ResBlock,
    Stride,
    Upsample,
    initialise,
)
from decoders.backbones.staged import ConvStream, StagedDecoder, StagedEncoder
from decoders.layers.causal_conv import Chain, Past

# Multipliers and strides for k frames per latent frame. The multipliers are the paper's (B.3). The strides are ours: space
# first, time late, as in MAGVIT-v2; every stage ends in a reduction, perhaps by 1, or 32 could not be reached (Fig. 10).
LAYOUTS: dict[int, tuple[list[int], list[str]]] = {
    4: ([1, 2, 4, 6], ["122", "222", "222", "111"]),
    8: ([1, 2, 4, 6, 6], ["122", "222", "222", "211", "111"]),
    16: ([1, 2, 4, 6, 6], ["122", "222", "222", "211", "211"]),
    32: ([1, 2, 4, 6, 6], ["222", "222", "222", "211", "211"]),
}


@dataclass
class Magvit2Config:
    """The layout of an autoencoder; the defaults are the paper's for 4 frames per latent frame."""

    channels: int = 128  # width of the first stage
    multipliers: list[int] = field(default_factory=lambda: list(LAYOUTS[4][0]))  # of the width, one per stage
    strides: list[str] = field(default_factory=lambda: list(LAYOUTS[4][1]))  # frames, rows, columns; where a stage ends
    res_blocks: int = 4  # per stage; ours, MAGVIT-v2's number
    latent_channels: int = 8
    pad_t: Literal["replicate", "zeros"] = "replicate"  # what stands before the first frame: that frame; ours
    norm: Literal["layer", "group"] = "layer"  # over a pixel's channels, or a frame's groups: frames never mix; ours
    decoder_channels: int | None = None  # the decoder's width, where it differs (the paper's widened decoder)
    late: bool = False  # the decoder enlarges just before its last stage, not along the way (the paper's k = 32)
    checkpointing: bool = False  # recompute blocks in the backward pass
    chunk: int | None = None  # frames after which coding starts anew (the paper's 17, and 33 for k = 32); null: never

    def __post_init__(self) -> None:
        self.multipliers, self.strides = list(self.multipliers), [str(stride) for stride in self.strides]
        if not self.multipliers or len(self.multipliers) != len(self.strides):
            raise ValueError(
                f"magvit2: {len(self.multipliers)} multipliers for {len(self.strides)} strides; every stage has one of "
                "each"
            )
        for name in ("channels", "res_blocks", "latent_channels", "decoder_channels"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"magvit2: {name} is {value}; it must be 1 or more")
        if min(self.multipliers) < 1:
            raise ValueError(f"magvit2: multipliers are {self.multipliers}; each must be 1 or more")
        for stride in self.strides:
            if len(stride) != 3 or set(stride) - {"1", "2"} or stride[1] != stride[2]:
                raise ValueError(f"magvit2: stride {stride!r} is none of 111, 122, 211 and 222 (frames, rows, columns)")

        if self.chunk is not None and (self.chunk < 1 or (self.chunk - 1) % self.stride_t):
            raise ValueError(
                f"magvit2: a chunk of {self.chunk} frames; the strides make {self.stride_t} frames a latent frame, so it has 1 + a "
                f"multiple of {self.stride_t}"
            )

    @property
    def chunk_latents(self) -> int | None:
        """Latent frames of a chunk."""
        return None if self.chunk is None else 1 + (self.chunk - 1) // self.stride_t

    @property
    def steps(self) -> list[Stride]:
        """The strides as numbers."""
        return [(int(stride[0]), int(stride[1]), int(stride[2])) for stride in self.strides]

    @property
    def stride_t(self) -> int:
        return prod(step[0] for step in self.steps)

    @property
    def stride_hw(self) -> int:
        return prod(step[1] for step in self.steps)

    def widths(self, channels: int | None = None) -> list[int]:
        """Channels of every stage, the encoder's order."""
        return [(channels or self.channels) * multiplier for multiplier in self.multipliers]


def layout(k: int, **changes: object) -> Magvit2Config:
    """The paper's encoder with ``k`` frames per latent frame, 4, 8, 16 or 32, with some values changed.

    REGEN and the baseline share it: 1 + k frames are two latent frames, the baseline's 17 frames five, three or two.
    """
    if k not in LAYOUTS:
        raise ValueError(
            f"no MAGVIT-v2 layout for {k} frames per latent frame; there are {', '.join(map(str, LAYOUTS))}"
        )
    multipliers, strides = LAYOUTS[k]
    return replace(Magvit2Config(multipliers=list(multipliers), strides=list(strides), late=k == 32), **changes)


def widened(config: Magvit2Config, parameters: float = 1.21e9, multiple: int = 8) -> Magvit2Config:
    """``config`` with the decoder's width, a multiple of ``multiple``, that brings its parameters nearest to ``parameters``."""
    low, high = multiple, multiple
    while num_parameters(replace(config, decoder_channels=high)) < parameters:
        low, high = high, 2 * high
    while high - low > multiple:
        middle = (low + high) // (2 * multiple) * multiple
        if num_parameters(replace(config, decoder_channels=middle)) < parameters:
            low = middle
        else:
            high = middle
    near = [replace(config, decoder_channels=width) for width in (low, high)]
    return min(near, key=lambda wide: abs(num_parameters(wide) - parameters))


def num_parameters(config: Magvit2Config) -> int:
    """Of the decoder, without allocating it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Magvit2Decoder(config).parameters())


class Magvit2Encoder(StagedEncoder):
    """RGB in [-1, 1] "b 3 t h w", t = 1 + a multiple of k, to latents "b c n y x", n = 1 + (t - 1) / k, not normalised.

    The first latent frame depends on the first frame only. Stages: conv_in, down0 ..., out. With ``config.chunk`` a video is
    chunks of so many frames, the last perhaps shorter, each coded as if it were the whole.

    Args:
        variational: give the mean and the log-variance of a posterior, not a latent alone.
    """

    def __init__(self, config: Magvit2Config, variational: bool = False) -> None:
        norm, replicate = NORMS[config.norm], config.pad_t == "replicate"
        widths = config.widths()
        stages: dict[str, nn.Module] = {"conv_in": Chain(CausalConv3d(3, widths[0], replicate=replicate))}
        for number, (before, width, step) in enumerate(
            zip([widths[0], *widths[:-1]], widths, config.steps, strict=True)
        ):
            blocks = [ResBlock(before if i == 0 else width, width, norm, replicate) for i in range(config.res_blocks)]
            stages[f"down{number}"] = Chain(*blocks, CausalConv3d(width, width, step, replicate))
        out = config.latent_channels * (2 if variational else 1)
        stages["out"] = Chain(Head(widths[-1], out, norm, replicate, pointwise=True))
        super().__init__(stages)
        self.config, self.variational = config, variational
        initialise(self)
        self.set_checkpointing(config.checkpointing)

    def forward(self, video: Float[Tensor, "b 3 t h w"]) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance (None where not ``variational``) of the whole clip, in two calls of the network per chunk.

        Raises:
            ValueError: a length or size that strides do not divide; names the nearest.
        """
        return self._moments(video, max(video.shape[2] - 1, 1))

    @torch.no_grad()
    def encode_in_chunks(self, video: Float[Tensor, "b 3 t h w"]) -> tuple[Tensor, Tensor | None]:
        """The same, k frames at a time: memory does not grow with the clip."""
        return self._moments(video, self.config.stride_t)

    def _moments(self, video: Tensor, frames: int) -> tuple[Tensor, Tensor | None]:
        self._check(*video.shape[2:])
        chunks = video.split(self.config.chunk or video.shape[2], dim=2)
        mean = torch.cat([self.run_in_chunks(chunk, frames) for chunk in chunks], 2)
        return tuple(mean.chunk(2, dim=1)) if self.variational else (mean, None)

    def _check(self, t: int, h: int, w: int) -> None:
        k, s, chunk = self.config.stride_t, self.config.stride_hw, self.config.chunk
        start = 0 if chunk is None else t // chunk * chunk  # of the last chunk, which may be shorter
        if t < 1 or (t > start and (t - start - 1) % k):
            below = start + 1 + max(t - start - 1, 0) // k * k
            rule = "" if chunk is None else f" after chunks of {chunk}"
            raise ValueError(
                f"{t} frames: this encoder takes 1 or 1 + a multiple of {k}{rule}; the nearest are {below} and {below + k}"
            )
        if h < s or w < s or h % s or w % s:
            below, above = ((max(h // s, 1) * s, max(w // s, 1) * s), (max(-(-h // s), 1) * s, max(-(-w // s), 1) * s))
            raise ValueError(
                f"{h}x{w} pixels: this encoder takes multiples of {s}; the nearest are {below[0]}x{below[1]} and "
                f"{above[0]}x{above[1]}"
            )


class Magvit2Decoder(StagedDecoder):
    """Normalised latents "b c n y x" to RGB "b 3 1+(n-1)*k h w": the encoder's stages backwards, chunk by chunk.

    Stages: conv_in, up<last> ... up0, out. Every stage enlarges, then has its blocks; ``late`` enlarges all at once before
    up0, in a stage of its own.

    Args:
        mean, std: of the space's latents, one number per channel; None: 0 and 1.
    """

    def __init__(self, config: Magvit2Config, mean: list[float] | None = None, std: list[float] | None = None) -> None:
        self.config = config
        norm, replicate = NORMS[config.norm], config.pad_t == "replicate"
        widths = config.widths(config.decoder_channels)
        stages: dict[str, nn.Module] = {
            "conv_in": Chain(CausalConv3d(config.latent_channels, widths[-1], replicate=replicate))
        }
        for number in reversed(range(len(widths))):
            width, after = widths[number], widths[max(number - 1, 0)]
            blocks = [
                ResBlock(width, after if i == config.res_blocks - 1 else width, norm, replicate)
                for i in range(config.res_blocks)
            ]
            enlarge = [Upsample(width, config.steps[number], replicate)]
            if config.late:
                enlarge = [Upsample(width, step, replicate) for step in reversed(config.steps)] if number == 0 else []
            stages[f"up{number}"] = Chain(*enlarge, *blocks)
        stages["out"] = Chain(Head(widths[0], 3, norm, replicate))
        super().__init__(stages, config.latent_channels, config.stride_t, config.stride_hw, mean, std)
        initialise(self)
        self.set_checkpointing(config.checkpointing)

    def run(
        self, x: Tensor, past: Past, first: bool, taps: Collection[str] = (), stages: Collection[str] | None = None
    ) -> tuple[Tensor, dict[str, Past], dict[str, Tensor]]:
        """As in the base; what begins a video or a chunk goes in two parts, its first frame and the rest."""
        if first and x.shape[2] > (whole := self.config.chunk_latents or x.shape[2]):
            runs = [self.run(part, None, True, taps, stages) for part in x.split(whole, dim=2)]
            features = {name: torch.cat([own[name] for _, _, own in runs], 2) for name in runs[0][2]}
            return torch.cat([video for video, _, _ in runs], 2), runs[-1][1], features
        if not first or x.shape[2] == 1:
            return super().run(x, past, first, taps, stages)
        head, past, head_features = super().run(x[:, :, :1], None, True, taps, stages)
        rest, past, features = super().run(x[:, :, 1:], past, False, taps, stages)
        both = {name: torch.cat([head_features[name], features[name]], 2) for name in features}
        return torch.cat([head, rest], 2), past, both

    @torch.no_grad()
    def step_stream(self, latent_frame: Float[Tensor, "b c y x"], state: ConvStream) -> Float[Tensor, "b 3 k h w"]:
        """As in the base; at the first latent frame of a chunk what was remembered is forgotten."""
        if self.config.chunk_latents is not None and state.steps % self.config.chunk_latents == 0:
            state.past, state.started = None, False
        return super().step_stream(latent_frame, state)
