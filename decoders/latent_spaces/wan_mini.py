"""wan_mini: a small trained video autoencoder that comes with the code, in Wan 2.1's layout (16 channels, 4 x 8 x 8).

Base width 24 instead of 96. Weights, how they were made and what they reach: ``wan_mini_weights/README.md``. The
folder holds what diffusers calls its weights, in two files; ``save_diffusers`` writes the one-file folder that
``AutoencoderKLWan.from_pretrained`` reads.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from decoders.backbones import wan_weights
from decoders.backbones.wan import WanConfig, WanDecoder, WanEncoder
from decoders.latent_spaces.base import LatentSpace, hash_parts
from decoders.latent_spaces.learned import LOG_VARIANCE_RANGE, draw

FOLDER = Path(__file__).parent / "wan_mini_weights"
CONFIG, ENCODER, DECODER = "config.json", "encoder.safetensors", "decoder.safetensors"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class WanMiniConfig:
    """The weights are those in the repository; only how they are computed with is a choice."""

    dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of encoding and decoding; bfloat16 is what short runs on a CPU want
    )


class WanMini(LatentSpace):
    """The frozen space. The encoder is read when it is first needed and follows the video's device.

    Clips are encoded one at a time and four frames at a time, so memory does not grow with their length.
    """

    Config = WanMiniConfig
    name = "wan_mini"
    causal = True

    def __init__(self, config: WanMiniConfig | None = None) -> None:
        self.config = config or WanMiniConfig()
        self.layout = load_config()
        self.channels, self.stride_t, self.stride_hw = self.layout.channels, self.layout.stride_t, self.layout.stride_hw
        self._encoder: WanEncoder | None = None
        self._decoder: WanDecoder | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the encoder's weights, the strides and the statistics."""
        return _fingerprint()

    @property
    def statistics(self) -> tuple[list[float], list[float]]:
        """As in the base."""
        return torch.tensor(self.layout.mean).tolist(), torch.tensor(self.layout.std).tolist()

    def require(self) -> None:
        missing = [name for name in (CONFIG, ENCODER, DECODER) if not (FOLDER / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{FOLDER} lacks {', '.join(missing)}, which belong to the repository: check it out again"
            )

    def _encode(
        self, video: Float[Tensor, "b 3 t h w"], sample: bool, generator: torch.Generator | None
    ) -> Float[Tensor, "b c n y x"]:
        latents = []
        for mean, log_variance in self._posteriors(video):
            latents.append(draw(mean, log_variance, generator) if sample else mean)
        shift, scale = self._statistics(video.device)
        return (torch.cat(latents) - shift) / scale

    def _moments(self, video: Float[Tensor, "b 3 t h w"]) -> tuple[Tensor, Tensor]:
        means, log_variances = zip(*self._posteriors(video), strict=True)
        shift, scale = self._statistics(video.device)
        return (torch.cat(means) - shift) / scale, torch.cat(log_variances) - 2 * scale.log()

    def _posteriors(self, video: Float[Tensor, "b 3 t h w"]) -> Iterator[tuple[Tensor, Tensor]]:
        """Mean and log-variance of one clip after the other, not normalised."""
        if self._encoder is None:
            self._encoder = load_encoder()
        encoder = self._encoder.to(video.device, self._dtype)
        for clip in video.float().split(1):
            mean, log_variance = (moment.float() for moment in encoder.encode_in_chunks(clip))
            yield mean, log_variance.clamp(*LOG_VARIANCE_RANGE)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, device=device) for values in (self.layout.mean, self.layout.std))
        return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b 3 t h w"]:
        """The space's own decoder: RGB clamped to [-1, 1], one latent frame at a time."""
        if self._decoder is None:
            self._decoder = load_decoder().requires_grad_(False)
        with torch.autocast(latent.device.type, enabled=False):
            return self._decoder.to(latent.device, self._dtype).decode(latent.float()).float()

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.config.dtype)


def load_config() -> WanConfig:
    """Layout and statistics of the weights in the repository."""
    return wan_weights.config_of(json.loads((FOLDER / CONFIG).read_text()))


def load_encoder() -> WanEncoder:
    """The trained encoder, float32, frozen. It gives latents that are not normalised yet, as all ``WanEncoder`` do."""
    encoder = wan_weights.fill(WanEncoder(load_config()), load_file(FOLDER / ENCODER), FOLDER / ENCODER)
    return encoder.requires_grad_(False).eval()


def load_decoder() -> WanDecoder:
    """The trained decoder with the statistics of its latents, float32: a teacher or a start for fine-tuning."""
    return wan_weights.fill(WanDecoder(load_config()), load_file(FOLDER / DECODER), FOLDER / DECODER)


def save(
    folder: Path,
    encoder: WanEncoder,
    decoder: WanDecoder,
    mean: list[float],
    std: list[float],
    about: Mapping[str, str],
) -> None:
    """Write the three files of ``FOLDER``, weights in bfloat16; ``about`` goes into their metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = wan_weights.to_config(decoder.config)
    config |= {"latents_mean": mean, "latents_std": std}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    for name, half in ((ENCODER, encoder), (DECODER, decoder)):
        save_file(_stored(half), folder / name, {"format": "pt", **about})
        (folder / name).chmod(0o644)


def save_diffusers(folder: str | Path) -> Path:
    """Write the folder that ``diffusers.AutoencoderKLWan.from_pretrained`` reads, and return it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text((FOLDER / CONFIG).read_text())
    both = load_file(FOLDER / ENCODER) | load_file(FOLDER / DECODER)
    save_file(both, folder / DIFFUSERS_WEIGHTS, {"format": "pt"})
    return folder


def _stored(half: nn.Module) -> dict[str, Tensor]:
    return {k: v.to(torch.bfloat16).contiguous() for k, v in wan_weights.to_diffusers(half).items()}


@cache
def _fingerprint() -> str:
    config = load_config()
    shape = {"stride_t": config.stride_t, "stride_hw": config.stride_hw, "mean": config.mean, "std": config.std}
    return hash_parts("wan_mini", shape, tensors=load_file(FOLDER / ENCODER))
