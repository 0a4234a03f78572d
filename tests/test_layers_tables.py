"""Kept tables: made once, never poisoned by traced shapes."""

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from decoders.flashdecoder.stack import Grid, _table
from decoders.layers.tables import kept
from decoders.refdecoder.transformer import rope_table


def test_tables_are_made_once_and_the_oldest_goes():
    made = []

    @kept(2)
    def table(n: int):
        made.append(n)
        return torch.ones(n), torch.zeros(n)

    assert table(1) is table(1) and made == [1]
    table(2), table(1), table(3), table(1), table(2)
    assert made == [1, 2, 3, 2]


def test_tables_made_under_inference_mode_serve_training():
    @kept(2)
    def table(n: int):
        return torch.ones(n), torch.zeros(n)

    with torch.inference_mode():
        first, _ = table(3)
    weight = torch.ones(3, requires_grad=True)
    (weight * first).sum().backward()
    assert weight.grad.tolist() == [1.0] * 3


def test_traced_shapes_leave_no_fake_table_behind():
    cpu = torch.device("cpu")
    for make in (
        lambda: rope_table((0, 1), 3, 7, (12, 10, 10), cpu),
        lambda: _table(range(2), Grid(3, 7), (16, 24, 24), 1e4, cpu),
    ):
        with FakeTensorMode():
            assert isinstance(make()[0], FakeTensor)
        assert type(make()[0]) is torch.Tensor and make()[0] is make()[0]
