"""What a run makes of its time: clips and pixels per second, waiting for data, FLOPs utilisation, hours spent and left."""

import resource
import sys
import time
from datetime import datetime, timedelta
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from tqdm import tqdm

from datamodules.batch import VideoBatch, batch_size
from decoders.base import VideoDecoder
from experiments import cost
from experiments.budget import Budget
from experiments.config import Experiment

SETTLED_S = 60.0  # after so long a rate says something about the rest of a run
SLOW_LOADER = 0.1  # share of the time waited for data above which the words on the rate say what helps


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Waiting(PassThroughProfiler):
    """Adds up the seconds in which training stands still because the loader has no batch ready."""

    ACTION = ".train_dataloader_next"  # as Lightning's training loop calls it

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._since: float | None = None

    def start(self, action_name: str) -> None:
        if action_name.endswith(self.ACTION):
            self._since = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(self.ACTION) and self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None


class Window:
    """What happened since the last time it was logged. Validations, and what is saved and drawn after them, are no part of it."""

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting
        self.clips = self.megapixels = self.steps = 0
        self.flops: int | None = 0  # None: some batch was of a shape whose operations are not known
        self._start, self._waited = time.perf_counter(), waiting.seconds
        self._paused: float | None = None
        self._waited_at_pause = 0.0

    @property
    def seconds(self) -> float:
        return (self._paused or time.perf_counter()) - self._start

    @property
    def waited(self) -> float:
        return self._waiting.seconds - self._waited

    def pause(self) -> None:
        if self._paused is None:
            self._paused, self._waited_at_pause = time.perf_counter(), self._waiting.seconds

    def resume(self) -> None:
        if self._paused is not None:
            self._start += time.perf_counter() - self._paused
            self._waited += self._waiting.seconds - self._waited_at_pause
            self._paused = None


