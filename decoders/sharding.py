"""Weights that are spread over processes (FSDP2, ``trainer.strategy=fsdp``), and how all other code reads and writes them.

A sharded parameter is a DTensor: every process holds one slice of it, of its gradient, of Adam's moments and of its average.
The functions here take plain tensors and modules too, of which they change nothing, so that no caller asks what it has.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(roots: Sequence[nn.Module], units: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Spread the parameters of ``roots`` over the processes of ``mesh``; with a mesh of two axes the first has copies.

    A unit, a module inside of a root, is gathered when it is called, freed after it, and gathered again for its backward pass.
    What is left of a root is gathered when the root is called and stays until its backward pass is over. Parameters stay in
    the dtype that they have: autocast does the rest, as with DDP. (FSDP's own mixed precision would send half the bytes, but
    also hand norms and the residual stream's dtype to bfloat16, which makes another network.)
    """
    # Outputs of convolutions are often views; nothing here changes the output of a unit in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for root in roots:
        fully_shard(root, mesh=mesh, reshard_after_forward=False)


def is_sharded(module: nn.Module) -> bool:
    """Whether weights of ``module`` are spread over processes."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """All weights of ``module`` whole on every process, for as long as this is open and nothing is trained.

    Inside, no call waits for other processes: each may decode as many clips as it has, by any method. All processes must
    enter and leave together. Weights that are changed inside are lost.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    roots = {part for part in module.children() if isinstance(part, FSDPModule)}
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part not in roots, recurse=False)
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, on its device. All processes must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` whole, for a file; as they are where none is sharded, else copies in the first process's memory and
    nothing in the others'.

    All processes must call this together. It goes tensor by tensor: besides the copies, no process has more than one whole.
    """
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return dict(tensors)
    found = {}
    for name, tensor in tensors.items():
        complete = whole(tensor)
        if torch.distributed.get_rank() == 0:
            found[name] = complete.to("cpu", copy=True)
    return found


def slice_like(value: Tensor, like: Tensor) -> Tensor:
    """``value``, whole and the same on all processes, as ``like`` is: this process's slice where that is sharded. Nothing
    is sent."""
    if not isinstance(like, DTensor):
        return value
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
