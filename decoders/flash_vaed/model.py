"""Flash-VAED's students by config: a teacher's layout, an operator per stage, a share of channels per stage.

    latent -> conv_in -> mid -> up0 -> up1 -> up2 -> up3 -> out -> RGB
              dense      depthwise-separable    2D, an eighth of the channels

The defaults are the released student of Wan 2.1 (arXiv 2602.19161), 5.86 M parameters in place of 73.30 M.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from decoders.backbones.ltx import LTXConfig
from decoders.backbones.wan import LAYOUTS, WanConfig
from decoders.flash_vaed.fast import use_depthwise_kernels
from decoders.flash_vaed.ltx_student import LTXStudent, plan
from decoders.flash_vaed.wan_student import WanStudent, check_plan

STAGES = ["mid", "up0", "up1", "up2", "up3"]


@dataclass
class FlashVaedConfig:
    """The student. ``operators`` and ``keep`` name stages; what they do not name stays dense and whole."""

    layout: str = "wan21"  # the teacher's: wan21, wan22, wan_mini or ltx
    dim: int | None = None  # another width than the layout's at full resolution (the uniform baseline: a quarter)
    operators: dict[str, str] = field(
        default_factory=lambda: {
            "mid": "depthwise",
            "up0": "depthwise",
            "up1": "depthwise",
            "up2": "frame",
            "up3": "frame",
        }
    )  # stage -> dense (causal 3D), depthwise (separable, causal 3D), depthwise5 (the same, 5 taps), frame (2D)
    keep: dict[str, float] = field(default_factory=lambda: {"up2": 0.125, "up3": 0.125})  # stage -> share of channels
    upsample: Literal["repeat", "shuffle"] = "repeat"  # how pixels are doubled; shuffle is Turbo-VAED's
    checkpointing: bool = False  # recompute blocks in the backward pass
    # How depthwise convolutions are computed in training: by torch; by our Triton kernel (CUDA); or on CUDA by whichever was
    # faster when a shape was first met, elsewhere by torch. The same up to rounding. Optimised inference always takes auto.
    depthwise_kernel: Literal["torch", "triton", "auto"] = "torch"

    def __post_init__(self) -> None:
        known = (*LAYOUTS, "wan_mini", "ltx")
        if self.layout not in known:
            raise ValueError(f"decoder.layout={self.layout} is none of {', '.join(known)}")
        if self.dim is not None and self.dim < 2:
            raise ValueError(f"decoder.dim={self.dim} must be 2 or more, or null for the layout's own")
        if self.layout == "ltx":
            if self.upsample != "repeat":
                raise ValueError("decoder.upsample=shuffle is for Wan's layouts; LTX's students keep the teacher's")
            plan(LTXConfig(), self.operators, self.keep)
        else:
            check_plan(STAGES, self.operators, self.keep)


def teacher_layout(config: FlashVaedConfig, channels: int, stride_t: int, stride_hw: int) -> WanConfig | LTXConfig:
    """The layout that the student is made from.

    Raises:
        ValueError: the latent space has other strides than the layout.
    """
    if config.layout == "wan_mini":
        from decoders.latent_spaces.wan_mini import load_config

        layout = load_config()
    elif config.layout == "ltx":
        layout = LTXConfig()
    else:
        layout = LAYOUTS[config.layout]
    if (layout.stride_t, layout.stride_hw) != (stride_t, stride_hw):
        raise ValueError(
            f"decoder.layout={config.layout} decodes {layout.stride_t}x{layout.stride_hw}x{layout.stride_hw}, the latent "
            f"space is {stride_t}x{stride_hw}x{stride_hw}"
        )
    if channels != layout.channels:  # another space in the same layout: its statistics are not the release's
        layout = replace(layout, channels=channels, mean=None, std=None)
    if config.dim is None:
        return layout
    if isinstance(layout, LTXConfig):
        return replace(layout, widths=tuple(config.dim * width // layout.widths[-1] for width in layout.widths))
    return replace(layout, dim=config.dim, encoder_dim=None)


def build_student(config: FlashVaedConfig, channels: int, stride_t: int, stride_hw: int) -> WanStudent | LTXStudent:
    """The student with random weights; ``calibrate.py`` and ``calibrate_ltx.py`` fill it from a teacher."""
    layout = teacher_layout(config, channels, stride_t, stride_hw)
    if isinstance(layout, LTXConfig):
        student: WanStudent | LTXStudent = LTXStudent(layout, config.operators, config.keep)
    else:
        student = WanStudent(layout, config.operators, config.keep, config.upsample)
    student.set_checkpointing(config.checkpointing)
    if config.depthwise_kernel != "torch":
        use_depthwise_kernels(student, config.depthwise_kernel)
    return student
