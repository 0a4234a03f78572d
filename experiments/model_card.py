"""The card of an exported decoder: the README.md that the hub shows, filled from the run's configuration and its evaluations.

Only what the run knows is written. Data are told by their sources' names, files by their last part: no path of the machine
that it was made on (:func:`without_paths`).
"""

import csv
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from decoders.base import DECODER
from decoders.exported import Exported
from experiments import weights as weights_of
from experiments.compose import ConfigError, header
from experiments.config import Experiment, locate, streams
from experiments.measured import markdown
from experiments.runs import DONE, is_neutral
from experiments.summary import CLIPS, RESULT
from metrics.intervals import interval_of_mean

EVALUATION = "evaluation.json"
LICENCE = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*")
LIBRARY = "latent-to-pixel"
NOT_STATED = "not-stated"
_ARXIV = re.compile(r"arXiv[ :]*(\d{4}\.\d{4,5})")
# An absolute path, by its last part; what follows a colon (a URL's //) is none.
_PATH = re.compile(
    r"""(?:(?<=^)|(?<=[\s"'`(=,\[{]))(?:~|[A-Za-z]:)?[/\\](?:[^\s"'`(),;\]}/\\]+[/\\])*([^\s"'`(),;\]}/\\]+)[/\\]?"""
)


def without_paths(tree: Any) -> Any:
    """``tree`` of plain values with absolute paths in its strings cut to their last part."""
    if isinstance(tree, Mapping):
        return {without_paths(key): without_paths(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_paths(value) for value in tree]
    return _PATH.sub(r"\1", tree) if isinstance(tree, str) else tree


# --- scores ------------------------------------------------------------------------------------------------------------


def evaluations(home: Path, weights: Mapping[str, Any], file: str | None) -> list[dict[str, Any]]:
    """Every evaluation in a run's folder of just these weights, with 95 % intervals: what ``evaluation.json`` holds.

    Weights are the same where the bytes of their file are, and else, where the evaluation did not note them, kind and step.
    """
    digest, found = weights_of.sha256(Path(file)) if file else None, []
    for path in sorted(home.glob(f"evaluation*/{RESULT}")):
        result = json.loads(path.read_text())
        measured = result["weights"]
        if digest and "sha256" in measured:
            same = measured["sha256"] == digest
        else:
            same = (measured["kind"], measured["step"]) == (weights["kind"], weights["step"])
        if same:
            found.append(_evaluation(result, path.with_name(CLIPS)))
    return found


def _evaluation(result: Mapping[str, Any], clips: Path) -> dict[str, Any]:
    bounds = _intervals(clips)
    means = [
        {
            "stream": mean["stream"],
            "method": mean["method"],
            "clips": mean["clips"],
            "scores": {
                name: {"mean": value} | bounds.get((mean["stream"], mean["method"], name), {})
                for name, value in mean["scores"].items()
            },
        }
        for mean in result["means"]
    ]
    about = {key: result[key] for key in ("device", "versions", "date", "compression")}
    return without_paths(about | {"protocols": result["protocols"], "sets": result.get("sets", {}), "means": means})


def _intervals(path: Path) -> dict[tuple[str, str, str], dict[str, float]]:
    """(stream, method, score's name) -> {low, high}, from the scores of every clip."""
    values: dict[tuple[str, str, str], list[float]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            for name in row.keys() - {"stream", "method", "key"}:
                try:
                    value = float(row[name] or "nan")
                except ValueError:
                    continue
                if math.isfinite(value):
                    values.setdefault((row["stream"], row["method"], name), []).append(value)
    found = {key: interval_of_mean(column) for key, column in values.items() if len(column) > 1}
    return {key: {"low": interval.low, "high": interval.high} for key, interval in found.items()}


def brief(scores: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The decoder's own scores, one entry each, for ``config.json``."""
    return [
        {"stream": mean["stream"], "clips": mean["clips"], "metric": name} | score
        for evaluation in scores
        for mean in evaluation["means"]
        if mean["method"] == DECODER
        for name, score in mean["scores"].items()
    ]


# --- the card ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a card tells."""

    name: str  # the experiment's
    model: Exported  # as it was read back
    title: str  # what the experiment's file says that it is
    family: str
    papers: list[str]  # arXiv numbers
    training: list[tuple[str, str]]
    scores: list[dict[str, Any]]

    @classmethod
    def of(
        cls,
        name: str,
        overrides: Sequence[str],
        experiment: Experiment,
        model: Exported,
        home: Path,
        scores: list[dict[str, Any]],
    ) -> "Facts":
        """Of the experiment ``name`` under ``overrides``, whose run is in ``home``, if there is one."""
        try:
            title = header(name)[0].rstrip(".")
        except (ConfigError, IndexError):
            title = ""
        family = locate(experiment.family, "family")
        documented = " ".join(filter(None, (title, sys.modules[family.__module__].__doc__, family.__doc__)))
        return cls(
            name=name,
            model=model,
            title=without_paths(title),
            family=family.__name__,
            papers=_ARXIV.findall(documented)[:1],
            training=training(experiment, overrides, home),
            scores=scores,
        )

    @property
    def about(self) -> dict[str, Any]:
        """What ``config.json`` says of the weights."""
        return self.model.about

    @property
    def parameters(self) -> dict[str, int]:
        """Part -> number."""
        parts = {"decoder": self.model.network, "encoder": self.model.encoder}
        return {
            part: sum(p.numel() for p in module.parameters()) for part, module in parts.items() if module is not None
        }


def training(experiment: Experiment, overrides: Sequence[str], home: Path) -> list[tuple[str, str]]:
    """(what, how it was), in words; data by the names of their sources."""
    lines = [("trained to", f"{experiment.trainer.max_steps} steps, {experiment.trainer.precision}")]
    done = home / DONE
    if done.is_file():
        said = json.loads(done.read_text())
        lines.append(
            (
                "it took",
                f"{said['minutes']:g} minutes for {said['clips_seen']} clips on {said['devices']} x {said['device']}",
            )
        )
    sources = getattr(experiment.data, "sources", {})
    for where, stream in streams(experiment).items():
        if not where.startswith("data.train."):
            continue
        height, width = stream.size
        of = ", ".join(_source(name, sources.get(name)) for name in stream.sources) or "the stream's own"
        lines.append(
            (f"stream `{where.removeprefix('data.train.')}`", f"{stream.num_frames} x {height}x{width} of {of}")
        )
    terms = ", ".join(f"{term} {json.dumps(weight)}" for term, weight in experiment.loss_weights.items() if weight)
    lines.append(("loss", terms or "the family's own"))
    lines.append(("rate", f"{experiment.optim.lr:g}, {experiment.optim.schedule}"))
    if experiment.ema is not None:
        lines.append(("average", "exponential, of the weights"))
    if experiment.init_from:
        lines.append(("began from", f"`{experiment.init_from}`"))
    changes = [text for text in overrides if not is_neutral(text.partition("=")[0])]
    if changes:
        lines.append(("changed", ", ".join(f"`{text}`" for text in changes)))
    return without_paths([list(line) for line in lines])


def _source(name: str, source: Any) -> str:
    kind, span = getattr(source, "kind", "video"), tuple(getattr(source, "span", (0.0, 1.0)))
    told = [kind] if kind != "video" else []
    told += [f"{span[0]:.0%} to {span[1]:.0%} of every film"] if span != (0.0, 1.0) else []
    return name + (f" ({', '.join(told)})" if told else "")


def card(facts: Facts, where: str, *, on_hub: bool) -> str:
    """The whole README.md. ``where``: the folder, or the name on the hub, that the example loads."""
    parts = (
        _head(facts),
        _what(facts),
        _use(facts, where, on_hub),
        _space(facts),
        _training(facts),
        _scores(facts),
        _terms(facts),
    )
    return "\n".join(parts)


def _head(facts: Facts) -> str:
    licence = facts.about["licence"]
    top: dict[str, Any] = {"license": licence or "other"}
    top |= {} if licence else {"license_name": NOT_STATED}
    tags = ["video", "video-vae", "latent-decoder", facts.family.lower(), *(f"arxiv:{paper}" for paper in facts.papers)]
    top |= {"library_name": LIBRARY, "pipeline_tag": "video-to-video", "tags": tags}
    return f"---\n{yaml.safe_dump(top, sort_keys=False)}---\n"


def licence_of(card: str) -> str | None:
    """The licence that the lines at a card's top state; None where they state none."""
    parts = card.split("---", 2)
    try:
        top = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return None
    stated = top.get("license") if isinstance(top, dict) else None
    return str(stated) if stated and not (stated == "other" and top.get("license_name") in (None, NOT_STATED)) else None


def _what(facts: Facts) -> str:
    weights = facts.about["weights"]
    state = f"\n**Training was not complete**: step {weights['step']} of {weights['max_steps']}.\n"
    if weights["finished"] or weights["kind"] == "start":
        state = ""
    kind = {
        "ema": "averaged (EMA) weights",
        "last": "last weights",
        "best": "weights of the best validation",
        "start": "weights that training starts from",
    }[weights["kind"]]
    sizes = " and ".join(
        f"{number / 1e6:.4g} M parameters in the {part}" for part, number in sorted(facts.parameters.items())
    )
    space = facts.model.space
    papers = f" The method: {', '.join(f'arXiv:{paper}' for paper in facts.papers)}." if facts.papers else ""
    return (
        f"# {facts.name}\n\n{facts.title + '.' if facts.title else ''}\n\n"
        f"A decoder of video latents ({facts.family}): it turns latents of the space {space.name} into RGB frames. {sizes}; "
        f"the {kind} of step {weights['step']}.{papers}\n{state}"
    )


def _use(facts: Facts, where: str, on_hub: bool) -> str:
    model, extra = facts.model, "[hub]" if on_hub else ""
    given = "latent, reference=image" if model.uses_reference else "latent"
    told = (
        (True, '`decoders.load(..., dtype=torch.bfloat16, device="cuda")` chooses both at loading.'),
        (
            model.uses_reference,
            '`image` is what to take detail from, RGB in [-1, 1], "b 3 r h w"; without one it decodes too.',
        ),
        (model.can_stream, "`start_stream`, `step_stream` and `end_stream` decode frame by frame."),
        (
            model.can_encode,
            "`model.encode(video)` gives its latents: the encoder that was trained with it is here too.",
        ),
        (
            model.space.mean,
            "Latents as the autoencoder gives them are not normalised yet: `model.normalise(raw)` does that.",
        ),
    )
    return (
        f"## Use\n\nWith the package `{LIBRARY}{extra}` installed (`pip install .` in its repository; lightning is not needed):\n\n"
        f"```python\nimport decoders\n\nmodel = decoders.load({json.dumps(where)})\n"
        f'video = model.decode({given})  # normalised latents "b c n y x" to RGB in [-1, 1], "b 3 t h w"\n```\n\n'
        + "\n".join(text for applies, text in told if applies)
        + "\n"
    )


def _space(facts: Facts) -> str:
    space = facts.model.space
    t = space.padded_frames(4 * space.stride_t + 1)
    lines = [
        ["", ""],
        ["space", f"{space.name}, fingerprint `{space.fingerprint}`"],
        [
            "a latent",
            f"{space.channels} channels; {space.stride_hw} x {space.stride_hw} pixels, {space.stride_t} frames (stride)",
        ],
        [
            "a clip",
            f"such as {t} frames in {space.latent_frames(t)} latent frames"
            + ("; an image is a clip of one frame" if space.causal else ""),
        ],
        ["sizes", f"multiples of {facts.model.size_multiple} pixels"],
        ["statistics", "in `config.json`" if space.mean else "none: what the encoder gives is normalised"],
    ]
    return f"## The latents it expects\n\n{markdown(lines)}"


def _training(facts: Facts) -> str:
    return f"## How it was trained\n\n{markdown([['', ''], *map(list, facts.training)])}"


def _scores(facts: Facts) -> str:
    if not facts.scores:
        return "## Scores\n\nNot measured: the run has no evaluation of these weights.\n"
    parts = [
        "## Scores\n",
        f"Means over clips, in brackets their 95 % intervals; all that decides a number is in `{EVALUATION}`.",
    ]
    for evaluation in facts.scores:
        names = list(dict.fromkeys(name for mean in evaluation["means"] for name in mean["scores"]))
        lines = [["clips", "method", *names]]
        for mean in evaluation["means"]:
            shown = "**this**" if mean["method"] == DECODER else mean["method"]
            lines.append(
                [f"{mean['stream']} ({mean['clips']})", shown, *(_score(mean["scores"].get(name)) for name in names)]
            )
        parts += ["", markdown(lines)]
        parts += [f"- {text}" for text in dict.fromkeys(_protocol(*one) for one in evaluation["protocols"].items())]
        parts += [f"- {stream}: {text}" for stream, text in evaluation["sets"].items()]
        versions = ", ".join(f"{package} {version}" for package, version in evaluation["versions"].items())
        parts.append(f"- measured on {evaluation['device']}, {versions}, {evaluation['date']}")
    return "\n".join(parts) + "\n"


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    if score["mean"] is None:
        return "not finite"
    return f"{score['mean']:.3f}" + (f" ({score['low']:.3f} to {score['high']:.3f})" if "low" in score else "")


def _protocol(column: str, protocol: Mapping[str, Any]) -> str:
    """One line on what was scored; equal for the metrics of a stream, but for their own definitions."""
    first, last = protocol["frames"]
    height, width = protocol["size"]
    stride = "" if protocol["frame_stride"] in (1, None) else f", every {protocol['frame_stride']}th"
    return (
        f"{column.partition('/')[0]}: frames {first} to {last - 1}{stride}, {height}x{width}, {protocol['resize']}, {protocol['num_clips']} "
        f"clips (list {protocol['clips']}), {protocol['dtype']}"
    )


def _terms(facts: Facts) -> str:
    licence = facts.about["licence"]
    said = f"The weights are given under {licence}." if licence else "No licence was stated for these weights."
    began = " Weights that began as somebody else's, and films that were trained on, have terms of their own."
    versions = ", ".join(f"{package} {version}" for package, version in facts.about["versions"].items())
    return f"## Licence\n\n{said}{began}\n\nWritten {facts.about['date']} by {versions}.\n"
