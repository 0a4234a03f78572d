"""PSNR, SSIM and what all metrics share; protocols. LPIPS's numbers are in test_lpips.py."""

import json
import math

import jaxtyping
import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

import metrics
from metrics.base import exact_fp32
from metrics.image import Psnr, PsnrVideo, Ssim, decibels
from metrics.protocol import Protocol, clip_list_hash, require_same


@pytest.fixture
def as_in_training():
    """Without the shape checks that only tests have, so that the errors are those a user meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def clips(b: int = 2, t: int = 3, h: int = 20, w: int = 28) -> list[torch.Tensor]:
    clip = torch.nn.functional.interpolate(torch.rand(b, 3, t, 5, 7), (t, h, w), mode="trilinear") * 2 - 1
    return [(clip + 0.15 * torch.randn_like(clip)).clamp(-1, 1), clip]


IMAGE = [Psnr(), Ssim()]


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_psnr_of_a_known_error():
    target = torch.zeros(1, 3, 2, 8, 8)
    prediction = torch.full_like(target, 0.2)
    prediction[:, :, 1] = 0.02
    assert Psnr()(prediction, target).tolist()[0] == pytest.approx([20.0, 40.0], abs=1e-4)  # 20 log10(2 / error)


def test_psnr_of_a_video_is_that_of_its_mean_error():
    target = torch.zeros(1, 3, 2, 8, 8)
    prediction = torch.full_like(target, 0.2)
    prediction[:, :, 1] = 0.02
    frames = PsnrVideo()(prediction, target)[0]
    assert torch.equal(frames, Psnr()(prediction, target)[0])
    assert PsnrVideo().clip_score(frames) == pytest.approx(10 * math.log10(4 / 0.0202), abs=1e-4)
    assert Psnr().clip_score(frames) == pytest.approx(30.0, abs=1e-4)
    prediction, target = clips()
    mse = (prediction[0].double() - target[0]).square().mean()
    assert PsnrVideo().clip_score(PsnrVideo()(prediction, target)[0]) == pytest.approx(decibels(mse).item(), abs=1e-4)


def test_psnr_of_8_bit_images_is_the_usual_one():
    a, b = (np.random.randint(0, 256, (3, 16, 16)) for _ in range(2))
    usual = 10 * math.log10(255**2 / np.mean((a - b) ** 2.0))
    first, second = (torch.tensor(x)[None, :, None] / 127.5 - 1 for x in (a, b))
    assert Psnr()(first, second).item() == pytest.approx(usual, abs=1e-4)


def test_identical_frames_have_the_documented_best_score():
    _, target = clips()
    assert (Psnr()(target, target) == 100).all()
    torch.testing.assert_close(Ssim()(target, target), torch.ones(2, 3))
    assert PsnrVideo().clip_score(PsnrVideo()(target, target)[0]) == pytest.approx(100)


def test_prediction_is_clamped_and_nan_stays_visible():
    _, target = clips()
    white = torch.ones_like(target)
    assert torch.equal(Psnr()(white * 7, target), Psnr()(white, target))
    white[0, 0, 1, 2, 3] = math.nan
    for metric in IMAGE:
        assert metric(white, target).isnan().tolist() == [[False, True, False], [False] * 3]
    assert decibels(torch.tensor(math.nan)).isnan()


def film(mean: float, spread: float, t: int = 2, h: int = 24, w: int = 32) -> torch.Tensor:
    """A smooth clip of this mean and standard deviation, cut to [-1, 1]."""
    clip = torch.nn.functional.interpolate(torch.rand(1, 3, t, 5, 7), (t, h, w), mode="trilinear")
    return ((clip - clip.mean()) / clip.std() * spread + mean).clamp(-1, 1)


def between(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


@pytest.mark.parametrize("side", ["prediction", "target"])
def test_a_mixed_range_is_refused(side):
    """[0, 1] on one side and [-1, 1] on the other: any film that is not nearly white, any decoder of 28 dB and more."""
    for _ in range(100):
        truth = film(between(-0.7, 0.4), between(0.15, 0.6))
        given = (truth + 2 * 10 ** (-between(28, 45) / 20) * torch.randn_like(truth)).clamp(-1, 1)
        pair = [(given + 1) / 2, truth] if side == "prediction" else [given, (truth + 1) / 2]
        with pytest.raises(ValueError, match=f"the {side} of clip 0 looks like RGB in .0, 1."):
            Psnr()(*pair)
    clips = [torch.cat([truth, x]) for x in ((truth + 1) / 2, truth)]
    with pytest.raises(ValueError, match="the prediction of clip 1"):
        Psnr()(*clips)  # one clip of a batch
    mask = torch.ones(2, 1, *truth.shape[2:])
    mask[1, ..., :16] = 0
    clips[0][1, ..., :16] = math.nan  # what does not count may be anything
    with pytest.raises(ValueError, match="the prediction of clip 1"):
        Psnr()(*clips, mask)


def test_a_bad_decoder_is_no_mixed_range():
    """Whatever it does wrong, dark films and nearly white ones among them: a colour, no contrast, nothing below 0, noise."""
    for _ in range(300):
        truth, noise = film(between(-1, 1), between(0, 0.7)), between(0, 0.3)
        rough, mean = noise * torch.randn_like(truth), truth.mean()
        flat = mean + between(0, 1.2) * (truth - mean)  # of less contrast, or more
        for bad in (
            torch.full_like(truth, between(0, 1)), flat + between(-0.1, 0.1) + rough, (flat + rough).clamp(0, 1),
            film(between(0, 1), between(0, 0.5)).clamp(0, 1), (truth + rough).clamp(0, 1),
        ):  # fmt: skip
            assert Psnr()(bad, truth).isfinite().all() and Psnr()(truth, bad.clamp(-1, 1)).isfinite().all()


def test_half_the_contrast_about_white_is_told_by_the_shift():
    """Thin writing on white, half faded: 2 v - 1 is nearer to it, and still it is what a blurred decoder makes."""
    page = torch.ones(1, 3, 1, 40, 40)
    page[..., ::10, ::10] = -1
    faded = page.mean() + (page - page.mean()) / 2
    assert faded.min() > -0.05 and (2 * faded - 1 - page).square().mean() * 20 < (faded - page).square().mean()
    assert Psnr()(faded, page).isfinite().all()


def numpy_ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Wang et al. 2004, equation 13, for one channel in [-1, 1], window by window in float64; the whole map."""
    x = np.arange(11) - 5
    gauss = np.exp(-(x**2) / (2 * 1.5**2))
    window = np.outer(gauss, gauss) / np.outer(gauss, gauss).sum()
    one, two = (np.lib.stride_tricks.sliding_window_view(np.pad(v, 5, mode="reflect"), (11, 11)) for v in (a, b))

    def mean(v):
        return (v * window).sum(axis=(-2, -1))

    mu_a, mu_b = mean(one), mean(two)
    var_a, var_b = (mean((v - m[..., None, None]) ** 2) for v, m in ((one, mu_a), (two, mu_b)))
    cov = mean((one - mu_a[..., None, None]) * (two - mu_b[..., None, None]))
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    return (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))


