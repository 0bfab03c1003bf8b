from __future__ import annotations

import sys

import pytest
import torch

from lipcert.checkpoint import load_model
from lipcert.cli import main


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    return int(caught.value.code or 0)


def test_an_exported_program_computes_the_network_for_any_batch(run_folder, tmp_path, capsys) -> None:
    file = tmp_path / "new" / "digits.pt2"
    assert run("export", run_folder, file) == 0
    assert f"wrote {file}: lipshift_tiny, inputs float64 (batch, 1, 8, 8)" in capsys.readouterr().err
    program = torch.export.load(file).module()
    network = load_model(run_folder)[0].double()
    for n in (1, 3, 7):
        x = torch.rand(n, 1, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(program(x), network(x), rtol=1e-6, atol=1e-6)


def test_float32_programs_take_float32(run_folder, tmp_path) -> None:
    file = tmp_path / "digits.pt2"
    assert run("export", run_folder, file, "--precision", "float32") == 0
    assert torch.export.load(file).module()(torch.zeros(2, 1, 8, 8)).dtype == torch.float32


def test_onnx_runs_elsewhere(run_folder, tmp_path) -> None:
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    file = tmp_path / "digits.onnx"
    assert run("export", run_folder, file, "--precision", "float32") == 0
    x = torch.rand(3, 1, 8, 8)
    evaluator = reference.ReferenceEvaluator(str(file))
    (output,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), load_model(run_folder)[0](x), rtol=1e-4, atol=1e-4)


def test_without_onnx_the_extra_is_named(run_folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert run("export", run_folder, tmp_path / "digits.onnx") == 2
    assert capsys.readouterr().err == "Error: ONNX files need onnx; run: pip install 'lipcert[onnx]'\n"
    assert not (tmp_path / "digits.onnx").exists()
