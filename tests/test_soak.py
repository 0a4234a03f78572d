"""Two thousand steps: memory and open files stay where they were."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from video_files import make_film

ROOT = Path(__file__).parent.parent
STEPS, EVERY, SETTLED = 2000, 20, 600  # until SETTLED, caches fill and the allocator finds its size
MIB = 2**20

SCRIPT = """
import json, os, sys
from pathlib import Path
from lightning import Callback
from experiments.config import load
from experiments.train import train

def resident(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def children():
    tasks = Path("/proc/self/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]

class Watch(Callback):
    def __init__(self): self.seen = []
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step % int(sys.argv[2]): return
        workers = children()
        self.seen.append({
            "step": trainer.global_step, "main": resident("self"), "workers": [resident(pid) for pid in workers],
            "files": len(os.listdir("/proc/self/fd")), "worker_files": [len(os.listdir(f"/proc/{pid}/fd")) for pid in workers],
        })
    def on_train_end(self, trainer, module):
        json.dump(self.seen, open(sys.argv[1], "w"))

if __name__ == "__main__":
    name, *overrides = sys.argv[3:]
    train(load(name, overrides), name, overrides, [Watch()])
"""


def slope(steps: np.ndarray, values: np.ndarray) -> float:
    """Per 1,000 steps, by Theil and Sen: the median slope of all pairs, which single peaks do not move."""
    i, j = np.triu_indices(len(steps), 1)
    return float(np.median((values[j] - values[i]) / (steps[j] - steps[i]))) * 1000


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads memory and open files from /proc")
def test_memory_and_open_files_stay_flat(tmp_path):
    """Real files, buckets, two workers, validation, checkpoints and TensorBoard, as in a long run."""
    (tmp_path / "films").mkdir()
    for i in range(12):
        size, length = ((48, 64), 30) if i % 3 else ((64, 48), 12)
        make_film(tmp_path / "films" / f"{i}.mp4", length, size, film=i)
    (tmp_path / "script.py").write_text(SCRIPT)
    overrides = [
        f"data.sources.motion={{path: {tmp_path}/films, kind: video, num_videos: 64, size: [256, 256], num_frames: 64, seed: 0}}",
        "data.train.video.buckets={sizes: [[32, 48], [48, 32]], num_frames: [5, 9, 13]}", "data.num_workers=2",
        f"trainer.max_steps={STEPS}", "trainer.val_every_steps=250", "trainer.checkpoint_every_steps=100",
        "trainer.log_every_steps=5", "trainer.progress_bar=false",
    ]  # fmt: skip
    environment = os.environ | {
        "RUNS_ROOT": str(tmp_path / "runs"),
        "CACHE_ROOT": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable,
        tmp_path / "script.py",
        tmp_path / "seen.json",
        str(EVERY),
        "flashdecoder_debug",
        *overrides,
    ]
    done = subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert [each["step"] for each in seen] == list(range(EVERY, STEPS + 1, EVERY))
    seen = [each for each in seen if each["step"] > SETTLED]
    steps = np.array([each["step"] for each in seen])
    main, workers = (np.array([np.sum(each[name]) for each in seen]) / MIB for name in ("main", "workers"))
    files = np.array([[each["files"], sum(each["worker_files"])] for each in seen])
    growth = slope(steps, main), slope(steps, workers)
    print(
        f"steps {SETTLED} to {STEPS}: training process {main[0]:.1f} to {main[-1]:.1f} MiB ({growth[0]:+.2f} per 1,000 steps), its "
        f"{len(seen[-1]['workers'])} children {workers[0]:.1f} to {workers[-1]:.1f} MiB ({growth[1]:+.2f}); open files "
        f"{files[:, 0].min()} to {files[:, 0].max()} and {files[:, 1].min()} to {files[:, 1].max()}"
    )
    assert growth[0] < 5 and growth[1] / len(seen[-1]["workers"]) < 5  # MiB per process
    assert np.ptp(files, axis=0).max() <= 4, "a file that is being written or read may be open"
