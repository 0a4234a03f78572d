"""Speed and memory of decoding, beside diffusers' Wan decoders: ``python -m experiments.bench NAME [key=value ...]``.

Everything is measured in one run on the same latents with random weights, which cost as much as trained ones: frames/s,
time to the first frame, latency of a latent frame (median and 95th percentile) and peak memory beyond the weights. Each
decoder has a process of its own; they take turns, so that whatever else the machine does is shared between them. Both
sides stream one latent frame at a time where they can, in the same precision, and a convolutional peer in the faster of
two memory layouts. How far a decoder is from the machine's own matrix product rate, measured beside it, is told too.

Options are overrides under ``bench.``; all others change the experiment:

    make bench exp=flashdecoder_xl_stage1 bench.sizes=[[480,832],[720,1280]] bench.num_frames=25 bench.dtype=bf16
"""

import math
import multiprocessing
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from decoders.inference import InferenceOptions
from decoders.latent_spaces.base import LatentSpace
from decoders.latent_spaces.learned import Learned, LearnedConfig
from experiments import board
from experiments.bench_meters import matmul_rate
from experiments.bench_table import ratio, report, summarise
from experiments.bench_worker import DTYPES, Job, serve
from experiments.compose import ConfigError, parse_overrides, run_cli
from experiments.config import build_space, load
from experiments.measured import require_folder, write
from experiments.runs import run_dir

PEERS = {"wan21": "diffusers Wan 2.1", "wan22": "diffusers Wan 2.2"}
OPTIMISED = "optimised"


@dataclass
class BenchConfig:
    """``bench.*``: what is measured and how."""

    sizes: list[list[int]] = field(default_factory=lambda: [[256, 256]])  # height, width in pixels
    num_frames: int = 17
    batch_size: int = 1
    peers: list[str] = field(default_factory=lambda: ["wan21", "wan22"])
    dtype: Literal["bf16", "fp32"] = "bf16"
    # Linear layers and convolutions of bf16 decoders: in bf16, in float32 (weights and activations stay bf16 in
    # memory), or whichever this machine multiplies matrices faster in. All decoders alike.
    arithmetic: Literal["auto", "bf16", "fp32"] = "auto"
    layout: Literal["auto", "contiguous", "channels_last"] = "auto"  # of convolutional decoders; auto tries both
    compile: bool = False  # torch.compile, of the experiment's decoder only
    # The experiment's decoder through decoders/inference.py, beside its plain form; what the last five choose is said there.
    optimise: bool = False
    graphs: bool = True
    bits8: Literal["none", "mlp", "linear"] = "none"
    attention: str = "auto"
    uint8: bool = False
    fast_convolutions: bool = False
    repeats: int = 3  # each decoder once per round
    max_minutes: float = 30.0  # no further round is begun after so long
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    results: str = "results"  # folder of the JSON file

    def __post_init__(self) -> None:
        for size in self.sizes:
            if len(size) != 2 or min(size) < 1:
                raise ValueError(f"bench.sizes: {size} is not [height, width]")
        if not self.sizes or min(self.num_frames, self.batch_size, self.repeats) < 1:
            raise ValueError("bench.sizes must not be empty; num_frames, batch_size and repeats must be 1 or more")
        for peer in self.peers:
            if peer not in PEERS:
                raise ValueError(f"bench.peers: no peer {peer}; there are {', '.join(PEERS)}")
        if self.dtype == "fp32" and self.arithmetic == "bf16":
            raise ValueError("bench.arithmetic=bf16 needs bench.dtype=bf16")
        plain = BenchConfig.__dataclass_fields__
        for name in ("graphs", "bits8", "attention", "uint8", "fast_convolutions"):
            if not self.optimise and getattr(self, name) != plain[name].default:
                raise ValueError(f"bench.{name} is an option of the optimised decoder: set bench.optimise=true")

    @property
    def options(self) -> InferenceOptions | None:
        """Of the optimised decoder; None: there is only the plain one."""
        if not self.optimise:
            return None
        return InferenceOptions(
            self.compile, self.graphs, self.bits8, self.attention, self.uint8, self.fast_convolutions
        )


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        raise ConfigError("which experiment? python -m experiments.bench NAME [bench.key=value ...] [key=value ...]")
    name, *overrides = arguments
    config = options([text for text in overrides if text.startswith("bench.")])
    experiment = tuple(text for text in overrides if not text.startswith("bench."))
    result = bench(name, experiment, config)
    marks = ["optimised"] * config.optimise + ["compiled"] * config.compile
    marks += [config.bits8] * (config.bits8 != "none")
    path = write("bench", result, config.results, config.dtype, *marks)
    board.add_measurement(run_dir(name, experiment), "bench", result, report(result))
    print(report(result), f"\nwritten to {path}", sep="")


