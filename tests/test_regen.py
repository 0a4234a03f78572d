"""What REGEN's network promises: its size, its conditioning, one pass, and no positions but those the latents give."""

from pathlib import Path

import pytest
import torch
from regen_small import CHANNELS, STRIDE_HW, TINY, VARIANTS, K, latents, tiny, untrained
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from decoders.regen.conditioning import ContentAware, Siren, fold_frames
from decoders.regen.config import RegenConfig, SirenConfig
from decoders.regen.dit import DiT
from decoders.regen.model import RegenDecoder
from decoders.regen.sampler import skip_factors
from decoders.regen.windows import num_frames


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- size


def test_full_size_has_the_papers_1_21_billion_parameters() -> None:
    """24 blocks of 12 D^2, D = 2048, are 1.208 B; what is written out here is the rest, part by part."""
    with torch.device("meta"):
        model = RegenDecoder(RegenConfig(), CHANNELS, K, STRIDE_HW, chunked=True)
    d, patch, siren = 2048, 192, 256
    block = 12 * d**2 + 9 * d + 2 * 128  # four matrices' biases: 3 + 1 + 4 + 1; gains of q and k over a head
    assert {name: count(part) for name, part in model.dit.named_children()} == {
        "embed": (patch + 1) * d,
        "level": (256 + 1) * d + (d + 1) * d,
        "blocks": 24 * block,
        "final": (d + 1) * patch,
    }
    sines = 2 * siren + 2 * (siren + 1) * siren
    modulation = CHANNELS * 2 * 3 * siren
    assert count(model.condition.siren) == sines + modulation + (siren + 1) * siren == 210_176
    assert count(model.condition) == 210_176 + (CHANNELS + siren + 1) * d + d == 754_944
    assert (count(model.dit), count(model)) == (1_213_919_424, 1_214_674_368)


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        (dict(patch_t=2), 2 * 2048 * 192 + 192 + (8 + 256) * 2048),  # patches and features of two frames
        (dict(modulation="single"), (2048 + 1) * 6 * 2048 + (24 * 6 + 2) * 2048),  # about the 25 M of PixArt's
        (dict(conditioning="in_context"), 2 * (8 + 1) * 2048 - 754_944),
        (dict(first_frame="linear"), (8 + 1) * 256),
        (dict(qk_norm=False), -24 * 2 * 128),
        (dict(skip=True), 0),
    ],
)
def test_options_change_the_size_by_their_own_parts(changes: dict, more: int) -> None:
    with torch.device("meta"):
        model = RegenDecoder(RegenConfig(**changes), CHANNELS, K, STRIDE_HW, chunked=True)
    assert count(model) == 1_214_674_368 + more


# ---- conditioning


@pytest.mark.parametrize("variant", ["paper", "linear", "letter", "multiply", "patch_t_2"])
def test_an_image_and_a_videos_first_frame_are_conditioned_alike(variant: str) -> None:
    """Where the rule is read as content or linear. By the letter the first frame hears of the motion latent only."""
    condition = tiny(**VARIANTS[variant]).condition
    pair, other = latents(2), latents(2)
    other[:, :, 0] = pair[:, :, 0]
    times = torch.arange(K + 1).expand(2, -1) / K
    image = condition(pair[:, :, :1], times[:, :1]).added
    first, first_of_other = (condition(latent, times).added[:, : image.shape[1]] for latent in (pair, other))
    if variant == "letter":
        assert (first - image).abs().max() > 0.1
        other = pair.clone()
        other[:, :, 0] += 1.0
        again = condition(other, times).added
        assert torch.equal(again[:, : image.shape[1]], first)  # nothing of the content is in it
        assert (again - condition(pair, times).added)[:, image.shape[1] :].abs().max() > 0.1
    else:
        torch.testing.assert_close(first, image, atol=1e-6, rtol=0)
        assert torch.equal(first, first_of_other)


