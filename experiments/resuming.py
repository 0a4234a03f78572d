"""How a run goes on: what its last checkpoint says of itself, and TensorBoard's files as they were at that step."""

import json
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.summary.writer import event_file_writer

from experiments.compose import ConfigError
from experiments.config import Experiment, as_dict, with_defaults
from experiments.runs import CONFIG, LAST, VALIDATED, diff

_WRITER_THREAD = event_file_writer._AsyncWriterThread


@dataclass
class Resumed:
    """A checkpoint that a run goes on from."""

    path: Path
    step: int  # optimiser steps done
    validation_owed: bool = False  # the validation that follows this step was not finished
    scalars: dict[str, float] = field(default_factory=dict)  # what the step itself logged, where a validation is owed

    @property
    def purge_step(self) -> int:
        """The first step whose numbers TensorBoard must forget: it gets them anew."""
        return self.step if self.validation_owed else self.step + 1

    def log_again(self, trainer: Trainer) -> None:
        """Log what TensorBoard was made to forget of the checkpoint's own step; once."""
        if self.scalars:
            trainer.logger.log_metrics(self.scalars, self.step)
        self.scalars = {}

    def validate(self, trainer: Trainer) -> None:
        """Make up for the validation that is owed, within training."""
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.restarting = False
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True


class Board(TensorBoardLogger):
    """TensorBoard's logger, which remembers what it logged at the last step, and logs nothing while it is ``muted``.

    Args:
        purge_step: numbers of this step and later ones, of a session that was killed, do not count. None: there are none.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        super().__init__(folder, name="", version="", default_hp_metric=False, purge_step=purge_step)
        self.last: tuple[int | None, dict[str, float]] = (None, {})
        self.muted = False

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self.muted:
            return
        before = self.last[1] if self.last[0] == step else {}
        self.last = step, {**before, **{name: float(value) for name, value in metrics.items()}}
        super().log_metrics(metrics, step)


@contextmanager
def told_once() -> Iterator[None]:
    """Within, the thread in which TensorBoard writes prints no traceback when it cannot: TensorBoard keeps the error and raises
    it in the training process too, with the next number or when the logger ends, and there it is told."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not (isinstance(failed.thread, _WRITER_THREAD) and isinstance(failed.exc_value, OSError)):
            before(failed)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def logged(trainer: Trainer) -> dict[str, float]:
    """What was logged of the step that was just made; nothing on ranks that do not log."""
    step, scalars = getattr(trainer.logger, "last", (None, {}))
    return dict(scalars) if step == trainer.global_step else {}


def as_after_a_step(fit_loop: dict[str, Any], step: int) -> None:
    """Write Lightning's counters, in a checkpoint made anywhere between two steps, as they are right after the first of them.

    That is the only place from which Lightning goes on without counting a batch twice or leaving out a log.
    """
    progress = fit_loop["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        done = counts["processed"]
        counts.update(ready=done, started=done, completed=done - 1)
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1


def check_resume(experiment: Experiment, folder: Path) -> Resumed | None:
    """The checkpoint to resume from, if this run has one.

    Raises:
        ConfigError: the run began under another configuration, or the checkpoint is another experiment's (shows the
            differences); it cannot be read, or holds more than tensors and plain values.
    """
    path = folder / LAST
    if not path.is_file():
        return None
    if (folder / CONFIG).is_file():
        _refuse_changes(
            f"{folder} was begun under another configuration",
            (folder / CONFIG).read_text(),
            experiment,
            "undo the change, give it as an override (which makes another run), or move the folder away",
        )
    state = read_checkpoint(path)
    about = state.get("run") or {}
    if about.get("config"):
        _refuse_changes(
            f"{path} is a checkpoint of {about['experiment']}, under another configuration",
            about["config"],
            experiment,
            "put this run's own checkpoint back, or move the file away: weights alone are taken over by init_from=",
        )
    owed = bool(about.get("validation_owed")) and validated(folder) != state["global_step"]
    return Resumed(path, state["global_step"], owed, dict(about.get("scalars") or {}) if owed else {})


def _refuse_changes(said: str, before: str, now: Experiment, advice: str) -> None:
    if changes := diff(with_defaults(yaml.safe_load(before), now), as_dict(now)):
        raise ConfigError(f"{said}:\n  " + "\n  ".join(changes) + f"\n{advice}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint by memory map. Raises ConfigError."""
    others = sorted(other.name for other in path.parent.glob("step-*.ckpt"))
    hint = f"copy {others[-1]} over it" if others else "move it away: the run then starts afresh"
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:200]
        if (
            isinstance(error, pickle.UnpicklingError) or "mmap can only be used" in reason
        ):  # by memory map: no plain pickles
            raise ConfigError(
                f"{path} holds more than tensors and plain values, so it was not written here; it is not loaded, as it might "
                f"run code ({reason}). If you do not know where it is from, delete it, or {hint}"
            ) from None
        raise ConfigError(f"{path} is damaged ({reason}); {hint}") from None
    if not isinstance(state, dict) or not {"global_step", "loops", "state_dict"} <= state.keys():
        raise ConfigError(f"{path} is no checkpoint of a training run; {hint}")
    return state


def validated(folder: Path) -> int | None:
    """The last step of a run whose validation is done and logged."""
    try:
        return json.loads((folder / VALIDATED).read_text())["step"]
    except (OSError, ValueError, KeyError):  # never written, or not by us: the validation is repeated
        return None


def purge_step(folder: Path, resumed: Resumed | None) -> int | None:
    """The step from which on numbers in ``folder`` do not count: those that come after the checkpoint, or, without one, all."""
    if resumed is not None:
        return resumed.purge_step
    return 0 if any(folder.glob("events.out.tfevents.*")) else None
