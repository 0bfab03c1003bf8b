"""Graphs: constants folded, in-place writes undone, images of a batch kept apart, weights hashed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dense import Apply, assert_sound
from torch import nn

from lipcert.bounds import BoundError, audit
from lipcert.bounds.graph import BatchConstant, BatchSize, Ref
from lipcert.bounds.tracing import trace


def ops(graph):
    return [node.op for node in graph.nodes]


def test_a_graph_describes_one_image_and_knows_its_modules():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    graph = trace(model, (3, 6, 6))
    assert ops(graph) == ["input", "aten.conv2d.default", "aten.flatten.using_ints", "aten.linear.default"]
    conv = graph.nodes[1]
    assert (conv.shape, conv.batch, conv.module) == ((1, 4, 4, 4), 0, "0")
    assert conv["input"] == Ref("input") or conv.inputs == (graph.input.name,)
    assert conv["weight"].dtype == torch.float64 and conv.source.endswith(".py:" + conv.source.split(":")[1])
    assert graph.output == graph.nodes[-1].name and graph.batched
    assert next(model.parameters()).dtype == torch.float32  # the model itself is left alone


def test_operators_of_weights_alone_are_evaluated_once():
    model = Apply(lambda m, x: F.linear(x, m.w / m.w.norm(dim=1, keepdim=True) * 2), w=nn.Parameter(torch.randn(3, 4)))
    graph = trace(model, (4,))
    assert ops(graph) == ["input", "aten.linear.default"]
    assert torch.allclose(graph.nodes[1]["weight"].norm(dim=1), torch.full((3,), 2.0, dtype=torch.float64))


def test_casts_do_not_lower_the_precision():
    model = Apply(lambda m, x: m.a(x.float().double()), a=nn.Linear(4, 3))
    assert "aten.linear.default" in ops(trace(model, (4,)))
    x = torch.rand(2, 4, dtype=torch.float64) + 2.0**-40
    assert torch.equal(audit(model, (4,)).program(x), audit(model.a, (4,)).program(x))


def test_constants_may_have_a_batch_dimension():
    model = Apply(lambda m, x: torch.cat([m.w.expand(x.shape[0], -1, -1), x], 1), w=nn.Parameter(torch.randn(1, 1, 4)))
    graph = trace(model, (3, 4))
    constant = graph.nodes[-1]["tensors"][0]
    assert isinstance(constant, BatchConstant) and constant.tensor.shape == (1, 1, 4)
    x = torch.rand(5, 3, 4, dtype=torch.float64)
    result = audit(model, (3, 4))
    assert torch.equal(result.program(x), model.double()(x))


def test_sizes_that_depend_on_the_batch_are_kept_symbolic():
    graph = trace(Apply(lambda m, x: F.relu(x).view(2 * x.shape[0], 2).view(x.shape[0], 4)), (4,))
    assert graph.nodes[2]["size"] == (BatchSize(2), 2) and graph.nodes[2].shape == (2, 2)


WRITES = {
    "activation": lambda m, x: F.relu_(m.a(x)) + x,
    "sum": lambda m, x: m.a(x).add_(x).mul_(2),
    "through a view": lambda m, x: shifted(x),
    "of a view of a fresh value": lambda m, x: fill(m.a(x)),
}


def shifted(x):
    out = torch.zeros_like(x)
    out[:, :2, :, 1:] = x[:, :2, :, :-1]
    out[:, 2:] = x[:, 2:]
    return x + out


def fill(y):
    y[:, 0] += y[:, 1]
    return y


@pytest.mark.parametrize("how", WRITES)
def test_writing_in_place_is_undone(how):
    model = Apply(WRITES[how], a=nn.Conv2d(4, 4, 1)).double().eval()
    result = audit(model, (4, 3, 3))
    x = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(result.program(x), model(x), rtol=0, atol=1e-14)
        y = x + 1e-3 * torch.randn_like(x)
        moved = (model(x) - model(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert moved.max() <= result.upper.value


def test_a_value_changed_after_it_was_read_is_not_changed_for_the_reader():
    def forward(m, x):
        y = m.a(x)
        early = 3 * y
        y.mul_(0)
        return early + y

    model = Apply(forward, a=nn.Linear(4, 4, bias=False))
    expected = 3 * float(torch.linalg.matrix_norm(model.a.weight.detach().double(), 2))
    assert audit(model, (4,)).upper.value == pytest.approx(expected, rel=1e-6)


def test_two_names_of_one_memory_see_each_others_changes():
    def forward(m, x):
        y = m.a(x)
        z = F.relu_(y)
        y.add_(x)  # z is y
        return z + 0 * x

    model = Apply(forward, a=nn.Linear(4, 4)).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(audit(model, (4,)).program(x), model(x), rtol=0, atol=1e-14)


MIXING = {
    "mean over the batch": lambda m, x: x - x.mean(0, keepdim=True),
    "roll of the batch": lambda m, x: torch.roll(x, 1, 0),
    "flip of the batch": lambda m, x: x.flip(0),
    "roll of everything": lambda m, x: torch.roll(x, 1),
    "a view across images": lambda m, x: x.transpose(0, 1).reshape(x.shape[0], -1),
    "folded into one": lambda m, x: x.reshape(-1).relu(),
    "norm over the batch": lambda m, x: x / x.norm(),
    "batch as channels": lambda m, x: F.linear(x.T, m.w.expand(5, x.shape[0])),
    "first image": lambda m, x: x + x[0],
    "sort of the batch": lambda m, x: x.sort(0).values,
    "stacked on the batch": lambda m, x: torch.cat([x, x]),
    "depends on the position": lambda m, x: x + torch.arange(x.shape[0]).unsqueeze(1),
    "broadcast against the batch": lambda m, x: x - x.view(-1, 2, 3).mean(2).view(-1, 2)[:, :1].squeeze(1),
    "maximum of the batch": lambda m, x: torch.maximum(x, x.amax(0, keepdim=True)),
}


@pytest.mark.parametrize("how", MIXING)
def test_images_of_a_batch_are_kept_apart(how):
    model = Apply(MIXING[how], w=nn.Parameter(torch.ones(5, 1)))
    with pytest.raises(BoundError):
        audit(model, (6,))


def test_views_that_merge_and_part_the_batch_are_followed():
    """Windows, as in Swin: positions go into the batch and come back; a wrong way back is an error."""

    def windows(m, x, right=True):
        n = x.shape[0]
        y = x.view(n, 2, 2, 2, 2, 3).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 3)  # (n·windows, tokens, c)
        y = F.relu(m.a(y)).reshape(n if right else 4, 4 if right else n, 4, 3)
        return y.reshape(n, -1) if right else y.permute(1, 0, 2, 3).reshape(n, -1)

    model = Apply(windows, a=nn.Linear(3, 3))
    assert_sound(model, (4, 4, 3))
    with pytest.raises(BoundError, match="mixes the images"):
        audit(Apply(lambda m, x: windows(m, x, right=False), a=nn.Linear(3, 3)), (4, 4, 3))


def test_batch_norm_of_the_batch_is_refused_and_recorded_statistics_are_used():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(BoundError, match="BatchNorm uses the statistics of the batch .module 1"):
        audit(model, (3, 4, 4))
    trained = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    assert audit(trained, (3, 4, 4)).upper.value < 10 and trained.training
    program = torch.export.export(
        copy.deepcopy(trained).double(), (torch.zeros(2, 3, 4, 4, dtype=torch.float64),),
        dynamic_shapes=({0: torch.export.Dim("n")},),
    )  # fmt: skip
    with pytest.raises(BoundError, match="running_mean|statistics"):
        audit(program, (3, 4, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    model[2].weight.data[0, 1] = bad
    with pytest.raises(BoundError, match=r"weight 2\.weight has NaN"):
        audit(model, (3,))


def test_all_unknown_operators_are_listed_at_once():
    model = nn.Sequential(Apply(lambda m, x: torch.fft.fft(x).real), Apply(lambda m, x: torch.erfinv(x)))
    with pytest.raises(BoundError) as caught:
        audit(model, (4,))
    assert "aten.erfinv.default" in str(caught.value) and "aten.fft_fft.default" in str(caught.value)
    assert "dense.py:" in str(caught.value)


REFUSED = {
    "a branch on data": (lambda m, x: x if x.sum() > 0 else 2 * x, "export"),
    "a number read off the data": (lambda m, x: x * x.abs().max().item(), "export|Python number|mixes"),
    "noise": (lambda m, x: x + torch.randn(4), "random"),
    "dropout while training": (lambda m, x: F.dropout(x, 0.5, True), "random"),
    "two results": (lambda m, x: (x, x), "one tensor"),
    "no dependence on the input": (lambda m, x: m.w.expand(x.shape[0], -1), "depends on its input"),
    "indices": (lambda m, x: x.sort(1).indices * 1.0, "indices|rule"),
    "a fixed batch": (lambda m, x: x.reshape(2, 4) + 1, "export|batch"),
    "state": (lambda m, x: x + m.count.add_(1), "changes count"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_a_fixed_function_of_one_image_is_refused(what):
    forward, message = REFUSED[what]
    model = Apply(forward, w=nn.Parameter(torch.ones(1, 4)))
    model.register_buffer("count", torch.zeros(1))
    with pytest.raises(BoundError, match=message):
        audit(model, (4,))


UNBOUNDED = {
    "product of data": lambda m, x: x * F.relu(x),
    "matrix product of data": lambda m, x: x @ x.transpose(1, 2),
    "division by data": lambda m, x: 1 / x,
    "square": lambda m, x: x**2,
    "exp": lambda m, x: x.exp(),
    "sign": lambda m, x: x.sign(),
    "normalisation without ε": lambda m, x: F.layer_norm(x, (3,), eps=0.0),
}


@pytest.mark.parametrize("what", UNBOUNDED)
def test_what_has_no_constant_is_reported_as_unbounded(what):
    result = audit(Apply(UNBOUNDED[what]), (3, 3), domain=(-float("inf"), float("inf")))
    assert result.upper.value == float("inf")
    ((name, op, reason),) = result.unbounded
    assert name and op and "dense.py" in reason
    assert result.program.evaluate(torch.rand(2, 3, 3, dtype=torch.float64))[1].isinf().all()


def test_the_hash_is_of_the_weights_alone():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    first = audit(model, (3, 2, 2)).weights_sha256
    assert len(first) == 64
    assert audit(model.double(), (3, 2, 2)).weights_sha256 == first  # float64 holds the same numbers
    model[1].num_batches_tracked += 1
    assert audit(model, (3, 2, 2)).weights_sha256 == first  # which evaluation does not read
    model[3].bias.data[0] = torch.nextafter(model[3].bias.data[0], torch.tensor(9.0, dtype=torch.float64))
    assert audit(model, (3, 2, 2)).weights_sha256 != first


def test_an_exported_program_for_one_image_is_audited_and_evaluated_one_by_one():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).double().eval()
    program = torch.export.export(model, (torch.zeros(1, 3, 4, 4, dtype=torch.float64),))
    fixed, moving = audit(program, (3, 4, 4)), audit(model, (3, 4, 4))
    assert fixed.upper == moving.upper and fixed.layers == moving.layers
    x = torch.rand(3, 3, 4, 4, dtype=torch.float64)
    for a, b in zip(fixed.program.evaluate(x), moving.program.evaluate(x), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-18)
    two = torch.export.export(model, (torch.zeros(2, 3, 4, 4, dtype=torch.float64),))
    with pytest.raises(BoundError, match="batch of one"):
        audit(two, (3, 4, 4))
    with pytest.raises(BoundError, match="was exported for inputs"):
        audit(program, (3, 8, 8))


@pytest.mark.parametrize("shape, message", [((), "input_shape"), ((0, 4), "input_shape"), ((3, 5, 4), "cannot export")])
def test_input_shapes_are_checked(shape, message):
    with pytest.raises(BoundError, match=message):
        audit(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), shape)
