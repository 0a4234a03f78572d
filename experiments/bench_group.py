"""Measuring one group of ``make bench-all``: processes, checks, rounds."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import Decoder
from experiments.bench_check import Difference, against_exact, against_plain, difference
from experiments.bench_rows import PLAIN, Entry, Group, Profile, options_of
from experiments.bench_store import Store
from experiments.bench_worker import Job

AHEAD = 1  # processes that are built on the CPU before their turn
NOTHING: dict[str, Any] = {"status": "", "reason": "", "repetitions": []}


@dataclass(frozen=True)
class Cell:
    """One thing that a decoder is timed at."""

    frames: int
    size: tuple[int, int]
    mode: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.frames}x{self.size[0]}x{self.size[1]}", self.mode]
        return " ".join(parts + [f"{key}={value}" for key, value in self.arguments])


@dataclass
class Runner:
    """A decoder in one way, in its process while it has one."""

    entry: Entry
    way: str
    group: str
    job: Job
    cells: list[Cell]
    decoder: Decoder | None = None
    about: dict[str, Any] = field(default_factory=dict)
    layout: str | None = None
    refused: str = ""  # why, for all its cells
    gone: tuple[str, str] | None = None  # status and reason, once it has no process any more
    check: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.entry.label} | {self.way}"

    def key(self, cell: Cell) -> str:
        return f"{self.name} | {cell}"

    def start(self) -> None:
        if self.decoder is None and self.gone is None:
            self.decoder, self.about = Decoder(self.job), {}  # a later batch's process is settled anew

    def ask(self, request: str, **arguments: Any) -> Any:
        """The answer; None where it has none, and ``gone`` or the decoder's ``failed`` says why."""
        if self.gone:
            return None
        self.start()
        try:
            if not self.about and request != "settle":
                self.settle()
            return None if self.gone else self.decoder.ask(request, **arguments)
        except RuntimeError as error:
            self._ended(request, str(error))
            return None

    def settle(self) -> bool:
        """Built and on its device; False where that did not work."""
        if self.gone or self.about:
            return not self.gone
        self.start()
        try:
            self.decoder.wait_until_built()
            self.about = self.decoder.ask("settle") or {}
            if self.decoder.failed:
                self._ended("settle", self.decoder.failed)
        except RuntimeError as error:
            self._ended("settle", str(error))
        return not self.gone

    def _ended(self, request: str, message: str) -> None:
        reason = message.strip().splitlines()[-1]
        status = "failed"
        if "exit code -9" in message or "out of memory" in message.lower():
            status = "out of memory"
        elif request == "settle" and self.way != PLAIN and reason.startswith("ValueError"):
            status = "not available"  # this family has no such form
        self.gone = (status, reason.removeprefix("ValueError: "))
        _say(f"{self.name}: {status}: {self.gone[1]}")
        self.close()

    def close(self) -> None:
        if self.decoder:
            self.decoder.close()
        self.decoder = None


# --- a group ----------------------------------------------------------------------------------------------------------


def measure_group(
    group: Group,
    profile: Profile,
    store: Store,
    shared: dict[str, Any],
    sizes: list[tuple[int, int]],
    num_frames: list[int] | None,
    name: str,
    max_gib: float | None = None,
) -> None:
    """Measure what ``store`` lacks of ``group``. ``sizes`` and ``num_frames`` replace the profile's where they are given."""
    runners = []
    for entry in group.entries:
        cells = cells_of(entry, profile, name, sizes, num_frames)
        for way in entry.ways.get(name, (PLAIN,)):
            runners.append(Runner(entry, way, group.name, _job(entry, way, shared), cells))
    batches = batched(runners, max_gib or _free_gib() / 2) if profile.together else [[runner] for runner in runners]
    batches = [batch for batch in batches if any(_is_wanted(runner, runners, store) for runner in batch)]
    try:
        for number, batch in enumerate(batches):
            ahead = [] if profile.together else [runner for later in batches[number + 1 :] for runner in later]
            _measure_batch(batch, ahead, profile, store)
            _close(batch)
    finally:
        _close(runners)


def _close(runners: list[Runner]) -> None:
    for runner in runners:
        if runner.decoder:
            runner.decoder.end()
    for runner in runners:
        runner.close()


def _is_wanted(runner: Runner, runners: list[Runner], store: Store) -> bool:
    """Whether it has something to measure, or frames to give to another that has."""
    if not all(store.has(runner.key(cell)) for cell in runner.cells):
        return True
    label = runner.entry.label
    for other in runners if runner.way == PLAIN else ():
        missing = [cell for cell in other.cells if not store.has(other.key(cell))]
        files = [_frames_file(store, label, "float32")]
        if other.entry.label == label:
            files += [_frames_file(store, label, str(cell)) for cell in missing]
        elif other.entry.equals != label:
            continue
        if missing and not all(file.exists() for file in files):
            return True
    return False


