"""TensorBoard as the place to compare: the same charts for every family, HParams that tell runs apart, speed as scalars.

What is written where: :func:`begin` when training starts (the CUSTOM SCALARS layout), :func:`finish` when it ends (HPARAMS, and
the evaluation as ``final/<clips>/<metric>``), :func:`add_measurement` by `make bench` and `make profile` (TEXT, and scalars
``bench/...`` and ``profile/...``) where the run is there. Tags name no family, so that runs of all families share their charts.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from decoders.base import DECODER, VideoDecoder
from experiments.config import Experiment, streams

Layout = dict[str, dict[str, list[Any]]]
BENCHED = {
    "fps": "frames_per_s",
    "first_frame_ms": "first_frame_ms",
    "step_ms": "step_ms",
    "weights_gib": "weights_gib",
    "peak_gib": "peak_gib",
}  # quantity of a result -> its tag
CHART = "Multiline"  # TensorBoard's name of a chart whose tags are regular expressions


def layout() -> Layout:
    """Category -> chart -> tags of the CUSTOM SCALARS tab; tags are regular expressions, as families differ in their terms.

    It depends on no experiment: TensorBoard merges layouts of runs that are equal into one.
    """
    return {
        "quality": {
            "PSNR (dB), all validation clips": [CHART, [r"^val/psnr$"]],
            "SSIM, all validation clips": [CHART, [r"^val/ssim$"]],
            "LPIPS, all validation clips": [CHART, [r"^val/lpips_(alex|vgg)$"]],
            "PSNR (dB), by clips": [CHART, [r"^val_psnr/.*"]],
            "LPIPS, by clips": [CHART, [r"^val_lpips_(alex|vgg)/.*"]],
        },
        "losses": {
            "weighted sum": [CHART, [r"^train/loss$"]],
            "reconstruction terms": [CHART, [r"^train/(l1|mse|ssim|lpips|diffusion)$"]],
            "adversarial terms": [CHART, [r"^train/(gan_g|gan_d|r1)$"]],
            "distillation and regularisation": [CHART, [r"^train/(guidance|kl)$"]],
            "every term": [CHART, [r"^train/(?!loss$).*"]],
        },
        "throughput": {
            "clips/s": [CHART, [r"^perf/clips_per_s$"]],
            "megapixels/s": [CHART, [r"^perf/megapixels_per_s$"]],
            "ms a step": [CHART, [r"^perf/step_ms$"]],
            "model FLOPs utilisation": [CHART, [r"^perf/mfu$"]],
            "share of time waiting for data": [CHART, [r"^perf/data_wait$"]],
            "clips seen": [CHART, [r"^clips_seen$"]],
        },
        "memory": {"peak, GiB": [CHART, [r"^perf/peak_memory_gib$"]]},
        "time": {
            "hours left": [CHART, [r"^perf/hours_left$"]],
            "GPU-hours, spent and left": [CHART, [r"^perf/gpu_hours(_left)?$"]],
        },
        "gradient norms": {"before clipping, by group": [CHART, [r"^grad_norm/.*"]]},
        "learning rates": {"by group": [CHART, [r"^lr/.*"]]},
        "at the end": {
            "PSNR (dB), by clips": [CHART, [r"^final/.*/psnr$"]],
            "frames/s, by size": [CHART, [r"^bench/frames_per_s.*"]],
        },
    }


def begin(writer: SummaryWriter) -> None:
    """Write the layout into a run that starts or goes on."""
    writer.add_custom_scalars(layout())


def chosen(experiment: Experiment, decoder: VideoDecoder, steps: int) -> dict[str, int | float | str]:
    """The hyper-parameters that tell runs apart, the same keys for every family."""
    batches = [stream.batch_size for where, stream in streams(experiment).items() if where.startswith("data.train.")]
    trainer = experiment.trainer
    return {
        "family": experiment.family.rpartition(".")[2],
        "space": decoder.latent_space.name,
        "compression": float(decoder.latent_space.compression),
        "parameters_m": sum(p.numel() for p in decoder.inference_parameters().values()) / 1e6,
        "steps": steps,
        "lr": float(experiment.optim.lr),
        "batch": max(batches, default=0) * trainer.accumulate_grad_batches,  # clips of one process in one step
        "init_from": experiment.init_from or "",
        "seed": experiment.seed,
    }


def finish(
    writer: SummaryWriter, experiment: Experiment, decoder: VideoDecoder, means: list[Mapping[str, Any]], step: int
) -> None:
    """The decoder's means on every stream as scalars ``final/<stream>/<metric>``, and as metrics of the HPARAMS tab.

    ``means``: as in ``result.json``. A score that is not finite is left out.
    """
    final = {
        f"final/{mean['stream']}/{name}": float(value)
        for mean in means
        if mean["method"] == DECODER
        for name, value in mean["scores"].items()
        if value is not None and math.isfinite(value)
    }
    for tag, value in final.items():
        writer.add_scalar(tag, value, step)
    for summary in hparams(chosen(experiment, decoder, step), final):
        writer._get_file_writer().add_summary(summary)
    writer.flush()


def add_measurement(folder: Path, kind: str, result: Mapping[str, Any], text: str) -> None:
    """What `make bench` or `make profile` (``kind``) found, in the events of the run in ``folder``: text and scalars.

    A run that is not there is not made: then nothing is written.
    """
    if not folder.is_dir():
        return
    values = MEASURED[kind](result)
    with SummaryWriter(str(folder), filename_suffix=f".{kind}") as writer:
        fenced = f"```\n{text.replace('```', chr(39) * 3)}\n```"
        writer.add_text(kind, fenced, 0)
        for tag, value in values.items():
            writer.add_scalar(tag, value, 0)


def bench_scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """``bench/<quantity>/<h>x<w>`` of the experiment's own decoder: frames_per_s, first_frame_ms, peak_gib, ..."""
    found = {}
    for size in result["sizes"]:
        summary = size["rows"][result["experiment"]]["summary"] or {}  # none: it ran out of memory
        for quantity, tag in BENCHED.items():
            if summary.get(quantity) is not None:
                found[f"bench/{tag}/{size['size'][0]}x{size['size'][1]}"] = summary[quantity]
    return found


def profile_scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """``profile/ms/<h>x<w>``, ``profile/gflop/<h>x<w>`` and ``profile/stage_ms/<stage>/<h>x<w>`` of the experiment's decoder."""
    found = {}
    for size in result["sizes"]:
        own, where = next(iter(size["rows"].values())), "{}x{}".format(*size["size"])
        found[f"profile/ms/{where}"] = 1e3 * own["total_s"]
        found[f"profile/gflop/{where}"] = own["flops"] / 1e9
        for stage, cell in own["stages"].items():
            found[f"profile/stage_ms/{_tag(stage)}/{where}"] = 1e3 * cell["s"]
    return found


def _tag(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)


MEASURED: dict[str, Callable[[Mapping[str, Any]], dict[str, float]]] = {
    "bench": bench_scalars,
    "profile": profile_scalars,
}
