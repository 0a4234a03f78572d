"""What really happens to loaders: a decoder that hangs, workers that are killed, files and shards that are not what they say."""

import ctypes
import io
import multiprocessing
import os
import signal
import struct
import tarfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from video_files import keys, make_film, take

from datamodules import workers
from datamodules.clips import ClipData
from datamodules.config import ClipDataConfig, SourceConfig, StreamConfig
from datamodules.faults import Unreachable
from datamodules.loaders import UnreadableClip, read_singly
from datamodules.probe import BadFile, inspect_image, inspect_video
from datamodules.reader import ClipReader, ClipRequest

CULPRIT = "3.mkv"


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    for i in range(6):
        make_film(folder / f"{i}.mkv", 20, film=i)
    return folder


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setattr(Faulty, "once", str(tmp_path / "killed"))


class Faulty(ClipReader):
    """A reader to which ``how`` happens at the culprit; in the main process the culprit is a damaged file."""

    how, once = "", ""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.how, self.once = Faulty.how, Faulty.once  # its own, so that workers of every kind get them

    def read_one(self, request):
        here = os.path.basename(request.path) == CULPRIT
        if here and self.how == "hang":  # as C code does that keeps Python's lock
            ctypes.PyDLL(None).sleep(1000)
        if here and self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if here and self.how == "kill once" and not os.path.exists(self.once):
            Path(self.once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if here and self.how == "unreachable":
            raise Unreachable("https://host/0.tar cannot be read after 4 attempts")
        if here and self.how == "bad":
            raise BadFile("damaged")
        return super().read_one(request)


def config(folder: Path, num_workers: int = 2, **options) -> ClipDataConfig:
    stream = StreamConfig(["films"], (32, 32), 5, batch_size=2)
    # Forked workers, which start at once; so by PyAV, as decord may have run in this process.
    options = {"max_bad_share": 0.2, "start_method": "fork", "reader": "pyav", "clip_timeout_s": 3.0} | options
    return ClipDataConfig({"films": SourceConfig(str(folder))}, {"v": stream}, num_workers=num_workers, **options)


def told(folder: Path, how: str, monkeypatch, num: int = 12, run_dir=None, **options) -> list[list[str]]:
    """Keys of the first batches where ``how`` happens."""
    monkeypatch.setattr(Faulty, "how", how)
    monkeypatch.setattr(workers, "ClipReader", Faulty)
    return keys(take(ClipData(config(folder, **options), seed=4, run_dir=run_dir), num))


# ---- workers that hang


def test_a_decoder_that_hangs_is_ended_and_its_file_replaced(films, tmp_path, monkeypatch, caplog):
    expected = told(films, "bad", monkeypatch, num_workers=0)
    undisturbed = told(films, "", monkeypatch, num_workers=0)
    assert expected != undisturbed, "the culprit is among the first clips"
    before = time.monotonic()
    found = told(films, "hang", monkeypatch, run_dir=tmp_path / "run")
    assert found == expected and time.monotonic() - before < 60
    quarantined = (tmp_path / "run" / "quarantine.jsonl").read_text()
    assert CULPRIT in quarantined and "longer than data.clip_timeout_s = 3 s" in quarantined
    restarts = [record.message for record in caplog.records if "reading begins again" in record.message]
    assert 1 <= len(restarts) <= 2 and CULPRIT in restarts[0]  # two, where both workers had begun it


def test_clip_after_clip_that_hangs_ends_with_one_clear_error(films, monkeypatch):
    monkeypatch.setattr(workers, "MAX_IN_VAIN", 1)
    monkeypatch.setattr(ClipReader, "read_one", lambda *_: time.sleep(1000))
    with pytest.raises(RuntimeError, match="Clip after clip hangs: is the disk there.*hung for more than") as error:
        take(ClipData(config(films, num_workers=1, clip_timeout_s=0.5), seed=4), 1)
    assert "Traceback" not in str(error.value) and error.value.__cause__ is None


def test_a_validation_clip_that_hangs_is_an_error_that_names_it(films, monkeypatch):
    monkeypatch.setattr(Faulty, "how", "hang")
    monkeypatch.setattr(workers, "ClipReader", Faulty)
    made = config(films)
    made.val = {"v": StreamConfig(["films"], (32, 32), 5)}
    seen = []
    with pytest.raises(UnreadableClip, match=rf"data.val: .*{CULPRIT}: takes longer than data.clip_timeout_s"):
        for batch in ClipData(made).val_dataloader()[0]:
            seen += batch["key"]
    assert [key.split("#")[0] for key in seen] == ["films/0.mkv", "films/1.mkv", "films/2.mkv"]


# ---- workers that are killed


def test_a_signal_to_the_whole_group_ends_no_worker(films, caplog):
    """SLURM's SIGUSR1 is for the training process; workers of any kind start with it withheld, as forkserver's server does."""
    data = ClipData(config(films), seed=4)
    iterator = iter(data.train_dataloader())
    before = [next(iterator)["key"]]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGUSR1)
    found = before + [next(iterator)["key"] for _ in range(5)]
    assert found == keys(take(ClipData(config(films, num_workers=0), seed=4), 6))
    assert not [record for record in caplog.records if "reading begins again" in record.message]
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # this process still gets it


