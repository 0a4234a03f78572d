"""The arrows of the house: experiments -> decoders -> {losses, metrics, datamodules.batch}; metrics -> losses.

Imports are read from the source, relative ones and those inside functions too. Families never import one another, and
``model.py`` imports neither lightning nor omegaconf.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("datamodules", "losses", "metrics", "decoders", "experiments")
ALLOWED = {
    "datamodules": ("datamodules",),
    "losses": ("losses",),
    "metrics": ("metrics", "losses"),
    "decoders": ("decoders", "losses", "metrics", "datamodules.batch"),
    "experiments": ROOMS,
}
SHARED = ("latent_spaces", "backbones", "layers")  # folders of decoders/ that are not families
TRAINERS = ("lightning", "pytorch_lightning", "omegaconf")
FAMILIES = sorted(p.parent.name for p in ROOT.glob("decoders/*/module.py"))


def modules() -> dict[str, Path]:
    """Dotted name -> file, of everything that is ours."""
    files = (path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def imports(source: str, module: str) -> set[str]:
    """Dotted names that ``source``, the text of ``module``, imports anywhere. A package's name ends in ``.__init__``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            found |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def family_of(module: str) -> str | None:
    """The family that a module of ours belongs to: the folder in decoders/ that is neither shared nor a file there."""
    room, _, rest = module.partition(".")
    name = rest.split(".")[0]
    is_family = room == "decoders" and name not in ("", *SHARED) and not (ROOT / "decoders" / f"{name}.py").is_file()
    return name if is_family else None


def violations(module: str, source: str) -> list[str]:
    """What ``module`` imports and must not, each with the reason."""
    room, own = module.split(".")[0], family_of(module)
    bad = []
    for name in sorted(imports(source, module)):
        if name.split(".")[0] in ROOMS:
            if not any(within(name, allowed) for allowed in ALLOWED[room]):
                bad.append(f"{module} imports {name}: {room} may import only {', '.join(ALLOWED[room])}")
            # The base, the shared folders and the other families must not know this family; experiments may.
            if room == "decoders" and family_of(name) not in (None, own):
                bad.append(f"{module} imports {name}: nothing in decoders imports a family but the family itself")
        if module.endswith(".model") and name.split(".")[0] in TRAINERS:
            bad.append(f"{module} imports {name}: model.py is plain torch")
    return bad


def test_arrows():
    bad = [line for module, path in modules().items() for line in violations(module, path.read_text())]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("datamodules.clips", "import losses.pixel", True),
        ("datamodules.clips", "from . import batch", False),
        ("datamodules.clips", "from .. import decoders", True),
        ("losses.pixel", "from metrics import image", True),
        ("losses.pixel", "def f():\n    from decoders.base import VideoDecoder", True),
        ("metrics.image", "from losses.perceptual import Lpips", False),
        ("metrics.image", "from datamodules.batch import VideoBatch", True),
        ("decoders.base", "from datamodules.batch import VideoBatch", False),
        ("decoders.base", "from datamodules import batch", False),
        ("decoders.base", "from datamodules import clips", True),
        ("decoders.base", "from experiments.config import load", True),
        ("decoders.base", "import decoders.flashdecoder.model", True),
        ("decoders.regen.module", "from decoders.flashdecoder import FlashDecoder", True),
        ("decoders.regen.module", "from ..flashdecoder.model import x", True),
        ("decoders.regen.module", "from .. import flashdecoder", True),
        ("decoders.regen.module", "import importlib\nimportlib.import_module('decoders.flashdecoder')", True),
        ("decoders.regen.module", "from ..base import VideoDecoder\nfrom .model import Regen", False),
        ("decoders.regen.module", "from decoders.latent_spaces.dct import DCT\nimport lightning", False),
        ("decoders.regen.__init__", "from . import module", False),
        ("decoders.layers.rope", "from decoders.regen.model import x", True),
        ("decoders.regen.model", "import lightning.pytorch as pl", True),
        ("decoders.regen.model", "def f():\n    from omegaconf import OmegaConf", True),
        ("decoders.regen.model", "import torch\nfrom decoders.layers import rope", False),
        ("experiments.train", "from decoders.flashdecoder import FlashDecoder", False),
    ],
)
def test_the_reader_of_imports_sees(module, source, caught):
    assert bool(violations(module, source)) == caught


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_imports_no_training_code(family):
    """A family's network can be used where lightning, our losses, metrics and datamodules are absent."""
    heavy = ("lightning", "pytorch_lightning", "omegaconf", "torchmetrics", "losses", "metrics", "datamodules")
    code = f"import sys, decoders.{family}, decoders.{family}.model; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
