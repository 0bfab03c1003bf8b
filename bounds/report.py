"""The rows of an audit: one per closed segment and per nonlinear operator, in the order of the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from lipcert.bounds.core import Bound
from lipcert.bounds.graph import Node
from lipcert.bounds.propagation import Context
from lipcert.bounds.values import Derivation

_WEIGHTED = ("conv", "linear", "addmm", "matmul", "mm", "batch_norm", "layer_norm", "group_norm")
_SILENT = tuple(
    "alias contiguous clone detach dropout view reshape flatten permute transpose unsqueeze squeeze _unsafe_view "
    "unflatten".split()
)


@dataclass(frozen=True)
class LayerBound:
    """One row: the factor `upper` from what it starts at, and the bound `cumulative` of its result from the input."""

    name: str
    op: str
    shape: tuple[int, ...]
    upper: Bound
    lower: Bound | None
    method: str
    cumulative: Bound
    note: str = ""


def rows(context: Context, results: Iterable[int]) -> tuple[LayerBound, ...]:
    """Return the rows of every derivation that the results rest on, in topological order."""
    found: set[int] = set()
    stack = list(results)
    while stack:
        index = stack.pop()
        if index not in found and index in context.derivations:
            found.add(index)
            stack.extend(context.derivations[index].sources)
    return tuple(
        _row(context, index, context.derivations[index])
        for index in sorted(found)
        if index and not _idle(context, index, context.derivations[index])
    )


def _idle(context: Context, index: int, derivation: Derivation) -> bool:
    """Return whether a derivation only says that a view changes nothing."""
    members = derivation.members | {index}
    exact = len(derivation.factors) == 1 and derivation.factors[0].value == 1.0
    return exact and all(_short(context.nodes[i]) in _SILENT for i in members)


def _row(context: Context, index: int, derivation: Derivation) -> LayerBound:
    node = context.nodes[index]
    members = [context.nodes[i] for i in sorted(derivation.members | {index})]
    op = _operators(members, derivation)
    note = f"no bound: {derivation.reason}" if derivation.reason else ""
    if derivation.reason:
        upper = derivation.bound
    elif len(derivation.sources) == 1:
        upper = derivation.factors[0]
    else:
        before = [context.derivations[i].bound for i in derivation.sources]
        parts = " + ".join(f"{short(f)}·{short(b)}" for f, b in zip(derivation.factors, before, strict=True))
        note = f"√ of squares of {parts}" if derivation.joint else f"sum of branches {parts}"
        note += "; upper is relative to the largest branch"
        upper = replace(derivation.bound / max(before, key=lambda bound: bound.order), method="branches")
    batch = 0 if node.batch is None else node.batch  # a program for one image has no other
    shape = tuple(size for d, size in enumerate(node.shape) if d != batch)
    return LayerBound(_name(members), op, shape, upper, None, upper.method, derivation.bound, note)


def short(bound: Bound, digits: int = 6) -> str:
    """Return a bound with a few significant digits, rounded to the nearest.

    >>> short(Bound(2.0, "upper", "")), short(Bound(1e200, "upper", "") * Bound(1e200, "upper", ""))
    ('2', '1e+400')
    """
    value = bound.written
    if isinstance(value, float) or value == "inf":
        return f"{float(value):.{digits}g}"
    mantissa, exponent = f"{Decimal(value):.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"


def describe(node: Node) -> str:
    """Return the module path of a node, or its own name at the top level."""
    return node.module or node.name


def _operators(members: Sequence[Node], derivation: Derivation) -> str:
    names: list[str] = []
    for node in members:
        name = _short(node)
        if name in _SILENT:
            continue
        if names and names[-1].split("×")[0] == name:
            count = int(names[-1].split("×")[1]) if "×" in names[-1] else 1
            names[-1] = f"{name}×{count + 1}"
        else:
            names.append(name)
    if derivation.label in ("affine", "chain"):
        return f"{derivation.label}: " + ("+".join(names) or _short(members[-1]))
    inner = [name for name in names if name != _short(members[-1])]
    return f"{derivation.label} of {'+'.join(inner)}" if inner else derivation.label


def _name(members: Sequence[Node]) -> str:
    """Return the module paths of a segment: those with weights if there are any, at most three."""
    weighted = [node.module for node in members if _short(node).startswith(_WEIGHTED) and node.module]
    paths = list(dict.fromkeys(weighted or [node.module for node in members if node.module]))
    if not paths:
        return members[-1].name
    return ", ".join(paths) if len(paths) <= 3 else f"{paths[0]} … {paths[-1]}"


def _short(node: Node) -> str:
    return node.op.split(".")[1] if "." in node.op else node.op


def table(
    layers: Sequence[LayerBound], upper: Bound, unbounded: Sequence[tuple[str, str, str]], position: Bound | None = None
) -> str:
    """Return the rows as text, the network bound in the last line, and after it that of one position of a map."""
    header = ("layer", "operators", "shape", "upper", "cumulative", "method")
    body = [
        (row.name, row.op, "×".join(map(str, row.shape)), short(row.upper), short(row.cumulative), row.method)
        for row in layers
    ]
    widths = [min(48, max(len(line[k]) for line in (header, *body))) for k in range(len(header))]
    lines = [
        "  ".join(_fit(cell, width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, *body)
    ]
    lines += [f"no bound: {name} ({op}): {reason}" for name, op, reason in unbounded]
    value = short(upper, 10) if upper.finite else "no finite bound"
    lines.append(f"Lipschitz constant (l2, image to outputs): at most {value}")
    if position is not None and position.finite:
        lines.append(f"of the outputs at one position: at most {short(position, 10)}")
    return "\n".join(lines)


def _fit(cell: str, width: int) -> str:
    return cell.ljust(width) if len(cell) <= width else cell[: width - 1] + "…"
