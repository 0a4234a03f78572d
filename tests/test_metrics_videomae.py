"""The VideoMAE encoder against transformers', and how a checkpoint is read. How clips are cut is in test_metrics_fvd.py."""

import math

import jaxtyping
import pytest
import torch
from safetensors.torch import save_file

from losses.pretrained import WeightsDamaged, WeightsNotFound
from metrics.frechet import Fvd
from metrics.videomae import FILE, Layout, VideoMae, sinusoids

GIANT = Layout(dim=1408, depth=40, heads=16, hidden=6144, patch=14, tubelet=2)
TINY = Layout(dim=32, depth=2, heads=4, hidden=56, patch=32, tubelet=4)


def random_tensors(layout: Layout) -> dict[str, torch.Tensor]:
    scale = {1: 0.3, 2: 0.2, 5: 0.02}
    return {key: torch.randn(shape) * scale[len(shape)] for key, shape in layout.shapes().items()}


def as_transformers(tensors: dict[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
    """The same weights under the names of transformers' VideoMAEForVideoClassification."""
    names = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    theirs = {f"fc_norm.{kind}": tensors[f"fc_norm.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        theirs[f"videomae.embeddings.patch_embeddings.projection.{kind}"] = tensors[f"patch_embed.proj.{kind}"]
    for i in range(layout.depth):
        block = f"videomae.encoder.layer.{i}."
        for ours, their in names.items():
            for kind in ("weight", "bias"):
                theirs[f"{block}{their}.{kind}"] = tensors[f"blocks.{i}.{ours}.{kind}"]
        parts = tensors[f"blocks.{i}.attn.qkv.weight"].chunk(3)
        for part, weight in zip(("query", "key", "value"), parts, strict=True):
            theirs[f"{block}attention.attention.{part}.weight"] = weight
        theirs[f"{block}attention.attention.query.bias"] = tensors[f"blocks.{i}.attn.q_bias"]
        theirs[f"{block}attention.attention.value.bias"] = tensors[f"blocks.{i}.attn.v_bias"]
    return theirs


def test_features_are_transformers():
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    tensors = random_tensors(TINY)
    config = VideoMAEConfig(
        image_size=224, patch_size=TINY.patch, num_frames=16, tubelet_size=TINY.tubelet, hidden_size=TINY.dim,
        num_hidden_layers=TINY.depth, num_attention_heads=TINY.heads, intermediate_size=TINY.hidden,
        layer_norm_eps=1e-6, use_mean_pooling=True,
    )  # fmt: skip
    theirs = VideoMAEForVideoClassification(config).eval()
    missing, unexpected = theirs.load_state_dict(as_transformers(tensors, TINY), strict=False)
    assert set(missing) == {"classifier.weight", "classifier.bias"} and not unexpected
    theirs.fc_norm.eps = 1e-6  # OpenGVLab's; transformers leaves this one at torch's default
    theirs.classifier = torch.nn.Identity()

    ours, video = VideoMae(tensors, heads=TINY.heads), torch.rand(2, 3, 16, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(video), theirs(video.transpose(1, 2)).logits, rtol=1e-5, atol=1e-5)
        assert ours(video.flip(2)).sub(ours(video)).abs().max() > 1e-3  # it sees time


def test_positions_are_counted_over_the_whole_clip():
    table = sinusoids(40, 6)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    angle = 39 / 10000 ** (2 / 6)
    assert table[39, 2:4].tolist() == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-6)


@pytest.mark.parametrize(("dim", "heads"), [(384, 6), (768, 12), (1024, 16), (1280, 16), (1408, 16)])
def test_layout_is_read_from_the_shapes(dim, heads):
    """ViT-S, B, L, H and the giant that Ge et al. measured with; nothing of their size is allocated."""
    expected = GIANT if dim == 1408 else Layout(dim, 12, heads, 4 * dim, 16, 2)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in expected.shapes().items()}
    assert Layout.of(tensors) == expected
    assert expected.tokens == (2048 if dim == 1408 else 1568)


@pytest.fixture
def small() -> dict[str, torch.Tensor]:
    """A network of a known width, so that nothing but the file says what it is."""
    return random_tensors(Layout(dim=384, depth=1, heads=6, hidden=40, patch=32, tubelet=4))


def test_every_form_of_the_file_is_read(small, tmp_path, monkeypatch):
    extra = small | {"head.weight": torch.ones(174, 384), "head.bias": torch.ones(174)}
    torch.save({"module": extra}, tmp_path / "module.pth")
    torch.save({"model": extra, "epoch": 3}, tmp_path / "model.pth")
    torch.save(extra, tmp_path / "flat.pth")
    save_file(small, tmp_path / "plain.safetensors")
    (tmp_path / "folder").mkdir()
    torch.save({"module": small}, tmp_path / "folder" / f"{FILE}.pth")
    names = ("module.pth", "model.pth", "flat.pth", "plain.safetensors", "folder")
    prints = {VideoMae.load(tmp_path / name).fingerprint for name in names}
    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path / "folder"))
    assert prints == {VideoMae.load().fingerprint} and prints.pop().startswith("videomae:")


