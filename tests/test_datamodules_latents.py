"""Saved latents: file formats, what is refused, the stream of a data set, and streams that alternate."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from video_files import cut, keys, take

from datamodules.clips import ClipData
from datamodules.config import ClipDataConfig, CropConfig, SourceConfig, StreamConfig
from datamodules.index import NotNormalised, build_index
from datamodules.latents import find_reference, inspect_latent, load_latent, save_latent
from datamodules.plan import MixturePlan, Position
from datamodules.probe import BadFile
from datamodules.quarantine import TooManyBadFiles
from datamodules.streams import EmptyStream, Stream

# Per channel statistics of Wan 2.1's autoencoder (diffusers' AutoencoderKLWan, latents_mean and latents_std).
WAN_MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
WAN_MEAN += [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
WAN_STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
WAN_STD += [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]
SAID = {"space": "wan21", "height": 32, "width": 48}


def normal(n: int = 3, c: int = 16, seed: int = 0) -> torch.Tensor:
    """A latent like those of a diffusion model, for 32x48 pixels."""
    return torch.randn(c, n, 4, 6, generator=torch.Generator().manual_seed(seed))


def denormalised(latent: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (WAN_MEAN, WAN_STD))
    return latent * std + mean


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (50, 70)) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten latents of nine frames with a reference image beside each."""
    root = tmp_path / "latents"
    root.mkdir()
    for i in range(10):
        save_latent(root / f"{i}.safetensors", normal(seed=i), **SAID, prompt=f"film {i}", seed=i)
        picture(root / f"{i}.png", i)
    return root


def config(folder: Path, batch_size: int = 2, **options) -> ClipDataConfig:
    """Latents alone."""
    stream = StreamConfig(["saved"], (32, 48), 9, batch_size=batch_size)
    defaults = {
        "sources": {"saved": SourceConfig(str(folder), "latent")},
        "train": {"latent": stream},
        "num_workers": 0,
    }
    return ClipDataConfig(**{**defaults, **options})


# ---- files


def test_what_is_saved_is_read(tmp_path):
    save_latent(tmp_path / "a.safetensors", normal(), **SAID, prompt="a bird", seed=7, fps=16)
    latent, header = load_latent(str(tmp_path / "a.safetensors"))
    assert torch.equal(latent, normal()) and latent.dtype == torch.float32
    assert (header.channels, header.frames, header.rows, header.columns) == (16, 3, 4, 6)
    assert (header.space, header.height, header.width, header.prompt) == ("wan21", 32, 48, "a bird")
    assert (header.seed, header.fps) == (7, 16.0)
    assert inspect_latent(str(tmp_path / "a.safetensors")) == header
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"], "nothing temporary stays"


@pytest.mark.parametrize("form", ["tensor", "clip", "bf16", "released", "old"])
def test_what_torch_saved_is_read(tmp_path, form):
    path, latent = tmp_path / "a.pt", normal()
    content = {
        "tensor": latent[None],
        "clip": latent,
        "bf16": latent[None].bfloat16(),
        "released": {
            "latents": latent[None],
            "height": 32,
            "width": 48,
            "image_name": "x.jpg",
            "prompt": "p",
            "seed": 5,
        },
        "old": latent[None],
    }[form]
    torch.save(content, path, _use_new_zipfile_serialization=form != "old")
    found, header = load_latent(str(path))
    assert torch.equal(found, latent.bfloat16().float() if form == "bf16" else latent)
    assert header.frames == inspect_latent(str(path)).frames == 3
    if form == "released":
        assert (header.image, header.seed, header.prompt, header.height) == ("x.jpg", 5, "p", 32)


