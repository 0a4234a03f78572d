"""What LTX-Video's decoders are made of. Every layer is ``layer(x, past, first) -> (y, new)``, as in causal_conv.py.

Past the ends of a clip LTX repeats the edge frame, where Wan sees zeros. A released decoder looks both ways, so it
remembers nothing; the causal form looks back only and can be fed frame by frame.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.layers.causal_conv import DepthwiseSeparableConv3d, Past, remember

ConvFactory = Callable[[int, int, int], nn.Module]  # (in_channels, out_channels, kernel) -> layer


class EdgeConv3d(nn.Conv3d):
    """3D convolution to the same length. Edge frames are repeated in time (half before and half after, or with
    ``causal`` all before), zeros are padded in space."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, groups: int = 1, causal: bool = False
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel // 2, kernel // 2), groups=groups)
        self.causal = causal

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        """``x`` "b c t h w"; ``past`` holds the k - 1 input frames before it, None at the start of a clip."""
        reach = self.kernel_size[0] - 1
        if not reach:
            return super().forward(x), None
        if not self.causal:
            side = reach // 2
            return super().forward(torch.cat([x[:, :, :1]] * side + [x] + [x[:, :, -1:]] * side, 2)), None
        x = torch.cat([x[:, :, :1]] * reach + [x] if past is None else [past, x], 2)
        return super().forward(x), remember(x, reach)


class SeparableEdgeConv3d(DepthwiseSeparableConv3d):
    """The same in two: a convolution of each channel by itself, then a 1x1x1 convolution that mixes channels.

    Causal by default, as in the released Flash-VAED student, even among convolutions that look both ways.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, causal: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel)
        self.depthwise = EdgeConv3d(in_channels, in_channels, kernel, groups=in_channels, causal=causal)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and a shortcut that is normalised and mixed where the width changes.

    Args:
        before, width: channels in and out.
        conv: makes the convolutions, with kernels of 3, and of 1 for the shortcut.
        force_skip: mix the shortcut even if the width stays: for pruned blocks, which keep one subset of the channels
            at their input and another at their output.
        eps: of the shortcut's LayerNorm.
        noise: add one random image to all frames after each convolution, scaled per channel (0.9.1). It comes from
            torch's default generator.
        modulated: scale and shift per channel after each norm (0.9.1 and later: the time embedding at timestep 0).
    """

    def __init__(
        self,
        before: int,
        width: int,
        conv: ConvFactory = EdgeConv3d,
        force_skip: bool = False,
        eps: float = 1e-6,
        noise: bool = False,
        modulated: bool = False,
    ) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(before, width, 3), conv(width, width, 3)
        self.skip_norm = self.skip = None
        if force_skip or before != width:
            self.skip_norm, self.skip = nn.LayerNorm(before, eps=eps), conv(before, width, 1)
        self.noise1 = nn.Parameter(torch.zeros(width, 1, 1)) if noise else None
        self.noise2 = nn.Parameter(torch.zeros(width, 1, 1)) if noise else None
        # Shift and scale of the first norm, then of the second.
        self.modulation = nn.Parameter(torch.zeros(4, width)) if modulated else None

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        past1, past2 = past or (None, None)
        tables = (None, None) if self.modulation is None else self.modulation.split(2)
        y, new1 = self.conv1(F.silu(modulate(rms_norm(x), tables[0])), past1, first)
        y = add_noise(y, self.noise1)
        y, new2 = self.conv2(F.silu(modulate(rms_norm(y), tables[1])), past2, first)
        y = add_noise(y, self.noise2)
        if self.skip is not None:
            x, _ = self.skip(self.skip_norm(x.movedim(1, -1)).movedim(-1, 1), None, first)
        return x + y, (new1, new2)


class Upsample(nn.Module):
    """Twice the frames, rows and columns: a convolution to 8 / ``factor`` times the channels, which become pixels.

    The first latent frame gives one frame, not two. With ``residual`` the input's own channels become pixels too, and
    are added, repeated to the width that comes out: ``channels / factor``.
    """

    def __init__(self, channels: int, factor: int = 1, residual: bool = False, conv: ConvFactory = EdgeConv3d) -> None:
        super().__init__()
        if channels % factor or 8 % factor or (residual and channels % 8):
            raise ValueError(f"{channels} channels cannot become pixels with factor {factor}, residual {residual}")
        self.conv = conv(channels, channels * 8 // factor, 3)
        self.repeats = 8 // factor if residual else 0

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        y, new = self.conv(x, past, first)
        y = to_pixels(y)
        if self.repeats:
            y = y + to_pixels(x).repeat(1, self.repeats, 1, 1, 1)
        return (y[:, :, 1:] if first else y), new


class Head(nn.Module):
    """Norm, SiLU and a convolution to RGB, with a patch of pixels folded into channels."""

    def __init__(self, width: int, out_channels: int, conv: ConvFactory = EdgeConv3d, modulated: bool = False) -> None:
        super().__init__()
        self.conv = conv(width, out_channels, 3)
        self.modulation = nn.Parameter(torch.zeros(2, width)) if modulated else None

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        return self.conv(F.silu(modulate(rms_norm(x), self.modulation)), past, first)


def rms_norm(x: Tensor) -> Tensor:
    """Every pixel's channels divided by their root mean square, in float32 at least."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    return (y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-8)).to(x.dtype)


def modulate(x: Tensor, table: Tensor | None) -> Tensor:
    """Shift ``table[0]`` and scale 1 + ``table[1]``, per channel."""
    if table is None:
        return x
    shift, scale = table.view(2, -1, 1, 1, 1)
    return x * (1 + scale) + shift


def add_noise(x: Tensor, scale: Tensor | None) -> Tensor:
    """The same image of noise in every frame of every clip, times ``scale`` per channel."""
    if scale is None:
        return x
    image = torch.randn(x.shape[-2:], device=x.device, dtype=x.dtype)
    return x + (image * scale).unsqueeze(1)


def to_pixels(x: Tensor) -> Tensor:
    """Every eight channels become two frames of two by two pixels."""
    return rearrange(x, "b (c i j k) t h w -> b c (t i) (h j) (w k)", i=2, j=2, k=2)
