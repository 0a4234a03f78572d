"""Results of VBench's scorers, read back: every decoder's scores and the differences on the same videos.

The scorer's own number stands in the column; the difference between two decoders is of pairs, with a 95 % interval over
prompts: the videos of one prompt are no independent draws, so their mean is one value.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.compose import ConfigError
from experiments.measured import markdown
from experiments.vbench_suites import SUITES, totals
from metrics.intervals import paired

RESULTS = "*_eval_results.json"
NOT_JUDGED = -1.0


@dataclass(frozen=True)
class Dimension:
    """What the scorer says of one decoder in one dimension; ``videos`` by file name, NaN where it could not judge."""

    score: float
    videos: dict[str, float] = field(default_factory=dict)


def read_result(folder: Path, dimension: str) -> Dimension | None:
    """The newest result in ``folder``; None: the scorer has not written one. Raises ConfigError: it is no such result."""
    files = sorted(folder.glob(RESULTS), key=lambda path: path.stat().st_mtime)
    if not files:
        return None
    try:
        content = json.loads(files[-1].read_text())[dimension]
        score, lines = float(content[0]), content[-1]
        if isinstance(lines, int | float):  # a score alone
            lines = []
        if not isinstance(lines, list):
            raise TypeError(f"a {type(lines).__name__} where the list of videos should be")
        videos = {Path(line["video_path"]).name: _value(line["video_results"], dimension) for line in lines}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            f"{files[-1]} is no result of {dimension} ({type(error).__name__}: {error}); delete it, and score again"
        ) from None
    if not math.isfinite(score):
        raise ConfigError(f"{files[-1]}: the score of {dimension} is {score}; see scorer.log beside it")
    return Dimension(score, videos)


def compare(layout: Mapping[str, Any], results: Mapping[str, Mapping[str, Dimension]]) -> dict[str, Any]:
    """Scores, totals and paired differences to the first decoder, as JSON.

    Args:
        layout: ``layout.json``: suite, labels, prompts (file name -> prompt).
        results: label -> dimension -> what the scorer said.
    """
    labels = layout["labels"]
    baseline = labels[0]
    found: dict[str, Any] = {"baseline": baseline, "decoders": {}}
    for label in labels:
        dimensions = results.get(label, {})
        rows = {}
        for name, said in dimensions.items():
            row: dict[str, Any] = {"score": said.score, "videos": len(said.videos)}
            other = results.get(baseline, {}).get(name)
            if label != baseline and other is not None:
                row |= _difference(said, other, layout["prompts"], name)
            rows[name] = row
        full = layout["mode"] == "standard" and not layout["partial"]
        scores = {name: said.score for name, said in dimensions.items()}
        found["decoders"][label] = {"dimensions": rows, "totals": totals(layout["suite"], scores) if full else {}}
    return found


def report(layout: Mapping[str, Any], compared: Mapping[str, Any]) -> str:
    """A Markdown table: a line per dimension, a column per decoder, differences with their intervals."""
    labels, suite = layout["labels"], SUITES[layout["suite"]]
    first, others = labels[0], labels[1:]
    lines = [["dimension", first, *(cell for label in others for cell in (label, f"{label} - {first} (95 %)"))]]
    of = {label: compared["decoders"][label]["dimensions"] for label in labels}
    for name in suite.dimensions:
        if not any(name in of[label] for label in labels):
            continue
        line = [name, _shown(of[first].get(name))]
        for label in others:
            line += [_shown(of[label].get(name)), _interval((of[label].get(name) or {}).get("difference"))]
        lines.append(line)
    for name in dict.fromkeys(key for label in labels for key in compared["decoders"][label]["totals"]):
        line = [f"**{name}**"]
        for label in labels:
            value = compared["decoders"][label]["totals"].get(name)
            line += [f"{value:.4f}" if value is not None else "not measured"] + ([""] if label != first else [])
        lines.append(line)
    share = (
        f"{layout['num_prompts']} of {layout['suite_prompts']} prompts" if layout["suite_prompts"] else "own prompts"
    )
    note = "" if layout["mode"] == "standard" and not layout["partial"] else "; not the benchmark: no totals"
    return f"{suite.title}, {share}, the same latents for all decoders{note}\n\n" + markdown(lines)


def as_json(compared: Mapping[str, Any], results: Mapping[str, Mapping[str, Dimension]]) -> str:
    """``compared`` with every video's score; NaN becomes null."""
    videos = {label: {name: asdict(said)["videos"] for name, said in of.items()} for label, of in results.items()}
    return json.dumps(_plain({**compared, "videos": videos}), indent=1, allow_nan=False) + "\n"


def _difference(ours: Dimension, theirs: Dimension, prompts: Mapping[str, str], dimension: str) -> dict[str, Any]:
    """Ours minus theirs over prompts, of videos that both have a score of."""
    both = [
        name
        for name in sorted(ours.videos.keys() & theirs.videos.keys())
        if not (math.isnan(ours.videos[name]) or math.isnan(theirs.videos[name]))
    ]
    if not both:
        return {}
    means = []
    for said in (ours, theirs):
        grouped: dict[str, list[float]] = {}
        for name in both:
            grouped.setdefault(prompts.get(f"{dimension}/{name}", name), []).append(said.videos[name])
        means.append({prompt: sum(values) / len(values) for prompt, values in grouped.items()})
    interval = paired(*means)
    return {
        "difference": [v if math.isfinite(v) else None for v in interval],
        "pairs": len(both),
        "prompts": len(means[0]),
    }


def _value(said: Any, dimension: str) -> float:
    """A video's score on the dimension's own scale."""
    value = float(said)
    if dimension == "Multi-View_Consistency" and value == NOT_JUDGED:
        return math.nan
    return value / 100 if dimension == "imaging_quality" else value


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _shown(row: Mapping[str, Any] | None) -> str:
    return f"{row['score']:.4f}" if row else "not measured"


def _interval(values: list[float | None] | None) -> str:
    if values is None:
        return ""
    mean, low, high = values
    return f"{mean:+.4f}" + (f" ({low:+.4f} to {high:+.4f})" if low is not None else "")
