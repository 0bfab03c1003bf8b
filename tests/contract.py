"""What every layer must do: one line in a test file runs all of it.

test_mine = layer_contract(lambda: Mine(8), (8, 5, 5))
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lipcert.bounds import audit
from lipcert.export import export

Make = Callable[[], nn.Module]


def jacobian_norm(module: nn.Module, x: Tensor) -> float:
    """Return the spectral norm of the Jacobian at x, (c, ...) float64, from a dense matrix."""
    jacobian = torch.autograd.functional.jacobian(lambda v: module(v[None])[0].flatten(), x)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), ord=2).item()


def layer_contract(make: Make, shape: tuple[int, ...]) -> Callable[[str], None]:
    """Return a parametrised test of a layer for inputs of `shape` (without batch)."""

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.strip("_"))
    def test(check: Callable[[Make, tuple[int, ...]], None]) -> None:
        torch.manual_seed(0)
        check(make, shape)

    return test


def _bounded_at_every_weight(make: Make, shape: tuple[int, ...]) -> None:
    """The audit of the exported layer bounds its Jacobian: at the start, after ascent, with tiny and with huge
    weights."""
    layer = make()
    for change in (_nothing, _ascend, _scale(1e-5), _scale(1e7)):
        change(layer, shape)
        plain = export(layer)
        upper = audit(plain, shape).upper.require_upper()
        for seed in range(3):
            x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            assert jacobian_norm(plain, x) <= upper * (1 + 1e-9)  # the Jacobian is rounded too


def _exported_function_is_the_same(make: Make, shape: tuple[int, ...]) -> None:
    layer = make()
    _ascend(layer, shape)
    x = torch.randn(4, *shape)
    with torch.no_grad():
        expected = layer.eval()(x)
        torch.testing.assert_close(export(layer)(x.double()).float(), expected, rtol=1e-5, atol=1e-6)
    allowed = ("torch.nn.", "lipcert.")
    assert all(type(m).__module__.startswith(allowed) for m in export(layer).modules())


def _bound_does_not_depend_on_mode(make: Make, shape: tuple[int, ...]) -> None:
    layer = make()
    layer.train()(torch.randn(4, *shape))
    in_training = audit(export(layer.train()), shape).upper.value
    assert audit(export(layer.eval()), shape).upper.value == in_training


def _survives_copies_and_files(make: Make, shape: tuple[int, ...]) -> None:
    layer, x = make().eval(), torch.randn(2, *shape)
    _ascend(layer, shape)
    expected = layer(x)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected)
    other = make().eval()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), expected)


def _compiles_to_one_graph(make: Make, shape: tuple[int, ...]) -> None:
    layer, x = make().eval(), torch.randn(2, *shape)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


def _builds_without_memory(make: Make, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        layer = make()
    assert all(tensor.is_meta for tensor in layer.state_dict().values())


def _runs_in_bfloat16(make: Make, shape: tuple[int, ...]) -> None:
    layer, x = make().eval(), torch.rand(2, *shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    torch.testing.assert_close(low.float(), layer(x), rtol=0.05, atol=0.05)


def _gradient_is_finite_at_zero(make: Make, shape: tuple[int, ...]) -> None:
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    x = torch.zeros(2, *shape, requires_grad=True)
    layer(x).sum().backward()
    gradients = [x.grad, *(p.grad for p in layer.parameters())]
    assert all(g is None or bool(torch.isfinite(g).all()) for g in gradients)


def _says_what_it_is(make: Make, shape: tuple[int, ...]) -> None:
    layer = make()
    assert repr(layer).startswith(type(layer).__name__ + "(")


def _nothing(layer: nn.Module, shape: tuple[int, ...]) -> None:
    pass


def _ascend(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Three gradient steps that make outputs larger."""
    x = torch.randn(4, *shape)
    for _ in range(3):
        parameters = [p for p in layer.parameters() if p.requires_grad]
        if not parameters:
            return
        gradients = torch.autograd.grad(layer(x).square().mean(), parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter += 0.5 * gradient / gradient.norm().clamp_min(1e-12)


def _scale(factor: float) -> Callable[[nn.Module, tuple[int, ...]], None]:
    def change(layer: nn.Module, shape: tuple[int, ...]) -> None:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter *= factor

    return change


CHECKS = (
    _bounded_at_every_weight,
    _exported_function_is_the_same,
    _bound_does_not_depend_on_mode,
    _survives_copies_and_files,
    _compiles_to_one_graph,
    _builds_without_memory,
    _runs_in_bfloat16,
    _gradient_is_finite_at_zero,
    _says_what_it_is,
)
