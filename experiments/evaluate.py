"""Measure a run on its validation clips: ``python -m experiments.evaluate NAME [key=value ...]``.

    weights    ema, last or best of the run, default EMA if it kept one, else last; start: those that its training starts
               from (objective.start, init_from), for which there need be no run
    sets       named evaluation sets in place of the validation clips: sets=[inter4k,davis], of those that the experiment
               has under data.sets

Everything else is an override; :func:`evaluate` says which name another run, and which what a run is measured on. Writes
``clips.csv`` (every clip by every method), ``frames.csv`` (every frame), ``result.json`` (means with their protocol),
``table.md``, and where some frames were references ``distance.md``.
"""

import csv
import hashlib
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning import Callback, Trainer
from torch import Tensor

from datamodules.batch import VideoBatch
from datamodules.clips import NoOtherClip
from datamodules.config import SourceConfig
from datamodules.loaders import UnreadableClip
from datamodules.quarantine import TooManyBadFiles
from datamodules.sources import SourceError, find_files
from datamodules.streams import StreamError
from decoders.base import DECODER, PER_FRAME, Method, Row, VideoDecoder
from decoders.latent_spaces.base import LatentSpace, pad_to_valid
from decoders.latent_spaces.dct import dc_decode
from experiments import distance
from experiments import weights as weights_of
from experiments.checkpoints import write_atomically
from experiments.compose import ConfigError, run_cli
from experiments.config import Experiment, as_dict, load, require_paths
from experiments.measured import markdown
from experiments.runs import CONFIG, LONGEST_NAME, run_dir, run_name
from metrics.protocol import Protocol, clip_list_hash

TABLE, RESULT, CLIPS, FRAMES, DISTANCE = "table.md", "result.json", "clips.csv", "frames.csv", "distance.md"
MEASURED_ON = (
    "data.",
    "pad=",
    "objective.evaluate",
    "objective.controls",
    "objective.compare_",
    "objective.steps=",
    "objective.extension=",
    "objective.tasks",
    "objective.ahead=",
)  # what a run is measured on, not what it learnt
LEARNT = ("data.train", "data.order")  # of these: nothing but training reads them


def reference_methods(space: LatentSpace) -> dict[str, Method]:
    """What a decoder is held against on the same clips, from nothing learnt to the space's own decoder."""

    def mean_colour(batch: VideoBatch) -> Tensor:
        video = batch["video"]
        return video.mean(dim=(2, 3, 4), keepdim=True).expand_as(video)

    def cell_colour(batch: VideoBatch) -> Tensor:
        t, h, w = batch["video"].shape[2:]
        whole = pad_to_valid(batch["video"], space)
        chunks = whole.split(getattr(space, "chunk", whole.shape[2]), dim=2)
        cells = [dc_decode(chunk, space.stride_t, space.stride_hw, space.causal) for chunk in chunks]
        return torch.cat(cells, dim=2)[:, :, :t, :h, :w]

    def own_decoder(batch: VideoBatch) -> Tensor | None:
        t, h, w = batch["video"].shape[2:]
        video = space.decode(batch["latent"])  # None: what was encoded is not the clip, but every second frame, say
        return video[:, :, :t, :h, :w] if video.shape[2] >= t else None

    cell = f"one colour per {space.stride_hw}x{space.stride_hw}x{space.stride_t} cell"
    methods = {"mean colour of the clip": mean_colour, cell: cell_colour}
    return methods | ({f"the {space.name} space's own decoder": own_decoder} if hasattr(space, "decode") else {})


def run(
    trainer: Trainer, decoder: VideoDecoder, data, folder: Path, references: bool, weights: dict[str, Any]
) -> dict[str, Any]:
    """Validate, gather the clips of all ranks, and write the three files. Returns the result.

    ``weights`` says which were measured: kind, step, file.
    """
    decoder.references = decoder.own_references() | reference_methods(decoder.latent_space) if references else {}
    trainer.validate(decoder, datamodule=data, verbose=False)
    decoder.references = {}
    rows = [row | {"stream": data.val_names[row["stream"]]} for row in decoder.validation_rows]
    result = {"weights": weights} | summarise(rows, trainer, decoder, data)
    result["distance"] = distance.by_distance(rows, [DECODER, *decoder.own_references()])
    if trainer.is_global_zero:
        _write(folder, rows, result)
    return result


