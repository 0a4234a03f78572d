"""`latent2pixel`: videos to latents and back on exported decoders; what comes out is what the decoder gives, to the bit."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from cli_files import export, files, frames_of, rotated, run, times_of, uneven, with_sound
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from video_files import decoded, make_film

from datamodules.faults import BadFile
from datamodules.latent_stream import LatentReader
from datamodules.latents import load_latent, save_latent
from datamodules.transforms import to_video
from decoders.exported import load
from experiments.cli_coding import to_bytes
from experiments.decode import check_fit
from experiments.video_kinds import OutputError
from experiments.video_out import video_file
from metrics.image import Psnr, Ssim

ROOT = Path(__file__).parent.parent
SIZE = (32, 48)


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    """own: an encoder of its own, streams. dct: a stream over the closed-form space. plain: looks at a reference, no stream.
    chunked: pairs of latent frames, noise."""
    root = tmp_path_factory.mktemp("exports")
    names = {
        "own": "baseline_debug",
        "dct": "flashdecoder_debug",
        "plain": "refdecoder_debug",
        "chunked": "regen_debug",
    }
    return {key: export(name, root / key) for key, name in names.items()}


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    return make_film(tmp_path_factory.mktemp("films") / "a.mp4", 9, SIZE, fps=24)


def clip(film: Path) -> torch.Tensor:
    return to_video(decoded(film))[None]


# ---- what comes out


def test_encode_and_decode_are_the_models(exports, film, tmp_path):
    latents, out = tmp_path / "a.safetensors", tmp_path / "a.mkv"
    assert run("encode", exports["own"], film, "-o", latents, "-q") == 0
    model = load(exports["own"])
    expected = model.encode(clip(film))
    assert torch.equal(load_file(latents)["latent"], expected[0])
    latent, header = load_latent(str(latents))  # the project's own format
    assert torch.equal(latent, expected[0]) and (header.height, header.width, header.fps) == (*SIZE, 24)
    assert header.space == model.space.fingerprint and header.num_frames == 9
    assert run("decode", exports["own"], latents, "-o", out, "--codec", "ffv1", "-q") == 0
    assert np.array_equal(frames_of(out), to_bytes(model.decode(expected)))
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == 24


def test_reconstruct_is_both_and_scores(exports, film, tmp_path, capsys):
    out, scores = tmp_path / "a.mkv", tmp_path / "scores.json"
    assert run("reconstruct", exports["own"], film, "-o", out, "--codec", "ffv1", "--json", scores) == 0
    model = load(exports["own"])
    frames = to_bytes(model.decode(model.encode(clip(film))))
    assert np.array_equal(frames_of(out), frames)
    row = json.loads(scores.read_text())["files"][0]
    pair = to_video(frames)[None], clip(film)
    assert row["scores"]["psnr"] == pytest.approx(Psnr()(*pair).mean().item(), abs=1e-4)
    assert row["scores"]["ssim"] == pytest.approx(Ssim()(*pair).mean().item(), abs=1e-5)
    assert f"psnr {row['scores']['psnr']:.4g}" in capsys.readouterr().out
    none = tmp_path / "none.mp4"
    assert run("reconstruct", exports["own"], film, "-o", none, "--metrics", "none") == 0
    assert "psnr" not in capsys.readouterr().out and len(frames_of(none)) == 9


@pytest.mark.parametrize("name", ["own", "dct", "chunked", "plain"])
def test_every_kind_keeps_odd_sizes_and_lengths(exports, tmp_path, capsys, name):
    """11 frames of 35x46 fit no space here: padded, said once, and cut back."""
    source = make_film(tmp_path / "odd.mkv", 11, (35, 46), fps=10, codec="ffv1")
    for folder, command in (("l", "encode"), ("d", "decode"), ("r", "reconstruct")):
        given = tmp_path / "l" / "odd.safetensors" if command == "decode" else source
        assert run(command, exports[name], given, "-o", f"{tmp_path / folder}/") == 0
        said = capsys.readouterr().err
        assert said.count("is padded to 40x48") == (command != "decode")
        if command != "encode":
            assert frames_of(tmp_path / folder / "odd.mp4").shape == (11, 35, 46, 3)
    encoder = load(exports[name])
    if encoder.can_encode:
        padded = torch.nn.functional.pad(
            clip(source), (0, 2, 0, 5, 0, encoder.space.padded_frames(11) - 11), mode="replicate"
        )
        assert torch.equal(load_file(tmp_path / "l" / "odd.safetensors")["latent"], encoder.encode(padded)[0])


def test_the_closed_space_is_encoded_without_being_named(exports, film, tmp_path):
    from decoders.latent_spaces.dct import DCT, DCTConfig

    assert run("encode", exports["dct"], film, "-o", tmp_path / "a.safetensors", "-q") == 0
    expected = DCT(DCTConfig(12, 4, 8)).encode(clip(film))
    torch.testing.assert_close(load_file(tmp_path / "a.safetensors")["latent"], expected[0], atol=1e-5, rtol=0)


def test_images_pipes_and_folders(exports, film, tmp_path, capsysbinary):
    latents = tmp_path / "latents"
    films = tmp_path / "films" / "more"
    films.mkdir(parents=True)
    (films / "a.mp4").write_bytes(film.read_bytes())
    (films.parent / "b.mp4").write_bytes(film.read_bytes())
    assert run("encode", exports["own"], films.parent, "-o", latents, "-q") == 0
    assert files(latents) == {"more/a.safetensors", "b.safetensors"}
    model = load(exports["own"])
    expected = to_bytes(model.decode(load_file(latents / "b.safetensors")["latent"][None]))
    assert (
        run("decode", exports["own"], latents / "b.safetensors", "-o", tmp_path / "png", "--format", "png", "-q") == 0
    )
    images = sorted((tmp_path / "png").iterdir())
    assert [path.name for path in images] == [f"{i:06d}.png" for i in range(9)]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in images]), expected)
    capsysbinary.readouterr()
    assert run("decode", exports["own"], latents / "b.safetensors", "-o", "-") == 0
    out, err = capsysbinary.readouterr()
    assert out == expected.tobytes() and b"-video_size 48x32 -framerate 24" in err
    assert run("decode", exports["own"], latents, "-o", tmp_path / "all", "-q") == 0
    assert files(tmp_path / "all") == {"more/a.mp4", "b.mp4"}
    # images are a video again
    again = tmp_path / "again.safetensors"
    assert run("encode", exports["own"], tmp_path / "png", "-o", again, "--fps", 24, "-q") == 0
    assert torch.equal(load_file(again)["latent"], model.encode(to_video(expected)[None])[0])
    assert run("encode", exports["own"], tmp_path / "png", "-o", tmp_path / "x.safetensors") == 1
    assert b"--fps 24" in capsysbinary.readouterr().err


def test_raw_latents_are_normalised_at_the_door(exports, film, tmp_path, capsys):
    plain, raw, bare = (tmp_path / f"{name}.safetensors" for name in ("plain", "raw", "bare"))
    source = ROOT / "decoders" / "latent_spaces" / "wan_mini_weights"
    assert source.is_dir()
    assert run("encode", "wan_mini", film, "-o", plain, "-q") == 0
    assert run("encode", "wan_mini", film, "-o", raw, "--raw", "-q") == 0
    with safe_open(raw, framework="pt") as file:
        assert file.metadata()["normalised"] == "false"
    assert (load_latent(str(raw))[0] - load_latent(str(plain))[0]).abs().max() < 1e-5
    model = load("wan_mini")
    latent = load_file(raw)["latent"]
    from safetensors.torch import save_file

    save_file({"latent": latent * 3 + 2}, bare, {"fps": "24"})  # says nothing, and looks like nothing normalised
    assert run("decode", "wan_mini", bare, "-o", tmp_path / "no.mp4") == 1
    said = capsys.readouterr().err
    assert "--assume raw" in said and "Traceback" not in said and not (tmp_path / "no.mp4").exists()
    save_file({"latent": latent}, bare, {"fps": "24"})
    assert run("decode", "wan_mini", bare, "-o", tmp_path / "yes.mkv", "--codec", "ffv1", "--assume", "raw", "-q") == 0
    assert np.array_equal(frames_of(tmp_path / "yes.mkv"), to_bytes(model.decode(model.normalise(latent[None]))))
    assert (
        run("decode", "wan_mini", bare, "-o", tmp_path / "as.mkv", "--codec", "ffv1", "--assume", "normalised", "-q")
        == 0
    )
    assert np.array_equal(frames_of(tmp_path / "as.mkv"), to_bytes(model.decode(latent[None])))


def test_pieces_of_an_encoder_without_a_stream(exports, tmp_path):
    """--chunk 5: each five frames are a clip by itself, in one file, which training refuses and this command decodes."""
    source = make_film(tmp_path / "a.mp4", 13, SIZE)
    latents, model = tmp_path / "a.safetensors", load(exports["own"])
    assert run("encode", exports["own"], source, "-o", latents, "--chunk", 5, "-q") == 0
    pieces = [model.encode(part) for part in clip(source)[:, :, :10].split(5, 2)]
    last = torch.cat([clip(source)[:, :, 10:], clip(source)[:, :, 12:].expand(-1, -1, 2, -1, -1)], 2)
    pieces.append(model.encode(last))
    assert torch.equal(load_file(latents)["latent"], torch.cat(pieces, 2)[0]) and LatentReader(latents).piece == 2
    with pytest.raises(BadFile, match="pieces of 2 latent frames"):
        load_latent(str(latents))
    assert run("decode", exports["own"], latents, "-o", tmp_path / "a.mkv", "--codec", "ffv1", "-q") == 0
    expected = np.concatenate([to_bytes(model.decode(piece)) for piece in pieces])[:13]
    assert np.array_equal(frames_of(tmp_path / "a.mkv"), expected)


def test_a_decoder_without_a_stream_takes_windows(exports, tmp_path, capsys):
    source = make_film(tmp_path / "a.mp4", 21, SIZE)
    latents, model = tmp_path / "a.safetensors", load(exports["plain"])
    assert not model.can_stream
    assert run("encode", exports["plain"], source, "-o", latents) == 0
    latent = load_file(latents)["latent"][None]
    Image.fromarray(decoded(source)[0]).save(latents.with_suffix(".png"))  # the reference lies beside
    reference = clip(source)[:, :, :1]

    def frames(*more: object) -> np.ndarray:
        out = tmp_path / "a.mkv"
        assert run("decode", exports["plain"], latents, "-o", out, "--codec", "ffv1", "--overwrite", *more) == 0
        return frames_of(out).astype(int)

    capsys.readouterr()
    assert np.array_equal(frames(), to_bytes(model.decode(latent, reference=reference)))
    assert "does not stream" not in capsys.readouterr().err, "six latent frames are one window"
    without = to_bytes(model.decode(latent)).astype(int)
    assert np.array_equal(frames("--reference", "none"), without)
    windowed = frames("--window", 2, "--reference", "none")
    assert "does not stream" in capsys.readouterr().err
    by_hand = []
    for start in (0, 2, 4):
        left, right = max(start - 2, 0), min(start + 4, 6)
        video = model.decode(latent[:, :, left:right])
        before = model.space.pixel_frames(start - left) if start > left else 0
        by_hand.append(video[:, :, before : model.space.pixel_frames(min(start + 2, 6) - left)])
    assert np.array_equal(windowed, to_bytes(torch.cat(by_hand, 2)))


# ---- the files themselves


def test_uneven_times_are_kept(exports, tmp_path, capsys):
    times = [0.0, 0.04, 0.12, 0.16, 0.40, 0.44, 0.6, 0.7, 1.5]
    source = uneven(tmp_path / "phone.mp4", times)
    assert times_of(source) == pytest.approx(times, abs=1e-4)
    assert run("reconstruct", exports["own"], source, "-o", tmp_path / "r.mp4") == 0
    assert "its frame rate varies" in capsys.readouterr().err
    assert times_of(tmp_path / "r.mp4") == pytest.approx(times, abs=1e-3)
    latents = tmp_path / "l.safetensors"
    assert run("encode", exports["own"], source, "-o", latents, "-q") == 0
    assert LatentReader(latents).seconds == pytest.approx(times, abs=1e-3)
    assert run("decode", exports["own"], latents, "-o", tmp_path / "d.mkv", "-q") == 0
    assert times_of(tmp_path / "d.mkv") == pytest.approx(times, abs=1e-3)
    assert run("decode", exports["own"], latents, "-o", tmp_path / "even.mp4", "--fps", 10, "-q") == 0
    assert times_of(tmp_path / "even.mp4") == pytest.approx([i / 10 for i in range(9)], abs=1e-3)


def test_rotated_films_are_read_upright(exports, film, tmp_path):
    turned = rotated(film, tmp_path / "turned.mp4")
    assert run("encode", exports["own"], turned, "-o", tmp_path / "a.safetensors", "-q") == 0
    latent, header = load_latent(str(tmp_path / "a.safetensors"))
    assert (header.height, header.width) == (48, 32)
    frames = decoded(film)
    expected = [load(exports["own"]).encode(to_video(np.rot90(frames, k, (1, 2)))[None])[0] for k in (1, 3)]
    assert any(torch.equal(latent, one) for one in expected)
    with av.open(str(turned)) as container:
        turn = next(container.decode(video=0)).rotation
    assert torch.equal(latent, expected[0 if turn % 360 == 90 else 1]), "as players show it"


def test_audio_is_copied(exports, film, tmp_path):
    source = with_sound(film, tmp_path / "sound.mp4")

    def sound(path: Path) -> list[tuple]:
        with av.open(str(path)) as container:
            assert container.streams.audio, path
            return [(round(float(p.pts * p.time_base), 3), bytes(p)) for p in container.demux(audio=0) if p.size]

    assert run("reconstruct", exports["own"], source, "-o", tmp_path / "r.mp4", "--audio", "-q") == 0
    assert sound(tmp_path / "r.mp4") == sound(source) and len(frames_of(tmp_path / "r.mp4")) == 9
    latents = tmp_path / "l.safetensors"
    assert run("encode", exports["own"], source, "-o", latents, "-q") == 0
    assert run("decode", exports["own"], latents, "-o", tmp_path / "d.mkv", "--audio", source, "-q") == 0
    assert [data for _, data in sound(tmp_path / "d.mkv")] == [data for _, data in sound(source)]


@pytest.mark.parametrize(("codec", "suffix"), [("h264", ".mp4"), ("h265", ".mp4"), ("ffv1", ".mkv")])
@pytest.mark.parametrize("size", [(32, 64), (33, 67)])
def test_codecs_keep_colours(codec, suffix, size, tmp_path):
    """Saturated flat colours come back: another matrix or range than the file's tags say would move them by 10 and more."""
    colours = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (250, 250, 250), (5, 5, 5)]
    frames = np.stack([np.full((*size, 3), colour, np.uint8) for colour in colours])
    with video_file(tmp_path / f"a{suffix}", 8, codec) as sink:
        sink.write(frames)
    found = frames_of(tmp_path / f"a{suffix}")
    assert found.shape == frames.shape and np.abs(found.astype(int) - frames).max() <= (0 if codec == "ffv1" else 4)


