"""Dense references for tests of the audit: Jacobians of small models, matrices of affine maps."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from lipcert.bounds import Audit, audit
from lipcert.bounds.affine import AffineMap


def jacobian_norm(model: nn.Module, shape: tuple[int, ...], points: int = 6, seed: int = 0) -> float:
    """Return the largest spectral norm of the Jacobian over random points, spread over several scales."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    largest = 0.0
    for scale in itertools.islice(itertools.cycle((0.1, 1.0, 5.0)), points):
        x = scale * torch.randn(1, *shape, generator=generator, dtype=torch.float64)
        matrix = torch.autograd.functional.jacobian(model, x)
        largest = max(largest, float(torch.linalg.matrix_norm(matrix.reshape(-1, x.numel()), 2)))
    return largest


def secant(model: nn.Module, shape: tuple[int, ...], pairs: int = 64, seed: int = 1) -> float:
    """Return the largest ‖f(x) - f(y)‖ / ‖x - y‖ over random pairs."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    x = torch.randn(pairs, *shape, generator=generator, dtype=torch.float64)
    y = x + 10.0 ** torch.linspace(-3, 0.5, pairs, dtype=torch.float64).reshape(-1, *(1,) * len(shape)) * torch.randn(
        pairs, *shape, generator=generator, dtype=torch.float64
    )
    with torch.no_grad():
        moved = (model(x) - model(y)).flatten(1).norm(dim=1)
    return float((moved / (x - y).flatten(1).norm(dim=1)).max())


def assert_sound(model: nn.Module, shape: tuple[int, ...], slack: float | None = None, points: int = 6) -> Audit:
    """Audit a model and attack its bound from below; with `slack`, also require it to be that close to the attack."""
    result = audit(model, shape)
    attained = max(jacobian_norm(model, shape, points), secant(model, shape))
    assert result.upper.kind == "upper"
    assert attained <= result.upper.value * (1 + 1e-9), f"{attained} > {result.upper.value}\n{result}"
    if slack is not None:
        assert result.upper.value <= attained * (1 + slack) + 1e-12, f"{result.upper.value} vs {attained}\n{result}"
    return result


def dense(m: AffineMap) -> Tensor:
    """Return the matrix of an affine map, (c_out·h'·w', c_in·h·w), entry by entry from its definition."""
    matrix = torch.zeros(m.c_out, *m.out, m.c_in, *m.n, dtype=torch.float64)
    taps = m.regrouped(1).taps[:, 0]
    for tap, shift in zip(taps, m.shifts, strict=True):
        for i in itertools.product(range(m.out[0]), range(m.out[1])):
            q = [m.stride[k] * i[k] + shift[k] for k in (0, 1)]
            q = [q[k] % m.n[k] if m.wrap[k] else q[k] for k in (0, 1)]
            if all(0 <= q[k] < m.n[k] for k in (0, 1)):
                matrix[:, i[0], i[1], :, q[0], q[1]] += tap
    return matrix.reshape(m.size, -1)


class Apply(nn.Module):
    """A module made of a function of (self, x) and the submodules and parameters that it uses."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)