def summarise(rows: list[Row], trainer: Trainer, decoder: VideoDecoder, data) -> dict[str, Any]:
    """Means of every method on every stream, each with its protocol."""
    means = []
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["stream"], row["method"]), []).append(row)
    order = {name: i for i, name in enumerate(data.val_names)}
    for (stream, method), clips in sorted(groups.items(), key=lambda g: (order[g[0][0]], g[0][1] != DECODER)):
        scores = {name: statistics.fmean(row[name] for row in clips) for name in score_columns(clips[0], decoder)}
        spread = {name: statistics.pstdev([row[name] for row in clips]) for name in scores}
        means.append({"stream": stream, "method": method, "clips": len(clips), "scores": scores, "spread": spread})
    return {
        "means": means,
        "compression": decoder.latent_space.compression,
        "files": {name: _files(data.streams("val")[name].describe()) for name in data.val_names},
        "protocols": protocols(rows, trainer, decoder, data),
        "device": torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _files(about: dict[str, Any]) -> dict[str, Any]:
    """How many files of a stream were used, and why the others were not."""
    return {"used": about["files_used"], "found": about["files_found"], "left_out": about["dropped"]}


def score_columns(row: Row, decoder: VideoDecoder) -> dict[str, tuple[str, str | None]]:
    """Column -> (metric, group of frames or None), in the order of a row: ``psnr``, ``psnr_others``, ..."""
    columns = {}
    for name in row:
        for metric in decoder.metric_protocols:
            if name == metric or name.startswith(f"{metric}_"):
                columns[name] = (metric, name[len(metric) + 1 :] or None)
    return dict(sorted(columns.items(), key=lambda item: (item[1][1] or "", list(row).index(item[0]))))


def protocols(rows: list[Row], trainer: Trainer, decoder: VideoDecoder, data) -> dict[str, dict[str, Any]]:
    """``<stream>/<metric>`` -> everything that decides the number."""
    found = {}
    for stream in data.val_names:
        clips = [row for row in rows if row["stream"] == stream and row["method"] == DECODER]
        if not clips:
            continue
        config, first = data.config.val[stream], clips[0]
        for name, (metric, group) in score_columns(first, decoder).items():
            definition = decoder.metric_protocols[metric] | ({"only_frames": group} if group else {})
            definition |= {"decoding": chosen} if (chosen := decoder.decoding(stream)) else {}
            if mask := data.streams("val")[stream].mask:
                definition |= {"pixels": f"outside the edit, {mask} masks; inside, the prediction is the target"}
            found[f"{stream}/{name}"] = Protocol(
                metric=name,
                frames=(0, first["frames"]),
                frame_stride=1,
                size=(first["height"], first["width"]),
                resize=f"PIL bicubic, {config.resize}, centre" + (f", {config.fps:g} fps" if config.fps else ""),
                clips=clip_list_hash(row["key"] for row in clips),
                num_clips=len(clips),
                dtype=str(trainer.precision),
                latent_space=decoder.latent_space.fingerprint,
                definition=definition,
            ).to_dict()
    return found


def _write(folder: Path, rows: list[Row], result: dict[str, Any]) -> None:
    def written(lines: list[dict[str, Any]]) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            names = list(dict.fromkeys(name for line in lines for name in line))
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=names)
                writer.writeheader()
                writer.writerows(lines)

        return write

    write_atomically(folder / CLIPS, written([{k: v for k, v in row.items() if k != PER_FRAME} for row in rows]))
    frames = [
        {k: row[k] for k in ("stream", "key", "method")} | {"frame": t} | {k: v[t] for k, v in row[PER_FRAME].items()}
        for row in rows
        for t in range(row["frames"])
    ]
    write_atomically(folder / FRAMES, written(frames))
    write_atomically(folder / RESULT, lambda path: path.write_text(json.dumps(result, indent=2)))
    write_atomically(folder / TABLE, lambda path: path.write_text(table(result)))
    if result["distance"]:
        write_atomically(folder / DISTANCE, lambda path: path.write_text(distance.text(result["distance"])))
    else:
        (folder / DISTANCE).unlink(missing_ok=True)


