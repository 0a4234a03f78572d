"""The baseline for inference, a Wan or MAGVIT-v2 layout with its encoder where it trained one: see ``decoders/exported.py``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decoders.backbones.magvit2 import Magvit2Config, Magvit2Decoder, Magvit2Encoder
from decoders.backbones.wan import WanConfig, WanDecoder, WanEncoder
from decoders.baseline.linear_start import shortcuts_only
from decoders.baseline.model import BaselineConfig, build_decoder
from decoders.exported_files import Sampling, fill, plain
from decoders.exported_module import Exported
from decoders.exported_space import ExportError, SpaceInfo
from decoders.latent_spaces.learned import LOG_VARIANCE_RANGE, draw


@dataclass
class BaselineExport:
    """The networks as they were built."""

    wan: WanConfig | None = None
    magvit2: Magvit2Config | None = None
    encoder: bool = False
    skeleton: bool = False  # without residual branches
    mean: list[float] | None = None  # of the latents, as magvit2 takes them; wan has them in its layout
    std: list[float] | None = None

    def __post_init__(self) -> None:
        if (self.wan is None) == (self.magvit2 is None):
            raise ExportError("network: a baseline has one layout, wan or magvit2")
        if self.skeleton and self.wan is None:
            raise ExportError("network.skeleton is for the wan layout")


class ExportedBaseline(Exported):
    """As the base, with an encoder that gives a posterior."""

    def _encode(self, video: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        mean, log_variance = self.encoder.encode_in_chunks(video)
        return draw(mean, log_variance.clamp(*LOG_VARIANCE_RANGE), generator) if sample else mean.float()


def describe(decoder: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Networks and sampling of a run's decoder, as plain values.

    Raises:
        ExportError: it is a latent space's own decoder, which is not trained here.
    """
    return _described(decoder.model, decoder.encoder is not None), {}


def _described(model: nn.Module, encoder: bool) -> dict[str, Any]:
    if not isinstance(model, WanDecoder | Magvit2Decoder):
        raise ExportError(
            "decoder.backbone=space is the latent space's own decoder, which is not trained here: there is nothing to export. "
            "decoders.load(FOLDER) reads a diffusers folder of Wan or LTX, decoders.load('wan_mini') the one that comes along"
        )
    kind = "wan" if isinstance(model, WanDecoder) else "magvit2"
    skeleton = any("forward" in vars(part) for part in model.modules())  # see linear_start.shortcuts_only
    statistics = model.given_statistics if kind == "magvit2" else {}
    return plain(BaselineExport(**{kind: model.config}, encoder=encoder, skeleton=skeleton, **statistics))


def build(network: Mapping[str, Any], sampling: Mapping[str, Any], space: SpaceInfo) -> ExportedBaseline:
    """The decoder without its weights. Raises ExportError: values that there cannot be."""
    config = fill(BaselineExport, network, "network")
    if config.wan is not None:
        decoder, encoder = WanDecoder(config.wan), WanEncoder(config.wan) if config.encoder else None
    else:
        decoder = Magvit2Decoder(config.magvit2, config.mean, config.std)
        encoder = Magvit2Encoder(config.magvit2, variational=True) if config.encoder else None
    own = (decoder.channels, decoder.stride_t, decoder.stride_hw)
    if own != (space.channels, space.stride_t, space.stride_hw):
        raise ExportError(f"network: channels and strides are {own}, the space's are other ones")
    if config.skeleton:
        shortcuts_only(*(part for part in (encoder, decoder) if part is not None))
    return ExportedBaseline(decoder, encoder, space, plain(fill(Sampling, sampling, "sampling")))


def from_run(config: Mapping[str, Any], space: SpaceInfo) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same as :func:`describe`, from a run's resolved configuration."""
    own = fill(BaselineConfig, config["decoder"], "decoder")
    if own.backbone == "space":
        return _described(nn.Identity(), False), {}
    with torch.device("meta"):
        model = build_decoder(own, space.channels, space.stride_t, space.stride_hw)
        if own.skeleton:
            shortcuts_only(model)
        return _described(model, own.train_encoder), {}
