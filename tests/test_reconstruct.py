"""`make reconstruct`: videos of any length through a run's encoder and decoder, chunk by chunk, whole or not at all."""

import csv
import os
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from video_files import decoded, make_film

from datamodules.stills import load_reference
from datamodules.transforms import to_video
from decoders.base import key_seed
from decoders.chunks import default_chunk
from decoders.latent_spaces.chunked import Chunked, ChunkedConfig
from decoders.latent_spaces.dct import DCT, DCTConfig
from experiments import reconstruct
from experiments.callbacks import to_uint8
from experiments.checkpoints import save_weights
from experiments.compose import ConfigError
from experiments.config import build_decoder, build_space, load
from experiments.decode import load_decoder
from experiments.runs import run_dir

ROOT = Path(__file__).parent.parent
NAME = "refdecoder_debug"


def untrained(name: str) -> None:
    """A run with the weights that it begins with."""
    experiment = load(name)
    space = build_space(experiment)
    torch.manual_seed(0)
    decoder = build_decoder(experiment, space)
    weights = {**decoder.inference_parameters(), **decoder.inference_buffers()}
    kept = {"latent_space": space.fingerprint, "step": "0"}
    save_weights(run_dir(name) / "weights-ema.safetensors", weights, kept)


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_ROOT", str(tmp_path_factory.mktemp("runs")))
        untrained(NAME)
        yield


@pytest.fixture
def film(tmp_path) -> Path:
    (tmp_path / "films" / "more").mkdir(parents=True)
    return make_film(tmp_path / "films" / "more" / "a.mkv", 22, (32, 48), fps=24)


def command(source: Path, out: Path, *arguments: str, name: str = NAME) -> int:
    return reconstruct.main([name, f"in={source}", f"out={out}", *arguments])


def report(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "reconstruct.csv") as file:
        return {Path(row["source"]).stem: row for row in csv.DictReader(file)}


def expected(film: Path, chunk: int, reference) -> torch.Tensor:
    """The same by hand: "t h w 3" bytes before H.264, and the PSNR of all frames."""
    decoder, _ = load_decoder(NAME, [], None, "cpu")
    video = to_video(decoded(film))[None]
    given = reference(video)
    generator = torch.Generator().manual_seed(key_seed("more/a.mkv", 0))
    parts = []
    for start in range(0, video.shape[2], chunk):
        piece = video[:, :, start : start + chunk]
        size = tuple(piece.shape[2:])
        filled = torch.cat([piece, piece[:, :, -1:].expand(-1, -1, chunk - size[0], -1, -1)], 2)
        latent = decoder.encode(filled)
        parts.append(decoder.decode(latent, size=size, reference=given, generator=generator))
    found = torch.cat(parts, 2)
    mse = (found - video).square().mean(dim=(1, 3, 4))
    return to_uint8(found[0]), (10 * torch.log10(4 / mse)).mean().item()


