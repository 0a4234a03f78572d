"""Where a report goes: nobody else's files are touched, and no two reports share a folder."""

import json
import os
from pathlib import Path

import pytest

from experiments import report, report_folder
from experiments.compose import ConfigError
from experiments.report_folder import MARKER, default, replaced


def write(out: Path, *files: str) -> None:
    with replaced(out) as made:
        for file in files:
            (made / file).parent.mkdir(exist_ok=True)
            (made / file).write_text(f"{file} of {files}")


def inside(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}


def test_a_report_takes_the_place_of_the_one_before_and_of_nothing_else(tmp_path):
    out = tmp_path / "some" / "page"
    write(out, "index.html", "clips/0.js", "clips/1.js", "videos/0-films.mp4")
    assert inside(out) == {"index.html", "clips/0.js", "clips/1.js", "videos/0-films.mp4", MARKER}
    (out / "clips" / "notes.txt").write_text("somebody's")
    (out / "videos" / "mine.mp4").write_text("somebody's")
    (out / "plots").mkdir()
    write(out, "index.html", "clips/0.js")
    assert inside(out) == {"index.html", "clips/0.js", "clips/notes.txt", "videos/mine.mp4", MARKER}
    assert (out / "index.html").read_text() == "index.html of ('index.html', 'clips/0.js')"
    assert [path.name for path in out.parent.iterdir()] == ["page"], "nothing is left beside it"


@pytest.mark.parametrize("folder", ["clips", "videos", "plots"])
def test_a_folder_that_no_report_wrote_is_refused(tmp_path, folder):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "precious.mp4").write_text("a film")
    with pytest.raises(ConfigError, match=f"holds what no report wrote .{folder}"):
        report.report(report.ReportConfig(["no_such_run"], out=str(tmp_path)))  # told before the run is looked for
    with pytest.raises(ConfigError, match="holds what no report wrote"):
        write(tmp_path, "index.html")
    assert inside(tmp_path) == {f"{folder}/precious.mp4"}


def test_somebody_elses_file_is_not_written_over(tmp_path):
    out = tmp_path / "page"
    write(out, "index.html")
    (out / "data.js").write_text("somebody's")
    with pytest.raises(ConfigError, match=r"data\.js there was not written by a report"):
        write(out, "index.html", "data.js")
    assert (out / "data.js").read_text() == "somebody's" and "'data.js'" not in (out / "index.html").read_text()


def test_a_report_that_fails_leaves_the_one_before(tmp_path):
    out = tmp_path / "page"
    write(out, "index.html", "clips/0.js")
    with pytest.raises(RuntimeError), replaced(out) as made:
        (made / "index.html").write_text("half")
        raise RuntimeError
    assert inside(out) == {"index.html", "clips/0.js", MARKER} and [p.name for p in tmp_path.iterdir()] == ["page"]


def test_a_marker_leads_nowhere_else(tmp_path):
    """Paths in it that lead out of the folder, straight or by a link, are not deleted."""
    out, other = tmp_path / "page", tmp_path / "other"
    out.mkdir(), other.mkdir()
    (other / "precious").write_text("")
    os.symlink(other, out / "clips")
    files = ["../other/precious", str(other / "precious"), "clips/precious"]
    (out / MARKER).write_text(json.dumps({"files": files}))
    write(out, "index.html")
    assert (other / "precious").is_file()
    with pytest.raises(ConfigError, match="clips/0.js there was not written by a report"):
        write(out, "clips/0.js")
    (out / MARKER).write_text("[]")
    with pytest.raises(ConfigError, match="is not a report's"):
        write(out, "index.html")
    with pytest.raises(ConfigError, match="is a file"):
        report_folder.earlier(out / "index.html")


def test_no_two_reports_share_a_folder(runs_root):
    long = "flashdecoder_debug+" + "a" * 110
    asked = [
        ((["a", "b"], None, ()), (["a", "b"], ["davis"], ())),
        ((["a"], ["x"], ()), (["a"], ["y"], ())),
        ((["a"], None, ["objective.steps=4"]), (["a"], None, ["objective.steps=8"])),
        (([long, "one"], None, ()), ([long, "two"], None, ())),
        ((["a", "b"], None, ()), (["a-b"], None, ())),
    ]
    for one, other in asked:
        assert default(*one) != default(*other)
        assert default(*one).parent == runs_root / "comparisons" and len(default(*one).name) < 200


def test_options():
    found = report.options(
        ["a+b=1 c:best", "sets=[x]", "out=/tmp/a+b", "max_mb=5", "data.val.x.size=[8,8]", "pad=replicate"],
        report.ReportConfig,
    )
    assert found.overrides == ["data.val.x.size=[8,8]", "pad=replicate"]
    assert (found.runs, found.sets, found.out, found.max_mb) == (["a+b=1", "c:best"], ["x"], "/tmp/a+b", 5.0)
    for wrong, said in (([], "which runs"), (["a", "frames=1"], "frames 2 or more"), (["a", "clip=3"], "clip")):
        with pytest.raises(ConfigError, match=said):
            report.options(wrong, report.ReportConfig)
