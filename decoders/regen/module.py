"""REGEN's objective: encoder and diffusion decoder trained together by the diffusion loss alone (arXiv 2503.08665, section 3).

A clip of a training stream is a window of which ``k + 1`` frames are encoded and as many asked for, see ``targets.py``.
Over a frozen space of latents (equal ground with the other families) the whole clip is encoded and every pair of
neighbouring latent frames is decoded.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from datamodules.batch import VideoBatch, batch_size, counted
from decoders.backbones.magvit2 import Magvit2Encoder
from decoders.base import Method, VideoDecoder
from decoders.latent_spaces.base import LatentSpace
from decoders.latent_spaces.chunked import Chunked
from decoders.latent_spaces.learned import draw
from decoders.regen import controls
from decoders.regen.interpolator import Interpolator
from decoders.regen.model import RegenConfig, RegenDecoder
from decoders.regen.moments import Moments, encode_with
from decoders.regen.objective import RegenObjective, encoded_frames_of
from decoders.regen.targets import Task, Wanted, draw_task, draw_wanted, needed_frames
from decoders.regen.windows import num_pairs
from decoders.training import TrainingConfig
from losses import flow
from losses.kl import LOG_VARIANCE_RANGE, kl_to_standard_normal

MEASURED_STEPS = 300  # at the end of training: the latents of the averaged encoder (EMA) are measured in so many
MEASURED_SHARE = 0.2  # and where time ends the run, in this share of it, the last half of which may be the end
TIMES = "times"  # in a batch of validation: when the frames that are asked for are, in frames of what was encoded


class Regen(VideoDecoder):
    """Terms: ``diffusion``, the paper's only one, and ``kl`` for a variational encoder.

    With ``decoder.encoder`` set the encoder is trained too, over the space ``Chunked``. Without, the space is frozen and
    any causal one.

    Parameter groups: ``encoder`` and ``decoder``.
    """

    Config = RegenConfig
    Objective = RegenObjective
    trains_encoder = True  # losses encodes: what, depends on the task
    terms_may_be_absent = True  # and their gradients: an image has no motion

    def __init__(
        self, config: RegenConfig, objective: RegenObjective, latent_space: LatentSpace, training: TrainingConfig
    ) -> None:
        super().__init__(latent_space, training)
        _check_space(config, latent_space)
        if objective.variational and config.encoder is None:
            raise ValueError("objective.variational=true, but the space is frozen: set decoder.encoder, or false")
        self.objective = objective
        self.terms = frozenset({"diffusion", "kl"} if objective.variational else {"diffusion"})
        self.model = self.build_model(config, latent_space)
        self.encoder = None if config.encoder is None else Magvit2Encoder(config.encoder, objective.variational)
        # Shares of the time at the last two steps, where time ends the run.
        self._used: tuple[float, float] | None = None
        self.moments = Moments(latent_space.channels)
        self.interpolator = Interpolator(objective.interpolator) if objective.interpolator else None
        self._task: Task = "reconstruct"

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.interpolator is not None:  # what is wrong with the file is told before any step
            self.interpolator.load()

    @staticmethod
    def build_model(config: RegenConfig, space: LatentSpace) -> RegenDecoder:
        chunked = isinstance(space, Chunked)
        return RegenDecoder(config, space.channels, space.stride_t, space.stride_hw, chunked=chunked)

    def param_groups(self) -> list[dict]:
        parts = {"encoder": self.encoder, "decoder": self.model}
        return [{"name": name, "params": dict(p.named_parameters())} for name, p in parts.items() if p is not None]

    def shard_units(self) -> list[nn.Module]:
        """The Transformer's blocks, and the stages of the encoder, each of which runs once for a chunk's first frame and once
        for the others."""
        stages = [] if self.encoder is None else self.encoder.stages.values()
        return [*self.model.dit.blocks, *stages]

    def tokens(self, n: int, y: int, x: int) -> dict[str, int]:
        """As in the base: those of all pairs, each a sequence of its own."""
        config, pairs = self.model.config, num_pairs(n, self.model.chunked)
        frames = -(-(self.latent_space.stride_t + 1) // config.patch_t) if pairs else 1
        beside = min(n, 2) if config.conditioning == "in_context" else 0
        return {f"{max(pairs, 1)} sequences": max(pairs, 1) * (frames + beside) * y * x}

    # ---- lengths

    @classmethod
    def encoded_frames(cls, space: LatentSpace, objective: RegenObjective, where: str, num_frames: int) -> int:
        """As in the base: of a training clip one chunk is encoded, of a validation clip what its task says."""
        _, split, name = where.split(".")
        chunk = getattr(space, "chunk", None)
        if split == "train":
            return num_frames if chunk is None or num_frames == 1 else min(chunk, num_frames)
        return encoded_frames_of(objective.tasks.get(name, "reconstruct"), num_frames, objective.ahead)

    def on_fit_start(self) -> None:
        k, space, data = self.latent_space.stride_t, self.latent_space, self.trainer.datamodule.config
        self._check_tasks(getattr(data, "val", {}), getattr(data, "sets", {}))
        for name, stream in getattr(data, "train_streams", getattr(data, "train", {})).items():
            if any(stream.extend):
                raise ValueError(
                    f"data.train.{name}: a step cuts its own window, which may lie in frames that do not count: leave extend "
                    "out and raise num_frames"
                )
            height, width = (stream.multiple,) * 2 if stream.resize == "keep" else stream.size
            if height % space.stride_hw or width % space.stride_hw:
                raise ValueError(
                    f"data.train.{name}: {height}x{width}: what is trained on is never padded, so sizes must be multiples of "
                    f"{space.stride_hw} pixels"
                )
            for task in self.objective.trained_tasks if stream.total_frames > 1 else ():
                if stream.total_frames < needed_frames(task, k):
                    raise ValueError(
                        f"data.train.{name}: {stream.total_frames} frames, but to {task} with k = {k} takes "
                        f"{needed_frames(task, k)} or more: lengthen it, or set the probability of the task to 0"
                    )
                if task == "interpolate" and not isinstance(space, Chunked):
                    space.check((stream.total_frames + 1) // 2, *stream.size)
        super().on_fit_start()

    def _check_tasks(self, streams: dict[str, Any], sets: dict[str, Any]) -> None:
        """Refuse a task of a stream that there is not, or whose clips it cannot cut, padded or not."""
        for name, task in self.objective.tasks.items():
            if name not in streams and name not in sets:
                raise ValueError(f"objective.tasks.{name}: no such stream in data.val; there are {', '.join(streams)}")
            if task != "reconstruct" and name in streams:
                try:
                    self._encoded(task, streams[name].total_frames)
                except ValueError as error:
                    raise ValueError(f"data.val.{name}, objective.tasks.{name}={task}: {error}") from None

    def _encoded(self, task: str, t: int) -> int:
        """How many of ``t`` frames a validation task encodes. Raises ValueError where it cannot."""
        encoded = encoded_frames_of(task, t, self.objective.ahead)
        if task == "extrapolate":  # padded, the frames ahead would be those that repeat the last
            self.latent_space.latent_frames(encoded)
        return encoded

    # ---- latents

    @torch.no_grad()
    def encode(
        self, video: Float[Tensor, "b 3 t h w"], *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c n y x"]:
        """As in the base; a trained encoder works chunk by chunk, so memory does not grow with t, and outside autocast, as
        frozen ones do: in bfloat16 latents are off by hundredths of their spread."""
        if self.encoder is None:
            return super().encode(video, sample=sample, generator=generator)
        latents = []
        with torch.autocast(video.device.type, enabled=False):
            for chunk in self.fitted(video).split(self.latent_space.chunk, dim=2):
                mean, log_variance = self.encoder(chunk)
                if sample and log_variance is not None:
                    mean = draw(mean, log_variance.float().clamp(*LOG_VARIANCE_RANGE), generator)
                latents.append(mean.float())
        return self._normalise(torch.cat(latents, dim=2))

    def _normalise(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b c n y x"]:
        """What the decoder undoes at its door; nothing until the statistics are frozen."""
        shift, scale = (side.view(-1, 1, 1, 1) for side in (self.model.latent_mean, self.model.latent_std))
        return (latent - shift) / scale

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.moments.end_step(made=not self._skipped)
        # Lightning counts this step only once we return. Where time ends the run, this may be the last step or not: frozen
        # again, statistics change no picture.
        if self.encoder is not None and self.objective.freeze_statistics and self._ends_within(1, MEASURED_SHARE / 2):
            mean, std = self.moments.over_ranks()
            self.model.latent_mean.copy_(mean)
            self.model.latent_std.copy_(std)

    def _ends_within(self, steps: int, share: float) -> bool:
        """Whether this step is one of the last, by number or, where time ends the run, by time; the same on all ranks."""
        by_steps = self.global_step + steps >= self.training_config.max_steps
        if self.progress is None:
            return by_steps
        used = self.progress()
        before, last = self._used or (used, used)  # a run that goes on has no last step yet
        if used > last:
            before, last = last, used
        self._used = (before, last)
        return by_steps or used + (last - before) >= 1 - share  # one more step as long may be all that is left

    def _measure(self, clip: Tensor, latent: Tensor) -> None:
        """Take the moments of ``latent``, or where the run keeps an average of its weights, which is what it is used with, of
        what the averaged encoder makes of ``clip``: once more through the encoder, so only towards the end."""
        if self.ema is None:
            self.moments.update(latent)
        elif self.objective.freeze_statistics and self._ends_within(MEASURED_STEPS, MEASURED_SHARE):
            own = {name.removeprefix("encoder."): value for name, value in self.ema.average.items()}
            mean, log_variance = encode_with(self.encoder, own, clip)
            if log_variance is not None:
                mean = draw(mean, log_variance.float().clamp(*LOG_VARIANCE_RANGE), self._step_generator(2))
            self.moments.update(mean)

    # ---- objective

    def losses(self, batch: VideoBatch) -> dict[str, Tensor]:
        if "video" not in batch:
            raise ValueError("REGEN learns pixels: a batch of latents alone has nothing to learn from")
        generator = torch.Generator().manual_seed(torch.initial_seed())  # of this step and rank, see the base
        video, mask = batch["video"], counted(batch)
        task = draw_task(*self.objective.probabilities(self.global_step), generator)
        wanted = draw_wanted(task, video.shape[2], self.latent_space.stride_t, generator)
        cut = self._cut_chunk if self.encoder is not None else self._cut_pairs
        latent, frames, found = cut(batch, wanted, generator)
        target = _windows(video, frames)
        if mask is not None:  # what has no target may hold anything, and must reach no other token
            mask = _windows(mask, frames)
            target = torch.where(mask > 0, target, 0.0)
        times = None  # of an image, whose only time is 0
        if latent.shape[2] > 1:
            times = torch.tensor(wanted.times, device=video.device).expand(len(target), -1)
        found["diffusion"] = self._diffusion(latent, target, times, mask, generator)
        return found

    def _diffusion(
        self, latent: Tensor, target: Tensor, times: Tensor | None, mask: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        """The mean squared error of what the network predicts of a noisy ``target``."""
        objective, predicts = self.objective, self.model.config.prediction
        drawn = {"distribution": objective.levels, "at_one": objective.at_one, "generator": generator}
        level = flow.draw_levels(len(target), **drawn).to(target.device)
        noise = torch.randn(target.shape, generator=self._step_generator(1), device=target.device)
        prediction = self.model(latent, flow.noised(target, noise, level, self.model.coefficients), level, times)
        return flow.denoising(prediction, target, noise, mask, predicts=predicts)

    def _step_generator(self, number: int) -> torch.Generator:
        """For large draws of this step and rank, on the device."""
        return torch.Generator(self.device).manual_seed(torch.initial_seed() + number)

    def _cut_chunk(
        self, batch: VideoBatch, wanted: Wanted, generator: torch.Generator
    ) -> tuple[Tensor, list[list[int]], dict[str, Tensor]]:
        """One chunk of every clip, encoded with gradients; and which frames are wanted."""
        start = wanted.draw_start(generator)
        clip = batch.get("source", batch["video"])[:, :, [start + i for i in wanted.encoded]]
        latent, log_variance = self.encoder(clip)
        found = {}
        if log_variance is not None:
            found["kl"] = kl_to_standard_normal(latent, log_variance)
            latent = draw(latent, log_variance.float().clamp(*LOG_VARIANCE_RANGE), self._step_generator(2))
        if self.training:
            self._measure(clip, latent)
        return self._normalise(latent), [[start + i for i in wanted.frames]], found

    def _cut_pairs(
        self, batch: VideoBatch, wanted: Wanted, generator: torch.Generator
    ) -> tuple[Tensor, list[list[int]], dict[str, Tensor]]:
        """All pairs of latent frames of every clip for which the clip has the frames that are wanted."""
        if wanted.stride > 1:
            latent = self.encode(batch.get("source", batch["video"])[:, :, :: wanted.stride])
        else:
            latent = super().with_latent(batch)["latent"]
        if latent.shape[2] == 1:
            return latent, [list(wanted.frames)], {}
        starts = wanted.starts(range(latent.shape[2] - 1))
        pairs = self.model.fold_pairs(latent).unflatten(0, (len(latent), -1))[:, list(starts)].flatten(0, 1)
        return pairs, [[start + i for i in wanted.frames] for start in starts.values()], {}

    # ---- inference

    @torch.no_grad()
    def decode(
        self,
        latent: Float[Tensor, "b c n y x"],
        *,
        size: tuple[int, int, int] | None = None,
        reference: Float[Tensor, "b 3 r h w"] | None = None,
        generator: torch.Generator | None = None,
        times: Any = None,
        steps: int | None = None,
        extension: bool | None = None,
    ) -> Float[Tensor, "b 3 t h w"]:
        """As in the base, with ``steps`` steps of the sampler (objective.steps). ``times``: numbers, in frames of the clip; frames
        between, before and after those encoded are interpolated and extrapolated. The noise is that of ``generator``, or of
        the run's seed. ``reference`` is ignored."""
        steps = self.objective.steps if steps is None else steps
        extension = self.objective.extension if extension is None else extension
        generator = generator or self._default_noise()
        video = self.model.decode(latent, times=times, steps=steps, extension=extension, generator=generator)
        return video if size is None else video[:, :, : size[0], : size[1], : size[2]]

    def start_stream(self, batch_size: int, height: int, width: int, *, reference=None, generator=None) -> Any:
        """As in the base; content and motion come in turn."""
        chosen = {"steps": self.objective.steps, "extension": self.objective.extension}
        return self.model.start_stream(
            batch_size, height, width, generator=generator or self._default_noise(), **chosen
        )

    def _default_noise(self) -> torch.Generator:
        return self.clip_generator("noise")

    # ---- evaluation

    def validation_step(self, batch: VideoBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """As in the base, with the task of the batch's stream."""
        self._task = self.objective.tasks.get(self._stream_name(dataloader_idx), "reconstruct")
        return super().validation_step(batch, batch_idx, dataloader_idx)

    def with_latent(self, batch: VideoBatch) -> VideoBatch:
        """As in the base; in validation what the task encodes, with the times of all frames and those that are scored."""
        if "latent" in batch or self.training or self._task == "reconstruct":
            return super().with_latent(batch)
        source = batch.get("source", batch["video"])
        t, scored = source.shape[2], torch.ones(source.shape[2], dtype=torch.bool)
        seen = self._encoded(self._task, t)
        if self._task == "interpolate":
            latent, times = self.encode(source[:, :, ::2]), [i / 2 for i in range(t)]
            scored[::2] = False
        else:
            latent, times = self.encode(source[:, :, :seen]), list(range(t))
            scored[:seen] = False
        supervised = scored.to(source.device).expand(batch_size(batch), -1)
        if "supervised" in batch:
            supervised = supervised & batch["supervised"]
        return {**batch, "latent": latent, "supervised": supervised, TIMES: times}

    def sampling(self, batch: VideoBatch) -> dict[str, Any]:
        return {"times": batch[TIMES]} if TIMES in batch else {}

    def decoding(self, stream: str) -> dict[str, Any]:
        task = self.objective.tasks.get(stream, "reconstruct")
        chosen = {"steps": self.objective.steps, "extension": self.objective.extension, "task": task}
        if self.interpolator is not None and task == "interpolate":
            chosen["interpolator"] = self.interpolator.protocol
        return chosen

    def own_references(self) -> dict[str, Method]:
        """Other numbers of steps, other noise, latents of other clips, and what needs no decoder."""
        return controls.methods(self)

    def frame_groups(self, batch: VideoBatch) -> dict[str, Bool[Tensor, "b t"]]:
        """The first frames of later pairs, where a decoder that works pair by pair may jump, and the others."""
        k, t = self.latent_space.stride_t, batch["video"].shape[2]
        if t <= k + 1 or TIMES in batch:
            return {}
        frame = torch.arange(t)
        seam = frame % (k + 1) == 0 if self.model.chunked else frame % k == min(1, k - 1)
        seam[: k + 1] = False  # the first pair
        inside = ~seam
        inside[0] = False  # nothing comes before it
        return {"seam": seam.expand(batch_size(batch), -1), "inside": inside.expand(batch_size(batch), -1)}

    # ---- weights

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["moments"] = self.moments.sums

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        self.moments.restore(checkpoint["moments"])


def _windows(video: Float[Tensor, "b c t h w"], frames: list[list[int]]) -> Float[Tensor, "B c f h w"]:
    """Windows of every clip, given by their frames; the windows of one clip follow one another."""
    return torch.stack([video[:, :, window] for window in frames], dim=1).flatten(0, 1)


def _check_space(config: RegenConfig, space: LatentSpace) -> None:
    """An encoder is trained over a chunked space and over no other."""
    chunked = isinstance(space, Chunked)
    if config.encoder is None:
        if chunked:
            raise ValueError("the chunked space needs decoder.encoder: nothing else would encode")
        if not space.causal:
            raise ValueError(
                f"the {space.name} space is not causal: REGEN reads a latent frame as the motion after the one before it, "
                "so an image must be a latent frame; take a causal space"
            )
        return
    if not chunked:
        raise ValueError(
            f"decoder.encoder is set over the frozen {space.name} space; set latent_space to "
            "decoders.latent_spaces.chunked.Chunked, or decoder.encoder to null"
        )
    if config.encoder.chunk is not None:
        raise ValueError(
            f"decoder.encoder.chunk={config.encoder.chunk} is a setting of the baseline: REGEN's chunks are the space's, of "
            f"{space.chunk} frames; leave it out"
        )
    shape = (config.encoder.latent_channels, config.encoder.stride_t, config.encoder.stride_hw)
    if shape != (space.channels, space.stride_t, space.stride_hw):
        raise ValueError(
            f"decoder.encoder makes {shape[0]} channels and strides of {shape[1]} frames and {shape[2]} pixels; the space has "
            f"{space.channels}, {space.stride_t} and {space.stride_hw}"
        )
