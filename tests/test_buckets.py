"""Buckets: which film goes to which size and length, how often each comes, one size per step; and resampling."""

import logging
import math
import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback

from datamodules.buckets import BucketsConfig, expand
from datamodules.clips import ClipData
from datamodules.config import ClipDataConfig, SourceConfig, StreamConfig
from datamodules.plan import MixturePlan, Position
from datamodules.streams import EmptyStream
from experiments import show
from experiments.compose import ConfigError
from experiments.config import build_decoder, build_space, load, streams
from experiments.train import train

SIZES = [[480, 832], [832, 480], [640, 640], [720, 1280]]


def listed(folder: Path, films: list[tuple], name: str = "films") -> SourceConfig:
    """A list of (height, width, frames, rate): with those in it no file is opened, so none need be there."""
    rows = [f"{i}.mp4,{w},{h},{t},{fps}" for i, (h, w, t, fps) in enumerate(films)]
    (folder / f"{name}.csv").write_text("\n".join(["path,width,height,num_frames,fps", *rows]))
    return SourceConfig(str(folder / f"{name}.csv"))


def data(folder: Path, films: list[tuple], world_size: int = 1, **options) -> ClipData:
    stream = {"sources": ["films"], "batch_size": 2, "buckets": BucketsConfig(SIZES, [17, 33])} | options
    config = ClipDataConfig({"films": listed(folder, films)}, {"web": StreamConfig(**stream)}, num_workers=0)
    return ClipData(config, world_size=world_size, rank=0)


def places(data: ClipData) -> dict[int, list[str]]:
    """Number of a film -> the buckets that have it."""
    found: dict[int, list[str]] = {}
    for name, stream in data.streams("train").items():
        for i in range(len(stream)):
            film = int(stream.request(i, None).name.removeprefix("films/").removesuffix(".mp4"))
            found.setdefault(film, []).append(name.removeprefix("web/"))
    return found


# ---- which film goes where


def test_films_go_to_the_nearest_shape_that_they_fill(tmp_path):
    films = {
        (480, 854, 40, 25.0): "480x832x33",
        (480, 854, 32, 25.0): "480x832x17",
        (1080, 1920, 33, 25.0): "720x1280x33",  # 720x1280 is as near as 480x832 (3 % apart), and larger
        (720, 1270, 40, 25.0): "480x832x33",  # ten columns short of 720x1280
        (1920, 1080, 17, 25.0): "832x480x17",
        (700, 700, 20, 25.0): "640x640x17",
        (600, 600, 20, 25.0): None,  # nearest is 640x640, which is enlarging; so is 480 of 832
        (600, 900, 20, 25.0): "480x832x17",
        (840, 640, 99, 25.0): "640x640x33",  # 4:3 upright lies nearer to the square than to 832x480
        (1080, 1920, 16, 25.0): None,
    }
    built = data(tmp_path, list(films))
    found = places(built)
    for number, (film, bucket) in enumerate(films.items()):
        assert found.get(number, []) == ([bucket] if bucket else []), film
    counts = built.describe()["train"]["web/480x832x17"]
    assert counts["files_used"] == 2 and counts["files_found"] == 10
    assert counts["dropped"] == {"in another bucket": 6, "too small": 1, "too short": 1}


@pytest.mark.parametrize("lengths", ["longest", "all"])
def test_the_rule_on_random_films(tmp_path, lengths):
    """Against the rule, film by film, in plain Python."""
    rng = random.Random(0)
    films = [
        (rng.randrange(100, 2000), rng.randrange(100, 2000), rng.randrange(1, 90), rng.choice((12.0, 25.0, 30.0)))
        for _ in range(400)
    ]
    sizes, frames = [[256, 256], [256, 448], [512, 512], [448, 256], [720, 1280]], [33, 1, 17]
    fps, tolerance = 12.0, 0.1
    buckets = BucketsConfig(sizes, frames, lengths, tolerance=tolerance)
    found = places(data(tmp_path, films, buckets=buckets, fps=fps))
    for number, (h, w, t, rate) in enumerate(films):
        distance = {(H, W): abs(math.log(h / w) - math.log(H / W)) for H, W in sizes if h >= H and w >= W}
        long = [n for n in frames if math.ceil((n - 1) * rate / fps) + 1 <= t]
        expected = []
        if distance and long:
            near = [size for size, d in distance.items() if d <= min(distance.values()) + tolerance]
            area = max(H * W for H, W in near)
            size = min((size for size in near if size[0] * size[1] == area), key=distance.get)
            expected = [f"{size[0]}x{size[1]}x{n}" for n in frames if n in (long if lengths == "all" else [max(long)])]
        assert found.get(number, []) == expected, (h, w, t, rate)
    assert len(found) > 200 and len({bucket for some in found.values() for bucket in some}) > 8


