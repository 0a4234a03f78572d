"""Wan's weights by their other names: diffusers' folders, and the original release's checkpoint.

Our names follow our stages (``stages.up1.layers.0.conv1.weight``); a table of one line per kind of layer gives the
others. Norm gains are (c,) here and (c, 1, 1) or (c, 1, 1, 1) there.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from decoders.backbones.wan import LAYOUTS, WanConfig, WanDecoder, WanEncoder
from decoders.latent_spaces.diffusers_files import find_folder, find_weights, read_layout

#        ours             diffusers           original
PARTS = (
    ("norm1.gain",        "norm1.gamma",      "residual.0.gamma"),
    ("conv1",             "conv1",            "residual.2"),
    ("norm2.gain",        "norm2.gamma",      "residual.3.gamma"),
    ("conv2",             "conv2",            "residual.6"),
    ("skip",              "conv_shortcut",    "shortcut"),
    ("norm.gain",         "norm.gamma",       "norm.gamma"),
    ("qkv",               "to_qkv",           "to_qkv"),
    ("proj",              "proj",             "proj"),
    ("time_conv",         "time_conv",        "time_conv"),
    ("conv",              "resample.1",       "resample.1"),
)  # fmt: skip


def other_names(name: str, config: WanConfig, half: str) -> tuple[str, str]:
    """diffusers' and the original release's name of our parameter ``name`` of the ``half`` encoder or decoder."""
    stage, rest = re.fullmatch(r"stages\.(\w+)\.layers\.(.+)", name).groups()
    index, part = rest.split(".", 1)
    index = int(index)
    if stage == "conv_in":
        if half == "decoder" and index == 0:
            return f"post_quant_conv.{part}", f"conv2.{part}"
        return f"{half}.conv_in.{part}", f"{half}.conv1.{part}"
    if stage == "out":
        if half == "encoder" and index == 1:
            return f"quant_conv.{part}", f"conv1.{part}"
        if part.startswith("norm"):
            return f"{half}.norm_out.gamma", f"{half}.head.0.gamma"
        tail = part.removeprefix("conv.")
        return f"{half}.conv_out.{tail}", f"{half}.head.2.{tail}"
    theirs, original = _part(part)
    if stage == "mid":
        kind = "attentions.0" if index == 1 else f"resnets.{index // 2}"
        return f"{half}.mid_block.{kind}.{theirs}", f"{half}.middle.{index}.{original}"
    number = int(stage.lstrip("updown"))
    blocks = config.num_res_blocks + (half == "decoder")
    resample = index == blocks
    way, group = ("up", "upsamples") if half == "decoder" else ("down", "downsamples")
    if config.residual:
        where = f"{way}sampler" if resample else f"resnets.{index}"
        return f"{half}.{way}_blocks.{number}.{where}.{theirs}", f"{half}.{group}.{number}.{group}.{index}.{original}"
    flat = number * (blocks + 1) + index  # in Wan 2.1's release, and in diffusers' encoder, stages are not nested
    if half == "encoder":
        return f"encoder.down_blocks.{flat}.{theirs}", f"encoder.downsamples.{flat}.{original}"
    where = "upsamplers.0" if resample else f"resnets.{index}"
    return f"decoder.up_blocks.{number}.{where}.{theirs}", f"decoder.upsamples.{flat}.{original}"


def _part(part: str) -> tuple[str, str]:
    for ours, theirs, original in PARTS:
        if part == ours or part.startswith(f"{ours}."):
            return theirs + part[len(ours) :], original + part[len(ours) :]
    raise KeyError(part)


def fill(module: WanDecoder | WanEncoder, state: Mapping[str, Tensor], source: Path | str) -> Any:
    """Copy diffusers' or the original's weights into ``module``.

    Raises:
        ValueError: names that are missing, or of another shape, or of this half of the model and left over.
    """
    half = "decoder" if isinstance(module, WanDecoder) else "encoder"
    own = dict(module.named_parameters())
    kind = 0 if any(name.startswith(f"{half}.conv_in.") for name in state) else 1
    table = {name: other_names(name, module.config, half)[kind] for name in own}
    wrong = [f"{theirs} is missing" for theirs in table.values() if theirs not in state]
    top = ("decoder.", "post_quant_conv.", "conv2.") if half == "decoder" else ("encoder.", "quant_conv.", "conv1.")
    left = sorted(name for name in state.keys() - set(table.values()) if name.startswith(top))
    wrong += [f"{name} is left over" for name in left]
    for name, theirs in table.items():
        if theirs in state and state[theirs].numel() != own[name].numel():
            wrong.append(f"{theirs} is {tuple(state[theirs].shape)}, expected {tuple(own[name].shape)}")
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} weights do not fit this layout; {wrong[0]}")
    with torch.no_grad():
        for name, theirs in table.items():
            own[name].copy_(state[theirs].reshape(own[name].shape))
    return module


def to_diffusers(module: WanDecoder | WanEncoder) -> dict[str, Tensor]:
    """The weights of ``module`` as diffusers' AutoencoderKLWan names and shapes them."""
    half = "decoder" if isinstance(module, WanDecoder) else "encoder"
    state = {}
    for name, parameter in module.named_parameters():
        theirs, _ = other_names(name, module.config, half)
        ones = 0
        if theirs.endswith("gamma"):
            ones = 2 if ".attentions." in theirs else 3
        state[theirs] = parameter.detach().reshape(*parameter.shape, *(1,) * ones)
    return state


