"""What eight bits cost on trained weights: ``python -m experiments.quantise NAME [bits8=mlp,linear] [key=value ...]``.

    bits8     which products are rounded: mlp (default), linear, or both one after the other: mlp,linear
    latents   training clips that the scales are calibrated on, in turn from the experiment's training streams; default 8
    clips     validation clips of each stream at most; default all
    weights   ema, last or best; default the EMA where the run kept one
    out       folder of the JSON file; default results
    scales    a folder: the calibrations are saved there, one file per arithmetic (decoders.flashdecoder.bits8.Calibration)

Everything else is an override of the experiment. Each validation clip is decoded by the plain network in float32 and by the
optimised one in bfloat16, with FP8 products and with int8 products; the table has each form's scores and its difference from
bfloat16 on the same clips with a 95 % interval. FP8 without such a device, and int8 without such a CPU, are emulated: the same
rounding, sums in float32 or exact. So it needs no GPU, and says which numbers were emulated.
"""

import copy
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from datamodules.clips import NoOtherClip
from datamodules.faults import Unreachable
from datamodules.loaders import UnreadableClip, read_singly
from datamodules.quarantine import TooManyBadFiles
from datamodules.sources import SourceError
from datamodules.streams import StreamError
from decoders.base import VideoDecoder
from decoders.flashdecoder import bits8 as eight
from decoders.flashdecoder.model import FlashDecoderModel
from decoders.inference import InferenceOptions, optimise
from decoders.layers.linear8 import has_int8
from decoders.scoring import Clips, Row, mean_score
from experiments import weights as weights_of
from experiments.bench import device_name
from experiments.compose import ConfigError, run_cli
from experiments.config import Experiment, check_own, load, require_paths
from experiments.evaluate import require_files
from experiments.measured import markdown, require_folder, write
from experiments.runs import run_name
from experiments.train import build, build_data, quiet
from losses.pretrained import WeightsNotFound
from metrics.base import SetMetric
from metrics.intervals import Interval, interval_of_mean

BASE, EXACT = "bf16", "fp32, plain"


@dataclass
class QuantiseOptions:
    """The command's own options."""

    bits8: str = eight.MLP
    latents: int = 8
    clips: int | None = None
    weights: str | None = None
    out: str = "results"
    scales: str | None = None

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in (eight.MLP, eight.ALL):
                raise ValueError(f"bits8={kind} is neither {eight.MLP} nor {eight.ALL} (both: {eight.MLP},{eight.ALL})")
        if self.latents < 1 or (self.clips is not None and self.clips < 1):
            raise ValueError("latents and clips must be 1 or more")
        weights_of.check_kind(self.weights)

    @property
    def kinds(self) -> list[str]:
        return [kind.strip() for kind in self.bits8.strip("[]").split(",")]


@dataclass
class Form:
    """One way to decode, and what is said of it."""

    name: str
    network: nn.Module
    dtype: torch.dtype
    emulated: bool = False
    num_layers: int = 0  # that are rounded


