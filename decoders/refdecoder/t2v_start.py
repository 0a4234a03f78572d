"""Start the Transformer's blocks from Wan2.1-T2V-1.3B's first ones: self-attention and feed-forward layers fit as they are.

The paper trains blocks from scratch; the released training config loads these (README.md, conflicts). Names are those of
diffusers' WanTransformer3DModel or of the original release; both turn neighbouring pairs of dimensions, as we do.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from decoders.refdecoder.injection import JointAttention
from decoders.refdecoder.model import RefDecoderModel
from decoders.refdecoder.released import block_name

HUB_ID = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
FILES = "diffusion_pytorch_model*.safetensors"


def fill_blocks(model: RefDecoderModel, state: Mapping[str, Tensor], source: Path | str) -> RefDecoderModel:
    """Copy the first blocks of a Wan Transformer into the model's; with a set for each point, into every set.

    Raises:
        ValueError: the model has no blocks, or the Transformer's are missing or of another width.
    """
    _check(model)
    wrong, copies = [], []
    kind = 0 if any(".attn1." in name for name in state) else 1
    for blocks in model.injection.blocks:
        for name, parameter in blocks.named_parameters():
            number, part = name.split(".", 1)
            theirs = f"blocks.{number}.{block_name(part)[kind]}"
            if theirs not in state:
                wrong.append(f"{theirs} is missing")
            elif state[theirs].shape != parameter.shape:
                wrong.append(f"{theirs} is {tuple(state[theirs].shape)}, expected {tuple(parameter.shape)}")
            else:
                copies.append((parameter, state[theirs]))
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} weights do not fit the blocks; {wrong[0]}")
    with torch.no_grad():
        for parameter, tensor in copies:
            parameter.copy_(tensor)
    return model


def start_from_t2v(model: RefDecoderModel, path: str | Path = HUB_ID) -> RefDecoderModel:
    """Read the first blocks from a folder with the Transformer's safetensors, its parent, or a hub id, and copy them.

    Raises:
        FileNotFoundError: there are none; says how to get them.
        ValueError: as :func:`fill_blocks`.
    """
    _check(model)
    blocks = model.config.blocks
    state = {}
    for file in _find(str(path)):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                number = re.match(r"blocks\.(\d+)\.(attn1|self_attn|ffn)\.", name)
                if number and int(number[1]) < blocks:
                    state[name] = tensors.get_tensor(name)
    return fill_blocks(model, state, path)


def _check(model: RefDecoderModel) -> None:
    if not isinstance(model.injection, JointAttention):
        raise ValueError(f"decoder.inject={model.config.inject} has no Transformer blocks to start")


def _find(path: str) -> list[Path]:
    folder = Path(path).expanduser()
    for root in (folder, *(_snapshots(path) if not folder.exists() else ())):
        for place in (root / "transformer", root):
            if files := sorted(place.glob(FILES)):
                return files
    raise FileNotFoundError(
        f"no {FILES} in {path} or its folder transformer; get them with `hf download {HUB_ID} --include 'transformer/*'` "
        "and give the folder, or the hub id"
    )


def _snapshots(repository: str) -> Iterator[Path]:
    """The hub's folder: from its cache, then from the hub."""
    from huggingface_hub import snapshot_download

    patterns = [f"transformer/{FILES}", FILES]
    for offline in (True, False):
        try:
            yield Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=offline, etag_timeout=5))
        except (OSError, ValueError):  # the hub's own errors derive from these
            continue
