"""How a run is told to leave: Ctrl-C, SIGTERM, and SIGUSR1, by which SLURM warns a job of its end (``--signal=SIGUSR1@180``).

In the midst of training a signal is only noted: the step is finished, saved, and then the run leaves. SIGUSR1 also has the
job queued again, so that the same command goes on as soon as there is room.
"""

import os
import signal
import subprocess
import sys
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

STAY, LEAVE, REQUEUE = 0, 1, 2  # what a run was told; the larger counts where processes were told different things
TOLD = {signal.SIGINT: LEAVE, signal.SIGTERM: LEAVE, signal.SIGUSR1: REQUEUE}


class Signals:
    """While entered, SIGUSR1 ends the process in good order and queues the SLURM job again.

    Between :meth:`hold` and :meth:`release` all three signals are only noted in ``told``, for whoever saves; a second
    Ctrl-C leaves at once. On the way out the first process asks SLURM for the requeue.
    """

    def __init__(self) -> None:
        self.told = STAY
        self._held = False
        self._before: dict[int, Any] = {}
        self._outer: Any = None
        self._process = os.getpid()

    def __enter__(self) -> "Signals":
        self._outer = signal.signal(signal.SIGUSR1, self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        self.release()
        signal.signal(signal.SIGUSR1, self._outer)
        if self.told == REQUEUE and rank_zero_only.rank == 0:
            requeue()

    def hold(self) -> None:
        """From here on signals are only noted."""
        self._held = True
        self._before = {number: signal.signal(number, self._on_signal) for number in TOLD}

    def release(self) -> None:
        """Signals act as before :meth:`hold`."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._held = {}, False

    def agree(self, trainer: Trainer) -> int:
        """What any process was told, on all of them; every process must ask at the same place."""
        if trainer.world_size > 1:
            told = torch.tensor(self.told, device=trainer.strategy.root_device)
            self.told = int(trainer.strategy.reduce(told, reduce_op="max"))
        return self.told

    def _on_signal(self, number: int, frame) -> None:
        if os.getpid() != self._process:  # a forked decoding worker: whole groups of processes are signalled
            return
        if number == signal.SIGINT and self.told:
            signal.default_int_handler(number, frame)
        if self.told < TOLD[signal.Signals(number)]:
            self.told = TOLD[signal.Signals(number)]
            after = "stopping after this step or validation" if self._held else "stopping"
            print(f"\n{signal.Signals(number).name}: {after}; the same command resumes", flush=True)
        if not self._held:
            raise SystemExit(1)


def requeue() -> bool:
    """Have this SLURM job queued again. False, with the reason on stderr, where that fails; outside of SLURM nothing is done."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        reason = done.stderr.strip() if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if reason is None:
        print(f"job {job} is queued again", flush=True)
        return True
    print(f"error: {' '.join(command)} failed ({reason}); submit the job again: it goes on by itself", file=sys.stderr)
    return False
