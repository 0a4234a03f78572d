"""A run that is killed again and again, without warning, ends as if it had never been."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
COMMAND = (
    sys.executable, "-m", "experiments.train", "flashdecoder_debug", "trainer.progress_bar=false",
    "trainer.checkpoint_every_steps=1", "trainer.max_steps=40", "validation.num_shown=0",
)  # fmt: skip


def start(folder: Path) -> subprocess.Popen:
    environment = os.environ | {"RUNS_ROOT": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(COMMAND, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(folder: Path) -> dict:
    process = start(folder)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()[-3000:]
    return torch.load(next(folder.glob("*/last.ckpt")), weights_only=True)


def steps_done(folder: Path) -> int:
    for checkpoint in folder.glob("*/last.ckpt"):
        return torch.load(checkpoint, weights_only=True, mmap=True)["global_step"]
    return 0


@pytest.mark.slow
def test_repeated_kills_change_nothing(tmp_path: Path) -> None:
    expected = finish(tmp_path / "whole")
    folder, rng, progress = tmp_path / "killed", random.Random(0), [0]
    for _ in range(6):
        process = start(folder)
        deadline = time.monotonic() + 300
        while steps_done(folder) == progress[-1] and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1.5))  # anywhere: in a step, a validation, or a write
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        progress.append(steps_done(folder))
    assert progress == sorted(progress)
    assert progress[-1] > progress[1] > 0
    actual = finish(folder)
    assert actual["seen"] == expected["seen"]
    for name, weight in expected["state_dict"].items():
        assert torch.equal(actual["state_dict"][name], weight), name
    assert not list(folder.glob("*/.*.tmp")), "leftovers of killed writes"