def cells_of(
    entry: Entry, profile: Profile, name: str, sizes: list[tuple[int, int]], num_frames: list[int] | None
) -> list[Cell]:
    """By size, then mode, then arguments."""
    places = entry.sizes.get(name, profile.sizes)
    if sizes:
        places = [(frames, *size) for size in sizes for frames in sorted({place[0] for place in places})]
    if num_frames:
        places = [(frames, *size) for size in dict.fromkeys(place[1:] for place in places) for frames in num_frames]
    each = [(place, mode, given) for place in places for mode in profile.modes for given in entry.arguments]
    return [Cell(place[0], tuple(place[1:]), mode, given) for place, mode, given in each]


def _job(entry: Entry, way: str, shared: dict[str, Any]) -> Job:
    return Job(
        label=f"{entry.label} {way}",
        experiment=(entry.experiment, ()) if entry.experiment else None,
        release=entry.release or None,
        kind=entry.kind,
        options=options_of(way),
        references=entry.references,
        lazy=True,
        **shared,
    )


def batched(runners: list[Runner], max_gib: float) -> list[list[Runner]]:
    """As many as fit into memory, each time with the anchor and with the plain forms that others are held against."""
    anchor, *rest = runners
    plain = {runner.entry.label: runner for runner in runners if runner.way == PLAIN}
    batches: list[list[Runner]] = []
    batch = [anchor]
    for runner in rest:
        new = [each for each in (plain[runner.entry.label], runner) if each not in batch]
        new = new[-1:] if plain[runner.entry.label] is runner else new
        if len(batch) > 1 and sum(map(_bytes, [*batch, *new])) > max_gib * 2**30:
            batches.append(batch)
            batch = [anchor] + [each for each in (plain[runner.entry.label],) if each is not runner] + [runner]
        else:
            batch += new
    return [*batches, batch]


def _bytes(runner: Runner) -> float:
    """About what its process holds: bf16 weights and, beside those of an optimised form, the plain ones."""
    return runner.entry.millions * 1e6 * (2 if runner.way == PLAIN else 4)


def _free_gib() -> float:
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable")), 8.0)


def _measure_batch(batch: list[Runner], ahead: list[Runner], profile: Profile, store: Store) -> None:
    """Settle and check everyone, then every cell in rounds. While one is settled only the next of the batch and of ``ahead`` are
    built: until it has been, each holds its weights in float32."""
    for index, runner in enumerate(batch):
        for later in [*batch[index:], *ahead][: 1 + AHEAD]:
            later.start()
        _say(f"building {runner.name}")
        if runner.settle() and not (runner.check or runner.refused):  # an anchor comes again with every batch
            _check(runner, profile, store)
    cells = list(dict.fromkeys(cell for runner in batch for cell in runner.cells))
    for place in dict.fromkeys((cell.frames, cell.size, cell.mode) for cell in cells):
        here = [(r, cell) for r in batch for cell in r.cells if (cell.frames, cell.size, cell.mode) == place]
        if not all(store.has(runner.key(cell)) for runner, cell in here):
            _measure_cells(here, profile, store)


def _frames_file(store: Store, name: str, what: str) -> Path:
    """Where frames wait for those that must equal them, who may be measured after this process has ended."""
    letters = "".join(letter if letter.isalnum() else "-" for letter in f"{name} {what}").lower()
    folder = store.path.with_suffix(".frames")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{letters}-{store.conditions.get('code', '')}.npy"


def _check(runner: Runner, profile: Profile, store: Store) -> None:
    """Against float32 at the profile's small size; fills ``check`` and ``refused``."""
    frames, *size = profile.check_size
    if not _prepare(runner, Cell(frames, tuple(size), runner.cells[0].mode, runner.entry.arguments[0])):
        return
    runner.layout = None if runner.entry.kind == "diffusers" and runner.entry.release else runner.layout
    own = runner.ask("look")
    label = runner.entry.equals if runner.way == PLAIN and runner.entry.equals else runner.entry.label
    file = _frames_file(store, label, "float32")
    if runner.way == PLAIN and not runner.entry.equals:
        exact = runner.ask("look", exact=True)
        if exact is None:  # no memory for a copy in float32: then nothing says what bf16 itself costs
            return
        np.save(file, exact)
        np.save(_frames_file(store, label, "own"), own)
    if own is None or not file.exists():
        runner.refused = runner.refused or "there is no plain form to hold it against"
        return
    exact, plain = np.load(file), np.load(_frames_file(store, label, "own"))
    if runner.way == PLAIN and runner.entry.equals:  # it is the truth of its own optimised forms, too
        np.save(_frames_file(store, runner.entry.label, "float32"), exact)
        np.save(_frames_file(store, runner.entry.label, "own"), own)
    try:
        found, of_plain = difference(own, exact), difference(plain, exact)
        reason = against_exact(found, of_plain, runner.way, other_code=bool(runner.entry.equals))
    except ValueError as error:
        runner.refused = str(error)
        return
    against = label if runner.way == PLAIN and runner.entry.equals else f"{runner.entry.label} plain"
    runner.check = {"float32": found.content(), "plain_float32": of_plain.content(), "against": against}
    runner.refused = reason


