"""`latent2pixel`: sampling options reach the decoder, films without sound, and results that are there already."""

import json
import random
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from cli_files import export, files, frames_of, run, with_sound
from video_files import make_film

from datamodules.latents import save_latent
from decoders.exported import Exported, ExportError, load
from decoders.streaming import Stream
from experiments.cli_checks import sampling_of
from experiments.cli_coding import to_bytes
from experiments.cli_files import UsageError

SIZE = (32, 48)
CODEC = ("--codec", "ffv1", "-q")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """REGEN whose steps and seeds matter, a decoder with a stream and no options, RefDecoder; a film, and latents of two chunks."""
    folder = tmp_path_factory.mktemp("options")
    export("regen_debug", folder / "regen")
    export("baseline_debug", folder / "plain")
    export("refdecoder_debug", folder / "ref")
    shaken(folder / "regen")
    make_film(folder / "film.mp4", 9, SIZE, fps=24)
    model = load(folder / "regen")
    latent = torch.randn(4, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    save_latent(folder / "l.safetensors", latent, space=model.space.fingerprint, height=32, width=48, fps=8)
    assert run("encode", folder / "plain", folder / "film.mp4", "-o", folder / "p.safetensors", "-q") == 0
    return folder


def shaken(folder: Path) -> None:
    """Weights of the last layer that are not zero: noise and steps change every frame."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.ndim > 1:
            weights[name] = tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
    save_file(weights, folder / "model.safetensors")


def decoded(root: Path, tmp_path: Path, *more: object) -> np.ndarray:
    out = tmp_path / "d.mkv"
    assert run("decode", root / "regen", root / "l.safetensors", "-o", out, *CODEC, "--overwrite", *more) == 0
    return frames_of(out)


def expected(model: Exported, latent: torch.Tensor, seed: int, **sampling) -> np.ndarray:
    return to_bytes(model.decode(latent, generator=torch.Generator().manual_seed(seed), **sampling))


# ---- sampling


def test_sampling_reaches_the_decoder(root, tmp_path):
    """The pixels are those of `decode` with the same options, to the bit; and each option changes them."""
    from safetensors.torch import load_file

    model, latent = load(root / "regen"), load_file(root / "l.safetensors")["latent"][None]
    found = {}
    for seed, sampling in (
        (0, {}),
        (3, {}),
        (0, {"steps": 3}),
        (0, {"steps": 3, "extension": True}),
        (3, {"times": [1.5, 0, 9, -1]}),
        (0, {"times": [0.5], "steps": 2}),
    ):
        options = [f"--sampling={name}={json.dumps(value).replace(' ', '')}" for name, value in sampling.items()]
        frames = decoded(root, tmp_path, "--seed", seed, *options)
        assert np.array_equal(frames, expected(model, latent, seed, **sampling)), sampling
        found[json.dumps([seed, sampling])] = frames.tobytes()
    assert len(set(found.values())) == len(found)


def test_times_of_all_frames_are_the_clip(root, tmp_path):
    """With or without brackets; and what is shown goes by the latents' rate, or --fps."""
    whole = decoded(root, tmp_path)
    numbers = ",".join(str(i) for i in range(10))
    assert np.array_equal(decoded(root, tmp_path, "--sampling", f"times={numbers}"), whole)
    assert np.array_equal(decoded(root, tmp_path, "--sampling", f"times=[{numbers}]"), whole)
    one = decoded(root, tmp_path, "--sampling", "times=4")
    assert len(one) == 1 and np.array_equal(decoded(root, tmp_path, "--sampling", "times=[4]"), one)
    twice = ",".join(str(i / 2) for i in range(19))
    decoded(root, tmp_path, "--sampling", f"times={twice}", "--fps", 16)
    with av.open(str(tmp_path / "d.mkv")) as container:
        assert container.streams.video[0].average_rate == 16


def test_reconstruct_takes_steps(root, tmp_path):
    many, once = tmp_path / "4.mkv", tmp_path / "1.mkv"
    assert run("reconstruct", root / "regen", root / "film.mp4", "-o", once, *CODEC) == 0
    given = ("--sampling", "steps=4", "--sampling", "extension=true")
    assert run("reconstruct", root / "regen", root / "film.mp4", "-o", many, *CODEC, *given) == 0
    model = load(root / "regen")
    film = torch.from_numpy(frames_of(root / "film.mp4")).permute(3, 0, 1, 2)[None] / 127.5 - 1
    latent = model.encode(torch.cat([film, film[:, :, -1:]], 2))  # as many frames as chunks have
    assert np.array_equal(frames_of(many), expected(model, latent, 0, steps=4, extension=True)[:9])
    assert not np.array_equal(frames_of(many), frames_of(once))


def test_refdecoder_without_its_reference(root, tmp_path):
    """skip gives one video whatever the reference is."""
    made = []
    for number, reference in enumerate(("none", "0")):
        out = tmp_path / f"{number}.mkv"
        more = ("--sampling", "skip=true", "--reference", reference)
        assert run("reconstruct", root / "ref", root / "film.mp4", "-o", out, *CODEC, *more) == 0
        made.append(frames_of(out))
    assert np.array_equal(*made)


@pytest.mark.parametrize(
    ("command", "model", "given", "said"),
    [
        ("decode", "plain", ["steps=4"], "--sampling steps: no option of baseline; it has none"),
        ("decode", "regen", ["step=4"], "--sampling step: no option of regen; it has times, steps, extension"),
        ("reconstruct", "ref", ["steps=4"], "no option of refdecoder; it has skip"),
        ("reconstruct", "regen", ["times=0,1"], "latent2pixel decode takes times"),
        ("decode", "regen", ["steps"], "write --sampling NAME=VALUE"),
        ("decode", "regen", ["steps=0"], "1 or more"),
        ("decode", "regen", ["steps=2.5"], "whole number"),
        ("decode", "regen", ["steps=true"], "whole number"),
        ("decode", "regen", ["steps=many"], "no number, true, false or list"),
        ("decode", "regen", ["steps=1", "steps=2"], "steps is given twice"),
        ("decode", "regen", ["extension=1"], "true or false"),
        ("decode", "regen", ["times=[]"], "one or more finite numbers"),
        ("decode", "regen", ["times=NaN"], "no number, true, false or list"),
        ("decode", "regen", ["times=0,1", "extension=true"], "leave times out, or extension"),
        ("decode", "regen", ["seed=4"], "--seed 4"),
    ],
)
def test_sampling_that_cannot_be_is_refused_before_any_work(
    root, tmp_path, capsys, monkeypatch, command, model, given, said
):
    monkeypatch.setattr("decoders.exported_module.Exported.decode", lambda *_, **__: pytest.fail("worked"))
    monkeypatch.setattr("decoders.exported_module.Exported.encode", lambda *_, **__: pytest.fail("worked"))
    source = root / ("film.mp4" if command == "reconstruct" else "l.safetensors")
    asked = [part for text in given for part in ("--sampling", text)]
    assert run(command, root / model, source, "-o", tmp_path / "x.mp4", *asked) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("error: ") and err.count("\n") == 1 and not files(tmp_path)


def test_any_text_is_finite_values_or_one_clear_line():
    draw = random.Random(0)
    awkward = [
        "1e999",
        "-" * 9,
        "[" * 9999,
        "9" * 5000,
        "1" + "0" * 400,
        "[[1]]",
        '{"a":1}',
        '"x"',
        "null",
        "1,,2",
        "\u0663",
    ]
    for text in awkward + [
        "".join(draw.choices("0123456789.,-+eE[]truefalsNn ", k=draw.randrange(9))) for _ in range(3000)
    ]:
        try:
            found = sampling_of([f"times={text}"])["times"]
        except UsageError as error:
            assert "\n" not in str(error)
            continue
        parts = found if isinstance(found, list) else [found]
        assert all(np.isfinite(float(part)) for part in parts), text


def test_lists_come_back_as_they_were_typed():
    draw = random.Random(0)
    for _ in range(300):
        values = [
            draw.choice((draw.uniform(-1e6, 1e6), draw.randrange(-999, 999), 1e-9)) for _ in range(draw.randrange(2, 7))
        ]
        bare = ",".join(map(repr, values))
        assert sampling_of([f"times={bare}"]) == sampling_of([f"times=[{bare}]"]) == {"times": values}


def test_streams_take_what_they_have(root):
    model = load(root / "regen")
    latent = torch.randn(1, 4, 4, 4, 6)
    video = Stream(model, *SIZE, seed=5, sampling={"steps": 2, "extension": True})
    found = torch.cat([video.push(latent), video.finish()], 2)
    whole = model.decode(latent, steps=2, extension=True, generator=torch.Generator().manual_seed(5))
    assert torch.equal(found, whole)
    with pytest.raises(ValueError, match="does not take times: it takes steps, extension"):
        Stream(model, *SIZE, sampling={"times": [0]})
    with pytest.raises(ExportError, match="stream: times is no option of regen; it takes steps, extension"):
        model.start_stream(1, *SIZE, times=[0])
    with pytest.raises(ValueError, match="it takes no such options"):
        Stream(load(root / "plain"), *SIZE, sampling={"steps": 2})


def test_a_mistyped_option_names_the_nearest(root, tmp_path, capsys):
    given = ("decode", root / "regen", root / "l.safetensors", "-o", tmp_path / "x.mp4")
    for more, said in (
        (("--steps", 4), "did you mean --sampling steps=...?"),
        (("--overwrit3",), "did you mean --overwrite?"),
        (("--sampling", "steps=4", "times=0"), "did you mean --sampling times=...?"),
        (("--qqqq",), "latent2pixel decode --help"),
    ):
        assert run(*given, *more) == 2
        assert said in capsys.readouterr().err and not files(tmp_path)


def test_info_names_the_options(root, capsys):
    assert run("info", root / "regen") == 0
    assert "--sampling: times, steps, extension; its own: steps 1, extension no" in capsys.readouterr().out
    assert run("info", root / "plain") == 0 and "--sampling" not in capsys.readouterr().out
    assert (
        run("info", root / "none.mp4") == 2 and capsys.readouterr().err == f"error: {root / 'none.mp4'} is not there\n"
    )


# ---- sound


def has_sound(path: Path) -> bool:
    with av.open(str(path)) as container:
        return bool(container.streams.audio)


def test_a_film_without_sound_is_written_without_and_told(root, tmp_path, capsys):
    films = tmp_path / "films"
    (films / "frames").mkdir(parents=True)
    (films / "b.mp4").write_bytes((root / "film.mp4").read_bytes())
    with_sound(root / "film.mp4", films / "a.mp4")
    given = ("reconstruct", root / "plain", films, "-o", tmp_path / "out", "--audio", "--metrics", "none")
    assert run(*given) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{films / 'b.mp4'}: it has no sound; the video is written without"]
    assert has_sound(tmp_path / "out" / "a.mp4") and not has_sound(tmp_path / "out" / "b.mp4")
    assert len(frames_of(tmp_path / "out" / "b.mp4")) == 9
    assert run(*given, "--overwrite", "-q") == 0 and capsys.readouterr().err == ""
    latents = (root / "p.safetensors", "-o", tmp_path / "d.mp4", "--audio")
    assert run("decode", root / "plain", *latents, root / "film.mp4") == 0
    assert "has no sound" in capsys.readouterr().err and len(frames_of(tmp_path / "d.mp4")) == 9


def test_images_have_no_sound(root, tmp_path, capsys):
    assert run("decode", root / "plain", root / "p.safetensors", "-o", tmp_path / "f", "--format", "png", "-q") == 0
    given = ("reconstruct", root / "plain", tmp_path / "f", "-o", tmp_path / "r.mp4", "--fps", 8, "--audio")
    assert run(*given) == 0 and "has no sound" in capsys.readouterr().err


def test_sound_that_cannot_be_read_is_a_mistake(root, tmp_path, capsys):
    for name, said in (("none.mp4", "it is not there"), ("", "a folder"), ("l.safetensors", "no readable film")):
        given = (root / "p.safetensors", "-o", tmp_path / "x.mp4", "--audio", root / name)
        assert run("decode", root / "plain", *given) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and not files(tmp_path)
    given = (root / "l.safetensors", "-o", tmp_path / "x.mp4", "--audio", root / "film.mp4")
    assert run("decode", root / "regen", *given, "--sampling", "times=0,1") == 2
    assert "leave --audio or times out" in capsys.readouterr().err


# ---- what is there already


def test_scores_are_replaced_only_when_asked(root, tmp_path, capsys):
    scores = tmp_path / "s.json"
    scores.write_text("mine")
    given = ("reconstruct", root / "plain", root / "film.mp4", "-o", tmp_path / "x.mp4", "--json", scores)
    assert run(*given) == 2
    assert capsys.readouterr().err == f"error: --json {scores} is there already; --overwrite replaces it\n"
    assert scores.read_text() == "mine" and files(tmp_path) == {"s.json"}
    assert run(*given, "--overwrite") == 0 and "psnr" in json.loads(scores.read_text())["files"][0]["scores"]


def test_no_result_replaces_an_input(root, tmp_path, capsys):
    """Not the film that is read, not one that comes later in the batch, not by another name of it."""
    films = tmp_path / "films"
    (films / "sub").mkdir(parents=True)
    for name in ("a.mp4", "sub/a.mp4"):
        (films / name).write_bytes((root / "film.mp4").read_bytes())
    (tmp_path / "link.json").symlink_to(films / "a.mp4")
    before = (films / "a.mp4").read_bytes()
    reconstruct = ("reconstruct", root / "plain")
    for given in (
        (films, "-o", films / "sub"),
        (films / "a.mp4", "-o", tmp_path / "x.mp4", "--json", films / "a.mp4"),
        (films / "a.mp4", "-o", tmp_path / "x.mp4", "--json", tmp_path / "link.json"),
    ):
        assert run(*reconstruct, *given, "--overwrite") == 2
        assert "is an input itself" in capsys.readouterr().err
    assert run(*reconstruct, films / "a.mp4", "-o", tmp_path / "x.mp4", "--json", tmp_path / "x.mp4") == 2
    assert "a video goes there" in capsys.readouterr().err
    assert files(films) == {"a.mp4", "sub/a.mp4"} and (films / "a.mp4").read_bytes() == before


def test_outputs_that_are_not_what_they_are_called(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    latents, film = root / "p.safetensors", root / "film.mp4"
    for given, said in (
        (("encode", root / "plain", film, "-o", "-"), "not to standard output"),
        (("decode", root / "plain", latents, "-o", "x.mp4", "--format", "png"), "png writes a folder of images"),
        (("decode", root / "plain", latents, "-o", "x.mp4", "--format", "raw"), "raw RGB is no video"),
        (("decode", root / "plain", latents, latents, "-o", "x"), "p.safetensors is given twice"),
    ):
        assert run(*given) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_several_results_do_not_go_into_a_folder_called_like_a_film(root, tmp_path, capsys):
    films = tmp_path / "films"
    films.mkdir()
    (films / "a.mp4").write_bytes((root / "film.mp4").read_bytes())
    assert run("reconstruct", root / "plain", films, "-o", tmp_path / "out.mp4", "-q") == 2
    assert f"go into a folder: -o {tmp_path / 'out'}/" in capsys.readouterr().err
    assert run("reconstruct", root / "plain", films, "-o", f"{tmp_path / 'out.mp4'}/", "-q") == 0
    assert files(tmp_path / "out.mp4") == {"a.mp4"}
