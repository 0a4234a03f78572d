"""Lists of strings, as arrays: 12.8 million Python strings would cost gigabytes in every process."""

import os
from collections.abc import Iterable, Sequence

import numpy as np


class Names:
    """A list of strings in one block of bytes."""

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([len(part) for part in encoded], dtype=np.int64)
        self._blob = b"".join(encoded)

    @classmethod
    def packed(cls, blob: bytes, ends: np.ndarray) -> "Names":
        """From the block itself and the position at which each string ends, int64."""
        names = cls(())
        names._blob, names._ends = bytes(blob), np.asarray(ends, np.int64)
        return names

    @classmethod
    def joined(cls, parts: Sequence["Names"]) -> "Names":
        """All strings of these lists, in order."""
        lengths = [np.diff(part._ends, prepend=0) for part in parts]
        ends = np.cumsum(np.concatenate(lengths)) if lengths else np.zeros(0)
        return cls.packed(b"".join(part._blob for part in parts), ends)

    @property
    def content(self) -> bytes:
        """All strings, one after the other, as the file system encodes them."""
        return self._blob

    @property
    def ends(self) -> np.ndarray:
        """Where in ``content`` each ends, int64."""
        return self._ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> str:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return os.fsdecode(self._blob[self._ends[i - 1] if i else 0 : self._ends[i]])


class Chain:
    """Lists one after the other, as one."""

    def __init__(self, *parts: Sequence[str]):
        self._parts, self._ends = parts, np.cumsum([len(part) for part in parts])

    @property
    def content(self) -> bytes:
        """All that decides its strings."""
        return b"\0".join(part.content for part in self._parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> str:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        part = int(np.searchsorted(self._ends, i, side="right"))
        return self._parts[part][int(i) - (int(self._ends[part - 1]) if part else 0)]
