"""Tars that are broken, hostile, or none: what can be used is used, the rest is named, nothing is unpacked."""

import gzip
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shard_files import add, everything, index, make_films, make_shard, make_shards
from video_files import cut

from datamodules import shards
from datamodules.clips import ClipData
from datamodules.config import ClipDataConfig, SourceConfig, StreamConfig
from datamodules.probe import BadFile, check_readable, file_stamp, inspect_video
from datamodules.quarantine import TooManyBadFiles
from datamodules.shards_tar import Bytes, opened, walk
from experiments.pack_check import check


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[Path]:
    return make_films(tmp_path_factory.mktemp("films"))


@pytest.fixture
def root(tmp_path, films) -> Path:
    return make_shards(tmp_path / "k, 1", films)  # a blank and a comma, over which FFmpeg's subfile must not stumble


def make(path: Path, *members, end: bytes | None = None) -> Path:
    """A tar of (name, data, fields of its header) each."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data, fields in members:
            add(tar, name, data, **fields)
    if end is not None:
        path.write_bytes(path.read_bytes()[: -len(end)] + end)
    return path


def faults(path: Path) -> dict[str, str]:
    with opened(str(path)) as tar:
        return {entry.name: entry.fault for entry in walk(tar)}


def test_hostile_names_and_kinds_are_named_and_not_used(films, tmp_path):
    (tmp_path / "k").mkdir()
    film = films[0].read_bytes()
    members = [
        ("/etc/a.mp4", film, {}), ("../b.mp4", film, {}), ("x/../../c.mp4", film, {}), ("C:\\d.mp4", film, {}),
        ("e\n\x1b[31m.mp4", film, {}), ("n" * 2000 + ".mp4", film, {}), ("x\\..\\f.mp4", film, {}),
        ("link.mp4", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("hard.mp4", b"", {"type": tarfile.LNKTYPE, "linkname": "good.mp4"}),
        ("zero.mp4", b"", {"type": tarfile.CHRTYPE}), ("pipe.mp4", b"", {"type": tarfile.FIFOTYPE}),
        ("empty.mp4", b"", {}), ("folder.mp4", b"", {"type": tarfile.DIRTYPE}), ("./good.mp4", film, {}),
    ]  # fmt: skip
    path = make(tmp_path / "k/0.tar", *members, ("good.mp4", films[1].read_bytes(), {}))
    built = index(tmp_path / "k", tmp_path)
    assert everything(built) == [("k/0.tar/good.mp4", 64, 48, 20, 25)], "the first of its name"
    reasons = {path.rpartition("::")[2]: reason for path, reason in built.bad}
    assert {name.rpartition("/")[2][:8]: reason for name, reason in reasons.items()} == {
        "a.mp4": "an absolute path as name", "C:\\d.mp4": "an absolute path as name",
        "b.mp4": "a name that leads out of its folder", "c.mp4": "a name that leads out of its folder",
        "x\\..\\f.m": "a name that leads out of its folder", "e??[31m.": "a name with control characters",
        "nnnnnnnn": "a name of 2004 characters", "link.mp4": "a symbolic link, not a file",
        "hard.mp4": "a hard link, not a file", "zero.mp4": "a device, not a file", "pipe.mp4": "a pipe, not a file",
        "empty.mp": "empty file", "good.mp4": "a second member of the same name",
    }  # fmt: skip
    assert faults(path)["good.mp4"] == "", "which tars may have twice"
    assert not (tmp_path / "k/good.mp4").exists() and not (tmp_path / "b.mp4").exists()


def test_sparse_members(tmp_path, films):
    """GNU's old form, whose map may go on in further blocks, and the newer ones in PAX headers."""
    film = films[0].read_bytes()
    path = make(tmp_path / "0.tar", ("s.mp4", bytes(512) + film, {"type": tarfile.GNUTYPE_SPARSE}), ("b.mp4", film, {}))
    data = bytearray(path.read_bytes())
    data[482], data[257:265] = 1, b"ustar  \0"  # the map goes on: our first block of data is its second part
    data[148:156] = b" " * 8
    size = len(film)
    data[124:136] = b"%011o\0" % size
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(bytes(data))
    assert faults(path) == {"s.mp4": "a sparse file, which only an unpacked tar has whole", "b.mp4": ""}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "p.mp4", film, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.name": "q.mp4"})
        add(tar, "b.mp4", film)
    assert faults(path) == {"p.mp4": "a sparse file, which only an unpacked tar has whole", "b.mp4": ""}


