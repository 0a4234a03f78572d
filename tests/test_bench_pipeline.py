"""Shares of a pipeline's time: the clock against known times, decoders taking turns, and a pipeline left as it was."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments import bench_pipeline as command
from experiments.bench_pipeline import STAGES, StageClock
from experiments.compose import ConfigError
from tests.pipeline_small import FILES, exported
from tests.tiny_pipelines import tiny_image, tiny_pipeline


class Time:
    """Stands for the machine's clock: work takes exactly as long as it says."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def work(self, seconds: float) -> None:
        self.seconds += seconds


class Worker(nn.Module):
    def __init__(self, time: Time) -> None:
        super().__init__()
        self.work = time.work

    def forward(self, seconds: float) -> None:
        self.work(seconds)

    def encode(self, seconds: float) -> None:
        self.work(seconds)

    def decode(self, seconds: float) -> None:
        self.encode(seconds)  # a stage inside another counts as the outer one


class FakeScheduler:
    def __init__(self, time: Time) -> None:
        self.work = time.work

    def step(self, seconds: float) -> None:
        self.work(seconds)


class FakePipeline:
    """Stages of known length: text 1, image 2, denoise 3 x (2 + 1), decode 3, other 1 + 4 seconds."""

    def __init__(self, time: Time) -> None:
        self.work = time.work
        self.vae, self.transformer, self.scheduler = Worker(time), Worker(time), FakeScheduler(time)
        self.components = {"vae": self.vae, "transformer": self.transformer, "transformer_2": None}

    def encode_prompt(self, seconds: float) -> None:
        self.work(seconds)

    def __call__(self) -> None:
        self.encode_prompt(1)
        self.vae.encode(2)
        self.work(1)
        for _ in range(3):
            self.transformer(2)
            self.scheduler.step(1)
        self.work(4)
        self.vae.decode(3)


