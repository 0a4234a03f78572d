"""One set of latents through several decoders: whose pixels they are, what the table says, and what is refused."""

import csv
import json
import os
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import decoders
from datamodules.latents import save_latent
from datamodules.stills import load_reference
from experiments import decoder_choice, fixed_seed
from experiments.bench_all import read_options
from experiments.compose import ConfigError
from experiments.fixed_seed import FixedSeedConfig
from tests.tiny_pipelines import call_arguments, tiny_image, tiny_pipeline, tiny_vae

SIZE, FRAMES = (32, 48), 5


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two autoencoders of one latent space: the same encoder and statistics, other decoders."""
    folders = tmp_path_factory.mktemp("first") / "vae", tmp_path_factory.mktemp("second") / "vae"
    torch.manual_seed(0)
    vae = tiny_vae("wan")
    vae.save_pretrained(folders[0])
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    vae.save_pretrained(folders[1])
    return folders


@pytest.fixture
def latents(tmp_path: Path, vaes: tuple[Path, Path]) -> Path:
    """Three latents of two prompts, of that space, with their images."""
    folder = tmp_path / "latents"
    folder.mkdir()
    space = decoder_choice.open_decoder(decoder_choice.Named("own", "own"), str(vaes[0]), torch.float32, "cpu").space
    with open(folder / "latents.csv", "w", newline="") as file:
        rows = csv.DictWriter(file, ["path", "reference", "prompt", "index", "seed"])
        rows.writeheader()
        for number, (prompt, index) in enumerate([("a kite", 0), ("a kite", 1), ("a boat", 0)]):
            latent = torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(number))
            name = f"clip{number}"
            about = {"space": space.fingerprint, "height": SIZE[0], "width": SIZE[1], "fps": 16.0}
            save_latent(folder / f"{name}.safetensors", latent, prompt=prompt, seed=number, **about)
            tiny_image(*SIZE, seed=number).save(folder / f"{name}.png")
            row = {"path": f"{name}.safetensors", "reference": f"{name}.png", "prompt": prompt}
            rows.writerow(row | {"index": index, "seed": number})
    return folder


def options(latents: Path, out: Path, vaes: tuple[Path, Path], **more) -> FixedSeedConfig:
    given = {"source": str(latents / "latents.csv"), "out": str(out), "pipeline": str(vaes[0]), "device": "cpu"}
    return FixedSeedConfig(**given | {"decoders": ["own", f"other={vaes[1]}"]} | more)


def test_own_decodes_what_the_pipeline_decodes(tmp_path: Path) -> None:
    """Latents that a pipeline returned, decoded later by ``own``, are the frames that it would have returned itself."""
    pipe = tiny_pipeline("wan_t2v")
    pipe.vae.save_pretrained(tmp_path / "vae")
    arguments = call_arguments("wan_t2v") | {"return_dict": False}
    latent = pipe(**arguments, output_type="latent")[0]
    frames = pipe(**arguments | {"generator": torch.Generator().manual_seed(0)}, output_type="pt")[0]  # [0, 1]
    own = decoder_choice.open_decoder(decoder_choice.Named("own", "own"), str(tmp_path), torch.float32, "cpu")
    video = own.decode(latent, (FRAMES, *SIZE), None, torch.Generator())
    expected = frames.movedim(2, 1) * 2 - 1
    assert expected.std() > 0.05  # there is something to see
    torch.testing.assert_close(video.clamp(-1, 1), expected, rtol=0, atol=1e-5)


def test_every_decoder_decodes_the_same_latents(latents: Path, tmp_path: Path, vaes: tuple[Path, Path]) -> None:
    result, failed = fixed_seed.fixed_seed(options(latents, tmp_path / "out", vaes, crf=0))
    assert failed == 0 and result["clips"] == 3
    labels, rows = fixed_seed.read_table(tmp_path / "out")
    assert labels == ["own", "other"]
    assert [(row["prompt"], row["index"], row["seed"]) for row in rows] == [
        ("a kite", "0", "0"),
        ("a kite", "1", "1"),
        ("a boat", "0", "2"),
    ]
    for row in rows:
        videos = {label: frames_of(tmp_path / "out" / label / f"{row['name']}.mp4") for label in labels}
        assert videos["own"].shape == videos["other"].shape == (FRAMES, *SIZE, 3)
        assert float(row["psnr_to_first_decoder:own"]) == fixed_seed.LARGEST_PSNR
        told = float(row["psnr_to_first_decoder:other"])
        assert told < 60
        coded = fixed_seed.psnr(*(torch.from_numpy(videos[label]) for label in ("other", "own")))
        assert abs(coded - told) < 3  # the files hold these pixels, but for chroma at half size
        image = torch.from_numpy(np.array(Image.open(row["reference"])))[None]
        assert abs(fixed_seed.psnr(torch.from_numpy(videos["own"])[:1], image) - float(row["first_frame_psnr:own"])) < 1
    mean, low, high = result["scores"]["other"]["first_frame_psnr_difference"]
    values = [float(r["first_frame_psnr:other"]) - float(r["first_frame_psnr:own"]) for r in rows]
    assert low < mean < high and abs(mean - sum(values) / 3) < 1e-9
    assert "| other" in fixed_seed.report(result)


def test_goes_on_where_it_stopped(latents: Path, tmp_path: Path, vaes: tuple[Path, Path], monkeypatch) -> None:
    out = tmp_path / "out"
    real, calls = decoder_choice.Chosen.decode, []

    def counted(self, *args):
        calls.append(self.label)
        if len(calls) == 4:  # the second decoder of the second latent
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(decoder_choice.Chosen, "decode", counted)
    with pytest.raises(KeyboardInterrupt):
        fixed_seed.fixed_seed(options(latents, out, vaes))
    first = fixed_seed.read_table(out)[1]
    assert [row["name"] for row in first] == ["clip0"]
    result, _ = fixed_seed.fixed_seed(options(latents, out, vaes))
    assert len(calls) == 4 + 4 and result["clips"] == 3
    again, _ = fixed_seed.fixed_seed(options(latents, out, vaes))
    assert len(calls) == 8  # nothing was decoded again
    assert again["scores"] == result["scores"]
    with pytest.raises(ConfigError, match="videos of other weights under other"):
        fixed_seed.fixed_seed(options(latents, out, vaes, decoders=["own", f"other={vaes[0]}"]))
    with pytest.raises(ConfigError, match="crf=10: choose another out"):
        fixed_seed.fixed_seed(options(latents, out, vaes, crf=20))


def test_what_an_interruption_or_new_latents_left_is_decoded_anew(latents, tmp_path: Path, vaes, monkeypatch) -> None:
    out, real, calls = tmp_path / "out", decoder_choice.Chosen.decode, []
    swapped = ["own", f"other={vaes[0]}"]
    fixed_seed.fixed_seed(options(latents, out, vaes))

    def killed(self, *args):
        calls.append(self.label)
        raise SystemExit  # with the table as it was before: as a kill would leave it

    monkeypatch.setattr(decoder_choice.Chosen, "decode", killed)
    write = fixed_seed._write_table
    monkeypatch.setattr(fixed_seed, "_write_table", lambda *given: None if calls else write(*given))
    with pytest.raises(SystemExit):
        fixed_seed.fixed_seed(options(latents, out, vaes, decoders=swapped, overwrite=True))
    monkeypatch.setattr(fixed_seed, "_write_table", write)
    monkeypatch.setattr(decoder_choice.Chosen, "decode", lambda self, *a: (calls.append(self.label), real(self, *a))[1])
    calls.clear()
    fixed_seed.fixed_seed(options(latents, out, vaes, decoders=swapped))
    assert len(calls) == 6, "the old videos, of other weights, are not taken for the new ones"

    calls.clear()
    later = (out / "own" / "clip1.mp4").stat().st_mtime + 5
    os.utime(latents / "clip1.safetensors", (later, later))
    fixed_seed.fixed_seed(options(latents, out, vaes, decoders=swapped))
    assert calls == ["own", "other"], "clip1 was generated anew"
    assert [row["name"] for row in fixed_seed.read_table(out)[1]] == ["clip0", "clip1", "clip2"]
    with pytest.raises(ConfigError, match="holds videos of fps=None"):
        fixed_seed.fixed_seed(options(latents, out, vaes, decoders=swapped, fps=8))


def test_the_optimised_form_beside_the_plain_one(latents: Path, tmp_path: Path, vaes: tuple[Path, Path]) -> None:
    listed = [str(vaes[1]), f"fast={vaes[1]}+optimised", f"bytes={vaes[1]}+optimised+uint8"]
    result, failed = fixed_seed.fixed_seed(options(latents, tmp_path / "out", vaes, decoders=listed, pipeline=None))
    assert failed == 0
    assert result["how"]["decoders"]["fast"]["weights"] == result["how"]["decoders"]["vae"]["weights"] + "+optimised"
    for label in ("fast", "bytes"):
        assert result["scores"][label][fixed_seed.AGAINST][0] > 50
    with pytest.raises(ConfigError, match="eight bits need latents to calibrate on"):
        decoder_choice.open_decoder(decoder_choice.parse([f"{vaes[1]}+optimised+mlp8"])[0], None, torch.float32, "cpu")


class Painter(nn.Module):
    """Stands for an export that looks at references and draws noise: it shows the reference, and notes the first draw."""

    def __init__(self, space) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.space, self.size_multiple, self.uses_reference, self.family = space, 8, True, "painter"
        self.draws: list[float] = []

    def decode(self, latent, *, size, reference=None, generator=None):
        self.draws.append(torch.rand(1, generator=generator).item())
        return reference.expand(-1, -1, size[0], -1, -1)


def test_references_and_seeds_reach_the_decoder(latents: Path, tmp_path: Path, vaes, monkeypatch) -> None:
    space = decoder_choice.open_decoder(decoder_choice.Named("own", "own"), str(vaes[0]), torch.float32, "cpu").space
    painter = Painter(space)
    monkeypatch.setattr(decoders, "load", lambda source, **_: painter, raising=False)
    result, failed = fixed_seed.fixed_seed(options(latents, tmp_path / "out", vaes, decoders=["own", "painter"]))
    assert failed == 0
    assert painter.draws == [torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() for seed in range(3)]
    assert result["scores"]["painter"]["first_frame_psnr"][0] == fixed_seed.LARGEST_PSNR  # the image itself
    (latents / "clip1.png").unlink()
    (latents / "latents.csv").unlink()
    config = options(latents, tmp_path / "two", vaes, decoders=["painter"], source=str(latents))
    result, failed = fixed_seed.fixed_seed(config)
    assert (failed, result["clips"]) == (1, 2)
    assert load_reference(str(latents / "clip0.png"), SIZE).shape == (3, 1, *SIZE)


def test_latents_of_another_space_are_told(latents: Path, tmp_path: Path, vaes, capsys) -> None:
    save_latent(latents / "clip1.safetensors", torch.randn(16, 2, 4, 6), space="another", height=32, width=48, fps=16)
    save_latent(latents / "clip2.safetensors", torch.randn(4, 2, 4, 6), space="another", height=32, width=48, fps=16)
    arguments = [f"in={latents / 'latents.csv'}", f"out={tmp_path / 'out'}", f"pipeline={vaes[0]}", "decoders=[own]"]
    assert fixed_seed.main([*arguments, "device=cpu"]) == 1
    told = capsys.readouterr().out
    assert "clip1  failed: was saved in the space another; own's is" in told
    assert "clip2  failed: has 4 channels, and latents of own's space 16" in told


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (["own", "own"], "two are called own"),
        (["a/b", "c/b"], "two are called b; write LABEL=SOURCE"),
        (["x=own"], "is not own, SOURCE or LABEL=SOURCE"),
        (["a b=c"], "with a plain label"),
        (["=c"], "with a plain label"),
    ],
)
def test_decoders_need_labels_of_their_own(listed: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decoder_choice.parse(listed)


def test_decoders_are_found_by_label_source_and_run(runs_root: Path) -> None:
    named = decoder_choice.parse(["own", "exports/small/", "mine=user/name", "flashdecoder_demo"])
    assert [(n.label, n.source) for n in named] == [
        ("own", "own"),
        ("small", "exports/small/"),
        ("mine", "user/name"),
        ("flashdecoder_demo", "flashdecoder_demo"),
    ]
    assert decoder_choice.find("flashdecoder_demo") == "flashdecoder_demo"
    (runs_root / "flashdecoder_demo").mkdir(parents=True)
    assert decoder_choice.find("flashdecoder_demo") == str(runs_root / "flashdecoder_demo")
    with pytest.raises(ConfigError, match="decoders: gone: "):
        decoder_choice.load_export(decoder_choice.Named("gone", "no/such/folder/here"), torch.float32, "cpu")
    with pytest.raises(ConfigError, match="give pipeline=FOLDER"):
        decoder_choice.open_decoder(decoder_choice.Named("own", "own"), None, torch.float32, "cpu")


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in, decoders and out are needed"):
        fixed_seed.main(["in=x"])
    with pytest.raises(ConfigError, match="crf=99"):
        read_options(["source=a", "out=b", "decoders=[own]", "crf=99"], FixedSeedConfig)
    with pytest.raises(ConfigError, match="in"):
        fixed_seed.main([f"in={tmp_path / 'gone'}", f"out={tmp_path}", "decoders=[own]", "device=cpu"])


def test_a_damaged_record_is_told(latents: Path, tmp_path: Path, vaes) -> None:
    out = tmp_path / "out"
    fixed_seed.fixed_seed(options(latents, out, vaes, decoders=["own"]))
    (out / fixed_seed.ABOUT).write_text(json.dumps({})[:1])
    with pytest.raises(ConfigError, match="is damaged"):
        fixed_seed.fixed_seed(options(latents, out, vaes, decoders=["own"]))
    shutil.rmtree(out)
    with pytest.raises(ConfigError, match="holds no decoded pairs"):
        fixed_seed.read_table(out)


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
