"""Mutations of model files: the same seed and number always give the same file.

A case is a base model with one to three mutations of its messages, or of its bytes, or of where
its data lies. Nothing here asks whether the result still makes sense.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from fuzz.bases import EXTERNAL

ABSURD = (
    *(-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 7, 64, 1000, 2**16, 2**20, 2**31 - 1, 2**31),
    *(2**32, 2**40, 2**62, 2**63 - 1),
)
ABSURD_FLOATS = (0.0, -1.0, 1e-45, 1e30, 3e38, float("inf"), float("-inf"), float("nan"))
GARBAGE = (b"", b"\xff\xfe", b"\x00", b"NOTSET", b"SAME_UPPER", b"VALID", b"../x", b"a" * 5000)
OPERATORS = (
    *("Conv", "ConvTranspose", "BatchNormalization", "Gemm", "MatMul", "Add", "Mul", "Pad"),
    *("AveragePool", "GlobalAveragePool", "Concat", "Split", "Slice", "Gather", "Reshape", "Loop"),
    *("Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile", "Range", "ConstantOfShape"),
    *("Resize", "Cast", "Identity", "Dropout", "Relu", "Clip", "If", "Scan", "Shape", "TopK"),
    *("QuantizeLinear", "DequantizeLinear", "QLinearConv", "LSTM", "Einsum", "NonZero", "Unheard"),
)
LOCATIONS = (
    *("../../victim.bin", "/etc/passwd", "../model/data.bin", "link.bin", "", ".", "..", "folder"),
    *("nothing.bin", "pipe", "/dev/zero", "data.bin\x00", "a" * 300, "folder/../data.bin"),
    *("model.onnx", "data.bin", "hard.bin", "loop.bin", "~/x", "file:///etc/passwd", "folder/"),
)


@dataclass(frozen=True)
class Case:
    """One mutated model: the base it came from, what was done to it, and its bytes."""

    number: int
    base: str
    mutations: tuple[str, ...]
    data: bytes
    arguments: tuple[str, ...]

    def write(self, folder: Path) -> Path:
        """Put the model, and what hostile locations may point at, into an empty folder."""
        path = folder / "model.onnx"
        path.write_bytes(self.data)
        (folder / "data.bin").write_bytes(bytes(range(256)) * 16)
        (folder / "folder").mkdir()
        (folder / "link.bin").symlink_to("../../victim.bin")
        (folder / "loop.bin").symlink_to("loop.bin")
        os.link(folder / "data.bin", folder / "hard.bin")
        os.mkfifo(folder / "pipe")
        return path


def make_case(bases: dict[str, bytes], seed: int, number: int) -> Case:
    """The case of this seed and number."""
    rng = random.Random(f"{seed}:{number}")
    base = rng.choice(sorted(bases))
    data = bases[base]
    names: list[str] = []
    if base == EXTERNAL or rng.random() < 0.75:
        model = onnx.ModelProto.FromString(data)
        if base == EXTERNAL:
            move_outside(rng, model)
            names.append("move_outside")
        more = rng.choice((0, 0, 0, 1, 2)) + (base != EXTERNAL)
        names += [_mutate(rng, model) for _ in range(more)]
        data = model.SerializeToString()
        if rng.random() < 0.05:
            data, name = _mutate_bytes(rng, data, bases)
            names.append(name)
    else:
        data, name = _mutate_bytes(rng, data, bases)
        names.append(name)
    return Case(number, base, tuple(names), data, _arguments(rng))


def _arguments(rng: random.Random) -> tuple[str, ...]:
    kinds = [()] * 6 + [("--allow-growth",), ("--external-data", "always"), ("--strip-metadata",)]
    if rng.random() < 0.1:
        return ("inspect",)
    return ("optimize", *rng.choice(kinds))


# Bytes ----------------------------------------------------------------------------------------


def _mutate_bytes(rng: random.Random, data: bytes, bases: dict[str, bytes]) -> tuple[bytes, str]:
    kind = rng.choice(("flip", "flip", "flip", "truncate", "zero", "remove", "repeat", "splice"))
    changed = bytearray(data)
    first = rng.randrange(len(data) + 1)
    length = rng.choice((1, 4, 16, 256))
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del changed[first:]
    elif kind == "zero":
        changed[first : first + length] = bytes(len(changed[first : first + length]))
    elif kind == "remove":
        del changed[first : first + length]
    elif kind == "repeat":
        changed[first:first] = changed[first : first + length] * rng.choice((1, 2, 50))
    else:
        other = bases[rng.choice(sorted(bases))]
        changed[first:] = other[rng.randrange(len(other)) :][: 1 << 20]
    return bytes(changed), kind


# Messages -------------------------------------------------------------------------------------


def _mutate(rng: random.Random, model: onnx.ModelProto) -> str:
    """Apply one mutation that has something to work on; its name."""
    while True:
        mutation = rng.choice(MUTATIONS)
        try:
            mutation(rng, model)
        except (IndexError, ValueError, DecodeError):
            continue  # nothing of the kind in this model
        return mutation.__name__


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    stack = [model.graph, *model.functions]
    while stack:
        graph = stack.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    stack.append(attribute.g)
                stack.extend(attribute.graphs)


def _nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for graph in _graphs(model) for node in graph.node]


def _tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    found = [t for graph in _graphs(model) for t in getattr(graph, "initializer", ())]
    found += [a.t for node in _nodes(model) for a in node.attribute if a.HasField("t")]
    for graph in _graphs(model):
        for sparse in getattr(graph, "sparse_initializer", ()):
            found += [sparse.values, sparse.indices]
    return found


def _infos(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    found: list[onnx.ValueInfoProto] = []
    for graph in _graphs(model):
        found += graph.value_info
        if isinstance(graph, onnx.GraphProto):
            found += [*graph.input, *graph.output]
    return found


def _names(model: onnx.ModelProto) -> list[str]:
    return [name for node in _nodes(model) for name in (*node.input, *node.output)] + [""]


def rename_input(rng: random.Random, model: onnx.ModelProto) -> None:
    """Dangling inputs, cycles, inputs of other graphs."""
    node = rng.choice(_nodes(model))
    name = rng.choice([*_names(model), "nowhere"])
    node.input[rng.randrange(len(node.input))] = name


def rename_output(rng: random.Random, model: onnx.ModelProto) -> None:
    node = rng.choice(_nodes(model))
    name = rng.choice([*_names(model), "elsewhere", "x"])
    node.output[rng.randrange(len(node.output))] = name


def rename_any(rng: random.Random, model: onnx.ModelProto) -> None:
    thing = rng.choice([*_infos(model), *_tensors(model), *_nodes(model), *model.functions])
    thing.name = rng.choice([*_names(model), "\x00", "/etc/passwd", "a" * 10_000, "é" * 40])


def swap_inputs(rng: random.Random, model: onnx.ModelProto) -> None:
    node = rng.choice([node for node in _nodes(model) if len(node.input) > 1])
    first, second = rng.sample(range(len(node.input)), 2)
    node.input[first], node.input[second] = node.input[second], node.input[first]


def change_inputs(rng: random.Random, model: onnx.ModelProto) -> None:
    """One input or output fewer, or many more."""
    node = rng.choice(_nodes(model))
    names = rng.choice((node.input, node.output))
    if rng.random() < 0.5:
        del names[rng.randrange(len(names))]
    else:
        names.extend([rng.choice(_names(model))] * rng.choice((1, 1, 3, 500)))


def change_operator(rng: random.Random, model: onnx.ModelProto) -> None:
    node = rng.choice(_nodes(model))
    node.op_type = rng.choice([*OPERATORS, *(other.op_type for other in _nodes(model)), ""])


def change_domain(rng: random.Random, model: onnx.ModelProto) -> None:
    domains = ("", "ai.onnx", "ai.onnx.ml", "local", "com.microsoft", "org.example", "\x00")
    rng.choice(_nodes(model)).domain = rng.choice(domains)


def move_node(rng: random.Random, model: onnx.ModelProto) -> None:
    """Out of order, twice, or gone."""
    graph = rng.choice([graph for graph in _graphs(model) if graph.node])
    at = rng.randrange(len(graph.node))
    copy = onnx.NodeProto()
    copy.CopyFrom(graph.node[at])
    if rng.random() < 0.7:
        del graph.node[at]
    if rng.random() < 0.7:
        graph.node.insert(rng.randrange(len(graph.node) + 1), copy)


def remove_entry(rng: random.Random, model: onnx.ModelProto) -> None:
    graph = rng.choice(list(_graphs(model)))
    fields = [value for field, value in graph.ListFields() if field.is_repeated and value]
    entries = rng.choice(fields)
    del entries[rng.randrange(len(entries))]


def repeat_entry(rng: random.Random, model: onnx.ModelProto) -> None:
    graph = rng.choice(list(_graphs(model)))
    fields = [value for field, value in graph.ListFields() if field.is_repeated and value]
    entries = rng.choice(fields)
    entries.append(entries[rng.randrange(len(entries))])


def clear_field(rng: random.Random, model: onnx.ModelProto) -> None:
    kinds = (_nodes(model), _tensors(model), _infos(model), list(_graphs(model)), [model])
    message = rng.choice(rng.choice(kinds))
    message.ClearField(rng.choice(message.ListFields())[0].name)


def change_attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    attribute = rng.choice([item for node in _nodes(model) for item in node.attribute])
    kind = rng.randrange(6)
    if kind == 0:
        attribute.type = rng.choice(range(16))
    elif kind == 1:
        attribute.ref_attr_name = rng.choice(("slope", "nothing", attribute.name))
    elif attribute.ints:
        if rng.random() < 0.5:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(ABSURD)
        elif rng.random() < 0.5:
            attribute.ints.extend([rng.choice(ABSURD)] * rng.choice((1, 2, 300)))
        else:
            del attribute.ints[rng.randrange(len(attribute.ints)) :]
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = rng.choice(ABSURD_FLOATS)
    elif attribute.type == onnx.AttributeProto.STRING:
        attribute.s = rng.choice(GARBAGE)
    else:
        attribute.i = rng.choice(ABSURD)


_ATTRIBUTES = {
    "ints": ("pads", "strides", "dilations", "kernel_shape", "axes", "output_shape", "shape"),
    "i": ("axis", "group", "transA", "transB", "training_mode", "to", "keepdims", "spatial"),
    "f": ("alpha", "beta", "epsilon", "momentum", "value", "ratio"),
    "s": ("auto_pad", "mode", "coordinate_transformation_mode", "layout", "equation"),
}


def add_attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    """An attribute that other operators have, or the same one twice."""
    node = rng.choice(_nodes(model))
    if node.attribute and rng.random() < 0.2:
        node.attribute.append(rng.choice(node.attribute))
        return
    field = rng.choice(sorted(_ATTRIBUTES))
    name = rng.choice(_ATTRIBUTES[field])
    for item in list(node.attribute):
        if item.name == name:
            node.attribute.remove(item)
    value: object = {
        "ints": [rng.choice(ABSURD) for _ in range(rng.choice((0, 1, 2, 4, 8)))],
        "i": rng.choice(ABSURD),
        "f": rng.choice(ABSURD_FLOATS),
        "s": rng.choice(GARBAGE),
    }[field]
    if value == []:
        node.attribute.add(name=name, type=onnx.AttributeProto.INTS)
    else:
        node.attribute.append(helper.make_attribute(name, value))


def swap_attributes(rng: random.Random, model: onnx.ModelProto) -> None:
    nodes = [node for node in _nodes(model) if node.attribute]
    first, second = rng.choice(nodes), rng.choice(nodes)
    copy = [onnx.AttributeProto.FromString(item.SerializeToString()) for item in first.attribute]
    del first.attribute[:]
    first.attribute.extend(second.attribute)
    del second.attribute[:]
    second.attribute.extend(copy)


def change_dims(rng: random.Random, model: onnx.ModelProto) -> None:
    """Shapes of constants: absurd, of another rank, or the same numbers in another order."""
    tensor = rng.choice(_tensors(model))
    dims = list(tensor.dims)
    kind = rng.randrange(4)
    if kind == 0 and dims:
        dims[rng.randrange(len(dims))] = rng.choice(ABSURD)
    elif kind == 1:
        dims.insert(rng.randrange(len(dims) + 1), rng.choice((1, 1, 1, 0, 2, 2**40)))
    elif kind == 2:
        del dims[rng.randrange(len(dims))]
    else:
        rng.shuffle(dims)
    del tensor.dims[:]
    tensor.dims.extend(dims)


def change_values(rng: random.Random, model: onnx.ModelProto) -> None:
    """Values of constants: another type, too few, not finite, absurd integers."""
    tensor = rng.choice(_tensors(model))
    kind = rng.randrange(5)
    if kind == 0:
        tensor.data_type = rng.choice(range(-1, 28))
    elif kind == 1:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif kind == 2 and tensor.data_type == TensorProto.INT64:
        _set(tensor, 8, rng.choice(ABSURD).to_bytes(8, "little", signed=True), rng)
    elif kind == 3:
        tensor.float_data.extend([1.0, 2.0])
    else:
        values = (
            b"\x00\x00\xc0\x7f",
            b"\x00\x00\x80\x7f",
            b"\xff\xff\x7f\x7f",
            b"\x01\x00\x00\x00",
        )
        _set(tensor, 4, rng.choice(values), rng)


def _set(tensor: onnx.TensorProto, size: int, value: bytes, rng: random.Random) -> None:
    data = bytearray(tensor.raw_data)
    at = rng.randrange(len(data) // size) * size
    data[at : at + size] = value
    tensor.raw_data = bytes(data)


def swap_tensors(rng: random.Random, model: onnx.ModelProto) -> None:
    """Two constants change places: shapes and types that do not fit their readers."""
    first, second = rng.sample(_tensors(model)[:200], 2)
    copy = onnx.TensorProto.FromString(first.SerializeToString())
    first.CopyFrom(second)
    second.CopyFrom(copy)
    first.name, second.name = second.name, first.name


def change_info(rng: random.Random, model: onnx.ModelProto) -> None:
    """Declared types and shapes: absurd, of another rank, named, gone."""
    info = rng.choice(_infos(model))
    kind = info.type.tensor_type
    choice = rng.randrange(7)
    if choice == 0:
        kind.elem_type = rng.choice(range(28))
    elif choice == 1:
        info.ClearField("type")
    elif choice == 2:
        kind.ClearField("shape")
    elif choice == 3:
        info.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif choice == 4:
        kind.shape.dim.add().dim_value = rng.choice(ABSURD)
    elif choice == 5:
        del kind.shape.dim[rng.randrange(len(kind.shape.dim))]
    else:
        dim = kind.shape.dim[rng.randrange(len(kind.shape.dim))]
        dim.dim_value = rng.choice(ABSURD)
        if rng.random() < 0.2:
            dim.dim_param = rng.choice(("N", "", "W", "\x00"))


def add_info(rng: random.Random, model: onnx.ModelProto) -> None:
    """Claims about inner tensors that are wrong."""
    dims = [rng.choice((1, 2, 4, 8, *ABSURD)) for _ in range(rng.randrange(6))]
    info = helper.make_tensor_value_info(rng.choice(_names(model)), rng.choice((1, 7, 10)), dims)
    model.graph.value_info.append(info)


def change_versions(rng: random.Random, model: onnx.ModelProto) -> None:
    if rng.random() < 0.5 or not model.opset_import:
        model.ir_version = rng.choice((*ABSURD, *range(1, 14)))
    elif rng.random() < 0.7:
        rng.choice(model.opset_import).version = rng.choice((*ABSURD, *range(1, 26)))
    else:
        model.opset_import.append(rng.choice(model.opset_import))


def move_outside(rng: random.Random, model: onnx.ModelProto) -> None:
    """External data that lies where it must not be read, or not as it says."""
    tensor = rng.choice([item for item in _tensors(model) if item.raw_data] or _tensors(model))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=rng.choice(LOCATIONS))
    if rng.random() < 0.7:
        offset = rng.choice((*map(str, ABSURD), "0", "0", "64", "abc", "1.5", "", "9" * 400))
        tensor.external_data.add(key="offset", value=offset)
    if rng.random() < 0.7:
        length = rng.choice((*map(str, ABSURD), "432", "16", "80", "x", "-0", "0x10"))
        tensor.external_data.add(key="length", value=length)
    if rng.random() < 0.1:
        tensor.external_data.add(key="checksum", value="\x00")


def fill_hugely(rng: random.Random, model: onnx.ModelProto) -> None:
    """A constant that is computed, of an absurd size, used by some node."""
    node = rng.choice(list(model.graph.node))
    at = rng.randrange(len(node.input))
    dims = [
        rng.choice((1, 2, 3, 1000, 2**16, 2**20, 2**31, 2**40, -1))
        for _ in range(rng.choice((1, 2, 4)))
    ]
    made = helper.make_node("ConstantOfShape", ["huge_shape"], ["huge"])
    if rng.random() < 0.5:
        made = helper.make_node(
            rng.choice(("Expand", "Tile")), ["huge_one", "huge_shape"], ["huge"]
        )
    model.graph.initializer.append(
        helper.make_tensor("huge_shape", TensorProto.INT64, [len(dims)], dims)
    )
    model.graph.initializer.append(
        helper.make_tensor("huge_one", TensorProto.FLOAT, [1] * len(dims), [1.0])
    )
    model.graph.node.insert(0, made)
    node.input[at] = "huge"


def loop_long(rng: random.Random, model: onnx.ModelProto) -> None:
    """A loop that never ends, beside what the model does."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["still"]),
            helper.make_node("Add", ["sum", "sum"], ["doubled"]),
        ],
        "forever",
        [info("i", 7, []), info("go_on", 9, []), info("sum", 1, [1])],
        [info("still", 9, []), info("doubled", 1, [1]), info("still", 9, [])][
            : rng.choice((2, 2, 3))
        ],
    )
    trips = helper.make_tensor("forever_trips", TensorProto.INT64, [], [rng.choice((2**40, 2**62))])
    yes = helper.make_tensor("forever_yes", TensorProto.BOOL, [], [True])
    state = helper.make_tensor("forever_state", TensorProto.FLOAT, [1], [0.0])
    model.graph.initializer.extend([trips, yes, state])
    model.graph.node.add().CopyFrom(
        helper.make_node(
            "Loop",
            ["forever_trips", "forever_yes", "forever_state"],
            ["forever", "forever_scan"][: len(body.output) - 1],
            body=body,
        )
    )
    model.graph.output.append(info("forever", 1, [1]))


