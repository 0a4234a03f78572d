"""Kernels in C++ for CPUs with AVX-512 BF16: compiled once per machine and version, then loaded.

They need a C++ compiler (``$CXX``, else g++, else c++), as torch.compile does on a CPU. Nothing is compiled at import.
What was compiled is kept in ``$XDG_CACHE_HOME/video_decoders`` (``~/.cache/video_decoders``); where nothing can be written
or run there, in a folder of this user's own among the temporary files.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq",
         "-mavx512bf16", "-mfma")  # fmt: skip


def missing() -> str:
    """Why no kernel can run here; empty where they can."""
    if not (torch.cpu._is_avx512_supported() and torch.cpu._is_avx512_bf16_supported()):
        return "this CPU has no AVX-512 BF16"
    if compiler() is None:
        named = os.environ.get("CXX")
        return f"CXX={named} is no program here" if named else "there is no C++ compiler; install g++ or set CXX"
    return ""


def compiler() -> list[str] | None:
    """The C++ compiler's path and what ``$CXX`` gives it to begin with; None: there is none."""
    if named := shlex.split(os.environ.get("CXX", "")):
        path = shutil.which(named[0])
        return [path, *named[1:]] if path else None
    return next(([path] for name in ("g++", "c++") if (path := shutil.which(name))), None)


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """The compiled kernels of ``source``, out of the cache where they are there.

    Raises:
        RuntimeError: they cannot run here, the compiler failed, or there is no place for them; says why.
    """
    if reason := missing():
        raise RuntimeError(f"{source.name} cannot run: {reason}")
    command = [*compiler(), *FLAGS, str(source), *_openmp()]
    key = hashlib.sha256(source.read_bytes() + repr((command, torch.__version__)).encode()).hexdigest()[:16]
    failures = []
    for folder in _folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_others(folder)
            path = folder / f"{source.stem}_{key}.so"
            if not path.is_file():
                _build(command, path, source.name)
            return ctypes.CDLL(str(path))
        except OSError as error:  # not writable, full, or mounted so that nothing in it may run
            failures.append(f"{folder}: {error}")
    raise RuntimeError(f"no place for the compiled {source.name}; set XDG_CACHE_HOME ({'; '.join(failures)})")


def _openmp() -> list[str]:
    """The OpenMP that torch brings, if it does: two of them would fight for the cores."""
    root = Path(torch.__file__).parent
    folders = (root / "lib", root.parent / "torch.libs")
    return [str(found) for folder in folders for found in sorted(folder.glob("libgomp*.so*"))][:1]


def _folders() -> Iterator[Path]:
    """Where compiled kernels may be, the first that works."""
    with contextlib.suppress(RuntimeError):  # a user without a home
        yield Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "video_decoders"
    yield Path(tempfile.gettempdir()) / f"video_decoders_{os.getuid()}"


def _refuse_others(folder: Path) -> None:
    """Raises RuntimeError: a folder among the temporary files, where others could have put something that would be run."""
    about = folder.lstat()
    mine = about.st_uid == os.getuid() and not about.st_mode & 0o022 and not folder.is_symlink()
    if folder.parent == Path(tempfile.gettempdir()) and not mine:
        raise RuntimeError(f"{folder} could be written by others, so nothing in it is run; set XDG_CACHE_HOME")


def _build(command: list[str], path: Path, name: str) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as building:
        made = Path(building) / path.name
        run = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{command[0]} cannot compile {name}: {run.stderr.strip()[:500]}")
        made.replace(path)  # whole or not at all, if several processes build it