def test_latents_are_normalised_where_the_file_says_how(tmp_path):
    raw = denormalised(normal())
    save_latent(tmp_path / "a.safetensors", raw, **SAID, mean=WAN_MEAN, std=WAN_STD)
    torch.save({"latents": raw, "normalised": False, "mean": WAN_MEAN, "std": WAN_STD}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        assert torch.allclose(load_latent(str(tmp_path / name))[0], normal(), atol=1e-5)


@pytest.mark.parametrize(
    ("mean", "std", "passes"), [(0.9, 1, 1), (-1.1, 1, 0), (0, 0.25, 1), (0, 0.15, 0), (0, 1.8, 1), (0, 2, 0)]
)
def test_the_rule_about_statistics(tmp_path, mean, std, passes):
    values = normal()
    values = (values - values.mean()) / values.std() * std + mean
    save_latent(tmp_path / "a.safetensors", values, **SAID)
    if passes:
        load_latent(str(tmp_path / "a.safetensors"))
    else:
        with pytest.raises(BadFile, match=rf"its mean is -?{abs(mean):.2f} and its standard deviation {std:.2f}"):
            load_latent(str(tmp_path / "a.safetensors"))


class Anything:
    """A class that no latent needs."""


@pytest.mark.parametrize(
    ("content", "metadata", "message"),
    [
        ({"latent": normal()}, {}, "do not say whether it is normalised; write normalised=true"),
        ({"latent": normal()}, {"normalised": "perhaps"}, "do not say whether"),
        ({"latent": normal()}, {"normalised": "false"}, "lack mean or std: subtract the latent space's mean"),
        (
            {"latent": normal()},
            {"normalised": "false", "mean": "[0]", "std": "[1]"},
            "mean has 1 numbers for 16 channels",
        ),
        ({"latent": normal()}, {"normalised": "false", "mean": "much"}, "mean is no list of numbers: much"),
        ({"latent": normal()}, {"normalised": "true", "height": "tall"}, "height is 'tall', which is no int"),
        ({"latent": normal()}, {"normalised": "true", "seed": "x"}, "seed is 'x'"),
        ({"latent": normal()[0]}, {"normalised": "true"}, r"\(3, 4, 6\); a file holds one clip"),
        ({"latent": normal().expand(2, -1, -1, -1, -1).clone()}, {"normalised": "true"}, "a file holds one clip"),
        ({"latents": normal(), "x": normal()}, {"normalised": "true"}, "no tensor 'latent', only latents, x"),
        (
            {"latent": denormalised(normal())},
            {"normalised": "true"},
            "not normalised: its mean is .* deviation 2.[0-9]",
        ),
        ({"latent": torch.zeros(16, 3, 4, 6)}, {"normalised": "true"}, "not normalised: its mean is 0.00 and .* 0.00"),
        ({"latent": normal() + 2}, {"normalised": "true"}, "not normalised: its mean is [12]"),
        ({"latent": normal() / 0}, {"normalised": "true"}, "not finite"),
    ],
)
def test_files_that_are_refused(tmp_path, content, metadata, message):
    save_file(content, tmp_path / "a.safetensors", metadata)
    with pytest.raises(BadFile, match=message):
        load_latent(str(tmp_path / "a.safetensors"))


def test_damaged_files_and_pickles_are_refused(tmp_path, folder):
    torch.save(Anything(), tmp_path / "object.pt")
    torch.save({"images": normal()}, tmp_path / "other.pt")
    torch.save(normal(), tmp_path / "whole.pt")
    cut(tmp_path / "whole.pt", tmp_path / "half.pt", 0.5)
    cut(folder / "0.safetensors", tmp_path / "half.safetensors", 0.5)
    (tmp_path / "empty.safetensors").write_bytes(b"")
    messages = {
        "object.pt": "not a readable latent", "other.pt": "holds no tensor 'latents' or 'latent', but dict.images",
        "half.pt": "not a readable latent", "half.safetensors": "not a readable latent", "empty.safetensors": "empty file",
        "missing.pt": "cannot be opened",
    }  # fmt: skip
    for name, message in messages.items():
        with pytest.raises(BadFile, match=message):
            inspect_latent(str(tmp_path / name))


def test_the_rule_about_statistics_knows_real_latents(assets, tmp_path):
    """Generated Wan 2.1 latents pass as they are, and are refused as they would be before normalisation."""
    (latent,) = torch.load(assets / "latents" / "test_latents_wan21.pth", map_location="cpu", weights_only=True)
    torch.save(latent, tmp_path / "normalised.pt")
    torch.save(denormalised(latent.float()), tmp_path / "raw.pt")
    assert load_latent(str(tmp_path / "normalised.pt"))[1].frames == latent.shape[1]
    with pytest.raises(BadFile, match="not normalised"):
        load_latent(str(tmp_path / "raw.pt"))


def test_a_reference_is_found_beside(tmp_path):
    path = str(tmp_path / "a b.pt")
    assert find_reference(path) == find_reference(path, "crop.jpg") == ""
    picture(tmp_path / "crop.jpg")
    assert find_reference(path, "crop.jpg") == str(tmp_path / "crop.jpg")
    picture(tmp_path / "a b.jpg")
    assert find_reference(path, "crop.jpg") == str(tmp_path / "a b.jpg")


# ---- streams


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_the_contract(folder, workers):
    batches = take(ClipData(config(folder, num_workers=workers), seed=1), 5)
    assert sorted(key for batch in batches for key in batch["key"]) == [
        f"saved/{i}.safetensors#0@32x48x9" for i in range(10)
    ]
    for batch in batches:
        assert set(batch) == {"latent", "reference", "key"}
        assert batch["latent"].shape == (2, 16, 3, 4, 6) and batch["reference"].shape == (2, 3, 1, 32, 48)
        for latent, reference, key in zip(batch["latent"], batch["reference"], batch["key"], strict=True):
            number = int(key[6])
            assert torch.equal(latent, normal(seed=number))
            image = Image.open(folder / f"{number}.png").resize((48, 32), Image.Resampling.LANCZOS)
            assert torch.allclose((reference[:, 0].permute(1, 2, 0) + 1) * 127.5, torch.tensor(np.array(image)).float())
    assert keys(take(ClipData(config(folder), seed=1), 5)) == keys(batches)


def test_a_list_names_files_and_references(folder, tmp_path):
    picture(tmp_path / "other.jpg", 99)
    torch.save(normal(seed=0)[None], folder / "10.pt")
    (tmp_path / "list.csv").write_text(
        "path,reference,prompt,seed\nlatents/10.pt,other.jpg,a bird,3\nlatents/1.safetensors,,,\n"
    )
    index = build_index("saved", SourceConfig(f"{tmp_path}/list.csv", "latent"))
    assert [index.references[i] for i in range(2)] == [f"{tmp_path}/other.jpg", f"{folder}/1.png"]
    assert index.spaces == {"": 1, "wan21": 1}
    batch = take(ClipData(config(tmp_path / "list.csv")), 1)[0]
    assert sorted(batch["key"])[1].startswith("saved/latents/10.pt#0@")


def test_what_does_not_fit_is_left_out_and_counted(folder):
    save_latent(folder / "long.safetensors", normal(5, seed=50), **SAID)
    save_latent(folder / "short.safetensors", normal(2), **SAID)
    save_latent(folder / "wide.safetensors", torch.randn(16, 3, 4, 7), **{**SAID, "width": 56})
    for name in ("long", "short", "wide"):
        picture(folder / f"{name}.png")
    data = ClipData(config(folder, batch_size=1))
    described = data.describe()["train"]["latent"]
    assert described["dropped"] == {"of another size": 1, "too short": 1}
    assert (described["clips"], described["files_found"]) == (11, 13)
    batch = next(batch for batch in take(data, 11) if "long" in batch["key"][0])
    assert torch.equal(batch["latent"][0], normal(5, seed=50)[:, :3]), "of a longer film its first frames"
    assert data.latent_spaces == {"data.sources.saved": {"wan21": 13}}
    with pytest.raises(EmptyStream, match="data.train.latent: no clip survives.*13 of another size"):
        ClipData(config(folder, train={"latent": StreamConfig(["saved"], (64, 48), 9)})).describe()


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0)])
def test_resuming_equals_going_on(folder, before, after):
    whole = keys(take(ClipData(config(folder), seed=1), 12))
    first = ClipData(config(folder, num_workers=before), seed=1)
    assert keys(take(first, 7)) == whole[:7]
    second = ClipData(config(folder, num_workers=after), seed=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert keys(take(second, 5)) == whole[7:]


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_replaced_and_written_down(folder, tmp_path, workers):
    """Found by the index: a file cut short, one without an image. Found on reading: a damaged image, raw values."""
    for i in range(10, 30):
        save_latent(folder / f"{i}.safetensors", normal(seed=i), **SAID)
        picture(folder / f"{i}.png", i)
    cut(folder / "3.safetensors", folder / "3.safetensors", 0.5)
    (folder / "4.png").unlink()
    cut(folder / "5.png", folder / "5.png", 0.5)
    save_latent(folder / "7.safetensors", denormalised(normal()), **SAID)
    data = ClipData(config(folder, max_bad_share=0.2, num_workers=workers), seed=1, run_dir=tmp_path / "run")
    batches = take(data, 30)
    shown = {key.split("#")[0] for batch in batches for key in batch["key"]}
    assert all(len(batch["key"]) == 2 for batch in batches)
    assert shown == {f"saved/{i}.safetensors" for i in range(30) if i not in (3, 4, 5, 7)}
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    reasons = {Path(entry["path"]).name: entry["reason"] for entry in map(json.loads, lines)}
    assert set(reasons) == {"3.safetensors", "4.safetensors", "5.png", "7.safetensors"}
    assert "not a readable latent" in reasons["3.safetensors"] and "no reference image: put" in reasons["4.safetensors"]
    assert "reference: not a readable image" in reasons["5.png"] and "not normalised" in reasons["7.safetensors"]


def test_a_set_of_raw_latents_is_refused_before_training(folder):
    for i in range(10):
        save_latent(folder / f"{i}.safetensors", denormalised(normal(seed=i)), **SAID)
    with pytest.raises(
        NotNormalised, match=r"data.sources.saved: 8 of 8 latents looked at.*safetensors: not normalised"
    ):
        ClipData(config(folder)).prepare_data()


def test_wrong_strides_are_told(folder):
    source = SourceConfig(str(folder), "latent", strides=(4, 16))
    with pytest.raises(TooManyBadFiles, match=r"32x48 pixels, but 4x6 latent pixels are 64x96 with strides \[4, 16\]"):
        ClipData(config(folder, sources={"saved": source})).prepare_data()


def test_spaces_do_not_mix_in_a_batch(folder):
    save_latent(folder / "x.safetensors", normal(c=8), **SAID)
    picture(folder / "x.png")
    with pytest.raises(ValueError, match=r"data.train.latent: .* with channels 8 \(.*x.safetensors\), 16"):
        ClipData(config(folder)).prepare_data()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_frames": 10},
            r"with strides \[4, 8\], 10 frames are no number of latent frames; the nearest are 9 or 13",
        ),
        ({"size": (32, 50)}, r"size \[32, 50\] is no multiple of 8"),
        ({"crop": CropConfig(random=1.0)}, "used whole"),
        ({"resize": "none"}, "used whole"),
        ({"fps": 15.0}, "used whole"),
        ({"extend": (0, 4)}, "used whole"),
        ({"sources": ["saved", "motion"]}, "kinds latent, procedural.*a stream of its own"),
    ],
)
def test_streams_that_cannot_be_are_refused(options, message):
    sources = {"saved": SourceConfig("/x", "latent"), "motion": SourceConfig(kind="procedural")}
    stream = StreamConfig(**{"sources": ["saved"], "size": (32, 48), "num_frames": 9, **options})
    with pytest.raises(ValueError, match="data.train.x: .*" + message):
        ClipDataConfig(sources, {"x": stream})


