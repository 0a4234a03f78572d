"""The report: which clips, what fits, that frames are exact, that texts are only texts; and the page in a browser."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from experiments import decoded, report
from experiments.comparison import Column, Comparison, Row, Run, Score, Stream
from experiments.compose import ConfigError
from experiments.config import load
from experiments.report import ReportConfig
from experiments.train import train
from tests.chromium import launched, watched

EVIL = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
KEYS = ["films/a.mp4#0", f"films/{EVIL}.mp4#1", "films/c.mp4#2", "films/d.mp4#3"]
QUICK = ["trainer.progress_bar=false", "validation.num_shown=0"]
PSNR = dict(zip(KEYS, (31.0, 20.0, 28.0, 40.0), strict=True))


def truth_of(key: str) -> np.ndarray:
    return np.random.default_rng(KEYS.index(key)).integers(0, 256, (5, 24, 33, 3), dtype=np.uint8)


def fake_decode(run: str, stream: str, keys, sets=None, overrides=()):
    """The second run's first frame is exact, and the rest is 10 off."""
    found = {}
    for key in keys:
        truth = truth_of(key)
        second = np.where(truth > 127, truth - 10, truth + 10).astype(np.uint8)
        second[0] = truth[0]
        found[key] = {"truth": truth, "decoder": 255 - truth if run == "first" else second}
        if run == "second":
            found[key]["8 steps"] = truth
    return found


def a_run(name: str) -> Run:
    return Run(
        name=name, experiment=name, family="decoders.baseline.Baseline", header=f"a run {EVIL}", run_folder="", folder="",
        parameters=1_500_000, compression=48.0, latent_space="dct", fingerprint="f", start="from scratch", parents=[],
        finished=True, minutes=1.5, total_minutes=1.5, devices=1, device_kind="CPU", steps=10, total_steps=10, clips_seen=20,
        total_clips_seen=20, weights={"kind": "ema", "step": 10, "file": "weights-ema.safetensors"}, evaluated="2026-01-01",
    )  # fmt: skip


def a_row(id: str, run: str, method: str, kind: str, offset: float) -> Row:
    clips = {"unseen/psnr": {key: value + offset for key, value in PSNR.items()}}
    score = Score(29.75 + offset, 24.0 + offset, 36.0 + offset, 4, best=offset == 2, delta=None)
    if offset:
        score.delta = [offset, offset, offset]
    label = f"{id} {EVIL}" if kind == "method" else id
    return Row(
        id, label, run, [run], method, kind, {"unseen/psnr": score}, clips, {"dtype": "32-true"}, None, 1_500_000, 48.0
    )


@pytest.fixture
def comparison() -> Comparison:
    column = Column("unseen/psnr", "unseen", "psnr", "psnr", True, "dB", 2, True, {"metric": "psnr", "size": [24, 33]})
    rows = [
        a_row("first", "first", "decoder", "run", 0.0),
        a_row("second", "second", "decoder", "run", 2.0),
        a_row("second: 8 steps", "second", "8 steps", "method", -1.0),
        a_row("mean colour of the clip", "first", "mean colour of the clip", "floor", -15.0),
    ]
    return Comparison(
        title=f"compare first second {EVIL}", command="python -m experiments.report first second", date="2026-01-01T00:00:00",
        baseline="first", sets=None, versions={"torch": "2.14.1"}, machine={}, runs=[a_run("first"), replace(a_run("second"), start="init_from elsewhere", pretrained=True)],
        streams=[Stream("unseen", 4, 5, [24, 33], 1, "bicubic", sorted(KEYS))], columns=[column], rows=rows,
        papers=[{"run": None, "paper": "A paper", "where": "Table 1", "what": "", "values": {"psnr": 37.5}, "setting": "480p"}],
        notes=["Brackets: as the table says.", "a note"],
    )  # fmt: skip


