"""Reading real files: exact frames, target rates, and every kind of damage that we know of."""

import errno

import numpy as np
import pytest
from PIL import Image
from video_files import cut, decoded, index_of, make_film, overwrite

from datamodules import replay
from datamodules.probe import BadFile, Info, inspect_image, inspect_video
from datamodules.reader import ClipReader, ClipRequest, NoneReadable


def request(path, start=0, num_frames=9, size=(48, 64), **options) -> ClipRequest:
    options = {"kind": "video", "stop": 10**6} | options
    return ClipRequest(str(path), f"s/{path.name}", start=start, num_frames=num_frames, size=size, **options)


def bad(action) -> str:
    """The reason for which ``action`` calls a file bad."""
    with pytest.raises(BadFile) as error:
        action()
    return str(error.value)


# ---- sound files


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return make_film(tmp_path_factory.mktemp("films") / "film.mp4")


def test_a_window_is_exactly_its_frames(film):
    truth = decoded(film)
    for start in (0, 5, 11, 12, 13, 24, 31):
        video, key = ClipReader().read_one(request(film, start))
        assert video.shape == (3, 9, 48, 64)
        assert index_of(video, truth) == list(range(start, start + 9))
        assert key == f"s/film.mp4#{start}@0,0,48x64of48x64"


@pytest.mark.parametrize(
    ("name", "codec", "params"),
    [
        ("x265_open_gop.mp4", "libx265", "keyint=10:bframes=3:open-gop=1"),
        ("x264_open_gop.mkv", "libx264", "keyint=10:bframes=3:open-gop=1"),
        ("x264_intra_refresh.mp4", "libx264", "keyint=10:intra-refresh=1"),
        ("mpeg2.ts", "mpeg2video", ""),
        ("vp9.webm", "libvpx-vp9", ""),
    ],
)
def test_windows_where_decord_alone_is_wrong(tmp_path, name, codec, params):
    """After a seek decord may start late, and repeats the last frame at the end. The second opinion puts it right."""
    path = make_film(tmp_path / name, 50, codec=codec, params=params)
    truth, info = decoded(path), inspect_video(str(path))
    assert info == Info(64, 48, 50, 25.0)
    for start in (0, 9, 10, 13, 21, 29, 30, 38, 41):
        assert index_of(ClipReader().read_one(request(path, start))[0], truth) == list(range(start, start + 9)), start


def test_a_film_that_stands_still_is_legitimate(tmp_path):
    path = make_film(tmp_path / "still.mp4", still=True)
    inspect_video(str(path))
    for verify in ("window", "packets"):
        for gib in (0.0, 0.1):
            video, _ = ClipReader(verify, gib).read_one(request(path, 3))
            assert (video[:, 1:] == video[:, :-1]).float().mean() > 0.95


def test_the_film_cache_changes_nothing(film):
    plain, kept = ClipReader(), ClipReader(film_cache_gib=0.1)
    for start in (4, 20, 4, 31):
        for options in ({"size": (32, 32)}, {"size": (32, 32), "crop": "random", "position": (0.2, 0.9)},
                        {"size": (24, 24), "crop": "resize"}, {"size": (24, 40), "fps": 12.5, "num_frames": 4}):  # fmt: skip
            one, two = (reader.read_one(request(film, start, **options)) for reader in (plain, kept))
            assert one[1] == two[1] and (one[0] == two[0]).all()
    assert len(kept._films) == 3 and not plain._films
    tiny = ClipReader(film_cache_gib=40 * 32 * 43 * 3 * 1.5 / 2**30)
    tiny.read_one(request(film, size=(32, 32)))
    tiny.read_one(request(film, size=(32, 32), resize="stretch"))
    assert len(tiny._films) == 1, "an old film makes room for a new one"


