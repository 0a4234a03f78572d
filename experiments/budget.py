"""How long a run has trained, by the one clock of all that count it, and a run that ends after so many minutes of training, so
that decoders of different cost are compared on equal time."""

import time
from typing import Any

from lightning import Callback, Trainer

from decoders.base import VideoDecoder


class Clock:
    """Seconds of training, over all sessions of a run.

    Counted is the time from :meth:`on_fit_start`, before the module's own (in which a student is calibrated and pruned, or
    statistics are taken), to the end of training, data and checkpoints included, without validations.
    """

    def __init__(self) -> None:
        self._before = 0.0
        self._since: float | None = None  # None: the clock stands
        self._over = True

    @property
    def seconds(self) -> float:
        """So far, by this process's clock."""
        return self._before + (0.0 if self._since is None else time.monotonic() - self._since)

    def go_on_from(self, seconds: float) -> None:
        """What earlier sessions took."""
        self._before = seconds

    def begin(self) -> None:
        self._since, self._over = time.monotonic(), False

    def pause(self) -> None:
        self._before, self._since = self.seconds, None

    def resume(self) -> None:
        """After a pause; a clock that goes, has not begun, or is over, is left as it is (a validation after training)."""
        if not self._over and self._since is None:
            self._since = time.monotonic()

    def end(self) -> None:
        self.pause()
        self._over = True


class Budget(Callback):
    """Ends training once ``minutes`` are used (see :class:`Clock`), and tells the schedule of rates how much of them is.

    All ranks go by the first one's clock: their rates must be equal, and so must their last step. A resumed run goes on
    counting.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self._clock = Clock()
        self._used = 0.0

    @property
    def seconds(self) -> float:
        """Seconds used so far, by this process's clock."""
        return self._clock.seconds

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
        self._clock.go_on_from(state_dict["seconds"])

    def setup(self, trainer: Trainer, pl_module: VideoDecoder, stage: str) -> None:
        pl_module.progress = lambda: self._used

    def on_fit_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._clock.begin()

    def on_train_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._look(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._clock.pause()

    def on_train_batch_start(self, trainer: Trainer, pl_module: VideoDecoder, batch, batch_idx) -> None:
        self._clock.resume()  # not at the validation's end: pictures are drawn and the best weights are saved there

    def on_train_batch_end(self, trainer: Trainer, pl_module: VideoDecoder, outputs, batch, batch_idx) -> None:
        if pl_module.batches_seen % trainer.accumulate_grad_batches:
            return
        self._look(trainer)
        if self.is_used_up:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._clock.end()

    def _look(self, trainer: Trainer) -> None:
        share = min(1.0, self.seconds / (60 * self.minutes))
        self._used = share if trainer.world_size == 1 else trainer.strategy.broadcast(share)
