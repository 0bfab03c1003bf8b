"""Walk a graph once and give every value what bounds it: segments, pieces, products of constants (docs/bounds.md 3).

A rule (`lipcert.bounds.rule`) is called as `rule(node, context)` and returns the `Value` of the node, made by one of

- `Context.linear`      one data argument, linear in it;
- `Context.sum`         a weighted sum of data arguments;
- `Context.nonlinear`   a Lipschitz function of one or several data arguments together;
- `Context.value`       anything else;
- `Context.unbounded`   nothing is known, and why.

A value carries, where it can, affine maps from *anchors* (the input, outputs of nonlinear operators, values with
several consumers): value = M·anchor + const, so that ‖value‖_Lip ≤ ‖M‖·L(anchor) with one norm for the whole segment;
the farthest anchor is used, which is the tightest. Next to them it carries *pieces* (`pieces`): ‖Δvalue‖ ≤
f·‖Δparent[range]‖ along one dimension of a parent. Where neither helps, the constants of the operators multiply. All
three are inequalities for the same number: the smallest is taken, and the `Derivation` says which it was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from lipcert.bounds import attention, pieces
from lipcert.bounds.affine import segment_bound, stack
from lipcert.bounds.composition.segments import Segments
from lipcert.bounds.core import RULES, Bound, BoundError, unknown_operators
from lipcert.bounds.graph import BatchConstant, Graph, Node, Ref, leaves
from lipcert.bounds.ranges import Ranges
from lipcert.bounds.rounding import mul_up, sqrt_up
from lipcert.bounds.values import (
    EXACT,
    Anchor,
    Derivation,
    Piece,
    Representation,
    Rounding,
    Step,
    Transform,
    Value,
    added,
    broadcast,
    raised,
    root,
    total,
)

Domain = tuple[float | Tensor, float | Tensor]  # a box: two numbers, or two tensors of the shape of one input
ONCE = Rounding(output=1)
EXACT_INTEGERS = 2**24  # that float32 holds
KEPT = 4  # representations per value: the earliest two anchors and the latest two


class Context:
    """Hold the state of one walk: live values by name, and what is known of all nodes by index."""

    def __init__(self, graph: Graph, method: str, domain: Domain, segments: Segments) -> None:
        self.graph, self.method, self.segments = graph, method, segments
        self.ranges = Ranges(graph, domain)
        self.nodes = graph.nodes
        self.live: dict[str, Value] = {}
        self.kept: dict[str, Value] = {}  # those named in `keep`, and those that a rule asks for after their last use
        self.steps: list[Step] = []
        self.merged: list[tuple[int, int]] = []
        self.derivations: dict[int, Derivation] = {}
        self.uses = Counter(name for node in graph.nodes for name in set(node.inputs))
        self.uses[graph.output] += 1
        self.device = next(iter(graph.weights.values()), torch.zeros(())).device

    # ------------------------------------------------------------------------------------------- what rules ask for

    def data(self, node: Node, argument: str) -> Value:
        """Return the value of a data argument; raise BoundError if it is a constant."""
        ref = node[argument]
        if not isinstance(ref, Ref):
            raise BoundError(f"{node.op} needs {argument} to depend on the input ({node.place})")
        return self.live[ref.name]

    def axis(self, node: Node, x: Value, dim: int) -> int:
        """Return a dimension as 0 ≤ dim < rank; raise BoundError if entries along it belong to different images."""
        dim = dim % max(len(x.shape), 1)
        if dim == x.node.batch:
            raise self.mixed(node)
        return dim

    def mixed(self, node: Node) -> BoundError:
        return BoundError(
            f"{node.op} mixes the images of a batch ({node.place}); a certificate needs a function of one image"
        )

    def bound(self, value: Value) -> Bound:
        """Return a Lipschitz bound of a value with respect to the input; the first call decides how it is derived."""
        if value.index not in self.derivations:
            if value.representations:
                found = self._affine(value)
            else:
                found = min((candidate() for candidate in value.candidates), key=lambda d: d.bound.order)
            self.derivations[value.index] = found
            if value.retired:
                value.representations, value.candidates = {}, []
        return self.derivations[value.index].bound

    # ------------------------------------------------------------------------------------------- what rules return

    def linear(
        self, node: Node, x: Value, transform: Transform | None, *, rounding: Rounding = EXACT,
        channel: int | None = None, norm: Callable[[], Bound] | None = None, cheap: float | None = None,
        merged: tuple[int, int] | None = None,
    ) -> Value:  # fmt: skip
        """Return the value of a linear operator of one argument.

        `transform` turns a representation of the argument into one of the result, or None where it does not fuse; then
        the argument becomes an anchor itself, with dimension `channel` for its channels. `norm` bounds the operator
        alone, where no kernel can say it; `cheap` is a quick upper bound of the same.
        """
        made: dict[Anchor, Representation] = {}
        if transform is not None:
            for anchor, representation in x.carriers(channel).items():
                if (new := transform(representation)) is not None:
                    made[anchor] = new
            if not made and channel is not None:
                made = x.relabelled(channel, transform)
            if not made:
                anchor, representation = x.identity(channel)
                if (new := transform(representation)) is not None:
                    made[anchor] = new
        if transform is not None and (norm is None or cheap is None):
            anchor, own = x.identity(channel)
            alone = made.get(anchor) or transform(own)
            if alone is not None:
                cheap = alone.map.magnitude if cheap is None else cheap
                norm = norm or cache(lambda: self.segments.norm(alone.map))
        if norm is None or cheap is None:
            raise BoundError(f"no norm is known for {node.op} ({node.place})")
        operator = norm
        value = self.value(node, [x], [cheap], rounding, merged=merged)
        self._keep(value, made)
        pieces.after(value, x, operator)
        pieces.segments(value, self.segments.norm)
        if not made:
            value.candidates.append(lambda: self.derive([x], [operator()], _short(node)))
            if not x.pieces:
                self.bound(value)
        elif not any(anchor[0] is not x for anchor in made):
            self.bound(x)
        return value

    def sum(self, node: Node, terms: Sequence[tuple[Value, float]], *, rounding: Rounding = ONCE) -> Value:
        """Return the value of Σ factor·term, broadcast to the shape of the node; common anchors make it one map."""
        for x, _ in terms:
            self.aligned(node, x)
        factors = [
            mul_up(abs(f), sqrt_up(float(math.prod(node.shape) // max(1, math.prod(x.shape))))) for x, f in terms
        ]
        value = self.value(node, [x for x, _ in terms], factors, rounding)
        tables = [x.carriers() for x, _ in terms]
        made = {}
        for anchor in _common(tables):
            parts = [table[anchor] for table in tables]
            layouts = [raised(part.layout, len(node.shape)) for part in parts]
            whole: Representation | None = None
            for part, layout, (_, factor) in zip(parts, layouts, terms, strict=True):
                new = broadcast(replace(part, layout=layout), node.shape, layouts)
                new = new and replace(new, map=new.map.scaled(torch.tensor([factor], dtype=torch.float64)))
                whole = new if whole is None else new and added(whole, new)
                if whole is None:
                    break
            if whole is not None:
                made[anchor] = whole
        self._keep(value, made)
        bounds = [Bound(f, "upper", "scale") for f in factors]
        pieces.apart(value, [[(x, bound)] for (x, _), bound in zip(terms, bounds, strict=True)])
        pieces.segments(value, self.segments.norm)
        if not made:
            value.candidates.append(lambda: self.derive([x for x, _ in terms], bounds, _short(node)))
            if not value.pieces:
                self.bound(value)
        return value

    def nonlinear(
        self, node: Node, xs: Sequence[Value], factor: Bound, *, rounding: Rounding = EXACT, label: str = "",
        representations: dict[Anchor, Representation] | None = None, margins: Sequence[float] = (),
    ) -> Value:  # fmt: skip
        """Return the value of a function with ‖Δresult‖² ≤ factor²·Σ‖Δx_i‖², such as max(a, b).

        A linear one, such as a concatenation, may have `representations` by the anchors that its arguments share.
        `margins`: as in `value`.
        """
        value = self.value(node, xs, [factor.value] * len(xs), rounding, joint=True, margins=margins)
        self.segments.activation(value, xs)
        pieces.together(value, xs, factor)
        if representations:
            self._keep(value, representations)
            pieces.segments(value, self.segments.norm)
        else:
            value.candidates = self._joint(value, xs, factor, label or _short(node))
        value.pieces = {parent: piece for parent, piece in value.pieces.items() if not pieces.whole(parent, piece)}
        if not value.pieces and not representations:
            self.bound(value)
        return value

    def value(
        self, node: Node, inputs: Sequence[Value], factors: Sequence[float], rounding: Rounding, *, joint: bool = False,
        merged: tuple[int, int] | None = None, margins: Sequence[float] = (),
    ) -> Value:  # fmt: skip
        """Return a bare value: an operator with these arguments and cheap constants, and no bound yet.

        Constants that hold only where the arguments have certain ranges are proved for ranges that are larger by
        `margins`, one for each argument (∞ where it does not matter), because computed values leave the exact ranges.
        """
        step = Step(tuple(x.index for x in inputs), tuple(factors), joint, rounding, tuple(margins))
        value = Value(node, len(self.steps), step, self.uses[node.name] > 1, self.device)
        self.steps.append(step)
        if merged is None:
            factor = node.shape[node.batch] if node.batch is not None else 1
            known = {x.merged for x in inputs if math.prod(x.merged) == factor}
            if factor > 1 and len(known) != 1:
                raise self.mixed(node)
            merged = known.pop() if factor > 1 else (1, 1)
        value.merged = merged
        self.merged.append(merged)
        return value

    def unbounded(self, node: Node, inputs: Sequence[Value], reason: str) -> Value:
        """Return a value without a bound; the audit lists the reason."""
        infinite = Bound(math.inf, "upper", "none")
        value = self.value(node, inputs, [math.inf] * len(inputs), Rounding())
        found = self.derive(inputs, [infinite] * len(inputs), _short(node))
        self.derivations[value.index] = replace(found, bound=infinite, reason=reason)
        return value

    def derive(
        self, sources: Sequence[Value], factors: Sequence[Bound], label: str, *, joint: bool = False,
        members: Iterable[int] = (),
    ) -> Derivation:  # fmt: skip
        """Return the derivation of a bound from those of its sources."""
        parts = [factor * self.bound(source) for factor, source in zip(factors, sources, strict=True)]
        indices = tuple(source.index for source in sources)
        return Derivation(indices, tuple(factors), (root if joint else total)(parts), label, joint, frozenset(members))

    def retire(self, value: Value) -> None:
        """Let go of what only the consumers of a value needed; an unbounded value keeps one way to its bound."""
        value.retired, value.own = True, {}
        if value.index in self.derivations:
            value.representations, value.candidates = {}, []
        elif value.representations:
            anchor = min(value.representations, key=lambda a: a[0].index)
            value.representations = {anchor: value.representations[anchor]}

    def constant(self, node: Node, argument: str) -> Tensor | None:
        """Return a constant argument as a float64 tensor, None if it is not given; raise BoundError if not finite."""
        given = node[argument]
        if given is None:
            return None
        if isinstance(given, BatchConstant):
            given = given.tensor
        if isinstance(given, bool | int | float):
            given = torch.tensor(float(given), dtype=torch.float64)
        if not isinstance(given, Tensor):
            raise BoundError(f"{node.op} needs {argument} to be constant ({node.place})")
        given = given.to(torch.float64)
        if not bool(torch.isfinite(given).all()):
            raise BoundError(f"{argument} of {node.op} has NaN or infinite entries ({node.place})")
        return given

    def offset(self, node: Node) -> float:
        """Return an upper bound of the l2 norm, over one image, of the constants that an operator reads.

        In a precision that cannot hold them they are rounded, which counts as an error of the operator.
        """
        total = 0.0
        places = ("dim", "start", "end", "step", "index")  # where whole numbers are no constants
        read = [a for key, a in node.arguments.items() if not (key in places and isinstance(a, int))]
        for leaf in leaves(read):
            tensor = leaf.tensor if isinstance(leaf, BatchConstant) else leaf
            if isinstance(tensor, float) or (isinstance(tensor, int) and abs(tensor) > EXACT_INTEGERS):
                tensor = torch.tensor(float(tensor), dtype=torch.float64)
            if isinstance(tensor, Tensor) and not tensor.is_floating_point() and tensor.dtype != torch.bool:
                tensor = torch.where(tensor.abs() > EXACT_INTEGERS, tensor, 0).to(torch.float64)
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                copies = math.prod(node.shape) / tensor.numel()
                finite = torch.where(tensor.isinf(), 0.0, tensor)  # infinite bounds of a clamp are exact
                total += float(torch.linalg.vector_norm(finite)) * math.sqrt(max(1.0, copies))
        return total * (1.0 + 2.0**-20)

    def aligned(self, node: Node, x: Value) -> None:
        """Raise BoundError unless the images of x meet those of the result when shapes are broadcast."""
        if x.node.batch is not None and (
            node.batch is None or len(node.shape) - node.batch != len(x.shape) - x.node.batch
        ):
            raise self.mixed(node)

    def _keep(self, value: Value, made: dict[Anchor, Representation]) -> None:
        """Store the maps of a value, and let it be an anchor itself if that costs nothing.

        After a shift, a roll or a crop, which are no larger than 1, what follows may fuse from there on where it does
        not fuse with the shift: a zero-padded convolution after a roll.
        """
        order = sorted(made, key=lambda anchor: anchor[0].index)
        if order and not made[order[0]].map.pointwise and made[order[0]].map.magnitude <= 1.0:
            value.forked = True
        if len(order) > KEPT:
            order = order[: KEPT // 2] + order[-KEPT // 2 :]
        value.representations = {a: replace(made[a], members=made[a].members | {value.index}) for a in order}

    # ------------------------------------------------------------------------------------------ ways to a bound

    def _affine(self, value: Value) -> Derivation:
        (source, _), found = min(value.representations.items(), key=lambda item: item[0][0].index)
        norm = self.segments.norm(found.map)
        plain = self.derive([source], [norm], "affine", members=found.members)
        if (longer := self.segments.bound(value)) is None:
            return plain
        source, whole, members = longer
        chain = replace(self.derive([source], [whole], "chain", members=members), carried=plain)
        return chain if chain.bound.order < plain.bound.order else plain

    def _joint(self, value: Value, xs: Sequence[Value], factor: Bound, label: str) -> list[Callable[[], Derivation]]:
        """Return the ways to bound a function that is `factor`-Lipschitz in all its arguments together."""

        def from_piece(parent: Value, piece: Piece) -> Derivation:
            return self.derive([parent], [piece.factor()], label, members=piece.members - {value.index})

        ways: list[Callable[[], Derivation]] = [partial(from_piece, *item) for item in value.pieces.items()]
        everything = [parent for parent, piece in value.pieces.items() if pieces.whole(parent, piece)]
        if any(all(any(anchor is parent for anchor, _ in x.carriers()) for x in xs) for parent in everything):
            return ways  # slices of one value, such as the halves of MaxMin: nothing is gained by one bound for each
        if len(xs) == 1:
            return [*ways, lambda: self.derive(xs, [factor], label)]
        if (stacked := self._stacked(xs)) is not None:
            source, joined = stacked
            ways.append(
                lambda: self.derive(
                    [source], [segment_bound(joined.map, self.method) * factor], label, members=joined.members
                )
            )
        else:
            ways.append(lambda: self.derive(xs, [factor] * len(xs), label, joint=True))
        return ways

    def _stacked(self, xs: Sequence[Value]) -> tuple[Value, Representation] | None:
        """Return the earliest common anchor of several values and the map to all of them, one above the other."""
        tables = [x.carriers() for x in xs]
        for anchor in sorted(_common(tables), key=lambda anchor: anchor[0].index):
            parts = [table[anchor] for table in tables]
            if (joined := stack([part.map for part in parts])) is not None:
                members = frozenset[int]().union(*(part.members for part in parts))
                return anchor[0], Representation(joined, parts[0].layout, members)
        return None


def propagate(
    graph: Graph, method: str = "auto", keep: Iterable[str] = (), domain: Domain = (-math.inf, math.inf),
    tightness: str = "fast",
) -> tuple[Context, dict[str, Value]]:
    """Run every node's rule and return the context and the values named in `keep`, not yet bounded.

    Raises one BoundError that lists all operators without a rule.
    """
    missing = unknown_operators((node.op, node.module, node.source) for node in graph.nodes[1:])
    if missing is not None:
        raise missing
    method = "tight" if (method, tightness) == ("auto", "tight") else method
    context = Context(graph, method, domain, Segments(graph, {*keep}, tightness, method))
    wanted = {*keep, *attention.sources(context.ranges.nodes)}
    source = context.value(graph.input, [], [], Rounding())
    context.derivations[0] = Derivation((), (), Bound(1.0, "upper", ""), "input")
    context.live[graph.input.name] = source
    context.kept = {name: source for name in wanted if name == graph.input.name}
    last = {name: node.name for node in graph.nodes for name in node.inputs}
    for node in graph.nodes[1:]:
        value = RULES[node.op](node, context)
        if value.shape != node.shape:
            raise RuntimeError(f"the rule of {node.op} returned a value of another node ({node.place})")
        context.live[node.name] = value
        if node.name in wanted:
            context.kept[node.name] = value
        for name in set(node.inputs):
            if last[name] == node.name:
                context.retire(context.live.pop(name))
    return context, {name: context.kept[name] for name in keep}


def _common(tables: Sequence[dict]) -> list:
    return [key for key in tables[0] if all(key in table for table in tables[1:])]


def _short(node: Node) -> str:
    """Return the short name of an operator: "conv2d" for "aten.conv2d.default"."""
    return node.op.split(".")[1] if "." in node.op else node.op
