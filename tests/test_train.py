"""Training end to end, in process: resuming, stopping, stages, divergence, a full disk. Small runs of the debug experiments."""

import csv
import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from decoders.optimisation import TrainingDiverged
from experiments import checkpoints, evaluate
from experiments.checkpoints import LAST, DiskFull
from experiments.compose import ConfigError
from experiments.config import build_space, load
from experiments.train import train, train_missing

QUICK = ("trainer.progress_bar=false", "validation.num_shown=0")


def run(name: str, *overrides: str, callbacks=()) -> Path:
    overrides = (*QUICK, *overrides)
    return train(load(name, overrides), name, overrides, callbacks)


class At(Callback):
    """Does something after optimiser step ``step``."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            self.action(trainer, pl_module)


def press_ctrl_c(trainer, pl_module) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate(trainer, pl_module) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers():
    """Training installs signal handlers; give pytest its own back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def scalars(folder: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_n_plus_m_steps_equal_n_then_m(costly_name: str, tmp_path: Path, monkeypatch) -> None:
    """Weights, optimiser, EMA, data position and randomness: to the last bit, at a step where nothing was due."""
    stop = terminate if costly_name == "flashdecoder_debug" else press_ctrl_c  # what a signal does is no family's own
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "whole"))
    whole = run(costly_name)
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "parts"))
    with pytest.raises(SystemExit):
        run(costly_name, callbacks=[At(5, stop)])
    part = tmp_path / "parts" / whole.name
    assert not (part / "done.json").exists()
    assert torch.load(part / LAST, weights_only=True)["global_step"] == 5
    run(costly_name)
    a, b = (torch.load(folder / LAST, weights_only=True) for folder in (whole, part))
    assert a["global_step"] == b["global_step"] == 16
    assert a["seen"] == b["seen"]
    _assert_same(a["state_dict"], b["state_dict"])
    _assert_same(a.get("ema", {}), b.get("ema", {}))
    _assert_same(a["optimizer_states"][0]["state"], b["optimizer_states"][0]["state"])
    whole_loss, part_loss = (scalars(folder, "train/loss") for folder in (whole, part))
    assert whole_loss == part_loss
    assert scalars(whole, "val/psnr") == scalars(part, "val/psnr")


def _assert_same(a, b) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
        return
    assert a.keys() == b.keys()
    for key in a:
        _assert_same(a[key], b[key])


