"""Released autoencoders, and wan_mini, for inference: see ``decoders/exported.py``.

Wan's and VideoVAE+'s come with their encoders, so they encode too. LTX has a decoder alone here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from decoders.backbones import ltx_weights, videovaeplus_weights, wan_weights
from decoders.backbones.ltx import LTXConfig, LTXDecoder
from decoders.backbones.staged import StagedDecoder
from decoders.backbones.videovaeplus import VideoVAEPlusConfig, VideoVAEPlusDecoder, VideoVAEPlusEncoder
from decoders.backbones.wan import WanConfig, WanDecoder, WanEncoder
from decoders.exported_files import Sampling, fill, plain
from decoders.exported_module import Exported
from decoders.exported_space import ExportError, SpaceInfo, public_name
from decoders.latent_spaces import wan_mini
from decoders.latent_spaces.base import hash_parts
from decoders.latent_spaces.diffusers_files import find_weights, read_layout
from decoders.latent_spaces.learned import LOG_VARIANCE_RANGE, draw
from decoders.latent_spaces.videovaeplus import encode_clip

M = TypeVar("M", bound=nn.Module)


@dataclass
class BackboneExport:
    """The networks as they were built."""

    wan: WanConfig | None = None
    ltx: LTXConfig | None = None
    videovaeplus: VideoVAEPlusConfig | None = None
    encoder: bool = False

    def __post_init__(self) -> None:
        if sum(layout is not None for layout in (self.wan, self.ltx, self.videovaeplus)) != 1:
            raise ExportError("network: a backbone has one layout, wan, ltx or videovaeplus")
        if self.encoder and self.ltx is not None:
            raise ExportError("network.encoder: there is none of LTX here")


class ExportedBackbone(Exported):
    """As the base; clips are encoded one at a time, as by the latent spaces."""

    @property
    def can_stream_encode(self) -> bool:
        return isinstance(self.encoder, WanEncoder)

    def _encode(self, video: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        if isinstance(self.encoder, VideoVAEPlusEncoder):
            return torch.cat([encode_clip(self.encoder, clip, sample, generator) for clip in video.split(1)])
        latents = []
        for clip in video.float().split(1):
            mean, log_variance = (moment.float() for moment in self.encoder.encode_in_chunks(clip))
            latents.append(draw(mean, log_variance.clamp(*LOG_VARIANCE_RANGE), generator) if sample else mean)
        return torch.cat(latents)


def describe(decoder: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A backbone is no family that is trained under this name: see ``decoders/baseline/exported.py``."""
    raise ExportError(
        f"{type(decoder).__name__} is a backbone, which no run trains by itself: save what decoders.load gave"
    )


def build(network: Mapping[str, Any], sampling: Mapping[str, Any], space: SpaceInfo) -> ExportedBackbone:
    """The decoder without its weights. Raises ExportError: values that there cannot be."""
    config = fill(BackboneExport, network, "network")
    encoder: nn.Module | None = None
    if config.wan is not None:
        decoder: StagedDecoder = WanDecoder(config.wan)
        encoder = WanEncoder(config.wan) if config.encoder else None
    elif config.ltx is not None:
        decoder = LTXDecoder(config.ltx)
    else:
        decoder = VideoVAEPlusDecoder(config.videovaeplus)
        encoder = VideoVAEPlusEncoder(config.videovaeplus) if config.encoder else None
    own = (decoder.channels, decoder.stride_t, decoder.stride_hw)
    if own != (space.channels, space.stride_t, space.stride_hw):
        raise ExportError(f"network: channels and strides are {own}, the space's are other ones")
    return ExportedBackbone(decoder, encoder, space, plain(fill(Sampling, sampling, "sampling")))


# --- from released files ---------------------------------------------------------------------------------------------


def from_wan_mini() -> ExportedBackbone:
    """The autoencoder that comes with the project, float32, both halves."""
    space = wan_mini.WanMini()
    space.require()
    decoder, encoder = wan_mini.load_decoder(), wan_mini.load_encoder()
    return _made("wan", decoder, encoder, wan_mini.WanMini.name, space.fingerprint, {"source": "wan_mini"})


