"""Flash-VAED's student of a Wan decoder (arXiv 2602.19161): other operators and fewer channels, the same stages.

Deep stages (mid, up0, up1), which still change over time, get depthwise-separable causal convolutions and keep all of
their channels; the stages at high resolution (up2, up3), where most of the time is spent, get 2D convolutions of single
frames and keep an eighth. Which stage gets what is config; the defaults are the released student of Wan 2.1, 5.86 M.
"""

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.backbones.staged import StagedDecoder
from decoders.backbones.wan import WanConfig
from decoders.backbones.wan_layers import FrameAttention, NormConv, ResBlock, ResidualUp, Upsample, add, unfold
from decoders.flash_vaed.fast import for_inference
from decoders.flash_vaed.prune import kept_count
from decoders.inference import InferenceOptions
from decoders.layers.causal_conv import CausalConv3d, Chain, DepthwiseSeparableConv3d, FrameConv2d, Past


class WideSeparableConv3d(DepthwiseSeparableConv3d):
    """Depthwise-separable with 5 x 5 x 5 taps where 3 x 3 x 3 are asked for, as Turbo-VAED's deep stages."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3) -> None:
        super().__init__(in_channels, out_channels, 5 if kernel == 3 else kernel)


class ShuffleUpsample(Upsample):
    """Twice the pixels out of channels (a convolution to four times as many), in place of repeating them; time as before."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__(in_channels, out_channels, temporal)
        self.conv = nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1)

    def _enlarge(self, frames: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(frames), 2)


OPERATORS = {
    "dense": CausalConv3d,
    "depthwise": DepthwiseSeparableConv3d,
    "depthwise5": WideSeparableConv3d,
    "frame": FrameConv2d,
}
UPSAMPLES = {"repeat": Upsample, "shuffle": ShuffleUpsample}


