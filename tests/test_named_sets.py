"""Evaluation sets by name: for every experiment, in their papers' protocols, and whole or not at all."""

import json
import re

import av
import numpy as np
import pytest
from evaluated import untrained
from video_files import make_film

from datamodules import named
from datamodules.config import SourceConfig, StreamConfig
from datamodules.procedural import draw_frames
from datamodules.reader import ClipReader, ClipRequest
from datamodules.transforms import TooSmall, plan_geometry
from experiments import evaluate
from experiments.compose import ConfigError
from experiments.config import load

NAME = "flashdecoder_debug"
QUICK = ("validation.metrics=[psnr]", "validation.references=false", "trainer.progress_bar=false")


@pytest.mark.parametrize("name", named.names())
def test_every_set_says_what_it_is(name) -> None:
    found = named.read(name)
    assert all(len(text) > 15 for text in (found.about, found.licence, found.layout, found.protocol))
    assert "proposed" in found.protocol or "paper" in found.protocol or "(" in found.protocol
    StreamConfig(**found.stream)
    for source in found.sources.values():
        assert SourceConfig(**source).path.startswith(("$DATA_ROOT/", "package:"))
    if name != "samples":
        assert all(source["path"] in found.layout for source in found.sources.values()), "the layout names the list"


def test_the_papers_protocols() -> None:
    shapes = {name: named.read(name).shape for name in named.names()}
    assert shapes == {
        "bair": "16 x 64x64", "davis": "17 x 480x832", "davis_192": "33 x 192x320", "davis_216": "16 x 216x216",
        "davis_256": "33 x 256x256", "davis_384": "33 x 384x640", "davis_512": "33 x 512x512", "inter4k": "17 x 480x832",
        "inter4k_216": "16 x 216x216", "large_motion": "17 x 480x832", "large_motion_216": "16 x 216x216",
        "mcl_jcv_256": "33 x 256x256", "mcl_jcv_512": "33 x 512x512", "samples": "17 x 128x160", "ucf101": "17 x 240x320",
        "ultravideo_1080p": "25 x 1080x1920", "ultravideo_480p": "25 x 480x832", "ultravideo_720p": "25 x 720x1280",
        "webvid": "17 x 480x832", "webvid_216": "16 x 216x216",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in named.names() if "film without loss" in named.read(name).layout])
