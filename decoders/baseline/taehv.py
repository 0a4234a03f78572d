"""A tiny convolutional decoder in the layout of TAEHV, the row that everyone compares speed with.

Three stages of three memory blocks each (widths 256, 128, 64), then one narrow convolution to pixels. A memory block is a
residual block of 2D convolutions over every frame beside the frame before it in the same block; time doubles after the
second and third stage by 1x1 convolutions. 9.84 M parameters for Wan 2.1's latents and 9.92 M for Wan 2.2's; FlashDecoder's
paper (arXiv 2607.14898, Table 2) says 9.8 and 9.9. Layout facts are those of the public TAEHV; nothing of it is copied, and
there are no released weights here: random ones cost as much, and what it would score is not claimed.

Equal to it in operations but for one thing: of the four frames that the first latent frame stands for only the last is
shown, so the last stage computes that one alone.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.inference import DEFAULT, InferenceOptions

WIDTHS = (256, 128, 64, 64)
BLOCKS = 3  # memory blocks of a stage
GROWTH = (1, 2, 2)  # frames out per frame in, after each stage
SOFT_LIMIT = 3.0  # latents beyond it are bent towards it
#           channels, side of the patches that the last convolution gives
LAYOUTS = {"wan21": (16, 1), "wan22": (48, 2)}


@dataclass
class TaehvStream:
    """What a stream remembers: the last frame that went into every memory block. The caller owns it; it does not grow."""

    batch_size: int
    height: int  # pixels, of the frames that come out
    width: int
    past: list[Tensor | None] = field(default_factory=lambda: [None] * (BLOCKS * len(GROWTH)))
    started: bool = False
    ended: bool = False

    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(frame.nbytes for frame in self.past if frame is not None)


class MemoryBlock(nn.Module):
    """relu(frame + three 3x3 convolutions of [frame, frame before])."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2 * width, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "bt c y x"], before: Float[Tensor, "bt c y x"]) -> Float[Tensor, "bt c y x"]:
        hidden = F.relu(self.mix(torch.cat([x, before], 1)))
        return F.relu(x + self.last(F.relu(self.middle(hidden))))


