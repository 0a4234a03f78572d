"""What a run keeps on disk, written so that an interruption or a full disk never costs more than the steps since.

``last.ckpt``                       everything a resume needs, written to a temporary file first
``weights-{last,ema,best}.safetensors``   what inference needs, with the experiment's name and step as metadata
``done.json``                       written when the run is complete
"""

import errno
import glob
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import metrics
from decoders.base import VideoDecoder
from experiments.budget import Clock
from experiments.compose import ConfigError
from experiments.runs import DONE

LAST = "last.ckpt"


class DiskFull(OSError):
    """A checkpoint could not be written. What was there before is intact."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary neighbour of ``path`` and put it in place only once it is whole and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        temporary.unlink(missing_ok=True)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "PytorchStreamWriter" in str(error)
        if not full:
            raise
        raise DiskFull(
            f"no room to write {path}. The checkpoint before it is intact: free some space, or move the run's folder "
            "and set RUNS_ROOT, then run the same command to resume"
        ) from error


class StreamedCheckpointIO(TorchCheckpointIO):
    """Writes straight to a file (Lightning's own fills a buffer in memory first: 9 GB for XL) and reads by memory map."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options: Any | None = None) -> None:
        write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))

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


class Checkpoints(Checkpoint):
    """Saves every so many steps, at the end, and on the way out when the run is told to stop.

    Ctrl-C and SIGTERM finish the optimiser step, save and leave; a second Ctrl-C leaves at once. ``keep`` checkpoints
    stay, the last included.
    """

    def __init__(self, folder: Path, name: str, every_steps: int, keep: int = 1) -> None:
        self.folder, self.name, self.every_steps, self.keep = folder, name, every_steps, keep
        self.best: float | None = None
        self._stop_signal: int | None = None
        self._leaving = False
        self._saved_step = -1
        self._handlers: dict[int, Any] = {}
        self._clock = Clock()

    @property
    def seconds(self) -> float:
        """Time trained so far, over all sessions up to their last checkpoints, without any validation (:class:`Clock`)."""
        return self._clock.seconds

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._clock.go_on_from(state_dict["seconds"])

    def on_fit_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._clock.begin()

    def on_validation_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._clock.pause()

    def on_train_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._saved_step = trainer.global_step
        best = self.folder / "weights-best.safetensors"
        if trainer.global_step and best.is_file():  # the file itself knows: it may be newer than the last checkpoint
            with safe_open(best, framework="pt") as file:
                score = (file.metadata() or {}).get(f"val_{pl_module.training_config.validation.best}")
                self.best = None if score is None else float(score)
        self._handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def teardown(self, trainer: Trainer, pl_module: VideoDecoder, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _on_signal(self, number: int, frame) -> None:
        if self._stop_signal is not None:
            signal.default_int_handler(number, frame)
        self._stop_signal = number
        print(
            f"\n{signal.Signals(number).name}: stopping after this step or validation; the same command resumes",
            flush=True,
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: VideoDecoder, outputs, batch, batch_idx) -> None:
        if pl_module.batches_seen % trainer.accumulate_grad_batches:
            return  # half of a step cannot be saved: its gradients are in no checkpoint
        stop = self._everyone_stops(trainer, pl_module)
        step = trainer.global_step
        due = step % self.every_steps == 0 and step != self._saved_step
        if due or stop:
            self.save(trainer, pl_module)
        self._leaving = stop

    def on_train_batch_start(self, trainer: Trainer, pl_module: VideoDecoder, batch, batch_idx) -> None:
        self._clock.resume()  # not at a validation's end: pictures are drawn and the best weights are saved there
        if self._leaving:  # not in on_train_batch_end: the last step is still to be logged there
            raise KeyboardInterrupt

    def _everyone_stops(self, trainer: Trainer, pl_module: VideoDecoder) -> bool:
        told = self._stop_signal is not None
        if trainer.world_size == 1:
            return told
        return bool(trainer.strategy.reduce_boolean_decision(told, all=False))

    def on_validation_end(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        name = pl_module.training_config.validation.best
        score = trainer.callback_metrics.get(f"val/{name}")
        sign = 1 if metrics.higher_is_better(name) else -1
        if score is not None and (self.best is None or sign * score > sign * self.best):
            self.best = float(score)
            self._save_weights(pl_module, "best")

    def on_train_end(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        if trainer.global_step != self._saved_step:
            self.save(trainer, pl_module)
        self._clock.end()

    def save(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        """Write ``last.ckpt`` and the weights; older checkpoints beyond ``keep`` go."""
        self._saved_step = trainer.global_step
        last, older = self.folder / LAST, self.folder / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(last)
        if self.keep > 1 and trainer.is_global_zero:
            older.unlink(missing_ok=True)
            os.link(last, older)  # a second name for the same file; it stays when the next save replaces last.ckpt
            for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep]:
                old.unlink()
        self._save_weights(pl_module, "last")
        if pl_module.ema is not None:
            self._save_weights(pl_module, "ema")

    def _save_weights(self, pl_module: VideoDecoder, kind: str) -> None:
        if not pl_module.trainer.is_global_zero:
            return
        averaged = pl_module.ema is not None and kind != "last"
        weights = pl_module.ema.state_dict() if averaged else pl_module.inference_parameters()
        weights = {**weights, **pl_module.inference_buffers()}
        metadata = {
            "experiment": self.name,
            "step": str(pl_module.trainer.global_step),
            "averaged": str(averaged).lower(),
            "latent_space": pl_module.latent_space.fingerprint,
        }
        if kind == "best":
            metadata[f"val_{pl_module.training_config.validation.best}"] = str(self.best)
        save_weights(self.folder / f"weights-{kind}.safetensors", weights, metadata)

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as complete."""
        text = json.dumps(summary, indent=2)
        write_atomically(self.folder / DONE, lambda temporary: temporary.write_text(text))
