"""What a comparison does with scores: columns of one protocol, paired differences, what is best, what is shown once."""

import csv
import io
import math

import matplotlib
import pytest
from compare_small import FLOORS, A, compared, evaluation, shifted
from matplotlib.backends.backend_agg import FigureCanvasAgg

from decoders.scoring import TRUTH
from experiments import compare_plots, compare_scores, compare_speed, compare_table
from experiments.comparison import FLOOR, METHOD, RUN, SPACE, Comparison, Speed
from experiments.compose import ConfigError
from metrics.intervals import interval_of_mean

FLOOR_SCORES = dict(zip("abcdef", (10.0, 11.0, 12.0, 10.5, 11.5, 11.0), strict=True))


def test_means_intervals_and_paired_differences():
    comparison = compared(evaluation("x", {"decoder": {"psnr": A}}), evaluation("y", {"decoder": {"psnr": shifted(1)}}))
    x, y = (comparison.row(name).scores["s/psnr"] for name in "xy")
    assert (x.mean, x.low, x.high) == pytest.approx(interval_of_mean(list(A.values())))
    assert x.delta is None and y.delta == pytest.approx(
        [1, 1, 1]
    )  # every clip is one better: no doubt, though intervals overlap
    assert x.high > y.low and (x.best, y.best) == (False, True)


def test_ties_are_marked_together_and_the_lower_may_be_better():
    near = {"a": 20.5, "b": 24.4, "c": 30.2, "d": 21.2, "e": 28.4, "f": 25.1}
    three = [("x", A), ("y", near), ("z", shifted(-3))]
    comparison = compared(*(evaluation(name, {"decoder": {"psnr": s, "lpips_alex": s}}) for name, s in three))
    best = {c: [row.id for row in comparison.rows if row.scores[c].best] for c in ("s/psnr", "s/lpips_alex")}
    assert best == {"s/psnr": ["x", "y"], "s/lpips_alex": ["z"]}
    alone = compared(evaluation("x", {"decoder": {"psnr": A}}))
    assert not alone.row("x").scores["s/psnr"].best
    one_clip = compared(*(evaluation(name, {"decoder": {"psnr": {"a": v}}}) for name, v in (("x", 1.0), ("y", 2.0))))
    score = one_clip.row("y").scores["s/psnr"]
    assert (score.low, score.high, score.best, score.delta) == (None, None, False, [1.0, None, None])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"size": (64, 48)}, "size"),
        ({"frames": (0, 17)}, "frames"),
        ({"resize": "area"}, "resize"),
        ({"frame_stride": 2}, "frame_stride"),
        ({"definition": {"peak": 2.0}}, r"definition\.peak"),
    ],
)
def test_what_was_measured_otherwise_is_refused(change, field):
    same = [evaluation(name, {"decoder": {"psnr": A}}) for name in ("x", "y")]
    with pytest.raises(ConfigError, match=rf'(?s)s/psnr: .*z: {field} is.*exps="x y".*none of the others: z'):
        compared(*same, evaluation("z", {"decoder": {"psnr": A}}, **change))
    with pytest.raises(ConfigError, match="no two of these runs were measured alike"):
        compared(same[0], evaluation("z", {"decoder": {"psnr": A}}, **change))


def test_other_clips_are_refused_and_so_are_other_streams():
    other = evaluation("y", {"decoder": {"psnr": {"a": 1.0, "b": 1.0, "d": 1.0}}})
    with pytest.raises(ConfigError, match="y: clips is"):
        compared(evaluation("x", {"decoder": {"psnr": dict.fromkeys("abc", 1.0)}}), other)
    apart = evaluation("y", {"decoder": {"psnr": A}})
    apart.result["protocols"] = {"elsewhere/psnr": apart.result["protocols"]["s/psnr"]}
    with pytest.raises(ConfigError, match=r"(?s)no clips in common.*x: s\n.*y: elsewhere"):
        compared(evaluation("x", {"decoder": {"psnr": A}}), apart)


