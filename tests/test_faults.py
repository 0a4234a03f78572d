"""What really happens to long runs: full disks, folders that vanish, files that are not ours, a process that fails."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning import Callback
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch.distributed import TCPStore

from experiments import background, checkpoints
from experiments import train as training
from experiments.callbacks import Progress
from experiments.checkpoints import LAST, DiskFull, FolderGone
from experiments.compose import ConfigError
from experiments.config import load
from experiments.failfast import FailFast
from experiments.resuming import check_resume, told_once
from experiments.runs import CONFIG
from experiments.train import train
from tests.test_train import QUICK, At, _assert_same

NAME = "flashdecoder_debug"
ROOT = Path(__file__).parent.parent


def run(*overrides: str, callbacks=()) -> Path:
    overrides = (*QUICK, *overrides)
    return train(load(NAME, overrides), NAME, overrides, callbacks)


@pytest.fixture(autouse=True)
def handlers():
    """Give pytest its own signal handlers back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A run that was stopped after step 4."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_ROOT", str(tmp_path_factory.mktemp("begun")))
        with pytest.raises(SystemExit):
            run(callbacks=[At(4, lambda *_: os.kill(os.getpid(), signal.SIGINT))])
        return Path(os.environ["RUNS_ROOT"]) / NAME


@pytest.fixture
def folder(begun: Path, runs_root: Path) -> Path:
    """A copy of it."""
    shutil.copytree(begun, runs_root / NAME)
    return runs_root / NAME


class Payload:
    def __reduce__(self):
        return (os.system, ("touch harmed",))


def hostile(path: Path) -> None:
    path.write_bytes(pickle.dumps({"global_step": 3, "state_dict": Payload()}))


def hostile_zip(path: Path) -> None:
    torch.save(torch.load(path, weights_only=True) | {"callbacks": Payload()}, path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def foreign(path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(hostile, "might run code"), (hostile_zip, "might run code"), (truncated, "damaged"), (foreign, "no checkpoint")],
)
def test_a_checkpoint_that_is_not_ours_is_not_loaded(folder: Path, monkeypatch, spoil, message) -> None:
    monkeypatch.chdir(folder)
    spoil(folder / LAST)
    with pytest.raises(ConfigError, match=message):
        run()
    assert not (folder / "harmed").exists()


def test_a_checkpoint_of_another_experiment_is_refused_with_the_difference(folder: Path) -> None:
    state = torch.load(folder / LAST, weights_only=True)
    state["run"]["experiment"] = "other"
    state["run"]["config"] = state["run"]["config"].replace("lr: 0.002", "lr: 0.007")
    torch.save(state, folder / LAST)
    with pytest.raises(ConfigError, match=r"checkpoint of other.*\n  optim\.lr: 0\.007 -> 0\.002"):
        run()


def test_a_run_begun_before_a_key_existed_goes_on(folder: Path) -> None:
    state = torch.load(folder / LAST, weights_only=True)
    kept = yaml.safe_load((folder / CONFIG).read_text())
    del kept["data"]["latent_cache"], kept["optim"]["warmup_from"]
    (folder / CONFIG).write_text(yaml.safe_dump(kept))
    state["run"]["config"] = yaml.safe_dump(kept)
    torch.save(state, folder / LAST)
    assert check_resume(load(NAME, QUICK), folder).step == 4


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "file"))
    with pytest.raises(SystemExit, match=r"^error: the folder .* cannot be made \(Not a directory\): .*RUNS_ROOT"):
        training.main([NAME, *QUICK])


