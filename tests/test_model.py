"""Loading, checking, saving and comparing models."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich_model import rich_model

from graphfold import files, model
from graphfold.errors import ModelError, OutputError


def serialized(proto: onnx.ModelProto) -> bytes:
    return proto.SerializeToString(deterministic=True)


def small_model(elements: int = 600) -> onnx.ModelProto:
    """y = x * w + b, with w above the size that stays inside the file and b below it."""
    w = numpy_helper.from_array(np.arange(elements, dtype=np.float32), "w")
    b = numpy_helper.from_array(np.float32([1.0]), "b")
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    io = [helper.make_tensor_value_info(name, 1, ["N", elements]) for name in "xy"]
    graph = helper.make_graph(nodes, "small", io[:1], io[1:], [w, b])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def saved_with_data(folder: Path, name: str = "m.onnx") -> Path:
    path = folder / name
    onnx.save(
        small_model(),
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    return path


# ----------------------------------------------------------------- nothing is lost


@pytest.mark.parametrize("ir_version", [9, 10, 11, 13])
def test_every_field_survives(ir_version: int) -> None:
    original = rich_model(ir_version)
    assert serialized(model.to_proto(model.load(original, check=False))) == serialized(original)


def test_every_field_survives_cloning_and_checking() -> None:
    original = rich_model()
    loaded = model.load(model.load(original).clone())
    assert serialized(model.to_proto(loaded)) == serialized(original)


def test_every_field_survives_a_file(tmp_path: Path) -> None:
    original = rich_model()
    model.save(model.load(original), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == serialized(original)
    assert serialized(model.to_proto(model.load(tmp_path / "m.onnx"))) == serialized(original)


def test_every_field_survives_a_data_file(tmp_path: Path) -> None:
    written = model.save(model.load(rich_model()), tmp_path / "m.onnx", external_data="always")
    assert len(written) == 2
    assert serialized(model.to_proto(model.load(written[0]))) == serialized(rich_model())


@pytest.mark.needs_shared
def test_real_models_come_out_byte_for_byte(shared: Path) -> None:
    paths = sorted((shared / "models").glob("*.onnx"))
    assert paths
    for path in paths:
        loaded = model.load(path)
        proto = model.to_proto(loaded.clone())
        assert proto == onnx.load(path), path.name
        assert serialized(proto) == path.read_bytes(), path.name


def test_untyped_attributes_of_old_models_survive() -> None:
    original = small_model()
    original.ir_version = 1
    del original.opset_import[:]
    node = original.graph.node.add(op_type="Old", input=["y"], output=["z"])
    node.attribute.add(name="axis", i=1)
    node.attribute.add(name="nothing")
    assert serialized(model.to_proto(model.load(original))) == serialized(original)
    loaded = model.load(original)
    assert loaded.ir.graph[2].attributes["axis"].value == 1


def test_what_a_pass_changes_stays_changed_and_the_rest_as_it_was() -> None:
    original = rich_model()
    loaded = model.load(original)
    node = loaded.ir.graph[0]
    node.metadata_props["graphfold"] = "here"
    node.name = "renamed"
    proto = model.to_proto(loaded).graph.node[0]
    assert proto.name == "renamed"
    assert {item.key for item in proto.metadata_props} == {"scope", "namespace", "graphfold"}
    assert proto.HasField("domain")
    assert proto.domain == ""


def test_model_metadata_can_change_without_losing_training_info() -> None:
    loaded = model.load(rich_model())
    loaded.ir.metadata_props["plan"] = "digest"
    proto = model.to_proto(loaded)
    assert {item.key: item.value for item in proto.metadata_props}["plan"] == "digest"
    assert proto.training_info == rich_model().training_info


def test_what_described_a_removed_tensor_goes_with_it() -> None:
    loaded = model.load(rich_model())
    graph = loaded.ir.graph
    relu = graph[len(graph) - 1]
    scale = relu.inputs[0].producer()
    dropout = scale.inputs[0].producer()
    relu.replace_input_with(0, dropout.inputs[0])
    graph.remove([scale, dropout], safe=True)
    del graph.initializers["scale"]
    proto = model.to_proto(loaded).graph
    assert [info.name for info in proto.value_info] == ["y", "w", "h", "branch", "stale"]
    kept = {
        item.tensor_name: [pair.value for pair in item.quant_parameter_tensor_names]
        for item in proto.quantization_annotation
    }
    assert kept == {"h": ["zero_point"], "w": [], "nowhere": []}


def test_new_tensors_get_value_info_and_new_initializers_do_not() -> None:
    loaded = model.load(small_model())
    graph = loaded.ir.graph
    add = graph[1]
    bias = onnx_ir.Value(name="new_b", const_value=onnx_ir.tensor(np.float32([2.0])))
    graph.register_initializer(bias)
    add.replace_input_with(1, bias)
    relu = onnx_ir.Node("", "Relu", [add.inputs[0]])
    relu.outputs[0].name = "r"
    relu.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph.insert_before(add, relu)
    add.replace_input_with(0, relu.outputs[0])
    proto = model.to_proto(loaded)
    assert [info.name for info in proto.graph.value_info] == ["r"]
    onnx.checker.check_model(proto, full_check=True)


def test_sparse_initializers_are_constants_to_passes() -> None:
    loaded = model.load(rich_model())
    value = loaded.ir.graph.initializers["sparse_pairs"].const_value
    np.testing.assert_array_equal(value.numpy(), [[0, 7], [8, 0]])
    flat = loaded.ir.graph.initializers["sparse_flat"].const_value
    np.testing.assert_array_equal(flat.numpy(), [[5, 0], [0, 6]])
    loaded.ir.graph.initializers["sparse_flat"].name = "renamed"
    names = [item.values.name for item in model.to_proto(loaded).graph.sparse_initializer]
    assert names == ["sparse_pairs", "renamed"]


# ----------------------------------------------------------------- the caller's model


def test_the_callers_proto_and_the_model_do_not_share_state() -> None:
    proto = small_model()
    before = serialized(proto)
    loaded = model.load(proto)
    loaded.ir.graph.initializers["w"].name = "renamed"
    loaded.ir.graph.name = "changed"
    model.to_proto(loaded)
    assert serialized(proto) == before
    proto.graph.initializer[0].raw_data = b""
    sizes = {item.name: len(item.raw_data) for item in model.to_proto(loaded).graph.initializer}
    assert sizes == {"b": 4, "renamed": 2400}


def test_clones_rename_shared_tensors_independently() -> None:
    first = model.load(small_model())
    second = first.clone()
    second.ir.graph.initializers["w"].name = "renamed"
    assert [item.name for item in model.to_proto(second).graph.initializer] == ["b", "renamed"]
    assert serialized(model.to_proto(first)) == serialized(small_model())


def test_an_onnx_ir_model_is_copied() -> None:
    source = onnx_ir.serde.deserialize_model(small_model())
    loaded = model.load(source)
    loaded.ir.graph.name = "changed"
    assert source.graph.name == "small"
    onnx.checker.check_model(model.to_proto(loaded), full_check=True)


# ----------------------------------------------------------------- payload-free protos


def test_payload_free_protos_keep_types_shapes_and_small_tensors() -> None:
    proto = model.to_proto(model.load(small_model()), data=False)
    w, b = proto.graph.initializer
    assert (list(w.dims), w.data_type, w.raw_data) == ([600], TensorProto.FLOAT, b"")
    assert len(b.raw_data) == 4
    inferred = onnx.shape_inference.infer_shapes(proto)
    assert [info.name for info in inferred.graph.value_info] == ["m"]


def test_payload_free_protos_never_touch_large_external_data(tmp_path: Path) -> None:
    loaded = model.load(saved_with_data(tmp_path))
    for value in loaded.ir.graph.initializers.values():
        if value.name == "w":
            value.const_value.tobytes = None  # would fail if it was called
    (tmp_path / "weights.bin").write_bytes(b"\0" * 5000)
    model.to_proto(loaded, data=False)
    assert loaded.ir.graph.initializers["w"].const_value.raw is None


def test_protos_include_external_data(tmp_path: Path) -> None:
    proto = model.to_proto(model.load(saved_with_data(tmp_path)))
    assert serialized(proto) == serialized(small_model())


# ----------------------------------------------------------------- bad input


def lfs_pointer() -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is text\n", "is not an ONNX file"),
        (bytes(range(256)), "is not an ONNX file"),
        (lfs_pointer(), "Git LFS pointer"),
        (serialized(small_model())[:500], "is truncated: it ends after 500 bytes, at least"),
        (serialized(small_model())[:-1], "is truncated"),
        (b"\x08\x09", "has no graph"),
        (onnx.ModelProto(ir_version=9, graph=small_model().graph), "imports no operator set"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes | onnx.ModelProto, message: str) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content if isinstance(content, bytes) else serialized(content))
    for load in (model.load, lambda p: model.load(p.read_bytes())):
        with pytest.raises(ModelError, match=message) as caught:
            load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=message) as caught:
        model.digest(path)
    assert caught.value.where == str(path)


def test_missing_files_folders_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file") as caught:
        model.load(tmp_path / "none.onnx")
    assert caught.value.where == str(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        model.load(tmp_path)
    with pytest.raises(ModelError, match="cannot be read: not a directory"):
        model.load(Path(sys.executable) / "x.onnx")


def broken(change: str) -> onnx.ModelProto:
    proto = small_model()
    nodes = proto.graph.node
    match change:
        case "cycle":
            nodes[0].input[1] = "y"
        case "dangling":
            nodes[1].input[1] = "nobody"
        case "twice":
            nodes[1].output[0] = "m"
        case "initializer twice":
            proto.graph.initializer.append(proto.graph.initializer[0])
        case "nameless initializer":
            proto.graph.initializer[0].name = ""
        case "output":
            proto.graph.output[0].name = "nobody"
        case "data":
            proto.graph.initializer[0].raw_data = b"1234"
        case "typed data":
            proto.graph.initializer[0].ClearField("raw_data")
            proto.graph.initializer[0].float_data.append(1)
        case "operator":
            nodes[0].op_type = "Gelu"
        case "attribute":
            nodes[0].attribute.add(name="axis", type=onnx.AttributeProto.INT, i=1)
        case "domain":
            nodes[0].domain = "never.imported"
        case "opset":
            proto.opset_import[0].version = 1000
        case "ir":
            proto.ir_version = 1000
    return proto


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cycle", "cycle"),
        ("dangling", "a Add node reads the tensor 'nobody'"),
        ("twice", "the tensor 'm' is defined twice"),
        ("initializer twice", "the initializer 'w' is defined twice"),
        ("nameless initializer", "the initializer number 1 has no name"),
        ("output", "the graph output 'nobody' is produced by nothing"),
        ("data", "the tensor 'w' has 4 bytes of data, its shape asks for 2400"),
        ("typed data", "the tensor 'w' has 1 elements of data, its shape asks for 600"),
        ("operator", "No Op registered for Gelu"),
        ("attribute", "Unrecognized attribute: axis"),
        ("domain", "never.imported"),
        ("opset", "uses opset 1000"),
        ("ir", "has IR version 1000"),
    ],
)
def test_invalid_models(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "invalid.onnx"
    path.write_bytes(serialized(broken(change)))
    with pytest.raises(ModelError, match=message) as caught:
        model.load(path)
    assert caught.value.where == str(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=message):
        model.load(broken(change))


def test_a_dangling_input_of_a_subgraph_is_found() -> None:
    proto = rich_model()
    proto.graph.node[1].attribute[0].g.node[0].input[0] = "nobody"
    with pytest.raises(ModelError, match="'nobody', which nothing produces"):
        model.load(proto)


def test_nodes_out_of_order_are_sorted() -> None:
    proto = small_model()
    proto.graph.node.reverse()
    loaded = model.load(proto)
    assert serialized(model.to_proto(loaded)) == serialized(small_model())


def test_order_counts_what_subgraphs_read() -> None:
    proto = rich_model()
    nodes = [proto.graph.node[i] for i in (1, 0, 2, 3, 4, 5, 6, 7, 8)]
    shuffled = rich_model()
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(nodes)
    loaded = model.load(shuffled)
    names = [node.op_type for node in loaded.ir.graph]
    assert names.index("MatMul") < names.index("If")


def test_unknown_operators_pass() -> None:
    proto = small_model()
    proto.graph.node[0].op_type = "EfficientNMS_TRT"
    proto.graph.node[1].op_type = "Anything"
    proto.graph.node[1].domain = "com.example"
    proto.opset_import.add(domain="com.example", version=1)
    assert serialized(model.to_proto(model.load(proto))) == serialized(proto)


def test_a_graph_without_name_and_outputs_without_shape_pass() -> None:
    proto = small_model()
    proto.graph.ClearField("name")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    assert serialized(model.to_proto(model.load(proto))) == serialized(proto)


# ----------------------------------------------------------------- external data


def relocated(folder: Path, location: str) -> Path:
    path = saved_with_data(folder)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(serialized(proto))
    return path


@pytest.mark.parametrize("check", [True, False])
def test_data_files_outside_the_folder_are_refused(tmp_path: Path, check: bool) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    outside = tmp_path / "weights.bin"
    outside.write_bytes(b"\0" * 5000)
    (folder / "link.bin").symlink_to(outside)
    for location in ("../weights.bin", str(outside), "link.bin", "sub/../../weights.bin"):
        path = relocated(folder, location)
        with pytest.raises(ModelError, match="lies outside the model's folder"):
            model.load(path, check=check)


def test_missing_short_and_shared_data_files(tmp_path: Path) -> None:
    path = saved_with_data(tmp_path)
    data = tmp_path / "weights.bin"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match="is too short"):
        model.load(path)
    data.unlink()
    with pytest.raises(ModelError, match=r"the data file 'weights.bin' is missing"):
        model.load(path)
    (tmp_path / "other").write_bytes(whole)
    data.hardlink_to(tmp_path / "other")
    with pytest.raises(ModelError, match="several hard links"):
        model.load(path)
    with pytest.raises(ModelError, match="folder of a model in memory is not known"):
        model.load(path.read_bytes())


def test_external_data_stays_external_and_is_named_by_content(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    loaded = model.load(saved_with_data(tmp_path / "in"))
    written = model.save(loaded, tmp_path / "out" / "n.onnx")
    assert sorted((tmp_path / "out").iterdir()) == sorted(written)
    digest = hashlib.sha256(written[1].read_bytes()).hexdigest()
    assert written[1].name == f"n.{digest[:16]}.data"
    proto = onnx.load(written[0], load_external_data=False)
    placed = {t.name: t.data_location == TensorProto.EXTERNAL for t in proto.graph.initializer}
    assert placed == {"w": True, "b": False}
    assert model.to_proto(model.load(written[0])) == small_model()
    onnx.checker.check_model(str(written[0]), full_check=True)
    assert model.save(loaded, tmp_path / "one.onnx", external_data="never") == [
        tmp_path / "one.onnx"
    ]
    assert (tmp_path / "one.onnx").read_bytes() == serialized(small_model())


def test_shared_tensors_are_written_once_and_large_ones_on_pages(tmp_path: Path) -> None:
    loaded = model.load(small_model())
    graph = loaded.ir.graph
    large = onnx_ir.tensor(np.zeros(1 << 19, np.float32))
    for name in ("p", "q"):
        graph.register_initializer(onnx_ir.Value(name=name, const_value=large))
    written = model.save(loaded, tmp_path / "m.onnx", external_data="always")
    assert written[1].stat().st_size == 4096 + (2 << 20)
    again = model.load(written[0])
    written = model.save(again, tmp_path / "n.onnx")
    assert written[1].stat().st_size == 4096 + (2 << 20)


def test_replacing_a_model_in_place_keeps_the_old_data_file(tmp_path: Path) -> None:
    path, old = model.save(model.load(small_model()), tmp_path / "m.onnx", external_data="always")
    loaded = model.load(path)
    old_bytes = old.read_bytes()
    doubled = onnx_ir.tensor(2 * loaded.ir.graph.initializers["w"].const_value.numpy())
    loaded.ir.graph.initializers["w"].const_value = doubled
    written = model.save(loaded, path)
    assert written[1] != old
    assert old.read_bytes() == old_bytes
    tensor = model.load(path).ir.graph.initializers["w"].const_value
    np.testing.assert_array_equal(tensor.numpy(), 2 * np.arange(600, dtype=np.float32))


def test_the_same_model_is_written_with_the_same_bytes(tmp_path: Path) -> None:
    for policy in ("auto", "always"):
        names = []
        for folder in ("a", "b"):
            (tmp_path / policy / folder).mkdir(parents=True)
            written = model.save(
                model.load(rich_model()),
                tmp_path / policy / folder / "m.onnx",
                external_data=policy,
            )
            names.append([(item.name, item.read_bytes()) for item in written])
        assert names[0] == names[1]


def test_too_large_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_INLINE_LIMIT", 1000)
    loaded = model.load(small_model())
    assert len(model.save(loaded, tmp_path / "m.onnx")) == 2
    with pytest.raises(OutputError, match="allow external data"):
        model.save(loaded, tmp_path / "n.onnx", external_data="never")
    with pytest.raises(ModelError, match="2 GB"):
        model.to_proto(loaded)


# ----------------------------------------------------------------- whole or not at all


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    loaded = model.load(small_model())
    with pytest.raises(OutputError, match="there is no folder"):
        model.save(loaded, tmp_path / "none" / "m.onnx")
    with pytest.raises(OutputError, match="is a directory"):
        model.save(loaded, tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not a directory"):
        model.save(loaded, tmp_path / "file" / "m.onnx")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_folders_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="permission denied"):
        model.save(model.load(small_model()), tmp_path / "m.onnx")


@pytest.mark.parametrize("unnamed", [True, False])
@pytest.mark.parametrize("policy", ["never", "always"])
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, policy: str, unnamed: bool
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    loaded = model.load(small_model())
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "write":
        monkeypatch.setattr(model, "_serialized", full)
    elif step == "fsync":
        monkeypatch.setattr(files.os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="no space left on device") as caught:
        model.save(loaded, path, external_data=policy)
    assert caught.value.where == str(path)
    assert [item.name for item in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"old"


def test_a_model_that_fails_after_its_data_file_takes_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = files.PendingFile.publish

    def interrupted(self: files.PendingFile, target: Path) -> None:
        if target.suffix == ".onnx":
            raise KeyboardInterrupt
        publish(self, target)

    monkeypatch.setattr(files.PendingFile, "publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save(model.load(small_model()), tmp_path / "m.onnx", external_data="always")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_the_old_pair(tmp_path: Path, number: signal.Signals) -> None:
    path, old = model.save(model.load(small_model()), tmp_path / "m.onnx", external_data="always")
    before = {item.name: item.read_bytes() for item in (path, old)}
    code = f"""
        import time
        import numpy as np, onnx_ir
        from graphfold import model
        loaded = model.load({str(path)!r})
        class Slow(onnx_ir.Tensor):
            def tobytes(self):
                print("writing", flush=True)
                time.sleep(60)
        loaded.ir.graph.register_initializer(
            onnx_ir.Value(name="slow", const_value=Slow(np.zeros(5000, np.float32))))
        model.save(loaded, {str(path)!r})
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(number)
        process.wait(30)
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before