def test_images_go_to_buckets_of_one_frame(tmp_path):
    (tmp_path / "images.csv").write_text("path,width,height\na.png,900,500\nb.png,500,900\nc.png,90,90\n")
    stream = StreamConfig(["films", "images"], buckets=BucketsConfig([[480, 832], [832, 480]], [1, 17]))
    sources = {"images": SourceConfig(str(tmp_path / "images.csv"), kind="image")}
    sources["films"] = listed(tmp_path, [(480, 832, 20, 25.0), (480, 832, 2, 25.0)])
    made = ClipData(ClipDataConfig(sources, {"mixed": stream})).streams("train")
    names = {bucket: sorted(one.request(i, None).name for i in range(len(one))) for bucket, one in made.items()}
    assert names == {
        "mixed/480x832x1": ["films/1.mp4", "images/a.png"],
        "mixed/832x480x1": ["images/b.png"],
        "mixed/480x832x17": ["films/0.mp4"],
    }
    stream.buckets.num_frames = [9, 17]
    with pytest.raises(ValueError, match="clips of one frame: set num_frames: 1"):
        ClipDataConfig(sources, {"mixed": stream})


def test_buckets_without_a_film_are_named_and_nothing_at_all_is_refused(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        made = data(tmp_path, [(480, 832, 40, 25.0)])
        assert list(made.plan.streams) == ["web/480x832x33"]
    assert "data.train.web: no film for its buckets 480x832x17, 832x480x17" in caplog.text
    with pytest.raises(EmptyStream, match=r"data.train.web/480x832x17: no clip survives.*left out: 1 too short"):
        data(tmp_path, [(480, 832, 16, 25.0)]).streams("train")


# ---- how many clips a step has, and how often a bucket comes


def test_cheaper_buckets_get_more_clips():
    sizes, frames = [[480, 832], [240, 416], [832, 480]], [1, 17, 33]
    stream = StreamConfig(["s"], batch_size=2, buckets=BucketsConfig(sizes, frames, batch_sizes={"832x480x1": 7}))
    batches = {name.removeprefix("/"): one.batch_size for name, one in expand(stream).items()}
    # of 480x832: 33 frames are 9 latent frames, 17 are 5, 1 is 1; 240x416 is a quarter of it
    expected = {"480x832x33": 2, "480x832x17": 3, "480x832x1": 18, "240x416x33": 8, "240x416x17": 14, "240x416x1": 72}
    expected |= {"832x480x33": 2, "832x480x17": 3, "832x480x1": 7}
    assert batches == expected
    stream.buckets.batch = "equal"
    assert {one.batch_size for name, one in expand(stream).items() if name != "/832x480x1"} == {2}
    only_lengths = StreamConfig(["s"], (96, 96), batch_size=1, buckets=BucketsConfig([], [5, 9], stride_t=1))
    assert {name: one.batch_size for name, one in expand(only_lengths).items()} == {"/96x96x5": 1, "/96x96x9": 1}
    plain = StreamConfig(["s"])
    assert expand(plain) == {"": plain}


def test_every_clip_comes_equally_often_and_the_streams_share_is_kept(tmp_path):
    films = [(480, 832, 40, 25.0)] * 30 + [(832, 480, 20, 25.0)] * 12 + [(640, 640, 40, 25.0)] * 3
    other = SourceConfig(kind="procedural", num_videos=5, size=(64, 64))
    config = ClipDataConfig({"films": listed(tmp_path, films), "other": other})
    config.train = {
        "web": StreamConfig(["films"], share=0.7, batch_size=2, buckets=BucketsConfig(SIZES[:3], [17, 33])),
        "plain": StreamConfig(["other"], (32, 32), share=0.3),
    }
    plan = ClipData(config).plan
    assert sum(one.config.share for one in plan.streams.values()) == pytest.approx(1.0)
    steps = Counter(plan.stream_at(step) for step in range(4000))
    for block in range(5):  # the split within the stream does not blur it
        names = [plan.stream_at(step) for step in range(100 * block, 100 * block + 100)]
        assert sum(name.startswith("web/") for name in names) == 70
    clips = {"web/480x832x33": 30, "web/832x480x17": 12, "web/640x640x33": 3}
    times = {name: steps[name] * plan.streams[name].config.batch_size / num for name, num in clips.items()}
    assert plan.streams["web/832x480x17"].config.batch_size == 3
    mean = sum(times.values()) / 3
    for name, each in times.items():
        assert each == pytest.approx(mean, rel=0.02), name


@pytest.mark.parametrize("sampling", ["epoch", "resample"])
def test_one_size_per_step_on_all_ranks_and_any_number_of_them(tmp_path, sampling):
    films = [(480, 832, 40, 25.0)] * 9 + [(832, 480, 20, 25.0)] * 5 + [(640, 640, 40, 25.0)] * 7

    def plan(world_size: int, batch_size: int) -> MixturePlan:
        return data(tmp_path, films, world_size, batch_size=batch_size, sampling=sampling).plan

    four, one, position = plan(4, 1), plan(1, 4), Position()
    for (
        stream
    ) in one.streams.values():  # the rule rounds down: of four times as many clips not always to four times as many
        stream.config.batch_size = 4 * four.streams[stream.name].config.batch_size
        stream.config.share = four.streams[stream.name].config.share
    whole = list(islice(one.batches(Position(), 0), 40))
    sizes = set()
    for step in range(40):
        parts = [four.batch_at(position, rank) for rank in range(4)]
        assert len({(r.size, r.num_frames) for part in parts for r in part}) == 1
        assert len({len(part) for part in parts}) == 1
        assert sum(parts, []) == whole[step]
        sizes.add(parts[0][0].size)
        four.advance(position)
    assert len(sizes) == 3


# ---- resampling


def test_resampling_draws_from_all_clips_with_replacement():
    source = SourceConfig(kind="procedural", num_videos=10, num_frames=40, size=(32, 32))
    stream = StreamConfig(["s"], (16, 16), 5, sampling="resample", batch_size=4)
    plan = ClipData(ClipDataConfig({"s": source}, {"v": stream}), seed=1).plan
    clips = [plan.clip_at("v", draw) for draw in range(5000)]
    counts = Counter(clips)
    assert set(counts) == set(range(10))
    assert sum((n - 500) ** 2 / 500 for n in counts.values()) < 27.9, "chi square of 9, exceeded once in 1000"
    assert any(len(set(clips[i : i + 10])) < 10 for i in range(0, 100, 10)), "no epochs"
    repeats = np.mean([a == b for a, b in zip(clips, clips[1:], strict=False)])
    assert repeats == pytest.approx(0.1, abs=0.02), "independent of the one before"
    again = ClipData(ClipDataConfig({"s": source}, {"v": stream}), seed=1).plan
    assert [again.clip_at("v", draw) for draw in range(4990, 5000)] == clips[-10:], "of the position alone"
    other = ClipData(ClipDataConfig({"s": source}, {"v": stream}), seed=2).plan
    assert [other.clip_at("v", draw) for draw in range(50)] != clips[:50]


# ---- as experiments


def test_checks_see_every_bucket():
    buckets = "data.train.video.buckets={sizes: [[32, 48], [48, 32]], num_frames: [5, 9]}"
    names = [where for where in streams(load("flashdecoder_debug", [buckets])) if where.startswith("data.train")]
    expected = [f"data.train.video/{size}x{t}" for size in ("32x48", "48x32") for t in (5, 9)]
    assert names == [*expected, "data.train.image"]
    with pytest.raises(ConfigError, match=r"data.train.video/32x48x8: .*5 or 9"):
        load("flashdecoder_debug", [buckets, "data.train.video.buckets.num_frames=[5,8]"])
    with pytest.raises(ConfigError, match=r"data.train.video/32x44x5: "):
        load("flashdecoder_debug", [buckets, "data.train.video.buckets.sizes=[[32,44]]"])
    with pytest.raises(ValueError, match=r"data.train.video/32x48x9: nine"):
        ClipData(load("flashdecoder_debug", [buckets]).data, frame_rule=_no_nine)


def _no_nine(t: int, h: int, w: int) -> None:
    if t == 9 and h == 32 and w == 48:
        raise ValueError("nine")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.video.buckets={}", "buckets need sizes"),
        ("data.train.video.buckets={sizes: [[32, 48, 9]]}", r"sizes must be \[height, width\]"),
        ("data.train.video.buckets={sizes: [[32, 48], [32, 48]]}", "an entry twice"),
        ("data.train.video.buckets={num_frames: [0]}", "at least 1"),
        ("data.train.video.buckets={num_frames: [5], batch_sizes: {32x48x9: 2}}", "no bucket '32x48x9', only 32x48x5"),
        ("data.train.video={buckets: {num_frames: [5]}, resize: keep, batch_size: 1, multiple: 8}", "no via, resize: keep"),
        ("data.train.video={buckets: {num_frames: [5]}, num_clips: 3}", "no via, resize: keep or num_clips"),
        ("data.train.video={buckets: {num_frames: [5]}, via: [48, 64]}", "no via"),
        ("data.val.unseen.buckets={num_frames: [5]}", "data.val.unseen: .* are for data.train"),
        ("data.val.unseen.sampling=resample", "data.val.unseen: .* are for data.train"),
        ("data.train.video.buckets.size=[[32, 48]]", "data.train.video.buckets.sizes"),
        ("data.train.video.sampling=replacement", "data.train.video.sampling"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load("flashdecoder_debug", [override])


def test_buckets_need_shares_and_films():
    alternate = ["data.order=alternate", "data.train.video.share=0.5", "data.train.image.share=0.5"]
    with pytest.raises(ConfigError, match="not buckets: set order: shares"):
        load("flashdecoder_debug", [*alternate, "data.train.video.buckets={num_frames: [5]}"])
    saved = SourceConfig("nowhere", kind="latent")
    with pytest.raises(ValueError, match="not for sources of kind latent"):
        ClipDataConfig({"l": saved}, {"v": StreamConfig(["l"], buckets=BucketsConfig([], [5]))})


def test_show_has_a_row_for_each():
    upright = "data.sources.upright={kind: procedural, num_videos: 8, size: [64, 48], num_frames: 7}"
    buckets = (
        "data.train.video={buckets: {sizes: [[32, 48], [48, 32]], num_frames: [5, 9]}, sources: [motion, upright]}"
    )
    experiment = load("flashdecoder_debug", [upright, buckets])
    with torch.device("meta"):
        said = show.stream_table(experiment, build_decoder(experiment, build_space(experiment)))
    rows = {line.split()[0]: re.split(r"  +", line.strip()) for line in said.splitlines() if "  train." in line}
    columns = {name: [row[3], row[5], *row[7:]] for name, row in rows.items()}  # latent, batch, share, clips, files
    # shares of 0.75: 16 clips in steps of 2, 8 in steps of 3
    assert columns["train.video/32x48x9"] == ["3 4 6", "2", "0.5625", "16", "16 of 24, 8 in another bucket"]
    assert columns["train.video/48x32x5"] == ["2 6 4", "3", "0.1875", "8", "8 of 24, 16 in another bucket"]
    assert columns["train.video/48x32x9"] == ["3 6 4", "2", "0", "0", "0 of 24"]
    assert columns["train.image"][2] == "0.25"
    experiment = load("flashdecoder_debug", [upright.replace("kind: procedural", "path: /nowhere"), buckets])
    with torch.device("meta"):
        said = show.stream_table(experiment, build_decoder(experiment, build_space(experiment)))
    assert said.count("  of 0.75  ") == 4 and "data not found: data.sources.upright" in said


class Record(Callback):
    """Which clips were trained on; stops without ceremony after step ``stop``, as a crash would."""

    def __init__(self, stop: int):
        self.stop, self.keys = stop, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.keys.append(batch["key"])
        if trainer.global_step == self.stop:
            raise RuntimeError("stopped here")


def test_training_on_buckets_resumes_exactly(runs_root, monkeypatch):
    """Lying films and shorter upright ones."""
    overrides = [
        "data.sources.upright={kind: procedural, num_videos: 8, size: [64, 48], num_frames: 7, seed: 5}",
        "data.train.image=null", "data.train.video.sources=[motion, upright]", "data.train.video.share=1",
        "data.train.video.buckets={sizes: [[32, 48], [48, 32]], num_frames: [5, 9]}", "trainer.val_every_steps=100",
        "trainer.progress_bar=false", "validation.num_shown=0", "trainer.max_steps=10", "trainer.checkpoint_every_steps=4",
    ]  # fmt: skip
    whole, before, after = Record(stop=9), Record(stop=6), Record(stop=9)
    experiment = load("flashdecoder_debug", overrides)
    with pytest.raises(RuntimeError, match="stopped here"):
        train(experiment, "flashdecoder_debug", overrides, [whole])
    assert {len(keys) for keys in whole.keys} == {2, 3}, "two clips of 9 frames (3 latent ones), three of 5"
    sizes = [{key.split(",")[-1].split("of")[0] for key in keys} for keys in whole.keys]
    assert all(len(some) == 1 for some in sizes) and set.union(*sizes) == {"32x48", "48x32"}
    monkeypatch.setenv("RUNS_ROOT", str(runs_root) + "-stopped")
    for part in (before, after):
        with pytest.raises(RuntimeError, match="stopped here"):
            train(experiment, "flashdecoder_debug", overrides, [part])
    assert before.keys[:4] + after.keys == whole.keys
