"""The study of blocks and dense convolutions: its cases, its arithmetic and its plot."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from builders import random_input, run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import dense_vs_block as study
import scatter


def test_every_shape_of_mobilenets_blocks_is_there_once() -> None:
    cases = list(study.blocks())
    assert len(cases) == len({case.name for case in cases}) == 11
    names = [case.name for case in cases]
    assert names[0] == "16 to 24, 112x112, s2"
    assert names[-1] == "160 to 320, 7x7, s1"


@pytest.mark.parametrize("shape", [(8, 4, 4, 1), (8, 4, 6, 1), (8, 4, 6, 2)])
def test_a_block_and_its_replacement_take_and_give_the_same_shapes(
    shape: tuple[int, int, int, int],
) -> None:
    one, two = study.block(*shape), study.one_conv(*shape)
    assert ("Add" in {node.op_type for node in one.graph.node}) == (shape == (8, 4, 4, 1))
    feeds = random_input(one)
    assert run(one, feeds)[0].shape == run(two, feeds)[0].shape


def test_depth_and_width_have_equal_operations() -> None:
    for case in study.depth():
        macs = [study.costs(proto)[0] for proto in case.models.values()]
        assert len(macs) == 3
        assert max(macs) < 1.05 * min(macs)


def test_merged_kernels_see_as_far_as_what_they_replace() -> None:
    for case in study.merged():
        run_of, one, _ = case.models
        assert one.split()[1].startswith(str(1 + 2 * int(run_of.split()[0])))


def test_activations_move_nothing() -> None:
    macs, traffic = study.costs(study.stack(8, 4, 1))
    assert macs == 8 * 8 * 4 * 4 * 9
    assert traffic == 4 * (2 * 8 * 8 * 4 + 4 * 4 * 9 + 4)


def figure(macs: int, traffic: int, milliseconds: float) -> study.Figure:
    return study.Figure("s", "c", "m", macs, traffic, milliseconds, 1.0, 0.0, True)


def test_times_that_follow_a_rule_are_explained_by_it() -> None:
    sizes = [(10, 500), (20, 100), (300, 4000), (50, 10)]
    figures = [figure(macs, traffic, 0.3 * macs + 0.02 * traffic) for macs, traffic in sizes]
    weights, error = study.explained(figures, "macs", "traffic")
    assert weights == pytest.approx([0.3, 0.02])
    assert error < 1e-9
    assert study.explained(figures, "macs")[1] > 0.05


def test_the_plot_holds_every_point(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    series = {"one": [(0.1, 0.5, "a < b"), (10.0, 5.0, "c")], "two": [(1.0, 1.0, "d")]}
    scatter.write_scatter(path, series, "across", "up", level=1.0)
    root = ET.fromstring(path.read_text())
    space = "{http://www.w3.org/2000/svg}"
    points = [
        each for each in root.iter(f"{space}circle") if each.find(f"{space}title") is not None
    ]
    assert [each.findtext(f"{space}title") for each in points] == ["a < b", "c", "d"]
    left, right, middle = (float(each.get("cx", "nan")) for each in points)
    assert left < middle < right
    assert middle == pytest.approx((left + right) / 2)
