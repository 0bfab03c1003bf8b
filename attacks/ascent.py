"""Lower bounds of Lipschitz constants, each attained by an explicit pair of inputs.

A Jacobian norm is a lower bound only where the network is differentiable and the automatic derivative is the true one
(`detach`, straight-through estimators and `sign` break that). So derivatives only steer the search here: the number
that is returned is a difference quotient `‖f(x) − f(y)‖ / ‖x − y‖` of two points of the domain, less an allowance for
rounding, rounded down. Anybody can check it with two forward passes.

The search moves pairs `c ± s·v`. One backward pass at both ends gives the next direction (power iteration on the
secant) and the gradient with respect to the centre, which is not zero for piecewise linear networks as the gradient of
a Jacobian norm is. Golub-Kahan-Lanczos steps at the best centre finish the direction.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LENGTHS = (1e-3, 0.1, 0.5)  # of the pairs in the search, as parts of the longest pair along v that fits into the box
_FINAL_LENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0)
_RANDOM_STARTS = 4
_ROUNDING = 1e-12  # of the size of the outputs: far above float64 rounding in ordinary networks
_SLACK = 2.0**-50  # hypot errs by less than one unit in the last place, a subtraction or division by half of one


@dataclass(frozen=True)
class LowerBound:
    """A Lipschitz constant is at least `value`: the two inputs `x` and `y` (float64, in the domain) attain it.

    `proved` says that the rounding of the two outputs is bounded by a proof; else 1e-12 of their size was allowed for.
    """

    value: float
    x: Tensor
    y: Tensor
    method: str
    proved: bool = False


def lipschitz_lower(
    model: nn.Module,
    input_shape: tuple[int, ...],
    starts: Tensor | None = None,
    steps: int = 100,
    domain: tuple[float | Tensor, float | Tensor] = (0.0, 1.0),
    seed: int = 0,
    *,
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> LowerBound:
    """Search for two inputs whose outputs lie as far apart as possible, relative to the inputs, in l2.

    Args:
        model: Maps (n, *input_shape) to (n, ...), each row on its own; a float64 copy in eval mode is used.
        starts: Centres to start from, (n, *input_shape), for example images; default: the middle of the box and
            random points.
        domain: The box [low, high] in which both inputs lie; two numbers, or two tensors of the shape of an input.
        evaluate: Maps inputs (n, *input_shape) in float64 to outputs (n, ...) and l2 bounds (n,) of their rounding
            errors. With it the value is proved in real arithmetic; without it, 1e-12 of the outputs is allowed for.
            The same where its errors are infinite, or so large that not half of the quotient is left.

    Raises ValueError for an impossible domain, starts of another shape or outside the domain, or no finite output.

    >>> bound = lipschitz_lower(torch.nn.Linear(2, 2, bias=False).requires_grad_(False), (2,), steps=20)
    >>> bound.x.shape
    torch.Size([2])
    """
    low, high = (_end(end, input_shape) for end in domain)
    if not bool((low.isfinite() & high.isfinite() & (low < high)).all()):
        raise ValueError(f"the domain must be two finite numbers, the smaller one first; got {domain}")
    network = copy.deepcopy(model).double().eval().requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    centres = _centres(starts, input_shape, low, high, random)
    device = next((tensor.device for tensor in (*network.parameters(), *network.buffers())), torch.device("cpu"))
    low, high = low.to(device), high.to(device)

    def outputs(points: Tensor) -> Tensor:  # (n, d), d the size of the input -> (n, m)
        return network(points.reshape(-1, *input_shape)).flatten(1)

    lengths = torch.tensor(_LENGTHS, dtype=torch.float64).repeat(len(centres))[:, None].to(device)
    centres = centres.repeat_interleave(len(_LENGTHS), dim=0)
    directions = _unit(torch.randn(centres.shape, generator=random, dtype=torch.float64))
    with torch.enable_grad():
        pairs = _Pairs(outputs, low, high, centres.to(device), directions.to(device), lengths, random)
        for _ in range(steps):
            pairs.improve()
        best = int(pairs.quotient.argmax())
        finished = _lanczos(outputs, pairs.centre[best], pairs.direction[best], steps, float((high - low).min()) * 1e-5)
    final = torch.tensor(_FINAL_LENGTHS, dtype=torch.float64, device=device)[:, None]
    ends = [
        _ends(pairs.centre, pairs.direction, lengths, low, high),
        *(_ends(pairs.centre[best], way, final, low, high) for way in (pairs.direction[best], finished)),
    ]
    x, y = (torch.cat([pair[side] for pair in ends]).reshape(-1, *input_shape) for side in (0, 1))
    with torch.no_grad():
        values = [(value, False) for value in _quotients(x, y, lambda points: _allowed(outputs(points)))]
        if evaluate is not None:
            proved = _quotients(x, y, evaluate)
            if max(proved) > 0 and max(proved) >= max(values)[0] / 2:
                values = [(value, True) for value in proved]
    chosen = max(range(len(values)), key=values.__getitem__)
    value, certain = values[chosen]
    return LowerBound(value, x[chosen].cpu(), y[chosen].cpu(), "pair of inputs found by ascent", certain)


class _Pairs:
    """Pairs of inputs that improve side by side; a step that does not improve a pair is undone and shortened."""

    def __init__(
        self,
        outputs: Callable[[Tensor], Tensor],
        low: Tensor,  # (1, d)
        high: Tensor,
        centre: Tensor,  # (n, d)
        direction: Tensor,  # (n, d), unit rows
        length: Tensor,  # (n, 1)
        random: torch.Generator,
    ) -> None:
        self.outputs, self.low, self.high, self.length, self.random = outputs, low, high, length, random
        self.centre, self.direction = centre, direction
        self.step = torch.ones_like(length)  # the next step, as a part of the full one
        self.quotient, self.next_direction, self.uphill = self._look(centre, direction)
        if not self.quotient.isfinite().any():
            raise ValueError("the network has no finite output at any start; give other starts or another domain")

    def improve(self) -> None:
        """Take one step with every pair."""
        reach = 0.1 * (self.high - self.low).norm()
        centre = self.centre + self.step * reach * self.uphill
        direction = _unit(self.direction + self.step * (self.next_direction - self.direction))
        quotient, next_direction, uphill = self._look(centre, direction)
        better = (quotient > self.quotient)[:, None]
        self.centre = torch.where(better, centre, self.centre).clamp(self.low, self.high)
        self.direction = torch.where(better, direction, self.direction)
        self.next_direction = torch.where(better, next_direction, self.next_direction)
        self.uphill = torch.where(better, uphill, self.uphill)
        self.quotient = torch.where(better[:, 0], quotient, self.quotient)
        self.step = torch.where(better, (2 * self.step).clamp(max=1), self.step / 2)

    def _look(self, centre: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the quotients (n,), the next directions of the power iteration and the centres' ascent directions."""
        x, y = _ends(centre, direction, self.length, self.low, self.high)
        points = torch.cat([x, y]).requires_grad_()
        out_x, out_y = self.outputs(points).chunk(2)
        difference = out_x - out_y
        gradient = _gradient((difference * _unit(difference.detach())).sum(), points)
        at_x, at_y = gradient.nan_to_num(0.0, 0.0, 0.0).chunk(2)
        quotient = difference.detach().norm(dim=1) / (x - y).norm(dim=1)
        following = _unit(at_x - at_y)
        blind = ~following.any(dim=1, keepdim=True)
        if bool(blind.any()):  # flat, or cut off from the gradient: look around
            noise = torch.randn(direction.shape, generator=self.random, dtype=direction.dtype).to(direction)
            following = torch.where(blind, _unit(direction + _unit(noise)), following)
        return quotient.nan_to_num(-math.inf, -math.inf, -math.inf), following, _unit(at_x + at_y)


