"""On a GPU: an encoder in its own stream, compiled blocks and LPIPS in bfloat16 train as the plain path does."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file

from experiments import bench_train
from experiments.bench_train import BenchTrainConfig
from experiments.config import load
from experiments.train import train

pytestmark = pytest.mark.gpu
GPU = ("trainer.accelerator=gpu", "trainer.devices=1", "trainer.progress_bar=false", "validation.num_shown=0")
GPU += ("trainer.max_steps=8", "trainer.val_every_steps=8")


class Losses(Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.found.append(float(outputs["loss"]))


def run(name: str, *overrides: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses, overrides = Losses(), (*GPU, *overrides)
    folder: Path = train(load(name, overrides), name, overrides, [losses])
    weights = load_file(next(folder.glob("weights-last.safetensors")))
    shutil.rmtree(folder)  # another run with options that change no number has the same name
    return losses.found, weights


@pytest.mark.parametrize("name", ["flashdecoder_debug", "refdecoder_debug"])
def test_an_encoder_in_its_own_stream_gives_the_same_losses(name: str, runs_root: Path) -> None:
    """Atomic additions in backward kernels may differ in the last bits from run to run, with or without the stream."""
    (plain, weights), (ahead, others) = run(name), run(name, "trainer.encode_ahead=true")
    assert ahead[0] == plain[0] and ahead == pytest.approx(plain, rel=1e-4)
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_train_as_plain_ones(checkpointing: bool, runs_root: Path) -> None:
    shared = (f"decoder.checkpointing={str(checkpointing).lower()}", "trainer.precision=bf16-mixed")
    plain, compiled = (
        run("flashdecoder_debug", *shared)[0],
        run("flashdecoder_debug", *shared, "trainer.compile=blocks")[0],
    )
    assert compiled == pytest.approx(plain, rel=2e-2)


def test_shares_add_up_and_memory_is_measured() -> None:
    variants = ["base", "latents", "ahead", "compile+latents"]
    result = bench_train.bench_train(
        "flashdecoder_debug", [], BenchTrainConfig(variants, steps=2, rounds=2, device="gpu")
    )
    for row in result["streams"].values():
        for found in row["variants"].values():
            assert found["shares"]["rest"] > 0 and found["shares"]["forward"] > 0 and found["peak_gib"] > 0
