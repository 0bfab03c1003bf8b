"""Where the channels and the positions of an affine map lie in a tensor.

An affine map writes (c, h, w) arrays. A tensor holds the same numbers in another order: channels last, positions merged
into tokens, singleton dimensions. A `Layout` says, for every dimension of the tensor, which axes it consists of,
outermost first; axes of size 1 are never listed, and neither is the batch. Permuting, squeezing, flattening and viewing
change the layout and leave the map alone; they are isometries. What cannot be said this way (a view that cuts an axis
in two) has no layout, and the value starts a new segment.

Axes are named "c", "h", "w"; values of more dimensions have further axes "p0", "p1", … along which the map acts alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Layout:
    """Hold the axes of every tensor dimension and the size of every axis (of one image).

    >>> Layout.of((1, 8, 4, 4), batch=0, channel=1).reshape((1, 8, 16)).dims
    ((), ('c',), ('h', 'w'))
    """

    dims: tuple[tuple[str, ...], ...]
    sizes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, shape: Sequence[int], batch: int | None, channel: int) -> Layout:
        """Return the layout of a new anchor: dimension `channel` holds the channels, the others are positions."""
        others = [d for d in range(len(shape)) if d not in (batch, channel)]
        names = ["h", "w"][2 - len(others) :] if len(others) <= 2 else [f"p{k}" for k in range(len(others))]
        sizes = {"c": shape[channel], "h": 1, "w": 1}
        dims: list[tuple[str, ...]] = [()] * len(shape)
        for d, name in [(channel, "c"), *zip(others, names, strict=True)]:
            sizes[name] = shape[d]
            dims[d] = (name,)
        if batch is not None and shape[batch] > 1:  # positions merged into the batch
            sizes["b"], dims[batch] = shape[batch], ("b",)
        return cls._normal(dims, sizes)

    @classmethod
    def _normal(cls, dims: Sequence[Sequence[str]], sizes: dict[str, int]) -> Layout:
        kept = tuple(tuple(axis for axis in dim if sizes[axis] > 1) for dim in dims)
        return cls(kept, tuple(sorted((a, s) for a, s in sizes.items() if s > 1 or a in "chw")))

    def size(self, axis: str) -> int:
        return dict(self.sizes)[axis]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the tensor for one image."""
        return tuple(math.prod(self.size(axis) for axis in dim) for dim in self.dims)

    def is_axis(self, dim: int, axis: str) -> bool:
        """Return whether a dimension is exactly this axis; a singleton dimension is any axis of size 1."""
        return self.dims[dim] == ((axis,) if self.size(axis) > 1 else ())

    def resized(self, **sizes: int) -> Layout:
        """Return the layout after axes have changed their sizes; an axis that was of size 1 is placed with `placed`."""
        return self._normal(self.dims, {**dict(self.sizes), **sizes})

    def placed(self, dim: int, axis: str, size: int) -> Layout:
        """Return the layout with an axis of size 1 grown in a singleton dimension."""
        dims = [*self.dims[:dim], (axis,), *self.dims[dim + 1 :]]
        return self._normal(dims, {**dict(self.sizes), axis: size})

    def permute(self, order: Sequence[int]) -> Layout:
        return replace(self, dims=tuple(self.dims[d] for d in order))

    def reshape(self, shape: Sequence[int]) -> Layout | None:
        """Return the layout after a view with this shape (of one image), or None if it cuts an axis."""
        axes = [axis for dim in self.dims for axis in dim]
        dims = []
        for size in shape:
            taken: list[str] = []
            have = 1
            while have < size and axes:
                taken.append(axes.pop(0))
                have *= self.size(taken[-1])
            if have != size:
                return None
            dims.append(tuple(taken))
        return None if axes else replace(self, dims=tuple(dims))

    def without(self, dims: Sequence[int]) -> Layout:
        """Return the layout after singleton dimensions have been removed."""
        return replace(self, dims=tuple(dim for d, dim in enumerate(self.dims) if d not in dims))
