"""What a run left over time: its validation scores by step and by hours of all devices, and its scores by frame index."""

import csv
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from experiments.evaluate import BY_FRAME

EVENTS = "events.out.tfevents.*"
VALIDATION = "val/"
STEP = "step"  # the tag under which training logs the step it is at, once every so many steps


@dataclass
class Curve:
    """A scalar over a run; ``hours`` are spent hours of training and validation times devices, without pauses."""

    steps: list[int]
    hours: list[float]
    values: list[float]


def learning_curves(run_folder: Path, devices: int = 1, prefix: str = VALIDATION) -> dict[str, Curve]:
    """Tag -> curve, of all scalars whose tag begins with ``prefix``; empty where the run wrote no events.

    Every session of a run (a resume begins another) is an event file. Time runs within a session, from its first event to its
    last; pauses between sessions do not count. Steps that were repeated after an interruption count as time and show the later
    values.
    """
    found: dict[str, dict[int, tuple[float, float]]] = {}
    spent = 0.0
    for path in sorted(run_folder.glob(EVENTS), key=_begun):
        begun, events = _scalars(path)
        times = [time for entries in events.values() for time, _, _ in entries]
        if not times:
            continue
        first_step = min(step for entries in events.values() for _, step, _ in entries)
        for tag, entries in events.items():
            if not tag.startswith(prefix):
                continue
            points = {step: point for step, point in found.get(tag, {}).items() if step < first_step or step == 0}
            points |= {step: (spent + time - begun, value) for time, step, value in entries}
            found[tag] = points
        spent += max(times) - begun
    return {
        tag: Curve(
            steps=sorted(points),
            hours=[points[step][0] / 3600 * devices for step in sorted(points)],
            values=[points[step][1] for step in sorted(points)],
        )
        for tag, points in found.items()
    }


def _begun(path: Path) -> int:
    """The second at which an event file was opened, which its name says."""
    return int(path.name.split(".")[3])


def _scalars(path: Path) -> tuple[float, dict[str, list[tuple[float, int, float]]]]:
    """When an event file's first event was written; and tag -> (wall time, step, value)."""
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0, "images": 1, "histograms": 1})
    events.Reload()
    tags = events.Tags()
    found = {tag: [(e.wall_time, e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    for tag in tags["tensors"]:
        entries = [(e.wall_time, e.step, tensor_util.make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)]
        if all(value.shape == () and value.dtype.kind == "f" for _, _, value in entries):
            found[tag] = [(time, step, float(value)) for time, step, value in entries]
    return events.FirstEventTimestamp(), found


def by_frame(folder: Path) -> dict[tuple[str, str], dict[str, list[float]]]:
    """(stream, method) -> metric -> mean over clips of frame 0, 1, ... of an evaluation.

    NaN where no clip has a score (pairs of frames: the first), and everywhere where a prediction was not finite.
    """
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    with open(folder / BY_FRAME, newline="") as file:
        for line in csv.DictReader(file):
            metrics = found.setdefault((line["stream"], line["method"]), {})
            for metric in line.keys() - {"stream", "method", "frame", "clips"}:
                metrics.setdefault(metric, []).append(float(line[metric] or "nan"))
    return found
