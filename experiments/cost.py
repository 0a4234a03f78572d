"""What a run costs: operations of a training step, the rate a device could do them at, and hours told before they are spent.

Model FLOPs utilisation (MFU) is the share of a device's peak that the decoder's own network uses: its forward and backward
pass, counted without what activation checkpointing computes again. The frozen encoder, networks of the losses and a
discriminator are not counted, so a device is always busier than its MFU says.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Trainer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from datamodules.batch import VideoBatch
from experiments import runs, show
from experiments.bench_worker import matmul_rate
from experiments.config import Experiment, as_dict, build_decoder, streams, with_defaults

Shape = tuple[int, ...]

# Keys that change neither the work of a step nor the number of its clips: runs that differ in these alone cost the same a step.
SAME_COST = (
    "seed",
    "init_from",
    "allow_unfinished_parent",
    "optim.*",
    "trainer.max_steps",
    "trainer.max_minutes",
    "trainer.budget_minutes",
    "trainer.val_every_steps",
    "trainer.num_sanity_val_steps",
)


# --- operations -------------------------------------------------------------------------------------------------------


def batch_shape(batch: VideoBatch) -> Shape:
    """What tells a batch's cost: the shape of its video, or of its latent where it has none."""
    return tuple(batch["video"].shape if "video" in batch else batch["latent"].shape)


def stream_shapes(experiment: Experiment, decoder: Any) -> dict[str, tuple[Shape, Shape]]:
    """Training stream -> (shape of a process's batch as :func:`batch_shape` tells it, shape of its latent b c n y x).

    Streams of ``resize: keep``, whose clips differ in size, are left out.
    """
    found = {}
    for where, stream in streams(experiment).items():
        if not where.startswith("data.train.") or stream.resize == "keep":
            continue
        latent = (
            stream.batch_size,
            decoder.latent_space.channels,
            *show.latent_shape(experiment, decoder, where, stream),
        )
        saved = all(experiment.data.sources[source].kind == "latent" for source in stream.sources)
        video = (stream.batch_size, 3, stream.total_frames, *stream.size)
        found[where.removeprefix("data.train.")] = (latent if saved else video, latent)
    return found


def training_flops(experiment: Experiment, space: Any) -> dict[str, tuple[Shape, int]]:
    """Training stream -> (shape of a process's batch, operations of the network's forward and backward pass over it).

    Counted over tensors that have shapes and no memory, on a second decoder that is thrown away. A multiplication and an
    addition are two operations; attention counts whole, masked or not. Seconds for the largest decoders.
    """
    parts = experiment
    if hasattr(experiment.decoder, "checkpointing"):
        parts = dataclasses.replace(experiment, decoder=dataclasses.replace(experiment.decoder, checkpointing=False))
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            decoder = build_decoder(parts, space)
        shapes = stream_shapes(experiment, decoder)
        counts = count_operations(decoder.model, {latent for _, latent in shapes.values()}, decoder.step_inputs)
    return {name: (shape, counts[latent]) for name, (shape, latent) in shapes.items()}


def count_operations(network: nn.Module, shapes: set[Shape], inputs=lambda latent: {}) -> dict[Shape, int]:
    """Operations of a forward and backward pass of ``network`` over a latent of each shape (b c n y x).

    ``inputs`` says what it takes besides. ``network`` is on the meta device and is left unusable.
    """
    counts = {}
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):  # a CPU's own kernel is not counted
        network = network.to_empty(device="cpu").train()
        for shape in sorted(shapes):
            latent = torch.zeros(shape)
            with FlopCounterMode(display=False) as counter:
                network(latent, **inputs(latent)).float().sum().backward()
            counts[shape] = counter.get_total_flops()
            network.zero_grad(set_to_none=True)
    return counts


@dataclass(frozen=True)
class Peak:
    """Operations per second that one device could do, and where the number comes from."""

    flops_per_s: float
    origin: str  # given, measured

    def __str__(self) -> str:
        return f"{'' if self.origin == 'given' else 'a measured '}{self.flops_per_s / 1e12:.3g} TFLOP/s"


def find_peak(wanted: float | int | str, device: torch.device, precision: str) -> Peak:
    """``trainer.peak_tflops``: a number as it is, or "measured": the rate of a large matrix product in the run's precision."""
    if wanted != "measured":
        return Peak(float(wanted) * 1e12, "given")
    return Peak(matmul_rate(device, torch.bfloat16 if precision.startswith("bf16") else torch.float32), "measured")


# --- time -------------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds as a reader wants them: 45 s, 12 min, 3.2 h, 4.1 days."""
    for unit, size, until in (("s", 1, 90), ("min", 60, 5400), ("h", 3600, 48 * 3600)):
        if seconds < until:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 10 or unit == "s" else f"{value:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def device_hours(hours: float, device: str) -> str:
    """Hours times devices, by their name: GPU-hours, or hours of CPU processes."""
    digits = 0 if hours >= 100 else 1 if hours >= 1 else 3
    return f"{hours:,.{digits}f} {'CPU-process' if device == 'cpu' else 'GPU'}-hours"


@dataclass(frozen=True)
class Before:
    """What an earlier run of the same cost a step took: its name, seconds of training a step, and its record."""

    run: str
    step_s: float
    done: dict[str, Any]


def earlier_run(
    experiment: Experiment, name: str, device: str, devices: int, root: Path | None = None
) -> Before | None:
    """The newest complete run of the experiment ``name`` on as many devices of this kind whose steps cost the same.

    ``device``: as ``done.json`` has it. Runs that differ in more than :data:`SAME_COST` are passed over; None: there is none.
    """
    root = root or runs.runs_root()
    now, best = as_dict(experiment), (-math.inf, None)
    for path in root.glob(f"{name}*/{runs.DONE}") if root.is_dir() else ():
        folder = path.parent
        if folder.name.partition("+")[0] != name or not (folder / runs.CONFIG).is_file():
            continue
        try:
            done, before = json.loads(path.read_text()), yaml.safe_load((folder / runs.CONFIG).read_text())
        except (OSError, ValueError, yaml.YAMLError):  # another run's file: this one can do without
            continue
        same = (done.get("device"), done.get("devices")) == (device, devices)
        if not same or not done.get("steps") or not done.get("minutes"):
            continue
        changed = [line.partition(":")[0] for line in runs.diff(with_defaults(before, experiment), now)]
        if all(any(fnmatchcase(key, pattern) for pattern in SAME_COST) for key in changed):
            found = Before(folder.name, 60 * done["minutes"] / done["steps"], done)
            best = max(best, (path.stat().st_mtime, found), key=lambda entry: entry[0])
    return best[1]


def words_before(experiment: Experiment, name: str, trainer: Trainer) -> str:
    """One line for the beginning of a run of the experiment ``name``: what it will take, by its budget of time or an earlier run.
    Empty where nobody knows before the first steps."""
    devices = trainer.world_size
    device = torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else "cpu"
    if experiment.trainer.budget_minutes:
        seconds = 60 * experiment.trainer.budget_minutes
        return f"expected: {duration(seconds)} of training, {device_hours(seconds * devices / 3600, device)}"
    before = earlier_run(experiment, name, device, devices)
    if before is None:
        return ""
    seconds = experiment.trainer.max_steps * before.step_s
    return (
        f"expected: {duration(seconds)} of training, {device_hours(seconds * devices / 3600, device)}, at the "
        f"{before.step_s:.3g} s a step of {before.run} ({devices} x {device}); validations come on top"
    )
