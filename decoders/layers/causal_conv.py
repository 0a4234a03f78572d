"""Convolutions over video that look only at the past, functional in what they remember.

Every layer is called as ``layer(x, past, first) -> (y, new)``: ``past`` is what an earlier call returned as ``new``, or
None where nothing came before (zeros, as in the released Wan decoders); ``first`` says that ``x`` begins with the first
latent frame of a video. Nothing is changed in place, so a layer can be run again by activation checkpointing, and any
split of a video into calls gives the same frames.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Past = Any  # None, a tensor, or a tuple of these: whatever the layer returned last time


class CausalConv3d(nn.Conv3d):
    """3D convolution, zero-padded by k - 1 frames before and by half a kernel on each side in space."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int, int] = 3, groups: int = 1):
        kernel = (kernel,) * 3 if isinstance(kernel, int) else tuple(kernel)
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(in_channels, out_channels, kernel, padding=padding, groups=groups)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        """``x`` "b c t h w" to the same length; ``past`` holds the k - 1 input frames before it."""
        before = self.kernel_size[0] - 1
        if not before:
            return super().forward(x), None
        if past is None and x.shape[2] == 1:  # an image: all taps but the last would meet zeros
            new = torch.cat([*[torch.zeros_like(x)] * (before - 1), x], 2)  # in the memory layout of x
            y = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, 1, self.padding[1:], 1, self.groups)
            return y.unsqueeze(2), new
        x = F.pad(x, (0, 0, 0, 0, before, 0)) if past is None else torch.cat([past, x], 2)
        return super().forward(x), remember(x, before)


class DepthwiseSeparableConv3d(nn.Module):
    """A causal convolution of each channel by itself, then a 1x1x1 convolution that mixes channels; nothing in between."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int, int] = 3) -> None:
        super().__init__()
        self.depthwise = CausalConv3d(in_channels, in_channels, kernel, groups=in_channels)
        self.pointwise = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        x, new = self.depthwise(x, past, first)
        return self.pointwise(x), new


class FrameConv2d(nn.Conv2d):
    """The same 2D convolution of every frame; remembers nothing."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        return per_frame(super().forward, x), None


class Chain(nn.Module):
    """Layers one after another, each with its own past. With ``checkpointing`` every layer is run again in the backward
    pass, with the same past: exact, because layers are functional in it."""

    checkpointing = False

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
        past = past or (None,) * len(self.layers)
        new = []
        for layer, before in zip(self.layers, past, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                x, kept = checkpoint(layer, x, before, first, use_reentrant=False)
            else:
                x, kept = layer(x, before, first)
            new.append(kept)
        return x, tuple(new)


def remember(x: Tensor, frames: int) -> Tensor:
    """A copy of the last ``frames`` frames of ``x``, so that ``x`` itself can be freed."""
    return x[:, :, x.shape[2] - frames :].clone()


def per_frame(function: Any, x: Tensor) -> Tensor:
    """Apply a function of images "(b t) c h w" to a video "b c t h w"."""
    b, _, t, _, _ = x.shape
    if t == 1:  # to view one axis as two gives that of length 1 a stride that convolutions take for another layout
        return function(x[:, :, 0]).unsqueeze(2)
    frames = x.transpose(1, 2).flatten(0, 1)  # no copy where channels are last in memory
    return function(frames).unflatten(0, (b, t)).transpose(1, 2)
