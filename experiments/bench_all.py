"""All families and sizes, teachers and peers, plain and optimised, in one table: ``python -m experiments.bench_all``.

    make bench-all                        # a GPU if there is one, else a CPU in minutes
    make bench-all profile=cpu only=['FlashDecoder-*','flash_vaed_wan21*'] sizes=[[256,256]] num_frames=[17] out=FOLDER

Random weights, batch 1. Every decoder has a process of its own. On a CPU those of one latent space take turns, and ratios are
of rounds; on a GPU each is measured alone. Each optimised form is held against its plain form, and that against float32, on
the same latents in the same run: one that differs by more than rounding is refused and has no speed. A row that was measured
on this machine, with these versions and this code, is not measured again (``fresh=true`` does); one that runs out of memory
says so. Written after every row: JSON, and at the end a table (Markdown) and a plot (SVG).
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import bench_plot, bench_results
from experiments.bench import choose_arithmetic, device_name, find_device
from experiments.bench_group import measure_group
from experiments.bench_meters import Energy, measure_rates
from experiments.bench_rows import PLAIN, PROFILES, Group, Profile, chosen, options_of
from experiments.bench_store import Store
from experiments.bench_worker import DTYPES
from experiments.compose import ConfigError, parse_overrides, run_cli
from experiments.measured import require_folder

ROOT = Path(__file__).parents[1]
# What a change of makes measurements old: everything that decodes, and what times it; not what tells of it.
TIMES = ("build", "check", "group", "memory", "meters", "rows", "worker")
CODE = ("decoders/**/*.py", "decoders/**/*.cpp", *(f"experiments/bench_{name}.py" for name in TIMES))


@dataclass
class AllConfig:
    """What is measured; null stands for the profile's own."""

    profile: Literal["auto", "cpu", "gpu"] = "auto"
    only: list[str] = field(default_factory=list)  # labels, experiments or groups, with * for anything
    ways: list[str] | None = None  # plain, optimised, optimised+compiled+linear8, ...
    sizes: list[list[int]] | None = None  # height, width, of all decoders
    num_frames: list[int] | None = None
    modes: list[str] | None = None  # stream, clip
    rounds: int | None = None
    minutes: float | None = None  # no further round of one size of a group is begun after so long
    dtype: Literal["bf16", "fp32"] = "bf16"
    arithmetic: Literal["auto", "bf16", "fp32"] = "auto"
    threads: int | None = None
    max_gib: float | None = None  # of weights that processes which take turns may hold; null: half of what is free
    out: str = "results"
    fresh: bool = False

    def __post_init__(self) -> None:
        for way in self.ways or ():
            options_of(way)
        for size in self.sizes or ():
            if len(size) != 2 or min(size) < 1:
                raise ValueError(f"sizes: {list(size)} is not [height, width]")
        for mode in self.modes or ():
            if mode not in ("stream", "clip"):
                raise ValueError(f"modes: no mode {mode}; there are stream and clip")
        if [] in (self.ways, self.sizes, self.num_frames, self.modes) or min(self.num_frames or [1]) < 1:
            raise ValueError("ways, sizes, num_frames and modes must not be empty, and num_frames 1 or more")
        if self.rounds is not None and self.rounds < 1:
            raise ValueError("rounds must be 1 or more")


def main(arguments: list[str]) -> int:
    config = read_options(arguments, AllConfig)
    result, path = bench_all(config, arguments)
    text = bench_results.report(result)
    print(text)
    path.with_suffix(".md").write_text(text)
    drawn = bench_plot.draw(result, path.with_suffix(".svg"))
    print(f"written to {path}, {path.with_suffix('.md')}" + (f" and {drawn}" if drawn else ""))
    wrong = [row for row in result["rows"].values() if row["status"] in ("refused", "failed")]
    for row in wrong:
        print(f"{row['status']}: {row['id']}: {row['reason']}", file=sys.stderr)
    return 1 if wrong else 0


