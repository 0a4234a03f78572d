"""Decoding processes: started, watched, and started again where one hangs or is killed.

torch's DataLoader runs them. To it a worker that dies is the end of the iteration, and one that hangs the end of everybody's
patience. Here it ends the iteration too, but another one begins at the first batch that was not delivered yet:
a batch is a pure function of its place in the plan, so nothing is lost, seen twice or in another order. What was decoded ahead
is decoded again.

A file on which a worker hangs (``data.clip_timeout_s``), or of which one clip ended two workers in a row, is barred for the rest
of the session: readers pass over it as over a damaged one, so it is written down, counted, and another clip takes its
place. Workers that die for other reasons, mostly a lack of memory, are forgiven MAX_DEATHS times within DEATHS_WITHIN batches.
"""

import contextlib
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.config import ClipDataConfig
from datamodules.faults import Unreachable
from datamodules.films import decord_ran
from datamodules.reader import ClipReader, ClipRequest, NoneReadable
from datamodules.watch import Watch

log = logging.getLogger(__name__)

POLL_S = 0.25  # between two looks at the workers, while there is nothing else to do
MAX_DEATHS, DEATHS_WITHIN = 3, 100
MAX_IN_VAIN = 4  # begun again so often without a batch

Batches = Iterator[list[ClipRequest]]


class _Fault(Exception):
    """A worker hung or died. ``advice``: what to say where this does not end."""

    def __init__(self, message: str, advice: str):
        super().__init__(message)
        self.advice = advice


class Workers:
    """``num_workers`` processes that read batches; 0: they are read in this process, and nothing watches it."""

    def __init__(self, config: ClipDataConfig, num_workers: int):
        self.config, self.num_workers = config, num_workers
        self._barred: dict[bytes, str] = {}
        self._num_delivered = 0
        self._deaths: list[
            tuple[int, set]
        ] = []  # batches delivered before it, and the clips that were read at the time
        self._sampler = _Sampler()
        self._loader: DataLoader | None = None
        self._iterator: Iterator[dict] | None = None
        self._watch: Watch | None = None
        self._starts = 0

    def run(self, left: Callable[[], Batches]) -> Iterator[dict]:
        """What was read of each batch: {batch, failures, num_replaced}, or {error}. ``left`` gives the batches still to come, and
        is called again where reading begins again. Another run ends this one.

        Raises RuntimeError, which says what to do, where beginning again does not help.
        """
        in_vain = 0
        while True:
            try:
                for item in self._items(left):
                    self._num_delivered += 1
                    in_vain = 0
                    yield item
                return
            except _Fault as fault:
                self._loader = self._iterator = None  # ends the other workers, once nothing else refers to them
                in_vain += 1
                if len(self._deaths) > MAX_DEATHS or in_vain > MAX_IN_VAIN:
                    raise RuntimeError(f"{fault.advice} ({fault})") from None
                log.warning("%s; reading begins again at the same batch", str(fault))

    def _items(self, left: Callable[[], Batches]) -> Iterator[dict]:
        try:
            iterator = self._begin(left)
        except RuntimeError as error:
            raise self._judged(error) from None
        asked = time.monotonic()
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise self._judged(error) from None
                self._look(time.monotonic() - asked)
                continue
            yield item
            asked = time.monotonic()

    def _begin(self, left: Callable[[], Batches]) -> Iterator[dict]:
        self._sampler.left = left
        if not self.num_workers:
            return iter(self._new_loader())
        if self._loader is None:
            self._loader = self._new_loader()
        elif self._iterator is not None:  # a run was left early, and workers may have a batch of it to finish
            self._iterator._timeout = self.config.timeout_s
        before = signal.getsignal(signal.SIGCHLD)
        with _withheld(signal.SIGUSR1):
            self._iterator = iter(self._loader)
        if threading.current_thread() is threading.main_thread() and before is not None:
            # torch's handler raises for a dead worker wherever this process is, in the middle of a training step too.
            signal.signal(signal.SIGCHLD, before)
        self._iterator._timeout = POLL_S  # there is no public way: the loader's own is for whole runs
        return self._iterator

    def _new_loader(self) -> DataLoader:
        config, options = self.config, {}
        if self.num_workers:
            # Later than at the start this process has threads of all kinds, whose locks a forked one may find taken.
            method = _start_method(config.start_method, again=self._starts > 0)
            self._watch = Watch(multiprocessing.get_context(method), self.num_workers)
            self._starts += 1
            options = {
                "multiprocessing_context": method,
                "persistent_workers": True,
                "prefetch_factor": config.prefetch,
                "timeout": config.timeout_s,
            }
        reader = ClipReader(
            config.verify, config.film_cache_gib, config.reader, watch=self._watch, barred=dict(self._barred)
        )
        return DataLoader(
            _Clips(reader),
            batch_sampler=self._sampler,
            collate_fn=_collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: taking the workers' seeds from torch's would disturb an exact resume.
            generator=torch.Generator(),
            **options,
        )

    def _look(self, waited_s: float) -> None:
        """At what the workers do, while a batch is waited for. Ends those that hang; raises _Fault then."""
        limit_s = self.config.clip_timeout_s
        hung = self._watch.stuck(limit_s)
        for pid, what in hung:
            self._barred[what] = f"takes longer than data.clip_timeout_s = {limit_s:g} s to read"
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if hung:
            raise _Fault(
                f"a decoding worker hung for more than data.clip_timeout_s = {limit_s:g} s on {_told(what for _, what in hung)}",
                "Clip after clip hangs: is the disk there? Raise data.clip_timeout_s if it is only slow.",
            )
        if waited_s > self.config.timeout_s:
            raise RuntimeError(
                f"A decoding worker delivered nothing for data.timeout_s = {self.config.timeout_s} s: a disk that hangs, or, "
                "with data.start_method=fork, a process in which decord ran before (use data.start_method=forkserver)."
            )

    def _judged(self, error: Exception) -> Exception:
        """_Fault for what says that a worker died; else the error itself."""
        text = str(error)
        told = text.startswith("DataLoader worker (pid") and ("exited unexpectedly" in text or "by signal" in text)
        # A worker that is gone before what it sent was fetched; with "Caught" begins what a reader raised.
        cut_off = isinstance(error, (ConnectionError, EOFError, FileNotFoundError)) and not text.startswith("Caught")
        if not self.num_workers or not (told or cut_off):
            return error
        pids = {int(number) for number in re.findall(r"\d+", text)} if told else set()
        over = self._note_death(self._watch.read_by(pids))
        return _Fault(
            f"a decoding worker died{over}: {text if told else f'cut off in what it sent ({type(error).__name__})'}",
            "A decoding worker died, mostly for lack of memory (host or /dev/shm). Lower data.num_workers, "
            "data.prefetch, data.film_cache_gib or the batch size; data.num_workers=0 shows errors in place.",
        )

    def _note_death(self, clips: list[tuple[bytes, int]]) -> str:
        """Bar the files of clips over which a worker died twice in a row; over what they died, as a message says it."""
        # What was ahead of the batch that is waited for is read again at once, unless it is what ends workers.
        recent = self._num_delivered - self.num_workers * self.config.prefetch
        twice = [clip for clip in clips if any(clip in earlier for at, earlier in self._deaths if at >= recent)]
        self._barred |= {what: "two workers died while they read it" for what, _ in twice}
        if twice:  # explained, so neither counts
            self._deaths = [(at, earlier) for at, earlier in self._deaths if not earlier & set(twice)]
        else:
            since = self._num_delivered - DEATHS_WITHIN
            self._deaths = [death for death in self._deaths if death[0] > since] + [(self._num_delivered, set(clips))]
        return f" while it read {_told(what for what, _ in clips)}" if clips else ""


