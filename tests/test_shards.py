"""Clips in tar shards on disks: found, indexed, read in place; and tars that are broken or hostile."""

import io
import os
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from shard_files import add, everything, index, make_films, make_shard, make_shards
from video_files import decoded, index_of, make_film

from datamodules import shards, shards_index
from datamodules.clips import ClipData
from datamodules.config import ClipDataConfig, SourceConfig, StreamConfig
from datamodules.names import Chain, Names
from datamodules.probe import inspect_video
from datamodules.sources import SourceError, braces, find, find_files, find_some


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[Path]:
    return make_films(tmp_path_factory.mktemp("films"))


@pytest.fixture
def root(tmp_path, films) -> Path:
    return make_shards(tmp_path / "k, 1", films)  # a blank and a comma, over which FFmpeg's subfile must not stumble


def test_shards_by_folder_pattern_glob_and_name(root, films, tmp_path):
    make_film(root / "own.mp4", 30)
    names = [f"{i // 2:03d}.tar/{i // 2:03d}{i % 2:05d}.{'mkv' if i == 5 else 'mp4'}" for i in range(6)]
    built = index(root, tmp_path)
    assert [built.names[i] for i in range(len(built))] == ["k/own.mp4", *(f"k/{name}" for name in names)]
    assert built.num_frames.tolist() == [30, *range(20, 26)], "sizes come from the films, not from KEY.json"
    assert built.width.tolist() == [64] * 7 and built.height.tolist() == [48] * 7 and built.fps.tolist() == [25.0] * 7
    assert built.bad == [] and built.checked.all() and built.num_found == 7
    for path, wanted in (
        (root / "{000..002}.tar", names),
        (root / "*.tar", names),
        (root / "{000,002}.tar", names[:2] + names[4:]),
    ):
        assert [name for name, *_ in everything(index(path, tmp_path))] == [f"k/{name}" for name in wanted]
    assert [name for name, *_ in everything(index(root / "001.tar", tmp_path))] == [f"k/{name}" for name in names[2:4]]
    some = index(root, tmp_path, exclude=["001.tar/*", "*.mkv", "own*"])
    assert [name for name, *_ in everything(some)] == [f"k/{name}" for name in (*names[:2], names[4])]


def test_braces_are_written_out():
    assert braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"] and braces("x.tar") == ["x.tar"]
    assert braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"] and braces("{3..1}") == []


def test_a_member_is_read_as_its_file_is(root, films, tmp_path):
    """By every way in which a path is opened, and as clips with the same frames."""
    import decord

    built = index(root, tmp_path)
    for i, film in enumerate(films):
        path = built.paths[i]
        assert shards.is_member(path) and str(shards.parse(path)) == path
        assert shards.open_bytes(path).read() == film.read_bytes()
        assert inspect_video(path) == inspect_video(str(film))
        np.testing.assert_array_equal(decoded(shards.openable(path)), decoded(film))
        reader = decord.VideoReader(shards.openable(path), ctx=decord.cpu(0), num_threads=1)
        np.testing.assert_array_equal(reader.get_batch(range(len(reader))).asnumpy(), decoded(film))
    plain = str(films[0])
    assert not shards.is_member(plain) and shards.openable(plain) == plain
    assert shards.open_bytes(plain).read() == films[0].read_bytes()


def test_training_on_shards_beside_a_folder(root, films, tmp_path):
    """Every clip once an epoch, over two ranks, from shards and files alike; a resumed run goes on with the next one."""
    make_film(root / "own0.mp4", 30, film=7), make_film(root / "own1.mp4", 30, film=8)
    stream = StreamConfig(["k"], (32, 48), 5, batch_size=2)
    config = ClipDataConfig({"k": SourceConfig(str(root))}, {"s": stream}, num_workers=0, cache_dir=str(tmp_path))

    def ranks(state=None, num=2):
        for rank in range(2):
            data = ClipData(config, seed=1, world_size=2, rank=rank)
            if state is not None:
                data.load_state_dict(state)
            for batch in islice(data.train_dataloader(), num):
                data.batch_consumed()
                yield data, batch

    seen = []
    for data, batch in ranks():
        seen += batch["key"]
        state = data.state_dict()
    files = [key.partition("#")[0] for key in seen]
    assert len(files) == 8 and set(files) == {name for name, *_ in everything(index(root, tmp_path))}
    resumed = [key for data, batch in ranks(state, 2) for key in batch["key"]]
    assert {key.partition("#")[0] for key in resumed} == set(files), "the second epoch"


