"""`make cache-latents` and training from what it wrote: the same keys and losses, resumption, several processes, refusals."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from itertools import islice
from pathlib import Path

import pytest
import torch
from lightning import Callback
from video_files import make_film

from datamodules import cached
from datamodules.cached import read_record
from datamodules.latent_cache import load_manifest
from decoders.latent_spaces.dct import DCT
from experiments import cache_latents
from experiments.cache_latents import CacheOptions, main
from experiments.compose import ConfigError
from experiments.config import load
from experiments.given_latents import give
from experiments.train import build, build_data, train

ROOT = Path(__file__).parent.parent
QUICK = ("trainer.progress_bar=false", "validation.num_shown=0")
EXACT = CacheOptions(dtype="float32", shard_mb=1)
# Two streams of 16 clips each; the shared space of the comparison, tiny.
WAN_MINI = (
    "latent_space=decoders.latent_spaces.wan_mini.WanMini", "data.train.video.num_frames=5", "data.train.video.size=[16,32]",
    "data.train.image.size=[16,16]", "data.sources.motion.num_videos=8", "data.sources.stills.num_videos=4", "data.val.unseen.num_frames=5", "data.val.unseen.size=[16,32]", "data.val.unseen.num_clips=1",
)  # fmt: skip


class Losses(Callback):
    """Keys and losses of every step."""

    def __init__(self) -> None:
        self.keys, self.losses, self.encoded = [], [], 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.keys.append(batch["key"])
        self.losses.append(float(outputs["loss"]))
        self.encoded += "latent" not in batch


def trained(root: Path, monkeypatch, name: str, *overrides: str) -> Losses:
    monkeypatch.setenv("RUNS_ROOT", str(root))
    seen, overrides = Losses(), (*QUICK, *overrides)
    train(load(name, overrides), name, overrides, [seen])
    return seen


def made(folder: Path, name: str, options: CacheOptions = EXACT, *overrides: str):
    options = CacheOptions(str(folder), options.views, options.dtype, options.shard_mb)
    return cache_latents.cache_latents(name, options, (*QUICK, *overrides))


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "index"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- training

STEPS = ("trainer.max_steps=6", "trainer.val_every_steps=6", *WAN_MINI)


def test_training_from_the_cache_equals_training_on_the_fly(tmp_path, monkeypatch):
    plain = trained(tmp_path / "plain", monkeypatch, "flashdecoder_debug", *STEPS)
    manifest = made(tmp_path / "cache", "flashdecoder_debug", EXACT, *STEPS)
    given = f"data.latent_cache.path={tmp_path / 'cache'}"
    fast = trained(tmp_path / "fast", monkeypatch, "flashdecoder_debug", *STEPS, given)
    assert (plain.encoded, fast.encoded) == (6, 0)
    assert fast.keys == plain.keys
    assert fast.losses == pytest.approx(plain.losses, rel=1e-5) and len(set(fast.losses)) == 6
    assert manifest.streams.keys() == {"video", "image"}
    assert os.listdir(tmp_path / "fast") == os.listdir(tmp_path / "plain"), "where the cache is makes no other run"


def opened(name: str, *overrides: str):
    """The datamodule of an experiment, with its cache, and its decoder."""
    experiment = load(name, (*QUICK, *overrides))
    data, decoder = build_data(experiment, None), build(experiment)
    give(experiment, decoder, data, name)
    return data, decoder.train()


def test_float16_costs_less_than_a_thousandth_of_the_loss(tmp_path):
    made(tmp_path / "cache", "flashdecoder_debug", CacheOptions(), *WAN_MINI)
    data, decoder = opened("flashdecoder_debug", *WAN_MINI, f"data.latent_cache.path={tmp_path / 'cache'}")
    for batch in islice(data.train_dataloader(), 3):
        latent = decoder.encode(batch["video"])
        assert 0 < (batch["latent"] - latent).abs().max() <= latent.abs().max() * 2**-11
        rounded, exact = (decoder.losses({**batch, "latent": one})["l1"].item() for one in (batch["latent"], latent))
        assert rounded == pytest.approx(exact, rel=1e-3)


def test_a_family_that_draws_from_the_posterior_draws_from_the_cache(tmp_path, capsys):
    made(tmp_path / "cache", "refdecoder_debug", EXACT, *WAN_MINI)
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'cache'} data.latent_cache.sample=true\n")
    given = (*WAN_MINI, f"data.latent_cache.path={tmp_path / 'cache'}")
    with pytest.raises(ConfigError, match=r"set data.latent_cache.sample=true, or objective.sample=false"):
        opened("refdecoder_debug", *given)
    data, decoder = opened("refdecoder_debug", *given, "data.latent_cache.sample=true")
    with pytest.raises(ConfigError, match="no draw from one Gaussian"):
        decoder.latent_space.gaussian = False
        give(load("refdecoder_debug", (*given, "data.latent_cache.sample=true")), decoder, data, "refdecoder_debug")
    plain, _ = opened("refdecoder_debug", *WAN_MINI)
    loader = iter(data.train_dataloader())
    for number, other in enumerate(islice(plain.train_dataloader(), 4)):
        batch = next(loader)
        mean, log_variance = decoder.latent_space.moments(other["video"])
        assert batch["key"] == other["key"] and (batch["latent"] - mean).abs().mean() > 1e-3
        deviation = (batch["latent"] - mean) / (0.5 * log_variance).exp()
        assert deviation.std().item() == pytest.approx(1.0, abs=0.25)
        losses = []
        for given_batch in (batch, other):
            torch.manual_seed(number)
            losses.append(decoder.losses(decoder.with_latent(given_batch))["l1"].item())
        assert losses[0] == pytest.approx(losses[1], rel=0.1)  # other noise in the latent, else the same draws


def test_sampling_without_a_cache_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="data.latent_cache.path is null"):
        trained(tmp_path, monkeypatch, "flashdecoder_debug", "data.latent_cache.sample=true")


# ---- making it


def test_stopping_resuming_sharing_and_adding_views_change_nothing(tmp_path, monkeypatch):
    """Byte by byte: in one go; stopped and resumed; by two processes; with the second view added later."""
    tiny = 1 / 2**8  # 4 KiB, so several files
    options = CacheOptions(views=2, dtype="float32", shard_mb=tiny)
    whole = made(tmp_path / "whole", "flashdecoder_debug", options)
    expected = contents(tmp_path / "whole")
    assert len(whole.shards()) == len(expected) - 1 >= 8

    looked, count = cached.look_of, iter(range(1000))

    def stop(video):
        if next(count) == 37:
            raise KeyboardInterrupt
        return looked(video)

    monkeypatch.setattr(cache_latents, "look_of", stop)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "stopped", "flashdecoder_debug", options)
    monkeypatch.setattr(cache_latents, "look_of", looked)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").rglob("*.safetensors")}
    assert 0 < len(kept) < len(whole.shards())
    with pytest.raises(
        ConfigError, match=r"lacks \d+ of 64 latents(.|\n)*make cache-latents exp=flashdecoder_debug out="
    ):
        trained(tmp_path / "runs", monkeypatch, "flashdecoder_debug", f"data.latent_cache.path={tmp_path / 'stopped'}")
    made(tmp_path / "stopped", "flashdecoder_debug", options)
    assert contents(tmp_path / "stopped") == expected
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())

    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        made(tmp_path / "shared", "flashdecoder_debug", options)
        assert bool(load_manifest(tmp_path / "shared").sizes) == (rank == "0")
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    assert contents(tmp_path / "shared") == expected

    made(tmp_path / "grown", "flashdecoder_debug", CacheOptions(views=1, dtype="float32", shard_mb=tiny))
    made(tmp_path / "grown", "flashdecoder_debug", options)
    assert contents(tmp_path / "grown") == expected


def films(folder: Path, num: int = 6) -> tuple[str, ...]:
    """Overrides for a stream over so many films."""
    folder.mkdir()
    for i in range(num):
        make_film(folder / f"{i}.mp4", 12, (32, 48), film=i)
    return (
        "data.train=null", f"data.sources.films={{path: '{folder}', kind: video}}", "data.max_bad_share=0.4",
        "data.train.v={sources: [films], size: [16, 32], num_frames: 5, batch_size: 1}",
    )  # fmt: skip


def test_bad_and_replaced_films_have_records_that_others_take_the_place_of(tmp_path, monkeypatch):
    overrides = films(tmp_path / "films")
    experiment = load("flashdecoder_debug", (*QUICK, *overrides))
    build_data(experiment, None).setup("fit")  # the index remembers six good films
    stamp = (tmp_path / "films" / "2.mp4").stat()
    size = stamp.st_size
    (tmp_path / "films" / "2.mp4").write_bytes(b"\0" * size)
    os.utime(tmp_path / "films" / "2.mp4", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    manifest = made(tmp_path / "cache", "flashdecoder_debug", EXACT, *overrides)
    bad = []
    for row in range(6):
        try:
            read_record(str(tmp_path / "cache" / manifest.shards()[0].name), row)
        except cached.BadFile as error:
            bad.append((Path(error.path).name, str(error)))
    assert [name for name, _ in bad] == ["2.mp4"] and "to be cached" in bad[0][1]
    assert "2.mp4" in (tmp_path / "cache" / "quarantine.jsonl").read_text()

    make_film(tmp_path / "films" / "2.mp4", 12, (32, 48), film=2)  # repaired: its record stays bad
    shutil.copy(tmp_path / "films" / "4.mp4", tmp_path / "films" / "5.mp4")  # another film of the same name and length
    data, decoder = opened("flashdecoder_debug", *overrides, f"data.latent_cache.path={tmp_path / 'cache'}")
    loader = iter(data.train_dataloader())
    batches = [next(loader) for _ in range(6)]
    names = [batch["key"][0].split("#")[0] for batch in batches]
    assert not {"films/2.mp4", "films/5.mp4"} & set(names)
    for batch in batches:
        torch.testing.assert_close(batch["latent"], decoder.encode(batch["video"]))
    reasons = " ".join(entry["reason"] for entry in data.quarantine.entries)
    assert "when its latent was to be cached" in reasons and "the file was replaced" in reasons


def test_too_many_bad_films_stop_the_job(tmp_path):
    overrides = films(tmp_path / "films", 12)
    build_data(load("flashdecoder_debug", (*QUICK, *overrides)), None).setup("fit")
    for path in sorted((tmp_path / "films").iterdir())[:11]:
        stamp = path.stat()
        path.write_bytes(b"\0" * stamp.st_size)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(ConfigError, match=r"clips could not be read, more than data.max_bad_share = 0.01"):
        made(tmp_path / "cache", "flashdecoder_debug", EXACT, *overrides, "data.max_bad_share=0.01")


# ---- refusals


def test_latents_beyond_float16_say_which_type_holds_them(tmp_path, monkeypatch):
    monkeypatch.setattr(DCT, "moments", lambda self, video: (torch.full((1, 12, 3, 4, 6), 1e5), None))
    with pytest.raises(ConfigError, match=r"not finite as float16 \(largest 100000\): dtype=float32 holds larger ones"):
        made(tmp_path, "flashdecoder_debug", CacheOptions())


def test_what_cannot_be_cached_is_refused_with_the_reason(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="Regen encodes within its own loss"):
        made(tmp_path / "a", "regen_space_debug")
    with pytest.raises(ConfigError, match="out=FOLDER is needed: make cache-latents exp=flashdecoder_debug"):
        cache_latents.cache_latents("flashdecoder_debug", CacheOptions(), QUICK)
    latents = ("data.train=null", f"data.sources.saved={{path: '{tmp_path}', kind: latent}}", "data.val=null")
    with pytest.raises(ConfigError, match=r"saved|latent"):
        made(tmp_path / "b", "refdecoder_debug", EXACT, *latents, "data.train.s={sources: [saved], size: [32, 32]}")
    disk = namedtuple("disk", "total used free")(2**30, 2**30, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk)
    with pytest.raises(ConfigError, match="GiB of latents are still to be written"):
        made(tmp_path / "c", "flashdecoder_debug")
    with pytest.raises(ConfigError, match="views=0 must be 1 or more"):
        main(["flashdecoder_debug", "out=x", "views=0"])
    with pytest.raises(ConfigError, match="dtype"):
        main(["flashdecoder_debug", "out=x", "dtype=int8"])
    with pytest.raises(ConfigError, match="name an experiment"):
        main(["out=x"])
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ConfigError, match="RANK=2 must lie in 0 to WORLD_SIZE"):
        made(tmp_path / "d", "flashdecoder_debug")


def test_a_folder_of_another_cache_is_left_alone(tmp_path, monkeypatch):
    made(tmp_path / "cache", "flashdecoder_debug")
    before = contents(tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"about.seed: 0 -> 1"):
        made(tmp_path / "cache", "flashdecoder_debug", EXACT, "seed=1")
    with pytest.raises(ConfigError, match="dtype: float32 -> float16"):
        made(tmp_path / "cache", "flashdecoder_debug", CacheOptions())
    given = f"data.latent_cache.path={tmp_path / 'cache'}"
    with pytest.raises(ConfigError, match=r"config.size: \[32, 48\] -> \[32, 32\](.|\n)*make cache-latents"):
        trained(tmp_path / "runs", monkeypatch, "flashdecoder_debug", given, "data.train.video.size=[32,32]")
    assert contents(tmp_path / "cache") == before and not (tmp_path / "runs").exists()


def test_a_full_disk_keeps_what_is_whole(tmp_path, monkeypatch):
    replace, count = os.replace, iter(range(1000))

    def full(source, target):
        if str(target).endswith(".safetensors") and next(count) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="no room left in .*what is in it is whole"):
        made(tmp_path / "cache", "flashdecoder_debug")
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    made(tmp_path / "cache", "flashdecoder_debug")
    assert load_manifest(tmp_path / "cache").sizes


@pytest.mark.slow
def test_kills_and_torchrun_change_nothing(tmp_path):
    """Four times kill -9, then two processes by torchrun to the end: the files of one undisturbed process."""
    options = ("flashdecoder_debug", "views=24", "dtype=float32", "shard_mb=1", *QUICK)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    alone = [sys.executable, "-m", "experiments.cache_latents"]
    subprocess.run([*alone, *options, f"out={tmp_path / 'whole'}"], cwd=ROOT, env=environment, check=True)
    expected, rng, found = contents(tmp_path / "whole"), random.Random(0), [0]
    for _ in range(4):
        process = subprocess.Popen([*alone, *options, f"out={tmp_path / 'killed'}"], cwd=ROOT, env=environment)
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("killed/*/*.safetensors"))) == found[-1] and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found.append(len(list(tmp_path.glob("killed/*/*.safetensors"))))
    assert found == sorted(set(found)) and found[-1] < len(expected) - 1
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "-m"]
    command = [*launch, "experiments.cache_latents", *options, f"out={tmp_path / 'killed'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is complete" in done.stdout
    assert contents(tmp_path / "killed") == expected
    assert json.loads((tmp_path / "killed" / "manifest.json").read_text())["views"] == 24
