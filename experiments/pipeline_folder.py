"""A diffusers video pipeline in a folder, as ``save_pretrained`` writes it: what it is, its latents, and calling it.

Used by ``generate`` (latents with their seeds) and ``bench_pipeline`` (where its time goes). Pipelines over the autoencoders of
Wan and LTX are read; what other pipelines return for ``output_type="latent"`` is laid out or scaled in ways of their own.
"""

import hashlib
import importlib.util
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from datamodules.probe import BadFile
from datamodules.stills import load_image
from decoders.latent_spaces.diffusers import DiffusersVAE, DiffusersVAEConfig
from experiments.compose import ConfigError

INDEX = "model_index.json"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = ("wan", "ltx")
WAN22_CHANNELS = 48


@dataclass(frozen=True)
class PipelineFolder:
    """What a folder says of its pipeline before any weights are read."""

    path: Path
    class_name: str
    parts: tuple[str, ...]  # that are there: vae, transformer, text_encoder, ...
    space: DiffusersVAE  # of its autoencoder
    defaults: dict[str, Any]  # of its call, by argument; inspect.Parameter.empty where there is none

    @property
    def takes_image(self) -> bool:
        """Whether it starts from an image."""
        return "image" in self.defaults

    @property
    def fps(self) -> float:
        """Frames per second that the released models of this class make: LTX's default, 24 for Wan 2.2 TI2V, 16 for Wan."""
        if "frame_rate" in self.defaults:
            return float(self.defaults["frame_rate"])
        return 24.0 if self.space.channels == WAN22_CHANNELS else 16.0

    @property
    def size_multiple(self) -> int:
        """Pixels that height and width are multiples of: the autoencoder's stride times the transformer's patch."""
        config = self.path / "transformer" / "config.json"
        patch = json.loads(config.read_text()).get("patch_size", 1) if config.is_file() else 1
        return self.space.stride_hw * (patch[-1] if isinstance(patch, list) else patch)

    def identity(self) -> dict[str, Any]:
        """What tells this pipeline from another: class, latent space, and the names and sizes of all files."""
        listed = sorted(
            (path.relative_to(self.path).as_posix(), path.stat().st_size)
            for path in self.path.rglob("*")
            if path.suffix in (".safetensors", ".json") and ".cache" not in path.parts
        )
        files = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
        return {"class": self.class_name, "space": self.space.fingerprint, "files": files}


