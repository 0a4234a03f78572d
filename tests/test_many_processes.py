"""Several processes over shards: every clip once an epoch, one process's losses, another number of processes on resume."""

import json
import logging
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from video_files import make_film

from datamodules.clips import ClipData
from datamodules.config import ClipDataConfig, SourceConfig, StreamConfig

ROOT = Path(__file__).parent.parent
IN_SHARDS, IN_FOLDER = 22, 6
EPOCH = IN_SHARDS + IN_FOLDER


def shard(path: Path, films: list[Path]) -> None:
    """As video2dataset writes them: KEY.mp4, KEY.json, KEY.txt, with keys that begin anew in every shard."""
    with tarfile.open(path, "w") as tar:
        for number, film in enumerate(films):
            tar.add(film, f"{number:05d}.mp4")
            for suffix, text in (("json", json.dumps({"caption": film.stem, "status": "success"})), ("txt", film.stem)):
                beside = path.parent / f"{film.stem}.{suffix}"
                beside.write_text(text)
                tar.add(beside, f"{number:05d}.{suffix}")
                beside.unlink()


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """shards/ with three unequal tars, and folder/ with single films."""
    root = tmp_path_factory.mktemp("films")
    for name in ("drawn", "shards", "folder"):
        (root / name).mkdir()
    drawn = [make_film(root / "drawn" / f"{i}.mp4", 14, film=i) for i in range(IN_SHARDS)]
    for number, some in enumerate(np.split(np.array(drawn, object), [5, 16])):
        shard(root / "shards" / f"{number:05d}.tar", list(some))
    for i in range(IN_FOLDER):
        make_film(root / "folder" / f"{i}.mp4", 14, film=IN_SHARDS + i)
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path_factory.getbasetemp() / "index"))


def sources(films: Path) -> dict[str, SourceConfig]:
    return {
        "shards": SourceConfig(f"{films}/shards/{{00000..00002}}.tar"),
        "folder": SourceConfig(str(films / "folder")),
    }


def config(films: Path, batch_size: int = 1, num_workers: int = 0) -> ClipDataConfig:
    stream = StreamConfig(["shards", "folder"], (32, 48), 9, batch_size=batch_size)
    return ClipDataConfig(sources(films), {"video": stream}, num_workers=num_workers)


# Ranks as processes of their own; each writes down what it was given. Forked, so that the imports are paid once.
RANKS = """
import json, multiprocessing, sys
from itertools import islice
from datamodules.clips import ClipData
from datamodules.config import ClipDataConfig, SourceConfig, StreamConfig

def rank_of(folder, sources, world_size, rank, workers, batch_size, steps):
    stream = StreamConfig(list(sources), (32, 48), 9, batch_size=batch_size)
    config = ClipDataConfig({k: SourceConfig(v) for k, v in sources.items()}, {"video": stream}, num_workers=workers)
    data = ClipData(config, world_size=world_size, rank=rank)
    taken = []
    for batch in islice(data.train_dataloader(), steps):
        taken.append([batch["key"], [round(float(clip.double().sum()), 3) for clip in batch["video"]]])
        data.batch_consumed()
    with open(f"{folder}/{world_size}-{workers}-{rank}.json", "w") as file:
        json.dump(taken, file)

folder, sources, runs = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
fork = multiprocessing.get_context("fork")
for world_size, workers, batch_size, steps in runs:
    ranks = [fork.Process(target=rank_of, args=(folder, sources, world_size, r, workers, batch_size, steps)) for r in range(world_size)]
    for process in ranks: process.start()
    for process in ranks: process.join(120)
    assert all(process.exitcode == 0 for process in ranks), [process.exitcode for process in ranks]
"""


