"""The losses of distillation and of autoencoders: 1 - SSIM, features against a teacher's, running scales, KL."""

import math
import os

import jaxtyping
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from losses.distillation import RunningScale, RunningScaleConfig, feature_mse, pool_mask
from losses.kl import kl_to_standard_normal
from losses.structural import ssim_loss
from metrics.image import Ssim
from tests.ranks import leave


@pytest.fixture
def as_in_training():
    """Without the shape checks that only tests have, so that the errors are those a user meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A target in [-1, 1] and a prediction that resembles it."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(shape, generator=generator) * 2 - 1
    return (0.7 * target + 0.2 * torch.rand(shape, generator=generator)).clamp(-1, 1), target


# --- structural -------------------------------------------------------------------------------------------------------


def test_ssim_loss_is_one_minus_the_metric():
    prediction, target = pair(2, 3, 3, 16, 20)
    assert ssim_loss(prediction, target).item() == pytest.approx(1 - Ssim()(prediction, target).mean().item(), abs=1e-6)
    mask = (torch.rand(2, 1, 3, 16, 20) > 0.4).float()
    expected = 1 - Ssim()(prediction, target, mask).mean().item()
    assert ssim_loss(prediction, target, mask).item() == pytest.approx(expected, abs=1e-6)


def test_ssim_loss_known_answers():
    _, target = pair(1, 3, 2, 12, 12)
    assert ssim_loss(target, target).item() == pytest.approx(0, abs=1e-6)
    grey = torch.full((1, 3, 1, 12, 12), 0.5)  # constant frames: only the means' term is left, C1 = (0.01 * 2)^2
    expected = 1 - (2 * 0.5 * 0.25 + 4e-4) / (0.5**2 + 0.25**2 + 4e-4)
    assert ssim_loss(grey, 0.5 * grey).item() == pytest.approx(expected, abs=1e-5)


def test_ssim_loss_descends_and_reaches_values_outside_the_range():
    prediction, target = pair(1, 3, 1, 16, 16)
    prediction = (3 * prediction).requires_grad_()
    first = ssim_loss(prediction, target)
    first.backward()
    assert prediction.grad.isfinite().all() and (prediction.grad[prediction.abs() > 1] != 0).any()
    assert ssim_loss(prediction.detach() - 10 * prediction.grad, target) < first
    x = pair(1, 3, 1, 11, 11)[0].double().requires_grad_()
    (slope,) = torch.autograd.grad(ssim_loss(x, target[..., :11, :11].double()), x)
    step = torch.zeros_like(x)
    step[0, 1, 0, 4, 5] = 5e-3
    with torch.no_grad():
        difference = ssim_loss(x + step, target[..., :11, :11]) - ssim_loss(x - step, target[..., :11, :11])
    assert slope[0, 1, 0, 4, 5].item() == pytest.approx(difference.item() / 1e-2, rel=2e-2)


def test_ssim_loss_ignores_what_is_masked_out_and_frames_without_a_pixel():
    prediction, target = pair(1, 3, 3, 16, 16)
    mask = torch.ones(1, 1, 3, 16, 16)
    mask[..., :4] = 0
    mask[:, :, 2] = 0
    target[..., :4] = 0
    plain = ssim_loss(prediction[:, :, :2], target[:, :, :2], mask[:, :, :2])
    prediction[..., :4], target[..., :4] = math.nan, math.nan
    prediction[:, :, 2] = math.nan
    prediction.requires_grad_()
    loss = ssim_loss(prediction, target, mask)
    loss.backward()
    assert plain.isfinite() and prediction.grad.isfinite().all() and (prediction.grad[..., :4] == 0).all()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-6)


def test_ssim_loss_in_chunks_and_under_autocast_is_the_same():
    prediction, target = pair(2, 3, 3, 12, 12)
    whole, parts = prediction.clone().requires_grad_(), prediction.clone().requires_grad_()
    loss = ssim_loss(whole, target)
    with torch.autocast("cpu", torch.bfloat16):
        chunked = ssim_loss(parts, target, frames_per_chunk=4)
    assert chunked.dtype == torch.float32 and chunked.item() == pytest.approx(loss.item(), abs=1e-6)
    loss.backward()
    chunked.backward()
    torch.testing.assert_close(parts.grad, whole.grad)
    with torch.no_grad():
        assert ssim_loss(prediction, target, frames_per_chunk=1).item() == pytest.approx(loss.item(), abs=1e-6)


def test_ssim_loss_refuses_what_it_cannot_measure(as_in_training):
    prediction, target = pair(1, 3, 1, 10, 16)
    with pytest.raises(ValueError, match="11x11 pixels or more, got 10x16"):
        ssim_loss(prediction, target)
    with pytest.raises(ValueError, match="one shape"):
        ssim_loss(prediction, target[..., :4])
    prediction, target = pair(1, 3, 1, 12, 12)
    with pytest.raises(ValueError, match="counts no pixel"):
        ssim_loss(prediction, target, torch.zeros(1, 1, 1, 12, 12))
    with pytest.raises(ValueError, match="frames_per_chunk"):
        ssim_loss(prediction, target, frames_per_chunk=0)


# --- features ---------------------------------------------------------------------------------------------------------


def features(seed: int = 0) -> torch.Tensor:
    """Channels of different means and spreads."""
    x = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([0.5, 1.0, 2.0, 3.0]).view(4, 1, 1, 1) + torch.arange(4.0).view(4, 1, 1, 1)


def test_feature_mse_known_answers():
    teacher = features()
    assert feature_mse(teacher, teacher) == 0
    means = teacher.mean(dim=(0, 2, 3, 4), keepdim=True).expand_as(teacher)
    assert feature_mse(means, teacher).item() == pytest.approx(1, rel=1e-5)
    half = means + 0.5 * (teacher - means)  # R^2 = 0.75
    assert feature_mse(half, teacher).item() == pytest.approx(0.25, rel=1e-5)


def test_feature_mse_does_not_know_the_scale_of_a_layer():
    student, teacher = features(1), features(0)
    loss = feature_mse(student, teacher).item()
    assert feature_mse(100 * student, 100 * teacher).item() == pytest.approx(loss, rel=1e-4)
    assert feature_mse(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_feature_mse_teaches_the_student_only():
    student, teacher = features(1).requires_grad_(), features(0).requires_grad_()
    feature_mse(student, teacher).backward()
    assert teacher.grad is None
    variance = teacher.detach().var(dim=(0, 2, 3, 4), correction=0).mean()
    expected = 2 * (student - teacher).detach() / student.numel() / variance
    torch.testing.assert_close(student.grad, expected)


def test_feature_mse_of_constant_features_is_finite():
    teacher = torch.full((1, 2, 1, 2, 2), 3.0)
    assert feature_mse(teacher + 0.3, teacher).item() == pytest.approx(0.09 / (1e-2 * 9), rel=1e-4)
    assert feature_mse(torch.zeros_like(teacher), torch.zeros_like(teacher)) == 0


def test_feature_mse_counts_what_the_mask_counts():
    student, teacher = features(1), features(0)
    mask = torch.ones(2, 1, 9, 10, 12)  # nine frames: three feature frames of 1, 4 and 4
    assert feature_mse(student, teacher, mask).item() == pytest.approx(feature_mse(student, teacher).item(), rel=1e-4)
    mask[:, :, 5:] = 0
    mask[..., :4] = 0
    expected = feature_mse(student[:, :, :2, :, 2:], teacher[:, :, :2, :, 2:]).item()
    student[:, :, 2], student[..., :2] = math.nan, math.nan
    student.requires_grad_()
    loss = feature_mse(student, teacher, mask)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert student.grad.isfinite().all() and (student.grad[..., :2] == 0).all()


def test_masks_are_pooled_as_frames_are_grouped():
    mask = torch.zeros(1, 1, 9, 4, 4)
    mask[:, :, 0] = 1
    mask[:, :, 1:3, :2] = 1
    pooled = pool_mask(mask, (3, 2, 2))
    assert torch.equal(pooled[0, 0, 0], torch.ones(2, 2)) and torch.equal(pooled[0, 0, 2], torch.zeros(2, 2))
    assert torch.equal(pooled[0, 0, 1], torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    assert torch.equal(pool_mask(mask, (9, 4, 4)), mask)
    assert torch.equal(pool_mask(mask[:, :, :1], (1, 2, 2)), torch.ones(1, 1, 1, 2, 2))
    for frames in (1, 4):
        with pytest.raises(ValueError, match=f"features of {frames} frames do not belong to a clip of 9"):
            pool_mask(mask, (frames, 4, 4))


def test_feature_mse_refuses_other_shapes(as_in_training):
    with pytest.raises(ValueError, match="must be alike"):
        feature_mse(features()[:, :2], features())
    with pytest.raises(ValueError, match="counts no pixel"):
        feature_mse(features(1), features(), torch.zeros(2, 1, 9, 10, 12))


# --- running scales ---------------------------------------------------------------------------------------------------


def test_running_scale_follows_its_formula():
    scale = RunningScale(RunningScaleConfig(decay=0.75))
    first = scale({"a": torch.tensor(4.0), "b": torch.tensor(0.01)})
    assert first["a"].item() == first["b"].item() == pytest.approx(1)  # no bias towards the start
    second = scale({"a": torch.tensor(2.0), "b": torch.tensor(0.01)})
    mean = (0.75 * 4 + 2) / 1.75
    assert scale.mean("a").item() == pytest.approx(mean) and second["a"].item() == pytest.approx(2 / mean)
    assert second["b"].item() == pytest.approx(1)


def test_running_scale_scales_gradients_and_carries_none():
    scale, loss = RunningScale(), torch.tensor(5.0, requires_grad=True)
    scale({"a": loss})["a"].backward()
    assert loss.grad.item() == pytest.approx(1 / 5)
    assert not scale.mean("a").requires_grad
    kept = scale.mean("a")
    assert scale({"a": torch.tensor(10.0)}, update=False)["a"].item() == pytest.approx(2)
    assert scale.mean("a") == kept


def test_running_scale_resumes_exactly(tmp_path):
    losses = [{"a": torch.rand(()) * 10, "b": torch.rand(())} for _ in range(8)]
    whole, part = RunningScale(), RunningScale()
    expected = [whole(loss) for loss in losses]
    for loss in losses[:3]:
        part(loss)
    torch.save(part.state_dict(), tmp_path / "state")
    part(losses[0])  # what comes after does not reach into what was kept
    resumed = RunningScale()
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for loss, wanted in zip(losses[3:], expected[3:], strict=True):
        assert resumed(loss) == wanted


def test_running_scale_refuses_nothing_and_the_unknown():
    with pytest.raises(ValueError, match="no losses"):
        RunningScale()({})
    with pytest.raises(ValueError, match="no loss of a was seen"):
        RunningScale()({"a": torch.tensor(1.0)}, update=False)
    with pytest.raises(ValueError, match="decay=1"):
        RunningScaleConfig(decay=1.0)


def _one_rank(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, store=store)
    scale = RunningScale()
    scale({"a": torch.tensor(1.0 + 2 * rank)})
    torch.save(scale.mean("a"), f"{folder}/mean{rank}")
    leave()


def test_running_scale_is_the_same_on_all_ranks(tmp_path):
    torch.multiprocessing.start_processes(_one_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    assert [torch.load(tmp_path / f"mean{rank}").item() for rank in range(2)] == [2.0, 2.0]


# --- KL ---------------------------------------------------------------------------------------------------------------


def test_kl_known_answers():
    zeros = torch.zeros(1, 2, 1, 3, 3)
    assert kl_to_standard_normal(zeros, zeros) == 0
    assert kl_to_standard_normal(zeros + 2, zeros).item() == pytest.approx(2)  # half of 2^2
    mean, log_variance = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    reference = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).mean()
    assert kl_to_standard_normal(mean, log_variance).item() == pytest.approx(reference.item(), rel=1e-5)


def test_kl_gradients_and_clamp():
    mean = torch.randn(1, 1, 1, 2, 2, requires_grad=True)
    log_variance = torch.tensor([0.5, -1.0, 100.0, -100.0]).view(1, 1, 1, 2, 2).requires_grad_()
    loss = kl_to_standard_normal(mean, log_variance)
    loss.backward()
    torch.testing.assert_close(mean.grad, mean.detach() / 4)
    expected = torch.tensor([0.5 * (math.exp(0.5) - 1) / 4, 0.5 * (math.exp(-1) - 1) / 4, 0.0, 0.0])
    torch.testing.assert_close(log_variance.grad.flatten(), expected)
    assert loss.isfinite()
    assert kl_to_standard_normal(mean.bfloat16(), log_variance.bfloat16()).dtype == torch.float32


def test_kl_refuses_other_shapes(as_in_training):
    with pytest.raises(ValueError, match="one shape"):
        kl_to_standard_normal(torch.zeros(1, 2, 1, 3, 3), torch.zeros(1, 1, 1, 3, 3))