def test_target_rate_takes_the_nearest_frames(film):
    truth = decoded(film)
    cases = {12.5: [3, 5, 7, 9], 10.0: [3, 5, 8, 10], 25.0: [3, 4, 5, 6], 8.0: [3, 6, 9, 12]}
    for fps, expected in cases.items():
        video, key = ClipReader().read_one(request(film, 3, num_frames=4, fps=fps))
        found = index_of(video, truth)
        assert all(abs(f - (3 + i * 25 / fps)) <= 0.5 + 1e-6 for i, f in enumerate(found)), fps
        assert found == expected or fps == 10.0, "10 per second: halves may go either way"
        assert key == f"s/film.mp4#3~{fps:g}fps@0,0,48x64of48x64"
    assert "ends at 1.56 s" in bad(lambda: ClipReader().read_one(request(film, 30, fps=12.5)))


def test_a_window_never_leaves_its_span(film):
    assert "has 20 usable frames" in bad(lambda: ClipReader().read_one(request(film, 15, stop=20)))
    assert "has 40 usable frames" in bad(lambda: ClipReader().read_one(request(film, 35)))


def test_a_film_that_is_smaller_than_a_list_says_is_not_enlarged(film):
    assert "48x64 is smaller than 96x96" in bad(lambda: ClipReader().read_one(request(film, size=(96, 96))))


def test_a_film_lying_on_its_side_is_turned(tmp_path, film):
    """The quarter turn that phones write into the track header."""
    data = bytearray(film.read_bytes())
    begin = data.find(b"tkhd") + 44  # version 0: the matrix follows 40 bytes of times, ids and layers
    numbers = [0, 65536, 0, -65536, 0, 0, 48 * 65536, 0, 0x40000000]
    data[begin : begin + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in numbers)
    path = tmp_path / "upright.mp4"
    path.write_bytes(data)
    video, _ = ClipReader().read_one(request(path, 5, size=(64, 48)))
    assert index_of(video, np.rot90(decoded(film), 3, (1, 2))) == list(range(5, 14))
    assert inspect_video(str(path)) == Info(48, 64, 40, 25.0), "width and height as displayed"


# ---- images


