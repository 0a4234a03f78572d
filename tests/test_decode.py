"""`make decode`: saved latents to mp4 with a trained run's weights, whole or not at all."""

import csv
import errno
import os
import signal
import subprocess
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from video_files import cut

from datamodules.latents import save_latent
from datamodules.procedural import draw_frames
from datamodules.stills import tell_fit
from decoders.base import key_seed
from decoders.latent_spaces.dct import DCT, DCTConfig
from experiments import decode, reconstruct
from experiments.callbacks import to_uint8
from experiments.checkpoints import save_weights
from experiments.compose import ConfigError
from experiments.config import build_decoder, build_space, load
from experiments.decode import DecodeConfig, Job
from experiments.runs import run_dir
from experiments.train import train

ROOT = Path(__file__).parent.parent
NAME = "flashdecoder_debug"
OVERRIDES = ("trainer.max_steps=2", "trainer.progress_bar=false", "validation.num_shown=0")
SPACE = DCT(DCTConfig(12, 4, 8))  # that of the debug experiments
SAID = {"space": SPACE.fingerprint, "height": 32, "width": 48}


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    """A debug experiment, trained for two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_ROOT", str(tmp_path_factory.mktemp("runs")))
        train(load(NAME, OVERRIDES), NAME, OVERRIDES)
        yield


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three latents of nine frames of 32x48, one of them in a folder of its own and with a reference image."""
    root = tmp_path / "latents"
    (root / "more").mkdir(parents=True)
    for i, name in enumerate(("a", "more/b", "c")):
        save_latent(root / f"{name}.safetensors", latent(i), **SAID, seed=i, fps=16)
    Image.fromarray(draw_frames(0, 9, [0], (40, 60))[0]).save(root / "more" / "b.png")
    return root


def latent(seed: int, channels: int = 12, n: int = 3, y: int = 4, x: int = 6) -> torch.Tensor:
    return torch.randn(channels, n, y, x, generator=torch.Generator().manual_seed(seed))


def command(folder: Path, out: Path, *arguments: str) -> int:
    return decode.main([NAME, f"in={folder}", f"out={out}", *OVERRIDES, *arguments])


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def report(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "decode.csv") as file:
        return {Path(row["latent"]).stem: row for row in csv.DictReader(file)}


