"""RefDecoder's optimised form equals the model: everywhere it looks, in streams, with references that were prepared once."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from refdecoder_small import clip, small

from decoders.inference import InferenceOptions, optimise
from decoders.refdecoder.fast_attention import stream_table
from decoders.refdecoder.model import RefDecoderModel
from decoders.refdecoder.transformer import rope_table

ROOT = Path(__file__).parent.parent
WINDOWED = dict(attention="windowed", window=2)
CHANGES = [
    {},
    dict(residual="both", reread=True, shared=False),
    WINDOWED | dict(residual="both", reread=True),
    WINDOWED | dict(window=1),
    WINDOWED | dict(window=3, shared=False, local_start=True, point_norms="channel"),
    dict(inject="controlnet"),
]
close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)


def step_all(model, latent: torch.Tensor, **options) -> torch.Tensor:
    height, width = (side * model.stride_hw for side in latent.shape[3:])
    state = model.start_stream(len(latent), height, width, **options)
    frames = [model.step_stream(frame, state) for frame in latent.unbind(2)]
    return torch.cat([*frames, model.end_stream(state)], 2)


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize(
    ("layout", "changes"),
    [*(("wan21", one) for one in CHANGES), ("wan22", CHANGES[2]), ("videovaeplus", {}), ("videovaeplus", CHANGES[-1])],
)
def test_it_equals_the_model(layout: str, changes: dict, references: int) -> None:
    model = small(layout, **changes).float()
    latent, reference = (part.float() for part in clip(model, frames=4 if "attention" in changes else 2, references=2))
    given = reference if references else None
    fast, expected = optimise(model), model.decode(latent, given)
    close(fast.decode(latent, given), expected)
    close(fast(latent, given), model(latent, given))
    if references:
        prepared = fast.prepare(reference, *reference.shape[3:])
        close(fast.decode(latent, prepared), expected)
        close(fast.decode(latent, skip=True), model.decode(latent, skip=True))
        one = fast.prepare(reference[:1], *reference.shape[3:])  # one set of references for all clips
        close(fast.decode(latent, one), model.decode(latent, reference[:1].expand(2, -1, -1, -1, -1)))


def test_without_references_it_is_the_plain_decoder() -> None:
    model = small(inject="none").float()
    latent, reference = (part.float() for part in clip(model))
    close(optimise(model).decode(latent), model.decode(latent))
    with pytest.raises(ValueError, match="looks at no reference"):
        optimise(model).prepare(reference, *reference.shape[3:])


@pytest.mark.parametrize(("window", "steps"), [(1, 10), (2, 100), (3, 12)])
def test_a_long_stream(window: int, steps: int) -> None:
    """In float64: keys are turned once, by times that grow, and stay equal to keys that are turned anew in every window.
    What is held stops growing as soon as it is allocated."""
    model = small(**WINDOWED | dict(window=window, points=["up1"], blocks=1))
    fast = optimise(model)
    _, reference = clip(model, clips=1)
    states = [decoder.start_stream(1, 8, 24, reference=reference) for decoder in (model, fast)]
    sizes = []
    for frame in torch.randn(steps, 1, 4, 1, 3, dtype=torch.float64):
        expected, found = (
            decoder.step_stream(frame, state) for decoder, state in zip((model, fast), states, strict=True)
        )
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        sizes.append(states[1].num_bytes())
    assert len(set(sizes[1:])) == 1
    assert fast.end_stream(states[1]).shape == (1, 3, 0, 8, 24) and states[1].num_bytes() == 0


def test_streams_of_two_sizes_share_a_model_and_references_undisturbed() -> None:
    model = small(**WINDOWED, residual="both").float()
    fast = optimise(model)
    latent, reference = (part.float() for part in clip(model, frames=5, clips=1))
    wide = torch.randn(2, 4, 5, 2, 4)
    prepared = fast.prepare(reference, 8, 24)
    before = [part.clone() for point in prepared.memory for seen in point for part in seen]
    latents = [latent, latent.flip(2), wide]
    options = [dict(reference=prepared), dict(reference=prepared), dict()]
    alone = [step_all(fast, part, **option) for part, option in zip(latents, options, strict=True)]
    close(alone[0], step_all(model, latent, reference=reference))
    states = [
        fast.start_stream(len(part), part.shape[3] * 8, part.shape[4] * 8, **option)
        for part, option in zip(latents, options, strict=True)
    ]
    steps = [
        [fast.step_stream(part[:, :, n], state) for part, state in zip(latents, states, strict=True)] for n in range(5)
    ]
    for number, expected in enumerate(alone):
        assert torch.equal(torch.cat([step[number] for step in steps], 2), expected)
    after = [part for point in prepared.memory for seen in point for part in seen]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("changes", [{}, WINDOWED, dict(inject="controlnet")])
def test_references_are_worked_out_once(changes: dict) -> None:
    fast = optimise(small(**changes).float())
    latent, reference = (part.float() for part in clip(fast, frames=3))
    calls = []
    fast.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    carry = fast._carry
    fast._carry = lambda *given: calls.append("carry") or carry(*given)
    prepared = fast.prepare(reference, *reference.shape[3:])
    assert calls.count("encoder") == 1
    calls.clear()
    for _ in range(3):
        fast.decode(latent, prepared)
    # Full attention changes references by the video, so that only the encoder's work can be kept.
    assert "encoder" not in calls and ("carry" in calls) == (not changes)


def test_rotations_at_any_time_of_a_stream() -> None:
    cpu = torch.device("cpu")
    first, second = stream_table(7, 3, 2, 5, (4, 4, 4), cpu), rope_table((7, 8, 9), 2, 5, (4, 4, 4), cpu)
    for found, expected in zip(first, second, strict=True):
        assert torch.equal(found, expected)
    far = stream_table(10**7, 1, 1, 1, (4, 4, 4), cpu)[0][0, 0, 0]
    assert far == pytest.approx(torch.tensor(1e7, dtype=torch.float64).cos().item(), abs=1e-7)


def test_the_source_is_left_as_it_was() -> None:
    model = small(**WINDOWED).float()
    latent, reference = (part.float() for part in clip(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = optimise(model)
    expected = fast.decode(latent, reference)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and not any(p.requires_grad for p in fast.parameters())
    assert model.train().training and not fast.training
    model(latent, reference).sum().backward()
    model.to(torch.bfloat16)
    assert torch.equal(fast.decode(latent, reference), expected)


@pytest.mark.parametrize("changes", [dict(residual="both"), WINDOWED | dict(residual="both")])
def test_bf16_rounds_no_more_than_the_model(changes: dict) -> None:
    exact = small(dim=32, head_dim=24, **changes).float()
    latent, reference = (part.float() for part in clip(exact, frames=4))
    expected = exact.decode(latent, reference)
    model = small(dim=32, head_dim=24, **changes)
    model.load_state_dict(exact.state_dict())
    model.bfloat16()
    exact.load_state_dict(model.float().state_dict())  # the same rounded weights
    model.bfloat16()
    expected = exact.decode(latent, reference)
    errors = [(d.decode(latent, reference).float() - expected).square().mean().sqrt() for d in (optimise(model), model)]
    assert 0 < errors[0] <= 1.1 * errors[1]


@pytest.mark.parametrize("changes", [{}, WINDOWED])
def test_uint8(changes: dict) -> None:
    model = small(**changes).float()
    latent, reference = (part.float() for part in clip(model))
    video = model.decode(latent, reference)
    found = optimise(model, InferenceOptions(uint8=True)).decode(latent, reference)
    assert found.dtype == torch.uint8 and found.is_contiguous() and found.shape == (2, 5, 8, 24, 3)
    assert ((video.permute(0, 2, 3, 4, 1) + 1) * 127.5 - found).abs().max() < 0.502


def test_what_is_refused() -> None:
    model = small(**WINDOWED).float()
    for options, message in (
        (dict(bits8="mlp"), "no 8-bit products"),
        (dict(attention="flash"), "no kernels to choose"),
    ):
        with pytest.raises(ValueError, match=message):
            optimise(model, InferenceOptions(**options))
    fast = optimise(model)
    latent, reference = (part.float() for part in clip(model))
    with pytest.raises(ValueError, match="in training alone"):
        fast(latent, reference, keep=torch.ones(2, 1, 1, 1, 3))
    prepared = fast.prepare(reference, 8, 24)
    with pytest.raises(ValueError, match="prepared for 8x24 pixels, the clip has 16x24"):
        fast.start_stream(2, 16, 24, reference=prepared)
    with pytest.raises(ValueError, match="prepared for 2 clips, and 3 clips"):
        fast.start_stream(3, 8, 24, reference=prepared)
    with pytest.raises(TypeError, match="train one with decoder.attention=windowed"):
        optimise(small().float()).start_stream(2, 8, 24)


COMPILED = """
import sys, torch
sys.path.insert(0, "tests")
from refdecoder_small import clip, small
from decoders.inference import InferenceOptions, optimise
torch.manual_seed(0)
for changes, frames in ((dict(residual="both"), (2, 3)), (dict(attention="windowed", window=2), (4, 2))):
    model = small(**changes).float()
    fast = optimise(model, InferenceOptions(compile=True))
    for count in frames:
        latent, reference = (part.float() for part in clip(model, frames=count, references=2))
        worst = (fast.decode(latent, reference) - model.decode(latent, reference)).abs().max().item()
        assert worst < 1e-5, worst
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


def test_the_type_says_what_it_is() -> None:
    assert isinstance(optimise(small().float()), RefDecoderModel)
