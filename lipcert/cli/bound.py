"""`lipcert bound`: a proved upper bound of the l2-Lipschitz constant of any model, and a lower bound beside it."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lipcert
from lipcert.cli.model import Resolved, resolve_model
from lipcert.cli.options import (
    Constant,
    Domain,
    Radius,
    Shape,
    data_root_option,
    html_option,
    json_option,
    note,
    seed_option,
    write_json,
)
from lipcert.errors import Finding, InputError
from lipcert.files import require_writable, write_text
from lipcert.files import write_json as write_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lipcert.attacks.ascent import LowerBound
    from lipcert.bounds.audit import Audit
    from lipcert.bounds.core import Bound

_STARTS = 8  # images that the search begins from
_LISTED = 4096  # numbers of an input that JSON spells out


@click.command(
    epilog="""\b
Examples:
  lipcert bound runs/digits
  lipcert bound torchvision:resnet18 --html resnet18.html
  lipcert bound timm:resnet18.a1_in1k --claimed 1000 -o pair.safetensors
  lipcert bound hf:segformer:random --input-shape 3,64,64
  lipcert bound network.onnx --json -
  lipcert bound path/to/file.py:factory --input-shape 3,32,32 --require-finite
  lipcert bound runs/digits --around digit.png --radius 36/255
  lipcert bound lipshift_paper --published

\b
The bound holds for the network in evaluation mode, in exact arithmetic, between any two inputs of the domain.
A claim is proved, refuted (a saved pair of inputs exceeds it; exit code 3) or open.

