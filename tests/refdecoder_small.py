"""Small RefDecoders and clips for the tests."""

import torch

from decoders.refdecoder.model import RefDecoderConfig, RefDecoderModel, build_model

SMALL = dict(dim=8, blocks=2, heads=2, head_dim=12, ffn=32)
SPACES = {"wan21": (4, 4, 8), "wan22": (4, 4, 16), "videovaeplus": (4, 4, 8)}  # channels and strides


def small(layout: str = "wan21", lively: bool = True, **changes) -> RefDecoderModel:
    """A small model in float64 (norms over few channels magnify rounding). ``lively``: nothing in it is zero or one."""
    model = build_model(RefDecoderConfig(layout=layout, **SMALL | changes), *SPACES[layout])
    if lively:
        with torch.no_grad():
            for name, parameter in model.state_dict().items():
                if name.endswith(("gain", "norm_video.weight", "norm_reference.weight")):
                    parameter.uniform_(0.5, 1.5)
                elif parameter.abs().sum() == 0:
                    parameter.normal_(0, 0.1)
    return model.double().eval()


def clip(
    model: RefDecoderModel, frames: int = 2, references: int = 1, clips: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of 1 x 3 cells, which leave every patch of Wan 2.1 half empty, and their references."""
    draw = torch.Generator().manual_seed(0)
    latent = torch.randn(clips, model.channels, frames, 1, 3, generator=draw, dtype=torch.float64)
    size = (model.stride_hw, 3 * model.stride_hw)
    return latent, torch.rand(clips, 3, references, *size, generator=draw, dtype=torch.float64) * 2 - 1


def both(layouts: list[str], changes: list[dict]) -> list[tuple[str, dict]]:
    """Every layout with every change of its config, but for what cannot stream in windows."""
    return [
        (layout, one) for layout in layouts for one in changes if layout != "videovaeplus" or "attention" not in one
    ]
