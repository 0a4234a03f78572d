"""Cached latents: moments of the spaces, shards and their damage, which record a draw takes, what a manifest refuses."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from test_latent_spaces_diffusers import MODELS

from datamodules.cached import (
    CachedClip,
    Record,
    ShardWriter,
    cached_latent,
    inspect_shard,
    look_of,
    put_in_place,
    read_record,
    remove_left,
)
from datamodules.clips import ClipData
from datamodules.config import ClipDataConfig, LatentCacheConfig, SourceConfig, StreamConfig
from datamodules.latent_cache import (
    CacheError,
    LatentCache,
    Manifest,
    StreamPart,
    differences,
    load_manifest,
    protocol_of,
    shard_name,
)
from datamodules.plan import MixturePlan
from datamodules.probe import BadFile
from decoders.latent_spaces.dct import DCT, DCTConfig
from decoders.latent_spaces.diffusers import DiffusersVAE, DiffusersVAEConfig
from decoders.latent_spaces.videovaeplus import VideoVAEPlus
from decoders.latent_spaces.wan_mini import WanMini

ABOUT = {"space": "DCT", "fingerprint": "f", "seed": 0}


@pytest.fixture(scope="module")
def wan21(tmp_path_factory) -> DiffusersVAE:
    """A tiny Wan autoencoder in diffusers' format, random weights."""
    import diffusers

    folder = tmp_path_factory.mktemp("wan21")
    torch.manual_seed(0)
    name, arguments = MODELS["wan21"]
    getattr(diffusers, name)(**arguments).save_pretrained(folder)
    return DiffusersVAE(DiffusersVAEConfig(str(folder)))


# ---- the spaces


@pytest.mark.parametrize("name", ["wan_mini", "wan21"])
def test_moments_are_what_encode_draws_from(name, request):
    space = WanMini() if name == "wan_mini" else request.getfixturevalue("wan21")
    video = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    mean, log_variance = space.moments(video)
    assert torch.equal(mean, space.encode(video)) and mean.shape == log_variance.shape
    drawn = space.encode(video, sample=True, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    noise = torch.cat([torch.randn(clip.shape, generator=generator) for clip in mean.split(1)])
    torch.testing.assert_close(mean + (0.5 * log_variance).exp() * noise, drawn, atol=2e-5, rtol=1e-5)
    assert (drawn - mean).abs().max() > 1e-3


def test_spaces_without_one_gaussian_say_so():
    space, video = DCT(DCTConfig(12, 4, 8)), torch.rand(1, 3, 5, 16, 16)
    mean, log_variance = space.moments(video)
    assert log_variance is None and torch.equal(mean, space.encode(video))
    assert DCT.gaussian and not VideoVAEPlus.gaussian
    with pytest.raises(ValueError, match="nearest"):
        space.moments(video[:, :, :4])


# ---- shards


def records(num: int = 3, variance: bool = True) -> tuple[list[Record], list[torch.Tensor]]:
    videos = [torch.rand(3, 5, 16, 16) * 2 - 1 for _ in range(num)]
    shapes = [(2, 2, 2, 2 + i) for i in range(num)]  # clips of resize: keep have sizes of their own
    some = [
        Record(
            f"films/a{i}é.mp4#{i}@0,0,16x16of16x16", torch.randn(s), torch.randn(s) if variance else None, look_of(v)
        )
        for i, (s, v) in enumerate(zip(shapes, videos, strict=True))
    ]
    return some, videos


def written(path: Path, some: list[Record], dtype: type = np.float32, bad: tuple = ()) -> str:
    writer = ShardWriter(dtype)
    for record in some:
        writer.add(record)
    for one in bad:
        writer.add_bad(*one)
    writer.write(path, "s")
    return str(path)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 0.0), (np.float16, 2e-3)])
def test_records_come_back(tmp_path, dtype, tolerance):
    some, videos = records()
    shard = written(tmp_path / "a" / "0.safetensors", some, dtype)
    for row, (record, video) in enumerate(zip(some, videos, strict=True)):
        back = read_record(shard, row)
        assert back.key == record.key and torch.equal(back.look, record.look)
        for one, two in ((back.mean, record.mean), (back.log_variance, record.log_variance)):
            torch.testing.assert_close(one, two, atol=tolerance, rtol=0)
        latent = cached_latent(CachedClip(shard, row), record.key, video)
        assert latent.dtype == torch.float32 and torch.equal(latent, back.mean)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["0.safetensors"]