@pytest.fixture(scope="module")
def ranks(films, tmp_path_factory) -> dict[tuple[int, int], list[list]]:
    """(ranks, workers) -> for every rank its [keys, sums of pixels] step by step, over two epochs."""
    folder, index = tmp_path_factory.mktemp("ranks"), tmp_path_factory.getbasetemp() / "index"
    runs = [(1, 0, 12, 6), (2, 0, 6, 6), (2, 2, 6, 6), (4, 0, 3, 6), (4, 2, 3, 6)]
    paths = {name: source.path for name, source in sources(films).items()}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CACHE_ROOT": str(index)}
    command = [sys.executable, "-c", RANKS, str(folder), json.dumps(paths), json.dumps(runs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    read = {}
    for world_size, workers, _, _ in runs:
        files = [folder / f"{world_size}-{workers}-{rank}.json" for rank in range(world_size)]
        read[world_size, workers] = [json.loads(file.read_text()) for file in files]
    return read


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [2, 4])
def test_no_clip_of_an_epoch_of_shards_is_lost_or_doubled(ranks, world_size, workers):
    steps = list(zip(*ranks[world_size, workers], strict=True))
    names = [key.split("#")[0] for step in steps for keys, _ in step for key in keys]
    first, second = names[:EPOCH], names[EPOCH : 2 * EPOCH]
    assert Counter(first) == Counter(second) == Counter(set(first)) and len(set(first)) == EPOCH
    assert sum(name.startswith("shards/") for name in first) == IN_SHARDS
    assert first != second
    [[*whole]] = ranks[1, 0]
    for step, (keys, sums) in zip(steps, whole, strict=True):
        assert sum((part for part, _ in step), []) == keys, "the ranks' batches make up the batch of one process"
        assert sum((part for _, part in step), []) == sums, "and so do the pixels"


def test_resuming_with_other_numbers_of_processes_continues_the_epoch(films, caplog):
    """Two processes, then one, then four, mid-epoch each time: as one process would have gone on."""
    whole = ClipData(config(films), seed=3)
    expected = [whole.plan.request_at("video", draw).name for draw in range(EPOCH)]
    taken, state = [], None
    for world_size, steps in ((2, 4), (1, 4), (4, 4)):
        ranks = [ClipData(config(films), seed=3, world_size=world_size, rank=rank) for rank in range(world_size)]
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            for data in ranks if state else ():
                data.load_state_dict(state)
        warned = [record.getMessage() for record in caplog.records]
        for step in zip(*(iter(data.train_dataloader()) for data in ranks), strict=True):
            taken += [key.split("#")[0] for batch in step for key in batch["key"]]
            for data in ranks:
                data.batch_consumed()
            steps -= 1
            if not steps:
                break
        if state:
            (said,) = warned  # once, not by every rank
            was = state["world_size"]
            assert f"saved by {was} processes and goes on with {world_size}" in said
            assert f"{world_size / was:g} times as many clips" in said
        states = [json.loads(json.dumps(data.state_dict())) for data in ranks]
        assert all(each == states[0] for each in states)
        state = states[0]
    assert taken == expected and len(set(taken)) == EPOCH


# ---- training


# Lightning starts the other processes by running this script again. After ``stop`` steps all end at once, as in a crash.
SCRIPT = """
import json, os, sys
from lightning import Callback
from experiments.config import load
from experiments.train import train

class Record(Callback):
    def __init__(self, stop): self.steps, self.stop = [], stop
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step > self.stop: os._exit(0)
        self.steps.append({"keys": batch["key"], "loss": float(outputs["loss"])})
        if trainer.global_step == self.stop:
            json.dump(self.steps, open(f"{sys.argv[1]}/{trainer.world_size}-{trainer.global_rank}.json", "w"))

if __name__ == "__main__":
    stop, name, *overrides = sys.argv[2:]
    train(load(name, overrides), name, overrides, [Record(int(stop))])
"""


def trained(folder: Path, films: Path, world_size: int, stop: int, *overrides: str) -> tuple[list[list[dict]], str]:
    """What every rank was given step by step until ``stop`` or the end, and what was said on stderr."""
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    fixed = ["flashdecoder_debug", "trainer.progress_bar=false", "validation.num_shown=0", "trainer.max_steps=12"]
    fixed += [f"data.sources.{name}.path={source.path}" for name, source in sources(films).items()]
    fixed += ["data.train=null", "data.train.video={sources: [shards, folder], size: [32, 48], num_frames: 9}"]
    fixed += ["trainer.checkpoint_every_steps=4", "trainer.val_every_steps=100", "data.num_workers=1"]
    fixed += ["data.sources.unseen.num_videos=4"]  # every process validates something
    environment = {"RUNS_ROOT": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    environment["CACHE_ROOT"] = str(folder)
    command = [sys.executable, str(script), str(folder), str(stop), *fixed, f"trainer.devices={world_size}", *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    files = [folder / f"{world_size}-{rank}.json" for rank in range(world_size)]
    return [json.loads(file.read_text()) for file in files], done.stderr


@pytest.fixture(scope="module")
def one(films, tmp_path_factory) -> tuple[list[dict], dict]:
    """What one process was given in steps of four clips, and its final checkpoint."""
    folder = tmp_path_factory.mktemp("one")
    [steps], _ = trained(folder, films, 1, 12, "data.train.video.batch_size=4")
    return steps, torch.load(next(folder.glob("*/last.ckpt")), weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_many_processes_train_on_shards_as_one(films, tmp_path, one, world_size):
    steps, expected = one
    many, _ = trained(tmp_path, films, world_size, 12, f"data.train.video.batch_size={4 // world_size}")
    for *parts, whole in zip(*many, steps, strict=True):
        assert sum((part["keys"] for part in parts), []) == whole["keys"]
        assert sum(part["loss"] for part in parts) / world_size == pytest.approx(whole["loss"], rel=2e-3)
    actual = torch.load(next(tmp_path.glob("*/last.ckpt")), weights_only=True)
    assert actual["seen"] == expected["seen"]
    for name, weight in expected["state_dict"].items():
        torch.testing.assert_close(actual["state_dict"][name], weight, atol=2e-3, rtol=2e-2, msg=name)


@pytest.mark.slow
def test_a_run_that_goes_on_with_other_numbers_of_processes_ends_its_epoch(films, tmp_path):
    taken = []
    for world_size, stop in ((2, 4), (1, 8), (4, 12)):
        ranks, said = trained(tmp_path / "run", films, world_size, stop)
        taken += [key.split("#")[0] for step in zip(*ranks, strict=True) for part in step for key in part["keys"]]
        assert said.count("no clip is lost or comes twice") == (world_size != 2), said[-2000:]
    assert len(taken) == 4 * (2 + 1 + 4) == EPOCH
    assert len(set(taken)) == EPOCH
