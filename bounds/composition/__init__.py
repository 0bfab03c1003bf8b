"""Whole segments bounded at once: chains of affine maps and slope-restricted activations, tighter than the product."""

from lipcert.bounds.composition.chain import Chain
from lipcert.bounds.composition.methods import METHODS, chain_bound
from lipcert.bounds.composition.slopes import slopes

__all__ = ["METHODS", "Chain", "chain_bound", "slopes"]
