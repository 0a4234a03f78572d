"""Triples of input, style image and target: one crop for both, repeated images, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from video_files import cut, decoded, index_of, keys, make_film, take

from datamodules.clips import ClipData
from datamodules.config import ClipDataConfig, CropConfig, SourceConfig, StreamConfig
from datamodules.index import build_index
from datamodules.quarantine import TooManyBadFiles
from datamodules.sources import SourceError


def picture(path: Path, seed: int, size: tuple[int, int] = (48, 64), inverted: bool = False) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(255 - pixels if inverted else pixels).save(path)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "cache"))


def listed(folder: Path, *rows: tuple[str, str, str]) -> Path:
    text = "\n".join(",".join(row) for row in (("input", "reference", "target"), *rows))
    (folder / "list.csv").write_text(text + "\n")
    return folder / "list.csv"


@pytest.fixture
def images(tmp_path) -> Path:
    """Eight triples: the target is the negative of the input, and four style images of another shape are shared."""
    rows = []
    for i in range(8):
        picture(tmp_path / f"in{i}.png", i)
        picture(tmp_path / f"out{i}.png", i, inverted=True)
        rows.append((f"in{i}.png", f"style{i % 4}.png", f"out{i}.png"))
    for i in range(4):
        picture(tmp_path / f"style{i}.png", 100 + i, (40, 30))
    return listed(tmp_path, *rows)


def config(path: Path, **stream) -> ClipDataConfig:
    stream = {"sources": ["styles"], "size": (32, 32), "num_frames": 5, "batch_size": 2, **stream}
    return ClipDataConfig({"styles": SourceConfig(str(path), "triple")}, {"s": StreamConfig(**stream)}, num_workers=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_the_contract(images, workers):
    made = config(images, resize="none", crop=CropConfig(random=1.0))
    made.num_workers = workers
    batches = take(ClipData(made, seed=1), 12)
    for batch in batches:
        assert set(batch) == {"video", "source", "reference", "key"}
        assert batch["video"].shape == batch["source"].shape == (2, 3, 5, 32, 32)
        assert torch.allclose(batch["source"], -batch["video"], atol=1e-5), "cut by the same box"
        assert torch.equal(batch["video"], batch["video"][:, :, :1].expand(-1, -1, 5, -1, -1)), "an image is repeated"
        for key, reference in zip(batch["key"], batch["reference"], strict=True):
            number = int(key.removeprefix("styles/out")[0])
            assert key.startswith(f"styles/out{number}.png+style{number % 4}.png#0@")
            image = Image.open(images.parent / f"style{number % 4}.png")
            fitted = np.array(ImageOps.fit(image, (32, 32), Image.Resampling.LANCZOS))
            assert torch.allclose(
                (reference[:, 0].permute(1, 2, 0) + 1) * 127.5, torch.tensor(fitted).float(), atol=1e-3
            )
    boxes = {key.split("@")[1] for batch in batches for key in batch["key"]}
    assert len(boxes) > 12, "the box is drawn anew"
    assert keys(take(ClipData(config(images, resize="none", crop=CropConfig(random=1.0)), seed=1), 12)) == keys(batches)


def test_the_key_says_which_box(images):
    (batch,) = take(ClipData(config(images, resize="none", crop=CropConfig(random=1.0), batch_size=1), seed=3), 1)
    top, left = map(int, batch["key"][0].split("@")[1].split(",")[:2])
    number = int(batch["key"][0].removeprefix("styles/out")[0])
    truth = np.array(Image.open(images.parent / f"in{number}.png"))[top : top + 32, left : left + 32]
    assert index_of(batch["source"][0][:, :1], truth[None]) == [0]


def test_resuming_equals_going_on(images):
    whole = keys(take(ClipData(config(images), seed=1), 9))
    first = ClipData(config(images), seed=1)
    take(first, 4)
    second = ClipData(config(images), seed=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert keys(take(second, 5)) == whole[4:]


def test_validation(images):
    made = config(images)
    made.val = {"v": StreamConfig(["styles"], (32, 32), 5, batch_size=3)}
    batches = list(ClipData(made).val_dataloader()[0])
    assert [len(batch["key"]) for batch in batches] == [3, 3, 2] and set(batches[0]) == {
        "video",
        "source",
        "reference",
        "key",
    }


def test_another_clip_is_of_another_file(images):
    """What a wrong reference is taken from: fixed, of the same stream where it has another file, and not the same for all."""
    made = config(images)
    films = SourceConfig(kind="procedural", num_videos=3, num_frames=20, size=(32, 32), clips_per_video=2)
    made.sources |= {"films": films, "one": SourceConfig(str(images.parent / "in0.png"), "image")}
    made.val = {
        "films": StreamConfig(["films"], (32, 32), 5),
        "one": StreamConfig(["one"], (32, 32), 1),
    }
    data = ClipData(made)
    clips = {
        key: clip for batch in data.val_dataloader()[0] for key, clip in zip(batch["key"], batch["video"], strict=True)
    }
    chosen = set()
    for key in clips:
        other = data.another_clip(key)
        assert torch.equal(other, ClipData(made, world_size=2, rank=1).another_clip(key))
        (found,) = (name for name, clip in clips.items() if torch.equal(clip, other))
        assert found.split("#")[0] != key.split("#")[0]
        chosen.add(found.split("#")[0])
    assert chosen == {"films/0", "films/1", "films/2"}
    (alone,) = data.val_dataloader()[1]
    assert data.another_clip(alone["key"][0]).shape[1] == 5, "of another stream, for want of a file in its own"
    made.val.pop("films")
    with pytest.raises(ValueError, match="all clips are of one file, one/in0.png"):
        ClipData(made).another_clip(alone["key"][0])


@pytest.mark.parametrize("crop", [CropConfig(), CropConfig(random=1.0), CropConfig(resize=1.0)])
def test_an_input_of_another_size_is_brought_to_the_targets(tmp_path, crop):
    """The same smooth picture at twice the size: after resizing and cropping both are nearly equal."""
    y, x = np.mgrid[0:96, 0:128] / 96
    smooth = np.stack([np.sin(5 * x), np.cos(4 * y), np.sin(3 * (x + y))], -1)
    large = Image.fromarray((127.5 + 120 * smooth).astype(np.uint8))
    large.save(tmp_path / "large.png")
    large.resize((64, 48), Image.Resampling.BICUBIC).save(tmp_path / "small.png")
    for given, target in (("large", "small"), ("small", "large")):
        path = listed(tmp_path, (f"{given}.png", "small.png", f"{target}.png"))
        (batch,) = take(ClipData(config(path, crop=crop, batch_size=1), seed=2), 1)
        assert (batch["video"] - batch["source"]).abs().max() < 0.05
        assert batch["video"].std() > 0.3
    index = build_index("styles", SourceConfig(str(path), "triple"))
    assert (index.height[0], index.width[0]) == (48, 64), "nothing is enlarged: the smaller one counts"


def test_videos_go_frame_by_frame(tmp_path):
    for name, film in (("in", 0), ("out", 1)):
        make_film(tmp_path / f"{name}.mp4", 30 if name == "in" else 24, film=film)
    path = listed(tmp_path, ("in.mp4", str(picture(tmp_path / "style.png", 0)), "out.mp4"))
    data = ClipData(config(path, size=(48, 64), batch_size=1), seed=1)
    truth = {name: decoded(tmp_path / f"{name}.mp4") for name in ("in", "out")}
    starts = set()
    for batch in take(data, 6):
        start = int(batch["key"][0].split("#")[1].split("@")[0])
        expected = list(range(start, start + 5))
        assert index_of(batch["source"][0], truth["in"]) == index_of(batch["video"][0], truth["out"]) == expected
        starts.add(start)
    assert len(starts) > 3 and max(starts) <= 24 - 5, "windows end where the shorter film ends"


def test_an_image_beside_a_video_is_repeated(tmp_path):
    make_film(tmp_path / "in.mp4", 20)
    picture(tmp_path / "out.png", 1)
    path = listed(tmp_path, ("in.mp4", "out.png", "out.png"))
    (batch,) = take(ClipData(config(path, size=(48, 64), batch_size=1)), 1)
    assert batch["source"].shape == batch["video"].shape == (1, 3, 5, 48, 64)
    assert torch.equal(batch["video"][:, :, 0], batch["video"][:, :, 4])
    assert not torch.equal(batch["source"][:, :, 0], batch["source"][:, :, 4])


def test_what_is_no_triple_is_quarantined_under_its_own_name(images, tmp_path):
    """In the index: a style image cut short, inputs of another shape or rate, a film as a reference. On reading: a damaged input."""
    folder = images.parent
    picture(folder / "tall.png", 1, (64, 48))
    for name, fps in (("slow", 20), ("fast", 25)):
        make_film(folder / f"{name}.mp4", 12, fps=fps)
    cut(folder / "style0.png", folder / "style9.png", 0.01)
    rows = [tuple(line.split(",")) for line in images.read_text().splitlines()[1:]]
    rows += [
        ("in0.png", "style9.png", "out0.png"), ("tall.png", "style1.png", "out1.png"),
        ("fast.mp4", "style1.png", "slow.mp4"), ("in0.png", "fast.mp4", "out1.png"), ("in0.png", "none.png", "out1.png"),
    ]  # fmt: skip
    Image.open(folder / "in3.png").save(folder / "in3.png", "JPEG")  # the header of half a JPEG is whole
    cut(folder / "in3.png", folder / "in3.png", 0.5)
    made = config(listed(folder, *rows))
    made.max_bad_share = 0.5
    data = ClipData(made, seed=1, run_dir=tmp_path / "run")
    batches = take(data, 20)
    shown = {key.split("+")[0] for batch in batches for key in batch["key"]}
    assert shown == {f"styles/out{i}.png" for i in range(8) if i != 3}
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    reasons = {Path(entry["path"]).name: entry["reason"] for entry in map(json.loads, lines)}
    assert "not a readable image" in reasons["style9.png"] and "not a readable image" in reasons["in3.png"]
    assert "input is 64x48 and its target 48x64: one crop cannot cut both" in reasons["out1.png"]
    assert "input has 25 frames per second and its target 20" in reasons["slow.mp4"]
    assert "cannot be opened" in reasons["none.png"]
    assert data.describe()["train"]["s"]["dropped"] == {"unreadable": 5}
    with pytest.raises(TooManyBadFiles, match="5 of 13 files are unreadable"):
        ClipData(config(images)).prepare_data()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.csv", "input,target\na.png,b.png\n", "no column 'reference', only .'input', 'target'"),
        ("list.csv", "input,reference,target\na.png,,b.png\n", "line 2: a triple without reference"),
        ("list.csv", "input,reference,target\n", "no triple found"),
        ("list.txt", "", "no list of triples: a .csv with the columns input, reference, target"),
    ],
)
def test_lists_that_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=message):
        build_index("styles", SourceConfig(str(tmp_path / name), "triple"))


def test_a_triple_too_small_is_left_out(images):
    with pytest.raises(ValueError, match="8 too small"):
        ClipData(config(images, size=(64, 64))).describe()
