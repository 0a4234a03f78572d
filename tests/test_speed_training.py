"""What makes a training step faster computes the same: compiled blocks, LPIPS in bfloat16, an encoder ahead, activations kept."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file
from torch import nn

from decoders.flashdecoder.model import FlashDecoderConfig, FlashDecoderModel
from decoders.terms import hasten_lpips
from experiments import compiling, recompute
from experiments.ahead import READY, Ahead, EncodeAhead
from experiments.compose import ConfigError
from experiments.config import build_space, load
from experiments.recompute import plan, set_checkpointing
from experiments.train import build, train
from losses import pretrained
from losses.perceptual import Lpips, distance_of_layer
from losses.pretrained import WeightsNotFound, find_weights

ROOT = Path(__file__).parent.parent
SHORT = ("trainer.progress_bar=false", "validation.num_shown=0", "trainer.max_steps=4", "trainer.val_every_steps=4")


@pytest.fixture(autouse=True)
def handlers():
    """Training installs signal handlers; give pytest its own back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


class Losses(Callback):
    def __init__(self) -> None:
        self.found: list[float] = []
        self.again: list[bool] = []
        self.encoded: set[bool] = set()  # whether batches come with a latent

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.found.append(float(outputs["loss"]))
        self.encoded.add("latent" in batch)
        assert READY not in batch
        if hasattr(pl_module.model, "backbone") and hasattr(pl_module.model.backbone, "checkpointing"):
            self.again.append(pl_module.model.backbone.checkpointing)


def run(name: str, *overrides: str) -> tuple[Losses, dict[str, torch.Tensor]]:
    losses, overrides = Losses(), (*SHORT, *overrides)
    folder = train(load(name, overrides), name, overrides, [losses])
    weights = load_file(next(folder.glob("weights-last.safetensors")))
    shutil.rmtree(folder)  # what changes no number changes no run's name: the next one must not find this one complete
    return losses, weights


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- LPIPS ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lpips() -> Lpips:
    assets = Path(os.environ.get("ASSETS_ROOT") or ROOT.parent / "shared" / "assets") / "lpips"
    for folder in (assets, pretrained.cache_dir()):
        try:
            find_weights("vgg16", folder)
        except WeightsNotFound:
            continue
        return Lpips("vgg", folder)
    pytest.skip(f"no LPIPS backbone at {assets} (set ASSETS_ROOT)")


def score(
    network: Lpips, prediction: torch.Tensor, target: torch.Tensor, mask=None
) -> tuple[torch.Tensor, torch.Tensor]:
    prediction = prediction.clone().requires_grad_()
    scores = network.per_frame(prediction, target, mask)
    scores.sum().backward()
    return scores.detach(), prediction.grad


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    clip = nn.functional.interpolate(torch.rand(1, 3, 2, 6, 6), (2, 32, 32), mode="trilinear") * 2 - 1
    return (clip + 0.1 * torch.randn_like(clip)).clamp(-1, 1), clip


def test_lpips_in_bfloat16_errs_by_what_is_stated(lpips, pair) -> None:
    exact, slope = score(lpips, *pair)
    hasten_lpips(nn.ModuleList([lpips]), "bfloat16", compiled=False)
    try:
        rounded, rounded_slope = score(lpips, *pair)
    finally:
        hasten_lpips(nn.ModuleList([lpips]), "auto", compiled=False)
    assert not torch.equal(rounded, exact), "it did round"
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
    cosine = nn.functional.cosine_similarity(rounded_slope.flatten(), slope.flatten(), dim=0)
    assert cosine > 0.97
    assert rounded_slope.norm() == pytest.approx(slope.norm(), rel=0.05)
    again, _ = score(lpips, *pair)
    assert torch.equal(again, exact), "what is switched off leaves nothing behind"


def test_lpips_in_float32_under_autocast_is_exact(lpips, pair) -> None:
    exact, _ = score(lpips, *pair)
    hasten_lpips(nn.ModuleList([lpips]), "float32", compiled=False)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(score(lpips, *pair)[0], exact)
    finally:
        hasten_lpips(nn.ModuleList([lpips]), "auto", compiled=False)


