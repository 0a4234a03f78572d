"""What all frame metrics promise: no bit depends on the batch or on what is kept of the target; names; directions."""

import time

import pytest
import torch

import metrics
from decoders.flashdecoder.model import FlashDecoderConfig, FlashDecoderModel
from metrics.base import TargetCache


def clips(b: int, t: int, h: int, w: int) -> list[torch.Tensor]:
    clip = torch.nn.functional.interpolate(torch.rand(b, 3, t, 5, 7), (t, h, w), mode="trilinear") * 2 - 1
    return [(clip + 0.15 * torch.randn_like(clip)).clamp(-1, 1), clip]


ALL_FRAMES = ["psnr", "psnr_video", "ssim", "lpips_alex", "jump", "flicker", "tlpips_alex", "warp_dis"]


@pytest.mark.parametrize("name", ALL_FRAMES)
def test_batch_size_changes_no_bit(name, request, monkeypatch):
    """Nor do the frames that are computed together, of metrics that look at one pair at a time (to rounding)."""
    weights = request.getfixturevalue("assets") / "lpips" if "lpips" in name else None
    (metric,) = metrics.build([name], weights=weights)
    prediction, target = clips(b=3, t=5, h=40, w=48)
    scores = metric(prediction, target)
    assert scores.shape == (3, 5) and scores.dtype == torch.float32
    assert scores.isnan().all(dim=0).tolist() == [metric.pairs, False, False, False, False]
    parts = [metric(prediction[i], target[i]) for i in ([0, 1], [2])]
    assert torch.equal(torch.cat(parts).nan_to_num(), scores.nan_to_num())
    parts = [metric(prediction[i : i + 1], target[i : i + 1]) for i in range(3)]
    assert torch.equal(torch.cat(parts).nan_to_num(), scores.nan_to_num())
    monkeypatch.setattr("metrics.base._PIXELS_PER_CHUNK", 40 * 48 * 2)
    torch.testing.assert_close(metric(prediction, target), scores, equal_nan=True, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        metric(prediction[:, :, 2:], target[:, :, 2:])[:, 1:], scores[:, 3:], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["lpips_alex", "warp_dis"])
def test_what_is_kept_of_the_target_changes_no_bit(name, request):
    weights = request.getfixturevalue("assets") / "lpips" if "lpips" in name else None
    (metric,), (fresh,) = (metrics.build([name], weights=weights) for _ in range(2))
    prediction, target = clips(b=2, t=3, h=40, w=48)
    counted = count_misses(metric)

    def equals_uncached(one: torch.Tensor, other: torch.Tensor, computed: int) -> None:
        counted.clear()
        fresh.forget()
        assert torch.equal(metric(one, other).nan_to_num(), fresh(one, other).nan_to_num())
        assert len(counted) == computed

    equals_uncached(prediction, target, 2)
    equals_uncached(target.flip(3), target, 0)
    equals_uncached(prediction, target.clone(), 0)  # what counts is what is in it
    target[1, 0, 1, 20, 20] += 1e-3  # in place: the same object is another target
    equals_uncached(prediction, target, 1)
    with torch.inference_mode():
        equals_uncached(prediction * 1, target * 1, 0)
    equals_uncached(prediction[1:], target[1:], 1)
    equals_uncached(prediction[1:].bfloat16(), target[1:].bfloat16(), 1)
    metric.forget()
    equals_uncached(prediction[1:], target[1:], 1)


def count_misses(metric) -> list:
    """A list that grows whenever the metric works on a target."""
    found, get = [], metric._kept.get

    def counting(frames, compute):
        return get(frames, lambda x: (found.append(1), compute(x))[1])

    metric._kept.get = counting
    return found


def test_no_more_is_kept_than_one_batch_and_the_limit():
    kept, calls = TargetCache(limit=3 * 800), []

    def twice(frames):
        calls.append(1)
        return (frames * 2,)

    def batch(*seeds: int) -> None:
        kept.rewind()
        for seed in seeds:
            frames = torch.full((10, 10), float(seed))  # 400 bytes, and what is made of it as much
            assert torch.equal(kept.get(frames, twice)[0], frames * 2)

    batch(1, 2)
    batch(1, 2)
    assert len(calls) == 2 and kept._bytes == 1600
    batch(1, 3)
    assert len(calls) == 3 and kept._bytes == 1600
    batch(4)
    assert kept._bytes == 800  # of batches before, nothing
    batch(1, 2, 3, 4, 5)
    assert kept._bytes == 2400
    calls.clear()
    batch(1, 2, 3, 4, 5)
    assert len(calls) == 2  # beyond the limit it is computed anew
    kept.forget()
    assert kept._bytes == 0 and not kept._entries


def test_names_say_which_way_is_up(assets):
    """Of every column, with or without a suffix, and as the metrics themselves say."""
    own = metrics.build(ALL_FRAMES, weights={"lpips": assets / "lpips"})
    for metric in own:
        assert metrics.higher_is_better(metric.name) == metric.higher_is_better
        assert metrics.higher_is_better(f"{metric.name}_others") == metric.higher_is_better
    assert metrics.higher_is_better("clip_consistency") and metrics.higher_is_better("psnr_video_seam")
    assert not metrics.higher_is_better("fvd_i3d_16f_n120") and not metrics.higher_is_better("fvd_videomae_16f")
    assert not metrics.higher_is_better("warp_raft")
    for unknown in ("psnrs", "fvd_i3d", "decode_fps"):
        with pytest.raises(ValueError, match="no metric has the column"):
            metrics.higher_is_better(unknown)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL_FRAMES)
def test_a_gpu_gives_the_same(name, request):
    weights = request.getfixturevalue("assets") / "lpips" if "lpips" in name else None
    (metric,) = metrics.build([name], weights=weights)
    videos = clips(b=2, t=4, h=40, w=48)
    expected, mask = metric(*videos), torch.ones(2, 1, 4, 40, 48)
    for given in ([*videos], [*videos, mask]):
        found = metric(*(x.cuda() for x in given)).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.slow
def test_measuring_costs_less_than_decoding(assets):
    """PSNR, SSIM and LPIPS of AlexNet on 17 frames of 256 x 256 against FlashDecoder-S, processor seconds, first method."""
    model = FlashDecoderModel(FlashDecoderConfig(depth=12, dim=512, num_heads=8, num_kv_heads=2), 48, 4, 16).eval()
    latent, (prediction, target) = torch.randn(1, 48, 5, 16, 16), clips(1, 17, 256, 256)
    measures = metrics.build(["psnr", "ssim", "lpips_alex"], weights=assets / "lpips")

    def seconds(work) -> float:
        begun = time.process_time()
        work()
        return time.process_time() - begun

    with torch.no_grad():
        decoding = seconds(lambda: model(latent))
    assert seconds(lambda: [metric(prediction, target) for metric in measures]) < decoding
