"""The pieces of Wan's autoencoders. Every layer is ``layer(x, past, first) -> (y, new)``, see layers/causal_conv.py."""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.layers.causal_conv import CausalConv3d, Chain, Past, per_frame

Conv = Callable[[int, int, int], nn.Module]  # (in channels, out channels, kernel) -> layer


# Pixels repeated twice, then three taps: the new pixel 2i + p sees only the pixels i - 1 + p and i + p, through these taps
# ([p, which of the two, tap]). In both directions: nine taps of a kernel to (p, q, which row, which column).
TAPS = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
TAPS_2D = torch.einsum("pak,qbl->klpqab", TAPS, TAPS).reshape(9, 16)


def channels_last(pattern: str, x: Tensor, **sizes: int) -> Tensor:
    """einops' ``rearrange`` of a video, written with its channels last and left so in memory."""
    return rearrange(x.movedim(1, -1), pattern, **sizes).movedim(-1, 1)


def unfold(x: Tensor, frames: int) -> Tensor:
    """Frames and pixels out of channels: "b (c k p q) t h w" to "b c (t k) (h p) (w q)", p = q = 2."""
    return channels_last("b t h w (c k p q) -> b (t k) (h p) (w q) c", x, k=frames, p=2, q=2)


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else has: in place where there is no gradient, as new memory costs more."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y; the same of x as for :func:`silu`."""
    return x + y if torch.is_grad_enabled() else x.add_(y)


def repeat_and_convolve(
    frames: Float[Tensor, "f i y x"], weight: Float[Tensor, "o i 3 3"], bias: Float[Tensor, " o"]
) -> Float[Tensor, "f o 2*y 2*x"]:
    """Every pixel repeated 2 x 2, then a 3x3 convolution with zeros around, as one 2x2 convolution of the few pixels.

    Taps that fall on the same pixel are added up first: 16 products in place of 36, and no enlarged copy. On one CPU core
    in bf16 47 became 23 ms for 384 to 192 channels (32 x 32, 2 frames), 90 became 23 ms for 384 to 24 (64 x 64, 4 frames).
    """
    return convolve_folded(frames, folded_taps(weight), bias.repeat(4))


def folded_taps(weight: Float[Tensor, "o i 3 3"]) -> Float[Tensor, "o4 i 2 2"]:
    """The four 2x2 kernels of :func:`repeat_and_convolve`, one after another."""
    weight = rearrange(weight.flatten(2) @ TAPS_2D.to(weight), "o i (p q a b) -> (p q o) a b i", p=2, q=2, a=2)
    return weight.movedim(-1, 1)


def convolve_folded(
    frames: Float[Tensor, "f i y x"], weight: Float[Tensor, "o4 i 2 2"], bias: Float[Tensor, " o4"]
) -> Float[Tensor, "f o 2*y 2*x"]:
    """The rest of :func:`repeat_and_convolve`; ``bias`` is there four times."""
    f, _, y, x = frames.shape
    four = F.conv2d(frames, weight, bias, padding=1)
    four = four.movedim(1, -1).unflatten(-1, (2, 2, -1))  # f y+1 x+1 p q o
    large = four.new_empty(f, y, 2, x, 2, four.shape[-1])
    for p in (0, 1):
        for q in (0, 1):
            large[:, :, p, :, q] = four[:, p : p + y, q : q + x, p, q]
    return large.flatten(3, 4).flatten(1, 2).movedim(-1, 1)


