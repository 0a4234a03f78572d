"""What the measuring commands say alike: the file a measurement goes to, where it was made, and a table of it."""

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.compose import ConfigError


def require_folder(folder: str | Path) -> None:
    """Make the folder of a result, before the work that it is for. Raises ConfigError where nothing can be written."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"results cannot be written to {folder}: {error.strerror}; choose another folder") from None


def write(kind: str, result: dict[str, Any], folder: str, *marks: str) -> Path:
    """``result`` as JSON in ``folder``: one file per kind, experiment, device and ``marks``; a later run replaces it."""
    name = "-".join([kind, result["experiment"], result["device"], *marks])
    path = Path(folder) / (re.sub(r"[^\w.+-]+", "-", name).lower() + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def heading(result: dict[str, Any]) -> tuple[str, str]:
    """One line on the machine, versions and date; and the arithmetic with the machine's own rates beside it."""
    dtype = result["options"]["dtype"]
    compute = dtype if result["arithmetic"] == dtype else f"{dtype} in memory, arithmetic in {result['arithmetic']}"
    if result["matmul_gflops_per_s"]:
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in result["matmul_gflops_per_s"].items())
        compute += f" (matrix products here, GFLOP/s: {rates})"
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    threads = f", {result['threads']} threads" if result["threads"] else ""
    return f"{result['device']}{threads}; {versions}; {result['date']}", compute


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, its columns as wide as they need; the first line is the head."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text) + "\n"
