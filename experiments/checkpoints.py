"""What a run keeps on disk, written so that an interruption or a full disk never costs more than the steps since.

``last.ckpt``                       everything a resume needs, written to a temporary file first
``validated.json``                  the last step whose validation is done; that step's checkpoint is older than it
``weights-{last,ema,best}.safetensors``   what inference needs, with the experiment's name and step as metadata
``done.json``                       written when the run is complete
"""

import contextlib
import csv
import errno
import glob
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import metrics
from decoders.base import VideoDecoder
from decoders.optimisation import TrainingDiverged
from decoders.sharding import gathered, is_sharded
from experiments.background import Writer
from experiments.budget import Clock
from experiments.compose import ConfigError
from experiments.resuming import Resumed, as_after_a_step, logged, validated
from experiments.runs import CONFIG, DONE, LAST, VALIDATED
from experiments.signals import Signals

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.ENOTDIR)
GONE = (errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ENODEV, errno.EROFS, errno.EHOSTDOWN)


class Unwritable(OSError):
    """A file of a run could not be written. What was there before is intact."""


class DiskFull(Unwritable):
    """There is no room."""


class FolderGone(Unwritable):
    """The folder, or the mount that it is on, is gone."""


def explained(error: Exception, path: Path) -> Exception:
    """``error`` of writing ``path``: as it is, or where it means a full disk or a mount that is gone, one that says so."""
    number = getattr(error, "errno", None)
    if isinstance(error, Unwritable):
        return error
    # torch reports a failed write as RuntimeError of one of these texts, safetensors as an error of its own
    if number in FULL or any(sign in str(error) for sign in ("PytorchStreamWriter", "unexpected pos", "No space left")):
        return DiskFull(
            f"no room to write {path}. What was written before it is intact: free some space, or move the run's folder "
            "and set RUNS_ROOT, then run the same command to resume"
        )
    if number in FORBIDDEN:
        return Unwritable(
            f"{path} cannot be written ({os.strerror(number)}): use a folder of yours, for runs by RUNS_ROOT"
        )
    if number in GONE:
        return FolderGone(
            f"{path} cannot be written ({os.strerror(number)}): the mount that it is on is gone. Bring it back, then run "
            "the same command to resume from the last checkpoint"
        )
    return error


def told_of_folder(error: Exception, folder: Path) -> Exception:
    """``error`` of a run in ``folder``, whoever wrote there (TensorBoard, say): as it is, or as :func:`explained`."""
    if isinstance(error, Unwritable) or not isinstance(error, OSError):
        return error
    if error.errno in FULL:
        return explained(error, folder)
    inside = error.filename and os.fsdecode(error.filename).startswith(f"{folder}{os.sep}")
    return folder_gone(folder) if inside and not (folder / CONFIG).is_file() else error


def folder_gone(folder: Path) -> FolderGone:
    """The error of a run whose folder is not there any more."""
    return FolderGone(
        f"{folder} is gone, or a mount that it is on, and nothing can be saved there. Bring it back, then run the same command "
        "to resume from the last checkpoint in it"
    )


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary neighbour of ``path`` and put it in place only once it is whole and on disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL:
            raise explained(error, path) from error
        reason = error.strerror or type(error).__name__
        raise Unwritable(
            f"the folder {path.parent} cannot be made ({reason}): use one that can be written, for runs by RUNS_ROOT"
        ) from error
    for left in path.parent.glob(
        f".{glob.escape(path.name)}.*.tmp"
    ):  # by a write that was killed; nobody else writes this file
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if (better := explained(error, path)) is error:
            raise
        raise better from error


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV with a line of names, whole or not at all."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


class StreamedCheckpointIO(TorchCheckpointIO):
    """Writes straight to a file (Lightning's own fills a buffer in memory first: 9 GB for XL) and reads by memory map."""

    def __init__(self, writer: Writer | None = None) -> None:
        self.writer = writer or Writer()

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options: Any | None = None) -> None:
        state = self.writer.keep(checkpoint)
        self.writer.submit(lambda: write_atomically(Path(path), lambda temporary: torch.save(state, temporary)))

    def load_checkpoint(self, path, map_location=None, weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def save_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write named tensors as safetensors."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


@torch.no_grad()
def load_weights(decoder: VideoDecoder, path: Path) -> dict[str, str]:
    """Copy a weights file into ``decoder``, tensor by tensor from a memory map, and return its metadata.

    Raises:
        ConfigError: the names or shapes are not those of this decoder.
    """
    targets = decoder.inference_parameters() | decoder.inference_buffers()
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if odd := sorted(names ^ targets.keys()):
            raise ConfigError(
                f"{path} does not fit this decoder: {len(odd)} of its {len(names | targets.keys())} names differ, "
                f"the first is {odd[0]} ({'missing in the file' if odd[0] in targets else 'only in the file'})"
            )
        for name, parameter in targets.items():
            tensor = file.get_tensor(name)
            if tensor.shape != parameter.shape:
                raise ConfigError(
                    f"{path} does not fit this decoder: {name} is {tuple(tensor.shape)} there and "
                    f"{tuple(parameter.shape)} here"
                )
            parameter.copy_(tensor)
        metadata = file.metadata() or {}
    space = decoder.latent_space
    if metadata.get("latent_space", space.fingerprint) != space.fingerprint:
        raise ConfigError(
            f"{path} was trained on another latent space ({metadata['latent_space']}; this one, {space.name}, is "
            f"{space.fingerprint}): its weights mean nothing here. Set latent_space and space to what it was trained on"
        )
    return metadata


def finite(trainer: Trainer, pl_module: VideoDecoder) -> bool:
    """Whether all that training changes is finite; of what is spread over processes, this one's part."""
    states = [state.values() for optimizer in trainer.optimizers for state in optimizer.state.values()]
    tensors = [p.detach() for _, p in pl_module.trainable()] + [t for state in states for t in state]
    tensors += [] if pl_module.ema is None else pl_module.ema.state_dict().values()
    own = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, Tensor)]
    largest = torch._foreach_norm([t for t in own if t.numel() and t.is_floating_point()], float("inf"))
    return bool(torch.stack([norm.float().cpu() for norm in largest]).isfinite().all()) if largest else True


