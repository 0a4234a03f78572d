"""The quality half of a comparison: runs' evaluations read, columns checked, rows merged, intervals and differences drawn."""

import csv
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decoders.base import DECODER
from decoders.scoring import TRUTH
from experiments import compare_runs, evaluate
from experiments import weights as weights_of
from experiments.comparison import FLOOR, METHOD, RUN, SPACE, UNITS, Column, Comparison, Row, Run, Score, Stream, films
from experiments.compose import ConfigError
from experiments.runs import runs_root
from metrics import higher_is_better, truth_has_value
from metrics.intervals import interval_of_mean, paired
from metrics.protocol import Protocol, require_same

TEACHER = "teacher"
SOME, ALL, NONE = "some", "all", "none"
FEWEST = 6  # clips below which nothing is called best: a lucky one decides
SAME = 1e-3  # by how large a share scores of one method on one clip may differ and count as measured twice

NAMED_STEPS = re.compile(r"(\d+) steps\b")
OF_SETS = re.compile("fvd_")  # scores of all clips together
ONLY_FRAMES = "only_frames"  # in a protocol's definition: the group of frames that was scored

Clips = dict[tuple[str, str], dict[str, dict[str, float]]]  # (stream, method) -> score's name -> clip -> score


@dataclass
class Evaluation:
    """What a run's evaluation left in its folder."""

    name: str
    folder: Path
    result: dict[str, Any]
    clips: Clips

    @property
    def protocols(self) -> dict[str, Protocol]:
        """``<stream>/<score's name>`` -> protocol, of the decoder's rows; what no method has a score of is left out, such as what
        lies between two frames of a group that has one."""
        scored = {f"{mean['stream']}/{name}" for mean in self.result["means"] for name in mean["scores"]}
        return {c: Protocol.from_dict(values) for c, values in self.result["protocols"].items() if c in scored}

    @property
    def streams(self) -> set[str]:
        return {column.partition("/")[0] for column in self.result["protocols"]}


def read(name: str, sets: Sequence[str] | None = None, overrides: Sequence[str] = ()) -> Evaluation:
    """A run's evaluation; measured now where there is none of the weights that the run has. Raises ConfigError.

    ``overrides`` say what is measured and how (``validation.metrics=[...]``), as `make evaluate` takes them.
    """
    run, kind = compare_runs.split(name)
    stem, folder, typed = compare_runs.stem(name), runs_root() / run / "evaluation", None
    if sets is not None or overrides or kind:
        typed = [*compare_runs.overrides_of(name), *overrides]
        folder = evaluate.evaluation_dir(stem, typed, kind, sets)
    path = folder / evaluate.RESULT
    whole = path.is_file() and (folder / evaluate.BY_FRAME).is_file()
    result = json.loads(path.read_text()) if whole else None
    if result is None or not _measured(name, result["weights"]):
        print(f"compare: {name} is evaluated first", file=sys.stderr)
        result = evaluate.evaluate(stem, compare_runs.overrides_of(name) if typed is None else typed, kind, sets)
    return Evaluation(name, folder, result, _clips(folder / evaluate.CLIPS))


def _measured(name: str, weights: Mapping[str, Any]) -> bool:
    """Whether these weights are what the run has now: their step, and their bytes where the evaluation says which it read."""
    if compare_runs.newest_step(name) not in (None, weights["step"]):
        return False
    file = compare_runs.weights_file(name) if "sha256" in weights else None
    return file is None or weights_of.sha256(file) == weights["sha256"]


def _clips(path: Path) -> Clips:
    """Scores that are numbers; one that is NaN, or empty, is none. Whether that is as it should be, the means know."""
    found: Clips = {}
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            scores = found.setdefault((line["stream"], line["method"]), {})
            for name, text in line.items():
                if (value := _number(text)) is not None:
                    scores.setdefault(name, {})[line["key"]] = value
    return found


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# --- columns ------------------------------------------------------------------------------------------------------------