@contextlib.contextmanager
def _withheld(number: signal.Signals) -> Iterator[None]:
    """Processes that are started inside, forkserver's server among them, never get this signal, of which they would die: a
    scheduler sends it to whole groups of processes. This one gets what came meanwhile at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Sampler:
    """The DataLoader's batch sampler: what ``left`` gives at the time."""

    left: Callable[[], Batches]

    def __iter__(self) -> Batches:
        return self.left()


class _Clips(Dataset):
    """Workers' side: a request in, a sample or the reason why not out."""

    def __init__(self, reader: ClipReader):
        self.reader = reader

    def __getitem__(self, request: ClipRequest):
        try:
            return self.reader.read(request)
        except (NoneReadable, Unreachable) as error:  # raised in the main process: there the message stands alone, once
            return error


def _collate(samples: list) -> dict:
    """Stack a batch, and carry the workers' bookkeeping beside it."""
    for sample in samples:
        if isinstance(sample, Exception):
            return {"error": sample}
    batch = {name: torch.stack([s.tensors[name] for s in samples]) for name in samples[0].tensors}
    return {
        "batch": batch | {"key": [s.key for s in samples]},
        "failures": [failure for s in samples for failure in s.failures],
        "num_replaced": sum(bool(s.failures) for s in samples),
    }


def _start_method(configured: str, again: bool = False) -> str:
    if configured != "auto":
        return configured
    if again or decord_ran():
        if not again:
            log.info("decord already ran in this process, so workers are started by forkserver: forked ones would hang")
        # Imported once, by the server; the workers that it forks then start at once.
        multiprocessing.get_context("forkserver").set_forkserver_preload(["datamodules.clips"])
        return "forkserver"
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"


def _told(names) -> str:
    return ", ".join(sorted({name.decode(errors="replace").replace("\n", " + ") for name in names}))
