"""What a run costs: operations counted, time by the clock, waiting told apart, and estimates from runs that cost the same."""

import json
import math
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments import cost, throughput
from experiments.budget import Budget
from experiments.compose import ConfigError
from experiments.config import as_dict, build_decoder, build_space, load
from experiments.throughput import Throughput, Waiting, Window
from experiments.train import train

NAME = "flashdecoder_debug"
QUICK = ("trainer.progress_bar=false", "validation.num_shown=0", "data.train.image=null", "data.train.video.share=1")
QUICK += ("decoder.depth=1",)


@pytest.fixture(autouse=True)
def handlers():
    """Training installs signal handlers; give pytest its own back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def run(*overrides: str, callbacks=()) -> Path:
    overrides = (*QUICK, *overrides)
    return train(load(NAME, overrides), NAME, overrides, callbacks)


def scalars(folder: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


# --- operations -------------------------------------------------------------------------------------------------------


def test_operations_by_hand() -> None:
    """Two matrices: 2 x rows x in x out forward; backward as much for the weights, and for the input of the second."""
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    first, second = 2 * 10 * 8 * 16, 2 * 10 * 16 * 4
    assert cost.count_operations(network, {(10, 8)}) == {(10, 8): 2 * first + 3 * second}


def test_recomputation_is_not_counted_and_attention_is() -> None:
    """The count over fake tensors is that of a real pass without checkpointing, of attention both products included."""
    plain, kept = (load(NAME, [*QUICK, f"decoder.checkpointing={flag}"]) for flag in ("false", "true"))
    space = build_space(plain)
    before = torch.random.get_rng_state()
    counted = cost.training_flops(kept, space)
    assert torch.equal(torch.random.get_rng_state(), before), "a run with MFU draws what a run without it draws"
    assert counted == cost.training_flops(plain, space)
    ((shape, flops),) = counted.values()
    assert shape == (2, 3, 9, 32, 48)
    decoder = build_decoder(plain, space)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder.model(torch.zeros(2, 12, 3, 4, 6)).sum().backward()
    assert flops == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        decoder.model(torch.zeros(2, 12, 3, 4, 6)).sum().backward()
    assert flops > counter.get_total_flops(), "a CPU's own attention is not in torch's table"


def test_streams_of_many_sizes_have_no_count() -> None:
    keep = load(NAME, ["data.train.video.resize=keep", "data.train.video.batch_size=1"])
    with torch.device("meta"):
        decoder = build_decoder(keep, build_space(keep))
    assert list(cost.stream_shapes(keep, decoder)) == ["image"]
    assert cost.batch_shape({"latent": torch.zeros(2, 12, 3, 4, 6), "key": []}) == (2, 12, 3, 4, 6)


def test_peak() -> None:
    given = cost.find_peak(989.4, torch.device("cpu"), "bf16-mixed")
    assert (given.flops_per_s, str(given)) == (989.4e12, "989 TFLOP/s")
    measured = cost.find_peak("measured", torch.device("cpu"), "32-true")
    assert 1e8 < measured.flops_per_s < 1e14 and str(measured).startswith("a measured ")
    for wrong in ("0", "fast"):
        with pytest.raises(ConfigError, match="peak_tflops"):
            load(NAME, [f"trainer.peak_tflops={wrong}"])


# --- a run's own time -------------------------------------------------------------------------------------------------


def test_what_is_logged_adds_up(runs_root: Path) -> None:
    """At every log step, also where validations come between and batches are accumulated; the clips' pixels by hand."""
    folder = run(
        "trainer.max_steps=6", "trainer.log_every_steps=2", "trainer.val_every_steps=3",
        "trainer.accumulate_grad_batches=2", "trainer.peak_tflops=0.001",
    )  # fmt: skip
    values = {
        tag: scalars(folder, f"perf/{tag}")
        for tag in ("clips_per_s", "megapixels_per_s", "step_ms", "data_wait", "mfu", "gpu_hours", "hours_left")
    }
    assert all(list(points) == [2, 4, 6] for points in values.values()), "a validation in a window loses no window"
    experiment = load(NAME, QUICK)
    ((_, flops),) = cost.training_flops(experiment, build_space(experiment)).values()
    for step in (2, 4, 6):
        seconds = values["step_ms"][step] / 1000
        assert values["clips_per_s"][step] * seconds == pytest.approx(4, rel=1e-3)
        assert values["megapixels_per_s"][step] * seconds == pytest.approx(4 * 9 * 32 * 48 / 1e6, rel=1e-3)
        assert values["mfu"][step] * seconds == pytest.approx(2 * flops / 1e9, rel=1e-3)
        assert 0 < values["data_wait"][step] < 1
    assert values["hours_left"][6] == 0 < values["hours_left"][4] < values["hours_left"][2]
    assert 0 < values["gpu_hours"][2] < values["gpu_hours"][4] < values["gpu_hours"][6]
    done = json.loads((folder / "done.json").read_text())
    assert min(values["mfu"].values()) <= done["mfu"] <= max(values["mfu"].values())
    assert done["gpu_hours"] == pytest.approx(values["gpu_hours"][6], abs=0.01) and 0 < done["data_wait"] < 1


