from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest

import lipcert
from lipcert import cli as package
from lipcert.cli import COMMANDS, main
from lipcert.errors import Finding, InputError

ROOT = Path(__file__).parents[2]


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Run the command line in this process and return (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """A command `fail` that raises what it is given."""

    def add(error: BaseException) -> None:
        @click.command()
        def command() -> None:
            raise error

        monkeypatch.setitem(sys.modules, "lipcert.cli.fail", type(sys)("lipcert.cli.fail"))
        sys.modules["lipcert.cli.fail"].command = command
        monkeypatch.setattr(package, "COMMANDS", (*COMMANDS, "fail"))

    return add


def test_version_and_help(capsys) -> None:
    assert run(capsys, "--version") == (0, f"lipcert {lipcert.__version__}\n", "")
    code, out, err = run(capsys, "-h")
    assert code == 0 and err == ""
    for name in COMMANDS:
        assert f"\n  {name} " in out
    code, out, err = run(capsys)
    assert code == 2 and out == "" and "Commands:" in err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_examples(capsys, name: str) -> None:
    code, out, err = run(capsys, name, "-h")
    assert code == 0 and err == ""
    assert "Examples:" in out and f"lipcert {name}" in out


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys, lipcert.cli\n"
        "for args in (['-h'], *([name, '-h'] for name in lipcert.cli.COMMANDS)):\n"
        "    try: lipcert.cli.main(args)\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("the file is missing; name another"), 2, "Error: the file is missing; name another"),
        (click.UsageError("no such thing"), 2, "Error: no such thing"),
        (Finding("lower is above upper"), 3, "Finding: lower is above upper"),
        (ValueError("odd"), 1, "Error: ValueError: odd (--debug shows where)"),
        (KeyboardInterrupt(), 130, "Stopped: finished rows and epochs are kept; --resume continues"),
    ],
)
def test_exit_codes_and_one_line_on_stderr(capsys, failing, error, code, text) -> None:
    failing(error)
    found, out, err = run(capsys, "fail")
    assert (found, out, err.strip()) == (code, "", text)


def test_bound_errors_are_input_errors(capsys, failing) -> None:
    from lipcert.bounds.core import BoundError

    failing(BoundError("no rule for aten.sort"))
    assert run(capsys, "fail") == (2, "", "Error: no rule for aten.sort\n")


