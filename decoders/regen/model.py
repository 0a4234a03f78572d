"""REGEN's decoder: latents and noise in, pixel frames out (section 3.2 of arXiv 2503.08665).

    pair of latent frames, times -> C_e -----------------+
    noisy frames -> patches -> linear -> + noise level -> + -> Transformer -> linear -> velocity of every pixel

One step from noise is a feed-forward decoder; more steps add detail. What the paper leaves open, and what we chose, is
listed in README.md beside this file.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from decoders.backbones.staged import check_frame
from decoders.inference import InferenceOptions
from decoders.regen.conditioning import Condition, ContentAware, InContext, fold_frames
from decoders.regen.config import RegenConfig, SirenConfig
from decoders.regen.dit import DiT
from decoders.regen.sampler import Coefficients, coefficients_of, sample, skip_factors
from decoders.regen.windows import Window, asked, latents_of, num_frames, num_pairs, whole_pair

__all__ = ["RegenConfig", "RegenDecoder", "RegenStream", "SirenConfig"]

Generators = torch.Generator | list[torch.Generator] | None
Guide = list[Tensor]  # one frame "b 3 1 h w" before every step of the sampler


@dataclass
class RegenStream:
    """Everything that a stream remembers. The caller owns it; its size does not grow."""

    batch_size: int
    height: int  # pixels, of the frames that come out
    width: int
    steps: int
    extension: bool
    generators: list[torch.Generator]
    pending: Tensor | None = None  # "b c y x", a latent frame that waits for the next
    guide: Guide | None = None  # latent extension: the last frame at every step
    pairs: int = 0  # that were decoded
    ended: bool = field(default=False, repr=False)

    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in (self.pending, *(self.guide or ())) if part is not None)


class RegenDecoder(nn.Module):
    """Normalised latents "b c n y x" to RGB "b 3 t h w" in [-1, 1].

    Args:
        config: the architecture.
        channels, stride_t, stride_hw: of the latent space.
        chunked: whether latent frames come in pairs of their own, as from REGEN's encoder (t = k + 1 frames for every two
            of them); else the space is causal (t = 1 + (n - 1) k) and neighbours make a pair.

    Buffers ``latent_mean`` and ``latent_std`` "c" undo the latents' normalisation at the door; 0 and 1 until they are set.
    """

    def __init__(self, config: RegenConfig, channels: int, stride_t: int, stride_hw: int, chunked: bool) -> None:
        super().__init__()
        if config.patch != stride_hw:
            raise ValueError(
                f"decoder.patch={config.patch}, but a latent cell of this space covers {stride_hw} pixels: cells and patches "
                f"are one to one, set decoder.patch={stride_hw}"
            )
        if stride_t % config.patch_t:
            raise ValueError(f"decoder.patch_t={config.patch_t} must divide the space's stride_t={stride_t}")
        self.config, self.chunked = config, chunked
        self.channels, self.stride_t, self.stride_hw = channels, stride_t, stride_hw
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))
        if config.conditioning == "embedding":
            parts = (channels, config.width, config.patch_t, config.siren, config.first_frame)
            self.condition = ContentAware(*parts)
            nn.init.constant_(self.condition.norm.gain, config.gain)
        else:
            self.condition = InContext(channels, config.width, config.patch_t, stride_t)
        self.dit = DiT(
            numbers=3 * config.patch_t * config.patch**2,
            dim=config.width,
            blocks=config.blocks,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            qk_norm=config.qk_norm,
            modulated=config.modulation == "single",
            checkpointing=config.checkpointing,
        )

    @property
    def coefficients(self) -> Coefficients:
        """Level to (a, b) of a noisy video, a clean + b noise, that this decoder is trained on."""
        return coefficients_of(self.config.prediction)

    def optimised(self, options: InferenceOptions, calibration: Sequence[Tensor] = ()) -> "RegenDecoder":
        """The same decoder for inference: see ``decoders/regen/fast.py`` and ``decoders/inference.py``."""
        from decoders.regen.fast import FastRegenDecoder

        return FastRegenDecoder(self, options)

    # ---- one pass

    def forward(
        self,
        latent: Float[Tensor, "b c n y x"],
        noisy: Float[Tensor, "b 3 t h w"] | None = None,
        level: Float[Tensor, " b"] | None = None,
        times: Float[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b 3 t h w"]:
        """What the network predicts of a pair of latent frames (n = 2) or an image (n = 1): velocity or noise.

        Args:
            noisy: the frames at ``level``; default: noise, always the same.
            level: 0 (clean) to 1 (noise); default: 1.
            times: of each clip's frames, in chunks: i / k, any number else; default: i = 0 .. k. An image has time 0.

        A longer latent is taken pair by pair, in one batch, and only with the defaults: the whole clip's prediction.

        Raises:
            ValueError: shapes that do not go together.
        """
        self._check_latent(latent)
        if latent.shape[2] > 2:
            if not (noisy is None and level is None and times is None):
                raise ValueError(
                    f"{latent.shape[2]} latent frames: noisy, level and times belong to one pair; fold pairs into the batch "
                    "with fold_pairs"
                )
            return self.unfold_pairs(self(self.fold_pairs(latent)), len(latent))
        times = self._times(latent, times)
        b, (rows, columns) = len(latent), latent.shape[-2:]
        shape = (b, 3, times.shape[1], rows * self.stride_hw, columns * self.stride_hw)
        if noisy is None:
            noisy = torch.randn(shape, device=latent.device, generator=torch.Generator(latent.device).manual_seed(0))
        elif tuple(noisy.shape) != shape:
            raise ValueError(f"noisy is {tuple(noisy.shape)}; this latent and these times make it {shape} (b 3 t h w)")
        if level is None:
            level = latent.new_ones(b, dtype=torch.float32)
        return self._predict(noisy, level, self._condition(latent, times))

    def fold_pairs(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "bp c 2 y x"]:
        """All pairs of every clip, clip by clip, as a batch; ``n`` of 2 or more."""
        pairs = num_pairs(latent.shape[2], self.chunked)
        if not pairs:
            raise ValueError("one latent frame is an image: it has no pair")
        parts = [latent[:, :, latents_of(pair, self.chunked)] for pair in range(pairs)]
        return torch.stack(parts, 1).flatten(0, 1)

    def fold_frames(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "bp 3 k h w"]:
        """The frames of every pair, k + 1 each, in the order of :meth:`fold_pairs`. In a causal space neighbours share one."""
        k, t = self.stride_t, video.shape[2]
        step = k + self.chunked
        if t < k + 1 or (t - (k + 1)) % step:
            raise ValueError(f"{t} frames are no whole number of pairs of {k + 1}, each {step} after the one before")
        parts = [video[:, :, start : start + k + 1] for start in range(0, t - k, step)]
        return torch.stack(parts, 1).flatten(0, 1)

    def unfold_pairs(self, frames: Float[Tensor, "bp 3 k h w"], batch_size: int) -> Float[Tensor, "b 3 t h w"]:
        """The inverse of :meth:`fold_frames`; a frame that two pairs share is the first one's."""
        parts = frames.unflatten(0, (batch_size, -1))
        if not self.chunked:
            first, later = parts[:, 0], parts[:, 1:, :, 1:]
            return torch.cat([first, later.transpose(1, 2).flatten(2, 3)], 2)
        return parts.transpose(1, 2).flatten(2, 3)

    def _times(self, latent: Tensor, times: Tensor | None) -> Float[Tensor, "b t"]:
        image = latent.shape[2] == 1
        if times is None:
            frames = torch.arange(1 if image else self.stride_t + 1, device=latent.device, dtype=torch.float32)
            return (frames / self.stride_t).expand(len(latent), -1)
        if times.ndim != 2 or len(times) != len(latent) or not times.shape[1]:
            raise ValueError(f"times are {tuple(times.shape)}; expected ({len(latent)}, t), one row per clip")
        if image and (times.shape[1] != 1 or bool((times != 0).any())):
            raise ValueError("one latent frame is an image: it has no motion, so its only time is 0")
        return times.to(latent.device)

    def _condition(self, latent: Tensor, times: Tensor) -> Condition:
        shape = (-1, 1, 1, 1)
        latent = latent.float() * self.latent_std.float().view(shape) + self.latent_mean.float().view(shape)
        return self.condition(latent, times)

    def _predict(self, noisy: Tensor, level: Tensor, condition: Condition) -> Tensor:
        f, p = self.config.patch_t, self.config.patch
        folded = fold_frames(noisy.transpose(1, 2), f)  # "b g f 3 h w"
        patches = rearrange(folded, "b g f c (y p) (x q) -> b (g y x) (f p q c)", p=p, q=p)
        patches = self.dit(patches, level, *condition)
        rows = noisy.shape[-2] // p
        video = rearrange(
            patches, "b (g y x) (f p q c) -> b c (g f) (y p) (x q)", g=folded.shape[1], y=rows, f=f, p=p, q=p
        )
        video = video[:, :, video.shape[2] - noisy.shape[2] :]  # without the frame that made the first group full
        if not self.config.skip:
            return video
        factors = skip_factors(level, self.config.prediction, self.config.spread)
        of_noisy, of_mean = (factor.view(-1, 1, 1, 1, 1) for factor in factors)
        return of_noisy * noisy + of_mean * video

    # ---- whole clips

    @torch.no_grad()
    def decode(
        self,
        latent: Float[Tensor, "b c n y x"],
        *,
        times: Sequence[float | int] | Tensor | None = None,
        steps: int = 1,
        extension: bool = False,
        generator: Generators = None,
    ) -> Shaped[Tensor, "b 3 t h w"]:
        """RGB, float32, pair by pair in bounded memory.

        Clamped to [-1, 1]: a sampler's last step is a difference of noise and prediction, which no layer holds in range.

        Args:
            times: of the frames that are wanted, in frames of the clip: 0 is its first, t - 1 its last; numbers between
                them interpolate, others extrapolate. In any order. Default: every frame.
            steps: of the sampler.
            extension: let every chunk begin with the last frame of the chunk before (B.4), against seams.
            generator: of the noise. One per clip, or one from which each clip's is seeded in turn: the same seeds give the
                same video however clips are batched. Noise is drawn on the generator's device. Default: seed 0 for each.

        Raises:
            ValueError: no steps, latent frames that make no whole pairs, ``times`` that are empty or not finite, of an
                image other than 0, or together with ``extension``.
        """
        self._check_latent(latent)
        self._check_steps(steps)
        b, _, n = latent.shape[:3]
        pairs = num_pairs(n, self.chunked)
        generators = per_clip(generator, b, latent.device)
        if times is not None:
            times = self._asked(times, n, extension)
        if not pairs:
            video, _ = self._decode(latent, (0.0,), steps, generators)
            return video if times is None else video.expand(-1, -1, len(times), -1, -1).clone()
        if times is None:
            windows = [whole_pair(pair, self.stride_t, self.chunked, extension) for pair in range(pairs)]
            t = num_frames(n, self.stride_t, self.chunked)
        else:
            windows, t = asked(times, n, self.stride_t, self.chunked), len(times)
        return self._decode_windows(latent, windows, t, steps, generators, extension)

    def _decode_windows(
        self,
        latent: Tensor,
        windows: list[Window],
        t: int,
        steps: int,
        generators: list[torch.Generator],
        extension: bool,
    ) -> Tensor:
        """The ``t`` frames that ``windows`` make, one after another."""
        height, width = (side * self.stride_hw for side in latent.shape[-2:])
        video = latent.new_empty(len(latent), 3, t, height, width, dtype=torch.float32)
        guide = None
        for window in windows:
            two = latent[:, :, latents_of(window.pair, self.chunked)]
            frames, guide = self._window(two, window, steps, generators, guide, extension)
            video[:, :, list(window.outputs)] = frames
        return video

    def _check_latent(self, latent: Tensor) -> None:
        if latent.ndim != 5 or latent.shape[1] != self.channels or not latent.shape[2]:
            raise ValueError(f"latent is {tuple(latent.shape)}; this decoder reads (b, {self.channels}, n, y, x)")

    def _check_steps(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps}: at least one step leads from noise to a video")

    def _asked(self, times: Sequence[float | int] | Tensor, n: int, extension: bool) -> list[float]:
        times = [float(time) for time in times]
        if not times or not all(map(isfinite, times)):
            raise ValueError("times must be one or more finite numbers, in frames of the clip")
        if extension:
            raise ValueError("extension joins whole chunks: leave times out, or decode them without it")
        k, last = self.stride_t, num_frames(n, self.stride_t, self.chunked) - 1
        if n == 1 and any(times):
            raise ValueError("one latent frame is an image: it has no motion, so its only time is 0")
        if min(times) < -k or max(times) > last + k:
            warnings.warn(
                f"times from {min(times)} to {max(times)} go more than {k} frames outside the clip of 0 to {last}: no training "
                "goes so far",
                stacklevel=4,  # the caller of decode, which no_grad wraps
            )
        return times

    def _window(
        self,
        latent: Tensor,
        window: Window,
        steps: int,
        generators: list[torch.Generator],
        guide: Guide | None,
        extension: bool,
    ) -> tuple[Tensor, Guide]:
        """The frames of a window that are wanted, and the guide for what follows."""
        own = guide if window.guided else None
        frames, guide = self._decode(latent, window.times, steps, generators, own, keep=extension)
        if window.frames != tuple(range(frames.shape[2])):
            frames = frames[:, :, list(window.frames)]
        return frames, guide

    def _decode(
        self,
        latent: Float[Tensor, "b c n y x"],
        times: tuple[float, ...],
        steps: int,
        generators: list[torch.Generator],
        guide: Guide | None = None,
        keep: bool = False,
    ) -> tuple[Float[Tensor, "b 3 t h w"], Guide]:
        """Frames at ``times`` of one pair or image. A guided frame before time 0 takes no noise: with latent extension and
        without, the others have the same."""
        height, width = (side * self.stride_hw for side in latent.shape[-2:])
        before = int(guide is not None and times[0] < 0)
        shape = (3, len(times) - before, height, width)
        noise = torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators]).to(latent.device)
        if before:
            noise = torch.cat([guide[0], noise], 2)
        moments = torch.tensor(times, device=latent.device, dtype=torch.float32).expand(len(latent), -1)
        condition = self._condition(latent, moments)

        def predict(x: Tensor, level: Tensor) -> Tensor:
            return self._predict(x, level, condition)

        video, kept = sample(predict, noise, steps, prediction=self.config.prediction, guide=guide, keep=keep)
        return video.clamp_(-1, 1), kept

    # ---- streams

    def start_stream(
        self,
        batch_size: int,
        height: int,
        width: int,
        *,
        steps: int = 1,
        extension: bool = False,
        generator: Generators = None,
    ) -> RegenStream:
        """A new stream of ``batch_size`` clips of ``height`` x ``width`` pixels; the rest is as in :meth:`decode`."""
        self._check_steps(steps)
        if batch_size < 1 or height < 1 or width < 1:
            raise ValueError(f"a stream of {batch_size} clips of {height}x{width} pixels is empty")
        generators = per_clip(generator, batch_size, self.latent_mean.device)
        return RegenStream(batch_size, height, width, steps, extension, generators)

    @torch.no_grad()
    def step_stream(self, latent_frame: Float[Tensor, "b c y x"], state: RegenStream) -> Shaped[Tensor, "b 3 k h w"]:
        """The frames that this latent frame completes: k + 1 with the second of a chunk, none with its first. In a causal
        space none with the very first, k + 1 with the second, k with each that follows."""
        check_frame(latent_frame, state, self.channels, self.stride_hw)
        before = state.pending
        state.pending = latent_frame.clone()  # not a view, which would keep a whole clip
        if before is None:
            return self._nothing(state)
        window = whole_pair(state.pairs, self.stride_t, self.chunked, state.extension)
        pair = torch.stack([before, latent_frame], 2)
        frames, state.guide = self._window(pair, window, state.steps, state.generators, state.guide, state.extension)
        state.pairs += 1
        if self.chunked:
            state.pending = None
        return frames[..., : state.height, : state.width]

    @torch.no_grad()
    def end_stream(self, state: RegenStream) -> Shaped[Tensor, "b 3 k h w"]:
        """Close the stream: a content frame that waits for its motion, or the only frame there was, is an image."""
        frames = self._nothing(state)
        if state.pending is not None and (self.chunked or not state.pairs):
            frames, _ = self._decode(state.pending.unsqueeze(2), (0.0,), state.steps, state.generators)
        state.ended, state.pending, state.guide = True, None, None
        return frames[..., : state.height, : state.width]

    def _nothing(self, state: RegenStream) -> Tensor:
        return self.latent_mean.new_zeros(state.batch_size, 3, 0, state.height, state.width)


def per_clip(generator: Generators, batch_size: int, device: torch.device) -> list[torch.Generator]:
    """A generator for every clip: those given; seeded in turn from the one given; or all with seed 0."""
    if generator is None:
        return [torch.Generator(device).manual_seed(0) for _ in range(batch_size)]
    if isinstance(generator, torch.Generator):
        seeds = torch.randint(2**62, (batch_size,), generator=generator, device=generator.device).tolist()
        return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]
    if len(generator) != batch_size:
        raise ValueError(f"{len(generator)} generators for {batch_size} clips: give one, or one for each")
    return list(generator)
