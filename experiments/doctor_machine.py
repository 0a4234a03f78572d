"""What `make doctor` asks the machine: versions, GPUs, all-reduce between ranks, disks, shared memory, open files, cores."""

import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed as dist
from torch import multiprocessing

GIB, MIB = 2**30, 2**20
BLOCK = 4 * MIB
PACKAGES = ("torch", "torchvision", "lightning", "decord2", "av", "numpy")
RANKS_TIMEOUT_S = 180.0
FEW_FILES = 4096  # open files below which workers that hand over tensors by file descriptor may run out


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``advice`` says what to do, where something is to be done; ``data`` are its numbers."""

    status: Literal["OK", "WARN", "FAIL"]
    what: str
    says: str
    advice: str = ""
    data: Any = None


# --- software and GPUs ------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Python's, the packages', and those of CUDA, cuDNN and NCCL that torch was built with."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    if dist.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def check_versions() -> Finding:
    """All of them, in a line; what is missing is an error."""
    found = versions()
    missing = [name for name, number in found.items() if number == "missing"]
    says = ", ".join(f"{name} {number}" for name, number in found.items())
    advice = f"pip install -r requirements.txt ({', '.join(missing)})" if missing else ""
    return Finding("FAIL" if missing else "OK", "versions", says, advice, found)


def driver() -> str:
    """The NVIDIA driver's version, or why it is not known."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return "unknown (no nvidia-smi)"
    except subprocess.TimeoutExpired:
        return "unknown (nvidia-smi does not answer)"
    lines = run.stdout.split()
    return lines[0] if run.returncode == 0 and lines else f"unknown ({(run.stderr or run.stdout).strip()[:100]})"


def check_gpus(wanted: int | None) -> Finding:
    """The GPUs of this node. ``wanted``: how many the experiment has on a node; None: it needs none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        status = "FAIL" if wanted else "OK"
        advice = ""
        if wanted:
            advice = (
                f"the experiment trains on {wanted}: run it where they are, or set trainer.accelerator=cpu to try it"
            )
        return Finding(status, "GPUs", "none that torch can use", advice, {"count": 0})
    cards, busy = [], []
    for index in range(count):
        about, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        cards.append({"name": about.name, "total_gib": total / GIB, "free_gib": free / GIB})
        if free < 0.9 * total:
            busy.append(f"GPU {index} has {free / GIB:.0f} of {total / GIB:.0f} GiB free")
    kinds = {f"{card['name']}, {card['total_gib']:.0f} GiB" for card in cards}
    says = f"{count} x {' / '.join(sorted(kinds))}; driver {driver()}"
    data = {"count": count, "cards": cards}
    if wanted and count < wanted:
        advice = f"the experiment wants {wanted} on a node: set trainer.devices={count} (fewer clips in a step)"
        return Finding("FAIL", "GPUs", says, advice, data)
    if busy:
        return Finding("WARN", "GPUs", f"{says}; {busy[0]}", "another process holds their memory: nvidia-smi", data)
    return Finding("OK", "GPUs", says, "", data)


def check_peers() -> Finding | None:
    """Whether GPUs reach one another's memory directly; None with fewer than two."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return None
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    reached = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
    says = f"{reached} of {len(pairs)} pairs reach each other's memory"
    if reached == len(pairs):
        return Finding("OK", "peer access", says)
    return Finding("WARN", "peer access", says, "gradients go through the host: nvidia-smi topo -m shows the links")


# --- all-reduce between ranks -----------------------------------------------------------------------------------------