def read_options(arguments: Sequence[str], schema: type) -> Any:
    """``["profile=cpu"]`` as checked options of ``schema``. Raises ConfigError."""
    if odd := [text for text in arguments if "=" not in text]:
        raise ConfigError(
            f"{odd[0]}: options are written key=value; there are {', '.join(schema.__dataclass_fields__)}"
        )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), parse_overrides(list(arguments)))
        return OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key + ': ' if key else ''}{str(error).splitlines()[0]}") from None


def bench_all(config: AllConfig, arguments: Sequence[str] = ()) -> tuple[dict[str, Any], Path]:
    """Measure what is missing; everything that is known, as in the JSON file, and that file."""
    name = config.profile if config.profile != "auto" else "gpu" if torch.cuda.is_available() else "cpu"
    device = find_device(PROFILES[name].device, "profile")
    try:
        groups = _with_ways(chosen(name, config.only), name, config.ways)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    require_folder(config.out)
    if config.threads:
        torch.set_num_threads(config.threads)
    profile = _changed(PROFILES[name], config)
    arithmetic, _ = choose_arithmetic(device, config)
    shared = {
        "device": device,
        "dtype": config.dtype,
        "float32_arithmetic": config.dtype == "bf16" and arithmetic == "fp32",
        "layout": "auto",
        "compile": False,
        "threads": config.threads,
    }
    path = bench_results.path_of(config.out, device_name(device), name, config.dtype)
    how = conditions(device, config, arithmetic)
    store = Store(path, how, fresh=config.fresh)
    store.about |= {
        "command": " ".join(["python -m experiments.bench_all", *arguments]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": asdict(config),
        "energy": Energy(torch.device(device)).source,
    }
    if "rates" not in store.about:  # else those that the rows which are kept were measured beside
        rates = measure_rates(torch.device(device), DTYPES[config.dtype], shared["float32_arithmetic"])
        store.about["rates"] = asdict(rates)
        store.save()
    sizes = [tuple(size) for size in config.sizes or ()]
    for group in groups:
        measure_group(group, profile, store, shared, sizes, config.num_frames, name, config.max_gib)
    result = bench_results.complete(store.content())
    store.about["ratios"] = result["ratios"]
    store.save()
    shutil.rmtree(
        path.with_suffix(".frames"), ignore_errors=True
    )  # only kept for whoever goes on after an interruption
    return result, path


def conditions(device: str, config: AllConfig, arithmetic: str) -> dict[str, Any]:
    """What measurements must have in common to stand in one table; kept with each, and compared before one is taken over."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "dtype": config.dtype,
        "arithmetic": arithmetic,
        "versions": {package: version(package) for package in ("torch", "diffusers")}
        | {"python": ".".join(map(str, sys.version_info[:3]))}
        | ({"cuda": torch.version.cuda} if device == "cuda" else {}),
        "code": code_hash(),
        "cores": os.cpu_count(),
    }


def code_hash(root: Path = ROOT) -> str:
    """Of the files that decide what is measured."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in CODE for path in root.glob(pattern)}):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _changed(profile: Profile, config: AllConfig) -> Profile:
    changes = {key: getattr(config, key) for key in ("rounds", "minutes") if getattr(config, key) is not None}
    return replace(profile, **changes | ({"modes": tuple(config.modes)} if config.modes else {}))


def _with_ways(groups: list[Group], profile: str, ways: list[str] | None) -> list[Group]:
    """With ``ways``, every decoder that has more than its plain form is run in those, and in the plain form."""
    if ways is None:
        return groups
    given = tuple(dict.fromkeys([PLAIN, *ways]))
    return [
        replace(
            group,
            entries=tuple(replace(e, ways={profile: given}) if e.ways else e for e in group.entries),
        )
        for group in groups
    ]


if __name__ == "__main__":
    run_cli(main)
