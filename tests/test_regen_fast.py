"""REGEN's optimised form equals the model: every variant, number of steps, way of asking for frames, and stream."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from regen_small import STRIDE_HW, VARIANTS, latents, tiny
from torch import Tensor

from decoders.inference import InferenceOptions, optimise
from decoders.regen import fast as fast_module
from decoders.regen.config import RegenConfig
from decoders.regen.fast import mixing
from decoders.regen.sampler import coefficients_of, sample, skip_factors

ROOT = Path(__file__).parent.parent
ASKED = [dict(), dict(extension=True), dict(times=[0, 2.5, 7, 1, 1, -1])]


def close(found: Tensor, expected: Tensor, name: str = "") -> None:
    """The first step of epsilon divides by 0.068."""
    torch.testing.assert_close(found, expected, atol=1e-4 if name == "epsilon" else 1e-5, rtol=0)


def step_all(model, latent: Tensor, **sampling) -> Tensor:
    state = model.start_stream(len(latent), *(side * STRIDE_HW for side in latent.shape[-2:]), **sampling)
    frames = [model.step_stream(frame, state) for frame in latent.unbind(2)]
    return torch.cat([*frames, model.end_stream(state)], 2)


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_it_equals_the_model(name: str, chunked: bool) -> None:
    model = tiny(chunked, **VARIANTS[name]).eval()
    fast, latent = optimise(model), latents(6 if chunked else 4)
    for steps in (1, 3):
        for asked in ASKED:
            close(fast.decode(latent, steps=steps, **asked), model.decode(latent, steps=steps, **asked), name)
        close(step_all(fast, latent, steps=steps), model.decode(latent, steps=steps), name)
    close(fast.decode(latent[:, :, :1]), model.decode(latent[:, :, :1]), name)
    own = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    again = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    close(fast.decode(latent, generator=own), model.decode(latent, generator=again), name)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("prediction", ["velocity", "epsilon"])
def test_a_weighted_sum_is_the_samplers_step(prediction: str, skip: bool) -> None:
    """With a network whose answer is known, in float64."""
    config = RegenConfig(prediction=prediction, skip=skip, spread=0.2)
    noise = torch.randn(1, 3, 2, 4, 4, dtype=torch.float64)

    def network(x: Tensor) -> Tensor:
        return (0.3 * x).sin() + 0.1

    def predict(x: Tensor, level: Tensor) -> Tensor:
        if not skip:
            return network(x)
        of_noisy, of_mean = skip_factors(level.double(), prediction, config.spread)
        return of_noisy * x + of_mean * network(x)

    for steps in (1, 2, 7):
        expected, _ = sample(predict, noise, steps, prediction=prediction)
        x, levels = noise, torch.linspace(1, 0, steps + 1).double()
        for index in range(steps):
            last = index == steps - 1
            of_noisy, of_network = mixing(config, levels[index], None if last else levels[index + 1])
            x = of_noisy * x + of_network * network(x)
        torch.testing.assert_close(x, expected, atol=2e-4 if prediction == "epsilon" else 1e-6, rtol=1e-5)
    assert coefficients_of(prediction)(torch.ones(()))[1] > 0.99


def test_from_pure_noise_in_one_step_with_skip_the_noise_cancels() -> None:
    assert mixing(RegenConfig(skip=True), torch.ones((), dtype=torch.float64), None) == (0, 1)


@pytest.mark.parametrize("name", ["paper", "in_context", "single"])
def test_what_no_step_changes_is_computed_once(name: str, monkeypatch) -> None:
    """Over five steps: the latents once for all three pairs, the noise level not at all the second time, positions too."""
    fast, calls = optimise(tiny(**VARIANTS[name])), []
    part = fast.condition.content if name == "in_context" else fast.condition.project
    part.register_forward_hook(lambda *_: calls.append("latents"))
    fast.dit.level.register_forward_hook(lambda *_: calls.append("level"))
    if name == "in_context":
        positions = fast.condition._positions
        monkeypatch.setattr(fast.condition, "_positions", lambda *a: calls.append("positions") or positions(*a))
    latent = latents(6)
    first = fast.decode(latent, steps=5)
    assert calls.count("latents") == 1 and calls.count("level") == 5
    assert calls.count("positions") == (2 if name == "in_context" else 0)
    calls.clear()
    assert torch.equal(fast.decode(latent, steps=5), first)
    assert calls == ["latents"]


def test_pairs_are_decoded_together_as_far_as_tokens_allow(monkeypatch) -> None:
    model = tiny()
    fast, latent, passes = optimise(model), latents(8), []
    run = fast._run
    monkeypatch.setattr(
        fast, "_run", lambda noise, *rest, **more: passes.append(len(noise)) or run(noise, *rest, **more)
    )
    expected = model.decode(latent)
    close(fast.decode(latent), expected)
    assert passes == [8]  # four pairs of two clips
    passes.clear()
    monkeypatch.setattr(fast_module, "TOKENS", 3 * 2 * 5 * 6)  # three pairs of two clips, five frames of 2 x 3 tokens
    close(fast.decode(latent), expected)
    assert passes == [6, 2]
    passes.clear()
    monkeypatch.setattr(fast_module, "TOKENS", 1)
    close(fast.decode(latent), expected)
    assert passes == [2, 2, 2, 2]


def test_a_hundred_steps_of_two_streams() -> None:
    model = tiny()
    fast = optimise(model)
    frames = torch.randn(100, 1, 8, 2, 3)
    states = [d.start_stream(1, 16, 24, extension=True, steps=2) for d in (model, fast, fast)]
    sizes = []
    for frame in frames:
        expected, found = model.step_stream(frame, states[0]), fast.step_stream(frame, states[1])
        fast.step_stream(-frame, states[2])
        close(found, expected)
        sizes.append(states[1].num_bytes())
    assert len(set(sizes[3::2])) == 1 and len(set(sizes[2::2])) == 1


@pytest.mark.parametrize("name", ["paper", "patch_t_2"])
def test_uint8(name: str) -> None:
    model = tiny(**VARIANTS[name])
    fast, latent = optimise(model, InferenceOptions(uint8=True)), latents(5)
    for asked in ASKED:
        video = model.decode(latent[:, :, :4], **asked).permute(0, 2, 3, 4, 1)
        found = fast.decode(latent[:, :, :4], **asked)
        assert found.dtype == torch.uint8 and found.is_contiguous() and found.shape == video.shape
        assert ((video + 1) * 127.5 - found).abs().max() < 0.502
    streamed = fast.start_stream(2, 14, 20)
    shapes = [tuple(fast.step_stream(frame, streamed).shape) for frame in latent.unbind(2)]
    assert shapes == [(2, 0, 14, 20, 3), (2, 5, 14, 20, 3)] * 2 + [(2, 0, 14, 20, 3)]
    assert fast.end_stream(streamed).shape == (2, 1, 14, 20, 3)


@pytest.mark.parametrize("name", ["paper", "in_context", "skip"])
def test_bf16_rounds_no_more_than_the_model(name: str) -> None:
    model = tiny(**VARIANTS[name]).bfloat16()
    exact = tiny(**VARIANTS[name])
    exact.load_state_dict(model.state_dict())
    latent = latents(6)
    for steps in (1, 4):
        expected = exact.decode(latent, steps=steps)
        found, plain = (
            (d.decode(latent, steps=steps) - expected).square().mean().sqrt() for d in (optimise(model), model)
        )
        assert 0 < found <= 1.1 * plain


def test_the_source_is_left_as_it_was() -> None:
    model = tiny().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast, latent = optimise(model), latents()
    expected = fast.decode(latent, steps=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not fast.training and not any(p.requires_grad for p in fast.parameters())
    pointers = {p.data_ptr() for p in model.dit.parameters()}
    assert {p.data_ptr() for p in fast.dit.parameters()} == pointers  # nothing is held twice
    model.to(torch.bfloat16)
    assert torch.equal(fast.decode(latent, steps=2), expected)


def test_what_is_refused() -> None:
    model = tiny()
    for options, message in (
        (dict(bits8="mlp"), "no 8-bit products"),
        (dict(attention="flash"), "no kernels to choose"),
        (dict(fast_convolutions=True), "no convolutions"),
    ):
        with pytest.raises(ValueError, match=message):
            optimise(model, InferenceOptions(**options))
    with pytest.raises(ValueError, match="chunks have two each"):
        optimise(model).decode(latents(3))
    with pytest.raises(ValueError, match="at least one step"):
        optimise(model).decode(latents(2), steps=0)


COMPILED = """
import sys, torch
sys.path.insert(0, "tests")
from regen_small import VARIANTS, latents, tiny
from decoders.inference import InferenceOptions, optimise
torch.manual_seed(0)
for name in ("paper", "in_context", "single", "patch_t_2"):
    model = tiny(**VARIANTS[name])
    fast = optimise(model, InferenceOptions(compile=True))
    for size, steps in (((2, 3), 1), ((3, 4), 3)):
        latent = latents(4, size=size)
        worst = (fast.decode(latent, steps=steps) - model.decode(latent, steps=steps)).abs().max().item()
        assert worst < 1e-5, (name, worst)
assert torch._dynamo.utils.counters["graph_break"] == {}
print("equal")
"""


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    """In a process whose functions do not check their shapes: those checks cannot be traced."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, capture_output=True
    )
    assert done.stdout.decode().split()[-1:] == ["equal"], done.stderr.decode()[-3000:]
