"""LTX-Video's decoder (128 channels, 8 x 32 x 32; HaCohen et al., arXiv 2501.00103), written from its layout.

Equal to the decoder of diffusers' AutoencoderKLLTXVideo on the same weights (tests/test_backbones_ltx.py). The first
release (0.9.0) is the default. The decoders of 0.9.1 and later are conditioned on a timestep; they are decoded at timestep
0, latents taken as free of noise, where the conditioning is a constant shift and scale per channel.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

from einops import rearrange
from torch import Tensor, nn

from decoders.backbones.ltx_layers import ConvFactory, EdgeConv3d, Head, ResBlock, Upsample
from decoders.backbones.staged import StagedDecoder
from decoders.layers.causal_conv import Chain


@dataclass
class LTXConfig:
    """The layout of an LTX-Video decoder, in decoding order; the defaults are the first release's."""

    channels: int = 128  # of the latents
    widths: tuple[int, ...] = (512, 512, 512, 256, 128)  # of mid, up0, up1, ...
    blocks: tuple[int, ...] = (4, 3, 3, 3, 4)  # residual blocks of mid, up0, up1, ...
    upsample: tuple[bool, ...] = (False, True, True, True)  # which of up0, up1, ... double frames, rows and columns
    factors: tuple[int, ...] = (1, 1, 1, 1)  # by how much upsampling itself narrows, in up0, up1, ...
    residual: tuple[bool, ...] = (False, False, False, False)  # upsampling around a parameter-free shortcut
    noise: tuple[bool, ...] = (False, False, False, False, False)  # noise added in the blocks of mid, up0, up1, ...
    modulated: bool = False  # conditioned on a timestep, which is 0 here
    patch: int = 4  # the last stage gives patches of this side, folded into channels
    eps: float = 1e-6  # of the shortcuts' LayerNorm
    causal: bool = False  # no released decoder is: they look at future frames and cannot stream
    mean: list[float] | None = None  # of the space's latents; null: 0 and 1
    std: list[float] | None = None

    def __post_init__(self) -> None:
        ups = len(self.widths) - 1
        for name, expected in (
            ("blocks", ups + 1),
            ("noise", ups + 1),
            ("upsample", ups),
            ("factors", ups),
            ("residual", ups),
        ):
            if len(getattr(self, name)) != expected:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries; {ups + 1} widths need {expected}")
        if min(self.channels, self.patch, *self.widths, *self.blocks, *self.factors) < 1:
            raise ValueError("channels, patch, widths, blocks and factors must be 1 or more")
        for number, factor in enumerate(self.factors):
            before, width = self.widths[number : number + 2]
            if factor > 1 and not (self.upsample[number] and before == width * factor):
                raise ValueError(f"up{number} narrows {before} to {width} channels by upsampling with factor {factor}")
            if self.modulated and factor == 1 and before != width:
                raise ValueError(
                    f"up{number} goes from {before} to {width} channels in a block, which cannot be modulated"
                )
        if self.causal and any(self.noise):
            raise ValueError("noise is drawn once per clip, so a causal decoder cannot have it")

    @property
    def stride_t(self) -> int:
        return 2 ** sum(self.upsample)

    @property
    def stride_hw(self) -> int:
        return self.patch * 2 ** sum(self.upsample)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages with residual blocks, as ``widths`` has them."""
        return ("mid", *(f"up{number}" for number in range(len(self.widths) - 1)))


class LTXDecoder(StagedDecoder):
    """Normalised latents "b c n y x" to RGB "b 3 1+(n-1)*8 h w". Stages: conv_in, mid, up0 ... up3, out.

    An up stage is a block that changes the width, if it changes, then an upsampling, if it has one, then blocks.

    Args:
        config: the layout.
        operators: stage -> what makes the convolutions of its blocks; "up2.entry" for the block that changes the
            width. Dense 3D convolutions where nothing is said, and in conv_in, upsamplings and out always.
        force_skip: stages whose blocks mix their shortcut even where the width stays; their first block is then there
            even if the width does not change.

    Raises:
        ValueError: names of stages that there are not.
    """

    def __init__(
        self, config: LTXConfig, operators: Mapping[str, ConvFactory] | None = None, force_skip: Collection[str] = ()
    ) -> None:
        self.config = config
        operators = operators or {}
        known = {*config.stages, *(f"{name}.entry" for name in config.stages[1:])}
        if unknown := ({*operators} - known) | ({*force_skip} - {*config.stages}):
            raise ValueError(f"no blocks at {', '.join(sorted(unknown))}; there are {', '.join(config.stages)}")
        dense = partial(EdgeConv3d, causal=config.causal)
        widths = dict(zip(config.stages, config.widths, strict=True))
        stages: dict[str, nn.Module] = {"conv_in": Chain(dense(config.channels, config.widths[0], 3))}
        before = config.widths[0]
        for number, (name, width) in enumerate(widths.items()):
            forced = name in force_skip
            options = {"eps": config.eps, "noise": config.noise[number], "modulated": config.modulated}
            layers: list[nn.Module] = []
            factor = config.factors[number - 1] if number else 1
            if number and factor == 1 and (forced or before != width):
                layers.append(ResBlock(before, width, operators.get(f"{name}.entry", dense), forced, **options))
            if number and config.upsample[number - 1]:
                layers.append(Upsample(width * factor, factor, config.residual[number - 1], dense))
            conv = operators.get(name, dense)
            layers += [ResBlock(width, width, conv, forced, **options) for _ in range(config.blocks[number])]
            stages[name] = Chain(*layers)
            before = width
        stages["out"] = Chain(Head(before, 3 * config.patch**2, dense, config.modulated))
        super().__init__(
            stages,
            config.channels,
            config.stride_t,
            config.stride_hw,
            config.mean,
            config.std,
            can_stream=config.causal,
        )

    def finish(self, x: Tensor) -> Tensor:
        p = self.config.patch
        return rearrange(x, "b (c q p) t h w -> b c t (h p) (w q)", p=p, q=p)

    @classmethod
    def from_folder(cls, path: str, subfolder: str | None = None) -> "LTXDecoder":
        """Released weights, float32, from a diffusers folder or a hub id.

        Raises:
            FileNotFoundError: there is nothing; says how to get it.
            ValueError: the files hold another layout, or names are missing or left over.
        """
        from decoders.backbones import ltx_weights

        config, state = ltx_weights.read(path, subfolder)
        return ltx_weights.fill(cls(config), state, path)
