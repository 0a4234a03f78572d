"""Flash-VAED's students for inference: see ``decoders/exported.py``. Teachers and projections are not part of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from decoders.backbones.ltx import LTXConfig
from decoders.backbones.wan import WanConfig
from decoders.exported_files import Sampling, fill, plain
from decoders.exported_module import Exported
from decoders.exported_space import ExportError, SpaceInfo
from decoders.flash_vaed.ltx_student import LTXStudent
from decoders.flash_vaed.model import FlashVaedConfig, build_student
from decoders.flash_vaed.wan_student import WanStudent


@dataclass
class StudentConfig:
    """A student as it was built: its teacher's layout in full, so that no name has to be looked up."""

    wan: WanConfig | None = None
    ltx: LTXConfig | None = None
    operators: dict[str, str] = field(default_factory=dict)
    keep: dict[str, float] = field(default_factory=dict)
    upsample: Literal["repeat", "shuffle"] = "repeat"

    def __post_init__(self) -> None:
        if (self.wan is None) == (self.ltx is None):
            raise ExportError("network: a student has one layout, wan or ltx")


class ExportedFlashVaed(Exported):
    """As the base: a student looks at latents alone."""


def describe(decoder: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Network and sampling of a run's decoder, as plain values."""
    return _described(decoder.model), {}


def _described(student: WanStudent | LTXStudent) -> dict[str, Any]:
    kind = "ltx" if isinstance(student, LTXStudent) else "wan"
    own = {kind: student.layout, "operators": student.operators, "keep": student.keep}
    return plain(StudentConfig(**own, upsample=getattr(student, "upsample", "repeat")))


def build(network: Mapping[str, Any], sampling: Mapping[str, Any], space: SpaceInfo) -> ExportedFlashVaed:
    """The decoder without its weights. Raises ExportError: values that there cannot be."""
    config = fill(StudentConfig, network, "network")
    if config.ltx is not None:
        student: WanStudent | LTXStudent = LTXStudent(config.ltx, config.operators, config.keep)
    else:
        student = WanStudent(config.wan, config.operators, config.keep, config.upsample)
    return ExportedFlashVaed(student, None, space, plain(fill(Sampling, sampling, "sampling")))


def from_run(config: Mapping[str, Any], space: SpaceInfo) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same as :func:`describe`, from a run's resolved configuration."""
    student = fill(FlashVaedConfig, config["decoder"], "decoder")
    with torch.device("meta"):
        return _described(build_student(student, space.channels, space.stride_t, space.stride_hw)), {}
