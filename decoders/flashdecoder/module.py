"""FlashDecoder's objective: L1, LPIPS and, in stage 3, a 3D PatchGAN (arXiv 2607.14898 section 3.5, Table A)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batch import VideoBatch, counted
from decoders.base import VideoDecoder
from decoders.flashdecoder.model import FlashDecoderConfig, FlashDecoderModel, FlashStream
from decoders.latent_spaces.base import LatentSpace
from decoders.training import TrainingConfig
from losses.adversarial import (
    DiscriminatorConfig,
    PatchDiscriminator3d,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from losses.perceptual import Lpips, random_crop_pair
from losses.pixel import l1


@dataclass
class FlashDecoderObjective:
    """What is trained for, besides the weights of the terms."""

    lpips_net: str = "vgg"  # the paper does not name it
    lpips_weights: str | None = None  # file or folder of the backbone; null: looked for (losses/pretrained.py)
    lpips_frames_per_chunk: int | None = None  # bounds memory
    crop: int | None = None  # LPIPS and the discriminator see random crops of this side; null: whole frames
    discriminator: DiscriminatorConfig | None = None  # null: no adversarial terms
    r1_interval: int = 16

    def __post_init__(self) -> None:
        if self.crop is not None and self.crop < 16:
            raise ValueError(f"objective.crop={self.crop} must be 16 or more, or null for whole frames")
        if self.r1_interval < 1:
            raise ValueError(f"objective.r1_interval={self.r1_interval} must be 1 or more")


class FlashDecoder(VideoDecoder):
    """Terms: ``l1`` on whole clips; ``lpips`` on crops; with a discriminator ``gan_g``, ``gan_d`` and lazy ``r1``.

    The adversarial terms skip images: the discriminator judges motion. See ``losses/adversarial.py`` for the single
    backward that trains both players.
    """

    Config = FlashDecoderConfig
    Objective = FlashDecoderObjective

    def __init__(
        self,
        config: FlashDecoderConfig,
        objective: FlashDecoderObjective,
        latent_space: LatentSpace,
        training: TrainingConfig,
    ) -> None:
        super().__init__(latent_space, training)
        self.objective = objective
        self.model = self.build_model(config, latent_space.channels, latent_space.stride_t, latent_space.stride_hw)
        self.terms = frozenset({"l1", "lpips"})
        self.discriminator = None
        if objective.discriminator is not None:
            self.terms |= {"gan_g", "gan_d", "r1"}
            self.discriminators = ("discriminator",)
            self.discriminator = PatchDiscriminator3d.from_config(objective.discriminator)
        self._lpips: Lpips | None = None  # built when first needed: it may have to fetch its weights

    build_model = staticmethod(FlashDecoderModel)

    @property
    def size_multiple(self) -> int:
        return self.model.patch

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.training_config.loss_weights["lpips"] != 0:  # a missing backbone is told at once
            objective = self.objective
            self._lpips = Lpips(
                objective.lpips_net, objective.lpips_weights, frames_per_chunk=objective.lpips_frames_per_chunk
            )

    def param_groups(self) -> list[dict]:
        groups = [{"name": "decoder", "params": dict(self.model.named_parameters())}]
        if self.discriminator is not None:
            groups.append({"name": "discriminator", "params": dict(self.discriminator.named_parameters())})
        return groups

    # ---- objective

    def losses(self, batch: VideoBatch) -> dict[str, Tensor]:
        video, mask = batch["video"], counted(batch)
        prediction = self.model(batch["latent"])[:, :, : video.shape[2], : video.shape[3], : video.shape[4]]
        terms = {"l1": l1(prediction, video, mask)}
        adversarial = self.discriminator is not None and video.shape[2] > 1
        if not (adversarial or self.is_on("lpips")):
            return terms
        fake, real, mask = self._crops(prediction, video, mask)
        if self.is_on("lpips"):
            terms["lpips"] = self._perceptual(fake, real, mask)
        if adversarial:
            terms |= self._adversarial(fake, real)
        return terms

    def _crops(self, prediction: Tensor, video: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.objective.crop is None:
            return prediction, video, mask
        generator = torch.Generator().manual_seed(torch.initial_seed())  # of this step and rank, see the base
        crops = random_crop_pair(prediction, video, self.objective.crop, generator, mask)
        return crops if mask is not None else (*crops, None)

    def _perceptual(self, fake: Tensor, real: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return self._lpips(fake, real)
        scores = self._lpips.per_frame(fake, real, mask)
        frames = mask.amax(dim=(1, 3, 4)) > 0
        return torch.where(frames, scores, 0.0).sum() / frames.sum().clamp(min=1)

    def _adversarial(self, fake: Tensor, real: Tensor) -> dict[str, Tensor]:
        terms = {
            "gan_g": generator_loss(self.discriminator, fake),
            "gan_d": discriminator_loss(self.discriminator, real, fake),
        }
        interval = self.objective.r1_interval
        if self.global_step % interval == 0:  # lazy R1: rarely, and as much stronger (StyleGAN2, appendix B)
            terms["r1"] = interval * r1_penalty(self.discriminator, real)
        return terms

    # ---- inference

    @torch.no_grad()
    def decode(
        self,
        latent: Float[Tensor, "b c n y x"],
        *,
        size: tuple[int, int, int] | None = None,
        reference: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b 3 t h w"]:
        """Frame by frame through the rolling cache. Deterministic: ``generator`` and ``reference`` are not used."""
        video = self.model(latent, mode="streaming")
        if size is None:
            return video
        t, h, w = size
        return video[:, :, :t, :h, :w]

    def start_stream(self, batch_size: int, height: int, width: int, *, reference=None, generator=None) -> FlashStream:
        return self.model.start_stream(batch_size, height, width)

    @torch.no_grad()
    def step_stream(self, latent_frame: Float[Tensor, "b c y x"], state: FlashStream) -> Float[Tensor, "b 3 k h w"]:
        return self.model.step_stream(latent_frame, state)

    def end_stream(self, state: FlashStream) -> Float[Tensor, "b 3 0 h w"]:
        return self.model.end_stream(state)
