"""A run that is stopped, wherever that is, goes on as if it had not been: its numbers in TensorBoard, signals, SLURM."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from lightning import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from experiments import signals
from experiments.checkpoints import LAST, Checkpoints
from experiments.config import load
from experiments.runs import run_name
from experiments.train import train
from tests.test_train import QUICK, At, _assert_same

NAME = "flashdecoder_debug"
ROOT = Path(__file__).parent.parent
STEPS = ("trainer.max_steps=10", "trainer.val_every_steps=4", "trainer.checkpoint_every_steps=2")
FOLDER = run_name(NAME, STEPS)


def run(*overrides: str, callbacks=()) -> Path:
    overrides = (*QUICK, *overrides)
    return train(load(NAME, overrides), NAME, overrides, callbacks)


@pytest.fixture(autouse=True)
def handlers():
    """Give pytest its own signal handlers back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of all its points, in order; without times, which differ."""
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    board.Reload()
    tags = [tag for tag in board.Tags()["scalars"] if not tag.startswith("perf/")]
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}


class Snapshots(Callback):
    """Copies the run's folder at certain moments: what a kill -9 would leave."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def take(self, trainer, moment: str) -> None:
        if not (self.root / moment).exists():
            if trainer.logger is not None:
                trainer.logger.experiment.flush()  # the worst case: what was logged so far is on the disk
            shutil.copytree(trainer.default_root_dir, self.root / moment / FOLDER)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 1:
            self.take(trainer, "before any checkpoint")
        if trainer.global_step in (7, 8):
            self.take(trainer, f"after step {trainer.global_step}, before it is saved")

    def on_validation_batch_start(self, trainer, pl_module, *_) -> None:
        if trainer.global_step == 8:
            self.take(trainer, "in a validation")

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.global_step == 8:
            self.take(trainer, "after a validation, before that is written down")
        if trainer.state.fn != "fit":
            self.take(trainer, "after the last evaluation, before that is written down")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 8:
            self.take(trainer, "after a validation")


@pytest.mark.slow
def test_numbers_in_tensorboard_are_neither_lost_nor_doubled(tmp_path: Path, monkeypatch) -> None:
    # A process numbers its event files, and TensorBoard reads files of one second by name: "10" before "9". A training process
    # opens two; this one opens twenty.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))
    moments, real = Snapshots(tmp_path / "killed"), Checkpoints.save

    def save(self, trainer, pl_module, *, owed=False):
        real(self, trainer, pl_module, owed=owed)
        if trainer.global_step in (6, 8):
            moments.take(trainer, f"after step {trainer.global_step} was saved")

    monkeypatch.setattr(Checkpoints, "save", save)
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "whole"))
    whole = run(*STEPS, callbacks=[moments])
    monkeypatch.setattr(Checkpoints, "save", real)
    expected, last = events(whole), torch.load(whole / LAST, weights_only=True)
    assert [step for step, _ in expected["train/loss"]] == list(range(1, 11))
    assert [step for step, _ in expected["val/psnr"]] == [4, 8, 10]  # with the last one, after training
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert len(left) == 9
    for moment in left:
        monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "killed" / moment))
        resumed = run(*STEPS)
        assert events(resumed) == expected, moment
        _assert_same(torch.load(resumed / LAST, weights_only=True)["state_dict"], last["state_dict"])


def fake_slurm(folder: Path, monkeypatch, *, scontrol: str = "exit 0") -> Path:
    """Commands of SLURM on PATH that write down how they were called, and a job's variables."""
    folder.mkdir()
    for name, does in (("scontrol", scontrol), ("srun", 'for a; do [ "$a" = -- ] && break; shift; done; exec "$@"')):
        command = folder / name
        command.write_text(f'#!/bin/bash\necho "{name} $*" >> {folder}/calls\n{does}\n')
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for variable, value in {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "bash"}.items():
        monkeypatch.setenv(variable, value)
    return folder / "calls"


def usr1(trainer, pl_module) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def test_sigusr1_saves_and_queues_the_job_again(runs_root: Path, tmp_path: Path, monkeypatch) -> None:
    calls = fake_slurm(tmp_path / "bin", monkeypatch)
    with pytest.raises(SystemExit):
        run(callbacks=[At(5, usr1)])
    assert torch.load(runs_root / NAME / LAST, weights_only=True)["global_step"] == 5
    assert calls.read_text() == "scontrol requeue 4711\n"
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    with pytest.raises(SystemExit):  # in a validation: all is saved before it, and it is made up for
        run(callbacks=[InValidation(8)])
    state = torch.load(runs_root / NAME / LAST, weights_only=True)
    assert state["global_step"] == 8 and state["run"]["validation_owed"]
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(SystemExit):  # before the first step: there is nothing to save
        run(callbacks=[BeforeTraining()])
    assert calls.read_text().splitlines()[1:] == ["scontrol requeue 4711", "scontrol requeue 12_3"]
    folder = run()
    assert [step for step, _ in events(folder)["val/psnr"]] == [8, 16]


class InValidation(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_start(self, trainer, pl_module, *_) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)


class BeforeTraining(Callback):
    def on_fit_start(self, trainer, pl_module) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)


def test_a_requeue_that_fails_says_what_to_do(tmp_path: Path, monkeypatch, capsys) -> None:
    fake_slurm(tmp_path / "bin", monkeypatch, scontrol="echo 'Requeue disabled' >&2; exit 1")
    assert signals.requeue() is False
    assert "scontrol requeue 4711 failed (Requeue disabled); submit the job again" in capsys.readouterr().err
    monkeypatch.delenv("SLURM_JOB_ID")
    assert signals.requeue() is False and capsys.readouterr().err == ""  # no SLURM: SIGUSR1 only saves


@pytest.mark.parametrize("script", sorted((ROOT / "experiments" / "slurm").iterdir()), ids=lambda path: path.name)
def test_scripts_are_shell_and_run_what_they_say(script: Path, tmp_path: Path, monkeypatch) -> None:
    """Parsed, and run as SLURM would with commands that only write down how they were called."""
    subprocess.run(["bash", "-n", script], check=True)
    calls = fake_slurm(tmp_path / "bin", monkeypatch)
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/bash\necho node7\necho node8\n")
    for name in ("python", "torchrun"):
        command = tmp_path / "bin" / name
        command.write_text(f'#!/bin/bash\necho "{name} $*" >> {calls}\n')
        command.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2"}
    environment |= {"SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_SUBMIT_DIR": str(ROOT)}
    environment |= {"NODE_RANK": "1", "MASTER_ADDR": "node7", "NUM_NODES": "2", "PYTHON": "python"}
    command = ["bash", script, "flashdecoder_xl_stage2", "optim.lr=1e-4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    called = calls.read_text()
    assert "-m experiments.train flashdecoder_xl_stage2 optim.lr=1e-4" in called
    assert "trainer.num_nodes=2" in called and "trainer.devices=8" in called
    refused = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "which experiment?" in refused.stderr


def test_lightnings_own_handlers_stay_off_under_srun(monkeypatch) -> None:
    from experiments.train import _scheduler

    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    assert _scheduler() == []
    for variable, value in {
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": "8",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_JOB_NAME": "train",
    }.items():
        monkeypatch.setenv(variable, value)
    [environment] = _scheduler()
    assert environment.auto_requeue is False
    for variable in ("TORCHELASTIC_RUN_ID", "GROUP_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(variable, "1")
    assert _scheduler() == []  # torchrun in a job: its own environment
