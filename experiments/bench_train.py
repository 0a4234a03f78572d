"""Speed of training: ``python -m experiments.bench_train NAME [key=value ...]``; options are overrides under ``bench.``.

Real training steps of an experiment, at each of its own sizes, on noise: no data are read. One process, one device. What makes
a step faster is switched on and off between steps, in turns, so that whatever else the machine does is shared:

    make bench-train exp=flashdecoder_xl_stage1 bench.variants=[base,latents,latents+compile,latents+compile+lpips_bf16]

A variant is switches joined by +: ``latents`` (given, as from a cache, with no encoder), ``compile`` (trainer.compile=blocks),
``lpips_bf16``, ``ahead`` (trainer.encode_ahead), ``keep`` and ``recompute`` (no activation checkpointing, and all of it); ``base``
is the experiment as it is. What needs another optimiser or model is an override, and a run of its own: optim.fused=false,
decoder.mode=parallel. Told are the median step and its 95th percentile, the share of each part of it, tokens and clips per
second, peak memory, and MFU: operations of the network's forward and backward pass, without recomputation, over the rate of a large
matrix product measured in the same run. Weights are random where the experiment's objective lets them be (RefDecoder:
objective.start=random; Flash-VAED: objective.start=null objective.teacher=random).
"""

import math
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

import torch
from lightning import Callback, LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader, IterableDataset

from decoders.base import VideoDecoder
from decoders.terms import hasten_lpips
from experiments import cost, recompute
from experiments.ahead import EncodeAhead
from experiments.bench import device_name, options
from experiments.compiling import repeated_blocks, switch
from experiments.compose import ConfigError, run_cli
from experiments.config import Experiment, build_decoder, build_space, check_decoder, load
from experiments.measured import markdown, require_folder, write
from experiments.shares import PARTS, Shares
from experiments.throughput import peak_memory_gib
from experiments.train import build, choose_precision, quiet

SWITCHES = ("base", "latents", "compile", "lpips_bf16", "ahead", "keep", "recompute")


@dataclass
class BenchTrainConfig:
    """``bench.*``: what is measured and how."""

    variants: list[str] = field(default_factory=lambda: ["base", "latents"])  # switches joined by +
    streams: list[str] = field(default_factory=list)  # of data.train; empty: all
    steps: int = 3  # measured in a turn, after one that is not
    rounds: int = 3  # turns of each variant
    warm_up: int = 2  # steps of each variant at each size before
    device: Literal["auto", "cpu", "gpu"] = "auto"
    threads: int | None = None
    results: str = "results"  # folder of the JSON file

    def __post_init__(self) -> None:
        if min(self.steps, self.rounds, self.warm_up) < 1 or not self.variants:
            raise ValueError("bench.steps, rounds and warm_up must be 1 or more, and bench.variants not empty")
        for variant in self.variants:
            if odd := set(variant.split("+")) - set(SWITCHES):
                raise ValueError(f"bench.variants: no switch {sorted(odd)[0]}; there are {', '.join(SWITCHES)}")
            if {"keep", "recompute"} <= set(variant.split("+")) or {"latents", "ahead"} <= set(variant.split("+")):
                raise ValueError(f"bench.variants: {variant} asks for one thing and its opposite")


@dataclass(frozen=True)
class Turn:
    """One training step: its size, how it is computed, and in which round it is measured (None: it warms up)."""

    stream: str
    variant: str
    round: int | None

    def has(self, name: str) -> bool:
        return name in self.variant.split("+")


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        raise ConfigError(
            "which experiment? python -m experiments.bench_train NAME [bench.key=value ...] [key=value ...]"
        )
    name, *overrides = arguments
    quiet()
    config = options([text for text in overrides if text.startswith("bench.")], BenchTrainConfig)
    kept = [text for text in overrides if not text.startswith("bench.")]
    result = bench_train(name, kept, config)
    path = write("bench-train", result, config.results, result["precision"])
    print(report(result), f"\nwritten to {path}", sep="")


# --- running ----------------------------------------------------------------------------------------------------------


