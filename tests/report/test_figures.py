"""What is drawn is what was counted; runs look different, legends cover nothing, the caller's settings stay."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from report.synthetic import EPS, METRICS, write_run, write_smoothing_log, write_tsv

from lipcert.report import drawing, figures, tables
from lipcert.report.read import Run, read, read_all


def draw(runs: tuple[Run, ...]) -> Figure:
    return figures.certified_curves(runs, tables.curves(runs), tables.attacks(runs), [0.0, EPS, 1.0])


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Run, ...]:
    first = write_run(tmp_path / "_first$", n=200, attacked=50, eps=(EPS,), blocks=1, epochs=3)
    second = write_run(tmp_path / "second", seed=1, n=200, attacked=200, eps=(EPS,), blocks=2, epochs=3)
    return read_all([first, second, write_smoothing_log(tmp_path / "smoothing.tsv", n=80)])


def test_the_curve_is_drawn_as_exact_steps(runs: tuple[Run, ...]) -> None:
    figure = draw(runs)
    lines = [line for line in figure.axes[0].get_lines() if line.get_drawstyle() == "steps-post"]
    for run, line in zip(runs, lines, strict=True):
        assert run.rows is not None
        x, y = line.get_data()
        assert (len(x) > 40, x[0], x[-1]) == (True, 0, figure.axes[0].get_xlim()[1])
        rows = run.rows[run.rows["correct"] == 1]
        assert y.tolist() == pytest.approx([100 * np.mean(rows["radius"] > r) * len(rows) / len(run.rows) for r in x])


def test_points_lie_at_eps_and_robust_accuracy(runs: tuple[Run, ...]) -> None:
    attacks = tables.attacks(runs)
    axes = draw(runs).axes[0]
    points = {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in axes.get_lines()
        if len(line.get_xdata()) == 1
    }
    for row in attacks.to_dict("records"):
        assert (row["eps"], 100 * row["robust"]) in points
    for run in runs:
        assert run.rows is not None
        assert (0.0, 100 * float(run.rows["correct"].mean())) in points
    assert (EPS, 100 * attacks["certified"][0]) in points  # the same 50 images
    assert (EPS, 100 * attacks["certified"][1]) not in points
    assert [text.get_text() for text in axes.texts if "n =" in text.get_text()] == ["n = 50"]


def test_runs_differ_in_colour_and_line_and_only_unproved_ones_are_dashed(runs: tuple[Run, ...]) -> None:
    looks = [figures.style(position, runs) for position in range(3)]
    assert len({look["color"] for look in looks}) == len({str(look["linestyle"]) for look in looks}) == 3
    assert looks[0]["linestyle"] == "-"
    labels = [text.get_text() for text in draw(runs).legends[0].get_texts()]
    assert labels[:3] == ["_first$", "second", "smoothing (probabilistic)"]


def test_legends_lie_outside_the_axes(runs: tuple[Run, ...]) -> None:
    training = figures.training(runs)
    depth = figures.depth(runs, [tables.layers(run) for run in runs])
    assert training is not None and depth is not None
    for figure in (draw(runs), training, depth):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
        assert legends
        for legend in legends:
            box = legend.get_window_extent()
            assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)
            assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1)


def test_a_constant_network_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    rows = [[0, 1, 1, sys.float_info.max, 1], [1, 1, 1, "inf", 1], [2, 1, 0, 0.0, 0]]
    write_tsv(path, ["idx", "label", "predict", "radius", "correct"], rows)
    figure = draw(read_all([path]))
    assert drawing.png(figure).startswith(b"\x89PNG")
    assert figure.axes[0].get_xlim() == (0.0, 1.0)


def test_nothing_correct_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    write_tsv(path, ["idx", "label", "predict", "radius", "correct"], [[0, 1, 0, 0.5, 0]])
    assert drawing.svg(draw(read_all([path])))


def test_depth_and_training_need_something_to_draw(run: Path) -> None:
    record = read(run)
    write_tsv(run / "metrics.csv", METRICS, [[1, *[""] * 12], [2, *["nan"] * 12]], ",")
    assert figures.training([read(run)]) is None
    (run / "metrics.csv").write_text("epoch,val_clean\n1,0.5\n")
    alone = figures.training([read(run)])
    assert alone is not None and [axes.get_title(loc="left") for axes in alone.axes] == ["Validation accuracy (%)"]
    layers = tables.layers(record).assign(cumulative=np.inf)
    assert figures.depth([record], [layers]) is None


def test_training_draws_what_was_logged(run: Path) -> None:
    record = read(run)
    figure = figures.training([record])
    assert figure is not None and record.metrics is not None
    loss, accuracy, constant = figure.axes
    assert loss.get_lines()[1].get_ydata().tolist() == record.metrics["val_loss"].tolist()
    assert accuracy.get_lines()[1].get_ydata().tolist() == (100 * record.metrics["val_certified"]).tolist()
    assert (constant.get_lines()[1].get_xdata()[0], constant.get_lines()[1].get_ydata()[0]) == (5, 26.69)


def test_inline_svg_follows_the_page(runs: tuple[Run, ...]) -> None:
    text = drawing.inline_svg(draw(runs), "certified", 'a "curve" < 1')
    root = ElementTree.fromstring(text)
    assert root.attrib["aria-label"] == 'a "curve" < 1' and "width" not in root.attrib
    assert "var(--s0)" in text and "var(--ink)" in text and "var(--font)" in text
    assert not re.search(r"(?i)" + "|".join([*drawing.COLOURS, drawing.INK, drawing.PAPER]), text)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert all(name.startswith("certified-") for name in ids) and len(ids) == len(set(ids))
    for target in re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text):
        assert (target[0] or target[1]) in ids
    assert "_first$" in text  # text is text, and no mathematics


def test_equal_runs_give_equal_bytes(runs: tuple[Run, ...]) -> None:
    for render in (drawing.svg, drawing.png, lambda figure: drawing.inline_svg(figure, "x", "y")):
        assert render(draw(runs)) == render(draw(runs))


def test_the_settings_of_the_caller_are_untouched(runs: tuple[Run, ...]) -> None:
    with matplotlib.rc_context({"font.size": 31, "axes.grid": False, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        figure = draw(runs)
        drawing.svg(figure), drawing.png(figure), drawing.inline_svg(figure, "a", "b")
        assert dict(matplotlib.rcParams) == before
    assert figure.axes[0].xaxis.label.get_fontsize() < 12


def test_a_report_needs_neither_torch_nor_a_display() -> None:
    code = "import sys, lipcert.report.page; print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "set()\n", done.stderr
