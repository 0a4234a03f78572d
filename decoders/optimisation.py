"""One AdamW over named parameter groups, with a rate and a largest gradient norm of their own."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from decoders.sharding import whole
from decoders.training import OptimConfig


class TrainingDiverged(RuntimeError):
    """A gradient is not finite. The weights are those before the step; nothing was saved after it."""


def build(
    groups: list[dict], config: OptimConfig, max_steps: int, used: Callable[[], float] | None = None
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """The optimiser of ``VideoDecoder.param_groups`` and its schedule, which ends at ``max_steps``, or where ``used``, the
    share of the run's time that is used, is 1.

    Raises:
        ValueError: ``optim.groups`` names a group that there is not.
    """
    unknown = config.groups.keys() - {group["name"] for group in groups}
    if unknown:
        names = sorted({group["name"] for group in groups})
        raise ValueError(f"optim.groups.{sorted(unknown)[0]} names no parameter group (there are: {names})")
    parts = [part for group in groups for part in _decay_parts(group, config)]
    optimizer = torch.optim.AdamW(parts, lr=config.lr, betas=config.betas, eps=config.eps, fused=config.fused)
    factors = [partial(_factor, config, max_steps, part["name"], used) for part in parts]
    return optimizer, LambdaLR(optimizer, factors)


def _factor(config: OptimConfig, max_steps: int, group: str, used: Callable[[], float] | None, step: int) -> float:
    return config.lr_factor(step, max_steps, group, None if used is None else used())


def _decay_parts(group: dict, config: OptimConfig) -> list[dict]:
    """A named group as AdamW groups: matrices decay, gains and biases do not."""
    own = config.groups.get(group["name"])
    options = {"name": group["name"], "grad_clip": config.grad_clip, "lr": config.lr, "betas": config.betas}
    decay = config.weight_decay
    if own is not None:
        options |= {k: getattr(own, k) for k in ("lr", "betas", "grad_clip") if getattr(own, k) is not None}
        decay = decay if own.weight_decay is None else own.weight_decay
    named = group["params"].items()  # AdamW keeps the names, so a checkpoint tells whose moments it has
    parts = ([(name, p) for name, p in named if p.ndim > 1], [(name, p) for name, p in named if p.ndim <= 1])
    return [{**options, "params": p, "weight_decay": d} for p, d in zip(parts, (decay, 0.0), strict=True) if p]


def clip(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Scale the gradients of every named group down to its largest norm; the norms before that, by group. Norms are those
    of whole gradients, the same on all processes, also where each process has a slice of them.
    """
    groups: dict[str, tuple[list[Tensor], float | None]] = {}
    for group in optimizer.param_groups:
        groups.setdefault(group["name"], ([], group["grad_clip"]))[0].extend(
            p for p in group["params"] if p.grad is not None
        )
    norms = {}
    for name, (parameters, largest) in groups.items():
        if parameters:
            norms[name] = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
            limit = float("inf") if largest is None else largest
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norms[name])
    return norms


def require_finite(norms: dict[str, Tensor], step: int) -> None:
    """Refuse to go on with gradients of these norms, in optimiser step ``step`` (from 0).

    Raises:
        TrainingDiverged: one of them is not finite.
    """
    if not torch.stack(list(norms.values())).isfinite().all():
        bad = ", ".join(name for name, norm in norms.items() if not norm.isfinite())
        raise TrainingDiverged(
            f"the gradient of {bad} is not finite at step {step}. The weights are those of the step "
            "before and the last checkpoint is intact: run the same command to resume from it, perhaps with a "
            "lower optim.lr, optim.grad_clip or a longer optim.warmup_steps (which make another run)"
        )
