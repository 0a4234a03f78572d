"""Evaluations, runs and comparisons made by hand, for tests of what a comparison does with them."""

import math
from collections.abc import Sequence
from pathlib import Path

from decoders.base import DECODER
from experiments import compare_notes, compare_scores
from experiments.compare_scores import Evaluation
from experiments.comparison import Comparison, Run
from metrics.protocol import Protocol, clip_list_hash

FLOORS = ("mean colour of the clip", "the dct space's own decoder")
A = {"a": 20.0, "b": 25.0, "c": 30.0, "d": 21.0, "e": 29.0, "f": 25.0}


def protocol(metric: str = "psnr", clips: Sequence[str] = "abc", **changes) -> Protocol:
    settings = dict(
        metric=metric, frames=(0, 9), frame_stride=1, size=(32, 48), resize="crop", clips=clip_list_hash(clips),
        num_clips=len(clips), dtype="32-true", latent_space="dct-1", definition={"peak": 1.0},
    )  # fmt: skip
    return Protocol(**settings | changes)


def evaluation(name: str, methods: dict[str, dict[str, dict[str, float]]], of_all=None, **changes) -> Evaluation:
    """``methods``: method -> metric -> clip (a letter) -> score, on the stream "s"; ``of_all``: method -> set metric -> score.

    A score that is NaN is of a prediction that is not finite: an empty cell, and no mean.
    """
    of_all = of_all or {}
    metrics = {m: sorted(scores) for m, scores in methods[DECODER].items()}
    protocols = {f"s/{m}": protocol(m, keys, **changes).to_dict() for m, keys in metrics.items()}
    letters = next(iter(metrics.values()))
    protocols |= {f"s/{m}": protocol(m, letters, **changes).to_dict() for m in of_all.get(DECODER, {})}
    means = [
        {
            "stream": "s",
            "method": method,
            "clips": len(letters),
            "scores": {m: None if _broken(values) else 0.0 for m, values in scores.items()} | of_all.get(method, {}),
        }
        for method, scores in methods.items()
    ]
    result = {"means": means, "protocols": protocols, "compression": 64.0, "device": "cpu"}
    clips = {
        ("s", method): {"frames": dict.fromkeys(letters, 9.0)}
        | {m: {k: v for k, v in values.items() if not math.isnan(v)} for m, values in scores.items()}
        for method, scores in methods.items()
    }
    return Evaluation(name, Path("/nowhere"), result, clips)


def _broken(values: dict[str, float]) -> bool:
    return any(math.isnan(value) for value in values.values())


def run(name: str) -> Run:
    return Run(
        name=name, experiment=name, family="f", header="", run_folder="/nowhere", folder="/nowhere", parameters=1000,
        compression=64.0, latent_space="dct", fingerprint=f"dct-{name}", start="from scratch", parents=[], finished=True,
        weights={"kind": "last", "step": 1}, evaluated="2026-01-01", evaluated_on="cpu",
    )  # fmt: skip


def shifted(by: float, **changes: float) -> dict[str, float]:
    return {key: value + by for key, value in A.items()} | changes


def compared(*evaluations, methods: str = "some", references=FLOORS) -> Comparison:
    streams, columns = compare_scores.columns(evaluations)
    runs = [run(each.name) for each in evaluations]
    rows = [
        row
        for each, about in zip(evaluations, runs, strict=True)
        for row in compare_scores.rows(each, about, columns, references, methods)
    ]
    comparison = Comparison(
        title="t", command="c", date="2026-01-01", baseline=runs[0].name, sets=None, versions={"torch": "2"}, machine={},
        runs=runs, streams=streams, columns=columns, rows=compare_scores.merged(rows, len(runs) > 1),
    )  # fmt: skip
    compare_scores.differences(comparison)
    compare_scores.mark_best(comparison)
    compare_scores.shares(comparison)
    comparison.notes = compare_notes.notes(comparison)
    return comparison
