"""REGEN for inference, with its encoder where it trained one: see ``decoders/exported.py``."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from decoders.backbones.magvit2 import Magvit2Encoder
from decoders.exported_files import Sampling, fill, plain
from decoders.exported_module import Exported
from decoders.exported_space import ExportError, SpaceInfo
from decoders.latent_spaces.learned import LOG_VARIANCE_RANGE, draw
from decoders.regen.model import RegenConfig, RegenDecoder
from decoders.seeds import key_seed


@dataclass
class RegenExport:
    """The networks as they were built."""

    config: RegenConfig
    variational: bool = False  # of the encoder


@dataclass
class RegenSampling(Sampling):
    """How the run decoded; ``decode`` may be told otherwise."""

    steps: int = 1
    extension: bool = False
    noise_seed: int = 0  # of the noise where the caller gives no generator

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ExportError(f"sampling.steps is {self.steps}; it must be 1 or more")


class ExportedRegen(Exported):
    """``decode`` takes ``times``, ``steps`` and ``extension`` as :meth:`decoders.regen.model.RegenDecoder.decode`, a stream the last
    two."""

    sampling_options = ("times", "steps", "extension")
    stream_options = ("steps", "extension")

    @property
    def can_stream(self) -> bool:
        return True

    def _decode(
        self,
        latent: Tensor,
        size: tuple[int, int, int] | None,
        reference: Any,
        generator: Any,
        **sampling: Any,
    ) -> Tensor:
        return self.network.decode(latent, generator=generator or self._noise(), **self._chosen(sampling))

    def check_sampling(self, sampling: Mapping[str, Any]) -> None:
        """As in the base; and values that no clip can be decoded with."""
        super().check_sampling(sampling)
        steps, extension, times = (sampling.get(name) for name in ("steps", "extension", "times"))
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ExportError(f"steps={steps} must be a whole number, 1 or more")
        if extension is not None and not isinstance(extension, bool):
            raise ExportError(f"extension={extension} must be true or false")
        if times is None:
            return
        if not _are_times(times):
            raise ExportError("times must be one or more finite numbers, in frames of the clip, such as [0,0.5,1]")
        if self._chosen(sampling)["extension"]:
            said = "leave times out, or extension" if extension else "with times give extension=false too"
            raise ExportError(f"extension joins whole chunks, and times ask for single frames: {said}")

    def _start_stream(
        self, batch_size: int, height: int, width: int, reference: Any, generator: Any, **sampling: Any
    ) -> Any:
        return self.network.start_stream(
            batch_size, height, width, generator=generator or self._noise(), **self._chosen(sampling)
        )

    def _chosen(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """What was asked, over how the run decoded."""
        own = {name: self.sampling[name] for name in self.stream_options}
        return own | {name: value for name, value in sampling.items() if value is not None}

    def _noise(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.sampling["noise_seed"])

    def _encode(self, video: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        """Chunk by chunk, so memory does not grow with the clip."""
        latents = []
        for chunk in video.split(self.space.chunk, dim=2):
            mean, log_variance = self.encoder(chunk)
            if sample and log_variance is not None:
                mean = draw(mean, log_variance.float().clamp(*LOG_VARIANCE_RANGE), generator)
            latents.append(mean.float())
        return torch.cat(latents, dim=2)


def _are_times(times: Any) -> bool:
    if isinstance(times, Tensor):
        return times.ndim == 1 and bool(times.numel()) and bool(times.isfinite().all())
    try:
        return len(times) > 0 and all(isfinite(float(time)) for time in times)
    except (TypeError, ValueError, OverflowError):
        return False


def describe(decoder: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Networks and sampling of a run's decoder, as plain values."""
    variational = decoder.encoder is not None and decoder.encoder.variational
    objective, seed = decoder.objective, decoder.training_config.seed
    return plain(RegenExport(decoder.model.config, variational)), _sampling(objective.steps, objective.extension, seed)


def _sampling(steps: int, extension: bool, seed: int) -> dict[str, Any]:
    return {"steps": steps, "extension": extension, "noise_seed": key_seed("noise", seed)}


def build(network: Mapping[str, Any], sampling: Mapping[str, Any], space: SpaceInfo) -> ExportedRegen:
    """The decoder without its weights. Raises ExportError: values that there cannot be."""
    found = fill(RegenExport, network, "network")
    config = found.config
    if (config.encoder is not None) != space.paired:
        raise ExportError("network.config.encoder and the space's chunks of content and motion belong together")
    decoder = RegenDecoder(config, space.channels, space.stride_t, space.stride_hw, chunked=space.paired)
    encoder = None if config.encoder is None else Magvit2Encoder(config.encoder, found.variational)
    return ExportedRegen(decoder, encoder, space, plain(fill(RegenSampling, sampling, "sampling")))


def from_run(config: Mapping[str, Any], space: SpaceInfo) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same as :func:`describe`, from a run's resolved configuration."""
    decoder, objective = fill(RegenConfig, config["decoder"], "decoder"), config["objective"]
    network = plain(RegenExport(decoder, decoder.encoder is not None and objective["variational"]))
    return network, _sampling(objective["steps"], objective["extension"], config["seed"])
