"""Norms of groups of entries, which are 1-Lipschitz although they multiply values by themselves."""

from __future__ import annotations

import math

from lipcert.bounds.core import Bound, BoundError, rule
from lipcert.bounds.graph import Node
from lipcert.bounds.propagation import Context
from lipcert.bounds.rounding import sqrt_up
from lipcert.bounds.values import ONE, Rounding, Value


@rule("aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim", "aten.norm.ScalarOpt_dim_dtype")
def vector_norm(node: Node, context: Context) -> Value:
    """Bound p-norms over disjoint groups: | ‖a‖_p - ‖b‖_p | ≤ ‖a-b‖_p ≤ ‖a-b‖₂ for p ≥ 2, √n‖a-b‖₂ for p = 1."""
    x = context.data(node, "self")
    order = node["ord"] if "ord" in node.arguments else node["p"]
    order = 2.0 if order is None else float(order)
    given = node["dim"]
    dims = range(len(x.shape)) if given is None or given == () else [given] if isinstance(given, int) else given
    count = math.prod(x.shape[context.axis(node, x, d)] for d in dims)
    if order == 1.0:
        factor = Bound(sqrt_up(float(count)), "upper", "norm inequality")
    elif order >= 2.0:
        factor = ONE
    else:
        raise BoundError(f"the {order}-norm has no rule ({node.place}); use an order of 1 or at least 2")
    return context.nonlinear(node, [x], factor, rounding=Rounding(output=count + 8, operations=count))
