"""Latents of pipelines with their seeds: equal to what the pipeline would decode, resumable, and refused where unclear."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from datamodules.latents import load_latent
from datamodules.stills import load_reference
from experiments import generate as command
from experiments import pipeline_folder
from experiments.bench_all import read_options
from experiments.compose import ConfigError
from experiments.generate import GenerateConfig
from experiments.prompts import read_prompts, suite_of
from tests.tiny_pipelines import IMAGE_KINDS, NUM_FRAMES, SIZES, space_of, tiny_image, tiny_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """``folders(kind)``: a tiny pipeline as ``save_pretrained`` writes it."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny_pipeline(kind).save_pretrained(made[kind])
        return made[kind]

    return folder


def options(folder: Path, prompts: Path, out: Path, kind: str = "wan_t2v", **more) -> GenerateConfig:
    height, width = SIZES[space_of(kind)]
    frames = NUM_FRAMES[space_of(kind)]
    fixed = {"height": height, "width": width, "num_frames": frames, "steps": 2, "dtype": "fp32", "device": "cpu"}
    return GenerateConfig(str(folder), str(prompts), str(out), **fixed | more)


def two_prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("# what is asked for\na red kite over the sea\n\na boat, far away\n")
    return path


def with_images(folder: Path, kind: str) -> Path:
    tiny_image(*SIZES[space_of(kind)], seed=3).save(folder / "first.png")
    path = folder / "prompts.csv"
    path.write_text("prompt,image,seed\na red kite over the sea,first.png,7\n")
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "wan_t2v",
        "wan_i2v",
        "ltx_t2v",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("wan22_t2v", "wan22_i2v", "ltx_i2v")),
    ],
)
def test_saved_latents_are_what_the_pipeline_decodes(kind: str, folders, tmp_path: Path) -> None:
    """Held against what the pipeline's autoencoder is given when it decodes by itself: raw, laid out and scaled."""
    prompts = with_images(tmp_path, kind) if kind in IMAGE_KINDS else two_prompts(tmp_path)
    config = options(folders(kind), prompts, tmp_path / "out", kind)
    counts = command.generate(config)
    clips = command.clips_of(read_prompts(str(prompts)), config)
    assert counts == {"made": len(clips), "there": 0, "failed": 0}

    folder = pipeline_folder.read_folder(str(folders(kind)))
    pipe = pipeline_folder.load_pipeline(folder, "fp32", "cpu")
    seen = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda raw, *args, **more: (seen.append(raw), decode(raw, *args, **more))[1]
    clip = clips[0]
    call = command.arguments_of(folder, config) | {"prompt": clip.prompt.text}
    if kind in IMAGE_KINDS:
        call["image"] = pipeline_folder.resized(clip.prompt.image, SIZES[space_of(kind)])
    pipe(**call, generator=torch.Generator().manual_seed(clip.seed), output_type="pt")

    latent, header = load_latent(str(clip.path))
    if space_of(kind) == "ltx":
        mean, std = pipe.vae.latents_mean, pipe.vae.latents_std / pipe.vae.config.scaling_factor
    else:
        mean, std = (torch.tensor(pipe.vae.config[key]) for key in ("latents_mean", "latents_std"))
    expected = (seen[0][0] - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5)
    assert (header.height, header.width) == SIZES[space_of(kind)]
    assert (header.prompt, header.seed, header.space) == (clip.prompt.text, clip.seed, folder.space.fingerprint)
    assert header.fps == {"wan": 16, "wan22": 24, "ltx": 25}[space_of(kind)]
    if kind in IMAGE_KINDS:
        assert clip.seed == 7
        seen_image = load_reference(str(clip.reference), SIZES[space_of(kind)])
        assert torch.equal(seen_image, load_reference(clip.prompt.image, SIZES[space_of(kind)]))


