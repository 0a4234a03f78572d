"""Attention that streams: what a stage may see when latent frames arrive one by one. The design is ours.

The paper's attention sees the whole clip, so its decoder has no stream. Here

- references see one another and nothing else: their keys and values are made once per stream, at every point;
- the frames of one latent frame (1 at first, then 1, 2, 4 at the three points of Wan) see the references, themselves, and
  the frames of the ``window`` - 1 latent frames before;
- positions in time are counted within the window, from 1: a group sees its window as a clip of its own. Until the window
  is full this is the clip's own numbering, so with a window as long as the clip the function is the paper's attention under
  a mask; later no position exceeds those of a clip of ``window`` latent frames, and nothing knows how long the stream runs.
  Keys are therefore kept unrotated.

Whole clips run through the same loop, in training with gradients, so a stream equals its clip.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from decoders.layers.causal_conv import Past
from decoders.refdecoder.injection import Carry, JointAttention, reference_times
from decoders.refdecoder.transformer import KeyValue, normalise, rope_table, rotate


class WindowMemory(NamedTuple):
    """Keys and values of every block at every point; nothing in it is changed in place."""

    references: tuple[tuple[KeyValue | None, ...], ...]  # rotated; None without references
    past: tuple[tuple[tuple[KeyValue, ...], ...], ...]  # of the latent frames before, oldest first; not rotated


class WindowedAttention(JointAttention):
    """``JointAttention`` within a window of latent frames, one latent frame at a time."""

    streams = True
    window: int  # latent frames that are seen, the current one included

    def begin(self, reference: Float[Tensor, "b c r y x"] | None, carry: Carry) -> WindowMemory:
        """The memory of a new stream: what the references say at every point."""
        seen: list[tuple[KeyValue | None, ...]] = []
        for number in range(len(self.gates)):
            if reference is None:
                seen.append((None,) * len(self.blocks_at(number)))
                continue
            last = number + 1 == len(self.gates)
            keys, tokens = self._references(number, reference, last)
            seen.append(keys)
            if not last:
                reference = carry(number, self.leave_reference(number, tokens, reference))
        empty = tuple(((),) * len(self.blocks_at(number)) for number in range(len(self.gates)))
        return WindowMemory(tuple(seen), empty)

    def _references(self, number: int, reference: Tensor, last: bool) -> tuple[tuple[KeyValue, ...], Tensor]:
        """Rotated keys and values of the references' tokens in every block of a point, and the tokens after it. At the
        ``last`` point nobody wants those."""
        tokens = self._run(self.gates[number].reference_tokens, reference)
        shape = tokens.shape[1:4]
        table = rope_table(reference_times(reference), *shape[1:], self.split, tokens.device)
        tokens, seen = tokens.flatten(1, 3), []
        blocks = self.blocks_at(number)
        for block in blocks:
            if last and block is blocks[-1]:
                keys, values = block.keys_values(normalise(tokens))
            else:
                tokens, (keys, values) = self._run(block, tokens, table, table)
            seen.append((rotate(keys, table), values))
        return tuple(seen), tokens.unflatten(1, shape)

    def step(
        self, number: int, video: Float[Tensor, "b c t y x"], memory: WindowMemory
    ) -> tuple[Float[Tensor, "b c t y x"], WindowMemory]:
        """The frames of the next latent frame after point ``number``, and the memory after it."""
        tokens = self._run(self.gates[number].video_tokens, video)
        shape = tokens.shape[1:4]
        before, per_frame = memory.past[number], shape[1] * shape[2]
        frames = sum(keys.shape[1] for keys, _ in before[0]) // per_frame + shape[0]  # in the window
        keys_at = rope_table(tuple(range(1, frames + 1)), *shape[1:], self.split, tokens.device)
        queries_at = tuple(part[-shape[0] * per_frame :] for part in keys_at)
        tokens, after = tokens.flatten(1, 3), []
        for block, past, fixed in zip(self.blocks_at(number), before, memory.references[number], strict=True):
            tokens, new = self._run(block, tokens, queries_at, keys_at, past, fixed)
            kept = (*past, new)
            after.append(kept[max(0, len(kept) - self.window + 1) :])
        video = self.leave(number, tokens.unflatten(1, shape), video)
        return video, memory._replace(past=(*memory.past[:number], tuple(after), *memory.past[number + 1 :]))


@dataclass
class RefStream:
    """What a stream remembers: inputs of causal convolutions, and what was seen of references and of the last latent
    frames. The caller owns it; two states never touch. It does not grow once the window is full."""

    batch_size: int
    height: int  # pixels, of the frames that come out
    width: int
    memory: Any = None  # None: a plain decoder's stream, which looks at nothing
    past: Past = None
    started: bool = False
    ended: bool = field(default=False, repr=False)

    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in _tensors((self.memory, self.past)))


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        held = tuple(held.values())
    if isinstance(held, tuple):
        for part in held:
            yield from _tensors(part)
