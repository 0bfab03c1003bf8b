"""The page about segmentation: shares of pixels against eps, certified and attacked, and the maps of a few images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray
from PIL import Image

from lipcert.errors import InputError
from lipcert.files import read_json
from lipcert.report import drawing, wording
from lipcert.report.page import Report, template
from lipcert.report.views import Cell, View

SUMMARY, CERTIFICATE, ATTACKS, MAPS = "summary.json", "certificate.json", "scene_attacks.json", "maps.safetensors"
_VOID = (150, 150, 150)
_ENLARGED = 3  # pixels of the page for one of the image, so that a logit of stride 4 is a square of 12
_SERIES = (
    ("accuracy", "clean", 7, ":", ""),
    ("attacked", "attacked", 1, "--", "s"),
    ("certified", "certified together", 0, "-", "o"),
    ("certified_alone", "certified alone", 4, "-", "^"),
)


@dataclass(frozen=True)
class SceneRun:
    """What a folder says about segmentation: its summary, its certificate, attacks, and maps of the first images."""

    path: Path
    summary: Mapping[str, Any]
    certificate: Mapping[str, Any]
    attacks: Sequence[Mapping[str, Any]]
    maps: Mapping[str, NDArray[Any]]

    @property
    def label(self) -> str:
        return self.path.resolve().name


def is_scene_run(path: Path) -> bool:
    """Whether a folder holds certificates or attacks of segmentation."""
    found = path / SUMMARY
    if path.is_dir() and found.is_file():
        summary = read_json(found)
        return isinstance(summary, dict) and summary.get("task") == "segmentation"
    return False


def read_scene_run(path: Path) -> SceneRun:
    """Read a folder; damaged files raise InputError."""
    maps = _read_maps(path / MAPS) if (path / MAPS).is_file() else {}
    attacks = read_json(path / ATTACKS) if (path / ATTACKS).is_file() else []
    run = SceneRun(path, read_json(path / SUMMARY), read_json(path / CERTIFICATE), attacks, maps)
    try:
        shares(run)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {SUMMARY} or {ATTACKS} lacks {error}; certify again") from error
    return run


def shares(run: SceneRun) -> pandas.DataFrame:
    """Return one row per eps, the clean one first: what is certified, what attacks left; NaN where nothing is known."""
    summary = run.summary
    rows = {0.0: {"certified": summary["accuracy"], "certified_alone": summary["accuracy"],
                  "certified_miou": summary["miou"], "stable": 1.0}}  # fmt: skip
    for key in summary["certified"]:
        rows[float(key)] = {
            name: summary[name][key] for name in ("certified", "certified_alone", "certified_miou", "stable")
        }
    for entry in run.attacks:
        near = next((eps for eps in rows if abs(eps - entry["eps"]) < 6e-5), entry["eps"])
        rows.setdefault(near, {}).update(
            attacked=entry["attacked"], worst_miou=entry["worst_miou"], attacked_n=entry["n"],
            contradictions=len(entry["contradictions"]) + entry["miou_refuted"], compared=float(entry["compared"]),
        )  # fmt: skip
    columns = ("certified", "certified_alone", "certified_miou", "stable", "attacked", "worst_miou", "attacked_n",
               "contradictions", "compared")  # fmt: skip
    frame = pandas.DataFrame([{"eps": eps, **row} for eps, row in sorted(rows.items())], columns=["eps", *columns])
    return frame.astype(float)


def build_scenes(runs: Sequence[SceneRun]) -> Report:
    """Make the report of these runs; equal folders give equal bytes."""
    frames = {run.label: shares(run) for run in runs}
    if len(frames) < len(runs):
        raise InputError("two of the folders have the same name; give them different ones")
    figures = {f"curve_{i}": curve(run, frames[run.label]) for i, run in enumerate(runs)}
    findings = tuple(
        f"{run.label}: at eps {wording.radius(entry['eps'])} an attack left less than is certified"
        + (f", idx {', '.join(map(str, entry['contradictions']))}." if entry["contradictions"] else " of the mean IoU.")
        for run in runs
        for entry in run.attacks
        if entry["contradictions"] or entry["miou_refuted"]
    )
    sections = [
        {
            "run": run,
            "table": _view(frames[run.label]),
            "classes": _classes(run),
            "figure": Markup(drawing.inline_svg(figures[f"curve_{i}"], f"curve_{i}", _DESCRIPTION)),  # noqa: S704
            "gallery": gallery(run),
            "legend": _legend(run),
            "joint": wording.upper(run.certificate["constants"]["joint"]),
            "pixel": wording.upper(run.certificate["constants"]["pixel"]),
            "sides": " x ".join(map(str, run.certificate["input_shape"][1:])),
            "part": _part(run),
        }
        for i, run in enumerate(runs)
    ]
    html = template("scenes.html").render(sections=sections, findings=findings, colours=drawing.COLOURS)
    tables = {"headline": pandas.concat([frame.assign(run=label) for label, frame in frames.items()])}
    return Report(html, figures, tables, findings)


_DESCRIPTION = "Shares of labelled pixels against eps: clean, under attack, certified together, certified one by one."


def curve(run: SceneRun, frame: pandas.DataFrame) -> Figure:
    """Draw shares of labelled pixels against eps on an axis that is linear up to the least eps and logarithmic then."""
    known = frame.assign(accuracy=run.summary["accuracy"])
    first = float(known["eps"][known["eps"] > 0].min())
    with drawing.settings():
        figure = Figure(figsize=(8.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        handles = []
        for name, text, colour, line, marker in _SERIES:
            rows = known[known[name].notna()]
            if len(rows):
                look: dict[str, Any] = dict(color=drawing.COLOURS[colour], linestyle=line, marker=marker, markersize=5)
                axes.plot(rows["eps"], 100 * rows[name], clip_on=False, **look)
                handles.append(Line2D([], [], label=text, **look))
        axes.set_xscale("symlog", linthresh=first, linscale=0.5)
        axes.set_xticks(known["eps"].tolist(), minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: wording.radius(value) if value else "0"))
        axes.set(xlim=(0, float(known["eps"].max())), ylim=(0, 100), xlabel="l2 radius eps of one image")
        axes.set_ylabel("labelled pixels (%)")
        axes.legend(handles=handles, loc="upper right")
        return drawing.settle(figure)


def gallery(run: SceneRun) -> list[dict[str, str]]:
    """Return for each image with maps its picture, labels, predictions and radii as URLs of PNG files."""
    if not run.maps:
        return []
    palette, top = _palette(len(run.certificate["classes"])), _scale(run)
    images = []
    for image, label, predict, radius in zip(*(run.maps[key] for key in _KEYS), strict=True):
        stride = image.shape[-1] // label.shape[-1]
        shade = np.clip(np.nan_to_num(radius / top), 0.0, 1.0)
        heat = (matplotlib.colormaps["viridis"](shade)[..., :3] * 255).round().astype(np.uint8)
        images.append(
            {
                "image": _url(image.transpose(1, 2, 0), _ENLARGED),
                "label": _url(_coloured(label, palette), _ENLARGED * stride),
                "predict": _url(_coloured(predict, palette), _ENLARGED * stride),
                "radius": _url(heat, _ENLARGED * stride),
                "largest": wording.lower(float(radius.max())),
            }
        )
    return images


_KEYS = ("image", "label", "predict", "radius")


def _legend(run: SceneRun) -> dict[str, Any]:
    if not run.maps:
        return {}
    used = set(np.unique(run.maps["label"]).tolist()) | set(np.unique(run.maps["predict"]).tolist())
    classes = run.certificate["classes"]
    palette = _palette(len(classes))
    ramp = (matplotlib.colormaps["viridis"](np.linspace(0, 1, 9))[:, :3] * 255).round().astype(int)
    return {
        "classes": [(name, _css(palette[i])) for i, name in enumerate(classes) if i in used],
        "void": _css(_VOID),
        "ramp": ", ".join(_css(colour) for colour in ramp),
        "top": wording.significant(_scale(run), 3),
    }


def _scale(run: SceneRun) -> float:
    """Return the radius of the brightest colour: what 99 of 100 pixels of these images have at most."""
    radius = run.maps["radius"]
    return max(float(np.quantile(radius[np.isfinite(radius)], 0.99)), 1e-12)


def _classes(run: SceneRun) -> View | None:
    """Show the intersection over union of every class that is labelled, clean and certified."""
    known = {name: entry for name, entry in run.summary.get("iou", {}).items() if entry is not None}
    if not known:
        return None
    keys = list(run.summary["certified"])
    columns = (("Class", ""), ("IoU, clean", "number"), *((f"Certified {key}", "number") for key in keys))
    rows = tuple(
        (Cell(name, name), _percent(entry["clean"]), *(_percent(entry["certified"][key]) for key in keys))
        for name, entry in known.items()
    )
    return View(columns, rows)


def _view(frame: pandas.DataFrame) -> View:
    titles = ("ε", "Certified", "Certified alone", "Attacked", "Certified mIoU", "Worst mIoU attacked", "Stable",
              "Contradictions")  # fmt: skip
    rows = []
    for row in frame.to_dict("records"):
        alarm = row["contradictions"]
        checked = "–" if math.isnan(alarm) else "not compared" if not row["compared"] else f"{alarm:.0f}"
        eps = Cell("clean" if row["eps"] == 0 else f"{row['eps']:g}", row["eps"], "number")
        names = ("certified", "certified_alone", "attacked", "certified_miou", "worst_miou", "stable")
        last = Cell(checked, -1.0 if math.isnan(alarm) else alarm, "number bad" if alarm > 0 else "number")
        rows.append((eps, *(_percent(row[name]) for name in names), last))
    return View(tuple((title, "number") for title in titles), tuple(rows))


def _percent(share: float | None) -> Cell:
    if share is None or math.isnan(share):
        return Cell(wording.MISSING, css="number")
    return Cell(wording.percent(share), share, "number", f"{share:.17g}")


def _part(run: SceneRun) -> str:
    """Say that fewer images were attacked than certified, if so."""
    counts = sorted({int(entry["n"]) for entry in run.attacks} - {int(run.summary["n"])})
    return f"Attacked: the first {counts[0]} images only, so these shares are of other pixels." if counts else ""


def _palette(n: int) -> NDArray[np.uint8]:
    """Return n colours that neighbours in the list tell apart: (n, 3)."""
    table = matplotlib.colormaps["tab20"]
    order = [(2 * i) % 20 + (i // 10) % 2 for i in range(n)]
    return np.array([[round(255 * part) for part in table(i)[:3]] for i in order], dtype=np.uint8)


def _coloured(classes: NDArray[Any], palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    known = (classes >= 0) & (classes < len(palette))
    result = np.full((*classes.shape, 3), _VOID, dtype=np.uint8)
    result[known] = palette[classes[known]]
    return result


def _css(colour: Sequence[Any] | NDArray[Any]) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def _url(pixels: NDArray[np.uint8], factor: int) -> str:
    """Return an image (h, w, 3), each pixel enlarged to a square, as the URL of a PNG file."""
    picture = Image.fromarray(np.ascontiguousarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1)))
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _read_maps(path: Path) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        maps = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); certify again") from error
    if set(maps) != set(_KEYS) or len({len(values) for values in maps.values()}) != 1:
        raise InputError(f"{path} does not hold {', '.join(_KEYS)} of the same images; certify again")
    return maps
