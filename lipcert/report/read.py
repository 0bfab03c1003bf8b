"""Run folders, and per-sample logs of other tools, as records. Nothing here aggregates.

A run folder may be unfinished: what is not there is None or empty, and the page says which command makes it. What is
there must be whole: a damaged file raises InputError with its name, line and column or key.

Logs of other tools are tab-separated files whose columns start `idx label predict radius correct` (the format of the
randomized-smoothing scripts of Cohen et al. 2019). They carry no proof that could be checked, so they are marked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas
import yaml

from lipcert.errors import InputError
from lipcert.files import read_json
from lipcert.report.delimited import damaged, flag, integer, length, number, read_columns, read_text

PROBABILISTIC = "probabilistic"
UNPROVED = "no certificate.json"

_ROWS = {"idx": integer, "label": integer, "predict": integer, "radius": length, "correct": flag}
_ATTACKED = {"eps": length, "idx": integer, "label": integer, "predict": integer, "success": flag}
_METRICS = (
    "epoch", "lr", "eps", "train_loss", "train_clean", "val_loss", "val_clean", "val_certified", "lipschitz_estimate",
    "lipschitz_upper", "seconds",
)  # fmt: skip
_FILES = (
    "config.yaml", "env.json", "metrics.csv", "model/config.json", "certificate.json", "summary.json", "attacks.tsv",
    "attacks.json", "bound.json",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Run:
    """Hold what one folder or log says. `mark` is empty where certificate.json backs the rows, else what they are.

    The JSON files are as read, but numbers are floats or None ("inf" is infinity). `bound` is bound.json, or without it
    the audit that certificate.json rests on. An attack that has no rows yet is left out of `attacks`.
    """

    path: Path
    label: str
    mark: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    certificate: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    bound: Mapping[str, Any] = field(default_factory=dict)
    attacks: tuple[Mapping[str, Any], ...] = ()
    rows: pandas.DataFrame | None = None
    attacked: pandas.DataFrame | None = None
    metrics: pandas.DataFrame | None = None

    @property
    def is_log(self) -> bool:
        """Whether this is the log of another tool: there is nothing but rows."""
        return self.mark == PROBABILISTIC

    @property
    def model_name(self) -> str | None:
        """The model's name as the run folder gives it."""
        return _first("model", self.model, self.config, self.bound, self.certificate)

    @property
    def data_name(self) -> str | None:
        """The data's name as the run folder gives it."""
        return _first("data", self.certificate, self.model, self.config)


def read_all(paths: Sequence[Path]) -> tuple[Run, ...]:
    """Read every path once; labels are folder names, lengthened where two are equal."""
    if not paths:
        raise InputError("nothing to report: name a run folder, or a log with the columns " + " ".join(_ROWS))
    runs = list({run.path.resolve(): run for run in map(read, paths)}.values())
    labels = _labels([run.path.resolve() for run in runs])
    return tuple(replace(run, label=label) for run, label in zip(runs, labels, strict=True))


def read(path: Path) -> Run:
    """Read one run folder, a folder that holds one log of another tool, or such a log itself."""
    if not path.exists():
        raise InputError(f"{path} does not exist; name a run folder, or a log with the columns {' '.join(_ROWS)}")
    if path.is_file():
        if path.name == "certificates.tsv" and (path.parent / "certificate.json").is_file():
            return read(path.parent)
        return _read_log(path)
    if any((path / name).is_file() for name in _FILES):
        return _read_folder(path)
    logs = sorted(path.glob("*.tsv"))
    if len(logs) != 1:
        names = ", ".join(log.name for log in logs)
        found = f"several logs ({names}): name one of them" if logs else "neither a run nor a log"
        raise InputError(f"{path} holds {found}; a run folder has {_FILES[0]}, {_FILES[2]} or {_FILES[4]}")
    return replace(_read_log(logs[0]), path=path)


def _read_log(path: Path) -> Run:
    rows = _read_rows(path)
    if rows is None:
        raise InputError(f"{path} has no rows yet, so there is nothing to report")
    return Run(path=path, label=path.name, mark=PROBABILISTIC, rows=rows)


def _read_folder(path: Path) -> Run:
    certificate = _read_object(path / "certificate.json")
    summary = _read_object(path / "summary.json")
    _numbers(path / "summary.json", summary, "n", "clean", "acr", "upper", "lower", "seconds")
    summary["certified"] = _certified(path / "summary.json", summary.get("certified") or {})
    attacks = [_attack(path / "attacks.json", entry) for entry in _read_list(path / "attacks.json")]
    audited = path / ("bound.json" if (path / "bound.json").is_file() else "certificate.json")
    bound = _read_object(audited) if audited.name == "bound.json" else certificate.get("audit") or {}
    rows = _read_rows(path / "certificates.tsv") if (path / "certificates.tsv").is_file() else None
    return Run(
        path=path,
        label=path.name,
        mark=UNPROVED if rows is not None and not certificate else "",
        config=_read_yaml(path / "config.yaml"),
        env=_read_object(path / "env.json"),
        model=_read_object(path / "model" / "config.json"),
        certificate=certificate,
        summary=summary,
        bound=_check_bound(audited, bound),
        attacks=tuple(entry for entry in attacks if entry["n"]),
        rows=rows,
        attacked=_read_attacked(path / "attacks.tsv"),
        metrics=_read_metrics(path / "metrics.csv"),
    )


