"""One decoder in a process of its own: built once, then measured when asked (see :mod:`experiments.bench`).

A process per decoder, so that peak memory is that decoder's and one that runs out of memory ends alone. All but one
wait at any time.
"""

import copy
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from decoders.inference import InferenceOptions, optimise
from experiments.bench_build import build, has_own_stream
from experiments.bench_memory import machine_busy_s, memory, peak_memory, release_memory, reset_peak
from experiments.bench_meters import Energy, OperationCounter, Operations, matmul_rate

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = {
    "contiguous": {4: torch.contiguous_format, 5: torch.contiguous_format},
    "channels_last": {4: torch.channels_last, 5: torch.channels_last_3d},
}


LONGEST_STEP = 256  # frames from one possible length of a clip to the next, at most
SEEN = 9  # pixel frames that are kept to be compared
CALIBRATION = 2  # latents of random numbers, as those that are decoded, that 8-bit scales are fixed on


@dataclass(frozen=True)
class Job:
    """What one process decodes with. ``experiment`` is a name with its overrides, or None for ``release``: a released layout
    by diffusers, or in our own code (``kind``: backbone, on the weights of diffusers' process; taehv)."""

    label: str
    experiment: tuple[str, tuple[str, ...]] | None
    release: str | None
    device: str
    dtype: str
    float32_arithmetic: bool
    layout: str
    compile: bool  # of the plain decoder's step; the optimised form has its own switch
    threads: int | None
    kind: str = "diffusers"  # of ``release``
    options: InferenceOptions | None = None  # None: the plain decoder
    references: int = 0  # frames that it is shown besides the latents
    lazy: bool = False  # built ahead of its turn on the CPU; ``settle`` then brings it to the device


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
    """A decoder on its device, plain or optimised, and how it is measured."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.device = torch.device(job.device)
        torch.manual_seed(0)
        self.model, self.space, self.multiple = build(job)
        self.parameters = sum(p.numel() for p in self.model.parameters())  # an optimised form packs them otherwise
        self.model.to(DTYPES[job.dtype])  # also of one that waits: in float32 it would hold twice as much
        release_memory(torch.device("cpu"))
        if not job.lazy:
            self.settle()

    def settle(self) -> dict[str, Any]:
        """Onto the device, and optimised there if the job says so; returns :meth:`description`."""
        job = self.job
        release_memory(self.device)
        before = memory(self.device)
        if self.device.type == "cpu":  # what was imported while building stays; what was built is counted again below
            before -= sum(p.nbytes for p in self.model.parameters())
        self.channels, self.stride_t, self.stride_hw = self.space.channels, self.space.stride_t, self.space.stride_hw
        self.model.eval().requires_grad_(False).to(self.device, DTYPES[job.dtype])
        self.arithmetic = Float32Arithmetic() if job.float32_arithmetic else nullcontext()
        can = getattr(self.model, "can_stream", True)
        self.can_stream = has_own_stream(self.model) and (can() if callable(can) else can)
        self.mode, self.arguments = "stream" if self.can_stream else "clip", {}
        self.layout = "contiguous"
        self.optimised = job.options is not None
        if self.optimised:
            latents = [self._latent((1, 3, *self._smallest()), seed) for seed in range(1, 1 + CALIBRATION)]
            self.model = optimise(self.model, job.options, latents if job.options.bits8 != "none" else ())
            self.layout = "its own"
        self.step = self.model.step_stream if self.can_stream else None
        release_memory(self.device)
        self.resident_bytes = memory(self.device)
        self.held_bytes = max(0, self.resident_bytes - before)
        self.energy = Energy(self.device)
        return self.description()

    def description(self) -> dict[str, Any]:
        if not hasattr(self, "energy"):  # not settled
            return {}
        parameters = list(self.model.parameters())
        return {
            "parameters": self.parameters,
            "weights_bytes": sum(p.nbytes for p in parameters),
            "held_bytes": self.held_bytes,  # with everything that was prepared beside the weights
            "channels": self.channels,
            "stride_t": self.stride_t,
            "stride_hw": self.stride_hw,
            "multiple": self.multiple,
            "streams": self.can_stream,
            "energy": self.energy.source,
        }

    # ---- one size

    def nearest_length(self, num_frames: int) -> int:
        """The shortest clip of this decoder's space that has at least ``num_frames``."""
        for frames in range(num_frames, num_frames + LONGEST_STEP):
            try:
                self.space.latent_frames(frames)
            except ValueError:
                continue
            return frames
        raise ValueError(f"the {self.space.name} space has no clip of {num_frames} to {frames} frames")

    @torch.no_grad()
    def prepare(
        self,
        batch_size: int,
        num_frames: int,
        size: tuple[int, int],
        mode: str | None = None,
        arguments: dict[str, Any] | None = None,
        layout: str | None = None,
    ) -> dict[str, Any]:
        """Make the latents of a size in pixels, warm up, count operations, and settle on the faster layout.

        Args:
            mode: stream or clip; None: stream where it can.
            arguments: of ``decode`` and ``start_stream``, beside the references.
            layout: None: the job's.
        """
        self.mode = mode or ("stream" if self.can_stream else "clip")
        self.size, self.num_frames = size, num_frames
        n = self.space.latent_frames(num_frames)
        self.latent = self._latent((batch_size, n, *size))
        self.arguments = dict(arguments or {}) | self._references(batch_size)
        tried: dict[str, float] = {}
        self.operations: list[Operations] = []
        for each in self._layouts(layout):
            self._lay_out(each)
            tried[each] = self._trial()
            if self.device.type == "cuda":  # convolutions try algorithms at the first sight of each shape
                self._run(self.latent)
                tried[each] = self._run(self.latent)[0][-1]
        self._lay_out(min(tried, key=tried.get))
        if self.job.compile and self.mode == "stream" and not self.optimised:
            self.step = torch.compile(self.model.step_stream)
            self._run(self.latent)
        counted = self.operations
        return {
            "layout": self.layout,
            "trial_s": tried,
            "trial_flops": sum(step.total for step in counted[:2]) if self.mode == "stream" else counted[0].total,
            "operations": [] if self.optimised else [step.numbers() for step in counted],
        }

    def _latent(self, shape: tuple[int, int, int, int], seed: int = 0) -> Tensor:
        """Clips, latent frames and pixels to a latent of random numbers, always the same."""
        b, n, *size = shape
        given = (b, self.channels, n, *(side // self.stride_hw for side in size))
        # From a CPU generator: decoders of one latent space get the same numbers, on any device.
        latent = torch.randn(given, generator=torch.Generator().manual_seed(seed))
        return latent.to(self.device, DTYPES[self.job.dtype])

    def _smallest(self) -> tuple[int, int]:
        side = -(-128 // self.multiple) * self.multiple
        return side, side

    def _references(self, batch_size: int) -> dict[str, Tensor]:
        if not self.job.references:
            return {}
        shape = (batch_size, 3, self.job.references, *self.size)
        pixels = torch.rand(shape, generator=torch.Generator().manual_seed(7)) * 2 - 1
        return {"reference": pixels.to(self.device, DTYPES[self.job.dtype])}

    def _layouts(self, wanted: str | None) -> list[str]:
        """Those to try: of convolutions both, unless one was asked for; the optimised form has chosen its own."""
        wanted = wanted or self.job.layout
        if self.optimised:
            return [self.layout]
        if not any(isinstance(module, nn.Conv3d | nn.Conv2d) for module in self.model.modules()):
            return ["contiguous"]
        return list(LAYOUTS) if wanted == "auto" else [wanted]

    def _trial(self) -> float:
        """Warm up on enough of the clip to see a first and later steps, counting operations the first time."""
        latent = self.latent[:, :, :2] if self.mode == "stream" else self.latent
        count, kept = None if self.operations or self.optimised else self.operations, []
        seconds = self._run(latent, count, kept)[0][-1]
        self.operations = self.operations or [Operations()]
        self.kept = self._seen(kept, exact=False)
        return seconds

    def _lay_out(self, layout: str) -> None:
        self.layout = layout
        if layout not in LAYOUTS:
            return
        for parameter in self.model.parameters():
            if parameter.ndim in (4, 5):
                parameter.data = parameter.data.contiguous(memory_format=LAYOUTS[layout][parameter.ndim])
        self.latent = self.latent.contiguous(memory_format=LAYOUTS[layout][5])

    def _run(self, latent: Tensor, count: list[Operations] | None = None, keep: list | None = None):
        """Seconds of each step, and how many pixel frames it gave; the frames are dropped, as after showing them.

        ``count`` takes the operations of every step, which makes them slower; ``keep`` takes the frames.
        """
        seconds: list[float] = []
        frames: list[int] = []
        size = tuple(side * self.stride_hw for side in latent.shape[3:])
        streams = self.mode == "stream"
        with self.arithmetic:
            start = self._now()
            if streams:
                state = self.model.start_stream(len(latent), *size, **self.arguments)
            for index in range(latent.shape[2] if streams else 1):
                if (parent := parent_process()) and not parent.is_alive():
                    raise EOFError
                with OperationCounter() if count is not None else nullcontext() as counter:
                    if streams:
                        video = self.step(latent[:, :, index], state)
                    else:
                        video = self.model.decode(latent, **self.arguments)
                now = self._now()
                frames.append(video.shape[1] if video.dtype == torch.uint8 else video.shape[2])
                seconds.append(now - start)
                if count is not None:
                    count.append(counter.counted())
                if keep is not None:
                    keep.append(video)
                start = now
        return seconds, frames

    @torch.no_grad()
    def look(self, exact: bool = False) -> np.ndarray:
        """The first frames that the prepared latents gave: "b t h w 3", uint8 if the decoder makes that, else float16 or, of
        float32 decoders and ``exact``, float32.

        ``exact``: by a copy of the plain decoder in float32, with the same weights.
        """
        if not exact:
            return self.kept
        own = self.model, self.arithmetic, self.step, self.arguments
        try:
            self.model, self.arithmetic = copy.deepcopy(self.model).float(), nullcontext()
            self.step = self.model.step_stream if self.can_stream else None
            given = self.arguments.items()
            self.arguments = {key: value.float() if isinstance(value, Tensor) else value for key, value in given}
            latent = (self.latent[:, :, :2] if self.mode == "stream" else self.latent).float()
            kept: list[Tensor] = []
            with tf32(False):
                self._run(latent, keep=kept)
        finally:
            self.model, self.arithmetic, self.step, self.arguments = own
        return self._seen(kept, exact=True)

    def _seen(self, videos: list[Tensor], exact: bool) -> np.ndarray:
        if videos[0].dtype == torch.uint8:
            return torch.cat(videos, 1)[:, :SEEN].cpu().numpy()
        video = torch.cat(videos, 2)[:, :, :SEEN].permute(0, 2, 3, 4, 1).float().cpu()
        return video.to(torch.float32 if exact or self.job.dtype == "fp32" else torch.float16).numpy()

    @torch.no_grad()
    def measure(self, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        """One repetition: seconds per step, peak memory beyond the weights, and the matrix product rate around it.

        ``arguments``: of ``decode`` and ``start_stream``, where they are others than was prepared for.
        """
        self.arguments |= arguments or {}
        dtype = torch.float32 if self.job.float32_arithmetic else DTYPES[self.job.dtype]
        rate = matmul_rate(self.device, dtype)
        release_memory(self.device)
        reset_peak(self.device)
        joules = self.energy.read()
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
            "reserved_bytes": torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else None,
            "matmul_flops_per_s": rate,
            "others_cpu_share": None if others is None else max(0.0, others / cores),
            "joules": self.energy.used(joules, self.energy.read()),
        }

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Float32 products and convolutions on CUDA with or without TF32, which has bf16's mantissa plus three bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