@pytest.mark.parametrize(("h", "w"), [(20, 28), (64, 37), (6, 6)])
def test_ssim_equals_torchmetrics(h, w):
    """The suite's own separable form of it, which is ten times as fast."""
    for prediction, target in (clips(2, 3, h, w), [torch.ones(1, 3, 1, h, w)] * 2):
        folded = [x.transpose(1, 2).flatten(0, 1) for x in (prediction, target)]
        _, full = structural_similarity_index_measure(
            *folded, sigma=1.5, data_range=2.0, reduction="none", return_full_image=True
        )
        ours = Ssim()(prediction, target).flatten()
        torch.testing.assert_close(ours, full.mean(dim=(1, 2, 3)), rtol=0, atol=1e-6)


def test_ssim_equals_an_independent_computation():
    prediction, target = clips()
    maps = np.array(
        [
            [
                [numpy_ssim(*(v[b, c, t].double().numpy() for v in (prediction, target))) for c in range(3)]
                for t in range(3)
            ]
            for b in range(2)
        ]
    )  # b t 3 h w
    np.testing.assert_allclose(Ssim()(prediction, target).numpy(), maps.mean(axis=(2, 3, 4)), atol=2e-5)
    mask = torch.zeros(2, 1, 3, 20, 28)
    mask[..., 4:15, 6:20] = 1
    replaced = torch.where(mask > 0, prediction, target)
    np.testing.assert_allclose(Ssim()(prediction, target, mask), Ssim()(replaced, target, mask), atol=0)
    maps = np.array([[numpy_ssim(*(v[0, c, 1].double().numpy() for v in (replaced, target))) for c in range(3)]])
    expected = maps.mean(axis=1)[0, 4:15, 6:20].mean()
    assert Ssim()(prediction, target, mask)[0, 1].item() == pytest.approx(expected, abs=2e-5)