@pytest.mark.parametrize("masked", [False, True])
def test_the_function_that_is_compiled_is_lpips(lpips, pair, masked) -> None:
    mask = torch.rand(1, 1, 2, 32, 32).round() if masked else None
    exact, slope = score(lpips, *pair, mask)
    lpips.fused = distance_of_layer
    try:
        fused, fused_slope = score(lpips, *pair, mask)
    finally:
        lpips.fused = None
    torch.testing.assert_close(fused, exact, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(fused_slope, slope, rtol=1e-3, atol=1e-6)


# --- an encoder ahead -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flashdecoder_debug", pytest.param("refdecoder_debug", marks=pytest.mark.slow)])
def test_encoding_ahead_changes_no_bit(name: str, runs_root: Path) -> None:
    plain, ahead = run(name), run(name, "trainer.encode_ahead=true")
    assert plain[0].encoded == {False} and True in ahead[0].encoded
    assert ahead[0].found == plain[0].found and same(ahead[1], plain[1])


def test_a_draw_of_the_posterior_is_that_of_its_own_step() -> None:
    """Batch 5 is encoded while step 4 is the coming one, and draws what step 5 would."""
    decoder = build(load("flashdecoder_debug"))
    decoder.with_latent = lambda batch: {**batch, "latent": torch.rand(3)}
    decoder.batches_seen, encode = 4, EncodeAhead(decoder)
    before = torch.get_rng_state()
    found = encode.prepared({"key": ["a"]}, 5)["latent"]
    assert torch.equal(before, torch.get_rng_state())
    decoder.batches_seen = 5
    torch.manual_seed(decoder.step_seed(0))
    assert torch.equal(found, torch.rand(3))


def test_batches_are_numbered_from_where_a_run_goes_on_and_others_get_them_plain() -> None:
    decoder = build(load("flashdecoder_debug"))
    decoder.batches_seen, encode, seen = 7, EncodeAhead(decoder), []
    encode.prepared = lambda batch, number: seen.append(number) or {**batch, "latent": number}
    loader = Ahead(encode, [{"key": [str(i)]} for i in range(3)])
    assert all("latent" not in batch for batch in loader) and not seen
    encode.on_train_start(None, decoder)
    assert [batch["latent"] for batch in loader] == [7, 8, 9]


def test_a_family_that_encodes_by_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="encode_ahead=true.*within its own loss"):
        EncodeAhead(build(load("regen_debug")))


# --- checkpointing where it is needed ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted() -> recompute.Counted:
    experiment = load("flashdecoder_debug")
    return recompute.count(experiment, build_space(experiment))


def test_sizes_that_fit_keep_their_activations(counted) -> None:
    none, words = plan(counted, 0.0)
    every, _ = plan(counted, 100.0)
    assert none == dict.fromkeys(none, False) and every == dict.fromkeys(every, True) and len(every) == 2
    assert "again" in words and "kept" not in words
    trained = sum(p.numel() for p in build(load("flashdecoder_debug")).parameters())
    assert counted.states == pytest.approx(20 * trained / 2**30), "with EMA"
    exact = counted.states + counted.saved["video"] / recompute.FOR_ACTIVATIONS
    assert all(plan(counted, 1.001 * exact)[0].values()) and not all(plan(counted, 0.999 * exact)[0].values())


def test_kept_or_computed_again_the_numbers_are_the_same(counted, runs_root: Path) -> None:
    """On a device with room for images and for no clips, both kinds of steps come."""
    room = counted.states + (counted.saved["video"] + counted.saved["image"]) / 2 / recompute.FOR_ACTIVATIONS
    plain = run("flashdecoder_debug")
    again = run("flashdecoder_debug", "trainer.checkpointing=auto", f"trainer.memory_gib={room}")
    assert set(plain[0].again) == {False} and set(again[0].again) == {False, True}
    assert again[0].found == plain[0].found and same(again[1], plain[1])


@pytest.mark.parametrize(
    "name", ["flashdecoder_debug", "flash_vaed_debug", "refdecoder_debug", "regen_debug", "magvit2_debug"]
)
def test_checkpointing_is_switched_in_every_family_and_the_experiment_is_left_alone(name: str) -> None:
    experiment = load(name)
    decoder = build(experiment)
    parts = [module for module in decoder.model.modules() if hasattr(module, "checkpointing")]
    assert parts
    for enabled in (True, False):
        set_checkpointing(decoder.model, enabled)
        assert all(module.checkpointing is enabled for module in parts)
        assert getattr(getattr(decoder.model, "config", None), "checkpointing", enabled) == enabled
        assert experiment.decoder.checkpointing is False


