"""Make the weights in the repository from a trained run: ``python -m experiments.export_wan_mini NAME [FOLDER] [key=value]``.

Measures the statistics of the latents on training clips, writes encoder, decoder and config.json (see
``decoders/latent_spaces/wan_mini.py``), then scores what was written on the run's validation clips, beside the closed-form
space of the same shape, and prints the table. Overrides say what to measure on, as in ``experiments.evaluate``.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

import metrics
from decoders.latent_spaces import wan_mini
from decoders.latent_spaces.base import LatentSpace
from decoders.latent_spaces.dct import DCT, DCTConfig
from experiments.checkpoints import load_weights
from experiments.compose import ConfigError, run_cli
from experiments.config import Experiment, load, require_paths
from experiments.runs import find_parent, run_dir
from experiments.train import build, build_data

STATISTICS_CLIPS = 64


def export(name: str, folder: Path, overrides: Sequence[str] = ()) -> None:
    """Write ``folder`` from the run's averaged weights."""
    experiment = load(name)
    require_paths(experiment)
    decoder = build(experiment)
    if decoder.encoder is None:
        raise ConfigError(f"{name} trains no encoder: there is no autoencoder to export")
    path = find_parent(name, allow_unfinished=True)
    about = load_weights(decoder, path)
    experiment.data.num_workers = 0
    data = build_data(experiment, run_dir(name))
    data.setup("fit")
    generator = torch.Generator().manual_seed(experiment.seed)
    mean, std = decoder.freeze_statistics(islice(_clips(data), STATISTICS_CLIPS), generator)
    values = ([round(v, 4) for v in side.tolist()] for side in (mean, std))
    wan_mini.save(folder, decoder.encoder, decoder.model, *values, {"experiment": name, "step": about.get("step", "?")})
    print(f"{path} (step {about.get('step', '?')}) -> {folder}")
    size = sum((folder / part).stat().st_size for part in (wan_mini.ENCODER, wan_mini.DECODER))
    print(f"{size / 1e6:.1f} MB; mean {mean.numpy().round(2)}, std {std.numpy().round(2)}")


def _clips(data) -> Iterator[Tensor]:
    """Training clips that move, one at a time."""
    for batch in data.train_dataloader():
        if batch["video"].shape[2] > 1:
            yield from batch["video"].split(1)


@torch.no_grad()
def compare(experiment: Experiment, spaces: Sequence[LatentSpace]) -> str:
    """Every space's own decoder on the validation clips, as a Markdown table: means over clips of means over frames."""
    data = build_data(experiment, None)
    data.setup("validate")
    measures = metrics.build(experiment.validation.metrics)
    lines = ["| clips | space | " + " | ".join(m.name for m in measures) + " |", "|---" * (2 + len(measures)) + "|"]
    for stream, loader in zip(data.val_names, data.val_dataloader(), strict=True):
        rows: dict[str, list[list[float]]] = {space.name: [] for space in spaces}
        for batch in loader:
            video = batch["video"]
            for space in spaces:
                shown = space.decode(space.encode(video)).clamp(-1, 1)
                scores = [m(shown, video).mean(1) for m in measures]
                rows[space.name] += [list(clip) for clip in zip(*(s.tolist() for s in scores), strict=True)]
        size = "x".join(map(str, video.shape[2:]))
        for space, scores in rows.items():
            means = " | ".join(f"{fmean(column):.3f}" for column in zip(*scores, strict=True))
            lines.append(f"| {stream} ({len(scores)} of {size}) | {space} | {means} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if not arguments:
        raise ConfigError("name a trained run of decoders.baseline.Baseline, such as baseline_wan_mini")
    name, *rest = arguments
    overrides = [a for a in rest if "=" in a]
    folder = next((Path(a) for a in rest if "=" not in a), wan_mini.FOLDER)
    export(name, folder)
    if folder.resolve() != wan_mini.FOLDER:
        return
    experiment = load(name, overrides)
    experiment.data.train = {}
    spaces = [wan_mini.WanMini(), DCT(DCTConfig(channels=16, stride_t=4, stride_hw=8))]
    print("\n" + compare(experiment, spaces))


if __name__ == "__main__":
    run_cli(main)
