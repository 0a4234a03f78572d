"""Wan's video autoencoders, 2.1 (16 channels, 4 x 8 x 8) and 2.2 (48 channels, 4 x 16 x 16), written from their layout.

Equal to diffusers' AutoencoderKLWan on the same weights (tests/test_backbones_wan.py), with what that one lacks: whole
clips in one call, caller-owned streams of any length, features of named stages, and activation checkpointing.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from decoders.backbones.staged import StagedDecoder, StagedEncoder
from decoders.backbones.wan_layers import (
    Downsample,
    FrameAttention,
    NormConv,
    ResBlock,
    ResidualDown,
    ResidualUp,
    Upsample,
)
from decoders.layers.causal_conv import CausalConv3d, Chain, Past


@dataclass
class WanConfig:
    """The layout of a Wan autoencoder; the defaults are Wan 2.1's."""

    dim: int = 96  # width at full resolution
    encoder_dim: int | None = None  # of the encoder, where it differs
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)  # widths of the encoder's stages; the decoder's run backwards
    num_res_blocks: int = 2  # per encoder stage; the decoder has one more
    channels: int = 16
    temporal: tuple[bool, ...] = (False, True, True)  # which of the encoder's reductions halve the frames too
    residual: bool = False  # Wan 2.2: every stage has a parameter-free shortcut
    patch: int = 1  # Wan 2.2: 2, pixels folded into channels at the outer ends
    mean: list[float] | None = None  # of the space's latents; null: 0 and 1
    std: list[float] | None = None

    def __post_init__(self) -> None:
        if len(self.temporal) != len(self.dim_mult) - 1:
            raise ValueError(f"temporal has {len(self.temporal)} entries for {len(self.dim_mult) - 1} reductions")
        if self.dim < 1 or self.channels < 1 or self.patch < 1 or self.num_res_blocks < 1:
            raise ValueError("dim, channels, patch and num_res_blocks must be 1 or more")
        if not self.residual and self.dim * min(self.dim_mult) % 2:
            raise ValueError(f"dim={self.dim} must be even: upsampling halves widths")

    @property
    def stride_t(self) -> int:
        return 2 ** sum(self.temporal)

    @property
    def stride_hw(self) -> int:
        return self.patch * 2 ** len(self.temporal)


# Statistics of the released spaces' latents: latents_mean and latents_std of the releases' config.json.
WAN21 = WanConfig(
    mean=[-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922,
          -0.9497, 0.2503, -0.2921],
    std=[2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
         2.8251, 1.9160],
)  # fmt: skip
WAN22 = WanConfig(
    dim=256, encoder_dim=160, channels=48, residual=True, patch=2,
    mean=[-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570,
          -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322,
          0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520,
          0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667],
    std=[0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
         0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
         0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600,
         0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744],
)  # fmt: skip
LAYOUTS = {"wan21": WAN21, "wan22": WAN22}


class WanDecoder(StagedDecoder):
    """Normalised latents "b c n y x" to RGB "b 3 1+(n-1)*4 h w". Stages: conv_in, mid, up0 ... up3, out."""

    def __init__(self, config: WanConfig) -> None:
        self.config = config
        widths = [config.dim * mult for mult in (config.dim_mult[-1], *reversed(config.dim_mult))]
        stages: dict[str, nn.Module] = {
            "conv_in": Chain(
                CausalConv3d(config.channels, config.channels, 1), CausalConv3d(config.channels, widths[0], 3)
            ),
            "mid": Chain(ResBlock(widths[0], widths[0]), FrameAttention(widths[0]), ResBlock(widths[0], widths[0])),
        }
        temporal = (*reversed(config.temporal), None)
        for number, (width, doubled) in enumerate(zip(widths[1:], temporal, strict=True)):
            before = widths[number]
            if number and not config.residual:
                before //= 2  # Wan 2.1's upsampling halves the width
            blocks = [ResBlock(before if i == 0 else width, width) for i in range(config.num_res_blocks + 1)]
            if doubled is None:
                stages[f"up{number}"] = Chain(*blocks)
            elif config.residual:
                up = Upsample(width, width, doubled)
                stages[f"up{number}"] = ResidualUp(before, width, doubled, *blocks, up)
            else:
                stages[f"up{number}"] = Chain(*blocks, Upsample(width, width // 2, doubled))
        stages["out"] = Chain(NormConv(widths[-1], 3 * config.patch**2))
        super().__init__(stages, config.channels, config.stride_t, config.stride_hw, config.mean, config.std)

    def finish(self, x: Tensor) -> Tensor:
        p = self.config.patch
        return rearrange(x, "b (c q p) t h w -> b c t (h p) (w q)", p=p, q=p)

    @classmethod
    def from_folder(cls, path: str, subfolder: str | None = None) -> "WanDecoder":
        """Released weights, float32: a diffusers folder or hub id, or the original release's ``.pth`` file.

        Raises:
            FileNotFoundError: there is nothing; says how to get it.
            ValueError: the files hold another layout, or names are missing or left over.
        """
        from decoders.backbones import wan_weights

        config, state = wan_weights.read(path, subfolder)
        return wan_weights.fill(cls(config), state, Path(path))


class WanEncoder(StagedEncoder):
    """RGB in [-1, 1] "b 3 t h w", t = 1 + 4k, to the posterior's mean and log-variance, each "b c n y x", not normalised.

    Stages: conv_in, down0 ... down3, mid, out.
    """

    def __init__(self, config: WanConfig) -> None:
        base = config.encoder_dim or config.dim
        widths = [base * mult for mult in (1, *config.dim_mult)]
        stages: dict[str, nn.Module] = {"conv_in": Chain(CausalConv3d(3 * config.patch**2, widths[0], 3))}
        for number, (before, width) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            halved = config.temporal[number] if number < len(config.temporal) else None
            layers: list[nn.Module] = [
                ResBlock(before if i == 0 else width, width) for i in range(config.num_res_blocks)
            ]
            if halved is not None:
                layers.append(Downsample(width, halved))
            if config.residual:
                stages[f"down{number}"] = ResidualDown(width, bool(halved), halved is not None, *layers)
            else:
                stages[f"down{number}"] = Chain(*layers)
        last = widths[-1]
        stages["mid"] = Chain(ResBlock(last, last), FrameAttention(last), ResBlock(last, last))
        stages["out"] = Chain(
            NormConv(last, 2 * config.channels), CausalConv3d(2 * config.channels, 2 * config.channels, 1)
        )
        super().__init__(stages)
        self.config = config

    def forward(self, video: Float[Tensor, "b 3 t h w"]) -> tuple[Tensor, Tensor]:
        """The whole clip at once."""
        moments, _ = self.run(video, {}, True)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance

    @torch.no_grad()
    def encode_in_chunks(self, video: Float[Tensor, "b 3 t h w"]) -> tuple[Tensor, Tensor]:
        """The same, four frames at a time: memory does not grow with the clip."""
        mean, log_variance = self.run_in_chunks(video, self.config.stride_t).chunk(2, dim=1)
        return mean, log_variance

    def run(self, x: Tensor, past: dict[str, Past], first: bool) -> tuple[Tensor, dict[str, Past]]:
        p = self.config.patch
        return super().run(rearrange(x, "b c t (h p) (w q) -> b (c q p) t h w", p=p, q=p), past, first)


def layout(name: str, **changes: object) -> WanConfig:
    """A released layout by name, wan21 or wan22, with some values changed."""
    if name not in LAYOUTS:
        raise ValueError(f"no Wan layout {name!r}; there are {', '.join(LAYOUTS)}")
    return replace(LAYOUTS[name], **changes)