def test_memory_is_the_devices_or_what_is_given() -> None:
    assert recompute.device_memory_gib(torch.device("cpu"), 3.0) == 3.0
    assert 0.1 < recompute.device_memory_gib(torch.device("cpu"), None) < 1e5


# --- compiled blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("flashdecoder_debug", {"Block"}),
        ("regen_debug", {"Block"}),
        ("flash_vaed_debug", {"ResBlock", "FrameAttention", "Upsample", "NormConv"}),
        ("refdecoder_debug", {"ResBlock", "FrameAttention", "Upsample", "NormConv", "Gate", "Block"}),
    ],
)
def test_blocks_are_found_once_and_hold_most_of_the_network(name: str, classes: set[str]) -> None:
    network = build(load(name)).model
    blocks = compiling.repeated_blocks(network)
    assert {type(block).__name__ for block in blocks} == classes
    inside = [id(p) for block in blocks for p in block.parameters()]
    assert len(inside) == len(set(inside)), "no block lies in another"
    held = {id(p): p.numel() for block in blocks for p in block.parameters()}
    assert sum(held.values()) > 0.6 * sum(p.numel() for p in network.parameters())


def test_true_compiles_the_network_and_blocks_its_blocks(monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr(compiling, "switch", lambda unit, on, many_sizes: compiled.append((unit, on, many_sizes)))
    decoder = build(load("flashdecoder_debug"))
    compiling.compile_decoder(decoder, True, False, True)
    assert compiled == [decoder.model] and not decoder.training_config.compile_losses
    compiled.clear()
    compiling.compile_decoder(decoder, "blocks", False, False)
    assert compiled == [(block, True, False) for block in compiling.repeated_blocks(decoder.model)]
    assert decoder.training_config.compile_losses
    compiled.clear()
    sharded = build(load("regen_debug"))
    compiling.compile_decoder(sharded, "blocks", True, True)
    assert compiled == sharded.shard_units()


@pytest.mark.parametrize("value", ["true", "false", "blocks"])
def test_compile_is_true_false_or_blocks(value: str) -> None:
    assert load("flashdecoder_debug", [f"trainer.compile={value}"]).trainer.compile in (True, False, "blocks")
    with pytest.raises(ConfigError, match="compile=all must be true, false or blocks"):
        load("flashdecoder_debug", ["trainer.compile=all"])


@pytest.fixture
def tracing(unchecked):
    """torch's limits and kernels as they were; the counters empty."""
    names = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    kept = {name: getattr(torch._dynamo.config, name) for name in names}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    for name, value in kept.items():
        setattr(torch._dynamo.config, name, value)


def small() -> FlashDecoderModel:
    torch.manual_seed(0)
    config = FlashDecoderConfig(depth=2, dim=64, num_heads=1, num_kv_heads=1, refinement_depth=1, head_ratio=2.0)
    return FlashDecoderModel(config, 12, 4, 8)


def gradients(model: nn.Module, latent: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(latent).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.slow
def test_later_sizes_compile_nothing_and_gradients_are_those_of_the_plain_blocks(tracing) -> None:
    """Traced and not compiled (backend eager): what compiles anew is decided by tracing."""
    plain, model = small(), small()
    for block in compiling.repeated_blocks(model):
        compiling.switch(block, on=True, many_sizes=True, backend="eager")
    graphs = []
    for b, n, y, x in ((2, 3, 4, 6), (2, 3, 6, 4), (3, 4, 8, 6), (2, 5, 4, 8)):
        before, latent = tracing["unique_graphs"], torch.randn(b, 12, n, y, x)
        for ours, theirs in zip(gradients(model, latent), gradients(plain, latent), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        graphs.append(tracing["unique_graphs"] - before)
    assert graphs[0] > 0 and graphs[2:] == [0, 0], graphs
    before = tracing["unique_graphs"]
    set_checkpointing(model, True)
    gradients(model, latent)
    assert tracing["unique_graphs"] == before, "checkpointing lies outside of blocks"


@pytest.mark.slow
def test_too_many_kernels_are_an_error_and_not_plain_code_in_silence(tracing, monkeypatch) -> None:
    monkeypatch.setattr(compiling, "MOST_KERNELS", 1)
    model = small()
    for block in compiling.repeated_blocks(model):
        compiling.switch(block, on=True, many_sizes=False, backend="eager")
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        model(torch.randn(1, 12, 3, 4, 6))