def check_ranks(num_cpu: int, mib: int | None = None) -> Finding:
    """All-reduce between one process per GPU by NCCL; with fewer than two GPUs, ``num_cpu`` processes by gloo, on the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks, backend = (gpus, "nccl") if gpus > 1 else (num_cpu, "gloo")
    mib = mib or (256 if backend == "nccl" else 64)
    what = f"all-reduce, {ranks} ranks"
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")  # a fork of a process that has used CUDA or threads may hang
        workers = [
            context.Process(target=_reduce, args=(rank, ranks, backend, mib, folder), daemon=True)
            for rank in range(ranks)
        ]
        for worker in workers:
            worker.start()
        end = time.monotonic() + RANKS_TIMEOUT_S
        while any(worker.is_alive() for worker in workers) and time.monotonic() < end:
            if any(worker.exitcode for worker in workers):
                break  # the others wait for it in vain
            time.sleep(0.05)
        hung = time.monotonic() >= end
        for worker in workers:
            worker.kill()
            worker.join()
        reasons = [path.read_text() for path in sorted(Path(folder).glob("failed-*"))]
        result = Path(folder) / "result.json"
        if not result.is_file():
            reason = "no answer" if hung else reasons[0] if reasons else "a rank died"
            hint = "NCCL_DEBUG=INFO says why; NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 may get around it"
            if backend == "gloo":
                hint = (
                    "processes of this machine cannot talk to one another: look at the firewall and GLOO_SOCKET_IFNAME"
                )
            return Finding("FAIL", what, f"{backend}: {reason}", hint)
        data = json.loads(result.read_text())
    rate = data["bytes"] / data["median_s"]
    bus = rate * 2 * (ranks - 1) / ranks
    says = f"{backend}, {mib} MiB in {1e3 * data['median_s']:.1f} ms: {rate / 1e9:.2f} GB/s, on the bus {bus / 1e9:.2f} GB/s"
    return Finding("OK", what, says, "", {**data, "backend": backend, "ranks": ranks, "bus_gb_per_s": bus / 1e9})


def _reduce(rank: int, ranks: int, backend: str, mib: int, folder: str) -> None:
    """A rank of :func:`check_ranks`: the median of five sums of ``mib`` MiB, and whether the sum is right."""
    try:
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        where = f"file://{folder}/meeting"
        dist.init_process_group(
            backend, init_method=where, rank=rank, world_size=ranks, timeout=timedelta(seconds=RANKS_TIMEOUT_S)
        )
        values, took = torch.empty(mib * MIB // 4, device=device), []
        for attempt in range(7):
            values.fill_(rank + 1.0)
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(values)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if attempt > 1:
                took.append(time.perf_counter() - start)
        wanted = ranks * (ranks + 1) / 2
        if float(values[0]) != wanted or float(values[-1]) != wanted:
            raise RuntimeError(f"a sum came out as {float(values[0])}, not {wanted}")
        if rank == 0:
            summary = {"bytes": mib * MIB, "median_s": statistics.median(took), "all_s": took}
            (Path(folder) / "result.json").write_text(json.dumps(summary))
        dist.destroy_process_group()
    except Exception as error:  # told by the parent, in one line
        (Path(folder) / f"failed-{rank}").write_text(f"rank {rank}: {str(error).splitlines()[0][:200]}")
        raise SystemExit(1) from None


# --- disks ------------------------------------------------------------------------------------------------------------


def existing(folder: Path) -> Path:
    """``folder``, or the nearest one above it that is there."""
    while not folder.is_dir():
        folder = folder.parent
    return folder


def drop_cache(path: Path) -> None:
    """Ask the kernel to forget a file's pages, so that reading it reads the disk; where it cannot be asked, nothing happens."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_rate(paths: Iterable[Path], most: int = GIB) -> tuple[int, float]:
    """Bytes and seconds of reading files from the disk, not from memory, until ``most`` bytes are read."""
    size, seconds = 0, 0.0
    for path in paths:
        drop_cache(path)
        start = time.perf_counter()
        with open(path, "rb", buffering=0) as file:
            while size < most and (block := file.read(BLOCK)):
                size += len(block)
        seconds += time.perf_counter() - start
        if size >= most:
            break
    return size, seconds