@pytest.mark.parametrize("method", ["fork", pytest.param("auto", marks=pytest.mark.slow)])
def test_a_worker_killed_once_changes_nothing(films, monkeypatch, caplog, method):
    """As the kernel does when memory runs out. ``auto`` starts workers again by forkserver."""
    expected = told(films, "", monkeypatch, num_workers=0)
    started = []
    monkeypatch.setattr(workers.multiprocessing, "get_context", _noting(started, workers.multiprocessing.get_context))
    assert told(films, "kill once", monkeypatch, start_method=method, clip_timeout_s=60, reader="decord") == expected
    assert Path(Faulty.once).exists()
    (told_once,) = [record.message for record in caplog.records if "reading begins again" in record.message]
    assert "a decoding worker died while it read" in told_once and CULPRIT in told_once
    if method == "auto":
        assert started[-1] == "forkserver"


def _noting(started: list, get_context):
    def noted(method=None):
        started.append(method)
        return get_context(method)

    return noted


def test_a_file_that_kills_two_workers_is_passed_over(films, tmp_path, monkeypatch):
    expected = told(films, "bad", monkeypatch, num_workers=0)
    assert told(films, "kill", monkeypatch, num_workers=1, run_dir=tmp_path / "run") == expected
    assert "two workers died while they read it" in (tmp_path / "run" / "quarantine.jsonl").read_text()


def test_workers_killed_from_outside(films, monkeypatch):
    """While training computes, so that nobody waits for them: no exception in the middle of a step, and no batch lost."""
    expected = told(films, "", monkeypatch, num_workers=0)
    data = ClipData(config(films), seed=4)
    loader, found = data.train_dataloader(), []
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    for step in range(12):
        found.append(next(batches)["key"])
        data.batch_consumed()
        if step in (2, 6):
            for pid in _pids(loader):
                os.kill(pid, signal.SIGKILL)
            until = time.monotonic() + 0.3
            while time.monotonic() < until:  # a training step: torch's handler would raise in here
                sum(range(1000))
    assert found == expected and signal.getsignal(signal.SIGCHLD) is handler
    monkeypatch.setattr(workers, "MAX_DEATHS", 2)
    with pytest.raises(
        RuntimeError, match="A decoding worker died, mostly for lack of memory.*(exited unexpectedly|cut off)"
    ):
        for _ in range(20):
            for pid in _pids(loader):
                os.kill(pid, signal.SIGKILL)
            next(batches)
    assert not any(_alive(pid) for pid in _pids(loader))


def _pids(loader) -> list[int]:
    iterator = loader._workers._iterator
    return [worker.pid for worker in iterator._workers] if iterator is not None else []


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_no_process_is_left_behind(films, monkeypatch):
    data = ClipData(config(films), seed=4)
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches)
    first = _pids(loader)
    os.kill(first[0], signal.SIGKILL)
    for _ in range(8):
        next(batches)
    assert _pids(loader) != first and not any(_alive(pid) for pid in first)


def test_validation_goes_on_where_a_worker_was_killed(films, monkeypatch):
    made = config(films)
    made.val = {"v": StreamConfig(["films"], (32, 32), 5, batch_size=2)}
    expected = [batch["key"] for batch in ClipData(made).val_dataloader()[0]]
    monkeypatch.setattr(Faulty, "how", "kill once")
    monkeypatch.setattr(workers, "ClipReader", Faulty)
    (loader,) = ClipData(made).val_dataloader()
    for _ in range(2):
        assert [batch["key"] for batch in loader] == expected
    assert Path(Faulty.once).exists()


def test_clips_read_singly_go_on_too(films, monkeypatch):
    data = ClipData(config(films), seed=4)
    asked = [replace(data.plan.request_at("v", draw), alternates=()) for draw in range(12)]
    assert any(request.path.endswith(CULPRIT) for request in asked)
    expected = [item["batch"]["key"] for item in read_singly(config(films, num_workers=0), iter(asked))]
    monkeypatch.setattr(Faulty, "how", "kill")
    monkeypatch.setattr(workers, "ClipReader", Faulty)
    found = list(read_singly(config(films), iter(asked)))
    for item, key, request in zip(found, expected, asked, strict=True):
        if request.path.endswith(CULPRIT):
            assert "two workers died" in item["error"]
        else:
            assert item["batch"]["key"] == key


def test_a_server_that_does_not_answer_stops_the_run_with_its_own_message(films, monkeypatch):
    with pytest.raises(Unreachable) as error:
        told(films, "unreachable", monkeypatch, num_workers=1)
    assert str(error.value) == "https://host/0.tar cannot be read after 4 attempts", "no traceback, no clip blamed"


# ---- files and shards


def request(path, **options) -> ClipRequest:
    options = {"kind": "video", "start": 0, "stop": 10**6, "num_frames": 5, "size": (32, 32)} | options
    return ClipRequest(str(path), f"s/{Path(path).name}", **options)


