"""Runs side by side, as they were evaluated: one row per run, and the teacher's where students were distilled from one.

Speed is measured here and now: students and their teacher decode the same latents in turns, and the ratio is the median.
"""

import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import yaml

from experiments.compose import ConfigError, run_cli
from experiments.config import build_decoder, build_space, load
from experiments.evaluate import RESULT
from experiments.runs import CONFIG, DONE, runs_root
from experiments.show import count_parameters
from experiments.show import table as aligned

TEACHER = "teacher"
ROUNDS = 5


def table(names: Sequence[str]) -> str:
    """One row per run and clip set: parameters, minutes, scores, share of the teacher's PSNR, measured speed ratio.

    Raises:
        ConfigError: a run is missing or not finished.
    """
    rows: list[list[Any]] = []
    taught = set()
    for name in names:
        folder = runs_root() / name
        if not (folder / DONE).is_file():
            raise ConfigError(f"beside: {name} has not been trained to its end under {runs_root()}; make exp={name}")
        done = json.loads((folder / DONE).read_text())
        result = json.loads((folder / "evaluation" / RESULT).read_text())
        millions, faster = _speed(name, yaml.safe_load((folder / CONFIG).read_text()))
        by_stream: dict[str, dict[str, Any]] = {}
        for mean in result["means"]:
            by_stream.setdefault(mean["stream"], {})[mean["method"]] = mean["scores"]
        minutes = done["minutes"] + _parents_minutes(folder)
        for stream, methods in by_stream.items():
            own, teacher = methods["decoder"], methods.get(TEACHER)
            if teacher and stream not in taught:
                taught.add(stream)
                rows.append([TEACHER, stream, "", "", *_scores(teacher), "", ""])
            share = f"{own['psnr'] / teacher['psnr']:.1%}" if teacher else ""
            rows.append([name, stream, f"{millions:.3f}", f"{minutes:.1f}", *_scores(own), share, faster])
    metrics = list(own)
    head = ["run", "clips", "M", "minutes", *metrics, "of teacher's PSNR", "x teacher's speed"]
    return "\n" + aligned([head, *rows])


def _scores(scores: dict[str, float]) -> list[str]:
    return [f"{value:.3f}" for value in scores.values()]


def _parents_minutes(folder: Any) -> float:
    """Training time of the stages before, found by the names in the configurations."""
    parent = yaml.safe_load((folder / CONFIG).read_text())["init_from"]
    if not parent or parent.endswith(".safetensors"):
        return 0.0
    folder = runs_root() / parent.partition(":")[0]
    return json.loads((folder / DONE).read_text())["minutes"] + _parents_minutes(folder)


@torch.no_grad()
def _speed(name: str, config: dict[str, Any]) -> tuple[float, str]:
    """Millions of parameters of the decoder, and how often it decodes in the teacher's time; "" without a teacher."""
    experiment = load(name.partition("+")[0])
    space = build_space(experiment)
    decoder = build_decoder(experiment, space).eval()
    millions = count_parameters(decoder.model) / 1e6
    stream = next(iter(config["data"]["val"].values()))
    teacher = decoder.own_references().get(TEACHER)
    if teacher is None:
        return millions, ""
    height, width = stream["size"]
    video = torch.rand(1, 3, stream["num_frames"], height, width) * 2 - 1
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
