"""CLIP from a local folder: consistency and categories, held against transformers' own on a tiny random network."""

import json
import math

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import metrics
from losses.pretrained import WeightsDamaged, WeightsNotFound
from metrics.clip import ClipCategories, ClipConsistency, preprocess

SIDE = 32


@pytest.fixture
def as_in_training():
    """Without the shape checks that only tests have, so that the errors are those a user meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP of two layers, of random weights, with a tokenizer of letters: as transformers saves them."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.save_pretrained(folder)
    layers = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = dict(vocab_size=len(words), max_position_embeddings=24, **layers, **ends)
    torch.manual_seed(0)
    vision = dict(image_size=SIDE, patch_size=8, **layers)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    for parameter in model.parameters():
        parameter.data.mul_(4)  # as it is drawn, all images look the same to it
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    """transformers' own model and image processor."""
    from transformers import CLIPImageProcessor, CLIPModel

    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return CLIPModel.from_pretrained(folder, local_files_only=True).eval(), processor


def pictures(b: int, t: int, h: int, w: int) -> torch.Tensor:
    """Smooth 8-bit clips in [-1, 1], so that resizing on bytes or floats is next to the same."""
    clip = F.interpolate(torch.rand(b, 3, t, 4, 5), (t, h, w), mode="trilinear")
    return (clip * 255).round() / 127.5 - 1


def their_embeddings(theirs, frames: torch.Tensor) -> torch.Tensor:
    """Of pixels as :func:`preprocess` gives them, which a test of its own holds against their processor."""
    with torch.no_grad():
        images = theirs[0](pixel_values=preprocess(frames, SIDE), input_ids=torch.tensor([[0, 53]]))
    return images.image_embeds


@pytest.mark.parametrize(("h", "w"), [(48, 48), (60, 100), (90, 52), (32, 40)])
def test_frames_are_prepared_as_clip_wants_them(theirs, h, w):
    checks = F.interpolate((torch.rand(1, 3, 6, 6) > 0.5) * 2.0 - 1, (h, w))  # the filter overshoots at their edges
    frames = torch.cat([pictures(1, 2, h, w)[0].transpose(0, 1), checks])
    images = [np.asarray(((frame + 1) * 127.5).round().byte().permute(1, 2, 0)) for frame in frames]
    expected = theirs[1](images=images, return_tensors="pt")["pixel_values"]
    error = (preprocess(frames, SIDE) - expected).abs()
    assert error[:2].max() < 1.1 / 255 / 0.26  # theirs is rounded to 8 bits, here divided by a deviation
    # Of the checks' edges theirs is clamped between the filter's two passes too, as bytes must be: elsewhere it is equal.
    assert (error[2] < 1.1 / 255 / 0.26).float().mean() > 0.95
    black, white = (preprocess(torch.full_like(frames, value), SIDE) for value in (-1.0, 1.0))
    ours = preprocess(frames, SIDE)
    assert (ours > black - 1e-5).all() and (ours < white + 1e-5).all()


def test_consistency_is_the_cosine_of_neighbours(folder, theirs):
    (metric,) = metrics.build(["clip_consistency"], weights={"clip": folder})
    prediction = pictures(2, 4, 48, 64)
    scores = metric(prediction, torch.zeros_like(prediction))
    assert scores.shape == (2, 4) and scores[:, 0].isnan().all()
    for clip, score in zip(prediction, scores, strict=True):
        embedded = their_embeddings(theirs, clip.transpose(0, 1))
        torch.testing.assert_close(score[1:], (embedded[1:] * embedded[:-1]).sum(dim=1))
        assert score[1:].max() < 0.999  # the network tells frames apart
    still = prediction[:, :, :1].expand_as(prediction)
    torch.testing.assert_close(metric(still, prediction)[:, 1:], torch.ones(2, 3))
    assert metric.clip_score(scores[0]) == pytest.approx(scores[0, 1:].mean().item())
    parts = torch.cat([metric(prediction[i : i + 1], prediction[i : i + 1]) for i in range(2)])
    assert torch.equal(parts.nan_to_num(), scores.nan_to_num())


@pytest.mark.gpu
def test_clip_on_a_gpu(folder):
    metric, categories, videos = ClipConsistency(folder), ClipCategories(folder, NAMES), pictures(2, 4, 48, 64)
    expected, named = metric(videos, videos), categories(videos)
    torch.testing.assert_close(metric(videos.cuda(), videos.cuda()).cpu(), expected, rtol=0, atol=1e-3, equal_nan=True)
    assert categories(videos.cuda()) == named


