"""Causal 3x3x3 convolutions of bf16 video on a CPU, on frames that lie where they were written.

A frame is "b rows columns c" with a border of zeros that nobody ever writes. A layer's norm and SiLU write straight into
frames; its convolution reads those and the two before them by their addresses, so nothing is padded or concatenated.
What was written is not written again as long as anybody else refers to it: a state that was kept stays valid.
"""

import ctypes
import sys
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decoders.layers import native
from decoders.layers.winograd import transformed_weight

SOURCE = Path(__file__).with_name("convolve_bf16.cpp")
Past = tuple[Tensor | None, Tensor | None]  # the two frames before; None: before the first, zeros
LANES = 16  # float32 numbers of a register; input channels come in multiples of it
WORK = 8 << 20  # bytes of transformed pixels at a time: they stay in a CPU's outer cache
PART = 96  # rows of a product that one thread works on: whole multiples of a kernel's 6 or 8
MOST_FRAMES = 8  # convolved at a time


class FramePool:
    """Frames to write on. One that only the pool still knows is given out again, its border still zero."""

    def __init__(self) -> None:
        self._frames: dict[tuple[int, ...], list[Tensor]] = {}

    def take(self, b: int, h: int, w: int, c: int) -> Tensor:
        frames = self._frames.setdefault((b, h, w, c), [])
        for index in range(len(frames)):
            if sys.getrefcount(frames[index]) == 2:  # the list's and the call's own
                return frames[index]
        frames.append(torch.zeros(b, h + 2 + h % 2, w + 2 + w % 2, c, dtype=torch.bfloat16))
        return frames[-1]

    def clear(self) -> None:
        """Forget all frames; those in use live as long as their users."""
        self._frames.clear()


