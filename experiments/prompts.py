"""Files of prompts: a text file, a table, or the list of a benchmark (VBench, VBench-I2V, VBench-2.0).

prompts.txt     one prompt a line; empty lines and lines that begin with # are left out
prompts.csv     columns prompt and, if wanted, image (a path, relative to the file), seed, negative_prompt
*_info.json     a list of {prompt_en, dimension, image_name}: VBench_full_info.json, vbench2_i2v_full_info.json and
                VBench2_full_info.json of Vchitect/VBench; images lie in a folder that is named beside
"""

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.compose import ConfigError

TEXT = "utf-8-sig"  # with or without the mark that spreadsheets and editors write first: it is no part of a prompt
LARGEST_SEED = 2**32  # exclusive; RefDecoder's script draws seeds below it
SAMPLES = {"vbench": 5, "i2v": 5, "vbench2": 3}  # videos of a prompt that the scorers read, indices from 0
DIVERSITY, DIVERSITY_SAMPLES = "Diversity", 20  # of VBench-2.0: how unlike each other the videos of one prompt are


@dataclass(frozen=True)
class Prompt:
    """A prompt, what else its video is made from, and how many are made."""

    text: str
    samples: int = 1
    image: str = ""
    negative: str = ""
    seed: int | None = None  # of sample 0; the next one's is one higher
    dimensions: tuple[str, ...] = ()

    def seed_of(self, index: int, base: int) -> int:
        """The seed of a sample: the file's own, else one that depends on ``base``, the prompt, its image's name and the index
        alone, so that no order and no interruption changes it."""
        if self.seed is not None:
            return self.seed + index
        return random.Random(f"{base}\n{self.text}\n{Path(self.image).name}\n{index}").randrange(LARGEST_SEED)


def suite_of(entries: Sequence[dict[str, Any]]) -> str:
    """Which benchmark a list of {prompt_en, dimension} is of: only VBench-2.0 writes dimensions with capitals, and only
    VBench-I2V names images."""
    if any("image_name" in entry for entry in entries):
        return "i2v"
    return "vbench2" if any(name[:1].isupper() for entry in entries for name in entry["dimension"]) else "vbench"


def read_info(path: str | Path) -> list[dict[str, Any]]:
    """A benchmark's list, checked. Raises ConfigError."""
    try:
        entries = json.loads(Path(path).expanduser().read_text(encoding=TEXT))
        for entry in entries:
            if not isinstance(entry["prompt_en"], str) or not isinstance(entry["dimension"], list):
                raise TypeError("prompt_en must be text and dimension a list")
            if not isinstance(entry.get("image_name", ""), str):
                raise TypeError("image_name must be text")
            entry["dimension"] = [str(name) for name in entry["dimension"]]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no list of prompts: {error}; VBench's lists hold {{prompt_en, dimension, ...}}"
        ) from None
    if not entries:
        raise ConfigError(f"{path} lists no prompts")
    if 0 < (without := sum("image_name" not in entry for entry in entries)) < len(entries):
        raise ConfigError(f"{path} is no list of prompts: {without} of {len(entries)} have no image_name")
    return entries


def samples_of(entry: dict[str, Any], suite: str) -> int:
    """How many videos of a prompt the scorer reads."""
    return DIVERSITY_SAMPLES if suite == "vbench2" and DIVERSITY in entry["dimension"] else SAMPLES[suite]


def chosen(entries: list[dict[str, Any]], dimensions: Sequence[str] | None) -> list[dict[str, Any]]:
    """Those of some dimensions; None: all. Raises ConfigError for a dimension that no prompt has."""
    known = sorted({name for entry in entries for name in entry["dimension"]})
    for name in dimensions or ():
        if name not in known:
            raise ConfigError(f"dimensions: no prompt is of {name}; there are {', '.join(known)}")
    return [entry for entry in entries if dimensions is None or set(entry["dimension"]) & set(dimensions)]


