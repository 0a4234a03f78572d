"""One decoder in a process of its own: built once, then measured when asked (see :mod:`experiments.bench`).

A process per decoder, so that peak memory is that decoder's and one that runs out of memory ends alone. All but one
wait at any time.
"""

import ctypes
import gc
import os
import platform
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from decoders.latent_spaces.base import LatentSpace
from decoders.latent_spaces.learned import Learned, LearnedConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = {
    "contiguous": {4: torch.contiguous_format, 5: torch.contiguous_format},
    "channels_last": {4: torch.channels_last, 5: torch.channels_last_3d},
}
RATE_SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrices whose product is the ceiling


@dataclass(frozen=True)
class Job:
    """What one process decodes with. ``experiment`` is a name with its overrides, or None for the peer ``release``."""

    label: str
    experiment: tuple[str, tuple[str, ...]] | None
    release: str | None
    device: str
    dtype: str
    float32_arithmetic: bool
    layout: str
    compile: bool
    threads: int | None


class Float32Arithmetic(TorchFunctionMode):
    """bf16 in memory, float32 in linear layers and convolutions: what a CPU without bf16 instructions is best at.

    Weights are widened into one buffer that is used again and again; a new one for each would cost more than the copy.
    """

    weighted = frozenset({F.linear, F.conv2d, F.conv3d})
    products = frozenset({torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__})

    def __init__(self) -> None:
        super().__init__()
        self._buffer = torch.empty(0)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.weighted and args[0].dtype != torch.float32:
            x, weight, *rest = args
            rest = [value.float() if isinstance(value, Tensor) else value for value in rest]  # the bias
            return function(x.float(), self._widened(weight), *rest, **kwargs).to(x.dtype)
        if function in self.products and args[0].dtype != torch.float32:
            return function(*(arg.float() for arg in args), **kwargs).to(args[0].dtype)
        return function(*args, **kwargs)

    def _widened(self, weight: Tensor) -> Tensor:
        if self._buffer.numel() < weight.numel():
            self._buffer = torch.empty(weight.numel())
        return self._buffer[: weight.numel()].as_strided(weight.shape, weight.stride()).copy_(weight)


def serve(connection: Connection, job: Any, make: Callable[[Any], Any] | None = None) -> None:
    """The process: build (``make`` from the job, by default a :class:`Bench`), say what was built, then answer
    ("prepare" | "measure", arguments) until told to stop."""
    try:
        if job.threads:
            torch.set_num_threads(job.threads)
        torch.backends.cudnn.benchmark = True  # every size is fixed while it is measured
        bench = (make or Bench)(job)
        connection.send(("ok", bench.description()))
        while (request := connection.recv()) is not None:
            name, arguments = request
            try:
                connection.send(("ok", getattr(bench, name)(**arguments)))
            except (torch.OutOfMemoryError, MemoryError) as error:
                connection.send(("failed", f"out of memory: {str(error).splitlines()[0]}"))
                del error
                release_memory(bench.device)
    except (EOFError, ConnectionError, KeyboardInterrupt):  # whoever asked is gone
        pass
    except Exception:
        connection.send(("error", traceback.format_exc()))


