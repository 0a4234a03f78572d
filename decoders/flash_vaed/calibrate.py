"""From a Wan teacher to its student: what the teacher's features are like, which channels stay, what the student starts as.

Three steps, each of which can be looked at by itself:

1. :func:`gather` runs the teacher over calibration latents and keeps statistics of its features at the dump points.
2. :func:`choose` selects the channels of every pruned feature map.
3. :func:`initialise` fills the student: rows of kept channels, columns that read dropped channels through their
   reconstruction from kept ones, dense convolutions as the nearest operator that the stage has.

Dump points, by the names of the statistics: ``up2`` (what the stage reads), ``up2.0.hidden`` and ``up2.0.out`` (what the
first and the second convolution of its first block give), ``up2.0.act1`` and ``up2.0.act2`` (what they read, behind norm
and SiLU) and ``out.act`` (what the last convolution reads). The stage before gives what ``up2`` names.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.backbones.wan import WanDecoder
from decoders.backbones.wan_layers import ChannelNorm, ResBlock, Upsample
from decoders.flash_vaed import operators, prune
from decoders.flash_vaed.prune import LayerRow, Selection
from decoders.flash_vaed.statistics import ChannelStatistics
from decoders.flash_vaed.wan_student import ProjectedUp, WanStudent
from decoders.layers.causal_conv import DepthwiseSeparableConv3d

Selections = dict[str, Selection]


class Statistics(dict[str, ChannelStatistics]):
    """Statistics by dump point; ``taps`` has, for what a 3x3x3 convolution reads, the moments between its taps."""

    def __init__(self) -> None:
        super().__init__()
        self.taps: dict[str, Tensor] = {}


@dataclass
class PruneConfig:
    """How channels are chosen and weights re-fitted."""

    method: Literal["greedy", "qr", "magnitude", "chip", "random"] = "greedy"
    refit: bool = True  # dropped inputs are read through their reconstruction; false: they are left out
    swaps: int = 3  # greedy: passes that exchange single channels for better ones, ours; 0: plain
    num_clips: int = 16  # calibration clips, over all processes
    positions: int | None = 20000  # of every feature map and clip, spread evenly; null: all
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_clips < 1:
            raise ValueError(f"prune.num_clips={self.num_clips} must be 1 or more")


@torch.no_grad()
def gather(
    teacher: WanDecoder, latents: Iterable[Float[Tensor, "b c n y x"]], positions: int | None = None, seed: int = 0
) -> Statistics:
    """Statistics at every dump point over calibration clips of normalised latents, on the teacher's device.

    Raises:
        ValueError: there are no clips, or features are not finite.
    """
    statistics = Statistics()

    def note(name: str, features: Tensor) -> None:
        if name not in statistics:
            statistics[name] = ChannelStatistics(features.shape[1], positions, seed)
        statistics[name].update(features)
        if name not in statistics.taps and "act" in name and features.shape[2] > 1:  # of one clip: they are an average
            statistics.taps[name] = operators.tap_moments(features[:1], mean=statistics[name].mean)

    with _dumping(teacher, note):
        for latent in latents:
            teacher(latent)
    if not statistics:
        raise ValueError("no calibration clip was given: pruning needs latents to look at the teacher's features")
    return statistics


@contextmanager
def _dumping(teacher: WanDecoder, note: Callable[[str, Tensor], None]):
    """Call ``note(dump point, features)`` whenever the teacher passes one."""
    with ExitStack() as hooks:

        def on(module: nn.Module, hook: Callable) -> None:
            hooks.callback(module.register_forward_hook(hook).remove)

        for stage, layers in teacher.stages.items():
            if not stage.startswith("up") and stage != "mid":
                continue
            hooks.callback(
                layers.register_forward_pre_hook(lambda _, inputs, stage=stage: note(stage, inputs[0])).remove
            )
            for index, block in _blocks(layers):
                name = f"{stage}.{index}"
                on(block.norm1, lambda _, __, y, name=name: note(f"{name}.act1", F.silu(y)))
                on(block.conv1, lambda _, __, y, name=name: note(f"{name}.hidden", y[0]))
                on(block.norm2, lambda _, __, y, name=name: note(f"{name}.act2", F.silu(y)))
                on(block, lambda _, __, y, name=name: note(f"{name}.out", y[0]))
        on(teacher.stages["out"].layers[0].norm, lambda _, __, y: note("out.act", F.silu(y)))
        yield


def _blocks(stage: nn.Module) -> list[tuple[int, ResBlock]]:
    return [(index, layer) for index, layer in enumerate(stage.layers) if isinstance(layer, ResBlock)]


def choose(student: WanStudent, teacher: WanDecoder, statistics: Statistics, config: PruneConfig) -> Selections:
    """Kept channels of every pruned feature map: what each pruned stage reads, and both convolutions of its blocks.

    Raises:
        ValueError: calibration clips too few for the rank; says how many positions there are.
    """
    selections = {}
    for stage in (name for name, share in student.keep.items() if share < 1):
        widths = {stage: student.stages[stage].layers[0].norm1.gain.shape[0]}
        for index, block in _blocks(student.stages[stage]):
            widths |= {f"{stage}.{index}.{what}": block.norm2.gain.shape[0] for what in ("hidden", "out")}
        for name, width in widths.items():
            swaps = config.swaps if config.method == "greedy" else 0
            selections[name] = prune.select(statistics[name], width, config.method, swaps=swaps, seed=config.seed)
    return selections


class _Kept:
    """What is kept of each feature map, and how those who read it get the rest."""

    def __init__(self, statistics: Statistics, selections: Selections, refit: bool) -> None:
        self.statistics, self.selections, self.refit = statistics, selections, refit

    def rows(self, name: str | None) -> Tensor | None:
        """Channels of the feature map ``name`` that the student has; None for all."""
        selection = self.selections.get(name)
        return None if selection is None or len(selection.kept) == selection.total else selection.kept

    def fill(
        self, target: nn.Module, dense: nn.Module, rows: Tensor | None, columns: Tensor | None, reads: str
    ) -> None:
        """``target`` as ``dense`` for these output rows, reading the feature map whose statistics are ``reads``."""
        if columns is None:
            if rows is None and isinstance(target, DepthwiseSeparableConv3d) and target.depthwise.kernel_size[0] > 1:
                taps = self.statistics.taps.get(reads)
                operators.init_depthwise_separable(target, dense, self.statistics[reads], taps)
            else:
                operators.init_sliced(target, dense, rows)
        elif self.refit:
            padded = any(size > 1 for size in dense.kernel_size)  # a constant would not survive padding with zeros
            matrix, offset = prune.reconstruction(self.statistics[reads], columns, bias=not padded)
            operators.init_folded(target, dense, matrix, offset, rows)
        else:
            operators.init_sliced(target, dense, rows, columns)

    @torch.no_grad()
    def norm(self, target: ChannelNorm, source: ChannelNorm, name: str) -> None:
        """Gains of the kept channels, times what the length of the vector over channels lost with the others."""
        rows = self.rows(name)
        gain = source.gain if rows is None else source.gain[rows] * prune.rms_gain(self.statistics[name], rows)
        target.gain.copy_(gain)


def initialise(
    student: WanStudent, teacher: WanDecoder, statistics: Statistics, selections: Selections, refit: bool = True
) -> None:
    """Fill the student from its teacher. With nothing pruned and no operator changed it is the teacher, to the bit.

    Raises:
        ValueError: the teacher's layout is not the one that the student was made for.
    """
    if teacher.config != student.layout:
        raise ValueError(f"the teacher's layout {teacher.config} is not the student's, {student.layout}")
    kept = _Kept(statistics, selections, refit)
    names = list(student.stages)
    last = ""
    for stage, after in zip(names, [*names[1:], None], strict=True):
        target, source = student.stages[stage], teacher.stages[stage]
        if stage == "out":
            kept.norm(target.layers[0].norm, source.layers[0].norm, last)
            kept.fill(target.layers[0].conv, source.layers[0].conv, None, kept.rows(last), "out.act")
            continue
        last = stage
        for index, (layer, original) in enumerate(zip(target.layers, source.layers, strict=True)):
            if isinstance(layer, ResBlock):
                _block(layer, original, f"{stage}.{index}", last, kept)
                last = f"{stage}.{index}.out"
            elif isinstance(layer, Upsample):
                _upsample(layer, original, kept, last, after)
            else:
                layer.load_state_dict(original.state_dict())
        if isinstance(target, ProjectedUp):
            _shortcut(target, source, kept, stage, after)
        if stage.startswith("up"):
            gives = after if isinstance(target.layers[-1], Upsample) else last
            rows = kept.rows(gives)
            if rows is not None:
                getattr(student, f"kept_{stage}").copy_(rows)
                getattr(student, f"recon_{stage}").copy_(prune.reconstruction(statistics[gives], rows, bias=False)[0])


def _block(target: ResBlock, source: ResBlock, name: str, reads: str, kept: _Kept) -> None:
    into, hidden, out = kept.rows(reads), kept.rows(f"{name}.hidden"), kept.rows(f"{name}.out")
    kept.norm(target.norm1, source.norm1, reads)
    kept.fill(target.conv1, source.conv1, hidden, into, f"{name}.act1")
    kept.norm(target.norm2, source.norm2, f"{name}.hidden")
    kept.fill(target.conv2, source.conv2, out, hidden, f"{name}.act2")
    if target.skip is None:
        return
    skip = source.skip
    if skip is None:  # the teacher passes the input on as it is
        channels = source.norm1.gain.shape[0]
        skip = nn.Conv3d(channels, channels, 1, bias=False)
        nn.init.dirac_(skip.weight)
    kept.fill(target.skip, skip, out, into, reads)


def _upsample(target: Upsample, source: Upsample, kept: _Kept, reads: str, after: str | None) -> None:
    columns = kept.rows(reads)
    if target.time_conv is not None:  # two frames per frame: kept channels of the first, then of the second
        width = source.conv.in_channels
        both = None if columns is None else torch.cat([columns, columns + width])
        kept.fill(target.time_conv, source.time_conv, both, columns, reads)
    kept.fill(target.conv, source.conv, kept.rows(after), columns, reads)


def _shortcut(target: ProjectedUp, source: nn.Module, kept: _Kept, reads: str, after: str | None) -> None:
    """The repetition of channels as a matrix, rows (c k p q), for kept outputs and inputs."""
    per_channel = target.frames * 4
    inputs = source.layers[0].norm1.gain.shape[0]
    outputs = source.layers[-1].conv.out_channels
    dense = nn.Conv3d(inputs, outputs * per_channel, 1, bias=False)
    with torch.no_grad():
        dense.weight.zero_()
        dense.weight[torch.arange(outputs * per_channel), torch.arange(outputs * per_channel) // source.repeats] = 1
    rows = kept.rows(after)
    if rows is not None:
        rows = (rows[:, None] * per_channel + torch.arange(per_channel)).flatten()
    kept.fill(target.shortcut, dense, rows, kept.rows(reads), reads)


def pruning_report(student: WanStudent, teacher: WanDecoder, selections: Selections) -> str:
    """One row per pruned feature map: kept channels, R^2, parameters and operations of what makes it, predicted share."""
    if not selections:
        return "all channels are kept"
    rows = []
    scale = dict.fromkeys(student.stages, 1)
    size = 1
    for stage in student.stages:  # positions of each stage's features, for one latent position
        scale[stage] = size
        if isinstance(student.stages[stage].layers[-1], Upsample):
            up = student.stages[stage].layers[-1]
            size *= 4 * (2 if up.time_conv is not None else 1)
    for name, selection in selections.items():
        stage, *where = name.split(".")
        if not where:  # made by the stage before
            stage = list(student.stages)[list(student.stages).index(stage) - 1]
            new, old = (half.stages[stage].layers[-1].conv for half in (student, teacher))
            positions = scale[stage] * 4 * (2 if student.stages[stage].layers[-1].time_conv is not None else 1)
        else:
            kind = "conv1" if where[1] == "hidden" else "conv2"
            new, old = (getattr(half.stages[stage].layers[int(where[0])], kind) for half in (student, teacher))
            positions = scale[stage]
        count = [sum(p.numel() for p in module.parameters()) for module in (old, new)]
        weights = [sum(p.numel() for p in module.parameters() if p.ndim > 1) for module in (old, new)]
        rows.append(
            LayerRow(
                name, len(selection.kept), selection.total, selection.r2, count[0], count[1],
                2.0 * weights[0] * positions, 2.0 * weights[1] * positions,
            )
        )  # fmt: skip
    return prune.report(rows)
