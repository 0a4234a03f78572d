"""Optical flow: DIS finds known shifts; RAFT is torchvision's, with strict weights, at any size."""

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_metrics_temporal import moving
from torchvision.models.optical_flow import raft_large

import metrics
from losses.pretrained import WeightsDamaged, WeightsNotFound
from metrics.flow import DisFlow, RaftFlow, visible


@pytest.fixture
def as_in_training():
    """Without the shape checks that only tests have, so that the errors are those a user meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- DIS --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (5, -3), (-2, 4)])
def test_dis_finds_the_shift_of_a_texture(dx, dy):
    frames = moving(3, 96, 112, dx, dy)[0].transpose(0, 1)
    forward, backward = DisFlow()(frames)
    assert forward.shape == backward.shape == (2, 2, 96, 112) and forward.dtype == torch.float32
    inner = (..., slice(16, -16), slice(16, -16))
    expected = torch.tensor([float(dx), float(dy)]).view(1, 2, 1, 1)
    assert (forward[inner] - expected).abs().mean() < 0.05 and (backward[inner] + expected).abs().mean() < 0.05
    assert visible(forward, backward)[inner].mean() > 0.95


def test_dis_sees_that_what_is_covered_is_gone():
    """A square moves over a background that stands still: what it covers in the next frame is left out."""
    torch.manual_seed(2)
    background, square = moving(1, 96, 96, 0, 0)[0, :, 0], moving(1, 32, 32, 0, 0)[0, :, 0]
    frames = torch.stack([background, background])
    frames[0, :, 32:64, 24:56], frames[1, :, 32:64, 32:64] = square, square  # by 8 to the right
    seen = visible(*DisFlow()(frames))[0, 0]
    assert seen[36:60, 57:63].mean() < 0.2 and seen[36:60, 30:48].mean() > 0.8 and seen[:20].mean() > 0.95


def test_dis_is_the_same_every_time_and_needs_sixteen_pixels(as_in_training):
    frames = torch.rand(2, 3, 64, 48) * 2 - 1
    assert torch.equal(DisFlow()(frames)[0], DisFlow()(frames)[0])
    assert DisFlow()(frames[:, :, :16, :16])[0].isfinite().all()
    with pytest.raises(ValueError, match="16x16 or more, got 15x48"):
        DisFlow()(frames[:, :, :15])


# --- RAFT -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raft_file(tmp_path_factory):
    """RAFT-large as torchvision saves it, untrained."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("raft") / "raft.pth"
    torch.save(raft_large(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def network(raft_file):
    network = raft_large(weights=None)
    network.load_state_dict(torch.load(raft_file, weights_only=True))
    return network.eval()


def test_raft_is_torchvisions_with_twenty_updates(raft_file, network, monkeypatch):
    flow, frames = RaftFlow(raft_file), torch.rand(2, 3, 128, 136) * 2 - 1
    with torch.no_grad():
        forward, backward = flow(frames)
        expected = network(frames[:1], frames[1:], num_flow_updates=20)[-1]
        torch.testing.assert_close(forward, expected)
        torch.testing.assert_close(backward, network(frames[1:], frames[:1], num_flow_updates=20)[-1])
    assert forward.shape == (1, 2, 128, 136) and "20 updates" in flow.definition


def test_raft_pads_and_enlarges(raft_file, network, monkeypatch):
    """A size that is no multiple of 8; and one below 128, whose flow is measured on an enlarged picture."""
    flow = RaftFlow(raft_file)
    monkeypatch.setattr(flow, "_updates", 2)
    with torch.no_grad():
        odd = torch.rand(2, 3, 130, 133) * 2 - 1
        padded = F.pad(odd, (0, 3, 0, 6), mode="replicate")
        expected = network(padded[:1], padded[1:], num_flow_updates=2)[-1][..., :130, :133]
        torch.testing.assert_close(flow(odd)[0], expected)
        small = torch.rand(2, 3, 64, 72) * 2 - 1
        large = F.interpolate(small, scale_factor=2, mode="bilinear")
        expected = network(large[:1], large[1:], num_flow_updates=2)[-1]
        torch.testing.assert_close(flow(small)[0], F.avg_pool2d(expected, 2) / 2)
        assert flow(torch.rand(2, 3, 20, 9))[0].shape == (1, 2, 20, 9)


@pytest.mark.gpu
def test_raft_on_a_gpu(raft_file):
    flow, frames = RaftFlow(raft_file), torch.rand(2, 3, 128, 136) * 2 - 1
    flow._updates = 2  # errors of an untrained network grow with every update
    with torch.inference_mode():
        expected = flow(frames)[0]
        torch.testing.assert_close(flow(frames.cuda())[0].cpu(), expected, rtol=1e-2, atol=1e-2)


def test_warp_raft_by_name(raft_file, tmp_path, monkeypatch):
    monkeypatch.setattr(RaftFlow, "_updates", 1)
    (metric,) = metrics.build(["warp_raft"], weights={"raft": raft_file})
    save_file(torch.load(raft_file, weights_only=True), tmp_path / "raft.safetensors")
    (again,) = metrics.build(["warp_raft"], weights={"raft": tmp_path / "raft.safetensors"})
    assert metric.protocol == again.protocol and metric.name == "warp_raft" and not metric.higher_is_better
    video = moving(3, 64, 64, 1, 0).expand(2, -1, -1, -1, -1)
    scores = metric(video, video)
    assert scores.shape == (2, 3) and torch.equal(scores.nan_to_num(), again(video, video).nan_to_num())
    assert torch.equal(metric(video[:1], video[:1]).nan_to_num(), scores[:1].nan_to_num())


def test_building_raft_leaves_the_random_numbers_alone(raft_file):
    before = torch.get_rng_state()
    flow = RaftFlow(raft_file)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(p.requires_grad or p.is_meta for p in flow._network.parameters()) and not flow._network.training
    assert not any(buffer.is_meta for buffer in flow._network.buffers())


def test_raft_takes_its_own_weights_and_no_others(raft_file, tmp_path, as_in_training):
    with pytest.raises(WeightsNotFound, match="download https://.*raft_large.*weights of raft; warp_dis needs none"):
        metrics.build(["warp_raft"])
    with pytest.raises(WeightsNotFound, match="nothing.pth is not a file"):
        RaftFlow(tmp_path / "nothing.pth")
    tensors = torch.load(raft_file, weights_only=True)
    tensors.pop("mask_predictor.conv.bias")
    torch.save(tensors, tmp_path / "less.pth")
    with pytest.raises(WeightsDamaged, match=r"(?s)does not hold RAFT-large.*mask_predictor\.conv\.bias"):
        RaftFlow(tmp_path / "less.pth")
    (tmp_path / "text.pth").write_text("<html>")
    (tmp_path / "text.safetensors").write_text("<html>")
    torch.save([1], tmp_path / "list.pth")
    for name, why in (("text.pth", "readable"), ("text.safetensors", "readable"), ("list.pth", "of tensors")):
        with pytest.raises(WeightsDamaged, match=f"{name} is not a .*{why}|{name} is not a state dict"):
            RaftFlow(tmp_path / name)
