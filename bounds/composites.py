"""Normalisation of rows, written out in several operators and lifted to one before the walk.

Alone, a quotient x / ‖x‖ has the bound of a quotient on its range; as one operator it is Lipschitz everywhere:

- `x / max(‖x‖, ε)` (F.normalize) is 1/ε times the projection onto the ball of radius ε, which is 1-Lipschitz: 1/ε.
- `x / (‖x‖ + ε)` has the radial slope ε/(r + ε)² and the tangential 1/(r + ε), r = ‖x‖: 1/ε.
- `x / √(Σx² + ε)` and `x / √(mean x² + ε)` (RMSNorm): slopes at most 1/√ε, rows of the second at most √D long.

Each match is exact: the norm is that of the very value that is divided, over dimensions that are kept; anything else is
left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lipcert.bounds.graph import Node, Ref

Match = tuple[str, dict[str, Any]]
_SAME = ("aten.expand_as.default", "aten.expand.default", "aten.alias.default")


def normalisation(node: Node, table: Mapping[str, Node]) -> Match | None:
    """Return the lifted operator and its arguments if a node is the last of such a normalisation."""
    if node.op == "aten.div.Tensor" and isinstance(node["self"], Ref) and isinstance(node["other"], Ref):
        x, divisor = node["self"], _behind(table[node["other"].name], table)
        found = _length(divisor, x, table)
        return None if found is None else ("lipcert.normalize", {"x": x, **found})
    if node.op == "aten.mul.Tensor" and isinstance(node["self"], Ref) and isinstance(node["other"], Ref):
        for x, factor in ((node["self"], node["other"]), (node["other"], node["self"])):
            inverse = _behind(table[factor.name], table)
            if inverse.op == "aten.rsqrt.default" and isinstance(inverse["self"], Ref):
                found = _squares(table[inverse["self"].name], x, table)
                if found is not None:
                    return "lipcert.normalize", {"x": x, **found}
    return None


def _length(node: Node, x: Ref, table: Mapping[str, Node]) -> dict[str, Any] | None:
    """Read max(‖x‖, ε), ‖x‖ + ε or √(Σx² + ε)."""
    if node.op in ("aten.clamp_min.default", "aten.clamp.default"):
        eps = node["min"]
        free = node.arguments.get("max") is None
        dim = _norm(node["self"], x, table)
        return {"dim": dim, "eps": float(eps), "kind": "max"} if dim is not None and free and _number(eps) else None
    if node.op in ("aten.add.Tensor", "aten.add.Scalar") and node["alpha"] == 1:
        dim = _norm(node["self"], x, table)
        eps = node["other"]
        return {"dim": dim, "eps": float(eps), "kind": "sum"} if dim is not None and _number(eps) else None
    if node.op == "aten.sqrt.default" and isinstance(node["self"], Ref):
        return _squares(table[node["self"].name], x, table)
    return None


def _squares(node: Node, x: Ref, table: Mapping[str, Node]) -> dict[str, Any] | None:
    """Read Σx² + ε or mean x² + ε."""
    if node.op not in ("aten.add.Tensor", "aten.add.Scalar") or node["alpha"] != 1 or not _number(node["other"]):
        return None
    if not isinstance(node["self"], Ref):
        return None
    total = table[node["self"].name]
    if total.op not in ("aten.mean.dim", "aten.sum.dim_IntList") or not total["keepdim"] or not total["dim"]:
        return None
    dims = total["dim"]
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    square = table[total["self"].name] if isinstance(total["self"], Ref) else None
    if square is None or len(dims) != 1 or not _square(square, x):
        return None
    kind = "mean" if total.op == "aten.mean.dim" else "squares"
    return {"dim": dims[0] % len(square.shape), "eps": float(node["other"]), "kind": kind}


def _square(node: Node, x: Ref) -> bool:
    if node.op == "aten.pow.Tensor_Scalar":
        return node["self"] == x and node["exponent"] == 2
    if node.op == "aten.square.default":
        return bool(node["self"] == x)
    return node.op == "aten.mul.Tensor" and node["self"] == x and node["other"] == x


def _norm(given: Any, x: Ref, table: Mapping[str, Node]) -> int | None:
    """Return the dimension over which a value is the l2 norm of x, kept as a singleton."""
    node = table[given.name] if isinstance(given, Ref) else None
    if node is None or not node.op.startswith(("aten.linalg_vector_norm.", "aten.norm.ScalarOpt_dim")):
        return None
    order = node["ord"] if "ord" in node.arguments else node["p"]
    dims = node["dim"]
    dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
    if node["self"] != x or order not in (None, 2, 2.0) or len(dims) != 1 or not node["keepdim"]:
        return None
    return int(dims[0]) % len(table[x.name].shape)


def _behind(node: Node, table: Mapping[str, Node]) -> Node:
    """Return what a value repeats."""
    while node.op in _SAME and isinstance(node["self"], Ref):
        node = table[node["self"].name]
    return node


def _number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, int | float) and not isinstance(value, bool)


def normalize(x: Tensor, dim: int, eps: float, kind: str) -> Tensor:
    """Return x normalised along a dimension; `kind`: max(‖x‖, ε), sum ‖x‖ + ε, squares √(Σx² + ε), mean √(mean x² + ε).

    >>> normalize(torch.tensor([3.0, 4.0]), 0, 1.0, "max")
    tensor([0.6000, 0.8000])
    """
    if kind in ("max", "sum"):
        norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
        return x / (norm.clamp_min(eps) if kind == "max" else norm + eps)
    squares = x.square().mean(dim, keepdim=True) if kind == "mean" else x.square().sum(dim, keepdim=True)
    return x / (squares + eps).sqrt()