def _prepare(runner: Runner, cell: Cell) -> dict[str, Any] | None:
    """Warm up for a cell, at the nearest length and size that the decoder has; what was done, or None."""
    if not runner.settle():
        return None
    about = runner.about
    size = tuple(-(-side // about["multiple"]) * about["multiple"] for side in cell.size)
    frames = runner.ask("nearest_length", num_frames=cell.frames)
    if frames is None:
        return None
    mode = cell.mode if about["streams"] else "clip"
    prepared = runner.ask(
        "prepare",
        batch_size=1,
        num_frames=frames,
        size=size,
        mode=mode,
        arguments=dict(cell.arguments),
        layout=runner.layout,
    )
    if prepared is None:
        return None
    runner.layout = runner.layout or prepared["layout"]
    return prepared | {"frames": frames, "decoded_size": list(size), "mode": mode}


def _measure_cells(here: list[tuple[Runner, Cell]], profile: Profile, store: Store) -> None:
    """One size and mode: everyone prepared and checked, then rounds, every other one in reverse order."""
    rows: dict[str, dict[str, Any]] = {}
    for runner, cell in here:
        rows[runner.key(cell)] = _begun(runner, cell, store)
    begun = time.monotonic()
    for number in range(profile.rounds):
        if number and time.monotonic() - begun > 60 * profile.minutes:
            _say(f"stopped after {number} rounds: minutes={profile.minutes:g}")
            break
        for runner, cell in here[:: -1 if number % 2 else 1]:
            row = rows[runner.key(cell)]
            if row["status"]:
                continue
            found = runner.ask("measure", arguments=dict(cell.arguments))
            if found is None:
                row["status"], row["reason"] = runner.gone or ("out of memory", runner.decoder.failed)
                continue
            row["repetitions"].append(found)
            seconds = sum(found["step_s"])
            _say(f"round {number + 1}, {runner.key(cell)}: {row['frames'] / seconds:.3g} frames/s")
    for key, row in rows.items():
        row["status"] = row["status"] or "measured"
        store.put(key, row)


def _begun(runner: Runner, cell: Cell, store: Store) -> dict[str, Any]:
    """A row before its rounds: warmed up and held against the plain form, or with the reason why it is not measured."""
    entry = runner.entry
    row = NOTHING | {
        "id": runner.key(cell),
        "label": entry.label,
        "way": runner.way,
        "group": runner.group,
        "asked": [cell.frames, *cell.size],
        "mode": cell.mode,
        "arguments": dict(cell.arguments),
        "repetitions": [],
        "check": runner.check,
        "about": runner.about,
    }
    if not runner.gone and cell.mode == "stream" and runner.about and not runner.about["streams"]:
        row["mode"] = "clip"
    if runner.gone or runner.refused:
        row["status"], row["reason"] = runner.gone or ("refused", runner.refused)
        return row
    _say(f"warming up {runner.key(cell)}")
    prepared = _prepare(runner, cell)
    if prepared is None:
        row["status"], row["reason"] = runner.gone or ("out of memory", runner.decoder.failed)
        return row
    row |= {key: prepared[key] for key in ("frames", "decoded_size", "mode", "layout", "operations")}
    file = _frames_file(store, entry.label, str(cell))
    frames = runner.ask("look")
    if runner.way == PLAIN:
        np.save(file, frames)
    elif not file.exists():
        row["status"], row["reason"] = "refused", "there is no plain form at this size to hold it against"
    else:
        try:
            found = difference(frames, np.load(file))
            row["check"] = runner.check | {"plain": found.content()}
            of_plain = Difference(**{k: v for k, v in runner.check["plain_float32"].items() if k != "db"})
            row["reason"] = against_plain(found, of_plain, runner.way)
        except ValueError as error:
            row["reason"] = str(error)
        row["status"] = "refused" if row["reason"] else ""
    return row


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
