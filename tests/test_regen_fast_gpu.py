"""REGEN's and RefDecoder's optimised forms on CUDA: graphs, compiled blocks and streams equal the model."""

import pytest
import torch
from refdecoder_small import clip, small
from regen_small import STRIDE_HW, VARIANTS, latents, tiny

from decoders.inference import InferenceOptions, optimise

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", VARIANTS)
def test_a_graph_of_regen_equals_the_model(name: str) -> None:
    """Two sizes in turn, one and three steps, with and without a guide; float32 without TF32."""
    model = tiny(**VARIANTS[name]).cuda()
    fast = optimise(model)
    for size in ((2, 3), (3, 4), (2, 3)):
        latent = latents(6, size=size).cuda()
        for steps in (1, 3):
            for extension in (False, True):
                found = fast.decode(latent, steps=steps, extension=extension)
                expected = model.decode(latent, steps=steps, extension=extension)
                torch.testing.assert_close(found, expected, atol=1e-3 if name == "epsilon" else 1e-4, rtol=0)
    assert fast._samplers


def test_many_numbers_of_steps_leave_the_first_graph_right() -> None:
    """A graph keeps the tensors that it was recorded with, however many others were made since."""
    model = tiny().cuda()
    fast, latent = optimise(model), latents().cuda()
    expected = fast.decode(latent, steps=2)
    for steps in range(1, 14):
        fast.decode(latent, steps=steps)
    assert torch.equal(fast.decode(latent, steps=2), expected)


def test_two_regen_streams_on_one_graph() -> None:
    model = tiny().cuda()
    fast, latent = optimise(model), latents(8).cuda()
    size = tuple(side * STRIDE_HW for side in latent.shape[-2:])
    states = [fast.start_stream(2, *size, extension=True) for _ in range(2)]
    found = [[], []]
    for frame in latent.unbind(2):
        for number, state in enumerate(states):
            found[number].append(fast.step_stream(frame if number else -frame, state))
    for frames, given in zip(found, (-latent, latent), strict=True):
        expected = model.decode(given, extension=True)
        torch.testing.assert_close(torch.cat(frames, 2), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("changes", [dict(residual="both"), dict(attention="windowed", window=2)])
def test_refdecoder_equals_the_model(changes: dict, compile: bool) -> None:
    if compile:
        pytest.importorskip("triton")
    model = small(**changes).float().cuda()
    latent, reference = (part.float().cuda() for part in clip(model, frames=5, references=2))
    fast = optimise(model, InferenceOptions(compile=compile))
    expected = model.decode(latent, reference)
    torch.testing.assert_close(fast.decode(latent, reference), expected, atol=1e-4, rtol=0)
    prepared = fast.prepare(reference, *reference.shape[3:])
    torch.testing.assert_close(fast.decode(latent, prepared), expected, atol=1e-4, rtol=0)
