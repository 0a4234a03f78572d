"""Experiment files: their names, their inheritance, and the overrides typed after them. No schema yet.

``defaults: [parents]`` are merged in order, then the file, then the overrides. Dictionaries merge, lists replace. A
file that two parents share is merged once, at its first place, so that it does not undo what the first parent set.
``$DATA_ROOT``, or any name in capitals, is replaced from the environment; while unset it stays in the value.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from datamodules import named

FOLDER = Path(__file__).parent
VARIABLE = re.compile(r"\$([A-Z][A-Z0-9_]*)|\$\{([A-Z][A-Z0-9_]*)\}")  # other braces are OmegaConf's: ${trainer.seed}
COMMAND_LINE = "the command line"


class ConfigError(ValueError):
    """A configuration that cannot be run. One line; the command line prints it without a traceback."""


def run_cli(main: Callable[[list[str]], int | None]) -> None:
    """Run a command line's ``main(arguments)``; a ConfigError is one line on stderr and exit status 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def names() -> list[str]:
    """Every runnable experiment, sorted. Files that begin with ``_`` are fragments."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.name.startswith("_"))


def header(name: str) -> list[str]:
    """The comment lines at the top of an experiment's file, without their ``#``."""
    lines = []
    for line in _path_of(name, "").read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return lines


def _path_of(name: str, asked_by: str) -> Path:
    path = FOLDER / f"{name}.yaml"
    if re.fullmatch(r"\w+", name) and path.is_file():
        return path
    known = sorted(p.stem for p in FOLDER.glob("*.yaml")) if asked_by else names()
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    where = f"{asked_by}: " if asked_by else ""
    hint = f"did you mean {', '.join(near)}?" if near else f"there are: {', '.join(known)}"
    raise ConfigError(f"{where}no experiment '{name}'; {hint} (make list shows all)")


def read(path: Path) -> dict[str, Any]:
    """One file as plain dictionaries."""
    try:
        content = OmegaConf.to_container(OmegaConf.create(path.read_text()))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path.name}, line {line}: not YAML: {error.problem}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name}: must be a mapping of keys to values")
    return content


def _chain(name: str, below: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(file name, content)`` of the parents, in merging order, and last of the file itself."""
    if name in below:
        raise ConfigError(f"defaults go round in a circle: {' -> '.join((*below, name))}")
    path = _path_of(name, f"{below[-1]}.yaml" if below else "")
    own = read(path)
    parents = own.pop("defaults", [])
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path.name}: defaults must be a list of names, such as [_base, flashdecoder_s_stage1]")
    for parent in parents:
        yield from _chain(parent, (*below, name))
    yield path.name, own


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``["optim.lr=1e-4"]`` -> ``{"optim.lr": 1e-4}``; values are YAML, a later override of the same key wins."""
    parsed: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise ConfigError(f"'{override}' is not an override; write key=value, such as optim.lr=1e-4")
        try:
            value = OmegaConf.create({"value": None}) if text == "" else OmegaConf.from_dotlist([f"value={text}"])
        except yaml.YAMLError:
            raise ConfigError(f"{override}: not a YAML value: close its brackets, or put it in double quotes") from None
        parsed.pop(key, None)
        parsed[key] = OmegaConf.to_container(value, resolve=False)["value"]
    return parsed


def layers(name: str, overrides: Sequence[str], sets: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """``(where it was written, content)`` of everything that is merged, in order.

    ``sets``: built-in evaluation sets that are asked for by name; they, and those to which ``data.sets`` only adds, come first.
    """
    if name.startswith("_"):
        raise ConfigError(f"{name}.yaml is a fragment that experiments inherit from; make list shows what can be run")
    typed = [(COMMAND_LINE, nest(key, value)) for key, value in parse_overrides(overrides).items()]
    written = [*dict(_chain(name)).items(), *typed]
    return [*_named_sets(written, sets), *written]


def _named_sets(written: list[tuple[str, dict[str, Any]]], asked: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Built-in sets below what an experiment writes of them; one that it defines itself, with sources, is its own.

    Of a set that is asked for by name no file may be left out as unreadable: other clips are another set.
    """
    own: dict[str, Any] = {}
    for _, layer in written:
        data = layer.get("data")
        said = data.get("sets") if isinstance(data, dict) else None
        own = merge(own, said if isinstance(said, dict) else {})
    added = [name for name, stream in own.items() if isinstance(stream, dict)]
    built_in = set(named.names())
    below = [
        name for name in dict.fromkeys([*asked, *added]) if name in built_in and "sources" not in (own.get(name) or {})
    ]
    strict = [("evaluation by named sets", {"data": {"max_bad_share": 0.0}})] if asked else []
    return strict + [(f"datamodules/sets/{name}.yaml", named.layer(name)) for name in below]


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``below`` with ``above`` laid over it: dictionaries merge, everything else replaces."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def expand(tree: Any) -> Any:
    """``tree`` with environment variables in its strings replaced, where they are set."""
    if isinstance(tree, dict):
        return {key: expand(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [expand(value) for value in tree]
    return VARIABLE.sub(_variable, tree) if isinstance(tree, str) else tree


def _variable(match: re.Match) -> str:
    name = match[1] or match[2]
    return os.environ.get(name) or f"${name}"


def nest(key: str, value: Any) -> dict[str, Any]:
    """``"a.b", 1`` -> ``{"a": {"b": 1}}``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """``{"a": {"b": [1]}}`` -> ``{"a.b": [1]}``; an empty dictionary is a value."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree} if path else {}
    return {k: v for key, child in tree.items() for k, v in flatten(child, f"{path}.{key}".lstrip(".")).items()}