def test_the_run_based_command_cuts_padding_off_too(exports, tmp_path):
    """`make decode` reads what this command encoded."""
    from types import SimpleNamespace

    from datamodules.latents import inspect_latent
    from decoders.latent_spaces.dct import DCT, DCTConfig

    source = make_film(tmp_path / "odd.mp4", 11, (36, 46), fps=10)
    assert run("encode", exports["dct"], source, "-o", tmp_path / "l.safetensors", "-q") == 0
    decoder = SimpleNamespace(latent_space=DCT(DCTConfig(12, 4, 8)), size_multiple=8)
    assert check_fit(decoder, inspect_latent(str(tmp_path / "l.safetensors"))) == (11, 36, 46)


def test_x265_is_not_given_what_aborts_it(tmp_path):
    with pytest.raises(OutputError, match="64 pixels in width"), video_file(tmp_path / "a.mp4", 8, "h265") as sink:
        sink.write(np.zeros((2, 64, 62, 3), np.uint8))
    assert not files(tmp_path)


# ---- as a program


def test_as_a_program(exports, film, tmp_path):
    """Help with examples, a broken pipe, and no trainer among what it imports."""

    def program(*arguments: object, code: str = "") -> subprocess.CompletedProcess:
        run = code or "from experiments.cli import main; sys.exit(main())"
        check = "import atexit, sys; atexit.register(lambda: print('TRAINER', *sorted({'lightning', 'omegaconf', 'torchmetrics'} & set(sys.modules)), file=sys.stderr));"
        command = [sys.executable, "-c", check + run, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})

    shown = program("reconstruct", "--help")
    assert shown.returncode == 0 and b"examples:" in shown.stdout
    done = program("reconstruct", exports["own"], film, "-o", tmp_path / "a.mp4")
    assert done.returncode == 0 and b"psnr" in done.stdout and done.stderr.strip() == b"TRAINER", done.stderr
    latents = tmp_path / "a.safetensors"
    big = torch.randn(4, 40, 16, 16) * 0.8
    save_latent(latents, big, space=load(exports["own"]).space.fingerprint, height=128, width=128, fps=8)
    command = f"{sys.executable} -m experiments.cli decode {exports['own']} {latents} -o - | head -c 100 >/dev/null; echo ${{PIPESTATUS[0]}}"
    piped = subprocess.run(["bash", "-c", command], capture_output=True, cwd=ROOT, text=True)
    assert piped.stdout.strip() == "1" and "Traceback" not in piped.stderr and "closed it" in piped.stderr


