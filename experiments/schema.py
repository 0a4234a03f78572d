"""What an experiment's YAML may say outside its family, its latent space and its data: the dataclasses, with their checks."""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from decoders.training import EmaConfig, GuardConfig, OptimConfig, ValidationConfig, check_loss_weights


@dataclass
class TrainerConfig:
    """How long, on what, and how often something is looked at. Steps are optimiser steps."""

    max_steps: int = MISSING
    max_minutes: float | None = None  # training stops in good order after so long, even before max_steps
    # The run is complete after so many minutes of training, and a cosine ends there: for comparisons on equal time. Steps then
    # depend on the machine; max_steps is only a bound.
    budget_minutes: float | None = None
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | str = "auto"  # a number, or "auto" for all there are on this node
    num_nodes: int = 1
    # auto: DDP with more than one process. fsdp: FSDP2, weights, gradients, moments and average are spread over the processes
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    shard_group: int | str | None = None  # fsdp: how many processes share one copy; "node": those of a node; null: all
    precision: Literal["32-true", "bf16-mixed", "auto"] = "32-true"  # auto: bf16 where the hardware has it
    # torch.compile. blocks: on each of the network's repeated blocks, which share kernels that take any size, and on how LPIPS
    # compares features; true: on the network as a whole, anew for sizes that differ
    compile: bool | str = False
    # Convolutions of LPIPS in training. auto: autocast's on a GPU, float32 on a CPU
    lpips_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    encode_ahead: bool = False  # encode the next batch, on a GPU beside the current one's step; the same numbers
    # When blocks are computed again in the backward pass. decoder: as decoder.checkpointing says; auto: at the sizes whose
    # activations do not fit, as far as they can be counted before (make show); the same numbers
    checkpointing: Literal["decoder", "auto"] = "decoder"
    memory_gib: float | None = None  # of one device, for checkpointing=auto; null: what the device says
    accumulate_grad_batches: int = 1
    val_every_steps: int = 1000
    log_every_steps: int = 50
    checkpoint_every_steps: int = 1000
    keep_checkpoints: int = 1  # how many stay, the last included
    async_checkpoints: bool = (
        False  # written beside training, from a copy in memory (fp32 with Adam and EMA: 16 bytes a weight)
    )
    guard: GuardConfig | None = field(default_factory=GuardConfig)  # null: the first bad step ends the run
    num_sanity_val_steps: int = 0
    deterministic: bool = False  # slower kernels that repeat bit for bit; an error where there are none
    benchmark: bool = False  # cuDNN autotuning: for one fixed size; with several sizes it searches again at each
    progress_bar: bool = True
    peak_tflops: float | int | str | None = (
        "measured"  # of one device: TFLOP/s, "measured" before step 0, or null: no perf/mfu
    )

    def __post_init__(self) -> None:
        often = ("val_every_steps", "log_every_steps", "checkpoint_every_steps")
        for name in ("max_steps", "num_nodes", "accumulate_grad_batches", *often):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.shard_group not in ("node", None) and (isinstance(self.shard_group, str) or self.shard_group < 1):
            raise ValueError(f"shard_group={self.shard_group} must be a number of processes, node, or null for all")
        for name in ("max_minutes", "budget_minutes"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0, or null for no limit")
        if self.compile not in (False, True, "blocks"):
            raise ValueError(f"compile={self.compile} must be true, false or blocks")
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise ValueError(f"memory_gib={self.memory_gib} must be above 0, or null for what the device has")
        if self.peak_tflops not in ("measured", None) and (isinstance(self.peak_tflops, str) or self.peak_tflops <= 0):
            raise ValueError(f"peak_tflops={self.peak_tflops} must be above 0, measured, or null for no MFU")
        if isinstance(self.devices, str) and self.devices != "auto":
            raise ValueError(f"devices={self.devices} must be a number or auto")
        if isinstance(self.devices, int) and self.devices < 1:
            raise ValueError(f"devices={self.devices} must be 1 or more (trainer.accelerator=cpu avoids the GPU)")


@dataclass
class Experiment:
    """Everything that decides a run. The classes named first say what ``decoder`` to ``data`` may hold, see PARTS."""

    family: str = MISSING  # import path: decoders.flashdecoder.FlashDecoder
    latent_space: str = MISSING  # import path: decoders.latent_spaces.dct.DCT
    datamodule: str = MISSING  # import path: datamodules.clips.ClipData
    decoder: Any = MISSING  # the architecture
    objective: Any = MISSING  # what it is trained for, besides the weights of the loss terms
    space: Any = MISSING
    data: Any = MISSING
    loss_weights: dict[str, Any] = field(default_factory=dict)  # term -> number, or a schedule of the step
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig | None = None
    trainer: TrainerConfig = MISSING
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    init_from: str | None = None  # <experiment>[:ema|last|best]: weights only; resuming needs no key
    allow_unfinished_parent: bool = False
    train_parents: bool = False  # train init_from first where it has not been, and afterwards what beside names
    beside: list[str] = field(default_factory=list)  # other experiments whose results are shown beside this one's
    pad: Literal["error", "replicate"] = "error"  # what to do with a size that the latent space cannot encode
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must lie in 0 to 4294967295")
        for term, weight in self.loss_weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float | dict):
                raise ValueError(
                    f"loss_weights.{term}={weight} must be a number, or {{start: 0, end: 1, to_step: 1000}}"
                )
        for other in ("start", "transformer"):
            if self.init_from and getattr(self.objective, other, None) is not None:
                raise ValueError(
                    f"init_from={self.init_from} and objective.{other} both say where the weights come from, and the second would "
                    f"win; set objective.{other}=null"
                )
        # Whether the terms are the family's own is asked when the family is built; here only whether they can be read.
        check_loss_weights(self.loss_weights, frozenset(self.loss_weights))
