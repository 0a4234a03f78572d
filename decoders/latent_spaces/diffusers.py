"""Frozen video autoencoders in diffusers' format, from a folder or a hub id: Wan, LTX, HunyuanVideo, Cosmos and others.

What decides shapes is read from the folder's ``config.json``, so nothing here is particular to one release. Frames: what a
clip may have, so that it is encoded and decoded to as many.

| `_class_name`               | released as      | channels, stride_t, stride_hw       | frames  | statistics                               |
|-----------------------------|------------------|-------------------------------------|---------|------------------------------------------|
| AutoencoderKLWan            | Wan 2.1          | 16, 4, 8                            | 1 + 4k  | `latents_mean`, `latents_std`            |
| AutoencoderKLWan            | Wan 2.2          | 48, 4, 16 (pixels patchified by 2)  | 1 + 4k  | the same                                 |
| AutoencoderKLLTXVideo       | LTX-Video        | 128, 8, 32 (pixels patchified by 4) | 1 + 8k  | buffers in the weights, `scaling_factor` |
| AutoencoderKLLTX2Video      | LTX-2            | 128, 8, 32                          | 1 + 8k  | the same                                 |
| AutoencoderKLHunyuanVideo   | HunyuanVideo     | 16, 4, 8                            | 1 + 4k  | `scaling_factor`                         |
| AutoencoderKLHunyuanVideo15 | HunyuanVideo 1.5 | 32, 4, 16                           | 1 + 4k  | `scaling_factor`                         |
| AutoencoderKLCosmos         | Cosmos 1.0       | 16, 8, 8                            | 1 + 8k  | `latents_mean`, `latents_std`, one per latent frame |
| AutoencoderKLCogVideoX      | CogVideoX        | 16, 4, 8                            | 1 + 8k  | `scaling_factor`                         |
| AutoencoderKLMochi          | Mochi 1          | 12, 6, 8                            | 1 + 6k  | `latents_mean`, `latents_std`            |
| AutoencoderVidTok           | VidTok           | 4 and more, 4, 8                    | 1 + 4k; not causal: 16k | none: mean 0, std 1      |

Clips are encoded one at a time. Wan and LTX are encoded a few frames at a time, exactly: both encoders are causal and keep a few
frames per convolution, so activations do not grow with the length of a clip (Wan: four frames; LTX: ``chunk_latents``).
The others are computed as diffusers does it: whole, but HunyuanVideo in overlapping pieces from 17 frames on, and CogVideoX
eight frames at a time.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decoders.latent_spaces.base import LatentSpace, hash_parts
from decoders.latent_spaces.causal_chunks import encode_in_chunks
from decoders.latent_spaces.diffusers_files import VAELayout, find_folder, find_weights, read_layout

SHAPE = ("channels", "stride_t", "stride_hw")
SMALLEST_STD = math.exp(
    -15
)  # of a posterior: diffusers clamps log-variances to -30; a logarithm of zero would be infinite


@dataclass
class DiffusersVAEConfig:
    """Which autoencoder, and how it is computed."""

    path: str
    """A folder written by ``save_pretrained`` (or one that holds it as ``vae``), or a hub id."""
    subfolder: str | None = None
    """Where in ``path`` the autoencoder is; null: ``path`` itself, else its ``vae``."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the frozen network computes in. Latents come out in float32."""
    chunk_latents: int = 4
    """Latent frames that LTX's encoder computes at once; memory grows with it, results do not change."""
    channels: int | None = None
    """What the autoencoder is expected to have, as the next two: refused if its config.json says otherwise, and enough
    to show an experiment (sizes, parameters) on a machine without the files."""
    stride_t: int | None = None
    stride_hw: int | None = None
    causal: bool | None = None
    """Declared too, where the files are not there and it is not: null is causal."""
    frame_step: int | None = None
    """Declared too: frames from one valid length to the next, where it is not ``stride_t``."""

    def __post_init__(self) -> None:
        if self.chunk_latents < 1:
            raise ValueError(f"chunk_latents is {self.chunk_latents}; it must be at least 1")


