"""RefDecoder's Transformer at inference: what references say is computed once, and every key is turned once.

What may be kept, and why:

- Windowed attention: references see one another and nothing else, so their tokens, keys and values at every point and block
  depend on the references alone. They are made once (``begin``) and serve every latent frame of every stream.
- A ControlNet's branch likewise: ``begin`` holds all that it ever adds.
- Full attention: from the first block on, references have seen the video. Only the encoder's features are theirs alone.

Windowed keys are kept as attention reads them. A score depends on the difference of two times alone, so video keys are
turned once by their time in the stream and stay; what moves instead are the references, which stand at times 0, -1, ... of
the *window*: once it is full their keys, few beside the window's, are turned anew for every latent frame. Keys and values of
a block lie in one buffer, references first, then a ring of the window's frames: attention does not ask in which order keys
come, so the newest latent frame takes the oldest one's place and nothing is joined or moved.

Shapes are those of ``transformer.py``; R references, S tokens of a frame, f frames of a latent frame, W latent frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.layers import products
from decoders.layers.deployed import compiled
from decoders.refdecoder.injection import Carry, JointAttention, reference_times
from decoders.refdecoder.transformer import EPS, THETA, Block, Gate, rope_table, wide

Turn = tuple[Tensor, Tensor]  # cosines and sines, each "s 1 d/2", float32


class Weights(NamedTuple):
    """Of one block; q, k and v are one product."""

    qkv: Tensor
    qkv_bias: Tensor
    q_gain: Tensor  # float32 at least
    k_gain: Tensor
    out: Tensor
    out_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    kernels: bool  # products run in those of decoders/layers/products.py


class Held(NamedTuple):
    """Keys, turned, and values of one block in one stream: "b m H d", references first, then the ring of the window."""

    keys: Tensor
    values: Tensor


class Seen(NamedTuple):
    """What references say to one block: keys, not turned, and values, "b R*S H d". It does not depend on the video."""

    keys: Tensor
    values: Tensor


class FastMemory(NamedTuple):
    """Of one stream. The buffers in ``held`` are written in place, so a memory belongs to one stream and one step of it."""

    seen: tuple[tuple[Seen, ...], ...] | None  # by point and block; None without references
    held: tuple[tuple[Held, ...] | None, ...]  # by point; None before its first frame
    steps: tuple[int, ...]  # latent frames that passed each point


class FastBlock(nn.Module):
    """The weights of a ``Block``, with q, k and v together."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        layers = (block.q, block.k, block.v)

        def kept(tensor: Tensor) -> nn.Parameter:
            return nn.Parameter(tensor.detach(), requires_grad=False)

        self.qkv = kept(torch.cat([layer.weight.detach() for layer in layers]))
        self.qkv_bias = kept(torch.cat([layer.bias.detach() for layer in layers]))
        self.q_gain, self.k_gain = kept(wide(block.q_norm.gain)), kept(wide(block.k_norm.gain))
        for name in ("out", "up", "down"):
            layer = getattr(block, name)
            setattr(self, name, kept(layer.weight))
            setattr(self, f"{name}_bias", kept(layer.bias))
        layers = ((getattr(self, name), getattr(self, f"{name}_bias")) for name in ("qkv", "out", "up", "down"))
        self.kernels = all(products.usable(*layer) for layer in layers)

    def weights(self) -> Weights:
        """As a tuple: functions of tensors are compiled once for all blocks."""
        found = Weights(*(getattr(self, name) for name in Weights._fields))
        return found._replace(kernels=found.kernels and products.still_fit(found.qkv))


# ---- one block


def layer_norm(x: Tensor) -> Tensor:
    """As ``normalise``: the kernels sum in float32 by themselves and round once."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def turned(x: Tensor, gain: Tensor, turn: Turn, head_dim: int) -> Tensor:
    """RMSNorm over all of D, then the rotation of a head's neighbouring pairs; in float32, which is what comes out."""
    x = wide(x)
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square().div(x.shape[-1]).add(EPS).rsqrt().unsqueeze(-1)
    return rotated((x * gain).unflatten(-1, (-1, head_dim)), (turn[0] * scale, turn[1] * scale))