def test_how_pixels_were_made_may_differ_and_is_shown():
    made = {"dtype": "bf16-mixed", "latent_space": "wan-2", "definition": {"peak": 1.0, "decoding": {"steps": 4}}}
    comparison = compared(
        evaluation("x", {"decoder": {"psnr": A}}), evaluation("y", {"decoder": {"psnr": shifted(1)}}, **made)
    )
    assert comparison.row("y").made == {"dtype": "bf16-mixed", "latent_space": "wan-2", "steps": 4}
    assert "bf16-mixed; wan-2\n" in compare_table.render(comparison, "txt"), "steps have a column of their own"
    assert "different latents" in " ".join(comparison.notes)


@pytest.mark.parametrize("made", [{"sampler_steps": 3}, {"definition": {"peak": 1.0, "decoding": {"steps": 3}}}])
def test_a_samplers_steps_have_a_column_where_there_is_one(made):
    """Of a run by what it was evaluated with; of its methods by their names; nothing of what has no sampler."""
    others = {
        name: {"psnr": shifted(n)} for n, name in enumerate(("8 steps, latent extension", "other noise 1", "teacher"))
    }
    sampled = evaluation("y", {"decoder": {"psnr": shifted(4)}, **others, FLOORS[0]: {"psnr": shifted(9)}}, **made)
    comparison = compared(evaluation("x", {"decoder": {"psnr": A}}), sampled, methods="all")
    assert {row.label: row.sampler_steps for row in comparison.rows} == {
        "x": None, "y": 3, "y: 8 steps, latent extension": 8, "y: other noise 1": None, "y: teacher": None,
        FLOORS[0]: None,
    }  # fmt: skip
    assert Comparison.from_dict(comparison.to_dict()).row("y").sampler_steps == 3
    tables = {table.title.partition(":")[0]: table for table in compare_table.tables(comparison)}
    for title in ("Quality", "Speed and size"):
        head, *lines = [[cell.text for cell in line] for line in tables[title].lines]
        place = head.index("sampler steps")
        told = {line[0]: line[place] for line in lines}
        assert (told["x"], told["y"]) == ("", "3"), title
    for line in csv.DictReader(io.StringIO(compare_table.render(comparison, "csv"))):
        assert line["sampler_steps"] == {"y": "3", "y: 8 steps, latent extension": "8"}.get(line["row"], "")
    plain = compared(evaluation("x", {"decoder": {"psnr": A}}), evaluation("z", {"decoder": {"psnr": shifted(1)}}))
    assert "sampler steps" not in compare_table.render(plain, "txt"), "no sampler, no column"


def test_a_floor_that_runs_share_stands_once_and_others_stay_apart():
    def methods(offset: float, floor: float = 0.0):
        lowest = {key: value + floor for key, value in FLOOR_SCORES.items()}
        others = {"teacher": {"psnr": shifted(5 + offset)}, "2 steps": {"psnr": A}, FLOORS[0]: {"psnr": lowest}}
        return {"decoder": {"psnr": shifted(offset)}} | others

    comparison = compared(evaluation("x", methods(0)), evaluation("y", methods(1, floor=0.001)))
    assert [(row.id, row.kind) for row in comparison.rows] == [
        ("x", RUN), ("y", RUN), ("x: teacher", METHOD), ("y: teacher", METHOD), (FLOORS[0], FLOOR),
    ]  # fmt: skip
    assert comparison.rows[-1].runs == ["x", "y"]
    assert comparison.row("x").share == {"s": pytest.approx(25 / 30)}
    assert len(compared(evaluation("x", methods(0)), methods="none").rows) == 1
    every = compared(evaluation("x", methods(0)), evaluation("y", methods(1, floor=3)), methods="all")
    assert [row.id for row in every.rows[2:]] == [
        "x: teacher", "2 steps", "y: teacher", f"x: {FLOORS[0]}", f"y: {FLOORS[0]}",
    ]  # fmt: skip


