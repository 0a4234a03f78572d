"""Edited films: the mask at the clip's own frames, crop and size, box or tight, and what is refused."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from video_files import index_of, make_film, take

from datamodules import masks
from datamodules.clips import ClipData, NoOtherClip
from datamodules.config import ClipDataConfig, CropConfig, SourceConfig, StreamConfig
from datamodules.index import build_index
from datamodules.latents import save_latent
from datamodules.procedural import draw_frames
from datamodules.sources import SourceError

SIZE, LENGTH = (48, 64), 24


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "cache"))


def marked(t: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """What is edited in frame ``t``: a square of 12 that moves two pixels a frame, so that it tells which frame it is of."""
    out = np.zeros(size, bool)
    out[10:22, 2 + 2 * t : 14 + 2 * t] = True
    return out


def mask_folder(path: Path, num: int = LENGTH, size: tuple[int, int] = SIZE, white: int = 255) -> Path:
    path.mkdir()
    for t in range(num):
        Image.fromarray(marked(t, size).astype(np.uint8) * white).save(path / f"{t:03d}.png")
    return path


def mask_film(path: Path, num: int = LENGTH, size: tuple[int, int] = SIZE) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for t in range(num):
            frame = np.repeat(marked(t, size)[..., None].astype(np.uint8) * 255, 3, -1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def listed(folder: Path, *rows: tuple[str, ...], columns: str = "path,mask") -> Path:
    (folder / "list.csv").write_text("\n".join([columns, *(",".join(row) for row in rows)]) + "\n")
    return folder / "list.csv"


@pytest.fixture
def film(tmp_path) -> Path:
    return make_film(tmp_path / "film.mp4", LENGTH)


def config(path: Path, form: str = "tight", val: bool = False, num_workers: int = 0, **stream) -> ClipDataConfig:
    stream = StreamConfig(**{"sources": ["edits"], "size": SIZE, "num_frames": 5, "batch_size": 1, **stream})
    sources = {"edits": SourceConfig(str(path), "edit", mask=form, strides=(4, 8))}
    split = {"val" if val else "train": {"s": stream}}
    return ClipDataConfig(sources, **split, num_workers=num_workers)


# ---- boxes


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6])
def test_connected_parts(share):
    ndimage = pytest.importorskip("scipy.ndimage")
    draw = np.random.default_rng(0)
    for _ in range(20):
        edited = draw.random((23, 31)) < share
        labels, _ = ndimage.label(edited, structure=np.ones((3, 3)))
        expected = [(r.start, c.start, r.stop, c.stop) for r, c in ndimage.find_objects(labels)]
        assert sorted(masks.connected(edited)) == sorted(expected)


def test_boxes_are_enlarged_by_a_tenth_and_small_ones_left_out():
    edited = np.zeros((100, 120), bool)
    edited[30:60, 20] = edited[59, 20:60] = True  # an angle of 30 x 40: enlarged by 3 and 4, half on either side
    edited[80:89, 100:111] = True  # 99 pixels: noise
    edited[0:10, 110:120] = True  # 100 pixels, in the corner
    expected = np.zeros_like(edited)
    expected[29:62, 18:62] = expected[0:11, 110:120] = True
    assert np.array_equal(masks.boxes(edited), expected)
    assert not masks.boxes(np.zeros((5, 5), bool)).any()


# ---- batches


@pytest.mark.parametrize("kind", ["film", "folder"])
def test_the_mask_is_of_the_clips_own_frames_and_crop(film, tmp_path, kind):
    path = mask_film(tmp_path / "mask.mp4") if kind == "film" else mask_folder(tmp_path / "mask")
    data = ClipData(config(listed(tmp_path, ("film.mp4", path.name)), size=(32, 40), resize="none",
                           crop=CropConfig(random=1.0)), seed=1)  # fmt: skip
    truth, seen = draw_frames(0, 0, list(range(LENGTH)), SIZE), set()
    for batch in take(data, 8):
        assert set(batch) == {"video", "mask", "key"}
        assert batch["video"].shape == (1, 3, 5, 32, 40) and batch["mask"].shape == (1, 1, 5, 32, 40)
        start, box = batch["key"][0].split("#")[1].split("@")
        top, left = map(int, box.split(",")[:2])
        expected = [~marked(int(start) + i)[top : top + 32, left : left + 40] for i in range(5)]
        found = batch["mask"][0, 0].numpy()
        assert set(np.unique(found)) <= {0.0, 1.0}, "no values between"
        assert np.array_equal(found, np.stack(expected)), "1 outside the edit, 0 inside"
        cut = np.stack(truth)[:, top : top + 32, left : left + 40]
        distance = [np.abs((batch["video"][0, :, 0].permute(1, 2, 0).numpy() + 1) * 127.5 - one).mean() for one in cut]
        assert int(np.argmin(distance)) == int(start), "and the film's frames are the same ones"
        seen.add((start, top, left))
    assert len(seen) > 5


def test_a_folders_images_are_taken_in_the_order_of_their_numbers(film, tmp_path):
    """8.png comes before 10.png; what the Finder leaves beside them is no frame."""
    folder = mask_folder(tmp_path / "mask")
    for t in reversed(range(LENGTH)):
        (folder / f"{t:03d}.png").rename(folder / f"m{t}.png")
    (folder / "._m0.png").write_bytes(b"no image")
    (loader,) = ClipData(
        config(listed(tmp_path, ("film.mp4", "mask")), val=True, num_frames=13, window="first")
    ).val_dataloader()
    (batch,) = loader
    assert np.array_equal(batch["mask"][0, 0].numpy(), np.stack([~marked(t) for t in range(13)]))


def test_two_edits_of_a_film_are_two_clips_of_one_file(film, tmp_path):
    """Scores are told apart by their keys; and neither is the other's wrong reference."""
    mask_folder(tmp_path / "mask")
    Image.fromarray(marked(3).astype(np.uint8) * 255).save(tmp_path / "still.png")
    data = ClipData(config(listed(tmp_path, ("film.mp4", "mask"), ("film.mp4", "still.png")), val=True))
    keys = [key for batch in data.val_dataloader()[0] for key in batch["key"]]
    assert len(set(keys)) == 2 and data.num_val_files == 1
    for key in keys:
        with pytest.raises(NoOtherClip, match="all clips are of one file.*leave that control out"):
            data.another_clip(key)
    make_film(tmp_path / "other.mp4", LENGTH, film=1)
    rows = ("film.mp4", "mask"), ("film.mp4", "still.png"), ("other.mp4", "mask")
    data = ClipData(config(listed(tmp_path, *rows), val=True))
    clips = {batch["key"][0]: batch["video"][0] for batch in data.val_dataloader()[0]}
    first, second, other = clips
    assert data.num_val_files == 2
    assert all(torch.equal(data.another_clip(key), clips[other]) for key in (first, second))
    assert torch.equal(data.another_clip(other), clips[first])


