"""FlashDecoder for inference: see ``decoders/exported.py``."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from decoders.exported_files import Sampling, fill, plain
from decoders.exported_module import Exported
from decoders.exported_space import SpaceInfo
from decoders.flashdecoder.model import FlashDecoderConfig, FlashDecoderModel


class ExportedFlashDecoder(Exported):
    """Latents are read in the network's dtype."""

    @property
    def size_multiple(self) -> int:
        return self.network.patch if hasattr(self.network, "patch") else self.space.stride_hw

    def _cast(self, latent: Tensor) -> Tensor:
        return latent.to(self.dtype)


def describe(decoder: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Network and sampling of a run's decoder, as plain values."""
    return plain(decoder.model.config), {}


def build(network: Mapping[str, Any], sampling: Mapping[str, Any], space: SpaceInfo) -> ExportedFlashDecoder:
    """The decoder without its weights. Raises ExportError: values that there cannot be."""
    config = fill(FlashDecoderConfig, network, "network")
    model = FlashDecoderModel(config, space.channels, space.stride_t, space.stride_hw)
    return ExportedFlashDecoder(model, None, space, plain(fill(Sampling, sampling, "sampling")))


def from_run(config: Mapping[str, Any], space: SpaceInfo) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same as :func:`describe`, from a run's resolved configuration."""
    return plain(fill(FlashDecoderConfig, config["decoder"], "decoder")), {}
