"""Causal depthwise 3D convolution, forward and backward, with the frames before it given apart: nothing is concatenated.

On CUDA by Triton where that is faster than cuDNN (measured once a shape), elsewhere by torch. Depthwise convolution does 27
multiplications a value, too few for the matrix units; what it can be bound by is memory: one read and one write of the video.
Norm and SiLU before it stay a pass of their own: in the convolution they would be computed again for each of the nine values
that a program loads an output, two slow-unit instructions each, which alone would take longer than both passes.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from decoders.layers.measured import fastest, kind

Kernel = Literal["auto", "triton", "torch"]
KERNELS = ("auto", "triton", "torch")


@functools.cache
def has_triton() -> bool:
    """Whether the package is there; it comes with torch for CUDA on Linux, and not with others."""
    return importlib.util.find_spec("triton") is not None


def can_launch(x: Tensor) -> bool:
    """Whether a Triton kernel can run on ``x``: on a GPU, or anywhere by Triton's interpreter (TRITON_INTERPRET=1)."""
    return has_triton() and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def causal_depthwise3d(
    x: Float[Tensor, "b c t h w"],
    past: Float[Tensor, "_ _ _ _ _"] | None,
    weight: Float[Tensor, "_ _ kt kh kw"],
    bias: Float[Tensor, " _"] | None = None,
    kernel: Kernel = "auto",
) -> Float[Tensor, "b c t h w"]:
    """Each channel convolved by itself, to the same size: zeros around in space, ``past`` before in time.

    Args:
        past: the kt - 1 frames before ``x``, "b c kt-1 h w"; None for zeros.
        weight: "c 1 kt kh kw"; odd sizes in space, at most 5.
        bias: "c".
        kernel: "auto": the faster one of both on CUDA for this shape, torch elsewhere; "triton" or "torch": that one.

    Differentiable in all four tensors, once. Under autocast everything is cast to its type, as torch's convolutions do.
    Raises ValueError for shapes, types or devices that do not fit, and for "triton" where it cannot run.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, past, weight, bias = (None if part is None else part.to(dtype) for part in (x, past, weight, bias))
    _check(x, past, weight, bias, kernel)
    packed = weight.squeeze(1).permute(1, 2, 3, 0).contiguous()  # "kt kh kw c": a tap's channels side by side
    return torch.ops.video_decoders.depthwise3d(x, past, packed, bias, x.shape[2], 1 - weight.shape[2], kernel)


def _check(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor | None, kernel: str) -> None:
    channels, (kt, kh, kw) = x.shape[1], weight.shape[2:]
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is none of {', '.join(KERNELS)}")
    if weight.shape[:2] != (channels, 1) or not kh % 2 or not kw % 2 or max(kh, kw) > 5:
        raise ValueError(
            f"weight {tuple(weight.shape)} is no depthwise kernel of {channels} channels with 1, 3 or 5 pixels"
        )
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias is {tuple(bias.shape)}; there are {channels} channels")
    before = (x.shape[0], channels, kt - 1, *x.shape[3:])
    if past is not None and tuple(past.shape) != before:
        raise ValueError(f"past is {tuple(past.shape)}; a kernel of {kt} frames on {tuple(x.shape)} needs {before}")
    for name, part in (("past", past), ("weight", weight), ("bias", bias)):
        if part is not None and (part.dtype != x.dtype or part.device != x.device):
            raise ValueError(f"{name} is {part.dtype} on {part.device}, but x is {x.dtype} on {x.device}")
    if kernel == "triton" and not can_launch(x):
        raise ValueError(f"kernel='triton' needs a CUDA tensor and the package triton; x is on {x.device}")


# ---- the operation, opaque to torch.compile: no graph break, and capturable in a CUDA graph


@torch.library.custom_op("video_decoders::depthwise3d", mutates_args=())
def depthwise3d(
    x: Tensor, past: Tensor | None, packed: Tensor, bias: Tensor | None, frames: int, shift: int, kernel: str
) -> Tensor:
    """``frames`` outputs; tap a of output t sees frame t + a + ``shift`` of ``x``, those before 0 in ``past``."""
    return _choose(kernel, (convolve_triton, convolve_torch), (x, past, packed, bias, frames, shift))


@depthwise3d.register_fake
def _(x, past, packed, bias, frames, shift, kernel):
    b, c, _, h, w = x.shape
    return torch.empty_like(x.new_empty(b, c, frames, h, w), memory_format=torch.channels_last_3d)


@torch.library.custom_op("video_decoders::depthwise3d_weight", mutates_args=())
def depthwise3d_weight(x: Tensor, past: Tensor | None, gradient: Tensor, size: list[int], kernel: str) -> Tensor:
    """Gradient of the packed weight "kt kh kw c" of that ``size``."""
    return _choose(kernel, (weight_gradient_triton, weight_gradient_torch), (x, past, gradient, tuple(size)))


@depthwise3d_weight.register_fake
def _(x, past, gradient, size, kernel):
    return x.new_empty(*size, x.shape[1])


def _setup(ctx, inputs, output) -> None:
    x, past, packed, bias, frames, shift, kernel = inputs
    ctx.save_for_backward(x, past, packed)
    ctx.has_bias, ctx.shift, ctx.kernel = bias is not None, shift, kernel


def _backward(ctx, gradient: Tensor):
    """A convolution's input gradient is one with the kernel turned round that looks ahead; the past's is what comes before."""
    x, past, packed = ctx.saved_tensors
    before = packed.shape[0] - 1
    if ctx.shift != -before:  # not the forward pass of a convolution, but the backward pass of one
        raise ValueError("causal_depthwise3d can be differentiated once, not twice")
    wants_x, wants_past, wants_weight, wants_bias = ctx.needs_input_grad[:4]
    to_x = to_past = to_weight = to_bias = None
    if wants_x or wants_past:
        turned, both = packed.flip(0, 1, 2), past is not None and wants_past
        frames, shift = (x.shape[2] + before, -before) if both else (x.shape[2], 0)
        full = torch.ops.video_decoders.depthwise3d(gradient, None, turned, None, frames, shift, ctx.kernel)
        to_past, to_x = full.split([before, x.shape[2]], 2) if both else (None, full)
    if wants_weight:
        size = list(packed.shape[:3])
        to_weight = torch.ops.video_decoders.depthwise3d_weight(x, past, gradient, size, ctx.kernel).to(packed.dtype)
    if ctx.has_bias and wants_bias:
        to_bias = gradient.sum((0, 2, 3, 4))
    return to_x, to_past, to_weight, to_bias, None, None, None


depthwise3d.register_autograd(_backward, setup_context=_setup)


# ---- by torch


def convolve_torch(
    x: Tensor, past: Tensor | None, packed: Tensor, bias: Tensor | None, frames: int, shift: int
) -> Tensor:
    """By torch's grouped convolution, on a copy with the frames before and after."""
    kt, kh, kw, channels = packed.shape
    if past is not None:
        x, shift = torch.cat([past, x], 2), shift + kt - 1
    after = frames - 1 + kt - 1 + shift - (x.shape[2] - 1)
    if shift < 0 or after > 0:
        x = F.pad(x, (0, 0, 0, 0, max(0, -shift), max(0, after)))
    x = x[:, :, max(0, shift) : max(0, shift) + frames + kt - 1]
    weight = packed.permute(3, 0, 1, 2).unsqueeze(1)
    y = F.conv3d(x, weight, bias, padding=(0, kh // 2, kw // 2), groups=channels)
    return y.contiguous(memory_format=torch.channels_last_3d)


def weight_gradient_torch(x: Tensor, past: Tensor | None, gradient: Tensor, size: tuple[int, ...]) -> Tensor:
    """By torch's own backward pass."""
    kt, kh, kw = size
    x = F.pad(x, (0, 0, 0, 0, kt - 1, 0)) if past is None else torch.cat([past, x], 2)
    shape = (x.shape[1], 1, *size)
    found = torch.nn.grad.conv3d_weight(x, shape, gradient, padding=(0, kh // 2, kw // 2), groups=x.shape[1])
    return found.squeeze(1).permute(1, 2, 3, 0).contiguous()


# ---- by Triton


@dataclass(frozen=True)
class Launch:
    """How a convolution is cut into programs. Compilation depends on all but the rows."""

    lanes: int  # threads side by side in a row
    pixels: int  # that each of them has
    block_c: int
    warps: int
    rows: int

    @property
    def columns(self) -> int:
        return self.lanes * self.pixels

    def programs(self, shape: tuple[int, ...]) -> int:
        b, c, t, h, w = shape
        return b * t * -(-h // self.rows) * -(-w // self.columns) * -(-c // self.block_c)


def plan(shape: tuple[int, ...], kh: int, itemsize: int) -> Launch:
    """Blocks for a video "b c t h w", by arithmetic.

    A thread has 16 bytes of channels (8 in bf16) of 4 pixels, so its sums take 32 x kh registers of 255: 96 for 3 rows
    of taps, and for 5, with 2 pixels, 80. 64 threads a program; as many rows as leave about 1,600 programs (132
    multiprocessors x 4 at once x 3), because every walk loads kh - 1 rows more than it gives.
    """
    h = shape[3]
    block_c, warps = max(16, min(64, 1 << (shape[1] - 1).bit_length())), 2
    lanes = max(1, warps * 32 * 16 // (block_c * itemsize))
    cut = Launch(lanes, 4 if kh <= 3 else 2, block_c, warps, rows=h)
    return replace(cut, rows=max(min(h, kh + 1), min(32, h * cut.programs(shape) // 1600)))


def channels_last(x: Tensor) -> Tensor:
    """``x`` with its channels side by side in memory; a copy only where they are not."""
    return x if x.stride(1) == 1 and x.shape[1] > 1 else x.movedim(1, -1).contiguous().movedim(-1, 1)


def _strides(x: Tensor) -> tuple[int, ...]:
    return tuple(x.stride(axis) for axis in (0, 2, 3, 4))


def convolve_triton(
    x: Tensor, past: Tensor | None, packed: Tensor, bias: Tensor | None, frames: int, shift: int
) -> Tensor:
    """By one launch of :func:`decoders.layers.depthwise_kernels.convolve`."""
    from decoders.layers import depthwise_kernels

    x, past, packed = channels_last(x), None if past is None else channels_last(past), packed.contiguous()
    (b, c, given, h, w), (kt, kh, kw) = x.shape, packed.shape[:3]
    out = torch.empty(b, frames, h, w, c, dtype=x.dtype, device=x.device)
    cut = plan((b, c, frames, h, w), kh, x.element_size())
    before = x if past is None else past
    depthwise_kernels.convolve[(cut.programs((b, c, frames, h, w)),)](
        x, before, packed, packed if bias is None else bias, out,
        given, frames, h, w, c, shift, cut.rows, -(-h // cut.rows), *_strides(x), *_strides(before),
        KT=kt, KH=kh, KW=kw, HAS_PAST=past is not None, HAS_BIAS=bias is not None, DOUBLE=x.dtype == torch.float64,
        LANES=cut.lanes, PIXELS=cut.pixels, BLOCK_C=cut.block_c, num_warps=cut.warps,
    )  # fmt: skip
    return out.movedim(-1, 1)


def weight_gradient_triton(x: Tensor, past: Tensor | None, gradient: Tensor, size: tuple[int, ...]) -> Tensor:
    """By one launch of :func:`decoders.layers.depthwise_kernels.weight_gradient` and a sum over its chunks."""
    from decoders.layers import depthwise_kernels

    x, past, gradient = channels_last(x), None if past is None else channels_last(past), channels_last(gradient)
    (b, c, t, h, w), (kt, kh, kw) = x.shape, size
    cut = plan(tuple(x.shape), kw, x.element_size())  # a sum for each column of taps
    rows = max(1, -(-b * t * h * kt * kh * -(-c // cut.block_c) // 3200))  # about 3,200 programs
    chunks = b * t * -(-h // rows)
    precise = torch.promote_types(x.dtype, torch.float32)
    partial = torch.empty(chunks, kt, kh, kw, c, dtype=precise, device=x.device)
    before = x if past is None else past
    depthwise_kernels.weight_gradient[(chunks, kt * kh, -(-c // cut.block_c))](
        x, before, gradient, partial, t, h, w, c, rows, -(-h // rows),
        *_strides(x), *_strides(before), *_strides(gradient),
        KT=kt, KH=kh, KW=kw, HAS_PAST=past is not None, DOUBLE=x.dtype == torch.float64,
        BLOCK_W=cut.columns, BLOCK_C=cut.block_c, num_warps=cut.warps,
    )  # fmt: skip
    return partial.sum(0).to(x.dtype)


# ---- which one


def _choose(kernel: str, both: tuple[Callable, Callable], arguments: tuple) -> Tensor:
    """Run the Triton form or torch's; "auto" takes the faster one on CUDA, torch's elsewhere."""
    x = arguments[0]
    if kernel == "triton":
        return both[0](*arguments)
    if kernel == "torch" or not (x.is_cuda and has_triton()):
        return both[1](*arguments)
    ways = [functools.partial(function, *arguments) for function in both]
    return fastest((both[0].__name__, *kind(*arguments)), ways)()