def test_the_spaces_own_decoder_is_known_by_its_name():
    comparison = compared(evaluation("x", {"decoder": {"psnr": A}, FLOORS[1]: {"psnr": shifted(2)}}))
    assert (comparison.rows[1].kind, comparison.rows[1].label) == (SPACE, FLOORS[1])
    assert comparison.rows[1].made == {}


def test_scores_of_all_clips_together_have_no_interval():
    of_all = [{"decoder": {"fvd_i3d_16f_n6": value}} for value in (90.0, 70.0)]
    comparison = compared(
        *(evaluation(n, {"decoder": {"psnr": A}}, of_all=o) for n, o in zip("xy", of_all, strict=True))
    )
    x, y = (comparison.row(name).scores["s/fvd_i3d_16f_n6"] for name in "xy")
    assert (x.low, x.clips, x.best) == (None, 6, False) and y.best and y.delta == [-20.0, None, None]
    assert not comparison.column("s", "fvd_i3d_16f_n6").per_clip
    assert "says nothing of chance" in " ".join(comparison.notes)


def test_a_method_of_fewer_clips_says_so():
    fewer = {"decoder": {"psnr": A}, "teacher": {"psnr": {"a": 21.0, "b": 26.0}}}
    comparison = compared(evaluation("x", fewer))
    assert comparison.row("teacher").scores["s/psnr"].delta == pytest.approx([1, 1, 1]), "on the clips that both have"
    assert "teacher was scored on 2 of the 6 clips of s." in comparison.notes


def test_clips_that_have_no_score_by_their_nature_are_left_out(tmp_path):
    """An image has no score of what lies between frames; the means say that nothing is wrong with it."""
    (tmp_path / "clips.csv").write_text(
        "stream,key,method,frames,psnr,jump,category\ns,a,decoder,1,20.5,nan,street\ns,b,decoder,9,21.5,0.5,\n"
    )
    scores = compare_scores._clips(tmp_path / "clips.csv")["s", "decoder"]
    assert scores["psnr"] == {"a": 20.5, "b": 21.5} and scores["jump"] == {"b": 0.5} and "category" not in scores


def test_worst_clips_are_those_with_the_worst_scores():
    other = {"a": 26.0, "b": 24.0, "c": 29.0, "d": 30.0, "e": 30.0, "f": 30.0}
    comparison = compared(
        *(evaluation(n, {"decoder": {"psnr": s, "lpips_alex": s}}) for n, s in (("x", A), ("y", other)))
    )
    found = compare_table.worst_clips(comparison, "s/psnr", "y", 2)
    assert found == [{"key": "b", "score": 24.0, "delta": -1.0}, {"key": "a", "score": 26.0, "delta": 6.0}]
    assert compare_table.worst_clips(comparison, "s/lpips_alex", "x", 1) == [{"key": "c", "score": 30.0, "delta": None}]


def test_latex_prints_what_stands_there():
    assert compare_table.escape("a_b & 50 % of {x}^2 ~ \\n #1 $") == (
        r"a\_b \& 50 \% of \{x\}\textasciicircum{}2 \textasciitilde{} \textbackslash{}n \#1 \$"
    )
    assert compare_table.escape("[1, 2]") == "{[}1, 2{]}"
    comparison = compared(
        evaluation("my_run", {"decoder": {"psnr": A}}), evaluation("y", {"decoder": {"psnr": shifted(1)}})
    )
    text = compare_table.render(comparison, "tex")
    assert r"my\_run & 25.00 {[}" in text and r"\textbf{26.00 {[}" in text
    body = "\n".join(
        line for line in text.splitlines() if not line.startswith(("%", r"\begin", r"\end", r"\centering"))
    )
    unescaped = body.replace(r"\_", "").replace(r"\%", "").replace(r"\&", "")
    assert "_" not in unescaped and "%" not in unescaped
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    tables = text.count(r"\toprule")
    assert tables == text.count(r"\bottomrule") == text.count(r"\caption{") and len(rows) > tables
    assert text.count("{") == text.count("}")