def test_a_draw_is_of_the_posterior_and_repeats(tmp_path):
    some, videos = records(1)
    some[0] = Record(some[0].key, some[0].mean, torch.full_like(some[0].mean, np.log(0.25)), some[0].look)
    shard = written(tmp_path / "0.safetensors", some)
    draws = torch.stack([cached_latent(CachedClip(shard, 0, seed), some[0].key, videos[0]) for seed in range(400)])
    assert torch.equal(draws[3], cached_latent(CachedClip(shard, 0, 3), some[0].key, videos[0]))
    torch.testing.assert_close(draws.mean(0), some[0].mean, atol=0.12, rtol=0)
    torch.testing.assert_close(draws.std(0), torch.full_like(some[0].mean, 0.5), atol=0.1, rtol=0)
    flat, frames = records(1, variance=False)
    shard = written(tmp_path / "1.safetensors", flat)
    assert torch.equal(cached_latent(CachedClip(shard, 0, 5), flat[0].key, frames[0]), flat[0].mean)


def test_pixels_of_another_window_or_film_are_refused(tmp_path):
    some, videos = records(2)
    shard = written(tmp_path / "0.safetensors", some)
    with pytest.raises(BadFile, match="record 0 is of films/a0"):
        cached_latent(CachedClip(shard, 0), some[1].key, videos[0])
    with pytest.raises(BadFile, match="not those that were encoded"):
        cached_latent(CachedClip(shard, 0), some[0].key, (videos[0] + 0.05).clamp(-1, 1))
    nearly = videos[0] + 0.008 * torch.sign(torch.randn_like(videos[0]))  # a grey level, as decoders differ
    cached_latent(CachedClip(shard, 0), some[0].key, nearly)


def test_damage_is_found(tmp_path):
    some, _ = records(2)
    good = Path(written(tmp_path / "0.safetensors", some, bad=[("/films/b.mp4", "empty file")]))
    with pytest.raises(BadFile, match="to be cached: empty file") as caught:
        read_record(str(good), 2)
    assert caught.value.path == "/films/b.mp4"
    with pytest.raises(BadFile, match="has 3 records, and number 3"):
        read_record(str(good), 3)
    places = inspect_shard(str(good))
    data = good.read_bytes()

    def changed(name: str, at: int, to: bytes) -> str:
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data[:at] + to + data[at + len(to) :])
        return str(path)

    with pytest.raises(BadFile, match="checksum"):
        read_record(changed("value", places["values"].begin + 4, b"\x01"), 0)
    with pytest.raises(BadFile, match="beyond its values"):
        read_record(changed("table", places["table"].begin, (10**9).to_bytes(8, "little")), 0)
    for name, side in {"none": 0, "huge": 2**62}.items():
        with pytest.raises(BadFile, match="damaged: its size"):
            read_record(changed(f"side-{name}", places["table"].begin + 8, side.to_bytes(8, "little")), 0)
    (tmp_path / "cut.safetensors").write_bytes(data[:-5])
    with pytest.raises(BadFile, match="its header says"):
        read_record(str(tmp_path / "cut.safetensors"), 0)
    for name, content in {
        "empty": b"",
        "text": b"hello, this is text",
        "huge": (2**60).to_bytes(8, "little") * 3,
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadFile, match="no shard of cached latents"):
            read_record(str(tmp_path / name), 0)
    with pytest.raises(BadFile, match="cannot be read: No such file"):
        read_record(str(tmp_path / "absent"), 0)


def test_many_writers_of_one_file_leave_it_whole_and_what_killed_ones_left_is_removed(tmp_path):
    with ThreadPoolExecutor(8) as pool:  # as processes that begin, or finish, a cache together
        list(pool.map(lambda i: put_in_place(tmp_path / "a" / "m.json", bytes([i]) * 100_000), range(40)))
    assert len(set((tmp_path / "a" / "m.json").read_bytes())) == 1
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["m.json"]
    old, new = tmp_path / "a" / ".v.safetensors.0.tmp", tmp_path / ".m.json.1.tmp"
    old.write_bytes(b"x"), new.write_bytes(b"x")
    os.utime(old, (0, 0))
    remove_left(tmp_path)
    assert new.exists() and not old.exists(), "somebody may still write to it"


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    some, _ = records(1)
    with pytest.raises(ValueError, match="not finite as float16"):
        ShardWriter(np.float16).add(Record("k", some[0].mean * 1e6, None, some[0].look))


# ---- which record


def plan(views: int, sampling: str = "epoch", clips: int = 7) -> MixturePlan:
    config = ClipDataConfig(
        sources={"drawn": SourceConfig(kind="procedural", num_videos=clips, size=(32, 32))},
        train={"s": StreamConfig(["drawn"], (16, 16), 5, batch_size=2, sampling=sampling)},
    )
    data = ClipData(config, seed=3)
    data.plan.cache = FakeCache(views)
    return data.plan


