"""The two exceptions that carry an exit code. Every other exception that reaches the command line is a bug of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from the user: one sentence that says what was given and what to do. The command line exits with 2."""


class Finding(Exception):
    """A result that contradicts a claim, like a certificate that does not verify. The command line exits with 3."""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Return the error for a name that does not exist: with the near match if there is one, else with all names.

    >>> print(unknown("dataset", "cifar", ["cifar10", "mnist"]))
    unknown dataset 'cifar'; did you mean 'cifar10'?
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return InputError(f"unknown {kind} {name!r}; did you mean {' or '.join(repr(match) for match in near)}?")
    return InputError(f"unknown {kind} {name!r}; known are: {', '.join(known) or 'none'}")