def bench_train(name: str, overrides: list[str], config: BenchTrainConfig) -> dict[str, Any]:
    """Measure the experiment ``name``. Raises ConfigError for what cannot be measured on noise."""
    experiment = load(name, overrides)
    if config.device != "auto":
        experiment.trainer.accelerator = config.device
    if config.threads:
        torch.set_num_threads(config.threads)
    seed_everything(experiment.seed, verbose=False)
    decoder = _build(experiment, config)
    shapes = _shapes(experiment, decoder, config)
    require_folder(config.results)
    turns = schedule(list(shapes), config)
    encode = EncodeAhead(decoder) if any(turn.has("ahead") for turn in turns) else None
    stepper = Stepper(experiment, turns, decoder)
    precision = choose_precision(experiment.trainer.precision, experiment.trainer.accelerator)
    trainer = Trainer(
        accelerator=experiment.trainer.accelerator,
        devices=1,
        precision=precision,
        max_steps=len(turns),
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        use_distributed_sampler=False,
        callbacks=[*([encode] if encode else []), stepper.shares, stepper],
    )
    device = trainer.strategy.root_device
    ceilings = [cost.find_peak("measured", device, precision).flops_per_s]
    noise = Noise(shapes, turns, encode)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no `val_dataloader`.*")
        trainer.fit(decoder, datamodule=NoiseData(experiment.data, noise))
    ceilings.append(cost.find_peak("measured", device, precision).flops_per_s)
    flops = cost.training_flops(experiment, decoder.latent_space)
    rows = {
        stream: {
            "batch": list(shapes[stream][0]),
            "latent": list(shapes[stream][1]),
            "tokens": _tokens(decoder, shapes[stream][1]),
            "flops": flops[stream][1],
            "variants": stepper.found(stream, flops[stream][1], max(ceilings), _tokens(decoder, shapes[stream][1])),
        }
        for stream in shapes
    }
    return {
        "experiment": name,
        "overrides": overrides,
        "device": device_name(device.type),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": {"torch": version("torch"), "lightning": version("lightning")},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["make bench-train", f"exp={name}", *overrides, *_own(config)]),
        "precision": precision,
        "ceiling_flops_per_s": max(ceilings),
        "process_peak_gib": peak_memory_gib(torch.device("cpu")),
        "streams": rows,
    }


def _build(experiment: Experiment, config: BenchTrainConfig) -> VideoDecoder:
    """The decoder; without its encoder's files where all variants are given latents."""
    if getattr(experiment.objective, "start", None) is not None and not isinstance(experiment.objective.start, str):
        raise ConfigError("a measurement prunes no teacher: set objective.start=null; random weights cost the same")
    given = all("latents" in variant.split("+") for variant in config.variants)
    if not given:
        decoder = build(experiment)
    else:
        decoder = build_decoder(experiment, build_space(experiment))
        check_decoder(experiment, decoder)
    if decoder.trains_encoder and any("latents" in variant.split("+") for variant in config.variants):
        raise ConfigError(
            f"bench.variants: {type(decoder).__name__} encodes within its own loss and takes no latents: leave those variants out"
        )
    return decoder


def _shapes(experiment: Experiment, decoder: VideoDecoder, config: BenchTrainConfig) -> dict[str, tuple]:
    """Stream -> (b 3 t h w, b c n y x) of its batches."""
    found = {k: v for k, v in cost.stream_shapes(experiment, decoder).items() if v[0][1] == 3 and v[0] != v[1]}
    if unknown := sorted(set(config.streams) - found.keys()):
        raise ConfigError(f"bench.streams: no stream {unknown[0]} of clips; there are {', '.join(found) or 'none'}")
    if not found:
        raise ConfigError("data.train has no stream of clips of one size, which noise could stand for")
    return {name: shapes for name, shapes in found.items() if not config.streams or name in config.streams}


