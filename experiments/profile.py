"""Where a decoder's time goes, beside its teacher's: ``python -m experiments.profile NAME [key=value ...]``.

The table that motivates Flash-VAED's choices: time, share and achieved operations per second of every named stage and of
every kind of operator, for the experiment's decoder and for the layout that it was made from, on the same latents in one
run. Weights are random, which cost as much as trained ones. The two take turns in one process; numbers are medians of
rounds. Stages and operators are timed in rounds of their own: whoever watches every operator slows the stage down.

Options are overrides under ``profile.``; all others change the experiment:

    make profile exp=flash_vaed_wan21_phase1 profile.sizes=[[480,832]] profile.dtype=fp32
"""

import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from decoders.backbones.staged import StagedDecoder
from experiments import board
from experiments.bench import check_length, choose_arithmetic, device_name, find_device, options
from experiments.bench_worker import DTYPES, LAYOUTS, Float32Arithmetic
from experiments.compose import ConfigError, run_cli
from experiments.config import build_decoder, build_space, load
from experiments.measured import heading, write
from experiments.runs import run_dir
from experiments.show import table

OUTSIDE = "between stages"  # latents denormalised, frames clamped and put together
REST = "SiLU, additions, rest"
KINDS = (
    "dense 3D convolution",
    "depthwise 3D convolution",
    "1x1 convolution",
    "2D convolution",
    "convolution in time",
    "enlarging",  # pixels repeated and convolved
    "norm",
    "attention",
    REST,
)


@dataclass
class ProfileConfig:
    """``profile.*``: what is measured and how."""

    sizes: list[list[int]] = field(default_factory=lambda: [[256, 256]])  # height, width in pixels
    num_frames: int = 9
    batch_size: int = 1
    teacher: bool = True  # beside the decoder, where it has one
    dtype: Literal["bf16", "fp32"] = "bf16"
    arithmetic: Literal["auto", "bf16", "fp32"] = "auto"  # of linear layers and convolutions, as in bench
    rounds: int = 3
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    results: str = "results"  # folder of the JSON file

    def __post_init__(self) -> None:
        for size in self.sizes:
            if len(size) != 2 or min(size) < 1:
                raise ValueError(f"profile.sizes: {size} is not [height, width]")
        if not self.sizes or min(self.num_frames, self.batch_size, self.rounds) < 1:
            raise ValueError("profile.sizes must not be empty; num_frames, batch_size and rounds must be 1 or more")
        if self.dtype == "fp32" and self.arithmetic == "bf16":
            raise ValueError("profile.arithmetic=bf16 needs profile.dtype=bf16")


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        raise ConfigError(
            "which experiment? python -m experiments.profile NAME [profile.key=value ...] [key=value ...]"
        )
    name, *overrides = arguments
    config = options([text for text in overrides if text.startswith("profile.")], ProfileConfig, "profile")
    experiment = tuple(text for text in overrides if not text.startswith("profile."))
    result = profile(name, experiment, config)
    path = write("profile", result, config.results, config.dtype)
    board.add_measurement(run_dir(name, experiment), "profile", result, report(result))
    print(report(result), f"\nwritten to {path}", sep="")


# --- running ----------------------------------------------------------------------------------------------------------


