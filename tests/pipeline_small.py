"""Small decoders of the families and small pipelines of diffusers for them, for the tests of decoders in pipelines."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_pipelines import KINDS, NUM_FRAMES, SIZES, call_arguments, space_of, tiny_pipeline
from torch import Tensor

import decoders
from decoders.base import VideoDecoder
from decoders.exported import Exported, save
from experiments.config import load
from experiments.train import build

FILES = tempfile.TemporaryDirectory(prefix="pipelines-")  # for this process, and deleted with it
REF = "{layout: %s, dim: 8, blocks: 1, heads: 2, head_dim: 16, ffn: 64, residual: video, zero_init: false%s}"
DECODERS = {  # space -> name -> experiment and its network there
    "wan": {
        "flashdecoder": ("flashdecoder_debug", None),
        "flash_vaed": ("flash_vaed_debug", "{layout: wan21, dim: 16, keep: {up2: 0.5, up3: 0.5}}"),
        "refdecoder": ("refdecoder_debug", REF % ("wan21", "")),
        "windowed": ("refdecoder_debug", REF % ("wan21", ", attention: windowed, window: 2")),
        "regen": ("regen_space_debug", None),
    },
    "wan22": {
        "flashdecoder": ("flashdecoder_debug", None),
        "flash_vaed": ("flash_vaed_debug", "{layout: wan22, dim: 16, keep: {up2: 0.5, up3: 0.5}}"),
        "refdecoder": ("refdecoder_debug", REF % ("wan22", "")),
    },
    "ltx": {
        "flashdecoder": ("flashdecoder_debug", None),
        "flash_vaed": ("flash_vaed_debug", "{layout: ltx, dim: 4, keep: {up2: 0.5, up3: 0.5}}"),
        "regen": ("regen_space_debug", "{patch: 32}"),
    },
}
SUITABLE = [(kind, name) for kind in KINDS for name in (*DECODERS[space_of(kind)], "own")]


@cache
def folder_of(space: str) -> Path:
    """An image-to-video pipeline of this space as ``save_pretrained`` writes it."""
    folder = Path(FILES.name) / space
    tiny_pipeline(f"{space}_i2v").save_pretrained(folder)
    return folder


def trained(space: str, name: str) -> VideoDecoder:
    """The decoder of ``DECODERS`` as a run would train it, with random weights."""
    experiment, network = DECODERS[space][name]
    overrides = ["latent_space=decoders.latent_spaces.diffusers.DiffusersVAE", f"space={{path: {folder_of(space)}}}"]
    if space == "ltx":
        drawn = [f"sources.{source}" for source in ("motion", "stills", "unseen")]
        overrides += [f"data.{stream}.size=[64,96]" for stream in (*drawn, "train.video", "val.unseen")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = build(load(experiment, [*overrides, *([f"decoder={network}"] if network else [])]))
        if name == "regen":  # whose last layer begins at zero
            for parameter in decoder.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape)
    return decoder


@cache
def exported(space: str, name: str) -> Exported:
    """A decoder of ``DECODERS``, saved and loaded. own: the pipeline's own autoencoder."""
    if name == "own":
        return decoders.load(folder_of(space))
    return decoders.load(save(Path(FILES.name) / "exported" / space / name, trained(space, name), {"test": name}))


@cache
def pipeline(kind: str) -> Any:
    """Shared by tests, which leave it as it was."""
    return tiny_pipeline(kind)


@cache
def latents_of(kind: str) -> Tensor:
    """Normalised latents "b c n y x" of the call, as the pipeline itself saves them."""
    pipe = pipeline(kind)
    latent = pipe(**call_arguments(kind), output_type="latent").frames
    if space_of(kind) != "ltx":
        return latent
    height, width = (side // 32 for side in SIZES["ltx"])
    return pipe._unpack_latents(latent, 1 + (NUM_FRAMES["ltx"] - 1) // 8, height, width)


def reference_of(kind: str, image: Any = None) -> Tensor | None:
    """The image as the pipeline prepares it, "b 3 1 h w"; None: text to video."""
    arguments = call_arguments(kind)
    image = image or arguments.get("image")
    if image is None:
        return None
    height, width = arguments["height"], arguments["width"]
    return pipeline(kind).video_processor.preprocess(image, height=height, width=width)[:, :, None]


def frames_of(video: Tensor) -> np.ndarray:
    """RGB in [-1, 1] as a pipeline's "np" gives it: "b t h w 3" in [0, 1]."""
    return (video.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()


def by_hand(decoder: Exported, kind: str, **given: Any) -> np.ndarray:
    return frames_of(decoder.decode(latents_of(kind), reference=reference_of(kind), **given))


def call(pipe: Any, kind: str, output_type: str = "np", **given: Any) -> Any:
    return pipe(**(call_arguments(kind) | given), output_type=output_type).frames


def same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Up to what float32 loses where the pipeline denormalises latents and the adapter undoes it."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 1e-3, "nothing to compare"
    np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=0)