def schedule(streams: list[str], config: BenchTrainConfig) -> list[Turn]:
    """Size by size: every variant warms up, then they take turns; the first step of a turn is not measured."""
    turns = []
    for stream in streams:
        turns += [Turn(stream, variant, None) for variant in config.variants for _ in range(config.warm_up)]
        for number in range(config.rounds):
            for variant in config.variants:
                turns += [Turn(stream, variant, None), *[Turn(stream, variant, number)] * config.steps]
    return turns


class Noise(IterableDataset):
    """A batch for every turn, the same one for all turns of a size."""

    def __init__(self, shapes: dict[str, tuple], turns: list[Turn], encode: EncodeAhead | None) -> None:
        self.shapes, self.turns, self.encode = shapes, turns, encode

    def __iter__(self) -> Iterator[dict[str, Any]]:
        made: dict[str, dict[str, Any]] = {}
        for number, turn in enumerate(self.turns):
            video, latent = self.shapes[turn.stream]
            if turn.stream not in made:
                made = {turn.stream: {"video": torch.rand(video) * 2 - 1, "latent": torch.randn(latent)}}
            batch = dict(made[turn.stream])
            batch["key"] = [f"noise/{turn.stream}#{clip}" for clip in range(video[0])]
            if not turn.has("latents"):
                del batch["latent"]
            yield self.encode.prepared(batch, number) if turn.has("ahead") else batch


class NoiseData(LightningDataModule):
    """Noise in the place of the experiment's data, whose ``config`` a decoder may look at when it begins."""

    def __init__(self, config: Any, noise: Noise) -> None:
        super().__init__()
        self.config, self._noise = config, noise

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self._noise, batch_size=None)


class Stepper(Callback):
    """Sets every step's switches, and takes its time: from the end of the step before, so what lies between counts too."""

    def __init__(self, experiment: Experiment, turns: list[Turn], decoder: VideoDecoder) -> None:
        self.turns, self.shares, self.measured = turns, Shares(), []
        self._checkpointing = bool(getattr(experiment.decoder, "checkpointing", False))
        self._many = len({turn.stream for turn in turns}) > 1
        self._blocks = repeated_blocks(decoder.model)
        self._set: str | None = None
        self._last: Any = None
        self._peaks: dict[tuple[str, str], float] = {}
        self._memory: list[tuple[Turn, float]] = []
        if not self._blocks and any(turn.has("compile") for turn in turns):
            raise ConfigError("bench.variants: this network has no blocks that compile would take")
        if not hasattr(experiment.decoder, "checkpointing") and any(t.has("keep") or t.has("recompute") for t in turns):
            raise ConfigError("bench.variants: this decoder has no checkpointing to keep or recompute by")

    def on_train_batch_start(self, trainer: Trainer, pl_module: VideoDecoder, batch: Any, batch_idx: int) -> None:
        turn = self.turns[batch_idx]
        if turn.variant != self._set:
            self._set = turn.variant
            self._apply(pl_module, turn)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def _apply(self, decoder: VideoDecoder, turn: Turn) -> None:
        precision = "bfloat16" if turn.has("lpips_bf16") else decoder.training_config.lpips_precision
        hasten_lpips(decoder, precision, compiled=turn.has("compile"))
        for block in self._blocks:
            switch(block, turn.has("compile"), self._many)
        again = turn.has("recompute") or (self._checkpointing and not turn.has("keep"))
        recompute.set_checkpointing(decoder.model, again)

    def on_train_batch_end(self, trainer: Trainer, pl_module: VideoDecoder, outputs, batch, batch_idx: int) -> None:
        turn, marks, now = self.turns[batch_idx], self.shares.timeline.end(), self._now(pl_module.device)
        if turn.round is not None:
            self.measured.append((turn, self._last, now, marks))
            if pl_module.device.type == "cuda":
                peak = peak_memory_gib(pl_module.device)
                key = (turn.stream, turn.variant)
                self._peaks[key] = max(peak, self._peaks.get(key, 0.0))
        self._last = now

    @staticmethod
    def _now(device: torch.device) -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def found(self, stream: str, flops: int, ceiling: float, tokens: int) -> dict[str, Any]:
        """Variant -> its numbers, those of rounds beside the first variant's."""
        steps: dict[str, dict[int, list[float]]] = {}
        parts: dict[str, list[dict[str, float]]] = {}
        for turn, start, stop, marks in self.measured:
            if turn.stream == stream:
                parts.setdefault(turn.variant, []).append(self.shares.timeline.seconds(marks))
                passed = stop - start if isinstance(stop, float) else start.elapsed_time(stop) / 1000
                steps.setdefault(turn.variant, {}).setdefault(turn.round, []).append(passed)
        rows, first = {}, next(iter(steps.values()))
        for variant, rounds in steps.items():
            every = sorted(value for values in rounds.values() for value in values)
            median, total = statistics.median(every), sum(every)
            gains = [statistics.median(first[n]) / statistics.median(rounds[n]) for n in rounds]
            rows[variant] = {
                "step_s": median,
                "step_p95_s": every[math.ceil(0.95 * len(every)) - 1],
                "gain": [statistics.median(gains), min(gains), max(gains)],
                "steps_per_s": 1 / median,
                "tokens_per_s": tokens / median,
                "mfu": flops / median / ceiling,
                "shares": _shares(parts[variant], total),
                "peak_gib": self._peaks.get((stream, variant)),
            }
        return rows


