"""Metrics of pairs of frames: jump, flicker, temporal LPIPS, warping error. Known answers."""

import math

import pytest
import torch

import metrics
from metrics.flow import Flow, visible, warp
from metrics.motion import Jump
from metrics.temporal import Flicker, WarpingError


def texture(h: int, w: int) -> torch.Tensor:
    """(3, h, w) in [-0.8, 0.8], with detail at several scales."""
    scales = (torch.nn.functional.interpolate(torch.rand(1, 3, s, s), (h, w), mode="bicubic")[0] for s in (6, 14, 30))
    return ((sum(scales) / 3 * 2 - 1) * 1.6).clamp(-0.8, 0.8)


def moving(t: int, h: int, w: int, dx: int, dy: int) -> torch.Tensor:
    """(1, 3, t, h, w): a window over a larger texture, so that what is seen moves by (dx, dy) pixels a frame."""
    wide = texture(h + (t - 1) * abs(dy), w + (t - 1) * abs(dx))
    left, top = ((t - 1) * max(d, 0) for d in (dx, dy))
    shots = [wide[:, top - i * dy :, left - i * dx :][:, :h, :w] for i in range(t)]
    return torch.stack(shots, dim=1)[None]


class KnownFlow(Flow):
    """The motion that a test made."""

    name, definition = "known", "as the test says"

    def __init__(self, dx: float, dy: float):
        self._flow, self.calls = torch.tensor([float(dx), float(dy)]).view(2, 1, 1), 0

    def __call__(self, frames):
        self.calls += 1
        flow = self._flow.expand(len(frames) - 1, 2, *frames.shape[-2:]).contiguous()
        return flow, -flow

    def _between(self, one, other):
        raise AssertionError("the motion is known and is never estimated")


# --- flicker and jump -------------------------------------------------------------------------------------------------


def test_flicker_of_a_known_change():
    prediction = torch.zeros(2, 3, 4, 8, 8)
    prediction[0, :, 1::2] = 0.2  # a tenth of the range, up and down
    scores = Flicker()(prediction, torch.zeros_like(prediction))
    assert scores[:, 0].isnan().all()
    torch.testing.assert_close(scores[:, 1:], torch.tensor([[0.1] * 3, [0.0] * 3]))
    assert Flicker().clip_score(scores[0]) == pytest.approx(0.1) and Flicker().clip_score(scores[1]) == 0
    assert math.isnan(Flicker().clip_score(scores[0, :1]))


def test_flicker_of_the_truth_is_what_it_is_held_against():
    target = moving(4, 16, 16, 1, 0)
    still = target[:, :, :1].expand_as(target)
    truth = Flicker()(target, target)[:, 1:]
    assert (truth > 0.001).all() and (Flicker()(still, target)[:, 1:] == 0).all()
    torch.testing.assert_close(truth[0], target.diff(dim=2).abs().mean(dim=(0, 1, 3, 4)) / 2)


def test_jump_is_of_the_change_not_of_the_picture():
    target = moving(4, 16, 16, 1, 0)
    assert Jump()(target + 0.1, target)[0, 1:].max() < 1e-6  # a constant error does not jump
    prediction = target.clone()
    prediction[:, :, 2:] += 0.1
    torch.testing.assert_close(Jump()(prediction, target)[0, 1:], torch.tensor([0.0, 0.05, 0.0]), atol=1e-6, rtol=0)


def test_temporal_lpips_is_lpips_between_neighbours(assets):
    temporal, plain = metrics.build(["tlpips_alex", "lpips_alex"], weights=assets / "lpips")
    prediction, target = moving(4, 48, 40, 2, 1), moving(4, 48, 40, 0, 1)
    scores = temporal(prediction, target)[0, 1:]
    torch.testing.assert_close(scores, plain(prediction[:, :, 1:], prediction[:, :, :-1])[0])
    assert (temporal(prediction[:, :, :1].expand_as(target), target)[0, 1:] == 0).all()
    assert temporal.protocol["backbone"] == plain.protocol["backbone"]


