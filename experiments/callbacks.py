"""What a run shows while it trains: a progress bar, and pictures of the same clips each time."""

import io
import sys

import torch
from einops import rearrange
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from tqdm import tqdm

from datamodules.batch import batch_size
from decoders.base import VideoDecoder
from experiments.budget import Budget
from experiments.throughput import Throughput


class Progress(ProgressBar):
    """One bar over all steps: loss, throughput, time and GPU-hours left. Where there is no terminal, a line now and then.

    With a budget of time nobody knows how many steps there will be: the bar says which share of the time is used.
    """

    def __init__(self, throughput: Throughput, budget: Budget | None = None) -> None:
        super().__init__()
        self._throughput, self._budget = throughput, budget
        self._bar: tqdm | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        if not self._enabled:
            return
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=None if self._budget else trainer.max_steps,
            initial=trainer.global_step,
            unit="step",
            mininterval=0.5 if terminal else 20.0,
            maxinterval=0.5 if terminal else 60.0,
            ncols=None if terminal else 120,
            smoothing=0.05,
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: VideoDecoder, outputs, batch, batch_idx) -> None:
        if self._bar is None:
            return
        moved = trainer.global_step - self._bar.n
        if moved and (self._bar.n + moved) % trainer.log_every_n_steps == 0:
            shown = {"loss": f"{float(outputs['loss']):.4f}"}
            shown |= self._throughput.shown(pl_module.device.type)
            if (psnr := trainer.callback_metrics.get("val/psnr")) is not None:
                shown["val_psnr"] = f"{float(psnr):.2f}"
            if self._budget:
                shown["time"] = f"{self._budget.used:.0%} of {self._budget.minutes:g} min"
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(moved)

    def on_exception(self, trainer: Trainer, pl_module: VideoDecoder, exception: BaseException) -> None:
        """End the bar's line: what is said of the error has a line of its own."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: VideoDecoder, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Reconstructions(Callback):
    """Draws the first validation clips at every validation: truth, decode, error; stills and moving pictures."""

    STILLS = 4  # frames of a clip that are drawn side by side
    SLICED = 8  # a clip of so many frames is also drawn as its middle row over time, where seams and flicker show
    ERROR_GAIN = 4  # the error map shows |decode - truth| so many times brighter

    def __init__(self, num_shown: int, video_fps: int) -> None:
        self.num_shown, self.video_fps = num_shown, video_fps
        self._shown: list[tuple[str, Tensor, Tensor]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._shown = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        for index in range(batch_size(batch)):
            if len(self._shown) < self.num_shown:
                truth, decoded = batch["video"][index].cpu(), outputs["prediction"][index].float().cpu()
                self._shown.append((batch["key"][index], truth, decoded))

    def on_validation_end(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        if trainer.logger is None or not trainer.is_global_zero or getattr(trainer.logger, "muted", False):
            return
        writer, step = trainer.logger.experiment, trainer.global_step
        for number, (_, truth, decoded) in enumerate(self._shown):
            rows = side_by_side(truth, decoded, self.ERROR_GAIN)
            every = torch.linspace(0, truth.shape[1] - 1, min(self.STILLS, truth.shape[1])).round().long()
            still = rearrange(rows[every], "t h w c -> h (t w) c")
            writer.add_image(f"clip{number}/truth_decode_error", still.numpy(), step, dataformats="HWC")
            if truth.shape[1] >= self.SLICED:
                both = torch.cat([slice_over_time(part) for part in (truth, decoded)], dim=1)
                writer.add_image(f"clip{number}/x_t_truth_decode", both.numpy(), step, dataformats="HWC")
            writer._get_file_writer().add_summary(moving_picture(f"clip{number}/moving", rows, self.video_fps), step)
        writer.flush()
        self._shown = []


def to_uint8(video: Tensor) -> Tensor:
    """RGB in [-1, 1] "3 t h w" to bytes "t h w 3"."""
    return rearrange((video.float().clamp(-1, 1) + 1) * 127.5, "c t h w -> t h w c").round().to(torch.uint8)


def slice_over_time(video: Tensor, rows: int = 6) -> Tensor:
    """The middle row of every frame, one below the other and ``rows`` pixels high each: "t*rows w 3" bytes."""
    return to_uint8(video[:, :, video.shape[2] // 2, None])[:, 0].repeat_interleave(rows, dim=0)


def side_by_side(truth: Tensor, decoded: Tensor, gain: float) -> Tensor:
    """Truth above decode above error map: "t 3h w 3" bytes."""
    error = ((decoded.clamp(-1, 1) - truth).abs() * gain - 1).clamp(-1, 1)
    return torch.cat([to_uint8(part) for part in (truth, decoded, error)], dim=1)


def moving_picture(tag: str, frames: Tensor, fps: int) -> Summary:
    """An animated GIF as an image summary: TensorBoard plays it, and no video encoder is needed."""
    pictures = [Image.fromarray(frame.numpy()) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)
    height, width = frames.shape[1:3]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
    return Summary(value=[Summary.Value(tag=tag, image=image)])
