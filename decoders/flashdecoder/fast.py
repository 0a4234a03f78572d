"""FlashDecoder's optimised inference (paper section 4.6): the function of model.py, arranged for the machine.

Every step of a size has the same few shapes (first frame, warm-up while the window fills, full window), caches of fixed
size that it changes in place, and rotations from tables made once.  So each of these phases can be one CUDA graph, and
torch.compile sees every block once: the blocks of a stack share one compiled function, cut at matrix products, where
nothing can be fused anyway.  Caches hold what the reference holds, keys before rotation in the order of age, and rounding happens where it
does there: a stream equals the reference to rounding, however long it runs.  Weights are shared with the model.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from decoders.flashdecoder import attention, rope
from decoders.flashdecoder.blocks import HEAD_DIM
from decoders.flashdecoder.fast_blocks import FastBlock, FastHead, Tables, gain_of, shared
from decoders.flashdecoder.stack import Grid
from decoders.layers import products
from decoders.layers.deployed import at_rest, check_latent, compiled

SIZES_KEPT = 8  # (batch, size) pairs whose tables and graphs are kept, the least recently used goes first


class Phase(NamedTuple):
    """All that distinguishes one step of a size from another."""

    past: int  # earlier latent frames in the cache
    first: bool  # one pixel frame comes out


@dataclass(eq=False)
class FastStream:
    """Everything that a stream remembers; the caller owns it.  Its caches lie in a CUDA graph's memory while it is resident."""

    batch_size: int
    height: int  # pixels, of the frames that come out
    width: int
    grid: Grid
    cache_bytes: int
    caches: list[Tensor] | None = (
        None  # keys and values of each block in turn, "b frames*s G d"; None: resident or not begun
    )
    steps: int = 0
    ended: bool = False
    resident: object = field(default=None, repr=False)

    @property
    def started(self) -> bool:
        return self.steps > 0

    def num_bytes(self) -> int:
        """Bytes of the caches, the same from the first step on."""
        return 0 if self.ended else self.cache_bytes

    def __getstate__(self) -> dict:
        """For copy and pickle: the copy has caches of its own."""
        if self.resident is not None:
            self.resident.leave()
        return self.__dict__


def _embed(linear: nn.Module, latent: Tensor, unshuffle: int) -> tuple[Tensor, Tensor]:
    u = unshuffle
    x = products.linear(linear, rearrange(latent, "b c (y p) (x q) -> b (y x) (c p q)", p=u, q=u))
    return x, torch.zeros_like(x)


def _block(block, x, branch, cache, past, tables, last, kernel):
    return block(x, branch, cache, past, tables, last, kernel)


def _expand(linear: nn.Module, gain: Tensor, x: Tensor, branch: Tensor, times: int) -> tuple[Tensor, Tensor]:
    x = rearrange(products.linear(linear, x + branch, gain), "b s (k d) -> b (k s) d", k=times)
    return x, torch.zeros_like(x)


def _head(head: nn.Module, x: Tensor, branch: Tensor, grid: Grid) -> Tensor:
    return head(x, branch, grid)


@dataclass
class Parts:
    """The four functions that a step is made of, plain or compiled for one phase of one size."""

    embed: Callable = _embed
    block: Callable = _block
    expand: Callable = _expand
    head: Callable = _head

    @classmethod
    def compiled(cls) -> "Parts":
        return cls(*(compiled(function, dynamic=False) for function in (_embed, _block, _expand, _head)))


class Size:
    """What the steps of one (batch, size) share: tables, attention kernels, compiled parts, graphs."""

    def __init__(self, batch: int, grid: Grid, tables: tuple[Tables, Tables]) -> None:
        self.batch, self.grid, self.tables = batch, grid, tables
        self.parts: dict[Phase, Parts] = {}
        self.graphs = None  # graphs.GraphedSteps on CUDA


