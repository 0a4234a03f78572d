"""Streams as callers use them: equal to decoding at once, independent of one another, and fed and emptied by threads."""

import runpy
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_files import export, frames_of
from torch import Tensor

from datamodules.latent_stream import LatentReader
from datamodules.latents import save_latent
from decoders import streaming
from decoders.exported import Exported, load
from decoders.inference import InferenceOptions
from decoders.streaming import Behind, Stream, ahead, stream
from experiments.cli_coding import to_bytes
from experiments.config import build_decoder, build_space
from experiments.config import load as load_experiment

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Exported:
    return load(export("baseline_debug", tmp_path_factory.mktemp("model") / "own"))


def latents(model: Exported, n: int, y: int = 4, x: int = 6, seed: int = 0, b: int = 1) -> Tensor:
    return torch.randn(b, model.space.channels, n, y, x, generator=torch.Generator().manual_seed(seed))


def test_every_family_streams_what_it_decodes(debug_name, tmp_path):
    model = load(export(debug_name, tmp_path / "model"))
    n = 4 if model.space.paired else 3
    latent = latents(model, n, b=2)
    size = model.space.pixel_frames(n), 32, 48
    reference = torch.rand(2, 3, 1, 32, 48) * 2 - 1 if model.uses_reference else None
    given = {"reference": reference, "seed": 7}
    if not model.can_stream:
        with pytest.raises(ValueError, match="cannot stream"):
            Stream(model, 32, 48)
        with pytest.raises(ValueError, match="cannot stream"):
            next(stream(model, latent, 32, 48))
        return
    whole = model.decode(latent, size=size, reference=reference, generator=torch.Generator().manual_seed(7))
    pieces = list(stream(model, latent, 32, 48, **given))
    assert all(piece.shape[2] for piece in pieces)
    torch.testing.assert_close(torch.cat(pieces, 2), whole, atol=2e-5, rtol=0)
    again = torch.cat(list(stream(model, (frame for frame in latent.unbind(2)), 32, 48, **given)), 2)
    assert torch.equal(again, torch.cat(pieces, 2)), "frames from anywhere, one after the other"
    cropped = torch.cat(list(stream(model, latent, 29, 46, **given)), 2)
    assert cropped.shape[-2:] == (29, 46) and torch.equal(cropped, again[..., :29, :46])


def test_streams_on_one_model_do_not_know_each_other(own):
    """Interleaved, one paused meanwhile, one reset: each gives what it gives alone."""
    first, second = latents(own, 4, seed=1), latents(own, 3, 6, 4, seed=2)
    alone = [torch.cat(list(stream(own, latent, *size)), 2) for latent, size in ((first, (32, 48)), (second, (48, 32)))]
    one, other = Stream(own, 32, 48), Stream(own, 48, 32)
    got, beside = [one.push(first[:, :, 0])], []
    beside += [other.push(second[:, :, 0]), other.push(second[:, :, 1])]  # ``one`` is paused
    got += [one.push(first[:, :, 1:3])]
    beside += [other.push(second[:, :, 2]), other.finish()]
    got += [one.push(first[:, :, 3]), one.finish()]
    assert torch.equal(torch.cat(got, 2), alone[0]) and torch.equal(torch.cat(beside, 2), alone[1])
    assert one.num_frames == 13
    one.push(second.transpose(3, 4)[:, :, 0])
    one.reset()
    assert torch.equal(one.push(first), alone[0]), "as if nothing had been pushed before"
    image = Stream(own, 32, 48)
    assert torch.cat([image.push(first[:, :, 0]), image.finish()], 2).shape == (1, 3, 1, 32, 48)