def test_stills_and_other_rates(film, tmp_path):
    path = listed(tmp_path, ("film.mp4", mask_folder(tmp_path / "mask").name))
    (batch,) = take(ClipData(config(path, fps=12.5), seed=1), 1)
    start = int(batch["key"][0].split("#")[1].split("~")[0])
    assert np.array_equal(batch["mask"][0, 0].numpy(), np.stack([~marked(start + 2 * i) for i in range(5)]))
    (batch,) = take(ClipData(config(path, still=True), seed=1), 1)
    start = int(batch["key"][0].split("#")[1].split("@")[0])
    assert np.array_equal(batch["mask"][0, 0].numpy(), np.stack([~marked(start)] * 5))
    assert torch.equal(batch["video"][:, :, 0], batch["video"][:, :, 4])


def test_masks_are_resized_by_nearest_neighbour(film, tmp_path):
    path = listed(tmp_path, ("film.mp4", mask_folder(tmp_path / "mask").name))
    (loader,) = ClipData(config(path, val=True, size=(24, 32), window="first", resize="stretch")).val_dataloader()
    (batch,) = loader
    expected = np.stack([~marked(t)[1::2, 1::2] for t in range(5)])
    assert np.array_equal(batch["mask"][0, 0].numpy(), expected)


def test_one_image_serves_all_frames_and_boxes_are_the_default(film, tmp_path):
    angle = np.zeros(SIZE, np.uint8)
    angle[10:30, 20] = angle[29, 20:40] = 128  # grey above the middle counts as white
    Image.fromarray(np.stack([angle, 0 * angle, 0 * angle], -1)).save(tmp_path / "mask.png")  # in one channel
    path = listed(tmp_path, ("film.mp4", "mask.png"))
    assert SourceConfig(str(path), "edit").mask == "box"
    (tight,) = take(ClipData(config(path, "tight")), 1)
    (box,) = take(ClipData(config(path, "box")), 1)
    assert torch.equal(tight["mask"], tight["mask"][:, :, :1].expand(-1, -1, 5, -1, -1))
    assert np.array_equal(tight["mask"][0, 0, 0].numpy() == 0, angle > 0)
    assert np.array_equal(box["mask"][0, 0, 0].numpy() == 0, masks.boxes(angle > 0)) and not box["mask"].all()