def test_absurd_sizes_are_refused_before_anything_is_read(tmp_path, films, monkeypatch):
    film = films[0].read_bytes()
    path = tmp_path / "0.tar"
    for size, what in (("9" * 15, "needs"), ("9" * 300, "no usable size"), ("-5", "no usable size")):
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            add(tar, "a.mp4", film)
            add(tar, "b.mp4", film, pax_headers={"size": size})
        assert faults(path)["a.mp4"] == "" and what in faults(path)["b.mp4"]
    asked = []
    real = Bytes.read
    monkeypatch.setattr(Bytes, "read", lambda self, num: asked.append(num) or real(self, num))
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
        make(path, ("a.mp4", film, {}))
        header = tarfile.TarInfo("x")
        header.size, header.type = 2**40, kind
        body = path.read_bytes()[: 512 + -(-len(film) // 512) * 512]
        path.write_bytes(body + header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
        with opened(str(path)) as tar:
            *_, last = walk(tar)
        assert "a header of 1099511627776 bytes" in last.fault and last.last
    assert max(asked) <= 512, "none of them was read"
    built = index(make(path, ("a.mp4", bytes(2**20 + 1), {})), tmp_path, max_member_mb=1)
    assert "more than max_member_mb of its source, 1" in built.bad[0][1]


def test_long_names_and_pax_names(tmp_path, films):
    film, long = films[0].read_bytes(), "d/" * 80 + "näme ünd mehr.mp4"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(tmp_path / "0.tar", "w", format=form) as tar:
            add(tar, "d" if form == tarfile.USTAR_FORMAT else long[:-4], type=tarfile.DIRTYPE)
            add(tar, "d/" * 60 + "x.mp4" if form == tarfile.USTAR_FORMAT else long, film)
            add(tar, "plain.mp4", film)
        with tarfile.open(tmp_path / "0.tar") as tar:
            truth = [(info.name, info.offset_data, info.size) for info in tar if info.isfile()]
        with opened(str(tmp_path / "0.tar")) as tar:
            assert [(entry.name, entry.offset, entry.size) for entry in walk(tar)] == truth


def test_a_shard_that_ends_early(root, films, tmp_path):
    """What comes before is used, the rest is named; wherever it was cut, and whether or not in a member."""
    whole = (root / "001.tar").read_bytes()
    with tarfile.open(root / "001.tar") as tar:
        ends = [info.offset_data + -(-info.size // 512) * 512 for info in tar]
    cases = [
        (ends[3] - 700, 1, "00100001.mp4", "needs"), (ends[2] + 100, 1, "", "without a tar's end mark"),
        (ends[2], 1, "", "without a tar's end mark"), (600, 0, "00100000.mp4", "needs"), (0, 0, "", "empty file"),
        (100, 0, "", "no tar file"),
    ]  # fmt: skip
    for size, num, member, reason in cases:
        (root / "001.tar").write_bytes(whole[:size])
        built = index(root, tmp_path)
        assert [name.split("/")[1] for name, *_ in everything(built)].count("001.tar") == num, size
        assert len(built.bad) == 1 and reason in built.bad[0][1] and member in built.bad[0][0]
        assert ("what comes before it is used" in built.bad[0][1]) == bool(num)
        assert "001.tar" in built.bad[0][0] and len(built) == 4 + num


@pytest.fixture(params=["index.json", "an earlier look"])
def long_shard(request, films, tmp_path) -> tuple[Path, int]:
    """A shard of six clips of which it is known what is in it, and the size of one before its last text."""
    (tmp_path / "k").mkdir()
    path = make_shard(tmp_path / "k/0.tar", {f"{i:05d}": film for i, film in enumerate(films)})
    if request.param == "index.json":
        check(str(path.parent), "video", 2048, True, say=lambda _: None)
    else:
        assert len(index(path.parent, tmp_path / "cache")) == 6
    return path, path.read_bytes().rindex(b"00005.txt")


def test_every_clip_that_a_cut_shard_has_lost_is_counted(long_shard, tmp_path):
    """Wherever it was cut, one after the other, and also when it is asked again: the share of bad clips is that of the shard."""
    (path, text), sizes = long_shard, [0, 100, 600]
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [info.offset_data + -(-info.size // 512) * 512 for info in tar if info.name[-4:] in (".mp4", ".mkv")]
    sizes += np.random.default_rng(0).integers(0, len(whole), 8).tolist() + ends + [text + 40]
    for size in sizes:
        path.write_bytes(whole[:size])
        left = sum(end <= size for end in ends)
        for _ in range(2):  # what was found is kept
            built = index(path.parent, tmp_path / "cache")
            assert (len(built), built.num_bad, built.num_found) == (left, 6 - left, 6), size
            assert len(built.bad) == (left < 6), "one entry stands for all"
        if built.bad:
            assert f"names {6 - left} are lost, from 0000{left}.m" in built.bad[0][1]


def test_the_share_of_bad_clips_is_that_of_clips_and_not_of_shards(long_shard, films, tmp_path):
    path, _ = long_shard
    path.write_bytes(path.read_bytes()[:600])
    for i in range(4):
        (path.parent / f"{i}.mp4").write_bytes(films[i].read_bytes())
    config = ClipDataConfig(
        {"k": SourceConfig(str(path.parent))}, {"s": StreamConfig(["k"], (16, 16), 5)}, cache_dir=str(tmp_path / "cache"),
        max_bad_share=0.5,
    )  # fmt: skip
    with pytest.raises(TooManyBadFiles, match="data.sources.k: 6 of 10 files are unreadable"):
        ClipData(config).streams("train")
    config = replace(config, sources={"k": SourceConfig(str(path.parent), exclude=["0.tar/0000[1-5]*"])})
    assert ClipData(config).streams("train")["s"].dropped["unreadable"] == 1, "what is left out is not missed"


def test_what_nobody_knew_counts_as_one(films, tmp_path):
    """Also when the shard, already cut, was looked at before; and clips that it has besides those in index.json are no loss."""
    path = make_shard(tmp_path / "0.tar", {f"{i:05d}": film for i, film in enumerate(films)})
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) // 4):
        path.write_bytes(whole[:size])
        built = index(path, tmp_path)
        assert built.num_bad == len(built.bad) == 1 and "are lost" not in built.bad[0][1]
    path.write_bytes(whole)
    assert index(path, tmp_path).num_found == 6
    make_shard(path, {"00000": films[0], "00001": films[1]})
    assert index(path, tmp_path).num_found == 2, "a whole shard is what it is, whatever it was"


def test_a_shard_that_shrinks_or_goes_away_while_training(root, tmp_path):
    built = index(root, tmp_path)
    path = built.paths[3]
    cut(root / "001.tar", root / "001.tar", 0.5)
    for use in (shards.openable, shards.open_bytes, check_readable, inspect_video, shards.open_part):
        with pytest.raises(BadFile, match="its shard ends early"):
            use(path)
    (root / "001.tar").unlink()
    with pytest.raises(BadFile, match="its shard cannot be opened: No such file"):
        shards.openable(path)
    with pytest.raises(FileNotFoundError):
        file_stamp(path)
    with pytest.raises(BadFile, match="more than the 4096 that are read into memory"):
        shards.open_bytes(f"{root}/000.tar::512+{2**40}::x.mp4")


def test_what_is_no_tar_says_what_it_is(root, tmp_path):
    for data, reason in (
        (gzip.compress((root / "000.tar").read_bytes()), "compressed with gzip (gunzip it)"),
        (b"BZh91AY" + bytes(600), "compressed with bzip2"),
        (bytes(range(256)) * 4, "no tar file"),
    ):
        (root / "001.tar").write_bytes(data)
        assert reason in index(root, tmp_path).bad[0][1]
    (root / "001.tar").unlink()
    os.rename(root / "002.tar", root / "002.tar.gz")
    assert "002.tar.gz" in index(root, tmp_path).names[2], "what is a tar may be called as it likes"
    damaged = bytearray((root / "000.tar").read_bytes())
    with tarfile.open(root / "000.tar") as tar:
        second = [info.offset for info in tar][1]
    damaged[second + 5] ^= 1
    (root / "000.tar").write_bytes(damaged)
    built = index(root / "000.tar", tmp_path)
    assert len(built) == 1 and f"damaged: no tar header at byte {second}" in built.bad[0][1]
    config = ClipDataConfig(
        {"k": SourceConfig(str(root / "000.tar"))}, {"s": StreamConfig(["k"], (16, 16), 5)}, cache_dir=str(tmp_path)
    )
    with pytest.raises(TooManyBadFiles, match="data.sources.k: 1 of 2 files are unreadable"):
        ClipData(config).streams("train")
