"""Weights spread over two processes on a CPU (FSDP2): the same training as DDP, and checkpoints that either goes on from."""

import pytest
import torch
from lightning import Callback
from ranks import FIXED, job, launch
from refdecoder_small import clip, small
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from decoders.sharding import gathered, is_sharded, shard, slice_like, unsharded, whole
from experiments.compose import ConfigError
from experiments.config import load
from experiments.strategy import check_sharding, compile_network
from experiments.train import build, train

# ---- refused, or not


@pytest.mark.parametrize(
    ("name", "reason"), [("flashdecoder_gan_debug", "discriminator"), ("baseline_debug", "does not say how")]
)
def test_what_cannot_be_sharded_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"fsdp.*{reason}.*strategy=ddp"):
        check_sharding(build(load(name)), 2, None)


def test_groups_must_divide_the_processes() -> None:
    decoder = build(load("regen_debug"))
    with pytest.raises(ConfigError, match="shard_group=3 must divide.*4"):
        check_sharding(decoder, 4, 3)
    for group in (2, "node", None):
        check_sharding(decoder, 4, group)
    for wrong in ("0", "rack"):
        with pytest.raises(ConfigError, match=f"shard_group={wrong} must be a number of processes, node, or null"):
            load("regen_debug", [f"trainer.shard_group={wrong}"])


def test_compile_takes_the_units_and_refuses_where_there_are_none(monkeypatch) -> None:
    decoder, compiled = build(load("regen_debug")), []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    compile_network(decoder, sharded=True)
    assert compiled == decoder.shard_units()
    compile_network(decoder, sharded=False)
    assert compiled[-1] is decoder.model
    with pytest.raises(ConfigError, match="gathered as a whole"):
        compile_network(build(load("flashdecoder_debug")), sharded=True)


# ---- one process: the functions by themselves


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("shards",))
    torch.distributed.destroy_process_group()


def test_a_sharded_module_is_read_written_and_gathered(mesh) -> None:
    holder = nn.Module()
    holder.root = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = {name: p.detach().clone() for name, p in holder.named_parameters()}
    x = torch.randn(5, 3)
    expected = holder.root(x)
    shard([holder.root], [holder.root[0]], mesh)
    assert is_sharded(holder) and all(isinstance(p, DTensor) for p in holder.parameters())
    found = holder.root(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()  # after which all is in slices again
    assert all(isinstance(p.grad, DTensor) for p in holder.parameters())
    found = gathered(dict(holder.named_parameters()))
    assert found.keys() == before.keys() and not any(isinstance(value, DTensor) for value in found.values())
    for name, parameter in holder.named_parameters():
        torch.testing.assert_close(found[name], before[name])
        with torch.no_grad():
            parameter.copy_(slice_like(2 * before[name], parameter))
        torch.testing.assert_close(whole(parameter.detach()), 2 * before[name])
    with unsharded(holder), torch.no_grad():
        for name, parameter in holder.named_parameters():
            assert not isinstance(parameter, DTensor)
            torch.testing.assert_close(parameter.detach(), 2 * before[name])
        inside = holder.root[1].weight @ holder.root[0](x).T  # not by way of the root: no hook gathers anything
    assert inside.shape == (2, 5)
    assert all(isinstance(p, DTensor) for p in holder.parameters())
    torch.testing.assert_close(gathered(dict(holder.named_parameters())), {k: 2 * v for k, v in before.items()})


def test_gathering_leaves_plain_tensors_as_they_are() -> None:
    plain = {"a": torch.ones(2)}
    assert gathered(plain)["a"] is plain["a"] and slice_like(plain["a"], torch.zeros(2)) is plain["a"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(shared=False),
        dict(reread=True),
        dict(attention="windowed"),
        dict(inject="controlnet"),
        dict(inject="none"),
    ],
)
def test_reference_parameters_are_those_without_a_gradient_where_there_is_no_reference(changes: dict) -> None:
    """Processes that have no reference give them zeros: one too few, and processes would wait for ever."""
    used = []
    for given in (True, False):
        model = small(**changes)
        latent, reference = clip(model)
        reference = reference if given and model.uses_reference else None
        model(latent, reference).square().mean().backward()
        used.append({name for name, p in model.named_parameters() if p.grad is not None})
    named = {id(p) for p in model.reference_parameters()}
    assert {name for name, p in model.named_parameters() if id(p) in named} == used[0] - used[1]
    assert used[1] <= used[0]
    assert bool(named) == model.uses_reference