# --- what all share ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", IMAGE, ids=lambda m: m.name)
def test_frames_are_scored_alone_and_in_order(metric, monkeypatch):
    prediction, target = clips(b=2, t=5)
    scores, order = metric(prediction, target), torch.tensor([3, 0, 4, 2, 1])
    assert scores.shape == (2, 5) and scores.dtype == torch.float32 and scores.unique().numel() == 10
    torch.testing.assert_close(metric(prediction[:, :, order], target[:, :, order]), scores[:, order])
    torch.testing.assert_close(metric(prediction[1:, :, 2:4], target[1:, :, 2:4]), scores[1:, 2:4])
    assert (metric(prediction[:, :, order], target) < scores)[:, order != torch.arange(5)].all()  # a swap is seen
    monkeypatch.setattr("metrics.base._PIXELS_PER_CHUNK", 20 * 28 * 3)
    torch.testing.assert_close(metric(prediction, target), scores)


@pytest.mark.parametrize("metric", IMAGE, ids=lambda m: m.name)
def test_a_shift_in_space_or_time_costs(metric):
    _, target = clips(t=6)
    assert metric(target.roll(1, -1), target).max() < metric(target, target).min()
    assert metric(target.roll(1, 2), target).max() < metric(target, target).min()


@pytest.mark.parametrize("metric", IMAGE, ids=lambda m: m.name)
def test_what_the_mask_does_not_count_cannot_touch_the_score(metric):
    prediction, target = clips()
    mask = torch.ones(2, 1, 3, 20, 28)
    torch.testing.assert_close(metric(prediction, target, mask), metric(prediction, target))
    mask[..., :9] = 0
    scores = metric(prediction, target, mask)
    prediction[..., :9], target[..., :9] = 0.7, math.nan
    assert metric(prediction, target, mask).isfinite().all()
    if metric.name == "psnr":  # SSIM's windows look at the target across the border
        torch.testing.assert_close(scores, metric(prediction[..., 9:], target[..., 9:]))
        torch.testing.assert_close(metric(prediction, target, mask), scores)
    mask[1, :, 2] = 0
    with pytest.raises(ValueError, match="nothing in frame 2 of clip 1"):
        metric(prediction, target, mask)


def test_metrics_refuse_bad_input(as_in_training):
    prediction, target = clips()
    with pytest.raises(ValueError, match="one shape"):
        Psnr()(prediction[:, :, :1], target)
    with pytest.raises(ValueError, match=r"RGB in \[-1, 1\], got values from 0 to 255"):
        Psnr()(target, torch.linspace(0, 255, target.numel()).view_as(target))
    with pytest.raises(ValueError, match="RGB in"):
        Psnr()(prediction, target * math.nan)
    for metric in (Psnr(), metrics.build(["flicker"])[0]):
        with pytest.raises(ValueError, match="the prediction has values from 0 to 255: not RGB"):
            metric(torch.linspace(0, 255, target.numel()).view_as(target), target)
        with pytest.raises(ValueError, match=r"float RGB in \[-1, 1\], got torch.uint8: divide by 127.5"):
            metric(torch.zeros_like(target, dtype=torch.uint8), target)
    with pytest.raises(ValueError, match="6x6 or more, got 5x28"):
        Ssim()(prediction[..., :5, :], target[..., :5, :])


