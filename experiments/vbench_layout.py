"""Decoded pairs named as VBench's scorers read them: the first step of ``experiments/vbench.py``, which has the options."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.checkpoints import write_atomically
from experiments.compose import ConfigError
from experiments.fixed_seed import read_table
from experiments.measured import require_folder
from experiments.prompts import DIVERSITY, DIVERSITY_SAMPLES, chosen, read_info, samples_of, suite_of
from experiments.vbench_suites import LONGEST_FILE_NAME, SUITES, Suite

LAYOUT, INFO, PROMPT_FILE, IMAGES = "layout.json", "info.json", "prompts.json", "images"
KEYS = {"suite", "mode", "partial", "labels", "dimensions", "num_prompts", "suite_prompts", "prompts"}  # of layout.json


@dataclass
class LayoutConfig:
    """Options of ``layout``; ``source`` is what is typed as ``in``."""

    source: str = ""
    out: str = ""
    suite: Literal["vbench", "i2v", "vbench2"] = "vbench"
    info: str | None = None
    dimensions: list[str] | None = None
    partial: bool = False

    def __post_init__(self) -> None:
        if not (self.source and self.out):
            raise ValueError(
                "in and out are needed: make vbench do=layout in=DECODED out=FOLDER suite=vbench|i2v|vbench2"
            )


@dataclass(frozen=True)
class Wanted:
    """One video that a scorer looks for: of which prompt and sample, and its file below a decoder's folder."""

    prompt: str
    index: int
    dimension: str
    room: str
    file: str


def layout(config: LayoutConfig) -> dict[str, Any]:
    """Lay the decoded videos out. What ``layout.json`` holds.

    Raises:
        ConfigError: videos that the suite needs are missing, or cannot be named as it asks.
    """
    suite = SUITES[config.suite]
    source, out = Path(config.source).expanduser(), Path(config.out).expanduser()
    labels, rows = read_table(source)
    videos = _indexed(rows)
    entries = _entries(suite, config)
    dimensions = _dimensions(suite, config, entries)
    wanted, used = (
        _of_suite(suite, entries, dimensions, videos, config.partial)
        if entries is not None
        else (_of_prompts(suite, dimensions, videos), None)
    )
    if not wanted:
        raise ConfigError(f"{source} has no video for {', '.join(dimensions)}; were other prompts decoded?")
    require_folder(out)
    made: dict[Path, str] = {}
    for label in labels:
        for want in wanted:
            name = videos[want.prompt, want.index]["name"]
            _place(source / label / f"{name}.mp4", out / label / want.room / want.file, made)
    about = {
        "suite": suite.name,
        "mode": "custom" if entries is None else "standard",
        "partial": entries is not None and len(used) < len(entries),
        "labels": labels,
        "dimensions": dimensions,
        "num_prompts": len({(w.dimension, w.prompt) if suite.per_dimension else w.prompt for w in wanted}),
        "suite_prompts": len(entries) if entries is not None else None,
        "source": str(source.resolve()),
        "prompts": {f"{want.dimension}/{want.file}": want.prompt for want in wanted},
    }
    if used is not None:
        _write(out / INFO, used)
    elif suite.name == "vbench":
        _write(out / PROMPT_FILE, {want.file: want.prompt for want in wanted})
    elif suite.name == "i2v":
        _lay_images(wanted, videos, out / IMAGES)
    _write(out / LAYOUT, about)
    print(f"{suite.title}: {len(made)} videos of {', '.join(labels)} for {', '.join(dimensions)}, in {out}")
    return about


def _indexed(rows: Sequence[Mapping[str, str]]) -> dict[tuple[str, int], Mapping[str, str]]:
    """(prompt, index) -> line. Without an index of its own a file takes the next one of its prompt, by name."""
    found: dict[tuple[str, int], Mapping[str, str]] = {}
    for row in sorted(rows, key=lambda row: (not row["index"], row["name"])):
        if not row["prompt"]:
            raise ConfigError(
                f"{row['name']} has no prompt: the scorers go by prompts; name it in the latents' list or metadata"
            )
        index = int(row["index"]) if row["index"] else 0
        while not row["index"] and (row["prompt"], index) in found:
            index += 1
        if (row["prompt"], index) in found:
            raise ConfigError(
                f"two videos are sample {index} of {row['prompt'][:60]!r}: decode each list into its own folder"
            )
        found[row["prompt"], index] = row
    return found


def _entries(suite: Suite, config: LayoutConfig) -> list[dict[str, Any]] | None:
    if config.info is None:
        return None
    entries = read_info(config.info)
    if (kind := suite_of(entries)) != suite.name:
        raise ConfigError(f"info={config.info} is the list of suite={kind}, not of {suite.name}")
    return chosen(entries, config.dimensions)


