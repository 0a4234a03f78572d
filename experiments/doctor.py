"""Is this machine fit to train, and for what will it take: ``python -m experiments.doctor [NAME] [key=value ...]``.

Every line is OK, WARN or FAIL, and what is not OK says what to do; the exit status is 1 where something fails. Without an
experiment only the machine is looked at, and how fast it decodes films; with one also its data, encoder and parent, what
its clips cost against what its trainer would take, its memory, and its hours. Nothing is trained and nothing is kept.

    make doctor exp=flashdecoder_xl_stage2 json=doctor.json [steps_per_s=2.5 skip=[ranks,loader] trainer.devices=4 ...]

Options of its own, below in DoctorConfig, have short names; every other key changes the experiment.
"""

import dataclasses
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from datamodules.probe import BadFile
from experiments import doctor_experiment as asked
from experiments import doctor_loader as loader
from experiments import doctor_machine as machine
from experiments.bench import device_name, options
from experiments.checkpoints import write_atomically
from experiments.compose import ConfigError, run_cli
from experiments.config import Experiment, load
from experiments.doctor_machine import Finding
from experiments.runs import runs_root
from experiments.train import quiet

MACHINE = ("versions", "host", "gpus", "peers", "ranks", "open_files", "disk")
EXPERIMENT = ("shared_memory", "space", "parent", "data", "films", "loader", "steps", "need", "memory", "hours")
CHECKS = (*MACHINE, *EXPERIMENT)  # what skip= and only= may name, in their order


@dataclass
class DoctorConfig:
    """What is looked at, and how long. All may be given without a prefix."""

    json: str | None = None  # a file for all numbers
    skip: list[str] = field(default_factory=list)  # checks to leave out
    only: list[str] = field(default_factory=list)  # no others than these
    ranks: int = 2  # processes of the all-reduce where there are fewer than two GPUs
    disk_mb: int = 256  # written and read on the disk of runs
    files: int = 8  # of every source, opened and decoded
    seconds: float = 4.0  # for each speed of reading
    sizes: list[list[int]] = field(default_factory=lambda: [[480, 832], [720, 1280]])  # of test films: height, width
    num_frames: int = 17  # of windows of test films
    film_frames: int = 250  # of a test film: ten seconds
    gop: int = 250  # frames between its key frames, at most: x264's own choice
    preset: str = "medium"  # x264's
    steps: int = 3  # training steps on noise for each stream, where the experiment's device is here; 0: none
    steps_per_s: float | None = None  # of the whole run, where you know it: then nothing is assumed
    mfu: float = 0.4  # assumed where no step can be measured
    tflops: float = (
        989.4  # and of this peak, unless trainer.peak_tflops is a number: dense bf16 of an H100 SXM by its data sheet
    )

    def __post_init__(self) -> None:
        if odd := sorted({*self.skip, *self.only} - set(CHECKS)):
            raise ValueError(f"there is no check {odd[0]}; there are {', '.join(CHECKS)}")
        if min(self.ranks - 1, self.disk_mb, self.files, self.num_frames, self.gop) < 1 or self.steps < 0:
            raise ValueError("ranks must be 2 or more; disk_mb, files, num_frames and gop 1 or more; steps 0 or more")
        if min(self.seconds, self.mfu, self.tflops, self.steps_per_s or 1) <= 0 or self.mfu > 1:
            raise ValueError("seconds, tflops and steps_per_s must be above 0, and mfu in (0, 1]")
        if self.film_frames < self.num_frames:
            raise ValueError(f"film_frames={self.film_frames} is less than num_frames={self.num_frames}")
        for size in self.sizes:
            if len(size) != 2 or min(size) < 16 or size[0] % 2 or size[1] % 2:
                raise ValueError(f"sizes: {list(size)} is not [height, width], both even and 16 or more")


def main(arguments: list[str]) -> int:
    name = arguments[0] if arguments and "=" not in arguments[0] else None
    own = {f.name for f in dataclasses.fields(DoctorConfig)}
    typed = arguments[name is not None :]
    config = options([text for text in typed if text.partition("=")[0] in own], DoctorConfig, "doctor")
    overrides = [text for text in typed if text.partition("=")[0] not in own]
    if overrides and name is None:
        raise ConfigError(
            f"{overrides[0]} is no option of doctor ({', '.join(sorted(own))}); name an experiment to change it"
        )
    quiet()
    if config.json and not Path(config.json).absolute().parent.is_dir():
        raise ConfigError(f"json={config.json}: there is no folder {Path(config.json).absolute().parent}")
    experiment = load(name, overrides) if name else None
    findings = []
    for finding in examine(experiment, name or "", overrides, config):
        findings.append(finding)
        print(line(finding), flush=True)
    fails, warns = (sum(finding.status == status for finding in findings) for status in ("FAIL", "WARN"))
    print(f"\n{len(findings)} checks: {fails} failed, {warns} with a warning")
    if config.json:
        text = json.dumps(report(arguments, config, findings), indent=1) + "\n"
        write_atomically(Path(config.json), lambda path: path.write_text(text))
        print(f"written to {config.json}")
    return 1 if fails else 0