# --- warping ----------------------------------------------------------------------------------------------------------


def test_warp_reads_where_the_flow_points():
    frame = torch.arange(20.0).view(1, 1, 4, 5)
    flow = torch.zeros(1, 2, 4, 5)
    flow[:, 0], flow[:, 1] = 1, 2
    torch.testing.assert_close(warp(frame, flow)[0, 0, :2, :4], frame[0, 0, 2:, 1:])
    torch.testing.assert_close(warp(frame, flow * 0 + 0.5)[0, 0, 0, 0], frame[0, 0, :2, :2].mean())


def test_only_what_both_frames_see_is_visible():
    still = torch.zeros(1, 2, 6, 8)
    assert visible(still, still).all()
    right = still.clone()
    right[:, 0] = 3
    seen = visible(right, -right)[0, 0]
    assert seen[:, :5].all() and not seen[:, 5:].any()  # three columns leave the frame
    assert not visible(right, still).any()  # 3 pixels there and 0 back: 9 > 0.01 * 9 + 0.5
    assert visible(still + 0.5, still - 0.4)[0, 0, :5, :7].all()  # 2 * 0.01 is within the half
    part = still.clone()
    part[..., 4:] = 1  # a boundary between columns 3 and 4; one pixel is within what both see
    seen = visible(part, -part)[0, 0]
    assert not seen[:, 3].any() and seen[:5, :3].all() and seen[:5, 4:7].all()


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (3, 0), (-2, 1)])
def test_a_texture_that_moves_as_known_has_no_warping_error(dx, dy):
    target = moving(4, 40, 48, dx, dy)
    scores = WarpingError(KnownFlow(dx, dy))(target, target)
    assert scores[0, 0].isnan() and scores[0, 1:].max() < 1e-5
    if dx or dy:
        assert WarpingError(KnownFlow(0, 0))(target, target)[0, 1:].min() > 0.01


def test_added_flicker_is_the_warping_error():
    """Every other frame a tenth of the range brighter: the root of the mean square is that tenth, whatever moves."""
    target = moving(4, 40, 48, 2, -1)
    prediction = target.clone()
    prediction[:, :, 1::2] += 0.2
    metric = WarpingError(KnownFlow(2, -1))
    torch.testing.assert_close(metric(prediction, target)[0, 1:], torch.full((3,), 0.1), atol=1e-5, rtol=0)
    one_channel = target.clone()
    one_channel[:, 0, 1::2] += 0.2
    expected = 0.1 / math.sqrt(3)  # per channel, where Lai et al. would sum
    torch.testing.assert_close(metric(one_channel, target)[0, 1:], torch.full((3,), expected), atol=1e-5, rtol=0)


def test_warping_error_leaves_out_what_either_frame_does_not_count():
    """The middle frame is brighter. Where it does not count the truth stands in, and must not make the error less."""
    target = moving(3, 40, 48, 2, 0)
    prediction, mask = target.clone(), torch.ones(1, 1, 3, 40, 48)
    prediction[:, :, 1] += 0.2
    mask[:, :, 1, :20, :30] = 0
    scores = WarpingError(KnownFlow(2, 0))(prediction, target, mask)
    torch.testing.assert_close(scores[0, 1:], torch.full((2,), 0.1), atol=1e-5, rtol=0)


def test_flow_is_the_truths_and_is_found_once():
    target, flow = moving(3, 40, 48, 2, 0), KnownFlow(2, 0)
    metric = WarpingError(flow)
    still = target[:, :, :1].expand_as(target)  # its own motion is none, and would excuse it
    assert metric(still, target)[0, 1:].min() > 0.01 and metric(target, target)[0, 1:].max() < 1e-5
    assert flow.calls == 1
    assert "of the truth: as the test says" in metric.protocol["flow"]


