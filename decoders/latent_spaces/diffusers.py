"""Frozen video autoencoders in diffusers' format: Wan 2.1, Wan 2.2 and LTX-Video, from a folder or a hub id.

What decides shapes is read from the folder's ``config.json``, so nothing here is particular to one release:

| `_class_name`         | released as | channels, stride_t, stride_hw       | statistics                               |
|-----------------------|-------------|-------------------------------------|------------------------------------------|
| AutoencoderKLWan      | Wan 2.1     | 16, 4, 8                            | `latents_mean`, `latents_std`            |
| AutoencoderKLWan      | Wan 2.2     | 48, 4, 16 (pixels patchified by 2)  | the same                                 |
| AutoencoderKLLTXVideo | LTX-Video   | 128, 8, 32 (pixels patchified by 4) | buffers in the weights, `scaling_factor` |

Clips are encoded one at a time and a few frames at a time, exactly: both encoders are causal and keep a few frames per
convolution. Activations therefore do not grow with the length of a clip (Wan: four frames; LTX: ``chunk_latents``).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decoders.latent_spaces.base import LatentSpace, hash_parts
from decoders.latent_spaces.causal_chunks import encode_in_chunks
from decoders.latent_spaces.diffusers_files import VAELayout, find_folder, find_weights, read_layout


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
    causal = True

    def __init__(self, config: DiffusersVAEConfig):
        self.config = config
        self.name = config.path
        declared = {key: getattr(config, key) for key in ("channels", "stride_t", "stride_hw")}
        try:
            self.layout = read_layout(find_folder(config.path, config.subfolder, download=None in declared.values()))
        except FileNotFoundError:
            if None in declared.values():
                raise
            self.layout = None
        self._refuse_undeclared(declared)
        for key, value in declared.items():
            setattr(self, key, getattr(self.layout, key) if self.layout else value)
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
    def fingerprint(self) -> str:
        """Hash of the encoder's weights, the strides and the statistics, as stored (not of the compute dtype)."""
        self._load()
        return self._fingerprint

    def require(self) -> None:
        """Find the weights, in the hub's cache or on the hub if they are not in a folder. Nothing is allocated."""
        find_weights(find_folder(self.config.path, self.config.subfolder, download=True), self.config.path)

    def _encode(
        self, video: Float[Tensor, "b 3 t h w"], sample: bool, generator: torch.Generator | None
    ) -> Float[Tensor, "b c n y x"]:
        self._load()
        self._place(video.device, "encoder", "quant_conv")
        return torch.cat([self._encode_clip(clip, sample, generator) for clip in video.split(1)])

    def _encode_clip(self, clip: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        clip = clip.to(self._dtype)
        if self.layout.kind == "ltx":
            from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

            chunk = self.config.chunk_latents * self.stride_t
            posterior = DiagonalGaussianDistribution(encode_in_chunks(self._vae.encoder, clip, chunk))
        else:
            posterior = self._vae.encode(clip).latent_dist
        latent = posterior.mean.float()
        if sample:
            # Drawn where the generator lives, so that one seed gives one latent on every device.
            device = generator.device if generator else latent.device
            noise = torch.randn(latent.shape, generator=generator, device=device).to(latent.device)
            latent = latent + posterior.std.float() * noise
        return (latent - self._mean) / self._std

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b 3 t h w"]:
        """The autoencoder's own decoder, the teacher: normalised latents to RGB, float32, clip by clip.

        Wan's decoder clamps to [-1, 1], LTX's does not. LTX decoders that ask for a time step (0.9.1 and later) get
        zero: the latents are taken as free of noise.
        """
        if latent.ndim != 5 or latent.shape[1] != self.channels:
            raise ValueError(f"latent is {tuple(latent.shape)}; this space has (b, {self.channels}, n, y, x)")
        self._load()
        self._place(latent.device, "decoder", "post_quant_conv")
        with torch.autocast(latent.device.type, enabled=False):
            clips = [clip.float() * self._std + self._mean for clip in latent.split(1)]
            return torch.cat([decode_clips(self._vae, clip.to(self._dtype)).float() for clip in clips])

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.config.dtype)

    def _load(self) -> None:
        if self._vae is not None:
            return
        folder = find_folder(self.config.path, self.config.subfolder, download=True)
        if self.layout is None:  # only declared so far
            self.layout = read_layout(folder)
            self._refuse_undeclared({key: getattr(self, key) for key in ("channels", "stride_t", "stride_hw")})
        vae = load_vae(folder, self.layout)
        self._mean, self._std = latent_statistics(vae, self.layout)
        # Of the weights as stored: casting to the compute dtype must not make another space of it.
        weights = {f"encoder.{name}": tensor for name, tensor in vae.encoder.state_dict().items()}
        weights |= {f"quant_conv.{n}": t for n, t in getattr(vae, "quant_conv", nn.Identity()).state_dict().items()}
        statistics = {"mean": self._mean, "std": self._std}
        shape = {"channels": self.channels, "stride_t": self.stride_t, "stride_hw": self.stride_hw}
        self._fingerprint = hash_parts(type(vae).__name__, shape, tensors=weights | statistics)
        self._vae = vae

    def _place(self, device: torch.device, *parts: str) -> None:
        """Only the half that is used is moved and cast: a run that only encodes never holds the decoder on its GPU."""
        for part in parts:
            if hasattr(self._vae, part):
                getattr(self._vae, part).to(device, self._dtype)
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


def latent_statistics(vae: nn.Module, layout: VAELayout) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, (1, c, 1, 1, 1) each: ``normalised = (latent - mean) / std``.

    Raises:
        ValueError: they are not one finite number per latent channel, or a deviation is not positive.
    """
    if layout.kind == "ltx":
        mean, std = vae.latents_mean.float(), vae.latents_std.float() / vae.config.scaling_factor
    else:
        mean, std = (torch.tensor(vae.config[key], dtype=torch.float32) for key in ("latents_mean", "latents_std"))
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        if values.shape != (layout.channels,):
            raise ValueError(
                f"{name} has {values.numel()} numbers for {layout.channels} latent channels; "
                f"config.json must give one per channel (left out, diffusers takes those of Wan 2.1)"
            )
    if mean.is_meta:  # only counting parameters
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise ValueError("latents_mean and latents_std must be finite, and latents_std above zero")
    return mean.view(1, -1, 1, 1, 1).clone(), std.view(1, -1, 1, 1, 1).clone()


def decode_clips(vae: nn.Module, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b 3 t h w"]:
    """Decode latents that are no longer normalised, all clips at once."""
    if getattr(vae.config, "timestep_conditioning", False):
        return vae.decode(latent, torch.zeros(len(latent), device=latent.device, dtype=latent.dtype)).sample
    return vae.decode(latent).sample
