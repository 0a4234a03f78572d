"""An interrupted evaluation goes on where it was, and ends with the numbers of one that nobody disturbed."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from evaluated import untrained
from torch import Tensor
from video_files import make_film

from decoders import scoring
from decoders.flashdecoder import FlashDecoder
from experiments import evaluate, resumed
from experiments.compose import ConfigError
from experiments.config import load
from experiments.train import build_data
from metrics.base import SetMetric

NAME = "flashdecoder_debug"
CLIPS = 5
QUICK = (
    f"data.sources.unseen.num_videos={CLIPS}", "data.val.unseen.num_frames=5", "data.val.unseen.batch_size=1",
    "data.val.more={sources: [unseen], size: [16, 16], num_frames: 5, num_clips: 2, batch_size: 2}",
    "validation.metrics=[psnr,jump]", "trainer.progress_bar=false",
)  # fmt: skip


class Mean(SetMetric):
    """A set metric with awkward numbers, so that what is kept of features must be exact."""

    name, higher_is_better, protocol = "mean_2f", False, {"per": "set"}

    def features(self, video: Tensor) -> Tensor:
        return torch.stack([video[:, :, i : i + 2].mean(dim=(2, 3, 4)) / 3 for i in (0, 2)], dim=1)

    def score(self, real: Tensor, fake: Tensor) -> float:
        return (real.double() - fake.double()).square().mean().sqrt().item()


@pytest.fixture(autouse=True)
def with_a_set_metric(monkeypatch) -> None:
    build = scoring.metrics.build
    monkeypatch.setattr(scoring.metrics, "build", lambda names, weights=None: [*build(names, weights=weights), Mean()])


def undated(result: dict) -> dict:
    return {key: value for key, value in result.items() if key not in ("date", "seconds")}


def decodes(monkeypatch, fail_at: int | None = None) -> list[int]:
    """Counts clips that are decoded; number ``fail_at`` fails."""
    counted, decode = [], FlashDecoder.decode

    def counting(self, latent, **given):
        if len(counted) == fail_at:
            raise MemoryError("in the middle")
        counted.append(len(latent))
        return decode(self, latent, **given)

    monkeypatch.setattr(FlashDecoder, "decode", counting)
    return counted


def files(folder: Path) -> dict[str, bytes]:
    """What an evaluation wrote, apart from date and times."""
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".csv"}
    return kept | {"result": json.dumps(undated(json.loads((folder / "result.json").read_text()))).encode()}


@pytest.fixture
def whole(runs_root) -> dict[str, bytes]:
    """The files of an undisturbed evaluation, whose folder is gone."""
    untrained(NAME)
    evaluate.evaluate(NAME, QUICK)
    folder = evaluate.evaluation_dir(NAME, QUICK)
    assert not list(folder.glob("part-*"))
    kept = files(folder)
    shutil.rmtree(folder)
    return kept


def interrupted(fail_at: int, *overrides: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        decodes(patch, fail_at)
        with pytest.raises(MemoryError):
            evaluate.evaluate(NAME, (*QUICK, *overrides))
    folder = evaluate.evaluation_dir(NAME, (*QUICK, *overrides))
    assert not (folder / "result.json").exists() and (folder / "part-0.jsonl").is_file()
    return folder


def test_the_rest_is_done_and_nothing_twice(whole, monkeypatch) -> None:
    folder = interrupted(fail_at=3)
    again = decodes(monkeypatch)
    result = evaluate.evaluate(NAME, QUICK)
    assert len(again) == CLIPS + 2 - 3
    assert files(folder) == whole and not list(folder.glob("part-*"))
    assert {"mean_2f_n10", "mean_2f_n4"} <= {name for mean in result["means"] for name in mean["scores"]}
    assert result["seconds"]["decode"] > 0


def test_a_batch_that_was_cut_is_done_again(whole, monkeypatch) -> None:
    """A kill in the middle of a line; and the rest of a batch of two is not kept by halves."""
    folder = interrupted(fail_at=CLIPS + 1)
    part = folder / "part-0.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + CLIPS
    part.write_bytes(b"".join(lines)[:-20])
    again = decodes(monkeypatch)
    evaluate.evaluate(NAME, QUICK)
    assert len(again) == 1 + 2 and files(folder) == whole


def test_what_other_processes_left_counts_too(whole, monkeypatch) -> None:
    """Begun on two processes, goes on on one; what both have is taken once."""
    folder = interrupted(fail_at=4)
    header, *batches = (folder / "part-0.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "part-0.jsonl").write_bytes(header + batches[0] + batches[1])
    (folder / "part-1.jsonl").write_bytes(header + batches[1] + batches[2] + batches[3])
    again = decodes(monkeypatch)
    evaluate.evaluate(NAME, QUICK)
    assert len(again) == CLIPS + 2 - 4 and files(folder) == whole


def test_all_clips_were_done_and_only_the_files_were_missing(whole, monkeypatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            evaluate.evaluate(NAME, QUICK)
    again = decodes(monkeypatch)
    evaluate.evaluate(NAME, QUICK)
    folder = evaluate.evaluation_dir(NAME, QUICK)
    assert again == [] and files(folder) == whole


def test_other_weights_begin_anew(runs_root, monkeypatch) -> None:
    untrained(NAME)
    folder = interrupted(3, "validation.references=false")
    untrained(NAME, seed=1)
    again = decodes(monkeypatch)
    evaluate.evaluate(NAME, (*QUICK, "validation.references=false"))
    assert len(again) == CLIPS + 2 and not list(folder.glob("part-*"))


def same(
    *overrides: str,
    sha256: str = "a",
    precision: str = "32-true",
    changed: int | None = None,
    space: str = "dct-1",
    backbone: str = "alexnet:1",
) -> str:
    """The identity of an evaluation, one of whose clips may be another."""
    experiment = load(NAME, (*QUICK, *overrides))
    experiment.data.train = {}
    decoder = SimpleNamespace(
        latent_space=SimpleNamespace(fingerprint=space), metric_protocols={"lpips": {"backbone": backbone}}
    )
    data = build_data(experiment, None)
    if changed is not None:
        data.streams("val")["unseen"]._first[changed] += 2  # its window moves by one frame
    trainer = SimpleNamespace(precision=precision, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    return resumed.identity(experiment, decoder, data, {"kind": "last", "sha256": sha256}, trainer)


def test_what_decides_the_numbers(monkeypatch) -> None:
    """All of it begins an evaluation anew, and nothing else does."""
    one = same()
    elsewhere = ("data.prefetch=3", "trainer.log_every_steps=7", "validation.num_shown=0", "optim.lr=1e-5")
    assert one == same() == same(*elsewhere)
    others = [
        same("seed=7"), same("pad=replicate"), same("validation.metrics=[psnr]"), same("validation.weights.lpips=/other"),
        same("validation.references=false"), same("data.val.more=null"), same("data.verify=packets"), same("decoder.depth=1"),
        same(sha256="b"), same(precision="bf16-mixed"), same(changed=0), same(space="dct-2"), same(backbone="alexnet:2"),
    ]  # fmt: skip
    for module, attribute in ((torch, "__version__"), (lightning, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(module, attribute, "9.9")
            others.append(same())
    with monkeypatch.context() as patch:
        patch.setattr(resumed, "code", lambda: "changed")
        others.append(same())
    for package in ("opencv-python-headless", "diffusers", "torchvision", "decord2", "av", "pillow"):
        with monkeypatch.context() as patch:
            patch.setattr(resumed, "version", lambda name, other=package: "9.9" if name == other else version(name))
            others.append(same())
    assert len({one, *others}) == 1 + len(others)


def test_files_of_networks_and_films_are_known_by_size_and_time(tmp_path) -> None:
    """Another teacher under its name, other images in a mask's folder: no byte of them is read."""
    (tmp_path / "teacher").mkdir()
    network, noted, film = (tmp_path / name for name in ("teacher/net.safetensors", "teacher/README", "film.mp4"))
    for file in (network, noted, film):
        file.write_bytes(b"before")
    named = {"teacher": f"{tmp_path}/teacher", "start": {"rank": 4, "cache": f"{tmp_path}/film.mp4"}, "target": "video"}

    def stamps() -> list:
        return resumed._stamps(resumed._strings(named), resumed.WEIGHTS)

    before, films = stamps(), resumed._stamps([str(film), "drawn/0", ""])
    assert [Path(name) for name, *_ in before] == [network] and [Path(name) for name, *_ in films] == [film]
    noted.write_bytes(b"other words")
    assert stamps() == before
    network.write_bytes(b"after!")  # as long
    os.utime(network, ns=(1, 1))
    os.utime(film, ns=(1, 1))
    assert stamps() != before and resumed._stamps([str(film)]) != films


