"""The tables of the report as pandas frames, in full precision, one row per run, attack, layer or step of a curve."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas

from lipcert.report import accuracy, wording
from lipcert.report.consistency import summary_agrees
from lipcert.report.read import Run
from lipcert.report.shares import magnitude, shares

_DEFAULT_RADII = ("0.0000", "0.1412", "0.2824", "0.4235", "1.0000")


def radius_keys(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return the radii of all summaries as their four-digit keys, sorted; the usual ones where there is no summary."""
    keys = {key for run in runs for key in run.summary.get("certified", {})} or set(_DEFAULT_RADII)
    return tuple(sorted(keys, key=float))


def curves(runs: Sequence[Run]) -> pandas.DataFrame:
    """Return the exact step curves: columns run, radius, certified; the value holds from its radius to the next one."""
    parts: list[tuple[str, float, float]] = []
    for run in runs:
        if run.rows is not None:
            radii, certified = accuracy.curve(run.rows)
            parts += zip([run.label] * len(radii), radii.tolist(), certified.tolist(), strict=True)
    return pandas.DataFrame(parts, columns=["run", "radius", "certified"])


def attacks(runs: Sequence[Run]) -> pandas.DataFrame:
    """Return one row per run and perturbation size that was attacked.

    `certified` counts the same images as `robust` (NaN unless each of them has a certificate). `checked` is the number
    of images whose attack was compared with a certificate; `idx` lists the contradictions among them: those that the
    attack reported, and those that its rows and the certificates give now.
    """
    columns = ["run", "eps", "n", "clean", "robust", "certified", "gap", "checked", "contradictions", "idx", "version"]
    columns.append("seconds")
    frame = pandas.DataFrame([row for run in runs for row in _attack_rows(run)], columns=columns)
    return _numeric(frame, text=("run", "idx", "version"))


def _attack_rows(run: Run) -> Iterator[dict[str, Any]]:
    summaries = list(run.attacks)
    attacked = pandas.DataFrame({"eps": []}) if run.attacked is None else run.attacked
    for eps in sorted(set(attacked["eps"])):
        rows = attacked[attacked["eps"] == eps]
        summary = next((entry for entry in summaries if math.isclose(entry["eps"], eps, rel_tol=1e-6)), None)
        if summary is not None:
            summaries.remove(summary)
        right = rows["label"] == rows["predict"]
        row = {
            "eps": eps,
            "n": len(rows),
            "clean": float(right.mean()),
            "robust": float((right & (rows["success"] == 0)).mean()),
            "contradictions": [],
            "version": "unknown",
        }
        found = set()
        if run.rows is not None:
            same = run.rows[run.rows["idx"].isin(rows["idx"])]
            if len(same) == len(rows):
                row["certified"] = accuracy.certified_accuracy(same, eps)
            row["checked"] = len(same)
            found = set(accuracy.contradictions(run.rows, rows))
        yield _finish(run, row, summary, found)
    for summary in summaries:  # what has no rows any more is shown as the attack reported it
        row = {key: summary.get(key) for key in ("eps", "n", "clean", "robust")}
        yield _finish(run, row, summary, set())


def _finish(run: Run, row: dict[str, Any], summary: Mapping[str, Any] | None, found: set[int]) -> dict[str, Any]:
    if summary is not None:
        found = found | set(summary["contradictions"])
        row["version"] = ", ".join(summary.get("attacks") or ()) or summary.get("version")
        if "checked" not in row and summary.get("compared", True):
            row["checked"] = summary["n"]
        row["seconds"] = summary.get("seconds")
    row["gap"] = row["robust"] - row.get("certified", math.nan)
    return {"run": run.label, **row, "contradictions": len(found), "idx": " ".join(map(str, sorted(found)))}


def headline(runs: Sequence[Run]) -> pandas.DataFrame:
    """Return one row per run.

    The columns `certified@…` are the radii of `radius_keys`, `robust@…` the perturbation sizes attacked. `upper` is the
    proved bound, `lower` the best one attained by inputs, both of the logits. Training estimates the constant of the
    features before the head: `features` is its proved bound, `estimate` the estimate, `ratio` the one over the other.
    `checked` is the largest number of images whose attack was compared with a certificate, at one perturbation size.
    """
    attacked = attacks(runs)
    frame = pandas.DataFrame([_headline_row(run, radius_keys(runs), attacked) for run in runs])
    return _numeric(frame, text=("run", "mark", "model", "data", "idx"))


def _headline_row(run: Run, keys: Sequence[str], attacked: pandas.DataFrame) -> dict[str, Any]:
    trusted = run.summary if run.rows is None or summary_agrees(run) else {}
    rows = run.rows
    row: dict[str, Any] = {"run": run.label, "mark": run.mark, "model": run.model_name, "data": run.data_name}
    row["n"] = trusted.get("n") if rows is None else len(rows)
    row["abstained"] = None if rows is None else float((rows["predict"] == -1).mean())
    row["clean"] = trusted.get("clean") if rows is None else accuracy.clean_accuracy(rows)
    for key in keys:
        value = trusted.get("certified", {}).get(key)
        if value is None and rows is not None:
            value = accuracy.certified_accuracy(rows, wording.exact_radius(key))
        row[f"certified@{key}"] = value
    row["acr"] = trusted.get("acr") if rows is None else accuracy.average_certified_radius(rows)
    row["upper"] = _known(run.summary.get("upper"), run.bound.get("upper"))
    row["lower"] = max((v for v in (run.summary.get("lower"), run.bound.get("lower")) if v is not None), default=None)
    row["features"] = proved_features(run)
    row["estimate"] = _known(run.bound.get("estimate"), _last(run.metrics, "lipschitz_estimate"))
    row["ratio"] = row["features"] / row["estimate"] if row["features"] is not None and row["estimate"] else None
    mine = attacked[attacked["run"] == run.label]
    for eps in sorted(set(attacked["eps"])):
        robust = mine.loc[mine["eps"] == eps, "robust"]
        row[f"robust@{eps:.4f}"] = float(robust.iloc[0]) if len(robust) else None
    found = sorted({int(idx) for cell in mine["idx"] for idx in cell.split()})
    row["checked"] = max(mine["checked"].dropna(), default=None)
    row["contradictions"] = len(found) if found or row["checked"] else None
    row["idx"] = " ".join(map(str, found))
    return row


