"""The guard: a step that is not finite, or explodes, is left out, written down, and can be computed again."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import Callback

from decoders.optimisation import TrainingDiverged
from decoders.training import GuardConfig
from experiments import guard, replay
from experiments.compose import ConfigError
from experiments.config import load
from experiments.runs import run_name
from experiments.train import train
from tests.test_train import QUICK, _assert_same, scalars

NAME = "flashdecoder_debug"
ROOT = Path(__file__).parent.parent


def run(*overrides: str, callbacks=(), name: str = NAME) -> Path:
    overrides = (*QUICK, *overrides)
    return train(load(name, overrides), name, overrides, callbacks)


class Poison(Callback):
    """Puts ``value`` into a weight's gradient, or times it, at optimiser steps ``steps`` (from 0)."""

    def __init__(self, steps, value: float = math.nan) -> None:
        self.steps, self.value, self.before, self.after = steps, value, {}, {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step in self.steps:
            self.before = state(pl_module, optimizer)
            if math.isfinite(self.value):
                pl_module.model.embed.weight.grad.mul_(self.value)
            else:
                pl_module.model.embed.weight.grad[0, 0] = self.value

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step - 1 in self.steps:
            self.after = state(pl_module, trainer.optimizers[0])


def state(module, optimizer) -> dict:
    moments = {str(i): one for i, one in enumerate(optimizer.state.values())}
    live = {"weights": dict(module.named_parameters()), "average": module.ema.average, "moments": moments}
    return {
        part: {
            name: {k: v.detach().clone() for k, v in value.items()}
            if isinstance(value, dict)
            else value.detach().clone()
            for name, value in named.items()
        }
        for part, named in live.items()
    }


def test_a_step_that_is_not_finite_leaves_no_trace_in_the_state(runs_root: Path, capsys) -> None:
    poison = Poison([6])
    folder = run("trainer.max_steps=9", callbacks=[poison])
    assert poison.before["moments"]  # there was something to spoil
    _assert_same(poison.before, poison.after)
    assert all(t.isfinite().all() for t in torch.load(folder / "last.ckpt", weights_only=True)["state_dict"].values())
    assert (
        "step 6 left out: the gradient of decoder is not finite (1 of at most 10 in 100 steps)"
        in capsys.readouterr().out
    )
    [record] = guard.read(folder)
    assert record["step"] == 6 and math.isnan(record["values"]["decoder"]) and record["position"]["step"] == 6
    assert len(record["ranks"][0][0]["keys"]) == 2 and record["ranks"][0][0]["terms"].keys() == {"l1"}
    assert json.loads((folder / guard.BAD_STEPS).read_text())["values"]["decoder"] == "nan"  # JSON that others can read
    assert json.loads((folder / "done.json").read_text())["skipped_steps"] == 1
    skipped = scalars(folder, "train/skipped")
    assert [skipped[step] for step in (6, 7, 9)] == [0, 1, 1] and len(scalars(folder, "train/loss")) == 9


def test_too_many_end_the_run_at_its_last_good_checkpoint(runs_root: Path) -> None:
    overrides = ("trainer.guard.limit=2", "trainer.guard.window=4", "trainer.checkpoint_every_steps=5")
    apart = Poison([1, 2, 5, 6])  # never three within four steps
    with pytest.raises(TrainingDiverged, match=r"not finite at step 12, .*3 steps within 4.*same command resumes"):
        run(*overrides, callbacks=[apart, Poison([10, 11, 12])])
    folder = runs_root / NAME
    kept = torch.load(folder / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 10
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())
    assert [record["step"] for record in guard.read(folder)] == [1, 2, 5, 6, 10, 11, 12]
    # Computed again from the checkpoint of the very step, its terms are the run's own, to the last bit.
    [seen] = replay.replay(NAME, (*QUICK, *overrides), step=10)
    assert seen.terms == [batch["terms"] for batch in guard.read(folder)[4]["ranks"][0]]
    run(*overrides)  # without the poison it goes on, and forgets what it wrote of steps that came again
    assert [record["step"] for record in guard.read(folder)] == [1, 2, 5, 6]
    assert json.loads((folder / "done.json").read_text())["skipped_steps"] == 4  # the checkpoint knew


def test_an_explosion_is_told_from_the_median(runs_root: Path) -> None:
    poison = Poison([14], value=1e4)
    folder = run("trainer.guard.explode=20", callbacks=[poison])
    _assert_same(poison.before, poison.after)
    [record] = guard.read(folder)
    assert record["step"] == 14 and record["why"].startswith("the gradient norm of decoder is ")
    assert record["values"]["decoder"] > 20 * record["medians"]["decoder"] > 0


def test_without_a_limit_on_growth_only_what_is_not_finite_counts() -> None:
    judge = guard.Guard(GuardConfig(), Path("nowhere"), None, "")
    judge._usual = {"decoder": guard.deque([1.0] * 20), "loss": guard.deque([1.0] * 20)}
    assert judge._verdict({"decoder": 1e30, "loss": -1e30}) is None
    assert judge._verdict({"decoder": 1.0, "loss": math.inf}) == "the loss is not finite"
    judge.config = GuardConfig(explode=10.0)
    assert "the loss is -11, above 10 times its median of 1" in judge._verdict({"decoder": 1.0, "loss": -11.0})


@pytest.mark.parametrize("value", ["trainer.guard.limit=-1", "trainer.guard.explode=1", "trainer.guard.window=0"])
def test_a_guard_that_cannot_work_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="guard"):
        load(NAME, [value])


