"""Runs that end with their time: complete at the budget, rates that reach zero there, a clock that resumes where it stopped."""

import itertools
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from decoders.base import VideoDecoder
from experiments import budget
from experiments.checkpoints import LAST, Checkpoints
from experiments.compose import ConfigError
from experiments.config import load
from experiments.train import train

NAME = "flashdecoder_debug"
QUICK = ("trainer.progress_bar=false", "validation.num_shown=0", "optim.schedule=cosine", "trainer.max_steps=1000")
SECOND = "trainer.budget_minutes=0.016666667"  # of a clock that ticks whenever it is read


@pytest.fixture
def ticking(monkeypatch, runs_root) -> None:
    """A clock that is a tenth of a second further each time: a budget of one second is ten readings."""
    ticks = itertools.count()
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 10))


def run(*overrides: str, callbacks=()) -> Path:
    overrides = (*QUICK, SECOND, *overrides)
    return train(load(NAME, overrides), NAME, overrides, callbacks)


def rates(folder: Path) -> list[float]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [event.value for event in events.Scalars("lr/decoder")]


def test_time_ends_a_run_and_its_rates(ticking) -> None:
    folder = run()
    done = json.loads((folder / "done.json").read_text())
    assert 5 <= done["steps"] <= 12 < 1000
    seen = rates(folder)
    assert max(seen) > 0.5 * 2e-3 and seen[-1] < 0.1 * max(seen), "the cosine ends with the time, not with max_steps"
    assert run() == folder, "a complete run is left alone"


def test_time_goes_on_after_an_interruption(ticking) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit):
            run(callbacks=[Stop()])
        folder = run()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    done = json.loads((folder / "done.json").read_text())
    assert 4 < done["steps"] <= 12, "the second part has what the first left of the second, not a second of its own"
    spent = torch.load(folder / LAST, weights_only=True)["callbacks"]["Budget"]["seconds"]
    assert 1.0 <= spent < 1.5


@pytest.mark.parametrize("make", [lambda: budget.Budget(minutes=1), lambda: Checkpoints(Path("nowhere"), "x", 1)])
def test_validation_takes_no_time(monkeypatch, make) -> None:
    """Neither of the budget nor of the minutes that a run is said to have trained."""
    ticks = iter(
        [0.0, 10.0, 500.0, 505.0, 506.0]
    )  # start; validation and pictures from 10 to 500; five seconds; the end
    clock = make()
    trainer = SimpleNamespace(world_size=1, state=SimpleNamespace(fn="fit"), sanity_checking=True, global_step=0)
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    clock.on_fit_start(trainer, None)
    clock.on_validation_start(trainer, None)
    clock.on_train_batch_start(trainer, None, None, 0)
    assert clock.seconds == 15.0
    clock._saved_step = 0  # nothing is left to be saved
    clock.on_train_end(trainer, None)
    clock.on_validation_start(trainer, None)  # the evaluation at the end
    assert clock.state_dict() == {"seconds": 16.0}


def test_what_a_module_does_before_its_first_step_counts(monkeypatch, runs_root) -> None:
    """Calibration, pruning and statistics are training: of an hour's budget too, and of the minutes that are told."""
    now = [0.0]
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: now[0]))
    begin = VideoDecoder.on_fit_start

    def prune(self) -> None:
        now[0] += 30.0
        begin(self)

    monkeypatch.setattr(VideoDecoder, "on_fit_start", prune)
    overrides = (*QUICK, "trainer.budget_minutes=0.5")
    folder = train(load(NAME, overrides), NAME, overrides)
    done = json.loads((folder / "done.json").read_text())
    assert (done["minutes"], done["steps"]) == (0.5, 1), "the budget was used up before the first step"


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="budget_minutes"):
        load(NAME, ["trainer.budget_minutes=0"])
