"""What a process holds in training, by hand and by what FSDP2 really deals out."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from decoders.sharding import shard
from experiments import recompute, show
from experiments.compose import ConfigError
from experiments.config import build_decoder, build_space, load
from experiments.states import GIB, states

FSDP = ("trainer.strategy=fsdp", "trainer.devices=3")


class Two(nn.Module):
    """A network of 8 x 16 numbers, which is a block, and 16 x 4 others; an encoder of 5 that is trained; a frozen one of 100."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
        self.encoder = nn.Linear(1, 5, bias=False)
        self.frozen = nn.Linear(10, 10, bias=False).requires_grad_(False)
        self.blocks = [self.model[0]]

    def trainable(self):
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def inference_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def shard_units(self) -> list[nn.Module]:
        return self.blocks


def of(*overrides: str, ema: bool = True, decoder: nn.Module | None = None):
    experiment = load("regen_debug", [*overrides, "ema={decay: 0.9}" if ema else "ema=null"])
    return states(experiment, decoder or Two())


def test_by_hand() -> None:
    trained, averaged = 8 * 16 + 16 * 4 + 5, 8 * 16 + 16 * 4
    for plain in (("trainer.strategy=ddp", "trainer.devices=8"), ()):
        assert of(*plain).gib * GIB == 16 * trained + 4 * averaged
        assert of(*plain, ema=False).gib * GIB == 16 * trained
        assert of(*plain).gradients_gib * GIB == 4 * averaged, "of the network"
    # 16, 4 and 5 rows over 3 processes: 6, 2 and 2 of them at most.
    slices_trained, slices_averaged = 6 * 8 + 2 * 16 + 2 * 1, 6 * 8 + 2 * 16
    whole = 8 * (16 * 4 + 5) + 2 * 8 * (8 * 16)  # what is no block; and of blocks two at a time
    found = of(*FSDP)
    assert found.gib * GIB == 16 * slices_trained + 4 * slices_averaged + whole
    assert found.gradients_gib * GIB == 4 * (16 * 4)
    no_blocks = Two()
    no_blocks.blocks = []
    assert of(*FSDP, ema=False, decoder=no_blocks).gib * GIB == 16 * slices_trained + 8 * trained


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), "auto, one process"),
        (("trainer.devices=4",), "auto (DDP), each of 4 processes"),
        (("trainer.devices=4", "trainer.num_nodes=2", "trainer.strategy=ddp"), "ddp (DDP), each of 8 processes"),
        (("trainer.devices=4", "trainer.num_nodes=2", "trainer.strategy=fsdp"), "fsdp, spread over 8 of 8 processes"),
        (
            ("trainer.devices=4", "trainer.num_nodes=2", "trainer.strategy=fsdp", "trainer.shard_group=node"),
            "fsdp, spread over 4 of 8 processes",
        ),
        (("trainer.devices=4", "trainer.strategy=fsdp", "trainer.shard_group=2"), "fsdp, spread over 2 of 4 processes"),
    ],
)
def test_the_strategy_is_told(overrides: tuple[str, ...], said: str) -> None:
    assert f"trainer.strategy={said}" in of(*overrides).strategy


@pytest.fixture(params=[1, 3, 8, 64])
def mesh(request):
    """Processes that nobody else runs: what this one, the first, holds is what it would hold."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield init_device_mesh("cpu", (request.param,), mesh_dim_names=("shards",))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["regen_debug", "refdecoder_debug", "flashdecoder_debug"])
def test_slices_are_those_that_fsdp_deals_out(mesh, name: str) -> None:
    experiment = load(name, ["trainer.strategy=fsdp", f"trainer.devices={mesh.size()}", "ema=null"])
    decoder = build_decoder(experiment, build_space(experiment))
    told = states(experiment, decoder)
    units = decoder.shard_units()
    inside = {id(p) for unit in units for p in unit.parameters()}
    roots = [child for child in decoder.children() if any(p.requires_grad for p in child.parameters())]
    rest = sum(p.numel() for root in roots for p in root.parameters() if id(p) not in inside)
    largest = max((sum(p.numel() for p in unit.parameters()) for unit in units), default=0)
    shard(roots, units, mesh)
    held = sum(p.to_local().numel() for _, p in decoder.trainable())
    assert told.gib * GIB == pytest.approx(16 * held + 8 * rest + 16 * largest, abs=1)


def test_the_peak_has_no_gradients_of_blocks_that_left() -> None:
    """One block of 4096 numbers a clip of 2: gradients, not activations, are what counts."""
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    shapes = {"s": (2, 64)}
    everything = show.fake_steps(network, shapes, autocast=False)[2]
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    left = show.fake_steps(network, shapes, autocast=False, leaving=list(network))[2]
    block = 4 * 64 * 64
    assert 2 * block <= everything < 2.5 * block and block <= left < 1.5 * block


def test_show_and_doctor_and_checkpointing_agree(runs_root, capsys) -> None:
    overrides = [*FSDP, "trainer.checkpointing=auto", "trainer.memory_gib=1", "trainer.accelerator=cpu"]
    experiment = load("flashdecoder_debug", overrides)
    space = build_space(experiment)
    with torch.device("meta"):
        decoder = build_decoder(experiment, space)
    expected = states(experiment, decoder).gib
    assert recompute.count(experiment, space).states == expected
    estimate = show.memory_estimate(experiment, decoder)
    assert estimate.states.gib == expected and estimate.peak > expected
    alone = dataclasses.replace(experiment, trainer=dataclasses.replace(experiment.trainer, strategy="ddp"))
    with torch.device("meta"):
        decoder = build_decoder(alone, space)
    assert show.memory_estimate(alone, decoder).peak > estimate.peak
    assert show.main(["flashdecoder_debug", *overrides]) == 0
    said = capsys.readouterr().out
    assert "memory per GPU, estimated for trainer.strategy=fsdp, spread over 3 of 3 processes" in said
    assert f" {expected:.2f} " in said


def test_what_cannot_be_sharded_is_told_by_show_and_doctor(runs_root) -> None:
    from experiments.doctor_experiment import Case

    with pytest.raises(ConfigError, match=r"trainer.strategy=fsdp: the adversarial terms .* use trainer.strategy=ddp"):
        show.main(["flashdecoder_gan_debug", "trainer.strategy=fsdp"])
    for name, status, said in (
        ("flashdecoder_gan_debug", "FAIL", "use trainer.strategy=ddp"),
        ("flashdecoder_debug", "OK", "trainer.strategy=fsdp, spread over 3 of 3 processes"),
    ):
        case = Case(load(name, [*FSDP, "trainer.accelerator=cpu"]), name, [], SimpleNamespace())
        finding = case.check_memory()
        assert finding.status == status and said in finding.says