@pytest.mark.parametrize("rule", ["content", "linear", "letter"])
def test_the_rule_holds_wherever_a_clips_time_is_zero(rule: str) -> None:
    """Clip by clip and frame by frame: times need neither begin at 0 nor be the same in all clips."""
    siren = SirenConfig(width=32, out=CHANNELS)
    condition = ContentAware(CHANNELS, 48, 1, siren, rule)
    latent = latents(2)
    mixed = condition(latent, torch.tensor([[-0.5, 0.0, 0.25], [0.25, 0.5, 0.0]])).added.unflatten(1, (3, -1))
    alone = [[condition(latent, torch.full((2, 1), t)).added[clip] for t in (-0.5, 0.0, 0.25, 0.5)] for clip in (0, 1)]
    expected = [[alone[0][i] for i in (0, 1, 2)], [alone[1][i] for i in (2, 3, 1)]]
    torch.testing.assert_close(mixed, torch.stack([torch.stack(clip) for clip in expected]), atol=1e-5, rtol=0)
    near = condition(latent, torch.full((2, 1), 1e-6)).added
    assert (near - condition(latent, torch.zeros(2, 1)).added).abs().max() > 0.1  # the rule does something


@pytest.mark.parametrize("variant", ["paper", "multiply", "in_context"])
def test_conditioning_is_continuous_in_time_but_at_zero(variant: str) -> None:
    condition, latent = tiny(**VARIANTS[variant]).condition, latents(2)
    for time in (-1.3, -0.25, 0.1, 0.33, 1.0, 1.7):
        here, near, far = (condition(latent, torch.full((2, 1), time + step)).added for step in (0, 1e-4, 0.25))
        assert 0 < (near - here).abs().max() < 0.02
        assert (far - here).abs().max() > 0.2


@pytest.mark.parametrize("modulation", ["film", "multiply"])
@pytest.mark.parametrize("width", [64, 256])
def test_sines_start_with_sirens_distribution(modulation: str, width: int) -> None:
    """Sitzmann et al., theorem 1.8: in every layer arguments about standard normal, outputs about arcsine (std 0.71)."""
    siren = Siren(CHANNELS, SirenConfig(width=width, layers=5, modulation=modulation))
    times, latent = torch.linspace(0, 1, 64).expand(4, -1), torch.randn(4, 4, 4, CHANNELS)
    arguments: list[Tensor] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.sin.default:
                arguments.append(args[0].detach().clone())
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        out = siren(times, latent)
    assert len(arguments) == 5
    assert arguments[0].std() > 5  # the first spreads over several turns
    assert [x.std().item() for x in arguments[1:]] == pytest.approx([1.0] * 4, abs=0.2)
    assert [x.sin().std().item() for x in arguments] == pytest.approx([0.68] * 5, abs=0.08)
    assert 0.6 < out.std() < 1.5


def test_each_cell_is_conditioned_by_itself() -> None:
    condition, latent = tiny().condition, latents(2)
    changed = latent.clone()
    changed[:, :, 1, 1, 2] += 1.0  # motion of the last cell of 2 x 3
    times = torch.tensor([[0.0, 0.5]] * 2)
    moved = (condition(changed, times).added - condition(latent, times).added).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [6 + 5]  # at time 0.5 alone: at 0 motion is not heard


def test_time_and_content_have_equal_shares_at_first() -> None:
    condition = ContentAware(CHANNELS, 512, 1, SirenConfig(), "content")
    power = condition.project.weight.detach().square()
    assert (power[:, :CHANNELS].sum() / power.sum()).item() == pytest.approx(0.5, abs=0.03)


def test_frames_fold_with_the_first_alone() -> None:
    frames = torch.arange(5.0).view(1, 5, 1)
    assert fold_frames(frames, 2).flatten(1).tolist() == [[0, 0, 1, 2, 3, 4]]
    assert fold_frames(frames[:, 1:], 2).flatten(1).tolist() == [[1, 2, 3, 4]]
    assert fold_frames(frames[:, :1], 2).flatten(1).tolist() == [[0, 0]]
    assert fold_frames(frames, 1).shape == (1, 5, 1, 1)


