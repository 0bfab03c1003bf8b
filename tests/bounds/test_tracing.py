"""Programs that torch.export writes with regions, writes in place, names for results, or for one image only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense import Apply, assert_sound
from torch import nn

from lipcert.bounds import BoundError, audit
from lipcert.bounds.functional import functional
from lipcert.bounds.tracing import trace


def conv():
    return nn.Conv2d(2, 2, 3, padding=1)


def without_autocast(m, x):
    with torch.autocast("cpu", enabled=False):
        y = m.a(x.float()).relu()
        z = y * 2
    return z + m.a(y)


def without_gradient(m, x):
    y = m.a(x)
    with torch.no_grad():
        z = F.relu_(y + 1)
    return z - y


REGIONS = {"autocast": without_autocast, "gradient": without_gradient}


@pytest.mark.parametrize("which", REGIONS)
def test_regions_are_written_out(which):
    model = Apply(REGIONS[which], a=conv())
    graph = trace(model, (2, 4, 4))
    assert all(node.op.startswith("aten.") for node in graph.nodes[1:])
    result = audit(model, (2, 4, 4))
    x = torch.rand(3, 2, 4, 4)
    with torch.no_grad():
        assert torch.allclose(result.program(x.double()), model.float()(x).double(), atol=1e-5)


def test_operators_with_a_type_of_their_own_are_evaluated_in_float64():
    single = torch.float32
    model = Apply(lambda m, x: x.softmax(1, dtype=single).to(x.dtype) + x.sum(1, keepdim=True, dtype=single))
    x = torch.rand(3, 5, dtype=torch.float64)
    output, error = audit(model, (5,)).program.evaluate(x)
    assert output.dtype == torch.float64 and error.max() < 1e-12
    assert (output - x.softmax(1) - x.sum(1, keepdim=True)).abs().max() < 1e-14


def test_models_that_run_in_float32_alone_are_exported_so():
    model = Apply(lambda m, x: m.a(x.float()), a=nn.Conv2d(2, 3, 1))
    result = audit(model, (2, 4, 4))
    x = torch.rand(3, 2, 4, 4, dtype=torch.float64)
    assert torch.allclose(result.program(x), F.conv2d(x, model.a.weight.double(), model.a.bias.double()), rtol=1e-14)
    model.double()
    with pytest.raises(BoundError, match="cannot export"):
        audit(model, (2, 4, 4))  # float32 would round the weights


def test_branches_on_data_are_refused():
    model = Apply(lambda m, x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y * 2, (x,)))
    with pytest.raises(BoundError, match="condition|export"):
        audit(model, (3,))


def masked(m, x):
    mask = x.new_zeros(3, 4)
    count = 0
    for rows in (slice(0, 1), slice(1, 3)):
        mask[rows] = count
        count += 1
    mask[:, 2:].add_(3)
    return x * mask + mask


def cleared(m, x):
    table = torch.zeros(3, 4)
    table += 2
    table[1].zero_()
    return x * table


def weighted(m, x):
    table = m.w * 1
    table[0] = 5
    return x * table + m.w


@pytest.mark.parametrize("function", [masked, cleared, weighted])
def test_writes_into_constants_are_repeated(function):
    model = Apply(function, w=nn.Parameter(torch.randn(3, 4)))
    result = assert_sound(model, (3, 4), 1e-8, points=1)
    x = torch.rand(2, 3, 4, dtype=torch.float64)
    assert torch.equal(result.program(x), model.double()(x))
    if function is not weighted:  # whose table is made by a product, not by new memory that is known to be new
        program = torch.export.export(model.double(), (x,), strict=False)
        assert functional(program) is program


def test_weights_are_never_written():
    model = Apply(lambda m, x: x * m.w.data.mul_(2.0), w=nn.Parameter(torch.ones(4)))
    for _ in range(2):
        try:
            assert audit(model, (4,)).upper.value == 2.0
        except BoundError:
            pass
    assert model.w.tolist() == [1.0] * 4


def test_dropout_of_weights_is_an_identity_unless_it_is_active():
    table = nn.Parameter(torch.randn(4))
    model = Apply(lambda m, x: x * F.dropout(m.w, 0.5, training=m.training), w=table)
    assert audit(model, (4,)).upper.value == pytest.approx(float(table.detach().abs().max()))
    with pytest.raises(BoundError, match="random"):
        audit(Apply(lambda m, x: x * F.dropout(m.w, 0.5, training=True), w=table), (4,))


def renamed(m, x):
    y = m.a(x)
    z = y.relu_()
    z.add_(1)
    return y * 2 + z


def dropped(m, x):
    return F.dropout(x.flatten(1), 0.5, training=m.training, inplace=True) * 3


@pytest.mark.parametrize("function", [renamed, dropped])
def test_whatever_name_a_value_has_it_is_the_written_one(function):
    model = Apply(function, a=nn.Linear(4, 4))
    result = audit(model, (4,))
    x = torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(result.program(x), model.double().eval()(x), rtol=1e-13)


def test_results_in_containers():
    one = Apply(lambda m, x: {"out": m.a(x)}, a=nn.Linear(4, 3))
    assert audit(one, (4,)).upper.value == audit(one.a, (4,)).upper.value
    two = Apply(lambda m, x: {"out": m.a(x), "aux": x}, a=nn.Linear(4, 3))
    with pytest.raises(BoundError, match=r"2 values \('out', 'aux'\)"):
        audit(two, (4,))


class Branching(nn.Module):
    """Treats the images of a batch one by one, in a Python loop that fixes its length."""

    def __init__(self, mixing: float) -> None:
        super().__init__()
        self.a, self.mixing = nn.Linear(4, 4), mixing

    def forward(self, x):
        rows = [self.a(x[i : i + 1]) for i in range(int(x.shape[0]))]
        return torch.cat(rows) + self.mixing * x.sum(0)


def test_programs_that_fix_the_batch_are_taken_for_one_image():
    model = Branching(0.0)
    result = audit(model, (4,))
    assert not result.program.graph.batched
    x = torch.rand(3, 4, dtype=torch.float64)
    assert torch.allclose(result.program(x), model.double()(x), rtol=1e-13)
    assert result.upper.value == pytest.approx(float(torch.linalg.matrix_norm(model.a.weight.detach(), 2)), rel=1e-9)


def test_programs_that_fix_the_batch_and_mix_it_are_refused():
    with pytest.raises(BoundError, match="cannot export"):
        audit(Branching(1.0), (4,))