def table(result: dict[str, Any]) -> str:
    """Means over clips and their standard deviation, as Markdown; below it what files were left out."""
    names = list(dict.fromkeys(name for mean in result["means"] for name in mean["scores"]))
    lines = [["clips", "method", *names]]
    for mean in result["means"]:
        size = next(p["size"] for key, p in result["protocols"].items() if key.startswith(f"{mean['stream']}/"))
        label = f"{mean['stream']} ({mean['clips']} of {size[0]}x{size[1]})"
        scores, spread = mean["scores"], mean["spread"]
        cells = (f"{scores[n]:.3f} ± {spread[n]:.3f}" if n in scores else "" for n in names)
        lines.append([label, mean["method"], *cells])
    left_out = ""
    for stream, files in result["files"].items():
        if files["left_out"]:
            reasons = ", ".join(f"{number} {reason}" for reason, number in files["left_out"].items())
            left_out += f"{stream}: {files['used']} of {files['found']} files; left out: {reasons}\n"
    compression = f"compression: {result['compression']:.4g} numbers of video for one of the latent\n"
    return f"{markdown(lines)}\n{left_out}{compression}"


class SpacesAgree(Callback):
    """Before anything is measured: saved latents among the clips are of the run's own space, as far as they say."""

    def on_validation_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        space = pl_module.latent_space
        for where, found in getattr(trainer.datamodule, "latent_spaces", {}).items():
            if odd := sorted(found.keys() - {"", space.name, space.fingerprint}):
                raise ConfigError(
                    f"{where}: {found[odd[0]]} of its latents are of the space {odd[0]}, and this run decodes {space.name} "
                    f"({space.fingerprint})"
                )


def evaluate(
    name: str, overrides: Sequence[str] = (), weights: str | None = None, sets: Sequence[str] | None = None
) -> dict[str, Any]:
    """Measure a run's weights (EMA if kept, else last) on its validation clips, or on others.

    Overrides of ``data``, ``pad`` and of what the objective says about evaluation (``MEASURED_ON``) that no run was trained with
    say what the run without them is measured on: ``data.val.unseen.size=[480,832]``. Results of named weights, of other clips or by other
    metrics (``validation.metrics``, ``validation.references``) go to a folder of their own.

    Args:
        weights: ema, last, best, or start: what training starts from, which needs no run.
        sets: names of ``data.sets``, which take the place of ``data.val``.

    Raises:
        ConfigError: no such run, weights, sets or files.
    """
    from experiments.train import build, build_data, build_trainer, quiet

    quiet()
    experiment = load(name, overrides)
    trained = which_run(name, overrides)
    home = run_dir(name, trained)
    experiment.data.train = {}  # not read, so it need not be there
    if sets is not None:
        experiment.data.val = {named: experiment.data.sets[named] for named in check_sets(name, experiment, sets)}
    require_paths(experiment)
    file = weights_of.find(experiment, run_name(name, trained), weights)
    require_files(experiment)
    experiment.ema = None  # the file holds one set of weights: those are measured
    decoder = build(experiment)
    about = weights_of.fill(decoder, experiment, file, weights)
    measured = [weights] if weights else []
    measured += [f"sets={','.join(experiment.data.val)}"] if sets is not None else []
    measured += _other_metrics(name, experiment, home)
    defined = ("data.sets",) if sets is not None else ()
    others = [text for text in overrides if text not in trained or text.startswith(defined)]
    measured += [more] if (more := run_name("", others, counts=defined)) else []  # last: it may be cut
    folder = home / _short("-".join(["evaluation", *measured]))
    data = build_data(experiment, home)
    trainer = build_trainer(experiment, home, [SpacesAgree()], find_unused=False)
    trainer.logger = None
    try:
        result = run(trainer, decoder, data, folder, experiment.validation.references, about)
    except (SourceError, StreamError, TooManyBadFiles, UnreadableClip, NoOtherClip) as error:
        raise ConfigError(str(error)) from None
    if trainer.is_global_zero:
        shown = f"distance from the reference: {folder / DISTANCE}\n" if result["distance"] else ""
        print(
            f"{file or about['file']} (step {about['step']})\n\n{(folder / TABLE).read_text()}\n{shown}results: {folder}"
        )
    return result