def columns(evaluations: Sequence[Evaluation]) -> tuple[list[Stream], list[Column]]:
    """The streams and columns that the runs have, each measured alike in all runs that have it. A score of a group of frames
    that has other frames in other runs is so many columns.

    Raises ConfigError that names the fields that differ and says which runs can be compared.
    """
    every: dict[str, dict[str, Protocol]] = {}
    for evaluation in evaluations:
        for column, protocol in evaluation.protocols.items():
            every.setdefault(column, {})[evaluation.name] = protocol
    found = {id: group for column, protocols in every.items() for id, group in _by_frames(column, protocols).items()}
    for column, protocols in found.items():
        try:
            require_same(protocols)
        except ValueError as error:
            raise ConfigError(f"{column}: {error}\n{_groups(protocols)}") from None
    if len(evaluations) > 1 and not set.intersection(*(each.streams for each in evaluations)):
        told = "\n  ".join(f"{each.name}: {', '.join(sorted(each.streams))}" for each in evaluations)
        raise ConfigError(f"these runs were evaluated on no clips in common; their streams are\n  {told}")
    named = dict.fromkeys(column.partition("/")[0] for column in found)
    clips = {stream: _keys(evaluations, stream) for stream in named}
    streams = [_stream(name, next(p for c, p in _of(found, name)), clips[name]) for name in named]
    runs = {id: [*protocols] for id, protocols in found.items()}
    return streams, [_column(id, p, runs[id]) for stream in named for id, p in _of(found, stream)]


def _by_frames(column: str, protocols: dict[str, Protocol]) -> dict[str, dict[str, Protocol]]:
    """A column's protocols by the frames that it scores: one column, or as many as there are groups of frames."""
    groups: dict[str, dict[str, Protocol]] = {}
    for name, protocol in protocols.items():
        groups.setdefault(_frames(protocol), {})[name] = protocol
    return {column: protocols} if len(groups) == 1 else {f"{column}{frames}": g for frames, g in groups.items()}


def _frames(protocol: Protocol) -> str:
    """`` (frames 5, 10, 15)`` of a score of a group of frames; empty for one of all frames."""
    about = protocol.definition.get(ONLY_FRAMES)
    if about is None:
        return ""
    if isinstance(about, str):  # of an evaluation from before groups said so
        return " (frames not recorded)"
    return f" (frames {about['frames']}{' ' + about['hash'][:4] if 'hash' in about else ''})"


def _of(found: dict[str, dict[str, Protocol]], stream: str) -> list[tuple[str, Protocol]]:
    return [(id, next(iter(p.values()))) for id, p in found.items() if id.partition("/")[0] == stream]


def _keys(evaluations: Iterable[Evaluation], stream: str) -> list[str]:
    scores = next(each.clips[stream, DECODER] for each in evaluations if (stream, DECODER) in each.clips)
    return sorted(set().union(*(clips.keys() for clips in scores.values())))


def _stream(name: str, protocol: Protocol, keys: list[str]) -> Stream:
    return Stream(
        name, len(keys), protocol.frames[1], list(protocol.size), protocol.frame_stride, protocol.resize, keys
    )


def _column(id: str, protocol: Protocol, runs: list[str]) -> Column:
    """``id`` is ``<stream>/<name>`` and, where several columns share that, the frames."""
    stream, _, label = id.partition("/")
    name = label.removesuffix(_frames(protocol))
    group = protocol.definition.get(ONLY_FRAMES) or ""
    metric = name.removesuffix(f"_{group['group'] if isinstance(group, dict) else group}")
    unit = UNITS.get(metric.partition("_")[0], "")
    return Column(
        id=id,
        stream=stream,
        name=name,
        metric=metric,
        higher_is_better=higher_is_better(name),
        unit=unit,
        digits=2 if unit or OF_SETS.match(name) else 4,
        per_clip=not OF_SETS.match(name),
        protocol=protocol.measured(),
        label=label,
        of_truth=truth_has_value(name),
        runs=runs,
    )


def _groups(protocols: dict[str, Protocol]) -> str:
    """Which of these runs may stand in one table."""
    groups: dict[str, list[str]] = {}
    for name, protocol in protocols.items():
        groups.setdefault(protocol.measured_hash(), []).append(name)
    told = [f'make compare exps="{" ".join(names)}"' for names in groups.values() if len(names) > 1]
    alone = [names[0] for names in groups.values() if len(names) == 1]
    if not told:
        return "no two of these runs were measured alike"
    return "these can be compared: " + "; ".join(told + [f"like none of the others: {', '.join(alone)}"] * bool(alone))


