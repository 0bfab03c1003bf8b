"""The rows of the rule table, one family per file; importing this package registers them all."""

from lipcert.bounds.rules import (
    attention,
    elementwise,
    joining,
    linear,
    normalisation,
    pooling,
    positions,
    product,
    recurrent,
    resample,
    selection,
    shape,
    steep,
)

__all__ = [
    "attention",
    "elementwise",
    "joining",
    "linear",
    "normalisation",
    "pooling",
    "positions",
    "product",
    "recurrent",
    "resample",
    "selection",
    "shape",
    "steep",
]