def proved_features(run: Run) -> float | None:
    """Return the proved constant of the features; of the logits where the audit says that there is no head (null)."""
    if "features" in run.bound:
        return _known(run.bound["features"], run.bound.get("upper"))
    return _last(run.metrics, "lipschitz_upper")


def layers(run: Run) -> pandas.DataFrame:
    """Return the rows of bound.json in the order of execution.

    `share` is a layer's part of the growth along the path that decides the bound, NaN off it; see `shares`. `log10` and
    `height` are the logarithms of `upper` and `cumulative`, which are ∞ above the largest float.
    """
    columns = ["name", "op", "shape", "upper", "lower", "method", "cumulative", "note"]
    frame = pandas.DataFrame(run.bound.get("layers", []), columns=columns)
    frame[["upper", "lower", "cumulative"]] = frame[["upper", "lower", "cumulative"]].astype(float)
    shapes = frame["shape"].tolist()
    frame["shape"] = ["×".join(map(str, shape)) if isinstance(shape, list) else str(shape or "") for shape in shapes]
    for name in ("name", "op", "method", "note"):
        frame[name] = ["" if value is None or value != value else str(value) for value in frame[name]]
    found = shares(run.bound.get("layers", []))
    frame["height"] = [magnitude(row.get("cumulative")) for row in run.bound.get("layers", [])]
    frame["log10"] = [math.nan if share.log10 is None else share.log10 for share in found]
    frame["share"] = [math.nan if share.part is None else share.part for share in found]
    frame.insert(0, "run", run.label)
    return frame


def facts(runs: Sequence[Run]) -> pandas.DataFrame:
    """Return what the run folders say about themselves: columns section, fact, and one per run, as text."""
    wanted: dict[tuple[str, str], dict[str, str]] = {}
    for run in runs:
        for section, fact, text in _facts(run):
            wanted.setdefault((section, fact), {})[run.label] = text
    order = {section: position for position, section in enumerate(("Model", "Certificate", "Training", "Software"))}
    rows = sorted(wanted.items(), key=lambda item: order[item[0][0]])
    return pandas.DataFrame(
        [{"section": section, "fact": fact, **{run.label: found.get(run.label, "") for run in runs}}
         for (section, fact), found in rows],
        columns=["section", "fact", *(run.label for run in runs)],
    )  # fmt: skip


def _facts(run: Run) -> Iterator[tuple[str, str, str]]:
    for fact, value in _flat(run.model):
        yield "Model", fact, value
    bound = {key: run.bound.get(key) for key in ("weights_sha256", "input", "norm") if run.bound.get(key) is not None}
    proved = {**bound, **{key: value for key, value in run.certificate.items() if key != "audit"}}
    proved.update({key: run.summary[key] for key in ("precision", "tf32") if run.summary.get(key) is not None})
    for fact, value in _flat(proved):
        yield "Certificate", fact, value
    for command, seconds in (("bound", run.bound.get("seconds")), ("certify", run.summary.get("seconds"))):
        if seconds is not None:
            yield "Certificate", f"time of {command}", wording.duration(seconds)
    for fact, value in _flat(run.config):
        yield "Training", fact, value
    for fact, value in _flat(run.env):
        yield "Software", fact, value


def _flat(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield what is short enough to be a fact: scalars, short lists of them, and the same one level deeper."""
    for key, value in entry.items():
        if isinstance(value, Mapping) and not prefix:
            yield from _flat(value, f"{key}.")
        elif isinstance(value, (list, tuple)):
            if len(value) <= 8 and not any(isinstance(item, (Mapping, list)) for item in value):
                text = " ".join(map(str, value)) if key == "command" else json.dumps(value, ensure_ascii=False)
                yield prefix + str(key), text
        elif value is not None and not isinstance(value, Mapping):
            yield prefix + str(key), str(value)


def _numeric(frame: pandas.DataFrame, text: Sequence[str]) -> pandas.DataFrame:
    """Make every other column float, so that what is missing is NaN even in a column that is empty."""
    return frame.astype({name: float for name in frame.columns if name not in text})


def csv(frame: pandas.DataFrame) -> bytes:
    """Return the frame as CSV: floats so that they read back equal, counts without a decimal point."""
    counts = [name for name in ("n", "checked", "contradictions") if name in frame.columns]
    return frame.astype(dict.fromkeys(counts, "Int64")).to_csv(index=False, lineterminator="\n").encode()


def _known(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _last(frame: pandas.DataFrame | None, name: str) -> float | None:
    known = [] if frame is None else frame[name].dropna().tolist()
    return known[-1] if known else None
