"""What a run would be, without running it: `make show exp=NAME`. And what there is to run: `make list`.

Nothing is allocated and nothing is decoded: parameters live on the meta device, and memory is that of a step over fake
tensors, which have shapes and no memory.
"""

import dataclasses
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments import compose, runs
from experiments.compose import ConfigError, run_cli
from experiments.config import (
    Experiment,
    build_decoder,
    build_space,
    check_decoder,
    encoded_frames,
    load,
    locate,
    resolved_yaml,
    streams,
)
from experiments.states import GIB, States, sharded_units, states

COLUMNS = ("stream", "size", "frames", "latent n y x", "tokens/clip", "batch", "tokens/step", "share", "clips", "files")


def main(arguments: list[str]) -> int:
    if arguments == ["--list"]:
        print(listing())
        return 0
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError("which experiment? python -m experiments.show NAME [key=value ...], or --list")
    name, *overrides = arguments
    experiment = load(name, overrides)
    print(f"{name}: {' '.join(compose.header(name)[:1])}\nrun: {_state(runs.run_dir(name, overrides))}\n")
    print(resolved_yaml(experiment))
    try:
        space = build_space(experiment)
    except FileNotFoundError as error:
        print(f"latent space not found: {error}\nWithout its channels and strides nothing else can be shown.")
        return 0
    with torch.device("meta"):
        decoder = build_decoder(experiment, space)
    check_decoder(experiment, decoder)
    states(experiment, decoder)  # what cannot be sharded is told before the tables
    print(parameters(decoder))
    print(stream_table(experiment, decoder))
    print(memory(experiment, decoder))
    return 0


def listing() -> str:
    """Every runnable experiment with the first line of its header."""
    rows = [[name, (compose.header(name) or [""])[0]] for name in compose.names()]
    return table([["experiment", "what it is"], *rows])


