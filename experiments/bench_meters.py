"""What a benchmark reads besides the clock: operations by kind, what the machine can do at most, energy.

The ceiling of a decoder is the time that its matrix products take at the machine's measured product rate plus its attention
at the measured rate of attention with heads of 64, the widest that its own shapes allow; norms, copies and launches would be
free. Rates are the best of torch's kernels and of our own, which would else come out above their ceiling.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from decoders.flashdecoder import attention
from decoders.layers import products

ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention")
HEAD_DIM = 64
# Queries and keys of the attention whose rate is the ceiling: XL at 720p has 3,600 tokens per frame and sees two frames.
ATTENTION_SIZE = {"cpu": (24, 256, 512), "cuda": (24, 3600, 7200)}
RATE_SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrices whose product is the ceiling
RAPL = Path("/sys/class/powercap")


# --- operations -------------------------------------------------------------------------------------------------------


@dataclass
class Operations:
    """Multiplications and additions, each one operation: of matrix products and convolutions, and of attention."""

    products: int = 0
    attention: int = 0
    mlp: int = 0  # of ``products``, those of the MLPs inside blocks
    linear: int = 0  # of ``products``, those of all linear layers inside blocks

    @property
    def total(self) -> int:
        return self.products + self.attention

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(*(a + b for a, b in zip(self.numbers(), other.numbers(), strict=True)))

    def times(self, number: int) -> "Operations":
        return Operations(*(number * value for value in self.numbers()))

    def numbers(self) -> tuple[int, ...]:
        return self.products, self.attention, self.mlp, self.linear


class OperationCounter:
    """Counts what runs inside ``with``, also by a CPU's own attention kernel, which torch's table lacks."""

    def __init__(self) -> None:
        table = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: self._shapes}
        self._counter = FlopCounterMode(display=False, custom_mapping=table)

    @staticmethod
    def _shapes(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **others: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def __enter__(self) -> "OperationCounter":
        self._counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._counter.__exit__(*error)

    def counted(self) -> Operations:
        by_module = self._counter.get_flop_counts()
        found = Operations()
        for kind, number in by_module.get("Global", {}).items():
            if any(name in str(kind) for name in ATTENTION):
                found.attention += number
            else:
                found.products += number
        for name, kinds in by_module.items():
            inside, _, leaf = name.rpartition(".")
            if (name.startswith("Block.") or ".blocks." in f"{inside}.") and leaf in ("gate_up", "down", "qkv", "out"):
                number = sum(kinds.values())
                found.linear += number
                found.mlp += number if leaf in ("gate_up", "down") else 0
        return found


# --- what the machine can do ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Measured operations per second; None: this machine has no such kernel."""

    products: float
    attention: float
    eight_bits: float | None
    how: dict[str, str]

    def least_seconds(self, operations: Operations, bits8: str = "none") -> float | None:
        """The ceiling's time for ``operations``; ``bits8``: none, mlp or linear, which products have eight bits."""
        narrow = {"none": 0, "mlp": operations.mlp, "linear": operations.linear}[bits8]
        if narrow and not self.eight_bits:
            return None
        seconds = (operations.products - narrow) / self.products + operations.attention / self.attention
        return seconds + (narrow / self.eight_bits if narrow else 0.0)


def measure_rates(device: torch.device, dtype: torch.dtype, float32_arithmetic: bool = False) -> Rates:
    """The best of several tries of each, on tensors that are large enough for the machine's best.

    Args:
        dtype: of the decoders. ``float32_arithmetic``: their products are computed in float32.
    """
    rates = product_rates(device, torch.float32 if float32_arithmetic else dtype, repeats=8)
    product = max(rates, key=rates.get)
    heads_rate, kernel = attention_rate(device, dtype)
    eight_bits, narrow = eight_bit_rate(device)
    return Rates(
        rates[product], heads_rate, eight_bits, {"products": product, "attention": kernel, "eight_bits": narrow}
    )


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int | None = None, repeats: int = 3) -> float:
    """Operations per second of a large matrix product, the best of ``repeats``: what no decoder here can exceed."""
    return max(product_rates(device, dtype, side, repeats).values())


def product_rates(
    device: torch.device, dtype: torch.dtype, side: int | None = None, repeats: int = 3
) -> dict[str, float]:
    """Operations per second of a large matrix product by every library that multiplies here, the best of ``repeats``."""
    side = side or RATE_SIZE[device.type]
    factor = torch.randn(side, side, device=device).to(dtype)
    ways: dict[str, Callable[[], Any]] = {"torch": lambda: factor @ factor}
    if products.usable(factor):
        ways["ours"] = lambda: products.linear_bf16(factor, factor)
    return {name: 2 * side**3 / _best(device, run, repeats) for name, run in ways.items()}


