"""Proved l2-Lipschitz bounds of PyTorch models: matrices, convolutions, and whole exported graphs."""

if __name__ != "lipcert.bounds":
    raise ImportError(
        f"this package is lipcert.bounds; it was imported as {__name__!r}. Write `import lipcert.bounds`: "
        "under two names there would be two copies and two rule tables"
    )

import lipcert.bounds.rules  # noqa: F401  (registers the rules)
from lipcert.bounds.audit import Audit, audit
from lipcert.bounds.core import Bound, BoundError, rule

__all__ = ["Audit", "Bound", "BoundError", "audit", "rule"]