def table(rows: list[list[Any]], indent: str = "") -> str:
    """Columns as wide as they need; numbers to the right, words to the left. The first row is the head."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(isinstance(value, int | float) for value in column[1:]) for column in zip(*rows, strict=True)]
    lines = []
    for row in cells:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        lines.append(indent + "  ".join(padded).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _state(folder: Path) -> str:
    if (folder / runs.DONE).is_file():
        return f"{folder} (complete)"
    return f"{folder} ({'begun: the same command resumes it' if (folder / runs.CONFIG).is_file() else 'not begun'})"


# --- parameters ---------------------------------------------------------------------------------------------------------


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def parameters(decoder: Any) -> str:
    """Millions of parameters of every part, two levels deep, and what of them is trained and needed at inference."""
    rows: list[list[Any]] = [["parameters", "M"]]
    for name, part in decoder.named_children():
        rows.append([name, count_parameters(part) / 1e6])
        rows += [[f"  {below}", count_parameters(piece) / 1e6] for below, piece in part.named_children()]
    rows.append(["trained", sum(p.numel() for _, p in decoder.trainable()) / 1e6])
    rows.append(["needed at inference", sum(p.numel() for p in decoder.inference_parameters().values()) / 1e6])
    return table([row for row in rows if isinstance(row[1], str) or row[1] > 0]) + "\n"


# --- sizes and clips ----------------------------------------------------------------------------------------------------


def stream_table(experiment: Experiment, decoder: Any) -> str:
    """One row per stream: its size in pixels, latents and tokens, per process and step, and the clips that it has."""
    clips = _clips(experiment)
    rows: list[list[Any]] = [list(COLUMNS)]
    places: dict[str, int] = {}
    named = {f"data.train.{name}" for name in getattr(experiment.data, "train", {})}
    for where, stream in streams(experiment).items():
        n, y, x = latent_shape(experiment, decoder, where, stream)
        places = decoder.tokens(n, y, x)
        folded = n * math.ceil(y * x / (decoder.size_multiple // decoder.latent_space.stride_hw) ** 2)
        tokens = sum(places.values()) if places else folded
        counts = clips[where]
        if isinstance(counts, str):
            num_clips, files = "?", "data not found, see below"
            share = f"{stream.share:g}" if where in named else f"of {stream.share:g}"  # a bucket's is told by the films
        else:
            share = f"{counts['share'] * stream.share:.4g}"
            num_clips = f"{counts['clips']:,}"
            left_out = "".join(f", {num:,} {reason}" for reason, num in counts["dropped"].items())
            files = f"{counts['files_used']:,} of {counts['files_found']:,}{left_out}"
        rows.append(
            [
                where.removeprefix("data."),
                "x".join(map(str, stream.size)),
                stream.total_frames,
                f"{n} {y} {x}",
                ", ".join(f"{place} {number:,}" for place, number in places.items()) if places else tokens,
                stream.batch_size,
                tokens * stream.batch_size,
                share if where.startswith("data.train.") else "",
                num_clips,
                files,
            ]
        )
    missing = dict.fromkeys(f"data not found: {counts}" for counts in clips.values() if isinstance(counts, str))
    where = "that pass its attention, place by place" if places else "of its first layer"
    return "\n".join([f"per process (a decoder's tokens are those {where})", table(rows, "  "), *missing, ""])


def latent_shape(experiment: Experiment, decoder: Any, where: str, stream: Any) -> tuple[int, int, int]:
    """Latent frames, rows and columns of a clip of the stream ``where``, padding included."""
    space, multiple = decoder.latent_space, decoder.size_multiple
    frames, (height, width) = encoded_frames(experiment, space, where, stream), stream.size
    if experiment.pad == "replicate":
        frames = space.padded_frames(frames)
        height, width = height + -height % multiple, width + -width % multiple
    return space.latent_frames(frames), height // space.stride_hw, width // space.stride_hw


def _clips(experiment: Experiment) -> dict[str, dict[str, Any] | str]:
    """The datamodule's own counts for every stream; or, where its data are not on this machine, what it says about that."""
    counted: dict[str, dict[str, Any] | str] = {}
    for split in ("train", "val"):
        for name, stream in getattr(experiment.data, split, {}).items():
            alone = {"train": {}, "val": {}, split: {name: dataclasses.replace(stream, share=1.0)}}
            datamodule = locate(experiment.datamodule, "datamodule")(dataclasses.replace(experiment.data, **alone))
            try:
                found = datamodule.describe()[split]
            except FileNotFoundError as error:
                found = str(error)
            except ValueError as error:  # no clip survives
                raise ConfigError(str(error)) from None
            for where in streams(experiment):
                part = where.removeprefix(f"data.{split}.")
                if part == name or part.rpartition("/")[0] == name:  # a bucket of it
                    counted[where] = found if isinstance(found, str) else found.get(part) or _none_of(found)
    return counted


