"""Attention for processors with AVX512-BF16 (attention_cpu.cpp), compiled at first use by the C++ compiler of the machine.

torch's own kernel spends most of its time on the softmax between its two products; this one keeps scores in registers.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from decoders.layers import native

SOURCE = Path(__file__).with_name("attention_cpu.cpp")
BLOCK = 64 * 64  # keys of a block times head dimension


def refused(q: Tensor) -> str:
    """Why the kernel cannot run on such queries; "" if it may."""
    if q.device.type != "cpu":
        return f"it runs on a CPU, these tensors are on {q.device.type}"
    if q.dtype != torch.bfloat16:
        return f"it takes bf16, not {q.dtype}"
    return native.missing()


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled kernel. RuntimeError: see :func:`decoders.layers.native.library`."""
    library = native.library(SOURCE)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.attention_bf16.argtypes = [*[pointer] * 5, *[integer] * 5, *[ctypes.POINTER(integer)] * 3, ctypes.c_int]
    library.attention_bf16.restype = None
    return library


@torch.library.custom_op("flashdecoder::attention_cpu", mutates_args=(), device_types="cpu")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """bf16 q "b s N 64" over k, v "b m G 64" -> "b s N 64"."""
    q, k, v = (part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v))
    clips, queries, heads, dim = q.shape
    keys, groups = k.shape[1:3]
    if dim != 64 or v.shape != k.shape or k.shape[0] != clips or heads % groups or q.dtype != torch.bfloat16:
        raise ValueError(f"attention of {q.dtype} {tuple(q.shape)} over {tuple(k.shape)} and {tuple(v.shape)}")
    out = torch.empty(clips, queries, heads, dim, dtype=q.dtype)
    scratch = torch.empty(2 * clips * groups * -(-keys // 64) * BLOCK, dtype=q.dtype)
    strides = [(ctypes.c_int64 * 3)(*part.stride()[:3]) for part in (q, k, v)]
    _library().attention_bf16(
        *(part.data_ptr() for part in (q, k, v, out, scratch)),
        *(clips, queries, heads, keys, groups), *strides, torch.get_num_threads(),
    )  # fmt: skip
    return out


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
