"""What all convolutional backbones share: named stages, whole clips and streams from one code path, features on request.

A decoder is a chain of stages, from normalised latents "b c n y x" to RGB "b 3 t h w" in [-1, 1]; each is called as
``stage(x, past, first) -> (y, new)`` (see ``decoders/layers/causal_conv.py``). A whole clip is one call, a stream is
one call per latent frame with the same weights and the caller's own state, so the two are equal by construction.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decoders.inference import InferenceOptions
from decoders.layers.causal_conv import Chain, Past


@dataclass
class ConvStream:
    """What a stream remembers: the last input frames of every causal convolution. The caller owns it; it does not grow."""

    batch_size: int
    height: int  # pixels, of the frames that come out
    width: int
    past: Past = None
    started: bool = False
    steps: int = 0  # latent frames that were decoded
    ended: bool = field(default=False, repr=False)

    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in _tensors(self.past))


class StagedDecoder(nn.Module):
    """Base of the backbones and of the students that are made from them.

    Args:
        stages: name -> stage, in order; the names are those of the released code's parts.
        channels, stride_t, stride_hw: of the latent space.
        mean, std: of the space's latents, one number per channel, None for 0 and 1. Latents arrive normalised and are
            denormalised here, at the decoder's own door.
        can_stream: False for decoders that look at future latent frames.
    """

    def __init__(
        self,
        stages: dict[str, nn.Module],
        channels: int,
        stride_t: int,
        stride_hw: int,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        can_stream: bool = True,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        self.channels, self.stride_t, self.stride_hw = channels, stride_t, stride_hw
        self.can_stream = can_stream
        self.given_statistics: dict[str, list[float]] = {}
        for name, values, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            self.given_statistics[name] = values = [default] * channels if values is None else list(values)
            if len(values) != channels:
                raise ValueError(f"latent {name} has {len(values)} numbers for {channels} channels")
            tensor = torch.tensor(values, dtype=torch.float32).view(1, channels, 1, 1, 1)
            self.register_buffer(f"latent_{name}", tensor, persistent=False)

    def reset_statistics(self) -> None:
        """The latents' mean and std that this decoder was built with, on the CPU: of one that was built on the meta device."""
        for name, values in self.given_statistics.items():
            tensor = torch.tensor(values, dtype=torch.float32, device="cpu").view(1, -1, 1, 1, 1)
            setattr(self, f"latent_{name}", tensor)

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute every block in the backward pass, or none."""
        for module in self.modules():
            if isinstance(module, Chain):
                module.checkpointing = enabled

    def finish(self, x: Tensor) -> Tensor:
        """What the last stage gives, as RGB: pixels that it folded into channels come out here."""
        return x

    # ---- whole clips

    def forward(
        self, latent: Float[Tensor, "b c n y x"], *, taps: Collection[str] = ()
    ) -> Float[Tensor, "b 3 t h w"] | tuple[Float[Tensor, "b 3 t h w"], dict[str, Tensor]]:
        """RGB, about [-1, 1], not clamped. With ``taps``, names of stages, also what those stages gave."""
        if unknown := set(taps) - set(self.stages):
            raise ValueError(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(self.stages)}")
        x, _, features = self.run(self.denormalise(latent), None, True, taps)
        video = self.finish(x)
        return (video, features) if taps else video

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b 3 t h w"]:
        """RGB clamped to [-1, 1], without gradients; a causal decoder frame by frame, in bounded memory."""
        if not self.can_stream:
            return self(latent).clamp(-1, 1)
        size = (latent.shape[3] * self.stride_hw, latent.shape[4] * self.stride_hw)
        state = self.start_stream(len(latent), *size)
        return torch.cat([self.step_stream(frame, state) for frame in latent.unbind(2)], dim=2)

    def run(
        self, x: Tensor, past: Past, first: bool, taps: Collection[str] = (), stages: Collection[str] | None = None
    ) -> tuple[Tensor, dict[str, Past], dict[str, Tensor]]:
        """Run ``stages`` (all by default) on denormalised latents or on features: output, new past, tapped features."""
        past, new, features = past or {}, {}, {}
        for name, stage in self.stages.items():
            if stages is not None and name not in stages:
                continue
            # Channels last: norms over them are faster (5 times at 384, 7 at 12), and convolutions. Layers keep it, but for
            # torch's own convolution of few float32 numbers.
            x = x.contiguous(memory_format=torch.channels_last_3d)
            x, new[name] = stage(x, past.get(name), first)
            if name in taps:
                features[name] = x
        return x, new, features

    def denormalise(self, latent: Float[Tensor, "b c n y x"]) -> Tensor:
        """The latents that the released weights were trained on, in this module's dtype."""
        if latent.ndim != 5 or latent.shape[1] != self.channels:
            raise ValueError(f"latent is {tuple(latent.shape)}; this decoder reads (b, {self.channels}, n, y, x)")
        dtype = next(self.parameters()).dtype
        return (latent.float() * self.latent_std.float() + self.latent_mean.float()).to(dtype)

    # ---- streams

    def start_stream(self, batch_size: int, height: int, width: int) -> ConvStream:
        """A new stream of ``batch_size`` clips of ``height`` x ``width`` pixels.

        Raises:
            ValueError: this decoder looks at future latent frames, so it has no stream.
        """
        if not self.can_stream:
            raise ValueError(
                "this decoder cannot stream: its convolutions look at future latent frames; decode whole clips"
            )
        if batch_size < 1 or height < 1 or width < 1:
            raise ValueError(f"a stream of {batch_size} clips of {height}x{width} pixels is empty")
        return ConvStream(batch_size, height, width)

    @torch.no_grad()
    def step_stream(self, latent_frame: Float[Tensor, "b c y x"], state: ConvStream) -> Float[Tensor, "b 3 k h w"]:
        """The frames of the next latent frame, clamped: one for the first, then ``stride_t`` for each."""
        check_frame(latent_frame, state, self.channels, self.stride_hw)
        video, state.past = self.advance(latent_frame, state.past, not state.started, state)
        state.started = True
        state.steps += 1
        return video[..., : state.height, : state.width]

    def advance(
        self, latent_frame: Float[Tensor, "b c y x"], past: Past, first: bool, state: ConvStream | None = None
    ) -> tuple[Tensor, Past]:
        """One latent frame's RGB, clamped, and the new past: what a step computes. ``state``, whose step it is, is for
        optimised forms that keep a stream's past themselves."""
        x, new, _ = self.run(self.denormalise(latent_frame.unsqueeze(2)), past, first)
        return self.finish(x).clamp(-1, 1), new

    # ---- optimised

    def optimised(self, options: InferenceOptions, calibration: Sequence[Tensor] = ()) -> nn.Module:
        """For inference only and faster, with weights of its own: see ``decoders/backbones/fast.py``."""
        from decoders.backbones.fast import optimised

        return optimised(self, options, calibration)

    def end_stream(self, state: ConvStream) -> Float[Tensor, "b 3 0 h w"]:
        """Close the stream. Nothing is ever pending: every step returns all of its frames."""
        state.ended, state.past = True, None
        return self.latent_mean.new_zeros(state.batch_size, 3, 0, state.height, state.width)


