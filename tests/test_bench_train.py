"""The benchmark of training: whose time a step is, turns, what is refused, and a run of it in small."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments import bench_train, shares
from experiments.bench_train import BenchTrainConfig, Turn, schedule
from experiments.compose import ConfigError
from experiments.config import load
from experiments.shares import PARTS, Timeline

TINY = ["decoder.depth=1", "data.train.image=null", "data.train.video.share=1"]
ONCE = ["bench.steps=1", "bench.rounds=1", "bench.warm_up=1"]


# --- shares -----------------------------------------------------------------------------------------------------------


def test_time_is_the_part_that_began_last_and_what_is_inside_is_taken_out(monkeypatch) -> None:
    now = iter(range(100))
    timeline = Timeline(torch.device("cpu"))
    monkeypatch.setattr(timeline, "_now", lambda: next(now))
    timeline.mark("lpips")  # nothing runs yet
    timeline.begin()
    timeline.mark("forward")
    with timeline.within("encoder"):
        pass
    timeline.mark("backward")
    marks = timeline.end()
    assert timeline.seconds(marks) == {"rest": 1, "forward": 2, "encoder": 1, "backward": 1}
    assert [part for part, _ in marks] == ["rest", "forward", "encoder", "forward", "backward", "end"]


def test_a_loss_ends_where_its_inputs_gradient_is_there(monkeypatch) -> None:
    """Three parts that move the clock in their backward pass, each as far as its own number says."""
    clock = [0]

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, seconds):
            ctx.seconds = seconds
            clock[0] += 1
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            clock[0] += ctx.seconds
            return gradient, None

    class Network(nn.Module):
        def forward(self, x):
            return Slow.apply(x, 80)

    timeline, network = Timeline(torch.device("cpu")), Network()
    monkeypatch.setattr(timeline, "_now", lambda: clock[0])
    shares._watch(timeline, "forward", "backward", network)
    perceptual = shares._timed(timeline, "lpips", lambda x: Slow.apply(x, 40), backward=True)
    timeline.begin()
    prediction = network(torch.ones(1, requires_grad=True))
    total = Slow.apply(prediction * 1.0, 20) + perceptual(prediction * 1.0)
    timeline.mark("losses")
    total.sum().backward()
    timeline.mark("optimiser")
    found = timeline.seconds(timeline.end())
    assert found == {"rest": 1, "forward": 1, "lpips": 1 + 40, "losses": 20, "backward": 80, "optimiser": 0}


# --- turns and options ------------------------------------------------------------------------------------------------


def test_variants_take_turns_at_each_size() -> None:
    config = BenchTrainConfig(variants=["base", "latents"], steps=2, rounds=3, warm_up=1)
    turns = schedule(["small", "large"], config)
    assert [turn.stream for turn in turns] == ["small"] * 20 + ["large"] * 20
    measured = [turn for turn in turns[:20] if turn.round is not None]
    assert len(measured) == 2 * 3 * 2
    assert [turn.variant for turn in measured[:4]] == ["base"] * 2 + ["latents"] * 2
    for before, after in zip(turns, turns[1:], strict=False):
        assert after.variant == before.variant or after.round is None, "the first step of a turn is not measured"
    assert Turn("a", "latents+compile", 0).has("compile") and not Turn("a", "latents+compile", 0).has("base")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"variants": ["fast"]}, "no switch fast; there are base"),
        ({"variants": ["keep+recompute"]}, "one thing and its opposite"),
        ({"variants": ["latents+ahead"]}, "one thing and its opposite"),
        ({"steps": 0}, "1 or more"),
    ],
)
def test_options_that_make_no_sense(given, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        BenchTrainConfig(**given)


@pytest.mark.parametrize(
    ("name", "overrides", "config", "reason"),
    [
        ("regen_debug", [], {"variants": ["latents"]}, "Regen encodes within its own loss.*leave those variants out"),
        ("regen_debug", [], {"variants": ["ahead"]}, "encode_ahead=true.*within its own loss"),
        ("flashdecoder_debug", [], {"streams": ["film"]}, "no stream film of clips; there are video, image"),
        ("flash_vaed_debug", ["objective.start={}"], {}, "set objective.start=null"),
    ],
)
def test_what_cannot_be_measured_is_told_before(name, overrides, config, reason) -> None:
    with pytest.raises(ConfigError, match=reason):
        bench_train.bench_train(name, overrides, BenchTrainConfig(**config))


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_in_small(tmp_path: Path, capsys) -> None:
    variants = "bench.variants=[base,latents,ahead,recompute]"
    bench_train.main(["flashdecoder_gan_debug", *TINY, *ONCE, variants, f"bench.results={tmp_path}"])
    told = capsys.readouterr().out
    (path,) = tmp_path.glob("bench-train-flashdecoder_gan_debug-*-32-true.json")
    result = json.loads(path.read_text())
    row = result["streams"]["video"]
    assert row["batch"] == [2, 3, 9, 32, 48] and row["latent"] == [2, 12, 3, 4, 6] and row["tokens"] == 2 * 3 * 4 * 6
    assert result["command"].startswith("make bench-train exp=flashdecoder_gan_debug decoder.depth=1")
    for name, found in row["variants"].items():
        assert f"| {name} " in told
        assert found["mfu"] == pytest.approx(row["flops"] / found["step_s"] / result["ceiling_flops_per_s"])
        assert found["tokens_per_s"] == pytest.approx(row["tokens"] * found["steps_per_s"])
        assert found["step_p95_s"] >= found["step_s"] > 0
        used = found["shares"]
        assert set(used) == set(PARTS) and sum(used.values()) == pytest.approx(1) and used["rest"] > 0
        assert min(used["forward"], used["backward"], used["discriminator"], used["optimiser"]) > 0
    of = {name: found["shares"] for name, found in row["variants"].items()}
    assert of["base"]["encoder"] > of["latents"]["encoder"], "a latent that is given costs a look"
    assert row["variants"]["base"]["gain"] == [1.0, 1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash_vaed_debug", "refdecoder_debug", "regen_debug", "baseline_debug"])
def test_every_family(name: str) -> None:
    without = ["objective.start=null"] if name.startswith("flash_vaed") else []  # a measurement prunes no teacher
    result = bench_train.bench_train(name, without, BenchTrainConfig(variants=["base"], steps=1, rounds=1, warm_up=1))
    assert result["streams"]
    for row in result["streams"].values():
        used = row["variants"]["base"]["shares"]
        assert used["forward"] > 0 and used["backward"] > 0 and row["variants"]["base"]["mfu"] > 0


@pytest.mark.slow
def test_the_network_is_what_training_has(tmp_path: Path) -> None:
    """Compiled blocks in turns with plain ones (traced only): switched on they have graphs, switched off none."""
    experiment = load("flashdecoder_debug", TINY)
    decoder = bench_train._build(experiment, BenchTrainConfig(variants=["base", "compile"]))
    turns = [Turn("video", "base", 0), Turn("video", "compile", 0), Turn("video", "base", 1)]
    stepper = bench_train.Stepper(experiment, turns, decoder)
    compiled = []
    for turn in turns:
        stepper._apply(decoder, turn)
        compiled.append({block._compiled_call_impl is not None for block in stepper._blocks})
    assert compiled == [{False}, {True}, {False}]
