"""Where a student's teacher comes from."""

import torch

from decoders.backbones.ltx import LTXConfig, LTXDecoder
from decoders.backbones.wan import WanConfig, WanDecoder


def load_teacher(name: str, layout: WanConfig | LTXConfig) -> WanDecoder | LTXDecoder:
    """The frozen teacher, float32, on the CPU.

    Args:
        name: a diffusers folder, a hub id or the original release's .pth file; ``wan_mini``, which comes with the
            project; or ``random``: random weights of ``layout``, for tests.
        layout: the student's, which the teacher must have.

    Raises:
        FileNotFoundError: there is no such teacher; says how to get it.
        ValueError: its layout is not the student's.
    """
    if name == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            decoder = LTXDecoder if isinstance(layout, LTXConfig) else WanDecoder
            return decoder(layout).requires_grad_(False).eval()
    if isinstance(layout, LTXConfig):
        if name == "wan_mini":
            raise ValueError("objective.teacher=wan_mini is no LTX-Video decoder, which decoder.layout=ltx asks for")
        teacher = LTXDecoder.from_folder(name)
    elif name == "wan_mini":
        from decoders.latent_spaces.wan_mini import load_decoder

        teacher = load_decoder()
    else:
        teacher = WanDecoder.from_folder(name)
    theirs = teacher.config
    # The encoder says nothing of the decoder; LTX's statistics come with the weights, and go to the student from there.
    ignored = ("mean", "std") if isinstance(layout, LTXConfig) else ("encoder_dim",)
    fields = [key for key, value in vars(theirs).items() if value != getattr(layout, key) and key not in ignored]
    if fields:
        raise ValueError(
            f"objective.teacher={name} differs from decoder.layout in {', '.join(fields)}: "
            + "; ".join(f"{key} {getattr(theirs, key)} against {getattr(layout, key)}" for key in fields)
        )
    return teacher.requires_grad_(False).eval()