def test_a_run_leaves_everything_behind(debug_name: str, runs_root: Path, capsys) -> None:
    overrides = ("trainer.progress_bar=false", "trainer.max_steps=4", "trainer.val_every_steps=2")
    experiment = load(debug_name, overrides)
    folder = train(experiment, debug_name, overrides)
    printed = capsys.readouterr().out
    for promised in ("| clips", "mean colour", "one colour per", str(folder), "--logdir"):
        assert promised in printed
    assert ("own decoder" in printed) == hasattr(build_space(experiment), "decode")
    done = json.loads((folder / "done.json").read_text())
    assert done["steps"] == 4
    result = json.loads((folder / "evaluation" / "result.json").read_text())
    assert result["protocols"]["unseen/psnr"]["frames"] == [0, experiment.data.val["unseen"].num_frames]
    with open(folder / "evaluation" / "clips.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "decoder"]
    mean = sum(float(row["psnr"]) for row in rows) / len(rows)
    assert result["means"][0]["scores"]["psnr"] == pytest.approx(mean)
    assert done["scores"]["psnr"] == pytest.approx(mean)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    expected = {
        "train/loss",
        "train/l1" if "l1" in experiment.loss_weights else "train/diffusion",
        "val/psnr",
        "val/ssim",
        "val_psnr/unseen",
        "clips_seen",
        "lr/decoder",
        "grad_norm/decoder",
    }
    assert expected | {"perf/clips_per_s", "perf/step_ms", "perf/peak_memory_gib"} <= set(tags["scalars"])
    assert {"clip0/truth_decode_error", "clip0/moving", "clip0/x_t_truth_decode"} <= set(tags["images"])
    assert any(tag.startswith("config") for tag in tags["tensors"])
    assert events.Images("clip0/moving")[0].encoded_image_string.startswith(b"GIF89a")
    train(load(debug_name, overrides), debug_name, overrides)
    assert "is complete" in capsys.readouterr().out


def test_evaluate_repeats_the_last_validation(runs_root: Path, capsys) -> None:
    folder = run("flashdecoder_debug", "trainer.max_steps=6")
    before = json.loads((folder / "evaluation" / "result.json").read_text())
    after = evaluate.evaluate("flashdecoder_debug", (*QUICK, "trainer.max_steps=6"))
    assert [m["scores"] for m in after["means"]] == [m["scores"] for m in before["means"]]
    last = evaluate.evaluate("flashdecoder_debug", (*QUICK, "trainer.max_steps=6"), weights="last")
    assert last["means"][0]["scores"] != before["means"][0]["scores"]  # those were the EMA's


def test_ema_is_what_validation_sees_and_what_is_exported(runs_root: Path) -> None:
    folder = run("flashdecoder_debug", "trainer.max_steps=8")
    ema, last = (load_file(folder / f"weights-{kind}.safetensors") for kind in ("ema", "last"))
    state = torch.load(folder / LAST, weights_only=True)
    _assert_same(ema, state["ema"])
    _assert_same(last, state["state_dict"])
    name = next(iter(ema))
    assert not torch.equal(ema[name], last[name])


def test_ema_follows_its_formula(runs_root: Path) -> None:
    seen = {}

    def remember(trainer, module):
        seen[trainer.global_step] = (
            module.model.embed.weight.detach().clone(),
            module.ema.average["model.embed.weight"].clone(),
        )

    run("flashdecoder_debug", "trainer.max_steps=6", callbacks=[At(step, remember) for step in range(1, 7)])
    for step in range(1, 7):
        weight, average = seen[step]
        expected = weight if step <= 4 else 0.9 * seen[step - 1][1] + 0.1 * weight
        torch.testing.assert_close(average, expected)


def test_a_changed_configuration_stops_a_resume_with_the_difference(runs_root: Path, monkeypatch) -> None:
    with pytest.raises(SystemExit):
        run("flashdecoder_debug", callbacks=[At(2, press_ctrl_c)])
    changed = load("flashdecoder_debug", QUICK)
    changed.optim.lr = 1e-5
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.002 -> 1e-05"):
        train(changed, "flashdecoder_debug", QUICK)


def test_a_stage_starts_from_its_parent_by_name(runs_root: Path) -> None:
    for missing, message in (("flashdecoder_debug", "make exp=flashdecoder_debug"), ("flashdecoder_debg", "make list")):
        with pytest.raises(ConfigError, match=message):
            run("flashdecoder_gan_debug", f"init_from={missing}", "trainer.max_steps=1")
    parent = runs_root / run("flashdecoder_debug", "trainer.max_steps=4").name
    weights = load_file(parent / "weights-ema.safetensors")
    started = {}

    class Start(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            started.update({name: p.detach().clone() for name, p in pl_module.inference_parameters().items()})

    run("flashdecoder_gan_debug", f"init_from={parent.name}", "trainer.max_steps=1", callbacks=[Start()])
    _assert_same(weights, started)
    (parent / "done.json").unlink()
    with pytest.raises(ConfigError, match="allow_unfinished_parent=true"):
        run("flashdecoder_gan_debug", f"init_from={parent.name}", "trainer.max_steps=2")
    wide = ("decoder.dim=192", "decoder.num_heads=3", "allow_unfinished_parent=true", "trainer.max_steps=2")
    with pytest.raises(ConfigError, match=r"model\.\S+ is \(128.* there and \(192"):
        run("flashdecoder_gan_debug", f"init_from={parent.name}", *wide)


def test_a_gradient_that_is_not_finite_stops_before_the_weights(runs_root: Path) -> None:
    kept = {}

    class Poison(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            if trainer.global_step == 10:
                kept.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})
                pl_module.model.embed.weight.grad[0, 0] = float("nan")
                kept["module"] = pl_module

    with pytest.raises(TrainingDiverged, match="gradient of decoder is not finite at step 10"):
        run("flashdecoder_debug", "trainer.guard=null", callbacks=[Poison()])
    module = kept.pop("module")
    _assert_same(kept, {name: p.detach() for name, p in module.named_parameters()})
    assert torch.load(runs_root / "flashdecoder_debug" / LAST, weights_only=True)["global_step"] == 8
    run("flashdecoder_debug")  # and the same command goes on


def test_a_full_disk_loses_nothing(runs_root: Path, monkeypatch) -> None:
    real, calls = torch.save, []

    def full_after_first(state, path):
        calls.append(path)
        if len(calls) > 1:
            Path(path).write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setattr(checkpoints.torch, "save", full_after_first)
    with pytest.raises(DiskFull, match="same command to resume"):
        run("flashdecoder_debug", "trainer.checkpoint_every_steps=4")
    monkeypatch.undo()
    os.environ["RUNS_ROOT"] = str(runs_root)
    folder = next(runs_root.iterdir())
    assert torch.load(folder / LAST, weights_only=True)["global_step"] == 4
    assert not list(folder.glob(".*.tmp"))


def test_leftovers_of_a_killed_write_are_removed_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".file.99999.tmp"
    left.write_text("half")
    checkpoints.write_atomically(tmp_path / "file", lambda temporary: temporary.write_text("whole"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_older_checkpoints_stay_as_many_as_asked(runs_root: Path, monkeypatch) -> None:
    folder = run("flashdecoder_debug", "trainer.keep_checkpoints=2", "trainer.checkpoint_every_steps=4")
    assert sorted(path.name for path in folder.glob("*.ckpt")) == [LAST, "step-00000012.ckpt", "step-00000016.ckpt"]
    assert torch.load(folder / "step-00000012.ckpt", weights_only=True)["global_step"] == 12


def test_a_stop_within_a_step_waits_for_its_end(tmp_path: Path, monkeypatch) -> None:
    """Half of an accumulated step is in no checkpoint."""
    overrides = ("trainer.accumulate_grad_batches=3", "trainer.max_steps=4", "trainer.val_every_steps=4")

    class StopWithin(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if pl_module.batches_seen == 4:  # the first of the second step's three
                press_ctrl_c(trainer, pl_module)

    states = []
    for name, callbacks in (("whole", []), ("parts", [StopWithin()])):
        monkeypatch.setenv("RUNS_ROOT", str(tmp_path / name))
        if callbacks:
            with pytest.raises(SystemExit):
                run("flashdecoder_debug", *overrides, callbacks=callbacks)
        states.append(torch.load(run("flashdecoder_debug", *overrides) / LAST, weights_only=True))
    _assert_same(states[0]["state_dict"], states[1]["state_dict"])
    assert states[0]["seen"] == states[1]["seen"]


def test_a_time_limit_is_no_end(runs_root: Path, capsys) -> None:
    folder = run("flashdecoder_debug", "trainer.max_minutes=0.005", "trainer.max_steps=400")
    assert "a larger value goes on" in capsys.readouterr().out
    assert not (folder / "done.json").exists()
    step = torch.load(folder / LAST, weights_only=True)["global_step"]
    assert 0 < step < 400
    assert run("flashdecoder_debug", "trainer.max_minutes=0.05", "trainer.max_steps=400") == folder
    assert torch.load(folder / LAST, weights_only=True)["global_step"] > step


def test_a_run_is_measured_on_other_clips_than_it_validated_on(runs_root: Path) -> None:
    folder = run("flashdecoder_debug", "trainer.max_steps=2")
    overrides = (*QUICK, "trainer.max_steps=2", "data.val.unseen.num_frames=17")
    result = evaluate.evaluate("flashdecoder_debug", overrides, weights="last")
    file = folder / "weights-last.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert result["weights"] == {"kind": "last", "step": 2, "file": file.name, "sha256": digest}
    assert result["protocols"]["unseen/psnr"]["frames"] == [0, 17]
    kept = json.loads((folder / "evaluation" / "result.json").read_text())
    assert kept["protocols"]["unseen/psnr"]["frames"] == [0, 9]
    assert kept["weights"]["sha256"] == hashlib.sha256((folder / "weights-ema.safetensors").read_bytes()).hexdigest()
    assert kept["experiment"] == folder.name and kept["seconds"]["decode"] > 0
    assert len(list(folder.glob("evaluation*/result.json"))) == 2


def test_weights_of_another_latent_space_are_refused(runs_root: Path) -> None:
    parent = run("flashdecoder_debug", "trainer.max_steps=1")
    other = ("space.stride_t=2", "space.channels=12", f"init_from={parent.name}", "trainer.max_steps=1")
    with pytest.raises(ConfigError, match="another latent space|does not fit"):
        run("flashdecoder_debug", *other)


def test_accumulated_steps_equal_one_larger_batch(runs_root: Path) -> None:
    """Two micro-batches a step: twice the clips, the same number of optimiser steps and validations."""
    folder = run(
        "flashdecoder_debug", "trainer.max_steps=4", "trainer.accumulate_grad_batches=2", "trainer.val_every_steps=2"
    )
    done = json.loads((folder / "done.json").read_text())
    assert (done["steps"], done["clips_seen"]) == (4, 16)
    assert list(scalars(folder, "val/psnr")) == [2, 4]


def test_a_schedule_moves_a_weight(runs_root: Path) -> None:
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            seen.append(pl_module.weight("l1"))

    run(
        "flashdecoder_debug",
        "trainer.max_steps=5",
        "loss_weights.l1={start: 1.0, end: 0.0, to_step: 4}",
        callbacks=[Watch()],
    )
    assert seen == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_missing_runs_are_all_looked_at_before_one_is_trained(runs_root: Path) -> None:
    """A run that is complete under another configuration is no substitute, and is told before hours go by."""
    done = run("flashdecoder_debug")
    config = done / "config.yaml"
    config.write_text(config.read_text().replace("max_steps: 16", "max_steps: 15"))
    with pytest.raises(ConfigError, match="trainer.max_steps: 15 -> 16"):
        train_missing(["baseline_debug", "flashdecoder_debug"], QUICK)
    assert not (runs_root / "baseline_debug").exists()
