"""The two exceptions that carry an exit code. Every other exception that reaches the command line is a bug of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from the user: one sentence that says what was given and what to do. The command line exits with 2."""


class Finding(Exception):
    """A result that contradicts a claim, like a certificate that does not verify. The command line exits with 3."""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Return the error for a name that does not exist: with the nearest ones if any are near, else with all names.

    >>> print(unknown("dataset", "cifar", ["cifar10", "cifar100", "mnist"]))
    unknown dataset 'cifar'; did you mean 'cifar10' or 'cifar100'?
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, cutoff=0.9) or difflib.get_close_matches(name, known)
    if near:
        return InputError(f"unknown {kind} {name!r}; did you mean {' or '.join(repr(match) for match in near)}?")
    return InputError(f"unknown {kind} {name!r}; known are: {', '.join(known) or 'none'}")


def missing_extra(library: str, extra: str) -> InputError:
    """Return the error for an optional library that is not installed.

    >>> print(missing_extra("timm", "timm"))
    timm is not installed; run: pip install 'lipcert[timm]'
    """
    return InputError(f"{library} is not installed; run: pip install 'lipcert[{extra}]'")
