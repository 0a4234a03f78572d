"""What a process holds in training whatever the size of its clips: weights, gradients, Adam's moments, average (EMA).

With DDP, or one process, that is all of them. With FSDP2 (``trainer.strategy=fsdp``) it is a slice of each, and besides, whole, what
is gathered at a time: the root's own weights and gradients, and those of two blocks, the one at work and its neighbour that
is on its way (``decoders/sharding.py``).
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from experiments.config import Experiment
from experiments.schema import TrainerConfig
from experiments.strategy import check_sharding, num_processes, slices

GIB = 2**30


@dataclass(frozen=True)
class States:
    """GiB that a process holds; how many of them are whole gradients of the network, which a count of a step's tensors
    (:func:`experiments.show.fake_steps`) has too; and both for the reader: the strategy, and the sum."""

    gib: float
    gradients_gib: float
    strategy: str
    formula: str


def states(experiment: Experiment, decoder: Any) -> States:
    """Of a process of this experiment. ``decoder`` may be without memory.

    Raises ConfigError where its weights cannot be sharded and ``trainer.strategy=fsdp`` wants it.
    """
    trained = [parameter for _, parameter in decoder.trainable()]
    averaged = list(decoder.inference_parameters().values()) if experiment.ema else []
    formula = f"(4 weight + 4 gradient + 8 Adam) B x {_millions(trained)}"
    formula += f" + 4 B EMA x {_millions(averaged)}" if averaged else ""
    t = experiment.trainer
    if t.strategy != "fsdp":
        held = 16 * _numel(trained) + 4 * _numel(averaged)
        gradients = 4 * _numel([p for p in decoder.model.parameters() if p.requires_grad])
        return States(held / GIB, gradients / GIB, _plain(t), formula)
    check_sharding(decoder, num_processes(t), t.shard_group)
    parts, units = slices(t), decoder.shard_units()
    held = 16 * sum(_slice(p, parts) for p in trained) + 4 * sum(_slice(p, parts) for p in averaged)
    roots = [child for child in decoder.children() if any(p.requires_grad for p in child.parameters())]
    inside = {id(p) for unit in units for p in unit.parameters()}
    rest = [p for root in roots for p in root.parameters() if id(p) not in inside]
    largest = max((_numel(unit.parameters()) for unit in units), default=0)
    gradients = [p for p in rest if p.requires_grad]
    own = {id(p) for p in decoder.model.parameters()}
    whole = 4 * _numel(rest) + 4 * _numel(gradients) + 16 * largest
    formula = f"1/{parts} of every tensor, rounded up to rows, of {formula}: {held / GIB:.2f} GiB;\n    and whole: "
    formula += f"(4 weight + 4 gradient) B x {_millions(rest)} for all of a step"
    formula += f" + 2 blocks x 8 B x {largest / 1e6:.1f} M in turn" if units else ""
    return States(
        (held + whole) / GIB,
        4 * _numel([p for p in gradients if id(p) in own]) / GIB,
        f"trainer.strategy=fsdp, spread over {parts} of {_processes(num_processes(t))}",
        formula,
    )


def sharded_units(experiment: Experiment, decoder: Any) -> list[nn.Module]:
    """The modules whose gradients leave a process as soon as they are complete; none but with FSDP2."""
    return decoder.shard_units() if experiment.trainer.strategy == "fsdp" else []


def _plain(t: TrainerConfig) -> str:
    if num_processes(t) == 1:
        return f"trainer.strategy={t.strategy}, one process that holds everything"
    return f"trainer.strategy={t.strategy} (DDP), each of {_processes(num_processes(t))} with everything"


def _processes(number: int) -> str:
    return f"{number} process{'' if number == 1 else 'es'}"


def _slice(tensor: Tensor, parts: int) -> int:
    """Numbers in the largest slice: FSDP2 deals out whole rows."""
    rows = tensor.shape[0] if tensor.dim() else 1
    return math.ceil(rows / parts) * (tensor.numel() // rows) if rows else 0


def _numel(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _millions(tensors: list[Tensor]) -> str:
    return f"{_numel(tensors) / 1e6:.1f} M"