def test_info(exports, film, tmp_path, capsys):
    assert run("info", exports["own"]) == 0
    said = capsys.readouterr().out
    assert "baseline" in said and "4x8x8" in said and "experiment: baseline_debug" in said
    assert run("encode", exports["own"], film, "-o", tmp_path / "a.safetensors", "-q") == 0
    assert run("info", tmp_path / "a.safetensors") == 0 and "9 frames of 32x48, 24 fps" in capsys.readouterr().out
    assert run("info", film) == 0 and "9 frames of 32x48, 24 fps" in capsys.readouterr().out
    assert run("info", tmp_path / "nowhere") == 2 and "Traceback" not in capsys.readouterr().err


def test_an_autoencoder_whose_encoder_is_not_taken_apart(tmp_path, capsys):
    """LTX in diffusers' form: its decoder is ours, its encoder diffusers' own, and neither streams."""
    from diffusers import AutoencoderKLLTXVideo
    from test_backbones_ltx import KINDS

    from decoders.latent_spaces.diffusers import DiffusersVAE, DiffusersVAEConfig

    torch.manual_seed(0)
    folder, source = tmp_path / "vae", make_film(tmp_path / "a.mp4", 20, (64, 96), fps=8)
    AutoencoderKLLTXVideo(**next(iter(KINDS.values()))).eval().save_pretrained(folder)
    assert run("encode", folder, source, "-o", tmp_path / "l.safetensors") == 0
    video = torch.cat([clip(source), clip(source)[:, :, -1:].expand(-1, -1, 5, -1, -1)], 2)
    expected = DiffusersVAE(DiffusersVAEConfig(str(folder))).encode(video)
    assert torch.equal(load_file(tmp_path / "l.safetensors")["latent"], expected[0])
    assert run("decode", folder, tmp_path / "l.safetensors", "-o", tmp_path / "d.mkv", "--codec", "ffv1", "-q") == 0
    assert np.array_equal(frames_of(tmp_path / "d.mkv"), to_bytes(load(folder).decode(expected))[:20])
    capsys.readouterr()
    assert run("reconstruct", folder, source, "-o", tmp_path / "r.mp4") == 0
    assert "coded in chunks of 17 frames" in capsys.readouterr().err and len(frames_of(tmp_path / "r.mp4")) == 20


