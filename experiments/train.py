"""Train an experiment, or resume it where it stopped: ``python -m experiments.train NAME [key=value ...]``."""

import json
import logging
import shlex
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from datamodules.faults import Unreachable
from datamodules.index import NotNormalised
from datamodules.loaders import UnreadableClip
from datamodules.quarantine import TooManyBadFiles
from datamodules.sources import SourceError
from datamodules.streams import StreamError
from decoders.base import VideoDecoder
from decoders.optimisation import TrainingDiverged
from experiments import board, compare, cost, evaluate, given_latents
from experiments.background import Background, Writer
from experiments.budget import Budget
from experiments.callbacks import Progress, Reconstructions
from experiments.checkpoints import (
    Checkpoints,
    StreamedCheckpointIO,
    Unwritable,
    load_weights,
    told_of_folder,
    write_atomically,
)
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
from experiments.failfast import FailFast
from experiments.faster import hasten
from experiments.guard import Guard
from experiments.resuming import Board, Resumed, check_resume, purge_step, told_once, validated
from experiments.runs import CONFIG, DONE, find_parent, is_neutral, run_dir, run_name
from experiments.signals import Signals
from experiments.strategy import Sharded, check_sharding, num_processes
from experiments.throughput import Throughput

say = rank_zero_only(print)
# Their messages say all; of other errors the place is wanted too.
TOLD = (
    TrainingDiverged,
    Unwritable,
    SourceError,
    StreamError,
    NotNormalised,
    TooManyBadFiles,
    UnreadableClip,
    Unreachable,
)


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
    decoder.training_config.lpips_precision = experiment.trainer.lpips_precision
    return decoder


def build_data(experiment: Experiment, folder: Path | None):
    """The experiment's datamodule. Bad files are listed in ``folder``."""
    return locate(experiment.datamodule, "datamodule")(experiment.data, run_dir=folder, seed=experiment.seed)


def build_trainer(
    experiment: Experiment,
    folder: Path,
    callbacks: Sequence[Callback],
    find_unused: bool,
    writer: Writer | None = None,
    purge_step: int | None = None,
) -> Trainer:
    """Lightning's Trainer, counting in optimiser steps. ``writer`` writes its checkpoints; TensorBoard forgets what is there of
    ``purge_step`` and later ones."""
    t = experiment.trainer
    strategy = t.strategy
    if strategy == "ddp" or (strategy == "auto" and num_processes(t) > 1):
        strategy = DDPStrategy(find_unused_parameters=find_unused, gradient_as_bucket_view=True)
    elif strategy == "fsdp":
        strategy = Sharded(t.shard_group)
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
        logger=Board(folder, purge_step),
        plugins=[StreamedCheckpointIO(writer), *_scheduler()],
        callbacks=list(callbacks),
    )


def _scheduler() -> list[SLURMEnvironment]:
    """Under srun: SLURM's ranks, without Lightning's own handlers of signals. Torchrun inside of a job is not srun."""
    srun = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if srun else []


def train(experiment: Experiment, name: str, overrides: Sequence[str] = (), callbacks: Sequence[Callback] = ()) -> Path:
    """Train or resume, and return the run's folder. A complete run says so and is left alone.

    Raises ConfigError, TrainingDiverged, Unwritable, and what the data raise. In a run of several processes the first one that
    fails says so and ends the others.
    """
    watch = FailFast()
    try:
        with Signals() as signals, told_once():
            return _train(experiment, name, overrides, callbacks, signals, watch)
    except Exception as error:
        watch.report(error)
        if (better := told_of_folder(error, run_dir(name, overrides))) is error:
            raise
        raise better from error
    finally:
        watch.close()


def _train(
    experiment: Experiment,
    name: str,
    overrides: Sequence[str],
    callbacks: Sequence[Callback],
    signals: Signals,
    watch: FailFast,
) -> Path:
    folder = run_dir(name, overrides)
    resumed = check_resume(experiment, folder)
    if (folder / DONE).is_file():
        say(f"{name} is complete.\n{closing_words(folder, json.loads((folder / DONE).read_text()))}")
        return folder
    require_paths(experiment)
    parent = None
    if experiment.init_from and resumed is None:
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
    if experiment.trainer.strategy == "fsdp":
        check_sharding(decoder, num_processes(experiment.trainer), experiment.trainer.shard_group)
    data = build_data(experiment, folder)
    given_latents.give(experiment, decoder, data, name, overrides)
    writer = Background() if experiment.trainer.async_checkpoints else Writer()
    keep = Checkpoints(
        folder,
        run_name(name, overrides),
        experiment.trainer.checkpoint_every_steps,
        experiment.trainer.keep_checkpoints,
        config=resolved_yaml(experiment),
        signals=signals,
        writer=writer,
        resumed=resumed,
    )
    budget = Budget(experiment.trainer.budget_minutes) if experiment.trainer.budget_minutes else None
    throughput = Throughput(experiment, budget)
    replay = shlex.join(["python", "-m", "experiments.replay", name, *overrides])
    guard = [Guard(experiment.trainer.guard, folder, data, replay)] if experiment.trainer.guard else []
    faster = hasten(experiment, decoder, data)
    first = [watch, *guard, DataPosition(data), *([budget] if budget else []), throughput, *faster]
    every = [*first, *_seen(experiment, throughput, budget), *callbacks, keep]
    purge = purge_step(folder, resumed)
    trainer = build_trainer(experiment, folder, every, decoder.terms_may_be_absent, writer, purge)
    if trainer.is_global_zero:
        begin(folder, experiment, trainer, decoder, resumed)
    trainer.fit(decoder, data, ckpt_path=resumed.path if resumed else None, weights_only=True)
    if trainer.interrupted or signals.told:
        raise SystemExit(1)
    finish(experiment, trainer, decoder, data, keep, throughput, budget)
    return folder


