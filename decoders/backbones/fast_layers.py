"""Layers of the optimised backbones that take the place of dense 3x3x3 convolutions and of the norms before them.

On a CPU with AVX-512 BF16 they work on frames (``decoders/layers/frames.py``), in bf16; elsewhere Winograd's convolution is
written in torch. All are ``layer(x, past, first) -> (y, new)`` as what they replace, for inference only.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from decoders.backbones import ltx_layers, magvit2_layers, wan_layers
from decoders.layers import causal_conv
from decoders.layers.causal_conv import Past
from decoders.layers.frames import LANES, FrameConv, FramePool, NormSilu, write
from decoders.layers.winograd import convolve, transformed_weight

# What stands before the first frame: zeros, that frame again, or that frame once, and the last once more at the end.
Edge = Literal["zeros", "repeat", "both"]


def edge_of(conv: nn.Module) -> Edge | None:
    """How a dense 3x3x3 convolution with stride 1 meets the ends of a clip; None for all other layers."""
    if not isinstance(conv, nn.Conv3d) or conv.kernel_size != (3, 3, 3) or conv.groups > 1 or conv.stride != (1, 1, 1):
        return None
    if type(conv) is causal_conv.CausalConv3d:
        return "zeros"
    if type(conv) is magvit2_layers.CausalConv3d:
        return "repeat" if conv.replicate else "zeros"
    if type(conv) is ltx_layers.EdgeConv3d:
        return "repeat" if conv.causal else "both"
    return None


class FastConv(nn.Module):
    """A dense convolution on frames."""

    def __init__(self, conv: nn.Conv3d, pool: FramePool, winograd: bool) -> None:
        super().__init__()
        self.edge, self.pool = edge_of(conv), pool
        self.conv = FrameConv(conv.weight, conv.bias, winograd)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        return self.run(write(x.movedim(1, -1), self.pool), past, x.shape[-2:])

    def run(self, frames: list[Tensor], past: Past, size: tuple[int, int], residual: Tensor | None = None) -> tuple:
        """``frames`` after ``past``, perhaps plus ``residual`` "b t h w o": "b o t h w" and the new past."""
        if self.edge == "both":
            given = [frames[0], *frames, frames[-1]]
            return self.conv(given[2:], tuple(given[:2]), size, residual).movedim(-1, 1), None
        before = past or ((None, None) if self.edge == "zeros" else (frames[0], frames[0]))
        y = self.conv(frames, before, size, residual).movedim(-1, 1)
        return y, (*before, *frames)[-2:]


class FastNormConv(nn.Module):
    """Norm and SiLU, written to where the convolution reads them, then the convolution."""

    def __init__(self, norm: NormSilu, conv: nn.Conv3d, pool: FramePool, winograd: bool) -> None:
        super().__init__()
        self.norm, self.conv = norm, FastConv(conv, pool, winograd)

    def forward(
        self, x: Tensor, past: Past = None, first: bool = False, residual: Tensor | None = None
    ) -> tuple[Tensor, Past]:
        frames = self.norm(x.movedim(1, -1).contiguous(), self.conv.pool)
        return self.conv.run(frames, past, x.shape[-2:], residual)


class FastResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and the shortcut, added before the last result is rounded."""

    def __init__(self, first: FastNormConv, second: FastNormConv, skip: nn.Module | None) -> None:
        super().__init__()
        self.first, self.second, self.skip = first, second, skip

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        past1, past2 = past or (None, None)
        y, new1 = self.first(x, past1, first)
        beside = x if self.skip is None else self.skip(x)[0]
        y, new2 = self.second(y, past2, first, beside.movedim(1, -1).contiguous())
        return y, (new1, new2)