# --- rows ---------------------------------------------------------------------------------------------------------------


def rows(
    evaluation: Evaluation, run: Run, table: Sequence[Column], references: Iterable[str], methods: str
) -> list[Row]:
    """The run's decoder first, then its other methods as ``methods`` asks. ``references``: names of its space's own."""
    found, references = [], list(references)
    means = {(m["stream"], m["method"]): m["scores"] for m in evaluation.result["means"]}
    for method in dict.fromkeys(method for _, method in means):
        kind = RUN if method == DECODER else _kind(method, references)
        if kind != RUN and (methods == NONE or (methods == SOME and kind == METHOD and method != TEACHER)):
            continue
        row = Row(
            id=run.name if kind == RUN else f"{run.name}: {method}",
            label=run.name if kind == RUN else f"{run.name}: {method}",
            run=run.name,
            runs=[run.name],
            method=method,
            kind=kind,
            scores={},
            clips={},
            made=_made(evaluation, method) if kind in (RUN, METHOD) else {},
            sampler_steps=_sampler_steps(evaluation, method, kind),
            parameters=run.parameters if kind == RUN else None,
            compression=run.compression if kind in (RUN, METHOD, SPACE) else None,
        )
        for column in table:
            mean_of, every = means.get((column.stream, method), {}), evaluation.clips.get((column.stream, method), {})
            if evaluation.name not in column.runs or column.name not in mean_of:
                continue
            clips, whole = every.get(column.name, {}), every.get("frames", {})
            if mean_of[column.name] is None or not column.per_clip:  # no mean of a prediction that is not finite
                row.scores[column.id] = Score(mean_of[column.name], None, None, len(whole), films=films(whole))
            elif clips:
                row.clips[column.id] = clips
                row.scores[column.id] = _score(clips)
        if row.scores:
            found.append(row)
    return found


def _kind(method: str, references: Sequence[str]) -> str:
    if method not in references:
        return METHOD
    return SPACE if method.endswith("space's own decoder") else FLOOR


def _made(evaluation: Evaluation, method: str) -> dict[str, Any]:
    """How the pixels were made; what differs between streams (a task) is left out."""
    every = [protocol.made() for protocol in evaluation.protocols.values()]
    shared = {key: value for key, value in every[0].items() if all(made.get(key) == value for made in every)}
    return shared if method == DECODER else {key: shared[key] for key in ("dtype", "latent_space") if key in shared}


def _sampler_steps(evaluation: Evaluation, method: str, kind: str) -> int | None:
    """The run's own number, where its decoder has a sampler; another one where a method is called by it ("4 steps")."""
    if kind == METHOD and (named := NAMED_STEPS.match(method)):
        return int(named[1])
    made = _made(evaluation, DECODER) if kind == RUN else {}
    return made.get("sampler_steps", made.get("steps"))


def _score(clips: Mapping[str, float]) -> Score:
    mean, low, high = interval_of_mean(list(clips.values()))
    bounds = (None if math.isnan(bound) else bound for bound in (low, high))
    return Score(mean, *bounds, clips=len(clips), films=films(clips))


def merged(found: Sequence[Row], several: bool) -> list[Row]:
    """Runs first, the baseline before the others, then methods, spaces' decoders and floors. A method that scored the same in
    several runs (a floor, a teacher) stands once; where there are two such groups, their names say whose they are."""
    kept: list[Row] = []
    for row in found:
        twin = next((k for k in kept if k.kind != RUN and k.method == row.method and _alike(k, row)), None)
        if twin is None:
            kept.append(row)
            continue
        twin.runs += row.runs
        for column in row.scores.keys() - twin.scores.keys():
            twin.scores[column], twin.clips[column] = row.scores[column], row.clips.get(column, {})
    for row in kept:
        alone = sum(other.method == row.method for other in kept) == 1
        if row.kind != RUN and (not several or alone and (row.kind in (FLOOR, SPACE) or len(row.runs) > 1)):
            row.id = row.label = row.method
        elif row.kind != RUN:
            more = f" and {len(row.runs) - 1} more" if len(row.runs) > 1 else ""
            row.id = row.label = f"{row.runs[0]}{more}: {row.method}"
    ids = [row.id for row in kept]
    assert len(set(ids)) == len(ids), f"rows of one name: {ids}"
    return sorted(kept, key=lambda row: (RUN, METHOD, SPACE, FLOOR).index(row.kind))


