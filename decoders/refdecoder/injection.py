"""How the reference reaches the video at the points of a layout: joint attention, or a ControlNet's residuals.

Both are modules with ``begin(reference, carry)`` -> memory and ``step(number, video, memory)`` -> (video, memory), where
what the references give does not depend on the video; attention over the whole clip, where it does, is called as a module
instead, point by point. ``carry(number, reference)`` takes references through the backbone's own stages from one point to
the next.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from decoders.backbones.staged import StagedDecoder
from decoders.backbones.wan_layers import Upsample
from decoders.refdecoder.layouts import Layout
from decoders.refdecoder.reference import fold_frames, unfold_frames
from decoders.refdecoder.transformer import Block, Gate, rope_table

Carry = Callable[[int, Tensor], Tensor]
Memory = Any  # what ``begin`` gave and ``step`` gave back: tuples of tensors, never changed in place


class JointAttention(nn.Module):
    """Tokens of references and video in one sequence, joined along time, each seeing all (section 2(b)).

    Args:
        split: dimensions of a head that turn with time, height and width.
        shared: one set of blocks for all points, or a set for each.
        skip_video, skip_reference: whether what comes out is added to what went in, or takes its place.
    """

    streams = False
    checkpointing = False

    def __init__(
        self,
        layout: Layout,
        blocks: int,
        heads: int,
        head_dim: int,
        ffn: int,
        split: tuple[int, int, int],
        shared: bool,
        skip_video: bool,
        skip_reference: bool,
        zero_init: bool,
    ) -> None:
        super().__init__()
        self.split, self.skip_video, self.skip_reference = split, skip_video, skip_reference
        self.gates = nn.ModuleList(
            Gate(point, heads * head_dim, layout.point_norms, zero_init) for point in layout.points
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(heads, head_dim, ffn) for _ in range(blocks))
            for _ in range(1 if shared else len(layout.points))
        )

    def forward(
        self, number: int, video: Float[Tensor, "b c t y x"], reference: Float[Tensor, "b c r y x"] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Video and references after point ``number``; None for references that nobody needs any more.

        Reference j stands at time -j, the video's frames at 1, 2, ...: with one reference the released numbering.
        """
        gate = self.gates[number]
        tokens, frames = self._run(gate.video_tokens, video), video.shape[2]
        times = tuple(range(1, frames + 1))
        if reference is not None:
            tokens = torch.cat([self._run(gate.reference_tokens, reference), tokens], dim=1)
            times = (*reference_times(reference), *times)
        shape = tokens.shape[1:4]
        table = rope_table(times, *shape[1:], self.split, tokens.device)
        tokens = tokens.flatten(1, 3)
        for block in self.blocks_at(number):
            tokens, _ = self._run(block, tokens, table, table)
        tokens = tokens.unflatten(1, shape)
        video = self.leave(number, tokens[:, -frames:], video)
        if reference is None or number + 1 == len(self.gates):
            return video, None
        return video, self.leave_reference(number, tokens[:, :-frames], reference)

    def blocks_at(self, number: int) -> nn.ModuleList:
        """The blocks of point ``number``."""
        return self.blocks[number if len(self.blocks) > 1 else 0]

    def leave(self, number: int, tokens: Float[Tensor, "b t Y X D"], video: Float[Tensor, "b c t y x"]) -> Tensor:
        """The video after a point, from its tokens and what it was before."""
        features = self._run(self.gates[number].features, tokens, *video.shape[-2:])
        return video + features.to(video.dtype) if self.skip_video else features

    def leave_reference(self, number: int, tokens: Tensor, reference: Float[Tensor, "b c r y x"]) -> Tensor:
        """The same for references."""
        features = self._run(self.gates[number].features, tokens, *reference.shape[-2:])
        return reference + features.to(reference.dtype) if self.skip_reference else features

    def _run(self, function: Callable, *inputs: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)


def reference_times(reference: Tensor) -> tuple[int, ...]:
    """Times of references "b c r y x": 0, -1, -2, ..."""
    return tuple(range(0, -reference.shape[2], -1))


class ControlBranch(nn.Module):
    """ControlNet's way (App. K; its code was not released, so this is a reading): features of the reference, from a
    trainable copy of the decoder's own stages, are added at the same pixels of every frame.

    The copy's outputs pass 1x1 convolutions that begin at zero. Several references add their mean.
    """

    streams = True

    def __init__(self, layout: Layout, backbone: StagedDecoder) -> None:
        super().__init__()
        points = [point.before for point in layout.points]
        order = list(backbone.stages)
        self.parts = [list(layout.branch)]  # stages of the copy that run before each point
        for before, after in zip(points[:-1], points[1:], strict=True):
            self.parts.append(order[order.index(before) : order.index(after)])
        stages = {name: deepcopy(backbone.stages[name]) for part in self.parts for name in part}
        for module in (module for stage in stages.values() for module in stage.modules()):
            if isinstance(module, Upsample):
                module.time_conv = None  # a single frame never passes it
        self.stages = nn.ModuleDict(stages)
        self.outputs = nn.ModuleList(nn.Conv2d(point.channels, point.channels, 1) for point in layout.points)
        for output in self.outputs:
            nn.init.zeros_(output.weight)
            nn.init.zeros_(output.bias)

    def copy_from(self, backbone: StagedDecoder) -> None:
        """Take the stages' weights from ``backbone``: the branch begins as a copy of the pretrained decoder."""
        for name, stage in self.stages.items():
            theirs = backbone.stages[name].state_dict()
            stage.load_state_dict({key: theirs[key] for key in stage.state_dict()})

    def begin(self, reference: Float[Tensor, "b c r y x"] | None, carry: Carry) -> Memory:
        """What to add at each point, "b c 1 y x", or None without references."""
        if reference is None:
            return None
        added = []
        for part, output in zip(self.parts, self.outputs, strict=True):
            frames = fold_frames(reference)
            for name in part:
                frames = frames.contiguous(memory_format=torch.channels_last_3d)
                frames, _ = self.stages[name](frames, None, True)
            reference = unfold_frames(frames, len(reference))
            added.append(output(reference.mean(2)).unsqueeze(2))
        return tuple(added)

    def step(self, number: int, video: Float[Tensor, "b c t y x"], memory: Memory) -> tuple[Tensor, Memory]:
        """The video after point ``number``."""
        return (video if memory is None else video + memory[number].to(video.dtype)), memory
