"""Kernels of grouped-query attention without a mask, by name, and the choice among them by measuring.

All are one function: softmax(q k^T / 8) v, q "b s N d" over k, v "b m G d" (d = 64, m >= s), in the dtype of q and back as
"b s N d".  They differ in the library that computes it, in layout, and in rounding within their dtype; "triton_fp8" alone
also rounds its inputs to 8 bits, so "auto" never takes it.
"""

import importlib.util
import logging
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from decoders.flashdecoder import attention_cpu

log = logging.getLogger(__name__)

SDPA = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
EXACT = ("folded", *SDPA, "cpu_bf16", "fa3", "fa4", "triton")  # those that "auto" chooses from
NAMES = ("auto", *EXACT, "triton_fp8")
HALF = (torch.bfloat16, torch.float16)
CPU_ORDER = ("cpu_bf16", "folded", "flash", "math")  # usually the fastest first
CLEARLY = 0.8  # of the time that one earlier in that order takes: less than noise makes of two that are alike
SCORES_LIMIT = 2**28  # bytes of scores above which "math", which writes them all, is not tried
MODULES = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute", "triton": "triton", "triton_fp8": "triton"}

Shape = tuple[int, int, int, int, int]  # clips, queries, query heads, keys, groups
Choices = dict[tuple[Shape, torch.dtype, str], str]


def _folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A group's heads as more rows of one head: keys and values are read once a group, and nothing is repeated."""
    rows = rearrange(q, "b s (G r) d -> b G (r s) d", G=k.shape[2])
    mixed = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2))
    return rearrange(mixed, "b G (r s) d -> b s (G r) d", s=q.shape[1])


def _sdpa(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One backend of torch's attention; those without groups get keys and values repeated."""
    grouped = q.shape[2] != k.shape[2]
    if grouped and (name == "efficient" or q.device.type == "cpu"):
        k, v = (part.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for part in (k, v))
        grouped = False
    with sdpa_kernel(SDPA[name]):
        mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), enable_gqa=grouped)
    return mixed.transpose(1, 2)


@torch.library.custom_op("flashdecoder::flash_attention_3", mutates_args=(), device_types="cuda")
def _fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v)  # older releases answer with (out, log-sum-exp)
    return out[0] if isinstance(out, tuple) else out


@torch.library.custom_op("flashdecoder::flash_attention_4", mutates_args=(), device_types="cuda")
def _fa4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out


@_fa3.register_fake
@_fa4.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, scales=None) -> Tensor:
    """Attention by the kernel of this name (none of them "auto"); ``scales`` are those of "triton_fp8"."""
    if name == "folded":
        return _folded(q, k, v)
    if name == "cpu_bf16":
        return attention_cpu.attend(q, k, v)
    if name in SDPA:
        return _sdpa(name, q, k, v)
    if name == "fa3":
        return _fa3(q, k, v)
    if name == "fa4":
        return _fa4(q, k, v)
    from decoders.flashdecoder import attention_fp8

    if name == "triton":
        return attention_fp8.attend_triton(q, k, v)
    if name == "triton_fp8":
        return attention_fp8.attend_triton_fp8(q, k, v, scales)
    raise ValueError(f"attention={name!r} is none of {', '.join(NAMES)}")


def refused(name: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why this kernel cannot run on such tensors, as far as that is known without running it; "" if it may."""
    if name == "cpu_bf16":
        return attention_cpu.refused(q)
    cuda, half = q.device.type == "cuda", q.dtype in HALF
    if name in MODULES and importlib.util.find_spec(MODULES[name].partition(".")[0]) is None:
        return f"the package of {MODULES[name]} is not installed"
    if name == "fa4" and importlib.util.find_spec(MODULES["fa4"]) is None:
        return "this flash_attn has no flash_attn.cute"
    if name in ("cudnn", "efficient", *MODULES) and not cuda:
        return f"it runs on CUDA, these tensors are on {q.device.type}"
    if name in ("cudnn", "fa3", "fa4", "triton") and not half or name == "flash" and cuda and not half:
        return f"it takes bf16 or fp16, not {q.dtype}"
    if name == "math" and q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] * q.element_size() > SCORES_LIMIT:
        return "it would write the whole score matrix"
    if name in ("triton", "triton_fp8"):
        from decoders.flashdecoder import attention_fp8

        return attention_fp8.refused(q, k, v, fp8=name == "triton_fp8")
    return ""


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def measure(q: Tensor, k: Tensor, v: Tensor, rounds: int = 5) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of every exact kernel that runs on such tensors, and the reasons of the others.

    The least of several turns, after one that is not counted: other work on the machine only ever adds.
    """
    seconds, reasons = {}, {}
    for turn in range(rounds + 1):
        for name in EXACT if turn == 0 else list(seconds):
            if reason := refused(name, q, k, v):
                reasons[name] = reason
                continue
            try:
                spent = _seconds(lambda name=name: attend(name, q, k, v), q.device)
            except (RuntimeError, ImportError, TypeError) as error:  # a library lacks this case
                reasons[name] = (str(error).splitlines() or [type(error).__name__])[0]
                seconds.pop(name, None)
                if q.device.type == "cpu":  # what is missing here was said by refused
                    log.warning("attention %s does not run and is not used: %s", name, reasons[name])
                continue
            seconds[name] = spent if turn <= 1 else min(spent, seconds[name])
    return seconds, reasons


def _best(seconds: dict[str, float], device: torch.device) -> str:
    """The fastest; on a CPU, whose times are noisy, the first of ``CPU_ORDER`` that none is clearly faster than."""
    least = min(seconds.values())
    order = [name for name in CPU_ORDER if name in seconds] if device.type == "cpu" else []
    return next((name for name in order if least >= CLEARLY * seconds[name]), min(seconds, key=seconds.get))


def choose(name: str, shape: Shape, dtype: torch.dtype, device: torch.device, choices: Choices) -> str:
    """The kernel for this shape: ``name`` itself if it can run, for "auto" the fastest by measuring, once a shape.

    ``choices`` is where earlier answers are kept.  ValueError: an unknown name, or one that cannot run, with the reason.
    """
    if name not in NAMES:
        raise ValueError(f"attention={name!r} is none of {', '.join(NAMES)}")
    key = (shape, dtype, str(device))
    if key in choices:
        return choices[key]
    clips, queries, heads, keys, groups = shape
    draw = torch.Generator(device).manual_seed(0)  # the caller's random numbers stay as they are
    sizes = ((queries, heads), (keys, groups), (keys, groups))
    q, k, v = (torch.randn(clips, *size, 64, device=device, dtype=dtype, generator=draw) for size in sizes)
    if name != "auto":
        if reason := refused(name, q, k, v):
            raise ValueError(f"attention={name} cannot run here: {reason}")
        choices[key] = name
        return name
    seconds, reasons = measure(q, k, v)
    if not seconds:
        raise ValueError(f"no attention kernel runs on {shape} in {dtype}: {reasons}")
    choices[key] = _best(seconds, device)
    listed = ", ".join(f"{found} {1e3 * value:.3f} ms" for found, value in sorted(seconds.items(), key=lambda x: x[1]))
    log.info("attention %s %s: %s (%s)", shape, dtype, choices[key], listed)
    return choices[key]
