"""Structural similarity as a training loss."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchmetrics.functional.image import structural_similarity_index_measure

from losses.pixel import check_pair

WINDOW = 11  # pixels a side of the Gaussian window
PEAK = 2.0  # width of [-1, 1]


def ssim_loss(
    prediction: Float[Tensor, "b 3 t h w"],
    target: Float[Tensor, "b 3 t h w"],
    mask: Float[Tensor, "b 1 t h w"] | None = None,
    *,
    frames_per_chunk: int | None = None,
) -> Float[Tensor, ""]:
    """1 - SSIM (Wang et al. 2004), mean over frames; 0 for a perfect prediction, at most 2; RGB in [-1, 1].

    Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03, range 2, mean over RGB: 1 minus the ``ssim`` of
    ``metrics.image``, but the prediction is not clamped, so that values outside the range have a gradient too. Always
    float32, also under autocast and where convolutions may use TF32: variances are small differences of large numbers.

    Args:
        mask: the map of SSIM is averaged over the pixels that count (1; a value between weighs). What does not count
            is replaced by the target first and may hold anything, NaN included. Frames in which nothing counts are
            left out.
        frames_per_chunk: bounds memory: so many frames at a time, computed again in the backward pass. None: all.

    Raises:
        ValueError: shapes differ, frames are smaller than the window, or the mask counts nothing.
    """
    check_pair(prediction, target, mask)
    h, w = prediction.shape[-2:]
    if min(h, w) < WINDOW:
        raise ValueError(f"the SSIM loss needs frames (or crops) of {WINDOW}x{WINDOW} pixels or more, got {h}x{w}")
    if frames_per_chunk is not None and frames_per_chunk < 1:
        raise ValueError(f"frames_per_chunk must be 1 or more, or None for all at once, got {frames_per_chunk}")
    frames = [x if x is None else x.float().transpose(1, 2).flatten(0, 1) for x in (prediction, target, mask)]
    size = frames_per_chunk or len(frames[0])
    masks = [None] * -(-len(frames[0]) // size) if mask is None else frames[2].split(size)
    chunks = zip(frames[0].split(size), frames[1].split(size), masks, strict=True)
    if frames_per_chunk is None or not torch.is_grad_enabled():
        scores = torch.cat([_per_frame(*chunk) for chunk in chunks])
    else:
        scores = torch.cat([checkpoint(_per_frame, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks])
    if mask is None:
        return 1 - scores.mean()
    counts = frames[2].sum(dim=(1, 2, 3)) > 0
    if not counts.any():
        raise ValueError("the mask counts no pixel: drop the clip, or leave the term out of this step")
    return 1 - torch.where(counts, scores, 0.0).sum() / counts.sum()


def _per_frame(prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """(frames, 3, h, w) twice and (frames, 1, h, w) -> (frames,); 0 for a frame in which nothing counts."""
    if mask is not None:
        target = torch.where(mask > 0, target, target.nan_to_num())
        prediction = torch.where(mask > 0, prediction, target)
    cudnn = torch.backends.cudnn
    with (
        torch.autocast(prediction.device.type, enabled=False),
        cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False),
    ):
        _, ssim = structural_similarity_index_measure(
            prediction, target, sigma=1.5, kernel_size=WINDOW, data_range=PEAK, k1=0.01, k2=0.03,
            reduction="none", return_full_image=True,
        )  # fmt: skip
    ssim = ssim.mean(dim=1)
    if mask is None:
        return ssim.mean(dim=(1, 2))
    return (ssim * mask[:, 0]).sum(dim=(1, 2)) / mask.sum(dim=(1, 2, 3)).clamp(min=1e-12)