def read(path: str, subfolder: str | None = None) -> tuple[WanConfig, dict[str, Tensor]]:
    """Layout and weights from a diffusers folder, a hub id, or the original release's ``.pth`` file."""
    file = Path(path).expanduser()
    if file.suffix in (".pth", ".pt"):
        return _read_original(file)
    folder = find_folder(path, subfolder, download=True)
    if read_layout(folder).kind != "wan":
        raise ValueError(f"{folder / 'config.json'} is no Wan autoencoder")
    state: dict[str, Tensor] = {}
    for part in find_weights(folder, path):
        with safe_open(part, framework="pt") as tensors:
            state |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return config_of(json.loads((folder / "config.json").read_text())), state


def config_of(theirs: Mapping[str, Any]) -> WanConfig:
    """Our layout from the contents of diffusers' config.json."""
    if theirs.get("attn_scales"):
        raise ValueError("a Wan autoencoder with attention at full stages (attn_scales) is not supported")
    return WanConfig(
        dim=theirs.get("decoder_base_dim") or theirs["base_dim"],
        encoder_dim=theirs["base_dim"],
        dim_mult=tuple(theirs["dim_mult"]),
        num_res_blocks=theirs["num_res_blocks"],
        channels=theirs["z_dim"],
        temporal=tuple(theirs["temperal_downsample"]),  # spelt so there
        residual=bool(theirs.get("is_residual")),
        patch=theirs.get("patch_size") or 1,
        mean=list(theirs["latents_mean"]),
        std=list(theirs["latents_std"]),
    )


def to_config(config: WanConfig) -> dict[str, Any]:
    """The contents of a config.json that diffusers reads as this layout."""
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": config.encoder_dim or config.dim,
        "decoder_base_dim": config.dim,
        "dim_mult": list(config.dim_mult),
        "num_res_blocks": config.num_res_blocks,
        "z_dim": config.channels,
        "attn_scales": [],
        "temperal_downsample": list(config.temporal),
        "dropout": 0.0,
        "is_residual": config.residual,
        "in_channels": 3 * config.patch**2,
        "out_channels": 3 * config.patch**2,
        "patch_size": config.patch if config.patch > 1 else None,
        "scale_factor_temporal": config.stride_t,
        "scale_factor_spatial": config.stride_hw,
        "latents_mean": config.mean or [0.0] * config.channels,
        "latents_std": config.std or [1.0] * config.channels,
    }


def _read_original(file: Path) -> tuple[WanConfig, dict[str, Tensor]]:
    """The release's own pickle (tensors only) says nothing of its layout but the shapes of its weights."""
    if not file.is_file():
        raise FileNotFoundError(
            f"no file {file}; get Wan2.1_VAE.pth with `hf download Wan-AI/Wan2.1-T2V-1.3B Wan2.1_VAE.pth`"
        )
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    width = state["decoder.head.0.gamma"].shape[0] if "decoder.head.0.gamma" in state else None
    for config in LAYOUTS.values():
        if width == config.dim and state["conv2.weight"].shape[0] == config.channels:
            return config, state
    raise ValueError(f"{file} holds neither Wan 2.1's nor Wan 2.2's autoencoder by the names of the original release")


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> nn.Module:
    """Copy weights under our own names. Raises ValueError, naming the first difference."""
    own = dict(module.named_parameters())
    odd = sorted(own.keys() ^ state.keys())
    odd += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if odd:
        raise ValueError(f"{source}: {len(odd)} weights do not fit this layout; the first is {odd[0]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
    return module
