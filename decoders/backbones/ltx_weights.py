"""LTX-Video's decoder weights by diffusers' names, which are also those of the released Flash-VAED student.

Names follow from the modules: see :func:`other_names`. No tensor changes shape. What a timestep-conditioned release
computes from timestep 0 is folded into one table per block when it is read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from decoders.backbones.ltx import LTXConfig, LTXDecoder
from decoders.backbones.ltx_layers import EdgeConv3d, ResBlock, Upsample
from decoders.latent_spaces.diffusers_files import find_folder, find_weights, read_layout

#        ours          diffusers
PARTS = {
    "skip_norm":  "norm3",
    "skip":       "conv_shortcut",
    "modulation": "scale_shift_table",
    "noise1":     "per_channel_scale1",
    "noise2":     "per_channel_scale2",
}  # fmt: skip
STATISTICS = ("latents_mean", "latents_std")
EMBEDDER = "time_embedder.timestep_embedder"


def other_names(decoder: LTXDecoder) -> dict[str, str]:
    """diffusers' name of every parameter of ``decoder``, by ours. Dense convolutions there have a module around them."""
    table = {}
    for name, _ in decoder.named_parameters():
        _, stage, _, index, part = name.split(".", 4)
        where = _layer(decoder, stage, int(index))
        path, _, leaf = f"{index}.{part}".rpartition(".")
        owner = decoder.stages[stage].layers.get_submodule(path)
        pieces = [PARTS.get(piece, piece) for piece in path.split(".")[1:]]
        if stage == "out" and pieces:  # the head's convolution has a name of its own there
            pieces, where = pieces[1:], "decoder.conv_out"
        if isinstance(owner, EdgeConv3d) and not path.endswith("depthwise"):
            pieces.append("conv")
        table[name] = ".".join((where, *pieces, PARTS.get(leaf, leaf)))
    return table


def _layer(decoder: LTXDecoder, stage: str, index: int) -> str:
    """Where diffusers has layer ``index`` of ``stage``."""
    if stage in ("conv_in", "out"):
        return "decoder.conv_in" if stage == "conv_in" else "decoder"
    block = "decoder.mid_block" if stage == "mid" else f"decoder.up_blocks.{stage.removeprefix('up')}"
    layers = decoder.stages[stage].layers
    if isinstance(layers[index], Upsample):
        return f"{block}.upsamplers.0"
    blocks = [i for i, layer in enumerate(layers) if isinstance(layer, ResBlock)]
    number = blocks.index(index) - (len(blocks) - decoder.config.blocks[decoder.config.stages.index(stage)])
    return f"{block}.resnets.{number}" if number >= 0 else f"{block}.conv_in"


def from_diffusers(
    decoder: LTXDecoder, state: Mapping[str, Tensor], source: str | Path = "these weights"
) -> dict[str, Tensor]:
    """What ``decoder.load_state_dict`` takes, from diffusers' names. The encoder and the statistics are passed over.

    Raises:
        ValueError: names that are missing or left over, or tensors of another shape; ``source`` is named.
    """
    table, own = other_names(decoder), decoder.state_dict()
    wrong = [f"{theirs} is missing" for theirs in table.values() if theirs not in state]
    passed_over = (*table.values(), *STATISTICS)
    left = sorted(name for name in state.keys() - {*passed_over} if not name.startswith("encoder."))
    wrong += [f"{name} is left over" for name in left]
    for name, theirs in table.items():
        if theirs in state and state[theirs].shape != own[name].shape:
            wrong.append(f"{theirs} is {tuple(state[theirs].shape)}, expected {tuple(own[name].shape)}")
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} weights do not fit this layout; {wrong[0]}")
    return {name: state[theirs] for name, theirs in table.items()}


def to_diffusers(decoder: LTXDecoder) -> dict[str, Tensor]:
    """The decoder's weights and the latents' statistics as diffusers' AutoencoderKLLTXVideo names them.

    A scaling factor that the statistics came with is in the deviation, so it is 1 there.

    Raises:
        ValueError: the decoder is a timestep-conditioned one. Its time embedding was folded and is not there any more.
    """
    if decoder.config.modulated:
        raise ValueError("a timestep-conditioned decoder has its time embedding folded and cannot be named as before")
    own = decoder.state_dict()
    state = {theirs: own[name] for name, theirs in other_names(decoder).items()}
    statistics = (decoder.latent_mean, decoder.latent_std)
    return state | {name: values.flatten().clone() for name, values in zip(STATISTICS, statistics, strict=True)}


def fill(decoder: LTXDecoder, state: Mapping[str, Tensor], source: str | Path = "these weights") -> LTXDecoder:
    """Copy weights by diffusers' names into ``decoder``. Raises ValueError as :func:`from_diffusers`."""
    decoder.load_state_dict(from_diffusers(decoder, state, source))
    return decoder


