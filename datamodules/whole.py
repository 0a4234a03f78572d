"""Files that are there whole or not at all; without the trainer's libraries (``experiments/checkpoints.py`` writes its weights)."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | Path, folder: bool = False) -> Iterator[Path]:
    """A name beside ``path`` to write a file, or a folder, to: it becomes ``path`` on leaving; an error leaves nothing behind.

    Folders above are made. A folder does not replace one that has something in it. Raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        if folder:
            temporary.mkdir()
        yield temporary
        if folder and path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
    except BaseException:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise
