"""The wheel: what it declares is what it needs, what it ships is all that its code reads, and it decodes where nothing else is."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from evaluated import untrained
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from safetensors.torch import load_file, save_file
from test_imports import ROOMS, TRAINERS

from datamodules.procedural import draw_frames
from decoders.version import VERSION
from experiments.config import load
from experiments.export import ExportConfig, _decoder, export
from experiments.video_out import write_video

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Declared, but not pinned: they come with what is (lightning, omegaconf, diffusers), or no test needs them.
COME_ALONG = {"huggingface-hub", "pyyaml", "tqdm", "pdoc"}
DOCUMENTS = {".md"}  # read by people, in the repository


def required(extra: str | None = None) -> dict[str, Requirement]:
    """What the base, or an extra, declares itself, without our own name."""
    lines = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(one.name): one for one in found if one.name != PROJECT["name"]}


def pins() -> dict[str, Version]:
    lines = (line.partition("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
    return {canonicalize_name(name): Version(version) for name, _, version in lines}


def test_what_is_pinned_is_declared_and_fits():
    declared: dict[str, Requirement] = required()
    for extra in PROJECT["optional-dependencies"]:
        again = declared.keys() & required(extra).keys()
        assert not again, f"{again} stands in two lists; an extra names another: latent-to-pixel[cli]"
        declared |= required(extra)
    pinned = pins()
    assert pinned.keys() <= declared.keys(), f"not in pyproject.toml: {pinned.keys() - declared.keys()}"
    assert declared.keys() - pinned.keys() <= COME_ALONG, "declared, but not pinned in requirements.txt"
    odd = [name for name, version in pinned.items() if version not in declared[name].specifier]
    assert not odd, f"the pins of {odd} are not what pyproject.toml allows"


def test_inference_declares_no_trainer():
    assert not required().keys() & {
        *TRAINERS,
        "torchmetrics",
        "lpips",
        "diffusers",
        "transformers",
        "huggingface-hub",
        "av",
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources: a build leaves folders beside them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    built = subprocess.run(
        [*command, "--disable-pip-version-check", "-w", out, source], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_has_all_that_its_code_reads(wheel):
    assert wheel.name.startswith(f"latent_to_pixel-{VERSION}-py3-none-any")
    with zipfile.ZipFile(wheel) as file:
        inside = {name for name in file.namelist() if ".dist-info/" not in name}
    files = (path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file())
    ours = {path.relative_to(ROOT).as_posix() for path in files if not {"__pycache__"} & set(path.parts)}
    read_by_people = {name for name in ours - inside if Path(name).suffix in DOCUMENTS}
    assert inside == ours - read_by_people
    assert "decoders/latent_spaces/wan_mini_weights/README.md" in inside, "the licence of the weights goes with them"


def bare_environment(folder: Path, wheel: Path, *extras: str) -> Path:
    """The Python of an environment that has the wheel, and of other packages only what it declares to need, and they in turn.

    They are links to the ones installed here: nothing is downloaded, and what is not declared cannot be imported.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    for name in closure(extras):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run([*install, "--disable-pip-version-check", wheel], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return python


def closure(extras: tuple[str, ...]) -> set[str]:
    """Names of everything that the base and ``extras`` need, by what installed packages declare."""
    todo = [Requirement(line) for line in PROJECT["dependencies"]]
    asked, found = [*extras], set()
    while asked:
        for line in PROJECT["optional-dependencies"][asked.pop()]:
            one = Requirement(line)
            if one.name == PROJECT["name"]:
                asked += one.extras
            else:
                todo.append(one)
    seen = set()
    while todo:
        one = todo.pop()
        if (key := (canonicalize_name(one.name), frozenset(one.extras))) in seen:
            continue
        seen.add(key)
        found.add(key[0])
        for line in importlib.metadata.requires(one.name) or ():
            inner = Requirement(line)
            extras_of = ["", *one.extras]
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras_of):
                todo.append(inner)
    return found


