"""Small REGEN decoders, latents, clips and seeds for the tests."""

import torch
from torch import Tensor, nn

from datamodules.batch import VideoBatch
from decoders.regen.config import RegenConfig, SirenConfig
from decoders.regen.model import RegenDecoder
from decoders.regen.module import Regen
from experiments.config import load
from experiments.train import build

CHANNELS, K, STRIDE_HW = 8, 4, 8
SIREN = SirenConfig(width=32, out=16)
TINY = dict(width=48, blocks=2, heads=2, siren=SIREN)
VARIANTS = {
    "paper": {},
    "patch_t_2": dict(patch_t=2),
    "no_qk_norm": dict(qk_norm=False),
    "single": dict(modulation="single"),
    "in_context": dict(conditioning="in_context"),
    "in_context_patch_t_2": dict(conditioning="in_context", patch_t=2),
    "linear": dict(first_frame="linear"),
    "letter": dict(first_frame="letter", siren=SirenConfig(width=32, out=CHANNELS)),
    "multiply": dict(siren=SirenConfig(width=32, out=16, modulation="multiply")),
    "epsilon": dict(prediction="epsilon"),
    "skip": dict(skip=True),
}


def untrained(chunked: bool = True, k: int = K, **changes) -> RegenDecoder:
    return RegenDecoder(RegenConfig(**TINY | changes), CHANNELS, k, STRIDE_HW, chunked)


def tiny(chunked: bool = True, k: int = K, **changes) -> RegenDecoder:
    """A small decoder with nothing at zero."""
    model = untrained(chunked, k, **changes)
    nn.init.xavier_uniform_(model.dit.final.weight)
    for name, parameter in model.named_parameters():
        if name.endswith(("gain", "modulation")):
            nn.init.normal_(parameter, float(name.endswith("gain")), 0.2)
    return model


def latents(n: int = 4, batch: int = 2, size: tuple[int, int] = (2, 3)) -> Tensor:
    return torch.randn(batch, CHANNELS, n, *size)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(*overrides: str, name: str = "regen_debug") -> Regen:
    torch.manual_seed(0)
    decoder = build(load(name, overrides))
    decoder.training_config.validation.metrics = ["psnr"]
    return decoder


def clip(t: int, side: int = 32, b: int = 2) -> VideoBatch:
    video = torch.rand(b, 3, t, side, side, generator=generator(t)) * 2 - 1
    return {"video": video, "key": [f"clip{i}" for i in range(b)]}
