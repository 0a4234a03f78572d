"""A run to evaluate, without training it."""

from pathlib import Path

from experiments.checkpoints import save_weights
from experiments.config import load
from experiments.runs import run_dir
from experiments.train import build


def untrained(name: str, *overrides: str, seed: int = 0) -> Path:
    """The folder of a run of ``name`` that has weights as they are before any step, other ones for each seed."""
    decoder = build(load(name, overrides))
    for number, parameter in enumerate(decoder.parameters()):
        parameter.data.add_(0.01 * (seed + 1) * ((number % 3) - 1))
    weights = {**decoder.inference_parameters(), **decoder.inference_buffers()}
    kept = {"latent_space": decoder.latent_space.fingerprint, "step": str(seed)}
    save_weights(run_dir(name, overrides) / "weights-last.safetensors", weights, kept)
    return run_dir(name, overrides)