class Bench:
    """A decoder on its device, and how it is measured."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.device = torch.device(job.device)
        torch.manual_seed(0)
        self.model, self.space, self.multiple = build(job)
        self.channels, self.stride_t, self.stride_hw = self.space.channels, self.space.stride_t, self.space.stride_hw
        self.model.eval().requires_grad_(False).to(self.device, DTYPES[job.dtype])
        self.streams = getattr(self.model, "can_stream", _has_stream(self.model))
        self.step = self.model.step_stream if self.streams else None
        self.layout = "contiguous"
        self.arithmetic = Float32Arithmetic() if job.float32_arithmetic else nullcontext()
        release_memory(self.device)
        self.resident_bytes = memory(self.device)

    def description(self) -> dict[str, Any]:
        parameters = list(self.model.parameters())
        return {
            "parameters": sum(p.numel() for p in parameters),
            "weights_bytes": sum(p.nbytes for p in parameters),
            "channels": self.channels,
            "stride_t": self.stride_t,
            "stride_hw": self.stride_hw,
            "multiple": self.multiple,
            "streams": self.streams,
        }

    # ---- one size

    @torch.no_grad()
    def prepare(self, batch_size: int, num_frames: int, size: tuple[int, int]) -> dict[str, Any]:
        """Make the latents of a size in pixels, warm up, count operations, and settle on the faster layout."""
        n = self.space.latent_frames(num_frames)
        shape = (batch_size, self.channels, n, *(side // self.stride_hw for side in size))
        # From a CPU generator: decoders of one latent space get the same numbers, on any device.
        latent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.latent = latent.to(self.device, DTYPES[self.job.dtype])
        self.size, self.num_frames = size, num_frames
        has_convolutions = any(isinstance(m, nn.Conv3d | nn.Conv2d) for m in self.model.modules())
        wanted = list(LAYOUTS) if self.job.layout == "auto" else [self.job.layout]
        tried: dict[str, float] = {}
        operations: list[int] = []
        for layout in wanted if has_convolutions else ["contiguous"]:
            self._lay_out(layout)
            count = FlopCounterMode(display=False)
            with count if not operations else nullcontext():
                tried[layout] = self._run(self._trial_part)[0][-1]
            operations = operations or [count.get_total_flops()]
            if self.device.type == "cuda":  # convolutions try algorithms at the first sight of each shape
                self._run(self.latent)
                tried[layout] = self._run(self.latent)[0][-1]
        self._lay_out(min(tried, key=tried.get))
        if self.job.compile and self.streams:
            self.step = torch.compile(self.model.step_stream)
            self._run(self.latent)
        return {"layout": self.layout, "trial_s": tried, "trial_flops": operations[0]}

    @property
    def _trial_part(self) -> Tensor:
        """Enough of the clip to see a first and a later step."""
        return self.latent[:, :, :2] if self.streams else self.latent

    def _lay_out(self, layout: str) -> None:
        for parameter in self.model.parameters():
            if parameter.ndim in (4, 5):
                parameter.data = parameter.data.contiguous(memory_format=LAYOUTS[layout][parameter.ndim])
        self.latent = self.latent.contiguous(memory_format=LAYOUTS[layout][5])
        self.layout = layout

    def _run(self, latent: Tensor) -> tuple[list[float], list[int]]:
        """Seconds of each step, and how many pixel frames it gave; the frames are dropped, as after showing them."""
        seconds, frames = [], []
        with self.arithmetic:
            start = self._now()
            if not self.streams:
                frames.append(self.model.decode(latent).shape[2])
                return [self._now() - start], frames
            state = self.model.start_stream(len(latent), *self.size)
            for index in range(latent.shape[2]):
                if (parent := parent_process()) and not parent.is_alive():
                    raise EOFError
                frames.append(self.step(latent[:, :, index], state).shape[2])
                now = self._now()
                seconds.append(now - start)
                start = now
        return seconds, frames

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """One repetition: seconds per step, peak memory beyond the weights, and the matrix product rate around it."""
        dtype = torch.float32 if self.job.float32_arithmetic else DTYPES[self.job.dtype]
        rate = matmul_rate(self.device, dtype)
        release_memory(self.device)
        reset_peak(self.device)
        busy, own, start = machine_busy_s(), time.process_time(), time.perf_counter()
        seconds, frames = self._run(self.latent)
        others = None if busy is None else machine_busy_s() - busy - (time.process_time() - own)
        cores = (time.perf_counter() - start) * (os.cpu_count() or 1)
        peak = peak_memory(self.device)
        if sum(frames) != self.num_frames:
            raise RuntimeError(f"{self.job.label} gave {sum(frames)} frames in place of {self.num_frames}")
        return {
            "step_s": seconds,
            "step_frames": frames,
            "beyond_weights_bytes": None if peak is None else max(0, peak - self.resident_bytes),
            "matmul_flops_per_s": rate,
            "others_cpu_share": None if others is None else max(0.0, others / cores),
        }

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


# --- what is measured -------------------------------------------------------------------------------------------------


def build(job: Job) -> tuple[nn.Module, LatentSpace, int]:
    """The decoder with random weights, the shape of its space, and the pixels its sizes are multiples of."""
    if job.release:
        from decoders.baseline.model import DiffusersDecoder

        model = DiffusersDecoder.random(job.release)
        layout = model.layout
        space = Learned(LearnedConfig(layout.channels, layout.stride_t, layout.stride_hw))
        return model, space, layout.stride_hw
    from experiments.config import build_decoder, build_space, load

    experiment = load(job.experiment[0], job.experiment[1])
    space = build_space(experiment)
    decoder = build_decoder(experiment, space)
    # The plain network where that is what streams: no Lightning, no discriminator.
    model = decoder.model if _has_stream(getattr(decoder, "model", None)) else decoder
    for name in decoder.discriminators if model is decoder else ():
        setattr(decoder, name, None)
    return model, space, decoder.size_multiple


def _has_stream(model: Any) -> bool:
    from decoders.base import VideoDecoder

    own = getattr(type(model), "step_stream", None)
    return own is not None and own is not VideoDecoder.step_stream


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int | None = None, repeats: int = 3) -> float:
    """Operations per second of a large matrix product, the best of ``repeats``: what no decoder here can exceed."""
    side = side or RATE_SIZE[device.type]
    factor = torch.randn(side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        factor @ factor
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def machine_busy_s() -> float | None:
    """Seconds that all cores together have worked since the machine started, or were taken from it; None if unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _wait, *interrupts_and_stolen = map(int, stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")


# --- memory -----------------------------------------------------------------------------------------------------------


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
