"""Trainings in several processes on a CPU, one after another in one start: importing torch is most of their time."""

import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SCRIPT = """
import gc, json, os, shutil, sys
from pathlib import Path
import torch
from lightning import Callback
from torch.distributed.tensor import DTensor
from experiments.config import load
from experiments.train import quiet, train
from tests.ranks import leave


class Record(Callback):
    def __init__(self, stop):
        self.stop, self.found = stop, {"losses": [], "norms": [], "keys": []}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        norms = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("grad_norm")}
        self.found["losses"].append(float(outputs["loss"]))
        self.found["norms"].append(norms)
        self.found["keys"].append(batch["key"])
        trainer.should_stop |= trainer.global_step == self.stop

    def on_train_end(self, trainer, module):
        trained = [p for _, p in module.trainable()]
        own = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in trained)
        kept = [v for state in trainer.optimizers[0].state.values() for v in state.values() if v.ndim]
        kept += list(module.ema.average.values()) if module.ema else []
        self.found["share"] = own / sum(p.numel() for p in trained)
        self.found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        self.found["kept_in_slices"] = all(isinstance(v, DTensor) for v in kept)


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["LOCAL_RANK"])
    quiet()
    for number, job in enumerate(json.loads(sys.argv[2])):
        os.environ["RUNS_ROOT"] = str(folder / job["root"])
        record = Record(job.get("stop"))
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        train(load(job["name"], job["overrides"]), job["name"], job["overrides"], [record])
        (folder / f"job{number}.rank{rank}.json").write_text(json.dumps(record.found))
        if rank == 0 and "copy_to" in job:
            shutil.copytree(folder / job["root"], folder / job["copy_to"])
        torch.distributed.barrier()
    leave()
"""
FIXED = (
    "trainer.progress_bar=false",
    "validation.num_shown=0",
    "validation.references=false",
    "validation.metrics=[psnr]",
)


def job(name: str, root: str, *overrides: str, **more) -> dict:
    """A training of ``name`` under ``root``; ``stop``: leave in good order after so many steps; ``copy_to``: afterwards copy
    the root there."""
    return {"name": name, "root": root, "overrides": [*FIXED, *overrides], **more}


def launch(folder: Path, processes: int, *jobs: dict, timeout: float = 300) -> list[list[dict]]:
    """What every process of every job saw."""
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    jobs = tuple(one | {"overrides": [*one["overrides"], f"trainer.devices={processes}"]} for one in jobs)
    command = [sys.executable, str(script), str(folder), json.dumps(jobs)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        own = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"], **own}
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            environment["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
        with open(folder / f"rank{rank}.txt", "w") as output:
            started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        for rank, process in enumerate(started):
            code = process.wait(timeout)
            assert code == 0, (folder / f"rank{rank}.txt").read_text()[-3000:]
    finally:
        for process in started:
            process.kill()
    return [
        [json.loads((folder / f"job{number}.rank{rank}.json").read_text()) for rank in range(processes)]
        for number in range(len(jobs))
    ]


def leave() -> None:
    """End a process of a group, all at once and successfully, without Python's own ending.

    gloo's threads still let go of Python objects while the interpreter is taken down, which aborts a process ("terminate
    called without an active exception") once in some hundred runs.
    """
    gc.collect()  # DDP's reducer stands in a cycle and holds the group
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