def test_a_film_without_loss_is_without_loss(name, tmp_path) -> None:
    """As its layout says to write it, read by what reads clips: every value of the images."""
    said = re.search(r"-c:v (\S+)\s+-qp 0\s+-pix_fmt (\S+)", named.read(name).layout)
    images = draw_frames(0, 0, list(range(6)), (48, 64))
    images = (
        (images.astype(int) + np.random.default_rng(0).integers(-9, 10, images.shape)).clip(0, 255).astype(np.uint8)
    )
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream(said[1], rate=24, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, said[2]
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    request = ClipRequest(str(tmp_path / "film.mp4"), "film", "video", 0, 6, 6, (48, 64), resize="none")
    video, _ = ClipReader().read_one(request)
    assert np.array_equal(((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy(), images)


def test_every_experiment_has_every_set(debug_name) -> None:
    experiment = load(debug_name, sets=named.names())
    assert set(named.names()) <= experiment.data.sets.keys() and experiment.data.max_bad_share == 0


def test_whoever_asks_for_none_has_none() -> None:
    alone = load(NAME).data
    assert alone.max_bad_share == 0.05 and not alone.sets and not any("davis" in source for source in alone.sources)


def test_an_experiments_own_words_count() -> None:
    """Laid over the built-in set, or, with sources, in its place; a source's path too."""
    shorter = load(NAME, ["data.sets.davis_256.num_frames=17", "data.sources.davis.path=/films"])
    assert (shorter.data.sets["davis_256"].num_frames, shorter.data.sets["davis_256"].window) == (17, "first")
    assert shorter.data.sources["davis"].path == "/films"
    own = load(NAME, ["data.sets.davis={sources: [unseen], size: [32, 48], num_frames: 5}"], sets=["davis", "bair"])
    assert own.data.sets["davis"].sources == ["unseen"] and "davis" not in own.data.sources
    assert own.data.sets["bair"].sources == ["bair"]
    with pytest.raises(ConfigError, match="datamodules/sets|num_frame"):
        load(NAME, ["data.sets.davis_256.num_frame=17"])
    extended = load("regen_k4").data.sets["davis_256"]
    assert (extended.extend, extended.num_frames, extended.sources) == ((0, 2), 33, ["davis"])


def test_a_missing_set_says_where_it_comes_from(runs_root, monkeypatch, tmp_path, capsys) -> None:
    untrained(NAME)
    for root, message in ((None, "needs the environment variable DATA_ROOT"), (tmp_path, "does not exist")):
        monkeypatch.delenv("DATA_ROOT", raising=False)
        if root:
            monkeypatch.setenv("DATA_ROOT", str(root))
        with pytest.raises(
            ConfigError, match=f"{message}(.|\n)*davis_256: DAVIS 2019(.|\n)*layout: a film without loss"
        ):
            evaluate.evaluate(NAME, QUICK, sets=["samples", "davis_256"])
    with pytest.raises(ConfigError, match="has no evaluation set 'davis_265'; did you mean davis_256"):
        evaluate.evaluate(NAME, QUICK, sets=["davis_265"])
    evaluate.main(["--sets"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in named.names()) and re.search("17 x 128x160 +yes", shown)


def test_the_built_in_samples_need_nothing(runs_root) -> None:
    untrained(NAME)
    smaller = ("data.sets.samples.size=[32,48]", "data.sets.samples.num_frames=5", "data.sets.samples.num_clips=3")
    result = evaluate.evaluate(NAME, (*QUICK, *smaller), sets=["samples"])
    assert result["categories"] == []
    assert not (evaluate.evaluation_dir(NAME, (*QUICK, *smaller), sets=["samples"]) / "categories.md").exists()
    assert result["means"][0]["clips"] == 3 and result["files"]["samples"] == {"used": 3, "found": 3, "left_out": {}}


def films(folder, number: int, broken: int = 0) -> None:
    for i in range(number):
        make_film(folder / f"{i:02}.mp4", 18, (72, 72), film=i)
    for i in range(broken):
        (folder / f"broken{i}.mp4").write_bytes(b"no film")
    names = sorted(path.name for path in folder.glob("*.mp4"))
    (folder / "bair_test.csv").write_text("\n".join(["path", *names]) + "\n")


def test_a_set_at_another_length_or_padded(runs_root, monkeypatch, tmp_path) -> None:
    """16 frames are none that the tiny space encodes: the error says what to type, and it works."""
    untrained(NAME)
    films(tmp_path, 2)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    with pytest.raises(ConfigError, match=r"data.val.bair: 16 .*pad=replicate.*data.sets.bair.num_frames"):
        evaluate.evaluate(NAME, QUICK, sets=["bair"])
    padded = evaluate.evaluate(NAME, (*QUICK, "pad=replicate"), sets=["bair"])
    assert padded["protocols"]["bair/psnr"]["frames"] == [0, 16] and padded["sets"] == {
        "bair": named.read("bair").protocol
    }
    shorter = evaluate.evaluate(NAME, (*QUICK, "data.sets.bair.num_frames=9"), sets=["bair"])
    assert shorter["protocols"]["bair/psnr"]["frames"] == [0, 9]
    folders = {
        evaluate.evaluation_dir(NAME, (*QUICK, o), sets=["bair"])
        for o in ("pad=replicate", "data.sets.bair.num_frames=9")
    }
    assert len(folders) == 2 and all((folder / "result.json").is_file() for folder in folders)
    kept = json.loads((sorted(folders)[0] / "result.json").read_text())
    assert kept["experiment"] == NAME


def test_a_set_is_whole_or_refused(runs_root, monkeypatch, tmp_path) -> None:
    """Of a stream up to 5 % may be unreadable; a paper's set with other clips would be another set."""
    untrained(NAME)
    films(tmp_path, 2, broken=1)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    nine = (*QUICK, "data.sets.bair.num_frames=9")
    with pytest.raises(ConfigError, match="1 of 3 files are unreadable, more than data.max_bad_share = 0 allows"):
        evaluate.evaluate(NAME, nine, sets=["bair"])
    result = evaluate.evaluate(NAME, (*nine, "data.max_bad_share=0.5"), sets=["bair"])
    assert result["files"]["bair"] == {"used": 2, "found": 3, "left_out": {"unreadable": 1}}


def test_scaled_first_then_cut() -> None:
    """UltraVideo at 480p is cut out of 720p."""
    geometry = plan_geometry((2160, 3840), (480, 832), via=(720, 1280))
    assert (geometry.resized, geometry.offset, geometry.size) == ((720, 1280), (120, 224), (480, 832))
    assert plan_geometry((2160, 3840), (480, 832)).resized == (480, 853)
    with pytest.raises(TooSmall):
        plan_geometry((480, 832), (480, 832), via=(720, 1280))
    assert StreamConfig(["a"], (480, 832), via=(720, 1280)).how_resized == "crop out of 720x1280"
    for wrong in ({"via": (400, 1280)}, {"via": (720, 1280), "resize": "stretch"}):
        with pytest.raises(ValueError, match="via"):
            StreamConfig(["a"], (480, 832), **wrong)
