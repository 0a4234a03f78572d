"""Runs side by side: ``python -m experiments.compare A B C [key=value ...]``, or ``make compare exps="A B C"``.

    sets       named evaluation sets in place of the validation clips: sets=[davis,mcl_jcv]
    baseline   the run from which differences are taken, default the first
    out        folder, default RUNS_ROOT/comparisons/<names>
    speed      false leaves out the speed measurement; true (default) times all decoders now, in turns, on this machine
    methods    which rows there are besides the runs: some (default: a teacher, the space's own decoder, floors), all (every
               method that a run was evaluated with: numbers of steps, controls), none
    train      true trains first, one after another, what has not been trained to its end

What else has a dot in its key, and pad, goes to every run's evaluation and to what is timed: validation.metrics=[psnr,fvd_i3d_16f]
data.val.clips.size=[256,256] objective.steps=4 pad=replicate.

Runs are folders under RUNS_ROOT; NAME:best is a run with those weights, NAME:start what an experiment starts from (released weights),
which needs no run. One that is trained and not evaluated is evaluated first. Quality is read from the runs'
evaluations; intervals and paired differences are over their clips. What was measured differently is not put in
one column. Writes table.txt, .md, .tex and .csv, comparison.json, and plots as PNG and SVG, in place of those of before.
"""

import hashlib
import json
import platform
import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning
import torch

from decoders.base import DECODER
from experiments import (
    compare_notes,
    compare_runs,
    compare_scores,
    compare_speed,
    compare_table,
    evaluate,
    reproduction,
    resumed,
)
from experiments.checkpoints import write_atomically
from experiments.compare_scores import ALL, NONE, SOME, TEACHER, Evaluation
from experiments.compare_table import worst_clips as worst
from experiments.comparison import RUN, Comparison, Row, Run
from experiments.compose import ConfigError, run_cli
from experiments.compose import names as known_experiments
from experiments.runs import LONGEST_NAME, runs_root

__all__ = ["Comparison", "beside", "gather", "worst", "write"]
TIMED = re.compile(rf"{TEACHER}|\d+ steps|the .* space's own decoder")  # methods besides the runs' that are timed
OPTIONS = ("sets", "baseline", "out", "speed", "methods", "train")
JSON = "comparison.json"
WRITTEN = re.compile(
    r"table\.(txt|md|tex|csv)|(fps|curve|scatter|frames)_.+\.(png|svg)"
)  # by this command, beside JSON


def gather(
    names: Sequence[str],
    sets: Sequence[str] | None = None,
    baseline: str | None = None,
    speed: bool = True,
    methods: str = SOME,
    finished: bool = False,
    overrides: Sequence[str] = (),
) -> Comparison:
    """Everything that tables, plots and the report show of these runs (folder names under RUNS_ROOT, see the top of this file).

    Args:
        methods: some, all or none.
        finished: refuse runs that have not come to their last step.
        overrides: for the evaluations of all runs, such as ``validation.metrics=[...]``.

    Raises:
        ConfigError: a run is not trained, the baseline is none of them, or they were not measured alike.
    """
    comparison = _scored(names, sets, baseline, methods, finished, overrides)
    if speed:
        _measure_speed(comparison)
    comparison.notes = _notes(comparison)
    return comparison


def _notes(comparison: Comparison) -> list[str]:
    """Below the table, and whose evaluation ran other code than there is now."""
    now = resumed.code()
    old = [run.name for run in comparison.runs if run.code and run.code != now]
    said = f"{', '.join(old)}: evaluated by other code than today's: make evaluate exp=... measures again."
    return compare_notes.notes(comparison) + [said] * bool(old)