def attention_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Operations per second of unmasked attention with heads of 64, and the kernel that had it."""
    heads, queries, keys = ATTENTION_SIZE[device.type]
    query, key, value = (torch.randn(1, n, heads, HEAD_DIM, device=device, dtype=dtype) for n in (queries, keys, keys))
    count = 4 * heads * queries * keys * HEAD_DIM
    names = ("flash", "cudnn", "efficient", "cpu_bf16")
    found: dict[str, float] = {}
    for name in names:
        if attention.refused(name, query, key, value):
            continue
        try:
            found[name] = count / _best(device, lambda name=name: attention.attend(name, query, key, value))
        except RuntimeError:  # this build, this device or this dtype does not have it
            continue
    if not found:
        raise RuntimeError(f"no attention kernel runs on this {device.type} in {dtype}")
    best = max(found, key=found.get)
    return found[best], best


def eight_bit_rate(device: torch.device) -> tuple[float | None, str]:
    """Operations per second of a large 8-bit product (E4M3 on CUDA, int8 on a CPU), and by what; None where there is none."""
    side = RATE_SIZE[device.type]
    runs: dict[str, Callable[[], Any]] = {}
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 9):
            return None, "none: before compute capability 8.9 there is no FP8"
        a = torch.randn(side, side, device=device).to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        runs["torch._scaled_mm, E4M3"] = lambda: torch._scaled_mm(a, a.t(), one, one, out_dtype=torch.bfloat16)
    else:
        a = torch.randint(-127, 128, (side, side), dtype=torch.int8)
        runs["torch._int_mm, int8"] = lambda: torch._int_mm(a, a)
        runs["oneDNN, int8"] = _onednn(side)
    found: dict[str, float] = {}
    for name, run in runs.items():
        try:
            found[name] = 2 * side**3 / _best(device, run)
        except (RuntimeError, AttributeError):  # not built for this processor
            continue
    if not found:
        return None, "none: no 8-bit product of torch runs here"
    best = max(found, key=found.get)
    return found[best], best


def _onednn(side: int) -> Callable[[], Any]:
    """A prepacked linear layer: uint8 tokens, int8 weights, bf16 out."""
    ops = torch.ops.onednn
    tokens = torch.randint(0, 255, (side, side), dtype=torch.uint8)
    scales, zeros = torch.full((side,), 0.01), torch.zeros(side, dtype=torch.int64)
    packed: list[Tensor] = []

    def run() -> Any:
        if not packed:
            packed.append(
                ops.qlinear_prepack(torch.randint(-127, 128, (side, side), dtype=torch.int8), list(tokens.shape))
            )
        given = (tokens, 0.01, 128, packed[0], scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], "none")
        return ops.qlinear_pointwise(*given)

    return run


def _best(device: torch.device, run: Callable[[], Any], repeats: int = 8) -> float:
    best = float("inf")
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


# --- energy -----------------------------------------------------------------------------------------------------------


class Energy:
    """Joules that the device has used, between two calls of :meth:`read`; None where that cannot be read.

    A GPU's by its driver (its board), a CPU's by RAPL (its packages, whatever runs on them); :attr:`source` says which.
    """

    def __init__(self, device: torch.device, rapl: Path = RAPL) -> None:
        self._read = _nvml(device) if device.type == "cuda" else _rapl(rapl)
        self.source = "not readable" if self._read is None else "NVML" if device.type == "cuda" else "RAPL"

    def read(self) -> tuple[float, ...] | None:
        """What the counters say; only differences mean something."""
        return self._read() if self._read else None

    def used(
        self, before: tuple[float, ...] | None, after: tuple[float, ...] | None, span: Sequence[float] = ()
    ) -> Any:
        """Joules between two readings. A counter that went round in between is read as having done so once."""
        if before is None or after is None:
            return None
        span = span or getattr(self._read, "span", (0.0,) * len(after))
        turned = (b - a if b >= a else b - a + whole for a, b, whole in zip(before, after, span, strict=True))
        return sum(turned)


def _rapl(folder: Path) -> Any:
    """A reader of the packages' counters in joules, with ``span``, at which they begin anew; None where unreadable."""
    packages = [path for path in sorted(folder.glob("intel-rapl:*")) if path.name.count(":") == 1]
    try:
        span = tuple(float((path / "max_energy_range_uj").read_text()) / 1e6 for path in packages)
        files = [path / "energy_uj" for path in packages]
        if not files or not [file.read_text() for file in files]:
            return None
    except (OSError, ValueError):  # only root may, on most machines
        return None

    def read() -> tuple[float, ...]:
        return tuple(float(file.read_text()) / 1e6 for file in files)

    read.span = span
    return read


def _nvml(device: torch.device, library: Any = None) -> Any:
    """A reader of the GPU's energy since the driver was loaded, in joules; None where the driver does not say."""
    try:
        library = library or ctypes.CDLL("libnvidia-ml.so.1")
        handle = ctypes.c_void_p()
        uuid = f"GPU-{str(torch.cuda.get_device_properties(device).uuid).removeprefix('GPU-')}".encode()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
            return None
    except (OSError, AttributeError, RuntimeError, AssertionError):
        return None

    def read() -> tuple[float, ...] | None:
        millijoules = ctypes.c_ulonglong()
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            return None
        return (millijoules.value / 1e3,)

    return read if read() is not None else None
