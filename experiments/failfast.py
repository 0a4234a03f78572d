"""A process that fails ends the whole job within seconds, and its reason is the first thing that is said.

Without this the others wait for it: in a collective operation of NCCL for half an hour, on other nodes for as long as the
scheduler lets them. Every process watches one key of the store through which they found each other.
"""

import os
import sys
import threading
import time
from datetime import timedelta

from lightning import Callback, Trainer
from torch.distributed import TCPStore

POLL_S = 0.5
LEAVE_S = 120.0  # what a process that fails has for saving
REQUEUE_S = 70.0  # what the first process has for asking the scheduler, at most
SILENT_S = 60.0  # a process that gave no sign of life for so long is taken for dead


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _say(line: str) -> None:
    """In one piece, as other processes write there too."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class FailFast(Callback):
    """Watches the other processes from the moment on that they have found each other, in a thread of its own.

    :meth:`report` tells them of a failure; :meth:`close` that this one is done. In a run of one process it only reports.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1
        self._store: TCPStore | None = None
        self._over = threading.Event()
        self._reported = False

    def setup(self, trainer: Trainer, pl_module, stage: str) -> None:
        if trainer.world_size == 1 or self._store is not None:
            return
        self.rank, self.world_size = trainer.global_rank, trainer.world_size
        # The server that the processes met at (torchrun's, or the first process); a connection of its own for this thread.
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = TCPStore(*where, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
        threading.Thread(target=self._watch, name="failfast", daemon=True).start()

    def on_exception(self, trainer: Trainer, pl_module, exception: BaseException) -> None:
        if isinstance(exception, Exception):
            self.report(exception)

    def report(self, error: Exception) -> None:
        """Say, as the first line, why this process ends, and end the others. Where another one failed before, this one ends
        here, as what went wrong here only came of it."""
        if self._reported:
            return
        self._reported = True
        text = reason(error)
        if self._store is None:
            return
        text = f"rank {self.rank} of {self.world_size}: {text}"
        try:
            first = self._store.compare_set(self._key("failed"), "", text).decode()
        except RuntimeError:  # the first process is gone, with the store
            first = self._said_by_nobody(text)
        if first != text:
            self._leave(first)
        _say(f"error: {text}")
        time.sleep(3 * POLL_S)  # where the store is this process's, the others must read it before it is gone

    def close(self) -> None:
        """This process needs the others no more. The first one, who may hold the store, waits a moment for the rest. These wait
        for it: it may still have the job queued again, and launchers end it with the first process that leaves."""
        if self._store is None:
            return
        self._over.set()
        try:
            self._store.set(self._key(f"beat{self.rank}"), "done")
            others, wait_s = ([0], REQUEUE_S) if self.rank else (range(self.world_size), 10.0)
            until = time.monotonic() + wait_s
            while time.monotonic() < until and not self._reported:
                if all(self._beat(rank) == "done" for rank in others):
                    break
                time.sleep(0.05)
        except RuntimeError:  # the store is gone already
            pass
        self._store = None

    def _watch(self) -> None:
        store, beats, since = self._store, {}, {}
        number = 0
        while not self._over.wait(POLL_S):
            if self._reported:  # this process fails: its main thread leaves by itself, unless it hangs on the others
                if not self._over.wait(LEAVE_S):
                    os._exit(1)
                return
            try:
                number += 1
                store.set(self._key(f"beat{self.rank}"), str(number))
                if store.check([self._key("failed")]):
                    self._leave(store.get(self._key("failed")).decode())
                silent = self._silent(beats, since, number) if self.rank == 0 else None
            except RuntimeError:
                if not self._over.wait(4 * POLL_S):
                    self._leave("the first process is gone (killed?)")
                return
            if silent is not None and not self._reported:
                text = f"rank {silent} of {self.world_size} gave no sign of life for {SILENT_S:.0f} s (killed?)"
                store.set(self._key("failed"), text)
                time.sleep(3 * POLL_S)
                self._leave(text)

    def _silent(self, beats: dict[int, str], since: dict[int, int], number: int) -> int | None:
        """A rank whose count did not move for so many of our own turns. Turns, so that a job that was suspended as a whole is
        not taken for dead."""
        for rank in range(1, self.world_size):
            beat = self._beat(rank)
            if beat != beats.get(rank):
                beats[rank], since[rank] = beat, number
            elif beat not in ("", "done") and (number - since[rank]) * POLL_S > SILENT_S:
                return rank
        return None

    def _beat(self, rank: int) -> str:
        key = self._key(f"beat{rank}")
        return self._store.get(key).decode() if self._store is not None and self._store.check([key]) else ""

    def _leave(self, why: str) -> None:
        """End this process at once: its main thread may wait for the failed one without end."""
        if self._over.is_set() and not self._reported:
            return
        _say(f"error: {why} (rank {self.rank} ends with it)")
        os._exit(1)

    def _said_by_nobody(self, text: str) -> str:
        return text if self.rank == 0 else "the first process is gone (killed?)"

    def _key(self, name: str) -> str:
        return f"failfast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