def options(overrides: Sequence[str], schema: type = BenchConfig, group: str = "bench") -> Any:
    """``["bench.num_frames=25"]`` as checked options. Raises ConfigError."""
    values = {key.removeprefix(f"{group}."): value for key, value in parse_overrides(overrides).items()}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except (OmegaConfBaseException, ValueError) as error:
        message, key = str(error).splitlines()[0], getattr(error, "full_key", None)
        where = f"{group}.{key}: " if key else f"{group}.sizes: " if "ListConfig" in message else f"{group}: "
        raise ConfigError(message if message.startswith(f"{group}.") else f"{where}{message}") from None


def find_device(wanted: str, group: str = "bench") -> str:
    """``cpu`` or ``cuda`` for an option that may be ``auto``. Raises ConfigError where there is no such device."""
    device = wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{group}.device=cuda, but there is no CUDA device; {group}.device=cpu measures the CPU")
    return device


# --- running ----------------------------------------------------------------------------------------------------------


class Decoder:
    """A decoder in its own process, and what it has measured at each size. ``make``: see :func:`serve`."""

    def __init__(self, job: Any, make: Callable[[Any], Any] | None = None) -> None:
        self.job = job
        context = multiprocessing.get_context("spawn")  # a fork of a process that has used CUDA or threads may hang
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, job, make), daemon=True)
        self.process.start()
        theirs.close()
        self.about: dict[str, Any] = {}
        self.failed = ""
        self.told = False

    def wait_until_built(self) -> None:
        self.about = self._answer()

    def ask(self, request: str, **arguments: Any) -> Any:
        """The answer, or None when it ran out of memory (``failed`` says so)."""
        self.connection.send((request, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            status, content = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise RuntimeError(
                f"the process of {self.job.label} ended with exit code {self.process.exitcode}"
                + (": probably out of memory; try smaller bench.sizes" if self.process.exitcode == -9 else "")
            ) from None
        if status == "error":
            raise RuntimeError(f"{self.job.label}: {content}")
        self.failed = content if status == "failed" else ""
        return None if self.failed else content

    def end(self) -> None:
        """Tell it to leave, without waiting: many leave sooner together than one after another."""
        if not self.told and self.process.is_alive():
            self.told = True
            with suppress(OSError):
                self.connection.send(None)

    def close(self) -> None:
        self.end()
        if self.process.is_alive():
            self.process.join(timeout=30)
        if self.process.is_alive():
            self.process.terminate()


def bench(name: str, overrides: tuple[str, ...], config: BenchConfig) -> dict[str, Any]:
    """Measure everything; the result is what the JSON file holds."""
    space = build_space(load(name, overrides))  # a typo is refused before anything is built
    check_length("bench", config.num_frames, space)
    if config.peers:
        check_length("bench", config.num_frames, Learned(LearnedConfig(stride_t=4)))
    device = find_device(config.device)
    require_folder(config.results)
    if config.threads:
        torch.set_num_threads(config.threads)
    arithmetic, rates = choose_arithmetic(device, config)
    shared = dict(
        device=device,
        dtype=config.dtype,
        float32_arithmetic=config.dtype == "bf16" and arithmetic == "fp32",
        layout=config.layout,
        threads=config.threads,
    )
    decoders: list[Decoder] = []
    try:
        if config.optimise:
            label = f"{name} {OPTIMISED}"
            decoders.append(
                Decoder(Job(label, (name, overrides), None, compile=False, options=config.options, **shared))
            )
        compiled = config.compile and not config.optimise
        decoders.append(Decoder(Job(name, (name, overrides), None, compile=compiled, **shared)))
        for peer in config.peers:
            decoders.append(Decoder(Job(PEERS[peer], None, peer, compile=False, **shared)))
        for decoder in decoders:
            _say(f"building {decoder.job.label}")
            _wait_until_built(decoder)
        sizes = [_measure_size(decoders, config, tuple(size)) for size in config.sizes]
        about = {decoder.job.label: decoder.about for decoder in decoders}
    finally:
        for decoder in decoders:
            decoder.end()
        for decoder in decoders:
            decoder.close()
    return {
        "experiment": name,
        "overrides": list(overrides),
        "command": " ".join(["python -m experiments.bench", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "versions": {package: version(package) for package in ("torch", "diffusers")}
        | {"python": platform.python_version()},
        "weights": "random",
        "arithmetic": arithmetic,
        "matmul_gflops_per_s": {key: rate / 1e9 for key, rate in rates.items()},
        "options": asdict(config),
        "decoders": about,
        "sizes": sizes,
    }


def _wait_until_built(decoder: Decoder) -> None:
    """Raises ConfigError where a family has no such optimised form."""
    try:
        decoder.wait_until_built()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        if decoder.job.options is None or not reason.startswith("ValueError: "):
            raise
        hint = "; make bench-all measures our own backbones on its weights" if "has no optimised form" in reason else ""
        raise ConfigError(f"bench.optimise=true: {reason.removeprefix('ValueError: ')}{hint}") from None


def choose_arithmetic(device: str, config: Any) -> tuple[str, dict[str, float]]:
    """In what linear layers and convolutions compute, and the measured rates that decided it."""
    if config.dtype == "fp32" or device == "cuda":
        return config.dtype, {}
    rates = {name: matmul_rate(torch.device(device), dtype, side=512) for name, dtype in DTYPES.items()}
    return max(rates, key=rates.get) if config.arithmetic == "auto" else config.arithmetic, rates


def check_length(command: str, num_frames: int, space: LatentSpace) -> None:
    """Raise ConfigError, naming the nearest, unless ``space`` has clips of ``num_frames``."""
    try:
        space.latent_frames(num_frames)
    except ValueError as error:
        raise ConfigError(f"{command}.num_frames={num_frames}: {error}") from None


def _measure_size(decoders: list[Decoder], config: BenchConfig, size: tuple[int, int]) -> dict[str, Any]:
    """Rounds in which every decoder decodes the clip once, every other round in reverse order."""
    multiple = math.lcm(*(decoder.about["multiple"] for decoder in decoders))
    covered = tuple(-(-side // multiple) * multiple for side in size)
    rows: dict[str, dict[str, Any]] = {}
    for decoder in decoders:
        _say(f"{size[0]}x{size[1]}: warming up {decoder.job.label}")
        prepared = decoder.ask("prepare", batch_size=config.batch_size, num_frames=config.num_frames, size=covered)
        rows[decoder.job.label] = {"failed": decoder.failed, "repetitions": []} | (prepared or {})
    begun = time.monotonic()
    for number in range(config.repeats):
        if number and time.monotonic() - begun > 60 * config.max_minutes:
            _say(f"stopped after {number} rounds: bench.max_minutes={config.max_minutes:g}")
            break
        for decoder in decoders[:: -1 if number % 2 else 1]:
            row = rows[decoder.job.label]
            repetition = None if row["failed"] else decoder.ask("measure")
            row["failed"] = row["failed"] or decoder.failed
            if repetition:
                row["repetitions"].append(repetition)
                rate = config.batch_size * config.num_frames / sum(repetition["step_s"])
                _say(f"{size[0]}x{size[1]}: round {number + 1}, {decoder.job.label}: {rate:.3g} frames/s")
    for decoder in decoders:
        if decoder.job.options and (plain := rows.get(decoder.job.label.removesuffix(f" {OPTIMISED}"))):
            rows[decoder.job.label]["trial_flops"] = plain.get(
                "trial_flops", 0
            )  # those of the model, whatever it computes
    for label, row in rows.items():
        row["summary"] = summarise(row, next(d.about for d in decoders if d.job.label == label), config)
    ours, *peers = rows
    ratios = {peer: ratio(rows[ours], rows[peer]) for peer in peers}
    return {"size": list(size), "decoded_size": list(covered), "rows": rows, "ratios": ratios}


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return model[1] if model else platform.processor() or platform.machine()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_cli(main)