def read_prompts(
    path: str, *, images: str | None = None, dimensions: Sequence[str] | None = None, samples: int | None = None
) -> list[Prompt]:
    """The prompts of a file, each once. Raises ConfigError.

    Args:
        images: folder of a benchmark's images; of a table's too, instead of the table's own folder.
        dimensions: only prompts of these; of a benchmark's list.
        samples: of each prompt; None: what the benchmark's scorer reads, one of other files.
    """
    file = Path(path).expanduser()
    if dimensions is not None and file.suffix != ".json":
        raise ConfigError(f"dimensions are of a benchmark's list (.json); {path} is none")
    if not file.is_file():
        raise ConfigError(f"prompts={path} is no file")
    readers = {".txt": _read_text, ".csv": _read_table, ".json": _read_benchmark}
    if file.suffix not in readers:
        raise ConfigError(f"prompts={path}: a .txt, .csv or .json file is needed")
    try:
        found = readers[file.suffix](file, images, dimensions, samples)
    except UnicodeDecodeError:
        raise ConfigError(f"prompts={path} is no text in UTF-8") from None
    except csv.Error as error:
        raise ConfigError(f"prompts={path} is no table: {error}") from None
    if not found:
        raise ConfigError(f"prompts={path} holds no prompt")
    merged: dict[tuple[str, str], Prompt] = {}
    for prompt in found:  # dimensions share prompts; one set of videos serves all
        key = (prompt.text, prompt.image)
        before = merged.get(key)
        if before and (before.seed, before.negative) != (prompt.seed, prompt.negative):
            raise ConfigError(f"prompts={path} has {prompt.text[:60]!r} twice, with other seeds or negative prompts")
        if before is None or prompt.samples > before.samples:
            merged[key] = prompt
    if missing := [prompt.image for prompt in merged.values() if prompt.image and not Path(prompt.image).is_file()]:
        raise ConfigError(
            f"prompts={path}: {len(missing)} images are not there, such as {missing[0]}; images=FOLDER says where they are"
        )
    return list(merged.values())


def _read_text(file: Path, images: str | None, dimensions: Any, samples: int | None) -> list[Prompt]:
    lines = (line.strip() for line in file.read_text(encoding=TEXT).splitlines())
    return [Prompt(line, samples or 1) for line in lines if line and not line.startswith("#")]


def _read_table(file: Path, images: str | None, dimensions: Any, samples: int | None) -> list[Prompt]:
    root = Path(images).expanduser() if images else file.parent
    found = []
    with open(file, newline="", encoding=TEXT) as text:
        rows = csv.DictReader(text, skipinitialspace=True)
        if "prompt" not in (rows.fieldnames or ()):
            raise ConfigError(f"prompts={file} has no column prompt, only {rows.fieldnames}")
        for row in rows:
            if not row["prompt"]:
                continue
            image, seed = row.get("image") or "", (row.get("seed") or "").strip()
            if seed and not (seed.isdecimal() and int(seed) + (samples or 1) <= 2**63):
                raise ConfigError(f"prompts={file}, line {rows.line_num}: the seed {seed[:40]!r} is no whole number")
            found.append(
                Prompt(
                    row["prompt"],
                    samples or 1,
                    str(root / image) if image else "",
                    row.get("negative_prompt") or "",
                    int(seed) if seed else None,
                )
            )
    return found


def _read_benchmark(
    file: Path, images: str | None, dimensions: Sequence[str] | None, samples: int | None
) -> list[Prompt]:
    entries = chosen(read_info(file), dimensions)
    suite = suite_of(entries)
    if suite == "i2v" and images is None:
        raise ConfigError(
            f"prompts={file} names images: give images=FOLDER (vbench2_beta_i2v/data/crop/16-9 of VBench, after its "
            "download_data.sh)"
        )
    return [
        Prompt(
            entry["prompt_en"],
            samples or samples_of(entry, suite),
            str(Path(images).expanduser() / entry["image_name"]) if suite == "i2v" else "",
            dimensions=tuple(entry["dimension"]),
        )
        for entry in entries
    ]
