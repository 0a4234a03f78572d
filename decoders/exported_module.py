"""An exported decoder as a module: what :func:`decoders.exported.load` returns, and what families build on."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from decoders.backbones.staged import StagedEncoder
from decoders.exported_space import ExportError, SpaceInfo
from decoders.inference import DEFAULT, InferenceOptions, optimise
from decoders.latent_spaces.base import pad_to_valid


class Exported(nn.Module):
    """A decoder for inference: in eval mode, without gradients. What :func:`load` returns.

    A family subclasses it where its network takes more than latents, and overrides what differs; it never adds weights.

    Args:
        network: latents to pixels.
        encoder: pixels to latents, where the decoder's training trained one (or the autoencoder is whole); else None.
        space: the latent space of both.
        sampling: settings of ``decode`` and ``encode`` that the run had.

    Attributes:
        family: the folder of ``decoders/`` that it comes from.
        architecture: plain values from which the family builds ``network`` and ``encoder``.
        about: what was said when it was exported: experiment, step, kind of weights, versions, scores.
        sampling_options, stream_options: names of what ``decode``, and of those what ``start_stream``, take besides.
    """

    sampling_options: tuple[str, ...] = ()
    stream_options: tuple[str, ...] = ()

    def __init__(
        self,
        network: nn.Module,
        encoder: nn.Module | None,
        space: SpaceInfo,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.encoder, self.space = network, encoder, space
        self.sampling = dict(sampling or {})
        self.family = type(self).__module__.split(".")[1]
        self.architecture: dict[str, Any] = {}
        self.about: dict[str, Any] = {}
        self._kept: Tensor | None = None  # of an optimised network: dtype and device of the one it was made from

    # ---- what it is

    @property
    def size_multiple(self) -> int:
        """Pixels that height and width must be a multiple of."""
        return self.space.stride_hw

    @property
    def can_stream(self) -> bool:
        """Whether frames can be decoded as latent frames arrive."""
        return bool(getattr(self.network, "can_stream", hasattr(self.network, "step_stream")))

    @property
    def can_encode(self) -> bool:
        """Whether its encoder is in it. The frozen encoder of a space that others share is not."""
        return self.encoder is not None

    @property
    def can_stream_encode(self) -> bool:
        """Whether :meth:`encode_step` works: encoders that run over a clip from its start to its end."""
        return isinstance(self.encoder, StagedEncoder) and self.space.chunk is None

    @property
    def uses_reference(self) -> bool:
        """Whether reference images change anything."""
        return False

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self._weights()).device

    @property
    def dtype(self) -> torch.dtype:
        """What its weights are stored in."""
        return next(self._weights()).dtype

    def _weights(self) -> Iterator[Tensor]:
        """Floating parameters, else buffers; of an optimised network, which may hold scales and bytes, those it was made from."""
        if self._kept is not None:
            yield self._kept
        for tensor in (*self.network.parameters(), *self.network.buffers()):
            if tensor.is_floating_point():
                yield tensor

    # ---- decoding

    @torch.no_grad()
    def decode(
        self,
        latent: Shaped[Tensor, "b c n y x"],
        *,
        size: tuple[int, int, int] | None = None,
        reference: Any = None,
        generator: torch.Generator | None = None,
        **sampling: Any,
    ) -> Shaped[Tensor, "b 3 t h w"] | Shaped[Tensor, "b t h w 3"]:
        """Normalised latents to RGB in about [-1, 1], in the network's dtype, cropped to ``size`` (t, h, w).

        Equal to what the run's own decoder gives. An optimised form with ``uint8`` gives uint8 "b t h w 3".

        Args:
            reference: RGB in [-1, 1], "b 3 r h w"; of use where ``uses_reference``, ignored elsewhere.
            generator: of the noise of a decoder that samples; default: the run's seed.
            sampling: what a family's decoder takes besides (REGEN: ``times``, ``steps``, ``extension``; RefDecoder: ``skip``).

        Raises:
            ExportError: latents of another shape, kind or device than this decoder reads, or an option that it does not have.
        """
        self.check_sampling(sampling)
        self._check_latent(latent)
        video = self._decode(self._cast(latent), size, reference, generator, **sampling)
        if size is None:
            return video
        t, h, w = size
        return video[:, :t, :h, :w] if video.dtype == torch.uint8 else video[:, :, :t, :h, :w]

    def _decode(
        self,
        latent: Tensor,
        size: tuple[int, int, int] | None,
        reference: Tensor | None,
        generator: torch.Generator | None,
        **sampling: Any,
    ) -> Tensor:
        return self.network.decode(latent)

    def check_sampling(self, sampling: Mapping[str, Any]) -> None:
        """Raise ExportError for what :meth:`decode` does not take besides; names what it does. A family with options adds checks of
        their values; None stands for the default."""
        self._refuse(sampling, self.sampling_options, "decode")

    def _refuse(self, sampling: Mapping[str, Any], known: Sequence[str], what: str) -> None:
        if odd := sorted(set(sampling) - set(known)):
            hint = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ExportError(f"{what}: {odd[0]} is no option of {self.family}; {hint}")

    def streams(self, sampling: Mapping[str, Any]) -> bool:
        """Whether frames can be decoded with these options as latent frames arrive."""
        return self.can_stream and set(sampling) <= set(self.stream_options)

    def _cast(self, latent: Tensor) -> Tensor:
        """For networks that take latents in their own dtype; others compute from float32 what they need."""
        return latent

    def _check_latent(self, latent: Tensor) -> None:
        if latent.ndim != 5 or latent.shape[1] != self.space.channels or not latent.numel():
            raise ExportError(
                f"latent is {tuple(latent.shape)}; this decoder reads the {self.space.name} space, (b, {self.space.channels}, n, y, x)"
            )
        self._check_kind(latent)
        try:
            self.space.pixel_frames(latent.shape[2])
        except ValueError as error:
            raise ExportError(str(error)) from None

    def _check_kind(self, latent: Tensor) -> None:
        if not latent.is_floating_point():
            raise ExportError(f"latent is {latent.dtype}; it must be floating, normalised by the space's mean and std")
        if latent.device != self.device:
            raise ExportError(
                f"latent is on {latent.device}, the decoder on {self.device}; move one of them with .to()"
            )

    # ---- streams

    @torch.no_grad()
    def start_stream(
        self,
        batch_size: int,
        height: int,
        width: int,
        *,
        reference: Any = None,
        generator: torch.Generator | None = None,
        **sampling: Any,
    ) -> Any:
        """State of a new stream of ``batch_size`` clips of ``height`` x ``width`` pixels; the caller owns it, and any number of
        them may be open on one decoder.

        Args:
            sampling: as of :meth:`decode`, those that are ``stream_options``.

        Raises:
            ExportError: this decoder cannot stream, and why; an option that its streams do not have.
        """
        self._refuse(sampling, self.stream_options, "stream")
        self.check_sampling(sampling)
        try:
            if not hasattr(self.network, "step_stream"):
                raise TypeError(f"{self.family} cannot stream: decode whole clips")
            return self._start_stream(batch_size, height, width, reference, generator, **sampling)
        except (TypeError, ValueError) as error:
            raise ExportError(str(error)) from error

    def _start_stream(
        self,
        batch_size: int,
        height: int,
        width: int,
        reference: Tensor | None,
        generator: torch.Generator | None,
        **sampling: Any,
    ) -> Any:
        return self.network.start_stream(batch_size, height, width)

    @torch.no_grad()
    def step_stream(
        self, latent_frame: Shaped[Tensor, "b c y x"], state: Any
    ) -> Shaped[Tensor, "b 3 k h w"] | Shaped[Tensor, "b k h w 3"]:
        """The frames that are ready after this latent frame, perhaps none. Raises ExportError: of another kind, or not this
        stream's shape; ValueError: the stream is over."""
        if latent_frame.ndim != 4 or latent_frame.shape[1] != self.space.channels:
            raise ExportError(
                f"latent frame is {tuple(latent_frame.shape)}; this decoder reads (b, {self.space.channels}, y, x), one frame at a time"
            )
        self._check_kind(latent_frame)
        return self.network.step_stream(self._cast(latent_frame), state)

    @torch.no_grad()
    def end_stream(self, state: Any) -> Shaped[Tensor, "b 3 k h w"] | Shaped[Tensor, "b k h w 3"]:
        """What was still pending, perhaps no frame; the stream is over."""
        return self.network.end_stream(state)

    # ---- encoding

    @torch.no_grad()
    def encode(
        self, video: Float[Tensor, "b 3 t h w"], *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c n y x"]:
        """Normalised latents, float32, of RGB in [-1, 1], by the encoder that is part of this decoder.

        Args:
            sample: draw from the posterior in place of its mean, where it has one.
            generator: source of that draw.

        Raises:
            ExportError: it has no encoder (names the space to encode with), or the clip's length or size does not fit.
        """
        self._require_encoder()
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
            raise ExportError(
                f"video is {video.dtype} {tuple(video.shape)}; expected RGB in [-1, 1] as (b, 3, t, h, w)"
            )
        with torch.autocast(video.device.type, enabled=False):
            return self._normalised(self._encode(self._fitted(video), sample, generator))

    def _encode(self, video: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        """Raw latents of a clip that fits. A family whose export can have an encoder overrides this."""
        raise ExportError(f"{self.family} does not say how its encoder is used")

    @torch.no_grad()
    def encode_step(
        self, video: Float[Tensor, "b 3 k h w"], past: dict[str, Any] | None = None
    ) -> tuple[Float[Tensor, "b c n y x"], dict[str, Any]]:
        """The next frames of a clip of any length: their normalised latents (the posterior's mean), and what to give next time.

        ``past`` None starts a clip, with its first frame alone; then come ``stride_t`` frames each time. Memory does not grow,
        and all latents together are :meth:`encode`'s.

        Raises:
            ExportError: the encoder is not in here or does not run so, or another number of frames.
        """
        self._require_encoder()
        if not self.can_stream_encode:
            raise ExportError(
                f"{self.family} encodes chunk by chunk: give chunks of {self.space.chunk} frames to encode()"
            )
        wanted = 1 if past is None else self.space.stride_t
        if video.shape[2] % wanted or not video.shape[2] or (past is None and video.shape[2] != 1):
            raise ExportError(
                f"{video.shape[2]} frames: a clip starts with 1, and goes on with {self.space.stride_t} at a time"
            )
        with torch.autocast(video.device.type, enabled=False):
            moments, past = self.encoder.run(video, past or {}, past is None)
            return self._normalised(moments[:, : self.space.channels]), past

    def _normalised(self, raw: Tensor) -> Tensor:
        return raw.float() if self.space.mean is None else self.space.normalise(raw)

    def _require_encoder(self) -> None:
        if self.encoder is None:
            own = "decoders.load('wan_mini')" if self.space.name == "wan_mini" else "the autoencoder of that space"
            raise ExportError(
                f"this decoder has no encoder: it reads latents of the frozen space {self.space.name} ({self.space.fingerprint}); "
                f"encode with {own}"
            )

    def _fitted(self, video: Tensor) -> Tensor:
        """As the run did: padded, or refused."""
        if self.sampling.get("pad") == "replicate":
            return pad_to_valid(video, self.space.rule, self.size_multiple)
        try:
            self.space.check(*video.shape[2:])
        except ValueError as error:
            raise ExportError(str(error)) from None
        return video

    # ---- latents

    def normalise(self, raw: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b c n y x"]:
        """What an autoencoder gives, as this decoder reads it: (raw - mean) / std. Raises ExportError: none are stated."""
        return self.space.normalise(raw)

    def denormalise(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b c n y x"]:
        """The inverse of :meth:`normalise`."""
        return self.space.denormalise(latent)

    def check_latent(self, latent: Float[Tensor, "b c n y x"], fingerprint: str | None = None) -> None:
        """Raise ExportError for latents of another space (``fingerprint``: what they say of theirs) or another shape, and for
        values that do not look normalised: :meth:`SpaceInfo.check_latent`."""
        if fingerprint:
            self.space.check_fingerprint(fingerprint)
        self._check_latent(latent.to(self.device) if latent.device != self.device else latent)
        self.space.check_latent(latent)

    # ---- speed

    @property
    def is_optimised(self) -> bool:
        """Whether :meth:`optimised` made it: then it stays on its device and is not saved."""
        return self._kept is not None

    def optimised(self, options: InferenceOptions = DEFAULT, calibration: Sequence[Tensor] | Any = ()) -> "Exported":
        """This decoder with its network's optimised form (``decoders/inference.py``); shares weights with it or has copies.
        Raises ValueError: the network has none, or no use for an option."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other._kept = torch.empty(0, dtype=self.dtype, device=self.device)
        other.network = optimise(self.network, options, calibration)
        return other
