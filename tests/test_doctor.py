"""`make doctor`: what it sees, what it says to do, and the arithmetic behind cores and hours."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from datamodules.config import SourceConfig, StreamConfig
from datamodules.probe import Info
from datamodules.sources import File
from experiments import doctor, doctor_loader, doctor_machine
from experiments.compose import ConfigError
from experiments.config import load
from experiments.doctor import DoctorConfig, Finding
from experiments.doctor_experiment import Case
from experiments.doctor_steps import Step, noise_shapes
from tests.video_files import cut, make_film

NAME = "flashdecoder_debug"
SMALL = ["seconds=0.05", "disk_mb=4", "film_frames=12", "num_frames=9", "skip=[ranks]"]


def case(*overrides: str, name: str = NAME, **options) -> Case:
    return Case(load(name, list(overrides)), name, list(overrides), DoctorConfig(**options))


# --- the whole --------------------------------------------------------------------------------------------------------


def test_a_machine_that_is_fit(runs_root: Path, tmp_path: Path, capsys) -> None:
    """All lines, in order, none of them a failure; the same in JSON, with numbers."""
    file = tmp_path / "doctor.json"
    assert doctor.main([NAME, *SMALL, f"json={file}"]) == 0
    said = capsys.readouterr().out
    result = json.loads(file.read_text())
    whats = [finding["what"] for finding in result["findings"]]
    assert whats[:3] == ["versions", "host", "GPUs"] and "peer access" not in whats
    for what in ("open files", "disk of runs", "latent space", "data.sources.motion", "clips of video", "clips of image",
                 "training step", "cores for the loader", "memory of a step", "expected"):  # fmt: skip
        assert what in whats and f"{what}: " in said
    assert f"{len(whats)} checks: 0 failed" in said
    by = {finding["what"]: finding for finding in result["findings"]}
    assert {step["stream"] for step in by["training step"]["data"]} == {"video", "image"}
    assert all(step["seconds"] > 0 for step in by["training step"]["data"])
    need, clips = by["cores for the loader"]["data"], {n: by[f"clips of {n}"]["data"] for n in ("video", "image")}
    step_s = sum(s["seconds"] * {"video": 0.75, "image": 0.25}[s["stream"]] for s in by["training step"]["data"])
    core_s = sum(2 * share * clips[n]["cpu_s"] / clips[n]["clips"] for n, share in (("video", 0.75), ("image", 0.25)))
    assert need["step_s"] == pytest.approx(step_s) and need["cores_of_a_node"] == pytest.approx(
        core_s / step_s, rel=0.02
    )
    assert by["expected"]["data"]["seconds"] == pytest.approx(16 * step_s)
    assert not list(runs_root.glob("*")) if runs_root.exists() else True, "nothing is kept"


def test_a_machine_that_is_not(runs_root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """No GPU, no data, no encoder, no parent: each said in one line with what to do; the need and the hours are told none the less."""
    for name in ("DATA_ROOT", "WEIGHTS_ROOT"):
        monkeypatch.delenv(name, raising=False)
    overrides = [
        "data.train=null",
        "data.train.films={sources: [kinetics600], size: [48, 64], num_frames: 9, batch_size: 2}",
    ]
    overrides += ["data.val=null", "data.val.few={sources: [ultravideo], size: [48, 64], num_frames: 9}"]
    overrides += ["decoder.depth=1", "decoder.dim=64", "decoder.num_heads=1", "decoder.num_kv_heads=1"]
    status = doctor.main(["flashdecoder_xl_stage2", *SMALL, "mfu=0.5", *overrides])
    said = capsys.readouterr().out
    assert status == 1
    assert "FAIL  GPUs: none" in said and "trainer.accelerator=cpu" in said
    assert "FAIL  latent space: " in said and "FAIL  parent: flashdecoder_xl_stage1 has not been trained" in said
    assert (
        "FAIL  data.sources.kinetics600: " in said and "DATA_ROOT" in said and "FAIL  data.sources.ultravideo" in said
    )
    assert "data.sources.datacomp" not in said, "no stream names it"
    assert "decord 48x64: " in said and "pyav 48x64: " in said
    assert "a 48x64 H.264 film made here (12 frames, key frames at most 250 apart, medium)" in said
    assert "ASSUMED: 50% of 989.4 TFLOP/s" in said and "expected: " in said
    assert "no GPU here to compare with" in said
    assert "could not be looked at" not in said


def test_a_film_that_one_library_cannot_read(tmp_path: Path) -> None:
    """decord fails on some widths; the other's speed is told none the less."""
    films = doctor.TestFilms(tmp_path, DoctorConfig(seconds=0.01, film_frames=12, num_frames=9))
    findings = list(films.speeds([(64, 96)]))
    assert [finding.what for finding in findings] == ["decord 64x96", "pyav 64x96"]
    assert findings[0].status == "WARN" and "data.reader=pyav" in findings[0].advice and findings[1].status == "OK"