@pytest.mark.parametrize("which", ["film.mp4", "weights/net.pth"])
def test_another_file_under_its_name_begins_anew(tmp_path, which) -> None:
    make_film(tmp_path / "film.mp4", num_frames=8, size=(32, 32))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "net.pth").write_bytes(b"some")
    named = (f"data.sources.film.path={tmp_path}/film.mp4", "data.val.more.sources=[film]")
    named += (f"validation.weights.lpips={tmp_path}/weights",)
    before = same(*named)
    assert before == same(*named)
    os.utime(tmp_path / which, ns=(1, 1))
    assert before != same(*named)


def test_the_code_is_all_that_scores(tmp_path) -> None:
    for room in ("metrics", "experiments"):
        (tmp_path / room).mkdir()
    before = [resumed.hash_of_sources(tmp_path)]
    for name in ("metrics/new.py", "experiments/evaluate.py", "experiments/summary.py"):
        (tmp_path / name).write_text("x = 1")
        before.append(resumed.hash_of_sources(tmp_path))
    assert len(set(before)) == 4
    (tmp_path / "experiments" / "report.py").write_text("x = 1")
    assert before[-1] == resumed.hash_of_sources(tmp_path)


def test_a_result_names_the_code_that_made_it(runs_root, monkeypatch) -> None:
    """Of the sources as they were imported, whatever happens to the files while it runs; and how many films there were."""
    untrained(NAME)
    quick = (*QUICK, "validation.references=false", "data.sources.unseen.clips_per_video=2")
    monkeypatch.setattr(resumed, "ROOT", runs_root)
    result = evaluate.evaluate(NAME, quick)
    written = json.loads((evaluate.evaluation_dir(NAME, quick) / "result.json").read_text())
    assert written["code"] == result["code"] == resumed.hash_of_sources(Path(resumed.__file__).parent.parent)
    assert {m["stream"]: (m["clips"], m["films"]) for m in written["means"]} == {"unseen": (10, 5), "more": (2, 2)}
    table = (evaluate.evaluation_dir(NAME, quick) / "table.md").read_text()
    assert "unseen (10 of 32x48, from 5 films)" in table and "more (2 of 16x16)" in table


