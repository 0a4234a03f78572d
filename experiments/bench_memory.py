"""Memory and work of this process and of the machine, by the kernel's own counts on a CPU and by torch's on a GPU."""

import ctypes
import gc
import os
import platform
from pathlib import Path

import torch


def machine_busy_s() -> float | None:
    """Seconds that all cores together have worked since the machine started, or were taken from it; None if unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _wait, *interrupts_and_stolen = map(int, stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")


def _status() -> dict[str, int]:
    """This process's memory in bytes, by the kernel's names; empty where there is no /proc."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def memory(device: torch.device) -> int:
    """Bytes in use: by torch on a GPU, anonymous memory on a CPU (pages of libraries come and go with the kernel)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status().get("RssAnon", 0)


def release_memory(device: torch.device) -> None:
    """Give back what is not used, so that what is resident is what is held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """The highest :func:`memory` since :func:`reset_peak`; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = _status()
    if "VmHWM" not in status:
        return None
    # Pages of files only grow while a decoder runs, so what they are now is what they were at the peak.
    return status["VmHWM"] - status["RssFile"] - status.get("RssShmem", 0)
