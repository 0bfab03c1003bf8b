"""The figure of an audit: the bound through depth, beside what is attained and what was claimed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lipcert.report.drawing import COLOURS, MUTED, PAPER, settings, settle
from lipcert.report.figures import plain_log
from lipcert.report.shares import number, path

_SMALLEST = 1e3  # how far below the line a branch is still drawn


def through_depth(layers: Sequence[Mapping[str, Any]], lower: float, claimed: float) -> Figure | None:
    """Draw the cumulative bound behind each row on a logarithmic axis; None without two finite ones.

    The line follows the rows that decide the bound of the last one, rows of other branches are hollow, and a row
    without a bound is marked where it stands. `lower` and `claimed` are NaN where there are none.
    """
    heights = [number(row["cumulative"]) for row in layers]
    finite = [i for i, height in enumerate(heights) if 0.0 < height < math.inf]
    if len(finite) < 2:
        return None
    deciding = path(layers) or finite
    with settings():
        figure = Figure(figsize=(8.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.set_yscale("log")
        least = min(1.0, *(heights[i] for i in deciding)) / _SMALLEST
        aside = [i for i in finite if i not in deciding and heights[i] > least]  # a branch times 0 has no place here
        axes.plot([i + 1 for i in aside], [heights[i] for i in aside], "o", color=MUTED, markerfacecolor=PAPER,
                  markersize=3.5, label="other branches")  # fmt: skip
        label = "bound up to here, along the path that decides it"
        axes.plot([0, *(i + 1 for i in deciding)], [1.0, *(heights[i] for i in deciding)], color=COLOURS[0], marker="o",
                  markersize=3.5, label=label)  # fmt: skip
        endless = [i for i, height in enumerate(heights) if math.isinf(height)]
        for i in endless[:1]:
            axes.axvline(i + 1, color=COLOURS[1], linestyle=(0, (4, 2.2)), linewidth=1.2,
                         label="first row without a finite bound")  # fmt: skip
        for value, name, colour in ((lower, "attained by two inputs", COLOURS[2]), (claimed, "claimed", COLOURS[3])):
            if 0.0 < value < math.inf:
                axes.axhline(value, color=colour, linewidth=1.2, linestyle=(0, (1.5, 1.5)), label=name)
        plain_log(axes)
        axes.set(xlabel="layer, in the order of execution", ylabel="Lipschitz bound (l2)", xlim=(0, len(layers) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, names = axes.get_legend_handles_labels()
        first = 0 if aside else 1
        figure.legend(handles[first:], names[first:], loc="outside lower left", ncols=2, handlelength=2.8)
        return settle(figure)
