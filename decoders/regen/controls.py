"""What REGEN is held against on its own validation clips: other numbers of steps, other noise, latents of other clips."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from datamodules.batch import VideoBatch
from decoders.base import Method
from decoders.regen.windows import num_pairs

if TYPE_CHECKING:
    from decoders.regen.module import Regen


def methods(decoder: "Regen") -> dict[str, Method]:
    """Name -> batch to video, or to None where the method has no meaning. A clip's noise is that of its decode, but for
    "other noise"."""
    objective = decoder.objective
    found: dict[str, Method] = {}
    for steps in objective.compare_steps:
        found[f"{steps} steps"] = lambda batch, steps=steps: _decoded(decoder, batch, steps=steps)
    for number in range(1, objective.compare_seeds + 1):
        found[f"other noise {number}"] = lambda batch, number=number: _decoded(decoder, batch, noise=number)
    if objective.compare_extension:
        steps = max([objective.steps, *objective.compare_steps])
        found[f"{steps} steps, latent extension"] = lambda batch: _extended(decoder, batch, steps)
    if "shuffled motion" in objective.controls:
        found["motion of another clip"] = lambda batch: _shuffled(decoder, batch, 1)
    if "shuffled content" in objective.controls:
        found["content of another clip"] = lambda batch: _shuffled(decoder, batch, 0)
    if "first frame repeated" in objective.controls:
        found["repeated frames"] = lambda batch: _repeated(decoder, batch)
        found["average of the frames beside"] = _averaged
    if decoder.interpolator is not None:
        found[decoder.interpolator.name] = lambda batch: (
            decoder.interpolator(batch["video"]) if _between(batch) else None
        )
    return found


def _decoded(decoder: "Regen", batch: VideoBatch, noise: int = 0, **sampling) -> Tensor:
    """As validation decodes, clip by clip, with other arguments or noise."""
    clips = []
    for index, key in enumerate(batch["key"]):
        generator = decoder.clip_generator(f"{key} noise {noise}" if noise else key)
        given = {"size": tuple(batch["video"].shape[2:]), "generator": generator} | decoder.sampling(batch) | sampling
        clips.append(decoder.decode(batch["latent"][index : index + 1], **given).float())
    return torch.cat(clips)


def _extended(decoder: "Regen", batch: VideoBatch, steps: int) -> Tensor | None:
    if num_pairs(batch["latent"].shape[2], decoder.model.chunked) < 2 or decoder.sampling(batch):
        return None  # no seam
    return _decoded(decoder, batch, steps=steps, extension=True)


def _shuffled(decoder: "Regen", batch: VideoBatch, part: int) -> Tensor | None:
    """With content (0) or motion (1) of a validation clip of another file."""
    latent = batch["latent"]
    if not hasattr(decoder.latent_space, "chunk") or latent.shape[2] == 1 or decoder.sampling(batch):
        return None  # in a common space every latent frame is content and motion in one
    t, (h, w) = batch["video"].shape[2], batch["video"].shape[3:]
    mixed = latent.clone()
    for index, key in enumerate(batch["key"]):
        try:
            other = decoder.trainer.datamodule.another_clip(key)[None].to(latent.device)
        except ValueError:
            if decoder.trainer.datamodule.num_val_files > 1:
                raise
            return None  # all clips are of one film
        if other.shape[2] < t or other.shape[3] < h or other.shape[4] < w:
            return None
        mixed[index, :, part::2] = decoder.encode(other[:, :, :t, :h, :w])[0, :, part::2]
    return _decoded(decoder, {**batch, "latent": mixed})


def _repeated(decoder: "Regen", batch: VideoBatch) -> Tensor:
    """The true first frame of every chunk in place of the others; the last encoded frame in place of those ahead; the
    frame before in place of one between."""
    video = batch["video"]
    t, chunk = video.shape[2], getattr(decoder.latent_space, "chunk", video.shape[2])
    frames = [i // chunk * chunk for i in range(t)]
    if decoder.sampling(batch):  # what is scored is what was not encoded
        scored = batch["supervised"][0].tolist()
        frames = [max([j for j in range(i + 1) if not scored[j]], default=0) for i in range(t)]
    return video[:, :, frames]


def _between(batch: VideoBatch) -> bool:
    """Whether every second frame was encoded, and those between are scored."""
    t = batch["video"].shape[2]
    return "supervised" in batch and batch["supervised"][0].tolist() == [bool(i % 2) for i in range(t)]


def _averaged(batch: VideoBatch) -> Tensor | None:
    """The mean of the true frames before and after, where every second frame was encoded."""
    video, t = batch["video"], batch["video"].shape[2]
    if not _between(batch):
        return None
    return torch.stack([video[:, :, i] if i % 2 == 0 else video[:, :, [i - 1, i + 1]].mean(2) for i in range(t)], dim=2)