class DiffusersVAE(LatentSpace):
    """A frozen diffusers autoencoder as a latent space. The weights are read when they are first needed.

    Raises:
        FileNotFoundError: there is no ``config.json`` and the config does not declare channels and strides; says where
            it was looked for and how to get it. :meth:`require` raises it for the weights.
        ValueError: the folder holds another kind of model, or one with other channels or strides than declared.
    """

    Config = DiffusersVAEConfig

    def __init__(self, config: DiffusersVAEConfig):
        self.config = config
        self.name = config.path
        declared = {key: getattr(config, key) for key in SHAPE}
        try:
            self.layout = read_layout(find_folder(config.path, config.subfolder, download=None in declared.values()))
        except FileNotFoundError:
            if None in declared.values():
                raise
            self.layout = None
        rule = {"causal": config.causal, "frame_step": config.frame_step}
        self._refuse_undeclared(declared | rule)
        for key, value in declared.items():
            setattr(self, key, getattr(self.layout, key) if self.layout else value)
        self.causal = self.layout.causal if self.layout else config.causal is not False
        self.frame_step = self.layout.frame_step if self.layout else config.frame_step or self.stride_t
        self._vae: nn.Module | None = None
        self._fingerprint: str | None = None

    def _refuse_undeclared(self, declared: dict[str, int | None]) -> None:
        for key, value in declared.items():
            if self.layout and value is not None and value != getattr(self.layout, key):
                raise ValueError(
                    f"{key} is declared as {value}, but the autoencoder at {self.config.path} has "
                    f"{getattr(self.layout, key)}; set {key} to that, or path to the autoencoder that was meant"
                )

    @property
    def _first(self) -> int:
        return 1 if self.causal else self.frame_step

    def latent_frames(self, t: int) -> int:
        if t < self._first or (t - self._first) % self.frame_step:
            raise ValueError(self._length_error(t))
        return 1 + (t - 1) // self.stride_t if self.causal else t // self.stride_t

    def pixel_frames(self, n: int) -> int:
        frames = super().pixel_frames(n)
        if (frames - self._first) % self.frame_step or frames < self._first:
            each = self.frame_step // self.stride_t
            rule = f"1 + {each}k" if self.causal else f"{each}k"
            raise ValueError(f"{n} latent frames: the {self.name} space decodes {rule} of them")
        return frames

    def padded_frames(self, t: int) -> int:
        return t + (int(self.causal) - t) % self.frame_step

    def _length_error(self, t: int) -> str:
        step = self.frame_step
        below = self._first + max(t - self._first, 0) // step * step
        near = str(below) if t < self._first else f"{below} or {below + step}"
        rule = f"1 + {step}k" if self.causal else f"{step}k"
        return f"{t} frames: the {self.name} space encodes clips of {rule} frames; the nearest is {near}"

    @property
    def compression(self) -> float:
        n = self.latent_frames(self.padded_frames(1 << 20))
        return 3 * self.pixel_frames(n) * self.stride_hw**2 / (self.channels * n)

    @property
    def fingerprint(self) -> str:
        """Hash of the encoder's weights, the strides and the statistics, as stored (not of the compute dtype)."""
        self._load()
        return self._fingerprint

    @property
    def statistics(self) -> tuple[list[float], list[float]] | None:
        """As in the base; None where every latent frame has its own (Cosmos). Of Wan without reading weights."""
        if self._vae is None and self.layout is not None and self.layout.kind == "wan":
            config = json.loads((self.folder / "config.json").read_text())
            given = [config.get("latents_mean"), config.get("latents_std")]
            if None not in given:
                return tuple(torch.tensor(values, dtype=torch.float32).tolist() for values in given)
        self._load()
        if self._mean.shape[2] > 1:
            return None
        return self._mean.flatten().tolist(), self._std.flatten().tolist()

    @property
    def folder(self) -> Path:
        """Where config.json is. Raises FileNotFoundError."""
        return find_folder(self.config.path, self.config.subfolder, download=True)

    @property
    def vae(self) -> nn.Module:
        """The autoencoder with its weights, read when this is first asked."""
        self._load()
        return self._vae

    def require(self) -> None:
        """Find the weights, in the hub's cache or on the hub if they are not in a folder. Nothing is allocated."""
        find_weights(self.folder, self.config.path)

    def _encode(
        self, video: Float[Tensor, "b 3 t h w"], sample: bool, generator: torch.Generator | None
    ) -> Float[Tensor, "b c n y x"]:
        self._load()
        self._place(video.device, "encoder", "quant_conv", "regularization")
        return torch.cat([self._encode_clip(clip, sample, generator) for clip in video.split(1)])

    def _encode_clip(self, clip: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        mean, std = self._posterior(clip.to(self._dtype))
        latent = mean.float()
        if sample and std is not None:
            # Drawn where the generator lives, so that one seed gives one latent on every device.
            device = generator.device if generator else latent.device
            noise = torch.randn(latent.shape, generator=generator, device=device).to(latent.device)
            latent = latent + std.float() * noise
        shift, scale = (for_frames(values, latent.shape[2]) for values in (self._mean, self._std))
        return (latent - shift) / scale

    def _moments(self, video: Float[Tensor, "b 3 t h w"]) -> tuple[Tensor, Tensor | None]:
        self._load()
        self._place(video.device, "encoder", "quant_conv", "regularization")
        posteriors = [self._posterior(clip.to(self._dtype)) for clip in video.split(1)]
        means, deviations = (list(part) for part in zip(*posteriors, strict=True))
        mean = torch.cat([part.float() for part in means])
        shift, scale = (for_frames(values, mean.shape[2]) for values in (self._mean, self._std))
        if deviations[0] is None:
            return (mean - shift) / scale, None
        deviation = torch.cat([part.float() for part in deviations]).clamp_min(SMALLEST_STD)
        return (mean - shift) / scale, 2 * (deviation / scale).log()

    def _posterior(self, clip: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of one clip, not normalised; no deviation where the encoder gives one latent."""
        if self.layout.kind == "ltx":
            from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

            chunk = self.config.chunk_latents * self.stride_t
            posterior = DiagonalGaussianDistribution(encode_in_chunks(self._vae.encoder, clip, chunk))
            return posterior.mean, posterior.std
        if self.layout.kind == "vidtok" and self.causal:  # as its forward does: a group of frames for the first
            clip = torch.cat([clip[:, :, :1].expand(-1, -1, self.stride_t - 1, -1, -1), clip], 2)
        encoded = self._vae.encode(clip)
        if isinstance(encoded, tuple):  # quantised: latents and their indices
            return encoded[0], None
        posterior = encoded.latent_dist
        return posterior.mode(), getattr(posterior, "std", None)

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b 3 t h w"]:
        """The autoencoder's own decoder, the teacher: normalised latents to RGB, float32, clip by clip.

        Wan's decoder clamps to [-1, 1], the others do not. LTX decoders that ask for a time step (0.9.1 and later) get
        zero: the latents are taken as free of noise.

        Raises:
            ValueError: latents of another shape, or a number of latent frames that this decoder makes other frames of.
        """
        if latent.ndim != 5 or latent.shape[1] != self.channels:
            raise ValueError(f"latent is {tuple(latent.shape)}; this space has (b, {self.channels}, n, y, x)")
        self.pixel_frames(latent.shape[2])
        self._load()
        self._place(latent.device, "decoder", "post_quant_conv")
        shift, scale = (for_frames(values, latent.shape[2]) for values in (self._mean, self._std))
        with torch.autocast(latent.device.type, enabled=False):
            clips = [clip.float() * scale + shift for clip in latent.split(1)]
            return torch.cat([decode_clips(self._vae, clip.to(self._dtype)).float() for clip in clips])

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.config.dtype)

    def _load(self) -> None:
        if self._vae is not None:
            return
        folder = self.folder
        if self.layout is None:  # only declared so far
            self.layout = read_layout(folder)
            self._refuse_undeclared({key: getattr(self, key) for key in (*SHAPE, "causal", "frame_step")})
        vae = load_vae(folder, self.layout)
        self._mean, self._std = latent_statistics(vae, self.layout)
        # Of the weights as stored: casting to the compute dtype must not make another space of it.
        weights = {f"encoder.{name}": tensor for name, tensor in vae.encoder.state_dict().items()}
        if (quant_conv := getattr(vae, "quant_conv", None)) is not None:
            weights |= {f"quant_conv.{name}": tensor for name, tensor in quant_conv.state_dict().items()}
        statistics = {"mean": self._mean, "std": self._std}
        shape = {"channels": self.channels, "stride_t": self.stride_t, "stride_hw": self.stride_hw}
        self._fingerprint = hash_parts(type(vae).__name__, shape, tensors=weights | statistics)
        self._vae = vae

    def _place(self, device: torch.device, *parts: str) -> None:
        """Only the half that is used is moved and cast: a run that only encodes never holds the decoder on its GPU."""
        for part in parts:
            if (module := getattr(self._vae, part, None)) is not None:
                module.to(device, self._dtype)
        self._mean, self._std = self._mean.to(device), self._std.to(device)


def load_vae(folder: Any, layout: VAELayout) -> nn.Module:
    """The autoencoder in ``folder``, float32, frozen, in eval mode, on the CPU; tiling and slicing off."""
    import importlib.util

    import diffusers

    find_weights(folder, str(folder))
    vae, info = getattr(diffusers, layout.class_name).from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        low_cpu_mem_usage=importlib.util.find_spec("accelerate") is not None,
    )
    # diffusers fills what is missing with random numbers and goes on.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise ValueError(f"{folder}: {len(info[problem])} {problem.replace('_', ' ')}, such as {info[problem][0]}")
    return vae.requires_grad_(False).eval()


def empty_vae(folder: Any, layout: VAELayout) -> nn.Module:
    """The autoencoder that ``folder``'s config.json describes, float32, frozen, with random weights."""
    with torch.device("cpu"):  # what diffusers makes when it is imported must not be meta tensors
        import diffusers

        cls = getattr(diffusers, layout.class_name)
    return cls.from_config(cls.load_config(folder, local_files_only=True)).requires_grad_(False).eval()


def latent_statistics(vae: nn.Module, layout: VAELayout) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, (1, c, 1, 1, 1) each: ``normalised = (latent - mean) / std``.

    Cosmos has numbers of their own for every latent frame: (1, c, 16, 1, 1), see :func:`for_frames`. A ``scaling_factor``
    divides the deviation, a ``shift_factor`` is the mean. The scale of a scheduler (Cosmos: ``sigma_data``) is no part of it.

    Raises:
        ValueError: they are not one finite number per latent channel, or a deviation is not positive.
    """
    mean, std = _given_statistics(vae, layout)
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        whole = values.ndim == 1 and values.numel() and values.numel() % layout.channels == 0
        if not whole or (layout.kind != "cosmos" and values.numel() != layout.channels):
            raise ValueError(
                f"{name} has {values.numel()} numbers for {layout.channels} latent channels; "
                f"config.json must give one per channel (left out, diffusers takes those of its default release)"
            )
    std = std / (vae.config.get("scaling_factor") or 1.0)
    mean, std = (values.view(1, layout.channels, -1, 1, 1) for values in (mean, std))
    if mean.is_meta:  # only counting parameters
        return mean, std
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise ValueError("latents_mean and latents_std must be finite, and latents_std above zero")
    return mean.clone(), std.clone()


def _given_statistics(vae: nn.Module, layout: VAELayout) -> tuple[Tensor, Tensor]:
    """Mean and deviation as the files say them, before the scaling factor; 0 and 1 where they say nothing."""
    if layout.kind in ("ltx", "ltx2"):
        return vae.latents_mean.float(), vae.latents_std.float()
    config, default = vae.config, vae.config.get("shift_factor") or 0.0
    given = [config.get("latents_mean"), config.get("latents_std")]
    defaults = [[default] * layout.channels, [1.0] * layout.channels]
    return tuple(torch.tensor(v or d, dtype=torch.float32) for v, d in zip(given, defaults, strict=True))


def for_frames(statistics: Float[Tensor, "1 c f 1 1"], n: int) -> Float[Tensor, "1 c g 1 1"]:
    """Statistics for ``n`` latent frames: the same for all, or every frame's own and after those the last one's."""
    known = statistics.shape[2]
    if known == 1 or known == n:
        return statistics
    return torch.cat([statistics[:, :, :n], statistics[:, :, -1:].expand(-1, -1, max(n - known, 0), -1, -1)], 2)


def decode_clips(vae: nn.Module, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b 3 t h w"]:
    """Decode latents that are no longer normalised, all clips at once."""
    steps = (latent.new_zeros(len(latent)),) if getattr(vae.config, "timestep_conditioning", False) else ()
    decoded = vae.decode(latent, *steps)
    return decoded if isinstance(decoded, Tensor) else decoded.sample