def _alike(a: Row, b: Row) -> bool:
    shared = a.clips.keys() & b.clips.keys()
    pairs = [(a.clips[c][key], b.clips[c][key]) for c in shared for key in a.clips[c].keys() & b.clips[c].keys()]
    return bool(pairs) and all(abs(x - y) <= SAME * max(abs(x), abs(y), 0.1) for x, y in pairs)


# --- differences --------------------------------------------------------------------------------------------------------


def differences(comparison: Comparison) -> None:
    """Every row minus the baseline run's, on the clips that both have; of what the truth has a value of its own for, minus the
    truth's, and nothing where that was not scored."""
    for column in comparison.columns:
        base = _against(comparison, column)
        if base is None or column.id not in base.scores or base.scores[column.id].mean is None:
            continue
        column.against = base.id
        for row in comparison.rows:
            score = row.scores.get(column.id)
            if row is base or score is None or score.mean is None:
                continue
            ours, theirs = row.clips.get(column.id, {}), base.clips.get(column.id, {})
            if ours.keys() & theirs.keys():
                score.delta = [None if math.isnan(value) else value for value in paired(ours, theirs)]
            elif not ours and not theirs:  # a score of all clips together
                score.delta = [score.mean - base.scores[column.id].mean, None, None]


def _against(comparison: Comparison, column: Column) -> Row | None:
    """Truths that scored alike in all runs are one row; several are of runs that saw other pixels, and none is the truth of all."""
    if not column.of_truth:
        return comparison.row(comparison.baseline)
    truths = [row for row in comparison.rows if row.method == TRUTH and column.id in row.scores]
    return truths[0] if len(truths) == 1 else None


def mark_best(comparison: Comparison) -> None:
    """The best run of every column, and with it all whose paired difference from it has an interval that holds zero.

    Nothing is best of a column that has one run, or fewer than FEWEST clips that all its runs have, and of what the truth has a
    value of its own for (flicker): less than the truth's is no merit. A run whose predictions are not finite takes no part.
    """
    for column in comparison.columns:
        own = [row for row in comparison.own_rows() if column.id in row.scores]
        own = [row for row in own if row.scores[column.id].mean is not None]
        if len(own) < 2 or column.of_truth:
            continue
        common = set.intersection(*(set(row.clips.get(column.id, {})) for row in own))
        if (len(common) if column.per_clip else min(row.scores[column.id].clips for row in own)) < FEWEST:
            continue
        best = (max if column.higher_is_better else min)(own, key=lambda row: row.scores[column.id].mean)
        for row in own if column.per_clip else [best]:
            held = row is best or _may_be_chance(row.clips[column.id], best.clips[column.id])
            row.scores[column.id].best = held


def _may_be_chance(ours: Mapping[str, float], theirs: Mapping[str, float]) -> bool:
    _, low, high = paired(ours, theirs)
    return low <= 0 <= high


def shares(comparison: Comparison) -> None:
    """For runs that were evaluated beside a teacher: their PSNR as a share of its, by stream."""
    for row in comparison.own_rows():
        if (teacher := teacher_of(comparison, row)) is not None:
            for column in comparison.columns:
                pair = [each.scores[column.id].mean for each in (row, teacher) if column.id in each.scores]
                if column.name == "psnr" and len(pair) == 2 and None not in pair:
                    row.share[column.stream] = pair[0] / pair[1]


def teacher_of(comparison: Comparison, row: Row) -> Row | None:
    """The row of the teacher that a run was evaluated beside."""
    return next((r for r in comparison.rows if r.method == TEACHER and row.run in r.runs), None)