\b
What is trusted: a .py file is run, with all that it does. Everything else is read as data: weights from
safetensors, a .pt2 file without its pickles (one that needs them, custom objects or compiled code is refused),
an .onnx file's listed operators. timm and torchvision read their own weights with torch's restricted unpickler."""
)
@click.argument("model")
@click.option("--input-shape", type=Shape(), help="Shape of one input, like 3,32,32; most models know theirs.")
@click.option("--domain", type=Domain(), default="0,1", show_default=True, help="Lowest and highest value of an input.")
@click.option(
    "--tightness",
    type=click.Choice(["fast", "tight"]),
    default="fast",
    show_default=True,
    help="tight works longer on chains of layers and convolutions of small maps, for a smaller bound.",
)
@click.option(
    "--lower-steps",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    help="Steps of the search for a lower bound; 0 leaves it out.",
)
@click.option("--data", metavar="NAME", help="Data set whose images the search begins from; default: random inputs.")
@click.option("--claimed", type=Constant(), metavar="L", help="A Lipschitz constant to be proved or refuted.")
@click.option(
    "--around",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Bound the constant near one input only: an image, a .npy array, or a .safetensors tensor x.",
)
@click.option("--radius", type=Radius(), help="How far from --around a value may move: the box holds this l2 ball.")
@click.option(
    "--published",
    is_flag=True,
    help="Evaluate the formula of a network's own paper also where that takes minutes: LipShiFT's power iterations.",
)
@click.option("--require-finite", is_flag=True, help="Exit with 3 if no finite bound is found.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the pair of inputs (safetensors).  [default: beside the JSON, the page, or in the run folder]",
)
@html_option
@data_root_option
@seed_option
@json_option
def command(
    model: str,
    input_shape: tuple[int, ...] | None,
    domain: tuple[float, float],
    tightness: str,
    lower_steps: int,
    data: str | None,
    claimed: float | None,
    around: Path | None,
    radius: float | None,
    published: bool,
    require_finite: bool,
    output: Path | None,
    html_file: str | None,
    data_root: str | None,
    seed: int,
    json_file: str | None,
) -> None:
    """Bound the l2-Lipschitz constant of MODEL from both sides, layer by layer and as a whole.

    MODEL is a run folder, the name of a model, torchvision:NAME, timm:NAME, hf:PATH, a .pt2 or .onnx file, or
    path/to/file.py:factory.
    """
    if output is not None:
        require_writable(output.parent)
    if (around is None) != (radius is None):
        raise InputError("--around FILE and --radius R go together")
    resolved = resolve_model(model, input_shape=input_shape, seed=seed)
    shape = _shape(resolved, input_shape)
    place = _neighbourhood(around, radius, shape, domain)
    starts = _starts(data, data_root, shape, domain) if data is not None else None
    if starts is not None and place is not None:
        starts = starts.clamp(*place)
    begun = time.perf_counter()

    from lipcert.bounds.audit import audit
    from lipcert.export import export
    from lipcert.programs import ProgramNetwork
    from lipcert.quiet import quiet

    network = export(resolved.model)
    audited = network.program if isinstance(network, ProgramNetwork) else network
    with quiet("torch"), redirect_stderr(io.StringIO()):  # a failed export is one sentence, not the exporter's log
        result = audit(audited, shape, place or domain, tightness)
    lower = _lower(network, result, starts, lower_steps, seed) if lower_steps else None
    record = _record(resolved, result, lower, claimed, time.perf_counter() - begun, published)
    if around is not None:
        record["input"] |= {"around": around.name, "radius": radius}
    pair = None if lower is None else _pair_file(output, json_file, html_file, resolved.run)
    if pair is not None and lower is not None:
        from lipcert.pair import save_pair

        save_pair(pair, lower.x, lower.y, network, _facts(record))
        record["lower_witness"]["file"] = pair.name
    if lower is not None and (pair is None or lower.x.numel() <= _LISTED):
        record["lower_witness"] |= {"x": lower.x.flatten().tolist(), "y": lower.y.flatten().tolist()}

    if json_file != "-":
        for line in _lines(record):
            click.echo(line)
    if pair is not None:
        note(f"wrote {pair}")
    for target in _targets(json_file, resolved.run):
        if target == "-":
            write_json(target, record)
        else:
            write_file(target, record)
            note(f"wrote {target}")
    if html_file is not None:
        from lipcert.report.audit_page import build

        note(f"wrote {write_text(html_file, build(record))}")
    _judge(record, result.upper, lower, require_finite)
    note(f"next: lipcert certify {model}" + ("" if resolved.run else " --data NAME"))


def _shape(resolved: Resolved, given: tuple[int, ...] | None) -> tuple[int, ...]:
    known = resolved.input_shape
    shape = given or known
    if shape is None:
        raise InputError(f"nothing says how large the inputs of {resolved.name} are; give --input-shape, like 3,32,32")
    if resolved.config and shape != known:
        raise InputError(f"{resolved.name} was built for inputs of {known}, not {shape}; leave out --input-shape")
    return shape


def _neighbourhood(
    around: Path | None, radius: float | None, shape: tuple[int, ...], domain: tuple[float, float]
) -> tuple[Tensor, Tensor] | None:
    if around is None or radius is None:
        return None
    from lipcert.neighbourhood import box, read_input

    return box(read_input(around, shape, domain), radius, domain)


def _starts(data: str, root: str | None, shape: tuple[int, ...], domain: tuple[float, float]) -> Tensor:
    """Return some test images, scaled from [0, 1] to the domain."""
    from lipcert import data as datasets

    source = datasets.info(data)
    size = shape[-1] if source.resizes else None
    images = datasets.load(data, root, "test", img_size=size).first(_STARTS)
    batch, _ = next(iter(datasets.loader(images, batch_size=_STARTS)))
    if tuple(batch.shape[1:]) != shape:
        raise InputError(f"the images of {data} are {tuple(batch.shape[1:])}, not {shape}; use other data")
    return domain[0] + (domain[1] - domain[0]) * batch.double().clamp(0.0, 1.0)


def _lower(network: nn.Module, result: Audit, starts: Tensor | None, steps: int, seed: int) -> LowerBound:
    from lipcert.attacks.ascent import lipschitz_lower

    return lipschitz_lower(
        network, result.input_shape, starts, steps, result.box or result.domain, seed, evaluate=result.program.evaluate
    )


def _record(
    resolved: Resolved, result: Audit, lower: LowerBound | None, claimed: float | None, seconds: float, published: bool
) -> dict[str, Any]:
    """Return the JSON of the result, what a paper's own formula claims, and for a run what training believed.

    `published`: also a formula that takes minutes.
    """
    from lipcert.models.network import Published
    from lipcert.report.shares import shares

    record: dict[str, Any] = {"lipcert": lipcert.__version__, "model": resolved.name, **result.to_json()}
    for row, share in zip(record["layers"], shares(record["layers"]), strict=True):
        row |= {"log10": share.log10, "share": share.part}
    record["lower"] = None if lower is None else lower.value
    record["lower_proved"] = None if lower is None else lower.proved
    record["lower_witness"] = None if lower is None else {}
    record["claim"] = None
    if claimed is not None:
        record["claim"] = {"claimed": claimed, "answer": _answer(claimed, result.upper.value, lower)}
    record["features"] = None if result.head is None else result.head.penultimate.written
    if resolved.run is not None:
        record["estimate"] = _estimate(resolved.run / "metrics.csv")
    if isinstance(resolved.model, Published):
        if published or not resolved.model.published_slow:
            if (formula := resolved.model.published_bound()) is not None:
                record["published"] = formula
        else:
            note("the formula of the network's own paper takes minutes: --published evaluates it")
    record["seconds"] = seconds
    return record


def _answer(claimed: float, upper: float, lower: LowerBound | None) -> str:
    if lower is not None and lower.value > claimed:
        return "refuted"
    return "proved" if upper <= claimed else "open"


def _facts(record: dict[str, Any]) -> dict[str, str]:
    claim = {} if record["claim"] is None else {key: str(value) for key, value in record["claim"].items()}
    return {
        "lipcert": record["lipcert"],
        "model": record["model"],
        "weights_sha256": record["weights_sha256"],
        "norm": record["norm"],
        "quotient": repr(record["lower"]),
        "rounding": "proved" if record["lower_proved"] else "allowed for, not proved",
        **claim,
    }


def _pair_file(output: Path | None, json_file: str | None, html_file: str | None, run: Path | None) -> Path | None:
    """Return where the pair goes: where the user says, else beside the first file that is written, else nowhere."""
    if output is not None:
        return output
    if run is not None:
        return run / "bound_pair.safetensors"
    beside = next((Path(file) for file in (json_file, html_file) if file not in (None, "-")), None)
    return None if beside is None else beside.with_name(beside.stem + "_pair.safetensors")


def _estimate(metrics: Path) -> float | None:
    """Return the last estimate of the features' constant that training logged, if there is one."""
    if not metrics.is_file():
        return None
    with open(metrics, newline="") as file:
        values = [row.get("lipschitz_estimate") for row in csv.DictReader(file)]
    return float(values[-1]) if values and values[-1] else None


