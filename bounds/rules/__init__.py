"""The rows of the rule table, one family per file; importing this package registers them all."""

from lipcert.bounds.rules import elementwise, joining, linear, normalisation, pooling, product, shape, steep

__all__ = ["elementwise", "joining", "linear", "normalisation", "pooling", "product", "shape", "steep"]