def _seen(experiment: Experiment, throughput: Throughput, budget: Budget | None) -> list[Callback]:
    """What shows how training goes."""
    shown = [Progress(throughput, budget)] if experiment.trainer.progress_bar else []
    validation = experiment.validation
    pictures = [Reconstructions(validation.num_shown, validation.video_fps)] if validation.num_shown else []
    return [*shown, *pictures]


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
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # What is logged of a validation is gathered before, or of one process by intent.
    warnings.filterwarnings("ignore", message=r".*It is recommended to use `self\.log\(.*sync_dist=True.*")
    # Of a guard, a budget or a limit of time that the run had before and has no more.
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided.*")
    warnings.filterwarnings(
        "ignore", message=".*Total length of .* across ranks is zero.*"
    )  # streams of which no clip is wanted


class DataPosition(Callback):
    """Tells the datamodule which batches were really trained on; what workers decoded ahead does not count."""

    def __init__(self, data) -> None:
        self.data = data

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.data.batch_consumed()


def begin(
    folder: Path, experiment: Experiment, trainer: Trainer, decoder: VideoDecoder, resumed: Resumed | None
) -> None:
    """Write the configuration down and say what is about to happen."""
    text = resolved_yaml(experiment)
    write_atomically(folder / CONFIG, lambda temporary: temporary.write_text(text))
    if resumed is None:
        trainer.logger.experiment.add_text("config", "```yaml\n" + text + "\n```", 0)
    board.begin(trainer.logger.experiment)
    millions = sum(p.numel() for p in decoder.inference_parameters().values()) / 1e6
    device = torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else "CPU"
    t = experiment.trainer
    until = f"for {t.budget_minutes:g} minutes" if t.budget_minutes else f"steps to {t.max_steps}"
    say(
        f"{'resuming' if resumed else 'training'} {folder.name}: {millions:.1f} M parameters, "
        f"{trainer.world_size} x {device}, {trainer.precision}, {until}, in {folder}"
    )
    if resumed is None and (expected := cost.words_before(experiment, folder.name.partition("+")[0], trainer)):
        say(expected)


def finish(
    experiment: Experiment,
    trainer: Trainer,
    decoder: VideoDecoder,
    data,
    keep: Checkpoints,
    throughput: Throughput,
    budget: Budget | None,
) -> None:
    """The last validation's result, in a table, in TensorBoard's HParams tab and in the file that says "complete".

    A run is complete with its last step, or, before that, where its budget of time is used up.
    """
    kind = "last" if decoder.ema is None else "ema"
    weights = {"kind": kind, "step": trainer.global_step, "file": f"weights-{kind}.safetensors"}
    folder = keep.folder / "evaluation"
    if keep.resumed is not None:
        keep.resumed.log_again(trainer)  # where the last step was done before: training did not begin
    trainer.logger.muted = validated(keep.folder) == trainer.global_step  # its numbers are in TensorBoard already
    result = evaluate.run(trainer, decoder, data, folder, experiment.validation.references, weights)
    if not trainer.is_global_zero:
        return
    means = result["means"][0]["scores"]
    board.finish(trainer.logger.experiment, experiment, decoder, result["means"], trainer.global_step)
    summary = {
        "steps": trainer.global_step,
        "skipped_steps": next((c.skipped for c in trainer.callbacks if isinstance(c, Guard)), 0),
        "clips_seen": decoder.clips_seen,
        "minutes": round(keep.seconds / 60, 2),
    }
    summary |= {
        "precision": trainer.precision,
        "device": result["device"],
        "devices": trainer.world_size,
        **throughput.summary(),
        "scores": means,
    }
    complete = trainer.global_step >= experiment.trainer.max_steps or (budget is not None and budget.is_used_up)
    if not complete:
        say(f"stopped by trainer.max_minutes={experiment.trainer.max_minutes}; a larger value goes on from here")
    else:
        keep.finish(summary)
    keep.note_validated(trainer)
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
    try:
        folder = train(experiment, name, overrides)
    except TOLD as error:
        raise SystemExit(f"error: {error}") from None
    if experiment.beside:
        if experiment.train_parents:
            train_missing(experiment.beside, overrides)
        say(compare.beside([folder.name, *experiment.beside]))


if __name__ == "__main__":
    run_cli(main)
