"""The forward pass in float64, and how far it is from the exact one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .program import Program
from .reading import Array
from .rounding import UP
from .steps import Step


def evaluate(
    program: Program, steps: Sequence[Step], distances: Mapping[str, Array], images: Array
) -> tuple[Array, Array, Array]:
    """Return the logits (n, k, …) of images, l2 bounds (n,) of their errors, and (n, k, k) of those of differences.

    The latter are |error of z_a - z_b| at any one position. At each node, something arises: what rounding adds to the
    operator's result. What arises between the sources of a step and its value reaches the value through the operators
    between, each with its own constant; what the sources bring, through the proved factors.
    """
    results = {program.input: images[:, None]}
    arisen = {program.input: np.zeros(len(images))}
    last = {x: name for name in program.nodes if name != program.input for x in program.operation(name).inputs}
    for name in program.nodes:
        if name != program.input:
            inputs = program.operation(name).inputs
            results[name], arisen[name] = program.operation(name).run(*(results[x] for x in inputs))
            for x in {*inputs}:
                if last[x] == name and x != program.output:
                    del results[x]
    errors = _carried(program, steps, program.input, arisen)
    logits = results[program.output].reshape(len(images), *program.shape(program.output)[1:])
    whole = errors[program.output]
    doubts = np.repeat(2 * whole[:, None, None], logits.shape[1], 1).repeat(logits.shape[1], 2)
    for head, apart in distances.items():
        nodes = program.between([program.output], head)
        since = _within(program, {head: 0 * whole}, nodes, arisen)[program.output]
        doubts = np.minimum(doubts, errors[head][:, None, None] * apart + math.sqrt(2) * since[:, None, None])
    return logits, whole, doubts * UP


def _carried(program: Program, steps: Sequence[Step], base: str, arisen: Mapping[str, Array]) -> dict[str, Array]:
    """Return bounds of the errors of values, if `base` has none."""
    errors = {base: np.zeros_like(arisen[program.input])}
    for step in steps:
        local = {s: np.zeros_like(errors[base]) for s in step.sources}
        for start, end, inner in step.branches:
            local[end] = _carried(program, inner, start, arisen)[end]
        inside = _within(program, local, step.nodes, arisen)[step.value]
        brought = _combined(step.factors, [errors[s] for s in step.sources], step.joint)
        errors[step.value] = (brought + inside) * UP
    return errors


def _within(
    program: Program, known: dict[str, Array], nodes: Sequence[str], arisen: Mapping[str, Array]
) -> dict[str, Array]:
    """Carry errors of values through nodes, operator by operator."""
    for name in nodes:
        operation = program.operation(name)
        inputs = [known[x] for x in operation.inputs]
        known[name] = (_combined(operation.factors, inputs, operation.joint) + arisen[name]) * UP
    return known


def _combined(factors: Sequence[float], errors: Sequence[Array], joint: bool) -> Array:
    parts = [factor * error for factor, error in zip(factors, errors, strict=True)]
    return (np.sqrt(np.sum(np.square(parts), axis=0)) if joint else np.sum(parts, axis=0)) * UP