def test_clips_of_members_have_the_frames_of_the_films(root, films, tmp_path):
    stream = StreamConfig(["k"], (48, 64), 5)
    data = ClipData(
        ClipDataConfig({"k": SourceConfig(str(root))}, {}, {"s": stream}, num_workers=0, cache_dir=str(tmp_path))
    )
    batches = list(data.val_dataloader()[0])
    assert len(batches) == 6
    for i, batch in enumerate(batches):
        start = int(batch["key"][0].partition("#")[2].partition("@")[0])
        assert index_of(batch["video"][0], decoded(films[i])) == list(range(start, start + 5))


def test_images_in_shards(tmp_path, monkeypatch):
    (tmp_path / "k").mkdir()
    with tarfile.open(tmp_path / "k/0.tar", "w") as tar:
        for i, form in enumerate(("png", "jpeg", "webp")):
            data = io.BytesIO()
            Image.fromarray(np.full((30 + i, 40, 3), 40 * i, np.uint8)).save(data, form)
            add(tar, f"{i}.{form}", data.getvalue())
        add(tar, "3.jpg", b"no image")
        add(tar, "._0.png", b"what another system left")
    built = index(tmp_path / "k", tmp_path, kind="image")
    assert everything(built) == [(f"k/0.tar/{i}.{f}", 40, 30 + i, 1, 0) for i, f in enumerate(("png", "jpeg", "webp"))]
    assert [(path.rpartition("::")[2], reason) for path, reason in built.bad] == [
        ("3.jpg", "not a readable image: no known format")
    ]
    part = shards.open_part(built.paths[1])
    part.seek(-2, io.SEEK_END)
    assert part.read() == b"\xff\xd9" and part.read() == b"", "a JPEG's end, and nothing of the next member"
    stream = StreamConfig(["k"], (24, 24), 1)
    config = ClipDataConfig(
        {"k": SourceConfig(str(tmp_path / "k"), "image")},
        {},
        {"s": stream},
        num_workers=0,
        max_bad_share=0.5,
        cache_dir=str(tmp_path),
    )
    pixels = [((b["video"].mean() + 1) * 127.5).round() for b in ClipData(config).val_dataloader()[0]]
    assert [abs(float(mean) - 40 * i) <= 2 for i, mean in enumerate(pixels)] == [True] * 3


def test_what_was_found_is_remembered_shard_by_shard(root, films, tmp_path, monkeypatch):
    looked = []
    real = shards_index.probe
    monkeypatch.setattr(shards_index, "probe", lambda path, *rest: looked.append(path) or real(path, *rest))
    first = everything(index(root, tmp_path))
    assert len(looked) == 6
    assert everything(index(root, tmp_path)) == first and len(looked) == 6
    make_shard(root / "001.tar", {"new": films[0]})
    changed = everything(index(root, tmp_path))
    assert len(looked) == 7, "only the shard that changed"
    assert [name for name, *_ in changed] == [
        *[n for n, *_ in first[:2]],
        "k/001.tar/new.mp4",
        *[n for n, *_ in first[4:]],
    ]
    for store in (tmp_path / "clip_index" / "shards").rglob("*.safetensors"):
        store.write_bytes(store.read_bytes()[:50])
    assert everything(index(root, tmp_path)) == changed and len(looked) == 12, "a broken cache is made anew"
    assert len(index(root, tmp_path, max_member_mb=1)) == 5 and len(looked) == 17, "other limits, another index"


