"""LTX's causal encoder on a few frames at a time, equal to the whole clip.

diffusers runs this encoder over all frames at once, so its memory grows with the clip. Every layer of it is either
local in time or a causal convolution, which pads its start by repeating the first frame. It is enough, then, that each
convolution keeps the input frames that its next window still needs, and that padding happens once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn


def encode_in_chunks(
    encoder: nn.Module, video: Float[Tensor, "b 3 t h w"], chunk_frames: int
) -> Float[Tensor, "b moments n y x"]:
    """``encoder(video)`` of an ``LTXVideoEncoder3d``: the first frame, then ``chunk_frames`` at a time.

    ``chunk_frames`` is a multiple of the temporal stride; activations are those of so many frames.
    """
    frames = video.shape[2]
    sizes = [1] + [min(chunk_frames, frames - start) for start in range(1, frames, chunk_frames)]
    with _keeping_past(encoder):
        return torch.cat([encoder(chunk) for chunk in video.split(sizes, dim=2)], dim=2)


@contextmanager
def _keeping_past(encoder: nn.Module) -> Iterator[None]:
    """Within the context the encoder's calls continue one another. Not for two threads at once."""
    from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoCausalConv3d, LTXVideoDownsampler3d

    past: dict[nn.Module, Tensor] = {}
    replaced = []
    for module in encoder.modules():
        step = {LTXVideoCausalConv3d: _conv_step, LTXVideoDownsampler3d: _downsampler_step}.get(type(module))
        if step:
            # On the instance, where nn.Module looks first; deleting it brings back the class's own.
            module.forward = partial(step, module, past)
            replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def _conv_step(module: nn.Module, past: dict[nn.Module, Tensor], x: Tensor) -> Tensor:
    """A causal convolution, also one with a stride in time: what its next window starts with is kept."""
    kernel, stride = module.kernel_size[0], module.conv.stride[0]
    before = past.get(module)
    if before is None:
        before = x[:, :, :1].expand(-1, -1, kernel - 1, -1, -1)
    x = torch.cat([before, x], dim=2)
    windows = (x.shape[2] - kernel) // stride + 1
    past[module] = x[:, :, windows * stride :].clone()
    return module.conv(x)


def _downsampler_step(module: nn.Module, past: dict[nn.Module, Tensor], x: Tensor) -> Tensor:
    """Pixels and frames to channels, plus the mean over groups of channels of the same without the convolution."""
    if module.conv not in past:  # the first frames are repeated to fill a group of frames, once
        x = torch.cat([x[:, :, : module.stride[0] - 1], x], dim=2)
    fold = partial(
        rearrange,
        pattern="b c (t p) (h q) (w r) -> b (c p q r) t h w",
        p=module.stride[0],
        q=module.stride[1],
        r=module.stride[2],
    )
    residual = reduce(fold(x), "b (c g) t h w -> b c t h w", "mean", g=module.group_size)
    return fold(module.conv(x)) + residual