# ---- edits with latents


def latent_list(folder: Path, size: tuple[int, int] = SIZE, frames: int = 5, name: str = "edit") -> Path:
    shape = (12, 1 + (frames - 1) // 4, size[0] // 8, size[1] // 8)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    save_latent(folder / f"{name}.safetensors", latent, space="dct", height=size[0], width=size[1])
    Image.fromarray(np.full((*SIZE, 3), 200, np.uint8)).save(folder / "first.png")
    return listed(
        folder, ("film.mp4", "mask", f"{name}.safetensors", "first.png"), columns="path,mask,latent,reference"
    )


def test_an_edits_latent_and_image_come_with_the_source_film(film, tmp_path):
    mask_folder(tmp_path / "mask")
    data = ClipData(config(latent_list(tmp_path), val=True))
    (batch,) = data.val_dataloader()[0]
    assert set(batch) == {"video", "mask", "latent", "reference", "key"}
    assert batch["latent"].shape == (1, 12, 2, 6, 8) and batch["reference"].shape == (1, 3, 1, *SIZE)
    assert torch.allclose(batch["reference"], torch.tensor(200 / 127.5 - 1))
    truth = np.stack(draw_frames(0, 0, [0], SIZE))
    assert batch["key"][0].startswith("edits/film.mp4+mask+edit.safetensors#0@"), (
        "the latent stands for the film's first frames"
    )
    assert np.abs((batch["video"][0, :, :1].permute(1, 2, 3, 0).numpy() + 1) * 127.5 - truth).mean() < 12
    assert data.latent_spaces == {"data.sources.edits": {"dct": 1}}


def test_latents_that_do_not_fit_a_stream(film, tmp_path):
    mask_folder(tmp_path / "mask")
    path = latent_list(tmp_path, size=(32, 32))
    with pytest.raises(ValueError, match="no clip survives.*1 with a latent of another size"):
        ClipData(config(path, val=True)).streams("val")
    path = latent_list(tmp_path)
    with pytest.raises(ValueError, match="no clip survives.*1 too short"):
        ClipData(config(path, val=True, num_frames=9)).streams("val")
    with pytest.raises(ValueError, match=r"with strides \[4, 8\], 6 frames are no number"):
        ClipData(config(path, val=True, num_frames=6)).streams("val")
    with pytest.raises(ValueError, match="so no fps, still, extend"):
        ClipData(config(path, val=True, fps=12.5)).streams("val")
    made = config(path, val=True)
    other = tmp_path / "other"
    other.mkdir()
    made.sources["more"] = SourceConfig(str(listed(other, ("../film.mp4", "../mask"))), "edit", mask="tight")
    made.val["s"].sources.append("more")
    with pytest.raises(ValueError, match="with latents and edits without make no batch"):
        ClipData(made).streams("val")


# ---- what is refused


def test_masks_of_another_length_or_size_are_quarantined(tmp_path):
    rows = []
    for i in range(12):
        make_film(tmp_path / f"{i}.mp4", 12, film=i)
        rows.append((f"{i}.mp4", "mask"))
    mask_folder(tmp_path / "mask", 12)
    mask_folder(tmp_path / "short", 11)
    mask_film(tmp_path / "large.mp4", 12, (64, 96))
    (tmp_path / "empty").mkdir()
    rows[2:6] = ("2.mp4", "short"), ("3.mp4", "large.mp4"), ("4.mp4", "empty"), ("5.mp4", "none.png")
    made = config(listed(tmp_path, *rows))
    made.max_bad_share = 0.5
    data = ClipData(made, run_dir=tmp_path / "run")
    assert {batch["key"][0].split("#")[0] for batch in take(data, 30)} == {
        f"edits/{i}.mp4+mask" for i in range(12) if i not in (2, 3, 4, 5)
    }
    lines = map(json.loads, (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines())
    reasons = {Path(entry["path"]).name: entry["reason"] for entry in lines}
    assert reasons.keys() == {"2.mp4", "3.mp4", "empty", "none.png"}
    assert "its mask has 11 frames and it 12: frame i of one belongs to frame i of the other" in reasons["2.mp4"]
    assert "its mask is 64x96 and it 48x64 pixels" in reasons["3.mp4"]
    assert "holds no images" in reasons["empty"] and "cannot be opened" in reasons["none.png"]


def test_masks_that_change_or_mark_everything_are_told_on_reading(film, tmp_path):
    folder = mask_folder(tmp_path / "mask")
    path = listed(tmp_path, ("film.mp4", "mask"))
    data = ClipData(config(path, val=True, window="first"))
    data.streams("val")

    def said() -> str:
        with pytest.raises(RuntimeError, match="a validation clip, which nothing may replace") as error:
            list(ClipData(config(path, val=True, window="first")).val_dataloader()[0])
        return str(error.value)

    Image.fromarray(np.full(SIZE, 255, np.uint8)).save(folder / "003.png")
    assert f"{folder}: marks all of the clip's frame 3 as edited, so nothing of it can be scored" in said()
    for t in range(LENGTH):
        Image.fromarray(marked(t).astype(np.uint8)).save(folder / f"{t:03d}.png")
    assert "its largest value is 1: white (255) marks what was edited" in said()
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(folder / "000.png")
    assert "its images are of different sizes: [(24, 32), (48, 64)]" in said()
    (folder / "000.png").write_bytes(b"no image")
    assert "not a readable image" in said()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,masks\nfilm.mp4,mask\n", "has no column 'mask'"),
        ("path,mask\nfilm.mp4,\n", "line 2: an edit without mask"),
        ("path,mask,latent,reference\nfilm.mp4,mask,a.safetensors,\n", "line 2: latent and reference come together"),
        ("path,mask,latent,reference\nfilm.mp4,mask,a.pt,a.png\nfilm.mp4,mask,,\n", "has latents in some lines only"),
    ],
)
def test_lists_that_are_refused(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(SourceError, match=message):
        build_index("edits", SourceConfig(str(tmp_path / "list.csv"), "edit"))
    with pytest.raises(
        SourceError, match="no list of edits: a .csv with the columns path, mask, see datamodules/masks.py"
    ):
        build_index("edits", SourceConfig(str(tmp_path), "edit"))


def test_streams_that_are_refused(tmp_path):
    sources = {
        "edits": SourceConfig("a.csv", "edit"),
        "tight": SourceConfig("b.csv", "edit", mask="tight"),
        "films": SourceConfig("c.csv"),
    }
    for names, message in (
        (["edits", "tight"], "box and tight masks"),
        (["edits", "films"], "but batches of edits hold"),
    ):
        with pytest.raises(ValueError, match=message):
            ClipDataConfig(sources, val={"s": StreamConfig(names)})


def test_index_of_is_shared(film, tmp_path):
    """The film beside the mask is read as any film is."""
    path = listed(tmp_path, ("film.mp4", mask_folder(tmp_path / "mask").name))
    (batch,) = take(ClipData(config(path), seed=3), 1)
    with av.open(str(film)) as container:
        truth = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    start = int(batch["key"][0].split("#")[1].split("@")[0])
    assert index_of(batch["video"][0], truth) == list(range(start, start + 5))
