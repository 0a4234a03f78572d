"""Where a report goes: an empty folder, or one that a report wrote. What lies beside the report in it is never touched.

A marker names every file that we wrote, and only those are ever deleted. The new page is made beside the folder and takes the
old one's place when it is whole, so a report that fails leaves the one before.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from experiments.checkpoints import write_atomically
from experiments.compare import _folder as folder_name
from experiments.compose import ConfigError
from experiments.runs import runs_root

MARKER = "report.json"  # {"files": [...]}, paths in the folder
ABOUT = "python -m experiments.report wrote these files, and deletes them when it writes this report again"


def default(runs: Sequence[str], sets: Sequence[str] | None, overrides: Sequence[str]) -> Path:
    """A folder for a report of these runs on these clips: no other report's."""
    return runs_root() / "comparisons" / f"report-{folder_name([*runs, *sets_named(sets), *overrides])}"


def sets_named(sets: Sequence[str] | None) -> list[str]:
    """Evaluation sets as a part of a folder's name."""
    return [] if sets is None else [f"sets={','.join(sets)}"]


def earlier(out: Path) -> list[str]:
    """What an earlier report wrote in ``out``. Raises ConfigError for a folder with content that no report wrote."""
    if not out.exists():
        return []
    if not out.is_dir():
        raise ConfigError(f"out={out} is a file; give a folder")
    try:
        files = json.loads((out / MARKER).read_text())["files"]
    except FileNotFoundError:
        if there := sorted(path.name for path in out.iterdir()):
            raise ConfigError(
                f"out={out} holds what no report wrote ({', '.join(there[:3])}): give another folder, or an empty one"
            ) from None
        return []
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"out={out}: its {MARKER} is not a report's; give another folder") from None
    return [str(file) for file in files if _inside(out, str(file))]


def _inside(out: Path, file: str) -> bool:
    """Whether a file lies in the folder itself, and not behind a link out of it."""
    return (out / file).parent.resolve().is_relative_to(out.resolve())


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """An empty folder to write a page to; when that is done its files take the place of those of the report in ``out``.

    Raises ConfigError where somebody else's file would be written over.
    """
    out = out.resolve()
    before = earlier(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name[:40]}-", dir=out.parent) as name:
        made = Path(name)
        yield made
        files = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
        odd = [file for file in files if file not in before and os.path.lexists(out / file)]
        odd += [file for file in files if not _inside(out, file)]
        if odd:
            raise ConfigError(
                f"out={out}: {odd[0]} there was not written by a report; move it away or give another folder"
            )
        _mark(out, [*before, *files])  # first: an interruption leaves no file of ours that the marker does not name
        for file in before:
            (out / file).unlink(missing_ok=True)
        for file in files:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(made / file, out / file)
        for folder in {str(Path(file).parent) for file in before} - {"."}:
            if (out / folder).is_dir() and not any((out / folder).iterdir()):
                (out / folder).rmdir()
        _mark(out, files)


def _mark(out: Path, files: Sequence[str]) -> None:
    text = json.dumps({"about": ABOUT, "files": sorted(set(files))}, indent=1)
    write_atomically(out / MARKER, lambda path: path.write_text(text + "\n"))
