"""`lipcert certify` and `lipcert attack` on a linear classifier of the digits, whose certificates are tight."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from brief import brief  # noqa: F401

from lipcert import data
from lipcert.cli import main

CODE = """
from pathlib import Path

import torch


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 10)
        self.head.load_state_dict(torch.load(Path(__file__).with_suffix(".pt"), weights_only=True))

    def forward(self, x):
        return self.head(x.flatten(1))


def build():
    return Linear()
"""


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """A least-squares classifier of the digits, as a Python file with a factory."""
    folder = tmp_path_factory.mktemp("linear")
    digits = data.load("digits", split="train", val_fraction=0.0)
    images = torch.cat([digits.images.double().flatten(1), torch.ones(len(digits), 1, dtype=torch.float64)], dim=1)
    targets = torch.nn.functional.one_hot(digits.labels, 10).double()
    solution = torch.linalg.solve(images.T @ images + 0.1 * torch.eye(65), images.T @ targets).T.float().contiguous()
    torch.save({"weight": solution[:, :64].clone(), "bias": solution[:, 64].clone()}, folder / "linear.pt")
    (folder / "linear.py").write_text(CODE)
    return f"{folder / 'linear.py'}:build"


@pytest.fixture(scope="session")
def _certified(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("certified") / "out"
    assert run("certify", classifier, "--data", "digits", "-o", folder, "--limit", "60", "--batch-size", "16") == 0
    return folder


@pytest.fixture
def certified(_certified, tmp_path):
    """A folder with certificates of 60 images; the test may change it."""
    return shutil.copytree(_certified, tmp_path / "certified")


def run(*args):
    with pytest.raises(SystemExit) as exit:
        main([str(arg) for arg in args] + ["--device", "cpu"])
    return exit.value.code


def rows(folder, name="certificates.tsv", without=()):
    lines = [line.split("\t") for line in (folder / name).read_text().splitlines()]
    return [{key: cell for key, cell in zip(lines[0], line, strict=True) if key not in without} for line in lines[1:]]


def certify(classifier, folder, *more):
    return run("certify", classifier, "--data", "digits", "-o", folder, *more)


def attack(classifier, folder, *more):
    return run("attack", classifier, "--data", "digits", "-o", folder, *more)


def test_certificates_agree_with_the_classifier_and_add_up(certified, classifier, capsys):
    table = rows(certified)
    weights = torch.load(classifier.removesuffix(".py:build") + ".pt", weights_only=True)
    weight, bias = weights["weight"].double(), weights["bias"].double()
    test = data.load("digits", split="test")
    logits = test.images[:60].double().flatten(1) @ weight.T + bias
    predict = logits.argmax(dim=1)
    gaps = (logits.gather(1, predict[:, None]) - logits) / (weight[predict][:, None] - weight).norm(dim=2)
    truth = gaps.nan_to_num(torch.inf).scatter(1, predict[:, None], torch.inf).min(dim=1).values
    assert [int(row["predict"]) for row in table] == predict.tolist()
    assert [int(row["label"]) for row in table] == test.labels[:60].tolist()
    for row, distance in zip(table, truth.tolist(), strict=True):
        assert distance * (1 - 1e-6) < float(row["radius"]) < distance
        assert int(row["correct"]) == (row["label"] == row["predict"])
    summary = json.loads((certified / "summary.json").read_text())
    correct = torch.tensor([int(row["correct"]) for row in table], dtype=torch.float64)
    assert summary["n"] == 60 and summary["clean"] == correct.mean().item()
    assert summary["certified"]["0.1412"] == (correct * (truth > 36 / 255)).mean().item()
    assert summary["acr"] == pytest.approx((correct * truth).mean().item(), rel=1e-6)
    assert (summary["precision"], summary["tf32"], summary["lower"]) == ("float64", False, None)
    assert summary["upper"] == pytest.approx(torch.linalg.matrix_norm(weight, 2).item(), rel=1e-6)


def test_output_goes_to_the_right_places(classifier, tmp_path, capsys):
    assert certify(classifier, tmp_path, "--limit", "20", "--radii", "0.1,36/255", "--json", "-") == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert list(summary["certified"]) == ["0.0000", "0.1000", "0.1412"]
    assert "certificates.tsv" in printed.err and "lipcert attack" in printed.err
    assert certify(classifier, tmp_path, "--limit", "20") == 0
    printed = capsys.readouterr()
    assert "holds these certificates already" in printed.err
    assert "Lipschitz bound" in printed.out and "0.4235" in printed.out


def test_an_interrupted_run_ends_with_the_same_rows(certified, classifier, tmp_path, monkeypatch, capsys):
    from lipcert import certificate

    folder, write, written = tmp_path / "stopped", certificate.write, []

    def stop(where, batch):
        if len(written) == 2:
            with open(where / "certificates.tsv", "a") as file:
                file.write("32\t5\t")  # torn
            raise KeyboardInterrupt
        written.append(batch)
        write(where, batch)

    monkeypatch.setattr(certificate, "write", stop)
    assert certify(classifier, folder, "--limit", "60", "--batch-size", "16") == 130
    assert len((folder / "certificates.tsv").read_text().splitlines()) == 1 + 32 + 1
    monkeypatch.setattr(certificate, "write", write)
    assert certify(classifier, folder, "--limit", "60", "--batch-size", "16") == 2
    assert "--resume" in capsys.readouterr().err
    assert certify(classifier, folder, "--limit", "60", "--batch-size", "16", "--resume") == 0
    assert rows(folder, without=("time",)) == rows(certified, without=("time",))


def test_other_weights_data_or_precision_do_not_mix(certified, classifier, tmp_path, capsys):
    source = classifier.removesuffix(".py:build")
    shutil.copy(source + ".py", tmp_path / "linear.py")
    weights = torch.load(source + ".pt", weights_only=True)
    torch.save({**weights, "bias": weights["bias"] * 0.99}, tmp_path / "linear.pt")
    before = (certified / "certificates.tsv").read_bytes()
    for model, more in (
        (f"{tmp_path / 'linear.py'}:build", ()),
        (classifier, ("--deployed", "float32")),
        (classifier, ("--split", "val")),
    ):
        for resume in ((), ("--resume",)):
            assert certify(model, certified, "--limit", "60", *more, *resume) == 2
            assert "is about something else" in capsys.readouterr().err
    assert before == (certified / "certificates.tsv").read_bytes()


def test_deployed_float32_radii_are_a_little_smaller(certified, classifier, tmp_path):
    assert certify(classifier, tmp_path, "--limit", "60", "--deployed", "float32") == 0
    pairs = list(zip(rows(tmp_path), rows(certified), strict=True))
    exact, deployed = ([float(pair[side]["radius"]) for pair in pairs] for side in (1, 0))
    assert all(0 <= small < large for small, large in zip(deployed, exact, strict=True))
    assert sum(deployed) > 0.99 * sum(exact)
    assert json.loads((tmp_path / "summary.json").read_text())["precision"] == "float32"


QUICK = ("--attacks", "apgd-ce", "--batch-size", "8", "--limit", "16")


def test_attack_confirms_sound_certificates(certified, classifier, capsys):
    eps = sorted(float(row["radius"]) for row in rows(certified)[:16])[8]
    assert attack(classifier, certified, "--eps", f"{eps},36/2550", *QUICK) == 0
    printed = capsys.readouterr()
    assert "robust" in printed.out and "wrote attacks.tsv" in printed.err
    table = rows(certified, "attacks.tsv")
    assert list(table[0]) == ["eps", "idx", "label", "predict", "adversarial", "distance", "success"]
    assert len(table) == 32
    radius = {row["idx"]: float(row["radius"]) for row in rows(certified)}
    for row in table:
        if row["success"] == "1":
            assert radius[row["idx"]] <= float(row["distance"]) <= float(row["eps"])
            assert row["label"] == row["predict"] != row["adversarial"]
    entries = json.loads((certified / "attacks.json").read_text())
    assert [entry["eps"] for entry in entries] == sorted([eps, 36 / 2550])
    for entry in entries:
        these = [row for row in table if float(row["eps"]) == entry["eps"]]
        right = [row["label"] == row["predict"] for row in these]
        robust = [r and row["success"] == "0" for r, row in zip(right, these, strict=True)]
        assert (entry["n"], entry["contradictions"], entry["compared"]) == (16, [], True)
        assert (entry["clean"], entry["robust"]) == (sum(right) / 16, sum(robust) / 16)
        assert (
            entry["robust"]
            >= sum(r and radius[row["idx"]] > entry["eps"] for r, row in zip(right, these, strict=True)) / 16
        )
    assert entries[0]["robust"] > entries[1]["robust"]


def test_certificates_from_half_the_bound_raise_the_alarm(certified, classifier, capsys):
    path = certified / "certificates.tsv"
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    radius = sorted(float(line[3]) for line in lines[1:17])[8]
    for line in lines[1:]:
        line[3] = repr(2 * float(line[3]))
    path.write_text("".join("\t".join(line) + "\n" for line in lines))
    assert attack(classifier, certified, "--eps", radius * 1.3, *QUICK) == 3
    printed = capsys.readouterr()
    (entry,) = json.loads((certified / "attacks.json").read_text())
    broken = [int(row["idx"]) for row in rows(certified, "attacks.tsv") if row["success"] == "1"]
    assert entry["contradictions"] and set(entry["contradictions"]) <= set(broken)
    assert "Finding: adversarial examples within the certified radius" in printed.err
    assert ", ".join(map(str, entry["contradictions"])) in printed.err
    assert len(rows(certified, "attacks.tsv")) == 16  # everything was written before


def test_an_interrupted_attack_ends_with_the_same_rows(classifier, tmp_path, monkeypatch, capsys):
    from lipcert.cli import attack as module

    whole, parts, append, written = tmp_path / "whole", tmp_path / "parts", module.append_rows, []
    assert attack(classifier, whole, "--eps", "0.1,0.3", *QUICK) == 0
    assert "no certificates in this folder" in capsys.readouterr().err

    def stop(path, columns, batch):
        if written:
            append(path, columns, batch[:5])
            raise KeyboardInterrupt
        written.append(batch)
        append(path, columns, batch)

    monkeypatch.setattr(module, "append_rows", stop)
    assert attack(classifier, parts, "--eps", "0.3,0.1", *QUICK) == 130
    monkeypatch.setattr(module, "append_rows", append)
    assert len(rows(parts, "attacks.tsv")) == 21
    assert json.loads((parts / "attacks.json").read_text())[0]["n"] == 8
    assert attack(classifier, parts, "--eps", "0.3,0.1", *QUICK) == 2
    assert "--resume" in capsys.readouterr().err
    assert attack(classifier, parts, "--eps", "0.2", *QUICK, "--resume") == 2
    assert "radii: [0.1, 0.3] there, [0.2] now" in capsys.readouterr().err
    assert attack(classifier, parts, "--eps", "0.3,0.1", *QUICK, "--resume") == 0
    capsys.readouterr()
    assert rows(parts, "attacks.tsv") == rows(whole, "attacks.tsv")
    assert attack(classifier, parts, "--eps", "0.3,0.1", *QUICK, "--json", "-") == 0
    printed = capsys.readouterr()
    assert "nothing was computed" in printed.err
    assert [entry["eps"] for entry in json.loads(printed.out)] == [0.1, 0.3]


@pytest.mark.parametrize(
    ("command", "file", "more"),
    [
        ("certify", "certificates.tsv", ("--batch-size", "3", "--limit", "360")),
        ("attack", "attacks.tsv", ("--eps", "0.1,0.3", "--attacks", "apgd-ce", "--batch-size", "2", "--limit", "24")),
    ],
)
def test_a_killed_process_resumes_to_the_same_rows(command, file, more, classifier, tmp_path):
    line = [sys.executable, "-m", "lipcert", command, classifier, "--data", "digits", "--device", "cpu", *more, "-o"]
    options = dict(cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    killed = subprocess.Popen([*line, str(tmp_path / "killed")], **options)
    deadline = time.monotonic() + 120
    while len(written(tmp_path / "killed" / file)) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it ended before it was killed"
    before = len(written(tmp_path / "killed" / file))
    for more in ((tmp_path / "whole",), (tmp_path / "killed", "--resume")):
        subprocess.run([*line, *map(str, more)], check=True, stdout=subprocess.DEVNULL, **options)
    assert 0 < before < len(written(tmp_path / "whole" / file))
    assert rows(tmp_path / "killed", file, ("time",)) == rows(tmp_path / "whole", file, ("time",))


def written(path):
    return path.read_bytes().splitlines() if path.exists() else []


def test_certificates_of_other_images_are_not_compared(certified, classifier, capsys):
    stored = json.loads((certified / "certificate.json").read_text())
    (certified / "certificate.json").write_text(json.dumps({**stored, "split": "val"}))
    assert attack(classifier, certified, "--eps", "0.1", *QUICK) == 0
    assert "not compared: split: val there, test now" in capsys.readouterr().err
    assert json.loads((certified / "attacks.json").read_text())[0]["compared"] is False


def test_a_run_folder_needs_no_more_than_its_name(run_folder, capsys):
    assert run("certify", run_folder, "--limit", "30") == 0
    assert {"certificates.tsv", "certificate.json", "summary.json"} <= {path.name for path in run_folder.iterdir()}
    assert run("attack", run_folder, "--eps", "0.01", "--attacks", "apgd-ce", "--limit", "10") == 0
    certified = {row["idx"]: row for row in rows(run_folder)}
    assert all(certified[row["idx"]]["predict"] == row["predict"] for row in rows(run_folder, "attacks.tsv"))


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (("certify", "MODEL", "-o", "OUT"), "name a data set with --data"),
        (("certify", "MODEL", "--data", "digits"), "say with -o"),
        (("certify", "MODEL", "--data", "digit", "-o", "OUT"), "did you mean 'digits'"),
        (("certify", "MODEL", "--data", "digits", "-o", "OUT", "--limit", "0"), "--limit"),
        (("certify", "MODEL", "--data", "digits", "-o", "OUT", "--radii", "-1"), "not a radius"),
        (("certify", "MODEL", "--data", "digits", "-o", "OUT", "--deployed", "bfloat16"), "float32"),
        (("certify", "RUN", "--data", "mnist"), "takes inputs of"),
        (("attack", "MODEL", "--data", "digits", "-o", "OUT"), "--eps"),
        (
            ("attack", "MODEL", "--data", "digits", "-o", "OUT", "--eps", "0.1", "--version", "rand"),
            "unknown AutoAttack version",
        ),
        (("attack", "MODEL", "--data", "digits", "-o", "OUT", "--eps", "0.1", "--attacks", "pgd"), "unknown attacks"),
        (("attack", "MODEL", "--data", "digits", "-o", "OUT", "--eps", "0.1", "--attacks", ""), "unknown attacks"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_2(args, match, classifier, run_folder, tmp_path, capsys):
    names = {"MODEL": classifier, "RUN": run_folder, "OUT": tmp_path / "out"}
    assert run(*(names.get(arg, arg) for arg in args)) == 2
    printed = capsys.readouterr()
    assert match in printed.err and "Traceback" not in printed.err and not printed.out