def test_warping_error_of_dis_flow():
    """DIS finds the shift of a texture, so that the truth has next to no error and added flicker its known one."""
    (metric,) = metrics.build(["warp_dis"])
    target = moving(3, 64, 80, 3, -2)
    prediction = target.clone()
    prediction[:, :, 1::2] += 0.2
    assert metric.name == "warp_dis" and "DIS, medium" in metric.protocol["flow"]
    assert metric(target, target)[0, 1:].max() < 0.004
    torch.testing.assert_close(metric(prediction, target)[0, 1:], torch.full((2,), 0.1), atol=1e-3, rtol=0)


def test_a_pair_that_shares_no_pixel_has_no_score():
    target = moving(2, 16, 16, 0, 0)
    assert WarpingError(KnownFlow(40, 0))(target, target).isnan().all()


# --- what all share ---------------------------------------------------------------------------------------------------

PAIRS = [Jump(), Flicker(), WarpingError(KnownFlow(1, 0)), *metrics.build(["warp_dis"])]


@pytest.mark.parametrize("metric", PAIRS, ids=lambda m: m.name)
def test_what_the_mask_does_not_count_cannot_touch_the_score(metric):
    target = moving(3, 32, 40, 1, 0)
    prediction = target + 0.05 * torch.randn_like(target)
    mask = torch.ones(1, 1, 3, 32, 40)
    torch.testing.assert_close(metric(prediction, target, mask), metric(prediction, target), equal_nan=True)
    mask[..., :9] = 0
    mask[:, :, 1, :5] = 0  # another part in the middle frame: counts against its neighbours nowhere
    scores = metric(prediction, target, mask)
    prediction[..., :9], prediction[:, :, 1, :5] = 0.7, math.nan
    torch.testing.assert_close(metric(prediction, target, mask), scores, equal_nan=True)
    assert scores[0, 1:].isfinite().all()
    if metric.name in ("flicker", "jump"):
        prediction[:, :, 1, :5] = 0
        for frames, rows in ((slice(0, 2), slice(5, 32)), (slice(1, 3), slice(5, 32))):
            cut = (slice(None), slice(None), frames, rows, slice(9, None))
            torch.testing.assert_close(metric(prediction[cut], target[cut])[0, 1], scores[0, frames.stop - 1])


def test_temporal_lpips_leaves_out_what_the_mask_does_not_count(assets):
    (metric,) = metrics.build(["tlpips_alex"], weights=assets / "lpips")
    target = moving(3, 40, 40, 1, 0)
    prediction, mask = target + 0.05 * torch.randn_like(target), torch.ones(1, 1, 3, 40, 40)
    torch.testing.assert_close(metric(prediction, target, mask), metric(prediction, target), equal_nan=True)
    mask[..., 20:], mask[:, :, 1, :10] = 0, 0
    scores = metric(prediction, target, mask)
    filled = torch.where(mask > 0, prediction.clamp(-1, 1), target)
    both = torch.minimum(mask[:, :, 1:], mask[:, :, :-1])
    torch.testing.assert_close(metric.lpips.per_frame(filled[:, :, 1:], filled[:, :, :-1], both), scores[:, 1:])
    prediction[..., 20:] = -1
    torch.testing.assert_close(metric(prediction, target, mask), scores, equal_nan=True)


@pytest.mark.parametrize("metric", PAIRS, ids=lambda m: m.name)
def test_a_broken_prediction_is_seen_and_an_image_has_no_score(metric):
    target = moving(4, 32, 40, 1, 0)
    prediction = target.clone()
    prediction[0, 0, 1, 2, 3] = math.nan
    scores = metric(prediction, target)[0]
    assert scores.isinf().tolist() == [False, True, True, False] and (scores[1:3] > 0).all()
    assert metric.clip_score(scores) == math.inf
    image = metric(target[:, :, :1], target[:, :, :1])
    assert image.shape == (1, 1) and image.isnan().all() and math.isnan(metric.clip_score(image[0]))
