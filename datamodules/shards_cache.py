"""What was found in a shard, kept in a file of arrays, and what a server said of its shards."""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from datamodules.names import Names
from datamodules.shards import is_member, parse

log = logging.getLogger(__name__)
STAMPS_HOLD_S = 600  # how long a server is not asked again: long enough for the processes that wait for the first one
COLUMNS = {
    "offset": np.int64, "size": np.int64, "width": np.int32, "height": np.int32, "num_frames": np.int32, "fps": np.float32
}  # fmt: skip


@dataclass(frozen=True)
class Clips:
    """The films, or images, of a shard: ``columns`` have one entry each; ``bad`` lists (path, reason) of what cannot be used.

    ``end``: (path, reason) where the shard cannot be read from some place on, until it is known what is lost there, see
    :func:`with_lost`; then ``lost`` names what is, but for a clip that ``bad`` names. ``tallied``: these are all clips that there are.
    """

    names: Names
    columns: dict[str, np.ndarray]
    bad: list[tuple[str, str]]
    lost: Names = field(default_factory=lambda: Names(()))
    end: tuple[str, str] | None = None
    tallied: bool = True

    def __len__(self) -> int:
        return len(self.names)

    def num_lost(self, wanted: Callable[[str], bool] = lambda name: True) -> int:
        """How many clips are lost beyond those that ``bad`` lists, of those that are ``wanted``; an entry there that names no
        clip stands for one of them."""
        unnamed = any(not _name(path) for path, _ in self.bad)
        return max(0, sum(map(wanted, self.lost)) - unnamed)

    def all_names(self) -> Names | None:
        """Of every clip, those that cannot be used among them; None where it is not known which there are."""
        bad = [name for path, _ in self.bad if (name := _name(path))]
        return Names([*self.names, *bad, *self.lost]) if self.tallied else None

    def at(self, positions: list[int]) -> "Clips":
        """Some of them."""
        columns = {name: column[np.array(positions, np.int64)] for name, column in self.columns.items()}
        return Clips(Names(self.names[i] for i in positions), columns, self.bad, self.lost, tallied=self.tallied)


def no_clips(path: str, reason: str) -> Clips:
    """Of a shard that cannot be read."""
    return Clips(Names(()), {name: np.zeros(0, kind) for name, kind in COLUMNS.items()}, [], end=(path, reason))


def with_lost(clips: Clips, known: Names | None, whose: str = "") -> Clips:
    """``clips`` of a shard whose end is missing, with every clip counted that is lost there.

    Args:
        known: names of the clips that the shard has when it is whole; None: nobody knows, and what is missing counts as one.
        whose: who knows it, for the message.
    """
    if clips.end is None:
        return clips
    path, reason = clips.end
    if known is None:
        return replace(clips, bad=[*clips.bad, (path, reason)], end=None, tallied=False)
    told = {_name(where) for where, _ in clips.bad}.union(map(shown, clips.names))
    missing = [name for name in dict.fromkeys(known) if shown(name) not in told]
    own = _name(path)  # of the clip in whose midst the shard ends, if it does
    if not missing and not own:
        log.warning("%s: %s; none of the clips that %s names is lost", path, reason, whose)
        return replace(clips, end=None)
    if missing:
        reason += f"; of the clips that {whose} names {len(missing)} are lost, from {shown(missing[0])} on"
    lost = Names(name for name in missing if shown(name) != own)
    return replace(clips, bad=[*clips.bad, (path, reason)], lost=lost, end=None)


def shown(name: str) -> str:
    """A member's name as it stands in messages and in ``bad``: no control characters, and not too long."""
    return "".join(char if char.isprintable() else "?" for char in name[:200])


def _name(path: str) -> str:
    return parse(path).name if is_member(path) else ""


def digest(*parts: str) -> str:
    """A name for a file in the cache."""
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def load_clips(store: Path, stamp: list | None) -> Clips | None:
    """What was kept of a shard of this stamp (None: of any); None where there is nothing."""
    try:
        with safe_open(store, framework="np") as file:
            told = json.loads(file.metadata()["told"])
            if stamp is not None and told["stamp"] != stamp:
                return None
            names = Names.packed(file.get_tensor("blob").tobytes(), file.get_tensor("ends"))
            columns = {name: file.get_tensor(name) for name in COLUMNS}
            lost = Names.packed(file.get_tensor("lost_blob").tobytes(), file.get_tensor("lost_ends"))
            bad = [tuple(entry) for entry in told["bad"]]
            return Clips(names, columns, bad, lost, tallied=told["tallied"])
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        log.warning("%s in the cache cannot be read (%s); its shard is looked into again", store, error)
        return None


def save_clips(store: Path, stamp: list, clips: Clips) -> None:
    """Keep what was found, for the next time. A cache that cannot be written is told in the log."""
    arrays = dict(clips.columns)
    for prefix, names in (("", clips.names), ("lost_", clips.lost)):
        arrays |= {f"{prefix}blob": np.frombuffer(names.content, np.uint8), f"{prefix}ends": names.ends}
    told = {"told": json.dumps({"stamp": stamp, "bad": clips.bad, "tallied": clips.tallied})}
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
