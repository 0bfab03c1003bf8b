"""What a walk knows about the values of a graph: maps from anchors, pieces of parents, how bounds were derived."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from lipcert.bounds.affine import AffineMap, add, identity
from lipcert.bounds.core import Bound
from lipcert.bounds.graph import Node
from lipcert.bounds.layout import Layout

ONE = Bound(1.0, "upper", "isometry")


@dataclass(frozen=True, eq=False)
class Representation:
    """An affine map from an anchor, how its output lies in the tensor, and the nodes (by index) that it composes."""

    map: AffineMap
    layout: Layout
    members: frozenset[int] = frozenset()


Transform = Callable[[Representation], Representation | None]


@dataclass(frozen=True, eq=False)
class Piece:
    """‖Δvalue‖ ≤ factor · ‖Δparent restricted to `indices` of dimension `dim`‖."""

    dim: int
    indices: frozenset[int]
    factor: Callable[[], Bound]
    members: frozenset[int]


@dataclass(frozen=True)
class Rounding:
    """Bound the error that one floating-point operator adds to the exact operator on its computed arguments, in l2.

    With γ of the precision: Σ_i γ_{n_i}·S_i·‖argument_i‖ + γ_output·‖result‖ + γ_n·‖constant‖ + absolute, plus what can
    underflow (`operations` per output entry; more where a loss is divided by something small). S_i also bounds the sum
    of the absolute values. `squares`: so many squares of the arguments are summed up for each output entry. `own_only`:
    proved for the evaluation by `Program` itself, not for torch's own kernel. `evaluated`: the (n_i, S_i) of that
    evaluation, where it computes in another way than a deployed program may.
    """

    inputs: tuple[tuple[int, float], ...] = ()
    evaluated: tuple[tuple[int, float], ...] = ()
    output: int = 0
    constant: tuple[int, float] = (0, 0.0)
    absolute: float = 0.0
    operations: float = 0
    squares: int = 0
    own_only: bool = False


EXACT = Rounding()


@dataclass(frozen=True)
class Step:
    """One operator alone: argument indices, a cheap Lipschitz constant for each, how they join, and its rounding.

    The constants hold where each computed argument is within its margin of an exact value (no margins: everywhere).
    """

    inputs: tuple[int, ...]
    factors: tuple[float, ...]
    joint: bool  # √Σ(f_i·)² instead of Σ f_i·
    rounding: Rounding
    margins: tuple[float, ...] = ()


@dataclass(frozen=True)
class Derivation:
    """Why L(value) ≤ Σ f_i L(source_i), or √Σ(f_i L(source_i))² if `joint`; `members` are the nodes in between.

    `carried`: another derivation of the same value, by which rounding errors are carried instead; a chain, whose
    members are not all linear, has the one that starts at its last activation.
    """

    sources: tuple[int, ...]
    factors: tuple[Bound, ...]
    bound: Bound
    label: str
    joint: bool = False
    members: frozenset[int] = frozenset()
    reason: str = ""  # why there is no bound
    margins: tuple[float, ...] = ()
    carried: Derivation | None = None


Anchor = tuple["Value", int]  # a value, and which of its dimensions holds the channels


@dataclass(eq=False)
class Value:
    """What is known about one node while the walk needs it."""

    node: Node
    index: int
    step: Step
    forked: bool
    device: torch.device
    representations: dict[Anchor, Representation] = field(default_factory=dict)
    own: dict[Anchor, Representation] = field(default_factory=dict)
    pieces: dict[Value, Piece] = field(default_factory=dict)
    candidates: list[Callable[[], Derivation]] = field(default_factory=list)
    merged: tuple[int, int] = (1, 1)  # the batch dimension is merged (outer) · images · (inner)
    retired: bool = False  # no further node reads it

    @property
    def shape(self) -> tuple[int, ...]:
        return self.node.shape

    @property
    def batch(self) -> int | None:
        """Return the dimension that counts the images, also in a program for exactly one."""
        return 0 if self.node.batch is None and self.shape[:1] == (1,) else self.node.batch

    def identity(self, channel: int | None) -> tuple[Anchor, Representation]:
        """Return the value as an anchor of its own, with a dimension for its channels (a guess by rank if None)."""
        if channel is None:
            free = [d for d in range(len(self.shape)) if d != self.batch]
            channel = free[0] if len(free) != 2 else free[-1]  # (c, h, w), (tokens, c), (c,)
        anchor = (self, channel)
        if anchor not in self.own:
            layout = Layout.of(self.shape, self.batch, channel)
            grid = layout.size("h"), layout.size("w")
            self.own[anchor] = Representation(identity(layout.size("c"), grid, self.device), layout)
        return anchor, self.own[anchor]

    def carriers(self, channel: int | None = None) -> dict[Anchor, Representation]:
        """Return the maps that the value is known by; it is an anchor itself if it has several consumers or no map."""
        table = {**self.representations, **self.own}
        if not table or (self.forked and not self.own):
            anchor, representation = self.identity(channel)
            table[anchor] = representation
        return table

    def relabelled(self, channel: int, transform: Transform) -> dict[Anchor, Representation]:
        """Return what `transform` makes of anchors that the value is a mere view of, their channels chosen to fit.

        An identity stays one whichever dimension of the anchor is called its channels.
        """
        made = {}
        for (anchor, old), known in {**self.representations, **self.own}.items():
            if not known.map.identity or len(known.layout.dims[channel]) != 1:
                continue
            before = Layout.of(anchor.shape, anchor.batch, old).dims
            new = before.index(known.layout.dims[channel])
            key, own = anchor.identity(new)
            pairs = zip(before, own.layout.dims, strict=True)
            names = {a: b for one, two in pairs for a, b in zip(one, two, strict=True)}
            dims = tuple(tuple(names[axis] for axis in dim) for dim in known.layout.dims)
            found = transform(replace(own, layout=replace(own.layout, dims=dims), members=known.members))
            if found is not None:
                made[key] = found
        return made


def added(a: Representation, b: Representation) -> Representation | None:
    """Return a + b, or None if they do not lie in the tensor in the same way."""
    total = add(a.map, b.map) if a.layout == b.layout else None
    return None if total is None else Representation(total, a.layout, a.members | b.members)


def broadcast(x: Representation, shape: Sequence[int], layouts: Sequence[Layout] = ()) -> Representation | None:
    """Return x expanded to a shape; only one channel can become many, and only where no other layout has positions."""
    for dim, size in enumerate(shape):
        if x.layout.shape[dim] == size:
            continue
        others = {layout.dims[dim] for layout in layouts if layout.dims[dim]}
        if x.layout.shape[dim] != 1 or x.layout.size("c") != 1 or not others <= {("c",)}:
            return None
        rows = x.map.rows(torch.zeros(size, dtype=torch.int64, device=x.map.taps.device))
        if rows is None:
            return None
        x = replace(x, map=rows, layout=x.layout.placed(dim, "c", size))
    return x


def raised(layout: Layout, rank: int) -> Layout:
    """Return a layout with singleton dimensions in front, as broadcasting puts them there."""
    return replace(layout, dims=((),) * (rank - len(layout.dims)) + layout.dims)


def total(parts: Sequence[Bound]) -> Bound:
    """Return the sum of bounds."""
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def root(parts: Sequence[Bound]) -> Bound:
    """Return the root of the sum of the squares of bounds."""
    if len(parts) == 1:
        return parts[0]
    return total([part * part for part in parts]).root()
