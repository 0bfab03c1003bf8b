"""Evaluate an audited graph and bound the rounding error of the result, image by image (docs/bounds.md 4).

Every node v has an exact value and a computed one. Let e(v) bound their distance in l2. Where the audit derived
L(v) ≤ Λ·L(a) from an anchor a (an affine segment, pieces of one parent, one operator), the same Λ carries errors:

    e(v) ≤ Λ·e(a) + local(v),      local(v) ≥ ‖computed v - the exact segment applied to the computed a‖,

    local(v) = Σ_i s_i·local(u_i) + (rounding of this operator)       over its arguments u_i, local(a) = 0,

with s_i a cheap bound of the operator's own norm; sums over several sources as in the derivation. So an error that has
passed a segment is multiplied by the norm of the segment, and only what arises inside meets cheap bounds. The rounding
of an operator is given by `Rounding`: in terms of the computed arguments and result, whose norms are measured. Chains
with activations inside (`Derivation.carried`) carry errors from their last activation: inside a segment all operators
must be linear, for a constant of another one may hold near exact values only.

*Deployed precision.* The same operators in another precision p, on any x' with ‖x' - x‖ ≤ r: then the arguments are not
at hand, but ‖u'‖ ≤ ‖u‖ + e(u) + L(u)·r for the exact values at x', and the computed ones are within e_p(u) of them.
Weights that are not representable in p are rounded, which `Rounding` counts; those of the list of operators, where
operators of constants alone have been evaluated in float64 before. Constants that hold on the ranges of the domain
alone come with margins: where the error of an argument exceeds its margin, the error is ∞. What evaluates the program
must use conventional arithmetic (any order of summation, fused multiply-add allowed; no TF32, Winograd or FFT
convolutions).

*Range of exponents.* A result below TINY may lose everything, and so may a weight or an argument below it: with fewer
than 2^40 of them, a lost argument is off by at most 2^20·TINY in l2, and lost weights change an operator by as much in
the operator norm, by FLUSHED in a BatchNorm that divides them by a root of at least √(TINY/u). What is squared may
underflow under a root. Where a weight, a result, the sum of absolute values of an inner product, or
the square of what is squared could exceed LARGE, the error is ∞; so it is where all that may underflow is not far below
one rounding (BatchNorm with variances as small as TINY).

Numbers here are float64 tensors (n,); every formula is enlarged by a relative 2^-40, which covers 8000 roundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipcert.bounds.core import BoundError
from lipcert.bounds.evaluation import evaluate
from lipcert.bounds.graph import BatchConstant, Graph, Node, given, leaves
from lipcert.bounds.rounding import UNIT, enlarge, gamma
from lipcert.bounds.values import EXACT, Derivation, Step

SLACK = 1.0 + 2.0**-40
TINY = {"float64": 2.0**-1022, "float32": 2.0**-126}  # below it results may be flushed to zero
LARGE = {"float64": 2.0**980, "float32": 2.0**100}  # above it something may overflow, such as a sum before a mean
FLUSHED = {"float64": 2.0**-450, "float32": 2.0**-50}  # an operator norm: of what is lost with weights below TINY
MANY = 2.0**20  # the root of more entries than a tensor has


@dataclass(frozen=True)
class Errors:
    """l2 bounds of the rounding error of results, for each image (n,): of all of it, and of its two parts.

    The result is an affine map M of an earlier value: its error is M times that of the value, at most `before`, plus
    what arises in the map, at most `since`. So a difference of two entries errs by ‖m_i - m_j‖·before + √2·since at
    most, which is far less than 2·whole where the rows of M differ by little.
    """

    whole: Tensor
    before: Tensor
    since: Tensor

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            (self.whole + other.whole) * SLACK, (self.before + other.before) * SLACK, (self.since + other.since) * SLACK
        )


class Program:
    """The audited graph as something to run; made by `lipcert.bounds.audit`.

    Calling it returns the outputs alone; `evaluate` also returns the bound of their error.
    """

    def __init__(
        self,
        graph: Graph,
        steps: Sequence[Step],
        derivations: Mapping[int, Derivation],
        merged: Sequence[tuple[int, int]],
    ) -> None:
        self.graph = graph
        self._steps, self._derivations, self._merged = tuple(steps), dict(derivations), tuple(merged)
        self._last = {name: node.name for node in graph.nodes for name in node.inputs}
        self._constants = [_largest_constant(node) for node in graph.nodes]
        self._kernels: dict[str, Tensor] = {}
        active = [i for i, step in enumerate(self._steps) if step.rounding != EXACT]
        self._measured = {*active, *(i for index in active for i in self._steps[index].inputs)}

    @property
    def derivations(self) -> Mapping[int, Derivation]:
        """Return why each value is bounded, by the index of its node."""
        return self._derivations

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x)[0]

    def evaluate(self, x: Tensor, precision: str = "float64", radius: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the outputs at x (n, *input_shape), computed in float64, and an l2 bound of the error for each image.

        With precision "float64" and radius 0 the error is ‖computed - exact‖ of the outputs returned. Otherwise it is
        that, plus ‖computed in `precision` at x' - exact at x'‖ for every x' within l2 distance `radius` of x: a margin
        of the returned outputs that exceeds twice the error, and what the Lipschitz bound allows within the radius, is
        a margin of the deployed program in the whole ball. Errors are ∞ where nothing is proved. Inputs count as exact.
        Raises BoundError for another shape, precision, or for an input that is not finite.
        """
        output, errors = self.evaluate_from(None, x, precision, radius)
        return output, errors.whole

    def evaluate_from(
        self, source: str | None, x: Tensor, precision: str = "float64", radius: float = 0.0
    ) -> tuple[Tensor, Errors]:
        """Return the outputs as `evaluate`, and their errors in two parts.

        The result must be an affine function of the value `source` (None: the whole error alone).
        """
        if precision not in UNIT or not 0.0 <= radius < math.inf:
            raise BoundError(
                f"precision is {' or '.join(UNIT)} and radius ≥ 0 finite, got {precision!r} and {radius!r}"
            )
        output, norms = self._run(x)
        zero = x.new_zeros(len(x))
        exact, rough, fresh = self._errors("float64", lambda i, _: norms[i], zero, own=True)
        found = self._parts(source, exact, fresh, zero)
        if precision == "float64" and radius == 0.0:
            return output, found
        self._require_plain(precision)
        reach = self._reach(radius)
        largest = [norm + r + reach[i] for i, (norm, r) in enumerate(zip(norms, rough, strict=True))]
        exact, _, fresh = self._errors(precision, lambda i, passed: largest[i] + passed, zero, own=False)
        return output, found + self._parts(source, exact, fresh, zero)

    def _require_plain(self, precision: str) -> None:
        """Raise BoundError where the program, run in a precision, does something else than this list of operators."""
        found = [place for kind, place in self.graph.departures if kind != precision]
        if found:
            raise BoundError(
                f"nothing is proved about a {precision} program that {found[0]}"
                f"{f' and {len(found) - 1} more' if len(found) > 1 else ''}: compute its weights beforehand, and leave "
                "out casts"
            )

    def _parts(
        self, source: str | None, exact: Mapping[int, Tensor], fresh: Sequence[Tensor], zero: Tensor
    ) -> Errors:
        index = len(self.graph.nodes) - 1
        if source is None:
            return Errors(exact[index], exact[index], zero)
        start = next(i for i, node in enumerate(self.graph.nodes) if node.name == source)
        return Errors(exact[index], exact[start], self._local(index, (start,), fresh, {}, zero))

    # ------------------------------------------------------------------------------------------------- evaluation

    def _run(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        source = self.graph.input
        if x.ndim != len(source.shape) or tuple(x.shape[1:]) != source.shape[1:] or x.dtype != torch.float64:
            raise BoundError(
                f"inputs are float64 tensors (n, {', '.join(map(str, source.shape[1:]))}), "
                f"got {x.dtype} {tuple(x.shape)}"
            )
        if not bool(torch.isfinite(x).all()):
            raise BoundError("the input has NaN or infinite entries")
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), torch.backends.cudnn.flags(enabled=False):
            if self.graph.batched:
                return self._images(x)
            runs = [self._images(image) for image in x.split(1)]
        return torch.cat([run[0] for run in runs]), [
            torch.cat(norms) for norms in zip(*(run[1] for run in runs), strict=True)
        ]

    def _images(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        values = {self.graph.input.name: x}
        norms = []
        for index, node in enumerate(self.graph.nodes):
            if index:
                arguments = {key: given(argument, values, x) for key, argument in node.arguments.items()}
                values[node.name] = evaluate(node, arguments, self._kernels)
                for name in {*node.inputs}:
                    if self._last[name] == node.name:
                        del values[name]
            norms.append(self._norm(index, node, values[node.name]))
        return values[self.graph.output], norms

    def _norm(self, index: int, node: Node, value: Tensor) -> Tensor:
        """Return the l2 norm of a computed value for each image, rounded up, (n,); ∞ where no rounding depends on it.

        Norms of values that are only moved need not be taken.
        """
        if index not in self._measured:
            return value.new_full((1,), math.inf)
        if node.batch is None:
            rows = value[None]
        else:
            outer, inner = self._merged[index]
            rows = value.unflatten(node.batch, (outer, -1, inner)).movedim(node.batch + 1, 0)
        count = math.prod(rows.shape[1:])
        return enlarge(torch.linalg.vector_norm(rows, dim=tuple(range(1, rows.ndim))), count + 4) + 2.0**-480

    # ----------------------------------------------------------------------------------------------------- errors

    def _errors(
        self, precision: str, norm: Callable[[int, Tensor | float], Tensor], zero: Tensor, *, own: bool
    ) -> tuple[dict[int, Tensor], list[Tensor], list[Tensor]]:
        """Return e(v) of every value with a derivation, of every value by cheap constants alone, and of each operator.

        `norm(i, passed)` bounds the norm of the exact result of operator i on its computed arguments, and, of computed
        arguments, their own; `passed` is the error that came in with them. `own`: evaluated here, not deployed.
        """
        exact: dict[int, Tensor] = {0: zero}
        rough: list[Tensor] = [zero]
        local: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        fresh: list[Tensor] = [zero]
        for index, step in enumerate(self._steps[1:], start=1):
            known = [exact.get(i, rough[i]) for i in step.inputs]
            passed = _combine(step.factors, known, step.joint) if step.inputs else zero
            fresh.append(self._fresh(index, step, precision, norm, passed, known, own))
            for error, margin in zip(known, step.margins, strict=False):
                fresh[index] = torch.where(error <= margin, fresh[index], math.inf)
            rough.append((passed + fresh[index]) * SLACK)
            derivation = self._derivations.get(index)
            if derivation is None:
                continue
            derivation = derivation.carried or derivation
            if derivation.reason:
                exact[index] = torch.full_like(zero, math.inf)
                continue
            carried = _combine(
                [factor.value for factor in derivation.factors],
                [exact[i] for i in derivation.sources],
                derivation.joint,
            )
            for source, margin in zip(derivation.sources, derivation.margins, strict=False):
                carried = torch.where(exact[source] <= margin, carried, math.inf)
            inside = self._local(index, derivation.sources, fresh, local, zero)
            exact[index] = torch.minimum((carried + inside) * SLACK, rough[index])
        return exact, rough, fresh

    def _fresh(
        self, index: int, step: Step, precision: str, norm: Callable[[int, Tensor | float], Tensor], passed: Tensor,
        known: Sequence[Tensor], own: bool,
    ) -> Tensor:  # fmt: skip
        """Return the error that operator `index` adds."""
        rounding = step.rounding
        tiny, entries = TINY[precision], math.prod(self.graph.nodes[index].shape)
        never = rounding.operations * tiny > UNIT[precision]
        if never or not own and (rounding.own_only or self._constants[index] > LARGE[precision]):
            return torch.full_like(passed, math.inf)
        if rounding == EXACT:
            return torch.zeros_like(passed)
        largest = result = norm(index, passed)
        total = _gamma(rounding.output, precision) * result + rounding.absolute
        inputs = rounding.evaluated if own and rounding.evaluated else rounding.inputs
        for (count, size), i, error in zip(inputs, step.inputs, known, strict=False):
            absolute = size * norm(i, error)
            total = total + _gamma(count, precision) * absolute
            largest = torch.maximum(largest, absolute)
        if rounding.constant[1]:
            total = total + _gamma(rounding.constant[0], precision) * rounding.constant[1]
        if rounding.operations:
            for factor, i, error in zip(step.factors, step.inputs, known, strict=True):
                total = total + FLUSHED[precision] * norm(i, error) + MANY * tiny * factor
        if rounding.squares:
            total = total + math.sqrt(rounding.squares * tiny * entries)
            for i, error in zip(step.inputs, known, strict=True):
                largest = torch.maximum(largest, norm(i, error).square())
        total = total + rounding.operations * tiny * math.sqrt(entries)
        return torch.where(largest < LARGE[precision], total, math.inf) * SLACK

    def _local(
        self, index: int, sources: tuple[int, ...], fresh: Sequence[Tensor],
        memory: dict[tuple[int, tuple[int, ...]], Tensor], zero: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return the error that arises between the sources and a value, by cheap constants."""
        pending = [index]
        while pending:
            i = pending[-1]
            missing = [j for j in self._steps[i].inputs if j not in sources and (j, sources) not in memory]
            if missing:
                pending += missing
                continue
            pending.pop()
            step = self._steps[i]
            inner = [zero if j in sources else memory[j, sources] for j in step.inputs]
            passed = _combine(step.factors, inner, step.joint) if inner else zero
            memory[i, sources] = (passed + fresh[i]) * SLACK
        return memory[index, sources]

    def _reach(self, radius: float) -> list[float]:
        """Return how far each exact value can move within the radius, by its own bound or by cheap constants."""
        reach = [radius]
        for index, step in enumerate(self._steps[1:], start=1):
            parts = [factor * reach[i] for factor, i in zip(step.factors, step.inputs, strict=True)]
            rough = math.hypot(*parts) if step.joint else math.fsum(parts)
            known = self._derivations.get(index)
            reach.append((min(rough, known.bound.value * radius) if known else rough) * SLACK if radius else 0.0)
        return reach


def _combine(factors: Sequence[float], errors: Sequence[Tensor], joint: bool) -> Tensor:
    """Return Σ f_i e_i, or √Σ(f_i e_i)²; 0·∞ is ∞."""
    parts = [torch.where(torch.isinf(e), e, f * e) if not math.isinf(f) else torch.full_like(e, math.inf)
             for f, e in zip(factors, errors, strict=True)]  # fmt: skip
    if not joint or len(parts) == 1:
        return torch.stack(parts).sum(0) * SLACK if parts else torch.zeros(1, dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack(parts), dim=0) * SLACK


def _largest_constant(node: Node) -> float:
    """Return the largest finite absolute value among the numbers that an operator reads."""
    found = [0.0]
    for leaf in leaves(list(node.arguments.values())):
        tensor = leaf.tensor if isinstance(leaf, BatchConstant) else leaf
        if isinstance(tensor, float | int):
            found.append(abs(float(tensor)))
        elif isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
            found.append(float(torch.where(tensor.isinf(), 0.0, tensor).abs().max()))
    return max(value for value in found if not math.isinf(value))


def _gamma(count: int, precision: str) -> float:
    return gamma(count, precision) if count * UNIT[precision] < 1.0 else math.inf
