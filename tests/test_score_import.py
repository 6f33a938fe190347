"""Published importance tables for a model at hand, and `graphfold score --import`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

import onnx
import pytest
from fake_timer import faked, network

from graphfold import planner
from graphfold.calibration.planning import make_plan
from graphfold.candidates import Candidates, find_candidates
from graphfold.cli import main
from graphfold.drops import is_drop
from graphfold.errors import MeasuresError, UsageError
from graphfold.graph import Graph
from graphfold.measures import read_importance
from graphfold.model import load
from graphfold.published_segments import import_importance
from graphfold.segments import main_path_convs
from graphfold.shared_choices import shared_choices

TABLES = Path(__file__).parent / "data" / "published_tables"
COLUMNS = ("id", "st", "end", "ker", "str", "is_dw", "conv_comb", "val_loss", "val_acc")


def found() -> Candidates:
    return find_candidates(Graph(load(network())))


def layer_merge_rows(first: int) -> Iterable[tuple[object, ...]]:
    """A row for every choice of the network, as LayerMerge writes it."""
    candidates = found()
    convs = [site.name for site in main_path_convs(candidates.graph, candidates.sites)]
    for number, each in enumerate(candidates.found):
        numbers = sorted(convs.index(site.name) + first for site in each.convs)
        for choice in each.choices:
            kept = [at for at in numbers if convs[at - first] not in choice.removed_convs]
            identity = choice.family == "identity"
            yield (
                *(number, numbers[0] - 1, numbers[-1]),
                *(0 if identity else choice.kernel[0], choice.stride[0]),
                *(int(choice.family == "depthwise"), str(tuple(kept)), 2.0),
                71.0 if len(each.convs) == 1 and kept else 70.0 - len(each.convs) / 10,
            )


def written(path: Path, rows: Iterable[tuple[object, ...]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return written(tmp_path / "importance.csv", layer_merge_rows(1))


def test_an_imported_table_joins_the_models_latencies(table: Path) -> None:
    imported = import_importance(table, load(network()), baseline=71.0)
    assert imported.score == "exp-accuracy"
    assert imported.first == 1
    assert imported.covered == (len(found().found),) * 2
    planning = planner.prepare(load(network()), faked().table, imported.table)
    points = planning.points()
    assert len(points) > 1
    assert max(point.speedup for point in points) > 1.0
    # Nothing changed: one term for each convolution, none for the Add.
    assert points[-1].importance == pytest.approx(6.0)


def test_choices_that_a_table_lacks_cannot_be_made(tmp_path: Path) -> None:
    """A published table without the stem still plans the rest."""
    rows = [row for row in layer_merge_rows(1) if row[1] != 0]
    imported = import_importance(
        written(tmp_path / "i.csv", rows), load(network()), baseline=71.0
    ).table
    latencies = faked().table
    fewer = latencies.model_copy(update={"rows": latencies.rows[:-1]})
    with pytest.raises(MeasuresError):
        planner.prepare(load(network()), fewer, imported)
    timed, worth, warning = shared_choices(fewer, imported)
    assert warning is not None
    found = make_plan(load(network()), latency=fewer, importance=imported, frontier=True)
    assert found.warnings == (warning,)
    pairs = {(row.input, row.output) for row in worth.rows if not row.unchanged}
    merges = [
        row
        for row in timed.rows
        if not row.unchanged and not is_drop(row) and row.input != row.output
    ]
    assert pairs == {(row.input, row.output) for row in merges}
    assert "x" not in {row.input for row in merges}
    assert [row for row in timed.rows if row.unchanged] == [
        row for row in latencies.rows if row.unchanged
    ]


def test_tables_of_other_models_must_fit_whole(table: Path) -> None:
    latencies = faked().table
    imported = import_importance(table, load(network()), baseline=71.0).table
    whole = shared_choices(latencies, imported)
    assert whole == (latencies, imported, None)
    other = imported.header.model_copy(update={"model": None})
    fewer = imported.model_copy(update={"header": other, "rows": imported.rows[:-1]})
    assert shared_choices(latencies, fewer) == (latencies, fewer, None)
    few = imported.model_copy(update={"rows": imported.rows[:2]})
    assert shared_choices(latencies, few) == (latencies, few, None)


def test_rows_name_the_models_tensors(table: Path) -> None:
    candidates = found()
    imported = import_importance(table, load(network()), baseline=71.0).table
    ends = {(each.input.name, each.output.name) for each in candidates.found}
    joins = {(row.input, row.output) for row in imported.rows} - ends
    assert len(joins) == 1  # the Add
    merged = [row for row in imported.rows if not row.unchanged and row.removed_convs]
    names = {site.name for site in candidates.sites.convs}
    assert merged
    assert all(set(row.removed_convs or ()) < names for row in merged)
    assert imported.header.model is not None


def test_kim_et_al_leave_the_stem_out(tmp_path: Path) -> None:
    text = "id,st,end,st_act,end_act,val_loss,val_acc\n0,0,1,1,1,1.0,70.5\n1,0,3,1,0,1.0,69\n"
    path = tmp_path / "i.csv"
    path.write_text(text)
    imported = import_importance(path, load(network()), baseline=71.0)
    assert (imported.first, imported.score, imported.table.no_change) == (0, "accuracy", 0.0)
    assert [(row.value, row.unchanged) for row in imported.table.rows] == [
        (-0.5, True),
        (-2.0, False),
    ]
    plain = import_importance(path, baseline=71.0).table
    assert [(row.input, row.output) for row in plain.rows] == [("0", "1"), ("0", "3")]


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    rows = [
        (0, 0, 9, 3, 1, 0, "(1,)", 1, 70),
        (1, 1, 4, 9, 1, 0, "(2, 3, 4)", 1, 70),
        (2, 1, 2, "x", 1, 0, "(2,)", 1, 70),
        (3, 7, 8, 3, 1, 0, "(8,)", 1, 70),
        (4, 2, 1, 3, 1, 0, "()", 1, 70),
    ]
    with pytest.raises(MeasuresError) as caught:
        import_importance(written(tmp_path / "i.csv", rows), load(network()), baseline=70.0)
    texts = [str(problem) for problem in caught.value.problems]
    assert [text.partition(":")[0] for text in texts] == [
        "line 2, st",
        "line 3, ker",
        "line 4, ker",
        "line 5, st",
        "line 6",
    ]
    assert "from 0 to 9: from 0 to" in texts[0]
    assert "becomes dense 3x3" in texts[1]
    assert "begins at 7" in texts[3]


def test_an_unknown_score_is_an_error(table: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'accuracy'"):
        import_importance(table, baseline=1.0, score="acuracy")


@pytest.mark.needs_shared
def test_the_published_pairs_of_mobilenet_are_those_of_the_model(
    shared: Path, tmp_path: Path
) -> None:
    times = list(csv.DictReader((TABLES / "mbv2_1.0_time.csv").open()))
    path = tmp_path / "i.csv"
    lines = [f"{row['st']},{row['end']},71" for row in times]
    path.write_text("st,end,val_acc\n" + "\n".join(lines) + "\n")
    model = load(shared / "models" / "mobilenetv2_tv_bn.onnx")
    imported = import_importance(path, model, baseline=72.0)
    assert imported.first == 0
    assert imported.covered == (171, 178)  # those with the stem or the last convolution: 7


def test_the_command_writes_a_table(table: Path, tmp_path: Path, capfd) -> None:
    model, out = tmp_path / "m.onnx", tmp_path / "importance.json"
    onnx.save(network(), model)
    arguments = ["score", str(model), "--import", str(table), "--baseline", "71", "-o", str(out)]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["rows"] == len(read_importance(out).rows)
    assert document["first_convolution"] == 1
    assert main(arguments) == 0
    assert "segments of the model with rows" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "i.json"], "--import FILE.csv"),
        (["--import", "i.csv", "-o", "i.json"], "--baseline"),
        (["--import", "i.csv", "--baseline", "1"], "-o importance.json"),
        (["--import", "i.csv", "--baseline", "1", "-o", "-"], "stdout"),
        (["--import", "i.csv", "--baseline", "1", "-o", "i.csv"], "i.csv"),
        (["--import", "none.csv", "--baseline", "1", "-o", "i.json"], "cannot be read"),
    ],
)
def test_usage_errors(arguments, message, table, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "i.csv").write_text("st,end,val_acc\n0,1,70\n")
    assert main(["score", *arguments]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "i.json").exists()
