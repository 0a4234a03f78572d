"""Channel selection and reconstruction: known answers, exactness and order between the methods. Linear algebra only."""

import pytest
import torch

from decoders.flash_vaed.prune import (
    METHODS,
    LayerRow,
    chip_scores,
    filter_l1,
    kept_count,
    latency_shares,
    r_squared,
    reconstruction,
    report,
    rms_gain,
    select,
)
from decoders.flash_vaed.statistics import ChannelStatistics

CHANNELS = 12


def correlated(seed: int, channels: int = CHANNELS, rank: int = 5, noise: float = 0.3) -> torch.Tensor:
    """Features of a few sources, mixed, with noise, means and sizes that differ by channel."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mixed = torch.einsum("cr,brthw->bcthw", draw(channels, rank), draw(2, rank, 3, 6, 7))
    size, mean = draw(channels).exp(), draw(channels)
    features = mixed + noise * draw(*mixed.shape)
    return features * size[:, None, None, None] + mean[:, None, None, None]


def statistics_of(features: torch.Tensor, **options) -> ChannelStatistics:
    statistics = ChannelStatistics(features.shape[1], **options)
    statistics.update(features)
    return statistics


def as_matrix(features: torch.Tensor) -> torch.Tensor:
    return features.movedim(1, -1).flatten(0, -2).double()


def r2_of_regression(features: torch.Tensor, kept: torch.Tensor) -> float:
    """R^2 by ordinary least squares on the features themselves."""
    matrix = as_matrix(features)
    matrix = matrix - matrix.mean(0)
    fitted = matrix[:, kept] @ torch.linalg.lstsq(matrix[:, kept], matrix, driver="gelsd").solution
    return float(1 - (matrix - fitted).square().sum() / matrix.square().sum())


def test_statistics_are_what_they_say():
    features = correlated(0)
    statistics, matrix = statistics_of(features), as_matrix(features)
    centred = matrix - matrix.mean(0)
    assert statistics.count == len(matrix)
    torch.testing.assert_close(statistics.mean, matrix.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(statistics.gram, centred.T @ centred, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(statistics.mean_square, matrix.square().mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_streamed_equals_one_shot(mean: float):
    features = correlated(1) + mean
    whole, streamed, other = statistics_of(features), ChannelStatistics(CHANNELS), ChannelStatistics(CHANNELS)
    for piece in features[:1].split([1, 2], dim=2):
        streamed.update(piece)
    for piece in features[1:].split(2, dim=3):
        other.update(piece)
    streamed.merge(other)
    streamed.merge(ChannelStatistics(CHANNELS))
    matrix = as_matrix(features)
    centred = matrix - matrix.mean(0)
    for statistics in (whole, streamed):
        assert statistics.count == len(matrix)
        torch.testing.assert_close(statistics.mean, matrix.mean(0), rtol=1e-10, atol=0)
        assert (statistics.gram - centred.T @ centred).norm() <= 1e-10 * (centred.T @ centred).norm()


def test_large_maps_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch):
    features = correlated(2)
    whole = statistics_of(features)
    monkeypatch.setattr("decoders.flash_vaed.statistics._ELEMENTS_PER_CHUNK", 10 * CHANNELS + 3)
    torch.testing.assert_close(statistics_of(features).gram, whole.gram, rtol=1e-11, atol=1e-9)


def test_sampled_positions_are_seeded_and_do_not_depend_on_batching():
    features = correlated(3)
    one = statistics_of(features, positions=50, seed=4)
    two = ChannelStatistics(CHANNELS, positions=50, seed=4)
    for clip in features.split(1):
        two.update(clip)
    assert one.count == two.count == 100
    assert torch.equal(one.gram, two.gram)
    assert not torch.equal(one.gram, statistics_of(features, positions=50, seed=5).gram)
    everything = statistics_of(features, positions=10**6)
    assert torch.equal(everything.gram, statistics_of(features).gram)
    chosen = ChannelStatistics(1, positions=50)._sample(77)
    assert len(chosen.unique()) == 50 and chosen.min() >= 0 and chosen.max() < 77


def test_statistics_survive_a_file(tmp_path):
    statistics = statistics_of(correlated(4))
    statistics.save(tmp_path / "calibration" / "up2.safetensors")
    loaded = ChannelStatistics.load(tmp_path / "calibration" / "up2.safetensors")
    assert loaded.count == statistics.count and loaded.channels == CHANNELS
    assert torch.equal(loaded.gram, statistics.gram) and torch.equal(loaded.mean, statistics.mean)
    with pytest.raises(ValueError, match="not channel statistics"):
        ChannelStatistics.from_tensors({"mean": torch.zeros(3)})


def test_bad_features():
    statistics = ChannelStatistics(CHANNELS)
    with pytest.raises(ValueError, match="12 channels; the features have 5"):
        statistics.update(torch.zeros(1, 5, 2, 2, 2))
    with pytest.raises(ValueError, match="not finite"):
        statistics.update(torch.full((1, CHANNELS, 2, 2, 2), torch.nan))
    assert statistics.count == 0


def test_kept_count():
    assert [kept_count(96, ratio) for ratio in (1, 1 / 2, 1 / 4, 1 / 8)] == [96, 48, 24, 12]
    assert kept_count(10, 0.3) == 3 and kept_count(24, 1 / 24) == 1
    with pytest.raises(ValueError, match=r"no channel of 6.* 1/6 \(0.1667\)"):
        kept_count(6, 1 / 8)
    assert kept_count(6, 0.1667) == 1
    for ratio in (0, -1, 1.5):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            kept_count(6, ratio)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 4, CHANNELS])
def test_selection_is_consistent(method: str, count: int):
    features = correlated(5)
    statistics = statistics_of(features)
    chosen = select(statistics, count, method)
    assert chosen.kept.tolist() == sorted(chosen.order) and len(set(chosen.order)) == count
    assert chosen.r2 == pytest.approx(r2_of_regression(features, chosen.kept), abs=1e-9)
    for m in range(count):  # what was added up while choosing is what a fresh regression finds
        assert chosen.r2_curve[m] == pytest.approx(r_squared(statistics, torch.tensor(chosen.order[: m + 1])), abs=1e-9)
    assert chosen.r2_curve == sorted(chosen.r2_curve)
    assert torch.equal(chosen.kept, select(statistics, count, method).kept)


@pytest.mark.parametrize("method", METHODS)
def test_ratio_one_keeps_everything_in_order(method: str):
    few = statistics_of(correlated(6)[:1, :, :1, :1, :2])  # two positions: nothing has to be estimated
    chosen = select(few, kept_count(CHANNELS, 1), method)
    assert chosen.kept.tolist() == list(range(CHANNELS)) and chosen.r2 == 1.0
    weight, bias = reconstruction(few, chosen.kept)
    assert torch.equal(weight, torch.eye(CHANNELS, dtype=torch.float64)) and not bias.any()
    assert rms_gain(few, chosen.kept) == 1.0


@pytest.mark.parametrize("method", ["greedy", "qr"])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_exact_recovery_of_low_rank(method: str, rank: int):
    features = correlated(7, rank=rank, noise=0.0)
    statistics, matrix = statistics_of(features), as_matrix(features)
    for count in (rank, rank + 2):
        chosen = select(statistics, count, method)
        assert chosen.r2 == pytest.approx(1, abs=1e-8) and chosen.r2_curve[rank - 1] == pytest.approx(1, abs=1e-8)
        weight, bias = reconstruction(statistics, chosen.kept, ridge=0.0)
        torch.testing.assert_close(matrix[:, chosen.kept] @ weight + bias, matrix, rtol=1e-7, atol=1e-7)
        # A ridge loses at most ridge * |W|^2, by its own objective, with kept channels scaled to variance 1.
        bound = 1e-6 * statistics.count * (weight.square() * statistics.variance[chosen.kept, None]).sum()
        weight, bias = reconstruction(statistics, chosen.kept)
        assert (matrix[:, chosen.kept] @ weight + bias - matrix).square().sum() <= bound


def test_the_rest_is_filled_up_by_variance():
    """Rank 1, so that the first channel explains all; dead channels come last, the lower index first."""
    source = torch.randn(1, 1, 2, 4, 4, dtype=torch.float64)
    features = source * torch.tensor([0.0, 1.0, 3.0, 0.0, 2.0], dtype=torch.float64)[:, None, None, None]
    for method in ("greedy", "qr"):
        first, *rest = select(statistics_of(features), 5, method).order
        assert first in (1, 2, 4) and rest == [c for c in (2, 4, 1, 0, 3) if c != first]


def test_channels_that_never_change():
    constant = torch.arange(3.0)[:, None, None, None].expand(1, 3, 2, 4, 4)
    chosen = select(statistics_of(constant), 1)
    assert chosen.kept.tolist() == [0] and chosen.r2 == 1.0 and chosen.r2_curve == [1.0]
    weight, bias = reconstruction(statistics_of(constant), chosen.kept)
    assert weight.isfinite().all() and bias.tolist() == [0.0, 1.0, 2.0]


def r2_of(method: str, statistics: ChannelStatistics, count: int, **options) -> float:
    return select(statistics, count, method, **options).r2


@pytest.mark.parametrize("seed", range(30))
def test_greedy_is_at_least_as_good_as_magnitude_and_random(seed: int):
    """Against magnitude and without exchanges this is no theorem: the mean below is what holds."""
    statistics = statistics_of(correlated(100 + seed, channels=16, rank=6, noise=0.5))
    for count in (1, 2, 4, 8):
        assert r2_of("greedy", statistics, count) >= r2_of("random", statistics, count, seed=seed)
        exchanged = select(statistics, count, swaps=20)
        assert exchanged.r2 >= max(r2_of(method, statistics, count) for method in ("greedy", "qr", "magnitude")) - 1e-12
        assert exchanged.r2_curve[-1] == pytest.approx(exchanged.r2, abs=1e-9)
        for place in range(count):  # and no single exchange is left that would improve on it
            for other in set(range(16)) - set(exchanged.order):
                changed = [*exchanged.order[:place], other, *exchanged.order[place + 1 :]]
                assert r_squared(statistics, torch.tensor(changed)) <= exchanged.r2 + 1e-8


def test_exchanges_among_channels_that_repeat_or_are_dead():
    source = torch.randn(1, 3, 2, 5, 5, dtype=torch.float64)
    features = torch.cat([5 * source[:, :1], 5 * source[:, :1], source, torch.zeros_like(source)], 1)
    for count in (1, 2, 3, 6):
        chosen = select(statistics_of(features), count, swaps=5)
        assert chosen.r2 >= select(statistics_of(features), count).r2 - 1e-12
        assert len(chosen.kept.unique()) == count


def test_greedy_is_better_on_the_whole():
    """Means over features of many kinds, at 1/8, 1/4 and 1/2."""
    kinds = [(channels, rank, noise) for channels in (16, 32) for rank in (4, 8) for noise in (0.1, 0.5)]
    sums = dict.fromkeys(("greedy", "qr", "magnitude", "random"), 0.0)
    for seed, (channels, rank, noise) in enumerate(kinds * 4):
        statistics = statistics_of(correlated(300 + seed, channels, rank, noise))
        for ratio in (1 / 8, 1 / 4, 1 / 2):
            for method in sums:
                sums[method] += r2_of(method, statistics, kept_count(channels, ratio)) / (3 * 4 * len(kinds))
    assert sums["greedy"] > sums["qr"] > sums["magnitude"] > sums["random"], sums


@pytest.mark.parametrize("seed", range(10))
def test_the_first_greedy_channel_is_the_best_one(seed: int):
    statistics = statistics_of(correlated(200 + seed))
    single = [r_squared(statistics, torch.tensor([c])) for c in range(CHANNELS)]
    chosen = select(statistics, 1)
    assert chosen.r2 == pytest.approx(max(single), abs=1e-12) and chosen.kept.item() == single.index(max(single))


def test_greedy_prefers_what_others_depend_on():
    """A large channel of its own loses to one that three others repeat; qr and magnitude take the large one."""
    shared, alone = torch.randn(2, 1, 1, 4, 8, 8, dtype=torch.float64)
    statistics = statistics_of(torch.cat([1.5 * alone, shared, shared, -shared], 1))
    assert select(statistics, 1).kept.item() == 1
    assert select(statistics, 1, "qr").kept.item() == select(statistics, 1, "magnitude").kept.item() == 0


def test_qr_is_column_pivoted_qr():
    features = correlated(8)
    matrix = as_matrix(features)
    residual, expected = matrix - matrix.mean(0), []
    for _ in range(6):
        j = int(residual.square().sum(0).argmax())
        expected.append(j)
        unit = residual[:, j] / residual[:, j].norm()
        residual = residual - torch.outer(unit, unit @ residual)
    assert select(statistics_of(features), 6, "qr").order == expected


def test_magnitude_by_filters():
    statistics, weight = statistics_of(correlated(9)), torch.randn(CHANNELS, 3, 3, 3, 3)
    scores = filter_l1(weight)
    torch.testing.assert_close(scores[2], weight[2].abs().sum())
    chosen = select(statistics, 3, "magnitude", scores=scores)
    assert chosen.order == scores.argsort(descending=True)[:3].tolist()
    with pytest.raises(ValueError, match="swaps are for method 'greedy', not 'qr'"):
        select(statistics, 3, "qr", swaps=1)
    with pytest.raises(ValueError, match="scores are for method 'magnitude'"):
        select(statistics, 3, "greedy", scores=scores)


def test_chip_is_the_nuclear_norm_without_the_channel():
    features = correlated(10)
    matrix = as_matrix(features)
    matrix = matrix - matrix.mean(0)
    full = torch.linalg.matrix_norm(matrix, "nuc")
    expected = [full - torch.linalg.matrix_norm(matrix[:, torch.arange(CHANNELS) != c], "nuc") for c in range(CHANNELS)]
    torch.testing.assert_close(chip_scores(statistics_of(features).gram), torch.stack(expected), rtol=1e-7, atol=1e-7)
    assert (
        select(statistics_of(features), 2, "chip").order == torch.stack(expected).argsort(descending=True)[:2].tolist()
    )


def test_reconstruction_is_least_squares():
    features = correlated(11)
    matrix, kept = as_matrix(features), torch.tensor([1, 4, 9])
    ones = torch.ones(len(matrix), 1, dtype=torch.float64)
    for bias in (True, False):
        known = torch.cat([matrix[:, kept], ones], 1) if bias else matrix[:, kept]
        best = torch.linalg.lstsq(known, matrix).solution
        weight, offset = reconstruction(statistics_of(features), kept, ridge=0.0, bias=bias)
        torch.testing.assert_close(weight, best[:3], rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(offset, best[3] if bias else torch.zeros(CHANNELS).double(), rtol=1e-7, atol=1e-7)
        assert torch.equal(weight[:, kept], torch.eye(3, dtype=torch.float64)) and not offset[kept].any()


def test_ridge_holds_where_kept_channels_repeat():
    source = torch.randn(1, 2, 2, 4, 4, dtype=torch.float64)
    features = torch.cat([source, source[:, :1], source.sum(1, keepdim=True)], 1)
    for ridge in (0.0, 1e-6):
        weight, bias = reconstruction(statistics_of(features), torch.tensor([0, 1, 2]), ridge=ridge)
        torch.testing.assert_close(weight[:, 3], torch.tensor([0.5, 1, 0.5]).double(), rtol=1e-5, atol=1e-5)
        assert bias.abs().max() < 1e-5


def test_rms_gain():
    features = correlated(12)
    kept = torch.tensor([0, 5, 7])
    rms = lambda x: x.square().mean().sqrt()  # noqa: E731
    expected = rms(as_matrix(features)[:, kept]) / rms(as_matrix(features))
    assert rms_gain(statistics_of(features), kept) == pytest.approx(float(expected), rel=1e-12)
    assert rms_gain(statistics_of(torch.zeros(1, 3, 1, 2, 2)), torch.tensor([0])) == 1.0


def test_too_few_positions():
    statistics = statistics_of(correlated(13)[:1, :, :1, :1, :6])
    assert len(select(statistics, 5).kept) == 5
    message = "too few for the rank: 6 positions were gathered and at least 7"
    for method in METHODS:
        with pytest.raises(ValueError, match=message):
            select(statistics, 6, method)
    with pytest.raises(ValueError, match=message):
        reconstruction(statistics, torch.arange(6))


def test_bad_choices():
    statistics = statistics_of(correlated(14))
    with pytest.raises(ValueError, match="no selection method 'gredy'; nearest is 'greedy'"):
        select(statistics, 3, "gredy")
    for count in (0, CHANNELS + 1):
        with pytest.raises(ValueError, match="cannot be kept of 12"):
            select(statistics, count)
    for kept in ([], [1, 1], [0, CHANNELS], [-1]):
        with pytest.raises(ValueError, match="different ones of 0..11"):
            r_squared(statistics, torch.tensor(kept, dtype=torch.long))


def test_report():
    rows = [
        LayerRow("up2.0.conv1", 24, 192, 0.9312, 995_520, 5_208, 8e9, 1e9),
        LayerRow("up3.0.conv1", 12, 96, 0.9, 248_928, 1_308, 2e9, 0.5e9),
    ]
    assert latency_shares(rows) == [(0.8, 0.1), (0.2, 0.05)]
    text = report(rows)
    assert "24/192" in text and "0.9312" in text and "995,520" in text and "1,244,448" in text
    assert text.endswith("predicted speed-up by FLOPs: 6.67 times")
    lines = text.splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1


def test_report_of_measured_times():
    first = LayerRow("a", 1, 2, 1.0, 10, 5, 8e9, 1e9, ms_before=10.0)
    second = LayerRow("b", 1, 2, 1.0, 10, 5, 2e9, 1e9, ms_before=30.0, ms_after=9.0)
    assert latency_shares([first, second]) == [(0.25, 1.25 / 40), (0.75, 9 / 40)]
    assert "by measured times: 3.90 times" in report([first, second])
    with pytest.raises(ValueError, match="beside layers with one: \\['c'\\]"):
        report([first, LayerRow("c", 1, 2, 1.0, 10, 5, 2e9, 1e9)])
    with pytest.raises(ValueError, match="no latency to share"):
        report([])
