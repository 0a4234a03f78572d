"""The validation of every decoder family: each clip decoded by itself, with the averaged weights, and scored.

The other half of :class:`decoders.base.VideoDecoder`, which has what is used here: the space, the options, ``decode``, the
average, and the attributes that say what is scored.
"""

import torch
from jaxtyping import Float
from lightning import LightningModule
from torch import Tensor

from datamodules.batch import VideoBatch, batch_size
from decoders import sharding
from decoders.scoring import DECODE, DECODER, Clips, Row, Scorer, named_groups, selected
from decoders.seeds import key_seed


class Validated(LightningModule):
    """What Lightning calls in a validation, and what it found."""

    def scorer(self) -> Scorer:
        """The metrics of validation. Made at first use: before any step, so that missing weights are told then."""
        if self._scorer is None:
            self._scorer = Scorer(self.training_config.validation)
        return self._scorer

    def on_validation_start(self) -> None:
        self.scorer().begin()
        self._swapped.enter_context(self.ema_weights())
        self._swapped.enter_context(sharding.unsharded(self))  # ranks have different numbers of clips

    def validation_step(self, batch: VideoBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Decode each clip with a generator of its own, seeded from its key: batch size and ranks change nothing.

        The prediction that is returned has the clips that are wanted: all of them, unless ``wanted`` is set.
        """
        if self.wanted is not None:
            batch = selected(batch, [i for i, key in enumerate(batch["key"]) if self.wanted(dataloader_idx, key)])
            if not batch["key"]:
                return {"prediction": batch["video"]}
        batch, scorer = self.with_latent(batch), self.scorer()
        with scorer.timed(DECODE, self.device):
            prediction = torch.cat([self._decode_clip(batch, index) for index in range(batch_size(batch))])
        groups = named_groups(batch, self.training_config.validation.groups) | self.frame_groups(batch)
        clips = Clips.of(batch, groups, dataloader_idx)
        clips.categories = self.categories(clips.video) if self.categories else None
        scorer.score(DECODER, prediction, clips)
        for method, reference in self.references.items():
            if (shown := reference(batch)) is not None:  # None: it has no meaning for these clips
                scorer.score(method, shown, clips)
        scorer.forget()
        return {"prediction": prediction}

    def _decode_clip(self, batch: VideoBatch, index: int) -> Float[Tensor, "1 3 t h w"]:
        clip = slice(index, index + 1)
        generator = self.clip_generator(batch["key"][index])
        reference = batch["reference"][clip] if "reference" in batch else None
        size = tuple(batch["video"].shape[2:])
        given = {"size": size, "reference": reference, "generator": generator, **self.sampling(batch)}
        return self.decode(batch["latent"][clip], **given).float()

    def clip_generator(self, key: str) -> torch.Generator:
        """The source of a clip's noise in validation, whatever the batch."""
        return torch.Generator(self.device).manual_seed(key_seed(key, self.training_config.seed))

    def on_validation_epoch_end(self) -> None:
        self._swapped.close()  # before any callback saves
        self._scorer.gather(self.trainer.world_size)
        own = [row for row in self.validation_rows if row["method"] == DECODER]
        if not own:
            raise ValueError("there are no validation clips; give data.val a stream")
        for name, mean in self._scorer.means(own).items():
            self.log(f"val/{name}", mean, rank_zero_only=True, prog_bar=name == "psnr")
        for stream in sorted({row["stream"] for row in own}):  # each size and source by itself
            for name, mean in self._scorer.means([row for row in own if row["stream"] == stream]).items():
                self.log(f"val_{name}/{self._stream_name(stream)}", mean, rank_zero_only=True)
        self.log("val/clips_seen", float(self.clips_seen), rank_zero_only=True)
        self.log("step", float(self.global_step), rank_zero_only=True)

    def _stream_name(self, index: int) -> str:
        names = getattr(self.trainer.datamodule, "val_names", [])
        return names[index] if index < len(names) else str(index)

    @property
    def validation_rows(self) -> list[Row]:
        """One row per clip and method of the last validation, of all ranks."""
        return self._scorer.rows if self._scorer else []

    @property
    def validation_seconds(self) -> dict[str, float]:
        """What the last validation's time was spent on, all ranks together: decoding (``decode``), and each metric."""
        return self._scorer.seconds if self._scorer else {}

    @property
    def metric_protocols(self) -> dict[str, dict]:
        """How each metric of the last validation was computed."""
        return {m.name: m.protocol for m in self._scorer.metrics} if self._scorer else {}