def _end(end: float | Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return one end of the box as (1, d)."""
    return torch.as_tensor(end, dtype=torch.float64).cpu().expand(shape).reshape(1, -1)


def _centres(
    starts: Tensor | None, shape: tuple[int, ...], low: Tensor, high: Tensor, random: torch.Generator
) -> Tensor:
    """Return the centres to start from, (n, d)."""
    if starts is None:
        unit = torch.rand(_RANDOM_STARTS, math.prod(shape), generator=random, dtype=torch.float64)
        return torch.cat([(low + high) / 2, low + (high - low) * unit])
    if starts.ndim == 0 or tuple(starts.shape[1:]) != tuple(shape) or len(starts) == 0:
        raise ValueError(f"starts must have the shape (n, {', '.join(map(str, shape))}); got {tuple(starts.shape)}")
    points = starts.detach().cpu().double().flatten(1)
    if not ((points >= low) & (points <= high)).all():
        raise ValueError(f"the starts must lie in the domain [{float(low.min())}, {float(high.max())}]")
    return points


def _ends(centre: Tensor, direction: Tensor, length: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return `c ± s·v`, the centre moved so that both ends lie in the box; `length` is s as a part of the largest s."""
    largest = 1.0 / (direction.abs() / (high - low)).amax(dim=-1, keepdim=True).clamp(min=1e-300)
    half = length * largest / 2 * direction
    middle = torch.minimum(torch.maximum(centre, low + half.abs()), high - half.abs())
    return (middle + half).clamp(low, high), (middle - half).clamp(low, high)  # the clamp undoes rounding only


def _lanczos(
    outputs: Callable[[Tensor], Tensor], centre: Tensor, direction: Tensor, steps: int, distance: float
) -> Tensor:
    """Return the leading right singular vector of the Jacobian at `centre` (d,) by Golub-Kahan bidiagonalisation.

    Products with the Jacobian are central differences, which every model has; forward-mode derivatives are not.
    """
    point = centre[None].clone().requires_grad_()
    value = outputs(point)[0]
    right: list[Tensor] = [direction]
    left: list[Tensor] = []
    diagonal: list[float] = []
    above: list[float] = []
    for _ in range(max(1, min(steps, len(centre), len(value)))):
        shift = distance * right[-1]
        ahead, behind = outputs(torch.stack([centre + shift, centre - shift])).detach()
        u, alpha = _orthogonal((ahead - behind) / (2 * distance), left)
        if alpha == 0:
            break
        left.append(u)
        diagonal.append(alpha)
        v, beta = _orthogonal(_gradient((value * u).sum(), point, retain_graph=True)[0], right)
        if beta <= 1e-9 * alpha:  # an invariant subspace: nothing to add
            break
        right.append(v)
        above.append(beta)
    if not diagonal:
        return direction
    size = len(diagonal)
    small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if size > 1:
        small += torch.diag(torch.tensor(above[: size - 1], dtype=torch.float64), 1)
    leading = torch.linalg.svd(small).Vh[0].to(centre)
    return _unit((leading[:, None] * torch.stack(right[:size])).sum(dim=0))


def _gradient(scalar: Tensor, points: Tensor, retain_graph: bool = False) -> Tensor:
    """Return the gradient; zero where a network is cut off from it (`detach`), or an operator has no derivative."""
    if not scalar.requires_grad:
        return torch.zeros_like(points)
    try:
        (gradient,) = torch.autograd.grad(scalar, points, retain_graph=retain_graph, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # also NotImplementedError
        return torch.zeros_like(points)
    return torch.zeros_like(points) if gradient is None else gradient


def _orthogonal(vector: Tensor, basis: list[Tensor]) -> tuple[Tensor, float]:
    """Remove the parts along an orthonormal basis, twice for stability; return the unit vector and its old length."""
    if basis:
        rows = torch.stack(basis)
        for _ in range(2):
            vector = vector - rows.T @ (rows @ vector)
    length = float(vector.norm())
    return (vector / length, length) if math.isfinite(length) and length > 0 else (vector, 0.0)


def _allowed(values: Tensor) -> tuple[Tensor, Tensor]:
    return values, _ROUNDING * values.norm(dim=1)


def _quotients(x: Tensor, y: Tensor, evaluate: Callable[[Tensor], tuple[Tensor, Tensor]]) -> list[float]:
    """Return proved lower bounds of ‖f(x) − f(y)‖ / ‖x − y‖, one for each pair."""
    (out_x, error_x), (out_y, error_y) = evaluate(x), evaluate(y)
    rows = zip(
        (out_x - out_y).flatten(1).tolist(), (error_x + error_y).tolist(), (x - y).flatten(1).tolist(), strict=True
    )
    return [_quotient(math.hypot(*difference), error, math.hypot(*step)) for difference, error, step in rows]


def _quotient(difference: float, error: float, step: float) -> float:
    least = difference * (1 - _SLACK) - error * (1 + _SLACK)
    if not (math.isfinite(least) and least > 0 and step > 0):
        return 0.0
    return least / (step * (1 + _SLACK)) * (1 - _SLACK)


def _unit(vectors: Tensor) -> Tensor:
    """Scale the last axis to length one; zero stays zero."""
    vectors = vectors / vectors.abs().amax(dim=-1, keepdim=True).clamp(min=1e-300)  # neither overflow nor underflow
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-300)