def test_the_best_is_bold_in_markdown_and_starred_in_text():
    comparison = compared(evaluation("x", {"decoder": {"psnr": A}}), evaluation("y", {"decoder": {"psnr": shifted(1)}}))
    markdown, text = (compare_table.render(comparison, kind) for kind in ("md", "txt"))
    assert "**26.00 [" in markdown and "**25.00" not in markdown
    assert (
        text.splitlines()[3].split("  ")[0] == "y" and "]*" in text.splitlines()[3] and "]*" not in text.splitlines()[2]
    )


def test_no_number_of_a_comparison_is_nan():
    comparison = compared(
        evaluation("x", {"decoder": {"psnr": {"a": 1.0}}}), evaluation("y", {"decoder": {"psnr": {"a": 2.0}}})
    )
    again = Comparison.from_dict(comparison.to_dict())
    assert again == comparison
    flat = [v for row in again.rows for s in row.scores.values() for v in (s.mean, s.low, s.high, *(s.delta or []))]
    assert not any(isinstance(value, float) and math.isnan(value) for value in flat)


def test_labels_of_close_points_do_not_cover_one_another():
    names = [f"compare_family_{number}" for number in range(6)]
    comparison = compared(*(evaluation(n, {"decoder": {"psnr": shifted(0.1 * i)}}) for i, n in enumerate(names)))
    comparison.machine = {
        "device": "a machine",
        "threads": 2,
        "dtype": "float32",
        "rounds": 1,
        "others_cpu_share": None,
    }
    for number, row in enumerate(comparison.rows):
        fps = 20.0 + number
        row.speed = Speed("s", 9, [32, 48], [9 / fps], fps, 0.9 * fps, 1.1 * fps)
    figure = compare_plots._against_speed(comparison)["fps_psnr"]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in figure.axes[0].texts]
    assert [text.get_text() for text in figure.axes[0].texts] == names
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert figure.axes[0].get_xscale() == "log" and "6 clips, 9 frames each" in figure.get_suptitle()


# --- what must not be put beside one another --------------------------------------------------------------------------


def test_a_prediction_that_is_not_finite_has_no_mean_no_difference_and_no_mark():
    broken = shifted(9.0, c=math.nan)  # far the best on what is left of it
    three = [("x", A), ("y", broken), ("z", shifted(1.0))]
    comparison = compared(*(evaluation(n, {"decoder": {"psnr": s, "ssim": A}}) for n, s in three))
    y = comparison.row("y").scores["s/psnr"]
    assert (y.mean, y.low, y.high, y.delta, y.best, y.clips) == (None, None, None, None, False, 6)
    assert comparison.row("z").scores["s/psnr"].best and not comparison.row("x").scores["s/psnr"].best
    assert comparison.row("y").scores["s/ssim"].mean == 25.0, "other scores are there"
    text = compare_table.render(comparison, "txt")
    assert "not finite" in text and "y gave pixels that are not finite" in text
    assert "s/psnr" not in comparison.row("y").clips and comparison.column("s", "psnr").per_clip
    alone = compared(evaluation("y", {"decoder": {"psnr": dict.fromkeys("abcdef", math.nan)}}))
    assert alone.columns[0].per_clip and alone.row("y").scores["s/psnr"].mean is None
    first = compared(*(evaluation(n, {"decoder": {"psnr": s}}) for n, s in (("y", broken), ("x", A))))
    score = first.row("x").scores["s/psnr"]
    assert (score.delta, score.best) == (None, False), "nothing to be told from, nothing to be better than"
    assert Comparison.from_dict(first.to_dict()) == first


def test_runs_whose_scored_clips_do_not_meet_are_not_marked():
    two = [evaluation(name, {"decoder": {"psnr": A, "jump": A}}) for name in "xy"]
    for each, keys in zip(two, ("abc", "def"), strict=True):  # as images have no score between frames
        scores = each.clips["s", "decoder"]
        scores["jump"] = {key: scores["jump"][key] for key in keys}
    comparison = compared(*two)
    assert not any(comparison.row(name).scores["s/jump"].best for name in "xy")
    assert comparison.row("y").scores["s/jump"].delta is None