class ChannelNorm(nn.Module):
    """Vectors over channels scaled to length sqrt(channels), times a gain; squares are added up in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        channels, training = x.shape[1], torch.is_grad_enabled()
        with torch.autocast(x.device.type, enabled=False):
            gain = self.gain.to(x.dtype)
            if channels < 32 and x.device.type == "cpu" and not training and x.movedim(1, -1).is_contiguous():
                gain = (self.gain.float() * channels**0.5).to(x.dtype)
                return self._narrow(x.movedim(1, -1), gain).movedim(-1, 1)
            # A CPU adds up in float32 whatever it returns, but copies all of x to return float32 (50 MB: 51 ms, not 3).
            dtype = x.dtype if x.device.type == "cpu" else torch.promote_types(x.dtype, torch.float32)
            length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype)
            length = length.to(torch.promote_types(x.dtype, torch.float32)).clamp_min(1e-12)
            x = x * (channels**0.5 / length).to(x.dtype)
            gain = gain.view(-1, *(1,) * (x.ndim - 2))
            return x * gain if training else x.mul_(gain)

    @staticmethod
    def _narrow(x: Tensor, gain: Tensor) -> Tensor:
        """The same for few channels, which are last in ``x``; gain times sqrt(channels). A number per pixel would meet only
        as many others at once as there are channels: a matrix of ones gives each channel the sum, and gains come for a
        row of pixels (12 channels of 256 x 256, 4 frames: 4.6 ms, not 10.8)."""
        channels, width = x.shape[-1], x.shape[-2]
        squares = F.linear(x * x, x.new_ones(channels, channels), x.new_full((channels,), 1e-24))
        y = squares.rsqrt_().mul_(x)
        return y.flatten(-2).mul_(gain.repeat(width)).view(x.shape)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the input through a 1x1x1 convolution where widths differ.

    Args:
        conv: what the convolutions are; the released model's are dense and causal in three dimensions.
        skip: give the input its convolution even where widths are equal: pruned blocks keep other channels at their
            input than at their output.
    """

    def __init__(self, in_channels: int, out_channels: int, conv: Conv = CausalConv3d, skip: bool = False) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3)
        self.norm2 = ChannelNorm(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.skip = conv(in_channels, out_channels, 1) if skip or in_channels != out_channels else None

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        past1, past2 = past or (None, None)
        y, new1 = self.conv1(silu(self.norm1(x)), past1, first)
        y, new2 = self.conv2(silu(self.norm2(y)), past2, first)
        return add(y, x if self.skip is None else self.skip(x)[0]), (new1, new2)


class FrameAttention(nn.Module):
    """Single-head self-attention over the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        return x + per_frame(self._mix, x), None

    def _mix(self, frames: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(frames)), "f (three c) y x -> three f 1 (y x) c", three=3)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(mixed, "f 1 (y x) c -> f c y x", y=frames.shape[-2]))


class Upsample(nn.Module):
    """Twice the frames where ``temporal`` (not the video's first), then twice the pixels.

    In time a causal convolution gives two frames per frame; the first latent frame stays one frame, and later frames do
    not see it. In space pixels are repeated, then convolved.
    """

    def __init__(self, in_channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.time_conv = CausalConv3d(in_channels, 2 * in_channels, (3, 1, 1)) if temporal else None
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        if self.time_conv is not None:
            head, rest = (x[:, :, :1], x[:, :, 1:]) if first else (x[:, :, :0], x)
            if rest.shape[2]:
                rest, past = self.time_conv(rest, past)
                rest = channels_last("b t h w (k c) -> b (t k) h w c", rest, k=2)
            x = torch.cat([head, rest], 2) if first else rest
        return per_frame(self._enlarge, x), past

    def _enlarge(self, frames: Tensor) -> Tensor:
        return repeat_and_convolve(frames, self.conv.weight, self.conv.bias)


class Downsample(nn.Module):
    """Half the pixels, then half the frames where ``temporal`` (the video's first stays as it is)."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        x = per_frame(lambda frames: self.conv(F.pad(frames, (0, 1, 0, 1))), x)
        if self.time_conv is None:
            return x, None
        new = x[:, :, -1:].clone()
        window = x if first else torch.cat([past, x], 2)
        halved = [self.time_conv(window)] if window.shape[2] > 2 else []
        return torch.cat([x[:, :, :1], *halved] if first else halved, 2), new


class NormConv(nn.Module):
    """The head: norm, SiLU, causal convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(in_channels)
        self.conv = CausalConv3d(in_channels, out_channels, 3)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        return self.conv(silu(self.norm(x)), past, first)


class ResidualUp(Chain):
    """Wan 2.2: a stage beside which its input is repeated over frames, pixels and channels to the output's size."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.frames = 2 if temporal else 1
        self.repeats = out_channels * self.frames * 4 // in_channels

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        y, new = super().forward(x, past, first)
        shortcut = unfold(x.repeat_interleave(self.repeats, 1), self.frames)
        return add(y, shortcut[:, :, self.frames - 1 :] if first else shortcut), new


class ResidualDown(Chain):
    """Wan 2.2: a stage beside which frames and pixels are folded into channels and averaged to the output's number."""

    def __init__(self, out_channels: int, temporal: bool, spatial: bool, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.out_channels = out_channels
        self.frames, self.pixels = 2 if temporal else 1, 2 if spatial else 1

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        y, new = super().forward(x, past, first)
        if first:  # zeros stand before the first frame
            x = F.pad(x, (0, 0, 0, 0, self.frames - 1, 0))
        folded = rearrange(
            x, "b c (t k) (h p) (w q) -> b (c k p q) t h w", k=self.frames, p=self.pixels, q=self.pixels
        )  # fmt: skip
        return y + folded.unflatten(1, (self.out_channels, -1)).mean(2), new
