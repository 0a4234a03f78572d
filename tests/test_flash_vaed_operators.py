"""Operators started from a dense convolution: exact where they can be, never worse than what is promised elsewhere."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoders.flash_vaed.operators import (
    fill,
    folded,
    init_depthwise_separable,
    init_folded,
    init_frame,
    init_map,
    init_sliced,
    separable,
    separable_error,
    sliced,
    tap_moments,
)
from decoders.flash_vaed.prune import reconstruction, select
from decoders.flash_vaed.statistics import ChannelStatistics
from decoders.layers.causal_conv import CausalConv3d, DepthwiseSeparableConv3d, FrameConv2d

CHANNELS, OUT = 10, 7


@pytest.fixture(autouse=True)
def double():
    """In float64 exact means exact."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def smooth(clips: int = 2, channels: int = CHANNELS) -> torch.Tensor:
    """Correlated features as a convolution meets them behind a norm and SiLU: smooth, with means."""
    generator = torch.Generator().manual_seed(clips)
    sources = torch.randn(clips, 4, 8, 14, 14, generator=generator)
    sources = F.avg_pool3d(sources, (3, 5, 5), 1) * 6
    mix = torch.randn(channels, 4, generator=torch.Generator().manual_seed(0))
    mixed = torch.einsum("cr,brthw->bcthw", mix, sources)
    return F.silu(mixed + 0.2 * torch.randn(mixed.shape, generator=generator))


def statistics_of(features: torch.Tensor) -> ChannelStatistics:
    statistics = ChannelStatistics(features.shape[1])
    statistics.update(features)
    return statistics


def call(layer: nn.Module, video: torch.Tensor) -> torch.Tensor:
    """A layer of any kind on a video."""
    with torch.no_grad():
        if type(layer) is nn.Conv2d:
            return torch.stack([layer(frame) for frame in video.unbind(2)], 2)
        return layer(video) if type(layer) is nn.Conv3d else layer(video)[0]


