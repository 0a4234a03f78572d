"""A run that is killed again and again, without warning, ends as if it had never been."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.test_preemption import events

ROOT = Path(__file__).parent.parent
ROUNDS = 20
STEPS = 120
COMMAND = (
    sys.executable, "-m", "experiments.train", "flashdecoder_debug", "trainer.progress_bar=false",
    "trainer.checkpoint_every_steps=1", f"trainer.max_steps={STEPS}", "trainer.val_every_steps=10", "validation.num_shown=0",
)  # fmt: skip


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    environment = os.environ | {"RUNS_ROOT": str(folder), "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, *overrides]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(folder: Path, *overrides: str) -> dict:
    process = start(folder, *overrides)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()[-3000:]
    return torch.load(next(folder.glob("*/last.ckpt")), weights_only=True)


def steps_done(folder: Path) -> int:
    for checkpoint in folder.glob("*/last.ckpt"):
        return torch.load(checkpoint, weights_only=True, mmap=True)["global_step"]
    return 0


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    """At random points of training and of writing: every step is followed by a checkpoint, so most of them hit a write. In every
    other session checkpoints are written beside training."""
    expected = finish(tmp_path / "whole")
    folder, rng, progress, writing = tmp_path / "killed", random.Random(0), [0], 0
    for number in range(ROUNDS):
        process = start(folder, f"trainer.async_checkpoints={'true' if number % 2 else 'false'}")
        deadline = time.monotonic() + 300
        while steps_done(folder) == progress[-1] and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.4))  # anywhere: in a step, a validation, or a write
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        progress.append(steps_done(folder))
        writing += bool(list(folder.glob("*/.*.tmp")))
    print(f"steps after each kill: {progress[1:]}; {writing} of {ROUNDS} kills hit a file that was being written")
    assert progress == sorted(progress)
    assert progress[-1] > progress[1] > 0 and writing
    actual = finish(folder)
    assert actual["seen"] == expected["seen"]
    for part in ("state_dict", "ema"):
        for name, weight in expected[part].items():
            assert torch.equal(actual[part][name], weight), name
    assert not list(folder.glob("*/.*.tmp")), "leftovers of killed writes"
    whole, killed = (events(next((tmp_path / which).iterdir())) for which in ("whole", "killed"))
    assert [step for step, _ in whole["train/loss"]] == list(range(1, STEPS + 1))
    assert killed == whole  # no number of TensorBoard's is lost, none is there twice
    shutil.rmtree(folder)
