"""The mixture plan: shares, permutations, ranks, resumption. Nothing is read from disk."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from datamodules.config import CropConfig, SourceConfig, StreamConfig
from datamodules.index import build_index
from datamodules.plan import MixturePlan, Position, validation_batches
from datamodules.streams import EmptyStream, Stream


def stream(name: str, num: int, share: float = 1.0, batch_size: int = 1, clips: int = 1, **options) -> Stream:
    source = SourceConfig(kind="procedural", num_videos=num, num_frames=40, size=(32, 32), clips_per_video=clips)
    config = StreamConfig(["s"], (16, 16), 17, share=share, batch_size=batch_size, **options)
    return Stream(name, config, [build_index("s", source)], f"data.train.{name}")


def mixture(world_size: int = 1, batch_size: int = 1, seed: int = 0) -> MixturePlan:
    streams = {"video": stream("video", 13, 0.8, batch_size), "image": stream("image", 7, 0.2, 2 * batch_size)}
    return MixturePlan(streams, seed, world_size)


def take(plan: MixturePlan, num: int, position: Position | None = None, rank: int = 0) -> list:
    return list(islice(plan.batches(position or Position(), rank), num))


def test_a_pure_function_of_seed_and_position():
    assert take(mixture(), 50) == take(mixture(), 50)
    plan, position = mixture(), Position()
    steps = take(plan, 50)
    for _ in range(31):
        plan.advance(position)
    assert mixture().batch_at(position, 0) == steps[31], "asked for directly, without the steps before it"
    assert take(mixture(seed=1), 50) != steps


def test_shares_are_exact_per_hundred_steps():
    plan = MixturePlan({n: stream(n, 5, s) for n, s in zip("abcd", (0.2, 0.4, 0.2, 0.2), strict=True)}, 0)
    names = [plan.stream_at(step) for step in range(400)]
    for block in range(4):
        assert Counter(names[100 * block : 100 * block + 100]) == {"a": 20, "b": 40, "c": 20, "d": 20}
    assert names[:100] != names[100:200], "in another order every time"


def test_shares_finer_than_a_hundredth_are_right_on_average():
    shares = {"a": 1 / 3, "b": 2 / 3 - 0.005, "c": 0.005}
    plan = MixturePlan({name: stream(name, 5, share) for name, share in shares.items()}, 0)
    counts = Counter(plan.stream_at(step) for step in range(20_000))
    for name, share in shares.items():
        assert counts[name] / 20_000 == pytest.approx(share, abs=0.002)


def test_an_epoch_holds_every_clip_once_even_where_a_batch_straddles_two():
    plan = MixturePlan({"v": stream("v", 13, batch_size=3)}, 0, world_size=2)
    names = [r.name for batches in zip(take(plan, 26), take(plan, 26, rank=1), strict=True) for b in batches for r in b]
    assert len(names) == 26 * 6
    epochs = [names[i : i + 13] for i in range(0, len(names), 13)]
    assert all(len(set(epoch)) == 13 for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_see_one_size_and_disjoint_clips(world_size):
    plans = [mixture(world_size) for _ in range(world_size)]
    per_rank = [take(plan, 60, rank=rank) for rank, plan in enumerate(plans)]
    for batches in zip(*per_rank, strict=True):
        assert len({len(batch) for batch in batches}) == 1
        assert len({(r.size, r.num_frames) for batch in batches for r in batch}) == 1
    draws = [(r.name, r.start, r.position) for batches in per_rank for batch in batches for r in batch]
    assert len(set(draws)) == len(draws)


def test_two_ranks_are_one_process_with_twice_the_batch():
    two = zip(*(take(mixture(2, 2), 40, rank=rank) for rank in range(2)), strict=True)
    assert [a + b for a, b in two] == take(mixture(1, 4), 40)


@pytest.mark.parametrize("at", [1, 37, 100, 143])
def test_resuming_equals_going_on(at):
    plan, position = mixture(2), Position()
    for _ in range(at):
        plan.advance(position)
    stored = Position(position.step, dict(position.draws))
    assert take(mixture(2), 20, stored, rank=1) == take(plan, at + 20, rank=1)[at:]


def test_resuming_with_another_number_of_ranks_goes_on_where_it_was():
    two, position = mixture(2), Position()
    for _ in range(30):
        two.advance(position)
    assert sum(position.draws.values()) == 30 * 2 + 2 * sum(two.stream_at(i) == "image" for i in range(30))
    expected = two.batch_at(position, 0) + two.batch_at(position, 1)
    assert mixture(1, 2).batch_at(position, 0) == expected, "no clip is lost, none comes twice"


def test_prefetching_does_not_move_the_position():
    position = Position(3, {"video": 5})
    take(mixture(), 40, position)
    assert position == Position(3, {"video": 5})


def test_windows_of_a_film_start_in_their_own_stretch_and_are_drawn_anew():
    plan = MixturePlan({"v": stream("v", 1, clips=6)}, 0)
    starts = [batch[0].start for batch in take(plan, 240)]
    epochs = [starts[i : i + 6] for i in range(0, 240, 6)]
    for epoch in epochs:
        assert [s * 6 // 24 for s in sorted(epoch)] == [0, 1, 2, 3, 4, 5], "24 starts in 6 stretches"
    assert len({tuple(epoch) for epoch in epochs}) == 40
    assert set(starts) == set(range(24)), "any start may come"
    assert len(stream("v", 1, clips=100)) == 24, "never more clips than starts"


def test_crops_follow_their_probabilities():
    crop = CropConfig(random=0.4, center=0.3, resize=0.3)
    plan = MixturePlan({"v": stream("v", 50, crop=crop)}, 0)
    requests = [batch[0] for batch in take(plan, 3000)]
    counts = Counter(r.crop for r in requests)
    for kind in ("random", "center", "resize"):
        assert counts[kind] / 3000 == pytest.approx(getattr(crop, kind), abs=0.03)
    assert np.std([r.position for r in requests]) == pytest.approx(12**-0.5, abs=0.02)


def test_replacements_are_planned_and_enough():
    plan = MixturePlan({"v": stream("v", 50)}, 0, max_bad_share=0.2)
    assert 0.2**plan.num_alternates <= 1e-9
    assert MixturePlan({"v": stream("v", 50)}, 0, max_bad_share=0.0).num_alternates >= 4


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_validation_clips_are_fixed_and_shared_out_without_padding(world_size, batch_size):
    streams = {"a": stream("a", 4, batch_size=batch_size), "b": stream("b", 3, batch_size=batch_size, clips=2)}
    whole = validation_batches(streams, 0, 1)
    dealt = [validation_batches(streams, rank, world_size) for rank in range(world_size)]
    for name in streams:
        expected = sorted((r.name, r.start) for batch in whole[name] for r in batch)
        assert sorted((r.name, r.start) for part in dealt for batch in part[name] for r in batch) == expected
    assert len({(r.name, r.start) for batch in whole["b"] for r in batch}) == 6
    assert {r.start for r in whole["a"][0]} == {12}, "one window is the middle one of 24"
    totals = [sum(len(batch) for batches in part.values() for batch in batches) for part in dealt]
    assert max(totals) - min(totals) <= 1


def test_a_rank_without_validation_clips_is_refused():
    with pytest.raises(ValueError, match="3 clips for 4 processes"):
        validation_batches({"a": stream("a", 3)}, 0, 4)


def test_num_clips_spreads_over_the_stream():
    few = stream("a", 10, num_clips=3)
    assert len(few) == 3
    assert [few.request(i, None).name for i in range(3)] == ["s/0", "s/4", "s/9"]
    assert len(stream("a", 10, num_clips=99)) == 10


def test_what_does_not_fit_is_counted_and_an_empty_stream_explains_itself():
    index = build_index("s", SourceConfig(kind="procedural", num_videos=4, num_frames=20, size=(32, 48), fps=25.0))
    cases = {
        "4 too small": StreamConfig(["s"], (33, 16)),
        "4 too short": StreamConfig(["s"], (16, 16), 17, extend=(2, 2)),
        "4 below the target frame rate": StreamConfig(["s"], (16, 16), 5, fps=30.0),
    }
    for reason, config in cases.items():
        with pytest.raises(EmptyStream, match=reason) as error:
            Stream("x", config, [index], "data.train.x")
        for part in ("data.train.x", "32x48", "20 to 20 frames", "25 to 25 fps"):
            assert part in str(error.value)
    half = Stream("x", StreamConfig(["s"], (16, 16), 5, fps=12.5), [index], "data.train.x")
    assert [half.request(0, None).start, half._last[0]] == [6, 11], "5 frames at half the rate span 9 of 20"


def test_span_keeps_windows_inside():
    source = SourceConfig(
        kind="procedural", num_videos=1, num_frames=100, size=(32, 32), span=(0.5, 0.9), clips_per_video=99
    )
    late = Stream("x", StreamConfig(["s"], (16, 16), 17), [build_index("s", source)], "data.val.x")
    requests = [late.request(i, np.random.default_rng(i)) for i in range(len(late))]
    assert min(r.start for r in requests) == 50 and max(r.start for r in requests) == 90 - 17
    assert {r.stop for r in requests} == {90}
