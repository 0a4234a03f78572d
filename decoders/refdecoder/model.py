"""RefDecoder: a pretrained video decoder that retrieves detail from reference images (arXiv 2605.15196).

    latent -> 1x1x1, conv_in, mid -> [attention] up0 -> [attention] up1 -> [attention] up2 -> up3, out -> RGB
    reference -> encoder ----------------^    \\-> up0 ----^    \\-> up1 ----^      (each frame by itself)

Plain ``nn.Module``. What the paper and the released code leave open, and what we chose, is in README.md beside this file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decoders.backbones.staged import StagedDecoder, check_frame
from decoders.inference import InferenceOptions
from decoders.layers.causal_conv import Chain, Past
from decoders.refdecoder.config import RefDecoderConfig
from decoders.refdecoder.injection import ControlBranch, JointAttention, Memory
from decoders.refdecoder.layouts import Layout, build_backbone
from decoders.refdecoder.local_start import begin_local
from decoders.refdecoder.reference import ReferenceEncoder, clip_size, fit, fold_frames, unfold_frames
from decoders.refdecoder.windowed import RefStream, WindowedAttention

__all__ = ["RefDecoderConfig", "RefDecoderModel", "build_model"]
PIECE = 4  # video frames that the finest stages decode at a time where no gradient is wanted


class RefDecoderModel(nn.Module):
    """Normalised latents "b c n y x", and references or none, to RGB "b 3 t h w".

    ``backbone`` is the pretrained decoder, ``encoder`` and ``injection`` are new; their parameters are told apart by these
    names. Weights of the backbone that the method never trains are buffers here, under their old names: they are stored with
    the model, and no optimiser sees them.

    Args:
        config: the architecture.
        channels, stride_t, stride_hw: of the latent space.
    """

    def __init__(self, config: RefDecoderConfig, channels: int, stride_t: int, stride_hw: int) -> None:
        super().__init__()
        self.config = config
        self.channels, self.stride_t, self.stride_hw = channels, stride_t, stride_hw
        shape = (channels, stride_t, stride_hw)
        points = None if config.points is None else list(config.points)
        self.backbone, self.layout = build_backbone(config.layout, config.dim, config.patches, *shape, points)
        if config.point_norms == "channel":
            self.layout = replace(self.layout, point_norms="channel", encoder_norm=False)
        self.injection = _build_injection(config, self.layout, self.backbone)
        self.encoder = None if self.injection is None else ReferenceEncoder(self.layout)
        later = range(1, len(self.layout.points)) if config.reread else ()
        self.rereads = nn.ModuleList(ReferenceEncoder(self.layout, number) for number in later)
        self.parts = _parts(self.layout, list(self.backbone.stages))
        _freeze(self.backbone, self.layout.frozen)
        self.set_checkpointing(config.checkpointing)

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute every block of the backbone and of the Transformer in the backward pass, or none."""
        for module in self.modules():
            if isinstance(module, Chain | JointAttention):
                module.checkpointing = enabled

    @property
    def uses_reference(self) -> bool:
        """Whether references change anything: not for ``inject=none``, which refuses them."""
        return self.injection is not None

    def reference_parameters(self) -> list[nn.Parameter]:
        """Those that have no gradient in a pass without references."""
        if self.injection is None:
            return []
        parts: list[nn.Module | None] = [self.encoder, self.rereads]
        if isinstance(self.injection, JointAttention):
            parts += [gate.norm_reference for gate in self.injection.gates]
        else:
            parts.append(self.injection)
        return [parameter for part in parts if part is not None for parameter in part.parameters()]

    def fill_backbone(self, pretrained: StagedDecoder) -> None:
        """Take the weights of a pretrained decoder of the same layout; a ControlNet's copy of it takes them too.

        Raises:
            ValueError: names or shapes differ.
        """
        own, theirs = self.backbone.state_dict(), pretrained.state_dict()
        odd = sorted(own.keys() ^ theirs.keys()) or [k for k, v in own.items() if v.shape != theirs[k].shape]
        if odd:
            raise ValueError(
                f"the pretrained decoder is no {self.config.layout} of this width: {len(odd)} weights do not fit; the "
                f"first is {odd[0]}"
            )
        self.backbone.load_state_dict(theirs)
        if isinstance(self.injection, ControlBranch):
            self.injection.copy_from(self.backbone)

    def optimised(self, options: InferenceOptions, calibration: Sequence[Tensor] = ()) -> "RefDecoderModel":
        """The same decoder for inference: see ``decoders/refdecoder/fast.py`` and ``decoders/inference.py``."""
        from decoders.refdecoder.fast import build_fast

        return build_fast(self, options, calibration)

    # ---- whole clips

    def forward(
        self,
        latent: Float[Tensor, "b c n y x"],
        reference: Float[Tensor, "b 3 r h2 w2"] | None = None,
        *,
        keep: Float[Tensor, "b 1 k y x"] | None = None,
        skip: bool = False,
        size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "b 3 t h w"]:
        """RGB, about [-1, 1], not clamped.

        Args:
            reference: RGB in [-1, 1], of the clip's size or resized to it; None: the video's tokens see one another only.
            keep: multiplies the features where latents are dropped; shape from :meth:`keep_shape`, or with k = 1 one mask
                for all frames.
            skip: no Transformer and no reference at all: the plain, fine-tuned decoder.
            size: height and width of the clip in pixels, where they are not those that the latents cover.

        Raises:
            ValueError: latents, references or mask of another shape; a reference of another aspect ratio; a reference
                for a decoder that looks at none.
        """
        x, reference = self._enter(latent, reference, size, skip)
        if keep is not None:
            self._check_keep(keep, latent)
        if skip or self.injection is None:
            return self._advance(x, None, True, None, keep)[0]
        if not self.injection.streams:
            return self._joint(x, reference, keep)
        memory = self._begin(reference)
        if isinstance(self.injection, ControlBranch):  # what it adds is the same for all frames
            return self._advance(x, None, True, memory, keep)[0]
        past, frames = None, []
        for number, frame in enumerate(x.split(1, dim=2)):
            kept = keep if keep is None or keep.shape[2] == 1 else keep[:, :, number : number + 1]
            video, past, memory = self._advance(frame, past, number == 0, memory, kept)
            frames.append(video)
        return torch.cat(frames, dim=2)

    @torch.no_grad()
    def decode(
        self,
        latent: Float[Tensor, "b c n y x"],
        reference: Float[Tensor, "b 3 r h2 w2"] | None = None,
        *,
        skip: bool = False,
        size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "b 3 t h w"]:
        """As :meth:`forward`, clamped to [-1, 1], without gradients; what can stream does, so that memory is bounded."""
        if not self.can_stream(skip):
            if not self.layout.causal:
                return self(latent, reference, skip=skip, size=size).clamp(-1, 1)
            x, reference = self._enter(latent, reference, size, skip)
            return self._joint(x, reference, in_pieces=True).clamp(-1, 1)
        rows, columns = (side * self.stride_hw for side in latent.shape[3:])
        state = self._start(len(latent), (rows, columns), reference, size, skip)
        return torch.cat([self.step_stream(frame, state) for frame in latent.unbind(2)], dim=2)

    def keep_shape(self, latent_frames: int, rows: int, columns: int) -> tuple[int, int, int, int]:
        """Shape (1, k, y, x) of one clip's mask of kept positions, for latents of so many frames, rows and columns."""
        return 1, latent_frames * self.layout.drop_frames, rows, columns

    def tokens(self, latent_frames: int, rows: int, columns: int, references: int = 1) -> dict[str, int]:
        """Tokens of a clip, references included, that pass the blocks at every point, by the name of the stage that follows.
        Unless attention is windowed all of a point see one another. Empty without attention."""
        if not isinstance(self.injection, JointAttention):
            return {}
        size = (rows * self.stride_hw, columns * self.stride_hw)
        lengths = self.layout.sequence_lengths(latent_frames, *size, references)
        return {point.before: length for point, length in zip(self.layout.points, lengths, strict=True)}

    # ---- streams

    def can_stream(self, skip: bool = False) -> bool:
        """Whether frames can be decoded as they arrive; ``skip``: without the Transformer."""
        return self.layout.causal and (skip or self.injection is None or self.injection.streams)

    def start_stream(
        self,
        batch_size: int,
        height: int,
        width: int,
        *,
        reference: Float[Tensor, "b 3 r h2 w2"] | None = None,
        skip: bool = False,
    ) -> RefStream:
        """A new stream of ``batch_size`` clips of ``height`` x ``width`` pixels with the same references throughout.

        Raises:
            TypeError: attention here sees the whole clip, or the backbone future frames.
            ValueError: as :meth:`forward` does of references.
        """
        if not self.can_stream(skip):
            reason = (
                "its attention sees the whole clip" if self.layout.causal else "its convolutions look at future frames"
            )
            other = ", or train one with decoder.attention=windowed" if self.layout.causal else ""
            raise TypeError(f"this decoder cannot stream: {reason}; decode whole clips{other}")
        if batch_size < 1 or height < 1 or width < 1:
            raise ValueError(f"a stream of {batch_size} clips of {height}x{width} pixels is empty")
        return self._start(batch_size, (height, width), reference, (height, width), skip)

    @torch.no_grad()
    def step_stream(self, latent_frame: Float[Tensor, "b c y x"], state: RefStream) -> Float[Tensor, "b 3 k h w"]:
        """The frames of the next latent frame, clamped: one for the first, then ``stride_t`` for each."""
        check_frame(latent_frame, state, self.channels, self.stride_hw)
        x = self.backbone.denormalise(latent_frame.unsqueeze(2))
        video, state.past, state.memory = self._advance(x, state.past, not state.started, state.memory)
        state.started = True
        return video[..., : state.height, : state.width].clamp(-1, 1)

    def end_stream(self, state: RefStream) -> Float[Tensor, "b 3 0 h w"]:
        """Close the stream. Nothing is ever pending: every step returns all of its frames."""
        state.ended, state.past, state.memory = True, None, None
        return self.backbone.latent_mean.new_zeros(state.batch_size, 3, 0, state.height, state.width)

    @torch.no_grad()
    def _start(
        self,
        clips: int,
        pixels: tuple[int, int],
        reference: Any,
        size: tuple[int, int] | None,
        skip: bool,
    ) -> RefStream:
        grid = tuple(-(-side // self.stride_hw) * self.stride_hw for side in pixels)
        reference = self._enter_reference(reference, clips, grid, size, skip)
        memory = None
        if self.injection is not None and not skip:
            memory = self._begin(reference)
        return RefStream(clips, *pixels, memory)

    # ---- the parts between two points

    def _enter(self, latent: Tensor, reference: Any, size: tuple[int, int] | None, skip: bool) -> tuple[Tensor, Any]:
        """Denormalised latents, and the references' pixels at the grid's size. Here and below ``reference`` is pixels, None, or
        what an optimised form has made of them (``fast.PreparedReference``)."""
        x = self.backbone.denormalise(latent)
        grid = (latent.shape[3] * self.stride_hw, latent.shape[4] * self.stride_hw)
        return x, self._enter_reference(reference, len(latent), grid, size, skip)

    def _enter_reference(
        self, reference: Any, clips: int, grid: tuple[int, int], size: tuple[int, int] | None, skip: bool
    ) -> Any:
        if reference is None:
            return None
        if self.encoder is None:
            raise ValueError("decoder.inject=none: this decoder looks at no reference; leave it out")
        reference = fit(reference, clips, size or clip_size(reference, grid, self.stride_hw), grid)
        return None if skip else reference

    def _begin(self, pixels: Any) -> Memory:
        features = None if pixels is None else self.encoder(pixels)
        return self.injection.begin(features, lambda number, carried: self._carry(number, carried, pixels))

    def _encoded(self, pixels: Any, clips: int) -> tuple[Tensor | None, Tensor | None]:
        """The references' pixels and their features before the first point."""
        return pixels, None if pixels is None else self.encoder(pixels)

    def _check_keep(self, keep: Tensor, latent: Tensor) -> None:
        _, frames, rows, columns = self.keep_shape(*latent.shape[2:])
        if keep.shape[2] not in (1, frames) or tuple(keep.shape[3:]) != (rows, columns) or len(keep) != len(latent):
            raise ValueError(
                f"keep is {tuple(keep.shape)}; it must be {(len(latent), 1, frames, rows, columns)}, or with 1 frame for all"
            )

    def _advance(
        self, x: Tensor, past: Past, first: bool, memory: Memory, keep: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Past], Memory]:
        """Video of the next latent frames, what convolutions remember, and the injection's memory; None: no injection."""
        new: dict[str, Past] = {}
        for number, stages in self.parts:
            if number is None:
                x, kept = self._drop(x, past, first, keep, stages)
            else:
                if memory is not None:
                    x, memory = self.injection.step(number, x, memory)
                x, kept, _ = self.backbone.run(x, past, first, stages=stages)
            new |= kept
        return self.backbone.finish(x), new, memory

    def _joint(self, x: Tensor, reference: Any, keep: Tensor | None = None, in_pieces: bool = False) -> Tensor:
        """The whole clip where video and references change each other. ``in_pieces``: the finest stages a few frames at a
        time, which bounds memory where there is no gradient."""
        pixels, reference = self._encoded(reference, len(x))
        for number, stages in self.parts:
            if number is None:
                x, _ = self._drop(x, None, True, keep, stages)
                continue
            x, reference = self.injection(number, x, reference)
            if reference is not None:
                reference = self._carry(number, reference, pixels)
            if in_pieces and number + 1 == len(self.layout.points):
                return torch.cat(list(self._pieces(x, stages)), dim=2)
            x, _, _ = self.backbone.run(x, None, True, stages=stages)
        return self.backbone.finish(x)

    def _pieces(self, x: Tensor, stages: list[str]) -> Iterator[Tensor]:
        past = None
        for number, piece in enumerate(x.split(PIECE, dim=2)):
            piece, past, _ = self.backbone.run(piece, past, number == 0, stages=stages)
            yield self.backbone.finish(piece)

    def _drop(
        self, x: Tensor, past: Past, first: bool, keep: Tensor | None, stages: list[str]
    ) -> tuple[Tensor, dict[str, Past]]:
        """The stages before the first point, with latents dropped on the way where ``keep`` says so."""
        if keep is None:
            x, new, _ = self.backbone.run(x, past, first, stages=stages)
            return x, new
        stage, layer = self.layout.drop
        at = stages.index(stage)
        x, new, _ = self.backbone.run(x, past, first, stages=stages[:at])
        kept: list[Past] = []
        layers = self.backbone.stages[stage].layers
        before = (past or {}).get(stage) or (None,) * len(layers)
        for number, part in enumerate(layers):
            if number == layer:
                x = x * keep.to(x.dtype)
            x, remembered = part(x.contiguous(memory_format=torch.channels_last_3d), before[number], first)
            kept.append(remembered)
        x, rest, _ = self.backbone.run(x, past, first, stages=stages[at + 1 :])
        return x, new | {stage: tuple(kept)} | rest

    def _carry(self, number: int, reference: Float[Tensor, "b c r y x"], pixels: Float[Tensor, "b 3 r h w"]) -> Tensor:
        """References from point ``number`` to the next, each by itself through the backbone's stages."""
        _, stages = self.parts[number + 1]
        frames, _, _ = self.backbone.run(fold_frames(reference), None, True, stages=stages)
        carried = unfold_frames(frames, len(reference))
        return carried + self.rereads[number](pixels).to(carried.dtype) if len(self.rereads) else carried


def _freeze(module: nn.Module, beginnings: tuple[str, ...]) -> None:
    """Make buffers of the parameters whose names begin so."""
    for name in [name for name, _ in module.named_parameters() if name.startswith(beginnings)]:
        owner, _, part = name.rpartition(".")
        layer = module.get_submodule(owner)
        weight = getattr(layer, part).detach()
        delattr(layer, part)
        layer.register_buffer(part, weight)


def _parts(layout: Layout, stages: list[str]) -> list[tuple[int | None, list[str]]]:
    """The backbone's stages before the first point, then those that follow each."""
    starts = [0, *(stages.index(point.before) for point in layout.points), len(stages)]
    numbers: list[Any] = [None, *range(len(layout.points))]
    return [(number, stages[starts[i] : starts[i + 1]]) for i, number in enumerate(numbers)]


def _build_injection(
    config: RefDecoderConfig, layout: Layout, backbone: StagedDecoder
) -> JointAttention | ControlBranch | None:
    if config.inject == "none":
        return None
    if config.inject == "controlnet":
        return ControlBranch(layout, backbone)
    kind = WindowedAttention if config.attention == "windowed" else JointAttention
    injection = kind(
        layout,
        blocks=config.blocks,
        heads=config.heads,
        head_dim=config.head_dim,
        ffn=config.ffn,
        split=tuple(config.split),
        shared=config.shared,
        skip_video=config.residual != "none",
        skip_reference=config.residual == "both",
        zero_init=config.residual != "none" if config.zero_init is None else config.zero_init,
    )
    if isinstance(injection, WindowedAttention):
        injection.window = config.window
    if config.local_start:
        begin_local(injection, tuple(config.split))
    return injection


def build_model(config: RefDecoderConfig, channels: int, stride_t: int, stride_hw: int) -> RefDecoderModel:
    """The network with random weights; ``RefDecoderModel.fill_backbone`` takes a pretrained decoder's."""
    return RefDecoderModel(config, channels, stride_t, stride_hw)
