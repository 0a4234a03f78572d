"""RefDecoder for inference: see ``decoders/exported.py``."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from decoders.exported_files import Sampling, fill, plain
from decoders.exported_module import Exported
from decoders.exported_space import ExportError, SpaceInfo
from decoders.refdecoder.model import RefDecoderConfig, RefDecoderModel


class ExportedRefDecoder(Exported):
    """``decode`` and ``start_stream`` take references "b 3 r h w", and ``skip``: the plain, fine-tuned decoder."""

    sampling_options = stream_options = ("skip",)

    @property
    def can_stream(self) -> bool:
        return self.network.can_stream()

    @property
    def uses_reference(self) -> bool:
        return self.network.uses_reference

    def _decode(
        self,
        latent: Tensor,
        size: tuple[int, int, int] | None,
        reference: Any,
        generator: Any,
        **sampling: Any,
    ) -> Tensor:
        pixels = None if size is None else size[1:]
        return self.network.decode(latent, self._given(reference), skip=bool(sampling.get("skip")), size=pixels)

    def _start_stream(
        self, batch_size: int, height: int, width: int, reference: Any, generator: Any, **sampling: Any
    ) -> Any:
        given = {"reference": self._given(reference), "skip": bool(sampling.get("skip"))}
        return self.network.start_stream(batch_size, height, width, **given)

    def check_sampling(self, sampling: Mapping[str, Any]) -> None:
        """As in the base; and values that are neither true nor false."""
        super().check_sampling(sampling)
        if not isinstance(sampling.get("skip"), bool | None):
            raise ExportError(f"skip={sampling['skip']} must be true or false")

    def streams(self, sampling: Mapping[str, Any]) -> bool:
        """As in the base; a plain decoder may stream where one with references sees the whole clip."""
        return set(sampling) <= set(self.stream_options) and self.network.can_stream(bool(sampling.get("skip")))

    def _given(self, reference: Any) -> Any:
        return reference if self.network.uses_reference else None


def describe(decoder: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Network and sampling of a run's decoder, as plain values."""
    return plain(decoder.model.config), {}


def build(network: Mapping[str, Any], sampling: Mapping[str, Any], space: SpaceInfo) -> ExportedRefDecoder:
    """The decoder without its weights. Raises ExportError: values that there cannot be."""
    config = fill(RefDecoderConfig, network, "network")
    model = RefDecoderModel(config, space.channels, space.stride_t, space.stride_hw)
    return ExportedRefDecoder(model, None, space, plain(fill(Sampling, sampling, "sampling")))


def from_run(config: Mapping[str, Any], space: SpaceInfo) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same as :func:`describe`, from a run's resolved configuration."""
    return plain(fill(RefDecoderConfig, config["decoder"], "decoder")), {}
