"""Has anything become slower? ``python -m experiments.bench_gate base=FILE [run=FILE]`` compares two files of bench-all.

    make bench-gate base=results/bench-all-amd-epyc-cpu-bf16.json run=/tmp/new/bench-all-amd-epyc-cpu-bf16.json

Only ratios between rows of one run are compared, never seconds: a machine that is slower today is slower for both rows. A
ratio is worse when it fell by more than ``tolerance`` and the two runs' spreads do not meet. Memory beside the other row's
must not grow by more than ``memory_tolerance``. A row that has no speed any more is worse, whatever the reason. Exit status 1
and the list when something is worse, 2 for files that cannot be compared.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.bench_all import read_options
from experiments.compose import ConfigError, run_cli

SAME = ("device", "dtype", "arithmetic")


@dataclass
class GateConfig:
    base: str = ""  # the earlier run's JSON
    run: str = ""  # the later one's; default: the file of base's name in results/
    tolerance: float = 0.1  # share of a ratio of frames/s
    memory_tolerance: float = 0.1
    allow_missing: bool = False  # rows that the later run did not try

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1 or self.memory_tolerance < 0:
            raise ValueError("tolerance is a share from 0 to below 1, memory_tolerance 0 or more")
        if not self.base:
            raise ValueError("base: which run to compare with? make bench-gate base=FILE [run=FILE]")


def main(arguments: list[str]) -> int:
    config = read_options(arguments, GateConfig)
    run = config.run or str(Path("results") / Path(config.base).name)
    if Path(run).resolve() == Path(config.base).resolve():
        raise ConfigError(f"run: {run} is the base itself; name another with run=FILE")
    base, new = (_read(path) for path in (config.base, run))
    for key in SAME:
        if base[key] != new[key]:
            raise ConfigError(f"{key} is {base[key]} in {config.base} and {new[key]} in {run}: no ratios to compare")
    worse, compared = judge(base, new, config)
    for line in worse:
        print(f"worse: {line}")
    print(f"{compared} ratios compared, {len(worse)} worse ({run} against {config.base})")
    return 1 if worse else 0


def judge(base: dict[str, Any], new: dict[str, Any], config: GateConfig) -> tuple[list[str], int]:
    """What is worse in ``new``, one line each, and how many ratios both have.

    Raises:
        ConfigError: there is none to compare.
    """
    found = {(each["row"], each["over"]): each for each in new["ratios"]}
    worse, compared = [], 0
    for before in base["ratios"]:
        names = before["row"], before["over"]
        after = found.get(names)
        if after is None:
            if reason := _missing(names, new, config):
                worse.append(f"{names[0]} / {names[1]}: {reason}")
            continue
        compared += 1
        if after["fps"] < before["fps"] * (1 - config.tolerance) and after["high"] < before["low"]:
            worse.append(
                f"{names[0]} / {names[1]}: {after['fps']:.3g}x ({after['low']:.3g} to {after['high']:.3g}), "
                f"was {before['fps']:.3g}x ({before['low']:.3g} to {before['high']:.3g})"
            )
        if _grew(before["memory"], after["memory"], config.memory_tolerance):
            worse.append(f"{names[0]} / {names[1]}: {after['memory']:.3g}x the memory, was {before['memory']:.3g}x")
    if not compared and not worse:
        raise ConfigError("the two files have no rows in common")
    return worse, compared


def _missing(names: tuple[str, str], new: dict[str, Any], config: GateConfig) -> str:
    """Why a ratio that was there is not, when that counts; else empty."""
    for name in names:
        row = new["rows"].get(name)
        if row is None and not config.allow_missing:
            return f"{name} was not tried (allow_missing=true lets it pass)"
        if row is not None and row["status"] != "measured":
            return f"{name} is {row['status']}: {row['reason']}"
    return ""


def _grew(before: float | None, after: float | None, tolerance: float) -> bool:
    return before is not None and after is not None and after > before * (1 + tolerance)


def _read(path: str) -> dict[str, Any]:
    """A finished run. Raises ConfigError for what is none."""
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"no file {path}; `make bench-all` writes one into results/") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    missing = [key for key in ("ratios", "rows", *SAME) if not isinstance(content, dict) or key not in content]
    if missing:
        raise ConfigError(f"{path} has no {missing[0]}: it is not of a finished `make bench-all`")
    return content


if __name__ == "__main__":
    run_cli(main)