def profile(name: str, overrides: tuple[str, ...], config: ProfileConfig) -> dict[str, Any]:
    """Measure everything; the result is what the JSON file holds."""
    device = find_device(config.device, "profile")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    space = build_space(load(name, overrides))
    check_length("profile", config.num_frames, space)
    models = build(name, overrides, config)
    model = next(iter(models.values()))
    n = space.latent_frames(config.num_frames)
    arithmetic, rates = choose_arithmetic(device, config)
    for each in models.values():
        prepare(each, torch.device(device), DTYPES[config.dtype])
    sizes = []
    widened = Float32Arithmetic() if config.dtype == "bf16" and arithmetic == "fp32" else nullcontext()
    for size in config.sizes:
        sides = [-(-side // model.stride_hw) for side in size]
        latent = torch.randn(config.batch_size, model.channels, n, *sides, generator=torch.Generator().manual_seed(0))
        latent = latent.to(device, DTYPES[config.dtype])
        with widened:
            sizes.append({"size": [side * model.stride_hw for side in sides], "rows": measure(models, latent, config)})
    return {
        "experiment": name,
        "overrides": list(overrides),
        "command": " ".join(["python -m experiments.profile", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "versions": {"torch": version("torch"), "python": platform.python_version()},
        "weights": "random",
        "arithmetic": arithmetic,
        "matmul_gflops_per_s": {key: rate / 1e9 for key, rate in rates.items()},
        "options": asdict(config),
        "parameters": {label: sum(p.numel() for p in each.parameters()) for label, each in models.items()},
        "sizes": sizes,
    }


def build(name: str, overrides: tuple[str, ...], config: ProfileConfig) -> dict[str, StagedDecoder]:
    """The experiment's decoder and, where it has one, its teacher's layout, both with random weights.

    Raises:
        ConfigError: the decoder is not made of named stages.
    """
    experiment = load(name, overrides)
    model = getattr(build_decoder(experiment, build_space(experiment)), "model", None)
    if not isinstance(model, StagedDecoder):
        raise ConfigError(
            f"{name} ({experiment.family}) is not made of named stages, which is what profile tells apart; "
            f"make bench exp={name} measures it as a whole"
        )
    models = {name: model}
    layout = getattr(model, "layout", None)
    if config.teacher and layout is not None:
        from decoders.flash_vaed.teacher import load_teacher

        models["its teacher"] = load_teacher("random", layout)
    return models


def prepare(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """For inference: no gradients, weights with channels last in memory."""
    model.eval().requires_grad_(False).to(device, dtype)
    for parameter in model.parameters():
        if parameter.ndim in (4, 5):
            layout = LAYOUTS["channels_last"][parameter.ndim]
            parameter.data = parameter.data.contiguous(memory_format=layout)


def measure(models: dict[str, StagedDecoder], latent: Tensor, config: ProfileConfig) -> dict[str, dict[str, Any]]:
    """Decoder -> the same latents' seconds and operations by stage, by kind of operator and by both."""
    operations, stages, kinds = {}, {label: [] for label in models}, {label: [] for label in models}
    for label, model in models.items():  # warm-up too
        _say(f"{tuple(latent.shape)}: counting operations of {label}")
        with FlopCounterMode(display=False) as counter, watched(model, counter.get_total_flops, True) as ledger:
            model.decode(latent)
        operations[label] = ledger
    clock = _clock(latent.device)
    for number in range(config.rounds):
        for label in list(models)[:: -1 if number % 2 else 1]:
            _say(f"{tuple(latent.shape)}: round {number + 1}, {label}")
            for each, ledgers in ((False, stages), (True, kinds)):
                with watched(models[label], clock, each) as ledger:
                    models[label].decode(latent)
                ledgers[label].append(ledger)
    return {label: _row(models[label], stages[label], kinds[label], operations[label]) for label in models}


def _row(model: StagedDecoder, stages: list[Counter], kinds: list[Counter], operations: Counter) -> dict[str, Any]:
    def lines(names: Any, ledgers: list[Counter], position: int) -> dict[str, dict[str, float]]:
        sums = [_summed(ledger, position) for ledger in ledgers]
        counted = _summed(operations, position)
        return {
            name: {"s": statistics.median(each[name] for each in sums), "flops": counted[name]}
            for name in names
            if any(each[name] for each in sums)
        }

    return {
        "total_s": statistics.median(ledger.total() for ledger in stages),
        "total_s_min_max": [min(ledger.total() for ledger in stages), max(ledger.total() for ledger in stages)],
        "flops": operations.total(),
        "stages": lines((*model.stages, OUTSIDE), stages, 0),
        "operators": lines(KINDS, kinds, 1),
        "operators_of_stages": {
            f"{stage}: {kind}": statistics.median(ledger[stage, kind] for ledger in kinds)
            for stage, kind in sorted(set().union(*kinds))
        },
    }


def _summed(ledger: Counter, position: int) -> Counter:
    """Summed over the other half of (stage, kind)."""
    sums: Counter = Counter()
    for key, value in ledger.items():
        sums[key[position]] += value
    return sums


# --- watching ---------------------------------------------------------------------------------------------------------


@contextmanager
def watched(model: StagedDecoder, read: Callable[[], float], operators: bool) -> Iterator[Counter]:
    """What ``read`` grows by while ``model`` works, by (stage, kind of operator), each without what is inside it.

    Without ``operators`` only stages are watched, and all is ``REST``.
    """
    ledger: Counter = Counter()
    where = [(OUTSIDE, REST)]
    last = read()

    def charge() -> None:
        nonlocal last
        now = read()
        ledger[where[-1]] += now - last
        last = now

    def enter(stage: str | None, kind: str | None) -> None:
        charge()
        inside = where[-1]
        if inside[1] == "attention":  # with its own norm and convolutions
            kind = None
        where.append((stage or inside[0], kind or inside[1]))

    def leave() -> None:
        charge()
        where.pop()

    with ExitStack() as hooks:

        def watch(module: nn.Module, stage: str | None, kind: str | None) -> None:
            hooks.callback(module.register_forward_pre_hook(lambda *_: enter(stage, kind)).remove)
            hooks.callback(module.register_forward_hook(lambda *_: leave()).remove)

        for name, stage in model.stages.items():
            watch(stage, name, REST)
            for module in stage.modules() if operators else ():
                if (kind := kind_of(module)) is not None:
                    watch(module, None, kind)
        yield ledger
        charge()


def kind_of(module: nn.Module) -> str | None:
    """Which of ``KINDS`` a module's own work is; None for what only holds others. Activations are functions, not modules."""
    name = type(module).__name__
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        if module.groups > 1:
            return "depthwise 3D convolution"
        if max(module.kernel_size) == 1:
            return "1x1 convolution"
        if isinstance(module, nn.Conv2d):
            return "2D convolution"
        return "convolution in time" if max(module.kernel_size[1:]) == 1 else "dense 3D convolution"
    for ending, kind in (("Norm", "norm"), ("Attention", "attention"), ("Upsample", "enlarging")):
        if name.endswith(ending):
            return kind
    return None


def _clock(device: torch.device) -> Callable[[], float]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


# --- telling ----------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    """The tables of every size, as printed."""
    options = result["options"]
    machine, compute = heading(result)
    lines = [
        machine,
        f"{compute}; random weights; batch "
        f"{options['batch_size']}; {options['num_frames']} frames; medians of {options['rounds']} rounds",
    ]
    for size in result["sizes"]:
        rows = size["rows"]
        frames = options["batch_size"] * options["num_frames"]
        lines += ["", "{}x{}".format(*size["size"])]
        for label, row in rows.items():
            low, high = (frames / seconds for seconds in reversed(row["total_s_min_max"]))
            lines.append(
                f"{label}: {result['parameters'][label] / 1e6:.2f} M, {frames / row['total_s']:.3g} frames/s "
                f"({low:.3g} to {high:.3g}), {row['flops'] / row['total_s'] / 1e9:.0f} GFLOP/s"
            )
        if len(rows) > 1:
            own, teacher = (row["total_s"] for row in rows.values())
            lines.append(f"the teacher takes {teacher / own:.1f} times as long")
        for what, head in (("stages", "stage"), ("operators", "operator")):
            lines += ["", table(_table(rows, what, head))]
    return "\n".join(lines) + "\n"


def _table(rows: dict[str, dict[str, Any]], what: str, head: str) -> list[list[Any]]:
    """One line per stage or kind, four columns per decoder."""
    labels = ["", *(["teacher "] if len(rows) > 1 else [])]
    lines: list[list[Any]] = [[head, *(label + c for label in labels for c in ("ms", "share", "GFLOP", "GFLOP/s"))]]
    names = dict.fromkeys(name for row in rows.values() for name in row[what])
    for name in sorted(names, key=[*KINDS].index) if what == "operators" else names:
        line: list[Any] = [name]
        for row in rows.values():
            if (cell := row[what].get(name)) is None:
                line += ["-"] * 4
                continue
            total = sum(each["s"] for each in row[what].values())
            rate = f"{cell['flops'] / cell['s'] / 1e9:.0f}" if cell["flops"] else "-"
            line += [f"{1e3 * cell['s']:.1f}", f"{cell['s'] / total:.1%}", f"{cell['flops'] / 1e9:.2f}", rate]
        lines.append(line)
    return lines


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_cli(main)
