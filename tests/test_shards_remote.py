"""Shards on servers: one pass to index them, one range request a clip; servers that fail, and what is then said."""

import io
import os
import tarfile
import time
from itertools import islice
from pathlib import Path

import fsspec
import pytest
from shard_files import Served, add, everything, index, make_films, make_shards, served

from datamodules import remote, shards, shards_cache, shards_index
from datamodules.clips import ClipData
from datamodules.config import ClipDataConfig, SourceConfig, StreamConfig
from datamodules.faults import BadFile, Unreachable
from datamodules.probe import inspect_video
from experiments.pack import PackConfig, pack


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[Path]:
    return make_films(tmp_path_factory.mktemp("films"))


@pytest.fixture
def server(tmp_path, films, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.001, 0.002))
    make_shards(tmp_path / "served", films)
    with served(tmp_path / "served") as running:
        yield running


def pattern(server: Served) -> str:
    return server.url + "/{000..002}.tar"


def test_an_index_is_one_pass_and_is_remembered(server, tmp_path, monkeypatch):
    built = index(pattern(server), tmp_path)
    local = index(tmp_path / "served", tmp_path)
    assert everything(built) == everything(local) and not built.bad
    assert [server.requests(f"00{i}.tar") for i in range(3)] == [["bytes=0-0", None]] * 3
    assert everything(index(pattern(server), tmp_path)) == everything(built)
    assert len(server.requests("000.tar")) == 2, "nothing is asked again within minutes"
    monkeypatch.setattr(shards_cache, "STAMPS_HOLD_S", 0)
    assert everything(index(pattern(server), tmp_path)) == everything(built)
    assert server.requests("000.tar")[2:] == ["bytes=0-0"], "later whether it is the same shard still, and no more"
    os.utime(tmp_path / "served" / "001.tar")
    index(pattern(server), tmp_path)
    assert [server.requests(f"00{i}.tar")[3:] for i in range(3)] == [["bytes=0-0"], ["bytes=0-0", None], ["bytes=0-0"]]


def test_an_epoch_is_one_range_request_a_clip(server, tmp_path, films):
    stream = StreamConfig(["k"], (32, 48), 5)
    built = index(pattern(server), tmp_path)
    config = ClipDataConfig({"k": SourceConfig(pattern(server))}, {"s": stream}, num_workers=0, cache_dir=str(tmp_path))
    server.log.clear()
    data = ClipData(config)
    keys = [batch["key"][0] for batch in islice(data.train_dataloader(), 6)]
    assert {key.partition("#")[0] for key in keys} == {name for name, *_ in everything(built)}
    wanted = [shards.parse(path) for path in (built.paths[i] for i in range(6))]
    asked = [given for _, given in server.log]
    assert sorted(asked) == sorted(f"bytes={m.offset}-{m.offset + m.size - 1}" for m in wanted), (
        "decoding and the second opinion share it"
    )


def test_our_index_beside_shards_saves_the_pass(tmp_path, films, monkeypatch):
    pack(PackConfig(str(films[0].parent), str(tmp_path / "packed"), shard_mb=0.02), print)
    num = len(list((tmp_path / "packed").glob("*.tar")))
    assert num > 1
    monkeypatch.setattr(shards_index, "probe", None)  # nobody looks into a film
    with served(tmp_path / "packed") as server:
        url = f"{server.url}/{{00000..{num - 1:05d}}}.tar"
        built = index(url, tmp_path)
        assert everything(built) == everything(index(tmp_path / "packed", tmp_path)) and len(built) == 6
        assert sorted(server.log) == sorted(
            [("/index.json", None), *((f"/{i:05d}.tar", "bytes=0-0") for i in range(num))]
        )
        assert [shards.open_bytes(built.paths[i]).read() for i in range(6)] == [film.read_bytes() for film in films]


def test_a_server_that_stumbles_is_asked_again(server, tmp_path, films):
    whole = everything(index(tmp_path / "served", tmp_path))
    server.broken = 2
    built = index(pattern(server), tmp_path)
    assert everything(built) == whole and not built.bad, "a connection that breaks is no shard that ends early"
    server.busy, server.broken = 2, 1
    path = built.paths[3]
    assert shards.open_bytes(path).read() == films[3].read_bytes()
    assert len(server.requests("001.tar")) >= 6 and inspect_video(path).num_frames == 23


