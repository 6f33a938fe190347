"""Reports and inspections: the JSON contract, the tables, the page."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import json

import pytest
import small_models as small
from rich.console import Console

from graphfold import tables
from graphfold.graph import Graph
from graphfold.inspection import build_inspection
from graphfold.model import load
from graphfold.report import build_report, print_report, skipped_table, snapshot
from graphfold.rewrite import Fold, PassStatistics, Skip
from graphfold.verifier import verify

CONTRACT = {
    "model", "output", "plan", "nodes", "ops", "params", "macs", "folds", "skipped",
    "verification", "seconds",
}  # fmt: skip
FOLD = {
    "output", "replaces", "kernel", "boundary", "bound", "max_error", "interior_max", "border_max"
}  # fmt: skip


def a_fold(output: str = "y", **changes) -> Fold:
    found = Fold(
        output=output,
        replaces=("first", "second"),
        kernel=(3, 3),
        strides=(1, 1),
        groups=1,
        boundary="exact",
        repair="bias map",
        reach=((1, 1), (1, 1)),
        pass_name="merge_convs",
        segment="$.segments[0]",
    )
    return dataclasses.replace(found, **changes)


def a_report(*, verified: bool = True, **options):
    before, after = small.pointwise_then_padded(), small.pointwise_then_padded(merged=True)
    folds = [a_fold()]
    found = verify(load(before), load(after), folds=folds) if verified else None
    statistics = PassStatistics("merge_convs", found=3, applied=1, folds=folds, seconds=0.1)
    return build_report(
        load(before),
        Graph(load(after)),
        folds,
        [Skip("a", "it has 2 readers", "merge_convs")],
        [statistics],
        found,
        {"fold": 0.1},
        **{"model": "in.onnx", "output": "out.onnx", "version": "1.2.3", **options},
    )


def printed(report) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=200))
    return stream.getvalue()


def test_the_json_document_has_the_keys_of_the_contract():
    found = a_report(plan="plan.json", plan_digest="abc").to_json()
    assert set(found) >= CONTRACT
    assert set(found["folds"][0]) >= FOLD
    assert found["nodes"] == {"before": 2, "after": 1}
    assert found["ops"] == {"Conv": [2, 1]}
    assert found["skipped"][0]["site"] == "a"
    assert found["skipped"][0]["reason"] == "it has 2 readers"
    assert set(found["verification"]) >= {"max_abs", "max_rel", "tolerance", "inputs"}
    json.dumps(found, allow_nan=False)


def test_errors_of_a_fold_are_told_apart_by_interior_and_border():
    (fold,) = a_report().to_json()["folds"]
    assert fold["interior_max"] < 1e-5 < fold["border_max"]
    assert fold["max_error"] == fold["border_max"]


def test_without_a_verification_there_is_a_reason():
    found = a_report(verified=False).to_json()
    assert found["verification"] is None
    assert found["reason"]


def test_a_model_that_cannot_be_run_is_reported_with_the_reason():
    custom = small.custom_operator()
    found = verify(load(custom), load(custom))
    report = build_report(load(custom), load(custom), [], [], [], found, {})
    document = report.to_json()
    assert document["verification"] is None
    assert "Unheard" in document["reason"]
    assert printed(report)


def test_the_tables_show_what_changed():
    text = printed(a_report())
    for expected in (
        "Conv",
        "MACs",
        "parameters",
        "peak activations",
        "3x3",
        "bias map",
        "-50.0 %",
    ):
        assert expected in text


def test_reasons_that_differ_only_in_numbers_are_one_row():
    skips = [Skip(f"site{i}", f"it maps 3 to {i} channels", "p") for i in range(5)]
    skips.append(Skip("other", "it is the last", "p"))
    table = skipped_table(skips)
    assert len(table.rows) == 2
    assert table.rows[0][0].startswith("it maps 3 to 0 channels (and alike)")
    assert table.rows[0][3] == "5"
    assert "2 more" in table.rows[0][2]


def test_equal_reasons_are_not_called_alike():
    table = skipped_table([Skip("a", "it maps 3 to 4", "p"), Skip("b", "it maps 3 to 4", "p")])
    assert table.rows[0][0] == "it maps 3 to 4"


def test_names_with_brackets_are_no_markup():
    report = dataclasses.replace(a_report(verified=False), folds=(a_fold("[bold]x[/nope]"),))
    assert "[bold]x[/nope]" in printed(report)


def test_a_conv_that_stands_for_one_normalised_conv_counts_as_normalised():
    before = small.conv_bn_relu()
    after = small.conv_bn_relu()
    fold = a_fold("bn", replaces=("conv", "bn"))
    report = build_report(load(before), load(after), [fold], [], [], None, {})
    assert report.to_json()["macs_fvcore"]["before"] == report.to_json()["macs_fvcore"]["after"]


def test_folded_nodes_count_in_the_block_that_they_stand_in():
    before, after = small.pointwise_then_padded(), small.pointwise_then_padded(merged=True)
    report = build_report(load(before), load(after), [a_fold()], [], [], None, {})
    macs = [change.macs for change in report.block_changes]
    assert sum(pair[0] for pair in macs) == report.before.cost.macs
    assert sum(pair[1] for pair in macs) == report.after.cost.macs


def test_a_snapshot_survives_changes_of_the_graph():
    model = load(small.conv_bn_relu())
    taken = snapshot(model)
    model.ir.graph.remove(list(model.ir.graph)[-1], safe=False)
    assert taken.nodes == 6
    assert taken.activations == 1


# The page -------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order, and collects what would be loaded."""

    VOID = frozenset({"meta", "br", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.loaded: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loaded += [value for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_well_formed_and_loads_nothing():
    text = a_report().to_html()
    page = Page()
    page.feed(text.replace("<!doctype html>", ""))
    assert page.open == []
    assert page.loaded == []
    assert {"svg", "table", "style"} <= page.tags
    assert "script" not in page.tags
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_has_the_figures_of_the_tables():
    report = a_report()
    text = report.to_html()
    for table in report.tables():
        for row in table.rows:
            assert all(cell is None or cell in text for cell in row if cell and "'" not in cell)


def test_the_page_escapes_names():
    report = dataclasses.replace(
        a_report(verified=False), model="<script>alert(1)</script>", warnings=("<b>",)
    )
    text = report.to_html()
    assert "<script>" not in text
    assert "<b>" not in text


def test_the_page_follows_the_readers_colour_scheme():
    assert "prefers-color-scheme: dark" in a_report().to_html()


# Inspection -----------------------------------------------------------------------------------


def test_an_inspection_names_interface_sites_blocks_and_costs():
    found = build_inspection(Graph(load(small.conv_bn_relu())), model="m.onnx")
    document = found.to_json()
    assert document["inputs"] == [{"name": "x", "type": "float", "shape": "[N, 3, 8, 8]"}]
    assert [site["output"] for site in document["activations"]] == ["relu"]
    assert [site["output"] for site in document["convs"]] == ["conv"]
    assert sum(block["nodes"] for block in document["blocks"]) == 6
    assert sum(block["macs"] for block in document["blocks"]) == document["macs"]
    block = document["blocks"][0]
    keys = {"macs", "params", "weight_bytes", "peak_activation_bytes", "traffic_bytes"}
    assert keys <= set(block)
    json.dumps(document, allow_nan=False)


def test_an_inspection_counts_activations_per_block():
    found = build_inspection(Graph(load(small.conv_bn_relu())))
    assert sum(block.activations for block in found.blocks) == 1
    assert sum(block.convs for block in found.blocks) == 1


def test_what_would_fold_is_told_where_it_was_tried():
    graph = Graph(load(small.conv_bn_relu()))
    assert build_inspection(graph).to_json()["folds"] is None
    found = build_inspection(graph, folds=[a_fold()], skipped=[Skip("a", "why", "p")])
    assert found.to_json()["folds"][0]["output"] == "y"
    assert [table.title for table in found.tables()][-2:] == [
        "Folds without a plan (1)",
        "Left as it is (1)",
    ]


def test_unknown_sizes_are_explained_under_the_totals():
    from onnx import helper

    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    model = small.build(nodes, {"x": ["N", 3, "H", "W"]}, ["y"], {"w": small.weight(4, 3, 1, 1)})
    found = build_inspection(Graph(load(model)))
    notes = [table.note for table in found.tables() if table.note]
    assert any("--input-shape" in note for note in notes)
    known = build_inspection(Graph(load(model)), input_shapes={"x": (1, 3, 8, 8)})
    assert known.cost.macs == 64 * 12


# Writing numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, None), (0, "0"), (12_345, "12,345"), (300_774_272, "300.8 M"), (6.3e9, "6.30 G")],
)
def test_counts(value, text):
    assert tables.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, None), (512, "512 B"), (14_243_154, "13.6 MiB"), (2**31, "2.00 GiB")]
)
def test_sizes(value, text):
    assert tables.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, None), (0.0, "0"), (1.234e-6, "1.2e-06"), (float("inf"), "inf")],
)
def test_errors(value, text):
    assert tables.error(value) == text


def test_changes():
    assert tables.change(200, 100) == "-50.0 %"
    assert tables.change(0, 100) is None
    assert tables.change(100, 100) is None
    assert tables.change(None, 100) is None
