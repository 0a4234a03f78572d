"""CUDA graphs: a fixed sequence of kernels on tensors at fixed addresses, replayed without the host's work for each launch."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # libraries choose kernels, Triton and inductor compile; none of that may happen during capture


@dataclass
class Captured:
    """A captured graph and the tensors that each replay writes."""

    graph: torch.cuda.CUDAGraph
    output: Tensor | tuple[Tensor, ...]

    def replay(self) -> Tensor | tuple[Tensor, ...]:
        """Run the graph on what its tensors hold now. The output is overwritten by the next replay: clone what must last."""
        self.graph.replay()
        return self.output


def capture(function: Callable[[], Tensor | tuple[Tensor, ...]], device: torch.device, pool=None) -> Captured:
    """Capture ``function``, which takes nothing and reads and writes tensors that stay where they are.

    It runs ``WARM_UP_CALLS`` times before the capture, so what it changes in place must be set (again) afterwards.  Graphs that
    never run at the same time, and whose outputs are cloned before the next one runs, may share a ``pool`` of memory
    (``torch.cuda.graph_pool_handle()``).
    """
    with torch.cuda.device(device):
        beside = torch.cuda.Stream(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP_CALLS):
                function()
        torch.cuda.current_stream(device).wait_stream(beside)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = function()
    return Captured(graph, output)


class GraphedCall:
    """A function of CUDA tensors that is captured once per set of shapes and dtypes, and replayed from then on.

    The function has no other inputs that change, no random numbers and no data-dependent control flow.  Inputs are copied
    into buffers of the graph, outputs are cloned.  ``size`` graphs are kept, the least recently used goes first.
    """

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]], size: int = 4) -> None:
        self.function = function
        self.size = size
        self._kept: OrderedDict[tuple, tuple[list[Tensor], Captured]] = OrderedDict()

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        key = tuple((x.shape, x.dtype, x.device) for x in inputs)
        if key not in self._kept:
            buffers = [x.detach().clone(memory_format=torch.contiguous_format) for x in inputs]
            captured = capture(lambda: self.function(*buffers), buffers[0].device)
            self._kept[key] = (buffers, captured)
            if len(self._kept) > self.size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        buffers, captured = self._kept[key]
        for buffer, x in zip(buffers, inputs, strict=True):
            buffer.copy_(x)
        output = captured.replay()
        return output.clone() if isinstance(output, Tensor) else tuple(part.clone() for part in output)