# ---- two processes

DDP, FSDP = "trainer.strategy=ddp", "trainer.strategy=fsdp"
TEN = ("trainer.max_steps=10", "ema={decay: 0.9, warmup_steps: 2}")
FOUR = ("data.train.image=null", "data.train.video.share=1.0", "trainer.max_steps=4")  # clips of one size
HALVES = ("data.train.video.batch_size=1", "trainer.accumulate_grad_batches=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """REGEN: five steps by DDP and five by FSDP2, and the other way round. RefDecoder: ten by each. FlashDecoder: steps of two
    batches of a clip for each process."""
    folder = tmp_path_factory.mktemp("fsdp")
    jobs = [
        job("regen_debug", "a", *TEN, DDP, stop=5),
        job("regen_debug", "a", *TEN, FSDP),
        job("regen_debug", "b", *TEN, FSDP, stop=5, copy_to="one"),
        job("regen_debug", "b", *TEN, DDP),
        job("refdecoder_debug", "c", *TEN, DDP),
        job("refdecoder_debug", "d", *TEN, FSDP),
        job("flashdecoder_debug", "e", *FOUR, *HALVES, DDP),
        job("flashdecoder_debug", "f", *FOUR, *HALVES, FSDP),
    ]
    return folder, launch(folder, 2, *jobs)


@pytest.mark.slow
def test_ten_steps_are_those_of_ddp_and_either_goes_on_from_the_other(runs) -> None:
    _, found = runs
    for rank in range(2):
        for ddp, fsdp, steps in ((0, 2, 5), (3, 1, 5), (4, 5, 10)):
            one, other = found[ddp][rank], found[fsdp][rank]
            assert one["keys"] == other["keys"] and len(other["losses"]) == steps
            assert other["losses"] == pytest.approx(one["losses"], rel=1e-4)
            for left, right in zip(one["norms"], other["norms"], strict=True):
                assert right == pytest.approx(left, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_every_process_has_a_part_of_weights_moments_and_average(runs) -> None:
    _, found = runs
    for one in (found[1], found[2], found[5]):
        for rank in range(2):
            assert one[rank]["share"] == pytest.approx(0.5, abs=0.02)
            assert one[rank]["kept_in_slices"]
    assert found[0][0]["share"] == 1


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: str) -> None:
    assert found.keys() == expected.keys(), where
    for name, value in expected.items():
        # Behind a norm the gradient of a bias is rounding noise, which Adam makes as large as any.
        noise = name.startswith(("encoder.stages", "model.backbone", "model.injection")) and name.endswith("bias")
        torch.testing.assert_close(found[name], value, atol=2e-3 if noise else 1e-4, rtol=1e-3, msg=f"{where} {name}")


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), [("a", "b"), ("c", "d")])
def test_checkpoints_are_whole_and_the_same(runs, one: str, other: str) -> None:
    """``a`` and ``d`` were written by FSDP2, ``b`` and ``c`` by DDP."""
    folder, _ = runs
    first, second = (torch.load(next(folder.glob(f"{r}/*/last.ckpt")), weights_only=True) for r in (one, other))
    assert first["global_step"] == second["global_step"] == 10
    close(first["state_dict"], second["state_dict"], "weights")
    close(first["ema"], second["ema"], "average")
    if "moments" in first:  # of latents, by the averaged encoder
        torch.testing.assert_close(first["moments"], second["moments"], atol=1e-4, rtol=1e-3)
    left, right = (state["optimizer_states"][0] for state in (first, second))
    assert left["param_groups"] == right["param_groups"]  # the names of parameters are there, too
    assert left["state"].keys() == right["state"].keys()
    for number, moments in left["state"].items():
        assert moments["step"] == right["state"][number]["step"]
        torch.testing.assert_close(moments["exp_avg"], right["state"][number]["exp_avg"], atol=1e-4, rtol=1e-2)
    names = sorted(path.name for path in folder.glob(f"{one}/*/weights-*.safetensors"))
    assert names == sorted(path.name for path in folder.glob(f"{other}/*/weights-*.safetensors"))
    assert names == [f"weights-{kind}.safetensors" for kind in ("best", "ema", "last")]
    for name in names:
        files = [load_file(next(folder.glob(f"{root}/*/{name}"))) for root in (one, other)]
        close(files[0], files[1], name)


@pytest.mark.slow
def test_one_process_goes_on_from_a_sharded_checkpoint(runs, monkeypatch) -> None:
    folder, _ = runs
    saved = torch.load(next(folder.glob("one/*/last.ckpt")), weights_only=True)
    assert saved["global_step"] == 5
    seen = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            seen["weights"] = {name: value.clone() for name, value in pl_module.state_dict().items()}
            seen["moments"] = {i: m["exp_avg"].clone() for i, m in trainer.optimizers[0].state_dict()["state"].items()}

        def on_train_end(self, trainer, pl_module) -> None:
            seen["step"] = trainer.global_step

    overrides = [*FIXED, *TEN, "trainer.devices=1"]
    monkeypatch.setenv("RUNS_ROOT", str(folder / "one"))
    train(load("regen_debug", overrides), "regen_debug", overrides, [Look()])
    assert seen["step"] == 10
    torch.testing.assert_close(seen["weights"], saved["state_dict"], atol=0, rtol=0)
    moments = {number: one["exp_avg"] for number, one in saved["optimizer_states"][0]["state"].items()}
    torch.testing.assert_close(seen["moments"], moments, atol=0, rtol=0)


@pytest.mark.slow
def test_accumulated_steps_of_two_processes_are_those_of_one_with_four_times_the_batch(runs, monkeypatch) -> None:
    folder, found = runs
    monkeypatch.setenv("RUNS_ROOT", str(folder / "whole"))
    overrides = [*FIXED, *FOUR, "data.train.video.batch_size=4"]
    whole = train(load("flashdecoder_debug", overrides), "flashdecoder_debug", overrides)
    expected = torch.load(whole / "last.ckpt", weights_only=True)
    for number, root in ((6, "e"), (7, "f")):
        assert [len(rank["keys"]) for rank in found[number]] == [8, 8]  # two batches a step
        assert len({key for rank in found[number] for keys in rank["keys"] for key in keys}) == 16
        own = torch.load(next(folder.glob(f"{root}/*/last.ckpt")), weights_only=True)
        assert own["seen"]["clips"] == expected["seen"]["clips"] == 16 and own["global_step"] == 4
        close(own["state_dict"], expected["state_dict"], root)


# ---- slow: more of what goes together


@pytest.mark.slow
def test_checkpointing_and_resume_change_nothing(tmp_path) -> None:
    """Two processes. Blocks run again in the backward pass; FSDP2 after FSDP2 bit for bit."""
    again = ("decoder.checkpointing=true", "decoder.encoder.checkpointing=true")
    jobs = [
        job("regen_debug", "plain", *TEN, FSDP),
        job("regen_debug", "resumed", *TEN, FSDP, stop=5),
        job("regen_debug", "resumed", *TEN, FSDP),
        job("regen_debug", "again", *TEN, FSDP, *again),
        job("refdecoder_debug", "ref", *TEN, FSDP),
        job("refdecoder_debug", "ref_again", *TEN, FSDP, "decoder.checkpointing=true"),
    ]
    found = [one[0]["losses"] for one in launch(tmp_path, 2, *jobs)]
    plain, first, second, again, reference, reference_again = found
    assert first + second == plain
    assert again == pytest.approx(plain, rel=1e-4)
    assert reference_again == pytest.approx(reference, rel=1e-4)
    for name in ("last.ckpt", "weights-ema.safetensors"):
        files = [next(tmp_path.glob(f"{root}/*/{name}")) for root in ("plain", "resumed")]
        if name.endswith("ckpt"):
            left, right = (torch.load(file, weights_only=True)["state_dict"] for file in files)
        else:
            left, right = (load_file(file) for file in files)
        torch.testing.assert_close(left, right, atol=0, rtol=0)


@pytest.mark.slow
def test_compiled_blocks_that_are_run_again_train_the_same(tmp_path) -> None:
    """Two processes, clips of one size: most of the time is the compiler's."""
    both = ("decoder.checkpointing=true", "trainer.compile=true")
    one_task = ("objective.interpolation=0.0", "objective.extrapolation=0.0")
    jobs = [
        job("regen_space_debug", "plain", *FOUR, *one_task, FSDP),
        job("regen_space_debug", "compiled", *FOUR, *one_task, FSDP, *both),
        job("refdecoder_debug", "ref", *FOUR, "objective.no_reference=0.0", FSDP),
        job("refdecoder_debug", "ref_compiled", *FOUR, "objective.no_reference=0.0", FSDP, *both),
    ]
    plain, compiled, reference, reference_compiled = (
        one[0]["losses"] for one in launch(tmp_path, 2, *jobs, timeout=900)
    )
    assert compiled == pytest.approx(plain, rel=1e-3)
    assert reference_compiled == pytest.approx(reference, rel=1e-3)


@pytest.mark.slow
def test_other_shapes_of_the_families_train_as_with_ddp(tmp_path) -> None:
    """Two processes, half of whose RefDecoder steps have no reference, each by its own draw."""
    half = "objective.no_reference=0.5"
    variants = [
        ("refdecoder_debug", half, "decoder.attention=windowed"),
        ("refdecoder_debug", half, "decoder.inject=controlnet", "decoder.residual=none"),
        ("refdecoder_debug", half, "decoder.shared=false"),
        ("regen_space_debug",),
        ("regen_debug", "decoder.conditioning=in_context", "decoder.modulation=single"),
        ("flashdecoder_debug",),
    ]
    jobs = [
        job(name, f"{number}{kind[-4:]}", *TEN, *changes, kind)
        for number, (name, *changes) in enumerate(variants)
        for kind in (DDP, FSDP)
    ]
    found = launch(tmp_path, 2, *jobs)
    for number, variant in enumerate(variants):
        for rank in range(2):
            ddp, fsdp = (one[rank]["losses"] for one in found[2 * number : 2 * number + 2])
            assert len(ddp) == 10 and fsdp == pytest.approx(ddp, rel=1e-4), variant


@pytest.mark.slow
def test_four_processes_in_one_group_or_in_two(tmp_path) -> None:
    """With groups of two each process has half of the weights, else a quarter; either goes on from the other."""
    ten = (*TEN, "data.sources.unseen.clips_per_video=2")  # a clip to validate for each
    pairs = (FSDP, "trainer.shard_group=2")
    jobs = [
        job("regen_debug", "ddp", *ten, DDP),
        job("regen_debug", "all", *ten, FSDP, stop=5),
        job("regen_debug", "all", *ten, *pairs),
        job("regen_debug", "pairs", *ten, *pairs, stop=5),
        job("regen_debug", "pairs", *ten, FSDP),
    ]
    ddp, *found = launch(tmp_path, 4, *jobs)
    for rank in range(4):
        for first, second in ((0, 1), (2, 3)):
            losses = found[first][rank]["losses"] + found[second][rank]["losses"]
            assert losses == pytest.approx(ddp[rank]["losses"], rel=1e-4)
        for number, share in enumerate((0.25, 0.5, 0.5, 0.25)):
            assert found[number][rank]["share"] == pytest.approx(share, abs=0.03)