def from_diffusers(folder: Path, name: str) -> ExportedBackbone:
    """A diffusers autoencoder of Wan (both halves) or LTX (the decoder), float32. ``folder`` has its config.json.

    Raises:
        ExportError: another kind of autoencoder.
        FileNotFoundError, ValueError: files are missing, or do not fit.
    """
    layout = read_layout(folder)
    if layout.kind not in ("wan", "ltx"):
        raise ExportError(
            f"{folder} holds a {layout.class_name}; here are decoders of Wan and LTX, use diffusers for it"
        )
    about = {"source": layout.class_name}
    if layout.kind == "ltx":
        config, state = ltx_weights.read(str(folder), "")
        decoder = _filled(LTXDecoder, config, lambda module: ltx_weights.fill(module, state, folder))
        return _made("ltx", decoder, None, name, _fingerprint(folder, layout, config), about)
    config, state = wan_weights.read(str(folder), "")
    halves = _wan(config, state, folder)
    return _made("wan", *halves, name, _fingerprint(folder, layout, config), about)


def from_file(file: Path) -> ExportedBackbone:
    """Wan's original ``.pth``, or VideoVAE+'s checkpoint, float32, both halves.

    Raises:
        ValueError: neither.
    """
    if file.suffix == ".pth":
        config, state = wan_weights.read(str(file))
        decoder, encoder = _wan(config, state, file)
        print_ = hash_parts("wan", plain(config), tensors=dict(encoder.named_parameters()))
        return _made("wan", decoder, encoder, file.stem, print_, {"source": file.name})
    config, state = videovaeplus_weights.read(file)
    halves = [
        _filled(half, config, lambda module: videovaeplus_weights.fill(module, state, file))
        for half in (VideoVAEPlusDecoder, VideoVAEPlusEncoder)
    ]
    shape = {"stride_t": config.stride_t, "stride_hw": config.stride_hw, "chunk_frames": None}
    print_ = hash_parts("videovaeplus", shape, tensors=dict(halves[1].named_parameters()))
    return _made("videovaeplus", *halves, "VideoVAE+", print_, {"source": file.name})


def _wan(config: WanConfig, state: Mapping[str, Tensor], source: Path) -> list[nn.Module]:
    halves = (WanDecoder, WanEncoder)
    return [_filled(half, config, lambda module: wan_weights.fill(module, state, source)) for half in halves]


def _filled(kind: Callable[[Any], M], config: Any, fill_in: Callable[[M], Any]) -> M:
    """A network with weights, without the random ones it would begin with."""
    with torch.device("meta"):
        module = kind(config)
    module.to_empty(device="cpu")
    if isinstance(module, StagedDecoder):
        module.reset_statistics()
    fill_in(module)
    return module


def _made(
    kind: str, decoder: nn.Module, encoder: nn.Module | None, name: str, fingerprint: str, about: dict[str, Any]
) -> ExportedBackbone:
    config = decoder.config
    known = getattr(config, "mean", None) is not None
    both = (config.mean, config.std) if known else ()  # in float32, as networks have them
    statistics = [tuple(torch.tensor(values, dtype=torch.float32).tolist()) for values in both] or [None, None]
    causal = kind != "videovaeplus"
    space = SpaceInfo(
        public_name(name), config.channels, config.stride_t, config.stride_hw, causal, fingerprint, *statistics
    )
    made = ExportedBackbone(decoder, encoder, space, plain(Sampling()))
    made.architecture = plain(BackboneExport(**{kind: config}, encoder=encoder is not None))
    made.about = about
    return made.requires_grad_(False).eval()


def _fingerprint(folder: Path, layout: Any, config: WanConfig | LTXConfig) -> str:
    """What ``decoders.latent_spaces.diffusers.DiffusersVAE`` says of the same folder, without diffusers."""
    weights: dict[str, Tensor] = {}
    for part in find_weights(folder, str(folder)):
        with safe_open(part, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.startswith(("encoder.", "quant_conv."))]  # noqa: SIM118
            weights |= {name: tensors.get_tensor(name).float() for name in names}
    for name, values in (("mean", config.mean), ("std", config.std)):
        weights[name] = torch.tensor(values, dtype=torch.float32).view(1, layout.channels, 1, 1, 1)
    shape = {"channels": layout.channels, "stride_t": layout.stride_t, "stride_hw": layout.stride_hw}
    return hash_parts(layout.class_name, shape, tensors=weights)
