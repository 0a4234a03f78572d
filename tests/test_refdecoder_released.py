"""RefDecoder's weights by other names: the authors' checkpoint, and a diffusion Transformer's first blocks."""

from functools import partial
from pathlib import Path

import pytest
import torch
from refdecoder_small import SMALL, small
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from decoders.refdecoder import released, t2v_start
from decoders.refdecoder.model import RefDecoderConfig, build_model


@pytest.mark.parametrize("shared", [True, False])
def test_released_names(shared):
    """Both ways and exact; with the prefixes that trainers leave, and with what is none of ours."""
    torch.manual_seed(0)
    model, other = small(shared=shared).float(), small(shared=shared).float()
    state = released.to_released(model)
    assert len(state) == len(model.state_dict())
    assert {
        "ae.post_quant_conv.weight": (4, 4, 1, 1, 1),
        "ae.decoder.conv_in.weight": (32, 4, 3, 3, 3),
        "ae.decoder.mid_block.attentions.0.to_qkv.weight": (96, 32, 1, 1),
        "ae.decoder.mid_block.attentions.0.norm.gamma": (32, 1, 1),
        "ae.decoder.up_blocks.1.upsamplers.0.time_conv.bias": (64,),
        "ae.decoder.norm_out.gamma": (8, 1, 1, 1),
        "ae.decoder.ref_conv_in.proj.weight": (32, 192, 3, 3),
        "ae.decoder.ref_conv_in.norm.gamma": (32, 1, 1),
        "transformer.patch_embeddings.2.weight": (24, 16, 1, 8, 8),
        "transformer.proj_outs.0.bias": (128,),
        f"transformer.transformer.blocks.{1 if shared else 5}.attn1.to_out.0.weight": (24, 24),
        "transformer.transformer.blocks.0.attn1.norm_k.weight": (24,),
        "transformer.transformer.blocks.1.ffn.net.0.proj.weight": (32, 24),
        "transformer.transformer.blocks.1.ffn.net.2.bias": (24,),
    }.items() <= {name: tuple(tensor.shape) for name, tensor in state.items()}.items()
    extra = {"ae.encoder.conv_in.weight": torch.zeros(1), "loss.logvar": torch.zeros(1)}
    wrapped = {f"_forward_module.{k.replace('ae.', 'vae.', 1)}": v for k, v in (state | extra).items()}
    for given in (state, wrapped):
        released.fill_released(other, given, "there")
        theirs = other.state_dict()
        assert all(torch.equal(theirs[name], weight) for name, weight in model.state_dict().items())
        nn.init.normal_(other.encoder.conv.weight)


def test_released_shapes_mean_the_same():
    """A patch embedding is a convolution there; what comes out is folded back in the order (p, q, c)."""
    model = small()
    state, gate = released.to_released(model), model.injection.gates[1]
    weight, bias = (state[f"transformer.patch_embeddings.1.{part}"] for part in ("weight", "bias"))
    video = torch.randn(2, 16, 3, 8, 12, dtype=torch.float64)
    tokens = F.conv3d(video, weight, bias, stride=(1, 4, 4)).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(gate.video_tokens(video), tokens)
    weight, bias = (state[f"transformer.proj_outs.1.{part}"] for part in ("weight", "bias"))
    patches = F.linear(F.layer_norm(tokens, (24,), eps=1e-6), weight, bias)
    folded = patches.view(2, 3, 2, 3, 1, 4, 4, 16).permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(2, 16, 3, 8, 12)
    torch.testing.assert_close(gate.features(tokens, 8, 12), folded)


def test_released_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = {name: value for name, value in SMALL.items() if name != "blocks"}
    monkeypatch.setattr(released, "RefDecoderConfig", partial(RefDecoderConfig, **sizes))
    model = build_model(RefDecoderConfig(**SMALL | {"blocks": 3}), 16, 4, 8)
    state, file = released.to_released(model), tmp_path / "model.pt"
    torch.save({"state_dict": state}, file)
    again = released.from_released(file)
    assert again.config.blocks == 3 and not any(p.requires_grad for p in again.parameters())
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())
    name = "transformer.proj_outs.1.bias"
    for changed, said in (
        ({k: v for k, v in state.items() if k != name}, f"1 weights do not fit this RefDecoder; {name} is missing"),
        (state | {"ae.decoder.extra": torch.zeros(1)}, "ae.decoder.extra is left over"),
        (state | {name: torch.zeros(3)}, rf"{name} is \(3,\), expected \(256,\)"),
        ({"weight": torch.zeros(1)}, "holds no Transformer blocks"),
        ({"state": Path("x")}, "holds more than tensors"),
    ):
        torch.save(changed, file)
        with pytest.raises(ValueError, match=said):
            released.from_released(file)
    with pytest.raises(FileNotFoundError, match="hf download Arrokothwhi/RefDecoder"):
        released.from_released(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match="layout=videovaeplus with inject=attention has no released names"):
        released.to_released(small("videovaeplus"))
    for ours in ({"points": ["up1", "up2"]}, {"point_norms": "channel"}):
        with pytest.raises(ValueError, match="are ours: what they add has no released names"):
            released.to_released(small(**ours))


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("shared", [True, False])
def test_blocks_start_from_a_diffusion_transformer(tmp_path: Path, kind, shared):
    """The first blocks of three; modulation and attention to text are left where they are."""
    names = [(name + tail, row) for row in released.BLOCK for name, tail in [(row[0], "")]]
    source = small(blocks=3).float()
    state = {"blocks.0.norm3.bias": torch.zeros(1), "blocks.0.attn2.to_q.weight": torch.zeros(1)}
    for number, block in enumerate(source.injection.blocks[0]):
        for name, parameter in block.named_parameters():
            ours, *theirs = next(row for _, row in names if name.startswith(f"{row[0]}.") or name == row[0])
            state[f"blocks.{number}.{theirs[kind]}{name.removeprefix(ours)}"] = parameter.detach()
    (tmp_path / "transformer").mkdir()
    save_file(state, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    model = small(shared=shared).float()
    t2v_start.start_from_t2v(model, tmp_path)
    for blocks in model.injection.blocks:
        for mine, theirs in zip(blocks, source.injection.blocks[0][:2], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    kept = {name: p.clone() for name, p in model.named_parameters()}
    first = next(name for name in state if "blocks.1." in name)
    with pytest.raises(ValueError, match=rf"{first} is missing"):
        t2v_start.fill_blocks(model, {k: v for k, v in state.items() if k != first}, "there")
    with pytest.raises(ValueError, match="is missing"):
        t2v_start.fill_blocks(small(blocks=4).float(), state, "there")
    with pytest.raises(ValueError, match=r"expected \(36, 36\)"):
        t2v_start.fill_blocks(small(heads=3).float(), state, "there")
    assert all(torch.equal(kept[name], p) for name, p in model.named_parameters())  # nothing half-copied
    with pytest.raises(FileNotFoundError, match="hf download Wan-AI"):
        t2v_start.start_from_t2v(model, tmp_path / "nothing")
