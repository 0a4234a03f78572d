"""From LTX-Video's decoder to its student: the three steps of ``calibrate.py`` for what is different here.

- Norms have no gain: what a norm loses with the dropped channels goes into the convolution behind it.
- Dense convolutions look a frame ahead and separable ones do not: the frame ahead is predicted from those behind.
- A pruned block's shortcut is normalised over channels, then mixed (the released layout): it starts as the linear map
  that, for features of usual length, passes on what the teacher passes on.
- Upsampling turns groups of eight channels into pixels, so groups are kept.

Dump points, by the names of the statistics: in every block ``up2.0.act1`` and ``up2.0.act2`` (what the convolutions read,
behind norm and SiLU), ``out.act`` (what the last one reads); in stages that can be pruned also ``up2.0.hidden`` and
``up2.0.out`` (what the convolutions of a block give), ``up2.1.out`` (what an upsampling gives) and ``up2.0.unit`` (what a
block reads, over its deviation among channels, and that deviation).
"""

import itertools
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.backbones.ltx import LTXDecoder
from decoders.backbones.ltx_layers import Head, ResBlock, Upsample
from decoders.flash_vaed import operators, prune
from decoders.flash_vaed.calibrate import PruneConfig, Selections, Statistics
from decoders.flash_vaed.ltx_student import LTXStudent, entries
from decoders.flash_vaed.prune import LayerRow
from decoders.flash_vaed.statistics import ChannelStatistics
from decoders.layers.causal_conv import DepthwiseSeparableConv3d

PIXELS = 8  # of one group of channels: two frames of two by two


@torch.no_grad()
def gather(
    teacher: LTXDecoder, latents: Iterable[Float[Tensor, "b c n y x"]], positions: int | None = None, seed: int = 0
) -> Statistics:
    """Statistics at every dump point over calibration clips of normalised latents, on the teacher's device.

    ``taps`` has the moments between the taps of a window from two frames before to one after (:func:`window_moments`).

    Raises:
        ValueError: there are no clips, or features are not finite.
    """
    statistics = Statistics()

    def note(name: str, features: Tensor) -> None:
        if name not in statistics:
            statistics[name] = ChannelStatistics(features.shape[1], positions, seed)
        statistics[name].update(features)
        if name not in statistics.taps and "act" in name and features.shape[2] > 1:  # of one clip: they are an average
            statistics.taps[name] = window_moments(features[:1], statistics[name].mean)

    with _dumping(teacher, note):
        for latent in latents:
            teacher(latent)
    if not statistics:
        raise ValueError("no calibration clip was given: pruning needs latents to look at the teacher's features")
    return statistics