def nest_deeply(rng: random.Random, model: onnx.ModelProto) -> None:
    """If in If in If."""
    depth = rng.choice((3, 8, 20, 30, 45, 60))
    info = helper.make_tensor_value_info("deep_0", 1, [1])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["deep_x"], ["deep_0"])], "g", [], [info]
    )
    for level in range(1, depth):
        output = f"deep_{level}"
        node = helper.make_node("If", ["deep_c"], [output], then_branch=graph, else_branch=graph)
        if level > 8:
            del node.attribute[1:]
        info = helper.make_tensor_value_info(output, 1, [1])
        graph = helper.make_graph([node], "g", [], [info])
    model.graph.initializer.append(helper.make_tensor("deep_c", TensorProto.BOOL, [], [True]))
    model.graph.initializer.append(helper.make_tensor("deep_x", TensorProto.FLOAT, [1], [1.0]))
    model.graph.node.extend(graph.node)


def call_itself(rng: random.Random, model: onnx.ModelProto) -> None:
    """Functions that call themselves or one another."""
    other = rng.choice(("Self", "Other"))
    for name, called in {"Self": other, "Other": "Self"}.items():
        body = [helper.make_node(called, ["a"], ["b"], domain="recursive")]
        model.functions.append(
            helper.make_function(
                "recursive", name, ["a"], ["b"], body, [helper.make_opsetid("recursive", 1)]
            )
        )
    model.opset_import.add(domain="recursive", version=1)
    node = rng.choice(list(model.graph.node))
    source = node.input[rng.randrange(len(node.input))]
    model.graph.node.add().CopyFrom(
        helper.make_node("Self", [source], ["recursed"], domain="recursive")
    )
    model.graph.output.append(helper.make_tensor_value_info("recursed", 1, None))


