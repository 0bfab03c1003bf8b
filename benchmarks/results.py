"""Append a row to benchmarks/RESULTS.md: what was measured, on what, by which command."""

from __future__ import annotations

import platform
import sys
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("RESULTS.md")


def machine() -> str:
    """Return the processor and the number of threads."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        name = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), name
        )
    return f"{name}, {torch.get_num_threads()} threads"


def record(section: str, row: str) -> None:
    """Add a table row below the heading `section` (which must be there, with its table)."""
    lines = RESULTS.read_text().splitlines()
    start = lines.index(f"## {section}")
    end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
    last = max(i for i in range(start, end) if lines[i].startswith("|"))
    command = " ".join(["python", *sys.argv])
    lines.insert(last + 1, f"| {date.today()} | {row} | {machine()}, torch {torch.__version__} | `{command}` |")
    RESULTS.write_text("\n".join(lines) + "\n")