def _lines(record: dict[str, Any]) -> Iterator[str]:
    """Yield the table of the audit, the bracket, and what else there is to say."""
    from lipcert.report import audit_text, wording

    yield from audit_text.lines(record)
    if record["lower"] is not None:
        how = "" if record["lower_proved"] else " (rounding allowed for, not proved)"
        yield f"lower bound, attained by two inputs: {wording.lower(record['lower'], 8)}{how}"
    if (claim := record["claim"]) is not None:
        bracket = f"at least {_exact(record['lower'])}, at most {_exact(record['upper'])}"
        yield f"claim {claim['claimed']!r}: {claim['answer']} ({bracket})"
    if record.get("estimate") is not None:
        proved = "none" if record["features"] is None else wording.upper(record["features"], 6)
        yield f"features before the head: estimate while training {record['estimate']:.6g}, proved bound {proved}"
    if "published" in record:
        yield from _published(record)


def _published(record: dict[str, Any]) -> Iterator[str]:
    """Yield what a paper's formula says beside what is proved of the same: features, or logits without a head."""
    from lipcert.report import wording

    published = record["published"]
    of = "logits" if record["features"] is None else "features before the head"
    proved = record["upper"] if record["features"] is None else record["features"]
    yield f"published formula of the {of}: {wording.significant(published['value'])} ({published['formula']})"
    if "refined" in published:
        yield f"  with its later refinement: {wording.significant(published['refined'])}"
    part = float(proved) / published["value"]
    times = f", which is {wording.significant(part, 3)} times the published value" if part > 0 else ""
    yield f"  proved: {wording.upper(proved)}{times}"


def _targets(json_file: str | None, run: Path | None) -> list[str]:
    targets = [] if json_file is None else [json_file]
    return targets if run is None else [*targets, str(run / "bound.json")]


def _exact(value: float | str | None) -> str:
    return "what was not searched for" if value is None else str(value)


def _judge(record: dict[str, Any], upper: Bound, lower: LowerBound | None, require_finite: bool) -> None:
    if lower is not None and lower.value > upper.value:
        raise Finding(f"the lower bound {lower.value!r} is above the upper bound {upper.value!r}; please report this")
    claim = record["claim"]
    if lower is not None and claim is not None and claim["answer"] == "refuted":
        where = record["lower_witness"].get("file")
        pair = f"the pair of inputs in {where}" if where else "a pair of inputs (keep it with -o FILE)"
        how = "" if lower.proved else ", less 1e-12 of the outputs for rounding, which is not proved"
        raise Finding(f"the claimed constant {claim['claimed']!r} is refuted: {pair} attains {lower.value!r}{how}")
    if require_finite and not upper.finite:
        raise Finding("there is no finite bound; the table names the operators that have none")