def _shares(steps: list[dict[str, float]], total: float) -> dict[str, float]:
    """Part -> its share of the ``total`` seconds; what no part claims, such as the way to the next batch, is the rest."""
    found = {part: sum(step.get(part, 0.0) for step in steps) / total for part in PARTS}
    return {**found, "rest": 1.0 - sum(share for part, share in found.items() if part != "rest")}


def _tokens(decoder: VideoDecoder, latent: tuple[int, ...]) -> int:
    """Tokens of a batch: all that pass the network's attention, or its latent positions as it folds them."""
    b, _, n, y, x = latent
    places = decoder.tokens(n, y, x)
    fold = decoder.size_multiple // decoder.latent_space.stride_hw
    return b * (sum(places.values()) if places else n * math.ceil(y * x / fold**2))


def _own(config: BenchTrainConfig) -> list[str]:
    """The options that were given, as they are typed."""
    plain = BenchTrainConfig()
    given = {k: v for k, v in vars(config).items() if v != getattr(plain, k)}
    return [f"bench.{k}={str(v).replace(' ', '').replace(chr(39), '')}" for k, v in given.items()]


# --- telling ----------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    """Tables of every size: steps by variant, and what their time goes to."""
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    threads = f", {result['threads']} threads" if result["threads"] else ""
    lines = [
        f"{result['experiment']}: training on noise, {result['precision']}; {result['device']}{threads}; {versions}; {result['date']}",
        f"ceiling (matrix product, measured here): {result['ceiling_flops_per_s'] / 1e12:.3g} TFLOP/s; peak memory of the process "
        f"{result['process_peak_gib']:.1f} GiB",
    ]
    for stream, row in result["streams"].items():
        clips = row["batch"][0]
        lines.append(f"\n{stream}: {clips} x {row['batch'][2]} frames of {row['batch'][3]}x{row['batch'][4]}, "
                     f"{row['flops'] / 1e12:.3g} TFLOP forward and backward")  # fmt: skip
        table = [["variant", "step ms", "p95", "gain", "clips/s", "tokens/s", "MFU", "GPU GiB"]]
        shares = [["share of a step", *(part for part in PARTS)]]
        for variant, found in row["variants"].items():
            gain, low, high = found["gain"]
            table.append([
                variant, f"{1000 * found['step_s']:.4g}", f"{1000 * found['step_p95_s']:.4g}",
                f"{gain:.2f} ({low:.2f} to {high:.2f})", f"{clips * found['steps_per_s']:.3g}", f"{found['tokens_per_s']:.4g}",
                f"{found['mfu']:.1%}", "" if found["peak_gib"] is None else f"{found['peak_gib']:.2f}",
            ])  # fmt: skip
            shares.append([variant, *(f"{found['shares'][part]:.1%}" for part in PARTS)])
        lines += [markdown(table), markdown(shares)]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_cli(main)
