"""Libraries that log what the caller will say better: their loggers, held back for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Let the named loggers speak of nothing below CRITICAL; their levels come back at the end.

    >>> with quiet("torch.export"):
    ...     logging.getLogger("torch.export").warning("not shown")
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