class FakeCache(LatentCache):
    """Of all streams, without files."""

    def __init__(self, views: int):
        self.views, self.sample, self.seed, self.folder = views, True, 0, Path("/cache")
        self._parts = {"s": StreamPart({}, 7, 3)}


def test_the_first_epochs_take_their_own_records_and_later_ones_repeat_them():
    made = plan(views=2)
    plain = ClipData(
        ClipDataConfig(
            sources={"drawn": SourceConfig(kind="procedural", num_videos=7, size=(32, 32))},
            train={"s": StreamConfig(["drawn"], (16, 16), 5, batch_size=2)},
        ),
        seed=3,
    ).plan
    for draw in range(14):
        one, two = made.request_at("s", draw), plain.request_at("s", draw)
        assert (one.name, one.start, one.position) == (two.name, two.start, two.position)
        assert (one.cached.shard, one.cached.row) == (
            f"/cache/{shard_name('s', draw // 7, draw % 7 // 3)}",
            draw % 7 % 3,
        )
        assert one.alternates and all(other.cached is not None for other in one.alternates)
    for epoch in range(2, 6):
        taken = [made.record_at("s", draw) for draw in range(7 * epoch, 7 * epoch + 7)]
        assert sorted(record for record, _ in taken) == list(range(7 * (epoch % 2), 7 * (epoch % 2) + 7))
        assert [clip for _, clip in taken] == [made.clip_at("s", draw) for draw in range(7 * epoch, 7 * epoch + 7)]
        for record, clip in taken:
            assert made.clip_at("s", record) == clip
    orders = {tuple(made.record_at("s", 7 * epoch + i)[0] for i in range(7)) for epoch in (0, 2, 4)}
    assert len(orders) == 3, "later epochs have orders of their own"
    seeds = {made.request_at("s", draw).cached.seed for draw in range(28)}
    assert len(seeds) == 28, "every draw from the posterior is another"


def test_resampled_streams_take_records_too():
    made = plan(views=2, sampling="resample")
    for draw in range(60):
        record, clip = made.record_at("s", draw)
        assert made.clip_at("s", record) == clip and (record == draw if draw < 14 else record < 14)


# ---- the manifest


def data_of(folder: Path | None = None, **stream) -> ClipData:
    options = {"size": (16, 16), "num_frames": 5, "batch_size": 2} | stream
    config = ClipDataConfig(
        sources={"drawn": SourceConfig(kind="procedural", num_videos=7, size=(32, 32))},
        train={"s": StreamConfig(["drawn"], **options)},
        num_workers=0,
        latent_cache=LatentCacheConfig(str(folder) if folder else None),
    )
    return ClipData(config, seed=3)


def cache_for(folder: Path, data: ClipData, views: int = 1) -> Manifest:
    """A cache of that data with tiny latents, three records a file."""
    stream = data.streams("train")["s"]
    manifest = Manifest(ABOUT, "float32", views, {"s": StreamPart(protocol_of(stream), len(stream), 3)})
    for shard in manifest.shards():
        writer = ShardWriter(np.float32)
        for draw in range(shard.first, shard.first + shard.num):
            sample = data_reader(data, draw)
            writer.add(
                Record(sample.key, torch.full((1, 2, 2, 2), float(draw)), None, look_of(sample.tensors["video"]))
            )
        writer.write(folder / shard.name)
    manifest.sizes = {shard.name: (folder / shard.name).stat().st_size for shard in manifest.shards()}
    manifest.save(folder)
    return manifest


def data_reader(data: ClipData, draw: int):
    from datamodules.reader import ClipReader

    return ClipReader().read(data.plan.request_at("s", draw))


def test_a_loader_hands_out_the_records_of_its_clips(tmp_path):
    cache_for(tmp_path, data_of(), views=2)
    data = data_of(tmp_path)
    with pytest.raises(CacheError, match="nobody has checked"):
        data.train_dataloader()
    data.use_cache(ABOUT, "make it")
    loader = iter(data.train_dataloader())
    first = [next(loader) for _ in range(7)]
    assert torch.equal(torch.cat([batch["latent"][:, 0, 0, 0, 0] for batch in first]), torch.arange(14.0))
    plain = iter(data_of().train_dataloader())
    for batch in first:
        other = next(plain)
        assert batch["key"] == other["key"] and torch.equal(batch["video"], other["video"]) and "latent" not in other
    third = torch.cat([next(loader)["latent"][:, 0, 0, 0, 0] for _ in range(3)])
    assert set(third.tolist()) < set(range(7))


