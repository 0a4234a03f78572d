"""The optimised form of every staged decoder: :func:`decoders.inference.optimise` comes here.

    CPU with AVX-512 BF16, bf16   norm, SiLU and 3x3x3 convolutions in C++ on frames that are never concatenated
    any, ``compile``              one step by torch.compile, which writes norms straight into the convolutions' inputs
    CUDA, ``graphs``              one step captured and replayed, the past at fixed addresses

With ``fast_convolutions`` the 3x3x3 convolutions take 2.25 times fewer products (``decoders/layers/winograd.py``).
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from decoders.backbones.fast_layers import replace_layers
from decoders.backbones.staged import ConvStream, StagedDecoder
from decoders.inference import InferenceOptions
from decoders.layers import native
from decoders.layers.causal_conv import Past
from decoders.layers.cuda_graphs import capture
from decoders.layers.deployed import check_latent, compiled, inference, shared_copy, to_uint8

MAX_GRAPHS = 4  # sizes whose graphs are kept


class FastStaged(nn.Module):
    """A staged decoder for inference: same ``decode`` and streams.

    Weights are copied where another order is faster and shared where not. Pieces of a decoder, for whoever drives it stage
    by stage, are in ``network``, a decoder of the same class.

    Args:
        source: stays as it is.
        options: ``bits8`` and ``attention`` are not for convolutional decoders.

    Attributes:
        kernels: what computes: "frames" (C++, see above) or "torch".
        reason: why not frames, where a bf16 decoder on a CPU has them not.

    Raises:
        ValueError: an option that this decoder has no use for.
    """

    def __init__(self, source: StagedDecoder, options: InferenceOptions) -> None:
        super().__init__()
        if options.bits8 != "none" or options.attention != "auto":
            raise ValueError(
                f"{type(source).__name__}: bits8 and attention are for Transformers; a convolutional decoder takes compile, "
                "graphs, uint8 and fast_convolutions"
            )
        self.options, self.can_stream = options, source.can_stream
        self.channels, self.stride_t, self.stride_hw = source.channels, source.stride_t, source.stride_hw
        self.config = getattr(source, "config", None)
        self.network = shared_copy(source)
        parameter = next(source.parameters())
        self.dtype, device = parameter.dtype, parameter.device
        self.reason = "torch.compile was asked for" if options.compile else native.missing()
        bf16_cpu = device.type == "cpu" and self.dtype == torch.bfloat16
        self.kernels = "frames" if bf16_cpu and not self.reason else "torch"
        replaced = replace_layers(self.network, self.kernels == "frames", options.fast_convolutions)
        if options.fast_convolutions and not replaced:
            raise ValueError(f"fast_convolutions: {type(source).__name__} has no convolution that would gain by it")
        if not replaced:
            self.kernels = "torch"
        _lay_out(self.network)
        self.eval()
        self._advance: Callable = self.network.advance
        self._whole: Callable = _whole(self.network)
        if options.compile:
            self._advance, self._whole = (compiled(part, dynamic=False) for part in (self._advance, self._whole))
        self._graphs: OrderedDict[tuple, StepGraph] = OrderedDict()
        if options.graphs and device.type == "cuda":
            self.network.advance = self._replay
        else:
            self.network.advance = self._plain

    def _plain(self, latent: Tensor, past: Past, first: bool, state: ConvStream) -> tuple[Tensor, Past]:
        return self._advance(latent, past, first, None)

    def _replay(self, latent: Tensor, past: Past, first: bool, state: ConvStream) -> tuple[Tensor, Past]:
        """By a graph, from the second time on that a step leaves a past of the form which it found: not a stream's first."""
        form = _form(past)
        key = (tuple(latent.shape), form)
        if key not in self._graphs:
            frames, new = self._advance(latent, past, first, None)
            if not first and _form(new) == form:
                self._graphs[key] = StepGraph(self._advance, latent, new)
                if len(self._graphs) > MAX_GRAPHS:
                    self._graphs.popitem(last=False)
            return frames, new
        self._graphs.move_to_end(key)
        return self._graphs[key](latent, past, state)

    # ---- as the decoder

    @inference
    def forward(self, latent: Float[Tensor, "b c n y x"]) -> Tensor:
        """As :meth:`decode`."""
        return self.decode(latent)

    @inference
    def decode(self, latent: Float[Tensor, "b c n y x"]) -> Tensor:
        """RGB clamped to [-1, 1] "b 3 t h w"; with ``uint8`` "b t h w 3"."""
        check_latent(latent, self.channels)
        if not self.can_stream:
            video = self.quantise(self._whole(latent))
            self.network.frame_pool.clear()
            return video
        size = (latent.shape[3] * self.stride_hw, latent.shape[4] * self.stride_hw)
        state = self.start_stream(len(latent), *size)
        frames = [self.step_stream(frame, state) for frame in latent.unbind(2)]
        self.end_stream(state)
        return torch.cat(frames, 1 if self.options.uint8 else 2)

    def start_stream(self, batch_size: int, height: int, width: int) -> ConvStream:
        """As :meth:`StagedDecoder.start_stream`."""
        return self.network.start_stream(batch_size, height, width)

    @inference
    def step_stream(self, latent_frame: Float[Tensor, "b c y x"], state: ConvStream) -> Tensor:
        """The frames of the next latent frame, "b 3 k h w" clamped to [-1, 1]; with ``uint8`` "b k h w 3"."""
        return self.quantise(self.network.step_stream(latent_frame, state))

    def end_stream(self, state: ConvStream) -> Tensor:
        """As :meth:`StagedDecoder.end_stream`; with ``uint8`` the empty frames are "b 0 h w 3"."""
        empty = self.network.end_stream(state)
        self.network.frame_pool.clear()
        return self.quantise(empty)

    def quantise(self, video: Float[Tensor, "b 3 t h w"]) -> Tensor:
        """As it is, or with ``uint8`` rounded to 0 ... 255, channels last."""
        if not self.options.uint8:
            return video
        return to_uint8(video.movedim(1, -1)).contiguous()


