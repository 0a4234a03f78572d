"""What was found in a shard, kept in a file of arrays, and what a server said of its shards."""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from datamodules.names import Names

log = logging.getLogger(__name__)
STAMPS_HOLD_S = 600  # how long a server is not asked again: long enough for the processes that wait for the first one
COLUMNS = {
    "offset": np.int64, "size": np.int64, "width": np.int32, "height": np.int32, "num_frames": np.int32, "fps": np.float32
}  # fmt: skip


@dataclass(frozen=True)
class Clips:
    """The films, or images, of a shard: ``columns`` have one entry each; ``bad`` lists (path, reason) of what cannot be used."""

    names: Names
    columns: dict[str, np.ndarray]
    bad: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.names)

    def at(self, positions: list[int]) -> "Clips":
        """Some of them."""
        columns = {name: column[np.array(positions, np.int64)] for name, column in self.columns.items()}
        return Clips(Names(self.names[i] for i in positions), columns, self.bad)


def no_clips(path: str, reason: str) -> Clips:
    """Of a shard that cannot be read."""
    return Clips(Names(()), {name: np.zeros(0, kind) for name, kind in COLUMNS.items()}, [(path, reason)])


def digest(*parts: str) -> str:
    """A name for a file in the cache."""
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def load_clips(store: Path, stamp: list) -> Clips | None:
    """What was kept of a shard of this stamp; None where there is nothing."""
    try:
        with safe_open(store, framework="np") as file:
            told = json.loads(file.metadata()["told"])
            if told["stamp"] != stamp:
                return None
            names = Names.packed(file.get_tensor("blob").tobytes(), file.get_tensor("ends"))
            columns = {name: file.get_tensor(name) for name in COLUMNS}
            return Clips(names, columns, [tuple(entry) for entry in told["bad"]])
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        log.warning("%s in the cache cannot be read (%s); its shard is looked into again", store, error)
        return None


def save_clips(store: Path, stamp: list, clips: Clips) -> None:
    """Keep what was found, for the next time. A cache that cannot be written is told in the log."""
    arrays = {"blob": np.frombuffer(clips.names.content, np.uint8), "ends": clips.names.ends, **clips.columns}
    told = {"told": json.dumps({"stamp": stamp, "bad": clips.bad})}
    write(store, lambda path: save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, path, told))


def load_stamps(store: Path) -> dict[str, list | str]:
    """What servers said of their files within the last minutes; nothing after that."""
    try:
        if time.time() - store.stat().st_mtime < STAMPS_HOLD_S:
            return json.loads(store.read_text())
    except (OSError, ValueError):
        pass  # they are asked again
    return {}


def write(store: Path, save: Callable[[str], object]) -> None:
    """Whole or not at all; several processes may do so at once, with the same content."""
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=store.parent)
        os.close(handle)
        try:
            save(temporary)
            os.replace(temporary, store)
        except BaseException:
            os.unlink(temporary)
            raise
    except (OSError, SafetensorError) as error:
        log.warning(
            "what was found in shards cannot be kept in %s (%s): it is looked for again next time", store, error
        )
