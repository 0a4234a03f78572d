"""The reference of the interface, from the docstrings: ``make docs``, or ``python -m experiments.api_docs [out=FOLDER]``.

    out     folder of the HTML pages; default docs/html, which git ignores
    write   false: docs/api.md stays as it is; default: it is written anew

What counts as the interface stands in ``PUBLIC``: the names that a release would not take away without a word. ``docs/api.md`` lists
them with their first lines; the HTML, made by pdoc (``pip install pdoc``), has their signatures and whole docstrings.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.bench_all import read_options
from experiments.compose import ConfigError, run_cli

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"
PUBLIC: dict[str, dict[str, tuple[str, ...]]] = {
    "Using a decoder": {
        "decoders": ("load",),
        "decoders.exported": ("Exported", "SpaceInfo", "ExportError", "load", "save", "describe", "families"),
        "decoders.streaming": ("Stream", "stream", "ahead", "Behind"),
        "decoders.inference": ("optimise", "InferenceOptions"),
        "decoders.pipelines": ("swap", "for_pipeline"),
    },
    "Latents": {
        "datamodules.latents": ("save_latent", "load_latent", "inspect_latent", "LatentHeader"),
        "decoders.latent_spaces.base": ("LatentSpace", "pad_to_valid", "hash_parts"),
        "decoders.latent_spaces.learned": ("Learned", "draw", "measure_statistics"),
        "decoders.latent_spaces.diffusers": ("DiffusersVAE",),
        "decoders.latent_spaces.wan_mini": ("WanMini", "load_encoder", "load_decoder", "save_diffusers"),
        "decoders.latent_spaces.dct": ("DCT",),
    },
    "The networks": {
        "decoders.flashdecoder.model": ("FlashDecoderModel", "FlashDecoderConfig"),
        "decoders.flash_vaed.model": ("build_student", "FlashVaedConfig"),
        "decoders.refdecoder.model": ("build_model", "RefDecoderModel", "RefDecoderConfig"),
        "decoders.refdecoder.released": ("from_released",),
        "decoders.regen.model": ("RegenDecoder", "RegenConfig"),
        "decoders.backbones.wan": ("WanDecoder", "WanEncoder"),
        "decoders.backbones.ltx": ("LTXDecoder",),
    },
    "Training": {
        "datamodules.batch": ("VideoBatch",),
        "decoders.base": ("VideoDecoder",),
        "experiments.config": ("load", "build_space", "build_decoder"),
        "experiments.schema": ("Experiment", "TrainerConfig"),
    },
    "Losses and metrics": {
        "losses.perceptual": ("Lpips",),
        "metrics": ("build",),
    },
}
TOP = """# Reference

Written by `make docs` from the docstrings: change those, not this page. The same command makes HTML pages of the whole of these
modules, with signatures, shapes, ranges and what is raised, in `docs/html/`. Axes: `b` clip, `t` frame, `h w` pixel, `c` latent channel, `n` latent
frame, `y x` latent pixel, `r` reference frame. What is not listed here may change from one commit to the next.
"""


@dataclass
class DocsConfig:
    """The command's options."""

    out: str = str(ROOT / "docs" / "html")
    write: bool = True


def entries(public: Mapping[str, Mapping[str, tuple[str, ...]]] = PUBLIC) -> Iterator[tuple[str, str, str, Any]]:
    """(section, module, name, object or None where there is none) of everything that is public; a module itself has an empty name."""
    for section, modules in public.items():
        for module, names in modules.items():
            found = importlib.import_module(module)
            yield section, module, "", found
            for name in names:
                yield section, module, name, getattr(found, name, None)


def problems(public: Mapping[str, Mapping[str, tuple[str, ...]]] = PUBLIC) -> list[str]:
    """What is named in ``public`` and is not there, or has no docstring of its own; of classes, their public methods too."""
    bad = []
    for _, module, name, found in entries(public):
        whole = f"{module}.{name}".rstrip(".")
        if found is None:
            bad.append(f"{whole}: there is no such name")
        elif not _doc(found):
            bad.append(f"{whole}: has no docstring")
        elif inspect.isclass(found):
            bad += [f"{whole}.{method}: has no docstring" for method in _methods(found) if not _said(found, method)]
    return bad


def _doc(found: Any) -> str:
    """Its docstring. A value's is its type's, and a dataclass without one is given its signature: neither counts."""
    if not (inspect.ismodule(found) or inspect.isclass(found) or inspect.isroutine(found)):
        return ""
    doc = inspect.getdoc(found) or ""
    if inspect.isclass(found):
        doc = inspect.cleandoc(found.__dict__.get("__doc__") or "")
        return "" if doc.startswith(f"{found.__name__}(") else doc
    return doc


def _methods(cls: type) -> list[str]:
    """Public methods and properties that ``cls`` itself defines."""
    kinds = (property, classmethod, staticmethod)
    return [
        name
        for name, value in vars(cls).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, kinds))
    ]


def _said(cls: type, name: str) -> bool:
    """Whether it has a docstring: its own, or that of the method which it overrides."""
    return any(inspect.getdoc(base.__dict__[name]) for base in cls.__mro__ if name in base.__dict__)


def page() -> str:
    """The text of docs/api.md."""
    lines, section_before = [TOP], ""
    for section, module, name, found in entries():
        if section != section_before:
            lines.append(f"\n## {section}\n")
            section_before = section
        first = _first_sentence(_doc(found))
        if not name:
            source = Path(inspect.getsourcefile(found)).relative_to(ROOT)
            lines.append(f"- [`{module}`](../{source.as_posix()}): {first}")
        else:
            lines.append(f"  - `{name}`: {first}")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _first_sentence(doc: str) -> str:
    """The first paragraph of a docstring up to its first full stop, on one line; roles and double backticks are made plain."""
    paragraph = re.sub(r"\s+", " ", doc.split("\n\n")[0])
    paragraph = re.sub(r":(?:class|func|meth|mod|attr):`[~.]?([^`]+)`", r"`\1`", paragraph).replace("``", "`")
    sentence = re.split(r"(?<=[.])\s(?=[A-Z`(])", paragraph)[0]
    return sentence.rstrip(":").replace("|", "\\|")


def _defining_module(module: str, name: str) -> str:
    """Where a name that a lazy package hands on is written: pdoc looks at modules, not at ``__getattr__``."""
    return getattr(getattr(importlib.import_module(module), name), "__module__", module)


def html(out: Path) -> None:
    """Write the HTML pages of all public modules into ``out``. Raises ConfigError without pdoc."""
    try:
        import pdoc
        import pdoc.render
    except ModuleNotFoundError:
        raise ConfigError("the HTML pages are made by pdoc, which is not installed: pip install pdoc") from None
    if out.exists() and any(out.iterdir()) and not (out / "index.html").is_file():
        raise ConfigError(f"out={out}: is a folder of something else; name an empty or a new one")
    pdoc.render.configure(docformat="google", footer_text="latent-to-pixel video decoders")
    wanted = dict.fromkeys(_defining_module(module, name) for _, module, name, _ in entries() if name)
    # A package would bring all its modules along, GPU kernels and the families' insides too.
    packages = [module for module in wanted if hasattr(importlib.import_module(module), "__path__")]
    pdoc.pdoc(*wanted, *(f"!{package}\\..*" for package in packages), output_directory=out)
    (out / ".gitignore").write_text("*\n")


def main(arguments: list[str]) -> int:
    config = read_options(arguments, DocsConfig)
    if bad := problems():
        print("\n".join(bad), file=sys.stderr)
        return 1
    if config.write:
        PAGE.write_text(page())
        print(f"written: {PAGE}")
    html(Path(config.out))
    print(f"written: {Path(config.out) / 'index.html'}")
    return 0


if __name__ == "__main__":
    run_cli(main)
