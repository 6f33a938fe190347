"""Tables of latency and importance: their files, their problems, and how they are joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graphfold.errors import MeasuresError, OutputError
from graphfold.measures import (
    ImportanceHeader,
    ImportanceRow,
    ImportanceTable,
    LatencyHeader,
    LatencyRow,
    LatencyTable,
    check_names,
    join,
    read_importance,
    read_latency,
    write_table,
)
from graphfold.plan import ModelReference


def latencies(*rows: LatencyRow, **fields: Any) -> LatencyTable:
    header = LatencyHeader(created_by="a test", threads=1, batch=1, dtype="float32")
    return LatencyTable(header=header, rows=rows, **fields)


def importances(*rows: ImportanceRow, **fields: Any) -> ImportanceTable:
    return ImportanceTable(header=ImportanceHeader(created_by="a test"), rows=rows, **fields)


def full_table() -> LatencyTable:
    header = LatencyHeader(
        created_by="a test",
        created="2026-01-31",
        model=ModelReference(name="m.onnx", sha256="ab" * 32),
        device="desk",
        processor="some CPU",
        runtime="onnxruntime 1.22",
        provider="CPUExecutionProvider",
        threads=2,
        batch=1,
        dtype="float32",
    )
    rows = (
        LatencyRow(input="a", output="b", unchanged=True, value=0.1 + 0.2, spread=0.01),
        LatencyRow(
            input="a",
            output="c",
            kernel=(5, 3),
            stride=(1, 2),
            family="dense",
            removed_convs=("c1",),
            removed_activations=(),
            start_active=True,
            end_active=False,
            value=1e-3,
        ),
    )
    return LatencyTable(header=header, rest=0.7, rows=rows)


def test_a_table_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    write_table(full_table(), path)
    assert read_latency(path) == full_table()
    table = importances(ImportanceRow(input="a", output="b", value=-0.1), no_change=0.0)
    write_table(table, path)
    assert read_importance(path) == table
    # One row is one line, so that two machines' tables can be compared as text.
    assert (
        path.read_text().splitlines().count('  {"input": "a", "output": "b", "value": -0.1}') == 1
    )


def test_the_digest_is_of_the_content() -> None:
    table = full_table()
    assert table.digest == full_table().digest
    assert table.digest != table.model_copy(update={"rest": 0.8}).digest


def test_a_table_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no folder"):
        write_table(full_table(), tmp_path / "none" / "latency.json")


def problems(path: Path, content: Any, read: Any = read_latency) -> dict[str, str]:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(MeasuresError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2
    return {problem.path: str(problem) for problem in caught.value.problems}


def test_all_problems_come_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    content = json.loads(full_table().model_dump_json())
    content["header"]["treads"] = 4
    content["header"]["threads"] = 0
    content["header"]["model"]["sha265"] = "x"
    content["rows"][0]["valeu"] = content["rows"][0].pop("value")
    content["rows"][1]["family"] = "dence"
    content["rows"][1]["kernel"] = [0, 3]
    content["rows"][1]["spread"] = -1
    content["rest"] = "much"
    found = problems(tmp_path / "t.json", content)
    assert found["header.treads"] == "header.treads: unknown key (did you mean 'threads'?)"
    assert "(did you mean 'sha256'?)" in found["header.model.sha265"]
    assert found["rows[0].value"] == "rows[0].value: is required"
    assert "(did you mean 'value'?)" in found["rows[0].valeu"]
    assert found["rows[1].family"].endswith("'dence' is not valid (did you mean 'dense'?)")
    assert set(found) >= {"header.threads", "rows[1].kernel[0]", "rows[1].spread", "rest"}
    assert len(found) == 9


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        ({"graphfold_table": 2}, "graphfold_table", "version 2 is not supported"),
        ({"graphfold_table": None}, "graphfold_table", "is required"),
        ({"measures": "latancy"}, "measures", "did you mean 'latency'?"),
        ({"measures": None}, "measures", "latency or importance"),
        ({"measures": "importance"}, "rows[0].spread", "unknown key"),
    ],
)
def test_a_file_of_another_kind(
    tmp_path: Path, change: dict[str, Any], path: str, message: str
) -> None:
    content = json.loads(full_table().model_dump_json(exclude_none=True)) | change
    content = {key: value for key, value in content.items() if value is not None}
    assert message in problems(tmp_path / "t.json", content)[path]


def test_an_importance_table_is_no_latency_table(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    write_table(importances(), path)
    with pytest.raises(MeasuresError, match="is a table of importance, not of latency"):
        read_latency(path)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    assert "not JSON" in problems(path, "{")["table"]
    assert "rows[1].value" in problems(path, '{"graphfold_table": 1, "measures": "latency", '
        '"header": {"created_by": "x"}, "rows": [{"input": "a", "output": "b", "value": 1}, '
        '{"input": "a", "output": "c", "value": NaN}]}')  # fmt: skip
    with pytest.raises(MeasuresError, match="no such file"):
        read_latency(tmp_path / "none.json")
    with pytest.raises(MeasuresError, match="cannot be read"):
        read_importance(tmp_path)


def test_a_key_stands_once(tmp_path: Path) -> None:
    row = LatencyRow(input="a", output="b", removed_convs=("c", "d"), value=1.0)
    again = row.model_copy(update={"removed_convs": ("d", "c"), "value": 2.0})
    write_table(latencies(row, again), tmp_path / "t.json")
    with pytest.raises(MeasuresError, match=r"rows\[1\]: repeats the key of rows\[0\]"):
        read_latency(tmp_path / "t.json")


def test_unknown_tensors_are_named_with_the_nearest(tmp_path: Path) -> None:
    table = latencies(
        LatencyRow(input="conv1", output="conv2", value=1.0),
        LatencyRow(input="conv1", output="covn3", removed_convs=("conv_2",), value=1.0),
    )
    with pytest.raises(MeasuresError) as caught:
        check_names(table, ["conv1", "conv2", "conv3"])
    assert [str(problem) for problem in caught.value.problems] == [
        "rows[1].output: the model has no tensor 'covn3' (did you mean 'conv3'?)",
        "rows[1].removed_convs[0]: the model has no tensor 'conv_2' (did you mean 'conv2'?)",
    ]
    check_names(table, ["conv1", "conv2", "covn3", "conv_2"])


# --- joining ----------------------------------------------------------------------------------


def test_rows_are_joined_by_key_whatever_their_order() -> None:
    times = [
        LatencyRow(input="a", output="c", kernel=(k, k), family="dense", value=float(k))
        for k in (1, 3, 5)
    ]
    worths = [
        ImportanceRow(
            input="a", output="c", kernel=(k, k), family="dense", removed_convs=(), value=-k / 10
        )
        for k in (5, 1, 3)
    ]
    found = join(latencies(*times), importances(*worths))
    assert [(c.row.kernel, c.latency, c.importance) for c in found] == [
        ((5, 5), 5.0, -0.5), ((1, 1), 1.0, -0.1), ((3, 3), 3.0, -0.3)
    ]  # fmt: skip
    assert all(candidate.row.removed_convs == () for candidate in found)


def test_what_a_row_does_not_state_fits_anything() -> None:
    # Depth: one latency, four states.
    time = LatencyRow(input="a", output="c", value=2.0)
    states = [
        ImportanceRow(input="a", output="c", start_active=a, end_active=b, value=float(a + b))
        for a in (False, True)
        for b in (False, True)
    ]
    found = join(latencies(time), importances(*states))
    assert {(c.row.start_active, c.row.end_active, c.latency) for c in found} == {
        (a, b, 2.0) for a in (False, True) for b in (False, True)
    }


def test_the_latency_with_most_in_common_is_taken() -> None:
    general = LatencyRow(input="a", output="c", value=1.0)
    special = LatencyRow(input="a", output="c", end_active=True, value=2.0)
    on = ImportanceRow(input="a", output="c", end_active=True, value=0.0)
    off = ImportanceRow(input="a", output="c", end_active=False, value=0.0)
    found = join(latencies(general, special), importances(on, off))
    assert [candidate.latency for candidate in found] == [2.0, 1.0]


def test_every_row_without_its_other_half_is_named() -> None:
    times = latencies(
        LatencyRow(input="a", output="b", unchanged=True, value=1.0),
        LatencyRow(input="a", output="c", kernel=(3, 3), value=1.0),
        LatencyRow(input="b", output="d", kernel=(3, 3), value=1.0),
        LatencyRow(input="b", output="d", kernel=(5, 5), value=1.0),
    )
    worths = importances(
        ImportanceRow(input="a", output="c", kernel=(5, 5), value=0.0),
        ImportanceRow(input="b", output="d", value=0.0),
    )
    with pytest.raises(MeasuresError) as caught:
        join(times, worths)
    assert [str(problem) for problem in caught.value.problems] == [
        "importance rows[0]: has no latency: 'a' to 'c', kernel 5x5",
        "importance rows[1]: fits latency rows[2] and rows[3] alike: 'b' to 'd'",
        "latency rows[0]: has no importance: 'a' to 'b'",
        "latency rows[1]: has no importance: 'a' to 'c', kernel 3x3",
        "latency rows[2]: has no importance: 'b' to 'd', kernel 3x3",
        "latency rows[3]: has no importance: 'b' to 'd', kernel 5x5",
    ]


def test_no_change_is_worth_what_the_table_says() -> None:
    times = latencies(LatencyRow(input="a", output="b", unchanged=True, value=1.5))
    (found,) = join(times, importances(no_change=1.0))
    assert (found.latency, found.importance, found.row.unchanged) == (1.5, 1.0, True)


def test_tables_of_different_models_are_not_joined() -> None:
    def header(kind: Any, digest: str) -> Any:
        return kind(created_by="a test", model=ModelReference(sha256=digest))

    times = LatencyTable(header=header(LatencyHeader, "aa"), rows=())
    same = ImportanceTable(header=header(ImportanceHeader, "aa"), rows=())
    other = ImportanceTable(header=header(ImportanceHeader, "bb"), rows=())
    assert join(times, same) == ()
    with pytest.raises(MeasuresError, match="made for different models"):
        join(times, other)


def test_the_documented_table_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "planning.md").read_text()
    path = tmp_path / "t.json"
    path.write_text(text.split("```json\n")[1].split("```")[0])
    table = read_latency(path)
    assert [row.value for row in table.rows] == [1.25, 0.91]
    listed = text.split("| field of a row | |")[1].split("\n\n")[0]
    fields = {name for name in LatencyRow.model_fields if name != "splits"}
    assert {name for name in fields if f"`{name}`" in listed} == fields
