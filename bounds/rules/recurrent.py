"""LSTM layers: Lipschitz because their gates are bounded, with a constant that grows with the length of the sequence.

One step is p = W x_t + U h_{t-1} + b, (i, f, g, o) = (σ, σ, tanh, σ)(p), c_t = f c_{t-1} + i g, h_t = o tanh(c_t)
(Hochreiter, Schmidhuber 1997, with forget gates). |h| ≤ 1 and |c_t| ≤ C_t = max|c_0| + t, entry by entry, so

    ‖Δc_t‖ ≤ ‖Δc_{t-1}‖ + α_t ‖Δp_t‖,   α_t² = (C_{t-1}/4)² + (1/4)² + 1,
    ‖Δh_t‖ ≤ ‖Δc_t‖ + ‖Δp_t‖/4,         ‖Δp_t‖ ≤ ‖W‖‖Δx_t‖ + ‖U‖‖Δh_{t-1}‖,

from f'c' - fc = (f' - f)c' + f(c' - c), the slopes 1/4 and 1 of σ and tanh, and Cauchy-Schwarz over the gates. The
recursion is linear with nonnegative coefficients: a matrix R between steps, and ‖(Δh_t)_t‖ ≤ ‖R‖‖W‖‖(Δx_t)_t‖.
Directions are concatenated: the root of the sum of their squares. Sequences do not act on each other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipcert.bounds.core import Bound, BoundError, rule
from lipcert.bounds.graph import BatchConstant, Node, Ref
from lipcert.bounds.matrix import spectral_norm_upper
from lipcert.bounds.propagation import Context
from lipcert.bounds.ranges import Range, Ranges, ranged
from lipcert.bounds.rounding import add_up, mul_up
from lipcert.bounds.rules.linear import schur
from lipcert.bounds.values import Rounding, Value, root

SAFE = 1.0 + 2.0**-30  # more than the rounding of the recursion, nonnegative sums of fewer than 2^18 terms
GATES = 256  # roundings granted to the functions and products of one step


@rule("aten.lstm.input")
def lstm(node: Node, context: Context) -> Value:
    """Bound one layer of LSTM, in one or both directions, by ‖R‖‖W‖.

    Rounding: p errs by γ(S(W)‖x_t‖ + S(U)√H + ‖b‖), c and h by γ(C + 1) an entry; an error of c counts no more than one
    of p, because α ≥ 1, and one of h as ‖U‖ times that in the next step. Twice that for products of errors.
    """
    x = context.data(node, "input")
    if node["train"] and node["dropout"] > 0.0:
        raise BoundError(f"{node.op} is random while training ({node.place}); call eval()")
    if len(node.inputs) > 1:
        return context.unbounded(node, [context.live[n] for n in node.inputs], "the state depends on the input")
    count = 4 if node["has_biases"] else 2
    if node["num_layers"] != 1 or len(node["params"]) != count * (1 + node["bidirectional"]):
        raise BoundError(f"LSTMs of several layers, or with projections, have no rule ({node.place}); use one by one")
    if node.output not in (None, 0):
        raise BoundError(f"only the outputs of {node.op} have a rule, not its last state ({node.place})")
    time = context.axis(node, x, 1 if node["batch_first"] else 0)
    steps, start = x.shape[time], [_largest(state) for state in node["hx"]]
    if start[0] > 1.0:
        return context.unbounded(node, [x], "the first output state is larger than 1")
    bounds, sizes, constant, length = [], [], 0.0, 0
    for weights in (node["params"][k : k + count] for k in range(0, len(node["params"]), count)):
        W, U, *biases = (weight.to(torch.float64) for weight in weights)
        size = spectral_norm_upper(U, context.method)
        response = spectral_norm_upper(_response(steps, start[1], size.value), context.method)
        response = Bound(response.value * SAFE, "upper", response.method)
        bounds.append(response * spectral_norm_upper(W, context.method))
        gain, hidden = response.value, U.shape[1]
        sizes.append(mul_up(2.0, gain, schur(W)))
        rows = math.sqrt(math.prod(x.shape) / x.shape[-1]) * SAFE
        offset = sum(float(torch.linalg.vector_norm(bias)) for bias in biases) * SAFE
        inner = rows * (schur(U) * math.sqrt(hidden) + offset) * SAFE
        states = rows * math.sqrt(hidden) * (start[1] + steps + 1.0) * (gain * (1.0 + size.value) + 1.0) * SAFE
        constant = add_up(constant, mul_up(2.0, gain, inner), mul_up(2.0, states))
        length = max(length, W.shape[1] + hidden + 8)
    norm = root(bounds)
    rounding = Rounding(((length, add_up(*sizes)),), constant=(max(length, GATES), constant), operations=4 * length)
    return context.linear(node, x, None, norm=lambda: norm, cheap=norm.value, rounding=rounding)


def _response(steps: int, state: float, size: float) -> Tensor:
    """Return R (steps, steps): how much h_t can move for each unit that p_s moves by itself."""
    h = c = torch.zeros(steps, dtype=torch.float64)
    rows = []
    for t in range(steps):
        p = h * size
        p[t] += 1.0
        c = c + p * math.sqrt(((state + t) / 4.0) ** 2 + 0.0625 + 1.0)
        h = c + p / 4.0
        rows.append(h)
    return torch.stack(rows)


def _largest(state: Tensor | BatchConstant | Ref) -> float:
    tensor = state.tensor if isinstance(state, BatchConstant) else state
    return float(tensor.abs().max()) if isinstance(tensor, Tensor) else math.inf


@ranged("aten.lstm.input")
def _lstm_range(node: Node, ranges: Ranges) -> Range:
    """Range over products of a sigmoid and a tanh."""
    return ranges.constant(node, -1.0, 1.0) if node.output in (None, 0) else ranges.unknown(node)
