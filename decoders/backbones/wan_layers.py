"""The pieces of Wan's autoencoders. Every layer is ``layer(x, past, first) -> (y, new)``, see layers/causal_conv.py."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.layers.causal_conv import CausalConv3d, Chain, Past, per_frame

Conv = Callable[[int, int, int], nn.Module]  # (in channels, out channels, kernel) -> layer


class ChannelNorm(nn.Module):
    """Vectors over channels scaled to length sqrt(channels), times a gain; the length is taken in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
            scale = (x.shape[1] ** 0.5 / length.clamp_min(1e-12)).to(x.dtype)
            return x * scale * self.gain.to(x.dtype).view(-1, *(1,) * (x.ndim - 2))


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
        y, new1 = self.conv1(F.silu(self.norm1(x)), past1, first)
        y, new2 = self.conv2(F.silu(self.norm2(y)), past2, first)
        return y + (x if self.skip is None else self.skip(x)[0]), (new1, new2)


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
                rest = rearrange(rest, "b (k c) t h w -> b c (t k) h w", k=2)
            x = torch.cat([head, rest], 2) if first else rest
        return per_frame(self._enlarge, x), past

    def _enlarge(self, frames: Tensor) -> Tensor:
        return self.conv(F.interpolate(frames, scale_factor=2.0, mode="nearest"))


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
        return self.conv(F.silu(self.norm(x)), past, first)


class ResidualUp(Chain):
    """Wan 2.2: a stage beside which its input is repeated over frames, pixels and channels to the output's size."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.frames = 2 if temporal else 1
        self.repeats = out_channels * self.frames * 4 // in_channels

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        y, new = super().forward(x, past, first)
        shortcut = rearrange(
            x.repeat_interleave(self.repeats, 1),
            "b (c k p q) t h w -> b c (t k) (h p) (w q)", k=self.frames, p=2, q=2,
        )  # fmt: skip
        return y + (shortcut[:, :, self.frames - 1 :] if first else shortcut), new


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
