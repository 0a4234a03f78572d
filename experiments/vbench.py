"""Decoded pairs through VBench's own scorers: ``python -m experiments.vbench layout|score|table ...``.

    make vbench do=layout in=decoded out=vb suite=i2v info=VBench/vbench2_beta_i2v/vbench2_i2v_full_info.json \
        dimensions=[i2v_subject,i2v_background]
    make vbench do=score in=vb scorer=VBench scorer_python=envs/vbench/bin/python ratio=16-9
    make vbench do=table in=vb

layout   names the videos of ``make fixed-seed`` as the scorers read them (hard links, copies on another disk), for each decoder:
         in, out, suite (vbench, i2v, vbench2), info (the suite's own list in the clone; without it the dimensions that take any
         prompt), dimensions (default: all of the suite), partial (true: only the prompts that are there in all samples)
score    runs the scorer on each decoder and dimension, in the scorer's own environment, where its requirements are installed:
         in, scorer (a clone of github.com/Vchitect/VBench), scorer_python (that environment's), ratio (of the images, i2v: 1-1, 8-5, 7-4
         or 16-9), dimensions, run (false: only say the commands), overwrite. What has a result is not scored again
table    reads the results back: scores, totals as the leaderboard computes them where the whole suite was scored, and paired
         differences to the first decoder with 95 % intervals over prompts; OUT/scores.md and OUT/scores.json

The scorers need a CUDA device and download their models. experiments/vbench_suites.py has the facts about them and their source.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import vbench_scores
from experiments.bench_all import read_options
from experiments.checkpoints import write_atomically
from experiments.compose import ConfigError, run_cli
from experiments.measured import require_folder
from experiments.vbench_layout import IMAGES, INFO, PROMPT_FILE, LayoutConfig, layout, read_layout
from experiments.vbench_suites import SUITES

RESULTS, LOG = "results", "scorer.log"
RATIOS = ("1-1", "8-5", "7-4", "16-9")


@dataclass
class ScoreConfig:
    """Options of ``score``."""

    source: str = ""
    scorer: str = ""
    scorer_python: str = "python"
    ratio: str | None = None
    dimensions: list[str] | None = None
    run: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not (self.source and self.scorer):
            raise ValueError(
                "in and scorer are needed: make vbench do=score in=FOLDER scorer=CLONE scorer_python=ENV/bin/python"
            )
        if self.ratio is not None and self.ratio not in RATIOS:
            raise ValueError(f"ratio={self.ratio}: VBench-I2V has images of {', '.join(RATIOS)}")


@dataclass
class TableConfig:
    """Options of ``table``."""

    source: str = ""

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("in is needed: make vbench do=table in=FOLDER")


# ---- score


def commands(config: ScoreConfig, about: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(label, dimension, command) of every scoring that is asked for; the command runs in the suite's folder of the clone."""
    suite, root = SUITES[about["suite"]], Path(config.source).expanduser().resolve()
    listed = config.dimensions or about["dimensions"]
    for name in listed:
        if name not in about["dimensions"]:
            raise ConfigError(f"dimensions: {name} was not laid out; there are {', '.join(about['dimensions'])}")
    found = []
    for label in about["labels"]:
        for name in listed:
            command = [config.scorer_python, suite.script, "--videos_path", str(root / label / suite.room(name))]
            command += ["--output_path", str(_place_of_result(root, label, name)), "--dimension", name]
            if about["mode"] == "standard":
                command += ["--mode", "vbench_standard", "--full_json_dir", str(root / INFO)]
                if suite.name == "i2v":
                    command += ["--ratio", _ratio(config)]
            else:
                command += ["--mode", "custom_input"]
                extra = {
                    "vbench": ["--prompt_file", root / PROMPT_FILE],
                    "i2v": ["--custom_image_folder", root / IMAGES],
                }
                command += [str(part) for part in extra.get(suite.name, ())]
            found.append((label, name, command))
    return found


