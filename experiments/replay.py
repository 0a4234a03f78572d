"""Compute a step that the guard left out again, and say what in it is not finite: ``python -m experiments.replay NAME
[key=value ...] [step=N] [rank=R]``; the overrides are those of the run.

The batch is made anew from its place in the data, with the step's own randomness, precision and loss weights, in one process
for each rank in turn. The weights are those of the checkpoint nearest to the step: what went wrong is told from how far away.
"""

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer, seed_everything
from torch import Tensor, nn

from datamodules.batch import VideoBatch
from decoders.base import VideoDecoder
from experiments import given_latents, guard
from experiments.checkpoints import StreamedCheckpointIO, load_weights
from experiments.compose import ConfigError, run_cli
from experiments.config import Experiment, load, locate
from experiments.resuming import read_checkpoint
from experiments.runs import LAST, find_parent, run_dir
from experiments.train import build, choose_precision, quiet

LARGEST = 5  # gradients that are named
NAMED = 8  # tensors that are not finite and are named


@dataclass
class Seen:
    """What a rank's part of a step was made of, and what came out."""

    keys: list[list[str]] = field(default_factory=list)  # a list for each batch that makes up the step
    tensors: list[dict[str, Tensor]] = field(default_factory=list)
    terms: list[dict[str, float]] = field(default_factory=list)
    first_bad: str | None = None  # the first module whose output is not finite
    gradients: dict[str, float] = field(default_factory=dict)  # parameter -> norm, before clipping
    bad_weights: list[str] = field(default_factory=list)


class Look(Callback):
    """Takes training to a recorded step, watches it, and ends training before it is made."""

    def __init__(self, record: dict[str, Any], rank: int, data) -> None:
        self.record, self.rank, self.data, self.seen = record, rank, data, Seen()

    def setup(self, trainer: Trainer, pl_module: VideoDecoder, stage: str) -> None:
        seed, encode = pl_module.step_seed, pl_module.with_latent
        pl_module.step_seed = lambda _: seed(self.rank)
        pl_module.with_latent = lambda batch: self._note_tensors(encode(batch))
        pl_module.admits = lambda norms: False

    def on_fit_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self.data.load_state_dict(self.record["position"])
        pl_module.batches_seen = self.record["position"]["batches"]

    def on_train_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        done = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        done.total.completed = done.total.ready = self.record["step"]
        self.seen.bad_weights = [n for n, p in pl_module.named_parameters() if not p.isfinite().all()]
        for name, module in pl_module.named_modules():
            if name:
                module.register_forward_hook(self._watcher(name))

    def _watcher(self, name: str):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self.seen.first_bad is None and not _finite(output):
                came = "of inputs that are finite" if _finite(inputs) else "of inputs that are not"
                self.seen.first_bad = f"{name} ({type(module).__name__}), {came}"

        return hook

    def on_train_batch_start(self, trainer: Trainer, pl_module: VideoDecoder, batch, batch_idx) -> None:
        self.seen.keys.append(list(batch["key"]))
        self._note_tensors(batch)

    def _note_tensors(self, batch: VideoBatch) -> VideoBatch:
        tensors = {name: value.detach() for name, value in batch.items() if isinstance(value, Tensor)}
        if len(self.seen.tensors) < len(self.seen.keys):
            self.seen.tensors.append({})
        self.seen.tensors[-1].update(tensors)
        return batch

    def on_before_backward(self, trainer: Trainer, pl_module: VideoDecoder, loss: Tensor) -> None:
        self.seen.terms.append({name: float(value) for name, value in pl_module.step_terms.items()})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: VideoDecoder, optimizer) -> None:
        found = ((name, p.grad) for name, p in pl_module.named_parameters() if p.grad is not None)
        self.seen.gradients = {name: float(gradient.float().norm()) for name, gradient in found}
        trainer.should_stop = True


def replay(name: str, overrides: Sequence[str] = (), step: int | None = None, rank: int | None = None) -> list[Seen]:
    """Compute step ``step`` (default: the last that was left out) of the run again, print what it holds, and return it by rank.

    Raises ConfigError: nothing was left out, or not this step; there is no such rank.
    """
    folder, experiment = run_dir(name, overrides), load(name, overrides)
    record = _record(folder, step)
    ranks = range(len(record["ranks"])) if rank is None else [rank]
    if rank is not None and not 0 <= rank < len(record["ranks"]):
        raise ConfigError(f"rank={rank}: the step was made by {len(record['ranks'])} processes, from 0 on")
    checkpoint, away = _nearest(folder, record["step"])
    print(f"step {record['step']} of {folder.name}, left out: {record['why']}")
    print(f"weights: {checkpoint.name if checkpoint else 'as training began'}, {_distance(away)}")
    seen = [_compute(name, experiment, record, number, checkpoint) for number in ranks]
    for number, one in zip(ranks, seen, strict=True):
        print("\n".join(describe(one, record["ranks"][number], number)))
    return seen


def _record(folder: Path, step: int | None) -> dict[str, Any]:
    records = {record["step"]: record for record in guard.read(folder)}
    if not records:
        raise ConfigError(f"{folder} has no {guard.BAD_STEPS}: no step was left out, so there is none to compute again")
    step = max(records) if step is None else step
    if step not in records:
        raise ConfigError(f"step={step} was not left out; there are {', '.join(map(str, sorted(records)))}")
    return records[step]


