"""Evaluation sets by name, as commands take them: which there are, whether their clips are here, and what to do if not."""

from collections.abc import Sequence
from difflib import get_close_matches

from datamodules import named
from datamodules.config import SourceConfig
from datamodules.sources import SourceError, find
from experiments.compose import ConfigError
from experiments.config import Experiment


def check_sets(name: str, experiment: Experiment, wanted: Sequence[str]) -> list[str]:
    """The names of the evaluation sets that are asked for. Raises ConfigError for one that there is not."""
    known = list(experiment.data.sets)
    known += [one for one in named.names() if one not in known]
    if odd := [one for one in wanted if one not in known] or ([] if wanted else ["nothing"]):
        near = get_close_matches(odd[0], known, n=1)
        raise ConfigError(
            f"sets: {name} has no evaluation set {odd[0]!r}; {f'did you mean {near[0]}? ' if near else ''}there are "
            f"{', '.join(known)}"
        )
    return list(dict.fromkeys(wanted))


def require_sets(experiment: Experiment, sets: Sequence[str]) -> None:
    """Refuse a built-in set whose files are not there, saying where they come from. Raises ConfigError."""
    for one in sets:
        for source in named.read(one).sources if one in named.names() else ():
            if source not in experiment.data.val[one].sources:
                continue  # the experiment's own set of this name
            try:
                find(source, experiment.data.sources[source])
            except SourceError as error:
                raise ConfigError(f"{error}\n{named.read(one).help()}") from None


def another_shape(sets: Sequence[str] | None, error: str) -> str:
    """What to type where a decoder cannot take a set's size or length."""
    one = next((one for one in sets or () if error.startswith(f"data.val.{one}:")), None)
    if one is None:
        return ""
    return (
        f". For this evaluation: pad=replicate pads clips and crops what is decoded; data.sets.{one}.num_frames=... or "
        f"data.sets.{one}.size=[...] makes another set of it, in results of its own"
    )


def listed() -> str:
    """The built-in evaluation sets: what a clip is, whether the files are there, and what the set is."""
    lines = [["set", "clips", "here", "what"]]
    for one in map(named.read, named.names()):
        try:
            for source, config in one.sources.items():
                find(source, SourceConfig(**config))
            here = "yes"
        except SourceError:
            here = "no"
        lines.append([one.name, one.shape, here, f"{one.about} | {one.protocol}"])
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True)) for line in lines]
    return (
        "\n".join(rows)
        + "\n\nmake evaluate exp=NAME sets=[davis_256,samples]; missing clips: it says how to lay them out"
    )