def test_info_says_which_lengths_there_are_and_no_control_codes(tmp_path, capsys):
    export("regen_debug", tmp_path / "regen", note="\x1b[31mred", scores=[{"metric": "psnr", "mean": 20.123456}])
    assert run("info", tmp_path / "regen") == 0
    said = capsys.readouterr().out
    assert "videos: 1, 5, 10, 15, 20, ... frames" in said, "whole chunks, and an image"
    assert "metric psnr, mean 20.12" in said and "\x1b" not in said


def test_images_are_read_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 2, 1):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"f{number}.png")
    (tmp_path / ".hidden.png").touch()
    from experiments.video_in import open_film

    assert [int(frame[0, 0, 0]) for frame in open_film(tmp_path, 8).frames()] == [1, 2, 9, 10]


def test_grey_images_of_sixteen_bits_keep_their_range(tmp_path):
    from datamodules.stills import load_image

    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert load_image(str(tmp_path / "deep.png"))[0, 0, :, 0].tolist() == [0, 128, 255]


def test_pixels_that_are_not_square_are_told(exports, tmp_path, capsys):
    with av.open(str(tmp_path / "wide.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(16, 11)
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode())
    assert run("encode", exports["own"], tmp_path / "wide.mp4", "-o", tmp_path / "x.safetensors") == 0
    assert "its pixels are 16/11 as wide as high" in capsys.readouterr().err
