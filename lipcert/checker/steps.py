"""Steps: each bounds a value as a function of values before it, and every number in it is confirmed by an own one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .maps import opened, phases
from .norms import Aim, joint_norm, norm
from .program import Program
from .reading import Array, Rejected, number_of, only, require, take
from .rounding import UP, lengths

RULES = {"lipcert.maxmin": "MaxMin", "aten.scaled_dot_product_attention.default": "attention"}


@dataclass(frozen=True)
class Step:
    """One step of the proof, with what this checker found itself."""

    value: str
    sources: Sequence[str]
    factors: Sequence[float]  # own
    joint: bool
    claimed: Sequence[float]
    nodes: Sequence[str]  # between the sources and the value, which is the last of them
    branches: Sequence[tuple[str, str, Sequence[Step]]] = ()  # start, end, steps


def prove(program: Program, records: Any, base: str, where: str = "") -> tuple[list[Step], dict[str, float]]:
    """Confirm steps that bound values as functions of `base`; return them and own bounds of the values."""
    claimed: dict[str, Fraction] = {base: Fraction(1)}
    bounds: dict[str, float] = {base: 1.0}
    steps = []
    for i, record in enumerate(records):
        here = f"{where}step {i}"
        only(record, ("value", "rule", "sources", "factors", "joint", "bound", "method", "branches"), here)
        value, rule = take(record, "value", str, here), take(record, "rule", str, here)
        here = f"{here} ({value}, {rule})"
        sources, factors = take(record, "sources", list, here), take(record, "factors", list, here)
        joint, bound = take(record, "joint", bool, here), number_of(record, "bound", here)
        known = value in program.nodes and value not in bounds
        require(known, f"{here}: the value is no node, or was bounded before")
        require(0 < len(sources) == len(factors), f"{here}: sources and factors do not correspond")
        for source in sources:
            if not isinstance(source, str) or source not in claimed:
                raise Rejected(f"{here}: the source {source!r} is not the input or the value of an earlier step")
        numbers = [number_of({"factor": factor}, "factor", here) for factor in factors]
        aim = Aim(numbers[0], take(record, "method", str, here))
        branches = take(record, "branches", list, here) if "branches" in record else None
        try:
            own, nodes, inner = _confirm(program, value, rule, sources, joint, branches, aim, here)
            for factor, found in zip(numbers, own, strict=True):
                require(found <= factor, f"the factor {factor!r} is below {found!r}, which is what can be proved")
        except Rejected as error:
            raise error if str(error).startswith(here) else Rejected(f"{here}: {error}") from error
        parts = [Fraction(f) * claimed[s] for f, s in zip(numbers, sources, strict=True)]
        squared = sum(p * p for p in parts) if joint else sum(parts) ** 2
        if Fraction(bound) ** 2 < squared:
            raise Rejected(f"{here}: the bound {bound!r} is below what its factors give, {math.sqrt(squared)!r}")
        claimed[value] = Fraction(bound)
        mine = [f * bounds[s] for f, s in zip(own, sources, strict=True)]
        bounds[value] = (math.hypot(*mine) if joint else sum(mine)) * (1.0 if own == [1.0] else UP)
        steps.append(Step(value, sources, own, joint, numbers, nodes, inner))
    return steps, bounds


def _confirm(
    program: Program, value: str, rule: str, sources: Sequence[str], joint: bool, branches: Any, aim: Aim, where: str
) -> tuple[list[float], list[str], list[tuple[str, str, Sequence[Step]]]]:
    """Return own factors of a step, the nodes that it passes, and its branches, proved."""
    require(rule != "chain", "bounds of chains of affine maps and activations cannot be rechecked")
    op = program.nodes[value].op
    operation = program.operation(value)
    affine = operation.trace is not None
    own = RULES.get(op, op.split(".")[1] if "." in op else op)
    require(rule == own or (rule == "affine" and affine), f"the operator of the value is {op}, not called {rule!r}")
    arguments = list(operation.inputs)
    if branches is not None:
        require(op == "aten.cat.default" and len(sources) == 1, "only a concatenation of one source has branches")
        factor, proved = _branches(program, arguments, sources[0], branches, where)
        return [factor], [value], proved
    if affine and len(sources) == 1:
        nodes = program.between([value], sources[0])
        return [norm(program.maps([value], sources[0])[0], aim)], nodes, []
    if list(sources) == arguments:
        require(operation.joint or not joint, "only what is side by side counts jointly")
        return list(operation.factors), [value], []
    ordered = len(sources) == 1 and (operation.joint or len(arguments) == 1)
    require(ordered, "the sources are not its arguments in order")
    nodes, factor = program.between(arguments, sources[0]), max(operation.factors)
    found = joint_norm(program.maps(arguments, sources[0]), aim.over(factor))
    return [found if factor == 1.0 else found * factor * UP], [*nodes, value], []


def _branches(
    program: Program, arguments: Sequence[str], source: str, branches: Sequence[Any], where: str
) -> tuple[float, list[tuple[str, str, Sequence[Step]]]]:
    """Bound a concatenation whose parts are functions f_i of different parts s_i = S_i x of one source.

    If f_i has the constant b_i, ‖Δvalue‖² = Σ ‖Δf_i‖² ≤ max b_i² Σ ‖Δs_i‖² ≤ max b_i² ‖(S_i)_i‖² ‖Δx‖².
    """
    require(len(branches) == len(arguments), "there is not one branch for each part")
    proved: list[tuple[str, str, Sequence[Step]]] = []
    largest = 0.0
    for i, (record, end) in enumerate(zip(branches, arguments, strict=True)):
        here = f"{where}, branch {i}"
        only(record, ("start", "steps"), here)
        start = take(record, "start", str, here)
        require(start in program.nodes, f"{here}: there is no node {start!r}")
        steps, bounds = prove(program, take(record, "steps", list, here), start, f"{here}: ")
        require(end in bounds, f"{here}: no step bounds {end}")
        proved.append((start, end, steps))
        largest = max(largest, bounds[end])
    starts = joint_norm(program.maps([start for start, _, _ in proved], source))
    return (largest if starts == 1.0 else largest * starts * UP), proved


def positions(program: Program, steps: Sequence[Step], bounds: Mapping[str, float]) -> dict[str, float]:
    """Return own bounds of what a value is at any one position, as a function of the image.

    They are at most those of the whole value. If all operators of a step act at each position alone, the value changes
    there as if its sources had changed at this position only, so the factors, which hold for all changes, hold for
    these. A mean changes by at most the largest change of what it is the mean of.
    """
    found = {program.input: 1.0}
    for step in steps:
        places = {program.operation(name).place for name in step.nodes}
        whole = found[step.value] = bounds[step.value]
        before = [found[source] for source in step.sources]
        if places == {"same"} and not step.branches:
            parts = [factor * bound for factor, bound in zip(step.factors, before, strict=True)]
            found[step.value] = min(whole, (math.hypot(*parts) if step.joint else sum(parts)) * UP)
        elif places == {"mean"}:
            found[step.value] = min(whole, sum(before))
    return found


def position(program: Program, steps: Sequence[Step], bounds: Mapping[str, float], head: str) -> float:
    """Return an own bound of what the logits of any one position read of a value, as a function of the image.

    It is that of one position of the value only if no logits read several of them.
    """
    places = {program.operation(name).place for name in program.between([program.output], head)}
    return positions(program, steps, bounds)[head] if places <= {"same"} else bounds[head]


def pairwise(program: Program, bounds: Mapping[str, float], heads: Sequence[str]) -> tuple[Array, dict[str, Array]]:
    """Return own bounds L (k, k) of z_i - z_j, and for each head the distances ‖w_i - w_j‖ (k, k).

    Where the output is a map of logits (1, k, h, w), those at one position, which are W times the head there, plus b.
    """
    shape = program.shape(program.output)
    require(len(shape) in (2, 4) and shape[0] == 1 and shape[1] > 1, "the output is not a vector of logits")
    best = np.full((shape[1], shape[1]), math.sqrt(2) * bounds[program.output] * UP)
    distances = {}
    for head in heads:
        try:
            require(head != program.output, "it is the output itself")
            kernel = phases(program.maps([program.output], head)[0].as_kernel())
            if len(shape) == 2:
                kernel = opened(opened(kernel, 0), 1)
            require({*kernel.taps} == {(0, 0)}, "the output is no matrix times it")
        except Rejected as error:
            raise Rejected(f"proof: the head {head!r}: {error}") from error
        rows = kernel.taps[0, 0]
        distances[head] = (np.stack([lengths(rows - row) for row in rows]) + 2 * kernel.error) * UP
        best = np.minimum(best, bounds[head] * distances[head] * UP)
    return best, distances