@pytest.mark.parametrize(("clips", "marked"), [(5, False), (6, True)])
def test_nothing_is_best_of_few_clips(clips, marked):
    few = dict(list(A.items())[:clips])
    better = {key: value + 1 for key, value in few.items()}
    of_all = [{"decoder": {f"fvd_i3d_16f_n{clips}": value}} for value in (90.0, 70.0)]
    given = zip("xy", (few, better), of_all, strict=True)
    comparison = compared(*(evaluation(n, {"decoder": {"psnr": s}}, of_all=o) for n, s, o in given))
    assert {score.best for score in comparison.row("y").scores.values()} == {marked}


def test_clips_of_one_film_are_told():
    windows = {f"film.mp4#{start}@0": value for start, value in enumerate(A.values())}
    comparison = compared(evaluation("x", {"decoder": {"psnr": windows}}))
    assert comparison.stream("s").films == 1
    text = compare_table.render(comparison, "txt")
    assert "6 clips of 1 film (list" in text and text.count("6 clips of 1 film") == 2
    assert "those of one film are not" in text
    apart = {f"{letter}.mp4#0@0": value for letter, value in A.items()}
    assert "6 clips of 6 films" in compare_table.render(compared(evaluation("x", {"decoder": {"psnr": apart}})), "txt")
    untold = compared(evaluation("x", {"decoder": {"psnr": A}}))
    assert untold.stream("s").films is None and "6 clips (list" in compare_table.render(untold, "txt")


def of_frames(name: str, frames: str, by: float) -> "compare_scores.Evaluation":
    """An evaluation with scores of the group "seam", which has these frames."""
    found = evaluation(name, {"decoder": {"psnr": shifted(by), "psnr_seam": shifted(by)}})
    found.result["protocols"]["s/psnr_seam"]["definition"]["only_frames"] = {"group": "seam", "frames": frames}
    return found


def test_groups_of_other_frames_are_columns_of_their_own():
    comparison = compared(of_frames("x", "5, 10", 0), of_frames("y", "4, 8", 2), of_frames("z", "5, 10", 1))
    ids = ["s/psnr", "s/psnr_seam (frames 5, 10)", "s/psnr_seam (frames 4, 8)"]
    assert [column.id for column in comparison.columns] == ids
    assert [(c.name, c.metric) for c in comparison.columns[1:]] == [("psnr_seam", "psnr")] * 2
    x, y, z = (comparison.row(name).scores for name in "xyz")
    assert set(x) == set(z) == set(ids[:2]) and set(y) == {ids[0], ids[2]}
    assert y[ids[2]].delta is None and not y[ids[2]].best, "nobody else has these frames"
    assert z[ids[1]].delta[0] == pytest.approx(1) and z[ids[1]].best and not x[ids[1]].best
    assert "psnr_seam (frames 4, 8) (dB) ↑" in compare_table.render(comparison, "md")
    same = compared(of_frames("x", "5", 0), of_frames("y", "5", 1))
    assert [column.id for column in same.columns] == ["s/psnr", "s/psnr_seam"] and same.columns[1].metric == "psnr"
    other = of_frames("y", "5", 1)
    other.result["protocols"]["s/psnr_seam"]["size"] = [64, 48]
    with pytest.raises(ConfigError, match="size"):
        compared(of_frames("x", "5", 0), other)


