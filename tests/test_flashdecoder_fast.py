"""FlashDecoder's optimised inference equals the model: every architecture, any size, streams in turns, 100 steps."""

import copy
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from decoders.flashdecoder import fast_blocks, graphs
from decoders.flashdecoder.model import FlashDecoderConfig, FlashDecoderModel
from decoders.inference import InferenceOptions, optimise
from decoders.layers import cuda_graphs
from experiments.callbacks import to_uint8

ROOT = Path(__file__).parent.parent
CHANNELS, STRIDE_T, STRIDE_HW = 6, 4, 8
TINY = dict(depth=2, dim=128, num_heads=2, num_kv_heads=1, refinement_depth=2)
VARIANTS = {
    "paper": {},
    "window_1": dict(window=1),
    "window_3": dict(window=3),
    "window_4": dict(window=4),
    "mha": dict(num_kv_heads=2),
    "no_refinement": dict(refinement_depth=0),
    "no_spatial_mlp": dict(head_ratio=0.0),
    "unshuffle": dict(unshuffle=2),
    "q_norm": dict(q_norm=True),
    "masked": dict(mode="masked"),
    "parallel": dict(mode="parallel"),
}
PLAIN = InferenceOptions(attention="folded")


def tiny(dtype: torch.dtype = torch.float32, **changes) -> FlashDecoderModel:
    model = FlashDecoderModel(FlashDecoderConfig(**TINY | changes), CHANNELS, STRIDE_T, STRIDE_HW)
    for name, parameter in model.named_parameters():
        if name.endswith("gain"):
            nn.init.normal_(parameter, 1.0, 0.2)
    return model.to(dtype)


def latents(frames: int = 5, batch: int = 2, y: int = 4, x: int = 6) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, frames, y, x)


