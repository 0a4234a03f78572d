"""Small decoders of every family with weights that are not their initial ones, for tests of exports."""

import torch
from torch import Tensor, nn

from decoders.base import VideoDecoder
from decoders.exported import Exported
from decoders.exported_files import Sampling, plain
from decoders.exported_space import SpaceInfo
from decoders.flashdecoder.exported import build as build_flashdecoder
from decoders.flashdecoder.model import FlashDecoderConfig
from experiments.config import load
from experiments.train import build


def shaken(module: nn.Module) -> None:
    """Every parameter away from its initial value, those that begin at zero too; statistics of latents away from 0 and 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))


def trained(name: str, *overrides: str) -> VideoDecoder:
    """A decoder as if a run had trained it: of an encoder that is trained the latents have statistics."""
    torch.manual_seed(0)
    decoder = build(load(name, overrides))
    shaken(decoder)
    if getattr(decoder, "encoder", None) is not None:
        with torch.no_grad():
            decoder.model.latent_mean.add_(0.3 * torch.randn(decoder.model.latent_mean.shape))
            decoder.model.latent_std.mul_(1.0 + torch.rand(decoder.model.latent_std.shape))
    return decoder.eval()


def clip(frames: int = 9, height: int = 32, width: int = 48) -> Tensor:
    """Smooth and moving, RGB in [-1, 1]."""
    t, y, x = torch.meshgrid(*(torch.linspace(0, 1, size) for size in (frames, height, width)), indexing="ij")
    return torch.stack([torch.sin(6 * x + 3 * t), torch.cos(5 * y - 2 * t), torch.sin(4 * (x + y))])[None] * 0.8


def frames_of(space: object) -> int:
    """A short length of video that the space encodes."""
    return 10 if getattr(space, "paired", False) or getattr(space, "chunk", None) == 5 else 9


def small_flashdecoder(**changes: object) -> Exported:
    """A small FlashDecoder over a space with statistics, as an export, with random weights."""
    config = FlashDecoderConfig(
        **{"depth": 1, "dim": 64, "num_heads": 1, "num_kv_heads": 1, "refinement_depth": 1, **changes}
    )
    space = SpaceInfo("small", 4, 4, 8, True, "f1", mean=(1.0, -2.0, 0.5, 0.0), std=(2.0, 3.0, 2.5, 4.0))
    made = build_flashdecoder(plain(config), plain(Sampling()), space)
    made.architecture = plain(config)
    return made.requires_grad_(False).eval()
