"""Where a diffusers autoencoder is on disk or on the hub, and what its config.json says about shapes."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
EXAMPLES = {
    "Wan 2.1": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan 2.2": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "LTX-Video": "Lightricks/LTX-Video",
    "LTX-2": "Lightricks/LTX-2",
    "HunyuanVideo": "hunyuanvideo-community/HunyuanVideo",
    "HunyuanVideo 1.5": "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
    "Cosmos": "nvidia/Cosmos-1.0-Diffusion-7B-Text2World",
    "CogVideoX": "THUDM/CogVideoX-5b",
    "Mochi": "genmo/mochi-1-preview",
}


@dataclass(frozen=True)
class VAELayout:
    """What a decoder must know of an autoencoder before its weights are read."""

    class_name: str
    kind: str  # wan, ltx, ...: see READERS
    channels: int
    stride_t: int
    stride_hw: int
    causal: bool = True  # an image is a clip of one frame; else a clip is a multiple of ``step``
    step: int | None = None  # frames from one length that it encodes and decodes to the next; None: ``stride_t``

    @property
    def frame_step(self) -> int:
        return self.step or self.stride_t


def find_folder(path: str, subfolder: str | None, *, download: bool) -> Path:
    """The folder with ``config.json``: ``path`` or its ``vae`` (or ``subfolder``), else the same in the hub's cache.

    Args:
        path: a folder, or a hub id.
        subfolder: where in it; None tries the folder itself and ``vae``.
        download: also ask the hub, for the autoencoder's own files only.

    Raises:
        FileNotFoundError: says everywhere it was looked for, and the command that gets it.
    """
    subfolders = ["", "vae"] if subfolder is None else [subfolder]
    local = Path(path).expanduser()
    looked = [str(local / sub / "config.json") for sub in subfolders]
    found = _with_config(local, subfolders)
    if found:
        return found
    if HUB_ID.fullmatch(path) and not local.exists():
        looked.append("the hub's cache")
        snapshot, reason = _hub_snapshot(path, subfolders, online=False)
        if not _complete(snapshot, subfolders) and download:
            online, reason = _hub_snapshot(path, subfolders, online=True)
            snapshot = online or snapshot
            looked.append(f"the hub ({reason})" if reason else "the hub")
        found = snapshot and _with_config(snapshot, subfolders)
        if found:
            return found
    raise FileNotFoundError(f"no autoencoder at {path}: looked for {', '.join(looked)}. {_how_to_get(path)}")


def find_weights(folder: Path, path: str) -> list[Path]:
    """The safetensors in ``folder``. Raises FileNotFoundError, with the command that gets them."""
    weights = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not weights:
        missing = folder / "diffusion_pytorch_model.safetensors"
        raise FileNotFoundError(f"{missing} is missing beside config.json. {_how_to_get(path)}")
    return weights


def read_layout(folder: Path) -> VAELayout:
    """Channels and strides from ``folder``'s config.json, without reading weights or importing diffusers.

    Raises:
        ValueError: another kind of model, or a layout whose frames do not follow the causal rule.
    """
    config = json.loads((folder / "config.json").read_text())
    class_name = config.get("_class_name")
    if class_name not in READERS:
        raise ValueError(f"{folder / 'config.json'} is a {class_name}; supported are {', '.join(READERS)}")
    try:
        return READERS[class_name](config)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} has no {error}; save it again with a current diffusers") from None


def _wan_layout(config: dict[str, Any]) -> VAELayout:
    stride_t = 2 ** sum(map(bool, config["temperal_downsample"]))  # spelt so in diffusers
    stride_hw = 2 ** (len(config["dim_mult"]) - 1) * (config.get("patch_size") or 1)
    if stride_t != 4:
        raise ValueError(f"a Wan autoencoder of temporal stride {stride_t}; diffusers encodes Wan in steps of 4 frames")
    return VAELayout("AutoencoderKLWan", "wan", config["z_dim"], stride_t, stride_hw)


def _ltx_layout(config: dict[str, Any]) -> VAELayout:
    scaled = config["spatio_temporal_scaling"]
    types = config.get("downsample_type") or ["conv"] * len(scaled)
    if config.get("down_block_types", ["LTXVideoDownBlock3D"])[-1] == "LTXVideoDownBlock3D":
        types = ["conv"] * len(scaled)  # the first release's blocks know no other
    in_time = sum(s and t in ("conv", "temporal", "spatiotemporal") for s, t in zip(scaled, types, strict=False))
    in_space = sum(s and t in ("conv", "spatial", "spatiotemporal") for s, t in zip(scaled, types, strict=False))
    if not config.get("encoder_causal", True) or config.get("patch_size_t", 1) != 1:
        raise ValueError("an LTX encoder that is not causal or patchifies time: the first frame has no latent")
    return VAELayout(
        "AutoencoderKLLTXVideo", "ltx", config["latent_channels"], 2**in_time, config["patch_size"] * 2**in_space
    )


def _ltx2_layout(config: dict[str, Any]) -> VAELayout:
    scaled, types = config["spatio_temporal_scaling"], config["downsample_type"]
    if isinstance(scaled, bool):
        scaled = [scaled] * (len(config["layers_per_block"]) - 1)
    in_time = sum(s and t in ("temporal", "spatiotemporal") for s, t in zip(scaled, types, strict=False))
    in_space = sum(s and t in ("spatial", "spatiotemporal") for s, t in zip(scaled, types, strict=False))
    if not config.get("encoder_causal", True) or config.get("patch_size_t", 1) != 1:
        raise ValueError("an LTX-2 encoder that is not causal or patchifies time: the first frame has no latent")
    stride_hw = config["patch_size"] * 2**in_space
    return VAELayout("AutoencoderKLLTX2Video", "ltx2", config["latent_channels"], 2**in_time, stride_hw)


def _ratios(class_name: str, kind: str) -> Callable[[dict[str, Any]], VAELayout]:
    """A reader of a config.json that says both ratios itself."""

    def read(config: dict[str, Any]) -> VAELayout:
        strides = (config["temporal_compression_ratio"], config["spatial_compression_ratio"])
        return VAELayout(class_name, kind, config["latent_channels"], *map(int, strides))

    return read


def _cogvideox_layout(config: dict[str, Any]) -> VAELayout:
    # diffusers decodes two latent frames at a time and puts the odd one first: of an even number it makes frames that were
    # never encoded, so only odd numbers go there and back.
    stride_t, stride_hw = int(config["temporal_compression_ratio"]), 2 ** (len(config["block_out_channels"]) - 1)
    channels = config["latent_channels"]
    return VAELayout("AutoencoderKLCogVideoX", "cogvideox", channels, stride_t, stride_hw, step=2 * stride_t)


def _mochi_layout(config: dict[str, Any]) -> VAELayout:
    strides = (prod(config["temporal_expansions"]), prod(config["spatial_expansions"]))
    return VAELayout("AutoencoderKLMochi", "mochi", config["latent_channels"], *strides)


def _vidtok_layout(config: dict[str, Any]) -> VAELayout:
    halvings = len(config["ch_mult"]) - 1
    in_time = 2 if config.get("tempo_ds") is None else len(config["tempo_ds"])
    in_space = halvings if config.get("spatial_ds") is None else len(config["spatial_ds"])
    causal = bool(config.get("is_causal", True))
    # What is not causal is decoded 16 frames at a time, and what does not fill them is dropped.
    step = None if causal else 16
    return VAELayout("AutoencoderVidTok", "vidtok", config["z_channels"], 2**in_time, 2**in_space, causal, step)


READERS: dict[str, Callable[[dict[str, Any]], VAELayout]] = {
    "AutoencoderKLWan": _wan_layout,
    "AutoencoderKLLTXVideo": _ltx_layout,
    "AutoencoderKLLTX2Video": _ltx2_layout,
    "AutoencoderKLHunyuanVideo": _ratios("AutoencoderKLHunyuanVideo", "hunyuanvideo"),
    "AutoencoderKLHunyuanVideo15": _ratios("AutoencoderKLHunyuanVideo15", "hunyuanvideo15"),
    "AutoencoderKLCosmos": _ratios("AutoencoderKLCosmos", "cosmos"),
    "AutoencoderKLCogVideoX": _cogvideox_layout,
    "AutoencoderKLMochi": _mochi_layout,
    "AutoencoderVidTok": _vidtok_layout,
}


def _with_config(root: Path, subfolders: list[str]) -> Path | None:
    return next((root / sub for sub in subfolders if (root / sub / "config.json").is_file()), None)


def _complete(snapshot: Path | None, subfolders: list[str]) -> bool:
    folder = snapshot and _with_config(snapshot, subfolders)
    return bool(folder and any(folder.glob("*.safetensors")))


def _hub_snapshot(repository: str, subfolders: list[str], *, online: bool) -> tuple[Path | None, str]:
    """A snapshot's folder, or None and one line that says why not."""
    from huggingface_hub import snapshot_download

    # A file pattern without a slash would match every folder's; the root's own files are asked for by name.
    root = ["config.json", "diffusion_pytorch_model*.safetensors"]
    patterns = [f"{sub}/{name}".lstrip("/") for sub in subfolders for name in (*root, f"{root[1]}.index.json")]
    try:
        folder = snapshot_download(repository, allow_patterns=patterns, local_files_only=not online, etag_timeout=5)
    except (OSError, ValueError) as error:  # the hub's own errors derive from these
        return None, str(error).strip().splitlines()[0]
    return Path(folder), ""


def _how_to_get(path: str) -> str:
    known = next((hub_id for hub_id in EXAMPLES.values() if hub_id.lower() == path.lower()), None)
    if known or HUB_ID.fullmatch(path):
        return f"Get it with `hf download {known or path} --include 'vae/*'`, or set path to a folder that has it."
    names = " or ".join(f"{hub_id} ({name})" for name, hub_id in EXAMPLES.items())
    return f"Get one with `hf download ID --include 'vae/*' --local-dir {path}`, with ID {names}."