def test_without_an_experiment(runs_root: Path, capsys) -> None:
    assert doctor.main([*SMALL, "sizes=[[48,64]]"]) == 0
    said = capsys.readouterr().out
    assert "decord 48x64: " in said and "pyav 48x64: " in said and "data.sources" not in said
    assert doctor.main(["only=[host,open_files]"]) == 0
    assert "\n2 checks: 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["optim.lr=1"], "name an experiment to change it"),
        (["skip=[everything]"], "there is no check everything"),
        (["ranks=1"], "ranks must be 2"),
        (["json=no/such/doctor.json"], "there is no folder"),
        (["mfu=2"], "mfu in"),
        (["film_frames=5"], "less than num_frames"),
        ([NAME, "no.such=1"], "no such key"),
    ],
)
def test_nonsense_is_refused(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        doctor.main(arguments)


def test_a_check_that_breaks_down_does_not_stop_the_others(monkeypatch, runs_root: Path) -> None:
    def broken() -> Finding:
        raise RuntimeError("the card fell out")

    monkeypatch.setattr(doctor_machine, "check_cores", broken)
    config = DoctorConfig(skip=["ranks", "disk", "films"])
    findings = list(doctor.examine(None, "", [], config))
    (host,) = [finding for finding in findings if finding.what == "host"]
    assert host.status == "FAIL" and "RuntimeError: the card fell out" in host.says
    assert [finding.what for finding in findings] == ["versions", "host", "GPUs", "open files"]


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_add_up() -> None:
    """Two processes and three, by gloo."""
    for ranks in (2, 3):
        finding = doctor_machine.check_ranks(ranks, mib=4)
        assert finding.status == "OK" and finding.data["ranks"] == ranks, finding
        assert finding.data["bus_gb_per_s"] == pytest.approx(
            2 * (ranks - 1) / ranks * finding.data["bytes"] / finding.data["median_s"] / 1e9
        )


@pytest.mark.slow
def test_ranks_that_cannot_meet_are_told(monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    finding = doctor_machine.check_ranks(2, mib=1)
    assert finding.status == "FAIL" and "rank" in finding.says and "GLOO_SOCKET_IFNAME" in finding.advice


def test_disk(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "runs" / "not" / "made"
    finding = doctor_machine.check_runs_disk(folder, 8, needed=0)
    assert finding.status == "OK" and finding.data["write_mb_per_s"] > 0 and finding.data["read_mb_per_s"] > 0
    assert not list(tmp_path.iterdir()), "the test file is gone, and no folder was made"
    free = shutil.disk_usage(tmp_path).free
    assert doctor_machine.check_runs_disk(folder, 4, needed=int(0.7 * free)).status == "WARN"
    full = doctor_machine.check_runs_disk(folder, 4, needed=2 * free)
    assert full.status == "FAIL" and "RUNS_ROOT" in full.advice
    greedy = doctor_machine.check_runs_disk(folder, free // 2**20 // 2, needed=0)  # other runs would find the disk full
    assert greedy.status == "FAIL" and "too large a part" in greedy.says and "disk_mb" in greedy.advice
    monkeypatch.setattr(doctor_machine, "existing", lambda folder: Path("/proc"))
    refused = doctor_machine.check_runs_disk(folder, 4, needed=0)
    assert refused.status == "FAIL" and "cannot be written" in refused.says


def test_shared_memory_and_open_files(tmp_path: Path, monkeypatch) -> None:
    free = shutil.disk_usage(tmp_path).free
    for usual, most, status in ((1, 2, "OK"), (free / 2, 2 * free, "WARN"), (2 * free, 3 * free, "FAIL"), (0, 0, "OK")):
        finding = doctor_machine.check_shared_memory(usual, most, tmp_path)
        assert finding.status == status and bool(finding.advice) == (status != "OK")
    assert doctor_machine.check_shared_memory(1, 1, tmp_path / "none") is None
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda what: (1024, 4096))
    assert doctor_machine.check_open_files().advice == "ulimit -n 4096"


def test_fewer_gpus_than_wanted(monkeypatch) -> None:
    cuda = doctor_machine.torch.cuda
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * 2**30)
    for name, value in (("is_available", True), ("device_count", 4), ("get_device_properties", card)):
        monkeypatch.setattr(cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(cuda, "mem_get_info", lambda index: (79 * 2**30, 80 * 2**30))
    assert doctor_machine.check_gpus(4).status == doctor_machine.check_gpus(None).status == "OK"
    finding = doctor_machine.check_gpus(8)
    assert finding.status == "FAIL" and "4 x NVIDIA H100" in finding.says and "trainer.devices=4" in finding.advice
    monkeypatch.setattr(cuda, "mem_get_info", lambda index: (20 * 2**30, 80 * 2**30))
    assert doctor_machine.check_gpus(4).status == "WARN"
    monkeypatch.setattr(cuda, "can_device_access_peer", lambda a, b: {a, b} != {0, 3})
    peers = doctor_machine.check_peers()
    assert peers.status == "WARN" and "10 of 12" in peers.says


# --- the data ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    for number in range(3):
        make_film(folder / f"{number}.mp4", num_frames=24, film=number)
    return folder


def test_readable_and_damaged_files(films: Path, tmp_path: Path) -> None:
    finding, good = doctor_loader.sample("films", SourceConfig(str(films)), 8)
    assert finding.status == "OK" and finding.data["files"] == len(good) == 3
    assert good[0][1] == Info(64, 48, 24, 25.0)
    shutil.copytree(films, tmp_path / "some")
    cut(films / "0.mp4", tmp_path / "some" / "9.mp4", 0.5)
    finding, good = doctor_loader.sample("films", SourceConfig(str(tmp_path / "some")), 8)
    assert finding.status == "WARN" and len(good) == 3 and "9.mp4" in finding.says and "exclude" in finding.advice
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_bytes(b"no film")
    assert doctor_loader.sample("films", SourceConfig(str(tmp_path / "bad")), 8)[0].status == "FAIL"
    assert doctor_loader.sample("films", SourceConfig(str(tmp_path / "none")), 8)[0].status == "FAIL"
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "bad" / "b.png")
    finding, good = doctor_loader.sample("stills", SourceConfig(str(tmp_path / "bad"), kind="image"), 8)
    assert finding.status == "OK" and good[0][1] == Info(50, 40, 1, 0.0)


def test_clips_of_the_files_that_are_here(films: Path, runs_root: Path) -> None:
    """Own files, not a test film; both libraries; a window never reaches beyond its film."""
    asked = case(f"data.sources.motion={{path: {films}, kind: video}}", seconds=0.01, files=3)
    assert [finding.status for finding in asked.check_data()] == ["OK"] * 3
    assert asked.film_sizes() == []
    finding = asked._clips_of("video", asked.train["video"], None)
    assert "its own files" in finding.says and finding.data["reader"] == "pyav" and finding.data["decord"]["frames"] > 0
    assert finding.data["frames"] == 9 * finding.data["clips"]
    stream = StreamConfig(["x"], (32, 48), 9, fps=12.5)
    requests = doctor_loader.requests_of(stream, [(File("a", "a"), Info(64, 48, 24, 25.0))], "video", 200)
    assert {r.start for r in requests} == set(range(24 - 17 + 1)), "nine frames at half the rate are 17 of the film's"
    for info in (Info(40, 48, 24, 25.0), Info(64, 48, 16, 25.0)):
        assert doctor_loader.requests_of(stream, [(File("a", "a"), info)], "video") == []


def test_speeds_by_hand(monkeypatch) -> None:
    clock = SimpleNamespace(wall=0.0, cpu=0.0)
    monkeypatch.setattr(
        doctor_loader, "time", SimpleNamespace(perf_counter=lambda: clock.wall, process_time=lambda: clock.cpu)
    )

    def work(number: int) -> int:
        clock.wall += 2.0
        clock.cpu += [9.0, 1.0, 0.5, 0.25][number]
        return 34

    speed = doctor_loader.measure(work, seconds=5.0, clips=2)
    assert (speed.frames, speed.clips, speed.cpu_s, speed.wall_s) == (102, 6, 1.75, 6.0), "the first round warms up"
    assert speed.spread == (34.0, 136.0) and speed.clip_s == pytest.approx(1.75 / 6)
    assert doctor_loader.told(speed) == "58 (34 to 136)"


def test_need_by_hand() -> None:
    streams = {
        "a": StreamConfig(["x"], (16, 16), 5, share=0.25, batch_size=2),
        "b": StreamConfig(["x"], (32, 32), 5, share=0.75, batch_size=1),
    }
    assert doctor_loader.core_seconds(streams, "shares", {"a": 1.0, "b": 0.1}) == pytest.approx(0.25 * 2 + 0.75 * 0.1)
    assert doctor_loader.core_seconds(streams, "alternate", {"a": 1.0, "b": 0.1}) == pytest.approx(0.5 * 2 + 0.5 * 0.1)
    assert doctor_loader.batch_bytes(streams, "shares") == (
        pytest.approx(12 * 5 * (0.25 * 2 * 256 + 0.75 * 1024)),
        12 * 5 * 1024,
    )
    buckets = {"v/16x16x5": streams["a"], "v/32x32x5": streams["a"], "b": streams["b"]}
    assert doctor_loader.shares(buckets, "shares") == {"v/16x16x5": 0.125, "v/32x32x5": 0.125, "b": 0.75}


def test_cores_and_workers_are_told(monkeypatch) -> None:
    """Eight processes of two clips a step at 4 steps/s: 64 clips/s; at 0.1 s of a core each, 6.4 cores, one worker a process."""
    images = ["data.train.image=null", "data.train.video.share=1", "trainer.devices=8", "data.num_workers=1"]
    asked = case(*images, steps_per_s=4.0)
    asked.clip_s = {"video": 0.1}
    monkeypatch.setattr(doctor_machine, "num_cores", lambda: 16.0)
    finding = asked.check_need()
    assert finding.status == "OK" and finding.data["cores_of_a_node"] == pytest.approx(6.4)
    assert finding.data["clips_per_s"] == pytest.approx(64) and finding.data["workers_of_a_process"] == 1
    monkeypatch.setattr(doctor_machine, "num_cores", lambda: 4.0)
    assert "this machine has 4" in asked.check_need().advice
    asked.clip_s = {"video": 0.3}
    assert "data.num_workers=3 (it is 1)" in asked.check_need().advice
    hours = asked.check_hours()
    assert hours.data == {"seconds": pytest.approx(16 / 4), "processes": 8} and "as given" in hours.says
    accumulated = case(*images, "trainer.accumulate_grad_batches=2", steps_per_s=4.0)
    accumulated.clip_s = {"video": 0.1}
    assert accumulated.check_need().data["clips_per_s"] == pytest.approx(128)
    unknown = case(*images)
    unknown.clip_s = {"video": 0.1}
    assert unknown.check_need().status == unknown.check_hours().status == "WARN"
    unknown = case(*images)
    unknown.steps = [Step("video", 0.5, 1.0)]
    assert unknown.pace[0] == 0.5 and "measured" in unknown.pace[1]


def test_what_noise_can_stand_for() -> None:
    assert noise_shapes(load(NAME)) == {"video": (2, 3, 9, 32, 48), "image": (2, 3, 1, 32, 32)}
    latents = "data.sources.motion={path: here, kind: latent, strides: [4, 8]}"
    assert list(noise_shapes(load(NAME, [latents, "data.train.video.crop=null"]))) == ["image"]
    kept = ["data.train.video.resize=keep", "data.train.video.batch_size=1"]
    assert list(noise_shapes(load(NAME, kept))) == ["image"]


def test_what_checkpoints_take() -> None:
    """fp32 weights, two Adam moments and an average, twice; and three files of weights."""
    asked = case("trainer.keep_checkpoints=1")
    decoder = asked.decoder()
    weights = 4 * sum(p.numel() for p in decoder.parameters())
    buffers = sum(b.numel() * b.element_size() for b in decoder.buffers())
    assert 0 <= asked.checkpoint_bytes() - (2 * 4 * weights + 3 * weights) <= 2 * buffers
    assert case("trainer.keep_checkpoints=3").checkpoint_bytes() > asked.checkpoint_bytes() + 2 * 4 * weights - 1
