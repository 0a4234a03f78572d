"""VideoVAE+'s weights by the release's names.

Our names follow our stages (``stages.level1.layers.0.conv1.weight``). Convolutions of single frames are (o, i, k, k) here
and (o, i, 1, k, k) there; attention's linear layers are 1 x 1 convolutions there. The release has a convolution across
frames for the shortcut of every block, and runs it only where the width changes: the others are not kept.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from decoders.backbones.videovaeplus import VideoVAEPlusConfig, VideoVAEPlusDecoder, VideoVAEPlusEncoder

#          ours         the release
PARTS = (
    ("time1",      "conv1_tmp"),
    ("time2",      "conv2_tmp"),
    ("skip_time",  "conv3_tmp"),
    ("skip",       "nin_shortcut"),
    ("proj",       "proj_out"),
    ("keys",       "relative_position_k.embeddings_table"),
    ("values",     "relative_position_v.embeddings_table"),
)  # fmt: skip
MID = ("block_1", "attn_1", "attn_1_tmp", "block_2")
HOW_TO_GET = (
    "sota-16z of github.com/VideoVerses/VideoVAEPlus (its README links to "
    "drive.google.com/file/d/13v2Pq6dG1jo7RNImxNOXr9-WizgMiJ7M; that repository's licence is CC BY-NC-ND 4.0)"
)
NORM_GROUPS = 32  # what weights do not tell: of all releases


def released_name(name: str, config: VideoVAEPlusConfig, half: str) -> str:
    """The release's name of our parameter ``name`` of the ``half`` encoder or decoder."""
    stage, index, part = re.fullmatch(r"stages\.(\w+)\.layers\.(\d+)\.(.+)", name).groups()
    if stage == "temporal":
        return _temporal_name(int(index), part, config, half)
    head, _, tail = part.partition(".")
    part = f"{dict(PARTS).get(head, head)}.{tail}".rstrip(".")
    if stage == "conv_in":
        return f"{half}.conv_in.{part}"
    if stage == "out":
        return f"{half}.{head}_out.{tail}"
    if stage == "mid":
        return f"{half}.mid.{MID[int(index)]}.{part}"
    way, blocks = ("up", config.num_res_blocks + 1) if half == "decoder" else ("down", config.num_res_blocks)
    where = f"block.{index}" if int(index) < blocks else f"{way}sample"
    return f"{half}.{way}.{stage.removeprefix('level')}.{where}.{part}"


def _temporal_name(index: int, part: str, config: VideoVAEPlusConfig, half: str) -> str:
    """The same in the temporal part: a convolution, groups of layers, and the end."""
    top, group = f"{half}_temporal", ("up", "res1", "res2") if half == "decoder" else ("down", "res")
    nested = re.sub(r"^(conv\d)\.", r"\1.conv.", part)  # padding is a layer of its own there, around the convolution
    number, layer = divmod(index - 1, len(group))
    if index == 0:
        return f"{top}.conv_in.conv.{part}"
    if number == config.num_halvings:
        if half == "decoder":
            return f"{top}.conv_last.conv.{part}"
        head, tail = part.split(".")
        return f"{top}.final_block.{'0' if head == 'norm' else '2.conv'}.{tail}"
    kind = group[layer]
    inner = f"conv.{part}" if kind == "down" else part if kind == "up" else nested
    return f"{top}.mid_blocks.{number}.{kind}.{inner}"


def fill(module: VideoVAEPlusDecoder | VideoVAEPlusEncoder, state: Mapping[str, Tensor], source: Path | str) -> Any:
    """Copy the release's weights into ``module``.

    Raises:
        ValueError: names that are missing, or of another shape, or of this half of the model and left over.
    """
    half = _half(module)
    own = dict(module.named_parameters())
    table = {name: released_name(name, module.config, half) for name in own}
    wrong = [f"{theirs} is missing" for theirs in table.values() if theirs not in state]
    top = (f"{half}.", f"{half}_temporal.")
    left = sorted(name for name in state.keys() - set(table.values()) if name.startswith(top))
    wrong += [f"{name} is left over" for name in left if ".conv3_tmp." not in name]
    for name, theirs in table.items():
        if theirs in state and _squeezed(state[theirs].shape) != _squeezed(own[name].shape):
            wrong.append(f"{theirs} is {tuple(state[theirs].shape)}, expected {tuple(own[name].shape)}")
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} weights do not fit this layout; {wrong[0]}")
    with torch.no_grad():
        for name, theirs in table.items():
            own[name].copy_(state[theirs].reshape(own[name].shape))
    return module


def to_released(module: VideoVAEPlusDecoder | VideoVAEPlusEncoder) -> dict[str, Tensor]:
    """The weights of ``module`` as the release names and shapes them, without the convolutions that it never runs."""
    state = {}
    for name, parameter in module.named_parameters():
        theirs, weight = released_name(name, module.config, _half(module)), parameter.detach()
        if weight.ndim == 4:
            weight = weight.unsqueeze(2)
        elif weight.ndim == 2 and theirs.endswith(".weight"):
            weight = weight.reshape(*weight.shape, *(1,) * (1 if ".attn_1_tmp." in theirs else 3))
        state[theirs] = weight
    return state


def read(path: str | Path) -> tuple[VideoVAEPlusConfig, dict[str, Tensor]]:
    """Layout and weights from the release's checkpoint (a pickle, read for its tensors only), or from safetensors.

    Raises:
        FileNotFoundError: there is no such file; says how to get it.
        ValueError: the file cannot be read that way, or holds something else.
    """
    file = find_file(path)
    if file.suffix == ".safetensors":
        state = load_file(file)
    else:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{file} holds more than tensors, which is not read here. If you trust it, keep its weights alone: "
                f"safetensors.torch.save_file(torch.load(..., weights_only=False)['state_dict'], 'x.safetensors')"
            ) from error
        state = state.get("state_dict", state)
    return config_of(state, file), state


def find_file(path: str | Path) -> Path:
    """``path`` as a file. Raises FileNotFoundError, which says how to get it."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; get {HOW_TO_GET} and put it there")
    return file


def config_of(state: Mapping[str, Tensor], source: str | Path) -> VideoVAEPlusConfig:
    """Our layout from the shapes of the release's weights.

    Raises:
        ValueError: they are not those of a VideoVAE+ autoencoder.
    """
    needed = {
        "first": "encoder.conv_in.weight",
        "latents": "decoder.conv_in.weight",
        "time": "encoder_temporal.conv_in.conv.weight",
        "table": "decoder.mid.attn_1_tmp.relative_position_k.embeddings_table",
    }
    if missing := [name for name in needed.values() if name not in state]:
        raise ValueError(f"{source} is no VideoVAE+ autoencoder: {missing[0]} is missing")
    shapes = {key: state[name].shape for key, name in needed.items()}
    dim, levels = shapes["first"][0], _count(state, r"encoder\.down\.(\d+)\.")
    return VideoVAEPlusConfig(
        dim=dim,
        dim_mult=tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // dim for i in range(levels)),
        num_res_blocks=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        channels=shapes["latents"][1],
        temporal_dim=shapes["time"][0],
        num_halvings=_count(state, r"encoder_temporal\.mid_blocks\.(\d+)\."),
        groups=NORM_GROUPS,
        max_distance=(shapes["table"][0] - 1) // 2,
    )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for name in state if (found := re.match(pattern, name))})


def _half(module: VideoVAEPlusDecoder | VideoVAEPlusEncoder) -> str:
    return "decoder" if isinstance(module, VideoVAEPlusDecoder) else "encoder"


def _squeezed(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]
