"""The page and the text of an audit: shares follow the path that decides the bound, advice names what made it large."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from lipcert.bounds import audit
from lipcert.export import export
from lipcert.registry import create_model
from lipcert.report import audit_figure, audit_page, audit_text
from lipcert.report.advice import COUNTERPARTS, advice
from lipcert.report.shares import path, shares


def row(name: str, op: str, upper: float | str, cumulative: float | str, note: str = "") -> dict[str, Any]:
    return {
        "name": name, "op": op, "shape": [4, 8, 8], "upper": upper, "lower": None, "method": "slope",
        "cumulative": cumulative, "note": note,
    }  # fmt: skip


BRANCHES = [  # x -> 4x -> (relu -> 0.5) + (relu -> 3 -> gelu 1.129): the second branch decides
    row("stem", "affine: conv2d+batch_norm", 4.0, 4.0),
    row("small", "affine: conv2d", 0.5, 2.0),
    row("large", "affine: conv2d", 3.0, 12.0),
    row("act", "gelu", 1.129, 12.0 * 1.129),
    row("sum", "add", (12.0 * 1.129 + 2.0) / (12.0 * 1.129), 12.0 * 1.129 + 2.0, "sum of branches 1·13.5 + 1·2"),
]


def record(layers: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "lipcert": "0.1.0", "model": "file.py:build", "weights_sha256": "ab" * 32, "norm": "l2",
        "input": {"shape": [3, 8, 8], "domain": [0.0, 1.0]}, "upper": layers[-1]["cumulative"] if layers else 1.0,
        "lower": 0.5, "lower_proved": True, "lower_witness": {"file": "pair.safetensors"}, "claim": None,
        "seconds": 1.5, "layers": layers, "unbounded": [], **more,
    }  # fmt: skip


def test_shares_follow_the_branch_that_decides() -> None:
    assert path(BRANCHES) == [0, 2, 3, 4]
    found = shares(BRANCHES)
    assert found[1].part is None and found[1].log10 == pytest.approx(math.log10(0.5))
    on_path = [found[i] for i in path(BRANCHES)]
    assert sum(share.log10 or 0 for share in on_path) == pytest.approx(math.log10(BRANCHES[-1]["cumulative"]))
    assert sum(share.part or 0 for share in on_path) == pytest.approx(1.0)
    assert found[0].part == pytest.approx(math.log(4) / math.log(12 * 1.129 + 2))


def test_shares_of_what_shrinks_or_has_no_bound() -> None:
    shrinking = [row("a", "affine: linear", 8.0, 8.0), row("b", "affine: avg_pool2d", 0.25, 2.0)]
    assert [share.part for share in shares(shrinking)] == pytest.approx([1.0, -2 / 3])
    endless = [row("a", "relu", 2.0, 2.0), row("b", "mul", "inf", "inf")]
    assert path(endless) == [] and [share.part for share in shares(endless)] == [None, None]
    assert [share.log10 for share in shares(endless)] == [pytest.approx(math.log10(2)), None]
    assert shares([]) == [] and path([row("zero", "mul", 0.0, 0.0)]) == []
    flat = [row("a", "relu", 1.0, 1.0)]
    assert shares(flat)[0].part is None and path(flat) == [0]


def test_advice_names_the_layers_in_the_order_of_their_growth() -> None:
    found = advice(BRANCHES, [])
    titles = [entry.counterpart.title for entry in found]
    assert titles[0].startswith("Batch normalisation") and titles[1].startswith("Linear layers")
    assert found[0].names == ("stem",) and found[1].names == ("large",)
    assert sum(entry.part or 0 for entry in found) <= 1.0 + 1e-12
    assert all("small" not in entry.names for entry in found)


@pytest.mark.parametrize(
    ("op", "upper", "counterpart"),
    [
        ("layer_norm", 316.3, "CenterNorm"),
        ("attention", 90.0, "scaled cosine similarity attention"),
        ("scaled_dot_product_attention", 90.0, "scaled cosine similarity attention"),
        ("gelu", 1.129, "MaxMin"),
        ("max_pool2d", 2.0, "L2Pool2d"),
        ("mul", 30.0, "no gate"),
        ("add", 1.9, "LiResConv"),
    ],
)
def test_each_operator_has_its_counterpart(op: str, upper: float, counterpart: str) -> None:
    (entry,) = advice([row("layer", op, upper, upper)], [])
    assert counterpart in entry.counterpart.instead and entry.part == pytest.approx(1.0)
    assert advice([row("layer", op, 1.0, 1.0)], []) == []  # nothing to say where nothing grows


def test_products_with_constants_are_no_gates() -> None:
    (entry,) = advice([row("layer", "affine: mul+add+conv2d", 3.0, 3.0)], [])
    assert entry.counterpart.title.startswith("Linear layers")
    assert advice([row("layer", "affine: mul+add", 3.0, 3.0)], []) == []


HALVES = "cat of slice×2+conv2d+linear+slice×3+normalize×{}+scaled_dot_product_attention+mul×2+add"


@pytest.mark.parametrize(("count", "advised"), [(3, False), (2, True), (0, True)])
def test_attention_with_normalised_rows_is_not_told_to_normalise_them(count: int, advised: bool) -> None:
    """Queries, keys and values are three; SwinV2 normalises two. In rows of their own, or inside a joined part."""
    rows = [row("stage.attn", "normalize", 1.0, 1.0) for _ in range(count)]
    for layers in (
        [*rows, row("stage.attn", "attention", 5.0, 5.0)],
        [row("stem", HALVES.format(count).replace("normalize×0+", ""), 5.0, 5.0)],
    ):
        found = advice(layers, [])
        assert advised == any("cosine" in entry.counterpart.instead for entry in found)


def test_joining_parts_costs_nothing() -> None:
    """What a joined row costs is the steepest part's, here of its linear layers, and not that of a residual sum."""
    (entry,) = advice([row("stem", HALVES.format(3), 5.0, 5.0)], [])
    assert entry.counterpart.title.startswith("Linear layers")
    assert advice([row("stem", "cat of slice×2+maxmin", 1.5, 1.5)], []) == []


