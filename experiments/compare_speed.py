"""How fast the rows of a comparison decode, on this machine and now: every decoder in a process of its own, taking turns.

Each decodes one clip of the first stream's length and size, whole, the way validation does, with the run's own weights.
Encoding is not counted. Medians over rounds; every other round runs in reverse order, so that whatever else the machine
does is shared. Peak memory is of the decoder's process: its weights, and what decoding needs beyond all that was loaded.
"""

import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from decoders.base import DECODER
from experiments import compare_runs
from experiments import weights as weights_of
from experiments.bench import Decoder, device_name
from experiments.bench_memory import machine_busy_s, memory, peak_memory, release_memory, reset_peak
from experiments.bench_table import GIB
from experiments.comparison import Row, Speed, Stream
from experiments.config import build_decoder, build_space
from experiments.evaluate import reference_methods

ROUNDS = 5
MAX_MINUTES = 10.0  # no further round is begun after so long
WARM_UP = 2


@dataclass(frozen=True)
class Turn:
    """What one process decodes with."""

    label: str
    run: str
    method: str
    stream: str
    frames: int
    size: tuple[int, int]
    device: str
    bf16: bool  # autocast, as evaluation in bf16-mixed
    threads: int | None = None
    overrides: tuple[str, ...] = ()  # that it was evaluated under


class Timed:
    """A run's decoder, or another of its methods, ready to decode one clip again and again."""

    @torch.no_grad()
    def __init__(self, turn: Turn) -> None:
        torch.manual_seed(0)
        self.turn, self.device = turn, torch.device(turn.device)
        experiment = compare_runs.as_trained(turn.run, turn.overrides)
        self.space = build_space(experiment)
        self.decoder = build_decoder(experiment, self.space)
        run, kind = compare_runs.split(turn.run)
        weights_of.fill(self.decoder, experiment, weights_of.find(experiment, run, kind), kind)
        for name in self.decoder.discriminators:
            setattr(self.decoder, name, None)
        self.decoder.eval().requires_grad_(False).to(self.device)
        self.batch = self._batch()
        methods = self.decoder.own_references() | reference_methods(self.space)
        self.run = self._own if turn.method == DECODER else lambda: methods[turn.method](self.batch)
        release_memory(self.device)
        self.resident_bytes = memory(self.device)

    def _batch(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        video = torch.rand(1, 3, self.turn.frames, *self.turn.size, generator=generator) * 2 - 1
        return self.decoder.with_latent({"video": video.to(self.device), "key": ["speed"]})

    def _own(self) -> torch.Tensor:
        given = {"size": tuple(self.batch["video"].shape[2:]), "reference": self.batch.get("reference")}
        given |= {"generator": self.decoder.clip_generator("speed")} | self.decoder.sampling(self.batch)
        return self.decoder.decode(self.batch["latent"], **given)

    def description(self) -> dict[str, Any]:
        """Bytes of the weights that decode: known of the run's own network only."""
        own = self.turn.method == DECODER
        return {"weights_bytes": sum(p.nbytes for p in self.decoder.model.parameters()) if own else None}

    @torch.no_grad()
    def measure(self, warm_up: int = 0) -> dict[str, Any]:
        """Seconds for the clip, and the peak of memory beyond what was loaded; ``warm_up`` decodes are not counted."""
        with torch.autocast(self.device.type, torch.bfloat16) if self.turn.bf16 else nullcontext():
            for _ in range(warm_up):
                self.run()
            release_memory(self.device)
            reset_peak(self.device)
            busy, own, begun = machine_busy_s(), time.process_time(), self._now()
            frames = self.run().shape[2]
            seconds = self._now() - begun
        if frames != self.turn.frames:
            raise RuntimeError(f"{self.turn.label} gave {frames} frames in place of {self.turn.frames}")
        peak = peak_memory(self.device)
        others = None if busy is None else machine_busy_s() - busy - (time.process_time() - own)
        return {
            "seconds": seconds,
            "beyond_bytes": None if peak is None else max(0, peak - self.resident_bytes),
            "others_s": others,
        }

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure(
    rows: Sequence[Row], stream: Stream, bf16: bool, rounds: int = ROUNDS, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Fill in the rows' ``speed``, all on clips of ``stream``, and say on what machine and how it was measured.

    ``overrides``: those of the evaluations, such as the number of sampling steps.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads() if device == "cpu" else None
    how = {"device": device, "bf16": bf16, "threads": threads, "overrides": tuple(overrides)}
    size = tuple(stream.size)
    decoders = [
        Decoder(Turn(row.id, row.run, row.method, stream.name, stream.frames, size, **how), Timed) for row in rows
    ]
    taken: list[list[dict[str, Any]]] = [[] for _ in rows]  # as rows and decoders stand
    try:
        for decoder in decoders:
            decoder.wait_until_built()
        about = [dict(decoder.about) for decoder in decoders]
        for decoder, known in zip(decoders, about, strict=True):
            decoder.ask("measure", warm_up=WARM_UP)
            known["failed"] = decoder.failed
        begun = time.monotonic()
        for number in range(rounds):
            if number and time.monotonic() - begun > 60 * MAX_MINUTES:
                print(f"speed: stopped after {number} rounds and {MAX_MINUTES:g} minutes", file=sys.stderr)
                break
            for place in range(len(decoders))[:: -1 if number % 2 else 1]:
                if not about[place]["failed"] and (found := decoders[place].ask("measure")):
                    taken[place].append(found)
                about[place]["failed"] = about[place]["failed"] or decoders[place].failed
    finally:
        for decoder in decoders:
            decoder.close()
    for row, measured, known in zip(rows, taken, about, strict=True):
        row.speed = summarise(measured, known, stream)
    each = [one for measured in taken for one in measured]
    return {
        "device": device_name(device),
        "threads": threads,
        "dtype": "bfloat16 autocast" if bf16 else "float32",
        "rounds": max(map(len, taken), default=0),
        "others_cpu_share": others_share(each),
    }


def others_share(taken: Sequence[dict[str, Any]]) -> float | None:
    """What other processes had of all cores while decoders were timed; of all rounds together, as the kernel counts in ticks
    that are longer than a short decode. None where it cannot be known."""
    if not taken or any(one["others_s"] is None for one in taken):
        return None
    share = sum(one["others_s"] for one in taken) / (sum(one["seconds"] for one in taken) * (os.cpu_count() or 1))
    return min(1.0, max(0.0, share))


def summarise(taken: Sequence[dict[str, Any]], about: dict[str, Any], stream: Stream) -> Speed:
    """Median and range over the rounds of one decoder; the worst round's memory."""
    speed = Speed(stream.name, stream.frames, list(stream.size), [each["seconds"] for each in taken])
    speed.failed = about.get("failed") or ""
    if not taken:
        return speed
    fps = [stream.frames / seconds for seconds in speed.seconds]
    speed.fps, speed.fps_low, speed.fps_high = statistics.median(fps), min(fps), max(fps)
    weights, beyond = about["weights_bytes"], [each["beyond_bytes"] for each in taken]
    if None not in beyond:
        speed.beyond_gib = max(beyond) / GIB
    if weights is not None:
        speed.weights_gib = weights / GIB
        speed.peak_gib = None if speed.beyond_gib is None else speed.weights_gib + speed.beyond_gib
    return speed


def ratio(ours: Speed | None, theirs: Speed | None) -> list[float] | None:
    """Our frames/s over theirs, round by round: median, min, max. None where either was not measured."""
    if ours is None or theirs is None or not (ours.seconds and theirs.seconds):
        return None
    found = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=False)]
    return [statistics.median(found), min(found), max(found)]
