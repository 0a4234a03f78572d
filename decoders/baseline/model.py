"""A diffusers autoencoder's decoder as a plain module: whole clip and, for Wan, one latent frame at a time.

``DiffusersDecoder.from_folder`` takes released weights. ``DiffusersDecoder.random`` has the layout of a release with
random weights, which is all that measuring speed and memory needs. The encoder is dropped, so that parameters and
memory are the decoder's. diffusers is imported when one is built.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decoders.latent_spaces.diffusers import decode_clips, latent_statistics, load_vae
from decoders.latent_spaces.diffusers_files import VAELayout, find_folder, read_layout

# What the config.json of each release says beyond diffusers' defaults, which are those of Wan 2.1. The statistics of
# Wan 2.2's latents are left at 0 and 1: with random weights they mean nothing.
RELEASED: dict[str, dict[str, Any]] = {
    "wan21": {},
    "wan22": {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
}
LAYOUTS = {
    "wan21": VAELayout("AutoencoderKLWan", "wan", channels=16, stride_t=4, stride_hw=8),
    "wan22": VAELayout("AutoencoderKLWan", "wan", channels=48, stride_t=4, stride_hw=16),
}


@dataclass
class WanStream:
    """What a Wan decoder keeps between latent frames: up to two past frames for each causal convolution."""

    num_frames: int = 0
    past: list[Any] = field(default_factory=list)


class DiffusersDecoder(nn.Module):
    """Normalised latents to RGB in [-1, 1] with a diffusers autoencoder's decoder.

    Attributes:
        layout: channels and strides.
        can_stream: whether :meth:`start_stream` works. LTX's released decoder looks at future latents, so it cannot.
    """

    def __init__(self, vae: nn.Module, layout: VAELayout):
        super().__init__()
        self.layout = layout
        self.can_stream = layout.kind == "wan"
        mean, std = latent_statistics(vae, layout)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.vae = vae
        for encoding in ("encoder", "quant_conv"):
            if hasattr(vae, encoding):
                setattr(vae, encoding, None)

    @classmethod
    def from_folder(cls, path: str, subfolder: str | None = None) -> "DiffusersDecoder":
        """Released weights, from a folder or a hub id; float32. Raises FileNotFoundError: says how to get them."""
        folder = find_folder(path, subfolder, download=True)
        layout = read_layout(folder)
        return cls(load_vae(folder, layout), layout)

    @classmethod
    def random(cls, release: str) -> "DiffusersDecoder":
        """The layout of ``wan21`` (``vae.decoder`` has 73.3 M parameters) or ``wan22`` (555.0 M), random, float32."""
        if release not in RELEASED:
            raise ValueError(f"no released layout {release!r}; there are {' and '.join(RELEASED)}")
        from diffusers import AutoencoderKLWan

        vae = AutoencoderKLWan(**RELEASED[release])
        return cls(vae.requires_grad_(False).eval(), LAYOUTS[release])

    @torch.no_grad()
    def forward(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b 3 t h w"]:
        """Decode whole clips, in the module's dtype; Wan's output is clamped to [-1, 1]."""
        return decode_clips(self.vae, self._denormalise(latent))

    decode = forward

    def start_stream(self, batch_size: int, height: int, width: int) -> WanStream:
        """State of a new stream of clips of that many pixels; Wan's decoder takes its sizes from what it is given."""
        if not self.can_stream:
            raise ValueError(
                "this autoencoder's decoder cannot stream: its convolutions look at future latent frames; use decode()"
            )
        convolutions = self.vae._cached_conv_counts["decoder"]
        return WanStream(past=[None] * convolutions)

    @torch.no_grad()
    def step_stream(self, latent_frame: Float[Tensor, "b c y x"], state: WanStream) -> Float[Tensor, "b 3 k h w"]:
        """Decode the next latent frame: the first gives one pixel frame, each later one ``stride_t``.

        The same computation as diffusers' own loop over latent frames, with the past owned by the caller.
        """
        latent = self.vae.post_quant_conv(self._denormalise(latent_frame[:, :, None]))
        first = state.num_frames == 0
        video = self.vae.decoder(latent, feat_cache=state.past, feat_idx=[0], first_chunk=first)
        state.num_frames += 1
        if self.vae.config.patch_size:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            video = unpatchify(video, patch_size=self.vae.config.patch_size)
        return video.clamp(-1, 1)

    def _denormalise(self, latent: Tensor) -> Tensor:
        dtype = next(self.vae.parameters()).dtype
        return (latent.float() * self.std.float() + self.mean.float()).to(dtype)