def test_networks_with_cosine_attention_are_not_advised_to_have_it() -> None:
    torch.manual_seed(0)
    sizes = dict(num_classes=3, img_size=32, height=16, in_chans=3, embed_dim=12, depths=(1, 1), num_heads=2)
    for mixer in ("window", "reduced"):
        for decoder in ("split", "mlp"):
            model = create_model("lipsegformer_tiny", **sizes, mixers=("shift", mixer), decoder=decoder, decoder_dim=12)
            layers = audit(export(model.eval()), (3, 16, 32)).to_json()["layers"]
            assert any("attention" in layer["op"] for layer in layers)
            assert not any("cosine" in entry.counterpart.instead for entry in advice(layers, []))


def test_counterparts_exist() -> None:
    import lipcert.layers

    for entry in COUNTERPARTS:
        for name in re.findall(r"lipcert\.layers\.(\w+)", entry.instead):
            assert hasattr(lipcert.layers, name), name


def test_what_has_no_bound_comes_first() -> None:
    unbounded = [{"name": "attn", "op": "scaled_dot_product_attention", "reason": "no range (a.py:3)"}]
    layers = [*BRANCHES, row("attn", "scaled_dot_product_attention", "inf", "inf")]
    found = advice(layers, unbounded)
    assert found[0].part is None and found[0].names == ("attn",)
    text = list(audit_text.lines(record(layers, unbounded=unbounded)))
    assert "no bound: attn (scaled_dot_product_attention): no range (a.py:3)" in text
    assert text[-1] == "Lipschitz constant (l2, image to outputs): at most no finite bound"


def test_text_rounds_upwards() -> None:
    text = list(audit_text.lines(record([row("a", "affine: linear", 1.00000012, 1.00000012)])))
    assert text[0].split() == ["layer", "operators", "shape", "bound", "log10", "share", "up", "to", "here", "method"]
    assert "1.00001" in text[1] and text[-1].endswith("at most 1.0000002")


class Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def parsed(html: str) -> tuple[str, Text]:
    page = Text()
    page.feed(html)
    page.close()
    assert page.open == []
    return " ".join(" ".join(page.text).split()), page


def test_the_page_is_complete_and_fetches_nothing() -> None:
    claim = {"claimed": 0.25, "answer": "refuted"}
    html = audit_page.build(record(BRANCHES, claim=claim))
    text, page = parsed(html)
    assert "The claimed constant 0.25 is refuted: a pair of inputs attains 0.5" in text
    assert "rounding of the outputs proved" in text and 'load_file("pair.safetensors")' in text
    assert "Rows without a share lie on other branches" in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 1
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base") and "src" not in attributes
    addresses = set(re.findall(r"https?://[^\"' <]*", html))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert audit_page.build(record(BRANCHES, claim=claim)) == html


def test_everything_on_the_page_is_escaped() -> None:
    evil = "<script>alert(1)</script>\"'&"
    layers = [{**entry, "name": evil, "op": evil, "method": evil, "note": evil} for entry in BRANCHES]
    made = record(layers, model=evil, unbounded=[{"name": evil, "op": evil, "reason": evil}])
    text, page = parsed(audit_page.build({**made, "lower_witness": {"file": evil}}))
    assert sum(tag == "script" for tag, _ in page.tags) == 1 and text.count(evil) > 8


def test_a_lower_bound_above_the_upper_one_and_no_bound_are_said() -> None:
    text, _ = parsed(audit_page.build(record(BRANCHES, lower=100.0)))
    assert "A pair of inputs attains 100.0, above the bound" in text
    endless = record([row("root", "sqrt", "inf", "inf")], lower=None, lower_proved=None, lower_witness=None)
    endless["unbounded"] = [{"name": "root", "op": "sqrt", "reason": "steep at zero (net.py:5)"}]
    text, page = parsed(audit_page.build(endless))
    assert "no finite bound is known" in text and "steep at zero (net.py:5)" in text and "Attained" not in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 0


def test_a_model_without_rows_has_a_page() -> None:
    text, _ = parsed(audit_page.build(record([])))
    assert "There are no rows" in text


def test_the_figure_draws_the_deciding_rows_and_the_others_apart() -> None:
    figure = audit_figure.through_depth(BRANCHES, 0.5, math.nan)
    assert figure is not None
    lines = {str(line.get_label()): line for line in figure.axes[0].get_lines()}
    assert list(lines["other branches"].get_ydata()) == [2.0]
    assert list(lines["bound up to here, along the path that decides it"].get_xdata()) == [0, 1, 3, 4, 5]
    assert "attained by two inputs" in lines and "claimed" not in lines
    endless = [*BRANCHES, row("attn", "mul", "inf", "inf")]
    figure = audit_figure.through_depth(endless, math.nan, 3.0)
    assert figure is not None
    labels = [str(line.get_label()) for line in figure.axes[0].get_lines()]
    assert "first row without a finite bound" in labels and "claimed" in labels
    assert audit_figure.through_depth(BRANCHES[:1], 0.5, 1.0) is None


def test_bounds_above_the_largest_float_are_numbers_and_not_missing_bounds() -> None:
    layers = [row("a", "mul", "1.0e+400", "1.0e+400"), row("b", "mul", 100.0, "1.0e+402")]
    huge = record(layers, position="2.00001e+401")
    assert path(layers) == [0, 1] and sum(share.part or 0 for share in shares(layers)) == pytest.approx(1.0)
    text = "\n".join(audit_text.lines(huge))
    assert "at most 1.0000000e+402" in text and "one position: at most 2.0000100e+401" in text
    assert "no finite bound" not in text and "∞" not in text
    page = audit_page.build(huge)
    assert "10^400.0" in page and "10^402.0" in page and "2.001e+401" in page
    assert "∞" not in page and "no finite bound is known" not in page
