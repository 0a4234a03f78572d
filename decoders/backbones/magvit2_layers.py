"""The pieces of the MAGVIT-v2 autoencoder. Every layer is ``layer(x, past, first) -> (y, new)``, see layers/causal_conv.py.

A video begins with its first frame alone (``past`` is None); all that follows comes with a past. So an image and the first
frame of a video are the same computation, to the bit, and later frames cannot reach the first.
"""

from collections.abc import Callable
from math import gcd, prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.backbones.wan_layers import add, channels_last, silu
from decoders.layers.causal_conv import Past, per_frame, remember

Stride = tuple[int, int, int]
Norm = Callable[[int], nn.Module]  # channels -> layer


class ChannelLayerNorm(nn.Module):
    """Mean 0 and variance 1 over the channels of every pixel, then gain and bias.

    One kernel each way where channels are last in memory, in the input's own dtype (sums are float32 inside): autocast
    would copy to float32 and back. Forward and backward in bf16 on one core, 2 clips of 5 frames: 3.0 ms, against 13.7 for
    Wan's norm and 14.9 for group norm by frame (16 channels, 64x64); 0.7, 1.5 and 0.5 ms (128 channels, 16x16).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x.movedim(1, -1), (x.shape[1],), weight, bias, 1e-6).movedim(-1, 1)


class FrameGroupNorm(nn.Module):
    """Group norm of every frame by itself, in up to 32 groups: over all frames at once the first would see the later."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = gcd(channels, 32)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return per_frame(lambda frames: F.group_norm(frames, self.groups, weight, bias, 1e-6), x)


NORMS: dict[str, Norm] = {"layer": ChannelLayerNorm, "group": FrameGroupNorm}


# Of a block's last convolution and of that to pixels at the start, in shares of the others': blocks begin near the
# identity, pixels near grey.
QUIET_START = 0.2


def initialise(module: nn.Module) -> None:
    """Start weights of a half: each convolution keeps its input's variance, blocks begin near the identity, pixels near grey.

    torch's own start loses two thirds of the variance in every convolution, and its biases drown what is left: latents
    begin almost constant, and the decoder learns to ignore them. magvit2_demo's layout, 100 steps of AdamW at 1e-3 on four
    clips of 5 x 32 x 32, unseen clips: 12.4 dB with torch's start (their mean colour; 13.9 at 5e-4), 14.4 with the variance
    kept, 15.5 with quiet blocks too. Grey pixels: the error left of one clip overfitted in 60 steps, as a share of the
    clip's variance, fell from 0.41 and 0.53 (two seeds) to 0.27 and 0.24.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv3d | nn.Linear):
            nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
            nn.init.zeros_(part.bias)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, ResBlock):
                part.conv2.weight.mul_(QUIET_START)
            elif isinstance(part, Head) and isinstance(part.conv, CausalConv3d):
                part.conv.weight.mul_(QUIET_START)


class CausalConv3d(nn.Conv3d):
    """3x3x3 convolution with a stride; in space half a kernel of zeros around, in time only frames before.

    Before the first frame stands that frame again and again (``replicate``) or nothing (``zeros``). Repeated frames all
    meet the same pixels, so the first frame takes one 2D convolution with the taps added up over time.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Stride = (1, 1, 1), replicate: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding=(0, 1, 1))
        self.replicate = replicate
        self.before = 3 - stride[0]  # frames that the next call needs

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        """``x`` "b c t h w": one frame where ``past`` is None, else any multiple of the stride in time."""
        if past is None:
            return self.begin(x)
        x = torch.cat([past, x], 2)
        new = x[:, :, -self.before :] if torch.is_grad_enabled() else remember(x, self.before)
        return super().forward(x), new

    def begin(self, x: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Past]:
        """The first frame, "b c 1 h w"; ``rows``: only these output channels."""
        if x.shape[2] != 1:
            raise ValueError(f"a video begins with one frame by itself, not with {x.shape[2]}")
        weight = self.weight[rows]
        weight = weight.sum(2) if self.replicate else weight[:, :, -1]
        y = F.conv2d(x[:, :, 0], weight, self.bias[rows], self.stride[1:], self.padding[1:])
        earlier = x if self.replicate else torch.zeros_like(x)
        return y.unsqueeze(2), torch.cat([*[earlier] * (self.before - 1), x], 2)


class Pointwise(nn.Linear):
    """A 1x1x1 convolution: one matrix product over channels, which are last in memory."""

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1), None


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the input through a 1x1x1 convolution where widths differ."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, replicate: bool) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, replicate=replicate)
        self.norm2 = norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, replicate=replicate)
        self.skip = Pointwise(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        past1, past2 = past or (None, None)
        y, new1 = self.conv1(silu(self.norm1(x)), past1, first)
        y, new2 = self.conv2(silu(self.norm2(y)), past2, first)
        return add(y, x if self.skip is None else self.skip(x)[0]), (new1, new2)


class Upsample(nn.Module):
    """A causal convolution to as many times the channels as there will be pixels, which are then put in their places.

    Latent frame j makes the frames 2j - 1 and 2j. There is no frame -1: of the first two the earlier one is left out, and
    not computed.
    """

    def __init__(self, channels: int, stride: Stride, replicate: bool) -> None:
        super().__init__()
        self.stride, self.channels = stride, channels
        self.conv = CausalConv3d(channels, channels * prod(stride), replicate=replicate)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        k, p, q = self.stride
        if past is None:
            y, new = self.conv.begin(x, slice((k - 1) * p * q * self.channels, None))
            k = 1
        else:
            y, new = self.conv(x, past, first)
        if (k, p, q) != (1, 1, 1):
            y = channels_last("b t h w (k p q c) -> b (t k) (h p) (w q) c", y, k=k, p=p, q=q)
        return y, new


class Head(nn.Module):
    """Norm, SiLU and a convolution to what comes out: 3x3x3 (pixels) or, ``pointwise``, 1x1x1 (latents)."""

    def __init__(
        self, in_channels: int, out_channels: int, norm: Norm, replicate: bool, pointwise: bool = False
    ) -> None:
        super().__init__()
        self.norm = norm(in_channels)
        if pointwise:
            self.conv = Pointwise(in_channels, out_channels)
        else:
            self.conv = CausalConv3d(in_channels, out_channels, replicate=replicate)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        return self.conv(silu(self.norm(x)), past, first)