def stream(model, latent: torch.Tensor, height: int | None = None, width: int | None = None) -> list[torch.Tensor]:
    height, width = height or latent.shape[3] * STRIDE_HW, width or latent.shape[4] * STRIDE_HW
    state = model.start_stream(latent.shape[0], height, width)
    with torch.no_grad():
        return [*(model.step_stream(frame, state) for frame in latent.unbind(2)), model.end_stream(state)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_equals_the_model(variant: str) -> None:
    model, latent = tiny(**VARIANTS[variant]), latents(6)
    expected = model.decode(latent)
    fast = optimise(model, PLAIN)
    assert expected.std() > 0.1
    torch.testing.assert_close(fast.decode(latent), expected, atol=1e-5, rtol=1e-5)
    frames = stream(fast, latent)
    assert [part.shape[2] for part in frames] == [1, 4, 4, 4, 4, 4, 0]
    torch.testing.assert_close(torch.cat(frames, 2), expected, atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in fast.parameters()) and not fast.training


@pytest.mark.parametrize("kernel", ["auto", "folded", "math", "flash"])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_kernel_of_a_cpu_is_the_same_function(kernel: str, groups: int) -> None:
    model, latent = tiny(num_kv_heads=groups), latents(3)
    fast = optimise(model, InferenceOptions(attention=kernel))
    torch.testing.assert_close(fast.decode(latent), model.decode(latent), atol=1e-5, rtol=1e-5)
    chosen = set(fast.kernels.values())
    assert chosen <= {"folded", "math", "flash"} if kernel == "auto" else chosen == {kernel}
    # keys of one and of two frames in the backbone, of one and two in the refinement, and the first frame's few queries
    assert len(fast.kernels) == 5


def test_sizes_crops_and_batches_side_by_side() -> None:
    model = tiny()
    fast = optimise(model, PLAIN)
    for batch, y, x, height, width in [(1, 4, 6, 32, 48), (2, 3, 5, 20, 33), (3, 2, 2, 16, 15), (1, 4, 6, 30, 41)]:
        latent = latents(4, batch, y, x)
        expected = torch.cat(stream(model, latent, height, width), 2)
        assert expected.shape == (batch, 3, 13, height, width)
        torch.testing.assert_close(torch.cat(stream(fast, latent, height, width), 2), expected, atol=1e-5, rtol=1e-5)


def test_more_sizes_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoders.flashdecoder.fast.SIZES_KEPT", 2)
    model = tiny()
    fast = optimise(model, PLAIN)
    shapes = [(1, 2, 2), (1, 2, 3), (1, 3, 2)]
    clips = [latents(4, *shape) for shape in shapes]
    states = [fast.start_stream(clip.shape[0], clip.shape[3] * 8, clip.shape[4] * 8) for clip in clips]
    frames = [[] for _ in clips]
    for step in range(4):  # in turns, so that each size is dropped and made again while its stream runs
        for clip, state, found in zip(clips, states, frames, strict=True):
            found.append(fast.step_stream(clip[:, :, step], state))
    assert len(fast._sizes) == 2
    for clip, found in zip(clips, frames, strict=True):
        torch.testing.assert_close(torch.cat(found, 2), model.decode(clip), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [2, 3])
def test_two_streams_in_turns_and_a_hundred_steps(window: int) -> None:
    model = tiny(window=window, depth=1, refinement_depth=1)
    fast = optimise(model, PLAIN)
    clips = [latents(100, 1, 1, 2), latents(100, 1, 1, 2)]
    states = [fast.start_stream(1, 8, 16) for _ in clips]
    held = states[0].num_bytes()
    frames = [[], []]
    for step in range(100):
        for clip, state, found in zip(clips, states, frames, strict=True):
            found.append(fast.step_stream(clip[:, :, step], state))
        assert states[0].num_bytes() == held == sum(part.nbytes for part in states[0].caches)
    for clip, found in zip(clips, frames, strict=True):
        torch.testing.assert_close(torch.cat(found, 2), model.decode(clip), atol=1e-5, rtol=1e-5)
    fast.end_stream(states[0])
    assert states[0].num_bytes() == 0
    with pytest.raises(ValueError, match="ended"):
        fast.step_stream(clips[0][:, :, 0], states[0])


def test_bf16_is_as_near_to_fp32_as_the_model_is() -> None:
    errors = {"fast": 0.0, "model": 0.0}
    for seed in range(4):
        torch.manual_seed(seed)
        exact, latent = tiny(depth=3), latents(4)
        truth = exact.decode(latent)
        half = copy.deepcopy(exact).to(torch.bfloat16)
        for name, network in (("fast", optimise(half, PLAIN)), ("model", half)):
            errors[name] += (network.decode(latent.bfloat16()).float() - truth).square().mean().item()
    assert 0 < errors["model"] ** 0.5 < 0.1
    assert errors["fast"] ** 0.5 <= 1.1 * errors["model"] ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uint8_frames_are_the_float_frames_rounded(dtype: torch.dtype) -> None:
    model, latent = tiny(dtype), 2 * latents(3).to(dtype)
    fast, plain = optimise(model, replace(PLAIN, uint8=True)), optimise(model, PLAIN)
    expected = torch.stack([to_uint8(clip) for clip in plain.decode(latent)])
    assert expected.min() == 0 and expected.max() == 255  # clamped on both sides
    found = fast.decode(latent)
    assert found.dtype == torch.uint8 and found.shape == (2, 9, 32, 48, 3)
    assert (found.int() - expected.int()).abs().max() <= 1 and (found != expected).float().mean() < 0.01
    frames = stream(fast, latent, 30, 41)
    assert [tuple(part.shape) for part in frames] == [(2, k, 30, 41, 3) for k in (1, 4, 4, 0)]
    assert torch.equal(torch.cat(frames, 1), found[:, :, :30, :41])


def test_long_sequences_go_through_the_mlps_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, latent = tiny(), latents(3, y=5, x=7)
    monkeypatch.setattr(fast_blocks, "WHOLE_MLP", 100)
    monkeypatch.setattr(fast_blocks, "PIECE", 33)
    torch.testing.assert_close(optimise(model, PLAIN).decode(latent), model.decode(latent), atol=1e-5, rtol=1e-5)


def test_the_model_stays_as_it_was_and_shares_its_weights() -> None:
    model, latent = tiny(), latents(3)
    before, expected = copy.deepcopy(model.state_dict()), model.decode(latent)
    fast = optimise(model, PLAIN)
    fast.decode(latent)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.decode(latent), expected)
    assert fast.blocks[0].gate_up.weight.data_ptr() == model.backbone.blocks[0].gate_up.weight.data_ptr()
    fast.blocks[0].gate_up = nn.Linear(128, 1024, bias=False)
    assert torch.equal(model.decode(latent), expected)


