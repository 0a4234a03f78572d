"""Kernels in C++ for CPUs with AVX-512 BF16: compiled once per machine and version, then loaded.

They need a C++ compiler (``$CXX``, else g++, else c++), as torch.compile does on a CPU. Nothing is compiled at import.
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

SOURCE = Path(__file__).parent / "convolve_bf16.cpp"
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq",
         "-mavx512bf16", "-mfma")  # fmt: skip


def missing() -> str:
    """Why the kernels cannot run here; empty where they can."""
    if not torch.cpu._is_avx512_bf16_supported():
        return "this CPU has no AVX-512 BF16"
    if compiler() is None:
        return "there is no C++ compiler; install g++ or set CXX"
    return ""


def compiler() -> str | None:
    """The C++ compiler's path, or None."""
    return next((path for name in (os.environ.get("CXX"), "g++", "c++") if name and (path := shutil.which(name))), None)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, out of the cache where they are there.

    Raises:
        RuntimeError: they cannot run here, or the compiler failed; says why.
    """
    if reason := missing():
        raise RuntimeError(f"bf16 convolution kernels cannot run: {reason}")
    # torch's own OpenMP is loaded already and has the system's name: both share one pool of threads.
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join((compiler(), *FLAGS, torch.__version__)).encode()).hexdigest()[
        :16
    ]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "video_decoders"
    path = folder / f"convolve_bf16_{key}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as building:
            made = Path(building) / path.name
            run = subprocess.run(
                [compiler(), *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, text=True, check=False
            )
            if run.returncode:
                raise RuntimeError(f"{compiler()} cannot compile {SOURCE.name}: {run.stderr.strip()[:500]}")
            made.replace(path)  # whole or not at all, if several processes build it
    return ctypes.CDLL(str(path))