def score(config: ScoreConfig) -> int:
    """Run what has no result yet; how many failed. Raises ConfigError: there is no such scorer."""
    about = read_layout(config.source)
    suite, root = SUITES[about["suite"]], Path(config.source).expanduser().resolve()
    work = (Path(config.scorer).expanduser() / suite.folder).resolve()
    if not (work / suite.script).is_file():
        raise ConfigError(
            f"scorer={config.scorer} is no clone of VBench ({work / suite.script} is not there): "
            "git clone https://github.com/Vchitect/VBench, and install its requirements in an environment of its own"
        )
    failed = 0
    python = shutil.which(config.scorer_python) or config.scorer_python  # relative to here, not to the clone
    if config.run and not os.path.isfile(python):
        raise ConfigError(
            f"scorer_python={config.scorer_python} is not there: the interpreter of the scorer's environment is needed"
        )
    config.scorer_python = os.path.abspath(python) if os.path.isfile(python) else python
    for label, name, command in commands(config, about):
        place = _place_of_result(root, label, name)
        if not config.overwrite and vbench_scores.read_result(place, name):
            print(f"{label}, {name}: has a result", flush=True)
            continue
        print(f"{label}, {name}: cd {work} && {shlex.join(command)}", flush=True)
        if config.run:
            failed += _run(command, work, place, name)
    return failed


def _run(command: Sequence[str], work: Path, place: Path, name: str) -> int:
    """One scoring, in an environment without our packages; 1 if it left no result."""
    require_folder(place)
    for old in place.glob(vbench_scores.RESULTS):
        old.unlink()
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    with open(place / LOG, "w") as log:
        try:
            status = subprocess.run(command, cwd=work, env=kept, stdout=log, stderr=subprocess.STDOUT).returncode
        except OSError as error:
            raise ConfigError(
                f"{command[0]} cannot be run: {error.strerror}; scorer_python= is the scorer's interpreter"
            ) from None
    result = vbench_scores.read_result(place, name) if status == 0 else None
    if result is None:
        lines = (place / LOG).read_text(errors="replace").strip().splitlines()
        print(
            f"failed (status {status}): {lines[-1] if lines else 'no output'}; {place / LOG}",
            file=sys.stderr,
            flush=True,
        )
        return 1
    print(f"{result.score:.4f} of {len(result.videos)} videos", flush=True)
    return 0


def _ratio(config: ScoreConfig) -> str:
    if config.ratio is None:
        raise ConfigError(
            f"ratio is needed for VBench-I2V: of the images that the videos began with, {', '.join(RATIOS)}"
        )
    return config.ratio


def _place_of_result(root: Path, label: str, dimension: str) -> Path:
    return root / RESULTS / label / dimension


# ---- table


def table(config: TableConfig) -> str:
    """Read the results back, write and return the table. Raises ConfigError: there is none yet."""
    about, root = read_layout(config.source), Path(config.source).expanduser()
    results: dict[str, dict[str, vbench_scores.Dimension]] = {}
    for label in about["labels"]:
        read = {
            name: vbench_scores.read_result(_place_of_result(root, label, name), name) for name in about["dimensions"]
        }
        results[label] = {name: said for name, said in read.items() if said is not None}
    if not any(results.values()):
        raise ConfigError(f"{root / RESULTS} has no result: make vbench do=score in={config.source} scorer=CLONE")
    compared = vbench_scores.compare(about, results)
    text = vbench_scores.report(about, compared)
    write_atomically(root / "scores.json", lambda path: path.write_text(vbench_scores.as_json(compared, results)))
    write_atomically(root / "scores.md", lambda path: path.write_text(text))
    return text


def _layout(arguments: list[str]) -> int:
    layout(read_options(arguments, LayoutConfig))
    return 0


def _score(arguments: list[str]) -> int:
    return int(score(read_options(arguments, ScoreConfig)) > 0)


def _table(arguments: list[str]) -> int:
    print(table(read_options(arguments, TableConfig)))
    return 0


DO: dict[str, Callable[[list[str]], int]] = {"layout": _layout, "score": _score, "table": _table}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in DO:
        raise ConfigError(f"say what to do: python -m experiments.vbench {'|'.join(DO)} key=value ...")
    renamed = [f"source={text[3:]}" if text.startswith("in=") else text for text in arguments[1:]]
    return DO[arguments[0]](renamed)


if __name__ == "__main__":
    run_cli(main)
