"""Train an experiment, or resume it where it stopped: ``python -m experiments.train NAME [key=value ...]``."""

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from decoders.base import VideoDecoder
from experiments import board, compare, evaluate
from experiments.budget import Budget
from experiments.callbacks import Progress, Reconstructions, Throughput
from experiments.checkpoints import LAST, Checkpoints, StreamedCheckpointIO, load_weights, write_atomically
from experiments.compose import ConfigError, run_cli
from experiments.config import (
    Experiment,
    build_decoder,
    build_space,
    check_decoder,
    load,
    locate,
    require_paths,
    resolved_yaml,
)
from experiments.runs import CONFIG, DONE, diff, find_parent, is_neutral, run_dir, run_name

say = rank_zero_only(print)


def choose_precision(wanted: str, accelerator: str) -> str:
    """``auto`` is bf16 autocast where the hardware multiplies bf16 natively, else fp32."""
    if wanted != "auto":
        return wanted
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "32-true"


def build(experiment: Experiment) -> VideoDecoder:
    """The experiment's decoder with fresh weights, checked against its loss weights and its data's sizes.

    Raises:
        ConfigError, and FileNotFoundError for a latent space whose files are not there.
    """
    space = build_space(experiment)
    try:
        space.require()
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None
    try:
        decoder = build_decoder(experiment, space)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    check_decoder(experiment, decoder)
    return decoder


def build_data(experiment: Experiment, folder: Path | None):
    """The experiment's datamodule. Bad files are listed in ``folder``."""
    return locate(experiment.datamodule, "datamodule")(experiment.data, run_dir=folder, seed=experiment.seed)


def build_trainer(experiment: Experiment, folder: Path, callbacks: Sequence[Callback], find_unused: bool) -> Trainer:
    """Lightning's Trainer, counting in optimiser steps."""
    t = experiment.trainer
    strategy = t.strategy
    if strategy == "ddp" or (strategy == "auto" and _num_processes(t) > 1):
        strategy = DDPStrategy(find_unused_parameters=find_unused, gradient_as_bucket_view=True)
    return Trainer(
        accelerator=t.accelerator,
        devices=t.devices if t.devices != "auto" or t.accelerator != "cpu" else 1,
        num_nodes=t.num_nodes,
        strategy=strategy,
        precision=choose_precision(t.precision, t.accelerator),
        default_root_dir=folder,
        max_epochs=-1,
        max_steps=t.max_steps,
        max_time=timedelta(minutes=t.max_minutes) if t.max_minutes else None,
        accumulate_grad_batches=t.accumulate_grad_batches,
        val_check_interval=t.val_every_steps * t.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        log_every_n_steps=t.log_every_steps,
        num_sanity_val_steps=t.num_sanity_val_steps,
        deterministic=t.deterministic,
        benchmark=t.benchmark,
        inference_mode=False,  # what is cached during validation is used in training too
        use_distributed_sampler=False,  # the datamodule shards
        enable_checkpointing=True,
        enable_progress_bar=any(isinstance(c, Progress) for c in callbacks),
        enable_model_summary=False,
        logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        plugins=[StreamedCheckpointIO()],
        callbacks=list(callbacks),
    )


def _num_processes(t) -> int:
    if t.devices != "auto":
        return int(t.devices) * t.num_nodes
    return max(1, torch.cuda.device_count() if t.accelerator != "cpu" else 1) * t.num_nodes


def check_resume(experiment: Experiment, folder: Path) -> Path | None:
    """The checkpoint to resume from, if this run has one.

    Raises:
        ConfigError: the run began under another configuration; shows the differences.
    """
    if not (folder / LAST).is_file():
        return None
    changes = diff((folder / CONFIG).read_text(), resolved_yaml(experiment))
    if changes:
        raise ConfigError(
            f"{folder} was begun under another configuration:\n  "
            + "\n  ".join(changes)
            + "\nundo the change, give it as an override (which makes another run), or move the folder away"
        )
    return folder / LAST


def train(experiment: Experiment, name: str, overrides: Sequence[str] = (), callbacks: Sequence[Callback] = ()) -> Path:
    """Train or resume, and return the run's folder. A complete run says so and is left alone."""
    folder = run_dir(name, overrides)
    resume = check_resume(experiment, folder)
    if (folder / DONE).is_file():
        say(f"{name} is complete.\n{closing_words(folder, json.loads((folder / DONE).read_text()))}")
        return folder
    require_paths(experiment)
    parent = None
    if experiment.init_from and resume is None:
        if experiment.train_parents:
            train_missing([experiment.init_from.partition(":")[0]], overrides)
        parent = find_parent(experiment.init_from, allow_unfinished=experiment.allow_unfinished_parent)
    seed_everything(experiment.seed, verbose=False)
    decoder = build(experiment)
    if not decoder.terms:
        raise ConfigError(f"{name} has nothing to train; make evaluate exp={name} weights=start measures it as it is")
    if parent is not None:
        step = load_weights(decoder, parent).get("step", "?")
        say(f"weights of {experiment.init_from}, step {step}: {parent}")
    data = build_data(experiment, folder)
    keep = Checkpoints(
        folder,
        run_name(name, overrides),
        experiment.trainer.checkpoint_every_steps,
        experiment.trainer.keep_checkpoints,
    )
    budget = Budget(experiment.trainer.budget_minutes) if experiment.trainer.budget_minutes else None
    throughput = Throughput()
    shown = [Progress(throughput, budget)] if experiment.trainer.progress_bar else []
    validation = experiment.validation
    pictures = [Reconstructions(validation.num_shown, validation.video_fps)] if validation.num_shown else []
    every = [DataPosition(data), *([budget] if budget else []), throughput, *shown, *pictures, *callbacks, keep]
    trainer = build_trainer(experiment, folder, every, decoder.terms_may_be_absent)
    if experiment.trainer.compile:
        decoder.model.compile()
    if trainer.is_global_zero:
        begin(folder, experiment, trainer, decoder, resume)
    trainer.fit(decoder, data, ckpt_path=resume, weights_only=True)
    if trainer.interrupted:
        raise SystemExit(1)
    finish(experiment, trainer, decoder, data, keep, budget)
    return folder