def test_a_stream_may_change_between_inference_mode_and_no_grad() -> None:
    model, latent = tiny(), latents(4)
    fast = optimise(model, PLAIN)
    state, frames = fast.start_stream(2, 32, 48), []
    for step, frame in enumerate(latent.unbind(2)):
        with torch.inference_mode(step % 2 == 0), torch.autocast("cpu", torch.bfloat16):
            frames.append(fast.step_stream(frame.clone(), state))
    torch.testing.assert_close(torch.cat(frames, 2), model.decode(latent), atol=1e-5, rtol=1e-5)


def test_a_copied_state_goes_its_own_way() -> None:
    model, latent = tiny(), latents(6, 1)
    fast = optimise(model, PLAIN)
    state = fast.start_stream(1, 32, 48)
    fast.step_stream(latent[:, :, 0], state)
    branch = copy.deepcopy(state)
    for step in (1, 2):
        fast.step_stream(latent[:, :, step + 3], branch)
    found = [fast.step_stream(latent[:, :, step], state) for step in (1, 2)]
    torch.testing.assert_close(torch.cat(found, 2), model.decode(latent[:, :, :3])[:, :, 1:], atol=1e-5, rtol=1e-5)


# ---- graphs, with an eager stand-in for the capture: what is tried is who owns the caches when


class Replayed:
    def __init__(self, function) -> None:
        self.function, self.output = function, None

    def replay(self):
        found = self.function()
        self.output = found.clone() if self.output is None else self.output.copy_(found)
        return self.output


@pytest.fixture
def eager_graphs(monkeypatch: pytest.MonkeyPatch) -> list:
    """Graphs that work on a CPU: as in a capture, the function runs (and changes the caches) before the first replay."""
    captures = []

    def capture(function, device, pool=None):
        captures.append([function() for _ in range(3)])
        return Replayed(function)

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    return captures


def graphed(model: FlashDecoderModel, options: InferenceOptions = PLAIN):
    fast = optimise(model, options)
    fast.graphed = True
    return fast


@pytest.mark.parametrize("window", [1, 2, 3])
def test_streams_take_turns_in_a_graph(window: int, eager_graphs: list) -> None:
    model = tiny(window=window)
    fast = graphed(model)
    clips = [latents(7, 1) for _ in range(3)]
    states = [fast.start_stream(1, 32, 48) for _ in clips]
    frames = [[] for _ in clips]
    order = [0, 0, 1, 0, 2, 1, 1, 2, 0, 0, 2, 2, 1, 0, 1, 2, 2, 2, 1, 1, 0]
    for turn in order:
        frames[turn].append(fast.step_stream(clips[turn][:, :, len(frames[turn])], states[turn]))
    for clip, found in zip(clips, frames, strict=True):
        torch.testing.assert_close(torch.cat(found, 2), model.decode(clip), atol=1e-5, rtol=1e-5)
    assert len(eager_graphs) == max(2, window)  # the first frame, warm-up, full window: once each, however many streams
    torch.testing.assert_close(fast.decode(clips[0]), model.decode(clips[0]), atol=1e-5, rtol=1e-5)


def test_a_resident_stream_is_copied_dropped_and_ended(eager_graphs: list) -> None:
    model, latent = tiny(), latents(6, 1)
    fast, expected = graphed(model), model.decode(latent)
    state = fast.start_stream(1, 32, 48)
    first = fast.step_stream(latent[:, :, 0], state)
    assert state.resident is not None and state.caches is None
    branch = copy.deepcopy(state)  # takes the caches out
    assert branch.resident is None and branch.caches is not None
    abandoned = fast.start_stream(1, 32, 48)
    fast.step_stream(latent[:, :, 3], abandoned)
    del abandoned
    fast.step_stream(latent[:, :, 4], branch)
    fast.end_stream(branch)
    found = [first, *(fast.step_stream(latent[:, :, step], state) for step in range(1, 6))]
    torch.testing.assert_close(torch.cat(found, 2), expected, atol=1e-5, rtol=1e-5)