def check_runs_disk(folder: Path, mib: int, needed: int, keep_s: str = "") -> Finding:
    """Speed and room of the disk that runs are written to. ``needed``: bytes of a run's checkpoints, 0 where none is asked about."""
    there = existing(folder)
    path = there / f".doctor-{os.getpid()}.tmp"
    room = shutil.disk_usage(there).free
    if room and mib * MIB > room / 10:  # others write there too
        says = f"{there} has {room / GIB:.1f} GiB free, of which disk_mb={mib} is too large a part to try"
        return Finding("FAIL", "disk of runs", says, "free some room, set RUNS_ROOT to a larger disk, or lower disk_mb")
    noise = os.urandom(BLOCK)  # what a file system cannot compress away, at least within a block
    try:
        try:
            start = time.perf_counter()
            with open(path, "wb", buffering=0) as file:
                for _ in range(max(1, mib * MIB // BLOCK)):
                    file.write(noise)
                os.fsync(file.fileno())
            written = path.stat().st_size / (time.perf_counter() - start)
            size, seconds = read_rate([path])
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        return Finding(
            "FAIL", "disk of runs", f"{there} cannot be written: {error.strerror}", "set RUNS_ROOT to a disk of yours"
        )
    free = shutil.disk_usage(there).free
    says = (
        f"{folder}: writes {written / 1e6:.0f} MB/s, reads {size / seconds / 1e6:.0f} MB/s, {free / GIB:.0f} GiB free"
    )
    if needed:
        says += f"; a run's checkpoints take {needed / GIB:.1f} GiB while one is written{keep_s}"
    data = {"write_mb_per_s": written / 1e6, "read_mb_per_s": size / seconds / 1e6, "free": free, "needed": needed}
    if free < needed:
        return Finding("FAIL", "disk of runs", says, "free some room, or set RUNS_ROOT to a larger disk", data)
    if free < 2 * needed:
        return Finding("WARN", "disk of runs", says, "a second run will not fit beside this one", data)
    return Finding("OK", "disk of runs", says, "", data)


# --- the rest ---------------------------------------------------------------------------------------------------------


def num_cores() -> float:
    """Cores that this process may use: those it is bound to, and no more than its control group is given."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, period = quota.read_text().split()
        if allowed != "max":
            return min(bound, int(allowed) / int(period))
    return float(bound)


def load_average() -> float:
    """How many processes wanted a core in the last minute: timings on a busy machine say so."""
    return os.getloadavg()[0]


def check_cores() -> Finding:
    """Cores and memory of the host."""
    cores, load = num_cores(), load_average()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    says = f"{cores:g} cores, load {load:.1f}; {memory:.0f} GiB of memory"
    data = {"cores": cores, "load": load, "memory_gib": memory}
    if load > 0.5 * cores:
        return Finding("WARN", "host", says, "something else is running: what is timed below is too slow", data)
    return Finding("OK", "host", says, "", data)


def check_open_files() -> Finding:
    """The limit on open files, which many workers reach."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    says = f"{soft} at most (hard limit {hard})"
    if 0 <= soft < FEW_FILES:
        return Finding("WARN", "open files", says, f"ulimit -n {min(65536, hard) if hard > 0 else 65536}", soft)
    return Finding("OK", "open files", says, "", soft)


def check_shared_memory(usual: float, most: float, folder: Path = Path("/dev/shm")) -> Finding | None:
    """Room for the batches that workers hand over, in bytes: of the mixture as it comes, and were all of the largest size."""
    if not folder.is_dir():
        return None
    free = shutil.disk_usage(folder).free
    says = f"{free / GIB:.1f} GiB free"
    data = {"free": free, "usual": usual, "most": most}
    if not most:
        return Finding("OK", "shared memory", says, "", data)
    says += f"; batches made ahead take {usual / GIB:.1f} GiB, {most / GIB:.1f} were all of the largest size"
    advice = (
        "lower data.num_workers or data.prefetch, or give /dev/shm more (docker run --shm-size, mount -o remount,size=)"
    )
    if free < usual:
        return Finding("FAIL", "shared memory", says, advice, data)
    return (
        Finding("WARN", "shared memory", says, advice, data)
        if free < most
        else Finding("OK", "shared memory", says, "", data)
    )
