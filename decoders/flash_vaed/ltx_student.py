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

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch

from decoders.backbones.ltx import LTXConfig, LTXDecoder
from decoders.backbones.ltx_layers import ConvFactory, EdgeConv3d, SeparableEdgeConv3d
from decoders.backbones.ltx_weights import fill
from decoders.layers.causal_conv import FrameConv2d

OPERATORS: Mapping[str, ConvFactory] = MappingProxyType(
    {"dense": EdgeConv3d, "separable": SeparableEdgeConv3d, "frame": FrameConv2d}
)
RELEASED_WIDTHS = MappingProxyType({"up2": 64, "up3": 32})
RELEASED_OPERATORS = MappingProxyType({"mid": "separable", "up0": "separable", "up1": "separable", "up3": "frame"})
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
        operators: stage -> dense, separable or frame, for its blocks; "up2.entry" for the block that changes the
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
    # A dense operator is left to the decoder, which makes it look ahead or not as its config says.
    chosen = {stage: OPERATORS[name] for stage, name in operators.items() if name != "dense"}
    forced = tuple(widths if force_skip is None else force_skip)
    return LTXDecoder(replace(teacher, widths=tuple(own.values())), chosen, forced)


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
