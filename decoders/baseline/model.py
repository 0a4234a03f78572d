"""Autoencoders to compare with: two layouts at any size, to be trained, and diffusers' decoders as they are.

``build_decoder`` and ``build_encoder`` make our own Wan backbone (``decoders/backbones/wan.py``) in any width, or
MAGVIT-v2's (``decoders/backbones/magvit2.py``), the baseline of REGEN's paper.
``DiffusersDecoder`` is a diffusers autoencoder's decoder as a plain module: whole clip and, for Wan, one latent frame at
a time. ``own_decoder`` is the one that belongs to a latent space, whatever kind that is (``backbone: space``).

``DiffusersDecoder.from_folder`` takes released weights. ``DiffusersDecoder.random`` has the layout of a release with
random weights, which is all that measuring speed and memory needs. The encoder is dropped, so that parameters and
memory are the decoder's. diffusers is imported when one is built.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decoders.backbones.magvit2 import Magvit2Config, Magvit2Decoder, Magvit2Encoder
from decoders.backbones.wan import WanConfig, WanDecoder, WanEncoder
from decoders.latent_spaces.base import LatentSpace
from decoders.latent_spaces.diffusers import (
    DiffusersVAE,
    decode_clips,
    empty_vae,
    for_frames,
    latent_statistics,
    load_vae,
)
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
    "ltx": {},  # 0.9.0, which diffusers' defaults are
}
LAYOUTS = {
    "wan21": VAELayout("AutoencoderKLWan", "wan", channels=16, stride_t=4, stride_hw=8),
    "wan22": VAELayout("AutoencoderKLWan", "wan", channels=48, stride_t=4, stride_hw=16),
    "ltx": VAELayout("AutoencoderKLLTXVideo", "ltx", channels=128, stride_t=8, stride_hw=32),
}


# A fresh posterior is about this narrow (std 0.05). At 0, a std of 1, its noise drowns a mean that starts small, and the
# decoder first learns to ignore its input: README.md has the numbers.
START_LOG_VARIANCE = -6.0


# Why a decoder other than Wan's has no stream.
NO_STREAM = {
    "ltx": "its convolutions look at future latent frames",
    "ltx2": "its convolutions look at future latent frames, or, where they are causal, diffusers keeps no state between calls",
    "hunyuanvideo": "diffusers decodes it in overlapping pieces of latent frames, with attention over each",
    "hunyuanvideo15": "diffusers decodes it whole, with attention over all latent frames",
    "cosmos": "diffusers decodes it whole, with attention over all latent frames",
    "cogvideox": "diffusers decodes two latent frames at a time and the odd one first, which takes the clip's length",
    "mochi": "diffusers drops frames at the start of a whole clip, and keeps no state between calls",
    "vidtok": "diffusers decodes it whole and keeps no state between calls",
}

# What both backbones read; the other settings are Wan's.
COMMON = {"backbone", "magvit2", "train_encoder", "mean", "std", "checkpointing"}


@dataclass
class BaselineConfig:
    """The layout of an autoencoder; its channels and strides are the latent space's. The defaults are Wan 2.1's."""

    backbone: Literal["wan", "magvit2", "space"] = "wan"  # space: the latent space's own decoder, as it is; not trained
    magvit2: Magvit2Config | None = (
        None  # the layout with backbone: magvit2, which takes dim ... patch from here instead
    )
    dim: int = 96  # the decoder's width at full resolution
    encoder_dim: int | None = None  # the encoder's, where it differs
    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])  # one more than the space halves pixels
    num_res_blocks: int = 2  # per encoder stage; the decoder has one more
    residual: bool = False  # Wan 2.2: parameter-free shortcuts beside the stages
    patch: int = 1  # Wan 2.2: 2, pixels folded into channels at the outer ends
    train_encoder: bool = False  # train an encoder too; needs the space decoders.latent_spaces.learned.Learned
    mean: list[float] | None = None  # of what the encoder gives, once frozen; null: 0 and 1
    std: list[float] | None = None
    checkpointing: bool = False  # recompute blocks in the backward pass
    start: Literal["random", "linear"] = "random"  # linear: a computed codec (linear_start.py); needs train_encoder
    skeleton: bool = False  # without residual branches: the linear path alone is trained and run

    def __post_init__(self) -> None:
        if len(self.dim_mult) < 1 or min(self.dim_mult) < 1:
            raise ValueError(f"decoder.dim_mult={list(self.dim_mult)} needs at least one width, all 1 or more")
        if self.start == "linear" and not self.train_encoder:
            raise ValueError(
                "decoder.start=linear makes encoder and decoder together: it needs decoder.train_encoder=true"
            )
        self._check_backbone()
        if self.backbone == "space":
            return
        self.layout(1, 1, self.patch * 2 ** (len(self.dim_mult) - 1))  # refuses what no space can save

    def _check_backbone(self) -> None:
        """Refuse settings of the other backbone: they would be read by nobody."""
        if self.backbone == "wan":
            if self.magvit2 is not None:
                raise ValueError("decoder.magvit2 is set, but decoder.backbone is wan; set decoder.backbone=magvit2")
            return
        wan = BaselineConfig()
        changed = [entry.name for entry in fields(self) if getattr(self, entry.name) != getattr(wan, entry.name)]
        if self.backbone == "space":
            if odd := [name for name in changed if name != "backbone"]:
                raise ValueError(
                    f"decoder.{odd[0]} is a setting of a decoder that is trained; decoder.backbone=space takes the space's own as it "
                    "is, so leave it out"
                )
            return
        if self.magvit2 is None:
            raise ValueError("decoder.backbone=magvit2 needs decoder.magvit2: its multipliers, strides and widths")
        for name in changed:
            if name not in COMMON:
                raise ValueError(f"decoder.{name} is a setting of the backbone wan; with magvit2 use decoder.magvit2")
        if self.magvit2.checkpointing:
            raise ValueError("decoder.magvit2.checkpointing: set decoder.checkpointing, which covers both halves")

    def magvit2_layout(self, channels: int, stride_t: int, stride_hw: int) -> Magvit2Config:
        """``magvit2``, checked against the space. Raises ValueError: the strides or the channels are other ones."""
        own = self.magvit2
        for name, has, wanted in (
            ("latent_channels", own.latent_channels, channels),
            ("strides (frames)", own.stride_t, stride_t),
            ("strides (pixels)", own.stride_hw, stride_hw),
        ):
            if has != wanted:
                raise ValueError(f"decoder.magvit2.{name} make {has}, but the latent space has {wanted}")
        return own

    def layout(self, channels: int, stride_t: int, stride_hw: int) -> WanConfig:
        """The autoencoder for a space of this shape: the innermost reductions are those that halve the frames too.

        Raises:
            ValueError: the widths and the patch do not make these strides.
        """
        reductions, halvings = len(self.dim_mult) - 1, stride_t.bit_length() - 1
        if self.patch * 2**reductions != stride_hw:
            raise ValueError(
                f"decoder.dim_mult has {reductions} reductions and decoder.patch is {self.patch}: a stride of "
                f"{self.patch * 2**reductions} pixels, but the latent space has {stride_hw}"
            )
        if 2**halvings != stride_t or halvings > reductions:
            raise ValueError(
                f"the latent space has {stride_t} frames per latent frame; {reductions} reductions of decoder.dim_mult "
                f"make powers of two up to {2**reductions}"
            )
        return WanConfig(
            dim=self.dim,
            encoder_dim=self.encoder_dim,
            dim_mult=tuple(self.dim_mult),
            num_res_blocks=self.num_res_blocks,
            channels=channels,
            temporal=(False,) * (reductions - halvings) + (True,) * halvings,
            residual=self.residual,
            patch=self.patch,
            mean=self.mean,
            std=self.std,
        )


def build_decoder(config: BaselineConfig, channels: int, stride_t: int, stride_hw: int) -> WanDecoder | Magvit2Decoder:
    """Latents "b c n y x" to video "b 3 t h w", with fresh weights."""
    shape = (channels, stride_t, stride_hw)
    if config.backbone == "magvit2":
        decoder = Magvit2Decoder(config.magvit2_layout(*shape), config.mean, config.std)
    else:
        decoder = WanDecoder(config.layout(*shape))
    decoder.set_checkpointing(config.checkpointing)
    return decoder


def build_encoder(config: BaselineConfig, channels: int, stride_t: int, stride_hw: int) -> WanEncoder | Magvit2Encoder:
    """Video "b 3 t h w" to a posterior's mean and log-variance, each "b c n y x", with fresh weights.

    The posterior starts narrow, see ``START_LOG_VARIANCE``.
    """
    shape = (channels, stride_t, stride_hw)
    if config.backbone == "magvit2":
        encoder = Magvit2Encoder(config.magvit2_layout(*shape), variational=True)
        last = encoder.stages["out"].layers[-1].conv
    else:
        encoder = WanEncoder(config.layout(*shape))
        last = encoder.stages["out"].layers[-1]
    encoder.set_checkpointing(config.checkpointing)
    with torch.no_grad():  # the log-variances, the second half of what comes out
        last.weight[channels:] *= 0.1
        last.bias[channels:] = START_LOG_VARIANCE
    return encoder


@dataclass
class WanStream:
    """What a Wan decoder keeps between latent frames: up to two past frames for each causal convolution."""

    batch_size: int
    height: int
    width: int
    num_frames: int = 0
    past: list[Any] = field(default_factory=list)


class DiffusersDecoder(nn.Module):
    """Normalised latents to RGB in [-1, 1] with a diffusers autoencoder's decoder.

    Attributes:
        layout: channels and strides.
        can_stream: whether :meth:`start_stream` works: for Wan alone, see ``NO_STREAM``.
    """

    def __init__(self, vae: nn.Module, layout: VAELayout):
        super().__init__()
        self.layout = layout
        self.can_stream = layout.kind == "wan"
        for name in ("mean", "std"):
            self.register_buffer(name, None, persistent=False)
        self.adopt(vae)

    def adopt(self, vae: nn.Module) -> None:
        """Decode with ``vae`` from now on. Its encoder is left out here and stays where it was."""
        self.mean, self.std = latent_statistics(vae, self.layout)
        self.vae = _without(vae, "encoder", "quant_conv", "regularization")

    @classmethod
    def from_folder(cls, path: str, subfolder: str | None = None) -> "DiffusersDecoder":
        """Released weights, from a folder or a hub id; float32. Raises FileNotFoundError: says how to get them."""
        folder = find_folder(path, subfolder, download=True)
        layout = read_layout(folder)
        return cls(load_vae(folder, layout), layout)

    @classmethod
    def random(cls, release: str) -> "DiffusersDecoder":
        """The layout of ``wan21`` (``vae.decoder`` has 73.3 M parameters), ``wan22`` (555.0 M) or ``ltx`` (238.8 M), random,
        float32."""
        if release not in RELEASED:
            raise ValueError(f"no released layout {release!r}; there are {', '.join(RELEASED)}")
        import diffusers

        vae = getattr(diffusers, LAYOUTS[release].class_name)(**RELEASED[release])
        return cls(vae.requires_grad_(False).eval(), LAYOUTS[release])

    @classmethod
    def of_space(cls, space: DiffusersVAE) -> "DiffusersDecoder":
        """The layout of ``space``, whose config.json must be there, with random weights: :meth:`adopt` brings the space's."""
        return cls(empty_vae(space.folder, space.layout), space.layout)

    @torch.no_grad()
    def forward(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b 3 t h w"]:
        """Decode whole clips, in the network's dtype and outside autocast; Wan's output is clamped to [-1, 1]."""
        with torch.autocast(latent.device.type, enabled=False):
            return decode_clips(self.vae, self._denormalise(latent))

    decode = forward

    def start_stream(self, batch_size: int, height: int, width: int) -> WanStream:
        """State of a new stream of clips of that many pixels; Wan's decoder takes its sizes from what it is given."""
        if not self.can_stream:
            raise ValueError(f"{self.layout.class_name} cannot stream: {NO_STREAM[self.layout.kind]}; use decode()")
        convolutions = self.vae._cached_conv_counts["decoder"]
        return WanStream(batch_size, height, width, past=[None] * convolutions)

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

    def end_stream(self, state: WanStream) -> Float[Tensor, "b 3 0 h w"]:
        """Close the stream. Nothing is ever pending: every step returns all of its frames."""
        state.past = []
        return self.mean.new_zeros(state.batch_size, 3, 0, state.height, state.width)

    def _denormalise(self, latent: Tensor) -> Tensor:
        dtype = next(self.vae.parameters()).dtype
        shift, scale = (for_frames(values, latent.shape[2]).float() for values in (self.mean, self.std))
        return (latent.float() * scale + shift).to(dtype)


def _without(vae: nn.Module, *parts: str) -> nn.Module:
    """``vae`` without some of its modules; the others are shared with it, not copied."""
    rest = vae.__new__(type(vae))
    rest.__dict__ = vae.__dict__ | {"_modules": dict(vae._modules)}
    for name in parts:
        if name in rest._modules:
            rest._modules[name] = None
    return rest


class SpaceDecoder(nn.Module):
    """The own decoder of a space that is no diffusers autoencoder, or whose files are not there, by ``space.decode``.

    It has no parameters of its own: they are the space's, and are not counted.
    """

    can_stream = False

    def __init__(self, space: LatentSpace) -> None:
        super().__init__()
        self.space = space

    def decode(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b 3 t h w"]:
        """RGB in about [-1, 1], float32."""
        return self.space.decode(latent)


def own_decoder(space: LatentSpace) -> DiffusersDecoder | SpaceDecoder:
    """The decoder that belongs to ``space``; of a diffusers autoencoder with random weights, until it adopts the released.

    Raises:
        ValueError: the space has none.
    """
    if not hasattr(space, "decode"):
        raise ValueError(
            f"decoder.backbone=space: the {space.name} space has no decoder of its own; take another backbone"
        )
    if isinstance(space, DiffusersVAE) and space.layout is not None:
        return DiffusersDecoder.of_space(space)
    return SpaceDecoder(space)