class NormedSkip(nn.Module):
    """LTX's shortcut: LayerNorm over channels, then a 1x1x1 convolution."""

    def __init__(self, norm: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.norm, self.conv = norm, conv

    def forward(self, x: Tensor) -> tuple[Tensor, Past]:
        return self.conv(self.norm(x.movedim(1, -1)).movedim(-1, 1))


class WinogradConv(nn.Module):
    """A dense convolution with fewer products, in torch: for any device and dtype."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.edge = edge_of(conv)
        self.weight = nn.Parameter(transformed_weight(conv.weight).to(conv.weight.dtype), requires_grad=False)
        self.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        begin = x[:, :, :1]
        if self.edge == "both":
            return convolve(torch.cat([begin, x, x[:, :, -1:]], 2), self.weight, self.bias), None
        if past is None:
            past = (
                begin.expand(-1, -1, 2, -1, -1)
                if self.edge == "repeat"
                else x.new_zeros(begin.shape).repeat_interleave(2, 2)
            )
        x = torch.cat([past, x], 2)
        return convolve(x, self.weight, self.bias), x[:, :, -2:].clone()


class FastUpsample(nn.Module):
    """Wan's upsampling with the taps that meet one pixel added up once and not in every call."""

    def __init__(self, layer: wan_layers.Upsample) -> None:
        super().__init__()
        self.time_conv = layer.time_conv
        self.weight = nn.Parameter(wan_layers.folded_taps(layer.conv.weight).detach(), requires_grad=False)
        self.bias = nn.Parameter(layer.conv.bias.detach().repeat(4), requires_grad=False)

    forward = wan_layers.Upsample.forward

    def _enlarge(self, frames: Tensor) -> Tensor:
        return wan_layers.convolve_folded(frames, self.weight, self.bias)


# ---- replacing


def replace_layers(network: nn.Module, on_frames: bool, winograd: bool) -> int:
    """Replace in place what can be replaced in ``network``; how many convolutions were.

    Args:
        on_frames: by layers on frames: bf16 on a CPU that :func:`decoders.layers.native.missing` has nothing against.
        winograd: with fewer products.
    """
    pool, count = FramePool(), 0
    network.frame_pool = pool
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            made, number = (_on_frames(child, pool, winograd) if on_frames else (None, 0)) or (None, 0)
            if made is None and type(child) is wan_layers.Upsample:
                made = FastUpsample(child)
            if made is None and winograd and not on_frames and _plain_place(parent, child):
                made, number = WinogradConv(child), 1
            if made is not None:
                setattr(parent, name, made)
                count += number
    return count


def _plain_place(parent: nn.Module, child: nn.Module) -> bool:
    """A dense convolution that is only called as a layer. MAGVIT-v2's upsampling takes its convolution apart itself."""
    return edge_of(child) is not None and not isinstance(parent, magvit2_layers.Upsample)


def _on_frames(layer: nn.Module, pool: FramePool, winograd: bool) -> tuple[nn.Module, int] | None:
    """``layer`` on frames and how many convolutions that are, or None."""
    kind = type(layer)
    if kind in (wan_layers.ResBlock, magvit2_layers.ResBlock, ltx_layers.ResBlock):
        return _block(layer, pool, winograd)
    if kind in (wan_layers.NormConv, magvit2_layers.Head, ltx_layers.Head):
        table = getattr(layer, "modulation", None)
        norm = _norm(getattr(layer, "norm", None), layer.conv, table)
        return (FastNormConv(norm, layer.conv, pool, winograd), 1) if norm is not None else None
    if kind is ltx_layers.Upsample and _fits(layer.conv):
        layer.conv = FastConv(layer.conv, pool, winograd)
        return layer, 1
    return None


def _block(block: nn.Module, pool: FramePool, winograd: bool) -> tuple[nn.Module, int] | None:
    tables, norms, skip = (None, None), (None, None), block.skip
    if type(block) is ltx_layers.ResBlock:
        if block.noise1 is not None:  # added between convolution and norm
            return None
        tables = tables if block.modulation is None else block.modulation.split(2)
        skip = None if skip is None else NormedSkip(block.skip_norm, skip)
    else:
        norms = (block.norm1, block.norm2)
    made = [_norm(n, c, t) for n, c, t in zip(norms, (block.conv1, block.conv2), tables, strict=True)]
    if None in made:
        return None
    first, second = (
        FastNormConv(norm, conv, pool, winograd) for norm, conv in zip(made, (block.conv1, block.conv2), strict=True)
    )
    return FastResBlock(first, second, skip), 2


def _fits(conv: nn.Module) -> bool:
    return edge_of(conv) is not None and conv.in_channels % LANES == 0


def _norm(norm: nn.Module | None, conv: nn.Module, table: Tensor | None) -> NormSilu | None:
    """The norm before ``conv`` (None: LTX's, whose parameters are ``table``), if both can be on frames."""
    if not _fits(conv):
        return None
    channels = conv.in_channels
    root = channels**0.5
    if isinstance(norm, wan_layers.ChannelNorm):
        return NormSilu(norm.gain.float() * root, None, 1e-24)
    if isinstance(norm, magvit2_layers.ChannelLayerNorm):
        return NormSilu(norm.weight.float() * root, norm.bias, 1e-6 * channels, centred=True)
    if norm is not None:
        return None
    shift, scale = (None, torch.zeros(channels)) if table is None else table.float().view(2, -1)
    return NormSilu((1 + scale) * root, shift, 1e-8 * channels)