def which_run(name: str, overrides: Sequence[str]) -> list[str]:
    """Those of the overrides that the run was trained with: of the runs that are there the one that names most of them.

    Raises ConfigError where two runs name as many.
    """
    on = [i for i, text in enumerate(overrides) if text.startswith(MEASURED_ON) and not text.startswith(LEARNT)]
    for number in range(len(on)):
        found: dict[Path, list[str]] = {}
        for left_out in itertools.combinations(on, number):
            kept = [text for i, text in enumerate(overrides) if i not in left_out]
            if (folder := run_dir(name, kept)).is_dir():
                found.setdefault(folder, kept)
        if len(found) > 1:
            raise ConfigError(
                f"{', '.join(folder.name for folder in found)} were trained with some of these overrides each: leave those out "
                "that the run that you mean was not trained with, or move the other runs away"
            )
        if found:
            return next(iter(found.values()))
    return [text for i, text in enumerate(overrides) if i not in on]


def check_sets(name: str, experiment: Experiment, wanted: Sequence[str]) -> list[str]:
    """The names of the evaluation sets that are asked for. Raises ConfigError for one that there is not."""
    known = list(getattr(experiment.data, "sets", {}))
    if not known:
        raise ConfigError(f"sets: {name} has no named evaluation sets (data.sets)")
    if odd := [one for one in wanted if one not in known] or ([] if wanted else ["nothing"]):
        near = get_close_matches(odd[0], known, n=1)
        raise ConfigError(
            f"sets: {name} has no evaluation set {odd[0]!r}; {f'did you mean {near[0]}? ' if near else ''}there are "
            f"{', '.join(known)}"
        )
    return list(dict.fromkeys(wanted))


def require_files(experiment: Experiment) -> None:
    """Refuse sources that lead nowhere, before a decoder is built. Opens no film. Raises ConfigError."""
    sources = getattr(experiment.data, "sources", {})
    for name in dict.fromkeys(name for stream in experiment.data.val.values() for name in stream.sources):
        if isinstance(sources.get(name), SourceConfig) and sources[name].kind != "procedural":
            try:
                find_files(name, sources[name])
            except SourceError as error:
                raise ConfigError(str(error)) from None


def _short(folder: str) -> str:
    """A name that file systems take; what is cut off is in its hash."""
    digest = hashlib.sha256(folder.encode()).hexdigest()[:8]
    return folder if len(folder) <= LONGEST_NAME else f"{folder[:LONGEST_NAME]}-{digest}"


def _other_metrics(name: str, experiment: Experiment, home: Path) -> list[str]:
    """How the metrics differ from those that the run itself was measured with (without one: from the experiment's)."""
    kept = home / CONFIG
    own = (yaml.safe_load(kept.read_text()) if kept.is_file() else as_dict(load(name)))["validation"]
    found, now = [], experiment.validation
    if set(now.metrics) != set(own["metrics"]):
        found.append(f"metrics={','.join(now.metrics)}")
    if now.references != own["references"]:
        found.append(f"references={str(now.references).lower()}")
    return found


def main(arguments: list[str]) -> None:
    if not arguments:
        raise ConfigError("name an experiment: make evaluate exp=NAME (make list shows them)")
    name, *rest = arguments
    options = dict(text.split("=", 1) for text in rest if text.startswith(("weights=", "sets=")))
    sets = options.get("sets")
    wanted = None if sets is None else [one.strip() for one in sets.strip("[]").split(",") if one.strip()]
    overrides = [text for text in rest if not text.startswith(("weights=", "sets="))]
    evaluate(name, overrides, options.get("weights"), wanted)


if __name__ == "__main__":
    run_cli(main)
