"""The checkpoint that the method's authors released for Wan 2.1, under their names (Aoko955/Flash-VAED)."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from decoders.backbones.wan_weights import other_names
from decoders.flash_vaed.model import FlashVaedConfig, build_student
from decoders.flash_vaed.wan_student import WanStudent


def released_name(name: str, student: WanStudent) -> str:
    """The released name of our parameter ``name``: Wan's original names, with separable convolutions taken apart."""
    _, original = other_names(name, student.layout, "decoder")
    return original.replace(".depthwise.", ".depthwise_conv.").replace(".pointwise.", ".pointwise_conv.")


def fill_released(student: WanStudent, state: Mapping[str, Tensor], source: Path | str) -> WanStudent:
    """Copy released weights into a student of the released structure.

    Raises:
        ValueError: names that are missing or left over, or shapes that differ.
    """
    own = {released_name(name, student): parameter for name, parameter in student.named_parameters()}
    theirs = {name for name in state if name.startswith(("decoder.", "conv2."))}
    wrong = [f"{name} is missing" for name in sorted(own.keys() - theirs)]
    wrong += [f"{name} is left over" for name in sorted(theirs - own.keys())]
    wrong += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(theirs & own.keys())
        if state[name].numel() != own[name].numel()
    ]
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} weights do not fit the released student; {wrong[0]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name].reshape(parameter.shape))
    return student


def from_released(path: str | Path) -> WanStudent:
    """The released student of Wan 2.1, 5.86 M parameters, from the authors' file ``vae_decoder_*.pth``.

    Raises:
        FileNotFoundError: there is no such file; says where it comes from.
        ValueError: it holds something else.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"no file {file}; the authors' student of Wan 2.1 is linked in github.com/Aoko955/Flash-VAED's README"
        )
    state = torch.load(file, map_location="cpu", weights_only=True)
    student = build_student(FlashVaedConfig(), channels=16, stride_t=4, stride_hw=8)
    return fill_released(student, state, file).requires_grad_(False).eval()
