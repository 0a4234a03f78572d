"""Linear layers and MLPs in bf16 on processors with AVX512-BF16, with the RMS norm before them (products_bf16.cpp).

torch multiplies nearly as fast; what these spare is everything between two products: a norm's passes, laying activations out once
more, the hidden layer of an MLP, which is written once and only in the layout that the next product reads, with gate and up in
float32 until then.  Weights are read where they lie.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from decoders.layers import native

SOURCE = Path(__file__).with_name("products_bf16.cpp")
EPS = 1e-6  # of the norms


def refused(weight: Tensor) -> str:
    """Why products with such weights "o i" cannot or should not run here; "" if they may."""
    if weight.device.type != "cpu":
        return f"they run on a CPU, these weights are on {weight.device.type}"
    if weight.dtype != torch.bfloat16:
        return f"they take bf16, not {weight.dtype}"
    if weight.ndim != 2 or not all(weight.shape) or any(size % 2 for size in weight.shape):
        return f"they take pairs of features, not {tuple(weight.shape)}"
    if not weight.is_contiguous() or weight.data_ptr() % 4:
        return "they read weights in pairs, row after row"
    if torch.cpu._is_amx_tile_supported():
        return "this CPU has AMX, which torch uses and which is faster"
    return native.missing()


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled kernels. RuntimeError: see :func:`decoders.layers.native.library`."""
    library = native.library(SOURCE)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    normed = [pointer, pointer, ctypes.c_float]
    library.linear_bf16.argtypes = [*normed, *[pointer] * 3, *[size] * 4, ctypes.c_int]
    library.mlp_bf16.argtypes = [*normed, *[pointer] * 4, *[size] * 5, ctypes.c_int, ctypes.c_int]
    return library


def _rows(x: Tensor, gain: Tensor | None, weights: tuple[Tensor, ...], residual: Tensor | None, out: int):
    """The operands as the kernels take them: tokens in rows, the rest contiguous. ValueError: they do not fit."""
    width = weights[0].shape[1]
    fits = x.shape[-1] == width and all(part.dtype == torch.bfloat16 and not refused(part) for part in weights)
    fits = fits and (gain is None or gain.shape == (width,)) and (residual is None or residual.shape == (*x.shape[:-1], out))
    if not fits or any(part is not None and part.dtype != torch.bfloat16 for part in (x, gain, residual)):
        shapes = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in (x, gain, *weights, residual) if part is not None)
        raise ValueError(f"no product of {shapes} (tokens, gain, weights, residual)")
    rows = x.reshape(-1, width)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    return rows, *(None if part is None else part.contiguous() for part in (gain, residual))


def _pointer(part: Tensor | None) -> int | None:
    return None if part is None else part.data_ptr()


@torch.library.custom_op("decoders::linear_cpu", mutates_args=(), device_types="cpu")
def linear(x: Tensor, gain: Tensor | None, weight: Tensor, residual: Tensor | None) -> Tensor:
    """``residual + rms_norm(x, gain) weight^T``, rounded once. All in bf16.

    Args:
        x: "... i".
        gain: " i" of the norm; None: there is no norm.
        weight: "o i".
        residual: "... o", or None.

    Returns:
        "... o".

    Raises:
        ValueError: operands that do not fit, or that :func:`refused` has something against.
        MemoryError.
    """
    out = x.new_empty(*x.shape[:-1], len(weight))
    rows, gain, residual = _rows(x, gain, (weight,), residual, len(weight))
    if not out.numel():
        return out
    failed = _library().linear_bf16(
        rows.data_ptr(), _pointer(gain), EPS, weight.data_ptr(), _pointer(residual), out.data_ptr(),
        *rows.shape[:1], rows.stride(0), rows.shape[1], len(weight), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory to lay out tokens {tuple(x.shape)}")
    return out


@torch.library.custom_op("decoders::mlp_cpu", mutates_args=(), device_types="cpu")
def mlp(x: Tensor, gain: Tensor | None, up: Tensor, down: Tensor, gated: bool) -> Tensor:
    """``hidden(rms_norm(x, gain)) down^T``, the hidden layer rounded once. All in bf16.

    Args:
        x, gain: see :func:`linear`.
        up: "h i", hidden = silu(x up^T); ``gated``: "2h i", gate before up, hidden = silu(x gate^T) * (x up^T).
        down: "o h".

    Returns:
        "... o".

    Raises:
        See :func:`linear`.
    """
    hidden, out = down.shape[1], x.new_empty(*x.shape[:-1], len(down))
    rows, gain, _ = _rows(x, gain, (up, down), None, len(down))
    if len(up) != (2 if gated else 1) * hidden:
        raise ValueError(f"hidden layers of {len(up)} and {hidden} features do not fit (gated={gated})")
    if not out.numel():
        return out
    failed = _library().mlp_bf16(
        rows.data_ptr(), _pointer(gain), EPS, up.data_ptr(), down.data_ptr(), None, out.data_ptr(),
        *rows.shape[:1], rows.stride(0), rows.shape[1], hidden, len(down), gated, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory to lay out tokens {tuple(x.shape)} and {hidden} hidden features of each")
    return out


@linear.register_fake
def _(x: Tensor, gain: Tensor | None, weight: Tensor, residual: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@mlp.register_fake
def _(x: Tensor, gain: Tensor | None, up: Tensor, down: Tensor, gated: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(down))