def _nearest(folder: Path, step: int) -> tuple[Path | None, int]:
    """The checkpoint nearest to ``step``, or None for the beginning, and how many steps it is before it."""
    found = {path: read_checkpoint(path)["global_step"] for path in sorted({*folder.glob("step-*.ckpt"), folder / LAST})
             if path.is_file()}  # fmt: skip
    places = {None: 0, **found}
    best = min(places, key=lambda path: (abs(places[path] - step), places[path] > step))
    return best, step - places[best]


def _distance(steps: int) -> str:
    if steps == 0:
        return "of exactly this step"
    return f"{abs(steps)} steps {'before' if steps > 0 else 'after'} it"


def _compute(name: str, experiment: Experiment, record: dict[str, Any], rank: int, checkpoint: Path | None) -> Seen:
    t = experiment.trainer
    if hasattr(experiment.data, "num_workers"):
        experiment.data.num_workers = 0
    seed_everything(experiment.seed, verbose=False)
    decoder = build(experiment)
    if experiment.init_from and checkpoint is None:
        load_weights(decoder, find_parent(experiment.init_from, allow_unfinished=True))
    made = locate(experiment.datamodule, "datamodule")
    data = made(experiment.data, seed=experiment.seed, world_size=len(record["ranks"]), rank=rank)
    given_latents.give(experiment, decoder, data, name)
    look = Look(record, rank, data)
    trainer = Trainer(
        accelerator=t.accelerator,
        devices=1,
        num_nodes=1,
        strategy="auto",
        precision=choose_precision(t.precision, t.accelerator),
        max_epochs=-1,
        accumulate_grad_batches=t.accumulate_grad_batches,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[StreamedCheckpointIO()],
        callbacks=[look],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided.*")
        trainer.fit(decoder, data, ckpt_path=checkpoint, weights_only=True)
    return look.seen


def describe(seen: Seen, recorded: list[dict[str, Any]], rank: int) -> list[str]:
    """Lines on a rank's part of a step, beside what was recorded of it."""
    lines = [f"\nrank {rank}"]
    for number, (keys, tensors, terms) in enumerate(zip(seen.keys, seen.tensors, seen.terms, strict=True)):
        then = recorded[number]
        lines.append(f"  clips       {', '.join(keys)}")
        if keys != then["keys"]:
            lines.append(
                f"              not those of the run ({', '.join(then['keys'])}): files were added or taken away"
            )
        lines += [f"  {name:<11} {_statistics(value)}" for name, value in sorted(tensors.items())]
        for name, value in sorted(terms.items()):
            was = then["terms"].get(name)
            beside = "" if was is None else f"   in the run {was:.6g}"
            lines.append(f"  {name:<11} {value:.6g}{'' if math.isfinite(value) else '   NOT FINITE'}{beside}")
    lines += _on_gradients(seen.gradients)
    if seen.bad_weights:
        lines.append(f"  weights     NOT FINITE: {_some(seen.bad_weights)}")
    if seen.first_bad:
        lines.append(f"  first output that is not finite: {seen.first_bad}")
    elif not _all_finite(seen):
        lines.append("  every module's output is finite: what is not comes of the loss, or of the way back")
    else:
        lines.append(
            "  here all is finite: it came of the weights in between, of the number of processes, or of the hardware"
        )
    return lines


def _on_gradients(norms: dict[str, float]) -> list[str]:
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    good = sorted(((norm, name) for name, norm in norms.items() if math.isfinite(norm)), reverse=True)
    lines = [f"  gradients   NOT FINITE in {len(bad)} of {len(norms)} tensors: {_some(bad)}"] if bad else []
    largest = ", ".join(f"{name} {norm:.3g}" for norm, name in good[:LARGEST])
    return [*lines, f"  gradients   largest norms: {largest}"] if good else lines


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _statistics(tensor: Tensor) -> str:
    shape = "x".join(map(str, tensor.shape))
    if not tensor.is_floating_point():
        return f"{shape} {str(tensor.dtype).removeprefix('torch.')}"
    values = tensor.float()
    good = values[values.isfinite()]
    text = f"{shape}"
    if good.numel():
        text += (
            f"   {good.min():.3g} to {good.max():.3g}, mean {good.mean():.3g}, deviation {good.std(correction=0):.3g}"
        )
    bad = values.numel() - good.numel()
    return text + (f"   NOT FINITE: {bad} of {values.numel()} values" if bad else "")


def _finite(tree: Any) -> bool:
    if isinstance(tree, Tensor):
        return not tree.is_floating_point() or bool(tree.isfinite().all())
    if isinstance(tree, dict):
        return all(map(_finite, tree.values()))
    return all(map(_finite, tree)) if isinstance(tree, list | tuple) else True


def _all_finite(seen: Seen) -> bool:
    numbers = [*seen.gradients.values(), *(value for terms in seen.terms for value in terms.values())]
    return all(map(math.isfinite, numbers))


def main(arguments: list[str]) -> None:
    own = {"step": None, "rank": None}
    rest = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in own:
            rest.append(argument)
        elif not re.fullmatch(r"\d+", value):
            raise ConfigError(f"{argument}: write a number from 0 on, such as {key}=0")
        else:
            own[key] = int(value)
    if not rest or "=" in rest[0]:
        raise ConfigError("name an experiment: python -m experiments.replay NAME [step=N]")
    quiet()
    replay(rest[0], rest[1:], **own)


if __name__ == "__main__":
    run_cli(main)
