"""The baseline's objective: a decoder over a frozen space, or a whole autoencoder from scratch: L1, MSE, LPIPS, KL, GAN."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from datamodules.batch import VideoBatch, batch_size, counted
from decoders import terms
from decoders.base import VideoDecoder
from decoders.baseline.linear_start import branch_widths, linear_start, shortcuts_only
from decoders.baseline.model import BaselineConfig, DiffusersDecoder, build_decoder, build_encoder, own_decoder
from decoders.latent_spaces.base import LatentSpace
from decoders.latent_spaces.learned import Learned, draw, measure_statistics
from decoders.training import TrainingConfig
from losses.adversarial import DiscriminatorConfig, PatchDiscriminator3d
from losses.kl import LOG_VARIANCE_RANGE, kl_to_standard_normal
from losses.perceptual import Lpips
from losses.pixel import l1, mse


@dataclass
class BaselineObjective:
    """What is trained for, besides the weights of the terms."""

    lpips_net: str = "vgg"
    lpips_weights: str | None = None  # file or folder of the backbone; null: looked for (losses/pretrained.py)
    lpips_frames_per_chunk: int | None = None  # bounds memory
    crop: int | None = None  # LPIPS and the discriminator see random crops of this side; null: whole frames
    discriminator: DiscriminatorConfig | None = None  # null: no adversarial terms
    r1_interval: int = 16
    train_crop: int | None = None  # each training clip is cut to a random square of this side, half of them mirrored
    split_branches: bool = False  # groups decoder_branches_<width> beside decoder: wide branches want a lower rate

    def __post_init__(self) -> None:
        if self.train_crop is not None and self.train_crop < 1:
            raise ValueError(f"objective.train_crop={self.train_crop} must be 1 or more, or null for whole frames")
        if self.crop is not None and self.crop < 16:
            raise ValueError(f"objective.crop={self.crop} must be 16 or more, or null for whole frames")
        if self.r1_interval < 1:
            raise ValueError(f"objective.r1_interval={self.r1_interval} must be 1 or more")


class Baseline(VideoDecoder):
    """A convolutional video autoencoder, trained like any other family.

    With ``backbone: space`` it is the space's own decoder, as it was released: no terms, no training, the row of a comparison.

    Terms: ``l1`` and ``mse`` on whole clips, ``lpips`` on crops; ``kl`` where the encoder is trained; with a
    discriminator ``gan_g``, ``gan_d`` and lazy ``r1``, which skip images.

    With ``train_encoder`` the space is a ``Learned`` one: the loss encodes the clips itself and decodes a sample of the
    posterior; a latent that a batch brings along is of no use to it. ``encode`` gives the posterior's mean.
    """

    Config = BaselineConfig
    Objective = BaselineObjective
    terms_may_be_absent = True  # and their gradients: an image passes no convolution over time

    def __init__(
        self,
        config: BaselineConfig,
        objective: BaselineObjective,
        latent_space: LatentSpace,
        training: TrainingConfig,
    ) -> None:
        super().__init__(latent_space, training)
        _check_space(config, latent_space)
        if objective.split_branches and config.backbone != "wan":
            raise ValueError("objective.split_branches knows the branches of decoder.backbone=wan only")
        self.objective = objective
        self._computed = config.start == "linear"
        shape = (latent_space.channels, latent_space.stride_t, latent_space.stride_hw)
        self.terms = frozenset({"l1", "mse", "lpips"})
        self.encoder = self.discriminator = None
        self._lpips: Lpips | None = None  # built when first needed: it may have to fetch its weights
        if config.backbone == "space":
            if objective != BaselineObjective():
                raise ValueError("decoder.backbone=space is not trained: leave the objective out")
            self.model, self.terms = own_decoder(latent_space), frozenset()
            return
        self.model = self.build_model(config, *shape)
        if config.train_encoder:
            self.terms |= {"kl"}
            self.trains_encoder = True
            self.encoder = build_encoder(config, *shape)
            if config.start == "linear":
                linear_start(self.encoder, self.model)
        if config.skeleton:
            shortcuts_only(*(part for part in (self.encoder, self.model) if part is not None))
        if objective.discriminator is not None:
            self.terms |= {"gan_g", "gan_d", "r1"}
            self.discriminators = ("discriminator",)
            self.discriminator = PatchDiscriminator3d.from_config(objective.discriminator)

    build_model = staticmethod(build_decoder)

    def take_start(self) -> str | None:
        """As in the base: a computed codec is there as soon as the network is; a space's own decoder has the space's weights."""
        space = self.latent_space
        if not self.terms:
            if isinstance(self.model, DiffusersDecoder):
                self.model.adopt(space.vae)
                for part in self.model.vae.children():
                    part.to(getattr(torch, space.config.dtype))
            return f"the {space.name} space's own decoder"
        return "a computed codec (decoder.start=linear)" if self._computed else None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and not self.terms:
            raise ValueError(
                "decoder.backbone=space: the space's own decoder is not trained; make evaluate exp=NAME weights=start measures it"
            )
        if stage == "fit" and self.training_config.loss_weights["lpips"] != 0:  # a missing backbone is told at once
            self._lpips = terms.build_lpips(self.objective)

    def param_groups(self) -> list[dict]:
        parts = {"encoder": self.encoder, "decoder": self.model, "discriminator": self.discriminator}
        groups = {name: dict(p.named_parameters()) for name, p in parts.items() if p is not None}
        if self.objective.split_branches:
            for name, width in branch_widths(self.model).items():
                groups.setdefault(f"decoder_branches_{width}", {})[name] = groups["decoder"].pop(name)
        return [{"name": name, "params": params} for name, params in groups.items()]

    # ---- latents

    @torch.no_grad()
    def encode(
        self, video: Float[Tensor, "b 3 t h w"], *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c n y x"]:
        """As in the base; a trained encoder gives its posterior's mean or a ``sample`` of it, in float32, as many
        frames at a time as a latent frame has."""
        if self.encoder is None:
            return super().encode(video, sample=sample, generator=generator)
        video = self.fitted(video)
        with torch.autocast(video.device.type, enabled=False):
            mean, log_variance = self.encoder.encode_in_chunks(video)
        latent = draw(mean, log_variance.clamp(*LOG_VARIANCE_RANGE), generator) if sample else mean.float()
        return self._normalise(latent)

    def _normalise(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b c n y x"]:
        """What the decoder undoes at its door; nothing until the statistics are frozen."""
        return (latent - self.model.latent_mean) / self.model.latent_std

    def freeze_statistics(
        self, clips: Iterable[Tensor], generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Measure what the encoder gives on ``clips`` "b 3 t h w" and normalise latents with it from now on.

        Returns mean and std per channel, float64. Weights files do not hold them: whoever keeps the weights writes
        them into ``decoder.mean`` and ``decoder.std``. Reconstructions stay the same.

        Raises:
            ValueError: the encoder is not trained here, or the clips have no statistics.
        """
        if self.encoder is None:
            raise ValueError("this decoder trains no encoder: its frozen space has its own statistics")
        buffers = self.model.latent_mean, self.model.latent_std
        kept = [buffer.clone() for buffer in buffers]
        try:
            for buffer, plain in zip(buffers, (0.0, 1.0), strict=True):
                buffer.fill_(plain)
            encode = partial(self.encode, sample=True, generator=generator)
            kept = measured = measure_statistics(encode, clips)
        finally:  # the measured ones, or those from before
            for buffer, values in zip(buffers, kept, strict=True):
                buffer.copy_(values.view_as(buffer))
        return measured

    # ---- objective

    def frame_groups(self, batch: VideoBatch) -> dict[str, Bool[Tensor, "b t"]]:
        """Where coding starts anew after so many frames: the first frames of later chunks, where pictures may jump, and the
        others."""
        t, chunk = batch["video"].shape[2], getattr(self.latent_space, "chunk", None)
        if chunk is None or t <= chunk:
            return {}
        frame = torch.arange(t)
        seam = (frame % chunk == 0) & (frame > 0)
        inside = ~seam & (frame > 0)  # nothing comes before the first
        return {name: group.expand(batch_size(batch), -1) for name, group in (("seam", seam), ("inside", inside))}

    def losses(self, batch: VideoBatch) -> dict[str, Tensor]:
        batch = self._cut(batch)
        video, mask = batch["video"], counted(batch)
        latent, found = (batch["latent"], {}) if self.encoder is None else self._sample_latent(batch)
        prediction = self.model(latent)[:, :, : video.shape[2], : video.shape[3], : video.shape[4]]
        found["l1"] = l1(prediction, video, mask)
        if self.is_on("mse"):
            found["mse"] = mse(prediction, video, mask)
        adversarial = self.discriminator is not None and video.shape[2] > 1
        if not (adversarial or self.is_on("lpips")):
            return found
        fake, real, mask = terms.crops(prediction, video, mask, self.objective.crop)
        if self.is_on("lpips"):
            found["lpips"] = terms.lpips(self._lpips, fake, real, mask)
        if adversarial:
            found |= terms.adversarial(self.discriminator, fake, real, self.global_step, self.objective.r1_interval)
        return found

    def _cut(self, batch: VideoBatch) -> VideoBatch:
        """Every clip's own random square, for ``train_crop``: crops are small, cached films are not."""
        side, (h, w) = self.objective.train_crop, batch["video"].shape[-2:]
        if side is None:
            return batch
        if self.encoder is None or side > min(h, w):
            raise ValueError(
                f"objective.train_crop={side} cuts the clips of an encoder that is trained, here of {h}x{w}"
            )
        # On the CPU, so that every device cuts the same.
        generator = torch.Generator().manual_seed(torch.initial_seed())
        y, x, mirrored = (torch.rand(len(batch["video"]), generator=generator) for _ in range(3))

        def cut(clips: Tensor) -> Tensor:
            tops, lefts = (y * (h - side + 1)).long().tolist(), (x * (w - side + 1)).long().tolist()
            parts = [c[..., i : i + side, j : j + side] for c, i, j in zip(clips, tops, lefts, strict=True)]
            return torch.stack([c.flip(-1) if m < 0.5 else c for c, m in zip(parts, mirrored, strict=True)])

        return {k: cut(v) if k in ("video", "source", "mask") else v for k, v in batch.items()}

    def _sample_latent(self, batch: VideoBatch) -> tuple[Float[Tensor, "b c n y x"], dict[str, Tensor]]:
        """A draw of the posterior, with gradients, and what the posterior costs."""
        mean, log_variance = self.encoder(self.fitted(batch.get("source", batch["video"])))
        # Seeded by this step and rank, see the base: a resumed run draws the same.
        generator = torch.Generator(mean.device).manual_seed(torch.initial_seed())
        latent = draw(mean, log_variance.float().clamp(*LOG_VARIANCE_RANGE), generator)
        return self._normalise(latent), {"kl": kl_to_standard_normal(mean, log_variance)}


def _check_space(config: BaselineConfig, space: LatentSpace) -> None:
    """An encoder is trained over a learned space and over no other."""
    if config.train_encoder and not isinstance(space, Learned):
        raise ValueError(
            f"decoder.train_encoder=true over the frozen {space.name} space; set latent_space to "
            "decoders.latent_spaces.learned.Learned, or train_encoder to false"
        )
    if isinstance(space, Learned) and not config.train_encoder:
        raise ValueError("the learned space needs decoder.train_encoder=true: nothing else would encode")
    chunk, own = getattr(space, "chunk", None), getattr(config.magvit2, "chunk", None)
    if own != chunk:
        raise ValueError(
            f"space.chunk={chunk} and decoder.magvit2.chunk={own}: both say after how many frames coding starts anew, which the "
            "backbone magvit2 can do; set both, or neither"
        )