def test_latents_are_no_validation_clips():
    with pytest.raises(ValueError, match="data.val.x: saved latents have no target"):
        ClipDataConfig({"s": SourceConfig("/x", "latent")}, val={"x": StreamConfig(["s"], (32, 48), 9)})


def test_frames_of_latents():
    causal, plain = SourceConfig("/x", "latent"), SourceConfig("/x", "latent", causal=False)
    assert [causal.pixel_frames(n) for n in (1, 2, 5)] == [1, 5, 17] and causal.latent_frames(17) == 5
    assert [plain.pixel_frames(n) for n in (1, 4)] == [4, 16] and plain.latent_frames(16) == 4
    for source, frames, near in ((causal, 4, "1 or 5"), (plain, 17, "16 or 20"), (plain, 3, "4 or 8")):
        with pytest.raises(ValueError, match=near):
            source.latent_frames(frames)


# ---- alternation


def alternating(folder: Path, **options) -> ClipDataConfig:
    films = SourceConfig(kind="procedural", num_videos=7, num_frames=24, size=(32, 48))
    train = {
        "video": StreamConfig(["films"], (32, 48), 9, batch_size=1),
        "latent": StreamConfig(["saved"], (32, 48), 9, batch_size=2),
    }
    sources = {"films": films, "saved": SourceConfig(str(folder), "latent")}
    return config(folder, sources=sources, train=train, order="alternate", **options)