def _scored(
    names: Sequence[str],
    sets: Sequence[str] | None,
    baseline: str | None,
    methods: str,
    finished: bool,
    overrides: Sequence[str],
) -> Comparison:
    """All but the speed."""
    names = list(dict.fromkeys(names))
    if not names:
        raise ConfigError('which runs? make compare exps="a b c"')
    baseline = baseline or names[0]
    if baseline not in names:
        raise ConfigError(f"baseline={baseline} is none of the runs: {', '.join(names)}")
    if methods not in (SOME, ALL, NONE):
        raise ConfigError(f"methods={methods} is none of {SOME}, {ALL}, {NONE}")
    names.sort(key=lambda name: name != baseline)  # it comes first; the others as they were named
    for name in names:
        compare_runs.require_trained(name, finished)
    evaluations = [compare_scores.read(name, sets, overrides) for name in names]
    streams, columns = compare_scores.columns(evaluations)
    runs, rows = [], []
    for evaluation in evaluations:
        parameters, space = compare_runs.decoder_parameters(evaluation.name, overrides)
        runs.append(_run(evaluation, parameters, space))
        references = evaluate.reference_methods(space)
        rows += compare_scores.rows(evaluation, runs[-1], columns, references, methods)
    comparison = Comparison(
        title=f"compare {' '.join(names)}",
        command=" ".join(["python -m experiments.compare", *map(shlex.quote, names)]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        baseline=baseline,
        sets=None if sets is None else list(sets),
        versions={"python": platform.python_version(), "torch": torch.__version__, "lightning": lightning.__version__},
        machine={},
        runs=runs,
        streams=streams,
        columns=columns,
        rows=compare_scores.merged(rows, several=len(names) > 1),
        papers=[figure for run in runs for figure in reproduction.figures_of(run.experiment, run.name)],
        overrides=list(overrides),
        categories=[_of_category(evaluation.name, c) for evaluation in evaluations for c in _categories(evaluation)],
    )
    compare_scores.differences(comparison)
    compare_scores.mark_best(comparison)
    compare_scores.shares(comparison)
    return comparison


def _categories(evaluation: Evaluation) -> list[dict[str, Any]]:
    return evaluation.result.get("categories") or []


def _of_category(name: str, found: dict[str, Any]) -> dict[str, Any]:
    return {"row": name if found["method"] == DECODER else f"{name}: {found['method']}"} | found


def _run(evaluation: Evaluation, parameters: int | None, space: Any) -> Run:
    name, result = evaluation.name, evaluation.result
    parents = compare_runs.parents(name)
    costs = [compare_runs.cost(each) for each in (name, *parents)]
    own, device = costs[0], costs[0]["device"] or ""
    hours = [c["minutes"] / 60 * c["devices"] if c["minutes"] is not None and c["devices"] else None for c in costs]
    return Run(
        name=name,
        experiment=compare_runs.stem(name),
        family=compare_runs.config(name)["family"],
        header=compare_runs.header(name),
        run_folder=str(compare_runs.folder_of(name)),
        folder=str(evaluation.folder),
        parameters=parameters,
        compression=result["compression"],
        latent_space=space.name,
        fingerprint=space.fingerprint,
        start=compare_runs.start(name),
        parents=parents,
        finished=compare_runs.finished(name),
        pretrained=compare_runs.pretrained(name),
        minutes=own["minutes"],
        total_minutes=compare_runs.total([c["minutes"] for c in costs]),
        devices=own["devices"],
        device_kind="CPU" if device.lower() == "cpu" else device,
        device_hours=compare_runs.total(hours),
        steps=own["steps"],
        total_steps=compare_runs.total([c["steps"] for c in costs]),
        clips_seen=own["clips_seen"],
        total_clips_seen=compare_runs.total([c["clips_seen"] for c in costs]),
        weights=result["weights"],
        precision=own["precision"] or "",
        evaluated=result["date"],
        evaluated_on=result["device"],
        versions=result["versions"],
        seconds=result.get("seconds") or {},
        code=result.get("code") or "",
    )


def _measure_speed(comparison: Comparison) -> None:
    """All decoders in turns on clips of the first stream, in bf16 where all runs were evaluated so."""
    timed = [row for row in comparison.rows if row.kind == RUN or TIMED.fullmatch(row.method)]
    bf16 = all("bf16" in row.made.get("dtype", "") for row in comparison.own_rows())
    comparison.machine = compare_speed.measure(timed, comparison.streams[0], bf16, overrides=comparison.overrides)
    base = comparison.row(comparison.baseline)
    for row in timed:
        row.speed.ratio = None if row is base else compare_speed.ratio(row.speed, base.speed)
    for row in comparison.own_rows():
        if (teacher := compare_scores.teacher_of(comparison, row)) is not None:
            row.teacher_ratio = compare_speed.ratio(row.speed, teacher.speed)


# --- what is written ----------------------------------------------------------------------------------------------------


def write(comparison: Comparison, folder: Path, command: str | None = None) -> list[Path]:
    """Tables, JSON and plots of a comparison in ``folder``; returns the files. Those of a comparison that was there go."""
    from experiments import compare_plots  # here: whoever only prints a table needs no matplotlib

    if (folder / JSON).is_file():
        for path in folder.iterdir():
            if WRITTEN.fullmatch(path.name):
                path.unlink()
    comparison.command = command or comparison.command
    texts = {f"table.{kind}": compare_table.render(comparison, kind) for kind in compare_table.KINDS}
    texts[JSON] = json.dumps(portable(comparison.to_dict()), indent=1, allow_nan=False) + "\n"
    for name, text in texts.items():
        write_atomically(folder / name, lambda path, text=text: path.write_text(text))
    return [*(folder / name for name in texts), *compare_plots.draw(comparison, folder)]


def portable(values: dict[str, Any]) -> dict[str, Any]:
    """Runs' folders as they lie under RUNS_ROOT: a file that is shown to others names no place on this machine."""
    root = runs_root()
    for run in values["runs"]:
        for key in ("run_folder", "folder"):
            if Path(run[key]).is_relative_to(root):
                run[key] = str(Path(run[key]).relative_to(root))
    return values


def beside(names: Sequence[str]) -> str:
    """The table at the end of a run that names others (``beside:``): the first run's controls and the others' against it.

    Raises ConfigError: a run is missing or not finished.
    """
    comparison = _scored(names, None, None, ALL, True, ())
    comparison.rows = [row for row in comparison.rows if _belongs(row, names[0])]
    comparison.papers = []
    _measure_speed(comparison)
    comparison.notes = _notes(comparison)
    return "\n" + compare_table.render(comparison, "txt", worst=False)


def _belongs(row: Row, first: str) -> bool:
    """Runs and teachers of all; the other methods (controls) of the first run alone, and no floors."""
    return row.kind == RUN or row.method == TEACHER or (row.kind == "method" and first in row.runs)


def main(arguments: list[str]) -> None:
    names = [text for text in arguments if "=" not in text or "+" in text.partition("=")[0]]
    options = dict(text.split("=", 1) for text in arguments if text not in names)
    overrides = [f"{key}={options.pop(key)}" for key in list(options) if "." in key or key == "pad"]
    if odd := sorted(options.keys() - set(OPTIONS)):
        raise ConfigError(f"{odd[0]}: no such option of compare; there are {', '.join(OPTIONS)}")
    speed, training = _is_true(options, "speed", "true"), _is_true(options, "train", "false")
    sets = options.get("sets")
    wanted = None if sets is None else [one.strip() for one in sets.strip("[]").split(",") if one.strip()]
    if training:
        from experiments import train  # here: it imports this module for its own last table

        train.quiet()
        train.train_missing([name for name in names if name in known_experiments()], [])
    comparison = gather(
        names, wanted, options.get("baseline"), speed, options.get("methods", SOME), overrides=overrides
    )
    folder = runs_root() / "comparisons" / _folder([*names, *(wanted or []), *overrides])
    folder = Path(options.get("out", folder))
    files = write(comparison, folder, " ".join(["python -m experiments.compare", *map(shlex.quote, arguments)]))
    print(f"{compare_table.render(comparison, 'txt')}\n{len(files)} files: {folder}")


def _is_true(options: dict[str, str], key: str, default: str) -> bool:
    value = options.get(key, default)
    if value not in ("true", "false"):
        raise ConfigError(f"{key}={value} is neither true nor false")
    return value == "true"


def _folder(parts: Sequence[str]) -> str:
    """A name that file systems take; what is cut off or replaced is in its hash."""
    full = "-vs-".join(parts)
    safe = re.sub(r"[^\w.,=+-]", "-", full)
    digest = hashlib.sha256(full.encode()).hexdigest()[:8]
    return safe if safe == full and len(full) <= LONGEST_NAME else f"{safe[: LONGEST_NAME - 9]}-{digest}"


if __name__ == "__main__":
    run_cli(main)