def test_an_index_that_is_stopped_goes_on(root, tmp_path, monkeypatch):
    real, looked = shards_index.probe, []

    def stop(path, *rest):
        looked.append(path)
        if "001.tar" in path:
            raise KeyboardInterrupt
        return real(path, *rest)

    monkeypatch.setattr(shards_index, "probe", stop)
    with pytest.raises(KeyboardInterrupt):
        index(root, tmp_path)
    looked.clear()
    monkeypatch.setattr(shards_index, "probe", lambda path, *rest: looked.append(path) or real(path, *rest))
    assert len(index(root, tmp_path)) == 6
    assert not any("000.tar" in path for path in looked) and len(looked) == 4


def test_webdataset_writes_and_we_read(films, tmp_path):
    (tmp_path / "k").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "k/%05d.tar"), maxcount=2, verbose=0) as writer:
        for i, film in enumerate(films[:5]):
            writer.write({"__key__": f"{i:09d}", "mp4": film.read_bytes(), "txt": "a caption", "json": {"fps": 1}})
    built = index(tmp_path / "k", tmp_path)
    assert built.num_frames.tolist() == [20, 21, 22, 23, 24] and not built.bad
    assert built.names[4] == "k/00002.tar/000000004.mp4"
    assert shards.open_bytes(built.paths[3]).read() == films[3].read_bytes()


def test_wrong_sources_are_told(root, tmp_path):
    def said(path, **options) -> str:
        with pytest.raises(SourceError) as error:
            find("k", SourceConfig(str(path), **options))
        return str(error.value)

    assert "2 of the 5 shards" in said(root / "{000..004}.tar") and "003.tar" in said(root / "{000..004}.tar")
    assert "names no shards" in said(root / "{000..004}.mp4") and "names no shards" in said(root / "{4..000}.tar")
    assert "does not exist" in said(tmp_path / "no/{000..004}.tar")
    assert "shards" in said(root / "{000..002}.tar", kind="latent") and "not latents" in said(
        root / "000.tar", kind="latent"
    )
    assert "is no list of triples" in said(root / "000.tar", kind="triple")
    assert "servers cannot be searched" in said("https://host/*.tar") and "names no shards" in said("https://host/k")
    with pytest.raises(SourceError, match="holds shards, such as .*000.tar, and this needs files: unpack them"):
        find_files("k", SourceConfig(str(root)))
    with pytest.raises(ValueError, match="max_member_mb must be at least 1"):
        SourceConfig("x", max_member_mb=0)


def test_a_list_may_name_members(root, films, tmp_path):
    path = index(root / "000.tar", tmp_path).paths[1]
    (root / "list.csv").write_text(f"path,category\n{path.replace(f'{root}/', '')},cars\n")
    built = index(root / "list.csv", tmp_path)
    assert built.paths[0] == path and built.num_frames.tolist() == [21] and built.categories[0] == "cars"
    assert everything(index(root / "list.csv", tmp_path)) == everything(built)


def test_names_are_lists(tmp_path):
    some = ["", "a", "ünï", os.fsdecode(b"\xff\x00b")]
    names = Names(some)
    again = Names.packed(names.content, names.ends)
    both = Names.joined([names, Names([]), again])
    chain = Chain(names, Names([]), Names(["z"]))
    assert [names[i] for i in range(4)] == some and [both[i] for i in range(8)] == some * 2
    assert [chain[i] for i in range(-5, 5)] == [*some, "z"] * 2 and len(chain) == 5 and names[-1] == some[-1]
    for lists in (names, chain, both):
        with pytest.raises(IndexError):
            lists[len(lists)]


def test_some_files_of_shards_for_a_look(root, tmp_path):
    make_film(root / "own.mp4", 30)
    (root / "001.tar").write_bytes(b"no tar")
    some = find_some("k", SourceConfig(str(root)), 3)
    assert [file.name for file in some.files] == ["k/own.mp4", "k/000.tar/00000000.mp4", "k/002.tar/00200000.mp4"]
    assert some.bad == [(str(root / "001.tar"), "no tar file")] and str(some) == "1 files and 3 shards"
    assert [inspect_video(file.path).num_frames for file in some.files] == [30, 20, 24]
    some = find_some("k", SourceConfig(str(root / "{000,002}.tar")), 100)
    assert len(some.files) == 4 and str(some) == "2 shards" and not some.bad
    assert "kind" in find_some("k", SourceConfig(str(root / "000.tar"), "image"), 3).bad[0][1]
