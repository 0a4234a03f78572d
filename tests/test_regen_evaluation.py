"""REGEN's validation: which frames are scored, what it is held against, and that its baseline is measured alike."""

import csv
import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from regen_small import K, clip, generator, made

from decoders.regen import controls
from decoders.regen.interpolator import Interpolator
from decoders.regen.module import Regen
from experiments.compose import ConfigError
from experiments.config import build_space, load
from experiments.train import train


def test_validation_scores_what_each_task_asks_for(runs_root) -> None:
    """Every second frame encoded: the others count. Frames ahead: those count. Two chunks: the seam is a group."""
    stream = "{{sources: [unseen], size: [32, 48], num_frames: {}, batch_size: 2}}"
    overrides = [
        "trainer.max_steps=2", "trainer.progress_bar=false", "trainer.val_every_steps=2", "validation.metrics=[psnr,jump]",
        "objective.tasks={between: interpolate, ahead: extrapolate}", "objective.ahead=3", "objective.compare_seeds=1",
        "objective.compare_extension=true", f"data.val.between={stream.format(9)}", f"data.val.ahead={stream.format(8)}",
        f"data.val.further={stream.format(8).replace('}', ', extend: [0, 2]}')}",
    ]  # fmt: skip
    folder = train(load("regen_debug", overrides), "regen_debug", overrides)
    rows = list(csv.DictReader((folder / "evaluation" / "clips.csv").open()))
    frames = {row["stream"]: int(row["frames"]) for row in rows}
    assert frames == {"unseen": 10, "between": 4, "ahead": 3, "further": 8}
    methods = {name: {row["method"] for row in rows if row["stream"] == name} for name in frames}
    for name in frames:
        assert {"decoder", "2 steps", "other noise 1", "repeated frames", "mean colour of the clip"} <= methods[name]
    assert "average of the frames beside" in methods["between"] - methods["unseen"] - methods["ahead"]
    assert "2 steps, latent extension" in methods["unseen"] - methods["between"] - methods["ahead"]
    for control in ("motion of another clip", "content of another clip"):
        assert control in (methods["unseen"] & methods["further"]) - methods["between"] - methods["ahead"]
    own = next(row for row in rows if row["stream"] == "unseen" and row["method"] == "decoder")
    assert float(own["jump_seam"]) > 0 and float(own["jump_inside"]) > 0
    result = json.loads((folder / "evaluation" / "result.json").read_text())
    assert {mean["stream"] for mean in result["means"]} == frames.keys()


def test_the_average_of_neighbours_is_right_on_a_line() -> None:
    """On a clip whose brightness grows evenly the mean of the frames beside is the frame."""
    video = torch.linspace(-1, 1, 9)[None, None, :, None, None].expand(1, 3, 9, 8, 8)
    scored = torch.tensor([[bool(i % 2) for i in range(9)]])
    torch.testing.assert_close(controls._averaged({"video": video, "supervised": scored, "key": ["a"]}), video)
    assert controls._averaged({"video": video, "key": ["a"]}) is None


class Blend(torch.nn.Module):
    """FILM's call. Gives the frames' mixture in [0, 1], of a kind that tells x0 from x1, and refuses what FILM refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(0.75))

    def forward(self, x0: torch.Tensor, x1: torch.Tensor, dt: torch.Tensor) -> torch.Tensor:
        assert x0.shape[2] % 64 == 0 and x0.shape[3] % 64 == 0 and float(x0.min()) >= 0.0 and float(x1.max()) <= 1.0
        assert dt.shape[0] == x0.shape[0] and dt.shape[1] == 1 and bool((dt == 0.5).all())
        return self.share * x0 + (1 - self.share) * x1


class Two(torch.nn.Module):
    def forward(self, x0: torch.Tensor, x1: torch.Tensor) -> torch.Tensor:
        return x0 + x1


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Files of an interpolator, of one with another call, and of nothing."""
    folder = tmp_path_factory.mktemp("interpolators")
    torch.jit.script(Blend()).save(str(folder / "blend.pt"))
    torch.jit.script(Two()).save(str(folder / "two.pt"))
    torch.save({"a": torch.zeros(1)}, folder / "weights.pt")
    return folder


