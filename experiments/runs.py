"""Runs on disk: which folder an experiment's run has, what makes it another run, and how a stage finds its parent's weights.

A run's folder is ``<RUNS_ROOT>/<experiment>``, or ``<experiment>+<key=value...>`` where overrides change what is learnt.
It holds ``config.yaml`` (resolved), ``weights-{last,ema,best}.safetensors`` and, once the run is complete, ``done.json``.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from experiments.compose import ConfigError, flatten, names, parse_overrides

CONFIG = "config.yaml"
DONE = "done.json"
LAST = "last.ckpt"
VALIDATED = "validated.json"
WEIGHTS = ("ema", "best", "last")
LONGEST_NAME = 160  # file systems allow 255 bytes; checkpoints and TensorBoard add to it

# Devices, logging and paths, and how data are read (not which): nothing here changes what is learnt, so these change
# neither the run's name nor whether it may be resumed.
NEUTRAL = (
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.shard_group",
    "trainer.encode_ahead",  # this one and the next two: when something is computed, or again; the same numbers
    "trainer.checkpointing",
    "trainer.memory_gib",
    "trainer.progress_bar",
    "trainer.peak_tflops",
    "trainer.log_every_steps",
    "trainer.checkpoint_every_steps",
    "trainer.keep_checkpoints",
    "trainer.async_checkpoints",
    "trainer.guard",  # a run that the guard ended may go on under another; what it left out is written down
    "trainer.guard.*",
    "trainer.max_minutes",
    "validation.*",
    "data.sets",
    "data.sets.*",
    "data.num_workers",
    "data.prefetch",
    "data.start_method",
    "data.timeout_s",
    "data.clip_timeout_s",
    "data.reader",
    "data.film_cache_gib",
    "train_parents",
    "beside",
    "beside.*",
    "*.lpips_weights",
    "objective.cache*",
    "*.path",
    "*_path",
    "*_dir",
    "*_root",
)


def is_neutral(key: str) -> bool:
    """Whether ``key`` says only where or how visibly a run happens."""
    return any(fnmatchcase(key, pattern) for pattern in NEUTRAL)


def _is_choice(key: str) -> bool:
    """A path that, typed as an override, chooses other data or another encoder: another run. Moving DATA_ROOT is none."""
    return fnmatchcase(key, "data.sources.*.path") or key == "space.path"


def runs_root() -> Path:
    """Where all runs are: ``RUNS_ROOT``, or ``runs/`` in the repository; for an installed package, in the working folder."""
    root = Path(__file__).parent.parent
    return Path(os.environ.get("RUNS_ROOT") or (root if (root / "pyproject.toml").is_file() else Path()) / "runs")


def run_name(name: str, overrides: Sequence[str] = (), *, counts: tuple[str, ...] = ()) -> str:
    """The folder name of ``name`` under ``overrides``: the same whatever their order, safe for any file system.

    ``counts``: beginnings of keys that are part of it although they are neutral to a run.
    """
    changes = {
        key: value
        for key, value in parse_overrides(overrides).items()
        if not is_neutral(key) or _is_choice(key) or key.startswith(counts)
    }
    if not changes:
        return name
    parts = [f"{key}={_brief(value)}" for key, value in sorted(changes.items())]
    full = "+".join((name, *parts))
    safe = re.sub(r"[^\w.,=+-]", "-", full)
    if safe == full and len(full) <= LONGEST_NAME:
        return full
    # What was cut or replaced is in the hash, so that two runs never share a folder.
    digest = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]
    return f"{safe[: LONGEST_NAME - 9]}-{digest}"


def _brief(value: Any) -> str:
    if isinstance(value, list) and not any(isinstance(item, list | dict | str) for item in value):
        return ",".join(map(_brief, value))
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def run_dir(name: str, overrides: Sequence[str] = ()) -> Path:
    """The folder of this run; it need not exist."""
    return runs_root() / run_name(name, overrides)


def diff(old: dict[str, Any] | str, new: dict[str, Any] | str) -> list[str]:
    """What separates two resolved configurations (YAML text or dictionaries), one ``key: old -> new`` a line.

    Devices, logging and paths are left out: a run may go on elsewhere.
    """
    before, after = (flatten(yaml.safe_load(side) if isinstance(side, str) else side) for side in (old, new))
    return [
        f"{key}: {_shown(before, key)} -> {_shown(after, key)}"
        for key in sorted(before.keys() | after.keys())
        if not is_neutral(key) and (key not in before or key not in after or before[key] != after[key])
    ]


def _shown(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "(absent)"


def find_parent(init_from: str, *, allow_unfinished: bool = False) -> Path:
    """The weights file that ``<experiment>[:ema|last|best]`` names. Without a suffix: EMA if the run kept one, else last.

    A path that ends in ``.safetensors`` is taken as it is. Raises ConfigError, which says what to run first.
    """
    if init_from.endswith(".safetensors"):
        if not Path(init_from).is_file():
            raise ConfigError(f"init_from: there is no file {init_from}")
        return Path(init_from)
    run, colon, kind = init_from.partition(":")
    if colon and kind not in WEIGHTS:
        raise ConfigError(f"init_from: '{kind}' is none of {', '.join(WEIGHTS)}; write {run}:ema, for example")
    folder = runs_root() / run
    if not folder.is_dir():
        raise ConfigError(f"init_from: {run} has not been trained under {runs_root()}; first {_command(run)}")
    if not (folder / DONE).is_file() and not allow_unfinished:
        raise ConfigError(
            f"init_from: {run} is not finished ({folder} has no {DONE}); finish it with {_command(run)}, "
            "or take it as it is with allow_unfinished_parent=true"
        )
    wanted = [kind] if colon else ["ema", "last"]
    files = [folder / f"weights-{kind}.safetensors" for kind in wanted]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        there = [kind for kind in WEIGHTS if (folder / f"weights-{kind}.safetensors").is_file()]
        hint = f"it has {', '.join(there)}" if there else f"it has no weights yet; go on with {_command(run)}"
        raise ConfigError(f"init_from: {folder} has no {files[-1].name}; {hint}")
    return found


def _command(run: str) -> str:
    """The command that makes ``run``. A folder's name may have been shortened, so its overrides are not spelled out."""
    name, overridden, _ = run.partition("+")
    if name not in names():
        near = get_close_matches(name, names(), n=1)
        return f"check the name: {f'did you mean {near[0]}? ' if near else ''}make list shows the experiments"
    return f"make exp={name}" + (" with the overrides that this name lists" if overridden else "")
