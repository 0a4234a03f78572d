"""What every decoder family shares: one training step, one optimiser, and one validation (decoders/validated.py).

A family writes ``terms`` and ``losses``; ``decode`` and the stream methods where its network, ``self.model``, does not have
them under the same names; ``encode`` where it trains an encoder; ``param_groups`` where it needs more than one. Axis letters are those of ``datamodules/batch.py``.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from datamodules.batch import VideoBatch, batch_size
from decoders import optimisation, sharding
from decoders.ema import Ema
from decoders.latent_spaces.base import LatentSpace, pad_to_valid
from decoders.scoring import DECODER, PER_FRAME, Method, Row, Scorer
from decoders.terms import hasten_lpips
from decoders.training import TrainingConfig, check_loss_weights, loss_weight
from decoders.validated import Validated, key_seed

__all__ = ["DECODER", "PER_FRAME", "Method", "Row", "VideoDecoder", "key_seed"]


class VideoDecoder(Validated):
    """The base of all families.

    Args:
        latent_space: the frozen space whose latents are decoded. It is no submodule: it never enters a checkpoint, an
            optimiser or an EMA.
        training: loss weights, optimiser, EMA, validation.

    Attributes:
        Config: dataclass of the architecture, in the family's ``model.py``.
        Objective: dataclass of the objective, in the family's ``module.py``.
        terms: names of all loss terms that ``losses`` may return. Declared once, checked against the weights at start.
        discriminators: names of submodules that are trained but not needed at inference.
        trains_encoder: whether ``losses`` encodes by itself, with gradients; then its batches come without a latent.
        samples_latents: whether training encodes a draw of the posterior in place of its mean.
    """

    Config: type
    Objective: type
    terms: frozenset[str]
    discriminators: tuple[str, ...] = ()
    trains_encoder: bool = False
    samples_latents: bool = False

    def __init__(self, latent_space: LatentSpace, training: TrainingConfig) -> None:
        super().__init__()
        self.latent_space = latent_space
        self.training_config = training
        self.clips_seen = 0
        self.batches_seen = 0
        self.ema: Ema | None = None
        self._restored_ema: dict[str, Tensor] | None = None
        self.progress: Callable[[], float] | None = None  # the share of the run's time that is used, where time ends it
        self.references: dict[str, Method] = {}  # other methods that validation scores too
        self.wanted: Callable[[int, str], bool] | None = None  # (stream, key): other clips are left out of validation
        self.categories: Callable[[Tensor], list[str]] | None = None  # of each clip "b 3 t h w" of a validation
        self.admits: Callable[[dict[str, Tensor]], bool] | None = None  # is a step of these norms made? None: if finite
        self.step_terms: dict[str, Tensor] = {}  # of the last training batch, unweighted
        self._skipped = False  # the last step was not admitted
        self._scorer: Scorer | None = None
        self._swapped = ExitStack()  # holds the EMA weights in place during validation

    # ---- what a family writes

    def losses(self, batch: VideoBatch) -> dict[str, Tensor]:
        """Named, unweighted scalars. ``batch`` has its latent, but where an encoder is trained (``trains_encoder``).

        A term may be absent in a step (lazy R1, images).
        """
        raise TypeError(f"{type(self).__name__} does not define losses()")

    @torch.no_grad()
    def decode(
        self,
        latent: Float[Tensor, "b c n y x"],
        *,
        size: tuple[int, int, int] | None = None,
        reference: Float[Tensor, "b 3 r h w"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b 3 t h w"]:
        """Normalised latents to RGB in about [-1, 1], without gradients, cropped to ``size`` (t, h, w).

        By default the network's own, which is deterministic and looks at no reference.
        """
        video = self.model.decode(latent)
        return video if size is None else video[:, :, : size[0], : size[1], : size[2]]

    def start_stream(self, batch_size: int, height: int, width: int, *, reference=None, generator=None) -> Any:
        """State of a new stream of ``height`` x ``width`` pixels; the caller owns it."""
        return self._streaming().start_stream(batch_size, height, width)

    @torch.no_grad()
    def step_stream(self, latent_frame: Float[Tensor, "b c y x"], state: Any) -> Float[Tensor, "b 3 k h w"]:
        """The frames that are ready after this latent frame, perhaps none."""
        return self._streaming().step_stream(latent_frame, state)

    def end_stream(self, state: Any) -> Float[Tensor, "b 3 k h w"]:
        """What was still pending; the stream is over."""
        return self._streaming().end_stream(state)

    def _streaming(self) -> nn.Module:
        if not hasattr(self.model, "step_stream"):
            raise TypeError(f"{type(self).__name__} cannot stream: use decode on the whole clip")
        return self.model

    def own_references(self) -> dict[str, Method]:
        """Other methods that this family is judged beside on the same clips (a teacher): name -> batch to video, or to
        None for clips that it does not apply to."""
        return {}

    def decoding(self, stream: str) -> dict[str, Any]:
        """What of a score on this validation stream is a choice of how to decode: a part of its protocol."""
        return {}

    def sampling(self, batch: VideoBatch) -> dict[str, Any]:
        """Further arguments of ``decode`` in validation, such as a number of steps."""
        return {}

    def frame_groups(self, batch: VideoBatch) -> dict[str, Tensor]:
        """Frames that are also scored by themselves: name -> bool "b t", some true in every clip. Columns: psnr_<name>."""
        return {}

    def take_start(self) -> str | None:
        """Give the network the pretrained weights that its training starts from, without any data, and say where they are
        from. None: there are no such weights, and it is left as it is."""
        return None

    def tokens(self, n: int, y: int, x: int) -> dict[str, int]:
        """Tokens that pass the network's attention for a clip of n latent frames of y by x: place -> number (of several
        sequences at one place, all). Empty: the latent's positions, as ``size_multiple`` folds them."""
        return {}

    def step_inputs(self, latent: Float[Tensor, "b c n y x"]) -> dict[str, Tensor]:
        """What a training step gives the network besides ``latent``, as zeros: `make show` counts its memory."""
        return {}

    @property
    def size_multiple(self) -> int:
        """Pixels that height and width must be a multiple of; more than the space's where the decoder folds latents."""
        return self.latent_space.stride_hw

    def param_groups(self) -> list[dict]:
        """Groups as {"name", "params": {name: parameter}}; ``optim.groups.<name>`` overrides their rates."""
        return [{"name": "decoder", "params": dict(self.trainable())}]

    @property
    def terms_may_be_absent(self) -> bool:
        """Whether some parameters get no gradient in some steps, which DDP must be told."""
        return bool(self.discriminators)

    def shard_units(self) -> list[nn.Module]:
        """Modules whose weights are gathered one by one with ``trainer.strategy=fsdp``; the rest of every trained child is
        gathered at once. In a step all processes call the same of them equally often, and children as modules.

        Raises:
            ValueError: this decoder cannot be sharded.
        """
        raise ValueError(f"{type(self).__name__} does not say how its weights are sharded; use trainer.strategy=ddp")

    def configure_model(self) -> None:
        """Shard the weights where the strategy made a mesh of processes; for training, and only once."""
        if self.device_mesh is not None and self.trainer.state.fn == "fit" and not sharding.is_sharded(self):
            roots = [child for child in self.children() if any(p.requires_grad for p in child.parameters())]
            sharding.shard(roots, self.shard_units(), self.device_mesh)

    # ---- latents

    @classmethod
    def encoded_frames(cls, space: LatentSpace, objective: Any, where: str, num_frames: int) -> int:
        """How many frames of a clip of the stream ``where`` ("data.train.NAME") are encoded at once: which decides the
        lengths that a stream may have. All of them, unless some are only targets."""
        return num_frames

    def encode(
        self, video: Float[Tensor, "b 3 t h w"], *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c n y x"]:
        """Normalised latents of RGB in [-1, 1], by the frozen space. ``pad: replicate`` pads what it cannot encode.

        Raises:
            ValueError: a length or size that cannot be encoded; names the nearest that can.
        """
        return self.latent_space.encode(self.fitted(video), sample=sample, generator=generator)

    def fitted(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 3 t2 h2 w2"]:
        """``video`` at a length and size that can be encoded: as it is, or padded with ``pad: replicate``.

        Raises:
            ValueError: it cannot be encoded; names the nearest that can.
        """
        space = self.latent_space
        if self.training_config.pad == "replicate":
            return pad_to_valid(video, space, self.size_multiple)
        space.check(*video.shape[2:])  # the more specific error, where it has one
        if video.shape[-2] % self.size_multiple or video.shape[-1] % self.size_multiple:
            m, (h, w) = self.size_multiple, video.shape[-2:]
            raise ValueError(
                f"{h}x{w} pixels: this decoder takes multiples of {m}; the nearest are {h // m * m}x{w // m * m} and "
                f"{-(-h // m) * m}x{-(-w // m) * m}. pad=replicate pads the clip and crops the output back"
            )
        return video

    def with_latent(self, batch: VideoBatch) -> VideoBatch:
        """``batch`` with its latent: the one it has, or the encoding of its source, else of its video."""
        if "latent" in batch:
            return batch
        source = batch.get("source", batch.get("video"))
        if source is None:
            raise ValueError("a batch needs a video or a latent; this one has neither")
        return {**batch, "latent": self.encode(source)}

    # ---- training

    def weight(self, term: str) -> float:
        """The weight of ``term`` at this step."""
        return loss_weight(self.training_config.loss_weights[term], self.global_step)

    def is_on(self, term: str) -> bool:
        """Whether ``term`` is worth computing now."""
        return self.weight(term) != 0

    def setup(self, stage: str) -> None:
        if stage == "fit":
            check_loss_weights(self.training_config.loss_weights, self.terms)
        self.scorer()

    def on_fit_start(self) -> None:
        hasten_lpips(self, self.training_config.lpips_precision, self.training_config.compile_losses)
        if self.training_config.ema is not None and self.ema is None:
            self.ema = Ema(self.inference_parameters(), self.training_config.ema)
            if self._restored_ema is not None:
                self.ema.load_state_dict(self._restored_ema)
                self._restored_ema = None

    def step_seed(self, rank: int, batch: int | None = None) -> int:
        """Every draw of a step (None: the coming one) comes from (seed, step, rank), so a resumed run draws the same."""
        return key_seed(f"train:{self.batches_seen if batch is None else batch}:{rank}", self.training_config.seed)

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
        torch.manual_seed(self.step_seed(self.global_rank))
        terms = self.losses(batch if self.trains_encoder else self.with_latent(batch))
        if unknown := terms.keys() - self.terms:
            raise ValueError(f"{type(self).__name__}.losses returned {sorted(unknown)}, which its terms do not name")
        self.step_terms = {name: value.detach() for name, value in terms.items()}
        weighted = [self.weight(name) * value for name, value in terms.items()]
        total = torch.stack([value.float() for value in weighted]).sum()
        self.batches_seen += 1
        self.clips_seen += batch_size(batch) * self.trainer.world_size
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        self.log("train/loss", total.detach(), prog_bar=True)
        self.log("clips_seen", float(self.clips_seen))
        self.log("step", self.global_step + 1.0)  # TensorBoard's x axis: optimiser steps done, this one included
        return total

    def configure_optimizers(self) -> dict:
        optimizer, schedule = optimisation.build(
            self.param_groups(), self.training_config.optim, self.training_config.max_steps, self.progress
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip every named group on its own. A step that is not admitted, or not finite, never reaches the weights."""
        norms = optimisation.clip(optimizer)
        self.log_dict({f"grad_norm/{name}": norm for name, norm in norms.items()})
        if self.admits is None:
            optimisation.require_finite(norms, self.global_step)
        self._skipped = self.admits is not None and not self.admits(norms)
        if self._skipped:
            optimizer.zero_grad()  # AdamW passes over what has no gradient: weights and moments stay as they are

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None and not self._skipped:
            self.ema.update(self.global_step + 1)  # Lightning counts this step only once we return

    # ---- weights

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that training changes, with their names."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def inference_parameters(self) -> dict[str, nn.Parameter]:
        """What was trained and is needed at inference: EMA and export cover exactly this."""
        prefixes = tuple(f"{name}." for name in self.discriminators)
        return {name: p for name, p in self.trainable() if not (prefixes and name.startswith(prefixes))}

    def inference_buffers(self) -> dict[str, Tensor]:
        """What is needed at inference besides trained parameters and is stored with them: frozen parameters of the decoder's
        own, and persistent buffers (kept channels)."""
        trained, state = {name for name, _ in self.trainable()}, self.state_dict()
        prefixes = tuple(f"{name}." for name in self.discriminators)
        names = (name for name in state.keys() - trained if not (prefixes and name.startswith(prefixes)))
        return {name: state[name] for name in sorted(names)}

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The averaged weights in place of the last ones, if there is an average."""
        with self.ema.applied() if self.ema is not None else nullcontext():
            yield

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["seen"] = {"clips": self.clips_seen, "batches": self.batches_seen}
        if self.ema is not None:
            checkpoint["ema"] = sharding.gathered(self.ema.state_dict())

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.clips_seen, self.batches_seen = checkpoint["seen"]["clips"], checkpoint["seen"]["batches"]
        if (self.training_config.ema is None) != ("ema" not in checkpoint):
            raise ValueError("this checkpoint and this config disagree on whether there is an EMA")
        self._restored_ema = checkpoint.get("ema")