def test_an_interpolator_is_called_as_film_is(network) -> None:
    video = torch.rand(2, 3, 5, 48, 72, generator=generator(0)) * 2 - 1
    interpolator = Interpolator(str(network / "blend.pt"))
    with torch.autocast("cpu", torch.bfloat16):
        shown = interpolator(video)
    expected = video.clone()
    expected[:, :, 1::2] = 0.75 * video[:, :, :-1:2] + 0.25 * video[:, :, 2::2]
    torch.testing.assert_close(shown, expected, atol=1e-6, rtol=0)
    assert torch.equal(shown[:, :, ::2], video[:, :, ::2])
    digest = hashlib.sha256((network / "blend.pt").read_bytes()).hexdigest()
    assert (interpolator.name, interpolator.protocol["sha256"]) == ("interpolator blend.pt", digest)


def test_an_interpolator_is_a_row_of_what_is_interpolated_and_in_its_protocol(network, runs_root) -> None:
    overrides = [
        "trainer.max_steps=1", "trainer.progress_bar=false", "validation.metrics=[psnr]", "validation.num_shown=0",
        "objective.compare_steps=[]", "objective.tasks={between: interpolate}", f"objective.interpolator={network}/blend.pt",
        "data.val.between={sources: [unseen], size: [32, 48], num_frames: 9, batch_size: 2}",
    ]  # fmt: skip
    folder = train(load("regen_debug", overrides), "regen_debug", overrides)
    result = json.loads((folder / "evaluation" / "result.json").read_text())
    rows = {(mean["stream"], mean["method"]): mean["scores"]["psnr"] for mean in result["means"]}
    assert [stream for stream, method in rows if method == "interpolator blend.pt"] == ["between"]
    assert rows["between", "interpolator blend.pt"] != rows["between", "average of the frames beside"]
    decoding = {
        stream: result["protocols"][f"{stream}/psnr"]["definition"]["decoding"] for stream in ("between", "unseen")
    }
    digest = hashlib.sha256((network / "blend.pt").read_bytes()).hexdigest()
    assert decoding["between"]["interpolator"]["sha256"] == digest and "interpolator" not in decoding["unseen"]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("nowhere.pt", "there is no such file"),
        ("two.pt", r"takes \(x0: Tensor, x1: Tensor\), not the tensors"),
        ("weights.pt", "is no TorchScript file"),
    ],
)
def test_an_interpolator_that_cannot_be_used_is_told_before_any_step(
    file: str, message: str, network, runs_root
) -> None:
    overrides = [
        "objective.tasks={between: interpolate}", f"objective.interpolator={network}/{file}",
        "data.val.between={sources: [unseen], size: [32, 48], num_frames: 9, batch_size: 2}", "trainer.progress_bar=false",
    ]  # fmt: skip
    with pytest.raises((ConfigError, ValueError), match=message):
        train(load("regen_debug", overrides), "regen_debug", overrides)
    assert not list(runs_root.rglob("*.ckpt"))
    with pytest.raises(ConfigError, match="no stream of objective.tasks is interpolated"):
        load("regen_debug", overrides[1:2])


@pytest.mark.parametrize("name", ["regen_debug", "regen_space_debug"])
@pytest.mark.parametrize("t", [1, 7])
def test_padded_clips_are_cropped_back(name: str, t: int) -> None:
    decoder = made("pad=replicate", name=name)
    torch.nn.init.xavier_uniform_(decoder.model.dit.final.weight)
    batch = clip(t)
    odd = batch | {"video": batch["video"][..., :29, :19]}
    padded = odd | {"video": decoder.fitted(odd["video"])}
    assert padded["video"].shape[2:] == ({1: 1, 7: 10 if name == "regen_debug" else 9}[t], 32, 24)
    shown = decoder._decode_clip(decoder.with_latent(odd), 0)
    assert shown.shape == (1, 3, t, 29, 19)
    assert torch.equal(shown, decoder._decode_clip(decoder.with_latent(padded), 0)[:, :, :t, :29, :19])
    strict = made(name=name)
    with pytest.raises(ValueError, match="nearest"):
        strict.encode(odd["video"])


