"""REGEN's optimised form: ``RegenDecoder.optimised``, or ``decoders.inference.optimise(model)``.

The function is the model's, its noise included. What differs:

- Latents and times are made into a condition once per pair, for every step of the sampler; positions that no latent changes
  (``conditioning=in_context``) once per size, for all streams.
- What a noise level adds to the tokens, and the factors by which a step mixes the noisy frames with what the network says, are
  numbers of the *sampler*, not of the clip: made once per number of steps. A step is then embed, blocks, last layer and one
  weighted sum. With one step from level 1 and ``skip`` the noise cancels out of that sum, and it is left out.
- Noisy frames stay patches from the first step to the last; pixels are put in order once, as uint8 if asked.
- Pairs that do not wait for one another are decoded in one batch, of up to ``TOKENS`` tokens.
- On CUDA all of that is one graph for each shape and number of steps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from decoders.inference import InferenceOptions
from decoders.layers import products
from decoders.layers.cuda_graphs import GraphedCall
from decoders.layers.deployed import check_latent, compiled, inference, shared_copy, to_uint8
from decoders.regen.conditioning import fold_frames
from decoders.regen.fast_dit import block, embed, last
from decoders.regen.model import RegenDecoder, RegenStream
from decoders.regen.sampler import coefficients_of, skip_factors
from decoders.regen.windows import Window, latents_of

TOKENS = (
    32_768  # in one pass: a pair of 480 x 832 at k = 4 has 31,200; more do not fill a device better, and cost memory
)
KEPT = 8  # numbers of steps, and sets of positions, that are kept


class Step(NamedTuple):
    """One step of a sampler; nothing in it is of a clip."""

    level: Tensor  # added to every token, "1 1 D"
    shared: Tensor | None  # modulation for all blocks, "1 6 D"
    of_noisy: float  # what goes on is ``of_noisy * noisy + of_network * network``
    of_network: float


class FastRegenDecoder(RegenDecoder):
    """A ``RegenDecoder`` for inference alone, over the model's own numbers in memory.

    ``decode`` and the stream methods are the model's, with the same seeds for the same frames. A stream's guide (latent
    extension) is kept as patches.

    Raises:
        ValueError: an option that REGEN has no use for.
    """

    def __init__(self, model: RegenDecoder, options: InferenceOptions) -> None:
        check_options(options)
        with torch.device("meta"):
            super().__init__(model.config, model.channels, model.stride_t, model.stride_hw, model.chunked)
        self.latent_mean, self.latent_std = model.latent_mean.detach(), model.latent_std.detach()
        self.condition, self.dit = shared_copy(model.condition), shared_copy(model.dit)
        if self.config.conditioning == "embedding":  # they compute in float32, and would convert themselves every time
            for part in (self.condition.siren, self.condition.first):
                if part is not None:
                    part.float()
        self.requires_grad_(False).eval()
        products.prefer(self.dit.blocks)
        self.options = options
        functions: list[Callable[..., Any]] = [self._conditioned, embed, block, last, self._pixels]
        if options.compile:
            functions = [compiled(function) for function in functions]
        self._parts = functions
        self._samplers: dict[Any, GraphedCall] = {}
        self._steps: OrderedDict[int, tuple[Step, ...]] = OrderedDict()
        self._times: OrderedDict[Any, tuple[Tensor, ...]] = OrderedDict()

    # ---- what is made once

    def sampler_steps(self, steps: int) -> tuple[Step, ...]:
        """All steps from noise to the clean frames."""
        return _kept(self._steps, steps, lambda: tuple(self._make_steps(steps)))

    def _make_steps(self, steps: int) -> Iterator[Step]:
        levels = torch.linspace(1, 0, steps + 1)
        for index, (level, following) in enumerate(pairwise(levels.unbind())):
            token = self.dit.level(level.to(self.latent_mean.device).view(1)).to(self.dit.embed.weight.dtype)
            shared = None
            if self.dit.shared is not None:
                shared = self.dit.shared(F.silu(token)).unflatten(-1, (6, -1)).to(token.dtype)
            goes_to = None if index == steps - 1 else following.double()
            yield Step(token.unsqueeze(1), shared, *mixing(self.config, level.double(), goes_to))

    def _moments(self, times: tuple[tuple[float, ...], ...], grid: tuple[int, int], images: bool) -> tuple[Tensor, ...]:
        """The times "b t"; with ``in_context`` also positions of the video's tokens and of those beside them."""

        def make() -> tuple[Tensor, ...]:
            moments = torch.tensor(times, device=self.latent_mean.device, dtype=torch.float32)
            if self.config.conditioning == "embedding":
                return (moments,)
            ends = moments.new_tensor([[0.0, 1.0]])[:, : 1 if images else 2]
            groups = fold_frames(moments, self.config.patch_t).mean(-1)
            return (moments, *(self.condition._positions(part, *grid) for part in (groups, ends)))

        return _kept(self._times, (times, grid, images), make)

    def _conditioned(self, latent: Tensor, times: Tensor, *positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network is told of the latents: added to its tokens, and tokens beside them."""
        if not positions:
            return tuple(self._condition(latent, times))
        shape = (-1, 1, 1, 1)
        latent = latent.float() * self.latent_std.float().view(shape) + self.latent_mean.float().view(shape)
        frames = latent.flatten(3).permute(2, 0, 3, 1).to(self.condition.content.weight.dtype)
        layers = (self.condition.content, self.condition.motion)[: len(frames)]
        beside = torch.cat([layer(frame) for layer, frame in zip(layers, frames.unbind(0), strict=True)], 1)
        return positions[0], beside + positions[1]

    # ---- one batch of pairs

    def _sample(
        self, noise: Tensor, latent: Tensor, *more: Tensor, plan: tuple[Step, ...], guided: bool, keep: bool
    ) -> tuple[Tensor, ...]:
        """Frames from noise, and with ``keep`` what the last of them was before every step, as patches "b yx fpqc".

        ``more``: times and positions, then with ``guided`` a frame's patches before every step.
        """
        condition, start, blocks, finish, pixels = self._parts
        guide = more[-len(plan) :] if guided else ()
        added, beside = condition(latent, *more[: len(more) - len(guide)])
        f, p, missing = self.config.patch_t, self.config.patch, -noise.shape[2] % self.config.patch_t
        folded = fold_frames(noise.transpose(1, 2), f)
        x = rearrange(folded, "b g f c (y p) (x q) -> b (g y x) (f p q c)", p=p, q=p)
        by_frame = (len(x), folded.shape[1], -1, f, 3 * p * p)
        dit, kept = self.dit, []
        for index, step in enumerate(plan):
            view = x.view(by_frame)
            if guided:
                view[:, 0, :, : missing + 1] = guide[index].unsqueeze(2)
            elif missing and index:
                view[:, 0, :, 0] = view[:, 0, :, 1]  # the frame that makes the first group full is its copy
            if keep:
                kept.append(view[:, -1, :, -1].clone())
            tokens = start(x, dit.embed.weight, dit.embed.bias, added, beside, step.level)
            shared = None if step.shared is None else step.shared.expand(len(x), -1, -1)
            for weights in dit.blocks:
                tokens = blocks(tokens, weights, shared)
            of_final = (dit.final.weight, dit.final.bias, dit.final_modulation, shared)
            x = finish(tokens, x, *of_final, step.of_noisy, step.of_network)
        size = (folded.shape[1], latent.shape[-2], latent.shape[-1], missing)
        return (pixels(x, *size), *kept)

    def _pixels(self, x: Tensor, groups: int, rows: int, columns: int, missing: int) -> Tensor:
        """Patches to clamped frames "b 3 t h w", or "b t h w 3" in uint8."""
        f, p = self.config.patch_t, self.config.patch
        x = x.view(len(x), groups, rows, columns, f, p, p, 3)
        if self.options.uint8:
            x = to_uint8(x).permute(0, 1, 4, 2, 5, 3, 6, 7)
            return x.reshape(len(x), groups * f, rows * p, columns * p, 3)[:, missing:]
        x = x.clamp(-1, 1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(len(x), 3, groups * f, rows * p, columns * p)[:, :, missing:]

    def _run(
        self,
        noise: Tensor,
        latent: Tensor,
        times: tuple[tuple[float, ...], ...],
        steps: int,
        guide: list[Tensor] | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Frames "b 3 t h w" of a batch of pairs or images, a view of what lies in memory, and the guide for what follows."""
        moments = self._moments(times, tuple(latent.shape[-2:]), latent.shape[2] == 1)
        function = partial(self._sample, plan=self.sampler_steps(steps), guided=guide is not None, keep=keep)
        if latent.is_cuda and self.options.graphs:  # a graph keeps the plan whose numbers it was recorded with
            function = self._samplers.setdefault((steps, guide is not None, keep), GraphedCall(function))
        frames, *kept = function(noise, latent, *moments, *(guide or ()))
        return frames.permute(0, 4, 1, 2, 3) if self.options.uint8 else frames, kept

    def _noise(self, latent: Tensor, frames: int, generators: list[torch.Generator]) -> Tensor:
        shape = (3, frames, *(side * self.stride_hw for side in latent.shape[-2:]))
        return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators]).to(latent.device)

    def _decode(
        self,
        latent: Tensor,
        times: tuple[float, ...],
        steps: int,
        generators: list[torch.Generator],
        guide: list[Tensor] | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        before = int(guide is not None and times[0] < 0)
        noise = self._noise(latent, len(times) - before, generators)
        if before:  # its numbers are the guide's
            noise = F.pad(noise, (0, 0, 0, 0, 1, 0))
        return self._run(noise, latent, (times,) * len(latent), steps, guide, keep)

    # ---- whole clips

    def _decode_windows(
        self,
        latent: Tensor,
        windows: list[Window],
        t: int,
        steps: int,
        generators: list[torch.Generator],
        extension: bool,
    ) -> Tensor:
        b, rows, columns = len(latent), *latent.shape[-2:]
        size = (t, rows * self.stride_hw, columns * self.stride_hw)
        if self.options.uint8:
            video = latent.new_empty(b, *size, 3, dtype=torch.uint8).permute(0, 4, 1, 2, 3)
        else:
            video = latent.new_empty(b, 3, *size, dtype=torch.float32)
        guide = None
        if extension:
            for window in windows:
                pair = latent[:, :, latents_of(window.pair, self.chunked)]
                frames, guide = self._window(pair, window, steps, generators, guide, extension)
                _place(video, window, frames)
            return video
        for group in _batches(windows, max(1, TOKENS // (b * rows * columns))):
            pairs = [latent[:, :, latents_of(window.pair, self.chunked)] for window in group]
            noise = [
                self._noise(pair, len(window.times), generators) for pair, window in zip(pairs, group, strict=True)
            ]
            times = tuple(window.times for window in group) * b
            frames, _ = self._run(
                torch.stack(noise, 1).flatten(0, 1), torch.stack(pairs, 1).flatten(0, 1), times, steps
            )
            for number, window in enumerate(group):
                _place(video, window, frames[number :: len(group)][:, :, list(window.frames)])
        return video

    @inference
    def decode(
        self, latent: Float[Tensor, "b c n y x"], **sampling: Any
    ) -> Float[Tensor, "b 3 t h w"] | UInt8[Tensor, "b t h w 3"]:
        """As :meth:`RegenDecoder.decode`; uint8 frames where the options say so."""
        check_latent(latent, self.channels)
        return self._out(super().decode(latent, **sampling))

    # ---- streams

    @inference
    def step_stream(
        self, latent_frame: Float[Tensor, "b c y x"], state: RegenStream
    ) -> Float[Tensor, "b 3 k h w"] | UInt8[Tensor, "b k h w 3"]:
        """As :meth:`RegenDecoder.step_stream`; uint8 frames where the options say so."""
        return self._out(super().step_stream(latent_frame, state))

    @inference
    def end_stream(self, state: RegenStream) -> Float[Tensor, "b 3 k h w"] | UInt8[Tensor, "b k h w 3"]:
        """As :meth:`RegenDecoder.end_stream`; uint8 frames where the options say so."""
        return self._out(super().end_stream(state))

    def _nothing(self, state: RegenStream) -> Tensor:
        dtype = torch.uint8 if self.options.uint8 else self.latent_mean.dtype
        return self.latent_mean.new_zeros(state.batch_size, 3, 0, state.height, state.width, dtype=dtype)

    def _out(self, frames: Tensor) -> Tensor:
        """As they are handed out: in uint8 with the channels last, as they lie in memory."""
        return frames.permute(0, 2, 3, 4, 1) if self.options.uint8 else frames


def check_options(options: InferenceOptions) -> None:
    """Raise ValueError for what cannot be done here."""
    if options.bits8 != "none":
        raise ValueError(f"bits8={options.bits8}: REGEN has no 8-bit products; set none")
    if options.attention != "auto":
        raise ValueError(f"attention={options.attention}: REGEN's attention has no kernels to choose from; set auto")
    if options.fast_convolutions:
        raise ValueError("fast_convolutions=true: REGEN's decoder has no convolutions; set false")


def mixing(config: Any, level: Tensor, following: Tensor | None) -> tuple[float, float]:
    """Factors of the noisy frames and of the network's answer in what the sampler goes on with: the noisy frames at the
    ``following`` level, or the clean ones (None). See ``sampler.split`` and ``sampler.skip_factors``."""
    coefficients = coefficients_of(config.prediction)
    a, b = (part.item() for part in coefficients(level))
    noisy, network = 0.0, 1.0  # of the prediction
    if config.skip:
        noisy, network = (part.item() for part in skip_factors(level, config.prediction, config.spread))
    clean, residue = (1 - b * noisy, -b * network), (noisy, network)
    if config.prediction == "velocity":
        residue = (1 + a * noisy, a * network)
    else:
        clean = (clean[0] / a, clean[1] / a)
    if following is None:
        return clean
    a, b = (part.item() for part in coefficients(following))
    return a * clean[0] + b * residue[0], a * clean[1] + b * residue[1]


def _batches(windows: list[Window], tokens_each: int) -> Iterator[list[Window]]:
    """Neighbouring windows with as many frames, as many together as ``tokens_each`` frames allow, one at least."""
    group: list[Window] = []
    for window in windows:
        frames = len(window.times)
        if group and (len(group[0].times) != frames or (len(group) + 1) * frames > tokens_each):
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def _place(video: Tensor, window: Window, frames: Tensor) -> None:
    first, outputs = window.outputs[0], window.outputs
    if outputs == tuple(range(first, first + len(outputs))):
        video[:, :, first : first + len(outputs)] = frames
    else:
        video[:, :, list(outputs)] = frames


def _kept(held: OrderedDict, key: Any, make: Callable[[], Any]) -> Any:
    if key not in held:
        held[key] = make()
        if len(held) > KEPT:
            held.popitem(last=False)
    held.move_to_end(key)
    return held[key]