def test_what_a_cache_must_agree_with(tmp_path):
    cache_for(tmp_path, data_of())
    streams = data_of().streams("train")

    def opened(some=streams, about=ABOUT, folder=tmp_path):
        return LatentCache(folder, some, about, 0, False, "make cache-latents exp=x")

    assert "s" in opened() and opened(data_of(share=1.0, batch_size=5).streams("train")).views == 1
    with pytest.raises(CacheError, match=r"about.fingerprint: \"f\" -> \"g\"(.|\n)*make cache-latents exp=x"):
        opened(about=ABOUT | {"fingerprint": "g"})
    (tmp_path / "twice").mkdir(), (tmp_path / "twice-2").mkdir()
    cache_for(tmp_path / "twice", data_of())
    with pytest.raises(CacheError, match=r"make out=\S*/twice-3 'x=1'$"):
        LatentCache(tmp_path / "twice", streams, {"seed": 1}, 0, False, f"make out={tmp_path}/twice 'x=1'")
    with pytest.raises(CacheError, match=r"streams.s.config.size: \[16, 16\] -> \[16, 24\]"):
        opened(data_of(size=(16, 24)).streams("train"))
    with pytest.raises(CacheError, match=r"config.fps: \(default\) -> 12"):
        opened(data_of(fps=12.0).streams("train"))
    with pytest.raises(CacheError, match="there are no cached latents in (.|\n)*make cache-latents"):
        opened(folder=tmp_path / "other")
    with pytest.raises(CacheError, match="no latents of data.train.t; it has s"):
        opened({"t": streams["s"]})
    assert (
        differences(
            {"about": {}, "streams": {"s": {"a": 1}, "more": {"b": 2}}}, {"about": {}, "streams": {"s": {"a": 1}}}
        )
        == []
    )


def test_files_that_came_or_went_are_other_clips(tmp_path):
    protocols = []
    for num in (7, 8):
        config = ClipDataConfig(
            sources={"drawn": SourceConfig(kind="procedural", num_videos=num, size=(32, 32))},
            train={"s": StreamConfig(["drawn"], (16, 16), 5, num_clips=7)},
        )
        protocols.append(protocol_of(ClipData(config).streams("train")["s"]))
    assert protocols[0]["films"] != protocols[1]["films"] and protocols[0]["clips"] == protocols[1]["clips"]


def test_missing_and_damaged_files_are_told_at_the_start(tmp_path):
    manifest = cache_for(tmp_path, data_of(), views=2)
    streams = data_of().streams("train")
    shards = [tmp_path / shard.name for shard in manifest.shards()]
    shards[1].unlink()
    shards[4].write_bytes(shards[4].read_bytes()[:-1])
    with pytest.raises(CacheError, match=r"lacks 6 of 14 latents \(2 of 6 files(.|\n)*make it"):
        LatentCache(tmp_path, streams, ABOUT, 0, False, "make it")
    for text, told in (
        ("{", "no manifest"),
        ('{"format": 9}', "another version"),
        ('{"format": 1, "views": 0}', "no manifest"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(CacheError, match=told):
            load_manifest(tmp_path)


def test_a_record_that_rots_after_the_start_is_replaced(tmp_path):
    manifest = cache_for(tmp_path, data_of())
    data = data_of(tmp_path)
    data.config.max_bad_share = 0.5
    data.use_cache(ABOUT, "make it")
    rotten = tmp_path / manifest.shards()[0].name
    stamp = rotten.stat()
    content = bytearray(rotten.read_bytes())
    place = inspect_shard(str(rotten))["values"].begin
    content[place : place + 8] = b"\xff" * 8  # of the first record
    rotten.write_bytes(content)
    os.utime(rotten, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    batch = next(iter(data.train_dataloader()))
    drawn = batch["latent"][:, 0, 0, 0, 0].tolist()
    assert drawn[0] != 0.0 and drawn[1] == 1.0
    sample = data_reader(data_of(), int(drawn[0]))
    assert batch["key"][0] == sample.key and torch.equal(batch["video"][0], sample.tensors["video"])
    assert [(entry["path"], entry["count"]) for entry in data.quarantine.entries] == [(str(rotten), 1)]


def test_names_of_streams_become_names_of_folders():
    assert shard_name("video_480p", 0, 12) == "video_480p/view000-00012.safetensors"
    names = [shard_name(name, 0, 0) for name in ("video/480x832", "video_480x832", "../up")]
    assert len(set(names)) == 3 and all(name.count("/") == 1 and not name.startswith(".") for name in names)


def test_a_manifest_comes_back(tmp_path):
    manifest = cache_for(tmp_path, data_of())
    assert load_manifest(tmp_path) == manifest and json.loads((tmp_path / "manifest.json").read_text())["format"] == 1
