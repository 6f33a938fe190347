"""Latency: what is measured, what is flagged, and the data readers beside it."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import small_models as small

from graphfold.calibration import latency
from graphfold.calibration.dataset import read_inputs
from graphfold.errors import DataError, UsageError
from graphfold.model import load
from graphfold.runtime import RunError
from graphfold.specs import InputSpec, model_inputs


def quick(*models, **options):
    return latency.compare(
        [load(model) for model in models], **{"rounds": 4, "seconds": 0.1, **options}
    )


def timing(*rounds: list[float], share: float = 1.0) -> latency._Timing:
    return latency._Timing(rounds=list(rounds), wall=1.0, cpu=share)


def summary(own: latency._Timing, first: latency._Timing) -> latency.ModelLatency:
    return latency._summary("m", own, first.rounds, (), own.cpu_share)


def test_two_models_are_measured_with_their_ratio():
    found = quick(small.chain(1.0), small.chain(1.0, 1.0, 1.0))
    first, second = found.models
    assert first.speedup == 1.0
    assert second.median > 0
    assert second.p5 <= second.median
    assert first.runs >= found.rounds
    json.dumps(found.to_json(), allow_nan=False)


def test_the_ratio_is_the_median_of_ratios_in_the_same_round():
    # The machine was twice as slow in the last two rounds: the ratio does not care.
    first = timing([10.0], [10.0], [20.0], [20.0])
    own = timing([5.0], [5.0], [10.0], [10.0])
    found = summary(own, first)
    assert found.speedup == 2.0
    assert found.speedup_spread == 0.0


def test_a_spread_above_ten_percent_is_flagged():
    steady = timing(*[[10.0]] * 8)
    wild = timing(*[[10.0], [14.0]] * 4)
    assert summary(steady, steady).is_reliable
    assert not summary(wild, steady).is_reliable
    (warning,) = latency._warnings([summary(wild, steady)])
    assert "spread" in warning


def test_a_processor_that_others_use_is_flagged():
    shared = summary(timing(*[[10.0]] * 8, share=0.5), timing(*[[10.0]] * 8))
    assert not shared.is_reliable
    (warning,) = latency._warnings([shared])
    assert "50 %" in warning


def test_models_alternate_and_nobody_is_always_first(monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(latency, "_warm_up", lambda run: 1.0)
    runs = [lambda name=name: order.append(name) for name in "ab"]
    latency._measure(runs, 3, 0.0, lambda *call: None)
    rounds = "".join(order[::2])  # every timed run has an untimed one before it
    assert rounds == "abbaab"


def test_the_environment_is_told():
    found = quick(small.conv_bn_relu()).environment
    assert found["batch"] == 1
    assert found["threads"] == 1
    assert found["provider"] == "CPUExecutionProvider"
    assert found["cpu"]
    assert found["inputs"] == "x [1, 3, 8, 8]"


def test_sizes_and_inputs_can_be_given():
    model = small.conv_bn_relu()
    assert quick(model, input_shapes={"": (5, 3, 8, 8)}).environment["batch"] == 5
    feeds = iter([{"x": np.ones((3, 3, 8, 8), np.float32)}])
    assert quick(model, inputs=feeds).environment["batch"] == 3


def test_times_per_operator():
    (found,) = quick(small.conv_bn_relu(), operators=True).models
    assert {"Conv", "Gemm"} & {item.op_type.removeprefix("Fused") for item in found.operators}
    assert all(item.milliseconds >= 0 for item in found.operators)


def test_operator_times_are_medians_per_node():
    events = [
        {"cat": "Node", "name": "n_kernel_time", "dur": dur, "args": {"op_name": "Conv"}}
        for dur in (9000, 1000, 2000)
    ]
    events.append({"cat": "Session", "name": "model_run", "dur": 5})
    (found,) = latency._node_times(events)
    assert found == latency.OperatorTime("n", "Conv", 2.0)


def test_an_unknown_provider_names_the_available_ones():
    with pytest.raises(UsageError, match="CPUExecutionProvider"):
        quick(small.chain(1.0), provider="AbacusExecutionProvider")


def test_a_model_that_takes_other_inputs_is_an_error():
    with pytest.raises(RunError):
        quick(small.chain(1.0), small.conv_bn_relu())


def test_nothing_to_measure():
    with pytest.raises(UsageError):
        latency.compare([])


def test_tables_name_the_models():
    found = quick(small.chain(1.0), small.chain(2.0), names=["one", "two"], operators=True)
    first, second = found.tables()
    assert [row[0] for row in first.rows] == ["one", "two"]
    assert second.columns[1:] == ("one", "two")


# Data -------------------------------------------------------------------------------------------

SPECS = (InputSpec("x", "tensor(float)", ("N", 3)),)
FIXED = (InputSpec("x", "tensor(float)", (2, 3)),)


def test_an_npz_is_keyed_by_input_name_and_labels_are_left_out(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, x=np.ones((4, 3)), labels=np.zeros(4))
    (feed,) = read_inputs(str(path), SPECS)
    assert set(feed) == {"x"}


def test_an_npy_is_the_only_input(tmp_path):
    path = tmp_path / "data.npy"
    np.save(path, np.ones((4, 3)))
    assert len(list(read_inputs(str(path), SPECS))) == 1
    with pytest.raises(DataError, match="2 inputs"):
        list(read_inputs(str(path), (*SPECS, InputSpec("z", "tensor(float)", (1,)))))


def test_many_samples_are_cut_into_batches(tmp_path):
    path = tmp_path / "data.npy"
    np.save(path, np.arange(60).reshape(20, 3))
    assert [len(feed["x"]) for feed in read_inputs(str(path), SPECS)] == [8, 8, 4]
    assert [len(feed["x"]) for feed in read_inputs(str(path), SPECS, limit=2)] == [8, 8]
    np.save(path, np.arange(15).reshape(5, 3))
    assert [len(feed["x"]) for feed in read_inputs(str(path), FIXED)] == [2, 2]


def test_a_fixed_batch_that_is_never_full_is_an_error(tmp_path):
    path = tmp_path / "data.npy"
    np.save(path, np.ones((1, 3)))
    with pytest.raises(DataError, match="batch of 2"):
        list(read_inputs(str(path), FIXED))


def test_arrays_of_unequal_length_are_an_error(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, x=np.ones((20, 3)), z=np.ones((30, 3)))
    with pytest.raises(DataError, match="unequal length"):
        list(read_inputs(str(path), (*SPECS, InputSpec("z", "tensor(float)", ("N", 3)))))


def test_a_callable_yields_feeds(tmp_path, monkeypatch):
    (tmp_path / "my_inputs.py").write_text(
        "import numpy as np\n"
        "def some():\n    yield {'x': np.ones((2, 3))}\n    yield {'x': np.zeros((1, 3))}\n"
        "def broken():\n    raise ValueError('no images today')\n"
        "def wrong():\n    return [1]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(list(read_inputs("my_inputs:some", SPECS))) == 2
    for name, message in (
        ("broken", "no images today"),
        ("wrong", "not dicts"),
        ("absent", "absent"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_inputs(f"my_inputs:{name}", SPECS))
    sys.modules.pop("my_inputs")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.npz", None, "No such file"),
        ("absent", None, "no such file"),
        ("text.npz", "hello", "cannot be read"),
        ("image.png", "hello", "neither"),
    ],
)
def test_files_that_are_no_data(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_inputs(str(path), SPECS))


def test_a_folder_is_no_data(tmp_path):
    with pytest.raises(DataError, match="folder"):
        list(read_inputs(str(tmp_path), SPECS))


def test_inputs_of_a_model_are_read_from_the_file():
    (found,) = model_inputs(load(small.conv_bn_relu()))
    assert found == InputSpec("x", "tensor(float)", ("N", 3, 8, 8))