def read(path: str, subfolder: str | None = None) -> tuple[LTXConfig, dict[str, Tensor]]:
    """Layout, statistics and the decoder's weights, by diffusers' names, from a diffusers folder or a hub id."""
    folder = find_folder(path, subfolder, download=True)
    if read_layout(folder).kind != "ltx":
        raise ValueError(f"{folder / 'config.json'} is no LTX-Video autoencoder")
    state: dict[str, Tensor] = {}
    for part in find_weights(folder, path):
        with safe_open(part, framework="pt") as tensors:
            names = [name for name in tensors.keys() if not name.startswith("encoder.")]  # noqa: SIM118
            state |= {name: tensors.get_tensor(name) for name in names}
    if missing := [name for name in STATISTICS if name not in state]:
        raise ValueError(
            f"{folder}: {missing[0]} is missing from the weights; without it latents cannot be denormalised"
        )
    theirs = json.loads((folder / "config.json").read_text())
    mean, std = (state.pop(name).float() for name in STATISTICS)
    std = std / theirs.get("scaling_factor", 1.0)
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise ValueError(f"{folder}: latents_mean and latents_std must be finite, and latents_std above zero")
    config = config_of(theirs, mean.tolist(), std.tolist())
    return config, fold_timestep_zero(state, config, folder) if config.modulated else state


def config_of(theirs: Mapping[str, Any], mean: list[float] | None = None, std: list[float] | None = None) -> LTXConfig:
    """Our layout from the contents of diffusers' config.json, which runs against the decoding order.

    What is absent is as in the first release, whatever the encoder's entries say: so diffusers reads it.

    Raises:
        ValueError: a layout that cannot be decoded here.
    """
    if theirs.get("patch_size_t", 1) != 1 or theirs.get("out_channels", 3) != 3:
        raise ValueError("an LTX decoder that folds frames into channels, or gives something other than RGB")
    ours = LTXConfig()

    def backwards(name: str, default: tuple) -> tuple:
        return tuple(reversed(theirs[name])) if theirs.get(name) is not None else default

    outer = backwards("decoder_block_out_channels", ours.widths[1:])
    factors = backwards("upsample_factor", (1,) * len(outer))
    if len(factors) < len(outer):
        raise ValueError(f"upsample_factor has {len(factors)} entries for {len(outer)} stages")
    widths = (outer[0], *(width // factor for width, factor in zip(outer, factors, strict=False)))
    return LTXConfig(
        channels=theirs.get("latent_channels", ours.channels),
        widths=widths,
        blocks=backwards("decoder_layers_per_block", ours.blocks),
        upsample=backwards("decoder_spatio_temporal_scaling", (False, True, True, True)),
        factors=factors,
        residual=backwards("upsample_residual", (False,) * len(outer)),
        noise=backwards("decoder_inject_noise", (False,) * len(widths)),
        modulated=theirs.get("timestep_conditioning", False),
        patch=theirs.get("patch_size", ours.patch),
        eps=theirs.get("resnet_norm_eps", ours.eps),
        causal=theirs.get("decoder_causal", ours.causal),
        mean=mean,
        std=std,
    )


def fold_timestep_zero(state: Mapping[str, Tensor], config: LTXConfig, source: str | Path) -> dict[str, Tensor]:
    """diffusers' names without the time embeddings: at timestep 0 each is a constant, added to its blocks' tables.

    The embedding of 0 is 128 ones (cosines) and 128 zeros (sines), whatever the timestep is multiplied by.
    """
    state = {name: tensor for name, tensor in state.items() if name != "decoder.timestep_scale_multiplier"}
    wave = torch.cat([torch.ones(128), torch.zeros(128)])
    blocks = ("mid_block.", *(f"up_blocks.{number}." for number in range(len(config.widths) - 1)), "")
    for block in (f"decoder.{name}" for name in blocks):
        names = [f"{block}{EMBEDDER}.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")]
        if missing := [name for name in names if name not in state]:
            raise ValueError(f"{source}: {missing[0]} is missing; config.json says the decoder has a timestep")
        weight1, bias1, weight2, bias2 = (state.pop(name).float() for name in names)
        embedding = F.linear(F.silu(F.linear(wave, weight1, bias1)), weight2, bias2)
        inside = [name for name in state if name.startswith(block) and name.endswith("scale_shift_table")]
        for name in inside if block != "decoder." else ["decoder.scale_shift_table"]:
            if name not in state:
                raise ValueError(f"{source}: {name} is missing; config.json says the decoder has a timestep")
            state[name] = state[name].float() + embedding.view(state[name].shape)
    return state
