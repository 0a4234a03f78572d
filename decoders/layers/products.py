"""Linear layers and MLPs of optimised forms, in kernels of our own on processors with AVX512-BF16 (products_bf16.cpp).

torch multiplies nearly as fast there; what is spared is everything between two products: a norm's passes, laying activations
out once more, and an MLP's hidden layer, which is written once, in the layout that the next product reads.  Biases, activations and
residuals are computed in float32 on a product's sums, which are rounded once.  Weights are read where they lie.

``prefer`` marks the layers of a module whose products shall run so; ``linear`` and ``mlp`` then take whichever way a layer has:
by itself while it has hooks, and once it is no longer bf16 on a CPU.
"""

import ctypes
import functools
import logging
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoders.layers import native

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("products_bf16.cpp")
EPS = 1e-6  # of the norms
ACTIVATIONS = ("swiglu", "silu", "gelu")  # in the kernels' order
Activation = Literal["swiglu", "silu", "gelu"]


def refused(weight: Tensor, bias: Tensor | None = None) -> str:
    """Why the products of a layer's weights "o i" cannot or should not run in the kernels; "" if they may."""
    if weight.device.type != "cpu":
        return f"they run on a CPU, these weights are on {weight.device.type}"
    for part in (weight, bias):
        if part is not None and part.dtype != torch.bfloat16:
            return f"they take bf16, not {part.dtype}"
    if not all(weight.shape) or any(size % 2 for size in weight.shape):
        return f"they take pairs of features, not {tuple(weight.shape)}"
    if not weight.is_contiguous() or weight.data_ptr() % 4 or bias is not None and not bias.is_contiguous():
        return "they read weights in pairs, row after row"
    if torch.cpu._is_amx_tile_supported():
        return "this CPU has AMX, which torch uses and which is faster"
    return native.missing()


def usable(weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether :func:`refused` has nothing against a layer. If so the kernels are compiled now, not with the first frame; a
    compiler that cannot do it is told once, and torch multiplies."""
    return not refused(weight, bias) and not _not_compiled()


@functools.cache
def _not_compiled() -> str:
    """Why the kernels could not be compiled, though there is a compiler; "" if they were."""
    try:
        _library()
    except RuntimeError as error:
        log.warning("products run in torch's kernels, which are slower: %s", error)
        return str(error)
    return ""


def prefer(module: nn.Module) -> None:
    """Let the products of all linear layers in ``module`` run in the kernels, those that are :func:`usable`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            plain = type(layer).forward is nn.Linear.forward  # a subclass may do more than multiply
            layer.kernels = plain and usable(layer.weight, layer.bias)


def still_fit(part: Tensor) -> bool:
    """Whether what was :func:`usable` still is: a module may have been moved or converted since."""
    return part.dtype == torch.bfloat16 and part.device.type == "cpu"


def _has_kernels(*layers: nn.Module) -> bool:
    """Those that somebody watches run by themselves: hooks, 8-bit calibration's among them, see nothing of a kernel."""
    return all(
        getattr(layer, "kernels", False)
        and still_fit(layer.weight)
        and not layer._forward_pre_hooks
        and not layer._forward_hooks
        for layer in layers
    )


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
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is none of {', '.join(ACTIVATIONS)}")
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


def _check(fits: bool, others: tuple[Tensor | None, ...], *layers: tuple[Tensor, Tensor | None]) -> None:
    """Kernels read what they are told to: nothing that does not fit, is not bf16, or lies otherwise, may reach them."""
    read = [part for layer in layers for part in layer if part is not None]
    given = [part for part in others if part is not None] + read
    fits = fits and all(not size % 2 and size for weight, _ in layers for size in weight.shape)
    fits = fits and all(bias is None or bias.shape == weight.shape[:1] for weight, bias in layers)
    if not fits or not all(part.is_contiguous() for part in read) or not all(still_fit(part) for part in given):
        about = (f"{part.dtype} {tuple(part.shape)} of strides {part.stride()}" for part in given)
        raise ValueError(f"no product of {', '.join(about)}")


def _rows(x: Tensor) -> Tensor:
    """Tokens in rows, which may lie apart."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _whole(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.contiguous()


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
        ValueError: operands that do not fit together, are not bf16 on a CPU, or weights that are refused.
        MemoryError.
    """
    out = x.new_empty(*x.shape[:-1], len(weight))
    fits = weight.shape[1:] == x.shape[-1:] and (gain is None or gain.shape == x.shape[-1:])
    _check(fits and (residual is None or residual.shape == out.shape), (x, gain, residual), (weight, bias))
    if not out.numel():
        return out
    rows, gain, residual = _rows(x), _whole(gain), _whole(residual)
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
    _check(fits, (x, gain), (up, up_bias), (down, down_bias))
    if not out.numel():
        return out
    rows, gain = _rows(x), _whole(gain)
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
