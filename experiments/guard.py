"""Steps that must not reach the weights: a loss or a gradient that is not finite, or far larger than usual.

Such a step is left out whole: weights, Adam's moments and the average stay as they are, to the last bit, and training goes on
with the next batch. What it was is in ``bad_steps.jsonl`` of the run's folder, a line a step: where in the data it was, the
clips, every term. :mod:`experiments.replay` computes it again and looks for the first tensor that went wrong.
"""

import json
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from decoders.base import VideoDecoder
from decoders.optimisation import TrainingDiverged
from decoders.training import GuardConfig

BAD_STEPS = "bad_steps.jsonl"
ENOUGH = 10  # steps before a median says anything
LOSS = "loss"


class Guard(Callback):
    """Judges every optimiser step before it is made; all processes come to one verdict, from the same numbers.

    Args:
        config: what is too large, and how many steps may be left out.
        folder: where ``bad_steps.jsonl`` is written.
        data: the datamodule; its ``state_dict`` says where in the data a step is.
        replay: the command that computes a step again, for what is said.
    """

    def __init__(self, config: GuardConfig, folder: Path, data, replay: str) -> None:
        self.config, self.folder, self.data, self.replay = config, folder, data, replay
        self.skipped = 0  # steps left out so far, over all sessions
        self._recent: list[int] = []  # those of them that are within the window
        self._usual: dict[str, deque[float]] = {}  # of the last steps that were made: norms by group, and |loss|
        self._batches: list[dict[str, Any]] = []  # of the step that is under way, a batch each: keys, terms, loss
        self._position: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        usual = {name: list(values) for name, values in self._usual.items()}
        return {"skipped": self.skipped, "recent": list(self._recent), "usual": usual}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self._recent = state_dict["skipped"], list(state_dict["recent"])
        self._usual = {name: deque(values, self.config.window) for name, values in state_dict["usual"].items()}

    def setup(self, trainer: Trainer, pl_module: VideoDecoder, stage: str) -> None:
        pl_module.admits = lambda norms: self.admits(trainer, pl_module, norms)

    def on_train_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        """Forget what a session that was killed wrote of steps that now come again."""
        path = self.folder / BAD_STEPS
        if trainer.is_global_zero and path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) < trainer.global_step]
            path.write_text("".join(line + "\n" for line in kept))

    def on_train_batch_start(self, trainer: Trainer, pl_module: VideoDecoder, batch, batch_idx) -> None:
        if pl_module.batches_seen % trainer.accumulate_grad_batches == 0:
            self._batches, self._position = [], dict(self.data.state_dict(), batches=pl_module.batches_seen)
        self._batches.append({"keys": list(batch["key"])})

    def on_before_backward(self, trainer: Trainer, pl_module: VideoDecoder, loss: Tensor) -> None:
        weighted = loss.detach() * trainer.accumulate_grad_batches  # Lightning has divided it
        self._batches[-1] |= {"terms": pl_module.step_terms, "loss": weighted}

    def admits(self, trainer: Trainer, pl_module: VideoDecoder, norms: dict[str, Tensor]) -> bool:
        """Whether the step with gradients of these norms may be made; writes it down if not.

        Raises:
            TrainingDiverged: too many were left out lately.
        """
        names = [*norms, LOSS]
        losses = torch.stack([one["loss"].float() for one in self._batches]).mean()
        values = torch.stack([*(norm.float().to(losses.device) for norm in norms.values()), losses])
        if trainer.world_size > 1:  # a mean keeps what is not finite on any of them, and makes one verdict of all
            values = trainer.strategy.reduce(values, reduce_op="mean")
        found = dict(zip(names, values.tolist(), strict=True))
        why = self._verdict(found)
        if why is None:
            for name, value in found.items():
                self._usual.setdefault(name, deque(maxlen=self.config.window)).append(abs(value))
        else:
            self._leave_out(trainer, found, why)
        pl_module.log("train/skipped", float(self.skipped))
        self._batches = []
        return why is None

    def _verdict(self, found: dict[str, float]) -> str | None:
        if bad := [name for name, value in found.items() if not math.isfinite(value)]:
            return f"{_and(bad)} not finite"
        if self.config.explode is None:
            return None
        for name, value in found.items():
            usual = self._usual.get(name, ())
            if len(usual) < min(ENOUGH, self.config.window):
                continue
            median = statistics.median(usual)
            if abs(value) > self.config.explode * median:
                what = LOSS if name == LOSS else f"gradient norm of {name}"
                return f"the {what} is {value:.3g}, above {self.config.explode:g} times its median of {median:.3g}"
        return None

    def _leave_out(self, trainer: Trainer, found: dict[str, float], why: str) -> None:
        step = trainer.global_step
        self.skipped += 1
        self._recent = [other for other in self._recent if other > step - self.config.window] + [step]
        own = [
            {**one, "terms": {k: float(v) for k, v in one.get("terms", {}).items()}, "loss": float(one["loss"])}
            for one in self._batches
        ]
        ranks: list[Any] = [own]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, own)
        medians = {name: statistics.median(values) for name, values in self._usual.items() if values}
        record = {
            "step": step,
            "why": why,
            "values": found,
            "medians": medians,
            "position": self._position,
            "ranks": ranks,
        }
        self._write(record)
        too_many = len(self._recent) > self.config.limit
        allowed = f"{len(self._recent)} of at most {self.config.limit} in {self.config.window} steps"
        replay = f"{self.replay} step={step}"
        if not too_many:
            rank_zero_only(print)(f"step {step} left out: {why} ({allowed}); {replay}", flush=True)
            return
        raise TrainingDiverged(
            f"{why} at step {step}, and with it {len(self._recent)} steps within {self.config.window} had to be left out "
            f"(trainer.guard.limit={self.config.limit}). The weights are those of the last good step and the last checkpoint is "
            f"intact. {replay} shows what went wrong; the same command resumes, perhaps with a larger trainer.guard.limit; a "
            "lower optim.lr, optim.grad_clip or a longer optim.warmup_steps make another run"
        )

    @rank_zero_only
    def _write(self, record: dict[str, Any]) -> None:
        with open(self.folder / BAD_STEPS, "a") as file:
            file.write(json.dumps(_plain(record), allow_nan=False) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """The steps that a run left out, in order; numbers that were not finite are numbers again."""
    path = folder / BAD_STEPS
    lines = path.read_text().splitlines() if path.is_file() else []
    return [record for line in lines if (record := _parsed(line)) is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return _numbers(json.loads(line))
    except ValueError:  # half a line, of a process that was killed
        return None


def _step_of(line: str) -> float:
    record = _parsed(line)
    return math.inf if record is None else record["step"]


def _plain(tree: Any) -> Any:
    """JSON has no NaN: such numbers are words there."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


def _numbers(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _numbers(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_numbers(value) for value in tree]
    return float(tree) if tree in ("nan", "inf", "-inf") else tree


def _and(names: list[str]) -> str:
    said = [LOSS if name == LOSS else f"gradient of {name}" for name in names]
    return f"the {' and the '.join(said)} {'is' if len(said) == 1 else 'are'}"
