"""Files that could not be read: written down, counted, and a stop when they are too many.

The rule. Of n clips that were asked for, k needed a replacement. The run stops when

    k  >  p * n  +  4 * sqrt(p * (1 - p) * n)  +  4        with p = max_bad_share

that is, as soon as k cannot be bad luck at the tolerated share. One bad file in ten passes with max_bad_share 0.1, at any
point of the run; at the default of 0.05 a disk that lost half its films stops the run within some 20 clips; and a disk that is gone
stops it at the first clip, because none of its replacements can be read either (reader.NoneReadable). Files that were
found unreadable when the index was made are never asked for; their share is held against p on its own, at the start. Of a tar
shard that ends early all clips count that are lost with its end, where index.json or an earlier look at it says which; else it
counts as one.
"""

import json
import logging
import math
import os
from pathlib import Path

log = logging.getLogger(__name__)


class TooManyBadFiles(RuntimeError):
    """More unreadable files than max_bad_share allows."""


class Quarantine:
    """Bad files of one process, by path, kept in ``<run_dir>/quarantine.jsonl`` (``quarantine-rank<r>.jsonl`` on others).

    A line is {"path", "reason", "count"}; count is how often it was found bad. What an earlier
    session of the run wrote is kept and counted on, but does not weigh in the share: the disk may be back.
    """

    def __init__(self, max_bad_share: float, run_dir: str | Path | None = None, rank: int = 0):
        self.max_bad_share = max_bad_share
        self.num_asked = self.num_replaced = 0
        self._entries: dict[str, dict] = {}
        name = "quarantine.jsonl" if rank == 0 else f"quarantine-rank{rank}.jsonl"
        self.file = Path(run_dir) / name if run_dir is not None else None
        if self.file is not None and self.file.exists():
            for line in self.file.read_text().splitlines():
                entry = json.loads(line)
                self._entries[entry["path"]] = entry

    @property
    def entries(self) -> list[dict]:
        """All entries: {"path", "reason", "count"}."""
        return list(self._entries.values())

    def add(self, path: str, reason: str) -> None:
        """Note a bad file; the first time it is logged."""
        if path not in self._entries:
            log.warning("quarantine: %s: %s", path, reason)
            self._entries[path] = {"path": path, "reason": reason, "count": 0}
        self._entries[path]["count"] += 1

    def add_indexed(self, bad: list[tuple[str, str]], num_bad: int, num_found: int, where: str) -> None:
        """Note files found unreadable when a source was indexed. Raises TooManyBadFiles.

        Args:
            num_bad: how many they are; more than ``bad`` lists where one entry stands for all that a shard has lost.
            num_found: those that can be read included.
        """
        for path, reason in bad:
            if path not in self._entries:
                self.add(path, reason)
        if bad:
            self.save()
        if num_bad > self.max_bad_share * num_found:
            raise TooManyBadFiles(self._message(f"{where}: {num_bad} of {num_found} files are unreadable", bad))

    def update(self, num_asked: int, failures: list[tuple[str, str]], num_replaced: int) -> None:
        """Account for a batch of ``num_asked`` clips of which ``num_replaced`` were replaced. Raises TooManyBadFiles."""
        self.num_asked += num_asked
        self.num_replaced += num_replaced
        if not failures:
            return
        for path, reason in failures:
            self.add(path, reason)
        self.save()
        n, p = self.num_asked, self.max_bad_share
        if self.num_replaced > p * n + 4 * math.sqrt(p * (1 - p) * n) + 4:
            what = f"{self.num_replaced} of {n} clips could not be read"
            raise TooManyBadFiles(self._message(what, [(e["path"], e["reason"]) for e in self._entries.values()]))

    def save(self) -> None:
        """Write the file whole, so that a kill leaves the old or the new one."""
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in self._entries.values()))
        os.replace(temporary, self.file)

    def _message(self, what: str, bad: list[tuple[str, str]]) -> str:
        shown = "\n".join(f"  {path}: {reason}" for path, reason in bad[:5])
        more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
        kept = f" All of them: {self.file}." if self.file else ""
        return (
            f"{what}, more than data.max_bad_share = {self.max_bad_share:g} allows. Repair or remove them, or raise "
            f"data.max_bad_share.{kept}\n{shown}{more}"
        )
