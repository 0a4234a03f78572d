"""Runs side by side, as they were evaluated: one row per run, and the teacher's where students were distilled from one.

Speed is measured here and now: students and their teacher decode the same latents in turns, and the ratio is the median.
Below stand differences on the same clips, the first run minus each other run and minus its own controls, with the 95 %
bootstrap interval of their mean over clips.
"""

import csv
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import yaml

from decoders.base import DECODER
from experiments.compose import ConfigError, flatten, run_cli
from experiments.config import Experiment, build_decoder, build_space, load
from experiments.evaluate import CLIPS, RESULT, reference_methods
from experiments.runs import CONFIG, DONE, runs_root
from experiments.show import count_parameters
from experiments.show import table as aligned
from metrics.intervals import bootstrap

TEACHER = "teacher"
ROUNDS = 5


def table(names: Sequence[str]) -> str:
    """One row per run and clip set: parameters, minutes, scores, share of the teacher's PSNR, measured speed ratio.

    Raises:
        ConfigError: a run is missing or not finished.
    """
    lines: list[tuple[list[str], dict[str, float], list[str]]] = []
    taught = set()
    for name in names:
        folder = runs_root() / name
        if not (folder / DONE).is_file():
            raise ConfigError(f"beside: {name} has not been trained to its end under {runs_root()}; make exp={name}")
        done = json.loads((folder / DONE).read_text())
        result = json.loads((folder / "evaluation" / RESULT).read_text())
        millions, faster = _speed(name)
        by_stream: dict[str, dict[str, Any]] = {}
        for mean in result["means"]:
            by_stream.setdefault(mean["stream"], {})[mean["method"]] = mean["scores"]
        minutes = done["minutes"] + _parents_minutes(folder)
        for stream, methods in by_stream.items():
            own, teacher = methods[DECODER], methods.get(TEACHER)
            if teacher and stream not in taught:
                taught.add(stream)
                lines.append(([TEACHER, stream, "", ""], teacher, ["", ""]))
            share = f"{own['psnr'] / teacher['psnr']:.1%}" if teacher else ""
            lines.append(([name, stream, f"{millions:.3f}", f"{minutes:.1f}"], own, [share, faster]))
    metrics = [name for name in lines[0][1] if all(name in scores for _, scores, _ in lines)]
    rows: list[list[Any]] = [[*begin, *(f"{scores[m]:.3f}" for m in metrics), *end] for begin, scores, end in lines]
    head = ["run", "clips", "M", "minutes", *metrics, "of teacher's PSNR", "x teacher's speed"]
    if not taught:
        head, rows = head[:-2], [row[:-2] for row in rows]
    return "\n\n".join(["\n" + aligned([head, *rows]), *_differences(names, metrics)])


def _differences(names: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """A table of the first run's scores minus the others', clip by clip; none where there is nothing to compare with."""
    first, *others = names
    own = _clips(first)
    space = build_space(_experiment(first))
    floors = reference_methods(space).keys()
    methods = dict.fromkeys(method for clip in own.values() for method in clip)
    rivals = {
        m: {clip: rows[m] for clip, rows in own.items() if m in rows} for m in methods if m not in {DECODER, *floors}
    }
    rivals |= {name: {clip: rows[DECODER] for clip, rows in _clips(name).items()} for name in others}
    rows = []
    for rival, theirs in rivals.items():
        for stream in dict.fromkeys(stream for stream, _ in own):
            clips = [clip for clip in own if clip[0] == stream and clip in theirs]
            if clips:
                cells = [str(bootstrap([own[c][DECODER][m] - theirs[c][m] for c in clips])) for m in metrics]
                rows.append([f"minus {rival}", stream, str(len(clips)), *cells])
    head = [first, "clips", "number", *metrics]
    return [aligned([head, *rows])] if rows else []


def _clips(name: str) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """(stream, key) -> method -> metric -> score, of a run's evaluation."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    with open(runs_root() / name / "evaluation" / CLIPS, newline="") as file:
        for row in csv.DictReader(file):
            about = {key: row.pop(key) for key in ("stream", "key", "method", "frames", "height", "width")}
            scores = {metric: float(value) for metric, value in row.items() if value}
            found.setdefault((about["stream"], about["key"]), {})[about["method"]] = scores
    return found


def _parents_minutes(folder: Any) -> float:
    """Training time of the stages before, found by the names in the configurations."""
    parent = yaml.safe_load((folder / CONFIG).read_text())["init_from"]
    if not parent or parent.endswith(".safetensors"):
        return 0.0
    folder = runs_root() / parent.partition(":")[0]
    return json.loads((folder / DONE).read_text())["minutes"] + _parents_minutes(folder)


def _config(name: str) -> dict[str, Any]:
    return yaml.safe_load((runs_root() / name / CONFIG).read_text())


def _experiment(name: str) -> Experiment:
    """The experiment as the run was trained: its overrides are part of what it is, and its folder's name may be cut."""
    kept = _config(name)
    parts = {part: kept[part] for part in ("family", "decoder", "objective", "latent_space", "space", "init_from")}
    return load(name.partition("+")[0], [f"{key}={json.dumps(value)}" for key, value in flatten(parts).items()])


@torch.no_grad()
def _speed(name: str) -> tuple[float, str]:
    """Millions of parameters of the decoder, and how often it decodes in the teacher's time; "" without a teacher."""
    experiment = _experiment(name)
    space = build_space(experiment)
    decoder = build_decoder(experiment, space).eval()
    millions = count_parameters(decoder.model) / 1e6
    stream = next(iter(_config(name)["data"]["val"].values()))
    teacher = decoder.own_references().get(TEACHER)
    if teacher is None:
        return millions, ""
    video = torch.rand(1, 3, stream["num_frames"], *stream["size"]) * 2 - 1
    batch = decoder.with_latent({"video": video, "key": [""]})
    seconds: dict[str, list[float]] = {"student": [], TEACHER: []}
    for _ in range(ROUNDS + 1):  # the first warms up
        for who, run in (("student", lambda: decoder.decode(batch["latent"])), (TEACHER, lambda: teacher(batch))):
            begun = time.perf_counter()
            run()
            seconds[who].append(time.perf_counter() - begun)
    ratios = [b / a for a, b in zip(seconds["student"][1:], seconds[TEACHER][1:], strict=True)]
    return millions, f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


if __name__ == "__main__":
    run_cli(lambda arguments: print(table(arguments)))