class StagedEncoder(nn.Module):
    """Base of the causal encoders: RGB in [-1, 1] "b 3 t h w" through named stages, functional in what they remember."""

    def __init__(self, stages: dict[str, nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)

    def run(self, x: Tensor, past: dict[str, Past], first: bool) -> tuple[Tensor, dict[str, Past]]:
        """The output of the last stage for the next frames, and what the stages remember of them."""
        x = x.to(next(self.parameters()).dtype).contiguous(memory_format=torch.channels_last_3d)  # a third less time
        new = {}
        for name, stage in self.stages.items():
            x, new[name] = stage(x, past.get(name), first)
        return x, new

    def run_in_chunks(self, video: Float[Tensor, "b 3 t h w"], frames: int) -> Tensor:
        """The first frame by itself, then ``frames`` at a time: the same as at once."""
        part, past = self.run(video[:, :, :1], {}, True)
        parts = [part]
        for start in range(1, video.shape[2], frames):
            part, past = self.run(video[:, :, start : start + frames], past, False)
            parts.append(part)
        return torch.cat(parts, 2)

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute every block in the backward pass, or none."""
        for module in self.modules():
            if isinstance(module, Chain):
                module.checkpointing = enabled


@runtime_checkable
class StreamClock(Protocol):
    """What a stream of any decoder says of itself."""

    batch_size: int
    height: int
    width: int
    ended: bool


def check_frame(latent_frame: Tensor, state: StreamClock, channels: int, stride_hw: int) -> None:
    """Raise ValueError for a stream that has ended, or a latent frame "b c y x" of another shape than it takes."""
    if state.ended:
        raise ValueError("this stream has ended; start another with start_stream")
    rows, columns = (-(-side // stride_hw) for side in (state.height, state.width))
    expected = (state.batch_size, channels, rows, columns)
    if tuple(latent_frame.shape) != expected:
        raise ValueError(
            f"latent frame of shape {tuple(latent_frame.shape)}, but this stream of {state.batch_size} x "
            f"{state.height}x{state.width} pixels takes {expected} (b c y x)"
        )


def _tensors(past: Past) -> Iterator[Tensor]:
    if isinstance(past, Tensor):
        yield past
    elif isinstance(past, dict):
        past = tuple(past.values())
    if isinstance(past, tuple):
        for part in past:
            yield from _tensors(part)
