"""The checkpoint that the method's authors released for Wan 2.1, under their names (Arrokothwhi/RefDecoder).

``I2V_Wan2.1/model.pt`` holds an autoencoder under ``ae.`` and the Transformer under ``transformer.``. Its encoder and its
losses are none of ours. A patch embedding is a convolution there and a linear map of a patch here, with the channels last.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from decoders.backbones.wan import WanDecoder
from decoders.backbones.wan_weights import other_names
from decoders.refdecoder.injection import JointAttention
from decoders.refdecoder.model import RefDecoderConfig, RefDecoderModel

#       ours           diffusers                original
BLOCK = (
    ("q",            "attn1.to_q",            "self_attn.q"),
    ("k",            "attn1.to_k",            "self_attn.k"),
    ("v",            "attn1.to_v",            "self_attn.v"),
    ("out",          "attn1.to_out.0",        "self_attn.o"),
    ("q_norm.gain",  "attn1.norm_q.weight",   "self_attn.norm_q.weight"),
    ("k_norm.gain",  "attn1.norm_k.weight",   "self_attn.norm_k.weight"),
    ("up",           "ffn.net.0.proj",        "ffn.0"),
    ("down",         "ffn.net.2",             "ffn.2"),
)  # fmt: skip
ENCODER = {
    "encoder.conv.weight": "ae.decoder.ref_conv_in.proj.weight",
    "encoder.conv.bias": "ae.decoder.ref_conv_in.proj.bias",
    "encoder.norm.gain": "ae.decoder.ref_conv_in.norm.gamma",
}
NOT_OURS = ("ae.encoder.", "ae.quant_conv.", "loss.", "loss_fn.")
WRAPPERS = ("_forward_module.", "_orig_mod.")  # left in names by DeepSpeed and torch.compile
HOW_TO_GET = "`hf download Arrokothwhi/RefDecoder I2V_Wan2.1/model.pt`"


def block_name(part: str) -> tuple[str, str]:
    """diffusers' and the original Wan Transformer's name of a parameter of a block, by ours (``q.weight``)."""
    for ours, diffusers, original in BLOCK:
        if part == ours or part.startswith(f"{ours}."):
            return diffusers + part[len(ours) :], original + part[len(ours) :]
    raise KeyError(part)


def released_name(name: str, model: RefDecoderModel) -> str:
    """The released name of our weight ``name``."""
    if name in ENCODER:
        return ENCODER[name]
    if name.startswith("backbone."):
        theirs, _ = other_names(name.removeprefix("backbone."), model.backbone.config, "decoder")
        return f"ae.{theirs}"
    if gate := re.fullmatch(r"injection\.gates\.(\d+)\.(embed|project)\.(\w+)", name):
        number, way, part = gate.groups()
        return f"transformer.{'patch_embeddings' if way == 'embed' else 'proj_outs'}.{number}.{part}"
    of, number, part = re.fullmatch(r"injection\.blocks\.(\d+)\.(\d+)\.(.+)", name).groups()
    number = int(of) * model.config.blocks + int(number)  # the points' own blocks stand one after another
    return f"transformer.transformer.blocks.{number}.{block_name(part)[0]}"


def to_released(model: RefDecoderModel) -> dict[str, Tensor]:
    """The weights under the released names and in the released shapes, as the authors' code loads them."""
    _check(model)
    state = {}
    for name, tensor in model.state_dict().items():
        theirs = released_name(name, model)
        if theirs.endswith("gamma"):
            images = ".attentions." in theirs or ".ref_conv_in." in theirs
            tensor = tensor.reshape(-1, *(1,) * (2 if images else 3))
        elif ".patch_embeddings." in theirs and tensor.ndim == 2:
            patch = _patch(name, model)
            tensor = tensor.unflatten(1, (patch, patch, -1)).permute(0, 3, 1, 2).unsqueeze(2)
        state[theirs] = tensor.contiguous()
    return state


def fill_released(model: RefDecoderModel, state: Mapping[str, Tensor], source: Path | str) -> RefDecoderModel:
    """Copy released weights into a model of the released structure.

    Raises:
        ValueError: names that are missing or left over, or shapes that differ.
    """
    _check(model)
    state = {_clean(name): tensor for name, tensor in state.items()}
    weights = model.state_dict()
    own = {released_name(name, model): name for name in weights}
    theirs = {name for name in state if not name.startswith(NOT_OURS)}
    wrong = [f"{name} is missing" for name in sorted(own.keys() - theirs)]
    wrong += [f"{name} is left over" for name in sorted(theirs - own.keys())]
    expected = {name: tensor.shape for name, tensor in to_released(model).items()}
    wrong += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(expected[name])}"
        for name in sorted(theirs & own.keys())
        if state[name].shape != expected[name]
    ]
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} weights do not fit this RefDecoder; {wrong[0]}")
    with torch.no_grad():
        for name, ours in own.items():
            tensor = state[name]
            if ".patch_embeddings." in name and tensor.ndim == 5:
                tensor = tensor.squeeze(2).permute(0, 2, 3, 1)
            weights[ours].copy_(tensor.reshape(weights[ours].shape))
    return model


def read_released(path: str | Path) -> tuple[dict[str, Tensor], int]:
    """The file's tensors, by memory map, and how many Transformer blocks it has.

    Raises:
        FileNotFoundError: there is no such file; says where it comes from.
        ValueError: it holds something else.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; get it with {HOW_TO_GET}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds more than tensors, so it is not read; get it with {HOW_TO_GET}") from error
    state = state.get("state_dict", state.get("module", state))
    numbers = [re.search(r"transformer\.blocks\.(\d+)\.", name) for name in state]
    blocks = 1 + max((int(number[1]) for number in numbers if number), default=-1)
    if not blocks:
        raise ValueError(f"{file} holds no Transformer blocks, so it is no RefDecoder; get one with {HOW_TO_GET}")
    return state, blocks


def from_released(path: str | Path) -> RefDecoderModel:
    """The released decoder of Wan 2.1, float32, frozen; as many blocks as the file holds. Raises as :func:`read_released`."""
    state, blocks = read_released(path)
    model = RefDecoderModel(RefDecoderConfig(blocks=blocks), channels=16, stride_t=4, stride_hw=8)
    return fill_released(model, state, path).requires_grad_(False).eval()


def _clean(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    name = name.removeprefix("model.")
    return f"ae.{name.removeprefix('vae.')}" if name.startswith("vae.") else name


def _patch(name: str, model: RefDecoderModel) -> int:
    return model.injection.gates[int(name.split(".")[2])].patch


def _check(model: RefDecoderModel) -> None:
    if not isinstance(model.backbone, WanDecoder) or not isinstance(model.injection, JointAttention):
        raise ValueError(
            f"decoder.layout={model.config.layout} with inject={model.config.inject} has no released names: they are of a "
            "Wan decoder with attention"
        )
    if model.config.points is not None or model.config.point_norms != "layout":
        raise ValueError(
            "decoder.points and point_norms are ours: what they add has no released names; leave both as they are"
        )
