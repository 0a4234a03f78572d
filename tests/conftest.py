"""What all tests share: seeds, shape checks on every annotated function, and the debug experiments as a parameter."""

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported; subprocesses that tests start inherit these.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread costs more than it brings
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs a hub would be one that fails on a train
os.environ["RUNS_ROOT"] = tempfile.mkdtemp(prefix="runs-")  # no test writes into runs/

import jaxtyping

# Before our packages are imported: in tests every annotated function checks its shapes and types; in training none does.
jaxtyping.install_import_hook(["decoders", "losses", "metrics"], "beartype.beartype")

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent


def pytest_configure() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``debug_name``: the test runs once for every experiments/<family>_debug.yaml, so a new family is tested at once;
    ``costly_name``: the same, in the slow tier but for two."""
    names = sorted(path.stem for path in ROOT.glob("experiments/[!_]*_debug.yaml"))
    if "debug_name" in metafunc.fixturenames:
        metafunc.parametrize("debug_name", names)
    if "costly_name" in metafunc.fixturenames:
        quick = ("flashdecoder_debug", "regen_debug")
        marked = [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]
        metafunc.parametrize("costly_name", marked)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """torch.compile cannot look into the checks of shapes, which only tests make."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def runs_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for this test's runs."""
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of real clips and metric weights for known answers: ``ASSETS_ROOT``, or ``../shared/assets``."""
    folder = Path(os.environ.get("ASSETS_ROOT") or ROOT.parent / "shared" / "assets")
    if not folder.is_dir():
        pytest.skip(f"no assets at {folder}; set ASSETS_ROOT to check against real clips and weights")
    return folder
