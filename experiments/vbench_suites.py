"""What the scorers of VBench, VBench-I2V and VBench-2.0 read and write: names of files, dimensions, results, totals.

Read off github.com/Vchitect/VBench at commit 45e79ec (2026-03-23): ``evaluate.py``, ``evaluate_i2v.py``, ``VBench-2.0/evaluate.py``,
the ``__init__.py`` of their packages and ``scripts/constant.py``. Papers: arXiv 2311.17982, 2411.13503, 2503.21755.

| suite   | videos of a prompt      | file                    | folders            | where prompts come from          |
|---------|-------------------------|-------------------------|--------------------|----------------------------------|
| vbench  | 5                       | ``PROMPT-0.mp4``        | one                | VBench_full_info.json            |
| i2v     | 5                       | ``PROMPT-0.mp4``        | one                | vbench2_i2v_full_info.json       |
| vbench2 | 3, of Diversity 20      | ``PROMPT[:180]-0.mp4``  | one per dimension, since dimensions share prompts | VBench2_full_info.json |

A scorer writes ``<name>_eval_results.json``: {dimension: [score, ..., videos]}, whose last entry lists {video_path,
video_results}. Special cases: videos of imaging_quality are out of 100 and the score out of 1; -1 of Multi-View_Consistency
is "cannot be judged" and is left out of the score; of Diversity each line is one prompt, named by its first video.
The prompts' page asks for 25 videos for temporal_flickering, of which a static filter keeps some; the scorer reads 0 to 4.
Without a benchmark's list ("custom input") only some dimensions can be scored, from whatever prompts the videos have.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from experiments.prompts import DIVERSITY

LONGEST_FILE_NAME = 255  # bytes, of a file system


@dataclass(frozen=True)
class Suite:
    """A benchmark's scorer."""

    name: str
    title: str
    folder: str  # in the clone: where the script runs
    script: str
    dimensions: tuple[str, ...]
    custom: tuple[str, ...]  # those that work for any prompts
    longest_prompt: int | None  # characters of it in a file's name
    per_dimension: bool  # videos lie in a folder per dimension

    def file_name(self, prompt: str, index: int) -> str:
        """Of a video."""
        return f"{prompt[: self.longest_prompt]}-{index}.mp4"

    def room(self, dimension: str) -> str:
        """The folder of a dimension's videos, below the decoder's."""
        return dimension if self.per_dimension else "videos"


_VBENCH = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
    "temporal_style",
    "overall_consistency",
)
_NOT_CUSTOM = ("object_class", "multiple_objects", "scene", "appearance_style", "color", "spatial_relationship")
_I2V = ("i2v_subject", "i2v_background", "camera_motion")
_I2V_QUALITY = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
_GROUPS2 = {
    "creativity": ("Composition", DIVERSITY),
    "commonsense": ("Instance_Preservation", "Motion_Rationality"),
    "controllability": (
        "Camera_Motion",
        "Complex_Landscape",
        "Complex_Plot",
        "Dynamic_Attribute",
        "Dynamic_Spatial_Relationship",
        "Human_Interaction",
        "Motion_Order_Understanding",
    ),
    "human fidelity": ("Human_Anatomy", "Human_Clothes", "Human_Identity"),
    "physics": ("Material", "Mechanics", "Multi-View_Consistency", "Thermotics"),
}
SUITES = {
    "vbench": Suite(
        "vbench",
        "VBench",
        ".",
        "evaluate.py",
        _VBENCH,
        tuple(name for name in _VBENCH if name not in _NOT_CUSTOM),
        None,
        False,
    ),
    "i2v": Suite(
        "i2v",
        "VBench-I2V",
        ".",
        "evaluate_i2v.py",
        _I2V + _I2V_QUALITY + ("temporal_flickering",),
        (*_I2V[:2], *_I2V_QUALITY, "temporal_flickering"),  # camera_motion reads the motion off the prompt's words
        None,
        False,
    ),
    "vbench2": Suite(
        "vbench2",
        "VBench-2.0",
        "VBench-2.0",
        "evaluate.py",
        tuple(name for names in _GROUPS2.values() for name in names),
        ("Human_Anatomy", "Human_Identity", "Human_Clothes", DIVERSITY, "Multi-View_Consistency"),
        180,
        True,
    ),
}

# scripts/constant.py: (lowest, highest) by which a score is brought to 0..1 in totals; (0, 1) where none is listed.
_RANGES = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
    "i2v_subject": (0.1462, 1.0),
    "i2v_background": (0.2615, 1.0),
}
_WEIGHTS = {"dynamic_degree": 0.5, "camera_motion": 0.1}  # 1 where none is listed
_QUALITY = (*_VBENCH[:7],)
_SEMANTIC = (*_VBENCH[7:],)


def totals(suite: str, scores: Mapping[str, float]) -> dict[str, float]:
    """The suite's totals (quality, semantic, total ...) of its dimensions' scores; those whose dimensions are all there.

    As ``scripts/cal_final_score.py``, ``cal_i2v_final_score.py`` and ``VBench-2.0/scripts/cal_final_score.py`` compute them, but
    for a dimension that is missing: those scripts take it as 0.
    """
    if suite == "vbench2":
        groups = {name: _mean(scores, names) for name, names in _GROUPS2.items()}
        weights = dict.fromkeys(groups, 1.0)
    elif suite == "i2v":
        groups = {"quality": _mean(scores, _I2V_QUALITY), "i2v": _mean(scores, _I2V)}
        weights = {"quality": 1.0, "i2v": 1.0}
    else:
        groups = {"quality": _mean(scores, _QUALITY), "semantic": _mean(scores, _SEMANTIC)}
        weights = {"quality": 4.0, "semantic": 1.0}
    found = {name: value for name, value in groups.items() if value is not None}
    if len(found) == len(groups):
        found["total"] = sum(weights[name] * value for name, value in found.items()) / sum(weights.values())
    return found


def _mean(scores: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    """Weighted mean of scores brought to 0..1; None where one is missing."""
    if any(name not in scores for name in names):
        return None
    weights = {name: _WEIGHTS.get(name, 1.0) for name in names}
    ranges = {name: _RANGES.get(name, (0.0, 1.0)) for name in names}
    normalised = {name: (scores[name] - ranges[name][0]) / (ranges[name][1] - ranges[name][0]) for name in names}
    return sum(weights[name] * normalised[name] for name in names) / sum(weights.values())
