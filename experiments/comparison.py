"""What a comparison of runs is, as plain data: made by :mod:`experiments.compare`, read by tables, plots and the report.

All is JSON: what was not measured is None or absent, and no number is NaN.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

RUN, METHOD, FLOOR, SPACE = "run", "method", "floor", "space"  # kinds of rows
UNITS = {"psnr": "dB"}


@dataclass
class Run:
    """A run as it was trained and evaluated. ``total_*`` count the stages before it too (init_from)."""

    name: str
    experiment: str
    family: str
    header: str  # first line of the experiment's file
    run_folder: str
    folder: str  # of the evaluation
    parameters: int | None  # of the decoder at inference
    compression: float  # numbers of video for one of the latent
    latent_space: str
    fingerprint: str
    start: str  # where its weights came from before training
    parents: list[str]
    finished: bool
    pretrained: bool = False  # it, or the first stage before it, began with weights whose training no cost here counts
    minutes: float | None = None  # of training, what precedes its first step included, without validations
    total_minutes: float | None = None
    devices: int | None = None
    device_kind: str = ""  # that it was trained on; empty: not known
    device_hours: float | None = None  # total minutes times devices; None where the number of devices is not known
    steps: int | None = None
    total_steps: int | None = None
    clips_seen: int | None = None
    total_clips_seen: int | None = None
    weights: dict[str, Any] = field(default_factory=dict)
    precision: str = ""
    evaluated: str = ""
    evaluated_on: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # of the evaluation, by part
    code: str = ""  # a hash of the sources that the evaluation ran; empty where it does not say


@dataclass
class Stream:
    """Clips that runs were scored on."""

    name: str
    clips: int
    frames: int  # up to the last one scored
    size: list[int]
    stride: int | None  # in frames of the file; None: it has no one stride
    resize: str
    keys: list[str]
    films: int | None = None  # that the clips are of

    def __post_init__(self) -> None:
        self.films = films(self.keys) if self.films is None else self.films


@dataclass
class Column:
    """One metric on one stream; ``protocol`` is the measured side, which all its scores share.

    Scores of a group of frames that has other frames in other runs are columns of one ``name`` and several ids.
    """

    id: str
    stream: str
    name: str
    metric: str
    higher_is_better: bool
    unit: str
    digits: int
    per_clip: bool  # False: a score of all clips together (FVD), which has no interval
    protocol: dict[str, Any]
    label: str = ""  # for people; the name, where nothing else is said
    of_truth: bool = False  # the truth has a value of its own (flicker): neither way is better, nearer to it is
    against: str = ""  # the row that differences are taken from: the baseline's, or the truth's; empty: there are none
    runs: list[str] | None = None  # those that have it; None: all

    def __post_init__(self) -> None:
        self.label = self.label or self.name


@dataclass
class Score:
    """A mean over clips with its 95 % interval; ``delta`` is this row minus the column's ``against`` on the same clips."""

    mean: float | None  # None: a prediction is not finite, so there is no mean, interval, difference or mark
    low: float | None
    high: float | None
    clips: int
    best: bool = False
    delta: list[float | None] | None = None  # mean, low, high
    films: int | None = None  # that the clips are of, where that is known


@dataclass
class Speed:
    """Decoding one clip at a time; median over rounds in which all decoders took turns."""

    stream: str
    frames: int
    size: list[int]
    seconds: list[float]  # one a round
    fps: float | None = None
    fps_low: float | None = None
    fps_high: float | None = None
    ratio: list[float] | None = None  # frames/s over the baseline's, round by round: median, min, max
    weights_gib: float | None = None
    beyond_gib: float | None = None
    peak_gib: float | None = None
    failed: str = ""


@dataclass
class Row:
    """A method's scores: a run's decoder, another method of a run, or one that several runs share."""

    id: str
    label: str
    run: str
    runs: list[str]  # all that share it
    method: str
    kind: str
    scores: dict[str, Score]
    clips: dict[str, dict[str, float]]  # column id -> clip -> score
    made: dict[str, Any]  # how its pixels were made: dtype, latent space, choices of decoding
    speed: Speed | None = None
    parameters: int | None = None
    compression: float | None = None
    share: dict[str, float] = field(default_factory=dict)  # stream -> its PSNR over its run's teacher's
    sampler_steps: int | None = None  # of a generative decoder; None: it has no sampler, or the method does not say
    teacher_ratio: list[float] | None = None  # frames/s over its run's teacher's, round by round: median, min, max


@dataclass
class Comparison:
    """See the fields' classes. ``papers``: figures that papers print, theirs, never in a column with ours."""

    title: str
    command: str
    date: str
    baseline: str
    sets: list[str] | None
    versions: dict[str, str]
    machine: dict[str, Any]
    runs: list[Run]
    streams: list[Stream]
    columns: list[Column]
    rows: list[Row]
    papers: list[dict[str, Any]] = field(default_factory=list)
    categories: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)  # of all runs' evaluations, and of what is timed

    def run(self, name: str) -> Run:
        """The run of this name. Raises KeyError."""
        return _named(self.runs, "name", name)

    def row(self, id: str) -> Row:
        """The row of this id. Raises KeyError."""
        return _named(self.rows, "id", id)

    def stream(self, name: str) -> Stream:
        """The stream of this name. Raises KeyError."""
        return _named(self.streams, "name", name)

    def column(self, stream: str, name: str) -> Column:
        """The column of a stream and a score's name (its id's, where several share the name). Raises KeyError."""
        return _named(self.columns, "id", f"{stream}/{name}")

    def columns_of(self, stream: str) -> list[Column]:
        """A stream's columns, in order."""
        return [column for column in self.columns if column.stream == stream]

    def own_rows(self) -> list[Row]:
        """The runs' own decoders."""
        return [row for row in self.rows if row.kind == RUN]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Comparison":
        """Back from :meth:`to_dict` or its JSON."""
        parts = dict(values)
        rows = []
        for row in parts["rows"]:
            scores = {column: Score(**score) for column, score in row["scores"].items()}
            speed = None if row["speed"] is None else Speed(**row["speed"])
            rows.append(Row(**{**row, "scores": scores, "speed": speed}))
        made = {"runs": Run, "streams": Stream, "columns": Column}
        lists = {name: [kind(**each) for each in parts[name]] for name, kind in made.items()}
        return cls(**{**parts, **lists, "rows": rows})


def films(keys: Iterable[str]) -> int | None:
    """How many films clips are of, where their keys tell: ``film#beginning``."""
    parts = [key.partition("#") for key in keys]
    return len({film for film, _, _ in parts}) if all(mark for _, mark, _ in parts) else None


def clips_of_films(clips: int, films: int | None) -> str:
    """``5 clips of 1 film``: clips of one film are less than so many independent ones."""
    of = "" if films is None else f" of {films} film{'' if films == 1 else 's'}"
    return f"{clips} clip{'' if clips == 1 else 's'}{of}"


def _named(entries: list[Any], attribute: str, wanted: str) -> Any:
    for entry in entries:
        if getattr(entry, attribute) == wanted:
            return entry
    raise KeyError(f"{wanted!r}; there are {[getattr(entry, attribute) for entry in entries]}")