def test_a_server_that_is_gone_is_no_clips_fault(server, tmp_path, monkeypatch):
    built = index(pattern(server), tmp_path)
    paused = []
    monkeypatch.setattr(remote, "PAUSES_S", (1.0, 4.0, 16.0))
    monkeypatch.setattr(time, "sleep", paused.append)
    server.busy = 100
    for use in (shards.openable, shards.open_bytes, shards.open_part, inspect_video):
        with pytest.raises(
            Unreachable, match="000.tar cannot be read after 4 attempts in 21 s .*503.*is the server up"
        ):
            use(built.paths[0])
    assert paused == [1.0, 4.0, 16.0] * 4
    config = ClipDataConfig(
        {"k": SourceConfig(pattern(server))},
        {"s": StreamConfig(["k"], (32, 48), 5)},
        num_workers=0,
        cache_dir=str(tmp_path),
    )
    data = ClipData(config, run_dir=tmp_path / "run")
    with pytest.raises(Unreachable, match="The same command goes on where this run stopped"):
        next(iter(data.train_dataloader()))
    assert data.quarantine.entries == [] and not (tmp_path / "run").exists()


def test_what_a_server_says_no_to(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_cache, "STAMPS_HOLD_S", 0)
    server.statuses = {"/001.tar": 404}
    built = index(pattern(server), tmp_path)
    assert len(built) == 4 and "is not there: the server says 404" in built.bad[0][1] and "001.tar" in built.bad[0][0]
    server.statuses = {"/001.tar": 403}
    with pytest.raises(Unreachable, match="001.tar: the server refuses it: 403 .*credentials"):
        index(pattern(server), tmp_path)
    server.statuses, server.parts = {}, False
    with pytest.raises(Unreachable, match="sends whole files only .*it ignores Range"):
        index(pattern(server), tmp_path)
    with pytest.raises(Unreachable, match="sends whole files only"):
        shards.open_bytes(built.paths[0])


def test_broken_shards_on_a_server(server, tmp_path, films):
    folder = tmp_path / "served"
    whole = (folder / "000.tar").read_bytes()
    (folder / "000.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "001.tar").write_bytes(b"")
    with tarfile.open(folder / "002.tar", "w") as tar:
        add(tar, "big.mp4", bytes(2**20 + 1))
        add(tar, "bad.mp4", b"no film")
        add(tar, "../out.mp4", films[0].read_bytes())
        add(tar, "good.mp4", films[1].read_bytes())
    url = pattern(server)
    far, near = index(url, tmp_path, max_member_mb=1), index(folder, tmp_path, max_member_mb=1)
    assert everything(far) == everything(near) and [name for name, *_ in everything(far)][-1] == "k/002.tar/good.mp4"
    assert [reason for _, reason in far.bad] == [reason for _, reason in near.bad] and len(far.bad) == 5
    path = far.paths[0]
    (folder / "000.tar").write_bytes(whole[:1000])
    with pytest.raises(BadFile, match="its shard ends early"):
        shards.open_bytes(path)
    (folder / "000.tar").write_bytes(whole[:100])
    with pytest.raises(BadFile, match="its shard ends early"):
        shards.open_bytes(path)
    (folder / "000.tar").unlink()
    with pytest.raises(BadFile, match="is not there"):
        shards.open_bytes(path)


def test_other_protocols_are_fsspecs(tmp_path, films, monkeypatch):
    """Stood in for by fsspec's files in memory; s3 and gs need plugins that are not installed here."""
    monkeypatch.setattr(remote, "PAUSES_S", (0.0,))
    memory = fsspec.filesystem("memory")
    for path in make_shards(tmp_path / "k", films).iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    built = index("memory://bucket/{000..002}.tar", tmp_path)
    assert everything(built) == everything(index(tmp_path / "k", tmp_path)) and len(built) == 6
    assert shards.open_bytes(built.paths[4]).read() == films[4].read_bytes()
    assert isinstance(shards.openable(built.paths[4]), io.BytesIO)
    monkeypatch.setattr(
        type(memory), "cat_file", lambda *_, **__: (_ for _ in ()).throw(OSError("the network is down"))
    )
    with pytest.raises(Unreachable, match="after 2 attempts .*the network is down"):
        shards.open_bytes(built.paths[3])
    for name in memory.ls("/bucket", detail=False):
        memory.rm(name)
    assert len(index("memory://bucket/{000..003}.tar", tmp_path).bad) == 4
    with pytest.raises(Unreachable, match="cannot be opened: .*s3fs"):
        shards.open_bytes("s3://bucket/a.tar::512+10::b.mp4")
