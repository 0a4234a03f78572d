"""Students with depthwise convolutions that do not concatenate the past, by Triton on CUDA.

For inference :func:`with_depthwise_kernels` makes a copy, to which the backbones' own optimisations apply
(``decoders/backbones/fast.py``); for training :func:`use_depthwise_kernels` changes a student in place, on CUDA.
"""

import copy

import torch
from torch import nn

from decoders.backbones.ltx_layers import EdgeConv3d
from decoders.layers.causal_conv import CausalConv3d, Past, remember
from decoders.layers.depthwise_triton import Kernel, causal_depthwise3d


class DepthwiseCausal3d(CausalConv3d):
    """A depthwise :class:`CausalConv3d` by :func:`causal_depthwise3d`; same parameters, same call, same past."""

    kernel: Kernel = "auto"

    def forward(self, x: torch.Tensor, past: Past = None, first: bool = False) -> tuple[torch.Tensor, Past]:
        """``x`` "b c t h w" to the same length; ``past`` holds the k - 1 input frames before it."""
        return causal_depthwise3d(x, past, self.weight, self.bias, self.kernel), _past(x, past, self.kernel_size[0] - 1)


class DepthwiseEdge3d(EdgeConv3d):
    """A causal depthwise :class:`EdgeConv3d` likewise: before a clip stands its first frame, repeated."""

    kernel: Kernel = "auto"

    def forward(self, x: torch.Tensor, past: Past = None, first: bool = False) -> tuple[torch.Tensor, Past]:
        """As above; ``past`` None means the start of a clip."""
        before = self.kernel_size[0] - 1
        if past is None and before:
            past = x[:, :, :1].expand(-1, -1, before, -1, -1)
        return causal_depthwise3d(x, past, self.weight, self.bias, self.kernel), _past(x, past, before)


def _past(x: torch.Tensor, past: Past, frames: int) -> Past:
    """The last ``frames`` of ``past`` (None: zeros) and ``x``."""
    if not frames:
        return None
    if x.shape[2] >= frames:
        return remember(x, frames)
    missing = frames - x.shape[2]
    if past is None:
        return torch.cat([torch.zeros_like(x[:, :, :1]).expand(-1, -1, missing, -1, -1), x], 2)
    return torch.cat([past[:, :, -missing:], x], 2)


def use_depthwise_kernels(student: nn.Module, kernel: Kernel = "auto") -> int:
    """Let every depthwise convolution that looks only back compute itself by :func:`causal_depthwise3d`. In place: parameters
    and their names stay. How many there were; 0 for a student without, or of convolutions that look ahead."""
    found = 0
    for module in student.modules():
        if not isinstance(module, nn.Conv3d) or module.groups == 1 or module.groups != module.in_channels:
            continue
        if type(module) is CausalConv3d:
            module.__class__ = DepthwiseCausal3d
        elif type(module) is EdgeConv3d and module.causal:
            module.__class__ = DepthwiseEdge3d
        if isinstance(module, DepthwiseCausal3d | DepthwiseEdge3d):
            module.kernel = kernel
            found += 1
    return found


def with_depthwise_kernels(student: nn.Module, kernel: Kernel = "auto") -> nn.Module:
    """A copy of a student that :func:`use_depthwise_kernels` was used on. Parameters are the student's own."""
    parameters = {id(part): part for part in [*student.parameters(), *student.buffers()]}
    other = copy.deepcopy(student, parameters)
    use_depthwise_kernels(other, kernel)
    return other


def for_inference(student: nn.Module) -> nn.Module:
    """What a student is optimised from: with kernels on CUDA; itself elsewhere, where torch's convolution is as good."""
    return with_depthwise_kernels(student) if next(student.parameters()).is_cuda else student
