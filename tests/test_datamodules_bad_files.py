"""ClipData and files that cannot be read: replaced and listed, tolerated up to a share, never shown as black frames."""

import json
from pathlib import Path

import numpy as np
import pytest
from video_files import cut, keys, make_film, take

from datamodules.clips import ClipData
from datamodules.config import ClipDataConfig, SourceConfig, StreamConfig
from datamodules.quarantine import Quarantine, TooManyBadFiles


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "cache"))


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Ten listed films of which one was cut short."""
    rows = ["path,width,height,num_frames,fps"]
    for i in range(10):
        make_film(tmp_path / f"{i}.mkv", 30, film=i)
        rows.append(f"{i}.mkv,64,48,30,25")
    cut(tmp_path / "3.mkv", tmp_path / "3.mkv", 0.5)
    (tmp_path / "list.csv").write_text("\n".join(rows))
    return tmp_path / "list.csv"


def listed(path: Path, **options) -> ClipDataConfig:
    stream = StreamConfig(["films"], (32, 32), 9, batch_size=2)
    return ClipDataConfig({"films": SourceConfig(str(path))}, {"v": stream}, num_workers=0, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_replaced_and_written_down(damaged, tmp_path, workers, caplog):
    made = listed(damaged, max_bad_share=0.1)
    made.num_workers = workers
    data = ClipData(made, seed=1, run_dir=tmp_path / "run")
    batches = take(data, 30)
    assert all(len(batch["key"]) == 2 and set(batch) == {"video", "key"} for batch in batches)
    shown = [key.split("#")[0] for batch in batches for key in batch["key"]]
    assert "films/3.mkv" not in shown and len(set(shown)) == 9
    (line,) = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["path"].endswith("3.mkv") and "cut short" in entry["reason"] and entry["count"] >= 6
    assert sum("3.mkv" in record.message for record in caplog.records) == 1, "logged once"
    assert keys(take(ClipData(made, seed=1), 30)) == keys(batches), "the same clips take its place every time"


def test_a_resumed_run_keeps_its_list(damaged, tmp_path):
    counts = []
    for _ in range(2):
        take(ClipData(listed(damaged, max_bad_share=0.1), seed=1, run_dir=tmp_path / "run"), 10)
        counts.append(json.loads((tmp_path / "run" / "quarantine.jsonl").read_text())["count"])
    assert counts[1] == 2 * counts[0]


def test_too_many_bad_files_stop_the_run(damaged):
    for i in range(5):
        cut(damaged.parent / f"{i}.mkv", damaged.parent / f"{i}.mkv", 0.5)
    with pytest.raises(TooManyBadFiles, match=r"clips could not be read, more than data.max_bad_share = 0.05") as error:
        take(ClipData(listed(damaged), seed=1), 30)
    assert "cut short" in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_is_gone_stops_the_run_at_the_first_clip(damaged, workers):
    for file in damaged.parent.glob("*.mkv"):
        file.unlink()
    made = listed(damaged)
    made.num_workers = workers
    with pytest.raises(TooManyBadFiles, match="is the disk still mounted") as error:
        take(ClipData(made, seed=1), 1)
    assert "Traceback" not in str(error.value)


def test_bad_files_in_the_index(tmp_path):
    for i in range(4):
        make_film(tmp_path / f"{i}.mkv", 30, film=i)
    cut(tmp_path / "0.mkv", tmp_path / "0.mkv", 0.5)
    strict = ClipDataConfig({"films": SourceConfig(str(tmp_path))}, {"v": StreamConfig(["films"], (32, 32), 9)})
    with pytest.raises(TooManyBadFiles, match="data.sources.films: 1 of 4 files are unreadable"):
        ClipData(strict).describe()
    strict.max_bad_share = 0.25
    data = ClipData(strict, run_dir=tmp_path / "run")
    assert data.describe()["train"]["v"]["dropped"] == {"unreadable": 1}
    assert "0.mkv" in (tmp_path / "run" / "quarantine.jsonl").read_text()


@pytest.mark.parametrize(
    ("tolerated", "actual", "stops"), [(0.1, 0.08, False), (0.05, 0.5, True), (0.0, 0.02, True), (0.2, 0.6, True)]
)
def test_the_rule_tolerates_what_the_config_allows_and_no_more(tolerated, actual, stops):
    rng = np.random.default_rng(0)
    for _ in range(20):
        quarantine, stopped_at = Quarantine(tolerated), None
        try:
            for _ in range(1000):
                failed = rng.random() < actual
                quarantine.update(1, [("a.mp4", "cut short")] if failed else [], int(failed))
        except TooManyBadFiles:
            stopped_at = quarantine.num_asked
        assert (stopped_at is not None) == stops
        assert not stops or stopped_at < max(60, 12 / actual), "soon"


def test_one_bad_file_in_ten_passes_at_any_point():
    for phase in range(10):
        quarantine = Quarantine(0.1)
        for n in range(200):
            failed = n % 10 == phase
            quarantine.update(1, [("a.mp4", "cut short")] if failed else [], int(failed))


def test_a_bad_validation_clip_is_an_error_not_another_clip(damaged):
    made = listed(damaged)
    made.val = {"v": StreamConfig(["films"], (32, 32), 9)}
    with pytest.raises(
        RuntimeError,
        match=r"data.val: a validation clip, which nothing may replace, cannot be read: .*3\.mkv: .*cut short",
    ):
        list(ClipData(made).val_dataloader()[0])