def rotated(x: Tensor, turn: Turn) -> Tensor:
    """``x`` "b s H d" in float32 at least, turned."""
    x = x.unflatten(-1, (-1, 2))
    if (
        not torch.compiler.is_compiling()
    ):  # one pass in place of seven; the compiler fuses those, and knows no complex numbers
        return torch.view_as_real(torch.view_as_complex(x) * torch.complex(*turn)).flatten(-2)
    even, odd = x.unbind(-1)
    cos, sin = turn
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads "b s H d" over "b m H d", to "b s D"."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def finish(x: Tensor, mixed: Tensor, w: Weights) -> Tensor:
    """The rest of a block after attention."""
    if w.kernels:
        x = products.linear_bf16(mixed, w.out, w.out_bias, residual=x)
        return x + products.mlp_bf16(layer_norm(x), w.up, w.up_bias, w.down, w.down_bias, activation="gelu")
    x = x + F.linear(mixed, w.out, w.out_bias)
    return x + F.linear(F.gelu(F.linear(layer_norm(x), w.up, w.up_bias), approximate="tanh"), w.down, w.down_bias)


def projected(x: Tensor, w: Weights) -> tuple[Tensor, ...]:
    """Queries, keys and values "b s D" of tokens before their norm."""
    product = products.linear_bf16 if w.kernels else F.linear
    return product(layer_norm(x), w.qkv, w.qkv_bias).chunk(3, -1)


def whole(x: Tensor, w: Weights, turn: Turn, head_dim: int, first: int) -> Tensor:
    """A block whose tokens see one another. Those before ``first`` are seen and do not come out."""
    q, k, v = projected(x, w)
    k = turned(k, w.k_gain, turn, head_dim).to(x.dtype)
    if first:
        x, q, turn = x[:, first:], q[:, first:], (turn[0][first:], turn[1][first:])
    q = turned(q, w.q_gain, turn, head_dim).to(x.dtype)
    return finish(x, attend(q, k, v.unflatten(-1, (-1, head_dim))), w)


def ring(
    x: Tensor, w: Weights, turn: Turn, keys: Tensor, values: Tensor, places: Tensor, head_dim: int
) -> tuple[Tensor, ...]:
    """A block whose tokens take ``places`` "s" among ``keys`` and ``values`` "b m H d", and see all of them."""
    q, k, v = projected(x, w)
    keys.index_copy_(1, places, turned(k, w.k_gain, turn, head_dim).to(x.dtype))
    values.index_copy_(1, places, v.unflatten(-1, (-1, head_dim)))
    q = turned(q, w.q_gain, turn, head_dim).to(x.dtype)
    return (finish(x, attend(q, keys, values), w),)


def stream_table(first: int, frames: int, rows: int, columns: int, split: tuple[int, ...], device: Any) -> Turn:
    """The rotations of ``frames`` frames from time ``first`` on: those of ``rope_table``, at a cost that does not grow with
    the stream's length: cosines in time and in space are made apart, the latter once."""
    cos, sin = rope_table((0,), rows, columns, tuple(split), device)
    turns = split[0] // 2
    angles = torch.arange(first, first + frames, dtype=torch.float64)[:, None]
    angles = angles * THETA ** (-torch.arange(0, split[0], 2, dtype=torch.float64) / split[0])
    parts = []
    for function, space in ((torch.cos, cos), (torch.sin, sin)):
        time = function(angles).float().to(device)[:, None, None].expand(-1, rows * columns, -1, -1)
        parts.append(torch.cat([time, space[..., turns:].expand(frames, -1, -1, -1)], -1).flatten(0, 1))
    return parts[0], parts[1]


# ---- all points


