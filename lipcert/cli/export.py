"""`lipcert export`: the network that a certificate is about, as a file that runs without lipcert."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lipcert.cli.model import resolve_model
from lipcert.cli.options import Shape, note, seed_option
from lipcert.errors import InputError
from lipcert.files import require_writable, write_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TOLERANCE = {"float64": 1e-9, "float32": 1e-4}  # of the largest logit; a wrong graph is off by far more


@click.command(
    epilog="""\b
Examples:
  lipcert export runs/digits digits.pt2
  lipcert export runs/digits digits.onnx --precision float32
  lipcert export runs/cifar10 cifar10.pt2 --blocked 64
  lipcert export torchvision:resnet18 resnet18.pt2

A .pt2 file is an exported program: torch.export.load("digits.pt2").module() is the network. ONNX needs
pip install 'lipcert[onnx]'."""
)
@click.argument("model")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--input-shape", type=Shape(), help="Shape of one input, like 3,32,32; run folders know theirs.")
@click.option(
    "--precision",
    type=click.Choice(["float64", "float32"]),
    default="float64",
    show_default=True,
    help="Type of weights and inputs. Certificates speak of float64, unless made with --deployed float32.",
)
@click.option(
    "--blocked",
    type=click.IntRange(1),
    metavar="N",
    help="Sum inner products in blocks of about N, so that little is lost when float32 is certified; 64 is a good N.",
)
@seed_option
def command(
    model: str, file: Path, input_shape: tuple[int, ...] | None, precision: str, blocked: int | None, seed: int
) -> None:
    """Write MODEL to FILE (.pt2 or .onnx): plain operators, weights computed, no dropout, any batch size.

    The file is read back and compared with the network before the command says that it is done.
    """
    if file.suffix not in (".pt2", ".onnx"):
        raise InputError(f"{file} ends in {file.suffix or 'nothing'}; the formats are .pt2 and .onnx")
    require_writable(file.parent)
    resolved = resolve_model(model, input_shape=input_shape, seed=seed)
    shape = input_shape or resolved.input_shape
    if shape is None:
        raise InputError(f"nothing says how large the inputs of {resolved.name} are; give --input-shape, like 3,32,32")

    import torch

    from lipcert.export import export
    from lipcert.numerics import exact

    dtype = getattr(torch, precision)
    network = export(resolved.model).to(dtype)
    if blocked is not None:
        from lipcert.blocked import blocked as in_blocks

        network = in_blocks(network, blocked)
    inputs = torch.rand(2, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    with exact():
        program = torch.export.export(network, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        content, again = (_pt2 if file.suffix == ".pt2" else _onnx)(program, inputs)
        expected = network(inputs)
        difference = float((again - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE[precision]:
        raise RuntimeError(f"the {file.suffix} program differs from the network by {difference:.2g}; not written")
    write_bytes(file, content)
    note(f"wrote {file}: {resolved.name}, inputs {precision} (batch, {', '.join(map(str, shape))})")


def _pt2(program: torch.export.ExportedProgram, inputs: Tensor) -> tuple[bytes, Tensor]:
    """Return the exported program as a file, and what it computes when it is read back."""
    import torch

    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    content = buffer.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module()(inputs)


def _onnx(program: torch.export.ExportedProgram, inputs: Tensor) -> tuple[bytes, Tensor]:
    """Return the program as an ONNX file, and what ONNX's reference implementation computes with it."""
    import torch

    try:
        import onnx.reference
        import onnxscript  # noqa: F401  torch.onnx imports it late and says less
    except ImportError as error:
        missing = (error.name or "onnx").partition(".")[0]
        raise InputError(f"ONNX files need {missing}; run: pip install 'lipcert[onnx]'") from error
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    if exported is None:
        raise RuntimeError("torch.onnx.export gave no program")
    content = exported.model_proto.SerializeToString()
    evaluator = onnx.reference.ReferenceEvaluator(exported.model_proto)
    (output,) = evaluator.run(None, {evaluator.input_names[0]: inputs.numpy()})
    return content, torch.from_numpy(output)
