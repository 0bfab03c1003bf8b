"""What the figures show: certified accuracy against radius, the bound through depth, the course of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lipcert.report import accuracy, wording
from lipcert.report.drawing import COLOURS, MUTED, PAPER, settings, settle
from lipcert.report.read import Run

Entry = tuple[Line2D, str]

_PROVED_LINES = ("-", (0, (7, 1.5, 1.5, 1.5)), (0, (1.5, 1)), (0, (9, 1.5, 1.5, 1.5, 1.5, 1.5)))
_DASHES = ((0, (4, 2.2)), (0, (7, 3)), (0, (2.5, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_ENDLESS = 1e9  # what cannot be changed at all may be written with the largest float as its radius


def certified_curves(
    runs: Sequence[Run], curves: pandas.DataFrame, attacks: pandas.DataFrame, radii: Sequence[float]
) -> Figure:
    """Draw certified accuracy against radius as exact steps, with what AutoAttack leaves of the accuracy above.

    Parameters are the frames of `tables`; `radii` are named on the upper edge. Where fewer images were attacked than
    certified, their number stands beside the point and a bar marks the certified accuracy of the same images.
    """
    with settings():
        figure, axes = _figure(8.2, 4.7)
        right = right_end(curves, attacks)
        entries = []
        clean = {run.label: accuracy.clean_accuracy(run.rows) for run in runs if run.rows is not None}
        for position, run in enumerate(runs):
            look = style(position, runs)
            mine = curves[(curves["run"] == run.label) & (curves["radius"] <= right)]
            if len(mine):
                x, y = mine["radius"].to_numpy(), 100 * mine["certified"].to_numpy()
                axes.step(np.append(x, right), np.append(y, y[-1]), where="post", **look)
                entries.append((Line2D([], [], **look), run.label + (f" ({run.mark})" if run.mark else "")))
            if run.label in clean:
                axes.plot([0], [100 * clean[run.label]], _MARKERS[position % 8], color=look["color"],
                          markerfacecolor=PAPER, markersize=6, clip_on=False, zorder=4)  # fmt: skip
            _draw_attacks(axes, attacks[attacks["run"] == run.label], run, look["color"], _MARKERS[position % 8])
        grey: dict[str, Any] = {"color": MUTED, "linestyle": "none", "markersize": 6}
        entries.append((Line2D([], [], marker="o", markerfacecolor=PAPER, **grey), "clean accuracy"))
        if len(attacks):
            entries.append((Line2D([], [], marker="o", **grey), "robust accuracy under AutoAttack"))
        if _subsets(attacks, runs):
            entries.append((Line2D([], [], marker="_", markeredgewidth=2.4, **{**grey, "markersize": 12}),
                            "certified, the images attacked"))  # fmt: skip
        top = 100 * max([*curves["certified"], *attacks["robust"], *clean.values()])
        axes.set(xlim=(0, right), xlabel="l2 radius r")
        axes.set(ylim=(0, min(100, 10 * math.ceil(top / 10 + 0.4))), ylabel="certified accuracy (%)")
        _name_radii(axes, [value for value in radii if 0 < value <= right])
        _legend(figure, entries)
        return settle(figure)


def depth(runs: Sequence[Run], layers: Sequence[pandas.DataFrame]) -> Figure | None:
    """Draw the cumulative bound behind each layer, on a logarithmic axis; None without a finite one."""
    with settings():
        figure, axes = _figure(8.2, 3.4)
        entries = []
        for position, (run, frame) in enumerate(zip(runs, layers, strict=True)):
            cumulative = frame["cumulative"].to_numpy(dtype=float)
            cumulative = np.where((cumulative > 0) & np.isfinite(cumulative), cumulative, np.nan)
            if np.isfinite(cumulative).any():
                look = {**style(position, runs), "marker": _MARKERS[position % 8], "markersize": 3.5}
                axes.plot(np.arange(1, len(frame) + 1), cumulative, **look)
                entries.append((Line2D([], [], **look), run.label))
        if not entries:
            return None
        axes.set_yscale("log")
        plain_log(axes)
        axes.set(xlabel="layer, in the order of execution", ylabel="bound up to here", xlim=(0.5, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, entries if len(entries) > 1 else [])
        return settle(figure)


def training(runs: Sequence[Run]) -> Figure | None:
    """Draw loss, accuracy and the estimate of L over the epochs; None without any of them."""
    panels = [
        ("Loss", (("train_loss", "train", True), ("val_loss", "validation", False)), 1),
        ("Validation accuracy (%)", (("val_clean", "clean", True), ("val_certified", "certified", False)), 100),
        ("Lipschitz constant", (("lipschitz_estimate", "estimate", False), ("lipschitz_upper", "proved", None)), 1),
    ]
    shown = [panel for panel in panels if any(_has(run, name) for run in runs for name, _, _ in panel[1])]
    if not shown:
        return None
    with settings():
        figure = Figure(figsize=(8.2, 3.0), layout="constrained")
        for place, (title, series, scale) in enumerate(shown, start=1):
            axes = figure.add_subplot(1, len(shown), place)
            for position, run in enumerate(runs):
                for name, _, dashed in series:
                    if run.metrics is not None and _has(run, name):
                        _draw_metric(axes, run.metrics, name, scale, COLOURS[position % len(COLOURS)], dashed)
            names = [(label, dashed) for name, label, dashed in series if any(_has(run, name) for run in runs)]
            axes.set(title=title, xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if title.startswith("Lipschitz"):
                axes.set_yscale("log")
                plain_log(axes)
            lines = [Line2D([], [], color=MUTED, **_metric_style(dashed)) for _, dashed in names]
            labels = [label for label, _ in names]
            axes.legend(lines, labels, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
        entries = [
            (Line2D([], [], color=COLOURS[position % len(COLOURS)]), run.label)
            for position, run in enumerate(runs)
            if run.metrics is not None
        ]
        _legend(figure, entries if len(entries) > 1 else [])
        return settle(figure)


def style(position: int, runs: Sequence[Run]) -> dict[str, Any]:
    """Return colour and line of the run at `position`: runs without a proof are dashed, all styles differ."""
    marked = [bool(run.mark) for run in runs]
    lines = _DASHES if marked[position] else _PROVED_LINES
    rank = marked[:position].count(marked[position])
    return {"color": COLOURS[position % len(COLOURS)], "linestyle": lines[rank % len(lines)]}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Figure, entries: Sequence[Entry]) -> None:
    """Put the legend below the axes, where no curve is."""
    if entries:
        longest = max(len(label) for _, label in entries)
        legend = figure.legend(
            [line for line, _ in entries], [str(place) for place in range(len(entries))], loc="outside lower left",
            ncols=max(1, min(3, len(entries), 100 // (longest + 8))), handlelength=2.8, columnspacing=1.6,
        )  # fmt: skip
        for text, (_, label) in zip(legend.get_texts(), entries, strict=True):
            text.set_text(label)  # matplotlib would leave out a label that starts with an underscore


def right_end(curves: pandas.DataFrame, attacks: pandas.DataFrame) -> float:
    """Return where the radius axis ends: all that was attacked, and every curve down to half a percent."""
    seen = curves.loc[(curves["certified"] > 0.005) & (curves["radius"] < _ENDLESS), "radius"]
    ends = [*(1.1 * attacks["eps"]), 1.08 * seen.max() if len(seen) else 0.0]
    return max(ends, default=0.0) or 1.0


def _draw_attacks(axes: Axes, attacks: pandas.DataFrame, run: Run, colour: str, marker: str) -> None:
    numbers = (attacks["eps"], 100 * attacks["robust"], 100 * attacks["certified"], attacks["n"])
    for eps, robust, certified, n in zip(*(column.tolist() for column in numbers), strict=True):
        axes.plot([eps], [robust], marker, color=colour, markersize=6, clip_on=False, zorder=4)
        if not math.isnan(certified):
            axes.vlines(eps, certified, robust, color=colour, linewidth=1, alpha=0.55, zorder=3)
        if n != _size(run):
            halo = [withStroke(linewidth=3, foreground=PAPER)]
            axes.annotate(f"n = {wording.count(n)}", (eps, robust), xytext=(8, 5), textcoords="offset points",
                          fontsize=8.5, color=colour, path_effects=halo, zorder=5)  # fmt: skip
            if not math.isnan(certified):
                axes.plot([eps], [certified], "_", color=colour, markersize=12, markeredgewidth=2.4, zorder=4)


def _subsets(attacks: pandas.DataFrame, runs: Sequence[Run]) -> bool:
    """Say whether a bar of `_draw_attacks` is there, so that the legend explains it."""
    sizes = attacks["run"].map({run.label: _size(run) for run in runs})
    return bool(((attacks["n"] != sizes) & attacks["certified"].notna()).any())


def _size(run: Run) -> int:
    return 0 if run.rows is None else len(run.rows)


def _name_radii(axes: Axes, radii: Sequence[float]) -> None:
    """Name the radii of the tables on the upper edge, as far as there is room."""
    left, right = axes.get_xlim()
    named: list[float] = []
    for value in sorted(radii):
        axes.axvline(value, color=MUTED, linewidth=0.7, linestyle=(0, (1, 2.5)), zorder=1)
        if not named or value - named[-1] > 0.085 * (right - left):
            named.append(value)
            axes.annotate(wording.radius(value), (value, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 4),
                          textcoords="offset points", ha="center", fontsize=8.5, color=MUTED)  # fmt: skip


def plain_log(axes: Axes) -> None:
    """Label a logarithmic axis with plain numbers, also where it spans less than a decade."""
    low, high = axes.get_ylim()
    decades = math.log10(high) - math.log10(low)
    steps = (1.0,) if decades > 2 else (1.0, 2.0, 5.0) if decades > 0.6 else tuple(float(step) for step in range(1, 10))
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, powers=decades > 6)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _tick(value: float, powers: bool) -> str:
    """Write a number plainly, or a power of ten as 10²⁰."""
    if not powers or value <= 0:
        return f"{value:.6g}"
    return "10" + str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _has(run: Run, name: str) -> bool:
    return run.metrics is not None and bool(np.isfinite(run.metrics[name]).any())


def _metric_style(dashed: bool | None) -> dict[str, Any]:
    if dashed is None:
        return {"linestyle": "none", "marker": "o", "markersize": 5}
    return {"linestyle": (0, (3, 1.8)) if dashed else "-", "linewidth": 1.3 if dashed else 1.8}


def _draw_metric(
    axes: Axes, metrics: pandas.DataFrame, name: str, scale: float, colour: str, dashed: bool | None
) -> None:
    known = metrics[np.isfinite(metrics[name])]
    marker = {"marker": "o", "markersize": 4} if len(known) == 1 else {}
    axes.plot(known["epoch"], scale * known[name], color=colour, **{**marker, **_metric_style(dashed)})