@pytest.mark.parametrize(
    ("typed", "reference", "chunk"),
    [
        ((), lambda video: video[:, :, :1], 17),
        (("reference=5,20", "chunk=9"), lambda video: video[:, :, [5, 20]], 9),
        (("reference=none", "chunk=5"), lambda video: None, 5),
    ],
)
def test_chunks_share_the_reference(film, tmp_path, typed, reference, chunk, monkeypatch):
    written = {}
    real = reconstruct.write_video

    def keep(path, parts, fps, crf):
        parts = list(parts)
        written.update(frames=torch.cat(parts), lengths=[len(part) for part in parts], fps=fps)
        real(path, parts, fps, crf)

    monkeypatch.setattr(reconstruct, "write_video", keep)
    out = tmp_path / "out"
    assert command(tmp_path / "films", out, *typed) == 0
    wanted, psnr = expected(film, chunk, reference)
    assert (written["frames"].int() - wanted.int()).abs().max() <= 1
    assert max(written["lengths"]) == chunk and sum(written["lengths"]) == 22 and written["fps"] == 24
    row = report(out)["a"]
    assert row["outcome"] == "decoded" and f"PSNR {psnr:.2f} dB" in row["detail"]
    assert row["reference"] == ("" if "reference=none" in typed else f"reference frame {'5, 20' if typed else '0'}")
    with av.open(str(out / "more" / "a.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert container.streams.video[0].average_rate == 24
    assert frames.shape == wanted.shape
    assert command(tmp_path / "films", out, *typed) == 0 and report(out)["a"]["outcome"] == "exists"


def test_a_report_keeps_what_earlier_commands_made(film, tmp_path, monkeypatch):
    """Seeds, references and scores of videos that are left as they are; also if the command is stopped half way."""
    films, out = film.parent, tmp_path / "out"
    make_film(films / "b.mp4", 5, (32, 48))
    assert command(films / "b.mp4", out, "reference=none") == 0
    made = report(out)["b"]
    real = reconstruct.reconstruct_file

    make_film(films / "c.mp4", 5, (32, 48))

    def stopped(decoder, job, *rest):
        if job.name == "c.mp4":
            raise KeyboardInterrupt
        return real(decoder, job, *rest)

    monkeypatch.setattr(reconstruct, "reconstruct_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        command(films, out)
    assert report(out).keys() == {"a", "b"} and report(out)["a"]["outcome"] == "decoded"
    monkeypatch.setattr(reconstruct, "reconstruct_file", real)
    assert command(films, out) == 0
    assert report(out)["b"] == made | {"outcome": "exists"} and "no reference, PSNR" in made["detail"] and made["seed"]
    assert report(out)["c"]["outcome"] == "decoded"
    (out / "b.mp4").unlink()
    assert command(film, out) == 0
    assert report(out).keys() == {"a", "c"}, "what is gone is not listed"


def test_a_reference_that_cannot_be_decoded_is_told(film, tmp_path, monkeypatch):
    """A container may announce more frames than it holds."""
    real = reconstruct.read_film
    monkeypatch.setattr(reconstruct, "read_film", lambda path: (frame for i, frame in enumerate(real(path)) if i < 20))
    assert command(film, tmp_path / "out", "reference=0,21") == 1
    assert (
        "says it has 22 frames, but frame 21, which is to be the reference" in report(tmp_path / "out")["a"]["detail"]
    )


def test_an_image_is_the_reference_of_all(film, tmp_path, monkeypatch):
    Image.fromarray(np.full((64, 96, 3), 30, np.uint8)).save(tmp_path / "look.png")
    seen = []
    monkeypatch.setattr(
        reconstruct, "reconstruct", lambda decoder, video, reference, **_: (seen.append(reference), video)[1]
    )
    assert command(film, tmp_path / "out", f"reference={tmp_path}/look.png") == 0
    assert all(torch.equal(one, load_reference(str(tmp_path / "look.png"), (32, 48))[None]) for one in seen)
    assert len(seen) == 2 and "look.png (resized from 64x96)" in report(tmp_path / "out")["a"]["detail"]


def test_memory_is_that_of_a_chunk(tmp_path, monkeypatch):
    """However long the film: no more than one chunk of frames is read ahead of what is decoded."""
    read, ahead = [], []
    make_film(tmp_path / "long.mp4", 90, (32, 48))
    real = reconstruct.read_film

    def counting(path):
        for frame in real(path):
            read.append(1)
            yield frame

    def shown(decoder, video, reference, **_):
        ahead.append(len(read))
        read.clear()
        return video

    monkeypatch.setattr(reconstruct, "read_film", counting)
    monkeypatch.setattr(reconstruct, "reconstruct", shown)
    assert command(tmp_path / "long.mp4", tmp_path / "out", "chunk=9", "reference=none") == 0
    assert ahead == [9] * 10


def test_every_family_reconstructs(debug_name, tmp_path):
    if debug_name != NAME:
        untrained(debug_name)
    make_film(tmp_path / "a.mp4", 7, (32, 48))
    assert command(tmp_path / "a.mp4", tmp_path / "out", name=debug_name) == 0
    assert decoded(tmp_path / "out" / "a.mp4").shape == (7, 32, 48, 3)


def test_what_cannot_be_reconstructed_is_told_and_the_rest_is_done(film, tmp_path):
    films = film.parent
    with av.open(str(films / "odd.mkv"), "w") as container:  # yuv420p has no odd sides
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 33, 48, "yuv444p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((33, 48, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    make_film(films / "size.mp4", 9, (36, 44))
    make_film(films / "short.mp4", 3, (32, 48))
    (films / "empty.mp4").write_bytes(b"")
    out = tmp_path / "out"
    assert command(films, out, "reference=4") == 1
    failed = {name: row["detail"] for name, row in report(out).items() if row["outcome"] == "failed"}
    assert failed.keys() == {"size", "short", "empty", "odd"}
    assert "is 33x48 pixels, and H.264 in yuv420p needs even sides" in failed["odd"]
    assert "36" in failed["size"] and "multiples of 8" in failed["size"]
    assert "has 3 frames, 0 to 2, and reference=4 is outside of them" in failed["short"]
    assert "empty file" in failed["empty"]
    assert report(out)["a"]["outcome"] == "decoded"
    assert not [path for path in out.rglob("*") if path.suffix == ".tmp" or path.stem in failed]
    assert command(films / "size.mp4", out, "pad=replicate") == 0
    assert decoded(out / "size.mp4").shape == (9, 36, 44, 3)


def test_a_film_that_is_damaged_half_way_leaves_nothing(film, tmp_path, monkeypatch):
    real = reconstruct.read_film

    def torn(path):
        for number, frame in enumerate(real(path)):
            if number == 19:
                raise reconstruct.Unfit("damaged: frame 19 could only be patched up")
            yield frame

    monkeypatch.setattr(reconstruct, "read_film", torn)
    assert command(film, tmp_path / "out", "chunk=9") == 1
    assert "frame 19" in report(tmp_path / "out")["a"]["detail"]
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["reconstruct.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in=x"], "name an experiment: make reconstruct"),
        ([NAME, "in=."], "out=FOLDER is needed: make reconstruct"),
        ([NAME, "in=tests", "out=y"], "^in: no video found at tests"),
        ([NAME, "in=FILM", "out=y", "chunk=8"], "chunk=8: 8 frames: .*the nearest is 5 or 9"),
        ([NAME, "in=FILM", "out=y", "chunk=0"], "chunk=0 must be 1 or more"),
        ([NAME, "in=FILM", "out=y", "reference=look.png"], "reference=look.png is no image, no frame's number"),
        ([NAME, "in=FILM", "out=y", "reference=-1"], "reference=-1 is no image"),
        ([NAME, "in=FILM", "out=y", "pad=maybe"], "^pad: "),
        ([NAME, "in=FILM", "out=y", "weights=best"], "it has ema"),
        (["flashdecoder_debug", "in=FILM", "out=y"], "has not been trained.*weights=start"),
    ],
)
def test_wrong_commands_are_refused(film, arguments, message, monkeypatch, tmp_path):
    if arguments[0].startswith("flash"):
        monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=message):
        reconstruct.main([text.replace("FILM", str(film)) for text in arguments])


def test_a_decoder_that_looks_at_nothing_takes_no_reference(film, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    untrained("flashdecoder_debug")
    with pytest.raises(ConfigError, match="reference=0: FlashDecoder looks at no reference; leave it out"):
        command(film, tmp_path / "out", "reference=0", name="flashdecoder_debug")


def test_default_chunks():
    assert default_chunk(DCT(DCTConfig(12, 4, 8))) == 17
    assert default_chunk(DCT(DCTConfig(12, 8, 8))) == 17
    assert default_chunk(Chunked(ChunkedConfig(stride_t=4))) == 15
    assert default_chunk(Chunked(ChunkedConfig(stride_t=32))) == 33
    space = DCT(DCTConfig(12, 4, 8))
    space.causal = False
    assert default_chunk(space) == 16


def test_make_hands_the_options_on():
    run = subprocess.run(
        ["make", "--no-print-directory", "-n", "reconstruct", "exp=x", "in=a b", "out=d", "reference=0,16", "python=py"],
        cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ,
    )  # fmt: skip
    assert run.stdout.strip() == "py -m experiments.reconstruct 'x' 'in=a b' 'out=d' 'reference=0,16'"