def test_consistency_leaves_out_what_the_mask_does_not_count(folder):
    metric, target = ClipConsistency(folder), pictures(1, 3, 40, 40)
    prediction, mask = target + 0.02, torch.ones(1, 1, 3, 40, 40)
    torch.testing.assert_close(metric(prediction, target, mask), metric(prediction, target), equal_nan=True)
    mask[..., 20:] = 0
    scores = metric(prediction, target, mask)
    assert scores[0, 1:].isfinite().all() and not torch.equal(scores[0, 1:], metric(prediction, target)[0, 1:])
    prediction[..., 20:], target[..., 20:] = -1, math.nan  # neither method nor truth shows there
    torch.testing.assert_close(metric(prediction, target, mask), scores, equal_nan=True)


def test_protocol_names_the_network_wherever_it_lies(folder, tmp_path):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder, local_files_only=True)
    model.save_pretrained(tmp_path / "copy")
    ours = ClipConsistency(folder)
    assert ours.protocol == ClipConsistency(tmp_path / "copy").protocol
    assert ours.protocol["backbone"].startswith("CLIP ViT 2 layers, patch 8, 32 px, 16-d:")
    model.visual_projection.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    assert ours.protocol != ClipConsistency(tmp_path / "other").protocol


def test_building_leaves_the_random_numbers_alone_and_trains_nothing(folder):
    before = torch.get_rng_state()
    metric = ClipConsistency(folder)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(p.requires_grad for p in metric._model.parameters()) and not metric._model.training


def test_only_a_whole_model_from_the_disk_will_do(folder, tmp_path, as_in_training):
    from safetensors.torch import load_file, save_file

    with pytest.raises(WeightsNotFound, match="CLIP has no weights of its own: save openai/clip-vit-large-patch14"):
        metrics.build(["clip_consistency"])
    with pytest.raises(WeightsNotFound, match=r"there is no .*openai/clip-vit-base-patch32/config\.json"):
        ClipConsistency("openai/clip-vit-base-patch32")  # a hub's name is no folder
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(WeightsDamaged, match="holds no CLIP that can be read"):
        ClipConsistency(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsDamaged, match=r"no whole CLIP: visual_projection\.weight is missing \(1 in all\)"):
        ClipConsistency(tmp_path)


# --- categories -------------------------------------------------------------------------------------------------------

NAMES = ["cat", "dog", "a street at night", "sea"]


def test_prompts_are_embedded_as_transformers_would(folder, theirs):
    from transformers import AutoTokenizer

    categories = ClipCategories(folder, NAMES, template="a film of {category} here")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for name, prompt in zip(NAMES, categories._prompts, strict=True):  # one by one: padding must change nothing
        tokens = tokenizer([f"a film of {name} here"], truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            expected = theirs[0].get_text_features(**tokens).pooler_output[0]
        torch.testing.assert_close(prompt, F.normalize(expected, dim=0), rtol=1e-4, atol=1e-5)
    assert categories._prompts.std(dim=0).max() > 0.01  # they differ
    assert categories.fingerprint == ClipConsistency(folder).protocol["backbone"]


def test_a_clip_gets_the_nearest_prompt(folder, theirs):
    categories, videos = ClipCategories(folder, NAMES), pictures(4, 11, 40, 48)
    means = []
    for video in videos:
        frames = [round(i * 10 / 7) for i in range(8)]  # 8 of 11, evenly, the ends among them
        means.append(their_embeddings(theirs, video[:, frames].transpose(0, 1)).mean(dim=0))
    expected = [NAMES[(categories._prompts @ mean).argmax()] for mean in means]
    assert categories(videos) == expected
    categories._prompts = F.normalize(torch.stack(means), dim=1)
    assert categories(videos) == NAMES
    order = [2, 0, 3, 1]
    assert categories(videos[order]) == [NAMES[i] for i in order] and categories(videos[1:2]) == ["dog"]
    assert len(categories(videos[:, :, :1])) == 4  # of images too


def test_bad_categories(folder, tmp_path, as_in_training):
    for names in ([], ["cat", "cat"]):
        with pytest.raises(ValueError, match="one or more different names"):
            ClipCategories(folder, names)
    with pytest.raises(ValueError, match="must contain {category}"):
        ClipCategories(folder, NAMES, template="a video")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip"
    with pytest.raises(WeightsNotFound, match="has no tokenizer"):
        ClipCategories(tmp_path, NAMES)
