"""What FlashDecoder promises beyond the contract: one function in every mode, streams of bounded state, exact sizes."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from decoders.flashdecoder.model import MODES, SIZES, FlashDecoderConfig, FlashDecoderModel
from experiments.config import load

CHANNELS, STRIDE_T, STRIDE_HW = 6, 4, 8
TINY = dict(depth=2, dim=128, num_heads=2, num_kv_heads=1, refinement_depth=2)
VARIANTS = {
    "paper": {},
    "full_context": dict(window=None),
    "window_1": dict(window=1),
    "window_3": dict(window=3),
    "window_4": dict(window=4),
    "mha": dict(num_kv_heads=2),
    "no_refinement": dict(refinement_depth=0),
    "no_spatial_mlp": dict(head_ratio=0.0),
    "unshuffle": dict(unshuffle=2),
    "q_norm": dict(q_norm=True),
    "wan_rope_split": dict(rope_split=(24, 20, 20)),
}


def tiny(**changes) -> FlashDecoderModel:
    """A small decoder whose frames really depend on one another."""
    model = FlashDecoderModel(FlashDecoderConfig(**TINY | changes), CHANNELS, STRIDE_T, STRIDE_HW)
    for name, parameter in model.named_parameters():
        if name.endswith("gain"):
            nn.init.normal_(parameter, 1.0, 0.2)
    return model


def latents(frames: int = 5, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, frames, 4, 6)


def stream(model: FlashDecoderModel, latent: torch.Tensor) -> torch.Tensor:
    p = model.stride_hw
    state = model.start_stream(latent.shape[0], latent.shape[3] * p, latent.shape[4] * p)
    with torch.no_grad():
        frames = [model.step_stream(frame, state) for frame in latent.unbind(2)]
        return torch.cat([*frames, model.end_stream(state)], dim=2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_streaming_equals_whole_clip_in_every_mode(variant: str) -> None:
    model, latent = tiny(**VARIANTS[variant]), latents()
    streamed = stream(model, latent)
    assert streamed.shape == (2, 3, 17, 32, 48)
    assert streamed.std() > 0.1
    for mode in MODES:
        torch.testing.assert_close(model(latent, mode=mode), streamed, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ["paper", "full_context", "window_3", "no_refinement"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_masked_and_parallel_training_equal_streaming_training(variant: str, checkpointing: bool) -> None:
    model, latent = tiny(checkpointing=checkpointing, **VARIANTS[variant]), latents()
    target = torch.randn(2, 3, 17, 32, 48)
    gradients = {}
    for mode in MODES:
        model.zero_grad()
        (model(latent, mode=mode) - target).square().mean().backward()
        gradients[mode] = {name: p.grad.clone() for name, p in model.named_parameters()}
    for mode, (name, expected) in itertools.product(("masked", "parallel"), gradients["streaming"].items()):
        torch.testing.assert_close(gradients[mode][name], expected, atol=1e-6, rtol=1e-3, msg=f"{mode}: {name}")


@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing_changes_nothing(mode: str) -> None:
    plain, latent = tiny(), latents(3)
    recomputed = tiny(checkpointing=True)
    recomputed.load_state_dict(plain.state_dict())
    for model in (plain, recomputed):
        model(latent, mode=mode).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_window_bounds_what_a_layer_sees() -> None:
    """One backbone layer, no refinement: frame n depends on frames n - 1 and n and on nothing else."""
    model = tiny(depth=1, refinement_depth=0, window=2)
    latent = latents(6)
    changed = latent.clone()
    changed[:, :, 2] += 1.0
    same = (model(latent) - model(changed)).abs().amax(dim=(0, 1, 3, 4)) < 1e-6
    frame_of = [0, *(1 + t // STRIDE_T for t in range(20))]  # pixel frame -> latent frame
    assert [not s for s in same] == [n in (2, 3) for n in frame_of]


def test_the_past_reaches_the_loss_unless_the_cache_is_detached() -> None:
    for detach, reaches in ((False, True), (True, False)):
        model = tiny(detach_cache=detach)
        latent = latents(2).requires_grad_()
        model(latent)[:, :, 1:].square().sum().backward()  # frames of the second latent frame only
        assert (latent.grad[:, :, 0].abs().sum() > 0) == reaches


def test_image_is_a_clip_of_one_frame() -> None:
    model, latent = tiny(), latents(3)
    torch.testing.assert_close(model(latent[:, :, :1]), model(latent)[:, :, :1], atol=1e-5, rtol=0)


def test_interleaved_streams_do_not_disturb_each_other() -> None:
    model = tiny()
    first, second = latents(4), latents(4)
    states = [model.start_stream(2, 32, 48) for _ in range(2)]
    outputs: tuple[list, list] = ([], [])
    with torch.no_grad():
        for step in range(4):
            for index, latent in enumerate((first, second)):
                outputs[index].append(model.step_stream(latent[:, :, step], states[index]))
    for frames, latent in zip(outputs, (first, second), strict=True):
        assert torch.equal(torch.cat(frames, 2), stream(model, latent))


def test_state_does_not_grow_over_200_latent_frames() -> None:
    model = tiny()
    state = model.start_stream(1, 32, 48)
    sizes = []
    with torch.no_grad():
        for _ in range(200):
            output = model.step_stream(torch.randn(1, CHANNELS, 4, 6), state)
            assert output.isfinite().all()
            sizes.append(state.num_bytes())
    # One earlier frame of keys and values: layers x 2 x tokens x groups x 64 x 4 bytes, and 4 times the tokens behind.
    assert set(sizes) == {(2 * 24 + 2 * 24 * STRIDE_T) * 2 * 64 * 4}


def test_a_stream_forgets_how_long_it_has_run() -> None:
    """Positions are relative: with a window of one frame, step 200 is step 1 to the last bit."""
    model, frame = tiny(window=1), torch.randn(1, CHANNELS, 4, 6)
    state = model.start_stream(1, 32, 48)
    with torch.no_grad():
        outputs = [model.step_stream(frame, state) for _ in range(200)]
    assert torch.equal(outputs[1], outputs[-1])


def test_sizes_that_the_patch_does_not_divide_are_cropped() -> None:
    model, latent = tiny(), latents(2)
    state = model.start_stream(2, 29, 43)
    with torch.no_grad():
        frames = torch.cat([model.step_stream(frame, state) for frame in latent.unbind(2)], 2)
    torch.testing.assert_close(frames, model(latent)[..., :29, :43], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s: m.step_stream(torch.randn(2, CHANNELS, 5, 6), s), r"takes \(2, 6, 4, 6\)"),
        (lambda m, s: (m.end_stream(s), m.step_stream(torch.randn(2, CHANNELS, 4, 6), s)), "has ended"),
        (lambda m, s: m(torch.randn(1, 3, 1, 4, 6)), "3 channels, but this decoder reads 6"),
        (lambda m, s: m.start_stream(0, 32, 48), "is empty"),
        (lambda m, s: m(latents(), mode="stream"), "none of streaming"),
        (lambda m, s: tiny(unshuffle=2)(torch.randn(1, CHANNELS, 1, 5, 6)), "multiples of 16"),
    ],
)
def test_misuse_is_told_plainly(call, message: str) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=message):
        call(model, model.start_stream(2, 32, 48))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dim=100), "must be 64 x num_heads = 128"),
        (dict(num_kv_heads=3), "must divide"),
        (dict(window=0), "1 or more"),
        (dict(rope_split=(16, 16, 16)), "sum to 64"),
        (dict(rope_split=(15, 24, 25)), "even"),
        (dict(detach_cache=True, mode="parallel"), "needs decoder.mode=streaming"),
        *((dict(rope_theta=theta), f"rope_theta={theta} must be") for theta in (0.0, -1e4, math.inf, math.nan)),
    ],
)
def test_impossible_architectures_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlashDecoderConfig(**TINY | changes)


# ---- sizes, against the paper's Table 2, Table 3 and the row sizes that follow from them


def millions(name: str) -> float:
    experiment = load(name)
    channels, stride_hw = (16, 8) if "wan21" in name else (48, 16)
    with torch.device("meta"):
        model = FlashDecoderModel(experiment.decoder, channels, 4, stride_hw)
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 1)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("flashdecoder_s_stage1", 56.8),
        ("flashdecoder_b_stage1", 161.7),
        ("flashdecoder_l_stage1", 348.0),
        ("flashdecoder_xl_stage1", 769.3),
        ("flashdecoder_xl_stage3", 769.3),
        ("flashdecoder_xl_wan21_stage1", 750.4),
        ("flashdecoder_xl_wan21_stage3", 750.4),
        ("flashdecoder_table1_d", 56.8),
        ("flashdecoder_table1_d_streaming", 56.8),
        ("flashdecoder_table1_e", 769.3),
        ("flashdecoder_table1_f", 769.3),
        ("flashdecoder_table1_g", 769.3),
        ("flashdecoder_table4_w4", 769.3),
    ],
)
def test_published_parameter_counts(name: str, published: float) -> None:
    assert millions(name) == published


def test_ablated_parameter_counts_follow_from_the_parts() -> None:
    """Not published; each row differs from the one before by exactly the part it adds (D = 512)."""
    d2 = 512**2 / 1e6
    counts = {row: millions(f"flashdecoder_table1_{row}") for row in ("baseline", "a", "b", "c", "d")}
    assert counts["a"] == counts["baseline"]
    assert counts["a"] - counts["b"] == pytest.approx(12 * 1.5 * d2, abs=0.11)  # K and V: 2 D^2 -> D^2 / 2, 12 blocks
    assert counts["c"] - counts["b"] == pytest.approx(2 * 14.5 * d2, abs=0.11)  # two blocks
    assert counts["d"] - counts["c"] == pytest.approx(8 * d2, abs=0.11)  # D -> 4 D -> D


def test_sizes_in_code_and_in_experiments_agree() -> None:
    for size, numbers in SIZES.items():
        decoder = load(f"flashdecoder_{size}_stage1").decoder
        assert {key: getattr(decoder, key) for key in numbers} == numbers


def test_table_a_is_in_the_experiments() -> None:
    """Supplement Table A, with batch sizes as clips per step on all eight GPUs."""
    stages = {n: load(f"flashdecoder_xl_stage{n}") for n in (1, 2, 3)}
    for e in stages.values():
        devices = e.trainer.devices
        shares = {
            tuple(s.size): (round(s.share * 10), s.num_frames, s.batch_size * devices) for s in e.data.train.values()
        }
        e.table = (shares, e.loss_weights, e.trainer.max_steps, e.optim.lr, e.trainer.precision)
        assert devices == 8
        assert (e.optim.betas, e.optim.weight_decay, e.decoder.window) == ((0.9, 0.999), 0.01, 2)
    image = {(512, 512): (2, 1, 8)}
    weights = {"l1": 1.0, "lpips": 0.25}
    assert stages[1].table == (
        {(224, 224): (8, 17, 16), (256, 256): (2, 1, 16)}, {"l1": 1.0, "lpips": 0.1}, 200_000, 1e-4, "bf16-mixed"
    )  # fmt: skip
    assert stages[2].table == (
        {(480, 832): (2, 17, 8), (720, 1280): (4, 17, 8), (1080, 1920): (2, 17, 8), **image},
        weights, 100_000, 1e-5, "bf16-mixed",
    )  # fmt: skip
    assert stages[3].table == (
        {(480, 832): (2, 17, 8), (720, 1280): (6, 17, 8), **image},
        weights | {"gan_g": 1e-4, "gan_d": 1.0, "r1": 0.1024}, 20_000, 1e-5, "bf16-mixed",
    )  # fmt: skip
    third = stages[3]
    assert (third.ema.decay, third.ema.warmup_steps) == (0.9999, 2000)
    assert (stages[1].ema, stages[2].ema) == (None, None)
    assert (stages[1].objective.crop, stages[2].objective.crop, third.objective.crop) == (None, 224, 224)
    disc, group = third.objective.discriminator, third.optim.groups["discriminator"]
    assert (disc.num_layers, disc.channels, third.objective.r1_interval) == (5, 128, 16)
    assert (group.lr, group.betas, group.weight_decay) == (1e-5, (0.0, 0.9), 0.01)
    assert [e.init_from for e in stages.values()] == [None, "flashdecoder_xl_stage1", "flashdecoder_xl_stage2"]


def test_readme_lists_what_was_guessed() -> None:
    text = (Path(__file__).parent.parent / "decoders" / "flashdecoder" / "README.md").read_text()
    for guess in ("rope_split", "first latent frame", "head", "initialisation", "discriminator"):
        assert guess in text


@pytest.mark.slow
def test_peak_memory_of_a_long_stream_does_not_grow() -> None:
    """Resident memory over 1000 latent frames (4000 pixel frames), after the allocator has settled."""
    model = tiny()
    state = model.start_stream(1, 64, 64)
    latent = torch.randn(1, CHANNELS, 8, 8)
    resident = []
    with torch.no_grad():
        for step in range(1000):
            model.step_stream(latent, state)
            if step % 100 == 99:
                resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert max(resident[2:]) - resident[1] < 16 * 2**20