class TaehvDecoder(nn.Module):
    """Normalised latents "b c n y x" to RGB "b 3 1+(n-1)*4 h w" in [-1, 1], frame by frame or whole.

    Args:
        layout: ``wan21`` (16 channels, 8x8 pixels) or ``wan22`` (48 channels, 16x16 pixels, out in 2x2 patches).

    Raises:
        ValueError: another layout.
    """

    can_stream = True

    def __init__(self, layout: str = "wan21") -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"no layout {layout!r}; there are {', '.join(LAYOUTS)}")
        self.channels, self.patch = LAYOUTS[layout]
        self.stride_t, self.stride_hw = 4, 8 * self.patch
        self.enter = nn.Conv2d(self.channels, WIDTHS[0], 3, padding=1)
        stages = zip(WIDTHS[:-1], WIDTHS[1:], GROWTH, strict=True)
        self.stages = nn.ModuleList(
            nn.ModuleDict(
                {
                    "blocks": nn.ModuleList(MemoryBlock(width) for _ in range(BLOCKS)),
                    "grow": nn.Conv2d(width, width * growth, 1, bias=False),
                    "narrow": nn.Conv2d(width, after, 3, padding=1, bias=False),
                }
            )
            for width, after, growth in stages
        )
        self.pixels = nn.Conv2d(WIDTHS[-1], 3 * self.patch**2, 3, padding=1)
        self._initialise()

    def _initialise(self) -> None:
        """He's, with quiet residual branches and grey in the middle: most of a random decoder's frames are then within the
        clamp, so that comparing two ways to compute them says something."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, MemoryBlock):
                    module.last.weight.mul_(0.3)
            self.pixels.weight.mul_(0.05)
            self.pixels.bias.fill_(0.5)

    def optimised(self, options: InferenceOptions = DEFAULT, calibration: Sequence[Tensor] = ()) -> "FastTaehv":
        """A copy in channels_last, with ``compile`` compiled; see :func:`decoders.inference.optimise`.

        Raises:
            ValueError: an option other than ``compile``, ``graphs`` and ``uint8``.
        """
        return FastTaehv(self, options)

    # ---- whole clips and streams

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b 3 t h w"]:
        """All latent frames at once, every layer over the whole clip: fast, and in memory that grows with it."""
        state = self.start_stream(len(latent), *(side * self.stride_hw for side in latent.shape[3:]))
        return self._frames(latent, state)

    forward = decode

    def start_stream(self, batch_size: int, height: int, width: int) -> TaehvStream:
        """A new stream of ``batch_size`` clips of ``height`` x ``width`` pixels."""
        if batch_size < 1 or height < 1 or width < 1:
            raise ValueError(f"a stream of {batch_size} clips of {height}x{width} pixels is empty")
        return TaehvStream(batch_size, height, width)

    @torch.no_grad()
    def step_stream(self, latent_frame: Float[Tensor, "b c y x"], state: TaehvStream) -> Float[Tensor, "b 3 k h w"]:
        """The frames of the next latent frame: one for the first, then four for each."""
        if state.ended:
            raise ValueError("this stream has ended; start another with start_stream")
        rows, columns = (-(-side // self.stride_hw) for side in (state.height, state.width))
        expected = (state.batch_size, self.channels, rows, columns)
        if tuple(latent_frame.shape) != expected:
            raise ValueError(
                f"latent frame of shape {tuple(latent_frame.shape)}, but this stream of {state.batch_size} x "
                f"{state.height}x{state.width} pixels takes {expected} (b c y x)"
            )
        return self._frames(latent_frame.unsqueeze(2), state)[..., : state.height, : state.width]

    def end_stream(self, state: TaehvStream) -> Float[Tensor, "b 3 0 h w"]:
        """Close the stream. Nothing is ever pending: every step returns all of its frames."""
        state.ended, state.past = True, []
        return self.pixels.weight.new_zeros(state.batch_size, 3, 0, state.height, state.width)

    # ---- pieces

    def _frames(self, latent: Tensor, state: TaehvStream) -> Tensor:
        """Latents "b c n y x" that follow what ``state`` remembers, to their frames "b 3 t h w"."""
        b = len(latent)
        video, state.past = self.run(latent, state.past, not state.started)
        state.started = True
        return video.unflatten(0, (b, -1)).transpose(1, 2)

    def run(
        self, latent: Float[Tensor, "b c n y x"], past: list[Tensor | None], first: bool
    ) -> tuple[Float[Tensor, "bt 3 h w"], list[Tensor]]:
        """Frames, clip by clip, and what the memory blocks remember after them; ``first``: a clip begins here."""
        b = len(latent)
        x = latent.to(self.pixels.weight.dtype).transpose(1, 2).flatten(0, 1)
        x = F.relu(self.enter(torch.tanh(x / SOFT_LIMIT) * SOFT_LIMIT))
        new = []
        for number, stage in enumerate(self.stages):
            for block in stage["blocks"]:
                before, last = _shifted(x, past[len(new)], b)
                new.append(last)
                x = block(x, before)
            x = stage["grow"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = x.unflatten(1, (GROWTH[number], -1)).flatten(0, 1)
            if first and number == len(GROWTH) - 1:  # nothing behind here remembers, and the first frames are not shown
                x = x.unflatten(0, (b, -1))[:, self.stride_t - 1 :].flatten(0, 1)
            x = stage["narrow"](x)
        x = F.pixel_shuffle(self.pixels(F.relu(x)), self.patch)
        return (x.clamp(0, 1) * 2 - 1), new


def _shifted(x: Float[Tensor, "bt c y x"], past: Tensor | None, b: int) -> tuple[Tensor, Tensor]:
    """Every frame's predecessor, zeros before the very first, and a copy of each clip's last frame."""
    frames = x.unflatten(0, (b, -1))
    past = torch.zeros_like(frames[:, :1]) if past is None else past
    return torch.cat([past, frames[:, :-1]], 1).flatten(0, 1), frames[:, -1:].clone()


class FastTaehv(nn.Module):
    """:class:`TaehvDecoder` for inference: channels_last, compiled if asked, uint8 if asked. Same calls, same frames."""

    can_stream = True

    def __init__(self, plain: TaehvDecoder, options: InferenceOptions) -> None:
        super().__init__()
        unused = {
            "bits8": options.bits8 != "none",
            "attention": options.attention != "auto",
            "fast_convolutions": options.fast_convolutions,
        }
        if asked := [name for name, is_asked in unused.items() if is_asked]:
            raise ValueError(f"TaehvDecoder has no use for {', '.join(asked)}; it knows compile, graphs and uint8")
        network = TaehvDecoder.__new__(TaehvDecoder)
        nn.Module.__init__(network)
        for name in ("channels", "patch", "stride_t", "stride_hw"):
            setattr(network, name, getattr(plain, name))
        for name, child in plain.named_children():
            setattr(network, name, _channels_last(child))
        self.network = network.eval().requires_grad_(False)
        self.channels, self.stride_t, self.stride_hw = plain.channels, plain.stride_t, plain.stride_hw
        self.uint8 = options.uint8
        if options.compile:
            network.run = torch.compile(network.run, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "b c n y x"]) -> Tensor:
        return self._out(self.network.decode(_last(latent)))

    def start_stream(self, batch_size: int, height: int, width: int) -> TaehvStream:
        return self.network.start_stream(batch_size, height, width)

    @torch.no_grad()
    def step_stream(self, latent_frame: Float[Tensor, "b c y x"], state: TaehvStream) -> Tensor:
        frame = latent_frame.contiguous(memory_format=torch.channels_last)
        return self._out(self.network.step_stream(frame, state))

    def end_stream(self, state: TaehvStream) -> Tensor:
        return self._out(self.network.end_stream(state))

    def _out(self, video: Float[Tensor, "b 3 t h w"]) -> Tensor:
        """As it is, or as uint8 "b t h w 3"."""
        if not self.uint8:
            return video
        return ((video.float() + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def _channels_last(module: nn.Module) -> nn.Module:
    """A copy whose convolutions lie in memory as ``channels_last``."""
    return copy.deepcopy(module).to(memory_format=torch.channels_last)


def _last(latent: Tensor) -> Tensor:
    return latent.contiguous(memory_format=torch.channels_last_3d)