class BadPixels(Callback):
    """The loss of one step is made of a picture with infinite values, as a broken file might give."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 5:
            batch["video"][0] = math.inf


def test_a_step_is_computed_again_from_its_place_in_the_data(runs_root: Path, capsys) -> None:
    overrides = ("trainer.max_steps=6", "trainer.checkpoint_every_steps=4", "trainer.keep_checkpoints=2")
    overrides += ("trainer.accumulate_grad_batches=2",)
    folder = run(*overrides, callbacks=[BadPixels()])
    [record], events = guard.read(folder), len(list(folder.glob("events*")))
    batches = record["ranks"][0]
    assert len(batches) == 2 and record["why"] == "the gradient of decoder and the loss are not finite"
    # As it was computed then, but with the weights of step 4, and of pixels that are in order.
    [seen] = replay.replay(NAME, (*QUICK, *overrides), step=5)
    assert seen.keys == [batch["keys"] for batch in batches]
    printed = capsys.readouterr().out
    assert "step-00000004.ckpt, 1 steps before it" in printed and "here all is finite" in printed
    assert len(guard.read(folder)) == 1 and len(list(folder.glob("events*"))) == events  # the run is as it was
    with pytest.raises(ConfigError, match="step=7 was not left out; there are 5"):
        replay.main([NAME, *QUICK, *overrides, "step=7"])
    # Had the weights been broken, the layer would be named.
    state = torch.load(folder / "step-00000004.ckpt", weights_only=True)
    state["state_dict"]["model.embed.weight"][0, 0] = math.inf
    torch.save(state, folder / "step-00000004.ckpt")
    replay.main([NAME, *QUICK, *overrides])
    printed = capsys.readouterr().out
    assert "first output that is not finite: model.embed (Linear), of inputs that are finite" in printed
    assert "weights     NOT FINITE: model.embed.weight" in printed and "l1          nan   NOT FINITE" in printed


def test_statistics_of_latents_keep_nothing_of_a_step_that_was_left_out(runs_root: Path) -> None:
    """REGEN's: not finite once, they would end the run at its last step, and every session that resumes it."""

    class Bad(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 1:
                batch["video"][1] = math.nan

    folder = run("trainer.max_steps=3", "ema=null", "trainer.val_every_steps=3", name="regen_debug", callbacks=[Bad()])
    moments = torch.load(folder / "last.ckpt", weights_only=True)["moments"]
    assert [record["step"] for record in guard.read(folder)] == [1] and moments.isfinite().all()
    assert moments[0].tolist() == pytest.approx([1 + 0.99] * 4)  # two steps were made


def test_weights_that_are_not_finite_are_never_saved(runs_root: Path) -> None:
    """A finite gradient can make them so: the checkpoint before stays the last one."""

    class Spoil(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 4:
                pl_module.model.embed.weight.data[0, 0] = math.inf

    with pytest.raises(TrainingDiverged, match="weights of step 4 are not finite.*last checkpoint is intact"):
        run("trainer.checkpoint_every_steps=2", "trainer.max_steps=6", callbacks=[Spoil()])
    state = torch.load(runs_root / f"{NAME}+trainer.max_steps=6" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2 and state["state_dict"]["model.embed.weight"].isfinite().all()


# Lightning starts the second process by running this script again.
SCRIPT = """
import math, sys
from lightning import Callback
from experiments.config import load
from experiments.train import quiet, train

class BadPixels(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            batch["video"][1] = math.nan

if __name__ == "__main__":
    quiet()
    train(load("flashdecoder_debug", sys.argv[1:]), "flashdecoder_debug", sys.argv[1:], [BadPixels()])
"""


@pytest.mark.slow
def test_all_processes_leave_out_the_same_step(runs_root: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    overrides = ("trainer.devices=2", "trainer.max_steps=5", *QUICK)
    environment = {
        "RUNS_ROOT": str(runs_root),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, tmp_path / "script.py", *overrides]
    subprocess.run(command, env=environment, check=True, timeout=300)  # were they to disagree, it would hang
    folder = runs_root / run_name(NAME, overrides)
    [record] = guard.read(folder)
    assert record["step"] == 2 and len(record["ranks"]) == 2
    (first,), (second,) = record["ranks"]
    assert math.isfinite(first["loss"]) and math.isnan(second["loss"]) and not set(first["keys"]) & set(second["keys"])
    state = torch.load(folder / "last.ckpt", weights_only=True)
    assert state["global_step"] == 5 and all(value.isfinite().all() for value in state["state_dict"].values())
    seen = replay.replay(NAME, overrides)  # each rank's batch in turn, in this one process
    assert [one.keys for one in seen] == [[first["keys"]], [second["keys"]]]
