"""The tables against numbers counted by hand from the files."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pandas as pd
import pytest
from report.synthetic import ATTACKS, EPS, write_run, write_tsv
from report.test_read import update

from lipcert.report import tables
from lipcert.report.read import read, read_all


def rows_of(path: Path) -> list[dict[str, str]]:
    header, *lines = [line.split("\t") for line in path.read_text().splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


def headline(*paths: Path) -> pd.DataFrame:
    return tables.headline(read_all(paths))


def test_headline_of_a_run(run: Path) -> None:
    row = headline(run).iloc[0]
    rows = rows_of(run / "certificates.tsv")
    certified = sum(r["correct"] == "1" and float(r["radius"]) > EPS for r in rows) / len(rows)
    bound = json.loads((run / "bound.json").read_text())
    assert row["n"] == 300
    assert row["certified@0.1412"] == pytest.approx(certified, abs=1e-12)
    assert row["acr"] == pytest.approx(sum(float(r["radius"]) * int(r["correct"]) for r in rows) / 300, rel=1e-12)
    assert (row["upper"], row["estimate"], row["features"]) == (bound["upper"], bound["estimate"], bound["features"])
    assert row["lower"] == max(bound["lower"], json.loads((run / "summary.json").read_text())["lower"])
    assert row["ratio"] == pytest.approx(1 / 0.93)  # of the same quantity: the features
    assert (row["checked"], row["contradictions"], row["idx"]) == (300, 0, "")
    assert row["robust@0.1412"] == json.loads((run / "attacks.json").read_text())[0]["robust"]


def test_without_a_head_the_estimate_is_about_the_logits(run: Path) -> None:
    update(run / "bound.json", features=None)
    row = headline(run).iloc[0]
    assert row["ratio"] == row["upper"] / row["estimate"]


def test_without_an_audit_training_knows_both(run: Path) -> None:
    (run / "bound.json").unlink()
    row = headline(run).iloc[0]
    assert row["features"] == 26.69
    assert row["estimate"] == pytest.approx(40 * math.exp(-0.5) + 2, rel=1e-8)


def test_a_stale_summary_is_not_believed(run: Path) -> None:
    honest = headline(run).iloc[0]["certified@0.1412"]
    certified = json.loads((run / "summary.json").read_text())["certified"]
    update(run / "summary.json", certified={**certified, "0.1412": 0.999, "0.2500": 0.9})
    row = headline(run).iloc[0]
    assert row["certified@0.1412"] == honest
    assert row["certified@0.2500"] < honest


def test_a_summary_may_stand_alone(run: Path) -> None:
    (run / "certificates.tsv").unlink()
    row = headline(run).iloc[0]
    summary = json.loads((run / "summary.json").read_text())
    assert (row["n"], row["clean"], row["certified@0.1412"]) == (300, summary["clean"], summary["certified"]["0.1412"])
    assert math.isnan(row["abstained"])


def test_a_log_of_another_tool(run: Path, log: Path) -> None:
    row = headline(run, log).iloc[1]
    rows = rows_of(log)
    assert row["mark"] == "probabilistic"
    assert row["abstained"] == sum(r["predict"] == "-1" for r in rows) / 100
    assert row["certified@0.2824"] == sum(r["correct"] == "1" and float(r["radius"]) > 72 / 255 for r in rows) / 100
    assert math.isnan(row["upper"]) and math.isnan(row["contradictions"])


def test_certified_counts_the_images_that_were_attacked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", n=200, attacked=60, eps=(EPS,), blocks=1)
    row = tables.attacks(read_all([run])).iloc[0]
    rows = rows_of(run / "certificates.tsv")[:60]
    assert row["n"] == 60
    assert row["certified"] == sum(r["correct"] == "1" and float(r["radius"]) > EPS for r in rows) / 60
    assert row["certified"] <= row["robust"] <= row["clean"]
    assert row["gap"] == row["robust"] - row["certified"]


def test_attacked_images_without_certificate_leave_no_comparison(run: Path) -> None:
    path = run / "certificates.tsv"
    path.write_text("\n".join(path.read_text().split("\n")[:100]) + "\n")
    attacks = tables.attacks(read_all([run]))
    assert attacks["certified"].isna().all() and attacks["robust"].notna().all()
    assert attacks["checked"].tolist() == [99, 99]


def test_an_attack_that_was_not_compared_refutes_and_confirms_nothing(run: Path) -> None:
    for name in ("certificates.tsv", "summary.json", "certificate.json", "attacks.tsv"):
        (run / name).unlink()
    entries = json.loads((run / "attacks.json").read_text())
    empty = {"n": 0, "eps": 1.0, "robust": 0.0, "contradictions": []}
    (run / "attacks.json").write_text(json.dumps([{**entry, "compared": False} for entry in entries] + [empty]))
    assert math.isnan(headline(run).iloc[0]["contradictions"])
    assert tables.attacks(read_all([run]))["eps"].tolist() == [EPS, 2 * EPS]


def test_contradictions_are_found_though_the_attack_did_not_report_them(run: Path) -> None:
    certified = next(r for r in rows_of(run / "certificates.tsv") if r["correct"] == "1" and float(r["radius"]) > 0.1)
    rows = [[r[name] for name in ATTACKS] for r in rows_of(run / "attacks.tsv")]
    for row in rows:
        if row[0] == repr(EPS) and row[1] == certified["idx"]:
            row[4:] = ["-1", repr(math.nextafter(float(certified["radius"]), 0)), "1"]
            row[5] = repr(min(float(row[5]), EPS))
    write_tsv(run / "attacks.tsv", ATTACKS, rows)
    row = headline(run).iloc[0]
    assert (row["contradictions"], row["idx"]) == (1, certified["idx"])


def test_contradictions_that_the_attack_reported_stay(run: Path) -> None:
    (run / "attacks.tsv").unlink()
    entries = json.loads((run / "attacks.json").read_text())
    entries[1]["contradictions"] = [11, 4]
    (run / "attacks.json").write_text(json.dumps(entries))
    assert headline(run).iloc[0]["idx"] == "4 11"
    assert tables.attacks(read_all([run]))["contradictions"].tolist() == [0, 2]


def test_an_attack_may_lack_its_summary(run: Path) -> None:
    (run / "attacks.json").unlink()
    attacks = tables.attacks(read_all([run]))
    assert attacks["version"].tolist() == ["unknown", "unknown"]
    assert attacks["robust"].notna().all()


def test_layers_share_the_growth(run: Path) -> None:
    layers = tables.layers(read(run))
    assert layers.loc[layers["share"] > 0, "share"].sum() == pytest.approx(1)
    stem, pool = layers.iloc[0], layers[layers["name"] == "pool"].iloc[0]
    growth = sum(math.log(upper) for upper in layers["upper"] if upper > 1)
    assert stem["share"] == pytest.approx(math.log(1.73) / growth)
    assert pool["share"] == pytest.approx(math.log(0.125) / growth) and pool["share"] < 0


def test_layers_without_a_bound_have_no_share(run: Path) -> None:
    update(run / "bound.json", layers=[{"name": "softmax", "upper": "inf"}, {"name": "zero", "upper": 0.0}])
    layers = tables.layers(read(run))
    assert layers["share"].isna().all() and layers["upper"].tolist() == [math.inf, 0.0]


def test_facts_name_what_a_claim_rests_on(run: Path) -> None:
    facts = tables.facts([read(run)]).set_index(["section", "fact"])["a"]
    assert facts["Certificate", "input.domain"] == "[0.0, 1.0]"
    assert facts["Certificate", "precision"] == "float64"
    assert len(facts["Certificate", "weights_sha256"]) == 64
    assert facts["Model", "kwargs.depths"] == "[2, 2]"
    assert facts["Software", "command"].startswith("lipcert train --model")
    assert ("Certificate", "graph") not in facts.index


def test_csv_reads_back_exactly(run: Path, log: Path) -> None:
    frame = headline(run, log)
    text = tables.csv(frame)
    again = pd.read_csv(io.BytesIO(text))
    assert b",300," in text
    for name in frame.select_dtypes("float").columns:
        pd.testing.assert_series_equal(again[name].astype(float), frame[name], rtol=0, atol=0)
    curve = tables.curves(read_all([run, log]))
    assert pd.read_csv(io.BytesIO(tables.csv(curve)))["certified"].tolist() == curve["certified"].tolist()
