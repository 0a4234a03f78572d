"""A Wan autoencoder that starts as a good linear codec, computed, instead of as noise.

All residual branches are silenced, which leaves a cascade of convolutions. The encoder's make packets of Haar's kind, in
space and in time, and keep those of largest variance under a separable AR(1) model of video; the decoder's put them back.
Their taps in space are fitted to the model together (``linear_fit.py``), so that packets overlap. The heads (norm, SiLU,
convolution) are made linear by large constant channels, which fix the norm, and by pairs: silu(u) - silu(-u) = u.

``skeleton`` runs a module without its residual branches, some eight times as fast. To train that first gives the best
linear codec of this layout, before the branches learn what no linear map can do.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from decoders.backbones.wan import WanConfig, WanDecoder, WanEncoder
from decoders.backbones.wan_layers import FrameAttention, ResBlock
from decoders.baseline.linear_fit import fit
from decoders.latent_spaces.dct import MEAN, OPPONENT
from decoders.layers.causal_conv import Past

RHO_SPACE, RHO_TIME = 0.95, 0.9  # correlation of neighbouring pixels and frames
CONSTANT = 60.0  # of the channels that fix the norm; signals are about 1
LOG_VARIANCE = -10.0  # of the posterior at the start: next to no noise
SPREAD = 0.5  # of the random features in channels that the linear codec leaves free, relative to the layer's own draw

Signs = tuple[int, ...]


@dataclass(frozen=True)
class Band:
    """A Haar packet: one opponent colour times a pattern of signs along frames, rows and columns."""

    colour: int
    t: Signs = (1,)
    h: Signs = (1,)
    w: Signs = (1,)

    @property
    def variance(self) -> float:
        """Of its value in video of the model: patterns are averages in time and orthonormal in space."""
        space = _gain(self.h, RHO_SPACE) * len(self.h) * _gain(self.w, RHO_SPACE) * len(self.w)
        return MEAN[self.colour] ** 2 * _gain(self.t, RHO_TIME) * space

    def finer(self, axis: str, sign: int) -> "Band":
        """The packet of twice the length along ``axis``: the pattern, then ``sign`` times the pattern."""
        pattern = getattr(self, axis)
        return Band(**{**self.__dict__, axis: pattern + tuple(sign * s for s in pattern)})


def _gain(signs: Signs, rho: float) -> float:
    """Variance of the mean of a unit AR(1) process under these signs."""
    n = len(signs)
    return sum(a * b * rho ** abs(i - j) for i, a in enumerate(signs) for j, b in enumerate(signs)) / n**2


@dataclass(frozen=True)
class Reduction:
    """One Downsample as a table: what its output channels are, and of which input channels they are made."""

    spatial: list[tuple[int, int, int]]  # per output channel: input channel, sign along rows, along columns
    temporal: list[tuple[int, int]] | None  # per output channel: input channel of the time convolution, sign
    bands: list[tuple[Band, Band]]  # per output channel: of the first frame, of the later ones


def plan(config: WanConfig) -> list[Reduction]:
    """Which packets every reduction keeps, strongest in images first.

    The first frame skips the time convolutions: its channels mean something else than the later frames'. The last
    reduction is arranged so that the latents are the first ``channels`` channels for both.

    Raises:
        ValueError: the layout has shortcuts or a patch, or changes its width where the linear codec cannot follow.
    """
    if config.residual or config.patch > 1:
        raise ValueError("the linear start is written for Wan 2.1's layout: no residual shortcuts, patch 1")
    if config.encoder_dim not in (None, config.dim) or len(config.dim_mult) < 2:
        raise ValueError("the linear start needs encoder and decoder of one width and at least one reduction")
    if config.dim_mult[-1] != config.dim_mult[-2] or config.dim_mult[1] != 2 * config.dim_mult[0]:
        raise ValueError(f"dim_mult={list(config.dim_mult)}: the linear start needs [a, 2a, ..., z, z]")
    bands = [(Band(colour),) * 2 for colour in range(3)]
    reductions = []
    for number, halved in enumerate(config.temporal):
        last = number == len(config.temporal) - 1
        width = config.dim * config.dim_mult[number]
        room = (width - 1) // 2 if last else width - max(1, width // 16)
        if last and room < config.channels:
            raise ValueError(f"dim={config.dim} has room for {room} packets, fewer than {config.channels} channels")
        reductions.append(_reduce(bands, room, halved, config.channels if last else 0))
        bands = reductions[-1].bands
    return reductions


def _reduce(bands: list[tuple[Band, Band]], room: int, halved: bool, channels: int) -> Reduction:
    split = [
        (source, p, q, *(band.finer("h", p).finer("w", q) for band in pair))
        for (source, pair), p, q in product(enumerate(bands), (1, -1), (1, -1))
    ]
    by_image = sorted(split, key=lambda s: -s[3].variance)
    still = [s for s in by_image if min(s[4].t) > 0][:channels]  # the latents of the first frame
    rest = [s for s in sorted(split, key=lambda s: -s[4].variance) if s not in still]
    kept = still + sorted(rest[: max(0, room - len(still))], key=lambda s: -s[3].variance)
    kept = kept[:room]
    spatial = [s[:3] for s in kept]
    now = [s[3:] for s in kept]
    if not halved:
        return Reduction(spatial, None, now)
    temporal = _pair_frames([later for _, later in now], channels)
    later = [now[source][1].finer("t", sign) for source, sign in temporal]
    return Reduction(spatial, temporal, [(first, band) for (first, _), band in zip(now, later, strict=True)])


def _pair_frames(bands: Sequence[Band], channels: int) -> list[tuple[int, int]]:
    """Means and differences of frame pairs, as many as ``bands``; the best ``channels`` of them come first.

    A mean stays in the channel of what it averages, so that it means the same as in the first frame.
    """
    made = sorted(product(range(len(bands)), (1, -1)), key=lambda m: -bands[m[0]].finer("t", m[1]).variance)
    places: list[tuple[int, int] | None] = [None] * len(bands)
    for chosen, where in ((made[:channels], range(channels)), (made[: len(bands)], range(len(bands)))):
        new = [m for m in chosen if m not in places]
        for source, sign in new:
            if sign > 0 and source in where and places[source] is None:
                places[source] = (source, sign)
        free = [place for place in where if places[place] is None]
        for place, m in zip(free, [m for m in new if m not in places], strict=False):
            places[place] = m
    return places


# ---- weights


@torch.no_grad()
def linear_start(encoder: WanEncoder, decoder: WanDecoder, iterations: int = 500) -> None:
    """Overwrite the weights of both; what the linear codec leaves free keeps part of its random draw.

    ``iterations`` of the fit: 500 take half a minute on two CPU cores at base width 24.

    Raises:
        ValueError: this layout cannot start so, see ``plan``.
    """
    reductions = plan(encoder.config)
    for module in (*encoder.modules(), *decoder.modules()):
        if isinstance(module, ResBlock):
            _zero(module.conv2)
        elif isinstance(module, FrameAttention):
            _zero(module.proj)
    scale = [later.variance**0.5 for _, later in reductions[-1].bands[: encoder.config.channels]]
    kept = encoder.config.channels
    still = sum(min(later.t) > 0 for _, later in reductions[-1].bands[:kept])
    carried = [[min(later.t) > 0 for _, later in reduction.bands] for reduction in reductions]
    down, up = fit([r.spatial for r in reductions], carried, kept, still, [m**2 for m in MEAN], RHO_SPACE, iterations)
    _start_encoder(encoder, reductions, scale, down)
    _start_decoder(decoder, reductions, scale, up)


def _start_encoder(encoder: WanEncoder, reductions: list[Reduction], scale: list[float], kernels: list[Tensor]) -> None:
    stages, config = encoder.stages, encoder.config
    colour = torch.tensor(OPPONENT)
    _fill(
        stages["conv_in"].layers[0], (colour / colour.norm(dim=1, keepdim=True)).unflatten(1, (3, 1, 1, 1)), (-1, 1, 1)
    )
    used = 3
    meant, finer = _meanings(reductions)
    for number, reduction in enumerate(reductions):
        *blocks, down = stages[f"down{number}"].layers
        _pass_through(blocks, used)
        taps = torch.zeros(len(reduction.spatial), used, 3, 3)
        _place(taps.transpose(0, 1), kernels[number].transpose(0, 1), meant[number + 1], finer[number])
        used = len(reduction.spatial)
        paired = number == len(reductions) - 1
        _fill(down.conv, taps, (slice(None), slice(None)), paired)
        if reduction.temporal is not None:
            taps = torch.zeros(used, used, 2, 1, 1)
            for place, (source, sign) in enumerate(reduction.temporal):
                taps[place, source, :, 0, 0] = torch.tensor([1, sign]) / 2
            _fill(down.time_conv, taps, (slice(1, 3), 0, 0), paired)
    head, quant = stages["out"].layers
    _linear_norm(head.norm, used)
    _level_norms((*stages[f"down{len(reductions)}"].layers, *stages["mid"].layers), used)
    _read_pairs(head.conv, torch.eye(used)[: config.channels] / torch.tensor(scale)[:, None], used)
    _zero(quant)
    quant.weight[:, :, 0, 0, 0] = torch.eye(2 * config.channels)
    quant.bias[config.channels :] = LOG_VARIANCE
    head.conv.weight[config.channels :] = 0
    head.conv.bias[config.channels :] = 0


def _start_decoder(decoder: WanDecoder, reductions: list[Reduction], scale: list[float], kernels: list[Tensor]) -> None:
    stages, used = decoder.stages, decoder.config.channels
    first, conv_in = stages["conv_in"].layers
    _fill(first, torch.eye(used).view(used, used, 1, 1, 1), (0, 0, 0))
    _fill(conv_in, torch.diag(torch.tensor(scale)).view(used, used, 1, 1, 1), (-1, 1, 1))
    meant, finer = (bands[::-1] for bands in _meanings(reductions))
    for number, (reduction, kernel) in enumerate(zip(reversed(reductions), kernels, strict=True)):
        *blocks, up = stages[f"up{number}"].layers
        _pass_through(blocks, used)
        if reduction.temporal is not None:
            before = len(reduction.temporal)
            taps = torch.zeros(2, before, used, 1, 1, 1)
            for place, (source, sign) in enumerate(reduction.temporal[:used]):
                taps[0, source, place], taps[1, source, place] = 1, sign
            _fill(up.time_conv, taps, (-1, 0, 0))
            used = before
        before = len(finer[number + 1])
        taps = torch.zeros(before, used, 3, 3)
        last = number == len(reductions) - 1
        _place(taps, kernel, meant[number], finer[number + 1])
        if last:
            colour = torch.tensor(OPPONENT)
            taps = torch.einsum("ck,cuhw->kuhw", colour / colour.norm(dim=1, keepdim=True), taps)
        _fill(up.conv, taps, (slice(None), slice(None)), paired=last)
        used = before
    stage = stages[f"up{len(reductions)}"].layers
    head = stages["out"].layers[0]
    _linear_norm(head.norm, (len(head.norm.gain) - 1) // 2)
    _level_norms(stage, (len(head.norm.gain) - 1) // 2)
    _read_pairs(head.conv, torch.eye(3, (len(head.norm.gain) - 1) // 2), (len(head.norm.gain) - 1) // 2)


def _meanings(reductions: list[Reduction]) -> tuple[list[list[Band]], list[list[Band]]]:
    """Of later frames, by channel: before the first reduction and after every one's convolution in space; and the same
    after its pairing of frames."""
    bands = [Band(colour) for colour in range(3)]
    meant, paired = [bands], [bands]
    for reduction in reductions:
        meant.append([bands[source].finer("h", p).finer("w", q) for source, p, q in reduction.spatial])
        bands = [later for _, later in reduction.bands]
        paired.append(bands)
    return meant, paired


def _place(taps: Tensor, kernel: Tensor, inputs: list[Band], outputs: list[Band]) -> None:
    """Write the fitted taps of still packets; a packet that changes in time gets those of its still twin."""
    twin = {}
    for place, band in enumerate(outputs):
        twin.setdefault((band.colour, band.t, band.h, band.w), place)
    still = {(b.colour, b.h, b.w): place for place, b in enumerate(inputs) if min(b.t) > 0}  # of the coarse side
    for place, band in enumerate(inputs[: taps.shape[1]]):
        if min(band.t) > 0:
            taps[:, place] = kernel[:, place]
            continue
        source = still.get((band.colour, band.h, band.w))
        if source is None:
            continue
        for other, wanted in enumerate(outputs):
            if min(wanted.t) > 0:
                there = twin.get((wanted.colour, band.t, wanted.h, wanted.w))
                if there is not None:
                    taps[there, place] = kernel[other, source]


def _zero(conv: nn.Module) -> None:
    conv.weight.zero_()
    conv.bias.zero_()


def _fill(conv: nn.Module, taps: Tensor, where: tuple, paired: bool = False) -> None:
    """Write ``taps`` "[k] o i ..." at the kernel positions ``where``; rows of unused outputs stay random, fewer loud.

    With ``paired`` every output u has a -u, (width - 1) // 2 of them in all; what is left of the channels is constant.
    ``k`` counts the frames that a time convolution makes, each in a block of its own.
    """
    groups = taps if taps.ndim == conv.weight.ndim + 1 else taps.unsqueeze(0)
    width = conv.out_channels // len(groups)
    conv.weight[:, groups.shape[2] :] = 0
    conv.weight.mul_(SPREAD)
    conv.bias.normal_(std=SPREAD)  # on free channels, so that no norm over channels is ever near 0, where it is steep
    for block, bias, rows in zip(conv.weight.split(width), conv.bias.split(width), groups, strict=True):
        block[: len(rows)] = 0
        bias[: len(rows)] = 0
        block[(slice(0, len(rows)), slice(0, rows.shape[1]), *_aligned(where))] = rows.reshape(
            block[(slice(0, len(rows)), slice(0, rows.shape[1]), *_aligned(where))].shape
        )
        if paired:
            pairs = (width - 1) // 2
            block[pairs : 2 * pairs] = -block[:pairs]
            bias[pairs : 2 * pairs] = -bias[:pairs]
            block[2 * pairs :] = 0
            bias[2 * pairs :] = CONSTANT


def _aligned(where: tuple) -> tuple:
    """Indices as slices, so that all axes stay."""
    return tuple(index if isinstance(index, slice) else slice(index, index + 1 or None) for index in where)


def _pass_through(blocks: Iterable[nn.Module], used: int) -> None:
    """Shortcut convolutions, where widths differ, hand on what they get."""
    for block in blocks:
        if isinstance(block, ResBlock) and block.skip is not None:
            _fill(block.skip, torch.eye(used).view(used, used, 1, 1, 1), (0, 0, 0))


def _linear_norm(norm: nn.Module, pairs: int) -> None:
    """The norm divides by the constant channels' length, its gain multiplies by it: signals come out as they went in."""
    width = len(norm.gain)
    constants = width - 2 * pairs
    norm.gain[: 2 * pairs] = CONSTANT * (constants / width) ** 0.5
    norm.gain[2 * pairs :] = 0.1


