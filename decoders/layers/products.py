"""Linear layers and MLPs of optimised forms, in kernels of our own on processors with AVX512-BF16 (products_bf16.cpp).

torch multiplies nearly as fast there; what is spared is everything between two products: a norm's passes, laying activations
out once more, and an MLP's hidden layer, which is written once, in the layout that the next product reads.  Biases, activations and
residuals are added in float32 before the one rounding.  Weights are read where they lie.

``prefer`` marks the layers of a module whose products shall run so; ``linear`` and ``mlp`` then take whichever way a layer has.
"""

import ctypes
import functools
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoders.layers import native

SOURCE = Path(__file__).with_name("products_bf16.cpp")
EPS = 1e-6  # of the norms
ACTIVATIONS = ("swiglu", "silu", "gelu")  # in the kernels' order
Activation = Literal["swiglu", "silu", "gelu"]


def refused(weight: Tensor, bias: Tensor | None = None) -> str:
    """Why the products of a layer's weights "o i" cannot or should not run in the kernels; "" if they may."""
    if weight.device.type != "cpu":
        return f"they run on a CPU, these weights are on {weight.device.type}"
    if any(part.dtype != torch.bfloat16 for part in (weight, bias) if part is not None):
        return f"they take bf16, not {weight.dtype}"
    if not all(weight.shape) or any(size % 2 for size in weight.shape):
        return f"they take pairs of features, not {tuple(weight.shape)}"
    if not weight.is_contiguous() or weight.data_ptr() % 4 or bias is not None and not bias.is_contiguous():
        return "they read weights in pairs, row after row"
    if torch.cpu._is_amx_tile_supported():
        return "this CPU has AMX, which torch uses and which is faster"
    return native.missing()


def usable(weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether :func:`refused` has nothing against a layer. If so the kernels are compiled now, not with the first frame.

    Raises:
        RuntimeError: they cannot be compiled, though there is a compiler; says why.
    """
    return not refused(weight, bias) and bool(_library())


def prefer(module: nn.Module, kernels: bool = True) -> None:
    """Let the products of all linear layers in ``module`` run in the kernels, those that can; or none of them.

    Raises:
        RuntimeError: see :func:`usable`.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.kernels = kernels and usable(layer.weight, layer.bias)


def _has_kernels(*layers: nn.Module) -> bool:
    return all(getattr(layer, "kernels", False) for layer in layers)


def _normed(x: Tensor, gain: Tensor | None) -> Tensor:
    return x if gain is None else F.rms_norm(x, gain.shape, gain, EPS)


def linear(layer: nn.Module, x: Tensor, gain: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """``residual + layer(rms_norm(x, gain))``, "... i" to "... o"; no norm without a gain, no sum without a residual "... o"."""
    if _has_kernels(layer):
        return linear_bf16(x, layer.weight, layer.bias, gain, residual)
    y = layer(_normed(x, gain))
    return y if residual is None else residual + y


def mlp(
    up: nn.Module, down: nn.Module, x: Tensor, gain: Tensor | None = None, activation: Activation = "swiglu"
) -> Tensor:
    """``down(activation(up(rms_norm(x, gain))))``, "... i" to "... o".

    Args:
        up: to the hidden layer; "swiglu": to gate and value, side by side, for silu(gate) * value. "gelu" is the one by tanh.
        gain: " i"; None: no norm.
    """
    if _has_kernels(up, down):
        return mlp_bf16(x, up.weight, up.bias, down.weight, down.bias, gain, activation)
    hidden = up(_normed(x, gain))
    if activation == "swiglu":
        gate, hidden = hidden.chunk(2, dim=-1)
        return down(F.silu(gate) * hidden)
    return down(F.silu(hidden) if activation == "silu" else F.gelu(hidden, approximate="tanh"))


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled kernels. RuntimeError: see :func:`decoders.layers.native.library`."""
    library = native.library(SOURCE)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    normed = [pointer, pointer, ctypes.c_float]
    library.linear_bf16.argtypes = [*normed, *[pointer] * 4, *[size] * 4, ctypes.c_int]
    library.mlp_bf16.argtypes = [*normed, *[pointer] * 5, *[size] * 5, ctypes.c_int, ctypes.c_int]
    return library


def _check(fits: bool, *operands: Tensor | None) -> None:
    """Kernels read what they are told to: nothing that does not fit, or is not bf16, may reach them."""
    given = [part for part in operands if part is not None]
    if not fits or any(part.dtype != torch.bfloat16 or part.device.type != "cpu" for part in given):
        raise ValueError(f"no product of {', '.join(f'{part.dtype} {tuple(part.shape)}' for part in given)}")


def _rows(x: Tensor) -> Tensor:
    """Tokens in rows, which may lie apart."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _at(part: Tensor | None) -> int | None:
    return None if part is None else part.data_ptr()


@torch.library.custom_op("decoders::linear_bf16", mutates_args=(), device_types="cpu")
def linear_bf16(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`linear` by the kernels, of weights that :func:`refused` has nothing against.

    Raises:
        ValueError: operands that do not fit together, or are not bf16 on a CPU.
        MemoryError.
    """
    out = x.new_empty(*x.shape[:-1], len(weight))
    fits = weight.shape[1:] == x.shape[-1:] and (gain is None or gain.shape == x.shape[-1:])
    fits = (
        fits and (bias is None or bias.shape == weight.shape[:1]) and (residual is None or residual.shape == out.shape)
    )
    _check(fits, x, gain, weight, bias, residual)
    if not out.numel():
        return out
    rows, residual = _rows(x), None if residual is None else residual.contiguous()
    failed = _library().linear_bf16(
        rows.data_ptr(), _at(gain), EPS, weight.data_ptr(), _at(bias), _at(residual), out.data_ptr(),
        len(rows), rows.stride(0), rows.shape[1], len(weight), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory to lay out tokens {tuple(x.shape)}")
    return out


@torch.library.custom_op("decoders::mlp_bf16", mutates_args=(), device_types="cpu")
def mlp_bf16(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    gain: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """:func:`mlp` by the kernels, as :func:`linear_bf16`."""
    out, hidden = x.new_empty(*x.shape[:-1], len(down)), down.shape[1]
    wide, kind = hidden * (2 if activation == "swiglu" else 1), ACTIVATIONS.index(activation)
    fits = up.shape == (wide, x.shape[-1]) and (gain is None or gain.shape == x.shape[-1:])
    fits = fits and all(bias is None or len(bias) == len(part) for bias, part in ((up_bias, up), (down_bias, down)))
    _check(fits, x, gain, up, up_bias, down, down_bias)
    if not out.numel():
        return out
    rows = _rows(x)
    failed = _library().mlp_bf16(
        rows.data_ptr(), _at(gain), EPS, up.data_ptr(), _at(up_bias), down.data_ptr(), _at(down_bias), out.data_ptr(),
        len(rows), rows.stride(0), rows.shape[1], hidden, len(down), kind, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory to lay out tokens {tuple(x.shape)} and {hidden} hidden features of each")
    return out


@linear_bf16.register_fake
def _(x, weight, bias=None, gain=None, residual=None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@mlp_bf16.register_fake
def _(x, up, up_bias, down, down_bias, gain=None, activation="swiglu") -> Tensor:
    return x.new_empty(*x.shape[:-1], len(down))