@pytest.mark.parametrize("kernel", [3, 1, (3, 1, 1)])
def test_separable_is_exact_where_the_dense_one_is(kernel):
    teacher = DepthwiseSeparableConv3d(CHANNELS, OUT, kernel)
    nn.init.zeros_(teacher.depthwise.bias)
    dense = CausalConv3d(CHANNELS, OUT, kernel)
    with torch.no_grad():
        product = teacher.pointwise.weight * teacher.depthwise.weight.transpose(0, 1)
        dense.weight.copy_(product)
        dense.bias.copy_(teacher.pointwise.bias)
    video = smooth()
    for options in ({}, dict(statistics=statistics_of(video), taps=tap_moments(video, dense.kernel_size))):
        student = DepthwiseSeparableConv3d(CHANNELS, OUT, kernel)
        init_depthwise_separable(student, dense, **options)
        torch.testing.assert_close(call(student, video), call(teacher, video), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(call(student, video), call(dense, video), rtol=1e-9, atol=1e-9)


def test_separable_is_the_best_rank_one_of_each_input():
    weight = torch.randn(OUT, CHANNELS, 3, 3, 3)
    depthwise, pointwise = separable(weight)
    values = torch.linalg.svdvals(weight.flatten(2).transpose(0, 1))
    assert separable_error(weight, depthwise, pointwise) == pytest.approx(float(values[:, 1:].square().sum()), rel=1e-9)
    torch.testing.assert_close(depthwise.flatten(1).norm(dim=1), torch.ones(CHANNELS))
    assert (depthwise.flatten(1).sum(1) >= 0).all()


def test_weights_of_single_channels_cannot_improve_on_it():
    """Weighted by one number a channel, the optimum is the same, whatever is done: inputs do not meet."""
    weight, moments = torch.randn(OUT, CHANNELS, 3, 3, 3), torch.rand(CHANNELS) * 5
    plain, stepped = separable(weight), separable(weight, moments.diag(), steps=5)
    error = separable_error(weight, *plain, moments)
    assert separable_error(weight, *stepped, moments) == pytest.approx(error, rel=1e-9)
    assert torch.equal(separable(weight, moments, steps=5)[1], plain[1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("with_taps", [False, True])
def test_alternating_least_squares_is_never_worse(seed: int, with_taps: bool):
    torch.manual_seed(seed)
    video, weight = smooth(1), torch.randn(OUT, CHANNELS, 3, 3, 3)
    statistics = statistics_of(video)
    taps = tap_moments(video, mean=statistics.mean) if with_taps else None
    weighted = dict(covariance=statistics.covariance, taps=taps)
    errors = [separable_error(weight, *separable(weight, steps=0), **weighted)]
    errors += [separable_error(weight, *separable(weight, **weighted, steps=s), **weighted) for s in (0, 1, 2, 4, 8)]
    # The tap-weighted SVD of single channels does not see how they go together; from there on each step is a descent.
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in zip(errors[1:], errors[2:], strict=False)), errors
    assert errors[-1] < 0.98 * errors[0], errors


def test_singular_moments():
    weight = torch.randn(OUT, CHANNELS, 3, 3, 3)
    weight[:, 3] = 0
    for moments in (torch.zeros(CHANNELS, CHANNELS), torch.ones(CHANNELS, CHANNELS), torch.eye(CHANNELS)):
        depthwise, pointwise = separable(weight, moments, torch.ones(27, 27), steps=3)
        assert depthwise.isfinite().all() and pointwise.isfinite().all()
    depthwise, pointwise = separable(torch.zeros_like(weight), torch.eye(CHANNELS), steps=3)
    assert depthwise.isfinite().all() and not pointwise.any()


def output_errors(dense: CausalConv3d) -> dict[str, float]:
    """Mean squared distance to the dense output on unseen features, by initialisation."""
    seen, unseen = smooth(3), smooth(2)
    statistics = statistics_of(seen)
    taps = tap_moments(seen, mean=statistics.mean)
    options = {"random": None, "svd": {}, "taps": dict(taps=taps), "all": dict(statistics=statistics, taps=taps)}
    errors = {}
    for name, chosen in options.items():
        student = DepthwiseSeparableConv3d(CHANNELS, OUT)
        if chosen is not None:
            init_depthwise_separable(student, dense, **chosen)
        errors[name] = float((call(student, unseen) - call(dense, unseen)).square().mean())
    return errors


@pytest.mark.parametrize("seed", range(4))
def test_computed_initialisations_start_closer_than_random(seed: int):
    torch.manual_seed(seed)
    errors = output_errors(CausalConv3d(CHANNELS, OUT))
    assert errors["all"] < errors["taps"] < errors["random"] and errors["svd"] < errors["random"], errors
    assert errors["all"] < 0.7 * errors["svd"], errors


def test_tap_moments():
    video = smooth()
    moments = tap_moments(video, mean=torch.full((CHANNELS,), 0.3))
    assert moments.diagonal().mean() == pytest.approx(1)
    padded = F.pad(video - 0.3, (1, 1, 1, 1, 2, 0))
    tap = lambda t, y, x: padded[:, :, t : t + 6, y : y + 10, x : x + 10]  # noqa: E731
    expected = (tap(0, 1, 2) * tap(2, 0, 1)).mean() / (tap(1, 1, 1).square().mean())
    measured = moments[0 * 9 + 1 * 3 + 2, 2 * 9 + 0 * 3 + 1] / moments[9 + 3 + 1, 9 + 3 + 1]
    assert measured == pytest.approx(float(expected), rel=1e-9)
    assert torch.equal(tap_moments(torch.zeros(1, 2, 3, 4, 4)), torch.eye(27))


def test_frames_of_a_static_video_are_exact():
    dense, student = CausalConv3d(CHANNELS, OUT), FrameConv2d(CHANNELS, OUT)
    init_frame(student, dense)
    video = smooth()[:, :, :1].repeat(1, 1, 5, 1, 1)
    torch.testing.assert_close(call(student, video)[:, :, 2:], call(dense, video)[:, :, 2:], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(call(student, video)[:, :, 0], call(dense, video)[:, :, 0])  # zeros come before a video


def test_frames_start_closer_than_random():
    dense, student = CausalConv3d(CHANNELS, OUT), FrameConv2d(CHANNELS, OUT)
    video = smooth()
    random = (call(student, video) - call(dense, video)).square().mean()
    init_frame(student, dense)
    assert (call(student, video) - call(dense, video)).square().mean() < 0.5 * random


@pytest.mark.parametrize("kind", [CausalConv3d, FrameConv2d])
def test_slices(kind):
    dense, student = kind(CHANNELS, OUT), kind(3, 2)
    rows, columns = torch.tensor([4, 1]), [0, 5, 9]
    init_sliced(student, dense, rows, columns)
    video = torch.zeros_like(smooth())
    video[:, columns] = smooth()[:, columns]
    torch.testing.assert_close(call(student, video[:, columns]), call(dense, video)[:, rows], rtol=1e-12, atol=1e-12)
    same = kind(CHANNELS, OUT)
    init_sliced(same, dense)
    assert torch.equal(same.weight, dense.weight) and torch.equal(same.bias, dense.bias)
    weight, bias = sliced(dense.weight, None, rows, columns)
    assert torch.equal(weight, student.weight) and not bias.any()


def test_slices_of_3d_into_frames():
    dense, student = CausalConv3d(CHANNELS, OUT), FrameConv2d(3, 2)
    init_frame(student, dense, rows=[4, 1], columns=[0, 5, 9])
    torch.testing.assert_close(student.weight, dense.weight.sum(2)[[4, 1]][:, [0, 5, 9]])
    torch.testing.assert_close(student.bias, dense.bias[[4, 1]])


CONSUMERS = {
    "conv2d": lambda i: nn.Conv2d(i, OUT, 3, padding=1),
    "conv3d": lambda i: nn.Conv3d(i, OUT, 3, padding=1),
    "causal": lambda i: CausalConv3d(i, OUT),
    "frame": lambda i: FrameConv2d(i, OUT),
    "1x1": lambda i: FrameConv2d(i, OUT, 1),
    "1x1x1": lambda i: CausalConv3d(i, OUT, 1),
}


def low_rank(rank: int = 3) -> torch.Tensor:
    mixed = torch.einsum("cr,brthw->bcthw", torch.randn(CHANNELS, rank), torch.randn(2, rank, 5, 8, 8))
    return mixed + torch.randn(CHANNELS, 1, 1, 1)


@pytest.mark.parametrize("kind", CONSUMERS)
def test_folded_consumer_of_kept_channels_is_the_consumer_of_all(kind: str):
    video = low_rank()
    statistics = statistics_of(video)
    kept = select(statistics, 3).kept
    matrix, offset = reconstruction(statistics, kept, ridge=0.0)
    source, target = CONSUMERS[kind](CHANNELS), CONSUMERS[kind](3)
    init_folded(target, source, matrix, offset)
    full, cheap = call(source, video), call(target, video[:, kept])
    inside = (..., slice(2, -1), slice(1, -1), slice(1, -1))  # at the border zeros stand for the offset
    torch.testing.assert_close(cheap[inside], full[inside], rtol=1e-7, atol=1e-7)
    if kind.startswith("1x1"):
        torch.testing.assert_close(cheap, full, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", CONSUMERS)
def test_folding_through_the_origin_is_exact_in_the_padding_too(kind: str):
    video = low_rank()
    statistics = statistics_of(video)
    kept = select(statistics, 4).kept  # the mean is one more direction
    matrix, offset = reconstruction(statistics, kept, ridge=0.0, bias=False)
    source, target = CONSUMERS[kind](CHANNELS), CONSUMERS[kind](4)
    init_folded(target, source, matrix, offset)
    # Four channels of rank 3 + mean: selection is blind to the mean, so the fourth may or may not bring it.
    reached = torch.linalg.matrix_rank(video.movedim(1, -1).flatten(0, -2)[:, kept]) == 4
    assert reached and not offset.any()
    torch.testing.assert_close(call(target, video[:, kept]), call(source, video), rtol=1e-7, atol=1e-7)


def test_folding_rows_into_another_operator():
    source, matrix, offset = CausalConv3d(CHANNELS, OUT), torch.randn(3, CHANNELS), torch.randn(CHANNELS)
    target = FrameConv2d(3, 2)
    init_folded(target, source, matrix, offset, rows=[5, 0])
    weight, bias = folded(source.weight, source.bias, matrix, offset)
    torch.testing.assert_close(target.weight, weight.sum(2)[[5, 0]])
    torch.testing.assert_close(target.bias, bias[[5, 0]])


def test_identity_folds_bit_for_bit():
    torch.set_default_dtype(torch.float32)
    source, target = CausalConv3d(CHANNELS, OUT), CausalConv3d(CHANNELS, OUT)
    few = statistics_of(torch.randn(1, CHANNELS, 1, 2, 2))
    init_folded(target, source, *reconstruction(few, torch.arange(CHANNELS)))
    assert torch.equal(target.weight, source.weight) and torch.equal(target.bias, source.bias)


def test_skip_between_two_choices_of_channels():
    video = low_rank()
    statistics = statistics_of(video)
    kept, out = select(statistics, 3).kept, torch.tensor([2, 7, 8, 9])
    skip = FrameConv2d(3, 4, 1)
    init_map(skip, *reconstruction(statistics, kept, ridge=0.0), rows=out)
    torch.testing.assert_close(call(skip, video[:, kept]), video[:, out], rtol=1e-7, atol=1e-7)


def test_what_does_not_fit():
    dense = CausalConv3d(CHANNELS, OUT)
    with pytest.raises(ValueError, match="10 -> 7 channels and kernel .3, 3, 3. does not fit DepthwiseSeparableConv3d"):
        init_depthwise_separable(DepthwiseSeparableConv3d(CHANNELS, OUT + 1), dense)
    with pytest.raises(ValueError, match="does not fit FrameConv2d of 10 -> 7 and kernel .1, 1."):
        init_frame(FrameConv2d(CHANNELS, OUT, 1), dense)
    with pytest.raises(ValueError, match="does not fit CausalConv3d"):
        init_sliced(CausalConv3d(3, OUT), dense, columns=[1, 2])
    with pytest.raises(ValueError, match="does not fit CausalConv3d"):  # 2D into 3D has no one answer
        init_sliced(CausalConv3d(CHANNELS, OUT), FrameConv2d(CHANNELS, OUT))
    with pytest.raises(ValueError, match="nothing to fill"):
        fill(CausalConv3d(CHANNELS, CHANNELS, groups=CHANNELS), dense.weight, dense.bias)
    with pytest.raises(ValueError, match="no bias"):
        fill(nn.Conv3d(CHANNELS, OUT, 3, bias=False), dense.weight.detach(), dense.bias.detach())
    with pytest.raises(ValueError, match="statistics of 4 channels"):
        init_depthwise_separable(DepthwiseSeparableConv3d(CHANNELS, OUT), dense, ChannelStatistics(4))


def test_half_precision_modules_keep_their_precision():
    dense, student = CausalConv3d(CHANNELS, OUT).bfloat16(), DepthwiseSeparableConv3d(CHANNELS, OUT).bfloat16()
    init_depthwise_separable(student, dense)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad and parameter.grad_fn is None for parameter in student.parameters())