def test_what_the_truth_has_a_value_of_is_told_from_the_truth():
    of_truth = {key: 1.0 + 0.01 * i for i, key in enumerate(A)}
    low, high = ({key: value + by for key, value in of_truth.items()} for by in (-0.5, 0.25))

    def methods(flicker):
        return {"decoder": {"psnr": A, "flicker": flicker}, TRUTH: {"flicker": of_truth}}

    comparison = compared(evaluation("x", methods(low)), evaluation("y", methods(high)), references=(*FLOORS, TRUTH))
    column = comparison.column("s", "flicker")
    assert (column.against, column.of_truth, comparison.column("s", "psnr").against) == (TRUTH, True, "x")
    deltas = {name: comparison.row(name).scores["s/flicker"].delta[0] for name in "xy"}
    assert deltas == pytest.approx({"x": -0.5, "y": 0.25}), "each from the truth, the baseline too"
    assert not any(row.scores["s/flicker"].best for row in comparison.rows)
    text = compare_table.render(comparison, "txt")
    assert "flicker minus truth" in text and "flicker ↓" not in text and "flicker ↑" not in text
    assert "psnr (dB) ↑" in text and "nearer the truth's" in compare_plots._axis(column)
    found = compare_table.worst_clips(comparison, "s/flicker", "x", 1)[0]
    assert found["delta"] == pytest.approx(-0.5)
    untold = compared(*(evaluation(n, {"decoder": {"psnr": A, "flicker": s}}) for n, s in (("x", low), ("y", high))))
    assert untold.row("y").scores["s/flicker"].delta is None and untold.column("s", "flicker").against == ""


def test_what_no_method_has_a_score_of_is_no_column():
    """Such as flicker of a group of one frame: it has a protocol and no mean."""
    given = evaluation("x", {"decoder": {"psnr": A, "flicker_reference": A}})
    for mean in given.result["means"]:
        del mean["scores"]["flicker_reference"]
    assert [column.id for column in compared(given).columns] == ["s/psnr"]


def test_two_teachers_of_two_runs_each_are_two_rows():
    by_run = zip("wxyz", (0, 0, 5, 5), strict=True)
    comparison = compared(
        *(evaluation(n, {"decoder": {"psnr": shifted(-1)}, "teacher": {"psnr": shifted(by)}}) for n, by in by_run)
    )
    assert [row.id for row in comparison.rows[4:]] == ["w and 1 more: teacher", "y and 1 more: teacher"]
    assert comparison.row("y and 1 more: teacher").scores["s/psnr"].mean == pytest.approx(30)


def test_each_row_gets_its_own_timing_even_where_labels_are_equal(monkeypatch):
    class Fixed:
        """A decoder that takes as long as its place says."""

        made = 0

        def __init__(self, job, make):
            Fixed.made += 1
            self.job, self.seconds, self.failed = job, float(Fixed.made), ""
            self.about = {"weights_bytes": None}

        def wait_until_built(self): ...

        def close(self): ...

        def ask(self, request, **arguments):
            return {"seconds": self.seconds, "beyond_bytes": None, "others_s": 0.0}

    monkeypatch.setattr(compare_speed, "Decoder", Fixed)
    comparison = compared(*(evaluation(name, {"decoder": {"psnr": A}}) for name in "xy"))
    x, y = comparison.rows
    y.id = x.id
    compare_speed.measure([x, y], comparison.streams[0], False, rounds=2)
    assert (x.speed.seconds, y.speed.seconds) == ([1.0, 1.0], [2.0, 2.0])


def test_a_run_without_means_by_frame_is_named_and_legends_lie_within(tmp_path):
    names = [f"compare_family_with_a_long_name_{number}" for number in range(5)]
    comparison = compared(*(evaluation(name, {"decoder": {"psnr": A}}) for name in names))
    for one in comparison.runs:
        one.folder = str(tmp_path / one.name)
        (tmp_path / one.name).mkdir()
        scores = ["", ""] if one.name == names[1] else ["20", "21"]
        lines = [f"s,decoder,{frame},6,{score}" for frame, score in enumerate(scores)]
        (tmp_path / one.name / "by_frame.csv").write_text("\n".join(["stream,method,frame,clips,psnr", *lines]))
    with matplotlib.rc_context(compare_plots.STYLE):
        figure = compare_plots._frames(comparison)["frames_s_psnr"]
    assert f"no such means: {names[1]}" in figure.get_suptitle()
    assert [line.get_label() for line in figure.axes[0].lines] == [name for name in names if name != names[1]]
    assert figure.axes[0].lines[1].get_color() == compare_plots.COLOURS[2], "a run has its colour in all figures"
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.legends[0].get_window_extent(canvas.get_renderer())
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
