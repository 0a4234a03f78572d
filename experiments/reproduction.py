"""The reproduction index: ``python -m experiments.reproduction``, or ``make index``, writes ``results/REPRODUCTION.md``.

Every table and figure of the four papers, from ``results/papers.yaml``: what it shows, their figures, the commands that
reproduce it here, what that needs, and what we have measured so far.
"""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from experiments.checkpoints import write_atomically
from experiments.compose import run_cli
from experiments.measured import markdown

SOURCE = Path(__file__).parent.parent / "results" / "papers.yaml"
PAGE = Path(__file__).parent.parent / "results" / "REPRODUCTION.md"
NOT_MEASURED = "not measured"
HEAD = """# Reproduction index

Every table and figure of the four papers, and what reproduces it here. Written by `make index` from `results/papers.yaml`: change
that, not this page. "Theirs" are the papers' figures, on their clips, protocols and machines. A command that trains takes what
"needs" says; stages train in the order in which they stand, and only `make exp=` of a demo is meant for a CPU. What we have not
run is "not measured".
"""


@cache
def papers() -> dict[str, Any]:
    """The index as data: paper -> title, copies, items. All values are text: figures keep the digits that papers print."""
    return yaml.load(SOURCE.read_text(), Loader=yaml.BaseLoader)


def figures_of(experiment: str, run: str) -> list[dict[str, Any]]:
    """The figures that papers print for what ``experiment`` reproduces, to stand beside the run ``run``; theirs, not ours."""
    return [
        {
            "run": run,
            "paper": name,
            "where": item["where"],
            "what": figure["label"],
            "setting": figure["setting"],
            "values": figure["values"],
        }
        for name, paper in papers().items()
        for item in paper["items"]
        for figure in item.get("theirs", [])
        if figure.get("run") == experiment
    ]


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, _summary(), *(_paper(paper) for paper in papers().values())])


def _summary() -> str:
    lines = [["paper", "tables and figures", "with a command here", "with a measurement of ours"]]
    for paper in papers().values():
        items = paper["items"]
        counts = (len(items), sum(bool(i["commands"]) for i in items), sum("measured" in i for i in items))
        lines.append([paper["title"].partition(":")[0], *map(str, counts)])
    return markdown(lines)


def _paper(paper: dict[str, Any]) -> str:
    parts = [f"## {paper['title']}\n", f"What our copies hold: {paper['copies']}\n"]
    return "\n".join([*parts, *(_item(item) for item in paper["items"])])


def _item(item: dict[str, Any]) -> str:
    parts = [f"### {item['where']}: {item['shows']}\n"]
    if figures := item.get("theirs"):
        names = list(dict.fromkeys(name for figure in figures for name in figure["values"]))
        lines = [["theirs", "setting", *names, "here"]]
        for figure in figures:
            values = (str(figure["values"].get(name, "")) for name in names)
            lines.append([figure["label"], figure["setting"], *values, f"`{figure['run']}`" if "run" in figure else ""])
        parts.append(markdown(lines))
    if missing := item.get("missing"):
        parts.append(f"Not in our copies: {missing}.\n")
    if item["commands"]:
        parts.append("\n".join(f"    {command}" for command in item["commands"]) + "\n")
    else:
        parts.append("Here: no command reproduces it.\n")
    parts.append("Needs: " + "; ".join(f"{key} {value}" for key, value in item["needs"].items()) + ".\n")
    parts.append(f"Ours: {item.get('measured', NOT_MEASURED).rstrip('.')}.\n")
    return "\n".join(parts)


def main(arguments: list[str]) -> None:
    write_atomically(PAGE, lambda path: path.write_text(page()))
    print(f"written: {PAGE}")


if __name__ == "__main__":
    run_cli(main)