class Shape(ctypes.Structure):
    """As in the kernels' source."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("clips", "frames", "height", "width", "row", "channels", "outputs", "block")
    ]  # fmt: skip


class FrameConv(nn.Module):
    """A causal 3x3x3 convolution's packed weights, in bf16, and its product with frames.

    Args:
        weight, bias: the convolution's; input channels a multiple of 16.
        winograd: 2.25 times fewer products, more rounding (see winograd.py).
    """

    def __init__(self, weight: Float[Tensor, "o i 3 3 3"], bias: Float[Tensor, " o"], winograd: bool) -> None:
        super().__init__()
        self.outputs, self.channels = weight.shape[:2]
        if self.channels % LANES:
            raise ValueError(f"{self.channels} input channels; these kernels take multiples of {LANES}")
        self.winograd, self.block = winograd, block_of(self.outputs)
        self.weight = nn.Parameter(pack(weight, self.block, winograd), requires_grad=False)
        self.bias = nn.Parameter(bias.detach().float().clone(), requires_grad=False)

    def forward(
        self, frames: list[Tensor], past: Past, size: tuple[int, int], residual: Tensor | None = None
    ) -> Float[Tensor, "b t h w o"]:
        """``frames`` of ``size`` (height, width) after ``past``; ``residual`` "b t h w o", contiguous, is added."""
        given = [*past, *frames]
        b, t = len(frames[0]), len(frames)
        out = frames[0].new_empty(b, t, *size, self.outputs)
        for start in range(0, t, MOST_FRAMES):
            stop = min(t, start + MOST_FRAMES)
            if (start, stop) == (0, t):
                self._run(given, size, residual, out)
                continue
            part = out[:, start:stop] if b == 1 else torch.empty_like(out[:, start:stop])
            beside = None if residual is None else residual[:, start:stop].contiguous()
            self._run(given[start : stop + 2], size, beside, part)
            if b > 1:
                out[:, start:stop] = part
        return out

    def _run(self, given: list[Tensor | None], size: tuple[int, int], residual: Tensor | None, out: Tensor) -> None:
        b, t = out.shape[:2]
        row = given[-1].shape[2]
        shape = Shape(b, t, *size, row, self.channels, self.outputs, self.block)
        pointers = addresses([[None if f is None else f[clip] for f in given] for clip in range(b)])
        threads = torch.get_num_threads()
        beside = None if residual is None else pointer(residual)
        operands = (ctypes.byref(shape), pointers, pointer(self.weight), pointer(self.bias), beside, pointer(out))
        if not self.winograd:
            sums = torch.empty(threads * size[1] * self.block)
            native.library(SOURCE).direct(*operands, pointer(sums), threads)
            return
        bytes_per_tile = 16 * (t + 2) * self.channels * 2
        part = max(24, PART // t // 24 * 24)
        tiles = min(-(-size[0] // 2) * -(-size[1] // 2), max(part * threads, WORK // bytes_per_tile // part * part))
        values = torch.empty(tiles * bytes_per_tile // 2, dtype=torch.bfloat16)
        sums = torch.empty(threads * 16 * part * t * self.block)
        c = ctypes.c_int64
        native.library(SOURCE).winograd(*operands, pointer(values), c(tiles), pointer(sums), c(part), threads)


class NormSilu(nn.Module):
    """SiLU of a norm over a pixel's channels, with sums in float32: gain (x - mean) / sqrt(sum of squares + least) + shift.

    Args:
        gain, shift: per channel; no shift: None.
        least: added to the sum of squares.
        centred: take the mean off first.
    """

    def __init__(self, gain: Float[Tensor, " c"], shift: Tensor | None, least: float, centred: bool = False) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain.detach().float().clone(), requires_grad=False)
        self.shift = None if shift is None else nn.Parameter(shift.detach().float().clone(), requires_grad=False)
        self.least, self.centred = least, centred

    def forward(self, x: Float[Tensor, "b t h w c"], pool: FramePool) -> list[Tensor]:
        """Frames of ``x``, which is contiguous."""
        b, t, h, w, c = x.shape
        frames: list[Tensor] = []
        for _ in range(t):
            frames.append(pool.take(b, h, w, c))
        long = ctypes.c_int64
        pointers = addresses([[frame[clip] for frame in frames] for clip in range(b)])
        sizes = (long(b * t), long(h), long(w), long(frames[0].shape[2]), long(c))
        shift = None if self.shift is None else pointer(self.shift)
        norm = (pointer(self.gain), shift, ctypes.c_float(self.least), int(self.centred))
        native.library(SOURCE).norm_silu(pointer(x), pointers, *norm, *sizes, torch.get_num_threads())
        return frames


def write(x: Float[Tensor, "b t h w c"], pool: FramePool) -> list[Tensor]:
    """``x`` as it is, as frames."""
    b, t, h, w, c = x.shape
    frames: list[Tensor] = []
    for i in range(t):
        frames.append(pool.take(b, h, w, c))
        frames[-1][:, 1 : h + 1, 1 : w + 1] = x[:, i]
    return frames


def block_of(outputs: int) -> int:
    """Output channels per product, 16 to 64: as few as possible that are computed for nothing, then as many at once."""
    return min((64, 48, 32, 16), key=lambda block: (-(-outputs // block) * block, -block))


def pack(weight: Float[Tensor, "o i 3 3 3"], block: int, winograd: bool) -> Tensor:
    """Weights in the order the kernels read them: per block of outputs, pairs of inputs beside each other."""
    outputs, channels = weight.shape[:2]
    if winograd:
        groups = transformed_weight(weight)  # 16, 3 i, o
    else:
        groups = weight.detach().permute(2, 3, 4, 1, 0).reshape(9, 3 * channels, outputs)
    groups = torch.nn.functional.pad(groups, (0, -outputs % block)).to(torch.bfloat16)
    return groups.unflatten(2, (-1, block)).unflatten(1, (-1, 2)).permute(3, 0, 1, 4, 2).contiguous()


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def addresses(tensors: list[list[Tensor | None]]) -> ctypes.Array:
    """A table of pointers, row by row; null for None."""
    flat = [0 if tensor is None else tensor.data_ptr() for row in tensors for tensor in row]
    return (ctypes.c_void_p * len(flat))(*flat)