def line(finding: Finding) -> str:
    """How a finding is printed: status, what, what was seen; what to do, on a line of its own."""
    advice = f"\n      -> {finding.advice}" if finding.advice else ""
    return f"{finding.status:4}  {finding.what}: {finding.says}{advice}"


def report(arguments: list[str], config: DoctorConfig, findings: list[Finding]) -> dict[str, Any]:
    """All findings with their numbers, and where and when they were made."""
    return {
        "command": " ".join(
            ["python -m experiments.doctor", *(text for text in arguments if not text.startswith("json="))]
        ),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "versions": machine.versions(),
        "options": {key: value for key, value in asdict(config).items() if key != "json"},
        "findings": [asdict(finding) for finding in findings],
    }


def examine(experiment: Experiment | None, name: str, overrides: list[str], config: DoctorConfig) -> Iterator[Finding]:
    """All findings, as they are made. A check that breaks down is a finding too, and the others go on."""
    case = asked.Case(experiment, name, overrides, config) if experiment else None
    with tempfile.TemporaryDirectory() as folder:
        films = TestFilms(Path(folder), config)
        for what, check in _checks(case, config, films):
            if what in config.skip or (config.only and what not in config.only):
                continue
            try:
                found = check()
                yield from [found] if isinstance(found, Finding) else found or ()
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                says = f"could not be looked at: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
                yield Finding("FAIL", what, says, f"skip=[{what}] leaves it out")


Check = tuple[str, Callable[[], Finding | Iterable[Finding] | None]]


def _checks(case: "asked.Case | None", config: DoctorConfig, films: "TestFilms") -> Iterator[Check]:
    yield "versions", machine.check_versions
    yield "host", machine.check_cores
    yield "gpus", lambda: machine.check_gpus(case.gpus_wanted if case else None)
    yield "peers", machine.check_peers
    yield "ranks", lambda: machine.check_ranks(config.ranks)
    yield "open_files", machine.check_open_files
    yield "disk", lambda: machine.check_runs_disk(runs_root(), config.disk_mb, case.checkpoint_bytes() if case else 0)
    if case is None:
        yield "films", lambda: films.speeds([tuple(size) for size in config.sizes])
        return
    yield "shared_memory", case.check_shared_memory
    yield "space", case.check_space
    yield "parent", case.check_parent
    yield "data", case.check_data
    yield "films", lambda: films.speeds(case.film_sizes())
    yield "loader", lambda: case.check_clips(films)
    yield "steps", case.check_steps
    yield "need", case.check_need
    yield "memory", case.check_memory
    yield "hours", case.check_hours


class TestFilms:
    """Films of any size, made when they are asked for, and how fast they are read."""

    __test__ = False  # no class of tests

    def __init__(self, folder: Path, config: DoctorConfig) -> None:
        self._folder, self._config = folder, config
        self._made: dict[tuple[int, int], loader.Film] = {}

    def film(self, size: tuple[int, int]) -> loader.Film:
        """A film of (height, width) ``size``; odd sides are one larger, as H.264 wants them."""
        c, size = self._config, tuple(side + side % 2 for side in size)
        if size not in self._made:
            path = self._folder / f"{size[0]}x{size[1]}.mp4"
            print(f"      making a film of {c.film_frames} frames at {size[0]}x{size[1]}", file=sys.stderr, flush=True)
            self._made[size] = loader.make_film(path, size, c.film_frames, c.gop, c.preset)
        return self._made[size]

    def image(self, size: tuple[int, int]) -> Path:
        """A JPEG of this size."""
        path = self._folder / f"{size[0]}x{size[1]}.jpg"
        return path if path.is_file() else loader.make_image(path, size)

    def speeds(self, sizes: list[tuple[int, int]]) -> Iterator[Finding]:
        """Frames for a second of a core, by size and library: whole films, and windows at random places."""
        yield from (self._speed(size, reader) for size in sizes for reader in loader.READERS)

    def _speed(self, size: tuple[int, int], reader: str) -> Finding:
        film, c, what = self.film(size), self._config, f"{reader} {size[0]}x{size[1]}"
        try:
            whole = loader.whole_film(str(film.path), reader, c.seconds)
            some = loader.windows(str(film.path), reader, c.num_frames, c.seconds)
        except BadFile as error:  # decord fails on films whose width it does not like
            other = loader.READERS[reader == loader.READERS[0]]
            return Finding("WARN", what, f"{error}; {film}", f"data.reader={other} for films of this width")
        says = (
            f"{loader.told(whole)} frames/s of a core from first to last, {loader.told(some)} in windows of "
            f"{c.num_frames} at random places; {film}"
        )
        return Finding(
            "OK", what, says, "", {"size": size, "reader": reader, "whole": whole.to_dict(), "windows": some.to_dict()}
        )


if __name__ == "__main__":
    run_cli(main)