class Checkpoints(Checkpoint):
    """Saves every so many steps, at the end, and on the way out when the run is told to stop.

    Ctrl-C, SIGTERM and SIGUSR1 finish the optimiser step, save and leave; a second Ctrl-C leaves at once. ``keep`` checkpoints
    stay, the last included.

    A checkpoint is written between two steps, when all that its step logs is in TensorBoard's file. Where a validation is due it
    is written before that one, and says that it is owed: a run that is killed there makes up for it when it goes on.

    Args:
        config: the run's configuration as YAML, which every checkpoint keeps.
        resumed: what the checkpoint says that this run goes on from.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        every_steps: int,
        keep: int = 1,
        *,
        config: str = "",
        signals: Signals | None = None,
        writer: Writer | None = None,
        resumed: Resumed | None = None,
    ) -> None:
        self.folder, self.name, self.every_steps, self.keep = folder, name, every_steps, keep
        self.config, self.resumed = config, resumed
        self.signals, self.writer = signals or Signals(), writer or Writer()
        self.best: float | None = None
        self._saved_step = -1
        self._between_steps = False  # the state is whole: neither in a step nor in a validation
        self._owed = False
        self._clock = Clock()

    @property
    def seconds(self) -> float:
        """Time trained so far, over all sessions up to their last checkpoints, without any validation (:class:`Clock`)."""
        return self._clock.seconds

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._clock.go_on_from(state_dict["seconds"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: VideoDecoder, checkpoint: dict[str, Any]) -> None:
        scalars = logged(trainer) if self._owed else {}
        about = {"experiment": self.name, "config": self.config, "validation_owed": self._owed, "scalars": scalars}
        checkpoint["run"] = about
        as_after_a_step(checkpoint["loops"]["fit_loop"], trainer.global_step)

    def on_fit_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._clock.begin()

    def on_train_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._saved_step = trainer.global_step
        best = self.folder / "weights-best.safetensors"
        if trainer.global_step and best.is_file():  # the file itself knows: it may be newer than the last checkpoint
            with safe_open(best, framework="pt") as file:
                score = (file.metadata() or {}).get(f"val_{pl_module.training_config.validation.best}")
                self.best = None if score is None else float(score)
        self._between_steps = True
        self.signals.hold()
        if self.resumed is not None and self.resumed.validation_owed:
            self.resumed.log_again(trainer)
            self.resumed.validate(trainer)

    def teardown(self, trainer: Trainer, pl_module: VideoDecoder, stage: str) -> None:
        self.signals.release()

    def on_train_batch_start(self, trainer: Trainer, pl_module: VideoDecoder, batch, batch_idx) -> None:
        self._clock.resume()  # not at a validation's end: pictures are drawn and the best weights are saved there
        self.writer.check()
        if not self._between_steps:
            return  # half of a step cannot be saved: its gradients are in no checkpoint
        # Not in on_train_batch_end: what the step logs is written after it, and would be lost with a kill between the two.
        self._save_if_due(trainer, pl_module)
        self._between_steps = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: VideoDecoder, outputs, batch, batch_idx) -> None:
        self._between_steps = not pl_module.batches_seen % trainer.accumulate_grad_batches

    def on_validation_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._clock.pause()
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._save_if_due(trainer, pl_module, owed=True)
        self._between_steps = False

    def _save_if_due(self, trainer: Trainer, pl_module: VideoDecoder, owed: bool = False) -> None:
        told, step = self.signals.agree(trainer), trainer.global_step
        if step != self._saved_step and (told or step % self.every_steps == 0):
            self.save(trainer, pl_module, owed=owed)
        if told:
            self.writer.wait()
            raise KeyboardInterrupt

    def on_validation_batch_start(self, trainer: Trainer, pl_module: VideoDecoder, *_) -> None:
        if trainer.state.fn == "fit" and self.signals.told and self._saved_step == trainer.global_step:
            self.writer.wait()  # all is saved: the validation is done when the run goes on
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        name = pl_module.training_config.validation.best
        score = trainer.callback_metrics.get(f"val/{name}")
        sign = 1 if metrics.higher_is_better(name) else -1
        better = score is not None and (self.best is None or sign * score > sign * self.best)
        if is_sharded(pl_module):  # only the first rank knows the score, and all must gather what it saves
            better = trainer.strategy.broadcast(better)
        if better:
            self.best = None if score is None else float(score)
            self._save_weights(pl_module, "best")
        self._between_steps = True
        self.note_validated(trainer)

    def note_validated(self, trainer: Trainer) -> None:
        """Write down that nothing is owed of the present step: all is in TensorBoard's file."""
        if trainer.is_global_zero:
            trainer.logger.experiment.flush()
            text = json.dumps({"step": trainer.global_step})
            write_atomically(self.folder / VALIDATED, lambda temporary: temporary.write_text(text))

    def on_train_end(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        if trainer.global_step != self._saved_step:
            self.save(trainer, pl_module, owed=validated(self.folder) != trainer.global_step)
        self.writer.wait()
        self._clock.end()
        self.signals.agree(trainer)

    def on_exception(self, trainer: Trainer, pl_module: VideoDecoder, exception: BaseException) -> None:
        """Save the steps since the last checkpoint, if the state is whole: a loader that fails costs none of them."""
        whole = self._between_steps and trainer.global_step != self._saved_step and not is_sharded(pl_module)
        try:
            self.writer.wait()
            ours = isinstance(exception, Unwritable | TrainingDiverged) or not isinstance(exception, Exception)
            there = not self.config or (self.folder / CONFIG).is_file()  # no folder of that name is made anew
            if whole and there and not ours and finite(trainer, pl_module):
                # By the process that failed: the others may be in the midst of a step. All have the same state.
                state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                write_atomically(self.folder / LAST, lambda temporary: torch.save(state, temporary))
                print(f"step {trainer.global_step} is saved", file=sys.stderr, flush=True)
        except Exception as error:  # the first error is the one to be told
            print(f"and the steps since the last checkpoint could not be saved: {error}", file=sys.stderr, flush=True)

    def save(self, trainer: Trainer, pl_module: VideoDecoder, *, owed: bool = False) -> None:
        """Write ``last.ckpt`` and the weights; older checkpoints beyond ``keep`` go. ``owed``: a validation comes next."""
        if self.config and trainer.is_global_zero and not (self.folder / CONFIG).is_file():
            raise folder_gone(self.folder)
        if not trainer.strategy.reduce_boolean_decision(finite(trainer, pl_module), all=True):
            raise TrainingDiverged(
                f"the weights of step {trainer.global_step} are not finite, or Adam's moments or the average; they are not saved. The "
                "last checkpoint is intact: the same command resumes from it; a lower optim.lr or optim.grad_clip make another run"
            )
        self._saved_step, self._owed = trainer.global_step, owed
        if trainer.is_global_zero and trainer.logger is not None:
            trainer.logger.experiment.flush()
        with self.writer.checkpoint():
            trainer.save_checkpoint(self.folder / LAST)
            if self.keep > 1 and trainer.is_global_zero:
                self.writer.submit(partial(self._keep_older, trainer.global_step))
            self._save_weights(pl_module, "last")
            if pl_module.ema is not None:
                self._save_weights(pl_module, "ema")

    def _keep_older(self, step: int) -> None:
        older = self.folder / f"step-{step:08d}.ckpt"
        older.unlink(missing_ok=True)
        os.link(
            self.folder / LAST, older
        )  # a second name for the same file; it stays when the next save replaces last.ckpt
        for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep]:
            old.unlink()

    def _save_weights(self, pl_module: VideoDecoder, kind: str) -> None:
        averaged = pl_module.ema is not None and kind != "last"
        weights = pl_module.ema.state_dict() if averaged else pl_module.inference_parameters()
        weights = gathered({**weights, **pl_module.inference_buffers()})  # by all ranks together
        if not pl_module.trainer.is_global_zero:
            return
        metadata = {
            "experiment": self.name,
            "step": str(pl_module.trainer.global_step),
            "averaged": str(averaged).lower(),
            "latent_space": pl_module.latent_space.fingerprint,
        }
        if kind == "best":
            metadata[f"val_{pl_module.training_config.validation.best}"] = str(self.best)
        path, kept = self.folder / f"weights-{kind}.safetensors", self.writer.keep(weights)
        self.writer.submit(lambda: save_weights(path, kept, metadata))

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as complete."""
        text = json.dumps(summary, indent=2)
        write_atomically(self.folder / DONE, lambda temporary: temporary.write_text(text))
