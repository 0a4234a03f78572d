"""What `make doctor exp=NAME` asks of one experiment: encoder, parent, data, clips against the trainer's need, memory, hours."""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch

from experiments import cost, show
from experiments import doctor_loader as loader
from experiments import doctor_machine as machine
from experiments.compose import ConfigError
from experiments.config import Experiment, build_decoder, build_space, streams
from experiments.doctor_machine import GIB, Finding
from experiments.doctor_steps import Step, measure_steps
from experiments.runs import find_parent

WORTH_IT = 1.25  # times that another reader must be faster before it is advised
TIGHT = 0.9  # share of a GPU's memory above which an estimate that leaves things out is a warning


class Case:
    """One experiment on this machine. ``config``: the doctor's options. Checks remember what later ones need."""

    def __init__(self, experiment: Experiment, name: str, overrides: list[str], config: Any) -> None:
        self.experiment, self.name, self.overrides, self.config = experiment, name, overrides, config
        every = streams(experiment)
        prefix = "data.train."
        self.train = {where.removeprefix(prefix): one for where, one in every.items() if where.startswith(prefix)}
        self.sources = list(dict.fromkeys(source for stream in every.values() for source in stream.sources))
        self.readable: dict[str, list] = {}  # source -> files that were looked at, with their sizes
        self.clip_s: dict[str, float] = {}  # training stream -> seconds of a core for a clip
        self.steps: list[Step] = []

    # ---- what it would run on

    @property
    def gpus_wanted(self) -> int | None:
        """GPUs of a node; None where it does not insist on any."""
        t = self.experiment.trainer
        if t.accelerator != "gpu":
            return None
        return t.devices if isinstance(t.devices, int) else 1

    @cached_property
    def gpus(self) -> int:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    @property
    def on_gpu(self) -> bool:
        """Whether it trains on GPUs: by its configuration, or because there are some."""
        t = self.experiment.trainer
        return t.accelerator == "gpu" or (t.accelerator == "auto" and self.gpus > 0)

    @property
    def is_here(self) -> bool:
        """Whether the devices that it wants are those of this machine."""
        return self.gpus >= (self.gpus_wanted or 0)

    @property
    def per_node(self) -> int:
        """Processes on a node."""
        devices = self.experiment.trainer.devices
        return devices if isinstance(devices, int) else max(1, self.gpus if self.on_gpu else 1)

    @property
    def processes(self) -> int:
        return self.per_node * self.experiment.trainer.num_nodes

    @cached_property
    def space(self) -> Any:
        """Its latent space; None for one that cannot tell its shape without its files."""
        try:
            return build_space(self.experiment)
        except FileNotFoundError:
            return None

    def decoder(self) -> Any:
        """Its decoder, with shapes and no memory."""
        with torch.device("meta"):
            return build_decoder(self.experiment, self.space)

    def checkpoint_bytes(self) -> int:
        """What a run keeps on disk, the checkpoint that is just being written beside the last one included."""
        if self.space is None:
            return 0
        decoder, t = self.decoder(), self.experiment.trainer
        state = sum(tensor.numel() * tensor.element_size() for tensor in decoder.state_dict().values())
        trained = sum(p.numel() for _, p in decoder.trainable())
        inference = 4 * sum(p.numel() for p in decoder.inference_parameters().values())
        averaged = inference if self.experiment.ema else 0
        return (t.keep_checkpoints + 1) * (state + 8 * trained + averaged) + inference * (3 if averaged else 2)

    # ---- files

    def check_space(self) -> Finding:
        """The encoder's files."""
        try:
            space = build_space(self.experiment)
            space.require()
        except (FileNotFoundError, ConfigError) as error:
            return Finding("FAIL", "latent space", str(error))
        return Finding("OK", "latent space", f"{space.name}: its files are here")

    def check_parent(self) -> Finding | None:
        """The weights that it starts from."""
        if not self.experiment.init_from:
            return None
        try:
            path = find_parent(self.experiment.init_from, allow_unfinished=self.experiment.allow_unfinished_parent)
        except ConfigError as error:
            if self.experiment.train_parents:
                return Finding("OK", "parent", f"{self.experiment.init_from} is trained first (train_parents)")
            return Finding("FAIL", "parent", str(error).removeprefix("init_from: "))
        return Finding("OK", "parent", str(path))

    def check_data(self) -> Iterator[Finding]:
        """Every source that a stream names."""
        for name in self.sources:
            finding, self.readable[name] = loader.sample(name, self.experiment.data.sources[name], self.config.files)
            yield finding

    def check_shared_memory(self) -> Finding | None:
        """Room for batches that workers make ahead."""
        data = self.experiment.data
        mean, largest = loader.batch_bytes(self.train, data.order)
        ahead = self.per_node * data.num_workers * data.prefetch
        return machine.check_shared_memory(ahead * mean, ahead * largest)

    # ---- clips

    def film_sizes(self) -> list[tuple[int, int]]:
        """Sizes of the training streams of films that none of the files looked at could be read for."""
        found = [
            tuple(s.size)
            for s in self.train.values()
            if self._kinds(s) == {"video"} and s.total_frames > 1 and not self._requests(s)
        ]
        return list(dict.fromkeys(found))

    def _kinds(self, stream: Any) -> set[str]:
        return {self.experiment.data.sources[name].kind for name in stream.sources}

    def check_clips(self, films: Any) -> Iterator[Finding]:
        """What a clip of every training stream costs: of its own files where they are here, else of a test film of its size."""
        yield from (self._clips_of(name, stream, films) for name, stream in self.train.items())

    def _clips_of(self, name: str, stream: Any, films: Any) -> Finding:
        what, kinds = f"clips of {name}", self._kinds(stream)
        if odd := sorted(kinds - {"video", "image", "procedural"}):
            return Finding("WARN", what, f"not measured: its sources are of kind {', '.join(odd)}")
        requests, where = self._requests(stream), "its own files"
        if not requests:
            requests, where = self._test_requests(stream, films)
        data, seconds = self.experiment.data, self.config.seconds
        speed = loader.clips(requests, data, seconds)
        self.clip_s[name] = speed.clip_s
        numbers = {"reader": data.reader, **speed.to_dict()}
        by = f" by {data.reader}, verify {data.verify}" if "video" in kinds else ""  # nothing else is read by them
        says = (
            f"{1e3 * speed.clip_s:.0f} ms of a core for {stream.total_frames} frames of {'x'.join(map(str, stream.size))}: "
            f"{loader.told(speed)} frames/s of a core{by}; {where}"
        )
        if kinds != {"video"}:
            return Finding("OK", what, says, "", numbers)
        other = loader.READERS[data.reader == loader.READERS[0]]
        speed_other = loader.clips(requests, data, seconds, other)
        numbers[other] = speed_other.to_dict()
        says += f"; by {other} {loader.told(speed_other)}"
        if speed.clip_s > WORTH_IT * speed_other.clip_s:
            advice = (
                f"data.reader={other} reads the same frames for {speed_other.clip_s / speed.clip_s:.0%} of the time"
            )
            return Finding("WARN", what, says, advice, numbers)
        if speed.wall_s > 2 * speed.cpu_s and where == "its own files":
            says += f"; {speed.wall_s / speed.cpu_s:.1f} times as long by the clock"
            return Finding("WARN", what, says, "the disk, or other work on this machine, holds it up", numbers)
        return Finding("OK", what, says, "", numbers)

    def _requests(self, stream: Any) -> list[Any]:
        found = []
        for name in stream.sources:
            source = self.experiment.data.sources[name]
            if source.kind == "procedural":
                found += loader.procedural_requests(stream, source, name)
            else:
                found += loader.requests_of(stream, self.readable.get(name, []), source.kind)
        return found

    def _test_requests(self, stream: Any, films: Any) -> tuple[list[Any], str]:
        size = stream.via or stream.size
        if "image" in self._kinds(stream):
            path = films.image(size)
            kind, frames, where = "image", 1, f"a JPEG of {size[0]}x{size[1]} made here"
        else:
            film = films.film(size)
            path, kind, frames, where = film.path, "video", film.num_frames, f"a {film}"
        info = loader.Info(size[1] + size[1] % 2, size[0] + size[0] % 2, frames, 25.0)
        requests = loader.requests_of(stream, [(loader.File(str(path), f"test/{path.name}"), info)], kind)
        if not requests:
            raise ValueError(
                f"a clip of {stream.total_frames} frames is longer than a test film: film_frames= makes it longer"
            )
        return requests, where

    # ---- steps

    def check_steps(self) -> Finding | None:
        """Training steps on noise, where the experiment's kind of device is here."""
        wanted_gpu = self.experiment.trainer.accelerator == "gpu"
        if not self.config.steps or self.config.steps_per_s or self.space is None or (wanted_gpu and not self.gpus):
            return None
        try:
            self.steps = measure_steps(self.experiment, self.config.steps)
        except torch.OutOfMemoryError as error:
            if self.experiment.trainer.strategy == "fsdp":
                says = "not measured: one device, which does not share its weights, has no room for a step"
                return Finding("WARN", "training step", says, "give steps_per_s=")
            advice = "lower batch_size, or set decoder.checkpointing=true"
            return Finding("FAIL", "training step", f"out of memory: {str(error).splitlines()[0]}", advice)
        except (ConfigError, FileNotFoundError) as error:
            return Finding("WARN", "training step", f"not measured: {error}")
        if not self.steps:
            return Finding(
                "WARN", "training step", "not measured: its batches are more than pixels", "give steps_per_s="
            )
        parts = [f"{step.stream} {1e3 * step.seconds:.0f} ms" for step in self.steps]
        says = f"{', '.join(parts)} on one device, peak {max(s.peak_gib for s in self.steps):.1f} GiB; noise for data"
        return Finding("OK", "training step", says, "", [vars(step) for step in self.steps])

    @cached_property
    def pace(self) -> tuple[float, str] | None:
        """Seconds of an optimiser step of the whole run, and where the number comes from: given, measured, an earlier run's, or
        assumed. None: nobody knows."""
        t, data, c = self.experiment.trainer, self.experiment.data, self.config
        if c.steps_per_s:
            return 1 / c.steps_per_s, "as given"
        weights = loader.shares(self.train, data.order)
        if self.steps:
            seconds = sum(weights[step.stream] * step.seconds for step in self.steps) * t.accumulate_grad_batches
            return seconds, "measured on one device here, nothing added for the others"
        device = torch.cuda.get_device_name() if self.gpus else "cpu"
        if before := cost.earlier_run(self.experiment, self.name, device, self.processes):
            return before.step_s, f"as in {before.run}"
        if self.space is None or not self.on_gpu:
            return None
        flops = cost.training_flops(self.experiment, self.space)
        if flops.keys() != self.train.keys():
            return None
        peak = t.peak_tflops if isinstance(t.peak_tflops, float | int) else c.tflops
        seconds = sum(weights[name] * count for name, (_, count) in flops.items()) / (1e12 * peak * c.mfu)
        return (
            seconds * t.accumulate_grad_batches,
            f"ASSUMED: {c.mfu:.0%} of {peak:g} TFLOP/s for the decoder and no time for encoder and losses (steps_per_s= if you know)",
        )

    def check_need(self) -> Finding | None:
        """Cores that keep the trainer fed, against those of this machine and the workers that are set."""
        if not self.clip_s:
            return None
        if self.pace is None:
            says = "unknown: no step was measured and none can be assumed"
            return Finding("WARN", "cores for the loader", says, "give steps_per_s=")
        t, data = self.experiment.trainer, self.experiment.data
        step_s, origin = self.pace
        known = {name: stream for name, stream in self.train.items() if name in self.clip_s}
        for_process = loader.core_seconds(known, data.order, self.clip_s) * t.accumulate_grad_batches / step_s
        node, workers = for_process * self.per_node, max(1, math.ceil(for_process))
        batch = sum(w * self.train[n].batch_size for n, w in loader.shares(self.train, data.order).items())
        clips = batch * self.processes * t.accumulate_grad_batches / step_s
        says = (
            f"{node:.1f} cores on a node of {self.per_node} processes, for {clips:.3g} clips/s "
            f"({1 / step_s:.3g} steps/s, {origin})"
        )
        has = machine.num_cores()
        numbers = {
            "cores_of_a_node": node,
            "clips_per_s": clips,
            "step_s": step_s,
            "origin": origin,
            "workers_of_a_process": workers,
            "cores_here": has,
        }
        advice = []
        if self.is_here and node > has:
            packets = " data.verify=packets decodes once and not twice," if data.verify == "window" else ""
            advice.append(f"this machine has {has:g}:{packets} smaller or re-encoded films cost less")
        if data.num_workers < workers:
            advice.append(f"data.num_workers={workers} (it is {data.num_workers})")
        return Finding("WARN" if advice else "OK", "cores for the loader", says, "; ".join(advice), numbers)

    # ---- memory and time

    def check_memory(self) -> Finding | None:
        """What a step holds against what a GPU has."""
        if self.space is None:
            return None
        try:
            estimate = show.memory_estimate(self.experiment, self.decoder())
        except ConfigError as error:
            return Finding("FAIL", "memory of a step", str(error))
        if estimate is None:
            return None
        # Steps are measured on one device, which holds everything: with FSDP2 only the estimate is of the run.
        measured = 0.0
        if self.gpus and self.experiment.trainer.strategy != "fsdp":
            measured = max((step.peak_gib for step in self.steps), default=0.0)
        peak = measured or estimate.peak
        how = "measured" if measured else "estimated without encoder and losses"
        says = (
            f"{peak:.1f} GiB a device at {estimate.largest} ({how}; {estimate.states.gib:.1f} of it weights, gradients, Adam "
            f"and average; {estimate.states.strategy})"
        )
        if not self.gpus:
            status = "WARN" if self.on_gpu else "OK"
            return Finding(status, "memory of a step", says, "no GPU here to compare with" if self.on_gpu else "", peak)
        total = torch.cuda.get_device_properties(0).total_memory / GIB
        says += f", of {total:.0f}"
        if peak > total:
            return Finding(
                "FAIL", "memory of a step", says, "lower batch_size, or set decoder.checkpointing=true", peak
            )
        return Finding("WARN" if peak > TIGHT * total else "OK", "memory of a step", says, "", peak)

    def check_hours(self) -> Finding:
        """What the whole run takes."""
        t, kind = self.experiment.trainer, "gpu" if self.on_gpu else "cpu"
        if t.budget_minutes:
            seconds, origin = 60 * t.budget_minutes, "trainer.budget_minutes"
        elif self.pace is None:
            return Finding(
                "WARN", "expected", "unknown: no step was measured and none can be assumed", "give steps_per_s="
            )
        else:
            seconds, origin = (
                t.max_steps * self.pace[0],
                f"{t.max_steps:,} steps of {self.pace[0]:.3g} s, {self.pace[1]}",
            )
        hours = cost.device_hours(seconds * self.processes / 3600, kind)
        says = f"{cost.duration(seconds)}, {hours}; {origin}; validations come on top"
        return Finding("OK", "expected", says, "", {"seconds": seconds, "processes": self.processes})
