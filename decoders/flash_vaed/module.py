"""Flash-VAED's distillation: align, transfer, refine (arXiv 2602.19161; what the paper leaves open is in README.md).

A phase is an experiment: which terms have which weights, what starts the student, and whose features are followed. Phase
1 prunes and initialises the student from the teacher before its first step; phases 2 and 3 start from the one before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from datamodules.batch import VideoBatch, batch_size, counted
from decoders import terms
from decoders.backbones.staged import StagedDecoder
from decoders.base import VideoDecoder
from decoders.flash_vaed import calibrate, calibrate_ltx
from decoders.flash_vaed.cache import TeacherCache
from decoders.flash_vaed.calibrate import PruneConfig, Statistics
from decoders.flash_vaed.ltx_student import LTXStudent
from decoders.flash_vaed.model import FlashVaedConfig, build_student, teacher_layout
from decoders.flash_vaed.statistics import ChannelStatistics
from decoders.flash_vaed.teacher import load_teacher
from decoders.flash_vaed.wan_student import stage_channels
from decoders.latent_spaces.base import LatentSpace
from decoders.training import TrainingConfig
from losses.distillation import RunningScale, feature_mse
from losses.perceptual import Lpips
from losses.pixel import l1
from losses.structural import ssim_loss
from metrics.image import Psnr


@dataclass
class FlashVaedObjective:
    """One phase of the distillation, besides the weights of its terms."""

    teacher: str | None = None  # folder, hub id, .pth, wan_mini, or random (tests); null: nothing is distilled
    start: PruneConfig | None = field(
        default_factory=PruneConfig
    )  # prune and initialise first; null: init_from or random
    taps: list[str] = field(
        default_factory=lambda: ["mid", "up0", "up1", "up2", "up3"]
    )  # stages whose features are followed
    # What a tap is compared with: the teacher's kept channels; all of them, from the student's through W; or all of them, from
    # the student's through two trained 1x1x1 convolutions (Turbo-VAED), for students of another width.
    match: Literal["kept", "reconstructed", "projected"] = "kept"
    feed: Literal["student", "teacher"] = (
        "student"  # whose features each followed stage reads: its own, or the teacher's
    )
    cache: str | None = None  # folder that keeps what the teacher said of each clip; null: it is asked every time
    cache_gib: float = 50.0  # room for it
    balance: bool = True  # each tap's loss over its running mean, so that all weigh equally
    target: Literal["video", "teacher"] = "video"  # what l1, ssim and lpips compare with
    lpips_net: str = "vgg"
    lpips_weights: str | None = None  # file or folder of the backbone; null: looked for (losses/pretrained.py)
    lpips_frames_per_chunk: int | None = None
    crop: int | None = None  # LPIPS sees random crops of this side; null: whole frames

    def __post_init__(self) -> None:
        if self.match == "projected" and (self.feed == "teacher" or self.start is not None):
            raise ValueError(
                "objective.match=projected is for students of their own: set objective.feed=student and start=null"
            )
        if self.crop is not None and self.crop < 16:
            raise ValueError(f"objective.crop={self.crop} must be 16 or more, or null for whole frames")
        if self.teacher is None and (self.start is not None or self.target == "teacher"):
            raise ValueError(
                "objective.teacher is null, but objective.start or target needs one; set start to null too"
            )


class FlashVaed(VideoDecoder):
    """Terms: ``l1``, ``ssim`` (1 - SSIM) and ``lpips`` against the video or the teacher's output; with a teacher also
    ``guidance``, the mean over taps of the features' normalised squared error. The frozen teacher is no submodule."""

    Config = FlashVaedConfig
    Objective = FlashVaedObjective
    terms_may_be_absent = True  # and their gradients: an image passes no convolution over time

    def __init__(
        self,
        config: FlashVaedConfig,
        objective: FlashVaedObjective,
        latent_space: LatentSpace,
        training: TrainingConfig,
    ) -> None:
        super().__init__(latent_space, training)
        self.objective = objective
        self.model = self.build_model(config, latent_space.channels, latent_space.stride_t, latent_space.stride_hw)
        self.terms = frozenset({"l1", "ssim", "lpips"})
        if objective.teacher is not None:
            self.terms |= {"guidance"}
            if unknown := sorted(set(objective.taps) - set(self.model.stages)):
                raise ValueError(f"objective.taps: no stage {unknown[0]}; there are {', '.join(self.model.stages)}")
        if objective.start is not None and not getattr(self.model, "has_computed_start", True):
            raise ValueError(
                "decoder.operators=depthwise5 and upsample=shuffle have no computed start; set objective.start=null"
            )
        self._teacher_layout = self.model.layout
        self.projections = nn.ModuleDict()
        if objective.teacher is not None and objective.match == "projected":
            if isinstance(self.model, LTXStudent):
                raise ValueError("objective.match=projected is for Wan's layouts")
            space = (latent_space.channels, latent_space.stride_t, latent_space.stride_hw)
            self._teacher_layout = teacher_layout(replace(config, dim=None), *space)
            self.discriminators = ("projections",)  # trained, and not needed at inference
            for tap in objective.taps:
                given = stage_channels(self.model.layout, tap) if tap == "mid" else self.model.out_channels(tap)
                wanted = stage_channels(self._teacher_layout, tap)
                layers = (nn.Conv3d(given, wanted, 1), nn.SiLU(), nn.Conv3d(wanted, wanted, 1))
                self.projections[tap] = nn.Sequential(*layers)
        self._scale = RunningScale()
        self._teacher: list[StagedDecoder] = []  # in a list, so that it is no submodule
        self._lpips: Lpips | None = None
        self._cache: TeacherCache | None = None
        if objective.cache is not None:
            said = (objective.teacher, objective.target, objective.feed, sorted(objective.taps), latent_space.name)
            self._cache = TeacherCache(objective.cache, repr(said), objective.cache_gib)

    build_model = staticmethod(build_student)

    # ---- the teacher, and the student's start

    @property
    def teacher(self) -> StagedDecoder:
        """The frozen teacher, on this module's device; read when it is first needed."""
        if not self._teacher:
            self._teacher.append(load_teacher(self.objective.teacher, self._teacher_layout))
        teacher = self._teacher[0]
        if next(teacher.parameters()).device != self.device:
            teacher.to(self.device)
        return teacher

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        objective = self.objective
        if self.training_config.loss_weights["lpips"] != 0:  # a missing backbone is told at once
            self._lpips = terms.build_lpips(self.objective)
        if objective.teacher is not None:
            _ = self.teacher  # a missing one is told at once

    def on_fit_start(self) -> None:
        if self.objective.start is not None and not self.trainer.ckpt_path:  # a resumed run has its student
            self.start_from_teacher(self.trainer.datamodule, Path(self.trainer.default_root_dir))
        super().on_fit_start()  # the EMA begins at what the student starts as

    def start_from_teacher(self, data: Any, folder: Path) -> str:
        """Calibrate on the first training clips, prune, initialise, and write what was found to ``pruning.txt`` and
        ``pruning.pt``. All processes see the same statistics, so they choose the same channels.

        Raises:
            ValueError: calibration clips too few for the rank.
        """
        config = self.objective.start
        device = self.trainer.strategy.root_device
        teacher = self.teacher.to(device)
        clips = list(self._calibration_latents(data, config.num_clips, device))
        steps = calibrate_ltx if isinstance(self.model, LTXStudent) else calibrate
        statistics = self._everyones(steps.gather(teacher, clips, config.positions, config.seed))
        student = self.model.to(device)
        before = self._closeness(student, teacher, clips[:1])
        selections = steps.choose(student, teacher, statistics, config)
        steps.initialise(student, teacher, statistics, selections, config.refit)
        after = self._closeness(student, teacher, clips[:1])
        report = (
            f"{len(clips) * self.trainer.world_size} calibration batches, {config.method}, "
            f"{'re-fitted' if config.refit else 'sliced'}\n{steps.pruning_report(student, teacher, selections)}\n"
            f"student against teacher before any training: {after:.2f} dB PSNR; with random weights {before:.2f} dB"
        )
        if rank_zero_only.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "pruning.txt").write_text(report + "\n")
            torch.save({name: vars(selection) for name, selection in selections.items()}, folder / "pruning.pt")
            print(report, flush=True)
        return report

    @torch.no_grad()
    def _calibration_latents(self, data: Any, wanted: int, device: torch.device):
        """This process's share of the calibration clips, as latents, from the first training batches."""
        share = -(-wanted // self.trainer.world_size)
        for batch in data.train_dataloader():
            latent = batch["latent"].to(device) if "latent" in batch else self.encode(batch["video"].to(device))
            yield latent[:share]
            share -= batch_size(batch)
            if share <= 0:
                return

    def _everyones(self, statistics: Statistics) -> Statistics:
        """What all processes saw, the same on each; moments between taps are the first process's."""
        if self.trainer.world_size == 1:
            return statistics
        everywhere: list[Any] = [None] * self.trainer.world_size
        own = {name: s.tensors() for name, s in statistics.items()}
        torch.distributed.all_gather_object(everywhere, (own, {name: t.cpu() for name, t in statistics.taps.items()}))
        merged = Statistics()
        merged.taps = everywhere[0][1]
        for gathered, _ in everywhere:
            for name, tensors in gathered.items():
                part = ChannelStatistics.from_tensors(tensors)
                if name in merged:
                    merged[name].merge(part)
                else:
                    merged[name] = part
        return merged

    @torch.no_grad()
    def _closeness(self, student: torch.nn.Module, teacher: StagedDecoder, clips: list[Tensor]) -> float:
        """PSNR of the student's output against the teacher's, dB, mean over clips and frames."""
        scores = [Psnr()(student.decode(latent).float(), teacher.decode(latent).float()).mean() for latent in clips]
        return float(torch.stack(scores).mean())

    # ---- objective

    def losses(self, batch: VideoBatch) -> dict[str, Tensor]:
        latent, mask = batch["latent"], counted(batch)
        guided = self.objective.teacher is not None and self.is_on("guidance")
        taps = self.objective.taps if guided else ()
        output = self.model(latent, taps=taps)
        prediction, features = output if taps else (output, {})
        taught = self._taught(batch, taps)
        found = {}
        if taps:
            found["guidance"] = self._guidance(features, taught)
        target = batch["video"] if self.objective.target == "video" else taught["video"].clamp(-1, 1)
        t, h, w = batch["video"].shape[2:]
        return found | self._pixels(prediction[:, :, :t, :h, :w], target[:, :, :t, :h, :w], mask)

    @torch.no_grad()
    def _taught(self, batch: VideoBatch, taps: Sequence[str]) -> dict[str, Tensor]:
        """What the teacher says of a batch: features of stages, and its video where that is the target."""
        if not taps and self.objective.target == "video":
            return {}
        if self._cache is None:
            return self._ask(batch["latent"], taps)
        said = self._cache.get(batch["key"], self.device)
        if said is None:
            said = self._ask(batch["latent"], self.objective.taps)  # all there is to ask, so that a clip has one file
            self._cache.put(batch["key"], said)
        return said

    def _ask(self, latent: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        teacher = self.teacher
        names = list(teacher.stages)
        wanted = set(taps) | {names[names.index(tap) - 1] for tap in taps if self.objective.feed == "teacher"}
        x = teacher.denormalise(latent)
        stages = names if self.objective.target == "teacher" else names[: 1 + max(map(names.index, wanted))]
        x, _, features = teacher.run(x, None, True, wanted, stages)
        return features | ({"video": teacher.finish(x)} if self.objective.target == "teacher" else {})

    def _guidance(self, features: dict[str, Tensor], taught: dict[str, Tensor]) -> Tensor:
        names = list(self.model.stages)
        losses = {}
        for tap in self.objective.taps:
            own = features[tap]
            if self.objective.feed == "teacher":
                before = names[names.index(tap) - 1]
                own, _, _ = self.model.run(self._kept(taught[before], before), None, True, (), (tap,))
            if self.objective.match == "projected":
                losses[tap] = feature_mse(self.projections[tap](own), taught[tap])
            elif self.objective.match == "reconstructed":
                losses[tap] = feature_mse(self._reconstructed(own, tap), taught[tap])
            else:
                losses[tap] = feature_mse(own, self._kept(taught[tap], tap))
        self.log_dict({f"guidance/{tap}": loss.detach() for tap, loss in losses.items()})
        if self.objective.balance:
            losses = self._scale(losses)
        return torch.stack(list(losses.values())).mean()

    def _kept(self, features: Tensor, stage: str) -> Tensor:
        """The channels that the student has, of what a stage of the teacher gives."""
        kept = getattr(self.model, f"kept_{stage}", None)
        return features if kept is None or len(kept) == features.shape[1] else features[:, kept]

    def _reconstructed(self, features: Tensor, stage: str) -> Tensor:
        """All channels of the teacher, linearly, from what a stage of the student gives."""
        matrix = getattr(self.model, f"recon_{stage}", None)
        return features if matrix is None else torch.einsum("bkthw,kc->bcthw", features, matrix.to(features))

    def _pixels(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        found = {"l1": l1(prediction, target, mask)}
        if self.is_on("ssim"):
            found["ssim"] = ssim_loss(prediction, target, mask)
        if self.is_on("lpips"):
            cut = terms.crops(prediction, target, mask, self.objective.crop)
            found["lpips"] = terms.lpips(self._lpips, *cut)
        return found

    # ---- evaluation

    def own_references(self) -> dict[str, Any]:
        """The teacher on the same latents, beside which the student is judged."""
        if self.objective.teacher is None:
            return {}

        def teacher(batch: VideoBatch) -> Tensor:
            t, h, w = batch["video"].shape[2:]
            return self.teacher.decode(batch["latent"])[:, :, :t, :h, :w].float()

        return {"teacher": teacher}

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["guidance_scale"] = self._scale.state_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        self._scale.load_state_dict(checkpoint["guidance_scale"])