def test_the_first_frame_is_repeated_in_every_chunk_whatever_is_scored() -> None:
    decoder, batch = made(), clip(2 * (K + 1))
    scored = (torch.arange(10) < 8).expand(2, -1)  # extend: [0, 2]
    for shown in (batch, batch | {"supervised": scored}):
        assert torch.equal(controls._repeated(decoder, shown), batch["video"][:, :, [0] * 5 + [5] * 5])
    ahead = batch | {"supervised": torch.arange(10).expand(2, -1) >= 5, "times": list(range(10))}
    assert torch.equal(controls._repeated(decoder, ahead), batch["video"][:, :, [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]])


@pytest.mark.parametrize(("name", "t"), [("regen_debug", 15), ("regen_space_debug", 13)])
def test_seams_are_where_a_later_pair_begins(name: str, t: int) -> None:
    """Found by changing one pair's noise alone: its own frames move."""
    decoder = made(name=name)
    torch.nn.init.xavier_uniform_(decoder.model.dit.final.weight)
    batch = decoder.with_latent(clip(t, b=1))
    pairs = decoder.model.fold_pairs(batch["latent"])
    starts = []
    for pair in range(1, 3):
        changed = pairs.clone()
        changed[pair:] += 1
        shown = [decoder.model.unfold_pairs(decoder.model(part), 1)[0] for part in (pairs, changed)]
        starts.append((shown[0] - shown[1]).abs().amax((0, 2, 3)).gt(1e-6).nonzero()[0].item())
    groups = decoder.frame_groups(batch)
    assert groups["seam"][0].nonzero().flatten().tolist() == starts
    assert groups["inside"][0].nonzero().flatten().tolist() == [i for i in range(1, t) if i not in starts]
    assert decoder.frame_groups(clip(K + 1)) == {}
    extended = controls._extended(decoder, batch, 2)
    assert (extended - controls._decoded(decoder, batch, steps=2))[:, :, starts[0] :].abs().max() > 1e-4


def test_one_film_cannot_be_shuffled(monkeypatch) -> None:
    decoder = made()

    def another_clip(key: str):
        raise ValueError("all clips are of one file")

    data, batch = SimpleNamespace(another_clip=another_clip, num_val_files=1), decoder.with_latent(clip(K + 1))
    monkeypatch.setattr(Regen, "trainer", SimpleNamespace(datamodule=data), raising=False)
    assert controls._shuffled(decoder, batch, 1) is None
    data.num_val_files = 2
    with pytest.raises(ValueError, match="all clips are of one file"):  # or whatever else is wrong
        controls._shuffled(decoder, batch, 1)


@pytest.mark.parametrize("k", [4, 8, 16, 32])
def test_regen_and_its_baseline_are_measured_on_the_same_frames(k: int) -> None:
    sets = ["mcl_jcv_256", "mcl_jcv_512", "davis_256", "davis_512", "davis_192", "davis_384"]
    runs = [load(f"{family}_k{k}", sets=sets) for family in ("regen", "magvit2")]
    for split in ("val", "sets"):
        ours, theirs = (getattr(run.data, split) for run in runs)
        assert {name: replace(stream, extend=(0, 0)) for name, stream in ours.items()} == theirs and theirs
        assert all(stream.num_frames == 33 for stream in ours.values())
    for run in runs:
        space = build_space(run)
        for stream in (*run.data.val.values(), *run.data.sets.values()):
            frames = stream.total_frames if run.pad == "error" else space.padded_frames(stream.total_frames)
            space.check(frames, *stream.size)
            assert stream.extend[0] == 0 and stream.extend[1] < k


def test_other_steps_and_batches_change_what_they_should(runs_root) -> None:
    decoder = made()
    with torch.no_grad():
        torch.nn.init.normal_(decoder.model.dit.final.weight, std=0.3, generator=generator(5))
    latent = decoder.encode(clip(K + 1)["video"])
    one, again, four = (decoder.decode(latent[:1], steps=n, generator=generator(3)) for n in (1, 1, 4))
    assert torch.equal(one, again) and not torch.equal(one, four)
    assert torch.equal(decoder.decode(latent[:1]), decoder.decode(latent[:1]))  # without a generator: the run's seed
    between = decoder.decode(latent, times=[0.5, 3.25])
    assert between.shape == (2, 3, 2, 32, 32)