def test_images_are_rgb_and_upright(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    files = {}
    for name, image, options in (
        ("plain.png", Image.fromarray(pixels), {}),
        ("turned.png", Image.fromarray(pixels), {"exif": exif}),
        ("grey.png", Image.fromarray(pixels).convert("L"), {}),
        ("alpha.png", Image.fromarray(pixels).convert("RGBA"), {}),
        ("palette.png", Image.fromarray(pixels).convert("P"), {}),
    ):
        files[name] = tmp_path / name
        image.save(files[name], **options)
    options = {"num_frames": 1, "kind": "image", "stop": 1}
    for name, path in files.items():
        h, w = (30, 20) if name == "turned.png" else (20, 30)
        assert inspect_image(str(path)) == Info(w, h, 1, 0.0)
        video, key = ClipReader().read_one(request(path, size=(h, w), **options))
        assert video.shape == (3, 1, h, w)
        assert key == f"s/{name}#0@0,0,{h}x{w}of{h}x{w}"
    assert index_of(ClipReader().read_one(request(files["plain.png"], size=(20, 30), **options))[0], pixels[None]) == [
        0
    ]
    turned = np.rot90(pixels, -1)[None]
    assert index_of(ClipReader().read_one(request(files["turned.png"], size=(30, 20), **options))[0], turned) == [0]


def test_damaged_images_are_bad(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    image.save(tmp_path / "a.jpg")
    half = cut(tmp_path / "a.jpg", tmp_path / "half.jpg", 0.5)
    text = tmp_path / "text.jpg"
    text.write_text("<html>404</html>")
    options = {"num_frames": 1, "kind": "image", "size": (32, 32), "stop": 1}
    assert "not a readable image" in bad(lambda: ClipReader().read_one(request(half, **options)))
    assert "not a readable image" in bad(lambda: inspect_image(str(text)))


# ---- damaged films


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["index_at_the_end.mp4", "index_in_front.mp4", "film.mkv"])
def test_films_cut_short_are_found_by_looking_at_the_container(tmp_path, kind, share):
    whole = make_film(tmp_path / kind, front="front" in kind)
    assert inspect_video(str(whole)).num_frames == 40
    reason = bad(lambda: inspect_video(str(cut(whole, tmp_path / f"cut_{kind}", share))))
    assert any(part in reason for part in ("cut short", "not a readable video", "no video stream", "has no frames"))


@pytest.mark.parametrize("kind", ["film.mp4", "film.mkv"])
def test_damage_inside_a_frame_spoils_the_windows_that_see_it(tmp_path, kind):
    """Frame 24 begins a group of pictures; the damage stays in the groups up to the next key frame."""
    whole = make_film(tmp_path / kind, 48, size=(96, 128), params="keyint=12:bframes=0:scenecut=0")
    truth = decoded(whole)
    damaged = overwrite(whole, tmp_path / f"damaged_{kind}", 24, 400, skip=400)
    inspect_video(str(damaged))  # the container is whole
    for start in (20, 24, 26):
        reason = bad(lambda: ClipReader().read_one(request(damaged, start, size=(96, 128))))  # noqa: B023
        assert "damaged" in reason or "decoding fails" in reason
    for start in (0, 12, 15, 36, 39):
        video, _ = ClipReader().read_one(request(damaged, start, size=(96, 128)))
        assert index_of(video, truth) == list(range(start, start + 9))


def test_a_middle_that_was_overwritten(tmp_path):
    whole = make_film(tmp_path / "film.mp4", 48, size=(96, 128))
    data = bytearray(whole.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = np.random.default_rng(0).bytes(4000)
    whole.write_bytes(data)
    reasons = [bad(lambda: ClipReader().read_one(request(whole, s, size=(96, 128)))) for s in (22, 26)]  # noqa: B023
    assert all("decoding fails" in reason or "damaged" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.mp4", b"", "empty file"),
        ("text.mp4", b"<html>404 not found</html>" * 100, "not a readable video"),
        ("zeros.mp4", bytes(10_000), "not a readable video"),
        ("gone.mp4", None, "No such file"),
    ],
)
def test_files_that_are_no_films(tmp_path, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert reason in bad(lambda: inspect_video(str(path)))
    assert bad(lambda: ClipReader().read_one(request(path, checked=False)))
    assert bad(lambda: ClipReader().read_one(request(path)))


def test_sound_without_pictures(tmp_path):
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert "no video stream" in bad(lambda: inspect_video(str(path)))


def test_a_listed_film_is_inspected_before_it_is_read(tmp_path):
    """decord would deliver the front part of a matroska file that was cut short."""
    path = cut(make_film(tmp_path / "film.mkv"), tmp_path / "cut.mkv", 0.7)
    assert "cut short" in bad(lambda: ClipReader().read_one(request(path, checked=False)))


def test_repeats_that_are_not_in_the_file_are_never_delivered(film, monkeypatch):
    """Were decord to repeat a frame, its window is replaced by what the file holds."""
    from datamodules.films import DecordFilm

    honest = DecordFilm.decode
    monkeypatch.setattr(DecordFilm, "decode", lambda self, i: honest(self, i)[np.minimum(np.arange(len(i)), 3)])
    for verify in ("window", "packets"):
        video, _ = ClipReader(verify).read_one(request(film, 7))
        assert index_of(video, decoded(film)) == list(range(7, 16))


# ---- replacement


def test_the_first_readable_alternate_takes_the_place(film, tmp_path):
    broken = cut(film, tmp_path / "broken.mp4", 0.5)
    first = request(broken, alternates=(request(broken, 5), request(film, 8), request(film, 9)))
    sample = ClipReader().read(first)
    assert sample.key.startswith("s/film.mp4#8@")
    assert [path for path, _ in sample.failures] == [str(broken)] * 2


def test_a_disk_that_is_gone_stops_at_once(tmp_path):
    gone = [request(tmp_path / f"{i}.mp4") for i in range(5)]
    with pytest.raises(NoneReadable, match="5 clips in a row cannot be read; is the disk still mounted") as error:
        ClipReader().read(ClipRequest(**{**gone[0].__dict__, "alternates": tuple(gone[1:])}))
    assert "No such file" in str(error.value)


@pytest.mark.parametrize("error", [MemoryError("no memory"), OSError(errno.ENOSPC, "disk full"), KeyError("a bug")])
def test_our_own_troubles_are_no_bad_files(film, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(replay, "_rgb", fail)
    with pytest.raises(type(error)):
        ClipReader().read(ClipRequest(**{**request(film).__dict__, "alternates": (request(film, 8),)}))
