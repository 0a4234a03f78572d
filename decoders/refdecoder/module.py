"""RefDecoder's objective: L1 and LPIPS with latents dropped and a reference at hand (arXiv 2605.15196, sections 2.2, G).

A batch of clips has its references drawn from the clip; one of saved latents (section G) has a reference and no video, and
the loss is on the one frame that the reference shows; a triple (style transfer) brings all three.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from datamodules.batch import VideoBatch, batch_size, counted
from decoders import terms
from decoders.base import VideoDecoder, key_seed
from decoders.chunks import reconstruct
from decoders.latent_spaces.base import LatentSpace
from decoders.refdecoder import start
from decoders.refdecoder.injection import JointAttention
from decoders.refdecoder.model import RefDecoderConfig, build_model
from decoders.refdecoder.reference import cut_to
from decoders.sharding import is_sharded
from decoders.training import TrainingConfig
from losses.perceptual import Lpips
from losses.pixel import l1

Frames = Literal["random", "first", "last", "ends", "given"]
CONTROLS = ("without reference", "wrong reference", "plain")
FRAMES = "reference_frames"  # in a batch: the numbers of the frames that validation took as references, "b r"
PARTS = {"attention": ("encoder.", "rereads.", "injection."), "decoder": ("backbone.",)}


@dataclass
class RefDecoderObjective:
    """What is trained for, besides the weights of the terms."""

    start: str | None = (
        None  # pretrained decoder: folder, hub id, .pth, wan_mini or random (tests); null: init_from, else random
    )
    transformer: str | None = (
        None  # folder or file of Wan2.1-T2V-1.3B, whose first blocks start ours; null: from scratch
    )
    reference: Frames = (
        "random"  # the clip's frames that are references in training; ends: first and last; given: the batch's own
    )
    num_references: int = 1  # how many random draws
    no_reference: float = 0.0  # share of training steps without one
    dropout: float = 0.7  # p_max: a step drops a share p ~ U(0, p_max) of the latents; 0: none
    dropout_mask: Literal["shared", "independent"] = "shared"  # the same for all frames (released code), or not (paper)
    sample: bool = True  # train on a draw of the posterior; validation has its mode
    reverse: float = 0.0  # share of steps on saved latents that decode, reverse and encode them again (section G)
    evaluate: Frames = "first"  # as reference, but in validation
    evaluate_references: int = 1
    controls: list[str] = field(default_factory=lambda: list(CONTROLS))  # scored beside the decoder at the end
    lpips_net: str = "vgg"
    lpips_weights: str | None = None  # file or folder of the backbone; null: looked for (losses/pretrained.py)
    lpips_frames_per_chunk: int | None = None  # bounds memory
    crop: int | None = None  # LPIPS sees random crops of this side; null: whole frames

    def __post_init__(self) -> None:
        for name in ("no_reference", "dropout", "reverse"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"objective.{name}={getattr(self, name)} must lie in [0, 1]")
        if min(self.num_references, self.evaluate_references) < 1:
            raise ValueError("objective.num_references and evaluate_references must be 1 or more")
        if unknown := sorted(set(self.controls) - set(CONTROLS)):
            raise ValueError(f"objective.controls: no {unknown[0]!r}; there are {', '.join(CONTROLS)}")
        for choice, number in (("reference", "num_references"), ("evaluate", "evaluate_references")):
            if getattr(self, choice) != "random" and getattr(self, number) != 1:
                raise ValueError(
                    f"objective.{number}={getattr(self, number)} is for objective.{choice}=random; {getattr(self, choice)} says by "
                    "itself how many (ends: two)"
                )
        if self.crop is not None and self.crop < 16:
            raise ValueError(f"objective.crop={self.crop} must be 16 or more, or null for whole frames")


class RefDecoder(VideoDecoder):
    """Terms: ``l1`` and ``lpips``, both on the output clamped to [-1, 1], as released.

    Parameter groups: ``attention``, all that is new (``optim.lr``), and ``decoder``, the pretrained one (a tenth of it:
    ``optim.groups.decoder``). The frozen first convolution is in neither.
    """

    Config = RefDecoderConfig
    Objective = RefDecoderObjective
    terms_may_be_absent = True  # and their gradients: without a reference its encoder has none
    terms = frozenset({"l1", "lpips"})

    def __init__(
        self,
        config: RefDecoderConfig,
        objective: RefDecoderObjective,
        latent_space: LatentSpace,
        training: TrainingConfig,
    ) -> None:
        super().__init__(latent_space, training)
        self.objective = objective
        self.samples_latents = objective.sample
        self.model = self.build_model(config, latent_space.channels, latent_space.stride_t, latent_space.stride_hw)
        self._lpips: Lpips | None = None

    build_model = staticmethod(build_model)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        if self.training_config.loss_weights["lpips"] != 0:  # a missing backbone is told at once
            self._lpips = terms.build_lpips(self.objective)
        if self.objective.reverse and not hasattr(self.latent_space, "decode"):
            raise ValueError(
                f"objective.reverse decodes saved latents with the space's own decoder, which {self.latent_space.name} lacks"
            )
        if not self._resumes():
            self.take_start()

    def take_start(self) -> str | None:
        """As in the base: what ``objective.start`` and ``objective.transformer`` name."""
        start.fill(self.model, self.objective.start, self.objective.transformer)
        return None if self.objective.start == "random" else self.objective.start

    def on_fit_start(self) -> None:
        data = self.trainer.datamodule
        self._check_latents(getattr(data, "latent_spaces", {}))
        wrong = self.training_config.validation.references and "wrong reference" in self.own_references()
        if wrong and getattr(data, "num_val_files", 2) < 2:  # told now, not after the last step
            rest = ", ".join(name for name in self.objective.controls if name != "wrong reference")
            raise ValueError(
                "all validation clips are of one file, so none can be the wrong reference of another: add a source to data.val, or "
                f"set objective.controls=[{rest}]"
            )
        super().on_fit_start()

    def _check_latents(self, found: dict[str, dict[str, int]]) -> None:
        """Saved latents must be this space's; files that do not say (``.pt``) are taken at their word."""
        space = self.latent_space
        for where, spaces in found.items():
            if odd := sorted(spaces.keys() - {"", space.name, space.fingerprint}):
                raise ValueError(
                    f"{where}: {spaces[odd[0]]} of its latents are of the space {odd[0]}, and this run decodes {space.name} "
                    f"({space.fingerprint}); take latents of that space, or another latent_space"
                )

    def _resumes(self) -> bool:
        return self._trainer is not None and bool(self.trainer.ckpt_path)

    def param_groups(self) -> list[dict]:
        groups: dict[str, dict] = {name: {} for name in PARTS}
        for name, parameter in self.trainable():
            part = next(p for p, starts in PARTS.items() if name.removeprefix("model.").startswith(starts))
            groups[part][name] = parameter
        return [{"name": name, "params": params} for name, params in groups.items() if params]

    def shard_units(self) -> list[nn.Module]:
        """The blocks of attention over the whole clip. Where attention streams, how often a block runs depends on whether a
        step has references, which processes draw by themselves: there all weights are gathered at once."""
        injection = self.model.injection
        if not isinstance(injection, JointAttention) or injection.streams:
            return []
        return [block for blocks in injection.blocks for block in blocks]

    def tokens(self, n: int, y: int, x: int) -> dict[str, int]:
        """As in the base, at every point, the references of a training step included."""
        return self.model.tokens(n, y, x, self._references_of_a_step)

    def step_inputs(self, latent: Float[Tensor, "b c n y x"]) -> dict[str, Tensor]:
        """As in the base: the references."""
        if not self.model.uses_reference:
            return {}
        h, w = (side * self.latent_space.stride_hw for side in latent.shape[3:])
        return {"reference": latent.new_zeros(len(latent), 3, self._references_of_a_step, h, w)}

    @property
    def _references_of_a_step(self) -> int:
        choice, number = self.objective.reference, self.objective.num_references
        return number if choice == "random" else 2 if choice == "ends" else 1

    # ---- references

    def with_latent(self, batch: VideoBatch) -> VideoBatch:
        """As in the base; training encodes a draw of the posterior, validation adds the references that it decodes with."""
        if "latent" not in batch and self.training and self.objective.sample:
            generator = torch.Generator(self.device).manual_seed(torch.initial_seed())
            source = batch.get("source", batch.get("video"))
            batch = {**batch, "latent": self.encode(source, sample=True, generator=generator)}
        batch = super().with_latent(batch)
        if self.training or "reference" in batch or "video" not in batch:
            return batch
        if self.objective.evaluate == "given":
            if self.model.uses_reference:
                raise ValueError(
                    f"objective.evaluate=given, but {batch['key'][0]} brings no reference; use another choice"
                )
            return batch
        frames = self._evaluated_frames(batch)
        batch = {**batch, FRAMES: frames}
        return {**batch, "reference": _take(batch["video"], frames)} if self.model.uses_reference else batch

    def _evaluated_frames(self, batch: VideoBatch) -> Int[Tensor, "b r"]:
        """The frames of each clip that validation gives as references, the same whatever the batch."""
        choice, number = self.objective.evaluate, self.objective.evaluate_references
        shown, rows = _shown(batch), []
        for key in batch["key"]:
            generator = torch.Generator().manual_seed(key_seed(f"reference:{key}", self.training_config.seed))
            rows.append(shown[_choose(choice, number, len(shown), generator)])
        return torch.stack(rows)

    def _training_reference(self, batch: VideoBatch) -> Float[Tensor, "b 3 r h w"] | None:
        """References of this step: the batch's own, or frames of the clip, the same ones for all clips (released code)."""
        if not self.model.uses_reference:
            return None
        generator = torch.Generator().manual_seed(torch.initial_seed())  # of this step and rank, see the base
        if self._goes_without(generator):
            return None
        if "reference" in batch:
            return batch["reference"]
        if self.objective.reference == "given":
            raise ValueError(
                "objective.reference=given, but this batch brings no reference; use a source of triples or of saved latents, "
                "or another choice"
            )
        video, mask = batch["video"], counted(batch)
        if mask is not None:  # what has no target may hold anything
            video = torch.where(mask > 0, video, 0.0)
        shown = _shown(batch)
        frames = shown[_choose(self.objective.reference, self.objective.num_references, len(shown), generator)]
        return _take(video, frames.expand(len(video), -1))

    def _goes_without(self, generator: torch.Generator) -> bool:
        """The first draw of a step: whether it has no reference."""
        return bool(torch.rand((), generator=generator) < self.objective.no_reference)

    def _as_elsewhere(self, prediction: Tensor) -> Tensor:
        """``prediction`` of a pass without references, from which parameters that only references use have a gradient of
        zeros where they have one in another process: processes exchange slices of the same gradients, or wait for ever.
        DDP means the same by none."""
        if not (self.training and self.model.uses_reference and is_sharded(self.model)):
            return prediction
        seeds = (self.step_seed(rank) for rank in range(self.trainer.world_size))
        if all(self._goes_without(torch.Generator().manual_seed(seed)) for seed in seeds):
            return prediction  # none has one: no gradient, and no step of Adam's, anywhere
        return prediction + 0 * torch.stack([p.sum() for p in self.model.reference_parameters()]).sum()

    # ---- objective

    def losses(self, batch: VideoBatch) -> dict[str, Tensor]:
        if "video" not in batch:
            return self._saved_latent_losses(batch)
        video, reference = batch["video"], self._training_reference(batch)
        prediction = self._predict(batch["latent"], reference, tuple(video.shape[2:]))
        prediction = prediction if reference is not None else self._as_elsewhere(prediction)
        return self._terms(prediction, video, counted(batch))

    def _predict(self, latent: Tensor, reference: Tensor | None, size: tuple[int, int, int]) -> Tensor:
        t, h, w = size
        video = self.model(latent, reference, keep=self._keep(latent), size=(h, w))
        return video[:, :, :t, :h, :w].clamp(-1, 1)

    def _keep(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b 1 k y x"] | None:
        """1 where a latent is kept, 0 where it is dropped (section 2.2): one share p for the whole step, no rescaling."""
        if not (self.training and self.objective.dropout):
            return None
        generator = torch.Generator(latent.device).manual_seed(torch.initial_seed() + 1)
        share = torch.rand((), device=latent.device, generator=generator) * self.objective.dropout
        _, k, y, x = self.model.keep_shape(*latent.shape[2:])
        frames = 1 if self.objective.dropout_mask == "shared" else k
        drawn = torch.rand(len(latent), 1, frames, y, x, device=latent.device, generator=generator)
        return (drawn >= share).to(latent.dtype)

    def _terms(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        found = {"l1": l1(prediction, target, mask)}
        if self.is_on("lpips"):
            fake, real, mask = terms.crops(prediction, target, mask, self.objective.crop)
            found["lpips"] = terms.lpips(self._lpips, fake, real, mask)
        return found

    def _saved_latent_losses(self, batch: VideoBatch) -> dict[str, Tensor]:
        """A diffusion model's latents have no clip: the frame that the reference shows is the only target (section G)."""
        if "reference" not in batch:
            raise ValueError("a batch of saved latents needs the reference image that they were made from")
        latent, reference = batch["latent"], batch["reference"][:, :, :1]
        given = reference if self.model.uses_reference else None
        generator = torch.Generator().manual_seed(torch.initial_seed() + 2)
        shown = slice(0, 1)
        if torch.rand((), generator=generator) < self.objective.reverse:
            latent, shown = self.encode(self.latent_space.decode(latent).flip(2)), slice(-1, None)
        stride, (y, x) = self.latent_space.stride_hw, latent.shape[3:]
        t = self.latent_space.pixel_frames(latent.shape[2])
        prediction = self._predict(latent, given, (t, y * stride, x * stride))
        return self._terms(prediction[:, :, shown], cut_to(reference, (y * stride, x * stride)), None)

    # ---- inference

    @torch.no_grad()
    def decode(
        self,
        latent: Float[Tensor, "b c n y x"],
        *,
        size: tuple[int, int, int] | None = None,
        reference: Float[Tensor, "b 3 r h w"] | None = None,
        generator: torch.Generator | None = None,
        skip: bool = False,
    ) -> Float[Tensor, "b 3 t h w"]:
        """As in the base. ``reference``: RGB in [-1, 1], resized to the clip's size where its aspect ratio allows; None:
        none. ``skip``: no attention at all, the fine-tuned plain decoder. A decoder without attention ignores references."""
        reference = reference if self.model.uses_reference else None
        video = self.model.decode(latent, reference, skip=skip, size=None if size is None else size[1:])
        return video if size is None else video[:, :, : size[0], : size[1], : size[2]]

    @torch.no_grad()
    def reconstruct(
        self, video: Float[Tensor, "b 3 t h w"], reference: Tensor | None = None, *, chunk: int = 17
    ) -> Float[Tensor, "b 3 t h w"]:
        """Encode and decode a clip of any length, ``chunk`` frames at a time, each by itself and all with the same
        references (released inference; the last chunk is filled with its last frame). Memory does not grow with t.

        Raises:
            ValueError: the space cannot encode ``chunk`` frames of this size; names the nearest that it can.
        """
        return reconstruct(self, video, reference, chunk=chunk)

    def start_stream(self, batch_size: int, height: int, width: int, *, reference=None, generator=None) -> Any:
        """As in the base, with the same references throughout. Raises TypeError where attention sees the whole clip."""
        reference = reference if self.model.uses_reference else None
        return self.model.start_stream(batch_size, height, width, reference=reference)

    # ---- evaluation

    def own_references(self) -> dict[str, Callable[[VideoBatch], Tensor]]:
        """The controls: the same weights with no reference, with another film's frame, and without attention."""
        if not self.model.uses_reference:
            return {}

        def decoded(batch: VideoBatch, reference: Tensor | None, skip: bool = False) -> Tensor:
            size = tuple(batch["video"].shape[2:])
            return self.decode(batch["latent"], size=size, reference=reference, skip=skip).float()

        methods: dict[str, Callable[[VideoBatch], Tensor]] = {
            "without reference": lambda batch: decoded(batch, None),
            "wrong reference": lambda batch: decoded(batch, self._strangers(batch)),
            "plain": lambda batch: decoded(batch, None, skip=True),
        }
        return {name: methods[name] for name in self.objective.controls}

    def _strangers(self, batch: VideoBatch) -> Float[Tensor, "b 3 r h w"]:
        """For each clip as many frames of a validation clip of another file as it has references, at its size."""
        data, size, r = self.trainer.datamodule, tuple(batch["video"].shape[3:]), batch["reference"].shape[2]
        clips = (data.another_clip(key)[None].to(self.device) for key in batch["key"])
        frames = [cut_to(clip[:, :, torch.linspace(0, clip.shape[2] - 1, r).long()], size) for clip in clips]
        return torch.cat(frames)

    def decoding(self, stream: str) -> dict[str, Any]:
        """Which true frames the decoder was given; where a batch brings its own reference (style, editing), that one."""
        return {"reference": self.objective.evaluate, "references": self.objective.evaluate_references}

    def frame_groups(self, batch: VideoBatch) -> dict[str, Bool[Tensor, "b t"]]:
        """Frames that are references themselves, and the others: retrieving a frame is not yet using it elsewhere."""
        t, frames = batch["video"].shape[2], batch.get(FRAMES)
        if frames is None or frames.shape[1] >= len(_shown(batch)):
            return {}
        same = torch.zeros(batch_size(batch), t, dtype=torch.bool)
        same.scatter_(1, frames, True)
        return {"reference": same, "others": ~same}


def _choose(choice: str, number: int, t: int, generator: torch.Generator) -> Int[Tensor, " r"]:
    """Frame numbers of a clip of ``t`` frames."""
    if choice == "first":
        return torch.zeros(1, dtype=torch.int64)
    if choice == "last":
        return torch.tensor([t - 1])
    if choice == "ends":
        return torch.tensor([0, t - 1])
    if number > t:
        raise ValueError(f"{number} reference frames of a clip of {t}; lower objective.num_references")
    return torch.randperm(t, generator=generator)[:number].sort().values


def _shown(batch: VideoBatch) -> Int[Tensor, " t"]:
    """Numbers of the frames that have a target; the same in all clips of a batch."""
    shown = torch.arange(batch["video"].shape[2])
    return shown[batch["supervised"][0].cpu()] if "supervised" in batch else shown


def _take(video: Float[Tensor, "b 3 t h w"], frames: Int[Tensor, "b r"]) -> Float[Tensor, "b 3 r h w"]:
    """The named frames of each clip."""
    return torch.stack([clip[:, own.to(clip.device)] for clip, own in zip(video, frames, strict=True)])
