"""FSDP2 as a strategy of the trainer: ``trainer.strategy=fsdp``.

A checkpoint is the same file as with DDP: whole tensors, optimiser state by parameter. So a run goes on under either, on
another number of processes. For this the first process holds 16 bytes per trained parameter (weights, Adam's two moments,
average) in main memory while it writes; devices need room for one whole tensor.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from decoders.base import VideoDecoder
from decoders.sharding import gathered, slice_like
from experiments.compose import ConfigError
from experiments.schema import TrainerConfig


def num_processes(t: TrainerConfig) -> int:
    """Of a run, on all nodes; ``devices=auto`` counts the GPUs of this machine."""
    return processes_of_node(t) * t.num_nodes


def processes_of_node(t: TrainerConfig) -> int:
    """Of a run, on each node."""
    if t.devices != "auto":
        return int(t.devices)
    return max(1, torch.cuda.device_count() if t.accelerator != "cpu" else 1)


def slices(t: TrainerConfig) -> int:
    """How many processes share one copy of the weights with ``strategy=fsdp``."""
    return _group_size(t.shard_group, num_processes(t), processes_of_node(t))


def _group_size(group: int | str | None, processes: int, of_node: int) -> int:
    return {None: processes, "node": of_node}.get(group, group)


def check_sharding(decoder: VideoDecoder, processes: int, group: int | str | None) -> None:
    """Refuse what cannot be sharded, before any process is started.

    Raises ConfigError: the decoder says why not; or ``group`` does not divide the number of ``processes``.
    """
    if isinstance(group, int) and processes % group:
        raise ConfigError(
            f"trainer.shard_group={group} must divide the number of processes, {processes}: take node (each node has one copy), "
            "or null (there is one)"
        )
    try:
        decoder.shard_units()
    except ValueError as error:
        raise ConfigError(f"trainer.strategy=fsdp: {error}") from None


def compile_network(decoder: VideoDecoder, sharded: bool) -> None:
    """torch.compile on the network; where weights are sharded, on every block that is gathered by itself.

    Raises ConfigError: there are no such blocks.
    """
    parts = decoder.shard_units() if sharded else [decoder.model]
    if not parts:
        raise ConfigError(
            "trainer.compile=true with trainer.strategy=fsdp compiles what is gathered by itself, and this decoder is gathered as a "
            "whole: leave one of the two out"
        )
    for part in parts:
        part.compile()


class Sharded(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy for data-parallel shards alone, on GPUs or, for tests, on CPU processes.

    It differs in this: the module is restored before training begins, as under DDP, so all hooks come in one order; and
    checkpoints are written and read by the trainer's own checkpoint plugin (atomic, no pickled code).

    Args:
        group: number of neighbouring processes that share one copy of the weights, while other groups have copies; "node":
            those of a node; None: all.
    """

    def __init__(self, group: int | str | None = None) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self.group = group
        self.shards: Any = None  # the mesh that weights are sharded over

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # configure_model has sharded the module before

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        if self.shards is None:
            world, kind = self.world_size, self.root_device.type
            size = _group_size(self.group, world, self.num_processes)
            if size == world:
                self.shards = init_device_mesh(kind, (world,), mesh_dim_names=("shards",))
            else:
                self.shards = init_device_mesh(kind, (world // size, size), mesh_dim_names=("copies", "shards"))
        self.lightning_module._device_mesh = self.shards

    # ---- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on rank 0, nothing elsewhere; all ranks must call."""
        return gathered(self.lightning_module.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        saved, own = checkpoint["state_dict"], self.lightning_module.state_dict()
        if odd := sorted(saved.keys() ^ own.keys()):
            raise ValueError(f"the checkpoint does not fit this model: {len(odd)} names differ, first {odd[0]}")
        for name, target in own.items():
            if saved[name].shape != target.shape:
                raise ValueError(
                    f"the checkpoint does not fit this model: {name} is {tuple(saved[name].shape)} there and "
                    f"{tuple(target.shape)} here"
                )
            target.copy_(slice_like(saved[name], target))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As the optimiser's own, with whole tensors on rank 0; empty elsewhere. All ranks must call."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning's wrapper
        state = optimizer.state_dict()
        flat = {f"{number} {key}": value for number, one in state["state"].items() for key, value in one.items()}
        found = gathered(flat)
        if self.global_rank:
            return {}
        whole: dict[int, dict[str, Tensor]] = {number: {} for number in state["state"]}
        for place, value in found.items():
            number, key = place.split()
            whole[int(number)][key] = value
        return {"state": whole, "param_groups": state["param_groups"]}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {key: _placed(value, parameters[number]) for key, value in one.items()}
                for number, one in saved["state"].items()
            }
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    """A moment is sharded as its parameter is; a count of steps is one number on every process."""
    return slice_like(value, parameter) if value.shape == parameter.shape else value
