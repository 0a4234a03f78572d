"""Attention kernels of a CPU against softmax in float64, and how one of them is chosen."""

import pytest
import torch

from decoders.flashdecoder import attention, attention_cpu
from decoders.flashdecoder.model import FlashDecoderConfig, FlashDecoderModel
from decoders.inference import InferenceOptions, optimise


@pytest.mark.parametrize("kernel", ["folded", "math", "flash"])
def test_kernels_against_softmax_in_float64(kernel: str) -> None:
    q, k, v = torch.randn(2, 5, 6, 64), torch.randn(2, 9, 3, 64), torch.randn(2, 9, 3, 64)
    wide_k, wide_v = (part.double().repeat_interleave(2, dim=2) for part in (k, v))
    weights = (torch.einsum("bsnd,bmnd->bnsm", q.double(), wide_k) / 8).softmax(-1)
    expected = torch.einsum("bnsm,bmnd->bsnd", weights, wide_v)
    torch.testing.assert_close(attention.attend(kernel, q, k, v).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "b,s,heads,m,groups", [(1, 7, 2, 13, 1), (2, 65, 6, 130, 3), (1, 48, 4, 64, 4), (3, 1, 8, 1, 2)]
)
def test_the_cpu_kernel_against_softmax_in_float64(b: int, s: int, heads: int, m: int, groups: int) -> None:
    q, k, v = (torch.randn(b, n, count, 64).bfloat16() for n, count in ((s, heads), (m, groups), (m, groups)))
    if reason := attention_cpu.refused(q):
        pytest.skip(reason)
    for loudness in (
        0.0,
        1.0,
        8.0,
        100.0,
    ):  # all keys alike; usual; the highest score moves from block to block; one key wins
        loud = (q * loudness).bfloat16()
        wide_k, wide_v = (part.double().repeat_interleave(heads // groups, dim=2) for part in (k, v))
        weights = (torch.einsum("bsnd,bmnd->bnsm", loud.double(), wide_k) / 8).softmax(-1)
        expected = torch.einsum("bnsm,bmnd->bsnd", weights, wide_v)
        error = (attention.attend("cpu_bf16", loud, k, v).double() - expected).square().mean().sqrt()
        torchs = (attention.attend("folded", loud, k, v).double() - expected).square().mean().sqrt()
        assert error <= 1.1 * torchs + 1e-4, loudness
    packed = torch.cat(
        [part.flatten(2) for part in (q[:, :1], k[:, :1], v[:, :1])], -1
    )  # strided views, as after one product
    parts = [part.unflatten(-1, (-1, 64)) for part in packed.split([heads * 64, groups * 64, groups * 64], -1)]
    expected = attention.attend("folded", *parts).float()
    torch.testing.assert_close(attention.attend("cpu_bf16", *parts).float(), expected, atol=0.02, rtol=0.01)


def test_the_cpu_kernel_in_the_model_and_what_it_refuses() -> None:
    config = FlashDecoderConfig(depth=2, dim=256, num_heads=4, num_kv_heads=2)
    model, latent = FlashDecoderModel(config, 6, 4, 8).bfloat16(), torch.randn(1, 6, 4, 4, 6).bfloat16()
    assert "bf16, not torch.float32" in attention_cpu.refused(torch.zeros(1, 1, 1, 64))
    if reason := attention_cpu.refused(latent):
        pytest.skip(reason)
    found = optimise(model, InferenceOptions(attention="cpu_bf16")).decode(latent).float()
    expected = model.decode(latent).float()
    assert (found - expected).square().mean().sqrt() <= 0.02 * expected.square().mean().sqrt()
    with pytest.raises(ValueError, match="attention of"):
        attention_cpu.attend(*(torch.zeros(1, 2, heads, 32).bfloat16() for heads in (2, 1, 1)))


def test_a_kernel_that_is_slower_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"folded": 2.0, "math": 3.0, "flash": 1.0}
    monkeypatch.setattr(attention, "refused", lambda name, *_: "" if name in spent else "not here")
    attended: list[str] = []
    monkeypatch.setattr(attention, "attend", lambda name, *_: attended.append(name))
    monkeypatch.setattr(attention, "_seconds", lambda run, device: run() or spent[attended[-1]])
    choices: attention.Choices = {}
    shape = (1, 4, 2, 8, 1)
    assert attention.choose("auto", shape, torch.float32, torch.device("cpu"), choices) == "flash"
    measured = len(attended)
    assert attention.choose("auto", shape, torch.float32, torch.device("cpu"), choices) == "flash"
    assert len(attended) == measured == 18  # once a shape: three kernels, a turn that does not count and five that do


def test_fp8_attention_gets_scales_from_the_calibration_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel needs a GPU: here its exact emulation stands in, so that the way of the scales is tried."""
    attention_fp8 = pytest.importorskip("decoders.flashdecoder.attention_fp8")
    seen = []

    def emulated(q, k, v, scales=None):
        seen.append(scales)
        return attention_fp8.emulate_fp8(q, k, v, scales)

    monkeypatch.setattr(attention_fp8, "attend_triton_fp8", emulated)
    model = FlashDecoderModel(FlashDecoderConfig(depth=2, dim=128, num_heads=2, num_kv_heads=1), 6, 4, 8)
    clips = [torch.randn(1, 6, 3, 4, 6), 2 * torch.randn(1, 6, 3, 4, 6)]
    fast, expected = optimise(model, InferenceOptions(attention="triton_fp8"), clips), model.decode(clips[0])
    assert not seen and all(block.attention_scales is not None for block in fast.blocks)
    alone = optimise(model, InferenceOptions(attention="triton_fp8"), clips[:1])
    for both, one in zip(fast.blocks, alone.blocks, strict=True):
        assert (both.attention_scales.q >= one.attention_scales.q).all()
    monkeypatch.setattr(attention, "refused", lambda *_: "")
    error = (fast.decode(clips[0]) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-4 < error < 0.1
    assert len(seen) == 3 * 4 and all(scales is not None for scales in seen)