class FastFlashDecoder(nn.Module):
    """The optimised form of a FlashDecoderModel: ``decode`` and the streams, in eval mode and without gradients.

    Args:
        model: in the dtype and on the device that it shall run in.
        compiles, graphs, kernel, uint8: see decoders/inference.py (``kernel``: its ``attention``).
    """

    def __init__(
        self, model: nn.Module, compiles: bool = False, graphs: bool = True, kernel: str = "auto", uint8: bool = False
    ) -> None:
        super().__init__()
        self.config = config = model.config
        if config.window is None:
            raise ValueError(
                "decoder.window=null keeps all frames, so no two steps are alike and nothing can be prepared: "
                "use the model itself, or a window of a fixed number of latent frames"
            )
        if kernel not in attention.NAMES:
            raise ValueError(f"attention={kernel!r} is none of {', '.join(attention.NAMES)}")
        self.channels, self.stride_t, self.stride_hw, self.patch = (
            model.channels, model.stride_t, model.stride_hw, model.patch
        )  # fmt: skip
        self.embed, self.expand = shared(model.embed), shared(model.expand)
        self.backbone = nn.ModuleList(FastBlock(block) for block in model.backbone.blocks)
        self.expand_gain = gain_of(model.backbone_norm)
        self.refinement = nn.ModuleList(FastBlock(block) for block in model.refinement.blocks)
        self.head = FastHead(model.head, uint8)
        self.kernel, self.uint8 = kernel, uint8
        self.kernels: attention.Choices = {}  # which attention each shape got
        self.prepare(compiles, graphs)
        self.eval()

    def prepare(self, compiles: bool, graphs: bool) -> None:
        """Steps from now on are compiled, or captured (CUDA only), or both; calibration comes before.

        Products run in the kernels of decoders/layers/products.py that can, but not while a layer is watched.
        """
        products.prefer(self)
        self.compiles = compiles
        self.graphed = graphs and self.device.type == "cuda"
        self._sizes: OrderedDict[tuple[int, Grid], Size] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if self.graphed else None

    @property
    def device(self) -> torch.device:
        return self.expand_gain.device

    @property
    def dtype(self) -> torch.dtype:
        return self.expand_gain.dtype

    @property
    def blocks(self) -> list[FastBlock]:
        return [*self.backbone, *self.refinement]

    # ---- clips and streams

    def decode(self, latent: Tensor) -> Tensor:
        """Latents "b c n y x" to frames "b 3 t h w", or uint8 "b t h w 3"."""
        check_latent(latent, self.channels)
        p, u = self.stride_hw, self.config.unshuffle
        if latent.shape[-2] % u or latent.shape[-1] % u:
            raise ValueError(
                f"latent of {latent.shape[-2]}x{latent.shape[-1]} is not divisible by decoder.unshuffle={u}: "
                f"pixels must come in multiples of {self.patch} (pad=replicate pads and crops back)"
            )
        state = self.start_stream(latent.shape[0], latent.shape[3] * p, latent.shape[4] * p)
        t = 1 + (latent.shape[2] - 1) * self.stride_t
        shape = (t, state.height, state.width)
        if self.uint8:
            video = torch.empty(state.batch_size, *shape, 3, dtype=torch.uint8, device=self.device)
        else:
            video = torch.empty(state.batch_size, 3, *shape, dtype=self.dtype, device=self.device)
        axis, done = 1 if self.uint8 else 2, 0
        for frame in latent.unbind(2):
            frames = self._advance(frame, state)
            video.narrow(axis, done, frames.shape[axis]).copy_(frames)
            done += frames.shape[axis]
        self.end_stream(state)
        return video

    def start_stream(self, batch_size: int, height: int, width: int) -> FastStream:
        """A new stream of ``batch_size`` clips of ``height`` x ``width`` pixels, cropped from what ``patch`` divides."""
        if batch_size < 1 or height < 1 or width < 1:
            raise ValueError(f"a stream of {batch_size} clips of {height}x{width} pixels is empty")
        grid = Grid(-(-height // self.patch), -(-width // self.patch))
        elements = sum(torch.Size(shape).numel() for shape in self._cache_shapes(batch_size, grid))
        return FastStream(batch_size, height, width, grid, elements * self.dtype.itemsize)

    def step_stream(self, latent_frame: Tensor, state: FastStream) -> Tensor:
        """Frames of the next latent frame "b c y x", one for the first, then ``stride_t``: "b 3 k h w" or uint8 "b k h w 3"."""
        frames = self._advance(latent_frame, state)
        if self.uint8:
            cropped = frames[:, :, : state.height, : state.width]
        else:
            cropped = frames[..., : state.height, : state.width]
        return cropped.clone() if self.graphed else cropped  # a graph writes its frames to the same place each time

    def end_stream(self, state: FastStream) -> Tensor:
        """Close the stream. Nothing is ever pending."""
        if state.resident is not None:
            state.resident.forget()
        state.ended, state.caches, state.resident = True, None, None
        size = (state.height, state.width)
        if self.uint8:
            return torch.empty(state.batch_size, 0, *size, 3, dtype=torch.uint8, device=self.device)
        return torch.empty(state.batch_size, 3, 0, *size, dtype=self.dtype, device=self.device)

    # ---- steps

    def _advance(self, latent: Tensor, state: FastStream) -> Tensor:
        """The uncropped frames of the next latent frame; with graphs in memory that the next step overwrites."""
        if state.ended:
            raise ValueError("this stream has ended; start another with start_stream")
        u = self.config.unshuffle
        expected = (state.batch_size, self.channels, state.grid.rows * u, state.grid.columns * u)
        if tuple(latent.shape) != expected:
            raise ValueError(
                f"latent frame of shape {tuple(latent.shape)}, but this stream of {state.batch_size} x "
                f"{state.height}x{state.width} pixels takes {expected} (b c y x)"
            )
        phase = Phase(min(state.steps, self.config.window - 1), state.steps == 0)
        with at_rest(self.device):  # caches outlive this call
            size = self._size(state.batch_size, state.grid)
            latent = latent.to(self.device, self.dtype)
            if self.graphed:
                frames = size.graphs(latent, state, phase)
            else:
                if state.caches is None:
                    state.caches = self._new_caches(state.batch_size, state.grid)
                frames = self._step(size, latent, state.caches, phase)
        state.steps += 1
        return frames

    def _step(self, size: Size, latent: Tensor, caches: list[Tensor], phase: Phase) -> Tensor:
        """One latent frame to its frames; ``caches`` are changed in place."""
        if phase not in size.parts:
            size.parts[phase] = Parts.compiled() if self.compiles else Parts()
        parts, rest = size.parts[phase], iter(zip(caches[::2], caches[1::2], strict=True))
        spatial = size.grid.rows * size.grid.columns
        x, branch = parts.embed(self.embed, latent, self.config.unshuffle)
        for block in self.backbone:
            x, branch = self._run(parts, block, x, branch, next(rest), size, 0, phase, spatial)
        x, branch = parts.expand(self.expand, self.expand_gain, x, branch, self.stride_t)
        for block in self.refinement:
            # The first latent frame stands for one pixel frame, the last of its stride_t times.
            last = spatial if phase.first and block is self.refinement[-1] else self.stride_t * spatial
            x, branch = self._run(parts, block, x, branch, next(rest), size, 1, phase, last)
        if phase.first and not self.refinement:
            x, branch = x[:, -spatial:], branch[:, -spatial:]
        return parts.head(self.head, x, branch, size.grid)

    def _run(self, parts: Parts, block: FastBlock, x, branch, cache, size: Size, stack: int, phase: Phase, last: int):
        past = phase.past * x.shape[1]
        tables = size.tables[stack]
        tables = Tables(tables.query, rope.last_frames(tables.key, past + x.shape[1]))
        groups = self.config.num_kv_heads
        shape = (x.shape[0], last, self.config.num_heads, past + x.shape[1], groups)
        kernel = attention.choose(self.kernel, shape, self.dtype, self.device, self.kernels)
        return parts.block(block, x, branch, cache, past, tables, last, kernel)

    # ---- what a size needs

    def _cache_shapes(self, batch: int, grid: Grid) -> list[tuple[int, ...]]:
        frame, frames = grid.rows * grid.columns, self.config.window - 1
        tokens = [frame] * len(self.backbone) + [self.stride_t * frame] * len(self.refinement)
        return [(batch, frames * count, self.config.num_kv_heads, HEAD_DIM) for count in tokens for _ in "kv"]

    def _new_caches(self, batch: int, grid: Grid) -> list[Tensor]:
        return [torch.zeros(s, device=self.device, dtype=self.dtype) for s in self._cache_shapes(batch, grid)]

    def _tables(self, grid: Grid, times: int) -> Tables:
        config = self.config
        span = range(-(config.window - 1) * times, times)
        cos, sin = rope.table(span, *grid, tuple(config.rope_split), config.rope_theta, self.device)
        key = (torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))
        return Tables(rope.last_frames(key, times * grid.rows * grid.columns), key)

    def _size(self, batch: int, grid: Grid) -> Size:
        key = (batch, grid)
        if key not in self._sizes:
            size = Size(batch, grid, (self._tables(grid, 1), self._tables(grid, self.stride_t)))
            if self.graphed:
                size.graphs = self._graphs(size)
            self._sizes[key] = size
            if len(self._sizes) > SIZES_KEPT:
                _, oldest = self._sizes.popitem(last=False)
                if oldest.graphs is not None:
                    oldest.graphs.resident.leave()
        self._sizes.move_to_end(key)
        return self._sizes[key]

    def _graphs(self, size: Size):
        from decoders.flashdecoder.graphs import GraphedSteps

        u = self.config.unshuffle
        latent = torch.zeros(size.batch, self.channels, size.grid.rows * u, size.grid.columns * u)
        return GraphedSteps(
            lambda latent, caches, phase: self._step(size, latent, caches, phase),
            latent.to(self.device, self.dtype),
            self._new_caches(size.batch, size.grid),
            self._pool,
        )


def build(model: nn.Module, options, calibration: Sequence[Tensor] | Any = ()) -> FastFlashDecoder:
    """The fast form of ``model`` under decoders.inference.InferenceOptions; ``calibration``: latents "b z f h w"."""
    if options.fast_convolutions:
        raise ValueError(
            "FlashDecoder has no convolutions: fast_convolutions=false (it has compile, bits8, attention, uint8)"
        )
    fast = FastFlashDecoder(model, compiles=False, graphs=False, kernel=options.attention, uint8=options.uint8)
    if options.attention == "triton_fp8":
        if not isinstance(calibration, Sequence):
            raise ValueError(
                f"attention=triton_fp8 takes its scales from latents, and a saved {type(calibration).__name__} has those of "
                "the linear layers alone: give latents as the calibration"
            )
        if len(calibration):
            calibrate_attention(fast, calibration)
    if options.bits8 != "none":
        from decoders.flashdecoder import bits8

        bits8.quantise(fast, options.bits8, calibration)
    fast.prepare(options.compile, options.graphs)
    return fast


def calibrate_attention(fast: FastFlashDecoder, calibration: Sequence[Tensor]) -> None:
    """Fixed scales of the FP8 attention of every block: what its queries, keys and values reach on these latents.

    Without them the kernel finds the largest value of every head at each call, which costs a pass over q, k and v.
    """
    from decoders.flashdecoder.attention_fp8 import Scales

    def observer(block: FastBlock) -> Callable[[Tensor, Tensor, Tensor], None]:
        def observe(q: Tensor, k: Tensor, v: Tensor) -> None:
            found, before = Scales.of(q, k, v), block.attention_scales
            block.attention_scales = found if before is None else before.merge(found)

        return observe

    wanted, fast.kernel = fast.kernel, "auto"
    for block in fast.blocks:
        block.observe = observer(block)
    for number, latent in enumerate(calibration):
        if not latent.isfinite().all():
            raise ValueError(f"calibration latent {number} is not finite")
        fast.decode(latent)
    for number, block in enumerate(fast.blocks):
        block.observe = None
        if not all(part.isfinite().all() for part in vars(block.attention_scales).values()):
            raise ValueError(f"calibration: queries, keys or values of block {number} are not finite")
    fast.kernel = wanted
    fast.kernels.clear()
