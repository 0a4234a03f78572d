"""What VideoVAE+'s autoencoder is made of. Every layer is ``layer(x, past, first) -> (y, new)``, as in causal_conv.py.

Nothing here is causal: convolutions reach one frame ahead and norms take their statistics over the whole clip, so a layer
remembers nothing (``new`` is None), and a single frame is a clip of its own.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.backbones.wan_layers import add, repeat_and_convolve, silu
from decoders.layers.causal_conv import FrameConv2d, Past, per_frame


class GroupNorm(nn.GroupNorm):
    """Mean 0 and variance 1 over a group's channels and all frames and pixels, then a gain and a shift per channel."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-6) -> None:
        super().__init__(groups, channels, eps=eps)


class EdgeConv3d(nn.Conv3d):
    """3 x 3 x 3 convolution beside whose edges, in time and space, the outermost values go on. ``halved``: every second
    frame, of an even number; the first output is centred on the first frame."""

    def __init__(self, in_channels: int, out_channels: int, halved: bool = False) -> None:
        stride = (2, 1, 1) if halved else 1
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=1, padding_mode="replicate")

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        return super().forward(x), None


class EdgeResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): the block between latent time and frames."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(groups, channels), EdgeConv3d(channels, channels)
        self.norm2, self.conv2 = GroupNorm(groups, channels), EdgeConv3d(channels, channels)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        y, _ = self.conv1(silu(self.norm1(x)))
        y, _ = self.conv2(silu(self.norm2(y)))
        return add(y, x), None


class EdgeHead(nn.Module):
    """Norm, SiLU, convolution: the end of the encoder's temporal part."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm, self.conv = GroupNorm(groups, in_channels), EdgeConv3d(in_channels, out_channels)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        return self.conv(silu(self.norm(x)))


class DoubleFrames(nn.ConvTranspose3d):
    """Twice the frames: output 2i sees input i alone, output 2i + 1 sees i and i + 1. Zeros past all edges."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=(2, 1, 1), padding=1, output_padding=(1, 0, 0))

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        return super().forward(x), None


class AcrossFrames(nn.Module):
    """x + conv(silu(norm(x))), 3 x 3 x 3 with zeros past the edges: what follows a convolution of single frames."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.conv = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return add(self.conv(silu(self.norm(x))), x)


class ResBlock(nn.Module):
    """Norm, SiLU and a convolution of every frame, then one across frames; all that twice, around a shortcut.

    Where the width changes, the shortcut is a 1 x 1 convolution and one across frames.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(groups, in_channels), FrameConv2d(in_channels, out_channels)
        self.time1 = AcrossFrames(out_channels, groups)
        self.norm2, self.conv2 = GroupNorm(groups, out_channels), FrameConv2d(out_channels, out_channels)
        self.time2 = AcrossFrames(out_channels, groups)
        self.skip = self.skip_time = None
        if in_channels != out_channels:
            self.skip = FrameConv2d(in_channels, out_channels, 1)
            self.skip_time = AcrossFrames(out_channels, groups)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        y = self.time1(self.conv1(silu(self.norm1(x)))[0])
        y = self.time2(self.conv2(silu(self.norm2(y)))[0])
        return add(y, x if self.skip is None else self.skip_time(self.skip(x)[0])), None


class SpaceAttention(nn.Module):
    """x + single-head self-attention over the pixels of each frame."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        b, _, _, height, _ = x.shape
        pixels = rearrange(self.norm(x), "b c t y x -> (b t) 1 (y x) c")
        mixed = self.proj(F.scaled_dot_product_attention(self.q(pixels), self.k(pixels), self.v(pixels)))
        return x + rearrange(mixed, "(b t) 1 (y x) c -> b c t y x", b=b, y=height), None


class TimeAttention(nn.Module):
    """x + single-head self-attention over the frames of each pixel, with learnt vectors for distances in time.

    With q already divided by sqrt(sqrt(c)), and k too, frame i looks at frame j with
    softmax_j(q_i . k_j + q_j . K[i - j]) and reads v_j + V[j - i], where K and V are the tables of distances. It is the
    query of the *other* frame that meets the table of keys: the released weights were trained so.

    Args:
        max_distance: distances beyond so many frames are taken for this one.
    """

    def __init__(self, channels: int, groups: int, max_distance: int) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.norm = GroupNorm(groups, channels, eps=1e-5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.keys, self.values = (
            nn.Parameter(nn.init.xavier_uniform_(torch.empty(2 * max_distance + 1, channels))) for _ in range(2)
        )
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        b, _, _, height, width = x.shape
        pixels = self.norm(rearrange(x, "b c t y x -> (b y x) c t")).transpose(1, 2)
        mixed = self.proj(self._mix(*self.qkv(pixels).chunk(3, -1)))
        return x + rearrange(mixed, "(b y x) t c -> b c t y x", b=b, y=height, x=width), None

    def _mix(self, q: Float[Tensor, "p t c"], k: Float[Tensor, "p t c"], v: Float[Tensor, "p t c"]) -> Tensor:
        frames = torch.arange(q.shape[1], device=q.device)
        distance = (frames - frames[:, None]).clamp(-self.max_distance, self.max_distance) + self.max_distance
        scale = q.shape[-1] ** -0.25
        q = q * scale
        # [i, j] of distance is j - i: what frame j's query gives for frame i stands at [j, i] of this product
        others = torch.einsum("pjc,jic->pij", q, self.keys[distance].to(q.dtype))
        weights = (q @ (k * scale).transpose(1, 2) + others).float().softmax(-1).to(v.dtype)
        return weights @ v + torch.einsum("pij,ijc->pic", weights, self.values[distance].to(v.dtype))


class Upsample(nn.Module):
    """Twice the pixels of every frame: each repeated, then a 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        return per_frame(lambda frames: repeat_and_convolve(frames, self.conv.weight, self.conv.bias), x), None


class Downsample(nn.Module):
    """Half the pixels of every frame: a 3 x 3 convolution of stride 2, zeros to the right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        return per_frame(lambda frames: self.conv(F.pad(frames, (0, 1, 0, 1))), x), None


class Head(nn.Module):
    """Norm, SiLU and a convolution of every frame."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm, self.conv = GroupNorm(groups, in_channels), FrameConv2d(in_channels, out_channels)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        return self.conv(silu(self.norm(x)))
