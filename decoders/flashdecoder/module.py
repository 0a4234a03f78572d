"""FlashDecoder's objective: L1, LPIPS and, in stage 3, a 3D PatchGAN (arXiv 2607.14898 section 3.5, Table A)."""

from dataclasses import dataclass

from torch import Tensor, nn

from datamodules.batch import VideoBatch, counted
from decoders import terms
from decoders.base import VideoDecoder
from decoders.flashdecoder.model import FlashDecoderConfig, FlashDecoderModel
from decoders.latent_spaces.base import LatentSpace
from decoders.training import TrainingConfig
from losses.adversarial import DiscriminatorConfig, PatchDiscriminator3d
from losses.perceptual import Lpips
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
            self._lpips = terms.build_lpips(self.objective)

    def shard_units(self) -> list[nn.Module]:
        """None: a block runs once for every latent frame, and would be gathered as often. What is sharded is what an optimiser
        step needs; all weights are gathered once for a step."""
        if self.discriminator is not None:
            raise ValueError(
                "the adversarial terms call the discriminator with detached copies of its weights, which slices cannot be; "
                "use trainer.strategy=ddp"
            )
        return []

    def param_groups(self) -> list[dict]:
        groups = [{"name": "decoder", "params": dict(self.model.named_parameters())}]
        if self.discriminator is not None:
            groups.append({"name": "discriminator", "params": dict(self.discriminator.named_parameters())})
        return groups

    # ---- objective

    def losses(self, batch: VideoBatch) -> dict[str, Tensor]:
        video, mask = batch["video"], counted(batch)
        prediction = self.model(batch["latent"])[:, :, : video.shape[2], : video.shape[3], : video.shape[4]]
        found = {"l1": l1(prediction, video, mask)}
        adversarial = self.discriminator is not None and video.shape[2] > 1
        if not (adversarial or self.is_on("lpips")):
            return found
        fake, real, mask = terms.crops(prediction, video, mask, self.objective.crop)
        if self.is_on("lpips"):
            found["lpips"] = terms.lpips(self._lpips, fake, real, mask)
        if adversarial:
            found |= terms.adversarial(self.discriminator, fake, real, self.global_step, self.objective.r1_interval)
        return found
