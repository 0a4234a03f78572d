"""What every decoding process is reading, and since when, in memory that it shares with the process that started it.

A decoder that hangs does so inside a library, where no signal handler and no thread of Python's own can end it, and a process
that the kernel killed tells nobody what it was at. So each process writes down what it begins and ends, and the one
that waits for its batches looks.
"""

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.data import get_worker_info

LONGEST_NAME = 4000  # bytes; of a longer name that many stand for it


class _Slot(ctypes.Structure):
    """Of one process: its id, since when it reads (monotonic seconds; 0: it does not), what, and from which frame on."""

    _fields_ = (
        ("pid", ctypes.c_longlong),
        ("since", ctypes.c_double),
        ("start", ctypes.c_longlong),
        ("what", ctypes.c_char * (LONGEST_NAME + 1)),
    )


class Watch:
    """Slots for ``num_workers`` processes of a DataLoader that is started with ``context`` (a multiprocessing context)."""

    def __init__(self, context, num_workers: int):
        self._slots = context.RawArray(_Slot, num_workers)

    @contextmanager
    def reading(self, what: str, start: int) -> Iterator[None]:
        """In a worker: from here to the end of the block it reads ``what`` from frame ``start`` on. Elsewhere nothing happens."""
        worker = get_worker_info()
        if worker is None:
            yield
            return
        slot = self._slots[worker.id]
        slot.pid, slot.start, slot.what = os.getpid(), start, shortened(what)
        slot.since = time.monotonic()  # last: with it the rest counts
        try:
            yield
        finally:
            slot.since = 0.0

    def stuck(self, limit_s: float) -> list[tuple[int, bytes]]:
        """(process id, what) of those that have been reading one thing for longer than ``limit_s`` seconds."""
        oldest = time.monotonic() - limit_s
        slots = [(slot.pid, slot.since, slot.what) for slot in self._slots]  # read once: a worker goes on meanwhile
        return [(pid, what) for pid, since, what in slots if since and since < oldest]

    def read_by(self, pids: set[int]) -> list[tuple[bytes, int]]:
        """(what, first frame) of what these processes were reading when they died."""
        return [(slot.what, slot.start) for slot in self._slots if slot.since and slot.pid in pids]


def shortened(what: str) -> bytes:
    """A name as it stands in a slot."""
    return what.replace("\0", " ").encode(errors="surrogateescape")[:LONGEST_NAME]
