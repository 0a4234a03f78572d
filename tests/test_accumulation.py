"""Gradient accumulation in one process: the same training as with the larger batch. With two processes: test_fsdp.py."""

import pytest
import torch
from lightning import Callback

from experiments.config import load
from experiments.train import train

FIXED = (
    "data.train.image=null",
    "data.train.video.share=1.0",
    "trainer.progress_bar=false",
    "validation.num_shown=0",
    "validation.references=false",
)
FIXED += (
    "validation.metrics=[psnr]",
    "trainer.max_steps=6",
    "trainer.val_every_steps=6",
    "ema={decay: 0.9, warmup_steps: 1}",
)


class Record(Callback):
    def __init__(self) -> None:
        self.keys: list[str] = []
        self.losses: list[float] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.keys += batch["key"]
        self.losses.append(float(outputs["loss"]))
        self.steps.append(trainer.global_step)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Six steps of four clips: at once, and as two batches of two."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for own in (["data.train.video.batch_size=4"], ["trainer.accumulate_grad_batches=2"]):
            root, record = tmp_path_factory.mktemp("accumulation"), Record()
            patch.setenv("RUNS_ROOT", str(root))
            overrides = [*FIXED, *own]
            folder = train(load("flashdecoder_debug", overrides), "flashdecoder_debug", overrides, [record])
            found.append((record, torch.load(folder / "last.ckpt", weights_only=True)))
    return found


def test_the_same_clips_make_the_same_steps(runs) -> None:
    (whole, _), (parts, _) = runs
    assert parts.keys == whole.keys and len(whole.keys) == 24
    assert parts.steps == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    # Lightning reports a part's loss as its share of the step's: already divided by the number of parts.
    means = [sum(parts.losses[i : i + 2]) for i in range(0, 12, 2)]
    assert means == pytest.approx(whole.losses, rel=1e-4)


def test_weights_moments_average_and_schedule_are_the_same(runs) -> None:
    (_, whole), (_, parts) = runs
    assert parts["global_step"] == whole["global_step"] == 6
    assert parts["seen"]["clips"] == whole["seen"]["clips"] == 24
    for part in ("state_dict", "ema"):
        torch.testing.assert_close(parts[part], whole[part], atol=1e-4, rtol=1e-3)
    left, right = (state["optimizer_states"][0]["state"] for state in (whole, parts))
    for number, moments in left.items():
        assert right[number]["step"] == moments["step"] == 6
        torch.testing.assert_close(right[number]["exp_avg"], moments["exp_avg"], atol=1e-5, rtol=1e-2)
    assert parts["lr_schedulers"][0]["last_epoch"] == whole["lr_schedulers"][0]["last_epoch"] == 6
