"""The published CSV forms."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from graphfold.errors import MeasuresError, UsageError
from graphfold.measures import join
from graphfold.published_tables import Names, read_importance_csv, read_latency_csv

TABLES = Path(__file__).parent / "data" / "published_tables"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "rows", "total"),
    [("mbv2_1.0", 171, 33.670), ("mbv2_1.4", 171, 43.201), ("vgg19_no_trt", 36, 193.084)],
)
def test_the_published_times(name: str, rows: int, total: float) -> None:
    table = read_latency_csv(TABLES / f"{name}_time.csv")
    assert len(table.rows) == rows
    assert sum(row.value for row in table.rows if row.unchanged) == pytest.approx(total, abs=5e-4)
    best = read_latency_csv(TABLES / f"{name}_opt_time.csv")
    assert len(best.rows) == rows
    assert all(row.splits and row.splits[0] == row.input for row in best.rows)


def test_positions_get_the_models_names(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "id,st,end,time,stdev\n7,1,2,0.5,0.01\n3,0,2,1,0\n")
    table = read_latency_csv(path, names=Names(tensors=["stem", "b1", "b2"]))
    assert [(row.input, row.output, row.value, row.unchanged) for row in table.rows] == [
        ("b1", "b2", 0.5, True),
        ("stem", "b2", 1.0, False),
    ]


def test_importances_of_depth(tmp_path: Path) -> None:
    text = (
        "id,st,end,st_act,end_act,train_loss,train_acc,val_loss,val_acc\n"
        "0,0,1,1,1,1.0,70,1.0,71.5\n1,0,2,1,0,1.0,70,1.0,70.0\n"
    )
    table = read_importance_csv(written(tmp_path / "i.csv", text), baseline=72.0)
    assert [(row.start_active, row.end_active, row.value) for row in table.rows] == [
        (True, True, -0.5),
        (True, False, -2.0),
    ]


LAYER_MERGE_TIMES = "id,st,end,ker,str,is_dw,time,stdev\n0,0,1,3,1,1,1.0,0\n1,0,2,3,1,0,2.0,0\n2,0,2,1,1,0,0.5,0\n3,1,2,0,1,0,0.0,0\n"  # noqa: E501
LAYER_MERGE_IMPORTANCES = """\
id,st,end,ker,str,is_dw,conv_comb,train_loss,train_acc,val_loss,val_acc
0,1,2,0,1,0,"()",0,0,4.0,70
1,0,2,1,1,0,"(2,)",0,0,3.0,70.5
2,0,2,3,1,0,"(1, 2)",0,0,2.5,71
3,0,1,3,1,1,"(1,)",0,0,2.0,72
"""


def test_tables_of_layer_merge_are_joined_by_key(tmp_path: Path) -> None:
    times = read_latency_csv(written(tmp_path / "t.csv", LAYER_MERGE_TIMES))
    worths = read_importance_csv(
        written(tmp_path / "i.csv", LAYER_MERGE_IMPORTANCES),
        baseline=72.0,
        score="exp-accuracy",
        names=Names(convs=["stem", "c1", "c2"]),
    )
    found = {
        (c.row.family, c.row.kernel): (c.row.removed_convs, c.latency, c.importance)
        for c in join(times, worths)
    }
    assert found == {
        ("depthwise", (3, 3)): ((), 1.0, 1.0),
        ("dense", (3, 3)): ((), 2.0, math.exp(-0.01)),
        ("pointwise", (1, 1)): (("c1",), 0.5, math.exp(-0.015)),
        ("identity", None): (("c2",), 0.0, math.exp(-0.02)),
    }


def test_a_loss_that_grows_is_worth_less(tmp_path: Path) -> None:
    path = written(tmp_path / "i.csv", LAYER_MERGE_IMPORTANCES)
    values = [row.value for row in read_importance_csv(path, baseline=2.0, score="exp-loss").rows]
    assert values == [math.exp(-1.0), math.exp(-0.5), math.exp(-0.25), 1.0]
    with pytest.raises(UsageError, match="must be positive"):
        read_importance_csv(path, baseline=0.0, score="exp-loss")


def problems(path: Path, text: str, **options: Names) -> list[str]:
    with pytest.raises(MeasuresError) as caught:
        read_latency_csv(written(path, text), **options)
    return [str(problem) for problem in caught.value.problems]


def test_all_problems_of_a_file_come_at_once(tmp_path: Path) -> None:
    text = "st,end,time\nx,2,1\n0,9,1\n2,1,1\n0,1,-3\n0,1,nan\n0,2\n"
    assert problems(tmp_path / "t.csv", text, names=Names(tensors=["a", "b", "c"])) == [
        "line 2, st: 'x' is no whole number",
        "line 3, end: there is no position 9: the model has 3",
        "line 4: leads from 2 to 1",
        "line 5, time: '-3' is negative",
        "line 6, time: 'nan' is no finite number",
        "line 7, time: '' is no number",
    ]


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    assert problems(path, "st,ende,tiem\n0,1,1\n") == [
        "line 1: there is no column 'end' (did you mean 'ende'?)",
        "line 1: there is no column 'time' (did you mean 'tiem'?)",
    ]
    assert problems(path, "st,end,ker,str,time\n0,1,1,1,1\n") == [
        "line 1: there is no column 'is_dw'"
    ]
    assert problems(path, "st,end,time\n") == ["table: has no lines"]
    assert problems(path, "st,end,time\n0,1,1\n0,1,2\n") == [
        "rows[1]: repeats the key of rows[0]: '0' to '1'"
    ]
    with pytest.raises(MeasuresError, match="cannot be read"):
        read_latency_csv(tmp_path / "none.csv")


@pytest.mark.parametrize("kept", ["(3,)", "2+2", "__import__('os')"])
def test_the_convolutions_kept_are_numbers_inside_the_segment(tmp_path: Path, kept: str) -> None:
    text = f'st,end,ker,str,is_dw,conv_comb,val_acc\n0,2,3,1,0,"{kept}",70\n'
    with pytest.raises(MeasuresError, match="line 2, conv_comb"):
        read_importance_csv(written(tmp_path / "i.csv", text), baseline=70.0)