class ProjectedUp(Chain):
    """Wan 2.2's shortcut where channels were pruned: which input repeats where is a 1x1x1 convolution's business."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.frames = 2 if temporal else 1
        self.shortcut = nn.Conv3d(in_channels, out_channels * self.frames * 4, 1)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        y, new = super().forward(x, past, first)
        shortcut = unfold(self.shortcut(x), self.frames)
        return add(y, shortcut[:, :, self.frames - 1 :] if first else shortcut), new


class WanStudent(StagedDecoder):
    """Normalised latents "b c n y x" to RGB "b 3 1+(n-1)*4 h w". Stages as the teacher's.

    Args:
        layout: the teacher's.
        operators: stage -> dense, depthwise, depthwise5 or frame; dense where a stage is not named.
        keep: stage -> share of its channels, input and output, that are kept; 1 where a stage is not named. Only stages
            whose input comes from an upsampling convolution (up1 and later) can be pruned.
        upsample: how pixels are doubled: repeat (and convolve, as the teacher) or shuffle.

    Attributes:
        widths: stage -> channels that it reads and writes, and the teacher's for both.
    """

    def __init__(
        self, layout: WanConfig, operators: Mapping[str, str], keep: Mapping[str, float], upsample: str = "repeat"
    ) -> None:
        self.layout, self.upsample = layout, upsample
        names = ["mid", *(f"up{number}" for number in range(len(layout.dim_mult)))]
        check_plan(names, operators, keep)
        teacher = [layout.dim * mult for mult in (layout.dim_mult[-1], *reversed(layout.dim_mult))]
        conv = {name: OPERATORS[operators.get(name, "dense")] for name in names}
        stages: dict[str, nn.Module] = {
            "conv_in": Chain(
                CausalConv3d(layout.channels, layout.channels, 1), CausalConv3d(layout.channels, teacher[0], 3)
            ),
            "mid": Chain(
                ResBlock(teacher[0], teacher[0], conv["mid"]),
                FrameAttention(teacher[0]),
                ResBlock(teacher[0], teacher[0], conv["mid"]),
            ),
        }
        for number, doubled in enumerate((*reversed(layout.temporal), None)):
            name, after = f"up{number}", f"up{number + 1}"
            before = teacher[number] // (2 if number and not layout.residual else 1)
            inside, width = (
                kept_count(before, keep.get(name, 1.0)),
                kept_count(teacher[number + 1], keep.get(name, 1.0)),
            )
            pruned = keep.get(name, 1.0) < 1
            blocks = [
                ResBlock(inside if i == 0 else width, width, conv[name], skip=pruned)
                for i in range(layout.num_res_blocks + 1)
            ]
            if doubled is None:
                stages[name] = Chain(*blocks)
                continue
            full = teacher[number + 1] // (1 if layout.residual else 2)
            out = kept_count(full, keep.get(after, 1.0))
            up = UPSAMPLES[upsample](width, out, doubled)
            if not layout.residual:
                stages[name] = Chain(*blocks, up)
            elif pruned or out < full:
                stages[name] = ProjectedUp(inside, out, doubled, *blocks, up)
            else:
                stages[name] = ResidualUp(inside, out, doubled, *blocks, up)
        stages["out"] = Chain(NormConv(width, 3 * layout.patch**2))
        super().__init__(stages, layout.channels, layout.stride_t, layout.stride_hw, layout.mean, layout.std)
        self.operators, self.keep = dict(operators), dict(keep)
        # Which of the teacher's channels each stage gives, and all of them from these; set by pruning.
        for number, name in enumerate(names[1:]):
            out, full = self.out_channels(name), teacher[number + 1]
            if not layout.residual and isinstance(self.stages[name].layers[-1], Upsample):
                full //= 2
            self.register_buffer(f"kept_{name}", torch.arange(out))
            self.register_buffer(f"recon_{name}", torch.eye(out, full))

    def out_channels(self, stage: str) -> int:
        """Channels that a stage gives."""
        last = self.stages[stage].layers[-1]
        if isinstance(last, Upsample):
            return last.conv.out_channels // (4 if isinstance(last, ShuffleUpsample) else 1)
        return last.norm2.gain.shape[0]

    @property
    def has_computed_start(self) -> bool:
        """Whether its weights can be computed from a teacher's: not those of Turbo-VAED's operators."""
        return self.upsample == "repeat" and "depthwise5" not in self.operators.values()

    def optimised(self, options: InferenceOptions, calibration: Sequence[Tensor] = ()) -> nn.Module:
        """For inference, as the backbones'; on CUDA with depthwise convolutions by Triton where that is faster."""
        return StagedDecoder.optimised(for_inference(self), options, calibration)

    def finish(self, x: Tensor) -> Tensor:
        p = self.layout.patch
        return rearrange(x, "b (c q p) t h w -> b c t (h p) (w q)", p=p, q=p)


def stage_channels(layout: WanConfig, stage: str) -> int:
    """Channels that a stage of an unpruned decoder gives: mid, up0, ..."""
    widths = [layout.dim * mult for mult in (layout.dim_mult[-1], *reversed(layout.dim_mult))]
    number = 0 if stage == "mid" else int(stage.removeprefix("up")) + 1
    halved = not layout.residual and 0 < number <= len(layout.temporal)
    return widths[number] // (2 if halved else 1)


def check_plan(names: list[str], operators: Mapping[str, str], keep: Mapping[str, float]) -> None:
    """Raise ValueError for a stage or operator that there is not, or a share that cannot be kept."""
    for option, values in (("operators", operators), ("keep", keep)):
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"decoder.{option}.{unknown[0]}: no such stage; there are {', '.join(names)}")
    for name, operator in operators.items():
        if operator not in OPERATORS:
            raise ValueError(f"decoder.operators.{name}={operator} is none of {', '.join(OPERATORS)}")
    for name, share in keep.items():
        if not 0 < share <= 1:
            raise ValueError(f"decoder.keep.{name}={share} must lie above 0 and be at most 1")
        if share < 1 and name in names[:2]:
            raise ValueError(
                f"decoder.keep.{name}={share}: only stages behind an upsampling can be pruned ({', '.join(names[2:])})"
            )