def run(python: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    kept = ("PATH", "HOME", "TMPDIR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    return subprocess.run(
        [python, "-I", *arguments], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


DECODES = """
import importlib.util, sys
from pathlib import Path
absent = ("lightning", "pytorch_lightning", "omegaconf", "torchmetrics", "lpips", "diffusers", "huggingface_hub", "yaml", "av")
assert not [name for name in absent if importlib.util.find_spec(name)]
import torch, decoders
from safetensors.torch import load_file, save_file
assert "site-packages" in decoders.__file__, decoders.__file__
for folder in map(Path, sys.argv[1:]):
    model = decoders.load(folder)
    # Copies: what is mapped from a file lies at odd addresses, from which some kernels sum in another order.
    given = {name: tensor.clone() for name, tensor in load_file(folder.parent / "given.safetensors").items()}
    reference = {"reference": given["reference"]} if model.uses_reference else {}
    video = model.decode(given["latent"], generator=torch.Generator().manual_seed(1), **reference)
    save_file({"video": video.contiguous()}, folder.parent / "decoded.safetensors")
mini = decoders.load("wan_mini")
clip = mini.decode(mini.encode(torch.zeros(1, 3, 5, 32, 32)))
assert clip.shape == (1, 3, 5, 32, 32) and clip.abs().mean() < 0.2, clip.abs().mean()
heavy = ("losses", "metrics", "datamodules", "experiments")
assert not [name for name in heavy if name in sys.modules]
"""


@pytest.mark.slow
def test_in_a_clean_environment_every_family_decodes_as_its_run_does(wheel, tmp_path, monkeypatch):
    """No lightning, no omegaconf, no diffusers there; equal to the bit."""
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    names = sorted(path.stem for path in ROOT.glob("experiments/[!_]*_debug.yaml"))
    for name in names:
        untrained(name)
        folder = export(name, config=ExportConfig(out=str(tmp_path / name / "exported")))
        decoder, _ = _decoder(load(name), str(tmp_path / "runs" / name / "weights-last.safetensors"), None)
        decoder.requires_grad_(False)  # as experiments.export.compare says
        space, side = decoder.latent_space, 2 * decoder.size_multiple
        n, y = space.latent_frames(space.padded_frames(1 + space.stride_t)), side // space.stride_hw
        given = {
            "latent": torch.randn(2, space.channels, n, y, y),
            "reference": torch.rand(2, 3, 1, side, side) * 2 - 1,
        }
        save_file(given, tmp_path / name / "given.safetensors")
        reference = {"reference": given["reference"]} if "refdecoder" in name else {}
        video = decoder.decode(given["latent"], generator=torch.Generator().manual_seed(1), **reference)
        save_file({"video": video.contiguous()}, tmp_path / name / "expected.safetensors")
        assert folder == tmp_path / name / "exported"
    python = bare_environment(tmp_path / "bare", wheel)
    done = run(python, "-c", DECODES, *(str(tmp_path / name / "exported") for name in names), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    asked = (
        "import sys; from experiments.cli import main; sys.exit(main(['encode', 'wan_mini', 'a.mp4', '-o', 'a.pt']))"
    )
    (tmp_path / "a.mp4").write_bytes(b"")
    told = run(python, "-c", asked, cwd=tmp_path)
    assert told.returncode == 2 and "pip install 'latent-to-pixel[cli]'" in told.stderr, told.stderr
    for name in names:
        ours, theirs = (load_file(tmp_path / name / f"{kind}.safetensors")["video"] for kind in ("expected", "decoded"))
        assert torch.equal(ours, theirs), f"{name}: {(ours - theirs).abs().max()} apart"


@pytest.mark.slow
def test_the_command_line_works_where_only_its_extra_is(wheel, tmp_path):
    """A film to latents and back, and with scores, without the trainer, decord or OpenCV."""
    python = bare_environment(tmp_path / "cli", wheel, "cli")
    write_video(tmp_path / "film.mp4", [torch.from_numpy(draw_frames(0, 9, list(range(9)), (48, 64)))], 16.0, 10)

    def call(*arguments: str) -> subprocess.CompletedProcess:
        command = "import sys; from experiments.cli import main; sys.exit(main(sys.argv[1:]))"
        return run(python, "-c", command, *arguments, cwd=tmp_path)

    assert run(python, "-c", "import lightning", cwd=tmp_path).returncode != 0
    script = subprocess.run([python.with_name("latent2pixel"), "--help"], capture_output=True, text=True, check=False)
    assert script.returncode == 0 and "reconstruct" in script.stdout, script.stderr
    for arguments in (
        ("info", "wan_mini"),
        ("encode", "wan_mini", "film.mp4", "-o", "film.safetensors"),
        ("decode", "wan_mini", "film.safetensors", "-o", "again.mp4"),
        ("reconstruct", "wan_mini", "film.mp4", "-o", "scored.mp4", "--metrics", "psnr,ssim", "--json", "scores.json"),
    ):
        done = call(*arguments)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
    assert load_file(tmp_path / "film.safetensors")["latent"].shape[-4:] == (16, 3, 6, 8)
    assert "psnr" in (tmp_path / "scores.json").read_text()
    wrong = call("info", "no-such-folder")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr, wrong.stderr
