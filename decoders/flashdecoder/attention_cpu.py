"""Attention for processors with AVX512-BF16 (attention_cpu.cpp), compiled at first use by the C++ compiler of the machine.

torch's own kernel spends most of its time on the softmax between its two products; this one keeps scores in registers.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import get_default_build_root

SOURCE = Path(__file__).with_name("attention_cpu.cpp")
FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512bf16",
)
BLOCK = 64 * 64  # keys of a block times head dimension


@functools.cache
def _flags() -> frozenset[str]:
    """What the processor can do, in Linux's words; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def refused(q: Tensor) -> str:
    """Why the kernel cannot run on such queries; "" if it may."""
    if q.device.type != "cpu":
        return f"it runs on a CPU, these tensors are on {q.device.type}"
    if q.dtype != torch.bfloat16:
        return f"it takes bf16, not {q.dtype}"
    if not {"avx512_bf16", "avx512bw", "avx512vl", "avx512dq"} <= _flags():
        return "this processor has no AVX512-BF16"
    if _compiler() is None:
        return "there is no C++ compiler (g++, or what CXX names)"
    return ""


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled kernel, from the folder of torch's extensions, made there if it is not. RuntimeError: it does not compile."""
    compiler = _compiler()
    # Linked to the OpenMP that torch runs on, if it brings one: two of them would fight for the cores.
    folders = (Path(torch.__file__).parent / "lib", Path(torch.__file__).parent.parent / "torch.libs")
    openmp = [str(found) for folder in folders for found in sorted(folder.glob("libgomp*.so*"))][:1]
    command = [compiler, *FLAGS, str(SOURCE), *openmp]
    digest = hashlib.sha256(repr(command).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    target = Path(get_default_build_root()) / f"flashdecoder_attention_{digest}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            run = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
            if run.returncode != 0:
                raise RuntimeError(f"{SOURCE.name} does not compile with {compiler}: {run.stderr.strip()[-500:]}")
            made.replace(target)
    library = ctypes.CDLL(str(target))
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
