"""What REGEN is trained for and how it is validated, as plain values."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from decoders.regen.targets import Task
from decoders.training import loss_weight

CONTROLS = ("shuffled motion", "shuffled content", "first frame repeated")


@dataclass
class RegenObjective:
    """What is trained for, besides the weights of the terms, and how validation samples."""

    interpolation: Any = 0.0  # probability of a step: a number, or {start, end, from_step, to_step}
    extrapolation: Any = 0.0
    levels: Literal["uniform", "logit_normal"] = "uniform"  # how noise levels are drawn
    at_one: float = 0.1  # share of them at pure noise, where one-step decoding begins
    variational: bool = False  # a Gaussian posterior: then loss_weights.kl counts
    freeze_statistics: bool = True  # at the last step latents are normalised, for a latent diffusion model to come
    steps: int = 1  # of the sampler, in validation and decode
    extension: bool = False  # latent extension over chunk seams, in validation and decode
    tasks: dict[str, str] = field(default_factory=dict)  # validation stream -> interpolate or extrapolate
    ahead: int = 4  # an extrapolated stream ends so many frames after what is encoded of it
    compare_steps: list[int] = field(
        default_factory=list
    )  # other numbers of steps, scored beside the decoder at the end
    compare_seeds: int = 0  # and so many other draws of the noise
    compare_extension: bool = False  # and latent extension, with the largest of compare_steps
    controls: list[str] = field(default_factory=lambda: list(CONTROLS))
    interpolator: str | None = None  # a TorchScript file, see interpolator.py: scored on streams that are interpolated

    def __post_init__(self) -> None:
        if not 0.0 <= self.at_one <= 1.0:
            raise ValueError(f"objective.at_one={self.at_one} must lie in [0, 1]")
        if min([self.steps, self.ahead, *self.compare_steps]) < 1 or self.compare_seeds < 0:
            raise ValueError(
                "objective.steps, ahead and compare_steps must be 1 or more, compare_seeds 0 or more, got "
                f"{self.steps}, {self.ahead}, {self.compare_steps}, {self.compare_seeds}"
            )
        if unknown := sorted(set(self.controls) - set(CONTROLS)):
            raise ValueError(f"objective.controls: no {unknown[0]!r}; there are {', '.join(CONTROLS)}")
        for stream, task in self.tasks.items():
            if task not in ("reconstruct", "interpolate", "extrapolate"):
                raise ValueError(f"objective.tasks.{stream}={task}: there are reconstruct, interpolate, extrapolate")
        if self.interpolator is not None and "interpolate" not in self.tasks.values():
            raise ValueError(
                f"objective.interpolator={self.interpolator}: no stream of objective.tasks is interpolated, so it would be asked "
                "for nothing; set objective.tasks.NAME=interpolate, or leave it out"
            )
        for step in self._turns():
            if sum(self.probabilities(step)) > 1.0 + 1e-9:
                raise ValueError(f"objective.interpolation and extrapolation are more than 1 together at step {step}")

    def _turns(self) -> list[int]:
        """Steps at which the probabilities begin and end to move, and some between."""
        moving = [value for value in (self.interpolation, self.extrapolation) if isinstance(value, dict)]
        turns = sorted({0, *(int(value.get(name) or 0) for value in moving for name in ("from_step", "to_step"))})
        return turns + [a + (b - a) * i // 64 for a, b in pairwise(turns) for i in range(1, 64)]

    @staticmethod
    def _at(value: Any, step: int) -> float:
        try:
            probability = loss_weight(value, step)
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"objective.interpolation and extrapolation are numbers or schedules (start, end, from_step, to_step), not "
                f"{value!r}"
            ) from None
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"objective: a probability of {probability} at step {step}; it must lie in [0, 1]")
        return probability

    def probabilities(self, step: int) -> tuple[float, float]:
        """Of interpolation and of extrapolation at optimiser step ``step``."""
        return self._at(self.interpolation, step), self._at(self.extrapolation, step)

    @property
    def trained_tasks(self) -> list[Task]:
        """The tasks that training ever has."""

        def ever(value: Any) -> bool:
            return max(value["start"], value["end"]) > 0 if isinstance(value, dict) else value > 0

        chosen = {"interpolate": self.interpolation, "extrapolate": self.extrapolation}
        return ["reconstruct", *(task for task, value in chosen.items() if ever(value))]


def encoded_frames_of(task: str, num_frames: int, ahead: int) -> int:
    """How many frames of a clip of ``num_frames`` a validation task encodes. Raises ValueError: too few, or an even number to
    interpolate, whose last frame would not lie between two that are encoded."""
    if task == "interpolate":
        if num_frames < 3 or not num_frames % 2:
            raise ValueError(f"{num_frames} frames: to interpolate takes an odd number, 3 or more")
        return (num_frames + 1) // 2
    if task == "extrapolate" and num_frames <= ahead:
        raise ValueError(f"{num_frames} frames: none is left to encode, {ahead} are ahead (objective.ahead)")
    return num_frames - ahead if task == "extrapolate" else num_frames
