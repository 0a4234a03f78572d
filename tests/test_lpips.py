"""LPIPS: known answers, gradients, precision. How its weights are found is in test_pretrained.py."""

import os
import warnings
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

from losses import pretrained
from losses.perceptual import Lpips, _unit
from losses.pretrained import WeightsNotFound, find_weights
from metrics.perceptual import LpipsMetric

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def weights() -> Path:
    """A folder that has both backbones without fetching anything."""
    assets = Path(os.environ.get("ASSETS_ROOT") or ROOT.parent / "shared" / "assets") / "lpips"
    for folder in (assets, pretrained.cache_dir()):
        try:
            [find_weights(name, folder) for name in ("alexnet", "vgg16")]
        except WeightsNotFound:
            continue
        return folder
    pytest.skip(f"no LPIPS backbones at {assets} (set ASSETS_ROOT); test-slow fetches them from the package index")


@pytest.fixture(scope="module")
def lpips_of(weights):
    """net -> Lpips, built once."""
    built: dict[str, Lpips] = {}
    return lambda net: built.setdefault(net, Lpips(net, weights))


@pytest.fixture
def as_in_training():
    """Without the shape checks that only tests have, so that the errors are those a user meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def clips(b: int, t: int, size: int) -> list[torch.Tensor]:
    """A smooth random clip and a noisy copy of it."""
    clip = torch.nn.functional.interpolate(torch.rand(b, 3, t, 6, 6), (t, size, size), mode="trilinear") * 2 - 1
    return [(clip + 0.2 * torch.randn_like(clip)).clamp(-1, 1), clip]


# --- known answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "other", "published", "measured"),
    [
        ("alex", "p0", 0.722, 0.7218807),  # published: PerceptualSimilarity's README
        ("alex", "p1", 0.138, 0.1375656),
        ("vgg", "p0", 0.5686, 0.5686128),
        ("vgg", "p1", 0.4217, 0.4216643),
    ],
)
def test_reference_images(lpips_of, assets, net, other, published, measured):
    pixels = [np.asarray(Image.open(assets / "lpips" / f"ex_{name}.png").convert("RGB")) for name in ("ref", other)]
    reference, distorted = (torch.tensor(x).permute(2, 0, 1)[None, :, None] / 127.5 - 1 for x in pixels)
    score = lpips_of(net)(distorted, reference).item()
    assert score == pytest.approx(published, abs=6e-4) and score == pytest.approx(measured, abs=5e-6)


def test_vgg_on_seeded_noise(lpips_of):
    random = np.random.RandomState(123)
    a, b = (torch.tensor(random.rand(10, 3, 100, 100)).float()[:, :, None] * 2 - 1 for _ in range(2))
    assert lpips_of("vgg")(a, b).item() == pytest.approx(0.3494, abs=5e-5)


@pytest.mark.parametrize(("net", "expected"), [("alex", 0.81395), ("vgg", 0.45384)])
def test_black_against_white(lpips_of, net, expected):
    white = torch.ones(1, 3, 1, 64, 64)
    assert lpips_of(net)(-white, white).item() == pytest.approx(expected, abs=1e-4)
    assert lpips_of(net)(white, white).item() == 0


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_values_and_gradients_equal_the_packages_own(lpips_of, net):
    lpips, (prediction, target) = lpips_of(net), clips(2, 2, 48)
    ours, theirs = prediction.clone().requires_grad_(), prediction.clone().requires_grad_()
    lpips(ours, target).backward()
    frames = (x.transpose(1, 2).flatten(0, 1) for x in (theirs, target))
    score = lpips.network(*frames).flatten()
    score.mean().backward()
    torch.testing.assert_close(lpips.per_frame(prediction, target).flatten(), score.detach())
    assert ours.grad.abs().max() > 0
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-7)


def test_gradient_where_every_channel_is_zero():
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    _unit(features).square().sum().backward()
    assert features.grad.isfinite().all()
    tiny = torch.full((1, 4, 2, 2), 1e-30, requires_grad=True)  # its square underflows
    _unit(tiny).sum().backward()
    assert tiny.grad.isfinite().all()


def test_frozen_hidden_and_always_in_eval_mode(lpips_of):
    lpips = lpips_of("alex").train()
    assert not list(lpips.parameters()) and not lpips.state_dict()
    assert not any(module.training for module in lpips.network.modules())
    assert not any(p.requires_grad for p in lpips.network.parameters())
    prediction, target = clips(1, 1, 64)
    prediction.requires_grad_()
    lpips(prediction, target).backward()
    assert all(p.grad is None for p in lpips.network.parameters())


def test_building_leaves_the_random_numbers_alone_and_warns_of_nothing(weights):
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Lpips("alex", weights)
    assert torch.equal(before, torch.get_rng_state())


def test_a_network_moved_during_validation_can_still_train(weights):
    with torch.inference_mode():
        lpips = Lpips("alex", weights)
        lpips._follow(torch.device("meta"))
    assert not any(tensor.is_inference() for tensor in lpips.network.state_dict().values())


def test_chunks_change_neither_values_nor_gradients(lpips_of, weights):
    chunked, (prediction, target) = Lpips("alex", weights, frames_per_chunk=2), clips(1, 5, 48)
    grads = []
    for lpips in (lpips_of("alex"), chunked):
        x = prediction.clone().requires_grad_()
        loss = lpips(x, target)
        loss.backward()
        grads.append((loss.detach(), x.grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_frames_are_scored_alone_and_in_order(lpips_of):
    lpips, (prediction, target) = lpips_of("alex"), clips(2, 4, 40)
    scores, order = lpips.per_frame(prediction, target), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(lpips.per_frame(prediction[:, :, order], target[:, :, order]), scores[:, order])
    torch.testing.assert_close(lpips.per_frame(prediction[1:, :, 2:3], target[1:, :, 2:3]), scores[1:, 2:3])
    assert lpips.per_frame(prediction, target[:, :, order]).ne(scores).any()


def test_mask_of_ones_changes_nothing_and_an_empty_one_is_no_number(lpips_of):
    lpips, (prediction, target) = lpips_of("alex"), clips(1, 2, 40)
    mask = torch.ones(1, 1, 2, 40, 40)
    torch.testing.assert_close(lpips.per_frame(prediction, target, mask), lpips.per_frame(prediction, target))
    mask[:, :, 1] = 0
    assert lpips.per_frame(prediction, target, mask).isnan().tolist() == [[False, True]]


@pytest.mark.parametrize(("net", "smallest"), [("alex", 31), ("vgg", 16)])
def test_too_small_names_the_minimum_and_the_minimum_works(lpips_of, net, smallest):
    prediction, target = clips(1, 1, smallest)
    assert lpips_of(net)(prediction, target).isfinite()
    with pytest.raises(ValueError, match=f"{smallest}x{smallest} or more, got {smallest - 1}x{smallest}"):
        lpips_of(net)(prediction[..., 1:, :], target[..., 1:, :])


def test_float32_on_a_cpu_whatever_autocast_says(lpips_of, weights):
    lpips, metric, (prediction, target) = lpips_of("alex"), LpipsMetric("alex", weights), clips(1, 2, 48)
    exact, score = lpips(prediction, target), metric(prediction, target)
    prediction.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lpips(prediction, target), exact) and torch.equal(metric(prediction, target), score)
        loss = lpips(prediction.bfloat16(), target)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.03)
    assert prediction.grad.isfinite().all() and prediction.grad.abs().max() > 0


@pytest.mark.gpu
def test_loss_follows_autocast_on_a_gpu_and_the_metric_does_not(weights):
    lpips, metric, (prediction, target) = Lpips("vgg", weights), LpipsMetric("vgg", weights), clips(1, 2, 48)
    exact = lpips.per_frame(prediction, target)
    prediction, target = prediction.cuda(), target.cuda()
    with torch.inference_mode():  # what moves the network first must not spoil it for training
        lpips(prediction, target)
    prediction.requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = lpips(prediction, target)
        torch.testing.assert_close(metric(prediction, target).cpu(), exact, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.mean().item(), rel=0.03)
    assert prediction.grad.isfinite().all()


def test_bad_choices(as_in_training, tmp_path):
    with pytest.raises(ValueError, match=r"no LPIPS network 'vgg19'.*'vgg', 'alex'"):
        Lpips("vgg19")
    with pytest.raises(ValueError, match="frames_per_chunk"):
        Lpips("vgg", frames_per_chunk=0)