def test_bytes_of_an_optimised_form(own):
    """Frames are then "b k h w 3": cropped and joined along their own axes."""
    fast = own.optimised(InferenceOptions(uint8=True, graphs=False))
    latent = latents(own, 3)
    got = torch.cat(list(stream(fast, latent, 30, 44)), 1)
    assert got.dtype == torch.uint8 and got.shape == (1, 9, 30, 44, 3)
    plain = torch.cat(list(stream(own, latent, 30, 44)), 2)
    expected = ((plain.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 4, 1)
    assert (got.float() - expected).abs().max() < 1.5


def test_mistakes_are_told(own):
    with pytest.raises(ValueError, match="nothing was pushed"):
        Stream(own, 32, 48).finish()
    with pytest.raises(ValueError, match="empty"):
        Stream(own, 0, 48)
    with pytest.raises(ValueError, match="no latent frames"):
        next(stream(own, iter(()), 32, 48))
    with pytest.raises(ValueError, match="latent frame"):
        Stream(own, 32, 48).push(latents(own, 1, 5, 5))
    with pytest.raises(ValueError, match="have no latent frame"):
        Stream(own, 32, 48).push(latents(own, 1)[:, :, :0])


def test_a_bare_networks_stream_keeps_no_graph():
    """Its weights may want gradients: memory would grow with every frame."""
    experiment = load_experiment("flashdecoder_debug")
    network = build_decoder(experiment, build_space(experiment)).model
    assert next(network.parameters()).requires_grad
    video = Stream(network, 32, 48)
    latent = torch.randn(1, 12, 2, 4, 6)
    assert not any(piece.requires_grad for piece in (video.push(latent), video.finish()))


# ---- threads


def test_ahead_is_bounded_and_in_order():
    made: list[int] = []

    def items():
        for number in range(30):
            made.append(number)
            yield number

    taken = []
    for number in ahead(items(), room=3):
        time.sleep(0.002)
        taken.append(number)
        assert len(made) - len(taken) <= 3 + 1, "three wait, and one waits to be put"
    assert taken == list(range(30))


def test_ahead_hands_errors_over_and_ends_with_its_reader():
    def broken():
        yield 1
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        list(ahead(broken()))

    before = threading.active_count()
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    reading = ahead(endless(), room=2)
    next(reading)
    reading.close()
    assert threading.active_count() == before


def test_no_room_is_no_unbounded_room():
    with pytest.raises(ValueError, match="room=0"):
        next(ahead(iter(range(3)), room=0))
    with pytest.raises(ValueError, match="room=0"):
        Behind(print, room=0)


def test_an_error_does_not_wait_for_an_item_that_never_comes(monkeypatch):
    monkeypatch.setattr(streaming, "PART_S", 0.1)
    never = threading.Event()

    def waiting():
        yield 1
        never.wait()

    with pytest.raises(KeyError):
        for _ in ahead(waiting()):
            raise KeyError
    never.set()


def test_nothing_is_put_after_the_end():
    with Behind(lambda item: None, room=1) as writing:
        writing.put(1)
    with pytest.raises(ValueError, match="context was left"):
        for number in range(3):
            writing.put(number)


def test_behind_is_bounded_in_order_and_raises():
    taken: list[int] = []
    put = 0

    def slow(item: int) -> None:
        time.sleep(0.002)
        taken.append(item)

    with Behind(slow, room=3) as writing:
        for number in range(30):
            writing.put(number)
            put += 1
            assert put - len(taken) <= 3 + 1 + 1, "three wait, one is being taken, one was just taken"
    assert taken == list(range(30))

    def full(item: int) -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"), Behind(full, room=1) as writing:
        for number in range(1000):
            writing.put(number)
    with pytest.raises(OSError, match="no room"), Behind(full) as writing:
        writing.put(1)  # found out on leaving
    taken.clear()
    with pytest.raises(KeyError), Behind(slow, room=30) as writing:
        for number in range(20):
            writing.put(number)
        raise KeyError
    assert len(taken) < 20, "what waited is dropped when an error ends it"


# ---- the examples


def test_the_loop_of_the_docs(capsys):
    runpy.run_path(str(EXAMPLES / "stream.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "frames per push: [1, 4, 4, 0]" in said and "image: (1, 3, 1, 64, 96)" in said


def test_the_asynchronous_example(own, tmp_path, capsys, monkeypatch):
    latent = latents(own, 6)[0]
    path, out = tmp_path / "a.safetensors", tmp_path / "a.mkv"
    save_latent(path, latent, space=own.space.fingerprint, height=32, width=46, fps=8)
    example, before = runpy.run_path(str(EXAMPLES / "stream_async.py")), threading.active_count()
    found = example["run"](own, LatentReader(path), out, codec="ffv1")
    assert found["frames"] == 21 and 0 < found["first_frame_ms"] < 60_000 and found["fps"] > 0
    assert np.array_equal(frames_of(out), to_bytes(own.decode(latent[None])[..., :46]))
    assert threading.active_count() <= before, "its threads have ended"

    def failing(*_: object) -> None:
        raise OSError("the disk is full")

    from experiments import video_out

    monkeypatch.setattr(video_out.VideoFile, "write", failing)
    with pytest.raises(OSError, match="disk is full"):
        example["run"](own, LatentReader(path), tmp_path / "b.mkv")
    assert not list(tmp_path.glob("*b.mkv*"))
    monkeypatch.undo()
    model = export("baseline_debug", tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["stream_async.py", str(model), str(path), str(tmp_path / "c.mp4")])
    example["main"]()
    said = capsys.readouterr().out
    assert "21 frames to" in said and "the first after" in said