@contextmanager
def _dumping(teacher: LTXDecoder, note: Callable[[str, Tensor], None]):
    """Call ``note(dump point, features)`` whenever the teacher passes one."""
    with ExitStack() as hooks:

        def reads(module: nn.Module, name: str, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
            hook = module.register_forward_pre_hook(lambda _, inputs: note(name, change(inputs[0])))
            hooks.callback(hook.remove)

        def gives(module: nn.Module, name: str) -> None:
            hooks.callback(module.register_forward_hook(lambda _, __, y: note(name, y[0])).remove)

        prunable = entries(teacher.config)
        for stage, layers in teacher.stages.items():
            for index, layer in enumerate(layers.layers):
                name = f"{stage}.{index}"
                if isinstance(layer, Head):
                    reads(layer.conv, "out.act")
                if isinstance(layer, ResBlock):
                    reads(layer.conv1, f"{name}.act1")
                    reads(layer.conv2, f"{name}.act2")
                if isinstance(layer, ResBlock) and stage in prunable:
                    reads(layer, f"{name}.unit", lambda x: _unit(x, teacher.config.eps))
                    gives(layer.conv1, f"{name}.hidden")
                if stage in prunable:
                    gives(layer, f"{name}.out")
        yield


def _unit(x: Tensor, eps: float) -> Tensor:
    """Every pixel's channels over their standard deviation, and that deviation as one channel more."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    deviation = (x.var(1, correction=0, keepdim=True) + eps).sqrt()
    return torch.cat([x / deviation, deviation], 1)


def window_moments(features: Float[Tensor, "b c t h w"], mean: Float[Tensor, " c"]) -> Float[Tensor, "n n"]:
    """Second moments, about ``mean``, between the 36 taps of 3x3 pixels in the frames t-2, t-1, t and t+1, averaged over
    channels and positions, in float64; scaled to a mean of 1 on the diagonal. Edge frames are repeated."""
    x = features.detach().double() - mean.to(features.device).double()[:, None, None, None]
    t, h, w = x.shape[2:]
    maps = F.pad(torch.cat([x[:, :, :1]] * 2 + [x, x[:, :, -1:]], 2), (1, 1, 1, 1)).flatten(0, 1)
    starts = list(itertools.product(range(4), range(3), range(3)))
    moments = x.new_zeros(len(starts), len(starts))
    for part in maps.split(max(1, (1 << 22) // (len(starts) * t * h * w))):  # patches of a few at a time: 32 MiB
        patches = torch.stack([part[:, z : z + t, i : i + h, j : j + w].flatten() for z, i, j in starts])
        moments += patches @ patches.T
    scale = moments.diagonal().mean()
    return moments / scale if scale > 0 else torch.eye(len(moments)).to(moments)


def causal(
    dense: nn.Conv3d, moments: Float[Tensor, "n n"] | None = None, mean: Float[Tensor, " i"] | None = None
) -> nn.Conv3d:
    """A 3x3x3 convolution that looks a frame ahead, as the nearest one that sees two frames back, float64.

    The frame ahead is replaced by its linear prediction from the three that are seen, by :func:`window_moments`; its
    deviation from ``mean`` shrinks, and the bias takes up the rest. Without moments it is taken to be the last one again.
    """
    weight, bias = dense.weight.detach().double(), dense.bias.detach().double()
    ahead, zeros = weight[:, :, 2].flatten(2), torch.zeros_like(weight[:, :, :1])
    seen = torch.cat([zeros, weight[:, :, :2]], 2).flatten(2)
    past, image = seen.shape[2], ahead.shape[2]
    if moments is None:
        seen[..., past - image :] += ahead
    else:
        moments = moments.to(weight)
        system = moments[:past, :past] + 1e-6 * torch.eye(past).to(weight)
        seen = seen + ahead @ torch.linalg.solve(system, moments[:past, past:]).T
    if mean is not None:
        bias = bias + (weight.flatten(2).sum(2) - seen.sum(2)) @ mean.to(weight)
    return _convolution(seen.reshape(weight.shape), bias)


def _convolution(weight: Tensor, bias: Tensor) -> nn.Conv3d:
    """A convolution that holds these, for the functions that read one."""
    holder = nn.Conv3d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), device="meta")
    holder.weight, holder.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
    return holder


def choose(student: LTXStudent, teacher: LTXDecoder, statistics: Statistics, config: PruneConfig) -> Selections:
    """Kept channels of every pruned feature map: what both convolutions of a block and the upsampling give.

    Raises:
        ValueError: calibration clips too few for the rank; says how many positions there are.
    """
    selections = {}
    swaps = config.swaps if config.method == "greedy" else 0
    for stage, width in zip(student.config.stages, student.config.widths, strict=True):
        if student.keep.get(stage, 1.0) == 1:
            continue
        for index, layer in enumerate(student.stages[stage].layers):
            for what in ("hidden", "out") if isinstance(layer, ResBlock) else ("out",):
                name = f"{stage}.{index}.{what}"
                selections[name] = prune.select(statistics[name], width, config.method, swaps=swaps, seed=config.seed)
    return selections


class _Kept:
    """What is kept of each feature map, and how those who read it get the rest."""

    def __init__(self, statistics: Statistics, selections: Selections, refit: bool) -> None:
        self.statistics, self.selections, self.refit = statistics, selections, refit

    def rows(self, name: str) -> Tensor | None:
        """Channels of the feature map ``name`` that the student has; None for all."""
        selection = self.selections.get(name)
        return None if selection is None or len(selection.kept) == selection.total else selection.kept

    def gain(self, name: str) -> float:
        """What the length of the vector over channels lost with the dropped ones."""
        rows = self.rows(name)
        return 1.0 if rows is None else prune.rms_gain(self.statistics[name], rows)

    def fill(
        self,
        target: nn.Module,
        dense: nn.Conv3d,
        rows: Tensor | None,
        columns: Tensor | None,
        reads: str,
        gain: float = 1.0,
    ) -> None:
        """``target`` as ``dense`` for these output rows, reading the feature map whose statistics are ``reads`` times
        1 / ``gain``."""
        deep = isinstance(target, DepthwiseSeparableConv3d) and target.depthwise.kernel_size[0] > 1
        moments = self.statistics.taps.get(reads)
        if deep and target.depthwise.causal and not dense.causal:
            dense = causal(dense, moments, self.statistics[reads].mean)
        if columns is not None:  # without a constant, which would not survive padding with zeros
            matrix = _selection(columns, dense.in_channels)
            if self.refit:
                matrix = prune.reconstruction(self.statistics[reads], columns, bias=False)[0]
            operators.init_folded(target, dense, matrix * gain, None, rows)
        elif deep and rows is None:
            taps = target.depthwise.weight[0].numel()
            seen = None if moments is None else moments[:taps, :taps]
            operators.init_depthwise_separable(target, dense, self.statistics[reads], seen)
        else:
            operators.init_sliced(target, dense, rows)


def _selection(columns: Tensor, channels: int) -> Tensor:
    return torch.eye(channels, dtype=torch.float64)[columns]


@torch.no_grad()
def initialise(
    student: LTXStudent, teacher: LTXDecoder, statistics: Statistics, selections: Selections, refit: bool = True
) -> None:
    """Fill the student from its teacher. With nothing pruned and no operator changed it is the teacher, to the bit.

    Raises:
        ValueError: the teacher's layout is not the one that the student was made for.
    """
    layouts = [replace(layout, mean=None, std=None) for layout in (teacher.config, student.layout)]
    if layouts[0] != layouts[1]:
        raise ValueError(f"the teacher's layout {layouts[0]} is not the student's, {layouts[1]}")
    student.latent_mean.copy_(teacher.latent_mean)
    student.latent_std.copy_(teacher.latent_std)
    kept = _Kept(statistics, selections, refit)
    last = ""
    for stage, target in student.stages.items():
        for index, (layer, original) in enumerate(zip(target.layers, teacher.stages[stage].layers, strict=True)):
            name = f"{stage}.{index}"
            if isinstance(layer, ResBlock):
                _block(layer, original, name, last, kept)
            elif isinstance(layer, Upsample):
                _upsample(layer, original, name, last, kept)
            elif isinstance(layer, Head):
                kept.fill(layer.conv, original.conv, None, kept.rows(last), "out.act", kept.gain(last))
                if layer.modulation is not None:
                    layer.modulation.copy_(original.modulation)
            else:
                layer.load_state_dict(original.state_dict())
            last = f"{name}.out"
        rows = kept.rows(last)
        if rows is not None and stage != "out":
            getattr(student, f"kept_{stage}").copy_(rows)
            getattr(student, f"recon_{stage}").copy_(prune.reconstruction(statistics[last], rows, bias=False)[0])


def _block(target: ResBlock, source: ResBlock, name: str, reads: str, kept: _Kept) -> None:
    into, hidden, out = kept.rows(reads), kept.rows(f"{name}.hidden"), kept.rows(f"{name}.out")
    kept.fill(target.conv1, source.conv1, hidden, into, f"{name}.act1", kept.gain(reads))
    kept.fill(target.conv2, source.conv2, out, hidden, f"{name}.act2", kept.gain(f"{name}.hidden"))
    for noise, original, rows in ((target.noise1, source.noise1, hidden), (target.noise2, source.noise2, out)):
        if noise is not None:
            noise.copy_(original if rows is None else original[rows])
    if target.modulation is not None:  # no layout that has it narrows in a block, so none is pruned
        target.modulation.copy_(source.modulation)
    if target.skip is None:
        return
    if source.skip is not None and into is None:
        target.skip_norm.load_state_dict(source.skip_norm.state_dict())
        kept.fill(target.skip, source.skip, out, None, reads)
    else:
        _skip(target, source, kept.statistics[f"{name}.unit"], into, out, kept.refit)


def _skip(
    target: ResBlock, source: ResBlock, unit: ChannelStatistics, into: Tensor | None, out: Tensor | None, refit: bool
) -> None:
    """The shortcut of kept channels to kept channels, through a norm of the kept ones.

    u = x / deviation, in calibration. The student's norm gives the kept channels of u, centred among themselves, over
    their own deviation, which is nearly the same at all pixels. All of u is a linear map of these, by regression; the
    teacher's shortcut is one of u: its norm and convolution, or the input itself, which is u times the mean deviation.
    """
    channels = unit.channels - 1
    into = torch.arange(channels) if into is None else into
    count = len(into)
    everything = torch.eye(channels + 1, dtype=torch.float64)
    some = everything[into]
    both = _mapped(unit, torch.cat([some - some.mean(0), everything[:channels]]))
    matrix, offset = _selection(into, channels), None
    if refit:
        matrix, offset = prune.reconstruction(both, torch.arange(count))
        matrix, offset = matrix[:, count:], offset[count:]
    matrix = matrix * both.mean_square[:count].mean().sqrt()
    eye = everything[:channels, :channels]
    if source.skip is None:
        weight, bias = eye * unit.mean[channels].cpu(), torch.zeros(channels, dtype=torch.float64)
    else:
        mix, norm = source.skip.weight.detach().double().cpu().flatten(1), source.skip_norm
        gain, shift = norm.weight.detach().double().cpu(), norm.bias.detach().double().cpu()
        weight = (mix * gain) @ (eye - 1 / channels)
        bias = mix @ shift + source.skip.bias.detach().double().cpu()
    nn.init.ones_(target.skip_norm.weight)
    nn.init.zeros_(target.skip_norm.bias)
    operators.init_folded(target.skip, _convolution(weight[:, :, None, None, None], bias), matrix, offset, out)


def _mapped(statistics: ChannelStatistics, matrix: Tensor) -> ChannelStatistics:
    """Statistics of ``matrix`` @ features."""
    mapped = ChannelStatistics(len(matrix))
    mapped.count, mapped.mean = statistics.count, matrix @ statistics.mean.cpu()
    mapped.gram = matrix @ statistics.gram.cpu() @ matrix.T
    return mapped


def _upsample(target: Upsample, source: Upsample, name: str, reads: str, kept: _Kept) -> None:
    columns, rows = kept.rows(reads), kept.rows(f"{name}.out")
    if columns is None and rows is None:
        target.load_state_dict(source.state_dict())
        return
    if rows is not None:
        rows = (rows[:, None] * PIXELS + torch.arange(PIXELS)).flatten()
    dense = source.conv
    if source.repeats:  # the shortcut's repetition of channels does not survive: the convolution makes up for it
        dense = _convolution(dense.weight.detach() + _repetition(source), dense.bias.detach())
    kept.fill(target.conv, dense, rows, columns, reads)
    if target.repeats:
        target.conv.weight.sub_(_repetition(target))


def _repetition(up: Upsample) -> Tensor:
    """The parameter-free shortcut as a convolution's weight: a channel's pixels are those of the group that it repeats."""
    weight = torch.zeros_like(up.conv.weight)
    rows = torch.arange(len(weight))
    columns = (rows // PIXELS % (weight.shape[1] // PIXELS)) * PIXELS + rows % PIXELS
    weight[rows, columns, 2 if up.conv.causal else 1, 1, 1] = 1
    return weight


def pruning_report(student: LTXStudent, teacher: LTXDecoder, selections: Selections) -> str:
    """One row per pruned feature map: kept channels, R^2, parameters and operations of what makes it, predicted share."""
    rows, positions = [], 1  # of the features, for one latent position
    for stage, layers in student.stages.items():
        for index, layer in enumerate(layers.layers):
            for what in ("hidden", "out"):
                selection = selections.get(f"{stage}.{index}.{what}")
                if selection is None:
                    continue
                halves = [_makers(half.stages[stage].layers[index], what) for half in (teacher, student)]
                count = [sum(p.numel() for module in half for p in module.parameters()) for half in halves]
                flops = [
                    2.0 * positions * sum(p.numel() for module in half for p in module.parameters() if p.ndim > 1)
                    for half in halves
                ]
                rows.append(
                    LayerRow(
                        f"{stage}.{index}.{what}", len(selection.kept), selection.total, selection.r2, *count, *flops
                    )
                )
            if isinstance(layer, Upsample):
                positions *= PIXELS
    return prune.report(rows) if rows else "all channels are kept"


def _makers(layer: nn.Module, what: str) -> list[nn.Module]:
    """The modules that make what a layer gives, or hides."""
    if isinstance(layer, Upsample):
        return [layer.conv]
    made = [layer.conv1] if what == "hidden" else [layer.conv2, layer.skip_norm, layer.skip]
    return [module for module in made if module is not None]