def run(name: str, options: QuantiseOptions, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Calibrate, score every form on the validation clips, print the table and write the result.

    Raises:
        ConfigError: no such run, or one of a family that has no eight-bit form; data or metrics' weights that are not there.
    """
    experiment = load(name, overrides)
    require_paths(experiment)
    file = weights_of.find(experiment, run_name(name, overrides), options.weights)
    require_files(experiment)
    for folder in filter(None, (options.out, options.scales)):
        require_folder(folder)
    experiment.ema = None  # the file holds one set of weights: those are measured
    try:
        decoder = build(experiment)
        decoder.scorer()
    except (WeightsNotFound, ValueError) as error:
        raise ConfigError(str(error)) from None
    if not isinstance(decoder.model, FlashDecoderModel):
        raise ConfigError(f"{name}: {type(decoder).__name__} has no eight-bit form; FlashDecoder's experiments have")
    about = weights_of.fill(decoder, experiment, file, options.weights)
    device = "cuda" if experiment.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    decoder.eval().requires_grad_(False).to(device)
    try:
        data = build_data(experiment, None)
        latents, used = calibration_latents(decoder, experiment, data, options.latents)
        forms = make_forms(decoder.model, latents, options)
        rows = score(decoder, data, forms, options.clips)
    except (SourceError, StreamError, TooManyBadFiles, Unreachable, UnreadableClip, NoOtherClip) as error:
        raise ConfigError(str(error)) from None
    result = {
        "experiment": run_name(name, overrides),
        "weights": about | ({"sha256": weights_of.sha256(Path(file))} if file else {}),
        "device": device_name(device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"make quantise exp={name} {' '.join(sys.argv[2:])}".strip(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "calibration": {"clips": used, "num_latents": len(latents)},
        "forms": {f.name: {"emulated": f.emulated, "rounded_layers": f.num_layers} for f in forms},
        "scores": summary(rows, data.val_names, decoder),
    }
    print(f"{file} (step {about['step']}); scales from {len(latents)} training clips\n\n{table(result)}")
    print(f"result: {write('quantise', result, options.out)}")
    return result


# ---- calibration


@torch.no_grad()
def calibration_latents(
    decoder: VideoDecoder, experiment: Experiment, data, number: int
) -> tuple[list[Tensor], list[str]]:
    """Latents of training clips, in turn from the training streams in the order of training, and the clips' keys.

    Raises ConfigError: the experiment has no training clips that can be read.
    """
    names = list(data.streams("train"))
    if not names:
        raise ConfigError("data.train has no stream, and the scales are calibrated on training clips")
    requests = (data.plan.request_at(names[i % len(names)], i // len(names)) for i in range(4 * number))
    latents, used = [], []
    for item in read_singly(experiment.data, requests):
        if "error" in item:
            continue
        batch = item["batch"]
        given = {key: part.to(decoder.device) for key, part in batch.items() if isinstance(part, Tensor)}
        latents.append(decoder.with_latent(batch | given)["latent"])
        used.append(batch["key"][0])
        if len(latents) == number:
            return latents, used
    raise ConfigError(
        f"only {len(latents)} of the first {4 * number} training clips can be read; latents={number} wanted"
    )


def make_forms(model: FlashDecoderModel, latents: Sequence[Tensor], options: QuantiseOptions) -> list[Form]:
    """The plain network in float32, the optimised one in bfloat16, and its eight-bit forms."""
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    forms = [Form(EXACT, model, torch.float32), Form(BASE, _fast(rounded), torch.bfloat16)]
    cuda = next(model.parameters()).is_cuda
    emulated = {"fp8": not cuda, "int8": cuda or not has_int8()}
    for kind in options.kinds:
        for arithmetic, without in emulated.items():
            fast = _fast(rounded)
            calibration = eight.calibrate(fast, kind, latents, arithmetic)
            if options.scales:
                calibration.save(Path(options.scales) / f"{arithmetic}-{kind}.safetensors")
            eight.quantise(fast, kind, calibration, arithmetic, without)
            name = f"{'FP8' if arithmetic == 'fp8' else arithmetic} {kind}{', emulated' if without else ''}"
            num_layers = len(list(eight.rounded_layers(fast)))
            forms.append(Form(name, fast, torch.bfloat16, without, num_layers))
    return forms


def _fast(model: FlashDecoderModel) -> nn.Module:
    """Without graphs: layers are still to be replaced."""
    return optimise(model, InferenceOptions(graphs=False))


# ---- scores


@torch.no_grad()
def score(decoder: VideoDecoder, data, forms: Sequence[Form], most: int | None) -> list[Row]:
    """A row for every validation clip by every form."""
    scorer = decoder.scorer()
    scorer.begin()
    for stream, loader in enumerate(data.val_dataloader()):
        for batch in _first(loader, most):
            given = {key: part.to(decoder.device) for key, part in batch.items() if isinstance(part, Tensor)}
            batch = decoder.with_latent(batch | given)
            clips, (t, h, w) = Clips.of(batch, {}, stream), batch["video"].shape[2:]
            for form in forms:
                video = form.network.decode(batch["latent"].to(form.dtype))
                scorer.score(form.name, video[:, :, :t, :h, :w].float(), clips)
            scorer.forget()
    return scorer.rows


def _first(loader, most: int | None) -> Iterator[dict]:
    done = 0
    for batch in loader:
        if most is not None and done >= most:
            return
        done += len(batch["key"])
        yield batch


def summary(rows: Sequence[Row], streams: Sequence[str], decoder: VideoDecoder) -> list[dict[str, Any]]:
    """One entry per stream and form: means of its scores and of the paired differences from bfloat16, with intervals."""
    columns = [metric.name for metric in decoder.scorer().metrics if not isinstance(metric, SetMetric)]
    found: dict[tuple[int, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["stream"], row["method"]), {})[row["key"]] = row
    entries = []
    for (stream, method), clips in found.items():
        base = found[stream, BASE]
        entry = {"stream": streams[stream], "form": method, "clips": len(clips), "scores": {}, "minus_bf16": {}}
        for column in columns:
            mean = mean_score(column, column, clips.values())
            entry["scores"][column] = mean if mean == mean else None  # JSON knows no NaN
            both = [(row[column], base[key][column]) for key, row in clips.items()]
            if method != BASE and not any(None in pair for pair in both):
                interval = interval_of_mean([own - other for own, other in both])
                entry["minus_bf16"][column] = {k: v if v == v else None for k, v in interval._asdict().items()}
        entries.append(entry)
    return entries


def table(result: dict[str, Any]) -> str:
    """As Markdown: a row per stream and form; the differences from bfloat16 in their own columns."""
    columns = list(result["scores"][0]["scores"])
    lines = [["clips", "form", *columns, *(f"{column} - bf16 (95 %)" for column in columns)]]
    for entry in result["scores"]:
        line = [f"{entry['stream']} ({entry['clips']})", entry["form"]]
        line += ["not finite" if entry["scores"][c] is None else f"{entry['scores'][c]:.3f}" for c in columns]
        line += [_difference(entry["minus_bf16"].get(c)) for c in columns]
        lines.append(line)
    return markdown(lines)


def _difference(found: dict[str, float | None] | None) -> str:
    if found is None:
        return ""
    if found["low"] is None:
        return f"{found['mean']:+.3f}"
    return str(Interval(**found))


# ---- command line


def split_options(arguments: Sequence[str]) -> tuple[QuantiseOptions, list[str]]:
    """The command's own options, and the overrides of the experiment. Raises ConfigError."""
    own = {item.name for item in fields(QuantiseOptions)}
    check_own(arguments, own)
    values = {key: text for key, equals, text in (a.partition("=") for a in arguments) if equals and key in own}
    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(QuantiseOptions), values))
    except (OmegaConfBaseException, ValueError) as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}" if key else str(error).splitlines()[0]) from None
    return options, [text for text in arguments if text.partition("=")[0] not in own]


def main(arguments: list[str]) -> None:
    if not arguments or "=" in arguments[0]:
        raise ConfigError("name an experiment: make quantise exp=NAME (make list shows them)")
    name, *rest = arguments
    quiet()
    options, overrides = split_options(rest)
    run(name, options, overrides)


if __name__ == "__main__":
    run_cli(main)