@pytest.mark.parametrize("args", [["--debug", "fail"], ["fail", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(capsys, failing, args) -> None:
    failing(InputError("the reason"))
    code, out, err = run(capsys, *args)
    assert code == 2 and out == "" and "Traceback" in err and err.endswith("Error: the reason\n")


def test_warnings_are_one_line(capsys, failing, monkeypatch) -> None:
    @click.command()
    def command() -> None:
        warnings.simplefilter("always")
        warnings.warn("the disk is nearly full", stacklevel=1)

    failing(InputError(""))
    sys.modules["lipcert.cli.fail"].command = command
    assert run(capsys, "fail") == (0, "", "Warning: the disk is nearly full\n")


def test_models_are_listed_and_filtered(capsys) -> None:
    code, out, err = run(capsys, "models", "lipshift_t*")
    assert code == 0 and out.splitlines()[1].startswith("lipshift_tiny  ") and len(out.splitlines()) == 2
    assert err.startswith("next: lipcert bound lipshift_tiny")
    code, out, _ = run(capsys, "models", "lipshift_t*", "--json", "-")
    assert [model["name"] for model in json.loads(out)] == ["lipshift_tiny"]


def test_data_says_what_is_there(capsys, tmp_path) -> None:
    code, out, _ = run(capsys, "data", "--data-root", tmp_path, "--json", "-")
    sets = {entry["name"]: entry for entry in json.loads(out)}
    assert sets["digits"]["present"] and sets["digits"]["train"] + sets["digits"]["test"] == 1797
    assert not sets["cifar10"]["present"] and sets["cifar10"]["missing"] == str(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py").mkdir()
    code, out, _ = run(capsys, "data", "--data-root", tmp_path)
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["cifar10"].endswith(str(tmp_path / "cifar-10-batches-py"))
    assert "lipcert data --download cifar100" in lines["cifar100"] and "missing" in lines["imagenet"]


def test_presets_show_their_headers_and_print_as_files(capsys, tmp_path, monkeypatch) -> None:
    from lipcert import config

    (tmp_path / "mine.yaml").write_text("# lipcert train --preset mine -o mine\n# a minute\nepochs: 3\n# not this\n")
    monkeypatch.setattr(config, "PRESETS", tmp_path)
    code, out, _ = run(capsys, "presets")
    assert code == 0 and out == "mine\n    lipcert train --preset mine -o mine\n    a minute\n"
    code, out, _ = run(capsys, "presets", "mine")
    assert out == (tmp_path / "mine.yaml").read_text()


def test_shipped_presets_are_valid_and_say_what_they_are(capsys) -> None:
    from lipcert.config import PRESETS, load_config

    files = sorted(PRESETS.glob("*.yaml"))
    assert "digits" in [file.stem for file in files]
    for file in files:
        load_config(file)
        assert f"lipcert train --preset {file.stem}" in file.read_text().partition("\n\n")[0]


def test_env_names_versions_and_arithmetic(capsys) -> None:
    import torch

    code, out, _ = run(capsys, "env", "--device", "cpu", "--json", "-")
    facts = json.loads(out)
    assert code == 0 and facts["torch"] == torch.__version__ and facts["certification"]["tf32"] is False
    code, out, _ = run(capsys, "env", "--device", "cpu")
    assert f"torch          {torch.__version__}" in out


# ---------------------------------------------------------------------------------------------------------------- bound


@pytest.fixture
def diagonal(tmp_path: Path) -> str:
    """MODEL for a linear map whose Lipschitz constant is exactly 3."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "def build():\n"
        "    layer = torch.nn.Linear(3, 3, bias=False)\n"
        "    layer.weight.data = torch.diag(torch.tensor([1.0, 3.0, 2.0]))\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), layer)\n"
    )
    return f"{file}:build"


def test_bound_of_a_file_is_proved_from_above_and_below(capsys, diagonal, tmp_path) -> None:
    target = tmp_path / "out" / "bound.json"
    code, out, err = run(capsys, "bound", diagonal, "--input-shape", "3,1,1", "--json", target)
    assert code == 0 and "running" in err and f"wrote {target}" in err
    assert re.search(r"lower bound, attained by two inputs: (3.0000|2.9999)\d*\n", out)
    record = json.loads(target.read_text())
    assert record["lower"] <= 3 <= record["upper"] < 3 * (1 + 1e-6) and record["lower"] > 2.99
    x, y = record["lower_witness"]["x"], record["lower_witness"]["y"]
    distance = math.dist(x, y)
    moved = math.hypot(*(factor * (a - b) for factor, a, b in zip((1, 3, 2), x, y, strict=True)))
    assert moved / distance == pytest.approx(record["lower"], rel=1e-9)
    assert record["input"] == {"shape": [3, 1, 1], "domain": [0.0, 1.0]} and record["norm"] == "l2"
    assert {"lipcert", "model", "weights_sha256", "upper", "lower", "seconds", "layers", "unbounded"} <= set(record)


def test_bound_json_on_stdout_is_nothing_but_json(capsys, diagonal) -> None:
    code, out, _ = run(capsys, "bound", diagonal, "--input-shape", "3,1,1", "--lower-steps", "0", "--json", "-")
    record = json.loads(out)
    assert code == 0 and record["lower"] is None and record["lower_witness"] is None


def test_bound_of_a_run_is_written_into_it_beside_the_estimate(capsys, run_folder) -> None:
    with open(run_folder / "metrics.csv", "w", newline="") as file:
        rows = csv.DictWriter(file, ["epoch", "lipschitz_estimate"])
        rows.writeheader()
        rows.writerows([{"epoch": 1, "lipschitz_estimate": 0.5}, {"epoch": 2, "lipschitz_estimate": 1.25}])
    code, out, err = run(capsys, "bound", run_folder, "--lower-steps", "2")
    record = json.loads((run_folder / "bound.json").read_text())
    assert code == 0 and record["estimate"] == 1.25 and record["model"] == "lipshift_tiny"
    assert 0 < record["lower"] <= record["upper"] and record["features"] > 0
    assert "estimate while training 1.25" in out and f"next: lipcert certify {run_folder}" in err


def test_a_lower_bound_above_the_upper_one_is_a_finding(capsys, diagonal, monkeypatch) -> None:
    import torch

    from lipcert.attacks import ascent

    def too_high(*args, **kwargs):
        return ascent.LowerBound(3.5, torch.zeros(3, 1, 1), torch.ones(3, 1, 1), "invented")

    monkeypatch.setattr(ascent, "lipschitz_lower", too_high)
    code, out, err = run(capsys, "bound", diagonal, "--input-shape", "3,1,1")
    assert code == 3 and "3.5" in out and "Finding: the lower bound 3.5 is above the upper bound 3.0" in err


def test_no_finite_bound_is_a_finding_only_on_request(capsys, tmp_path) -> None:
    file = tmp_path / "square.py"
    file.write_text(
        "import torch\n"
        "class Root(torch.nn.Module):\n"
        "    def forward(self, x): return x.flatten(1).sqrt()\n"
        "def build(): return Root()\n"
    )
    args = ("bound", f"{file}:build", "--input-shape", "1,1,2", "--lower-steps", "0", "--json", "-")
    code, out, _ = run(capsys, *args)
    assert code == 0 and json.loads(out)["upper"] == "inf"
    code, out, err = run(capsys, *args, "--require-finite")
    assert code == 3 and json.loads(out)["upper"] == "inf" and "no finite bound" in err


def test_bound_of_torchvision_models_reaches_the_audit(capsys, torchvision) -> None:
    code, _, err = run(capsys, "bound", "torchvision:resnet18:random")
    assert code == 2 and "give --input-shape" in err