_METADATA = (
    *("graphfold.replaces", "graphfold.fold", "graphfold.pass", "graphfold.plan", "location"),
    *("pkg.torch.onnx.stack_trace", ""),
)


def add_metadata(rng: random.Random, model: onnx.ModelProto) -> None:
    """What this program writes about its own folds, and is not that."""
    values = ("", "{", "[]", "null", "[1, 2]", '{"kernel": 3}', "\x00", "[" * 5000, '"x"')
    for holder in (rng.choice(_nodes(model)), rng.choice((model, model.graph))):
        for key in rng.sample(_METADATA, 3):
            holder.metadata_props.add(key=key, value=rng.choice(values))


def annotate(rng: random.Random, model: onnx.ModelProto) -> None:
    entry = model.graph.quantization_annotation.add(tensor_name=rng.choice(_names(model)))
    entry.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=rng.choice(_names(model)))
    training = model.training_info.add()
    training.algorithm.node.append(rng.choice(_nodes(model)))


def make_sparse(rng: random.Random, model: onnx.ModelProto) -> None:
    """An initializer in sparse form, of absurd dimensions or with indices outside."""
    tensor = rng.choice(list(model.graph.initializer))
    values = helper.make_tensor(tensor.name, TensorProto.FLOAT, [2], [1.0, 2.0])
    indices = [rng.choice((0, 1, *ABSURD)) for _ in range(2)]
    at = helper.make_tensor("", TensorProto.INT64, [2], indices)
    dims = list(tensor.dims)
    if dims and rng.random() < 0.5:
        dims[0] = rng.choice(ABSURD)
    model.graph.initializer.remove(tensor)
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, at, dims))


def reach_inside(rng: random.Random, model: onnx.ModelProto) -> None:
    """An inner tensor, constant or input becomes an output of the graph."""
    name = rng.choice(_names(model))
    kind = rng.choice((0, 1, 7))
    model.graph.output.append(helper.make_tensor_value_info(name, kind, None))


Mutation = Callable[[random.Random, onnx.ModelProto], None]
MUTATIONS: tuple[Mutation, ...] = (
    *(rename_input, rename_input, rename_output, rename_any, swap_inputs, change_inputs),
    *(change_operator, change_operator, change_domain, move_node, remove_entry, repeat_entry),
    *(clear_field, change_attribute, change_attribute, add_attribute, add_attribute),
    *(swap_attributes, change_dims, change_dims, change_values, change_values, swap_tensors),
    *(change_info, change_info, add_info, change_versions, move_outside, fill_hugely, loop_long),
    *(nest_deeply, call_itself, add_metadata, annotate, make_sparse, reach_inside),
)