def _read_rows(path: Path) -> pandas.DataFrame | None:
    rows = read_columns(path, "\t", _ROWS)
    wrong = rows.loc[(rows["predict"] == rows["label"]) != (rows["correct"] == 1), "line"]
    if len(wrong):
        raise damaged(path, int(wrong.iloc[0]), "correct", "it does not say whether predict equals label")
    _refuse_repeats(path, rows, ["idx"])
    return rows if len(rows) else None


def _read_attacked(path: Path) -> pandas.DataFrame | None:
    if not path.is_file():
        return None
    rows = read_columns(path, "\t", {**_ATTACKED, "distance": number})
    wrong = rows.loc[(rows["success"] == 1) & ~(rows["distance"] <= rows["eps"]), "line"]
    if len(wrong):
        raise damaged(path, int(wrong.iloc[0]), "distance", "an attack that succeeded is not within eps")
    _refuse_repeats(path, rows, ["eps", "idx"])
    return rows if len(rows) else None


def _read_metrics(path: Path) -> pandas.DataFrame | None:
    if not path.is_file() or not read_text(path).strip():
        return None
    metrics = read_columns(path, ",", {"epoch": number}, {name: number for name in _METRICS[1:]})
    return metrics.reindex(columns=_METRICS) if len(metrics) else None


def _refuse_repeats(path: Path, rows: pandas.DataFrame, key: list[str]) -> None:
    repeated = rows.loc[rows.duplicated(key), "line"]
    if len(repeated):
        raise damaged(path, int(repeated.iloc[0]), key[-1], "this image appears twice")


def _check_bound(path: Path, bound: Any) -> dict[str, Any]:
    if not isinstance(bound, dict):
        raise InputError(f"{path}: 'audit' is not an object; write it anew with lipcert certify")
    for key in ("upper", "features", "position"):
        if _beyond_floats(bound.get(key)):
            bound[key] = math.inf
    _numbers(path, bound, "upper", "lower", "estimate", "seconds")
    if "features" in bound:
        _numbers(path, bound, "features")
    for key in ("layers", "unbounded"):
        entries = bound.get(key) or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f"{path}: {key!r} is not a list of objects; write it anew with lipcert bound")
        bound[key] = entries
    for position, layer in enumerate(bound["layers"]):
        huge = {key: layer[key] for key in ("upper", "cumulative") if _beyond_floats(layer.get(key))}
        _numbers(path, layer, *({"upper", "lower", "cumulative"} - huge.keys()), where=f"layers[{position}].")
    if bound.get("published") is not None:
        if not isinstance(bound["published"], dict):
            raise InputError(f"{path}: 'published' is not an object; write it anew with lipcert bound")
        _numbers(path, bound["published"], "value", where="published.")
    return bound


def _beyond_floats(value: Any) -> bool:
    """Return whether a value is the text of a number above the largest float, such as "1.04e+712"."""
    return isinstance(value, str) and re.fullmatch(r"\d(\.\d+)?e\+\d{3,7}", value) is not None


def _attack(path: Path, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict) or not {"eps", "n", "robust"} <= entry.keys():
        raise InputError(f"{path}: an entry is not an object with 'eps', 'n' and 'robust'; run lipcert attack again")
    _numbers(path, entry, "eps", "n", "clean", "robust", "seconds")
    if any(entry[key] is None for key in ("eps", "n", "robust")):
        raise InputError(f"{path}: 'eps', 'n' or 'robust' of an entry is empty; run lipcert attack again")
    found = entry.get("contradictions") or []
    if not isinstance(found, list) or not all(isinstance(idx, int) for idx in found):
        raise InputError(f"{path}: 'contradictions' is not a list of image numbers; run lipcert attack again")
    entry["contradictions"] = found
    return entry


def _certified(path: Path, certified: Any) -> dict[str, float]:
    if not isinstance(certified, dict):
        raise InputError(f"{path}: 'certified' is not an object from radius to accuracy; run lipcert certify again")
    _numbers(path, certified, *certified, where="certified.")
    for key in certified:
        try:
            float(key)
        except ValueError:
            raise InputError(f"{path}: 'certified' has the key {key!r}, which is not a radius") from None
    return {key: value for key, value in certified.items() if value is not None}


def _numbers(path: Path, entry: dict[str, Any], *keys: str, where: str = "") -> None:
    """Make the values of `keys` floats ("inf" is infinity) or None, in place."""
    for key in keys:
        value = entry.get(key)
        if value in ("inf", "-inf"):
            value = float(value)
        if isinstance(value, bool) or not (value is None or isinstance(value, (int, float))):
            raise InputError(f"{path}, key '{where}{key}': {value!r} is not a number; the file is damaged")
        try:
            entry[key] = None if value is None or math.isnan(value) else float(value)
        except OverflowError:
            raise InputError(f"{path}, key '{where}{key}': the number is above all floats") from None


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object; the file is damaged")
    return value


def _read_list(path: Path) -> list[Any]:
    value = read_json(path) if path.is_file() else []
    if not isinstance(value, list):
        raise InputError(f"{path} is not a JSON list; the file is damaged")
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(read_text(path))
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply; the file is damaged") from error
    except (ValueError, OverflowError) as error:  # a date that does not exist
        raise InputError(f"{path} is not YAML: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{path}{place}: not YAML ({getattr(error, 'problem', None) or error})") from error
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{path} does not hold keys and values; the file is damaged")
    return {str(key): item for key, item in (value or {}).items()}


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths, of equal depth, that tell them apart; a log loses its `.tsv`."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]).removesuffix(".tsv") for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _first(key: str, *sources: Mapping[str, Any]) -> str | None:
    return next((source[key] for source in sources if isinstance(source.get(key), str)), None)