def _dimensions(suite: Suite, config: LayoutConfig, entries: list[dict[str, Any]] | None) -> list[str]:
    known = suite.dimensions if entries is not None else suite.custom
    for name in config.dimensions or ():
        if name not in suite.dimensions:
            raise ConfigError(f"dimensions: {suite.title} has no {name}; there are {', '.join(suite.dimensions)}")
        if name not in known:
            raise ConfigError(
                f"dimensions: {name} needs the suite's own prompts: give info=; any prompt does for {', '.join(known)}"
            )
    if config.dimensions is not None:
        return list(config.dimensions)
    if entries is None:
        return [
            name for name in known if name != DIVERSITY
        ]  # it needs 20 videos of a prompt: only where it is asked for
    return [name for name in known if any(name in entry["dimension"] for entry in entries)]


def _of_suite(
    suite: Suite,
    entries: Sequence[dict[str, Any]],
    dimensions: Sequence[str],
    videos: Mapping[tuple[str, int], Any],
    partial: bool,
) -> tuple[list[Wanted], list[dict[str, Any]]]:
    """Every video that the suite's list asks for, and the entries of the list that all videos are there for."""
    wanted, used, missing = [], [], []
    for entry in entries:
        prompt, count = entry["prompt_en"], samples_of(entry, suite.name)
        absent = [index for index in range(count) if (prompt, index) not in videos]
        if absent:
            missing.append(suite.file_name(prompt, absent[0]))
            continue
        used.append(entry)
        for dimension in entry["dimension"]:
            if dimension in dimensions:
                wanted += [_wanted(suite, prompt, index, dimension) for index in range(count)]
    if missing and not partial:
        raise ConfigError(
            f"{suite.title} asks for {len(entries)} prompts, and {len(missing)} lack videos, such as {missing[0]!r}; make generate with "
            "the same list makes all, partial=true scores what is there (which is not the benchmark)"
        )
    return wanted, used


def _of_prompts(suite: Suite, dimensions: Sequence[str], videos: Mapping[tuple[str, int], Any]) -> list[Wanted]:
    """Every video there is, for each dimension."""
    counts: dict[str, int] = {}
    for prompt, _ in videos:
        counts[prompt] = counts.get(prompt, 0) + 1
    if DIVERSITY in dimensions and (
        few := [p for p in counts if any((p, i) not in videos for i in range(DIVERSITY_SAMPLES))]
    ):
        raise ConfigError(
            f"{DIVERSITY} needs videos 0 to {DIVERSITY_SAMPLES - 1} of each prompt; {few[0][:60]!r} has {counts[few[0]]}"
        )
    return [_wanted(suite, prompt, index, dimension) for dimension in dimensions for prompt, index in videos]


def _wanted(suite: Suite, prompt: str, index: int, dimension: str) -> Wanted:
    file = suite.file_name(prompt, index)
    if "/" in file or "\0" in file or len(file.encode()) > LONGEST_FILE_NAME:
        raise ConfigError(
            f"the scorer reads prompts off file names, and {prompt[:60]!r} can be none (a slash, or over {LONGEST_FILE_NAME} bytes)"
        )
    return Wanted(prompt, index, dimension, suite.room(dimension), file)


def _place(source: Path, target: Path, made: dict[Path, str]) -> None:
    """Link ``source`` as ``target``. Raises ConfigError: it is missing, or another video has this name."""
    if target in made:
        if made[target] != str(source):
            raise ConfigError(f"two prompts share the file name {target.name!r}: the scorer cannot tell them apart")
        return
    if not source.is_file():
        raise ConfigError(f"{source} is not there; run make fixed-seed again")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)
    made[target] = str(source)


def _lay_images(wanted: Sequence[Wanted], videos: Mapping[tuple[str, int], Mapping[str, str]], folder: Path) -> None:
    """Images named by their prompts, as evaluate_i2v.py --custom_image_folder finds them."""
    made: dict[Path, str] = {}
    for want in wanted:
        image = videos[want.prompt, want.index]["reference"]
        if not image:
            raise ConfigError(f"VBench-I2V compares with the image, and {want.file!r} has none beside its latent")
        target = folder / f"{want.prompt}{Path(image).suffix}"
        if target not in made:
            _place(Path(image), target, made)


def read_layout(folder: str) -> dict[str, Any]:
    """``layout.json``. Raises ConfigError: there is none."""
    path = Path(folder).expanduser() / LAYOUT
    try:
        about = json.loads(path.read_text())
        if not isinstance(about, dict) or (missing := sorted(KEYS - about.keys())):
            raise ValueError(f"no {missing[0]} in it" if isinstance(about, dict) else "no layout")
        return about
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there; make vbench do=layout in=DECODED out={folder} makes it") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): make vbench do=layout again") from None


def _write(path: Path, content: Any) -> None:
    write_atomically(
        path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    )
