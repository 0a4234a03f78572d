"""Pixel losses, crops and the adversarial game. LPIPS has its own file."""

import copy
import math

import jaxtyping
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from losses.adversarial import (
    DiscriminatorConfig,
    PatchDiscriminator3d,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from losses.perceptual import random_crop_pair
from losses.pixel import charbonnier, l1, mse
from tests.ranks import leave


@pytest.fixture
def as_in_training():
    """Without the shape checks that only tests have, so that the errors are those a user meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def clips(*shape: int, seed: int = 0, count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) * 2 - 1 for _ in range(count)]


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "expected"), [(l1, 0.25), (mse, 0.0625), (charbonnier, math.hypot(0.25, 1e-3))])
def test_pixel_losses_of_a_constant_offset(loss, expected):
    target = clips(2, 3, 4, 6, 8)[0] * 0.5
    assert loss(target + 0.25, target).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [l1, mse, charbonnier])
def test_masked_mean_runs_over_counted_pixels(loss):
    prediction, target = clips(2, 3, 4, 6, 8)
    mask = torch.zeros(2, 1, 4, 6, 8)
    mask[..., :3] = 1
    assert loss(prediction, target, mask).item() == pytest.approx(
        loss(prediction[..., :3], target[..., :3]).item(), rel=1e-5
    )
    assert loss(prediction, target, torch.ones_like(mask)).item() == pytest.approx(loss(prediction, target).item())


def test_what_is_masked_out_may_be_nan():
    prediction, target = clips(1, 3, 2, 4, 4)
    target[..., 0] = math.nan
    mask = torch.ones(1, 1, 2, 4, 4)
    mask[..., 0] = 0
    prediction.requires_grad_()
    loss = l1(prediction, target, mask)
    loss.backward()
    assert loss.isfinite() and prediction.grad.isfinite().all() and (prediction.grad[..., 0] == 0).all()


def test_pixel_losses_refuse_bad_input(as_in_training):
    prediction, target = clips(2, 3, 4, 6, 8)
    with pytest.raises(ValueError, match="counts no pixel"):
        l1(prediction, target, torch.zeros(2, 1, 4, 6, 8))
    with pytest.raises(ValueError, match="one shape"):
        l1(prediction, target[:, :, :1])  # would broadcast
    with pytest.raises(ValueError, match="expected \\(2, 1, 4, 6, 8\\)"):
        l1(prediction, target, torch.ones(2, 3, 4, 6, 8))


def test_pixel_losses_are_float32_for_bf16_input():
    prediction, target = (x.bfloat16() for x in clips(1, 3, 2, 4, 4))
    assert l1(prediction, target).dtype == torch.float32


# --- crops ------------------------------------------------------------------------------------------------------------


def ramp(b: int, t: int, h: int, w: int) -> torch.Tensor:
    """A clip whose pixels say where they are: channel 0 the row, 1 the column, 2 the frame."""
    grids = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (t, h, w)), indexing="ij")
    return torch.stack([grids[1], grids[2], grids[0]]).expand(b, 3, t, h, w)


def test_crop_is_the_same_window_for_all_frames_and_tensors():
    video = ramp(3, 5, 40, 50)
    a, b, mask = random_crop_pair(video, video + 0, 16, torch.Generator().manual_seed(1), mask=video[:, :1])
    assert a.shape == (3, 3, 5, 16, 16) and torch.equal(a, b) and torch.equal(mask, a[:, :1])
    assert (a[:, :2] == a[:, :2, :1]).all()  # rows and columns do not depend on the frame
    assert torch.equal(a[:, 2, :, 0, 0], torch.arange(5.0).expand(3, 5))  # frames keep their order
    corners = {tuple(clip[:2, 0, 0, 0].tolist()) for clip in a}
    assert len(corners) > 1  # each clip has its own window


def test_crop_is_seeded_reaches_every_corner_and_keeps_small_dimensions_whole():
    video = ramp(1, 2, 9, 30)
    generator = torch.Generator().manual_seed(0)
    corners = [random_crop_pair(video, video, 8, generator)[0][0, :2, 0, 0, 0].tolist() for _ in range(300)]
    assert {top for top, _ in corners} == {0, 1} and {left for _, left in corners} == set(range(23))
    generator.manual_seed(0)
    again = [random_crop_pair(video, video, 8, generator)[0][0, :2, 0, 0, 0].tolist() for _ in range(300)]
    assert corners == again
    assert random_crop_pair(video, video, 16)[0].shape == (1, 3, 2, 9, 16)
    assert torch.equal(random_crop_pair(video, video, 224)[0], video)


def test_gradients_flow_through_the_crop():
    prediction, target = clips(2, 3, 2, 12, 12)
    prediction.requires_grad_()
    l1(*random_crop_pair(prediction, target, 4)).backward()
    assert (prediction.grad != 0).sum() == 2 * 3 * 2 * 4 * 4


# --- the discriminator ------------------------------------------------------------------------------------------------


def tiny(norm: str = "group") -> PatchDiscriminator3d:
    torch.manual_seed(0)
    return PatchDiscriminator3d(channels=4, num_layers=3, norm=norm)


def test_paper_discriminator_layout():
    with torch.device("meta"):
        disc = PatchDiscriminator3d.from_config(DiscriminatorConfig())
        logits = disc(torch.empty(1, 3, 17, 224, 224))
    assert [layer.out_channels for layer in disc.layers] == [128, 256, 512, 512, 1]
    assert [layer.stride for layer in disc.layers] == [(2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 1, 1), (1, 1, 1)]
    assert logits.shape == (1, 1, 5, 26, 26) and disc.output_size(17, 224, 224) == (5, 26, 26)
    assert sum(p.numel() for p in disc.parameters()) == 20_494_209
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in disc.modules())


@pytest.mark.parametrize("kernel_t", [1, 3, 4])
def test_smallest_clip_is_named_and_works(kernel_t):
    disc = PatchDiscriminator3d(channels=2, kernel_t=kernel_t)
    t, h, w = disc.smallest()
    assert (t, h, w) == ({1: 1, 3: 1, 4: 16}[kernel_t], 24, 24)
    assert disc(torch.zeros(1, 3, t, h, w)).numel() == 1
    with pytest.raises(ValueError, match=f"needs {t} frames of 24x24"):
        disc(torch.zeros(1, 3, t, h - 1, w))
    if t > 1:
        with pytest.raises(ValueError, match="too small"):
            disc(torch.zeros(1, 3, t - 1, h, w))


def test_discriminator_refuses_nonsense(as_in_training):
    with pytest.raises(ValueError, match="num_layers"):
        DiscriminatorConfig(num_layers=2)
    with pytest.raises(ValueError, match="kernel_t"):
        PatchDiscriminator3d(kernel_t=2)
    with pytest.raises(ValueError, match="norm"):
        PatchDiscriminator3d(norm="batch")
    with pytest.raises(ValueError, match="reads"):
        tiny()(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("norm", ["group", "none"])
def test_logits_of_a_clip_do_not_depend_on_the_batch(norm):
    disc, (a, b) = tiny(norm), clips(1, 3, 3, 16, 16)
    torch.testing.assert_close(disc(torch.cat([a, b]))[:1], disc(a))


# --- the losses -------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """D(x) = <weight, x>: all of its losses are known in closed form."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(clips(*shape, count=1)[0])

    def forward(self, x):
        return (x * self.weight).flatten(1).sum(1, keepdim=True)


def test_r1_of_a_linear_discriminator_is_half_its_squared_norm():
    disc, (real, _) = Linear(3, 2, 4, 4), clips(5, 3, 2, 4, 4)
    penalty = r1_penalty(disc, real)
    assert penalty.item() == pytest.approx(0.5 * disc.weight.square().sum().item(), rel=1e-6)
    penalty.backward()
    torch.testing.assert_close(disc.weight.grad, disc.weight.detach())  # d/dw (w^2 / 2) = w
    assert not real.requires_grad and real.grad is None


def test_r1_ignores_autocast():
    disc, (real, _) = tiny(), clips(2, 3, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = r1_penalty(disc, real.bfloat16().float())
    torch.testing.assert_close(inside, r1_penalty(disc, real.bfloat16()), rtol=0, atol=0)
    assert inside.dtype == torch.float32 and inside > 0


def test_logistic_losses_have_their_closed_form():
    disc, (real, fake) = Linear(3, 2, 4, 4), clips(4, 3, 2, 4, 4, seed=1)
    on_real, on_fake = (disc(x).double().detach() for x in (real, fake))
    assert generator_loss(disc, fake).item() == pytest.approx((1 + (-on_fake).exp()).log().mean().item(), rel=1e-5)
    expected = (1 + (-on_real).exp()).log().mean() + (1 + on_fake.exp()).log().mean()
    assert discriminator_loss(disc, real, fake).item() == pytest.approx(expected.item(), rel=1e-5)
    nn.init.zeros_(disc.weight)
    assert discriminator_loss(disc, real, fake).item() == pytest.approx(2 * math.log(2), rel=1e-6)


def test_each_term_reaches_its_own_player_only():
    disc, (real, fake) = tiny(), clips(2, 3, 3, 16, 16)
    fake.requires_grad_()
    generator_loss(disc, fake).backward()
    assert fake.grad.abs().sum() > 0 and all(p.grad is None and p.requires_grad for p in disc.parameters())
    fake.grad = None
    discriminator_loss(disc, real, fake).backward()
    assert fake.grad is None and all(p.grad.abs().sum() > 0 for p in disc.parameters())


def test_discriminator_learns_after_the_generators_term_under_autocast():
    # Under no_grad the casts of its weights would stay in autocast's cache without a graph, and D would never learn.
    disc, (real, fake) = nn.Sequential(nn.Flatten(), nn.Linear(2304, 4), nn.Linear(4, 1)), clips(2, 3, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert disc(real).dtype == torch.bfloat16
        (generator_loss(disc, fake) + discriminator_loss(disc, real, fake)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in disc.parameters())


def test_convolutions_stay_float32_on_a_cpu():
    disc, (real, _) = tiny(), clips(2, 3, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(disc(real), disc(real.float())) and disc(real.bfloat16()).dtype == torch.float32


@pytest.mark.gpu
def test_the_game_in_bf16_on_a_gpu():
    disc, (real, fake) = tiny().cuda(), (x.cuda() for x in clips(2, 3, 3, 16, 16))
    fake.requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert disc(real).dtype == torch.bfloat16
        loss = generator_loss(disc, fake) + discriminator_loss(disc, real, fake) + r1_penalty(disc, real)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in disc.parameters()) and fake.grad.abs().sum() > 0


# --- one backward for both players ------------------------------------------------------------------------------------


class Generator(nn.Module):
    def __init__(self, recompute: bool = False):
        super().__init__()
        self.first, self.last, self.recompute = nn.Conv3d(2, 8, 3, padding=1), nn.Conv3d(8, 3, 3, padding=1), recompute

    def body(self, x):
        return torch.tanh(self.last(torch.nn.functional.silu(self.first(x))))

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)


WEIGHTS = {"l1": 1.0, "gan_g": 0.1, "gan_d": 1.0, "gan_r1": 0.1024 * 3}


def players(recompute: bool = False) -> tuple[Generator, PatchDiscriminator3d]:
    disc = tiny()
    torch.manual_seed(1)
    return Generator(recompute), disc


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(2, 2, 3, 16, 16, generator=generator), torch.rand(2, 3, 3, 16, 16, generator=generator) * 2 - 1


def adamw(modules: list[nn.Module]) -> torch.optim.AdamW:
    settings = [{"lr": 1e-3, "betas": (0.9, 0.999)}, {"lr": 1e-3, "betas": (0.0, 0.9)}]
    kinds = {Generator: settings[0], PatchDiscriminator3d: settings[1]}
    return torch.optim.AdamW([{"params": [*m.parameters()], **kinds[type(m)]} for m in modules], weight_decay=0.01)


def one_backward(gen: Generator, disc: PatchDiscriminator3d, steps: int, without_gan: frozenset[int] = frozenset()):
    optimizer = adamw([gen, disc])
    for step in range(steps):
        latent, real = batch(step)
        fake = gen(latent)
        terms = {"l1": l1(fake, real)}
        if step not in without_gan:
            terms |= {"gan_g": generator_loss(disc, fake), "gan_d": discriminator_loss(disc, real, fake)}
            if step % 3 == 0:
                terms["gan_r1"] = r1_penalty(disc, real)
        optimizer.zero_grad(set_to_none=True)
        sum(WEIGHTS[name] * value for name, value in terms.items()).backward()
        if step in without_gan:
            assert all(p.grad is None for p in disc.parameters())
        optimizer.step()


def two_steps(gen: Generator, disc: PatchDiscriminator3d, steps: int):
    """The textbook loop: two optimisers, requires_grad toggled, one forward of the generator for both."""
    for_gen, for_disc = adamw([gen]), adamw([disc])
    for step in range(steps):
        latent, real = batch(step)
        fake = gen(latent)
        disc.requires_grad_(False)
        loss = WEIGHTS["l1"] * l1(fake, real) + WEIGHTS["gan_g"] * nn.functional.softplus(-disc(fake)).mean()
        for_gen.zero_grad()
        loss.backward()
        for_gen.step()
        disc.requires_grad_(True)
        fake = fake.detach()
        loss = WEIGHTS["gan_d"] * (
            nn.functional.softplus(-disc(real)).mean() + nn.functional.softplus(disc(fake)).mean()
        )
        if step % 3 == 0:
            x = real.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(disc(x).sum(), x, create_graph=True)
            loss = loss + WEIGHTS["gan_r1"] * gradient.square().sum(dim=(1, 2, 3, 4)).mean() / 2
        for_disc.zero_grad()
        loss.backward()
        for_disc.step()


def assert_equal(ours: list[nn.Module], theirs: list[nn.Module]):
    for a, b in zip(ours, theirs, strict=True):
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(x, y), f"{name} differs by {(x - y).abs().max()}"


def test_one_backward_equals_the_two_step_loop_to_the_last_bit():
    ours, theirs, start = players(), players(), players()
    one_backward(*ours, steps=7)
    two_steps(*theirs, steps=7)
    assert_equal(ours, theirs)
    assert all((a != b).any() for a, b in zip(ours[1].parameters(), start[1].parameters(), strict=True))


def test_a_checkpointed_generator_learns_the_same():
    plain, recomputed = players(), players(recompute=True)
    one_backward(*plain, steps=4)
    one_backward(*recomputed, steps=4)
    assert_equal(plain, recomputed)


def test_steps_without_the_game_leave_the_discriminator_alone():
    gen, disc = players()
    before = copy.deepcopy(disc)
    one_backward(gen, disc, steps=2, without_gan=frozenset({0, 1}))
    assert_equal([disc], [before])  # not even decayed


def _worker(rank: int, folder: str):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(_trained(*players(recompute=True), slice(rank, rank + 1), wrap=True), f"{folder}/{rank}.pt")
    leave()


class _Both(nn.Module):
    """What DDP wraps: both players, and a forward that is the summed loss."""

    def __init__(self, gen: Generator, disc: PatchDiscriminator3d):
        super().__init__()
        self.gen, self.disc = gen, disc

    def forward(self, latent, real, step):
        fake = self.gen(latent)
        if step == 1:  # a step without the game, like an image batch
            return l1(fake, real)
        game = WEIGHTS["gan_g"] * generator_loss(self.disc, fake) + discriminator_loss(self.disc, real, fake)
        return l1(fake, real) + game + (WEIGHTS["gan_r1"] * r1_penalty(self.disc, real) if step % 3 == 0 else 0)


def _trained(gen, disc, rows: slice, wrap: bool) -> dict:
    model, optimizer = _Both(gen, disc), torch.optim.SGD([*gen.parameters(), *disc.parameters()], lr=0.05)
    if wrap:
        model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(5):
        latent, real = batch(step)
        optimizer.zero_grad(set_to_none=True)
        model(latent[rows], real[rows], step).backward()
        optimizer.step()
    return {"gen": gen.state_dict(), "disc": disc.state_dict()}


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    alone = _trained(*players(), slice(None), wrap=False)
    for part, state in alone.items():
        for name, value in state.items():
            assert torch.equal(ranks[0][part][name], ranks[1][part][name])
            torch.testing.assert_close(ranks[0][part][name], value, rtol=1e-4, atol=1e-5)
