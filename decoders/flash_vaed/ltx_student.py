"""Flash-VAED's student of LTX-Video's decoder (arXiv 2602.19161): the teacher's class with other operators and widths.

The layout is that of the released inference code (Aoko955/Flash-VAED, 54a27aa, models/ltx/ltx_prune_1_4.py):

| stage   | teacher          | student                                                                        |
|---------|------------------|--------------------------------------------------------------------------------|
| conv_in | dense, 128 -> 512 | the same                                                                       |
| mid     | 4 blocks of 512  | depthwise-separable, causal                                                    |
| up0     | 3 blocks of 512  | depthwise-separable, causal                                                    |
| up1     | 3 blocks of 512  | depthwise-separable, causal, after the dense upsampling                        |
| up2     | 512 -> 256       | 512 -> 64, dense; every block mixes its shortcut                               |
| up3     | 256 -> 128       | 64 -> 32, dense down to its upsampling, then 2D; every block mixes its shortcut |
| out     | 128 -> 48        | 32 -> 48, dense                                                                |

66.96 M parameters, of which 58.3 M are up1's, nearly all in its dense upsampling. The teacher has 238.8 M.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from decoders.backbones.ltx import LTXConfig, LTXDecoder
from decoders.backbones.ltx_layers import ConvFactory, EdgeConv3d, SeparableEdgeConv3d
from decoders.backbones.ltx_weights import fill
from decoders.backbones.staged import StagedDecoder
from decoders.flash_vaed.fast import for_inference
from decoders.flash_vaed.prune import kept_count
from decoders.inference import InferenceOptions
from decoders.layers.causal_conv import FrameConv2d

OPERATORS: Mapping[str, ConvFactory] = MappingProxyType(
    {"dense": EdgeConv3d, "depthwise": SeparableEdgeConv3d, "frame": FrameConv2d}
)
RELEASED_WIDTHS = MappingProxyType({"up2": 64, "up3": 32})
RELEASED_OPERATORS = MappingProxyType({"mid": "depthwise", "up0": "depthwise", "up1": "depthwise", "up3": "frame"})
LEFTOVERS = ("mean_of_means", "std_of_means")  # in the released checkpoint, and used by nothing


def ltx_student(
    teacher: LTXConfig | None = None,
    widths: Mapping[str, int] = RELEASED_WIDTHS,
    operators: Mapping[str, str] = RELEASED_OPERATORS,
    force_skip: Collection[str] | None = None,
) -> LTXDecoder:
    """A student of ``teacher`` (default: the first release's layout), with random weights; the released one by default.

    Args:
        teacher: its statistics of the latents are the student's.
        widths: stage -> channels, where they differ from the teacher's.
        operators: stage -> dense, depthwise or frame, for its blocks; "up2.entry" for the block that changes the
            width. Dense where nothing is said.
        force_skip: stages whose blocks mix their shortcut even where the width stays; None: those in ``widths``.

    Raises:
        ValueError: names of stages or operators that there are not, or widths that the layout cannot have.
    """
    teacher = teacher or LTXConfig()
    if unknown := {*widths} - {*teacher.stages}:
        raise ValueError(f"no width at {', '.join(sorted(unknown))}; there are {', '.join(teacher.stages)}")
    if unknown := {*operators.values()} - {*OPERATORS}:
        raise ValueError(f"no operator {', '.join(sorted(unknown))}; there are {', '.join(OPERATORS)}")
    own = dict(zip(teacher.stages, teacher.widths, strict=True)) | dict(widths)
    forced = tuple(widths if force_skip is None else force_skip)
    return LTXDecoder(replace(teacher, widths=tuple(own.values())), _factories(operators), forced)


def _factories(operators: Mapping[str, str]) -> dict[str, ConvFactory]:
    """A dense operator is left to the decoder, which makes it look ahead or not as its config says."""
    return {stage: OPERATORS[name] for stage, name in operators.items() if name != "dense"}


class LTXStudent(LTXDecoder):
    """Such a student by shares of channels, and what it shares with its teacher. The latents' statistics, which come with
    a teacher's weights, are stored with its own.

    Args:
        layout: the teacher's.
        operators: stage -> dense, depthwise or frame, "up3.entry" among the stages; dense where nothing is said.
        keep: stage -> share of its channels that are kept; 1 where a stage is not named.

    Attributes:
        kept_<stage>, recon_<stage>: of every pruned stage, which of the teacher's channels it gives, and all of the
            teacher's from these. Set by pruning (``calibrate_ltx.py``).

    Raises:
        ValueError: see :func:`plan`.
    """

    def __init__(self, layout: LTXConfig, operators: Mapping[str, str], keep: Mapping[str, float]) -> None:
        widths, forced = plan(layout, operators, keep)
        super().__init__(replace(layout, widths=tuple(widths.values())), _factories(operators), forced)
        self.layout, self.operators, self.keep = layout, dict(operators), dict(keep)
        for name, width in zip(layout.stages, layout.widths, strict=True):
            if keep.get(name, 1.0) < 1:
                self.register_buffer(f"kept_{name}", torch.arange(widths[name]))
                self.register_buffer(f"recon_{name}", torch.eye(widths[name], width))
        for name in ("latent_mean", "latent_std"):
            self.register_buffer(name, getattr(self, name), persistent=True)

    def optimised(self, options: InferenceOptions, calibration: Sequence[torch.Tensor] = ()) -> nn.Module:
        """For inference, as the backbones'; on CUDA with depthwise convolutions by Triton where that is faster."""
        return StagedDecoder.optimised(for_inference(self), options, calibration)


def entries(layout: LTXConfig) -> list[str]:
    """The stages that begin with a block which changes the width: those that can be pruned."""
    steps = zip(layout.stages[1:], layout.factors, layout.widths[:-1], layout.widths[1:], strict=True)
    return [name for name, factor, before, width in steps if factor == 1 and before != width]


def plan(
    layout: LTXConfig, operators: Mapping[str, str], keep: Mapping[str, float]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Channels of every stage, and the stages whose blocks all mix their shortcut: those where channels are chosen, and
    one whose first block would be gone because the stage before was pruned to its width.

    Raises:
        ValueError: a stage or operator that there is not, a share that cannot be kept, or a pruned stage before one
            that takes its channels as they are.
    """
    prunable = entries(layout)
    names = {"operators": [*layout.stages, *(f"{name}.entry" for name in prunable)], "keep": layout.stages}
    for option, values in (("operators", operators), ("keep", keep)):
        if unknown := sorted(set(values) - set(names[option])):
            raise ValueError(f"decoder.{option}.{unknown[0]}: no such stage; there are {', '.join(names[option])}")
    for name, operator in operators.items():
        if operator not in OPERATORS:
            raise ValueError(f"decoder.operators.{name}={operator} is none of {', '.join(OPERATORS)}")
    for name, share in keep.items():
        if not 0 < share <= 1:
            raise ValueError(f"decoder.keep.{name}={share} must lie above 0 and be at most 1")
        if share < 1 and name not in prunable:
            raise ValueError(
                f"decoder.keep.{name}={share}: only stages that begin by changing the width can be pruned "
                f"({', '.join(prunable) or 'this layout has none'})"
            )
    widths = {name: kept_count(w, keep.get(name, 1.0)) for name, w in zip(layout.stages, layout.widths, strict=True)}
    forced = []
    for before, name in zip(layout.stages, layout.stages[1:], strict=False):
        if keep.get(name, 1.0) < 1 or (name in prunable and widths[before] == widths[name]):
            forced.append(name)
        elif name not in prunable and keep.get(before, 1.0) < 1:
            raise ValueError(
                f"decoder.keep.{before}={keep[before]}: {name} takes its channels as they are, all of them"
            )
    return widths, tuple(forced)


def from_released(file: str | Path, teacher: LTXConfig | None = None) -> LTXDecoder:
    """The released student, float32, from ``Flash_VAED_LTX.pth``.

    Args:
        file: a pickle of tensors by the names of the released code, of which only the decoder's are used.
        teacher: whose latents it decodes, e.g. ``LTXDecoder.from_folder("Lightricks/LTX-Video").config``. The statistics
            are the teacher's: the released code decodes latents that were never normalised.

    Raises:
        FileNotFoundError: there is no such file; says how to get it.
        ValueError: names that are missing or left over, or tensors of another shape.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        command = "hf download Aoko955/Flash-VAED models/ltx/Flash_VAED_LTX.pth"
        raise FileNotFoundError(f"no file {file}; get the released student with `{command}`")
    state = torch.load(file, map_location="cpu", weights_only=True)
    return fill(ltx_student(teacher), {name: state[name] for name in state if name not in LEFTOVERS}, file)