def test_a_size_that_is_dropped_gives_its_stream_back(eager_graphs: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoders.flashdecoder.fast.SIZES_KEPT", 1)
    model = tiny()
    fast, clips = graphed(model), [latents(4, 1, 2, 2), latents(4, 1, 2, 3)]
    states = [fast.start_stream(1, 16, clip.shape[4] * 8) for clip in clips]
    frames = [[], []]
    for step in range(4):
        for clip, state, found in zip(clips, states, frames, strict=True):
            found.append(fast.step_stream(clip[:, :, step], state))
    for clip, found in zip(clips, frames, strict=True):
        torch.testing.assert_close(torch.cat(found, 2), model.decode(clip), atol=1e-5, rtol=1e-5)


def test_a_lone_stream_is_never_copied(eager_graphs: list, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, latent = graphed(tiny()), latents(6, 1)
    state = fast.start_stream(1, 32, 48)
    for step in range(3):
        fast.step_stream(latent[:, :, step], state)
    monkeypatch.setattr(graphs.Resident, "leave", lambda self: pytest.fail("its caches were copied out"))
    for step in range(3, 6):
        fast.step_stream(latent[:, :, step], state)


# ---- torch.compile, in a process without the shape checks that tests put around every function


COMPILED = """
    import torch
    from tests.test_flashdecoder_fast import latents, stream, tiny
    from decoders.inference import InferenceOptions, optimise

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, latent = tiny({dtype}, depth=4, **{changes}), latents(5).to({dtype})
    fast = optimise(model, InferenceOptions(compile=True, uint8={uint8}, attention={kernel!r}))
    plain = optimise(model, InferenceOptions(uint8={uint8}, attention={kernel!r}))
    found = torch.cat(stream(fast, latent), 1 if {uint8} else 2)
    torch._dynamo.config.error_on_recompile = True
    again = fast.decode(latent)
    assert torch.equal(again, found)
    error = (found.float() - plain.decode(latent).float()).abs()
    assert error.max() <= {bound}, error.max()
    assert torch._dynamo.utils.counters["graph_break"] == {{}}
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # Embedding, expansion, head, a block of either stack, in two phases; in the first also the last block, of one frame.
    assert frames == 11, frames
    print("fine", error.max().item(), frames)
"""


def compiled(dtype: str, bound: float, uint8: bool = False, kernel: str = "folded", **changes) -> None:
    script = textwrap.dedent(COMPILED).format(dtype=dtype, bound=bound, uint8=uint8, kernel=kernel, changes=changes)
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and run.stdout.startswith("fine"), run.stderr[-3000:]


@pytest.mark.slow
def test_compiled_without_breaks_and_once_a_stack() -> None:
    compiled("torch.bfloat16", 0.1)


@pytest.mark.slow
def test_compiled_uint8_and_another_kernel() -> None:
    compiled("torch.float32", 1, uint8=True, kernel="flash", window=1, q_norm=True)


# ---- refusals


def test_refusals() -> None:
    with pytest.raises(ValueError, match="window=null"):
        optimise(tiny(window=None))
    with pytest.raises(ValueError, match="no convolutions"):
        optimise(tiny(), InferenceOptions(fast_convolutions=True))
    with pytest.raises(ValueError, match="is none of auto, folded"):
        optimise(tiny(), InferenceOptions(attention="fastest"))
    with pytest.raises(ValueError, match="Linear has no optimised form"):
        optimise(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="attention=triton_fp8 cannot run here"):
        optimise(tiny(), InferenceOptions(attention="triton_fp8")).decode(latents(2))
    with pytest.raises(ValueError, match="attention=fa3 cannot run here: .*flash_attn_interface"):
        optimise(tiny(), InferenceOptions(attention="fa3")).decode(latents(2))
    with pytest.raises(ValueError, match="attention=cudnn cannot run here: it runs on CUDA"):
        optimise(tiny(), InferenceOptions(attention="cudnn")).decode(latents(2))
    fast = optimise(tiny(), PLAIN)
    with pytest.raises(ValueError, match="is empty"):
        fast.start_stream(0, 32, 48)
    with pytest.raises(ValueError, match="takes .*b c y x"):
        fast.step_stream(torch.zeros(1, CHANNELS, 4, 6), fast.start_stream(2, 32, 48))
    with pytest.raises(ValueError, match="not divisible by decoder.unshuffle=2"):
        optimise(tiny(unshuffle=2), PLAIN).decode(latents(2, y=3))
