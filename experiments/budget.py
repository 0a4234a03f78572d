"""A run that ends after so many minutes of training, so that decoders of different cost are compared on equal time."""

import time
from typing import Any

from lightning import Callback, Trainer

from decoders.base import VideoDecoder


class Budget(Callback):
    """Ends training once ``minutes`` are used, and tells the schedule of rates how much of them is.

    Counted is the time between the start and the end of training, data and checkpoints included, without validations. All
    ranks go by the first one's clock: their rates must be equal, and so must their last step. A resumed run goes on counting.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self._before = 0.0
        self._since: float | None = None  # None: the clock stands
        self._used = 0.0

    @property
    def seconds(self) -> float:
        """Seconds used so far, by this process's clock."""
        return self._before + (0.0 if self._since is None else time.monotonic() - self._since)

    @property
    def used(self) -> float:
        """Share of the budget that was used at the end of the last step, at most 1; the same on all ranks."""
        return self._used

    @property
    def is_used_up(self) -> bool:
        return self._used >= 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["seconds"]

    def setup(self, trainer: Trainer, pl_module: VideoDecoder, stage: str) -> None:
        pl_module.progress = lambda: self._used

    def on_train_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._since = time.monotonic()
        self._look(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._stop_clock()

    def on_validation_end(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._since = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: VideoDecoder, outputs, batch, batch_idx) -> None:
        if pl_module.batches_seen % trainer.accumulate_grad_batches:
            return
        self._look(trainer)
        if self.is_used_up:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._stop_clock()

    def _stop_clock(self) -> None:
        self._before, self._since = self.seconds, None

    def _look(self, trainer: Trainer) -> None:
        share = min(1.0, self.seconds / (60 * self.minutes))
        self._used = share if trainer.world_size == 1 else trainer.strategy.broadcast(share)