def test_no_process_leaves_before_the_first_has_asked_for_the_requeue() -> None:
    """With --kill-on-bad-exit, or torchrun, the one that leaves first ends the others."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second = FailFast(), FailFast()
    first.rank, second.rank, first.world_size, second.world_size = 0, 1, 2, 2
    first._store, second._store = server, TCPStore("127.0.0.1", server.port, wait_for_workers=False)
    leaving = threading.Thread(target=second.close, daemon=True)
    leaving.start()
    time.sleep(0.3)
    assert leaving.is_alive()
    first.close()
    leaving.join(5)
    assert not leaving.is_alive()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("often", [2, 100], ids=["found by saving", "found by TensorBoard"])
def test_a_folder_that_vanishes_ends_in_one_clear_error(runs_root: Path, often: int) -> None:
    """And TensorBoard's thread, which fails too, prints nothing of its own."""

    def vanish(trainer, pl_module) -> None:
        (runs_root / NAME).rename(runs_root / "elsewhere")

    with pytest.raises(FolderGone, match="is gone, or a mount that it is on, .*Bring it back"):
        run(f"trainer.checkpoint_every_steps={often}", "trainer.log_every_steps=1", callbacks=[At(3, vanish)])
    assert not (runs_root / NAME / LAST).exists()  # nothing was begun anew in its place
    if often == 2:
        assert torch.load(runs_root / "elsewhere" / LAST, weights_only=True)["global_step"] == 2


def test_what_is_said_of_an_error_has_a_line_of_its_own(capsys) -> None:
    bar, trainer = Progress(None), SimpleNamespace(max_steps=6, global_step=3)
    bar.on_train_start(trainer, None)
    assert not capsys.readouterr().err.endswith("\n"), "the bar's line is open while it trains"
    bar.on_exception(trainer, None, OSError())
    assert capsys.readouterr().err.endswith("\n")
    bar.teardown(trainer, None, "fit")
    assert capsys.readouterr().err == ""


def test_other_threads_and_other_errors_are_told_as_before(monkeypatch) -> None:
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    before = threading.excepthook

    def fail(error: Exception) -> None:
        raise error

    with told_once():
        thread = threading.Thread(target=fail, args=(OSError("a disk"),))
        thread.start()
        thread.join()
        for number, error in enumerate((ValueError("ours"), OSError("a disk"))):
            writer = _AsyncWriterThread(None, None, 0)
            writer.run = lambda error=error: fail(error)
            writer.start()
            writer.join()
            assert len(told) == 2, number
    assert [str(each.exc_value) for each in told] == ["a disk", "ours"] and threading.excepthook is before


def test_a_loader_that_fails_costs_no_step(runs_root: Path) -> None:
    """Between two steps the state is whole: it is saved before the error ends the run."""

    class Broken(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 3:
                trainer.datamodule.plan.request_at = fail

    def fail(name, draw):
        raise OSError("the server of the films is gone")

    with pytest.raises(OSError, match="server of the films"):
        run(callbacks=[Broken()])
    assert torch.load(runs_root / NAME / LAST, weights_only=True)["global_step"] == 3


def test_checkpoints_beside_training_are_the_same_files(runs_root: Path, monkeypatch, tmp_path: Path) -> None:
    """Written from a copy in memory while training goes on, slowly here; a failure is raised, and loses nothing."""
    plain = torch.load(run() / LAST, weights_only=True)
    real, threads, seen = torch.save, set(), []

    def slow(state, path):
        threads.add(threading.current_thread().name)
        time.sleep(0.2)  # training has changed the weights meanwhile
        real(state, path)
        seen.append(state["global_step"])

    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "beside"))
    monkeypatch.setattr(checkpoints.torch, "save", slow)
    overrides = ("trainer.async_checkpoints=true", "trainer.checkpoint_every_steps=3", "trainer.keep_checkpoints=3")
    folder = run(*overrides)
    assert threads == {"checkpoint-writer"} and seen == [3, 6, 9, 12, 15, 16]
    beside = torch.load(folder / LAST, weights_only=True)
    for part in ("state_dict", "ema", "seen"):
        _assert_same(beside[part], plain[part]) if part != "seen" else None
    assert beside["seen"] == plain["seen"]
    _assert_same(beside["optimizer_states"][0]["state"], plain["optimizer_states"][0]["state"])
    assert [path.name for path in sorted(folder.glob("step-*"))] == [f"step-{n:08d}.ckpt" for n in (12, 15, 16)]

    def full(state, path):
        if state["global_step"] >= 6:
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "full"))
    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(DiskFull, match="same command to resume"):
        run(*overrides)
    assert torch.load(tmp_path / "full" / NAME / LAST, weights_only=True)["global_step"] == 3


