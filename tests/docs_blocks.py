"""Fenced blocks of Markdown pages: what they are, where they run, and what runs them.

A fence is a command unless it is marked as something else. The mark is an HTML comment on the line above, which readers do not see:

    <!-- runs -->            it is run in the fast tier. So are, without a mark, python, sh and bash
    <!-- runs: slow -->      it is run by `make test-slow`
    <!-- needs: GPU, ... --> it is not run here; after the colon is what it needs, of ``NEEDS``
    <!-- file: a/b.py -->    its text is written to that file of the checkout
    <!-- text -->            nothing to run: a tree, output. So is, without a mark, the language `text`

The blocks of a page run in order, in one copy of the checkout, as a reader would type them after cloning. Blocks of Python share their
variables from block to block of a page.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUN, SLOW, NEEDS_MORE, FILE, TEXT = "run", "slow", "needs", "file", "text"
NEEDS = (
    "GPU",  # a CUDA device
    "WEIGHTS_ROOT",  # released weights that the reader downloads
    "DATA_ROOT",  # data sets that the reader downloads
    "network",  # a hub, a server
    "token",  # an account at a hub
    "trained runs",  # that the page did not make
    "minutes",  # more of them than a test may take
    "people",  # who vote
    "browser",  # it serves a page until it is stopped
    "VBench",  # an environment with VBench in it
    "tests",  # it is what is running
)
RUN_ALONE = {"python", "sh", "bash"}  # languages that need no mark
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[\w+-]*)[^\n`]*$")
COMMENT = re.compile(r"^\s*<!--\s*(?P<word>[a-z]+)\s*(?::\s*(?P<value>.*?))?\s*-->\s*$")
LEFT_BEHIND = {".git", ".venv", "runs", "results", "__pycache__", ".pytest_cache", ".ruff_cache", ".ci"}


@dataclass(frozen=True)
class Block:
    """A fence of a page; ``kind`` is what is done with it, ``value`` what its mark says after the colon."""

    page: str
    line: int  # of its first line of text
    language: str
    text: str
    kind: str
    value: str = ""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


class Unmarked(ValueError):
    """A fence that is neither run nor marked with what it needs."""


def blocks(page: Path, root: Path = ROOT) -> list[Block]:
    """Every fence of ``page``, in order. Raises Unmarked, naming the line."""
    found, lines, name = [], page.read_text().splitlines(), _name(page, root)
    number = 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        number += 1
        if not opening:
            continue
        start = number
        while number < len(lines) and lines[number].strip() != opening["fence"]:
            number += 1
        if number == len(lines):
            raise Unmarked(f"{name}:{start}: the fence is not closed")
        text = textwrap.dedent("\n".join(lines[start:number])) + "\n"
        number += 1
        kind, value = _kind(lines[: start - 1], opening["language"], f"{name}:{start}")
        found.append(Block(name, start + 1, opening["language"], text, kind, value))
    return found


def _name(page: Path, root: Path) -> str:
    return str(page.relative_to(root)) if page.is_relative_to(root) else page.name


def _kind(before: list[str], language: str, where: str) -> tuple[str, str]:
    above = next((line for line in reversed(before) if line.strip()), "")
    mark = COMMENT.match(above)
    if not mark:
        if language in RUN_ALONE:
            return RUN, ""
        if language == "text":
            return TEXT, ""
        raise Unmarked(
            f"{where}: a fence of {language or 'no language'} without a mark: write <!-- runs -->, <!-- runs: slow -->, "
            "<!-- needs: ... -->, <!-- file: ... --> or <!-- text --> above it, or make it python or sh"
        )
    word, value = mark["word"], (mark["value"] or "").strip()
    if word == "runs" and value in ("", "slow"):
        return (SLOW, "") if value else (RUN, "")
    if word == "text" and not value:
        return TEXT, ""
    if word == "file" and value and not Path(value).is_absolute() and ".." not in Path(value).parts:
        return FILE, value
    if word == "needs":
        unknown = [need for need in re.split(r",\s*", value) if need not in NEEDS]
        if not unknown:
            return NEEDS_MORE, value
        raise Unmarked(f"{where}: needs {', '.join(map(repr, unknown))}; what can be needed is {', '.join(NEEDS)}")
    raise Unmarked(f"{where}: <!-- {word}{': ' + value if value else ''} --> is no mark of a fence")


@dataclass
class Reader:
    """Somebody who types a page's blocks, in order, into a fresh copy of the checkout at ``folder / "checkout"``."""

    folder: Path
    variables: dict = field(default_factory=lambda: {"__name__": "__main__"})

    def __post_init__(self) -> None:
        self.checkout = self.folder / "checkout"
        shutil.copytree(ROOT, self.checkout, ignore=shutil.ignore_patterns(*LEFT_BEHIND), symlinks=True)
        programs = self.folder / "bin"
        programs.mkdir()
        # Scripts, not links: a Python of a virtual environment that is called by another path is not of it any more.
        for name, command in {"python": "", "latent2pixel": "-m experiments.cli"}.items():
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
            (programs / name).chmod(0o755)
        self.environment = {
            **{key: value for key, value in os.environ.items() if key not in ("RUNS_ROOT", "MAKEFLAGS", "MFLAGS")},
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "MAKEFLAGS": f" -- python={sys.executable}",  # the page's make uses this environment, not one of its own
            "PYTHONPATH": "",
        }

    def do(self, block: Block) -> None:
        """Run or write one block. Raises AssertionError with the page's line for one that fails."""
        if block.kind == FILE:
            path = self.checkout / block.value
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.language == "python":
            # Blank lines in front, so that a traceback names the page's own lines.
            code = compile("\n" * (block.line - 1) + block.text, block.page, "exec")
            exec(code, self.variables)
        else:
            self._shell(block)

    def _shell(self, block: Block) -> None:
        run = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", block.text],
            cwd=self.checkout,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        said = f"{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
        assert run.returncode == 0, f"{block.where}: exit status {run.returncode}\n{block.text}\n{said}"


# ---- what a page names


def commands(text: str) -> list[str]:
    """Shell commands of a block or of a span of code, joined over continued lines, without comments and assignments before them."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    bare = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in lines)
    return [part.strip() for line in bare if line for part in re.split(r"\s(?:&&|;|\|)\s", line)]


def spans(text: str) -> list[str]:
    """Spans of code of a page, outside of fences."""
    outside = re.sub(r"^( *)(`{3,}|~{3,}).*?^\1\2\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", outside)]


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*?) *#*$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def imported(text: str) -> list[tuple[str, str]]:
    """(module, name) of every import of a block of Python; the name is empty for `import module`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found
