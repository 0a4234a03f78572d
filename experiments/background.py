"""Who writes a run's files: the training process itself, or a thread beside it (``trainer.async_checkpoints``)."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Job = Callable[[], None]


class Writer:
    """Does every job at once; ``keep`` hands tensors back as they are."""

    @contextmanager
    def checkpoint(self) -> Iterator[None]:
        """While a checkpoint's files are handed over. What was still being written is waited for, and its error raised."""
        yield

    def keep(self, tree: Any) -> Any:
        """``tree`` of dictionaries, lists and tensors as it is now, whatever training does to it afterwards."""
        return tree

    def submit(self, job: Job) -> None:
        job()

    def check(self) -> None:
        """Raise the error of a job that failed since."""

    def wait(self) -> None:
        """Until all jobs are done; raises the error of one that failed."""


class Background(Writer):
    """Does the jobs one after the other in a thread, on copies in CPU memory. After one that failed the rest is dropped.

    There is one checkpoint in memory at a time: the next one waits for it.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[Job] = queue.Queue()
        self._error: BaseException | None = None
        # Of one checkpoint: memory -> (source, copy), as weights are in several of its files and are copied once. Sources are
        # kept so that no other tensor gets their memory meanwhile. None: between checkpoints.
        self._copies: dict[tuple, tuple[Tensor, Tensor]] | None = None
        self._thread: threading.Thread | None = None

    @contextmanager
    def checkpoint(self) -> Iterator[None]:
        self.wait()
        self._copies = {}
        try:
            yield
        finally:
            self._copies = None

    def keep(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self._copy(tree)
        if isinstance(tree, dict):
            copied = {key: self.keep(value) for key, value in tree.items()}
            return copied if type(tree) is dict else type(tree)(copied)
        if isinstance(tree, list | tuple):
            return type(tree)(self.keep(value) for value in tree)
        return tree

    def _copy(self, tensor: Tensor) -> Tensor:
        source = tensor.detach()
        key = (source.data_ptr(), source.shape, source.stride(), source.dtype, source.device)
        known = self._copies if self._copies is not None and source.numel() else {}
        if key not in known:
            known[key] = source, torch.empty_like(source, device="cpu").copy_(source)
        return known[key][1]

    def submit(self, job: Job) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                if self._error is None:
                    job()
            except BaseException as error:  # raised in the training process, by check or wait
                self._error = error
            finally:
                self._jobs.task_done()

    def check(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        self._jobs.join()
        self.check()