def test_the_clock_divides_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time()
    monkeypatch.setattr(command, "time", time)
    pipe, clock = FakePipeline(time), StageClock("cpu")
    with clock.watch(pipe):
        for _ in range(2):  # a second call does not add to the first
            clock.start()
            begun = clock.now()
            pipe()
            found = clock.read(clock.now() - begun)
    assert found == {"text": 1, "image": 2, "denoise": 9, "decode": 3, "other": 5, "total": 20}
    assert list(found)[:-1] == list(STAGES)
    for owner, name in ((pipe, "encode_prompt"), (pipe.vae, "decode"), (pipe.vae, "encode"), (pipe.scheduler, "step")):
        assert name not in owner.__dict__
    assert not pipe.transformer._forward_pre_hooks
    clock.start()
    with pytest.raises(RuntimeError, match="no transformer was called"):
        clock.read(1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "tiny-ltx"
    tiny_pipeline("ltx_t2v").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of the same space with another decoder."""
    path = tmp_path_factory.mktemp("other") / "vae"
    vae = tiny_pipeline("ltx_t2v").vae
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    vae.save_pretrained(path)
    return path


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    fixed = ["prompt=a red kite", "height=64", "width=96", "num_frames=9", "steps=3", "dtype=fp32", "device=cpu"]
    return [f"pipeline={folder}", f"out={out}", *fixed, *more]


def test_decoders_take_turns_in_one_pipeline(folder: Path, other: Path, tmp_path: Path, capsys) -> None:
    command.main(arguments(folder, tmp_path, "rounds=3", f"decoders=[own,other={other}]"))
    captured = capsys.readouterr()
    turns = [line.split(":")[0] for line in captured.err.splitlines() if line.startswith("round")]
    assert turns == [
        f"round {n}, {label}"
        for n, both in ((1, "own other"), (2, "other own"), (3, "own other"))
        for label in both.split()
    ]
    (path,) = tmp_path.glob("bench-pipeline-tiny-ltx-*.json")
    result = json.loads(path.read_text())
    assert result["clip"] == {"num_frames": 9, "height": 64, "width": 96, "steps": 3}
    assert set(result["versions"]) >= {"torch", "diffusers"} and result["device"]
    for label in ("own", "other"):
        row = result["decoders"][label]
        assert len(row["rounds"]) == 3
        assert sum(row["shares"].values()) == pytest.approx(1, abs=0.2)  # medians of the parts and of the whole
        for stage in ("text", "denoise", "decode", "total"):
            values = sorted(one[stage] for one in row["rounds"])
            assert values[0] > 0
            assert (row["smallest"][stage], row["median"][stage], row["largest"][stage]) == tuple(values)
        assert row["median"]["image"] == 0  # text to video
    assert result["decoders"]["own"]["speed"] == {"decode": 1.0, "total": 1.0}
    assert "| other" in captured.out and path.with_suffix(".md").is_file()


def test_optimised_forms_take_turns_too(folder: Path, other: Path, tmp_path: Path, monkeypatch) -> None:
    """Made once, where they are used; plain decoders move away between their turns, and the frames are the same."""
    built, frames = [], {}
    real_build, real_run = command.optimised, command._run
    monkeypatch.setattr(command, "optimised", lambda *given: built.append(real_build(*given)) or built[-1])

    def run(pipe, model, name, *given):
        if name.label != "own":
            latent = torch.randn(1, 8, 2, 2, 3, generator=torch.Generator().manual_seed(0))
            frames.setdefault(name.label, []).append(model.decode(latent))
        return real_run(pipe, model, name, *given)

    monkeypatch.setattr(command, "_run", run)
    listed = f"decoders=[own,{other},fast={other}+optimised+nographs]"
    command.main(arguments(folder, tmp_path, "rounds=2", listed))
    (model,) = built
    assert model.is_optimised
    assert len(frames["vae"]) == len(frames["fast"]) == 3
    for plain, fast in zip(frames["vae"], frames["fast"], strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=0)
    (path,) = tmp_path.glob("bench-pipeline-*.json")
    found = json.loads(path.read_text())["decoders"]
    assert {label: row["way"] for label, row in found.items()} == {
        "own": "plain",
        "vae": "plain",
        "fast": "optimised+nographs",
    }


def test_eight_bits_are_calibrated_on_the_pipelines_own_latents(folder: Path, tmp_path: Path, monkeypatch) -> None:
    seen = []
    real = command.optimised
    monkeypatch.setattr(
        command, "optimised", lambda name, model, latents: (seen.append(latents), real(name, model, latents))[1]
    )
    exported("ltx", "flashdecoder")
    source = Path(FILES.name) / "exported" / "ltx" / "flashdecoder"
    command.main(arguments(folder, tmp_path, "rounds=1", f"decoders=[own,a={source}+optimised+linear8]"))
    ((latent,),) = seen
    assert latent.shape == (1, 8, 2, 2, 3) and latent.std() > 0.1


def test_negative_prompts_are_part_of_the_text(folder: Path) -> None:
    pipe, calls = tiny_pipeline("ltx_t2v"), []
    pipe.text_encoder.register_forward_hook(lambda *given: calls.append(clock._inside))
    clock = StageClock("cpu")
    given = {
        "prompt": "a kite",
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "num_inference_steps": 2,
        "output_type": "latent",
    }
    with clock.watch(pipe):
        pipe(**given, guidance_scale=3.0)
        assert calls == [True, True], "both prompts, inside the stage that is measured"
        pipe(**given, guidance_scale=1.0)
    assert calls == [True] * 3


@pytest.mark.parametrize("kind", ["ltx_i2v", "wan_i2v"])
def test_image_to_video_has_an_image_stage(kind: str, tmp_path: Path) -> None:
    tiny_pipeline(kind).save_pretrained(tmp_path / "tiny")
    tiny_image(64, 96).save(tmp_path / "first.png")
    config = arguments(tmp_path / "tiny", tmp_path, "rounds=1", f"image={tmp_path / 'first.png'}")
    command.main(config)
    (path,) = tmp_path.glob("bench-pipeline-*.json")
    assert json.loads(path.read_text())["decoders"]["own"]["median"]["image"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["image=x.png"], "takes no image; leave image out"),
        (["num_frames=6"], "the nearest is 1 or 9"),
        (["decoders=[own,wan_mini]"], "wan_mini: "),
        (["decoders=[]"], "names none"),
        (["decoders=[own+optimised]"], "fast=FOLDER\\+optimised"),
        (["decoders=[a=wan_mini+optimised+quick]"], "no way 'quick'"),
        (["rounds=0"], "rounds=0 must be at least 1"),
        (["decoder=own"], "decoder"),
    ],
)
def test_what_cannot_be_measured_is_refused(more: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        command.main(arguments(folder, tmp_path, *more))
    assert not list(tmp_path.glob("*.json"))