def test_a_slow_loader_is_told_from_a_slow_step(runs_root: Path, monkeypatch) -> None:
    """Three tenths of a second in the loader, and one in the step: the share that is waited is more than a half of it all."""
    from datamodules.reader import ClipReader

    read = ClipReader.read
    monkeypatch.setattr(ClipReader, "read", lambda self, request: (time.sleep(0.15), read(self, request))[1])

    class Slow(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            time.sleep(0.1)

    monkeypatch.setattr(throughput, "SETTLED_S", 0.0)
    folder = run("trainer.max_steps=4", "trainer.log_every_steps=2", callbacks=[Slow()])
    waited = scalars(folder, "perf/data_wait")[4]
    step_s = scalars(folder, "perf/step_ms")[4] / 1000
    assert waited * step_s >= 0.3 and (1 - waited) * step_s >= 0.1, "the sleeps are where they belong"


def test_only_training_waits(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    waiting = Waiting()
    waiting.stop("[_TrainingEpochLoop].train_dataloader_next")  # never begun: nothing
    for action in ("[_EvaluationLoop].val_next", "[_TrainingEpochLoop].train_dataloader_next", "run_training_batch"):
        waiting.start(action)
        now[0] += 2.0
        waiting.stop(action)
    assert waiting.seconds == 2.0


def test_a_window_leaves_validations_out(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    waiting = Waiting()
    window = Window(waiting)
    now[0] = 2.0
    waiting.seconds += 1.0
    window.pause()
    now[0] = 50.0  # a validation, pictures; what its loader waits for is not ours
    waiting.seconds += 7.0
    window.resume()
    now[0] = 53.0
    assert (window.seconds, window.waited) == (5.0, 1.0)
    window.resume()
    assert window.seconds == 5.0, "resuming twice changes nothing"


def test_a_pace_leaves_the_first_window_out_and_counts_validations(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    overrides = ["trainer.max_steps=100", "trainer.val_every_steps=10", "trainer.log_every_steps=5"]
    meter = Throughput(load(NAME, overrides))
    meter.on_fit_start(None, None)
    meter._world_size = 4

    def window(seconds: float, steps: int, step: int) -> dict[str, float]:
        made = Window(meter._waiting)
        made.steps, made.clips = steps, steps * 8
        now[0] += seconds
        return meter._take(made, step)

    assert window(50.0, 5, 5)["perf/hours_left"] * 3600 == pytest.approx(95 * 10.0)
    values = window(5.0, 5, 10)
    assert values["perf/hours_left"] * 3600 == pytest.approx(90.0), "1 s a step, not the 5.5 of all"
    meter._validations = (6.0, 2)
    values = window(5.0, 5, 15)
    assert values["perf/hours_left"] * 3600 == pytest.approx(85 + 9 * 3.0)
    assert values["perf/gpu_hours_left"] == pytest.approx(4 * values["perf/hours_left"])
    assert values["perf/gpu_hours"] * 3600 == pytest.approx(60 * 4)
    assert "perf/mfu" not in values
    line = meter.words("cuda", None)
    assert "1 s a step" in line and "GPU-hours left" in line and "too slow" not in line
    meter.data_wait = 0.5
    assert "data.num_workers" in meter.words("cuda", None)
    assert meter.shown("cuda") == {"clips/s": "8.00", "wait": "50%", "left": "1.9 min", "GPU-h": "0.1 of 0.2"}
    assert "GPU-h" not in meter.shown("cpu") and Throughput(load(NAME, overrides)).shown("cpu") == {}
    budget = Budget(minutes=10)
    budget._used = 0.25
    assert Throughput(load(NAME, overrides), budget)._seconds_left(3) == 450


def test_hours_go_on_after_an_interruption(runs_root: Path, monkeypatch, capsys) -> None:
    """And the resumed run says what was spent and what is left before its first step."""
    monkeypatch.setattr(throughput, "SETTLED_S", 0.0)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit):
        run("trainer.max_steps=5", callbacks=[Stop()])
    (last,) = runs_root.glob("*/last.ckpt")
    before = torch.load(last, weights_only=True)["callbacks"]["Throughput"]
    assert before["device_s"] > before["trained_s"] > 0 and before["steps"] == 3
    said = capsys.readouterr().out
    assert said.count("at this rate") == 1, "once in a session"
    folder = run("trainer.max_steps=5")
    said = capsys.readouterr().out
    assert re.search(r"CPU-process-hours spent so far; at the .* s a step until now: .* left", said)
    after = torch.load(last, weights_only=True)["callbacks"]["Throughput"]
    assert after["steps"] == 5 and after["device_s"] > before["device_s"]
    done = json.loads((folder / "done.json").read_text())
    assert done["gpu_hours"] * 3600 >= 0.9 * before["device_s"] and done["mfu"] is None


# --- before a run -----------------------------------------------------------------------------------------------------


def finished(root: Path, folder: str, overrides: list[str], **done) -> None:
    (root / folder).mkdir(parents=True)
    (root / folder / "config.yaml").write_text(yaml.safe_dump(as_dict(load(NAME, overrides))))
    record = {"steps": 100, "minutes": 5.0, "device": "cpu", "devices": 1} | done
    (root / folder / "done.json").write_text(json.dumps(record))


def test_an_earlier_run_of_the_same_cost_tells_the_time(runs_root: Path) -> None:
    experiment = load(NAME, ["seed=3", "trainer.max_steps=1000"])
    assert cost.earlier_run(experiment, NAME, "cpu", 1) is None, "nothing was run yet"
    finished(runs_root, f"{NAME}+decoder.depth=4", ["decoder.depth=4"])
    finished(runs_root, f"{NAME}_other", [])
    finished(runs_root, f"{NAME}+a", [], device="NVIDIA H100 80GB HBM3")
    finished(runs_root, f"{NAME}+b", [], devices=2)
    finished(runs_root, f"{NAME}+c", [], minutes=0.0)
    assert cost.earlier_run(experiment, NAME, "cpu", 1) is None, "another size, device, number of them, or no time"
    finished(runs_root, f"{NAME}+optim.lr=1", ["optim.lr=1", "trainer.num_nodes=1"])
    before = cost.earlier_run(experiment, NAME, "cpu", 1)
    assert (before.run, before.step_s) == (f"{NAME}+optim.lr=1", 3.0)
    finished(runs_root, NAME, [], minutes=10.0)
    os.utime(runs_root / NAME / "done.json", (time.time() + 10,) * 2)
    assert cost.earlier_run(experiment, NAME, "cpu", 1).step_s == 6.0, "the newest"
    trainer = SimpleNamespace(world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    line = cost.words_before(experiment, NAME, trainer)
    assert line.startswith(
        "expected: 1.7 h of training, 1.7 CPU-process-hours, at the 6 s a step of flashdecoder_debug"
    )
    limited = load(NAME, ["trainer.budget_minutes=30"])
    assert cost.words_before(limited, NAME, trainer).startswith("expected: 30 min of training, 0.500 CPU")


def test_a_second_run_says_what_it_will_take(runs_root: Path, capsys) -> None:
    run("trainer.max_steps=1")
    assert "expected:" not in capsys.readouterr().out, "nobody knows"
    (done,) = runs_root.glob("*/done.json")
    done.write_text(json.dumps(json.loads(done.read_text()) | {"minutes": 0.5}))
    run("trainer.max_steps=2", "seed=1")
    assert "expected: 60 s of training" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (45, "45 s"),
        (300, "5.0 min"),
        (3000, "50 min"),
        (2 * 3600, "2.0 h"),
        (30 * 3600, "30 h"),
        (4.1 * 86400, "4.1 days"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert cost.duration(seconds) == words


def test_device_hours() -> None:
    assert cost.device_hours(12345.6, "cuda") == "12,346 GPU-hours"
    assert cost.device_hours(2.34, "NVIDIA H100") == "2.3 GPU-hours"
    assert cost.device_hours(0.0123, "cpu") == "0.012 CPU-process-hours"
    assert not math.isnan(Throughput(load(NAME)).device_hours)