def train_missing(names: Sequence[str], overrides: Sequence[str]) -> None:
    """Train, or finish, the runs of these experiments, under those of the overrides that change no result.

    All are looked at before the first is trained. Raises ConfigError for one that was begun, or is complete, under another
    configuration.
    """
    neutral = [text for text in overrides if is_neutral(text.partition("=")[0])]
    experiments = {name: load(name, neutral) for name in names}
    for name, experiment in experiments.items():
        check_resume(experiment, run_dir(name))
    for name, experiment in experiments.items():
        if not (run_dir(name) / DONE).is_file():
            train(experiment, name, neutral)


def quiet() -> None:
    """Keep Lightning's advertisements and its dependencies' deprecation notes off the screen; errors stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings(
        "ignore", message=".*Total length of .* across ranks is zero.*"
    )  # streams of which no clip is wanted


class DataPosition(Callback):
    """Tells the datamodule which batches were really trained on; what workers decoded ahead does not count."""

    def __init__(self, data) -> None:
        self.data = data

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.data.batch_consumed()


def begin(folder: Path, experiment: Experiment, trainer: Trainer, decoder: VideoDecoder, resume: Path | None) -> None:
    """Write the configuration down and say what is about to happen."""
    text = resolved_yaml(experiment)
    write_atomically(folder / CONFIG, lambda temporary: temporary.write_text(text))
    trainer.logger.experiment.add_text("config", "```yaml\n" + text + "\n```", 0)
    board.begin(trainer.logger.experiment)
    millions = sum(p.numel() for p in decoder.inference_parameters().values()) / 1e6
    device = torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else "CPU"
    t = experiment.trainer
    until = f"for {t.budget_minutes:g} minutes" if t.budget_minutes else f"steps to {t.max_steps}"
    say(
        f"{'resuming' if resume else 'training'} {folder.name}: {millions:.1f} M parameters, "
        f"{trainer.world_size} x {device}, {trainer.precision}, {until}, in {folder}"
    )


def finish(
    experiment: Experiment, trainer: Trainer, decoder: VideoDecoder, data, keep: Checkpoints, budget: Budget | None
) -> None:
    """The last validation's result, in a table, in TensorBoard's HParams tab and in the file that says "complete".

    A run is complete with its last step, or, before that, where its budget of time is used up.
    """
    kind = "last" if decoder.ema is None else "ema"
    weights = {"kind": kind, "step": trainer.global_step, "file": f"weights-{kind}.safetensors"}
    folder = keep.folder / "evaluation"
    result = evaluate.run(trainer, decoder, data, folder, experiment.validation.references, weights)
    if not trainer.is_global_zero:
        return
    means = result["means"][0]["scores"]
    board.finish(trainer.logger.experiment, experiment, decoder, result["means"], trainer.global_step)
    summary = {
        "steps": trainer.global_step,
        "clips_seen": decoder.clips_seen,
        "minutes": round(keep.seconds / 60, 2),
    }
    summary |= {
        "precision": trainer.precision,
        "device": result["device"],
        "devices": trainer.world_size,
        "scores": means,
    }
    complete = trainer.global_step >= experiment.trainer.max_steps or (budget is not None and budget.is_used_up)
    if not complete:
        say(f"stopped by trainer.max_minutes={experiment.trainer.max_minutes}; a larger value goes on from here")
    else:
        keep.finish(summary)
    say(closing_words(keep.folder, summary))


def closing_words(folder: Path, summary: dict[str, Any]) -> str:
    """The table of results, where everything is, and how to look at it."""
    table = folder / "evaluation" / evaluate.TABLE
    return (
        f"\n{table.read_text() if table.is_file() else ''}\n"
        f"{summary['steps']} steps, {summary['clips_seen']} clips, {summary['minutes']:.1f} minutes of training "
        f"({summary['precision']})\n"
        f"results:     {folder / 'evaluation'} (table.md, clips.csv, frames.csv, result.json)\n"
        f"weights:     {folder}\n"
        f"TensorBoard: make tb, or {sys.executable} -m tensorboard.main --logdir {folder.parent}"
    )


def main(arguments: list[str]) -> None:
    if not arguments:
        raise ConfigError("name an experiment: make exp=NAME (make list shows them)")
    name, *overrides = arguments
    quiet()
    experiment = load(name, overrides)
    folder = train(experiment, name, overrides)
    if experiment.beside:
        if experiment.train_parents:
            train_missing(experiment.beside, overrides)
        say(compare.beside([folder.name, *experiment.beside]))


if __name__ == "__main__":
    run_cli(main)
