"""How figures look and how they become bytes; what they show is in `figures`.

Figures are made without pyplot and inside `rc_context`, so that no setting, backend or open figure of the program that
calls this changes. Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart. For the page
they become CSS variables, so that a figure follows light and dark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f00", "#5a5a5a")
INK, MUTED, GRID, PAPER = "#1c1e21", "#6a6f77", "#e3e5e8", "#fefefe"
_SETTINGS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "butt",
    "lines.dash_capstyle": "butt",
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@contextmanager
def settings(**more: Any) -> Iterator[None]:
    """Draw and render in the look of the report; the settings of the caller are back afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's matplotlibrc does not change a report
        cast(Any, matplotlib.rcParams).update(_SETTINGS | more)
        yield


def settle(figure: Figure) -> Figure:
    """Lay the figure out once, so that every rendering of it is the same and quick."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def png(figure: Figure, dpi: int = 200) -> bytes:
    """Return the figure as PNG; the same figure always gives the same bytes."""
    with settings():
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """Return the figure as a standalone SVG whose text is drawn, so that it looks the same everywhere."""
    with settings(**{"svg.fonttype": "path", "svg.hashsalt": "lipcert"}):
        FigureCanvasSVG(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an `<svg>` element for a page: text stays text, colours are CSS variables.

    `name` makes the ids of one page unique; `description` is what a screen reader says.
    """
    with settings(**{"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r' (width|height)="[^"]*"', "", text, count=2)  # the page sets the width, viewBox the ratio
    text = text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)
    text = text.replace("'DejaVu Sans'", "var(--font)")
    variables = {colour: f"--s{i}" for i, colour in enumerate(COLOURS)}
    variables |= {INK: "--ink", MUTED: "--muted", GRID: "--rule", PAPER: "--paper"}
    for colour, variable in variables.items():
        text = text.replace(colour, f"var({variable})")
    return text