def pack(folder: Path, tar: Path) -> dict[str, str]:
    """The folder's films in a shard: name -> path of the member."""
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as file:
        for film in sorted(folder.glob("*.mkv")):
            file.add(film, film.name)
    with tarfile.open(tar) as file:
        return {m.name: f"{tar}::{m.offset_data}+{m.size}::{m.name}" for m in file.getmembers()}


@pytest.mark.parametrize("reader", ["decord", "pyav"])
def test_a_shard_that_ends_early_loses_only_what_is_missing(films, tmp_path, reader):
    members = pack(films, tmp_path / "00000.tar")
    whole = {name: ClipReader(reader=reader).read_one(request(path))[0] for name, path in members.items()}
    offset = int(members[CULPRIT].split("::")[1].split("+")[0])
    os.truncate(tmp_path / "00000.tar", offset + 100)
    for name, path in members.items():
        if name < CULPRIT:
            assert (ClipReader(reader=reader).read_one(request(path))[0] == whole[name]).all()
        else:
            with pytest.raises(BadFile, match="its shard ends early"):
                ClipReader(reader=reader).read_one(request(path))
    sample = ClipReader(reader=reader).read(request(members[CULPRIT], alternates=(request(members["0.mkv"]),)))
    assert sample.key.startswith("s/") and sample.failures[0][0] == members[CULPRIT]


def test_an_image_in_a_shard_is_the_image(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        file.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
        file.add(tmp_path / "a.png", "a.png")
    with tarfile.open(tmp_path / "0.tar") as file:
        member = file.getmember("a.png")
    path = f"{tmp_path / '0.tar'}::{member.offset_data}+{member.size}::a.png"
    options = {"kind": "image", "num_frames": 1, "stop": 1, "size": (32, 48)}
    one, two = (ClipReader().read_one(request(p, **options))[0] for p in (tmp_path / "a.png", path))
    assert (one == two).all()
    os.truncate(tmp_path / "0.tar", member.offset_data + 20)
    with pytest.raises(BadFile, match="its shard ends early"):
        ClipReader().read_one(request(path, **options))


def giant_film(path: Path, height: int, width: int) -> Path:
    """A film whose first key frame says another size than its container does."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(5):
            grey = np.full((48, 64, 3), i * 20, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    begin = data.index(b"\x9d\x01\x2a") + 3  # VP8's start code; 14 bits for each side follow
    data[begin : begin + 4] = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    path.write_bytes(data)
    return path


def test_a_film_that_says_giant_frames_is_refused_before_memory_is_asked_for(tmp_path):
    """Unlimited, FFmpeg takes 460 MB for it."""
    sound = giant_film(tmp_path / "sound.webm", 48, 64)
    assert inspect_video(str(sound)).num_frames == 5
    ClipReader(reader="pyav").read_one(request(sound))
    giant = giant_film(tmp_path / "giant.webm", 16000, 16000)
    before = _peak_mb()
    with pytest.raises(BadFile):
        inspect_video(str(giant))
    for reader in ("decord", "pyav"):
        with pytest.raises(BadFile):
            ClipReader(reader=reader).read_one(request(giant, checked=False))
    assert _peak_mb() - before < 100


def _peak_mb() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


def test_an_image_that_says_giant_sizes_is_refused(tmp_path):
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    path = tmp_path / "giant.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + bytes(100))
    before = _peak_mb()
    for action in (
        lambda: inspect_image(str(path)),
        lambda: ClipReader().read_one(request(path, kind="image", num_frames=1, stop=1)),
    ):
        with pytest.raises(BadFile, match="not a readable image"):
            action()
    assert _peak_mb() - before < 100


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_of_every_bad_kind_in_one_run(films, tmp_path, num_workers):
    """Zero bytes, no film, cut short, giant: named with their reasons, and every batch is whole."""
    rows = ["path,width,height,num_frames,fps"]
    for i in range(6):
        rows += [f"{films}/{i}.mkv,64,48,20,25"] * 4
    (tmp_path / "empty.mkv").touch()
    (tmp_path / "text.mkv").write_text("<html>404 not found</html>" * 100)
    (tmp_path / "short.mkv").write_bytes((films / "0.mkv").read_bytes()[:3000])
    giant_film(tmp_path / "giant.webm", 16000, 16000)
    bad = ["empty.mkv", "text.mkv", "short.mkv", "giant.webm"]
    (tmp_path / "list.csv").write_text("\n".join([*rows, *(f"{name},64,48,20,25" for name in bad)]))
    made = config(tmp_path / "list.csv", num_workers, max_bad_share=0.3, clip_timeout_s=60)
    batches = take(ClipData(made, seed=4, run_dir=tmp_path / "run"), 28)
    shown = {key.split("#")[0].split("/")[-1] for batch in keys(batches) for key in batch}
    assert shown == {f"{i}.mkv" for i in range(6)} and all(len(batch["key"]) == 2 for batch in batches)
    quarantined = (tmp_path / "run" / "quarantine.jsonl").read_text()
    assert all(name in quarantined for name in bad)
