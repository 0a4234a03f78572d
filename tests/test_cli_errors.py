"""`latent2pixel` and bad input: one line that says what to do, the right exit status, and nothing half written."""

import os
import signal
from pathlib import Path

import pytest
import torch
from cli_files import export, files, run, with_sound
from PIL import Image
from safetensors.torch import save_file
from video_files import cut, make_film

from datamodules.latent_stream import LatentWriter
from datamodules.latents import save_latent
from decoders.exported import load

SIZE = (32, 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A decoder, a film and its latents, and a folder for what comes out."""
    root = tmp_path_factory.mktemp("errors")
    export("baseline_debug", root / "model")
    export("flashdecoder_debug", root / "dct")
    export("refdecoder_debug", root / "ref")
    make_film(root / "a.mp4", 9, SIZE, fps=24)
    assert run("encode", root / "model", root / "a.mp4", "-o", root / "a.safetensors", "-q") == 0
    return root


def refused(capsys, folder: Path, status: int, *arguments: object) -> str:
    """What is said; nothing may be left."""
    before, out = files(folder), folder / "out"
    capsys.readouterr()
    assert run(*arguments) == status
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith(("error:", "failed:", "latent2pixel"))]
    assert "Traceback" not in said.err and len(lines) == 1, said.err
    assert files(folder) == before and not (out.exists() and files(out))
    return lines[0]


def test_videos_that_cannot_be_read(folder, tmp_path, capsys):
    def encode(source: Path) -> str:
        return refused(capsys, folder, 1, "encode", folder / "model", source, "-o", tmp_path / "x.safetensors")

    text = tmp_path / "text.mp4"
    text.write_text("no video at all" * 100)
    assert "not a readable video" in encode(text)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    assert "empty" in encode(empty)
    assert "cut short" in encode(cut(make_film(tmp_path / "b.mkv", 30, SIZE), tmp_path / "c.mkv", 0.5))
    sound = with_sound(folder / "a.mp4", tmp_path / "sound.mp4", video=False)
    assert "holds no video stream" in encode(sound)
    (tmp_path / "images").mkdir()
    for number, side in enumerate((32, 40)):
        Image.new("RGB", (side, 32)).save(tmp_path / "images" / f"{number}.png")
    line = refused(
        capsys, folder, 1, "encode", folder / "model", tmp_path / "images", "-o", tmp_path / "x.safetensors", "--fps", 8
    )
    assert "frame 1 is 32x40, the first 32x32" in line
    assert not (tmp_path / "x.safetensors").exists() and not list(tmp_path.glob(".*"))


def test_latents_that_do_not_fit(folder, tmp_path, capsys):
    path, model = tmp_path / "x.safetensors", load(folder / "model")
    space = model.space.fingerprint
    latent = torch.randn(4, 3, 4, 6)
    about = {"height": 32, "width": 48, "fps": 8}

    def decode(*more: object) -> str:
        return refused(capsys, folder, 1, "decode", folder / "model", path, "-o", tmp_path / "out" / "x.mp4", *more)

    save_latent(path, latent, space="somebody-else", **about)
    assert "somebody-else" in decode() and "--any-space" in decode()
    assert run("decode", folder / "model", path, "-o", tmp_path / "any.mp4", "--any-space", "-q") == 0
    save_latent(path, torch.randn(12, 3, 4, 6), space=space, **about)
    assert "has 12 channels" in decode()
    save_latent(path, latent * 4, space=space, **about)  # says normalised
    assert "--assume raw" in decode()
    broken = latent.clone()
    broken[0, 1, 2, 3] = torch.nan
    save_latent(path, broken, space=space, **about)
    assert "not finite" in decode() and "not finite" in decode("--assume", "normalised")
    save_latent(path, latent, space=space, height=64, width=48, fps=8)
    assert "says it is 64x48 pixels, and 4x6 latent pixels are 32x48" in decode()
    save_latent(path, latent, space=space, height=32, width=48)
    assert "--fps 16" in decode()
    with LatentWriter(path, {"normalised": "true", "fps": "8", "frames": "99"}) as writer:
        writer.write(latent)
    assert "says it has 99 frames, and 3 latent frames are 9" in decode()
    with LatentWriter(path, {"normalised": "true", "fps": "8", "frames": "9", "seconds": "[1, 0]"}) as writer:
        writer.write(latent)
    assert "ascending times" in decode()
    whole = (folder / "a.safetensors").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "not a readable latent" in decode()
    path.write_bytes(b"\xff" * 4096)  # a header of 2^64 bytes
    assert "not a readable latent" in decode()
    save_file({"weights": latent}, path)
    assert "holds no tensor 'latent'" in decode()
    save_file({"latent": torch.randn(12, 3, 4, 6)}, path, {"normalised": "false", "fps": "8"})
    line = refused(capsys, folder, 1, "decode", folder / "dct", path, "-o", tmp_path / "out" / "x.mp4")
    assert "not normalised, and its metadata lack mean or std" in line


def test_outputs_that_cannot_be_written(folder, tmp_path, capsys):
    def decode(out: object, *more: object) -> str:
        return refused(capsys, folder, 2, "decode", folder / "model", folder / "a.safetensors", "-o", out, *more)

    there = tmp_path / "there.mp4"
    there.write_bytes(b"mine")
    assert "--overwrite" in decode(there) and there.read_bytes() == b"mine"
    assert "is a file, not a folder" in decode(there / "below" / "x.mp4")
    assert "written as .mp4" in decode(tmp_path / "x.avi")
    assert "ffv1 goes into .mkv, or h264, h265" in decode(tmp_path / "x.mp4", "--codec", "ffv1")
    assert "no --crf" in decode(tmp_path / "x.mkv", "--codec", "ffv1", "--crf", 3)
    assert "outside of 0" in decode(tmp_path / "x.mp4", "--crf", 77)
    assert "standard output" in decode("-", "--format", "png")
    assert "no place for audio" in decode("-", "--audio", folder / "a.mp4")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    assert "has something in it" in decode(tmp_path / "full", "--format", "png")
    line = refused(capsys, folder, 2, "encode", folder / "model", folder / "a.mp4", "-o", tmp_path / "x.npy")
    assert ".safetensors" in line
    line = refused(
        capsys, folder, 2, "decode", folder / "model", folder / "a.safetensors", folder / "a.safetensors", "-o", "-"
    )
    assert "is given twice" in line
    line = refused(
        capsys, folder, 2, "reconstruct", folder / "model", folder / "a.mp4", "-o", folder / "a.mp4", "--overwrite"
    )
    assert "input itself" in line


def test_mistakes_in_what_is_asked(folder, tmp_path, capsys):
    def said(*arguments: object) -> str:
        return refused(capsys, folder, 2, *arguments)

    out = ("-o", tmp_path / "x.mp4")
    film, model = folder / "a.mp4", folder / "model"
    assert "is not there" in said("reconstruct", model, tmp_path / "none.mp4", *out)
    assert "nowhere" in said("reconstruct", tmp_path / "nowhere", film, *out)
    assert "psnr, psnr_video, ssim" in said("reconstruct", model, film, *out, "--metrics", "psnr,vmaf")
    assert "--fps" in said("reconstruct", model, film, *out, "--fps", 0)
    assert "nearest" in said("reconstruct", model, film, *out, "--chunk", 4)
    assert "--seed" in said("reconstruct", model, film, *out, "--seed", -1)
    assert "--device" in said("reconstruct", model, film, *out, "--device", "abacus")
    (tmp_path / "empty").mkdir()
    assert "has no .mp4" in said("encode", model, tmp_path / "empty", "-o", tmp_path / "l")
    assert "states no mean and std" in said("encode", folder / "dct", film, "-o", tmp_path / "l.safetensors", "--raw")
    line = said("encode", folder / "dct", film, "-o", tmp_path / "l.safetensors", "--encoder", model)
    assert "--any-space" in line
    line = said("encode", folder / "dct", film, "-o", tmp_path / "l.safetensors", "--encoder", folder / "dct")
    assert "cannot encode" in line
    with torch.no_grad():  # a hostile export is refused as a model, too
        weights = model / "model.safetensors"
        kept = weights.read_bytes()
        weights.write_bytes(kept[: len(kept) // 2])
        assert str(model) in said("reconstruct", model, film, *out)
        weights.write_bytes(kept)


def test_one_bad_file_does_not_stop_the_others(folder, tmp_path, capsys):
    films = tmp_path / "films"
    films.mkdir()
    (films / "a.mp4").write_text("no film")
    make_film(films / "b.mp4", 5, SIZE)
    assert run("reconstruct", folder / "model", films, "-o", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert files(tmp_path / "out") == {"b.mp4"} and "failed: " in said.err and "5 frames" in said.out


def test_references(folder, tmp_path, capsys):
    def reconstruct(model: str, status: int, reference: object) -> str:
        given = ("reconstruct", folder / model, folder / "a.mp4", "-o", tmp_path / "x.mp4", "--reference", reference)
        return refused(capsys, folder, status, *given)

    assert "looks at no reference" in reconstruct("model", 2, "0")
    assert "0 to 8, and --reference asks for number 9" in reconstruct("ref", 1, "0,9")
    assert "cannot be opened" in reconstruct("ref", 1, tmp_path / "none.png")


def test_an_encode_that_is_stopped_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    from experiments import cli_coding

    real = cli_coding.clip_of

    def stopped(frames, multiple, device):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return real(frames, multiple, device)

    for command, out in (("encode", "x.safetensors"), ("reconstruct", "x.mp4")):
        calls: list[int] = []
        monkeypatch.setattr(cli_coding, "clip_of", stopped)
        assert run(command, folder / "model", folder / "a.mp4", "-o", tmp_path / out) == 130
        assert "interrupted" in capsys.readouterr().err and not files(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"fps": "inf"}, "fps is inf, outside of 0.001 to 1000"),
        ({"fps": "-3"}, "fps is -3, outside"),
        ({"height": "-5"}, "height is -5, outside"),
        ({"seed": str(10**30)}, "seed is 1000"),
        ({"normalised": "maybe"}, "normalised is 'maybe', and must be true or false"),
        ({"frames": "9", "seconds": str([number * 1e300 for number in range(9)])}, "are not 9 ascending times"),
        ({"frames": "9", "seconds": str(list(range(-5, 4)))}, "the first 0 or later"),
        ({"frames": "9", "seconds": str([0] * 9)}, "are not 9 ascending times"),
    ],
)
def test_hostile_metadata_of_latents(folder, tmp_path, capsys, metadata, said):
    path = tmp_path / "x.safetensors"
    save_file({"latent": torch.randn(4, 3, 4, 6)}, path, {"fps": "8"} | metadata)
    assert said in refused(capsys, folder, 1, "decode", folder / "model", path, "-o", tmp_path / "out" / "x.mp4")


class Code:
    """Would make a folder if it were loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_latents_that_hold_code_are_not_loaded(folder, tmp_path, capsys):
    path = tmp_path / "x.pt"
    torch.save({"latents": Code(tmp_path / "ran")}, path)
    line = refused(capsys, folder, 1, "decode", folder / "model", path, "-o", tmp_path / "out" / "x.mp4", "--fps", 8)
    assert "may run code" in line and "weights_only" not in line and not (tmp_path / "ran").exists()


def test_inputs_of_the_other_command_and_outputs_that_lead_nowhere(folder, tmp_path, capsys, monkeypatch):
    def said(*arguments: object) -> str:
        return refused(capsys, folder, 2, *arguments)

    model, film, latents = folder / "model", folder / "a.mp4", folder / "a.safetensors"
    assert "looks like a video" in said("decode", model, film, "-o", tmp_path / "x.mp4")
    assert "looks like latents" in said("encode", model, latents, "-o", tmp_path / "x.safetensors")
    assert "looks like latents" in said("reconstruct", model, latents, "-o", tmp_path / "x.mp4")
    assert "--device meta" in said("reconstruct", model, film, "-o", tmp_path / "x.mp4", "--device", "meta")
    scored = ("reconstruct", model, film, "-o", tmp_path / "x.mp4", "--json")
    assert "is a folder" in said(*scored, tmp_path)
    assert "is a file, not a folder" in said(*scored, film / "scores.json")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "not for a terminal" in said("decode", model, latents, "-o", "-")


def test_scores_that_cannot_be_written_are_one_line(folder, tmp_path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    given = ("reconstruct", folder / "model", folder / "a.mp4", "-o", tmp_path / "x.mp4", "--json", tmp_path / "s.json")
    assert run(*given) == 1
    assert "No space left" in capsys.readouterr().err and files(tmp_path) == {"x.mp4"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_leaves_nothing(folder, tmp_path, capsys, monkeypatch, number):
    from experiments import cli_work

    monkeypatch.setattr(cli_work, "_use_up", lambda _: signal.raise_signal(number))  # at the last moment
    given = ("reconstruct", folder / "model", folder / "a.mp4", "-o", tmp_path / "frames", "--format", "png")
    before = signal.signal(number, signal.SIG_DFL)  # as in a process of its own: other tests leave handlers of theirs
    try:
        assert run(*given) == 128 + number and "interrupted" in capsys.readouterr().err
        assert not list(tmp_path.iterdir()) and signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