class StepGraph:
    """One step as a CUDA graph. The past lies in buffers of its own, which the graph itself brings up to date; they hold
    the past of the stream that stepped last, and another stream's is copied in when it comes, that one's out.

    A stream's state may be deep-copied to go on from one point twice, but a shallow copy would share these buffers.
    """

    def __init__(self, advance: Callable, latent: Tensor, past: Past) -> None:
        self.latent, self.past = latent.clone(), _copy(past)
        self.owner: Callable[[], ConvStream | None] = lambda: None

        def step() -> Tensor:
            frames, new = advance(self.latent, self.past, False, None)
            _overwrite(self.past, new)
            return frames

        self.captured = capture(step, latent.device)  # leaves some past or other in the buffers; nobody owns them yet

    def __call__(self, latent: Tensor, past: Past, state: ConvStream) -> tuple[Tensor, Past]:
        if self.owner() is not state or past is not self.past:
            owner = self.owner()
            if owner is not None and owner.past is self.past:
                owner.past = _copy(self.past)
            _overwrite(self.past, past)
            self.owner = weakref.ref(state)
        self.latent.copy_(latent)
        return self.captured.replay().clone(), self.past


def optimised(source: StagedDecoder, options: InferenceOptions, calibration: Sequence[Tensor] = ()) -> FastStaged:
    """The optimised form of ``source``; ``calibration`` would be for 8 bits, which it has not. See :class:`FastStaged`."""
    return FastStaged(source, options)


def _whole(network: StagedDecoder) -> Callable:
    def whole(latent: Tensor) -> Tensor:
        return network(latent).clamp(-1, 1)

    return whole


def _form(past: Past) -> tuple:
    """Shapes of all that is remembered, None where nothing is."""
    return tuple(part.shape if isinstance(part, Tensor) else None for part in tree_leaves(past))


def _copy(past: Past) -> Past:
    return tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, past)


def _overwrite(past: Past, new: Past) -> None:
    for old, now in zip(tree_leaves(past), tree_leaves(new), strict=True):
        if old is not None:
            old.copy_(now)


def _lay_out(network: nn.Module) -> None:
    """Convolutions' weights with channels last, as activations are."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose3d):
            last = torch.channels_last if module.weight.ndim == 4 else torch.channels_last_3d
            module.weight.data = module.weight.data.contiguous(memory_format=last)
