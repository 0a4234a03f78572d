"""What every decoder's training has in common, as plain dataclasses. YAML picks the values; nothing here knows a family."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

NETWORKS = ("lpips", "i3d", "videomae", "raft", "clip")  # what metrics take weights for (metrics.build)


@dataclass
class GroupConfig:
    """Overrides for one named group of ``VideoDecoder.param_groups`` (the discriminator's betas, say). None: as the rest."""

    lr: float | None = None
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    grad_clip: float | None = None
    min_lr: float | None = None  # where the cosine ends; None: the same share of its lr as the other groups


@dataclass
class OptimConfig:
    """One AdamW over all parameter groups."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01  # on matrices only; gains and biases are never decayed
    eps: float = 1e-8
    warmup_steps: int = 0  # linear, the last of them at lr
    warmup_from: float | None = None  # share of lr at step 0, reaching lr at step warmup_steps; null: 1 / warmup_steps
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr: float = 0.0  # where the cosine ends, at trainer.max_steps
    grad_clip: float | None = 1.0  # largest norm, of each group on its own
    fused: bool = True  # the fused kernel exists for CPU and CUDA; no second copy of the weights is made
    groups: dict[str, GroupConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr={self.lr} must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={list(self.betas)} must each lie in [0, 1)")
        if self.eps <= 0 or self.weight_decay < 0 or not 0 <= self.min_lr <= self.lr:
            raise ValueError("optim: eps must be above 0, weight_decay 0 or more, and min_lr between 0 and lr")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps={self.warmup_steps} must be 0 or more")
        if self.warmup_from is not None and not 0 <= self.warmup_from <= 1:
            raise ValueError(f"optim.warmup_from={self.warmup_from} must lie in [0, 1], or null")
        for name, group in self.groups.items():
            if group.min_lr is not None and not 0 <= group.min_lr <= (group.lr or self.lr):
                raise ValueError(f"optim.groups.{name}.min_lr={group.min_lr} must lie between 0 and the group's lr")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(f"optim.grad_clip={self.grad_clip} must be above 0, or null for none")

    def lr_factor(self, step: int, max_steps: int, group: str = "", used: float | None = None) -> float:
        """The share of its own rate that a parameter group has in optimiser step ``step`` (from 0).

        ``used``: the share of a run's time that is used, where time ends it and not ``max_steps``.
        """
        if step < self.warmup_steps:
            if self.warmup_from is None:
                return (step + 1) / self.warmup_steps
            return self.warmup_from + (1 - self.warmup_from) * step / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps) if used is None else used
        done = min(1.0, done)
        own = self.groups.get(group)
        floor = self.min_lr / self.lr if own is None or own.min_lr is None else own.min_lr / (own.lr or self.lr)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class EmaConfig:
    """Exponential moving average of what is trained and needed at inference."""

    decay: float = 0.9999
    warmup_steps: int = 2000  # until then the average is the weights themselves

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ValueError(f"ema.decay={self.decay} must lie between 0 and 1")
        if self.warmup_steps < 0:
            raise ValueError(f"ema.warmup_steps={self.warmup_steps} must be 0 or more")


@dataclass
class GuardConfig:
    """What becomes of a step whose loss or gradient is not finite, or far too large: it is left out, and written down."""

    limit: int = 10  # training stops with the step that is one more than so many left out ...
    window: int = 100  # ... among so many steps in a row
    # A gradient norm, or a loss, so many times its median over the last `window` steps that were made is too large. null: none is
    explode: float | None = None

    def __post_init__(self) -> None:
        if self.limit < 0 or self.window < 1:
            raise ValueError(
                f"guard: limit={self.limit} must be 0 or more, window={self.window} 1 or more; null for no guard"
            )
        if self.explode is not None and self.explode <= 1:
            raise ValueError(f"guard: explode={self.explode} must be above 1, or null")


@dataclass
class ValidationConfig:
    """What is measured on the validation clips, and what of them is shown."""

    metrics: list[str] = field(default_factory=lambda: ["psnr", "ssim", "lpips_alex"])
    best: str = "psnr"  # the metric, one of the above, by which weights-best are chosen
    num_shown: int = 4  # the first so many clips are drawn in TensorBoard, the same for every family
    video_fps: int = 8  # of the moving pictures in TensorBoard
    weights: dict[str, str] = field(
        default_factory=dict
    )  # of metric networks (lpips, i3d, videomae, raft, clip): file or folder
    categories: list[str] = field(
        default_factory=list
    )  # of an evaluation's clips, told by CLIP (weights.clip) where lists say none
    # Frames that are also scored by themselves, [from, to): {others: [1, 17]} leaves a clip's first frame out. A family's own group
    # of a name has its place.
    groups: dict[str, list[int]] = field(default_factory=dict)
    references: bool = True  # at the end, also score the mean colour, one colour per cell, and the space's own decoder

    def __post_init__(self) -> None:
        for name, frames in self.groups.items():
            if len(frames) != 2 or not 0 <= frames[0] < frames[1]:
                raise ValueError(f"validation.groups.{name}={list(frames)} must be [from, to) with 0 <= from < to")
        if self.best not in self.metrics:
            raise ValueError(f"validation.best={self.best} is none of validation.metrics: {', '.join(self.metrics)}")
        if odd := sorted(self.weights.keys() - set(NETWORKS)):
            raise ValueError(
                f"validation.weights.{odd[0]}: no metric has such weights; there are {', '.join(NETWORKS)}"
            )
        if len(self.categories) == 1 or len(set(self.categories)) < len(self.categories):
            raise ValueError(f"validation.categories={self.categories} must be two or more different words, or none")
        if self.categories and "clip" not in self.weights:
            raise ValueError("validation.categories are told by CLIP: set validation.weights.clip to its folder")


@dataclass
class TrainingConfig:
    """Everything that ``VideoDecoder`` needs besides the architecture and the latent space."""

    loss_weights: dict[str, Any] = field(default_factory=dict)  # term -> number or schedule, see loss_weight
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig | None = None
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    pad: Literal["error", "replicate"] = "error"  # sizes that the space cannot encode
    seed: int = 0
    max_steps: int = 1  # where the schedule ends
    lpips_precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of its convolutions in training
    compile_losses: bool = False  # LPIPS compares features in compiled kernels


def loss_weight(weight: float | dict[str, Any], step: int) -> float:
    """The weight of a loss term at optimiser step ``step``.

    A number stays as it is. A schedule ``{start, end, from_step, to_step, shape}`` moves from ``start`` to ``end``
    between the two steps (``from_step`` defaults to 0), ``shape`` being linear (default) or cosine.
    """
    if not isinstance(weight, dict):
        return float(weight)
    first, last = weight.get("from_step", 0), weight["to_step"]
    done = min(1.0, max(0.0, (step - first) / max(1, last - first)))
    if weight.get("shape", "linear") == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    return weight["start"] + (weight["end"] - weight["start"]) * done


def check_loss_weights(weights: dict[str, Any], terms: frozenset[str]) -> None:
    """Refuse a term without a weight, a weight without a term, and a schedule that cannot be read.

    Raises:
        ValueError: naming every difference at once.
    """
    wrong = [f"loss_weights.{name} is missing (0 turns the term off)" for name in sorted(terms - weights.keys())]
    known = ", ".join(sorted(terms))
    wrong += [f"loss_weights.{name} has no such term (there are: {known})" for name in sorted(weights.keys() - terms)]
    for name, weight in weights.items():
        if isinstance(weight, dict):
            keys = {"start", "end", "from_step", "to_step", "shape"}
            if not {"start", "end", "to_step"} <= weight.keys() <= keys:
                wrong.append(
                    f"loss_weights.{name}={weight} needs start, end and to_step, and may have from_step, shape"
                )
            elif weight.get("shape", "linear") not in ("linear", "cosine"):
                wrong.append(f"loss_weights.{name}.shape={weight['shape']} is neither linear nor cosine")
    if wrong:
        raise ValueError("; ".join(wrong))
