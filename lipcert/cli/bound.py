"""`lipcert bound`: a proved upper bound of the l2-Lipschitz constant of any model, and a lower bound beside it."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lipcert
from lipcert.cli.model import Resolved, resolve_model
from lipcert.cli.options import Domain, Shape, json_option, note, seed_option, write_json
from lipcert.errors import Finding, InputError
from lipcert.files import write_json as write_file

if TYPE_CHECKING:
    from torch import nn

    from lipcert.attacks.ascent import LowerBound
    from lipcert.bounds.audit import Audit


@click.command(
    epilog="""\b
Examples:
  lipcert bound runs/digits
  lipcert bound lipshift_tiny --input-shape 3,32,32 --lower-steps 0
  lipcert bound torchvision:resnet18 --input-shape 3,224,224
  lipcert bound path/to/file.py:factory --input-shape 3,32,32 --require-finite --json -

The bound holds for the network in evaluation mode, in exact arithmetic, between any two inputs of the domain."""
)
@click.argument("model")
@click.option("--input-shape", type=Shape(), help="Shape of one input, like 3,32,32; run folders know theirs.")
@click.option("--domain", type=Domain(), default="0,1", show_default=True, help="Lowest and highest value of an input.")
@click.option(
    "--tightness",
    type=click.Choice(["fast", "tight"]),
    default="fast",
    show_default=True,
    help="How much work goes into each layer.",
)
@click.option(
    "--lower-steps",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    help="Steps of the search for a lower bound; 0 leaves it out.",
)
@click.option("--require-finite", is_flag=True, help="Exit with 3 if no finite bound is found.")
@seed_option
@json_option
def command(
    model: str,
    input_shape: tuple[int, ...] | None,
    domain: tuple[float, float],
    tightness: str,
    lower_steps: int,
    require_finite: bool,
    seed: int,
    json_file: str | None,
) -> None:
    """Bound the l2-Lipschitz constant of MODEL, layer by layer and as a whole.

    MODEL is a run folder, the name of a model, torchvision:NAME or path/to/file.py:factory.
    """
    resolved = resolve_model(model, input_shape=input_shape, seed=seed)
    shape = _shape(resolved, input_shape)
    begun = time.perf_counter()

    from lipcert.bounds.audit import audit
    from lipcert.export import export

    exported = export(resolved.model)
    result = audit(exported, shape, domain, tightness=tightness)
    lower = _lower(exported, result, lower_steps, seed) if lower_steps else None
    record = _record(resolved, result, lower, time.perf_counter() - begun)

    if json_file != "-":
        click.echo(str(result))
        for line in _lines(record):
            click.echo(line)
    for target in _targets(json_file, resolved.run):
        if target == "-":
            write_json(target, record)
        else:
            write_file(target, record)
            note(f"wrote {target}")
    _judge(result.upper.value, lower, require_finite)
    note(f"next: lipcert certify {model}" + ("" if resolved.run else " --data NAME"))


def _shape(resolved: Resolved, given: tuple[int, ...] | None) -> tuple[int, ...]:
    known = resolved.input_shape
    shape = given or known
    if shape is None:
        raise InputError(f"nothing says how large the inputs of {resolved.name} are; give --input-shape, like 3,32,32")
    if resolved.config and shape != known:
        raise InputError(f"{resolved.name} was built for inputs of {known}, not {shape}; leave out --input-shape")
    return shape


def _lower(exported: nn.Module, result: Audit, steps: int, seed: int) -> LowerBound:
    from lipcert.attacks.ascent import lipschitz_lower

    evaluate = None if result.program is None else result.program.evaluate
    return lipschitz_lower(
        exported, result.input_shape, steps=steps, domain=result.domain, seed=seed, evaluate=evaluate
    )


def _record(resolved: Resolved, result: Audit, lower: LowerBound | None, seconds: float) -> dict[str, Any]:
    """Return the JSON of the result; for a run also what training believed, and what a paper's own formula claims."""
    record: dict[str, Any] = {"lipcert": lipcert.__version__, "model": resolved.name, **result.to_json()}
    record["lower"] = None if lower is None else lower.value
    record["lower_witness"] = None
    if lower is not None:
        record["lower_witness"] = {"x": lower.x.flatten().tolist(), "y": lower.y.flatten().tolist()}
    record["features"] = None if result.head is None else result.head.penultimate.value
    if resolved.run is not None:
        record["estimate"] = _estimate(resolved.run / "metrics.csv")
        published: Any = getattr(resolved.model, "published_bound", None)  # networks that follow a paper have one
        if published is not None and (claim := published()) is not None:
            record["published"] = claim
    record["seconds"] = seconds
    return record


def _estimate(metrics: Path) -> float | None:
    """Return the last estimate of the features' constant that training logged, if there is one."""
    if not metrics.is_file():
        return None
    with open(metrics, newline="") as file:
        values = [row.get("lipschitz_estimate") for row in csv.DictReader(file)]
    return float(values[-1]) if values and values[-1] else None


def _lines(record: dict[str, Any]) -> Iterator[str]:
    """Yield what the table of the audit does not say."""
    if record["lower"] is not None:
        yield f"lower bound, attained by two inputs: {record['lower']:.6g}"
    if record.get("estimate") is not None:
        proved = "none" if record["features"] is None else f"{record['features']:.6g}"
        yield f"features before the head: estimate while training {record['estimate']:.6g}, proved bound {proved}"
    if "published" in record:
        yield f"published formula: {record['published']['value']:.6g} ({record['published']['formula']})"


def _targets(json_file: str | None, run: Path | None) -> list[str]:
    targets = [] if json_file is None else [json_file]
    return targets if run is None else [*targets, str(run / "bound.json")]


def _judge(upper: float, lower: LowerBound | None, require_finite: bool) -> None:
    if lower is not None and lower.value > upper:
        raise Finding(f"the lower bound {lower.value!r} is above the upper bound {upper!r}; please report this")
    if require_finite and math.isinf(upper):
        raise Finding("there is no finite bound; the table names the operators that have none")
