"""RefDecoder's optimised form: ``RefDecoderModel.optimised``, or ``decoders.inference.optimise(model)``.

The function is the model's. What differs: references are encoded, carried and attended to once (``prepare``), for every latent
frame and for any number of streams and clips; q, k and v are one product; keys are turned once; a window of keys is one
buffer that is written in place. What the mathematics allows to keep is told in ``fast_attention.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from decoders.backbones.fast import FastStaged
from decoders.backbones.staged import StagedDecoder
from decoders.inference import InferenceOptions
from decoders.layers.deployed import check_latent, compiled, inference, shared_copy, to_uint8
from decoders.refdecoder.fast_attention import FastAttention, FastWindowedAttention
from decoders.refdecoder.injection import JointAttention
from decoders.refdecoder.model import RefDecoderModel
from decoders.refdecoder.windowed import RefStream, WindowedAttention


@dataclass(frozen=True)
class PreparedReference:
    """All that references give and no video changes; only read, so that any number of streams may share it.

    Attributes:
        clips: how many clips' references these are; one serves a batch of any size.
        grid: height and width in pixels, whole latent cells, that they were prepared for.
        pixels: the references at that size, "b 3 r h w".
        features: of the encoder, "b c r y x"; with attention over the whole clip this is all that can be kept.
        memory: what the injection made of them, where it does not look at the video.
    """

    clips: int
    grid: tuple[int, int]
    pixels: Tensor
    features: Tensor
    memory: Any = None


class FastRefDecoder(RefDecoderModel):
    """A ``RefDecoderModel`` for inference alone. Its weights are the model's own numbers in memory, but for q, k and v.

    ``decode`` and the stream methods are the model's; wherever they take references in pixels, they also take what
    :meth:`prepare` gave. A stream's memory is written in place and holds ``window`` latent frames, one more than the model's.
    """

    def __init__(self, model: RefDecoderModel, options: InferenceOptions) -> None:
        check_options(options, model)
        with torch.device("meta"):
            super().__init__(model.config, model.channels, model.stride_t, model.stride_hw)
        self.options, self.backbone = options, _backbone(model, options)
        for name, part in list(model.named_children()):
            if name != "backbone":
                setattr(self, name, shared_copy(part))
        if isinstance(self.injection, WindowedAttention):
            frames = tuple(point.frames for point in self.layout.points)
            self.injection = FastWindowedAttention(self.injection, frames, options.compile)
        elif isinstance(self.injection, JointAttention):
            self.injection = FastAttention(self.injection, options.compile)
        self.requires_grad_(False).eval()

    # ---- references

    @inference
    def prepare(self, reference: Float[Tensor, "b 3 r h2 w2"], height: int, width: int) -> PreparedReference:
        """References of clips of ``height`` x ``width`` pixels, worked out as far as they do not depend on the video.

        Raises:
            ValueError: as :meth:`RefDecoderModel.forward` does of references.
        """
        grid = tuple(-(-side // self.stride_hw) * self.stride_hw for side in (height, width))
        pixels = self._enter_reference(reference, len(reference), grid, (height, width), False)
        features = self.encoder(pixels)
        memory = None
        if self.injection.streams:

            def carry(number: int, carried: Tensor) -> Tensor:
                return self._carry(number, carried, pixels)

            windowed = isinstance(self.injection, FastWindowedAttention)
            memory = self.injection.see(features, carry) if windowed else self.injection.begin(features, carry)
        return PreparedReference(len(reference), grid, pixels, features, memory)

    def _enter_reference(
        self,
        reference: Tensor | PreparedReference | None,
        clips: int,
        grid: tuple[int, int],
        size: tuple[int, int] | None,
        skip: bool,
    ) -> Tensor | PreparedReference | None:
        if not isinstance(reference, PreparedReference):
            return super()._enter_reference(reference, clips, grid, size, skip)
        if reference.grid != tuple(grid):
            raise ValueError(
                f"the reference was prepared for {reference.grid[0]}x{reference.grid[1]} pixels, the clip has "
                f"{grid[0]}x{grid[1]}: prepare it for this size"
            )
        if reference.clips not in (1, clips):
            raise ValueError(
                f"a reference prepared for {reference.clips} clips, and {clips} clips: prepare as many, or one"
            )
        return None if skip else reference

    def _begin(self, reference: Tensor | PreparedReference | None) -> Any:
        if not isinstance(reference, PreparedReference):
            return super()._begin(reference)
        windowed = isinstance(self.injection, FastWindowedAttention)
        return self.injection.fresh(reference.memory) if windowed else reference.memory

    def _encoded(self, reference: Tensor | PreparedReference | None, clips: int) -> tuple[Tensor | None, Tensor | None]:
        if not isinstance(reference, PreparedReference):
            return super()._encoded(reference, clips)
        pixels, features = (part.expand(clips, -1, -1, -1, -1) for part in (reference.pixels, reference.features))
        return pixels, features

    # ---- frames

    @inference
    def forward(
        self, latent: Float[Tensor, "b c n y x"], reference: Float[Tensor, "b 3 r h2 w2"] | None = None, **options: Any
    ) -> Float[Tensor, "b 3 t h w"]:
        """As the model's, without gradients and without a mask of dropped latents, which is for training.

        Raises:
            ValueError: a mask was given.
        """
        if options.pop("keep", None) is not None:
            raise ValueError("latents are dropped in training alone: the optimised form takes no mask (keep)")
        return super().forward(latent, reference, **options)

    @inference
    def decode(
        self,
        latent: Float[Tensor, "b c n y x"],
        reference: Tensor | PreparedReference | None = None,
        *,
        skip: bool = False,
        size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "b 3 t h w"] | UInt8[Tensor, "b t h w 3"]:
        """As :meth:`RefDecoderModel.decode`; uint8 frames where the options say so."""
        check_latent(latent, self.channels)
        if self.can_stream(skip):
            rows, columns = (side * self.stride_hw for side in latent.shape[3:])
            state = self._start(len(latent), (rows, columns), reference, size, skip)
            frames = [self.step_stream(frame, state) for frame in latent.unbind(2)]
            return torch.cat(frames, dim=1 if self.options.uint8 else 2)
        x, reference = self._enter(latent, reference, size, skip)
        if skip or self.injection is None:
            video = self._advance(x, None, True, None)[0]
        elif self.injection.streams:
            video = self._advance(x, None, True, self._begin(reference))[0]
        else:
            video = self._joint(x, reference, in_pieces=self.layout.causal)
        return self._out(video.clamp(-1, 1))

    @inference
    def start_stream(
        self,
        batch_size: int,
        height: int,
        width: int,
        *,
        reference: Tensor | PreparedReference | None = None,
        skip: bool = False,
    ) -> RefStream:
        """As :meth:`RefDecoderModel.start_stream`."""
        state = super().start_stream(batch_size, height, width, skip=skip)
        if reference is None:
            return state
        return self._start(batch_size, (height, width), reference, (height, width), skip)

    @inference
    def step_stream(
        self, latent_frame: Float[Tensor, "b c y x"], state: RefStream
    ) -> Float[Tensor, "b 3 k h w"] | UInt8[Tensor, "b k h w 3"]:
        """As :meth:`RefDecoderModel.step_stream`; uint8 frames where the options say so."""
        return self._out(super().step_stream(latent_frame, state))

    def end_stream(self, state: RefStream) -> Float[Tensor, "b 3 0 h w"] | UInt8[Tensor, "b 0 h w 3"]:
        """Close the stream. Nothing is ever pending."""
        return self._out(super().end_stream(state))

    def _out(self, video: Tensor) -> Tensor:
        return to_uint8(video.permute(0, 2, 3, 4, 1)).contiguous() if self.options.uint8 else video


def build_fast(model: RefDecoderModel, options: InferenceOptions, calibration: Sequence[Tensor] = ()) -> FastRefDecoder:
    """The optimised form of ``model``; nothing here is calibrated.

    Raises:
        ValueError: an option that RefDecoder has no use for.
    """
    return FastRefDecoder(model, options)


def check_options(options: InferenceOptions, model: RefDecoderModel) -> None:
    """Raise ValueError for what cannot be done here."""
    if options.bits8 != "none":
        raise ValueError(f"bits8={options.bits8}: RefDecoder has no 8-bit products; set none")
    if options.attention != "auto":
        raise ValueError(
            f"attention={options.attention}: RefDecoder's attention has no kernels to choose from; set auto"
        )


def _backbone(model: RefDecoderModel, options: InferenceOptions) -> StagedDecoder:
    """The backbone with its layers made fast, to be run piece by piece: a whole step's graph has no place for attention.

    Compiled on CUDA alone: on a CPU its own kernels are faster than what the compiler makes, and it would take minutes.
    """
    compiles = options.compile and next(model.parameters()).is_cuda
    fast = FastStaged(model.backbone, replace(options, uint8=False, graphs=False, compile=compiles)).network
    if compiles:
        fast.run = compiled(fast.run)
    return fast