@pytest.fixture(autouse=True)
def without_runs(monkeypatch, request):
    def draw(comparison, folder):
        path = folder / "curve_psnr.png"
        Image.new("RGB", (40, 30), "white").save(path)
        return [path]

    monkeypatch.setattr(decoded, "decode", fake_decode)
    monkeypatch.setattr(report, "draw", draw)
    if "video" not in request.node.name and "browser" not in request.node.name:  # encoding is what takes long
        monkeypatch.setattr(report, "write_video", lambda path, parts, fps, crf: path.write_bytes(bytes(3000)))


def written(comparison: Comparison, out: Path, **options) -> tuple[dict, Path]:
    page = report.write(comparison, ReportConfig(["first", "second"], **options), out)
    return json.loads((out / "data.js").read_text().removeprefix("window.REPORT = ").rstrip(";\n")), page


def test_clips_are_the_baselines_worst_median_and_best(comparison):
    found = report.choose(comparison, "psnr", 3)
    assert [(c.why, PSNR[c.key]) for c in found] == [("worst", 20.0), ("median", 31.0), ("best", 40.0)]
    comparison.rows[0].clips["unseen/psnr"], all_ = (
        dict(list(PSNR.items())[:2]),
        comparison.rows[0].clips["unseen/psnr"],
    )
    assert [c.why for c in report.choose(comparison, "psnr", 1)] == ["median"], "of two, as the page says"
    comparison.rows[0].clips["unseen/psnr"] = all_
    comparison.columns[0].higher_is_better = False
    assert [PSNR[c.key] for c in report.choose(comparison, "psnr", 2)] == [40.0, 20.0]
    assert [PSNR[c.key] for c in report.choose(comparison, "psnr", 9)][:2] == [40.0, 31.0]
    assert len({c.key for c in report.choose(comparison, "psnr", 9)}) == 4
    with pytest.raises(ConfigError, match="metric=lpips was not measured by clip; there are psnr"):
        report.choose(comparison, "lpips", 3)


def test_frames_in_the_page_are_exact(comparison, tmp_path):
    data, _ = written(comparison, tmp_path, clips=1)
    assert [m["id"] for m in data["shown"][0]["methods"]] == ["truth", "first", "second", "second: 8 steps"]
    content = json.loads(re.fullmatch(r"window\.arrived\(0, (.*)\);\n", (tmp_path / "clips" / "0.js").read_text())[1])
    expected = fake_decode("second", "unseen", KEYS)[data["shown"][0]["key"]]
    for id, method in (("truth", "truth"), ("second", "decoder"), ("second: 8 steps", "8 steps")):
        film = [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(frame))).convert("RGB"))
            for frame in content["methods"][id]
        ]
        assert np.array_equal(np.stack(film), expected[method])
    slice_ = Image.open(io.BytesIO(base64.b64decode(content["slices"]["truth"].partition(",")[2])))
    assert np.array_equal(np.asarray(slice_.convert("RGB"))[::6], expected["truth"][:, 12])


def test_slice_over_time_is_the_middle_row():
    frames = np.zeros((3, 8, 5, 3), np.uint8)
    frames[1, 4] = 9
    sliced = report.slice_over_time(frames, rows=2)
    assert sliced.shape == (6, 5, 3) and [int(row.max()) for row in sliced] == [0, 0, 9, 9, 0, 0]


def test_what_does_not_fit_is_said(comparison, tmp_path):
    whole, _ = written(comparison, tmp_path, clips=4)
    assert not whole["left_out"] and len(whole["shown"]) == 4
    fewer, _ = written(comparison, tmp_path, clips=4, max_mb=0.12)
    size = sum(path.stat().st_size for part in ("clips", "videos") for path in tmp_path.glob(f"{part}/*"))
    assert fewer["left_out"] and len(fewer["shown"]) == 4 and size < 1.03 * 0.12 * 2**20
    none, _ = written(comparison, tmp_path, clips=4, max_mb=0.001)
    assert none["shown"] == [] and len(none["left_out"]) == 4 and "is not shown" in none["left_out"][0]
    cut, _ = written(comparison, tmp_path, clips=1, frames=2)
    assert cut["shown"][0]["frames"] == 2 and "2 of 5 frames (frames=2)" in cut["left_out"][0]