def _level_norms(layers: Iterable[nn.Module], pairs: int) -> None:
    """Branches beside a paired stream should hear its signals, not its constant."""
    for layer in layers:
        for norm in (getattr(layer, "norm1", None), getattr(layer, "norm", None)):
            if norm is not None:
                _linear_norm(norm, pairs)


def _read_pairs(conv: nn.Module, rows: Tensor, pairs: int) -> None:
    """A head's convolution at its centre: ``rows`` of u, from silu(u) and silu(-u)."""
    _zero(conv)
    conv.weight[: len(rows), :pairs, -1, 1, 1] = rows
    conv.weight[: len(rows), pairs : 2 * pairs, -1, 1, 1] = -rows


# ---- the linear path alone


@contextmanager
def skeleton(*modules: nn.Module) -> Iterator[None]:
    """Within the context the modules run without residual branches: blocks hand on their input or its shortcut."""
    blocks = shortcuts_only(*modules)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def shortcuts_only(*modules: nn.Module) -> list[nn.Module]:
    """The same for good. Returns the blocks that lost their branches; deleting their ``forward`` brings those back."""
    blocks = [m for module in modules for m in module.modules() if isinstance(m, ResBlock | FrameAttention)]
    for block in blocks:
        block.forward = partial(_shortcut, block)  # on the instance, where nn.Module looks first
    return blocks


def branch_widths(module: nn.Module) -> dict[str, int]:
    """Parameters of residual branches, of blocks and attention but not of their shortcuts, each with its block's width."""
    return {
        f"{where}.{name}": block.norm2.gain.numel() if isinstance(block, ResBlock) else block.norm.gain.numel()
        for where, block in module.named_modules()
        if isinstance(block, ResBlock | FrameAttention)
        for name, _ in block.named_parameters()
        if not name.startswith("skip.")
    }


def _shortcut(block: nn.Module, x: Tensor, past: Past = None, first: bool = False) -> tuple[Tensor, Past]:
    skip = getattr(block, "skip", None)
    return (x if skip is None else skip(x)[0]), None
