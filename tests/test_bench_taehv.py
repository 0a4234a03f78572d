"""The tiny baseline: its size, stream equals whole clip, two streams, first frame, optimised equals plain."""

import pytest
import torch

from decoders.baseline.taehv import TaehvDecoder
from decoders.inference import InferenceOptions, optimise


def decoder(layout: str = "wan21") -> TaehvDecoder:
    torch.manual_seed(0)
    return TaehvDecoder(layout).eval().requires_grad_(False)


@pytest.mark.parametrize(("layout", "millions"), [("wan21", 9.8446), ("wan22", 9.9235)])
def test_it_has_the_published_number_of_parameters(layout: str, millions: float):
    with torch.device("meta"):
        count = sum(p.numel() for p in TaehvDecoder(layout).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=1e-4)  # 9.8 and 9.9 in FlashDecoder's Table 2


@pytest.mark.parametrize("layout", ["wan21", "wan22"])
def test_a_stream_gives_the_frames_of_the_whole_clip(layout: str):
    model = decoder(layout)
    latent = torch.randn(2, model.channels, 3, 2, 3)
    whole = model.decode(latent)
    assert whole.shape == (2, 3, 9, 2 * model.stride_hw, 3 * model.stride_hw) and whole.std() > 0.01
    states = [model.start_stream(1, 2 * model.stride_hw, 3 * model.stride_hw) for _ in range(2)]
    parts: list[list] = [[], []]
    for frame in latent.unbind(2):  # two streams in turns
        for clip, (state, out) in enumerate(zip(states, parts, strict=True)):
            out.append(model.step_stream(frame[clip : clip + 1], state))
    assert [part.shape[2] for part in parts[0]] == [1, 4, 4]
    torch.testing.assert_close(torch.cat([torch.cat(out, 2) for out in parts]), whole, atol=1e-5, rtol=1e-5)
    held = states[0].num_bytes()
    model.step_stream(latent[:1, :, 0], states[0])
    assert states[0].num_bytes() == held
    assert model.end_stream(states[0]).shape[2] == 0
    with pytest.raises(ValueError, match="has ended"):
        model.step_stream(latent[:1, :, 0], states[0])


def test_only_the_last_frame_of_the_first_latent_frame_is_computed_and_it_is_the_same():
    model = decoder()
    latent = torch.randn(1, 16, 1, 2, 2)
    shown, _ = model.run(latent, [None] * 9, True)
    four, _ = model.run(latent, [None] * 9, False)
    assert len(shown) == 1 and len(four) == 4
    torch.testing.assert_close(shown, four[3:], atol=1e-5, rtol=1e-5)


def test_frames_depend_on_the_past_and_not_on_the_future():
    model = decoder()
    latent = torch.randn(1, 16, 3, 2, 2)
    before, other = model.decode(latent), latent.clone()
    other[:, :, 1] += 1
    after = model.decode(other)
    assert torch.equal(before[:, :, :1], after[:, :, :1])
    assert (before[:, :, 1:] != after[:, :, 1:]).flatten(3).any(3).all()


def test_optimised_equals_plain_and_leaves_it_alone():
    model = decoder()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    latent = torch.randn(1, 16, 3, 4, 4)
    fast = optimise(model)
    torch.testing.assert_close(fast.decode(latent), model.decode(latent), atol=1e-5, rtol=1e-5)
    state = fast.start_stream(1, 30, 32)  # cropped to what was asked for
    streamed = torch.cat([fast.step_stream(frame, state) for frame in latent.unbind(2)], 2)
    torch.testing.assert_close(streamed, model.decode(latent)[..., :30, :], atol=1e-5, rtol=1e-5)
    bytes_ = optimise(model, InferenceOptions(uint8=True)).decode(latent)
    assert bytes_.dtype == torch.uint8 and bytes_.shape == (1, 9, 32, 32, 3)
    wanted = (model.decode(latent) + 1) * 127.5
    assert (bytes_.permute(0, 4, 1, 2, 3).float() - wanted).abs().max() <= 0.5 + 1e-3
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("option", "value"), [("bits8", "mlp"), ("attention", "cudnn"), ("fast_convolutions", True)])
def test_an_option_without_use_is_refused(option: str, value: object):
    with pytest.raises(ValueError, match=f"no use for {option}; it knows compile"):
        optimise(decoder(), InferenceOptions(**{option: value}))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no layout 'wan3'; there are wan21, wan22"):
        TaehvDecoder("wan3")
    model = decoder()
    with pytest.raises(ValueError, match=r"takes \(1, 16, 2, 2\)"):
        model.step_stream(torch.zeros(1, 16, 2, 3), model.start_stream(1, 16, 16))
    with pytest.raises(ValueError, match="is empty"):
        model.start_stream(0, 16, 16)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_compiled_equals_plain():
    model = decoder()
    latent = torch.randn(1, 16, 3, 4, 4)
    fast = optimise(model, InferenceOptions(compile=True))
    torch.testing.assert_close(fast.decode(latent), model.decode(latent), atol=1e-5, rtol=1e-5)