@pytest.mark.parametrize("metric", IMAGE, ids=lambda m: m.name)
def test_no_gradient_and_exact_float32_under_autocast(metric):
    prediction, target = clips()
    expected = metric(prediction, target)
    prediction.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = metric(prediction, target)
    assert not scores.requires_grad
    torch.testing.assert_close(scores, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_exact_float32_turns_tf32_off_and_back():
    before = torch.backends.cudnn.allow_tf32
    with exact_fp32(torch.device("cuda")):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before
    prediction, target = clips()
    for metric in IMAGE:
        torch.testing.assert_close(
            metric(prediction.cuda(), target.cuda()).cpu(), metric(prediction, target), rtol=1e-5, atol=1e-5
        )


def test_build_by_name():
    assert [metric.name for metric in metrics.build(["ssim", "psnr"])] == ["ssim", "psnr"]
    assert [metric.higher_is_better for metric in metrics.build(["ssim", "psnr"])] == [True, True]
    assert metrics.build([]) == []
    with pytest.raises(ValueError, match="no metric 'lpips_vg'; nearest is 'lpips_vgg'"):
        metrics.build(["psnr", "lpips_vg"])
    with pytest.raises(ValueError, match="nearest is 'fvd_i3d_16f'"):
        metrics.build(["fvd_i3d"])
    with pytest.raises(ValueError, match="listed twice"):
        metrics.build(["psnr", "psnr"])
    with pytest.raises(ValueError, match="no metric has weights 'rafts'; nearest is 'raft'"):
        metrics.build(["psnr"], weights={"rafts": "here"})


def test_lpips_metrics_carry_their_backbone(assets):
    for metric, net in zip(
        metrics.build(["lpips_alex", "lpips_vgg"], weights=assets / "lpips"), ("alex", "vgg"), strict=True
    ):
        assert (
            metric.name == f"lpips_{net}"
            and metric.protocol["backbone"].startswith(net)
            and not metric.higher_is_better
        )
        prediction, target = clips(h=32, w=40)
        scores, mask = metric(prediction, target), torch.ones(2, 1, 3, 32, 40)
        assert scores.shape == (2, 3) and (scores > 0).all() and not metric(target, target).any()
        torch.testing.assert_close(metric(prediction, target, mask), scores)
        mask[..., 20:] = 0
        masked = metric(prediction, target, mask)
        prediction[..., 20:] = -1
        torch.testing.assert_close(metric(prediction, target, mask), masked)


# --- protocols --------------------------------------------------------------------------------------------------------

SETTINGS = {
    "frames": (0, 17), "frame_stride": 1, "size": (256, 256), "resize": "pil bicubic, shorter side, centre crop",
    "clips": clip_list_hash(["a", "b"]), "num_clips": 2, "dtype": "float32",
}  # fmt: skip


def test_protocol_survives_json_and_its_hash_is_stable():
    protocol = Protocol.of(Psnr(), **SETTINGS)
    again = Protocol.from_dict(json.loads(json.dumps(protocol.to_dict())))
    assert again == protocol and again.hash() == protocol.hash() and len(protocol.hash()) == 12
    assert protocol.hash() == "84be086c42e6"  # it is written into results: a change makes old results incomparable


@pytest.mark.parametrize(
    "change",
    [
        {"frames": (0, 9)}, {"frame_stride": 2}, {"size": (256, 320)}, {"resize": "area"}, {"num_clips": 3},
        {"clips": clip_list_hash(["a", "c"])},
    ],
)  # fmt: skip
def test_every_measured_field_makes_another_column_and_is_named(change):
    (name,) = change
    ours, theirs = Protocol.of(Psnr(), **SETTINGS), Protocol.of(Psnr(), **SETTINGS | change)
    assert ours.hash() != theirs.hash()
    with pytest.raises(ValueError, match=f"(?s)one column.*theirs: {name} is"):
        require_same({"ours": ours, "again": ours, "theirs": theirs})


def test_metrics_own_settings_count_too():
    ours = Protocol.of(Psnr(), **SETTINGS)
    other = Protocol(metric="psnr", definition=Psnr().protocol | {"peak": 1.0}, **SETTINGS)
    with pytest.raises(ValueError, match=r"b: definition\.peak is 1\.0, a has 2\.0"):
        require_same({"a": ours, "b": other})
    assert require_same({"a": ours, "b": ours}) == ours


def test_protocols_refuse_nonsense():
    for change in ({"frames": (5, 5)}, {"size": (0, 4)}, {"num_clips": 0}):
        with pytest.raises(ValueError, match="must be"):
            Protocol.of(Psnr(), **SETTINGS | change)
    with pytest.raises(ValueError, match=r"missing \['clips'\], unknown \['clip'\]"):
        values = Protocol.of(Psnr(), **SETTINGS).to_dict()
        Protocol.from_dict({("clip" if key == "clips" else key): value for key, value in values.items()})
    with pytest.raises(ValueError, match="no result"):
        require_same({})


def test_clip_list_hash_knows_the_set_not_the_order():
    assert clip_list_hash(["a", "b"]) == clip_list_hash(["b", "a"]) != clip_list_hash(["a"])
    with pytest.raises(ValueError, match="twice"):
        clip_list_hash(["a", "b", "a"])
