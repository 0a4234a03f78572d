"""The objective of diffusion decoders: noisy clips, targets, masks, levels."""

import pytest
import torch
from torch import Tensor

from decoders.regen.sampler import rectified, variance_preserving
from losses.flow import denoising, draw_levels, noised, straight, velocity_target


def test_noised_clips_and_targets_belong_to_the_sampler() -> None:
    """What training makes of a clip, the sampler's formulas take apart."""
    clean, noise, level = torch.randn(3, 3, 2, 4, 4), torch.randn(3, 3, 2, 4, 4), torch.tensor([0.0, 0.3, 1.0])
    assert all(torch.equal(a, b) for a, b in zip(straight(level), rectified(level), strict=True))
    assert torch.equal(noised(clean, noise, level)[0], clean[0])
    assert torch.equal(noised(clean, noise, level)[2], noise[2])
    a, b = (part.view(-1, 1, 1, 1, 1) for part in rectified(level))
    x, velocity = noised(clean, noise, level), velocity_target(clean, noise)
    torch.testing.assert_close(x - b * velocity, clean)
    torch.testing.assert_close(x + a * velocity, noise)
    a, b = (part.view(-1, 1, 1, 1, 1) for part in variance_preserving(level))
    torch.testing.assert_close(noised(clean, noise, level, variance_preserving), a * clean + b * noise)
    assert noised(clean.bfloat16(), noise, level).dtype == torch.float32


@pytest.mark.parametrize("predicts", ["velocity", "epsilon"])
def test_the_loss_is_zero_for_the_truth_and_leaves_out_what_is_masked(predicts: str) -> None:
    clean, noise = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    truth = noise - clean if predicts == "velocity" else noise
    assert denoising(truth, clean, noise, predicts=predicts) == 0
    assert denoising(truth + 2, clean, noise, predicts=predicts) == pytest.approx(4, rel=1e-5)
    mask = torch.zeros(2, 1, 2, 4, 4)
    mask[:, :, 0] = 1
    spoilt = truth.clone()
    spoilt[:, :, 1] = float("nan")
    assert denoising(spoilt, clean, noise, mask, predicts=predicts) == 0
    with pytest.raises(ValueError, match="neither velocity nor epsilon"):
        denoising(truth, clean, noise, predicts="x0")
    with pytest.raises(ValueError, match="counts no pixel"):
        denoising(truth, clean, noise, 0 * mask, predicts=predicts)


def test_levels_have_their_distribution_and_their_share_at_one() -> None:
    def drawn(**ask) -> Tensor:
        return draw_levels(20_000, generator=torch.Generator().manual_seed(0), **ask)

    uniform, normal = drawn(at_one=0.1), drawn(distribution="logit_normal", at_one=0.0)
    assert (uniform == 1).float().mean() == pytest.approx(0.1, abs=0.01)
    assert uniform[uniform < 1].mean() == pytest.approx(0.5, abs=0.01)
    assert uniform.min() < 0.01
    logit = normal.logit()
    assert (logit.mean(), logit.std()) == (pytest.approx(0, abs=0.03), pytest.approx(1, abs=0.03))
    assert drawn(at_one=1.0).eq(1).all() and not drawn(at_one=0.0).eq(1).any()
    assert torch.equal(drawn(), drawn())
    for ask, message in ((dict(distribution="cosine"), "neither uniform"), (dict(at_one=1.5), "a probability")):
        with pytest.raises(ValueError, match=message):
            drawn(**ask)