def test_streams_alternate_strictly_on_all_ranks_and_after_a_resume(folder):
    whole = take(ClipData(alternating(folder), seed=1), 11)
    assert ["latent" in batch for batch in whole] == [bool(step % 2) for step in range(11)]
    assert all(("video" in batch) != ("latent" in batch) for batch in whole)
    latents = [key for batch in whole[1::2] for key in batch["key"]]
    assert len(set(latents)) == 10, "an epoch holds every file once"
    for at in (4, 5):
        first = ClipData(alternating(folder, num_workers=1), seed=1)
        take(first, at)
        second = ClipData(alternating(folder), seed=1)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert keys(take(second, 11 - at)) == keys(whole)[at:]
    ranks = [take(ClipData(alternating(folder), seed=1, world_size=2, rank=rank), 6) for rank in range(2)]
    assert ["latent" in batch for batch in ranks[1]] == [bool(step % 2) for step in range(6)]
    assert all(not set(a["key"]) & set(b["key"]) for a, b in zip(*ranks, strict=True))


def test_three_streams_take_turns_and_the_plan_is_a_function_of_the_step():
    index = build_index("s", SourceConfig(kind="procedural", num_videos=3, num_frames=20, size=(16, 16)))
    streams = {n: Stream(n, StreamConfig(["s"], (16, 16), 5, share=1 / 3), [index], n) for n in "abc"}
    plan = MixturePlan(streams, 0, order="alternate")
    assert "".join(plan.stream_at(step) for step in range(300)) == "abc" * 100
    assert plan.stream_at(10**9) == "b"
    names = [batch[0].name for batch in islice(plan.batches(Position(), 0), 9)]
    assert all(len(set(names[i::3])) == 3 for i in range(3)), "each stream has its own epochs"


def test_unequal_shares_do_not_alternate():
    sources = {"s": SourceConfig(kind="procedural")}

    def made(order: str, *shares: float) -> ClipDataConfig:
        train = {name: StreamConfig(["s"], share=share) for name, share in zip("ab", shares, strict=False)}
        return ClipDataConfig(sources, train, order=order)

    made("alternate", 0.5, 0.5), made("alternate", 1.0, 1.0), made("shares", 0.5, 0.5)
    with pytest.raises(
        ValueError, match="shares must be equal, got a 0.8, b 0.2: make them so, leave them out, or set"
    ):
        made("alternate", 0.8, 0.2)
    with pytest.raises(ValueError, match="must sum to 1"):
        made("shares", 1.0, 1.0)