def test_runs_that_saw_other_pixels_are_refused(comparison, tmp_path, monkeypatch):
    def other(run, stream, keys, sets=None, overrides=()):
        found = fake_decode(run, stream, keys, sets)
        return {
            key: films | {"truth": films["truth"] // 2} if run == "second" else films for key, films in found.items()
        }

    monkeypatch.setattr(decoded, "decode", other)
    with pytest.raises(ConfigError, match="not measured on the same pixels"):
        written(comparison, tmp_path)


def test_a_run_that_was_not_measured_on_a_clip_is_left_out_of_it(comparison, tmp_path):
    comparison.rows[1].clips["unseen/psnr"].pop(KEYS[1])
    data, _ = written(comparison, tmp_path)
    methods = {clip["key"]: [method["id"] for method in clip["methods"]] for clip in data["shown"]}
    assert methods[KEYS[1]] == ["truth", "first"] and "second" in methods[KEYS[3]]


def test_videos_show_every_method_and_every_error():
    films = fake_decode("second", "unseen", [KEYS[0]])[KEYS[0]]
    methods = {id: (id, frames) for id, frames in films.items()}
    whole, errors = (np.concatenate([frame.numpy() for frame in report.grids(methods, e)]) for e in (False, True))
    scale = -(-report.TILE // 33)
    assert whole.shape == (5, 24 * scale + 22, 3 * 33 * scale + (33 * scale * 3) % 2, 3)
    assert errors.shape[2] == 2 * 33 * scale
    middle = errors[1, 22 + 12 * scale, 16 * scale]
    assert middle.tolist() == [40] * 3, "ten off, four times as bright"
    assert errors[0, 22:].max() == 0, "nothing off in the first frame"


def test_videos_are_h264_that_plays_everywhere(comparison, tmp_path):
    data, _ = written(comparison, tmp_path, clips=1)
    for video in data["shown"][0]["videos"]:
        with av.open(str(tmp_path / video["file"])) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
            assert sum(1 for _ in container.decode(video=0)) == 5


def test_no_text_can_become_markup(comparison, tmp_path):
    _, page = written(comparison, tmp_path, clips=4)
    for path in (page, tmp_path / "data.js", *(tmp_path / "clips").iterdir()):
        assert EVIL not in path.read_text() and "<img" not in path.read_text()
    assert json.loads(report.script_json({"a": "</script>&\u2028é"})) == {"a": "</script>&\u2028é"}
    assert not re.search("[<>&\u2028]", report.script_json({"a": "</script>&\u2028"}))
    with pytest.raises(ValueError):
        report.script_json({"a": float("nan")})


def test_the_folder_needs_nothing_from_elsewhere(comparison, tmp_path):
    _, page = written(comparison, tmp_path, clips=1)
    for path in tmp_path.rglob("*"):
        if path.suffix in (".html", ".js", ".css") and path.parent == tmp_path:
            assert not re.search(r"(?:https?:)?//[a-z]", path.read_text()), path
    assert {p.name for p in tmp_path.iterdir()} >= {"index.html", "data.js", *report.SHARED}


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


CANVAS = """() => { const c = document.querySelector("#player canvas"); const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
  let sum = 0; for (let i = 0; i < d.length; i += 4) sum = (sum * 31 + d[i] + 7 * d[i + 1] + 13 * d[i + 2]) % 1000003; return sum; }"""
FRAMES = """async ([index, method, frame]) => { const films = await pictures(await load(index), method);
  return [...pixels(films[frame]).data].filter((_, i) => i % 4 !== 3); }"""


def settled(page) -> int:
    """What the player shows, as a number, once it is drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.evaluate(CANVAS)


def test_the_page_in_a_browser(comparison, tmp_path, browser):
    data, path = written(comparison, tmp_path, clips=4)
    page, trouble = watched(browser)
    page.goto(path.as_uri())
    page.wait_for_function("() => document.body.dataset.ready")
    assert not trouble, trouble
    assert page.evaluate("() => window.hacked") is None
    assert EVIL in page.locator("#title").inner_text() and EVIL in page.title()

    # Frames are those that were scored, byte by byte.
    first = data["shown"][0]
    assert page.evaluate(FRAMES, [0, "first", 3]) == (255 - truth_of(first["key"]))[3].ravel().tolist()

    # The divider moves: by mouse, by keys.
    handle = page.locator("#player .divider")
    before, box = settled(page), page.locator("#player .stage").bounding_box()
    middle = box["y"] + box["height"] / 2
    handle.hover()
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], middle, steps=4)
    page.mouse.up()
    assert handle.get_attribute("aria-valuenow") == "25" and settled(page) != before
    handle.press("ArrowRight")
    handle.press("Shift+ArrowRight")
    assert handle.get_attribute("aria-valuenow") == "36"
    handle.press("End")
    assert handle.get_attribute("aria-valuenow") == "100"

    # Frames step, by button and key, and go round.
    count = page.locator("#player .count")
    assert count.inner_text() == "1 / 5"
    shown = settled(page)
    page.get_by_label("one frame on").click()
    assert count.inner_text() == "2 / 5" and settled(page) != shown
    page.locator("#player canvas").press("End")
    page.locator("#player canvas").press(".")
    assert count.inner_text() == "1 / 5"
    page.get_by_role("button", name="play").click()
    page.wait_for_function('() => document.querySelector("#player .count").textContent !== "1 / 5"')
    page.get_by_role("button", name="pause").click()
    page.locator("#player canvas").press("Home")

    # The difference of the truth and the second run: nothing in frame 1, ten times the gain in frame 2.
    page.select_option("#left", "truth")
    page.select_option("#right", "second")
    page.wait_for_function('() => document.body.dataset.ready.endsWith("/truth/second")')
    split = settled(page)
    page.locator("#player canvas").press("d")
    assert settled(page) != split and not handle.is_visible()
    peak = "() => { view.paint(); const c = view.canvas; return Math.max(...c.getContext('2d').getImageData(c.width >> 1, c.height >> 1, 9, 9).data.filter((_, i) => i % 4 < 3)); }"
    assert page.evaluate(peak) == 0
    page.locator("#player canvas").press(".")
    assert page.evaluate(peak) == 40
    page.locator("#player canvas").press("]")
    assert page.evaluate(peak) == 80

    # Zoom and pan change what is seen; whole pixels when fitted.
    fitted = settled(page)
    page.get_by_label("zoom in").click()
    zoomed = settled(page)
    page.locator("#player canvas").press("ArrowLeft")
    assert len({fitted, zoomed, settled(page)}) == 3
    page.locator("#player canvas").press("0")
    assert settled(page) == fitted

    # Sorting sorts, both ways; what is missing stands last.
    rows = page.locator("#tables tbody tr")
    names = lambda: [rows.nth(i).get_attribute("data-id") for i in range(rows.count())]  # noqa: E731
    assert names()[0] == "first"
    page.locator("#tables th button", has_text="psnr").click()
    assert names() == ["second", "first", "second: 8 steps", "mean colour of the clip"]
    page.locator("#tables th button", has_text="psnr").click()
    assert names()[0] == "mean colour of the clip"
    assert page.locator("#tables th[aria-sort=ascending]").count() == 1

    # A clip is chosen from the list of all clips; its key is only a text.
    page.locator("#perclip button", has_text="best").click()
    best = next(clip["index"] for clip in data["shown"] if clip["why"] == "best")
    page.wait_for_function("best => document.body.dataset.ready.startsWith(`${best}/`)", arg=best)
    assert "unseen: 4 clips of 4 films" in page.locator("#tables h3").inner_text()
    ran = page.locator("#ran tbody tr")
    assert "init_from elsewhere (what that was trained for" in ran.nth(1).inner_text()
    assert "from scratch" in ran.nth(0).locator("td").nth(1).inner_text()
    page.locator("#theme").click()
    assert page.evaluate("() => document.documentElement.dataset.theme") in ("dark", "light")
    assert page.evaluate("() => window.hacked") is None
    assert not trouble, trouble
    page.close()


def test_a_select_that_is_changed_while_a_clip_is_read_in_the_browser(comparison, tmp_path, browser):
    """Slow disk: the clip that was pressed is shown, by the method that was chosen meanwhile, and nothing of another clip."""
    data, path = written(comparison, tmp_path, clips=4)
    page, trouble = watched(browser)
    page.goto(path.as_uri())
    page.wait_for_function("() => document.body.dataset.ready")
    before = page.evaluate("() => document.body.dataset.ready")
    page.evaluate("""() => { const plain = load; let open = null; const gate = new Promise((done) => { open = done; });
      window.open_ = open; window.load = (index) => gate.then(() => plain(index)); }""")
    page.locator("#shown button").nth(2).click()
    page.select_option("#right", "second")
    page.locator("#exchange").click()
    page.select_option("#right", "second: 8 steps")
    assert page.evaluate("() => document.body.dataset.ready") == before, (
        "nothing was drawn for a clip that is not there"
    )
    page.evaluate("() => window.open_()")
    page.wait_for_function('() => document.body.dataset.ready.startsWith("2/")')
    assert page.evaluate("() => document.body.dataset.ready") == "2/second/second: 8 steps"
    shown = page.evaluate("() => [...pixels(view.films[0][0]).data].filter((_, i) => i % 4 !== 3)")
    assert shown == fake_decode("second", "unseen", KEYS)[data["shown"][2]["key"]]["decoder"][0].ravel().tolist()
    page.evaluate("() => { window.load = () => Promise.reject(new Error('clips/3.js is not there')); }")
    page.locator("#shown button").nth(3).click()
    page.wait_for_function("() => document.querySelector('#scores').textContent.includes('is not there')")
    pressed = page.locator('#shown button[aria-pressed="true"]')
    assert pressed.count() == 1 and pressed.get_attribute("data-index") == "2" and not trouble
    page.close()


def test_every_control_has_a_name_and_can_be_focused(comparison, tmp_path, browser):
    _, path = written(comparison, tmp_path, clips=1)
    page, trouble = watched(browser)
    page.goto(path.as_uri())
    page.wait_for_function("() => document.body.dataset.ready")
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, select, input, canvas, [role=slider], video, img")]
        .filter((e) => !(e.getAttribute("aria-label") || e.getAttribute("alt") || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)""")
    assert not nameless and not trouble
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "() => document.activeElement.tagName + '.' + (document.activeElement.getAttribute('role') || '')"
            )
        )
    assert {"CANVAS.img", "DIV.slider", "BUTTON.", "SELECT.", "INPUT.", "SUMMARY."} <= reached
    page.close()


@pytest.mark.slow
def test_a_report_of_real_runs(runs_root, tmp_path, browser, monkeypatch):
    """Two families from training to the page, by the commands; REGEN's numbers of steps beside its one step."""
    monkeypatch.undo()
    monkeypatch.setenv("RUNS_ROOT", str(runs_root))
    names = ["flashdecoder_debug", "regen_space_debug"]
    for name in names:
        train(load(name, QUICK), name, QUICK)
    report.main([*names, "speed=false", f"out={tmp_path / 'page'}"])
    page, trouble = watched(browser)
    page.goto((tmp_path / "page" / "index.html").as_uri())
    page.wait_for_function("() => document.body.dataset.ready")
    shown = page.locator("#left option").all_inner_texts()
    assert {"truth", *names, "regen_space_debug: 2 steps"} <= {*shown}
    table = runs_root / names[0] / "evaluation" / "table.md"
    psnr = re.search(r"decoder +\| (\d+\.\d\d)", table.read_text())[1]
    assert psnr[:-1] in page.locator(f'#tables tr[data-id="{names[0]}"]').inner_text()
    assert not trouble
    page.close()