def _none_of(buckets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The counts of a bucket without a film, beside those of the others of its stream."""
    return next(iter(buckets.values())) | {"clips": 0, "files_used": 0, "share": 0.0, "dropped": {}}


# --- memory -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Memory:
    """GiB that a GPU holds in training: ``states`` whatever the size, ``saved`` for the backward pass by stream, and the ``peak``,
    states included, of a step on the ``largest`` stream."""

    states: States
    saved: dict[str, float]
    largest: str
    peak: float


def memory_estimate(experiment: Experiment, decoder: Any) -> Memory | None:
    """What a step holds under the experiment's strategy, counted over fake tensors; None where there is nothing to train on.
    Leaves ``decoder`` unusable.

    Raises ConfigError where its weights cannot be sharded and ``trainer.strategy=fsdp`` wants it.
    """
    held = states(experiment, decoder)
    shapes = {
        where.removeprefix("data."): (
            stream.batch_size,
            decoder.latent_space.channels,
            *latent_shape(experiment, decoder, where, stream),
        )
        for where, stream in streams(experiment).items()
        if where.startswith("data.train.")
    }
    if not shapes:
        return None
    autocast = experiment.trainer.precision != "32-true"
    leaving = sharded_units(experiment, decoder)
    saved, largest, peak = fake_steps(decoder.model, shapes, autocast, decoder.step_inputs, leaving)
    saved = {where: size / GIB for where, size in saved.items()}
    return Memory(held, saved, largest, held.gib - held.gradients_gib + peak / GIB)


def memory(experiment: Experiment, decoder: Any) -> str:
    """An estimate of what a GPU holds in training, at every training size, with the formula."""
    estimate = memory_estimate(experiment, decoder)
    if estimate is None:
        return "memory per GPU: data.train has no streams, so there is nothing to train on"
    held, precision = estimate.states.gib, experiment.trainer.precision
    rows: list[list[Any]] = [["stream", "states GiB", "activations GiB", "together GiB"]]
    rows += [[where, held, size, held + size] for where, size in estimate.saved.items()]
    return (
        f"memory per GPU, estimated for {estimate.states.strategy}\n{table(rows, '  ')}\n"
        f"  at {estimate.largest}, with what the backward pass recomputes and lays aside: {estimate.peak:.2f} GiB\n"
        f"  states = {estimate.states.formula}\n"
        f"  activations = what the network keeps for its backward pass at this batch size in {precision}, counted tensor\n"
        "  by tensor. Not counted: the encoder, the losses' networks, a discriminator's activations, DDP's buckets,\n"
        "  FSDP's copies of what it sends, the allocator's slack. TensorBoard shows the measured peak."
        + _recomputed(experiment, decoder)
    )


def _recomputed(experiment: Experiment, decoder: Any) -> str:
    """What ``trainer.checkpointing=auto`` would do here; empty without it."""
    if experiment.trainer.checkpointing != "auto":
        return ""
    from experiments import recompute  # it counts by what is here

    if not hasattr(experiment.decoder, "checkpointing"):
        return "\n  checkpointing=auto: this decoder has no checkpointing; leave it out"
    on_gpu = experiment.trainer.accelerator != "cpu" and torch.cuda.is_available()
    room = recompute.device_memory_gib(torch.device("cuda" if on_gpu else "cpu"), experiment.trainer.memory_gib)
    whose = "given" if experiment.trainer.memory_gib else "this machine's own; trainer.memory_gib says another's"
    counted = recompute.count(experiment, decoder.latent_space)
    return f"\n  {recompute.plan(counted, room)[1]}\n  of {room:.4g} GiB ({whose})"


def fake_steps(
    network: nn.Module,
    shapes: dict[str, tuple[int, ...]],
    autocast: bool,
    inputs: Callable[[torch.Tensor], dict[str, torch.Tensor]] = lambda latent: {},
    leaving: Sequence[nn.Module] = (),
) -> tuple[dict[str, int], str, int]:
    """Run ``network`` over a latent of each shape (b c n y x), and what else ``inputs`` says it takes, without memory, and
    count what it would have held.

    Returns the bytes that each forward pass keeps for its backward pass; the name of the largest; and the largest
    number of bytes alive during a forward and backward pass of that one, gradients among them, but for those of the parts
    ``leaving``, which go as soon as they are complete (FSDP2), parameters not.
    ``network`` is on the meta device and is left unusable: its parameters become fake.
    """
    saved = {}
    # Fake CPU tensors rather than meta ones: attention then takes the same memory-saving kernel that a GPU would.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        network = network.to_empty(device="cpu").train()
        for parameter in {p for part in leaving for p in part.parameters() if p.requires_grad}:
            parameter.register_post_accumulate_grad_hook(_forget_gradient)
        own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        for where, shape in shapes.items():
            kept: dict[int, int] = {}

            def note(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    kept[storage._cdata] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                latent = torch.zeros(shape)
                output = network(latent, **inputs(latent))
            saved[where] = sum(kept.values())
            del output
        largest = max(saved, key=saved.get)
        with LiveBytes(own) as live:
            latent = torch.zeros(shapes[largest])
            network(latent, **inputs(latent)).float().sum().backward()
    return saved, largest, live.peak


def _forget_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, those in ``ignored`` excepted; ``peak`` is the most there were."""

    def __init__(self, ignored: set[int]) -> None:
        super().__init__()
        self.alive = dict.fromkeys(ignored, 0)
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.alive:
            return
        self.alive[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._forget, storage._cdata).atexit = False
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _forget(self, address: int) -> None:
        self.now -= self.alive.pop(address)


if __name__ == "__main__":
    run_cli(main)