def test_a_small_real_disk_runs_full(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("cannot mount a file system here")
    try:
        for policy in ("never", "always"):
            with pytest.raises(OutputError, match="no space left on device"):
                model.save(model.load(small_model(100_000)), mount / "m.onnx", external_data=policy)
            assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("unnamed", [True, False])
def test_any_file_can_be_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool
) -> None:
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE")
    path = tmp_path / "report.html"
    with files.atomic_file(path) as file:
        file.write(b"first")

    def interrupted() -> None:
        with files.atomic_file(path) as file:
            file.write(b"second")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [item.read_bytes() for item in tmp_path.iterdir()] == [b"first"]


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real = tmp_path / "real" / "m.onnx"
    link = tmp_path / "link.onnx"
    link.symlink_to(real)
    assert model.save(model.load(small_model()), link) == [link]
    assert link.is_symlink()
    assert real.read_bytes() == serialized(small_model())
    with pytest.raises(OutputError, match="symbolic link into another folder"):
        model.save(model.load(small_model()), link, external_data="always")
    assert [item.name for item in real.parent.iterdir()] == ["m.onnx"]


def test_permissions_follow_the_umask_or_the_replaced_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    old = os.umask(0o027)
    try:
        model.save(model.load(small_model()), path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    model.save(model.load(small_model()), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


# ----------------------------------------------------------------- digests, interfaces


def test_digests(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(serialized(small_model()))
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.digest(path) == expected
    assert model.digest(str(path)) == expected
    assert model.digest(small_model()) == expected
    assert model.digest(model.load(path)) == expected
    assert model.digest(path.read_bytes()) == expected


def test_digests_see_external_data(tmp_path: Path) -> None:
    path = saved_with_data(tmp_path)
    data = tmp_path / "weights.bin"
    joined = hashlib.sha256(path.read_bytes() + data.read_bytes()).hexdigest()
    assert model.digest(path) == joined
    in_memory = model.digest(model.load(path))
    data.write_bytes(data.read_bytes()[:-1] + b"\x7f")
    assert model.digest(path) != joined
    assert model.digest(model.load(path)) != in_memory
    data.unlink()
    with pytest.raises(ModelError, match="missing"):
        model.digest(path)


def test_equal_interfaces() -> None:
    one = model.load(rich_model())
    assert model.compare_interfaces(one, one.clone()) == []


def test_differences_of_interfaces() -> None:
    one, other = model.load(rich_model()), model.load(rich_model())
    ir = other.ir
    ir.ir_version = 12
    ir.graph.opset_imports[""] = 22
    ir.graph.opset_imports["new"] = 1
    ir.graph.inputs[0].shape = onnx_ir.Shape(["M", 2])
    ir.graph.inputs[5].type = onnx_ir.TensorType(onnx_ir.DataType.DOUBLE)
    del ir.graph.initializers["overridable"]
    ir.graph.outputs[0].name = "renamed"
    ir.functions.pop(("local", "Scale", ""))
    ir.functions["local", "Scale", "second"].outputs[0].name = "changed"
    found = "\n".join(model.compare_interfaces(one, other))
    for text in (
        "IR version: 11 became 12",
        "opset '': 21 became 22",
        "opset 'new' is new",
        "graph input 'x': dims [N, 2] became [M, 2]",
        "graph input 'scalar': type",
        "graph input 'overridable': default value present became absent",
        "graph outputs: ['y',",
        "function 'local:Scale:' is gone",
        "function 'local:Scale:second': changed",
    ):
        assert text in found
    assert len(found.splitlines()) == 9