def test_a_copy_in_memory_is_a_copy() -> None:
    writer, weight = background.Background(), torch.arange(6.0).reshape(2, 3)
    with writer.checkpoint():
        kept = writer.keep({"a": weight, "b": [weight.T, 3], "empty": torch.zeros(0)})
        again = writer.keep({"a": weight})
    assert again["a"] is kept["a"] and kept["b"][0].data_ptr() != kept["a"].data_ptr()  # the same memory, another shape
    weight.zero_()
    assert kept["a"].sum() == 15 and torch.equal(kept["b"][0], kept["a"].T)
    with writer.checkpoint():
        assert writer.keep(weight).sum() == 0  # nothing of the checkpoint before is taken for this one's
    writer.submit(lambda: 1 / 0)
    writer.submit(lambda: pytest.fail("jobs after one that failed are dropped"))
    with pytest.raises(ZeroDivisionError):
        writer.wait()


def test_a_disk_that_is_really_full(tmp_path: Path, monkeypatch) -> None:
    """A mount with room for one checkpoint, its weights, and some of the second."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        monkeypatch.setenv("RUNS_ROOT", str(small))
        with pytest.raises(
            SystemExit, match=r"^error: no room to write .*same command to resume"
        ):  # one line, no traceback
            training.main([NAME, *QUICK, "trainer.checkpoint_every_steps=1", "trainer.keep_checkpoints=4"])
        kept = [torch.load(path, weights_only=True)["global_step"] for path in (small / NAME).glob("*.ckpt")]
        assert 1 <= max(kept) < 16 and not list((small / NAME).glob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=400m", small], check=True)
        training.main([NAME, *QUICK])  # with room again, the same command goes on
        assert torch.load(small / NAME / LAST, weights_only=True)["global_step"] == 16
    finally:
        subprocess.run(["umount", "-l", small], check=True)  # lazily: event files are still open here


# Lightning starts the second process by running this script again; torchrun starts both.
SCRIPT = """
import os, sys, time
from lightning import Callback
from experiments.config import load
from experiments.train import quiet, train

class Fail(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == int(os.environ["FAILS"]):
            open(os.environ["RUNS_ROOT"] + "/failed", "w").close()
            if os.environ["HOW"] == "kill":
                os.kill(os.getpid(), 9)
            raise ValueError("this GPU fell off the bus")
        if trainer.global_step == 2:
            time.sleep(float(os.environ["STUCK"]))  # as in a collective operation that never ends

if __name__ == "__main__":
    quiet()
    name, *overrides = sys.argv[1:]
    train(load(name, overrides), name, overrides, [Fail()])
"""


def fail(tmp_path: Path, launcher: list[str], rank: int, how: str = "raise") -> tuple[str, float]:
    """Standard error of a run of two processes, one of which fails while the other waits for 200 s, and seconds from the failure."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {"RUNS_ROOT": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    environment |= {"FAILS": str(rank), "STUCK": "200", "HOW": how, "PYTHONWARNINGS": "ignore"}
    command = [*launcher, str(script), NAME, *QUICK, "trainer.devices=2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode != 0
    return done.stderr, time.time() - (tmp_path / "failed").stat().st_mtime


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[sys.executable], TORCHRUN], ids=["lightning", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_the_job_with_its_reason_first(tmp_path: Path, launcher, rank: int) -> None:
    errors, seconds = fail(tmp_path, launcher, rank)
    assert errors.splitlines()[0] == f"error: rank {rank} of 2: ValueError: this GPU fell off the bus", errors[:3000]
    assert seconds < 20


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_job(tmp_path: Path) -> None:
    _, seconds = fail(tmp_path, [sys.executable], 1, how="kill")
    assert seconds < 20