class FastAttention(JointAttention):
    """``JointAttention`` for inference, over the same gates."""

    def __init__(self, injection: JointAttention, compile: bool) -> None:
        nn.Module.__init__(self)
        self.split, self.skip_video, self.skip_reference = (
            injection.split,
            injection.skip_video,
            injection.skip_reference,
        )
        self.gates = injection.gates
        self.head_dim = sum(self.split)
        self.blocks = nn.ModuleList(nn.ModuleList(FastBlock(block) for block in blocks) for blocks in injection.blocks)
        prepare: Callable[[Any], Any] = compiled if compile else (lambda function: function)
        self._whole, self._ring, self._features = (prepare(function) for function in (whole, ring, features))

    def forward(self, number: int, video: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As ``JointAttention.forward``. At the last point nobody wants the references any more, so that in its last block
        they are seen and no more."""
        gate, frames = self.gates[number], video.shape[2]
        tokens, times = gate.video_tokens(video), tuple(range(1, frames + 1))
        last = number + 1 == len(self.gates)
        if reference is not None:
            tokens = torch.cat([gate.reference_tokens(reference), tokens], dim=1)
            times = (*reference_times(reference), *times)
        shape = tokens.shape[1:4]
        turn = rope_table(times, *shape[1:], self.split, tokens.device)
        tokens, blocks = tokens.flatten(1, 3), self.blocks_at(number)
        unwanted = (shape[0] - frames) * shape[1] * shape[2] if last else 0
        for block in blocks:
            first = unwanted if block is blocks[-1] else 0
            tokens = self._whole(tokens, block.weights(), turn, self.head_dim, first)
        tokens = tokens.unflatten(1, (-1, *shape[1:]))
        video = self.leave(number, tokens[:, -frames:], video)
        if reference is None or last:
            return video, None
        return video, self.leave_reference(number, tokens[:, :-frames], reference)

    def leave(self, number: int, tokens: Tensor, video: Tensor) -> Tensor:
        """As ``JointAttention.leave``."""
        return self._left(number, tokens, video, self.skip_video)

    def leave_reference(self, number: int, tokens: Tensor, reference: Tensor) -> Tensor:
        """As ``JointAttention.leave_reference``."""
        return self._left(number, tokens, reference, self.skip_reference)

    def _left(self, number: int, tokens: Tensor, before: Tensor, skip: bool) -> Tensor:
        gate: Gate = self.gates[number]
        layer = gate.project
        return self._features(tokens, layer.weight, layer.bias, before, gate.patch, skip)


def features(tokens: Tensor, weight: Tensor, bias: Tensor, before: Tensor, patch: int, skip: bool) -> Tensor:
    """What a gate gives of ``tokens`` "b t Y X D", channels last, added to ``before`` "b c t y x" or in its place."""
    b, t, rows, columns = tokens.shape[:4]
    height, width = before.shape[-2:]
    patches = F.linear(layer_norm(tokens), weight, bias).view(b, t, rows, columns, patch, patch, -1)
    x = patches.transpose(3, 4).reshape(b, t, rows * patch, columns * patch, -1)
    x = x[:, :, :height, :width].movedim(-1, 1)
    return before + x if skip else x


class FastWindowedAttention(FastAttention):
    """``WindowedAttention`` for inference: same function, a memory that is written in place."""

    streams = True

    def __init__(self, injection: JointAttention, frames: tuple[int, ...], compile: bool) -> None:
        super().__init__(injection, compile)
        self.window, self.frames = injection.window, frames  # frames of a latent frame at every point

    def begin(self, reference: Tensor | None, carry: Carry) -> FastMemory:
        """The memory of a new stream."""
        return self.fresh(None if reference is None else self.see(reference, carry))

    def fresh(self, seen: tuple[tuple[Seen, ...], ...] | None) -> FastMemory:
        """A stream's memory over what references say, which may serve other streams as well: it is only read."""
        number = len(self.gates)
        return FastMemory(seen, (None,) * number, (0,) * number)

    def see(self, reference: Tensor, carry: Carry) -> tuple[tuple[Seen, ...], ...]:
        """Keys and values of the references "b c r y x" at every point and block."""
        seen = []
        for number in range(len(self.gates)):
            last = number + 1 == len(self.gates)
            tokens = self.gates[number].reference_tokens(reference)
            shape = tokens.shape[1:4]
            turn = rope_table(reference_times(reference), *shape[1:], self.split, tokens.device)
            tokens, here, blocks = tokens.flatten(1, 3), [], self.blocks_at(number)
            for block in blocks:
                said, tokens = self._say(block.weights(), tokens, None if last and block is blocks[-1] else turn)
                here.append(said)
            seen.append(tuple(here))
            if not last:
                reference = carry(number, self.leave_reference(number, tokens.unflatten(1, shape), reference))
        return tuple(seen)

    def _say(self, w: Weights, tokens: Tensor, turn: Turn | None) -> tuple[Seen, Tensor]:
        """What the references' ``tokens`` give one block, and the tokens after it; without ``turn`` nobody wants those."""
        heads, dim = (-1, self.head_dim), tokens.shape[-1]
        start = dim if turn is None else 0
        *q, k, v = F.linear(layer_norm(tokens), w.qkv[start:], w.qkv_bias[start:]).split(dim, -1)
        k = F.rms_norm(wide(k), w.k_gain.shape, w.k_gain, EPS).to(k.dtype).unflatten(-1, heads)
        said = Seen(k, v.unflatten(-1, heads).contiguous())
        if turn is None:
            return said, tokens
        query = turned(q[0], w.q_gain, turn, self.head_dim).to(k.dtype)
        return said, finish(tokens, attend(query, rotated(wide(k), turn).to(k.dtype), said.values), w)

    def step(self, number: int, video: Tensor, memory: FastMemory) -> tuple[Tensor, FastMemory]:
        """The frames of the next latent frame after point ``number``. The memory that went in must not be used again."""
        tokens = self.gates[number].video_tokens(video)
        new, rows, columns = tokens.shape[1:4]
        grid, cells = (rows, columns), rows * columns
        step, size = memory.steps[number], self.window * self.frames[number]
        at = 1 + (step - 1) * self.frames[number] if step else 0  # the clip's first frame is 0
        full = step >= self.window
        start = 1 + (step - self.window) * self.frames[number] if full else 0  # of the window
        seen = None if memory.seen is None else memory.seen[number]
        held = memory.held[number] or self._allocate(number, tokens, seen)
        references = 0 if seen is None else seen[0].keys.shape[1]
        if seen is not None and (full or not step):
            self._place_references(seen, held, start, grid)
        turn = stream_table(at + 1, new, *grid, self.split, tokens.device)
        places = (torch.arange(new * cells, device=tokens.device) + at % size * cells) % (size * cells) + references
        valid = references + cells * (size if full else at + new)
        tokens = tokens.flatten(1, 3)
        for block, (keys, values) in zip(self.blocks_at(number), held, strict=True):
            parts = (keys[:, :valid], values[:, :valid], places, self.head_dim)
            (tokens,) = self._ring(tokens, block.weights(), turn, *parts)
        video = self.leave(number, tokens.unflatten(1, (new, *grid)), video)
        return video, memory._replace(
            held=(*memory.held[:number], held, *memory.held[number + 1 :]),
            steps=(*memory.steps[:number], step + 1, *memory.steps[number + 1 :]),
        )

    def _allocate(self, number: int, tokens: Tensor, seen: tuple[Seen, ...] | None) -> tuple[Held, ...]:
        b, cells = len(tokens), tokens.shape[2] * tokens.shape[3]
        references = 0 if seen is None else seen[0].keys.shape[1]
        length = references + self.window * self.frames[number] * cells
        shape = (b, length, tokens.shape[-1] // self.head_dim, self.head_dim)
        held = tuple(Held(tokens.new_empty(shape), tokens.new_empty(shape)) for _ in self.blocks_at(number))
        for (_, values), said in zip(held, seen or (), strict=False):
            values[:, :references] = said.values
        return held

    def _place_references(self, seen: tuple[Seen, ...], held: tuple[Held, ...], start: int, grid: tuple) -> None:
        """Write the references' keys as a window that begins with the clip's frame ``start`` sees them."""
        count = seen[0].keys.shape[1] // (grid[0] * grid[1])
        cos, sin = stream_table(start + 1 - count, count, *grid, self.split, seen[0].keys.device)
        turn = tuple(part.unflatten(0, (count, -1)).flip(0).flatten(0, 1) for part in (cos, sin))  # 0, -1, -2, ...
        for said, (keys, _) in zip(seen, held, strict=True):
            keys[:, : said.keys.shape[1]] = rotated(wide(said.keys), turn)
