"""Evaluation sets by name: ``datamodules/sets/<name>.yaml``, for ``make evaluate exp=NAME sets=[davis_256]`` of any experiment.

    about:     what the set is and where it comes from
    licence:   of its clips
    layout:    how to lay it out
    protocol:  whose size, frames and windows these are: a paper's, or proposed
    sources:   as under data.sources
    stream:    as under data.sets; its sources are those above where it names none
    like:      another set, whose entries these are laid over

An experiment's own ``data.sets.<name>`` with sources of its own takes a built-in set's place; without sources it is laid over
it (``data.sets.davis_256.num_frames=17``). So are its own ``data.sources.<name>`` over the set's (``data.sources.davis.path``).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "sets"
TEXTS = ("about", "licence", "layout", "protocol")


@dataclass(frozen=True)
class NamedSet:
    """A built-in evaluation set. ``sources`` and ``stream`` are plain, as YAML has them."""

    name: str
    about: str
    licence: str
    layout: str
    protocol: str
    sources: dict[str, dict[str, Any]]
    stream: dict[str, Any]

    @property
    def shape(self) -> str:
        """Frames and size of its clips, for a list."""
        height, width = self.stream["size"]
        return f"{self.stream['num_frames']} x {height}x{width}"

    def help(self) -> str:
        """Where its clips come from and how to lay them out."""
        return f"{self.name}: {self.about}\n  licence: {self.licence}\n  layout: {self.layout}"


def names() -> list[str]:
    """All built-in sets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> NamedSet:
    """The built-in set of this name. Raises ValueError for a file that says too little or too much."""
    content = _content(name)
    content.setdefault("sources", {})
    content.setdefault("stream", {}).setdefault("sources", list(content["sources"]))
    wanted = {*TEXTS, "sources", "stream"}
    if odd := sorted(content.keys() ^ wanted):
        raise ValueError(f"datamodules/sets/{name}.yaml: {odd[0]} is missing, or no entry of a set")
    texts = {key: " ".join(content[key].split()) for key in TEXTS}
    return NamedSet(name, **texts, sources=content["sources"], stream=content["stream"])


def _content(name: str) -> dict[str, Any]:
    own = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    if "like" not in own:
        return own
    below = _content(own.pop("like"))
    return below | own | {"stream": below.get("stream", {}) | own.get("stream", {})}


def layer(name: str) -> dict[str, Any]:
    """What the set is of an experiment: ``{"data": {"sources": ..., "sets": ...}}``."""
    found = read(name)
    return {"data": {"sources": found.sources, "sets": {name: found.stream}}}
