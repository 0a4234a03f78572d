"""VideoVAE+'s 16-channel autoencoder (4 x 8 x 8; Xing et al., arXiv 2412.17805), written from its layout.

Two autoencoders in a row. The outer one takes 8 x 8 pixels of every frame to 16 channels, with convolutions across frames
in between; the inner one takes four such frames to one. Neither is causal: n latent frames are 4n frames, and there is
nothing to stream. Equal to the released code on the same weights.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decoders.backbones.staged import StagedDecoder
from decoders.backbones.videovaeplus_layers import (
    DoubleFrames,
    Downsample,
    EdgeConv3d,
    EdgeHead,
    EdgeResBlock,
    Head,
    ResBlock,
    SpaceAttention,
    TimeAttention,
    Upsample,
)
from decoders.layers.causal_conv import Chain, FrameConv2d


@dataclass
class VideoVAEPlusConfig:
    """The layout of a VideoVAE+ autoencoder; the defaults are those of the release with 16 channels."""

    dim: int = 128  # width at full resolution
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)  # widths of the encoder's levels; the decoder's run backwards
    num_res_blocks: int = 2  # per encoder level; the decoder has one more
    channels: int = 16  # of the latents, in either part
    temporal_dim: int = 128  # width of the temporal part at full length; each halving doubles it
    num_halvings: int = 2  # of the number of frames
    groups: int = 32  # of every norm
    max_distance: int = 64  # frames that attention over time tells apart

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "num_halvings" else 1
            if min(value if isinstance(value, tuple | list) else (value,)) < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        for name, width in (("dim", self.dim), ("temporal_dim", self.temporal_dim)):
            if width % self.groups:
                raise ValueError(f"{name}={width} must be a multiple of groups={self.groups}: norms are by group")

    @property
    def stride_t(self) -> int:
        return 2**self.num_halvings

    @property
    def stride_hw(self) -> int:
        return 2 ** (len(self.dim_mult) - 1)


class VideoVAEPlusDecoder(StagedDecoder):
    """Latents "b c n y x" to RGB "b 3 4*n h w", whole clips only.

    Stages: temporal (latent time to frames, still ``c`` channels at y x x), conv_in, mid, level3 ... level0, out. Every
    level but level0 ends in its upsampling. A stage after ``temporal`` keeps the number of frames, so it can also be called
    on a single one, as ``stage(image, None, True)``. The release has no statistics of its latents: they are decoded as
    they come.
    """

    def __init__(self, config: VideoVAEPlusConfig) -> None:
        self.config, groups = config, config.groups
        widths = [config.dim * mult for mult in (*config.dim_mult, config.dim_mult[-1])]
        stages: dict[str, nn.Module] = {
            "temporal": Chain(*_temporal_decoder(config)),
            "conv_in": Chain(FrameConv2d(config.channels, widths[-1])),
            "mid": _mid(config),
        }
        for level in reversed(range(len(config.dim_mult))):
            before, width = widths[level + 1], widths[level]
            blocks = [ResBlock(before if i == 0 else width, width, groups) for i in range(config.num_res_blocks + 1)]
            stages[f"level{level}"] = Chain(*blocks, *([Upsample(width)] if level else []))
        stages["out"] = Chain(Head(widths[0], 3, groups))
        super().__init__(stages, config.channels, config.stride_t, config.stride_hw, can_stream=False)

    @classmethod
    def from_file(cls, path: str | Path) -> "VideoVAEPlusDecoder":
        """Released weights, float32, from the release's checkpoint or a safetensors file with the same names.

        Raises:
            FileNotFoundError: there is nothing; says how to get it.
            ValueError: the file holds another layout, or names are missing or left over.
        """
        from decoders.backbones import videovaeplus_weights as weights

        config, state = weights.read(path)
        return weights.fill(cls(config), state, path)


class VideoVAEPlusEncoder(nn.Module):
    """RGB in [-1, 1] "b 3 t h w", t a multiple of 4, to the posterior's mean and log-variance, each "b c n y x", n = t / 4.

    There are two posteriors, the second that of the first one's latents. Called as a module, the encoder takes the mean
    of the first; who wants a draw of it calls :meth:`encode_frames`, then :meth:`encode_time`.

    Stages: conv_in, level0 ... level3, mid, out, temporal.
    """

    def __init__(self, config: VideoVAEPlusConfig) -> None:
        super().__init__()
        self.config, groups = config, config.groups
        widths = [config.dim * mult for mult in (1, *config.dim_mult)]
        stages: dict[str, nn.Module] = {"conv_in": Chain(FrameConv2d(3, widths[0]))}
        for level in range(len(config.dim_mult)):
            before, width = widths[level], widths[level + 1]
            blocks = [ResBlock(before if i == 0 else width, width, groups) for i in range(config.num_res_blocks)]
            last = level == len(config.dim_mult) - 1
            stages[f"level{level}"] = Chain(*blocks, *([] if last else [Downsample(width)]))
        stages["mid"] = _mid(config)
        stages["out"] = Chain(Head(widths[-1], 2 * config.channels, groups))
        stages["temporal"] = Chain(*_temporal_encoder(config))
        self.stages = nn.ModuleDict(stages)

    def forward(self, video: Float[Tensor, "b 3 t h w"]) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents, of the mean of the frames' latents. Raises as :meth:`encode_frames`."""
        mean, _ = self.encode_frames(video)
        return self.encode_time(mean)

    def encode_frames(self, video: Float[Tensor, "b 3 t h w"]) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the frames' own latents, each "b c t y x".

        Raises:
            ValueError: the second half could not take so many frames.
        """
        if video.shape[2] < 1 or video.shape[2] % self.config.stride_t:
            raise ValueError(f"{video.shape[2]} frames: this encoder takes multiples of {self.config.stride_t}")
        return self._run(video, [name for name in self.stages if name != "temporal"])

    def encode_time(self, frames: Float[Tensor, "b c t y x"]) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of the frames' latents, each "b c n y x"."""
        return self._run(frames, ["temporal"])

    def _run(self, x: Tensor, stages: Iterable[str]) -> tuple[Tensor, Tensor]:
        x = x.to(next(self.parameters()).dtype)
        for name in stages:
            x, _ = self.stages[name](x.contiguous(memory_format=torch.channels_last_3d), None, True)
        mean, log_variance = x.chunk(2, dim=1)
        return mean, log_variance

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute every block in the backward pass, or none."""
        for module in self.modules():
            if isinstance(module, Chain):
                module.checkpointing = enabled

    @classmethod
    def from_file(cls, path: str | Path) -> "VideoVAEPlusEncoder":
        """Released weights, as :meth:`VideoVAEPlusDecoder.from_file` reads them."""
        from decoders.backbones import videovaeplus_weights as weights

        config, state = weights.read(path)
        return weights.fill(cls(config), state, path)


def _mid(config: VideoVAEPlusConfig) -> Chain:
    width, groups = config.dim * config.dim_mult[-1], config.groups
    return Chain(
        ResBlock(width, width, groups),
        SpaceAttention(width, groups),
        TimeAttention(width, groups, config.max_distance),
        ResBlock(width, width, groups),
    )


def _temporal_encoder(config: VideoVAEPlusConfig) -> list[nn.Module]:
    """Frames' latents to latents' moments: a convolution, (every second frame, a block) per halving, the head."""
    widths = [config.temporal_dim * 2**i for i in range(config.num_halvings + 1)]
    layers: list[nn.Module] = [EdgeConv3d(config.channels, widths[0])]
    for before, width in zip(widths[:-1], widths[1:], strict=True):
        layers += [EdgeConv3d(before, width, halved=True), EdgeResBlock(width, config.groups)]
    return [*layers, EdgeHead(widths[-1], 2 * config.channels, config.groups)]


def _temporal_decoder(config: VideoVAEPlusConfig) -> list[nn.Module]:
    """Latents to frames' latents: a convolution, (twice the frames, two blocks) per halving, a convolution."""
    halvings = config.num_halvings
    widths = [config.temporal_dim * 2**i for i in (halvings, *range(halvings, 0, -1))]
    layers: list[nn.Module] = [EdgeConv3d(config.channels, widths[0])]
    for before, width in zip(widths[:-1], widths[1:], strict=True):
        layers += [DoubleFrames(before, width), *(EdgeResBlock(width, config.groups) for _ in range(2))]
    return [*layers, EdgeConv3d(widths[-1], config.channels)]