def read_folder(path: str) -> PipelineFolder:
    """Look at a pipeline's folder without reading weights. Raises ConfigError: there is none, or one that is not known."""
    folder = Path(path).expanduser()
    index = folder / INDEX
    if not index.is_file():
        raise ConfigError(
            f"pipeline={path} is no pipeline's folder ({index} is not there); save_pretrained writes one, and so does "
            "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir FOLDER"
        )
    try:
        content = json.loads(index.read_text())
        class_name = content["_class_name"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{index} cannot be read: {error}; download the pipeline again") from None
    import diffusers

    kind = getattr(diffusers, str(class_name), None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise ConfigError(f"{index} names {class_name}, which diffusers {diffusers.__version__} does not have")
    call = inspect.signature(kind.__call__).parameters
    defaults = {name: p.default for name, p in call.items() if name != "self" and p.kind is not p.VAR_KEYWORD}
    parts = tuple(name for name, value in content.items() if isinstance(value, list) and value[0])
    try:
        space = DiffusersVAE(DiffusersVAEConfig(path=str(folder), subfolder="vae"))
        space.require()
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"pipeline={path}: {error}") from None
    if space.layout.kind not in KINDS or "num_frames" not in defaults:
        raise ConfigError(
            f"pipeline={path} is a {class_name} over {space.layout.class_name}; video pipelines over AutoencoderKLWan and "
            "AutoencoderKLLTXVideo are supported"
        )
    return PipelineFolder(folder, class_name, parts, space, defaults)


def load_pipeline(
    folder: PipelineFolder, dtype: str, device: str, *, vae_dtype: str = "fp32", offload: bool = False
) -> Any:
    """The pipeline with its weights, on ``device``. Transformer and text encoder in ``dtype``; the image encoder in float32
    and so, by default, the autoencoder, as Wan's own examples and RefDecoder's protocol have it. ``offload``: parts are on the
    GPU only while they compute.

    Raises:
        ConfigError: files are missing or damaged.
    """
    import diffusers

    _require_packages(folder, offload)
    of_parts = {"vae": DTYPES[vae_dtype], "image_encoder": torch.float32}
    dtypes = {"default": DTYPES[dtype]} | {name: kind for name, kind in of_parts.items() if name in folder.parts}
    try:
        pipe = getattr(diffusers, folder.class_name).from_pretrained(folder.path, dtype=dtypes, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"pipeline={folder.path} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    pipe.set_progress_bar_config(disable=True)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def _require_packages(folder: PipelineFolder, offload: bool) -> None:
    """Raise ConfigError, naming the command, for packages that diffusers 0.42 asks for only when it is too late: accelerate
    to load Wan's transformer (and to offload), ftfy to read a prompt in Wan's image-to-video pipeline."""
    wanted = []
    if (offload or folder.space.layout.kind == "wan") and importlib.util.find_spec("accelerate") is None:
        wanted.append("accelerate")
    if folder.space.layout.kind == "wan" and folder.takes_image:
        from diffusers.pipelines.wan import pipeline_wan_i2v

        if not hasattr(pipeline_wan_i2v, "ftfy"):
            wanted.append("ftfy")
    if wanted:
        raise ConfigError(
            f"{folder.class_name} of diffusers needs {' and '.join(wanted)}: pip install {' '.join(wanted)}"
        )


def check_arguments(folder: PipelineFolder, given: dict[str, Any]) -> None:
    """Raise ConfigError for arguments that the pipeline's call does not have."""
    for name in given:
        if name not in folder.defaults:
            raise ConfigError(f"{folder.class_name} takes no {name}; leave it out")


def clip_size(folder: PipelineFolder, given: dict[str, Any]) -> tuple[int, int, int]:
    """(num_frames, height, width) of a call: as given, else the pipeline's defaults. Raises ConfigError: not such a clip."""
    t, h, w = ((given.get(name) or folder.defaults[name]) for name in ("num_frames", "height", "width"))
    if None in (t, h, w):
        raise ConfigError(f"{folder.class_name} has no default size: give num_frames, height and width")
    try:
        folder.space.check(t, h, w)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return t, h, w


def size_of_image(path: str, area: int, multiple: int) -> tuple[int, int]:
    """(height, width) with the image's aspect ratio and about ``area`` pixels, sides floored to multiples. Raises BadFile."""
    h, w = load_image(path).shape[1:3]
    scale = (area / (h * w)) ** 0.5
    height, width = (max(int(side * scale) // multiple, 1) * multiple for side in (h, w))
    return height, width


def resized(path: str, size: tuple[int, int]) -> Image.Image:
    """The image at (height, width) ``size`` by Lanczos, aspect ratio given up: what the pipeline sees and the decoder's
    reference. Raises BadFile."""
    frames: UInt8 = load_image(path)
    return Image.fromarray(frames[0]).resize((size[1], size[0]), Image.Resampling.LANCZOS)


def call_latents(pipe: Any, folder: PipelineFolder, given: dict[str, Any], seed: int) -> Float[Tensor, "c n y x"]:
    """One clip's latents as the pipeline would hand them to its autoencoder, normalised, on the CPU.

    The noise is drawn on the CPU, so that one seed gives one start on every device.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    latent = pipe(**given, generator=generator, output_type="latent", return_dict=False)[0]
    if folder.space.layout.kind == "ltx":  # returned as tokens
        t, h, w = clip_size(folder, given)
        space = folder.space
        sizes = (space.latent_frames(t), h // space.stride_hw, w // space.stride_hw)
        patches = (pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size)
        latent = pipe._unpack_latents(latent, *sizes, *patches)
    if latent.ndim != 5 or latent.shape[:2] != (1, folder.space.channels):
        raise BadFile(
            f"{folder.class_name} returned latents {tuple(latent.shape)}, not (1, {folder.space.channels}, n, y, x)"
        )
    return latent[0].detach().cpu()