def files(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


# ---- a trained run


def test_saved_latents_become_videos(folder, tmp_path, capsys):
    out = tmp_path / "videos"
    assert command(folder, out, "crf=1", "weights=last") == 0
    assert files(out) == {"a.mp4", "c.mp4", "more/b.mp4", "decode.csv"}
    decoder, about = decode.load_decoder(NAME, OVERRIDES, "last", "cpu")
    assert about.endswith("weights-last.safetensors (step 2)")
    for i, name in enumerate(("a", "more/b", "c")):
        expected = to_uint8(decoder.decode(latent(i)[None])[0]).numpy()
        found = frames_of(out / f"{name}.mp4")
        assert found.shape == expected.shape == (9, 32, 48, 3)
        assert np.abs(found.astype(int).mean((1, 2)) - expected.mean((1, 2))).max() < 2.5, "colours of every frame"
    with av.open(str(out / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 16
    rows = report(out)
    assert {name: (row["outcome"], row["seed"]) for name, row in rows.items()} == {
        "a": ("decoded", "0"), "b": ("decoded", "1"), "c": ("decoded", "2"),
    }  # fmt: skip
    assert rows["b"]["reference"].endswith("more/b.png") and not rows["a"]["reference"]
    printed = capsys.readouterr().out
    assert (
        "3 latents, cpu" in printed and "3 decoded, 0 exists, 0 failed" in printed and "more/b.safetensors" in printed
    )


def test_what_is_there_is_skipped_unless_told_otherwise(folder, tmp_path, capsys):
    out = tmp_path / "videos"
    assert command(folder / "a.safetensors", out) == 0
    before = (out / "a.mp4").read_bytes(), (out / "a.mp4").stat().st_mtime_ns
    assert command(folder, out) == 0
    assert ((out / "a.mp4").read_bytes(), (out / "a.mp4").stat().st_mtime_ns) == before
    assert report(out)["a"]["outcome"] == "exists" and "2 decoded, 1 exists" in capsys.readouterr().out
    assert command(folder, out, "overwrite=true", "crf=40", "fps=29.97") == 0
    assert len((out / "a.mp4").read_bytes()) < len(before[0]) and report(out)["a"]["outcome"] == "decoded"
    with av.open(str(out / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(2997, 100), "the option comes before the metadata"


def test_a_kill_leaves_no_half_file(folder, tmp_path):
    out = tmp_path / "videos"
    child = os.fork()
    if child == 0:
        calls, real = [], os.fsync

        def die_at_the_second(file: int) -> None:
            calls.append(file)
            if len(calls) == 2:  # the video is written, and not yet in its place
                os.kill(os.getpid(), signal.SIGKILL)
            real(file)

        os.fsync = die_at_the_second
        try:
            command(folder, out)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = files(out)
    assert {name for name in left if name.endswith(".mp4")} == {"a.mp4"} and len(left) == 2, "and a hidden piece"
    assert len(frames_of(out / "a.mp4")) == 9
    assert command(folder, out) == 0
    assert files(out) == {"a.mp4", "c.mp4", "more/b.mp4", "decode.csv"}
    assert report(out)["a"]["outcome"] == "exists"


def test_a_full_disk_is_told(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(decode, "write_video", full)
    with pytest.raises(ConfigError, match="no room to write .*a.mp4; what is in .* is whole: free some space"):
        command(folder, tmp_path / "videos")


def test_files_that_cannot_be_decoded_are_told_and_the_rest_is_done(folder, tmp_path):
    def save(name: str, values: torch.Tensor, **said) -> None:
        save_latent(folder / f"{name}.safetensors", values, **{**SAID, "fps": 16, **said})

    save("space", latent(0), space="wan21")
    save("named", latent(0), space="dct")
    save("channels", latent(0, channels=16))
    save("size", latent(0), height=64, width=96)
    save("raw", 4 * latent(0))
    save("rate", latent(0), fps=None)
    save("negative", latent(0), seed=-1)
    save("image", latent(0))
    (folder / "image.png").write_bytes(b"no image")
    cut(folder / "a.safetensors", folder / "half.safetensors", 0.5)
    torch.save(latent(3)[None], folder / "plain.pt")
    assert command(folder, tmp_path / "videos") == 1
    rows = report(tmp_path / "videos")
    reasons = {name: row["detail"] for name, row in rows.items() if row["outcome"] == "failed"}
    expected = {
        "space": f"was saved in the space wan21; this run's is dct ({SPACE.fingerprint})",
        "channels": "has 16 channels, and latents of this run's space, dct, 12",
        "size": "says it is 64x96 pixels, but 4x6 latent pixels of this run's space, dct, are 32x48",
        "raw": "not normalised: its mean is",
        "rate": "its metadata have no frame rate: give one, such as fps=16",
        "negative": "its seed -1 is outside of",
        "image": "image.png: reference: not a readable image",
        "half": "not a readable latent",
        "plain": "no frame rate",
    }
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in reasons[name]
    assert {name for name, row in rows.items() if row["outcome"] == "decoded"} == {"a", "b", "c", "named"}
    assert command(folder / "plain.pt", tmp_path / "videos", "fps=24") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name an experiment"),
        (["in=x", "out=y"], "name an experiment"),
        ([NAME], "in=FOLDER is needed"),
        ([NAME, "in=."], "out=FOLDER is needed"),
        ([NAME, "in=/no/such", "out=y"], r"^in: /no/such does not exist \(what exists is /\); set in to where it is"),
        ([NAME, "in=.", "out=y", "crf=60"], r"crf=60 must lie in 0 \(lossless\) to 51"),
        ([NAME, "in=.", "out=y", "crf=best"], "^crf: .*best"),
        ([NAME, "in=.", "out=y", "weights=first"], "weights=first is none of ema, best, last"),
        ([NAME, "in=.", "out=y", "fps=0"], "fps=0.0 must be positive"),
        ([NAME, "in=.", "out=y", "overwrite=perhaps"], "^overwrite: .*perhaps"),
        ([NAME, "in=tests", "out=y"], "^in: no latent found at tests"),
    ],
)
def test_wrong_commands_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        decode.main(arguments)


def test_runs_that_are_not_there_and_names_that_collide_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="has not been trained"):
        decode.main([NAME, f"in={folder}", f"out={tmp_path}"])
    with pytest.raises(ConfigError, match="weights=start: nothing in this configuration names weights of FlashDecoder"):
        command(folder, tmp_path, "weights=start")
    with pytest.raises(ConfigError, match="decoder.dept: no such key; did you mean decoder.depth"):
        command(folder, tmp_path, "decoder.dept=1")
    torch.save(latent(0), folder / "a.pt")
    with pytest.raises(ConfigError, match=r"a.pt and .*a.safetensors would both become .*a.mp4; rename one"):
        command(folder, tmp_path)


def test_every_family_decodes(debug_name, folder, tmp_path, monkeypatch):
    """Untrained weights, saved as a run keeps them."""
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    experiment = load(debug_name)
    space = build_space(experiment)
    decoder = build_decoder(experiment, space)
    n = space.latent_frames(space.padded_frames(9))
    weights = {**decoder.inference_parameters(), **decoder.inference_buffers()}
    save_weights(
        run_dir(debug_name) / "weights-ema.safetensors", weights, {"latent_space": space.fingerprint, "step": "0"}
    )
    for i, name in enumerate(("a", "more/b", "c")):
        saved = latent(i, space.channels, n, y=32 // space.stride_hw, x=48 // space.stride_hw)
        save_latent(folder / f"{name}.safetensors", saved, space=space.fingerprint, height=32, width=48, fps=16)
    assert decode.main([debug_name, f"in={folder}", f"out={tmp_path / 'videos'}"]) == 0
    assert frames_of(tmp_path / "videos" / "more" / "b.mp4").shape == (space.pixel_frames(n), 32, 48, 3)


# ---- times


@pytest.fixture
def regen(tmp_path, monkeypatch) -> Path:
    """Two latents of ten frames, and a decoder of them that takes times, with random weights as a run keeps them."""
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    decoder = build_decoder(load("regen_debug"), build_space(load("regen_debug")))
    torch.nn.init.xavier_uniform_(decoder.model.dit.final.weight)
    weights = {**decoder.inference_parameters(), **decoder.inference_buffers()}
    space = decoder.latent_space.fingerprint
    save_weights(run_dir("regen_debug") / "weights-ema.safetensors", weights, {"latent_space": space, "step": "0"})
    (tmp_path / "chunks").mkdir()
    for i, name in enumerate(("a", "b")):
        saved = latent(i, 4, 4, y=4, x=6)
        save_latent(
            tmp_path / "chunks" / f"{name}.safetensors", saved, space=space, height=32, width=48, fps=16, seed=i
        )
    return tmp_path / "chunks"


def test_frames_are_decoded_at_the_times_that_are_asked_for(regen, tmp_path):
    whole, some, all_times = (tmp_path / name for name in ("whole", "some", "all"))
    command = ["regen_debug", f"in={regen}", "crf=0"]
    assert decode.main([*command, f"out={whole}"]) == 0
    assert decode.main([*command, f"out={all_times}", "times=[0,1,2,3,4,5,6,7,8,9]"]) == 0
    assert decode.main([*command, f"out={some}", "times=[1.5, 3, -1]"]) == 0
    for name in ("a", "b"):
        assert np.array_equal(frames_of(whole / f"{name}.mp4"), frames_of(all_times / f"{name}.mp4"))
        assert frames_of(some / f"{name}.mp4").shape == (3, 32, 48, 3)
    decoder, _ = decode.load_decoder("regen_debug", (), None, "cpu")
    expected = decoder.decode(latent(0, 4, 4)[None], times=[1.5, 3, -1], generator=torch.Generator().manual_seed(0))
    found = frames_of(some / "a.mp4").astype(int)
    assert np.abs(found.mean((1, 2)) - to_uint8(expected[0]).numpy().mean((1, 2))).max() < 2.5
    assert "3 frames of 32x48 at times -1 to 3, 16 fps" in report(some)["a"]["detail"]


def test_a_run_decodes_with_other_steps_than_it_was_trained_with(regen, tmp_path):
    """As `make evaluate objective.steps=4` has it: they are no part of the run's name, unless a run was trained with them."""
    command, steps = ["regen_debug", f"in={regen}", "crf=0"], ["objective.steps=4", "objective.extension=true"]
    assert decode.main([*command, f"out={tmp_path / 'one'}"]) == 0
    assert decode.main([*command, f"out={tmp_path / 'four'}", *steps]) == 0
    one, four = (frames_of(tmp_path / name / "a.mp4") for name in ("one", "four"))
    assert one.shape == four.shape and not np.array_equal(one, four)
    decoder, about = decode.load_decoder("regen_debug", steps, None, "cpu")
    assert decoder.objective.steps == 4 and decoder.objective.extension and f"{run_dir('regen_debug').name}/" in about
    run_dir("regen_debug", steps).mkdir(parents=True)
    with pytest.raises(ConfigError, match="objective.steps=4"):  # a run of its own, which has no weights yet
        decode.load_decoder("regen_debug", steps, None, "cpu")


def test_an_option_that_is_mistyped_is_the_nearest_of_the_commands_own():
    with pytest.raises(ConfigError, match="tmes: .* did you mean times"):
        decode.main(["regen_debug", "in=.", "out=y", "tmes=[0]"])


def test_times_far_outside_are_warned_of(regen, tmp_path):
    with pytest.warns(UserWarning, match="go more than 4 frames outside the clip of 0 to 9"):
        assert decode.main(["regen_debug", f"in={regen}", f"out={tmp_path / 'far'}", "times=[0,30]"]) == 0


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ("[]", "times must be one or more finite numbers"),
        ("[0,.nan]", "times must be one or more finite numbers"),
        ("3", "^times: "),
        ("[0,soon]", r"^times\[1\]: "),
        ("[0", "close its brackets"),
    ],
)
def test_times_that_are_none_are_refused(times, message):
    with pytest.raises(ConfigError, match=message):
        decode.main(["regen_debug", "in=.", "out=y", f"times={times}"])


def test_other_families_have_no_times(folder, tmp_path):
    with pytest.raises(ConfigError, match="times: FlashDecoder decodes the frames that were encoded and no others"):
        command(folder, tmp_path / "videos", "times=[0,0.5]")
    with pytest.raises(ConfigError, match="make decode takes times"):
        reconstruct.main([NAME, "in=x", "out=y", "times=[0]"])


# ---- what a decoder is given


class Recorder:
    """A decoder that notes what it is asked, and answers with the space's own inverse."""

    latent_space, size_multiple, device = SPACE, 8, torch.device("cpu")
    training_config = SimpleNamespace(seed=3)

    def __init__(self) -> None:
        self.asked = []

    def decode(self, latent, *, size, reference, generator):
        self.asked.append((size, reference, generator.initial_seed()))
        return self.latent_space.decode(latent)


def job(folder: Path, name: str, **options) -> Job:
    return Job(f"{name}.safetensors", str(folder / f"{name}.safetensors"), folder / f"{name}.mp4", **options)


def test_size_seed_and_reference(folder):
    save_latent(folder / "d.safetensors", latent(0), **SAID, fps=16)
    decoder, config = Recorder(), DecodeConfig("x", "y")
    jobs = [job(folder, "a"), job(folder, "more/b"), job(folder, "d")]
    jobs += [job(folder, "a", seed="77", reference=str(folder / "more" / "b.png"))]
    for each in jobs:
        decode.decode_file(decoder, each, config, autocast=False)
    sizes, references, seeds = zip(*decoder.asked, strict=True)
    assert set(sizes) == {(9, 32, 48)}
    assert seeds == (0, 1, key_seed("d.safetensors", 3), 77), "the file's, one by its name, the list's"
    image = Image.open(folder / "more" / "b.png").resize((48, 32), Image.Resampling.LANCZOS)
    for reference in (references[1], references[3]):
        assert reference.shape == (1, 3, 1, 32, 48)
        assert torch.allclose((reference[0, :, 0].permute(1, 2, 0) + 1) * 127.5, torch.tensor(np.array(image)).float())
    assert references[0] is references[2] is None


def test_the_video_shows_what_was_decoded(folder):
    """A film through latents, the space's inverse and H.264 is the film, frame by frame and the right way round."""
    y, x = np.mgrid[0:32, 0:48] / 16
    film = np.stack([np.stack([np.sin(x + t / 4), np.cos(y), np.sin(x - y)], -1) for t in range(9)]).astype(np.float32)
    video = torch.from_numpy(film).permute(3, 0, 1, 2)[None] * 0.9
    save_latent(folder / "a.safetensors", SPACE.encode(video)[0], **SAID, fps=16)
    decode.decode_file(Recorder(), job(folder, "a"), DecodeConfig("x", "y", crf=5), autocast=False)
    wanted = to_uint8(SPACE.decode(SPACE.encode(video))[0]).numpy().astype(float)
    found = frames_of(folder / "a.mp4").astype(float)
    assert 10 * np.log10(255**2 / ((found - wanted) ** 2).mean()) > 30
    assert 10 * np.log10(255**2 / ((found[::-1] - wanted) ** 2).mean()) < 28


def test_make_hands_the_options_on(tmp_path):
    run = subprocess.run(
        ["make", "--no-print-directory", "-n", "decode", "exp=x", "in=a b/$c", "out=d", "fps=16", "python=py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == "py -m experiments.decode 'x' 'fps=16' 'in=a b/$c' 'out=d'"


def test_a_reference_of_another_shape_is_told(tmp_path):
    for name, (height, width) in (("same", (32, 48)), ("larger", (64, 96)), ("tall", (400, 100))):
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / f"{name}.png")
    said = [tell_fit(str(tmp_path / f"{name}.png"), (32, 48)) for name in ("same", "larger", "tall")]
    assert said == ["", " (resized from 64x96)", " (resized from 400x100, its aspect ratio changed by 500%)"]
