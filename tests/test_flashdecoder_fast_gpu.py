"""FlashDecoder's optimised inference on CUDA: graphs, compiled steps and every attention kernel equal the model."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from decoders.flashdecoder import attention
from decoders.flashdecoder.model import SIZES, FlashDecoderConfig, FlashDecoderModel
from decoders.inference import InferenceOptions, optimise

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent
BF16 = torch.bfloat16


def model(dtype: torch.dtype = BF16, **changes) -> FlashDecoderModel:
    config = dict(SIZES["s"], depth=3) | changes
    return FlashDecoderModel(FlashDecoderConfig(**config), 48, 4, 16).cuda().to(dtype).eval()


def latents(frames: int, batch: int = 1, y: int = 9, x: int = 13) -> torch.Tensor:
    return torch.randn(batch, 48, frames, y, x, device="cuda")


def rms(x: torch.Tensor) -> float:
    return x.float().square().mean().sqrt().item()


def check(options: InferenceOptions, frames: int = 6, **changes) -> None:
    """In bf16 as near to the model in fp32 as the model in bf16 is, and near to that one."""
    exact, latent = model(torch.float32, **changes), latents(frames)
    truth, half = exact.decode(latent), copy.deepcopy(exact).to(BF16)
    reference = half.decode(latent.to(BF16))
    found = optimise(half, options).decode(latent)
    assert found.shape == truth.shape and rms(truth) > 0.1
    assert rms(found - truth) <= 1.1 * rms(reference - truth)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_graphs_equal_the_model(graphs: bool, window: int) -> None:
    check(InferenceOptions(graphs=graphs), window=window)


@pytest.mark.parametrize(
    "changes", [dict(refinement_depth=0), dict(head_ratio=0.0), dict(q_norm=True), dict(num_kv_heads=8)]
)
def test_architectures(changes: dict) -> None:
    check(InferenceOptions(), **changes)


@pytest.mark.parametrize("kernel", attention.EXACT)
def test_attention_kernels(kernel: str) -> None:
    q, k, v = (torch.randn(2, n, heads, 64, device="cuda", dtype=BF16) for n, heads in ((300, 24), (601, 3), (601, 3)))
    if reason := attention.refused(kernel, q, k, v):
        pytest.skip(reason)
    wide = [part.double().repeat_interleave(8, dim=2).transpose(1, 2) for part in (k, v)]
    expected = ((q.double().transpose(1, 2) @ wide[0].mT / 8).softmax(-1) @ wide[1]).transpose(1, 2)
    found = attention.attend(kernel, q, k, v)
    assert found.shape == q.shape and found.dtype == BF16
    assert rms(found - expected) <= 5e-3 * rms(expected)
    check(InferenceOptions(attention=kernel))


def test_the_fastest_kernel_is_chosen_and_named() -> None:
    fast = optimise(model(), InferenceOptions())
    fast.decode(latents(3))
    assert fast.kernels and set(fast.kernels.values()) <= set(attention.EXACT)


@pytest.mark.parametrize("graphs", [False, True])
def test_two_streams_in_turns_and_a_hundred_steps(graphs: bool) -> None:
    source = model()
    fast = optimise(source, InferenceOptions(graphs=graphs, attention="flash"))
    clips = [latents(100, y=4, x=5).to(BF16) for _ in range(2)]
    alone = [fast.decode(clip) for clip in clips]
    states = [fast.start_stream(1, 64, 80) for _ in clips]
    frames, memory = [[], []], []
    for step in range(100):
        for clip, state, found in zip(clips, states, frames, strict=True):
            found.append(fast.step_stream(clip[:, :, step], state).cpu())
        memory.append(torch.cuda.memory_allocated())
    assert max(memory[5:]) == min(memory[5:])
    for expected, found, clip in zip(alone, frames, clips, strict=True):
        assert torch.equal(torch.cat(found, 2), expected.cpu())
        assert rms(expected - source.decode(clip)) <= 0.05 * rms(expected)


def test_frames_of_a_graph_are_the_callers() -> None:
    fast, latent = optimise(model(), InferenceOptions()), latents(4)
    state = fast.start_stream(1, 144, 208)
    frames = [fast.step_stream(latent[:, :, step], state) for step in range(4)]
    copies = [part.clone() for part in frames]
    fast.decode(latents(4))
    assert all(torch.equal(a, b) for a, b in zip(frames, copies, strict=True))


def test_uint8_in_a_graph() -> None:
    source, latent = model(), latents(4)
    found = optimise(source, InferenceOptions(uint8=True)).decode(latent)
    floats = optimise(source, InferenceOptions()).decode(latent)
    expected = ((floats.float().clamp(-1, 1) + 1) * 127.5).round().movedim(1, -1)
    assert found.dtype == torch.uint8 and (found.float() - expected).abs().max() <= 1


def test_many_sizes_share_memory() -> None:
    source = model()
    fast = optimise(source, InferenceOptions(attention="flash"))
    for y in range(3, 14):  # more than are kept
        latent = latents(3, y=y).to(BF16)
        assert rms(fast.decode(latent) - source.decode(latent)) <= 0.05
    assert len(fast._sizes) == 8


COMPILED = """
import torch
from tests.test_flashdecoder_fast_gpu import check, latents, model
from decoders.inference import InferenceOptions, optimise
torch.manual_seed(0)
check(InferenceOptions(compile=True, graphs={graphs}))
check(InferenceOptions(compile=True, graphs={graphs}, attention="triton"))
fast, latent = optimise(model(), InferenceOptions(compile=True, graphs={graphs}, uint8=True)), latents(4)
fast.decode(latent)
torch._dynamo.config.error_on_recompile = True
fast.decode(latent)
assert not torch._dynamo.utils.counters["graph_break"]
print("fine")
"""


@pytest.mark.parametrize("graphs", [False, True])
def test_compiled(graphs: bool) -> None:
    """In a process of its own: shape checks around every function, as tests have them, cannot be traced."""
    command = [sys.executable, "-c", COMPILED.format(graphs=graphs)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert run.returncode == 0 and "fine" in run.stdout, run.stderr[-3000:]
