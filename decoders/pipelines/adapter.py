"""A decoder in the place of a diffusers pipeline's autoencoder: what Wan's and LTX's pipelines have in common.

    pipeline                                   adapter                                         decoder
    latents * std + mean  -> vae.decode(z) ->  (z - mean) / std, the decoder's dtype       ->  decode, or a stream
    image                 -> vae.encode(x) ->  the pipeline's own encoder, as it is; the image is kept as a reference

Raw latents go in and out, as of any autoencoder of diffusers: pipelines need no change, and scripts that denormalise by themselves
stay right. What pipelines exchange with it is float32 whatever the decoder computes in (``dtype``), so that their statistics are
not applied in bfloat16; undoing them leaves float32's rounding, about 1e-6 of a latent. (LTX's pipelines round raw latents to the
prompt embedding's dtype before they call their autoencoder, whichever it is.)
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from jaxtyping import Float
from torch import Tensor, nn

from decoders.backbones.staged import StagedDecoder
from decoders.exported import Exported, ExportError
from decoders.pipelines.own_vae import OwnVAE
from decoders.pipelines.tiles import decode_in_tiles

NO_VARIANCE = -30.0  # the least log-variance that diffusers' posterior has


class PipelineDecoder(ModelMixin):
    """Stands where a pipeline expects its autoencoder. Made by ``for_pipeline`` or ``swap``.

    It is a ``ModelMixin`` because ``from_pretrained(folder, vae=...)`` refuses anything else. ``to``, ``enable_model_cpu_offload``
    and ``eval`` act on the decoder and on the own autoencoder's encoder; its decoder stays where it is. It is not offloaded layer
    by layer, as decoders read weights outside of layers' ``forward``: after a ``swap``, ``enable_sequential_cpu_offload`` leaves
    it on the device whole; ``enable_group_offload`` is refused by diffusers.

    Args:
        decoder: what ``decoders.load`` returns; or any module with ``decode(latent)`` of normalised latents.
        config: what the pipeline reads as ``vae.config``.
        mean, std: "c", of raw latents: ``normalised = (raw - mean) / std``.
        strides: frames and pixels per latent frame and latent pixel.
        own: the pipeline's autoencoder, which encodes; None: only what needs no encoding can be called.
        seed: of the noise of decoders that sample, the same for every call; None: the decoder's own default.
        sampling: further arguments of ``decoder.decode``, such as ``{"steps": 4}``.

    Attributes:
        decoder: as given.
        reference: RGB "b 3 r h w" in [-1, 1] for decoders that look at references, kept until it is changed. None: what the
            pipeline encoded last (`wan.py`), for one call.
        use_tiling, use_slicing: as ``enable_tiling`` and ``enable_slicing`` leave them.
    """

    _supports_group_offloading = False
    tile = (256, 256)  # pixels; diffusers' defaults for Wan
    step = (192, 192)

    def __init__(
        self,
        decoder: nn.Module,
        config: Mapping[str, Any],
        mean: Float[Tensor, " c"],
        std: Float[Tensor, " c"],
        strides: tuple[int, int],
        own: OwnVAE | None = None,
        *,
        seed: int | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.stride_t, self.stride_hw = strides
        self.seed, self.sampling = seed, dict(sampling or {})
        self.reference: Tensor | None = None
        self.use_tiling = self.use_slicing = False
        # No buffers: `pipe.to(torch.bfloat16)` would round them.
        self.mean, self.std = mean.float().cpu(), std.float().cpu()
        self._config = FrozenDict(config)
        self._seen: Tensor | None = None  # pictures that the pipeline had encoded since the last decoding
        self.own = own
        if own is not None and own.is_loaded:
            self._take_encoder()
        self.eval()

    # ---- what pipelines read

    @property
    def config(self) -> FrozenDict:
        return self._config

    @property
    def dtype(self) -> torch.dtype:
        """What latents and video are exchanged in. The decoder computes in ``compute_dtype``."""
        return torch.float32

    @property
    def compute_dtype(self) -> torch.dtype:
        if isinstance(self.decoder, Exported):  # whose optimised form may have neither parameters nor buffers
            return self.decoder.dtype
        return next((p.dtype for p in _tensors(self.decoder) if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        if isinstance(self.decoder, Exported):
            return self.decoder.device
        return next((p.device for p in chain(_tensors(self.decoder), _tensors(self))), torch.device("cpu"))

    @property
    def uses_reference(self) -> bool:
        """Whether the decoder looks at reference pictures."""
        network = getattr(self.decoder, "model", self.decoder)  # a trained LightningModule keeps it there
        return bool(getattr(self.decoder, "uses_reference", getattr(network, "uses_reference", False)))

    @property
    def can_stream(self) -> bool:
        network = getattr(self.decoder, "model", self.decoder)
        can = getattr(self.decoder, "can_stream", getattr(network, "can_stream", hasattr(network, "step_stream")))
        return bool(can() if callable(can) else can)

    # ---- what pipelines call

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "b 3 t h w"], return_dict: bool = True) -> Any:
        """The posterior of raw latents of RGB in [-1, 1], by the pipeline's autoencoder as it would itself; where none was given,
        by the decoder's own encoder, if it has one.

        Raises:
            ExportError: there is neither.
        """
        self._onload()
        self._see(x)
        if self.own is None:
            return self._encoded(x, return_dict)
        if not self.own.is_loaded:
            self._take_encoder()
        parameter = next(self.encoder.parameters())
        return self.own.vae.encode(x.to(parameter.device, parameter.dtype), return_dict=return_dict)

    @torch.no_grad()
    def decode(
        self, z: Float[Tensor, "b c n y x"], temb: Tensor | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """RGB "b 3 t h w", about [-1, 1], float32, of raw latents.

        Raises:
            ExportError: latents of another space; a time step (``temb``) other than 0: decoders here take latents without noise.
        """
        self._onload()
        if temb is not None and bool((temb != 0).any()):
            raise ExportError(
                "this decoder takes latents free of noise, not a time step: leave out decode_timestep and decode_noise_scale"
            )
        latent = self.normalise(z)
        reference, self._seen = self._reference(len(latent)), None
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        clips = zip(*(part.split(1) for part in (latent, reference) if part is not None), strict=True)
        parts = clips if self.use_slicing else [tuple(part for part in (latent, reference) if part is not None)]
        video = torch.cat([self._decoded(*part, generator=generator) for part in parts])
        return DecoderOutput(sample=video) if return_dict else (video,)

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | float | None = None,
        tile_sample_stride_width: int | float | None = None,
    ) -> None:
        """Decode with bounded memory, by what the decoder can do.

        A decoder that streams is given one latent frame after another: memory does not grow with the length, the video is the
        same, and sizes of tiles mean nothing. A convolutional one that cannot (LTX) decodes tiles of the given sizes in pixels
        and blends them. Encoding is not changed: ``own.vae.enable_tiling()`` does that.

        Raises:
            ExportError: the decoder can do neither: its attention sees the whole picture.
        """
        if not self.can_stream and not self._is_convolutional:
            raise ExportError(
                "this decoder's attention sees the whole clip, so tiles would decode something else: leave enable_tiling out, or "
                "take a decoder that streams"
            )
        self.use_tiling = True
        self.tile = (tile_sample_min_height or self.tile[0], tile_sample_min_width or self.tile[1])
        self.step = (int(tile_sample_stride_height or self.step[0]), int(tile_sample_stride_width or self.step[1]))

    def disable_tiling(self) -> None:
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Decode the clips of a batch one after another."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Refused: a folder of a pipeline holds autoencoders of diffusers, and could not be loaded with this one.

        Raises:
            ExportError: always.
        """
        raise ExportError(
            "a pipeline is not saved with a decoder of this project in it: take it out first (Swapped.undo(), or "
            "pipe.register_modules(vae=...)). The decoder has a folder of its own: decoders.load reads it"
        )

    # ---- statistics

    def normalise(self, raw: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b c n y x"]:
        """Undo the pipeline's denormalisation. Float32, on the decoder's device."""
        if raw.ndim != 5 or raw.shape[1] != len(self.mean):
            raise ExportError(
                f"latents of shape {tuple(raw.shape)}: this decoder takes (b, {len(self.mean)}, n, y, x), as its space has them"
            )
        mean, std = self._statistics()
        return (raw.to(self.device, torch.float32) - mean) / std

    def denormalise(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b c n y x"]:
        mean, std = self._statistics()
        return latent.to(self.device, torch.float32) * std + mean

    def _statistics(self) -> tuple[Tensor, Tensor]:
        return tuple(part.to(self.device).view(1, -1, 1, 1, 1) for part in (self.mean, self.std))

    # ---- decoding

    @property
    def _is_convolutional(self) -> bool:
        """Whether what a pixel depends on is near it, so that tiles are close to the whole picture."""
        from decoders.backbones.fast import FastStaged

        network = getattr(self.decoder, "network", getattr(self.decoder, "model", self.decoder))
        return (
            isinstance(network, StagedDecoder | FastStaged)
            or getattr(getattr(network, "layout", 0), "kind", "") == "ltx"
        )

    def _decoded(self, latent: Tensor, reference: Tensor | None = None, *, generator: Any = None) -> Tensor:
        given = {} if reference is None else {"reference": reference}
        given |= {} if generator is None else {"generator": generator}
        latent = self._cast(latent)
        if not self.use_tiling:
            return _pixels(self.decoder.decode(latent, **given, **self.sampling))
        if self.can_stream:
            return self._streamed(latent, given)
        return decode_in_tiles(
            lambda tile: _pixels(self.decoder.decode(tile, **given, **self.sampling)),
            latent,
            self.stride_hw,
            self.tile,
            self.step,
        )

    def _streamed(self, latent: Tensor, given: dict[str, Any]) -> Tensor:
        if self.sampling:
            raise ExportError(f"a stream takes no {', '.join(self.sampling)}: disable_tiling(), or leave sampling out")
        height, width = (side * self.stride_hw for side in latent.shape[3:])
        state = self.decoder.start_stream(len(latent), height, width, **given)
        frames = [_pixels(self.decoder.step_stream(frame, state)) for frame in latent.unbind(2)]
        return torch.cat([*frames, _pixels(self.decoder.end_stream(state))], dim=2)

    def _cast(self, given: Tensor) -> Tensor:
        """An exported decoder knows what it reads in which dtype; a bare network is given its own."""
        return given if isinstance(self.decoder, Exported) else given.to(self.compute_dtype)

    def _encoded(self, x: Tensor, return_dict: bool) -> Any:
        """By the decoder's own encoder: a posterior without variance."""
        if not getattr(self.decoder, "can_encode", False):
            raise ExportError(
                "nothing here can encode: give the pipeline's autoencoder too, for_pipeline(decoder, vae=pipe.vae or its folder)"
            )
        latent = self.denormalise(self.decoder.encode(x.to(self.device, self.compute_dtype)))
        moments = torch.cat([latent, torch.full_like(latent, NO_VARIANCE)], dim=1)
        posterior = DiagonalGaussianDistribution(moments, deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _see(self, x: Tensor) -> None:
        """What the pipeline encodes may serve as reference; which part of it, the kind of pipeline knows."""

    def _reference(self, clips: int) -> Tensor | None:
        """For so many clips, "b 3 r h w" in the decoder's dtype; None: there is none, or the decoder looks at none."""
        if not self.uses_reference:
            return None
        reference = self._seen if self.reference is None else self.reference
        if reference is None:
            return None
        if clips % len(reference):
            raise ExportError(f"{len(reference)} references for {clips} clips: give one for all, or one for each")
        reference = self._cast(reference.to(self.device))
        return reference.repeat_interleave(clips // len(reference), dim=0)

    # ---- where it is

    def _take_encoder(self) -> None:
        """Let the own autoencoder's encoding half follow ``to`` and the offloading of this module."""
        vae, here = self.own.vae, self.device
        self.encoder = vae.encoder
        if getattr(vae, "quant_conv", None) is not None:
            self.quant_conv = vae.quant_conv
            self.quant_conv.to(here)
        self.encoder.to(here)

    def _onload(self) -> None:
        """Bring the weights where ``enable_model_cpu_offload`` wants them; its hook is meant for ``forward``."""
        hook = getattr(self, "_hf_hook", None)
        if hasattr(hook, "pre_forward"):
            hook.pre_forward(self)


def _pixels(video: Tensor) -> Tensor:
    """Float32 "b 3 t h w" in about [-1, 1], also of the uint8 "b t h w 3" that an optimised form may give."""
    return video.float() if video.dtype != torch.uint8 else video.movedim(-1, 1).float() / 127.5 - 1


def _tensors(module: nn.Module) -> Any:
    return chain(module.parameters(), module.buffers())
