"""Folders packed into shards: whole, the same every time, taken up where a kill left them; and shards checked."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest
import webdataset
from conftest import ROOT
from PIL import Image
from shard_files import add, everything, index, make_films, make_shards
from video_files import make_film

from datamodules import shards, shards_index
from datamodules.shards_json import parse_index
from experiments import pack as pack_module
from experiments.compose import ConfigError
from experiments.pack import PackConfig, main, pack, read_options
from experiments.pack_check import check, key_of


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[Path]:
    return make_films(tmp_path_factory.mktemp("films"))


@pytest.fixture
def folder(tmp_path, films) -> Path:
    """Films with what lies beside them, names that clash or have dots, a film that is none."""
    root = tmp_path / "in"
    (root / "sub.d").mkdir(parents=True)
    names = ["a.mp4", "b.x.mp4", "b_x.mp4", "sub.d/c.mp4", "sub.d/d.mp4", "a.mkv"]
    for film, name in zip(films, names, strict=True):
        shutil.copy(film, root / name)
    (root / "a.txt").write_text("a caption")
    (root / "a.json").write_text('{"fps": 1}')
    (root / "b_x.json").write_text("{no json")
    (root / "zero.mp4").write_bytes(b"")
    return root


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix == ".tar"}


def shards_in(out: Path) -> list:
    with open(out / "index.json") as file:
        return list(parse_index(file)[1])


def packed(folder: Path, out: Path, **options) -> list[str]:
    said = []
    pack(PackConfig(str(folder), str(out), **{"shard_mb": 0.01, **options}), said.append)
    return said


def test_what_is_packed_can_be_used(folder, films, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert packed(folder, out) == [f"6 clips in 6 shards in {out}; 2 files left out, see {out / 'skipped.csv'}"]
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"{i:05d}.tar" for i in range(6)),
        "index.json",
        "skipped.csv",
    ]
    rows = (out / "skipped.csv").read_text().splitlines()
    assert len(rows) == 3 and "zero.mp4,empty file" in rows[-1] and "b_x.json,no JSON" in rows[1]
    monkeypatch.setattr(shards_index, "probe", None)
    built = index(out, tmp_path)  # by index.json alone
    keys = [built.names[i].partition(".tar/")[2] for i in range(len(built))]
    assert keys == ["a.mkv", "a-2.mp4", "b_x.mp4", "b_x-2.mp4", "sub_d/c.mp4", "sub_d/d.mp4"]
    assert built.num_frames.tolist() == [25, 20, 21, 22, 23, 24] and set(built.width) == {64}
    origin = [films[i] for i in (5, 0, 1, 2, 3, 4)]
    assert [shards.open_bytes(built.paths[i]).read() for i in range(6)] == [film.read_bytes() for film in origin]


def test_webdataset_reads_what_we_pack(folder, tmp_path):
    packed(folder, tmp_path / "out")
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    samples = {s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False)}
    assert list(samples) == ["a", "a-2", "b_x", "b_x-2", "sub_d/c", "sub_d/d"]
    assert samples["a-2"]["mp4"] == (folder / "a.mp4").read_bytes() and samples["a-2"]["txt"] == b"a caption"
    assert json.loads(samples["a-2"]["json"]) == {"fps": 1} and "json" not in samples["b_x-2"]


def test_the_same_files_make_the_same_bytes(folder, tmp_path):
    packed(folder, tmp_path / "one")
    time.sleep(0.01)
    shutil.copytree(folder, tmp_path / "copy" / "in")  # other times, another place
    packed(tmp_path / "copy" / "in", tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    for data in files_of(tmp_path / "one").values():
        assert len(data) <= 0.01 * 2**20 + 10240, "no larger than asked, but for a tar's own padding"


def test_images_and_lists(tmp_path):
    for i in range(4):
        Image.new("RGB", (20 + i, 16)).save(tmp_path / f"{i}.png")
    (tmp_path / "list.csv").write_text("path\n3.png\n1.png\n../nowhere.png\n")
    packed(tmp_path / "list.csv", tmp_path / "out", kind="image")
    built = index(tmp_path / "out", tmp_path, kind="image")
    assert everything(built) == [("k/00000.tar/3.png", 23, 16, 1, 0), ("k/00000.tar/1.png", 21, 16, 1, 0)]
    assert "cannot be opened" in (tmp_path / "out" / "skipped.csv").read_text()


def test_it_goes_on_after_a_stop(folder, tmp_path, monkeypatch):
    packed(folder, tmp_path / "whole")
    out, real, closed = tmp_path / "out", pack_module._Shard.close, []

    def stop(shard):
        closed.append(shard.path.name)
        if len(closed) == 3:
            raise KeyboardInterrupt
        return real(shard)

    monkeypatch.setattr(pack_module._Shard, "close", stop)
    with pytest.raises(KeyboardInterrupt):
        packed(folder, out)
    assert list(files_of(out)) == ["00000.tar", "00001.tar"] and not (out / "index.json").exists()
    with open(out / pack_module.PROGRESS, "a") as file:
        file.write('{"done": 9')  # as a kill may leave it
    first = (out / "00000.tar").stat().st_mtime_ns
    (folder / "zzz.mp4").write_bytes((folder / "a.mp4").read_bytes())
    with pytest.raises(ConfigError, match="being filled from other files"):
        packed(folder, out)
    (folder / "zzz.mp4").unlink()
    packed(folder, out)
    assert files_of(out) == files_of(tmp_path / "whole") and (out / "00000.tar").stat().st_mtime_ns == first
    assert closed == ["00000.tar", "00001.tar", "00002.tar", "00002.tar", "00003.tar", "00004.tar", "00005.tar"]
    assert (out / "skipped.csv").read_bytes() == (tmp_path / "whole" / "skipped.csv").read_bytes()
    hashes = [[shard.sha256 for shard in shards_in(tmp_path / o)] for o in ("whole", "out")]
    assert hashes[0] == hashes[1] and not [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert packed(folder, out) == [f"{out} is finished; check={out} checks it"]
    with pytest.raises(ConfigError, match="holds shards of other files, or made with other options"):
        packed(folder, out, shard_mb=1)


@pytest.mark.slow
def test_kills_at_any_time(tmp_path):
    """kill -9 at 12 points of the work, each time with the same command again: the same shards as undisturbed."""
    make_film(tmp_path / "film.mp4", 20)
    (tmp_path / "in").mkdir()
    for i in range(600):
        shutil.copy(tmp_path / "film.mp4", tmp_path / "in" / f"{i:04d}.mp4")
    packed(tmp_path / "in", tmp_path / "whole", shard_mb=0.05)
    command = [sys.executable, "-m", "experiments.pack", f"in={tmp_path}/in", f"out={tmp_path}/out", "shard_mb=0.05"]
    kills = 0
    for _ in range(100):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while not (tmp_path / "out" / pack_module.PROGRESS).exists() and process.poll() is None:
            time.sleep(0.005)
        before = len(list((tmp_path / "out").glob("*.tar")))
        while process.poll() is None and len(list((tmp_path / "out").glob("*.tar"))) < before + 4 + kills % 3:
            time.sleep(0.001 * (kills % 4))
        if process.poll() == 0:
            break
        process.kill()
        process.wait()
        kills += 1
    assert kills >= 12 and files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert check(str(tmp_path / "out"), "video", 2048, say=lambda _: None) == []


def test_memory_does_not_grow_with_the_files(tmp_path, monkeypatch):
    """A file of 64 MiB is copied through a few MiB."""
    (tmp_path / "in").mkdir()
    with open(tmp_path / "in" / "a.mp4", "wb") as file:
        file.truncate(64 * 2**20)
    info = shards_index.Info(64, 48, 20, 25.0)
    monkeypatch.setattr(pack_module, "probe", lambda path, kind: info)
    tracemalloc.start()
    packed(tmp_path / "in", tmp_path / "out", shard_mb=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out" / "00000.tar").stat().st_size > 64 * 2**20 and peak < 8 * 2**20


def test_a_full_disk_is_told_and_loses_nothing(folder, tmp_path, monkeypatch):
    real, asked = pack_module._Hashed.write, []

    def full(self, data):
        asked.append(len(data))
        if len(asked) == 12:
            raise OSError(28, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(pack_module._Hashed, "write", full)
    with pytest.raises(ConfigError, match="No space left on device; the shards that are whole stay"):
        packed(folder, tmp_path / "out")
    packed(folder, tmp_path / "out")
    packed(folder, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_options_that_make_no_sense(folder, tmp_path, films):
    def said(*arguments) -> str:
        with pytest.raises(ConfigError) as error:
            main(list(arguments))
        assert "\n" not in str(error.value)
        return str(error.value)

    out = f"out={tmp_path}/out"
    assert "options are accept=, check=, in=" in said("check") and "options are" in said("chek=x")
    assert "in=FOLDER out=DIR packs" in said(f"in={folder}") and "leave out in and out" in said("check=x", out)
    assert "kind" in said(f"in={folder}", out, "kind=audio") and "shard_mb" in said(
        f"in={folder}", out, "shard_mb=many"
    )
    assert "must be positive" in said(f"in={folder}", out, "shard_mb=0") and "goes with check" in said(
        f"in={folder}", out, "accept=true"
    )
    assert "in: " in said(f"in={tmp_path}/no", out) and "does not exist" in said(f"in={tmp_path}/no", out)
    for place in (folder, folder / "packed"):
        assert "lies in the folder that is packed" in said(f"in={folder}", f"out={place}")
    shards_here = make_shards(tmp_path / "k", films)
    assert "there are shards already" in said(f"in={shards_here}", out)
    assert "holds 000.tar already, which this did not make" in said(f"in={folder}", f"out={shards_here}")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("no film")
    assert "none of 1 files can be read" in said(f"in={tmp_path}/bad", out)
    (tmp_path / "file").write_text("no folder")
    for place in ("file", "file/below"):
        assert "cannot be written to" in said(f"in={folder}", f"out={tmp_path}/{place}")
    assert "no shards (.tar)" in said(f"check={folder}") and "is no folder" in said(f"check={tmp_path}/no")
    assert "is on a server" in said("check=https://host/k")
    assert read_options(["check=x", "accept=true"]).accept


# check


def table(folder, accept: bool = False) -> dict[tuple[str, str], str]:
    return {(f.tar, f.member): f.reason for f in check(str(folder), "video", 1, accept, say=lambda _: None)}


def test_check_of_what_was_packed(folder, tmp_path, capsys):
    out = tmp_path / "out"
    packed(folder, out)
    assert main([f"check={out}"]) == 0
    assert capsys.readouterr().out == "6 shards, 6 clips that can be read, 0 faults\n"
    os.utime(out / "00001.tar")
    data = bytearray((out / "00002.tar").read_bytes())
    data[600] ^= 1
    (out / "00002.tar").write_bytes(data)
    (out / "00005.tar").unlink()
    assert main([f"check={out}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["shard", "member", "fault"] and lines[-1].endswith(", 3 faults")
    assert "00001.tar" in lines[1] and "another time" in lines[1] and "accept=true" in lines[1]
    assert "00002.tar" in lines[2] and "sha256 is another" in lines[2]
    assert "00005.tar" in lines[3] and "not in the folder" in lines[3]
    faults = table(out, accept=True)
    assert list(faults) == [("00002.tar", ""), ("00005.tar", "")]
    assert [shard.tar for shard in shards_in(out)] == ["00000.tar", "00001.tar", "00003.tar", "00004.tar"]
    assert table(out) == {("00002.tar", ""): "is not in index.json (accept=true adds it)"}


def test_a_changed_caption_is_other_work(folder, tmp_path):
    packed(folder, tmp_path / "out")
    (folder / "a.txt").write_text("another caption")
    with pytest.raises(ConfigError, match="shards of other files"):
        packed(folder, tmp_path / "out")


def test_check_names_compressed_shards(films, tmp_path):
    root = make_shards(tmp_path / "k", films)
    (root / "003.tar.gz").write_bytes(gzip.compress((root / "000.tar").read_bytes()))
    assert "gzip (gunzip it)" in check(str(root), "video", 1, say=lambda _: None)[0].reason


def test_check_of_shards_from_elsewhere(films, tmp_path, monkeypatch):
    root = make_shards(tmp_path / "k", films)
    assert table(root) == {}
    film = films[0].read_bytes()
    with tarfile.open(root / "003.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "00000000.mp4", film)  # a key of 000.tar
        add(tar, "x.mp4", film)
        add(tar, "y.mp4", film)
        add(tar, "x.json", b"[" * 100_000)
        add(tar, "y.mp4", film)
        add(tar, "../z.mp4", film)
        add(tar, "link", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "w.mp4", b"no film"), add(tar, "v.mp4")
        add(tar, "u.txt", bytes(2**20 + 1))
    whole = (root / "002.tar").read_bytes()
    (root / "002.tar").write_bytes(whole[: len(whole) // 2])
    (root / "004.tar").write_bytes(b"")
    faults = table(root)
    said = {member: reason for (tar, member), reason in faults.items() if tar == "003.tar"}
    assert said.pop("w.mp4").startswith("not a readable video") and said.pop("x.json").startswith(
        ("no JSON", "the members of x")
    )
    assert said == {
        "00000000": "a key that 000.tar has too", "y.mp4": "the members of y do not lie together, so to webdataset they are two",
        "../z.mp4": "a name that leads out of its folder", "link": "a symbolic link, not a file", "v.mp4": "empty file",
        "u.txt": "is 1 MiB, more than max_member_mb",
    }  # fmt: skip
    assert "the shard ends early" in next(reason for (tar, _), reason in faults.items() if tar == "002.tar")
    assert faults["004.tar", ""] == "holds no video"
    usable = everything(index(root, tmp_path / "one"))
    table(root, accept=True)
    looked, real = [], shards_index.probe
    monkeypatch.setattr(shards_index, "probe", lambda path, *rest: looked.append(path) or real(path, *rest))
    assert everything(index(root, tmp_path / "two")) == usable, "as it is without index.json"
    assert {path.partition("::")[0] for path in looked} == {str(root / "002.tar")}, "which is not whole"


def test_an_index_that_is_wrong_is_not_believed(films, tmp_path, caplog):
    root = make_shards(tmp_path / "k", films)
    truth = everything(index(root, tmp_path / "cache"))
    check(str(root), "video", 2048, True, say=lambda _: None)
    text = (root / "index.json").read_text()
    cases = {
        "a member beyond the shard's end": text.replace('"sizes":[', '"sizes":[99999999', 1),
        "must be lists of one length": text.replace('"width":[64,', '"width":[64,64,', 1),
        "a number that is none": text.replace('"offsets":[512', '"offsets":[-512', 1),
        "no shard's description": text.replace('{"tar":"000', '{"x":1,"tar":"000'),
        "its first line": json.dumps(json.loads(text), indent=1),
        "it ends early": text[: text.rindex("\n]}")],
        "Expecting value": text.replace('"fps":[', '"fps":[,', 1),
    }
    for number, (reason, broken) in enumerate(cases.items()):
        caplog.clear()
        (root / "index.json").write_text(broken)
        assert everything(index(root, tmp_path / f"cache{number}")) == truth, reason
        assert "changed since" in caplog.text and reason in caplog.text, reason
        assert any(reason in text for (tar, _), text in table(root).items() if tar == "index.json")
    caplog.clear()
    (root / "index.json").write_text(text)
    os.utime(root / "001.tar")
    assert everything(index(root, tmp_path / "last")) == truth
    assert (
        "describes 1 shards (001.tar, ...) that have another size or time" in caplog.text
        and "accept=true" in caplog.text
    )


def test_odd_names_become_names_that_can_be_read(films, tmp_path):
    root = tmp_path / "in"
    for name in ("a: b.mp4", "\\c.mp4", "x\\..\\y.mp4", "/".join(["d" * 200] * 6) + "/l.mp4", os.fsdecode(b"\xff.mp4")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(films[0], root / name)
    packed(root, tmp_path / "out")
    assert check(str(tmp_path / "out"), "video", 2048, say=lambda _: None) == []
    found = index(tmp_path / "out", tmp_path / "cache")
    assert len(found) == 5 and not found.bad


def test_keys_are_webdatasets():
    for name in ("a/b.c/d.e.f", "x", "x.tar", "a.b/c.mp4"):
        assert key_of(name) == (webdataset.tariterators.base_plus_ext(name)[0] or name)