# ---- one pass


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pass_reaches_every_parameter(variant: str, chunked: bool) -> None:
    model = tiny(chunked, **VARIANTS[variant])
    prediction = model(latents(4))
    assert prediction.shape == (2, 3, 10 if chunked else 13, 16, 24)
    prediction.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_last_layer_of_zeros_predicts_zero_and_learns_in_a_step() -> None:
    model = untrained()
    assert not model(latents(2)).any()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        (model(latents(2)) - 1).square().mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("prediction", ["velocity", "epsilon"])
def test_with_skip_the_untrained_prediction_is_that_of_grey(prediction: str) -> None:
    model, noisy = untrained(skip=True, prediction=prediction), torch.randn(2, 3, K + 1, 16, 24)
    level = torch.tensor([0.2, 0.9])
    expected = skip_factors(level, prediction, 0.15)[0].view(-1, 1, 1, 1, 1) * noisy
    torch.testing.assert_close(model(latents(2), noisy, level), expected)


def test_pairs_fold_into_the_batch_and_back() -> None:
    for chunked, n, t in ((True, 4, 10), (False, 3, 9)):
        model, latent, video = tiny(chunked), latents(n), torch.randn(2, 3, t, 16, 24)
        assert num_frames(n, K, chunked) == t
        folded = model.fold_pairs(latent)
        assert folded.shape == (4, CHANNELS, 2, 2, 3)
        assert torch.equal(folded[1], latent[0, :, -2:])
        frames = model.fold_frames(video)
        assert torch.equal(frames[2], video[1, :, : K + 1])
        assert torch.equal(frames[3], video[1, :, -K - 1 :])
        assert torch.equal(model.unfold_pairs(frames, 2), video)
        torch.testing.assert_close(model(latent), model.unfold_pairs(model(folded), 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", [1, 4, 5, 6])
@pytest.mark.parametrize("patch_t", [1, 2])
def test_patches_go_back_to_where_they_came_from(patch_t: int, frames: int) -> None:
    """A network that changes nothing gives every pixel back, whatever frames share a token."""
    model, video = tiny(patch_t=patch_t), torch.randn(2, 3, frames, 16, 24)
    model.dit.forward = lambda patches, *_: patches
    condition = model.condition(latents(2), torch.rand(2, frames))
    assert condition.added.shape[1] == -(-frames // patch_t) * 6
    assert torch.equal(model._predict(video, torch.ones(2), condition), video)


def test_defaults_are_noise_at_level_one_and_all_times() -> None:
    model, latent = tiny(), latents(2)
    noise = torch.randn(1, 3, K + 1, 16, 24)
    given = model(latent, noise.repeat(2, 1, 1, 1, 1), torch.ones(2), (torch.arange(K + 1) / K).repeat(2, 1))
    assert torch.equal(given, model(latent, noise.repeat(2, 1, 1, 1, 1)))
    assert torch.equal(model(latent), model(latent))
    assert (model(latent, noise.repeat(2, 1, 1, 1, 1), torch.full((2,), 0.5)) - given).abs().max() > 1e-3


@pytest.mark.parametrize("modulation", ["none", "single"])
def test_blocks_start_as_plain_ones(modulation: str) -> None:
    """adaLN-single begins as the identity: with the same weights it is the model without it."""
    torch.manual_seed(1)
    plain = RegenDecoder(RegenConfig(**TINY), CHANNELS, K, STRIDE_HW, True)
    torch.manual_seed(1)
    other = RegenDecoder(RegenConfig(**TINY | dict(modulation=modulation)), CHANNELS, K, STRIDE_HW, True)
    other.load_state_dict(plain.state_dict(), strict=False)
    latent = latents(2)
    for level in (0.2, 1.0):
        arguments = (torch.randn(2, 3, K + 1, 16, 24), torch.full((2,), level))
        torch.testing.assert_close(other(latent, *arguments), plain(latent, *arguments), atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", ["paper", "single", "in_context", "patch_t_2"])
def test_checkpointing_changes_nothing(variant: str) -> None:
    plain, latent = tiny(**VARIANTS[variant]), latents(2)
    recomputed = tiny(checkpointing=True, **VARIANTS[variant])
    recomputed.load_state_dict(plain.state_dict())
    for model in (plain, recomputed):
        model(latent).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_finite_and_near(variant: str) -> None:
    """Under autocast, with gradients, and with weights in bfloat16."""
    model, latent = tiny(**VARIANTS[variant]), latents(2)
    noisy = torch.randn(2, 3, K + 1, 16, 24)
    exact = model(latent, noisy)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(latent, noisy)
        mixed.float().square().mean().backward()
    assert (mixed - exact).square().mean().sqrt() < 0.03 * exact.std()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    half = model.to(torch.bfloat16)(latent, noisy)
    assert (half - exact).square().mean().sqrt() < 0.06 * exact.std()
    assert model.decode(latent, steps=2).isfinite().all()


def test_time_keeps_its_digits_under_autocast() -> None:
    siren = Siren(CHANNELS, SirenConfig())
    times, latent = torch.rand(2, 7), torch.randn(2, 2, 2, CHANNELS)
    exact = siren(times, latent)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(siren(times, latent), exact)


def test_a_traced_pass_leaves_nothing_behind() -> None:
    """An estimate of memory in the same process must not poison the training that follows."""
    for variant in (dict(skip=True, prediction="epsilon"), dict(conditioning="in_context")):
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert tiny(**variant)(latents(4)).shape == (2, 3, 10, 16, 24)
        assert tiny(**variant)(latents(4)).isfinite().all()


# ---- no positions


@pytest.mark.parametrize("variant", ["paper", "single", "linear", "multiply", "in_context"])
def test_nothing_but_the_latent_says_where_a_cell_is(variant: str) -> None:
    """Cells of the latent and patches of the noise in another order: the same prediction in that order. The in-context
    variant has positions, and fails."""
    model, latent, noisy = tiny(**VARIANTS[variant]), latents(2, size=(3, 4)), torch.randn(2, 3, K + 1, 24, 32)
    order = torch.randperm(12)

    def shuffled(x: Tensor, side: int) -> Tensor:
        cells = x.unflatten(-1, (4, side)).unflatten(-3, (3, side)).movedim(-3, -2).flatten(-4, -3)
        return cells[..., order, :, :].unflatten(-3, (3, 4)).movedim(-2, -3).flatten(-4, -3).flatten(-2)

    other = model(shuffled(latent, 1), shuffled(noisy, 8))
    same = (other - shuffled(model(latent, noisy), 8)).abs().max() < 1e-4
    assert same == (variant != "in_context")


@pytest.mark.parametrize("variant", ["paper", "in_context"])
def test_frames_in_another_order_come_in_that_order(variant: str) -> None:
    model, latent, noisy = tiny(**VARIANTS[variant]), latents(2), torch.randn(2, 3, 4, 16, 24)
    times = torch.tensor([[0.0, -0.25, 1.5, 0.3], [0.7, 0.0, 0.1, 1.0]])
    order = [2, 0, 3, 1]
    again = model(latent, noisy[:, :, order], None, times[:, order])
    torch.testing.assert_close(again, model(latent, noisy, None, times)[:, :, order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 2), (6, 6)])
@pytest.mark.parametrize("variant", ["paper", "in_context"])
def test_any_resolution_and_aspect_ratio(variant: str, size: tuple[int, int]) -> None:
    video = tiny(**VARIANTS[variant]).decode(latents(2, size=size), steps=2)
    assert video.shape == (2, 3, K + 1, 8 * size[0], 8 * size[1])
    assert video.isfinite().all() and video.abs().max() <= 1 and video.std() > 0.1


def test_readme_lists_what_was_guessed() -> None:
    text = (Path(__file__).parent.parent / "decoders" / "regen" / "README.md").read_text()
    for guess in ("SIREN", "first frame", "adaLN", "schedule", "patch_t", "initialisation", "skip", "1.21 B"):
        assert guess in text


@pytest.mark.gpu
def test_a_block_never_writes_the_score_matrix() -> None:
    """Attention over 16384 tokens by a kernel that keeps memory linear."""
    dit = DiT(192, 256, 1, 2, 4.0, True, False, True, False).cuda().bfloat16()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        dit(torch.randn(1, 16384, 192, device="cuda"), torch.ones(1, device="cuda"), torch.zeros(1, 16384, 256).cuda())
    assert torch.cuda.max_memory_allocated() < 2**28
