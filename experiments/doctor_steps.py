"""How long a training step takes on this machine and what it holds, measured on noise: no data are read, no weights are loaded
but those of the encoder and the losses."""

import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader, IterableDataset

from datamodules.config import StreamConfig
from decoders.base import VideoDecoder
from experiments.compiling import compile_decoder
from experiments.config import Experiment, streams
from experiments.throughput import peak_memory_gib
from experiments.train import build, choose_precision

NOISE_KINDS = {"video", "image", "procedural"}  # sources whose batches are pixels and nothing else


@dataclass(frozen=True)
class Step:
    """Median seconds of a micro-batch of a stream on one device, forward to optimiser, and the largest memory until then."""

    stream: str
    seconds: float
    peak_gib: float


class Noise(IterableDataset):
    """For each stream ``1 + steps`` batches of noise in its shape; the first of each warms up."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], steps: int) -> None:
        self.shapes, self.steps = shapes, steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for name, shape in self.shapes.items():
            video = torch.rand(shape) * 2 - 1
            for number in range(1 + self.steps):
                yield {"video": video, "key": [f"noise/{name}#{number}.{clip}" for clip in range(shape[0])]}


class Stopwatch(Callback):
    """Takes the time of every step, from its batch being there to its end."""

    def __init__(self, names: list[str], steps: int) -> None:
        self.names, self.steps = names, steps
        self.seconds: list[float] = []
        self.peaks: list[float] = []
        self._since = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: VideoDecoder, batch, batch_idx) -> None:
        self._wait(pl_module)
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: VideoDecoder, outputs, batch, batch_idx) -> None:
        self._wait(pl_module)
        self.seconds.append(time.perf_counter() - self._since)
        self.peaks.append(peak_memory_gib(pl_module.device))

    def found(self) -> list[Step]:
        """What was measured, in the order of the streams."""
        rounds = 1 + self.steps
        return [
            Step(
                name,
                statistics.median(self.seconds[i * rounds + 1 : (i + 1) * rounds]),
                self.peaks[(i + 1) * rounds - 1],
            )
            for i, name in enumerate(self.names)
        ]

    def _wait(self, decoder: VideoDecoder) -> None:
        if decoder.device.type == "cuda":
            torch.cuda.synchronize(decoder.device)


def noise_shapes(experiment: Experiment) -> dict[str, tuple[int, ...]]:
    """Training stream -> b 3 t h w of a process's batch, of the streams that noise can stand for."""
    found = {}
    for where, stream in streams(experiment).items():
        if where.startswith("data.train.") and _is_pixels(experiment, stream):
            found[where.removeprefix("data.train.")] = (stream.batch_size, 3, stream.total_frames, *stream.size)
    return found


def _is_pixels(experiment: Experiment, stream: StreamConfig) -> bool:
    return stream.resize != "keep" and {experiment.data.sources[name].kind for name in stream.sources} <= NOISE_KINDS


def measure_steps(experiment: Experiment, steps: int) -> list[Step]:
    """``steps`` training steps of every stream on one device; an empty list where noise can stand for none.

    Raises ConfigError where the decoder cannot be built, and whatever a step raises: torch.OutOfMemoryError, say.
    """
    shapes = noise_shapes(experiment)
    if not shapes or len(shapes) < sum(where.startswith("data.train.") for where in streams(experiment)):
        return []
    seed_everything(experiment.seed, verbose=False)
    decoder, watch, noise = build(experiment), Stopwatch(list(shapes), steps), Noise(shapes, steps)
    if experiment.trainer.compile:
        compile_decoder(decoder, experiment.trainer.compile, sharded=False, many_sizes=len(set(shapes.values())) > 1)
    trainer = Trainer(
        accelerator=experiment.trainer.accelerator,
        devices=1,
        precision=choose_precision(experiment.trainer.precision, experiment.trainer.accelerator),
        max_steps=len(shapes) * (1 + steps),
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        use_distributed_sampler=False,
        callbacks=[watch],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no `val_dataloader`.*")
        trainer.fit(decoder, DataLoader(noise, batch_size=None))
    return watch.found()
