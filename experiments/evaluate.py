"""Measure a run on its validation clips: ``python -m experiments.evaluate NAME [weights=ema|last|best] [key=value ...]``.

Writes ``clips.csv`` (every clip by every method), ``frames.csv`` (every frame), ``result.json`` (means with their protocol)
and ``table.md``.
"""

import csv
import json
import statistics
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Trainer
from torch import Tensor

from datamodules.batch import VideoBatch
from decoders.base import DECODER, PER_FRAME, Row, VideoDecoder
from decoders.latent_spaces.base import LatentSpace, pad_to_valid
from decoders.latent_spaces.dct import dc_decode
from experiments.checkpoints import load_weights, write_atomically
from experiments.compose import ConfigError, run_cli
from experiments.config import load, require_paths
from experiments.runs import find_parent, run_dir, run_name
from metrics.protocol import Protocol, clip_list_hash

TABLE, RESULT, CLIPS, FRAMES = "table.md", "result.json", "clips.csv", "frames.csv"


def reference_methods(space: LatentSpace) -> dict[str, Callable[[VideoBatch], Tensor]]:
    """What a decoder is held against on the same clips, from nothing learnt to the space's own decoder."""

    def mean_colour(batch: VideoBatch) -> Tensor:
        video = batch["video"]
        return video.mean(dim=(2, 3, 4), keepdim=True).expand_as(video)

    def cell_colour(batch: VideoBatch) -> Tensor:
        t, h, w = batch["video"].shape[2:]
        whole = pad_to_valid(batch["video"], space.stride_t, space.stride_hw, space.causal)
        return dc_decode(whole, space.stride_t, space.stride_hw, space.causal)[:, :, :t, :h, :w]

    def own_decoder(batch: VideoBatch) -> Tensor:
        t, h, w = batch["video"].shape[2:]
        return space.decode(batch["latent"])[:, :, :t, :h, :w]

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
        "protocols": protocols(rows, trainer, decoder, data),
        "device": torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


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


def table(result: dict[str, Any]) -> str:
    """Means over clips and their standard deviation, as Markdown."""
    names = list(dict.fromkeys(name for mean in result["means"] for name in mean["scores"]))
    lines = [["clips", "method", *names]]
    for mean in result["means"]:
        size = next(p["size"] for key, p in result["protocols"].items() if key.startswith(f"{mean['stream']}/"))
        label = f"{mean['stream']} ({mean['clips']} of {size[0]}x{size[1]})"
        scores, spread = mean["scores"], mean["spread"]
        cells = (f"{scores[n]:.3f} ± {spread[n]:.3f}" if n in scores else "" for n in names)
        lines.append([label, mean["method"], *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text) + "\n"


def evaluate(name: str, overrides: Sequence[str] = (), weights: str | None = None) -> dict[str, Any]:
    """Measure a run's weights (EMA if kept, else last) on its validation clips, or on others.

    Overrides of ``data``, ``pad``, ``objective.evaluate`` and ``objective.controls`` that name no run of their own say what the run without them is
    measured on: ``data.val.unseen.size=[480,832]``. Results of named weights or other clips go to a folder of their own.
    """
    from experiments.train import build, build_data, build_trainer

    experiment = load(name, overrides)
    trained = list(overrides)
    if not run_dir(name, overrides).is_dir():
        trained = [
            text
            for text in overrides
            if not text.startswith(("data.", "pad=", "objective.evaluate", "objective.controls"))
        ]
    experiment.data.train = {}  # not read, so it need not be there
    require_paths(experiment)
    path = find_parent(run_name(name, trained) + (f":{weights}" if weights else ""), allow_unfinished=True)
    experiment.ema = None  # the file holds one set of weights: those are measured
    decoder = build(experiment)
    metadata = load_weights(decoder, path)
    folder = run_dir(name, trained)
    measured = [weights] if weights else []
    measured += (
        [run_name("", [text for text in overrides if text not in trained])] if trained != list(overrides) else []
    )
    folder = folder / "-".join(["evaluation", *measured])
    data = build_data(experiment, run_dir(name, trained))
    trainer = build_trainer(experiment, run_dir(name, trained), [], find_unused=False)
    trainer.logger = None
    kind = path.stem.removeprefix("weights-")
    about = {"kind": kind, "step": int(metadata.get("step", -1)), "file": path.name}
    result = run(trainer, decoder, data, folder, experiment.validation.references, about)
    if trainer.is_global_zero:
        print(f"{path} (step {about['step']})\n\n{(folder / TABLE).read_text()}\nresults: {folder}")
    return result


def main(arguments: list[str]) -> None:
    if not arguments:
        raise ConfigError("name an experiment: make evaluate exp=NAME (make list shows them)")
    name, *rest = arguments
    weights = next((a.removeprefix("weights=") for a in rest if a.startswith("weights=")), None)
    evaluate(name, [a for a in rest if not a.startswith("weights=")], weights)


if __name__ == "__main__":
    run_cli(main)
