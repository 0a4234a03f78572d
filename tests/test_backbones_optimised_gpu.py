"""The optimised backbones on CUDA: graphs and compiled steps equal the plain decoder, streams do not meet."""

import jaxtyping
import pytest
import torch
from torch import Tensor

from decoders.backbones.ltx import LTXConfig, LTXDecoder
from decoders.backbones.wan import WanConfig, WanDecoder
from decoders.inference import InferenceOptions, optimise

pytestmark = pytest.mark.gpu
DECODERS = {
    "wan21": lambda: WanDecoder(WanConfig(dim=16, channels=4)),
    "wan22": lambda: WanDecoder(WanConfig(dim=16, channels=6, residual=True, patch=2)),
    "ltx": lambda: LTXDecoder(LTXConfig(channels=16, widths=(32, 32, 32, 16, 16), blocks=(1, 1, 1, 1, 1))),
}
OPTIONS = {
    "graphs": InferenceOptions(),
    "compiled": InferenceOptions(compile=True, graphs=False),
    "both": InferenceOptions(compile=True),
    "winograd": InferenceOptions(fast_convolutions=True),
}


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """And no checks of shapes, which torch.compile cannot look into."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def make(name: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return DECODERS[name]().eval().requires_grad_(False).to("cuda", dtype)


def latents(decoder, seed: int = 0, n: int = 6) -> Tensor:
    return torch.randn(1, decoder.channels, n, 6, 4, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", DECODERS)
def test_float32_is_equal(name, options):
    decoder = make(name)
    fast = optimise(decoder, OPTIONS[options])
    for seed in (0, 1):  # the second clip by the graph from its third latent frame on
        z = latents(decoder, seed)
        torch.testing.assert_close(fast.decode(z), decoder.decode(z), atol=1e-4, rtol=0)
    small = z[..., :4, :]
    torch.testing.assert_close(fast.decode(small), decoder.decode(small), atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", ["graphs", "both", "winograd"])
@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_bf16_streams_in_turns(name, options):
    decoder = make(name, torch.bfloat16)
    fast = optimise(decoder, OPTIONS[options])
    clips = [latents(decoder, seed).bfloat16() for seed in (1, 2)]
    truth = [decoder.float().decode(clip.float()) for clip in clips]
    decoder.bfloat16()
    plain = max(float((decoder.decode(clip).float() - true).norm()) for clip, true in zip(clips, truth, strict=True))
    states = [fast.start_stream(1, 6 * decoder.stride_hw, 4 * decoder.stride_hw) for _ in clips]
    parts: list[list[Tensor]] = [[], []]
    for step in range(clips[0].shape[2]):
        for clip, state, own in zip(clips, states, parts, strict=True):
            own.append(fast.step_stream(clip[:, :, step], state))
    assert fast._graphs
    for own, true in zip(parts, truth, strict=True):
        assert (torch.cat(own, 2).float() - true).norm() < (3 if options == "winograd" else 1.2) * plain


def test_memory_of_a_stream_does_not_grow():
    decoder = optimise(make("wan21", torch.bfloat16))
    state = decoder.start_stream(1, 48, 32)
    frame = latents(decoder)[:, :, 0].bfloat16()
    held = []
    for _ in range(100):
        decoder.step_stream(frame, state)
        held.append(torch.cuda.memory_allocated())
    assert max(held[10:]) == held[10]