class Throughput(Callback):
    """Logs a run's throughput under ``perf/``, every ``trainer.log_every_steps``, and keeps it for the progress bar.

    ``clips_per_s`` and ``megapixels_per_s`` (a million pixels of the training clips' frames) are of all ranks; ``data_wait``
    is the share of time in which a step waited for its batch, of the rank that waited longest; ``mfu`` is explained in
    :mod:`experiments.cost`; ``gpu_hours`` are devices times hours since training began, over all sessions up to their last
    checkpoints, validations included (of processes, on a CPU), ``gpu_hours_left`` and ``hours_left`` what is still to come
    at the rate of this session.
    """

    def __init__(self, experiment: Experiment, budget: Budget | None = None) -> None:
        self._experiment, self._budget = experiment, budget
        self._waiting = Waiting()
        self._flops: dict[cost.Shape, int] = {}
        self.peak: cost.Peak | None = None
        self.clips_per_s: float | None = None
        self.mfu: float | None = None
        self.data_wait: float | None = None
        self.hours_left: float | None = None
        self._window: Window | None = None
        self._totals = dict.fromkeys(("device_s", "trained_s", "steps", "waited_s", "mfu_s", "mfu_weighted"), 0.0)
        self._began: float | None = None  # this session
        self._world_size = 1
        self._first: tuple[float, int] = (0.0, 0)  # seconds and steps of this session's first window,
        self._rest: tuple[float, int] = (0.0, 0)  # and of the others
        self._validations: tuple[float, int] = (0.0, 0)  # seconds, how many
        self._validation_since: float | None = None
        self._said = False

    # ---- over all sessions

    @property
    def device_hours(self) -> float:
        """Devices times hours so far."""
        now = 0.0 if self._began is None else (time.perf_counter() - self._began) * self._world_size
        return (self._totals["device_s"] + now) / 3600

    def state_dict(self) -> dict[str, Any]:
        return {**self._totals, "device_s": 3600 * self.device_hours}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._totals |= state_dict

    def summary(self) -> dict[str, float | None]:
        """For ``done.json``: {gpu_hours, data_wait, mfu}, of the whole run. mfu: None where it was not counted."""
        t = self._totals
        return {
            "gpu_hours": round(self.device_hours, 4),
            "data_wait": round(t["waited_s"] / t["trained_s"], 4) if t["trained_s"] else None,
            "mfu": round(t["mfu_weighted"] / t["mfu_s"], 4) if t["mfu_s"] else None,
        }

    # ---- hooks

    def setup(self, trainer: Trainer, pl_module: VideoDecoder, stage: str) -> None:
        if stage != "fit":
            return
        trainer.profiler = self._waiting
        self._world_size = trainer.world_size
        wanted = self._experiment.trainer.peak_tflops
        if wanted is not None and trainer.is_global_zero:
            self.peak = cost.find_peak(wanted, trainer.strategy.root_device, str(trainer.precision))
            self._flops = dict(cost.training_flops(self._experiment, pl_module.latent_space).values())

    def on_fit_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._began = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._window = Window(self._waiting)
        seconds, steps = self._totals["trained_s"], self._totals["steps"]
        if steps and seconds >= SETTLED_S and self._budget is None and trainer.is_global_zero:
            rest = (self._experiment.trainer.max_steps - trainer.global_step) * seconds / steps
            spent = cost.device_hours(self.device_hours, pl_module.device.type)
            print(f"{spent} spent so far; at the {seconds / steps:.3g} s a step until now: {cost.duration(rest)} left")

    def on_train_batch_start(self, trainer: Trainer, pl_module: VideoDecoder, batch, batch_idx) -> None:
        self._window.resume()  # not at a validation's end: pictures are drawn and the best weights are saved there

    def on_validation_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        if self._window is not None:
            self._window.pause()
            self._validation_since = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        if self._validation_since is not None:
            seconds, number = self._validations
            self._validations = (seconds + time.perf_counter() - self._validation_since, number + 1)
            self._validation_since = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: VideoDecoder, outputs, batch, batch_idx) -> None:
        window = self._window
        window.clips += batch_size(batch) * trainer.world_size
        window.megapixels += megapixels(batch, pl_module) * trainer.world_size
        flops = self._flops.get(cost.batch_shape(batch))
        window.flops = None if flops is None or window.flops is None else window.flops + flops
        if pl_module.batches_seen % trainer.accumulate_grad_batches:
            return
        window.steps += 1
        if trainer.global_step % trainer.log_every_n_steps:  # what is logged in other steps is lost
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        values = self._take(window, trainer.global_step) | {"perf/peak_memory_gib": peak_memory_gib(pl_module.device)}
        for group in trainer.optimizers[0].param_groups:
            values[f"lr/{group['name']}"] = group["lr"]
        pl_module.log_dict(values)
        pl_module.log("perf/data_wait", self.data_wait, reduce_fx="max", sync_dist=trainer.world_size > 1)
        self._say_rate(trainer)
        self._window = Window(self._waiting)

    def on_fit_end(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._totals["device_s"] = 3600 * self.device_hours
        self._began = self._window = None  # the evaluation at the end is no training

    # ---- what is made of it

    def _take(self, window: Window, step: int) -> dict[str, float]:
        """A window's numbers, which are also added to the run's."""
        seconds = window.seconds
        self.clips_per_s, self.data_wait = window.clips / seconds, min(1.0, window.waited / seconds)
        self.mfu = None
        if self.peak is not None and window.flops:
            self.mfu = window.flops / seconds / self.peak.flops_per_s
            self._totals["mfu_s"] += seconds
            self._totals["mfu_weighted"] += self.mfu * seconds
        self._totals["trained_s"] += seconds
        self._totals["steps"] += window.steps
        self._totals["waited_s"] += window.waited
        if self._first[1]:
            self._rest = (self._rest[0] + seconds, self._rest[1] + window.steps)
        else:
            self._first = (seconds, window.steps)
        self.hours_left = self._seconds_left(step) / 3600
        values = {
            "perf/clips_per_s": self.clips_per_s,
            "perf/megapixels_per_s": window.megapixels / seconds,
            "perf/step_ms": 1000 * seconds / window.steps,
            "perf/gpu_hours": self.device_hours,
            "perf/hours_left": self.hours_left,
            "perf/gpu_hours_left": self.hours_left * self._world_size,
        }
        return values | ({} if self.mfu is None else {"perf/mfu": self.mfu})

    @property
    def step_s(self) -> float:
        """Mean seconds of a step of this session, its first window, in which everything warms up, left out where it can be."""
        seconds, steps = self._rest if self._rest[1] else self._first
        return seconds / steps

    def _seconds_left(self, step: int) -> float:
        """Until the last step, validations as long as those of this session included."""
        if self._budget is not None:
            return (1 - self._budget.used) * 60 * self._budget.minutes
        t = self._experiment.trainer
        spent, number = self._validations
        validations = (t.max_steps // t.val_every_steps - step // t.val_every_steps) * (spent / number if number else 0)
        return (t.max_steps - step) * self.step_s + validations

    def _say_rate(self, trainer: Trainer) -> None:
        """Once in a session, as soon as the rate says something: what the rest will take."""
        old_enough = self._began is not None and time.perf_counter() - self._began >= SETTLED_S
        if self._said or not old_enough or not trainer.is_global_zero:
            return
        self._said = True
        tqdm.write(self.words(trainer.strategy.root_device.type, self._experiment.trainer), file=sys.stdout)

    def shown(self, device: str) -> dict[str, str]:
        """What the progress bar says of it."""
        if self.clips_per_s is None:
            return {}
        parts = {"clips/s": f"{self.clips_per_s:.2f}", "wait": f"{self.data_wait:.0%}"}
        if self.mfu is not None:
            parts["mfu"] = f"{self.mfu:.0%}"
        if self.hours_left is not None:
            parts["left"] = cost.duration(3600 * self.hours_left)
            if device == "cuda":
                whole = self.device_hours + self.hours_left * self._world_size
                parts["GPU-h"] = f"{self.device_hours:.1f} of {whole:.1f}"
        return parts

    def words(self, device: str, config: Any) -> str:
        """One line: "at this rate ...", and what helps where the loader is too slow."""
        parts = [f"{self.step_s:.3g} s a step", f"waiting for data {self.data_wait:.0%}"]
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.0%} of {self.peak}")
        end = datetime.now() + timedelta(hours=self.hours_left)
        left = cost.device_hours(self.hours_left * self._world_size, device)
        line = (
            f"at this rate ({', '.join(parts)}): {cost.duration(3600 * self.hours_left)} left, until about "
            f"{end:%Y-%m-%d %H:%M}; {left} left, {cost.device_hours(self.device_hours, device)} spent"
        )
        if self.data_wait > SLOW_LOADER:
            line += (
                "\nthe loader is too slow: raise data.num_workers; make doctor exp=NAME says how many cores it takes"
            )
        return line


def megapixels(batch: VideoBatch, decoder: VideoDecoder) -> float:
    """Millions of pixels of a batch's frames; of saved latents, those of the frames that they stand for."""
    if "video" in batch:
        b, _, t, h, w = batch["video"].shape
    else:
        b, _, n, y, x = batch["latent"].shape
        space = decoder.latent_space
        t, h, w = space.pixel_frames(n), y * space.stride_hw, x * space.stride_hw
    return b * t * h * w / 1e6