def test_the_bar_tells_clips_done(runs_root, capsys) -> None:
    untrained(NAME)
    shown = (*QUICK[:-1], "trainer.progress_bar=true")
    with pytest.MonkeyPatch.context() as patch:
        decodes(patch, 3)
        with pytest.raises(MemoryError):
            evaluate.evaluate(NAME, shown)
    capsys.readouterr()
    evaluate.evaluate(NAME, shown)
    error = capsys.readouterr().err
    assert f"3/{CLIPS + 2}" in error and f"{CLIPS + 2}/{CLIPS + 2}" in error


def test_missing_weights_of_a_metric_are_told_before_work(runs_root, monkeypatch, tmp_path) -> None:
    untrained(NAME)
    again = decodes(monkeypatch)
    missing = f"validation.weights.raft={tmp_path}/none.pth"
    with pytest.raises(ConfigError, match="none.pth"):
        evaluate.evaluate(NAME, (*QUICK, "validation.metrics=[psnr,warp_raft]", missing))
    assert again == [] and not list(runs_root.glob("*/evaluation*"))


@pytest.mark.slow
def test_killed_and_typed_again(runs_root, monkeypatch) -> None:
    """SIGKILL of a process, several times; the numbers are those of an evaluation that was left alone."""
    many = (*QUICK, "data.sources.unseen.num_videos=24")
    untrained(NAME)
    evaluate.evaluate(NAME, many)
    folder = evaluate.evaluation_dir(NAME, many)
    script = "from experiments import evaluate; import sys; evaluate.main(sys.argv[1:])"
    command, env = [sys.executable, "-c", script, NAME, *many], os.environ | {"RUNS_ROOT": str(runs_root)}
    subprocess.run(command, env=env, check=True, capture_output=True)  # without this test's set metric
    undisturbed = files(folder)
    shutil.rmtree(folder)
    part, kills = folder / "part-0.jsonl", 0
    for wanted in (2, 9, 20):
        running = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while running.poll() is None:
            if part.is_file() and part.read_bytes().count(b"\n") > wanted:
                running.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        running.wait()
    assert kills, "or this test tests nothing"
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert files(folder) == undisturbed and not part.exists()
    with open(folder / "clips.csv", newline="") as file:
        own = [row["key"] for row in csv.DictReader(file) if row["method"] == "decoder" and row["stream"] == "unseen"]
    assert len(own) == len(set(own)) == 24
