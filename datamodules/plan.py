"""Which clips make up which training batch: a pure function of the seed and the position, on every rank alike.

The stream of a step: steps come in blocks of 100; each block holds every stream as often as its share says, in an order
drawn from (seed, block). So 8:2 is 80 and 20 of every 100 steps, not merely on average. With ``order: alternate`` step s
draws from stream s mod (number of streams) instead.

The clips of a step: every stream counts the clips that it has handed out on all ranks, its *draws*. Draw d is element
d mod N of the permutation drawn from (seed, stream, epoch d div N), so an epoch holds each clip once even where a batch
straddles two epochs. With ``sampling: resample`` it is any of the N instead, drawn from (seed, stream, d): no epochs, and no
permutation of N numbers. Rank r of a step takes the draws [first + r * batch, first + (r + 1) * batch): disjoint, and the
same union whatever the number of ranks.

The start and crop of a clip come from (seed, stream, d), and so do the clips that replace it if it cannot be read.

With a cache of latents (``latent_cache.py``) draws take its records, and replacements are records too.

The position is therefore (steps consumed, draws per stream). Draws are stored rather than derived from steps so that a
run can go on with another number of GPUs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from datamodules.latent_cache import LatentCache
from datamodules.reader import ClipRequest
from datamodules.streams import Stream

BLOCK = 100


@dataclass
class Position:
    """Where training stands: consumed batches, and clips handed out per stream, all ranks together."""

    step: int = 0
    draws: dict[str, int] = field(default_factory=dict)

    def copy(self) -> "Position":
        """An independent copy: prefetching workers run ahead of what training has consumed."""
        return Position(self.step, dict(self.draws))


class MixturePlan:
    """The plan for given streams, seed and number of ranks. ``max_bad_share`` sets how many replacements a clip gets,
    ``order`` (ClipDataConfig.order) which stream a step draws from, ``cache`` has latents of clips."""

    def __init__(
        self,
        streams: dict[str, Stream],
        seed: int,
        world_size: int = 1,
        max_bad_share: float = 0.05,
        order: str = "shares",
        cache: LatentCache | None = None,
    ):
        self.streams, self.seed, self.world_size, self.order, self.cache = streams, seed, world_size, order, cache
        self._names = list(streams)
        self._bounds = np.cumsum([stream.config.share for stream in streams.values()])
        # Enough that a tolerated share of bad files never uses all of them up by chance (once in 10^9 clips).
        self.num_alternates = math.ceil(min(64, max(4, math.log(1e-9) / math.log(max(max_bad_share, 1e-9)))))
        self._block: tuple[int, np.ndarray] | None = None
        self._orders: dict[str, tuple[int, np.ndarray]] = {}
        self._places: dict[str, tuple[int, np.ndarray]] = {}

    def stream_at(self, step: int) -> str:
        """Name of the stream that step ``step`` draws from."""
        if self.order == "alternate":
            return self._names[step % len(self._names)]
        block = step // BLOCK
        if self._block is None or self._block[0] != block:
            rng = np.random.default_rng([self.seed, 0, block])
            # Evenly spaced points with one common random offset: shares finer than 1/100 come out right on average.
            points = (rng.permutation(BLOCK) + rng.random()) / BLOCK
            self._block = block, np.searchsorted(self._bounds, points * self._bounds[-1], side="right")
        return self._names[min(int(self._block[1][step % BLOCK]), len(self._names) - 1)]

    def clip_at(self, name: str, draw: int) -> int:
        """Number of the clip that is handed out as draw ``draw`` of a stream."""
        stream = self.streams[name]
        if stream.config.sampling == "resample":
            return int(np.random.default_rng([self.seed, 3, stream.seed, draw]).integers(len(stream)))
        epoch, place = divmod(draw, len(stream))
        if name not in self._orders or self._orders[name][0] != epoch:
            self._orders[name] = epoch, self._order(stream, epoch)
        return int(self._orders[name][1][place])

    def _order(self, stream: Stream, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 1, stream.seed, epoch]).permutation(len(stream))

    def request_at(self, name: str, draw: int) -> ClipRequest:
        """The clip of a draw with its start and crop, and what may take its place."""
        stream = self.streams[name]
        if self.cache is not None and name in self.cache:
            return self._cached_request(name, draw)
        rng = np.random.default_rng([self.seed, 2, stream.seed, draw])
        request = stream.request(self.clip_at(name, draw), rng)
        if request.kind == "procedural":
            return request
        others = rng.integers(len(stream), size=self.num_alternates)
        alternates = tuple(stream.request(int(other), rng) for other in others)
        return replace(request, alternates=alternates)

    def record_at(self, name: str, draw: int) -> tuple[int, int]:
        """(record of the cache, clip) that draw ``draw`` takes: its own in the first ``views`` epochs, later an earlier one's."""
        num, views = len(self.streams[name]), self.cache.views
        if draw < views * num:
            return draw, self.clip_at(name, draw)
        if self.streams[name].config.sampling == "resample":
            rng = np.random.default_rng([self.seed, 4, self.streams[name].seed, draw])
            record = int(rng.integers(views * num))
            return record, self.clip_at(name, record)
        clip = self.clip_at(name, draw)
        return self._record_of(name, draw // num % views, clip), clip

    def _record_of(self, name: str, view: int, clip: int) -> int:
        """The draw of epoch ``view`` that is clip ``clip``."""
        stream = self.streams[name]
        if name not in self._places or self._places[name][0] != view:
            self._places[name] = view, np.argsort(self._order(stream, view))
        return view * len(stream) + int(self._places[name][1][clip])

    def _cached_request(self, name: str, draw: int) -> ClipRequest:
        """As ``request_at``, of a cache's records, and those of other clips to take their place."""
        stream = self.streams[name]
        rng = np.random.default_rng([self.seed, 5, stream.seed, draw])
        view = draw // len(stream) % self.cache.views
        records = [self.record_at(name, draw)]
        for other in rng.integers(len(stream), size=self.num_alternates).tolist():
            if stream.config.sampling == "resample":
                other += view * len(stream)
                records.append((other, self.clip_at(name, other)))
            else:
                records.append((self._record_of(name, view, other), other))
        first, *others = (
            replace(
                stream.request(clip, np.random.default_rng([self.seed, 2, stream.seed, record])),
                cached=self.cache.clip(name, record, (6, stream.seed, draw)),
            )
            for record, clip in records
        )
        return replace(first, alternates=tuple(others))

    def batch_at(self, position: Position, rank: int) -> list[ClipRequest]:
        """What ``rank`` reads at ``position``."""
        name = self.stream_at(position.step)
        size = self.streams[name].config.batch_size
        first = position.draws.get(name, 0) + rank * size
        return [self.request_at(name, draw) for draw in range(first, first + size)]

    def advance(self, position: Position) -> None:
        """Move ``position`` on by one step, in place."""
        name = self.stream_at(position.step)
        used = self.streams[name].config.batch_size * self.world_size
        position.draws[name] = position.draws.get(name, 0) + used
        position.step += 1

    def batches(self, position: Position, rank: int) -> Iterator[list[ClipRequest]]:
        """Endless batches from ``position`` on, which is left as it is."""
        position = position.copy()
        while True:
            yield self.batch_at(position, rank)
            self.advance(position)


def validation_batches(streams: dict[str, Stream], rank: int, world_size: int) -> dict[str, list[list[ClipRequest]]]:
    """Per stream the batches of ``rank``: the fixed clips, dealt to the ranks in turn, without padding.

    Raises ValueError where a rank would get none at all: Lightning would leave it out, and the others wait for it.
    """
    total = sum(len(stream) for stream in streams.values())
    if total < world_size:
        raise ValueError(
            f"data.val has {total} clips for {world_size} processes, and each needs one: raise num_clips of a stream or "
            "clips_per_video of a source"
        )
    batches, dealt = {}, 0
    for name, stream in streams.items():
        mine = [stream.request(i, None) for i in range(len(stream)) if (dealt + i) % world_size == rank]
        dealt += len(stream)
        size = stream.config.batch_size
        batches[name] = [mine[i : i + size] for i in range(0, len(mine), size)]
    return batches