def test_learned_positions_and_half_precision(small):
    halved = {key: value.half() for key, value in small.items()}
    network = VideoMae(halved | {"pos_embed": torch.randn(1, 196, 384)})
    assert network.positions.shape == (196, 384) and network.blocks[0].attn.q_bias.dtype == torch.float32
    assert network.fingerprint != VideoMae(halved).fingerprint
    with pytest.raises(WeightsDamaged, match=r"pos_embed has shape \(1, 1568, 384\), not \(1, 196, 384\)"):
        VideoMae(small | {"pos_embed": torch.randn(1, 1568, 384)})


def test_what_is_no_videomae_says_so(small, tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path / "empty"))
    with pytest.raises(WeightsNotFound, match="(?s)empty does not exist.*weights path.*huggingface.*WEIGHTS_ROOT"):
        VideoMae.load()
    with pytest.raises(WeightsNotFound, match=f"has none of .*{FILE}.pth"):
        VideoMae.load(tmp_path)
    torch.save({"model": {f"encoder.{key}": value for key, value in small.items()}}, tmp_path / "pretrained.pth")
    with pytest.raises(WeightsDamaged, match=r"pretrained.pth is no VideoMAE: .*begin with encoder"):
        VideoMae.load(tmp_path / "pretrained.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "object.pth")
    with pytest.raises(WeightsDamaged, match="not a readable state dict"):
        VideoMae.load(tmp_path / "object.pth")
    without = {key: value for key, value in small.items() if "fc_norm" not in key}
    for tensors, said in [
        (without, r"fc_norm.weight is missing \(2 such"),
        (small | {"blocks.0.gamma_1": torch.ones(384)}, "blocks.0.gamma_1 is not known"),
        (small | {"fc_norm.bias": torch.ones(3)}, r"fc_norm.bias has shape \(3,\), not \(384,\)"),
    ]:
        with pytest.raises(WeightsDamaged, match=said):
            VideoMae(tensors)
    with pytest.raises(WeightsDamaged, match="no released VideoMAE has width 32"):
        VideoMae(random_tensors(TINY))
    with pytest.raises(WeightsDamaged, match="2x30x30 do not divide 16x224x224"):
        VideoMae(small | {"patch_embed.proj.weight": torch.ones(384, 3, 2, 30, 30)})


def test_as_a_distance(small, tmp_path):
    save_file(small, tmp_path / "small.safetensors")
    metric = Fvd("videomae", 16, tmp_path / "small.safetensors")
    video = torch.rand(1, 3, 33, 20, 24) * 2 - 1
    found = metric.features(video)
    assert found.shape == (1, 2, 384) and metric.name == "fvd_videomae_16f"
    shown = (torch.nn.functional.interpolate(video[0, :, 16:32].transpose(0, 1), (224, 224), mode="bilinear") + 1) / 2
    torch.testing.assert_close(metric.network(shown.transpose(0, 1)[None]), found[:, 1], rtol=1e-5, atol=1e-5)
    assert metric.score(found[0], found[0]) == pytest.approx(0, abs=1e-9)
    assert metric.protocol["range"].startswith("[0, 1]") and metric.protocol["backbone"].startswith("videomae:")
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match="windows of 16 frames, got 32.*fvd_videomae_16f"):
            Fvd("videomae", 32, tmp_path / "small.safetensors")
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
