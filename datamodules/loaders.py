"""Batches out of requests, as the trainer iterates them. Who decodes them: ``workers.py``."""

from collections import deque
from collections.abc import Iterable, Iterator

import torch

from datamodules.batch import VideoBatch
from datamodules.config import ClipDataConfig
from datamodules.plan import MixturePlan, Position
from datamodules.quarantine import Quarantine, TooManyBadFiles
from datamodules.reader import ClipRequest, NoneReadable
from datamodules.streams import Stream
from datamodules.workers import Workers


class UnreadableClip(RuntimeError):
    """A validation clip that cannot be read."""


def _mark_extension(batch: VideoBatch, extend: tuple[int, int]) -> VideoBatch:
    """Frames of ``extend`` are delivered but are not part of the window: ``supervised`` is false for them."""
    before, after = extend
    if before or after:
        b, _, t = batch["video"].shape[:3]
        batch["supervised"] = torch.zeros(b, t, dtype=torch.bool)
        batch["supervised"][:, before : t - after] = True
    return batch


def read_singly(config: ClipDataConfig, requests: Iterable[ClipRequest]) -> Iterator[dict]:
    """Clips one by one, in order, by the training's workers: ``batch``, or ``error`` for one that cannot be read.

    Raises what TrainLoader does for workers and servers.
    """
    source, begun = iter(requests), deque()

    def left() -> Iterator[list[ClipRequest]]:
        for request in list(begun):
            yield [request]
        for request in source:
            begun.append(request)
            yield [request]

    for item in Workers(config, config.num_workers).run(left):
        begun.popleft()
        if "error" in item and not isinstance(item["error"], NoneReadable):
            raise item["error"]
        yield {"error": str(item["error"])} if "error" in item else item


class TrainLoader:
    """Endless training batches; every ``iter()`` starts at ``position``, which whoever consumes the batches moves on.

    Not a DataLoader, on purpose: Lightning would put a sampler of its own into one. Raises TooManyBadFiles, Unreachable for a
    server of shards that does not answer, and RuntimeError where workers go on dying or hanging.
    """

    def __init__(
        self, config: ClipDataConfig, plan: MixturePlan, position: Position, rank: int, quarantine: Quarantine
    ):
        self.config, self.plan, self.position, self.quarantine = config, plan, position, quarantine
        self.rank, self._workers = rank, Workers(config, config.num_workers)

    def __iter__(self) -> Iterator[VideoBatch]:
        ahead, plan, rank = self.position.copy(), self.plan, self.rank  # not self: a cycle would keep the workers alive
        for item in self._workers.run(lambda: plan.batches(ahead, rank)):
            if "error" in item:
                raise TooManyBadFiles(str(item["error"])) if isinstance(item["error"], NoneReadable) else item["error"]
            stream = self.plan.streams[self.plan.stream_at(ahead.step)].config
            self.plan.advance(ahead)
            self.quarantine.update(len(item["batch"]["key"]), item["failures"], item["num_replaced"])
            yield _mark_extension(item["batch"], stream.extend)


class ValWorkers:
    """Workers that all validation loaders of a process share: streams are gone through one after the other."""

    def __init__(self, config: ClipDataConfig):
        self._turn = 0
        self._workers = Workers(config, min(config.num_workers, 2))

    def run(self, batches: list[list[ClipRequest]]) -> Iterator[VideoBatch]:
        """Read these batches. Another run ends this one. Raises UnreadableClip, and what TrainLoader does for workers."""
        turn = self._turn = self._turn + 1
        left = deque(batches)
        for item in self._workers.run(lambda: iter(list(left))):
            if "error" in item:
                if not isinstance(item["error"], NoneReadable):
                    raise item["error"]
                raise UnreadableClip(f"data.val: a validation clip, which nothing may replace, {item['error']}")
            left.popleft()
            yield item["batch"]
            if self._turn != turn:
                raise RuntimeError("two validation loaders are iterated at once, but they share their workers")


class ValLoader:
    """One stream's fixed validation clips, as far as they are this rank's.

    Raises UnreadableClip if one cannot be read: were another clip to take its place, the numbers would change in silence.
    """

    def __init__(self, workers: ValWorkers, stream: Stream, batches: list[list[ClipRequest]]):
        self._workers, self._extend, self._batches = workers, stream.config.extend, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[VideoBatch]:
        for batch in self._workers.run(self._batches):
            yield _mark_extension(batch, self._extend)