def test_goes_on_where_it_stopped_and_seeds_do_not_depend_on_it(folders, tmp_path: Path, monkeypatch) -> None:
    prompts, out = two_prompts(tmp_path), tmp_path / "out"
    config = options(folders("ltx_t2v"), prompts, out, "ltx_t2v", samples=2)
    real, calls = pipeline_folder.call_latents, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(pipeline_folder, "call_latents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.generate(config)
    assert len(rows_of(out)) == 1  # what is there is listed
    assert command.generate(config) == {"made": 3, "there": 1, "failed": 0}
    assert command.generate(config) == {"made": 0, "there": 4, "failed": 0}
    rows = rows_of(out)
    assert sorted((row["prompt"], row["index"]) for row in rows) == [
        (prompt, index) for prompt in ("a boat, far away", "a red kite over the sea") for index in "01"
    ]
    assert len({row["seed"] for row in rows}) == 4

    reversed_prompts = tmp_path / "reversed.txt"
    reversed_prompts.write_text("a boat, far away\na red kite over the sea\n")
    other = options(folders("ltx_t2v"), reversed_prompts, tmp_path / "other", "ltx_t2v", samples=2)
    command.generate(other)
    for row in rows_of(tmp_path / "other"):
        mine, theirs = (load_latent(str(folder / row["path"]))[0] for folder in (out, tmp_path / "other"))
        assert torch.equal(mine, theirs)


def test_other_settings_do_not_share_a_folder(folders, tmp_path: Path) -> None:
    prompts, out = two_prompts(tmp_path), tmp_path / "out"
    command.generate(options(folders("ltx_t2v"), prompts, out, "ltx_t2v"))
    with pytest.raises(ConfigError, match=r"other settings \(call: .*num_inference_steps.*overwrite=true"):
        command.generate(options(folders("ltx_t2v"), prompts, out, "ltx_t2v", steps=3))
    before = load_latent(str(next(out.glob("*.safetensors"))))[0]
    counts = command.generate(options(folders("ltx_t2v"), prompts, out, "ltx_t2v", steps=3, overwrite=True))
    assert counts["made"] == 2
    assert not torch.equal(before, load_latent(str(next(out.glob("*.safetensors"))))[0])
    assert json.loads((out / command.SETTINGS).read_text())["call"]["num_inference_steps"] == 3


def test_an_interrupted_overwrite_leaves_no_clip_of_the_old_settings(folders, tmp_path: Path, monkeypatch) -> None:
    prompts, out = two_prompts(tmp_path), tmp_path / "out"
    command.generate(options(folders("ltx_t2v"), prompts, out, "ltx_t2v"))
    real = pipeline_folder.call_latents
    monkeypatch.setattr(pipeline_folder, "call_latents", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        command.generate(options(folders("ltx_t2v"), prompts, out, "ltx_t2v", steps=3, overwrite=True))
    assert rows_of(out) == []
    monkeypatch.setattr(pipeline_folder, "call_latents", real)
    assert command.generate(options(folders("ltx_t2v"), prompts, out, "ltx_t2v", steps=3))["made"] == 2


def test_clips_are_listed_as_they_are_made(folders, tmp_path: Path, monkeypatch) -> None:
    """Whatever ends the process, the list names what is there."""
    out, real, listed = tmp_path / "out", pipeline_folder.call_latents, []
    monkeypatch.setattr(
        pipeline_folder,
        "call_latents",
        lambda *given: (listed.append((out / command.LIST).is_file() and len(rows_of(out))), real(*given))[1],
    )
    command.generate(options(folders("ltx_t2v"), two_prompts(tmp_path), out, "ltx_t2v"))
    assert listed == [False, 1]


def test_another_seed_or_negative_prompt_is_another_latent(folders, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.csv", tmp_path / "out"
    config = options(folders("ltx_t2v"), prompts, out, "ltx_t2v")
    prompts.write_text("prompt,seed,negative_prompt\na kite,7,blurry\n")
    command.generate(config)
    for line, message in (("8,blurry", "seed 7, not 8"), ("7,dull", "negative_prompt 'blurry', not 'dull'")):
        prompts.write_text(f"prompt,seed,negative_prompt\na kite,{line}\n")
        with pytest.raises(ConfigError, match=f"is there with {message}: choose another out"):
            command.generate(config)
    assert [(row["seed"], row["negative_prompt"]) for row in rows_of(out)] == [("7", "blurry")]
    next(out.glob("*.safetensors")).write_bytes(b"cut")
    with pytest.raises(ConfigError, match="delete it, then run the same command"):
        command.generate(config)


def test_the_size_follows_the_image(folders, tmp_path: Path) -> None:
    """RefDecoder's rule: the area is kept, sides are floored to multiples."""
    tiny_image(100, 200).save(tmp_path / "wide.png")
    assert pipeline_folder.size_of_image(str(tmp_path / "wide.png"), 480 * 832, 16) == (432, 880)  # 446.8 x 893.7
    (tmp_path / "prompts.csv").write_text("prompt,image\na kite,wide.png\n")
    config = options(folders("ltx_i2v"), tmp_path / "prompts.csv", tmp_path / "out", "ltx_i2v")
    config.height = config.width = None
    config.area = 66 * 130
    assert command.generate(config)["made"] == 1
    _, header = load_latent(str(next((tmp_path / "out").glob("*.safetensors"))))
    assert (header.height, header.width) == (64, 128)


@pytest.mark.parametrize(
    ("kind", "text", "more", "message"),
    [
        ("wan_i2v", "prompt\na kite\n", {}, "starts from images, and 1 of 1 prompts have none"),
        ("wan_t2v", "prompt,image\na kite,first.png\n", {}, "takes no image"),
        ("wan_t2v", "text\na kite\n", {}, "has no column prompt"),
        ("wan_t2v", "prompt,seed\na kite,-1\n", {}, "line 2: the seed '-1' is no whole number"),
        ("wan_t2v", "prompt,image\na kite,gone.png\n", {}, "1 images are not there"),
        ("wan_t2v", "prompt\n", {}, "holds no prompt"),
        ("wan_t2v", "prompt,seed\na kite,1\na kite,2\n", {}, "twice"),
        ("wan_t2v", "prompt\na kite\n", {"num_frames": 6}, "the nearest is 5 or 9"),
        ("wan_t2v", "prompt\na kite\n", {"height": 30}, "multiples of 8"),
        ("ltx_t2v", "prompt\na kite\n", {"guidance_2": 3.0}, "takes no guidance_scale_2"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(kind, text, more, message, folders, tmp_path: Path) -> None:
    tiny_image(32, 48).save(tmp_path / "first.png")
    (tmp_path / "prompts.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        command.generate(options(folders(kind), tmp_path / "prompts.csv", tmp_path / "out", kind, **more))
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_without_accelerate_and_ftfy_the_packages_are_named(folders, tmp_path: Path, monkeypatch) -> None:
    from diffusers.pipelines.wan import pipeline_wan_i2v

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else there(name))
    monkeypatch.delattr(pipeline_wan_i2v, "ftfy")
    with pytest.raises(ConfigError, match=r"needs accelerate: pip install accelerate$"):
        command.generate(options(folders("wan_t2v"), two_prompts(tmp_path), tmp_path / "out"))
    with pytest.raises(ConfigError, match="pip install accelerate ftfy"):
        command.generate(options(folders("wan_i2v"), with_images(tmp_path, "wan_i2v"), tmp_path / "out", "wan_i2v"))


def test_folders_that_are_no_pipeline(folders, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no pipeline's folder"):
        pipeline_folder.read_folder(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        pipeline_folder.read_folder(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(ConfigError, match="which diffusers .* does not have"):
        pipeline_folder.read_folder(str(tmp_path))
    with pytest.raises(ConfigError, match="prompts is needed"):
        read_options([f"pipeline={folders('wan_t2v')}"], GenerateConfig)


def test_a_failed_clip_is_told_and_the_others_are_made(folders, tmp_path: Path, monkeypatch, capsys) -> None:
    real = pipeline_folder.call_latents

    def failing(pipe, folder, given, seed):
        if "boat" in given["prompt"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pipe, folder, given, seed)

    monkeypatch.setattr(pipeline_folder, "call_latents", failing)
    arguments = {"height": 64, "width": 96, "num_frames": 9, "steps": 2, "dtype": "fp32", "device": "cpu"}
    arguments |= {"pipeline": folders("ltx_t2v"), "prompts": two_prompts(tmp_path), "out": tmp_path / "out"}
    assert command.main([f"{key}={value}" for key, value in arguments.items()]) == 1
    assert "failed: CUDA out of memory" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "out")) == 1


def test_benchmark_lists(tmp_path: Path) -> None:
    """VBench's lists: how many videos each scorer reads, images of VBench-I2V, prompts that dimensions share."""
    both = [{"prompt_en": "a dog runs", "dimension": ["motion_smoothness", "dynamic_degree"]}]
    both += [{"prompt_en": "a stop sign", "dimension": ["temporal_flickering"]}]
    (tmp_path / "vbench.json").write_text(json.dumps(both))
    assert suite_of(both) == "vbench"
    found = read_prompts(str(tmp_path / "vbench.json"), dimensions=["temporal_flickering"])
    assert [(prompt.text, prompt.samples) for prompt in found] == [("a stop sign", 5)]

    second = [{"prompt_en": "a toy", "dimension": ["Diversity"]}, {"prompt_en": "a toy", "dimension": ["Mechanics"]}]
    (tmp_path / "vbench2.json").write_text(json.dumps([*second, {"prompt_en": "ice", "dimension": ["Thermotics"]}]))
    assert [(p.text, p.samples) for p in read_prompts(str(tmp_path / "vbench2.json"))] == [("a toy", 20), ("ice", 3)]

    images = [{"prompt_en": "a beach", "dimension": ["i2v_background"], "image_name": "a beach.jpg"}]
    (tmp_path / "i2v.json").write_text(json.dumps(images))
    with pytest.raises(ConfigError, match="give images=FOLDER"):
        read_prompts(str(tmp_path / "i2v.json"))
    tiny_image(8, 8).save(tmp_path / "a beach.jpg")
    (prompt,) = read_prompts(str(tmp_path / "i2v.json"), images=str(tmp_path))
    assert (prompt.samples, Path(prompt.image).name) == (5, "a beach.jpg")
    with pytest.raises(ConfigError, match="no prompt is of scene; there are i2v_background"):
        read_prompts(str(tmp_path / "i2v.json"), images=str(tmp_path), dimensions=["scene"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt\n" + "x" * 200_000, "is no table: field larger"),
        ("a.json", '[{"prompt_en": "a", "dimension": [], "image_name": 3}]', "image_name must be text"),
        (
            "a.json",
            '[{"prompt_en": "a", "dimension": [], "image_name": "a.png"}, {"prompt_en": "b", "dimension": []}]',
            "1 of 2 have no image_name",
        ),
    ],
)
def test_files_that_hold_no_prompts(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_prompts(str(tmp_path / name), images=str(tmp_path))


@pytest.mark.parametrize(("name", "content"), [("a.txt", "a kite\n"), ("a.csv", "prompt,seed\na kite,\n")])
def test_a_byte_order_mark_is_no_part_of_a_prompt(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert [prompt.text for prompt in read_prompts(str(tmp_path / name))] == ["a kite"]


def rows_of(out: Path) -> list[dict[str, str]]:
    with open(out / command.LIST, newline="") as file:
        return list(csv.DictReader(file))
