"""Two processes on a CPU stand in for many GPUs: the same training as one process with twice the batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# Lightning starts the second process by running this script again.
SCRIPT = """
import json, sys
from lightning import Callback
from experiments.config import load
from experiments.train import train

class Record(Callback):
    def __init__(self): self.steps = []
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append({"keys": batch["key"], "shape": list(batch["video"].shape), "loss": float(outputs["loss"])})
    def on_train_end(self, trainer, module):
        json.dump(self.steps, open(f"{sys.argv[1]}/rank{trainer.global_rank}.json", "w"))

if __name__ == "__main__":
    name, *overrides = sys.argv[2:]
    train(load(name, overrides), name, overrides, [Record()])
"""


def train(folder: Path, *overrides: str) -> tuple[list[list[dict]], dict]:
    """What every rank saw, and the final checkpoint."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    fixed = ("flashdecoder_gan_debug", "trainer.progress_bar=false", "validation.num_shown=0", "trainer.max_steps=10")
    fixed += ("objective.crop=null",)  # random crops are drawn for each rank
    environment = {"RUNS_ROOT": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, str(script), str(folder), *fixed, *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
    return ranks, torch.load(next(folder.glob("*/last.ckpt")), weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    lone = "data.val.lone={sources: [unseen], size: [32, 48], num_frames: 9, num_clips: 1}"  # the other rank has none
    two = train(folder / "two", "trainer.devices=2", lone)
    one = train(folder / "one", "data.train.video.batch_size=4", "data.train.image.batch_size=4")
    return two, one


def test_two_ranks_see_one_size_and_no_clip_twice(runs) -> None:
    (ranks, _), _ = runs
    assert len(ranks) == 2
    epochs: dict[tuple, list[str]] = {}
    for first, second in zip(*ranks, strict=True):
        assert first["shape"] == second["shape"]
        epochs.setdefault(tuple(first["shape"]), []).extend(first["keys"] + second["keys"])
    assert len(epochs) == 2  # both sizes came up
    for keys in epochs.values():
        films = [key.split("#")[0] for key in keys][:16]  # each stream has 16 films: one epoch
        assert len(set(films)) == len(films)


def test_two_ranks_train_as_one_with_twice_the_batch(runs) -> None:
    (ranks, two), ([one], single) = runs
    for first, second, whole in zip(*ranks, one, strict=True):
        assert first["keys"] + second["keys"] == whole["keys"]
        # The discriminator's and R1's means are over equal halves, so they average exactly too.
        assert (first["loss"] + second["loss"]) / 2 == pytest.approx(whole["loss"], rel=2e-3)
    assert two["seen"] == single["seen"] == {"clips": 40, "batches": 10}
    for name, weight in single["state_dict"].items():
        if name.startswith("discriminator") and name.endswith("bias"):
            continue  # behind a norm: their gradient is rounding noise, which Adam makes as large as any
        torch.testing.assert_close(two["state_dict"][name], weight, atol=2e-3, rtol=2e-2, msg=name)
