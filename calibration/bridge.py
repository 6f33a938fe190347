"""An ONNX graph as a torch module whose parameters are the model's own tensors, and back.

`bridge(model)` runs the graph, or the part of it between any of its tensors, node by node in
torch, differentiably. What a network trains are its float initializers and Constant nodes, each
one parameter under its own name however many nodes read it; `OnnxModule.to_model()` puts the
values back into the same graph, where nothing else changes. Shapes are computed as the graph says,
so that open batch and image sizes stay open.

Not parameters: statistics of BatchNormalization, numbers that are settings of an operator (bounds
of Clip, pads, scales) and one-element constants of plain arithmetic (the 3 and the 6 of a
spelled-out hard-swish), which belong to the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.errors import DataError, Problem, ProblemsError, UsageError
from graphfold.graph import DEFAULT_DOMAINS, Graph, node_label
from graphfold.tensors import values_by_name

try:
    import torch
except ModuleNotFoundError:
    raise UsageError(
        "torch is not installed", hint="pip install 'graphfold[torch]', or leave out what trains"
    ) from None

from torch import Tensor, nn

from graphfold.calibration import torch_operators, torch_shapes, torch_windows
from graphfold.calibration.torch_table import OPERATORS, Call, State

if TYPE_CHECKING:
    from graphfold.model import Model

_OLDEST_OPSET = 7  # broadcasting as in numpy since
_REGISTERED_BY = (torch_operators, torch_shapes, torch_windows)
_NUMPY_TYPES = frozenset("?bBhilqefd")  # what torch and numpy both have


class BridgeError(ProblemsError):
    """A graph with operators, attributes or types that do not run in torch; all are listed."""

    subject = "graph for torch"


@dataclass(frozen=True)
class _Step:
    """One node: what runs, on which tensors, and which of them nobody needs afterwards."""

    call: Call
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    done: tuple[str, ...]
    label: str


class _Source:
    """The model that a module was made of; copies of the module share it."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __deepcopy__(self, _: dict[int, Any]) -> _Source:
        return self


class OnnxModule(nn.Module):
    """A graph, or a part of one, in torch; made by `bridge`.

    Attributes:
        input_names: what `forward` takes, in this order where it is given tensors.
        output_names: what it returns.
        changes: functions by tensor name: what a node makes goes through its function before
            anything reads it.
        depthwise_share: part of a batch, its first images, that gradients of depthwise weights
            are taken of: see `torch_depthwise`. 1.0, the gradient itself, unless it is set.
        takes_more: whether `forward` passes over tensors that the graph has no input for.
    """

    def __init__(
        self,
        source: _Source,
        steps: Sequence[_Step],
        interface: tuple[Sequence[str], Sequence[str]],
        tensors: _Tensors,
        state: State,
        *,
        update_statistics: bool,
    ) -> None:
        super().__init__()
        self.input_names, self.output_names = tuple(interface[0]), tuple(interface[1])
        self._source = source
        self._steps = tuple(steps)
        self._state = state
        self._update_statistics = update_statistics
        self.depthwise_share = state.depthwise_share
        self.changes: dict[str, Callable[[Tensor], Tensor]] = {}
        self.takes_more = False
        self._numbers = tensors.numbers
        self._weight_keys = {name: _key(name) for name in tensors.weights}
        self._fixed_keys = {name: _key(name) for name in tensors.fixed}
        for name, value in tensors.weights.items():
            self.register_parameter(_key(name), nn.Parameter(value))
        for name, value in tensors.fixed.items():
            self.register_buffer(_key(name), value)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters by the names that they have in the ONNX file."""
        return {name: getattr(self, key) for name, key in self._weight_keys.items()}

    @property
    def fixed(self) -> dict[str, Tensor]:
        """Float tensors of the file that are not trained: statistics and parts of formulas."""
        return {name: getattr(self, key) for name, key in self._fixed_keys.items()}

    def maker(self, name: str) -> Call | None:
        """The node that makes a tensor, None where none of the module's does."""
        return next((step.call for step in self._steps if name in step.outputs), None)

    def readers(self, name: str) -> list[tuple[Call, int]]:
        """The nodes that read a tensor, each with the number of the input where it does."""
        return [
            (step.call, index)
            for step in self._steps
            for index, read in enumerate(step.inputs)
            if read == name
        ]

    def forward(self, *values: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph.

        Args:
            values: one mapping of tensors by input name, or the tensors in order. A mapping may
                also hold inputs that have a default value in the file.

        Raises:
            DataError: an input is missing, or unknown.
        """
        tensors: dict[str, Tensor] = {**self._numbers, **self.fixed, **self.weights}
        tensors.update(self._feeds(values))
        self._state.batch_statistics = self._update_statistics and self.training
        self._state.depthwise_share = self.depthwise_share
        for step in self._steps:
            inputs = [tensors[name] if name else None for name in step.inputs]
            try:
                results = OPERATORS[step.call.op_type].run(step.call, *inputs)
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                error.add_note(f"in {step.call.op_type} {step.label!r}")
                raise
            if isinstance(results, Tensor):
                results = (results,)
            tensors.update(zip(step.outputs, results, strict=False))
            for name in step.outputs if self.changes else ():
                if name in self.changes:
                    tensors[name] = self.changes[name](tensors[name])
            for name in step.done:
                tensors.pop(name, None)
        return {name: tensors[name] for name in self.output_names}

    def _feeds(self, values: tuple[Tensor | Mapping[str, Tensor], ...]) -> Mapping[str, Tensor]:
        feeds: dict[str, Tensor] = {}
        if len(values) == 1 and isinstance(values[0], Mapping):
            feeds.update(values[0])
        else:
            pairs = zip(self.input_names, values, strict=False)
            feeds.update({n: value for n, value in pairs if isinstance(value, Tensor)})
            if len(feeds) != len(values):
                raise DataError(
                    f"{len(values)} inputs given where tensors for {', '.join(self.input_names)} "
                    "are wanted",
                    hint="one tensor for each, or one mapping by name",
                )
        missing = [name for name in self.input_names if name not in feeds]
        known = self._weight_keys.keys() | self._fixed_keys.keys() | self._numbers.keys()
        unknown = [name for name in feeds if name not in self.input_names and name not in known]
        if self.takes_more:
            feeds = {name: value for name, value in feeds.items() if name not in unknown}
            unknown = []
        if missing or unknown:
            parts = [("missing", missing), ("unknown", unknown)]
            text = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names)
            raise DataError(f"inputs do not fit the graph: {text}")
        return feeds

    def to_model(self) -> Model:
        """The ONNX model with the present values: same graph, same names, same types.

        Tensors whose values are what they were come out as they came in, wherever they are stored.
        """
        model = self._source.model.clone()
        values = values_by_name(model.ir.graph)
        for name, tensor in (*self.weights.items(), *self.fixed.items()):
            value = values[name]
            before = _stored(value)
            assert before is not None
            dtype = torch.from_numpy(np.empty(0, before.dtype)).dtype
            array = tensor.detach().to("cpu", dtype).numpy()
            if not np.array_equal(before, array, equal_nan=True):
                _store(value, array.copy())
        return model


def bridge(
    model: Model,
    *,
    outputs: Sequence[str] | None = None,
    inputs: Sequence[str] | None = None,
    update_statistics: bool = False,
) -> OnnxModule:
    """Make a torch module of a model, or of what lies between some of its tensors.

    Args:
        model: the model; it is not changed, and its tensors are copied.
        outputs: names of tensors to return, anywhere in the graph; the graph's outputs by default.
        inputs: names of tensors that are fed, anywhere in the graph; by default the inputs of the
            graph that `outputs` depend on.
        update_statistics: while the module is in training mode, BatchNormalization normalises by
            the batch and moves its running statistics; otherwise it always uses what the file says.

    Raises:
        UsageError: no such tensor, or `outputs` depend on a graph input that is not in `inputs`.
        BridgeError: something does not run in torch; the message lists all of it.
    """
    graph = model.ir.graph
    values = values_by_name(graph)
    wanted = _find(values, outputs, [value.name or "" for value in graph.outputs])
    fed = _find(values, inputs, [])
    exits = {values[name] for name in wanted}
    nodes = _between(graph, {values[name] for name in fed}, exits)
    needed = _graph_inputs(graph, nodes, wanted)
    open_inputs = [name for name in needed if name not in fed]
    if inputs is None:
        fed = open_inputs
    elif open_inputs:
        raise UsageError(
            f"{', '.join(wanted)} cannot be computed from {', '.join(fed)} alone: "
            f"{', '.join(open_inputs)} is read too",
            hint="name it among the inputs",
        )
    state = State()
    opset = Graph(model, {}).opset
    calls = {node: _call(node, opset, state, exits) for node in nodes}
    _refuse(calls, opset)
    tensors = _collect(calls, exits, set(fed))
    return OnnxModule(
        _Source(model.clone()),
        list(_steps(calls, set(wanted), set(fed))),
        (fed, wanted),
        tensors,
        state,
        update_statistics=update_statistics,
    )


def _find(
    values: Mapping[str, ir.Value], names: Sequence[str] | None, default: Sequence[str]
) -> list[str]:
    """The names, each once; an error for those that no tensor has."""
    chosen = list(dict.fromkeys(default if names is None else names))
    unknown = [name for name in chosen if name not in values]
    if unknown:
        raise UsageError(
            f"no such tensor in the graph: {', '.join(unknown)}", hint="names are case-sensitive"
        )
    return chosen


def _between(graph: ir.Graph, entries: set[ir.Value], exits: Iterable[ir.Value]) -> list[ir.Node]:
    """Nodes that the exits are computed from, back to the entries, in execution order."""
    found: set[ir.Node] = set()
    stack = list(exits)
    while stack:
        value = stack.pop()
        node = value.producer()
        if value in entries or node is None or node in found or _is_constant_node(node):
            continue
        found.add(node)
        stack.extend(source for source in node.inputs if source is not None)
    return [node for node in graph if node in found]


def _graph_inputs(graph: ir.Graph, nodes: Sequence[ir.Node], wanted: Sequence[str]) -> list[str]:
    """Inputs of the graph that these nodes read and that have no value in the file."""
    read = {value for node in nodes for value in node.inputs}
    return [
        value.name or ""
        for value in graph.inputs
        if not value.is_initializer() and (value in read or value.name in wanted)
    ]


def _is_constant_node(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS


# --- nodes ------------------------------------------------------------------------------------


def _call(node: ir.Node, opset: int, state: State, exits: set[ir.Value]) -> Call:
    return Call(
        node.op_type,
        opset,
        {attr.name: _attribute_value(attr) for attr in node.attributes.values()},
        tuple(value is not None for value in node.inputs),
        tuple(
            _name(value) if value.uses() or value.is_graph_output() or value in exits else ""
            for value in node.outputs
        ),
        state,
    )


def _attribute_value(attr: ir.Attr) -> Any:
    if attr.type != ir.AttributeType.TENSOR:
        return attr.value
    array = attr.as_tensor().numpy()
    # What torch does not have is for the operator to refuse.
    return _torch_tensor(array) if array.dtype.char in _NUMPY_TYPES else array


def _refuse(calls: Mapping[ir.Node, Call], opset: int) -> None:
    """Raise one error for everything that cannot run."""
    places: dict[tuple[str, str], list[str]] = {}
    for node, call in calls.items():
        reason = _reason(node, call)
        if reason is not None:
            label = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            places.setdefault((label, reason), []).append(node_label(node))
    problems = [
        Problem(op_type, f"{reason}: {', '.join(labels)}")
        for (op_type, reason), labels in places.items()
    ]
    if calls and opset < _OLDEST_OPSET:
        hint = "convert it with onnx.version_converter"
        problems.insert(0, Problem("opset", f"{opset} is older than {_OLDEST_OPSET}", hint))
    if problems:
        raise BridgeError(problems)


def _reason(node: ir.Node, call: Call) -> str | None:
    entry = OPERATORS.get(node.op_type) if node.domain in DEFAULT_DOMAINS else None
    if entry is None:
        return "not supported"
    return None if entry.refuses is None else entry.refuses(call)


def _steps(calls: Mapping[ir.Node, Call], kept: set[str], fed: set[str]) -> Iterator[_Step]:
    """The nodes as steps, each with the tensors that are read for the last time.

    What is fed stays as fed, also where a node with several outputs would make it anew.
    """
    last = {value: node for node in calls for value in node.inputs if value is not None}
    for node, call in calls.items():
        done = [value for value in node.outputs if value not in last]
        done += [value for value in dict.fromkeys(node.inputs) if value and last[value] is node]
        yield _Step(
            call,
            tuple("" if value is None else _name(value) for value in node.inputs),
            tuple("" if _name(value) in fed else _name(value) for value in node.outputs),
            tuple(name for value in done if (name := _name(value)) not in kept),
            node_label(node),
        )


def _name(value: ir.Value) -> str:
    return value.name or ""


# --- tensors ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensors:
    """Constants of the part that runs, by name.

    Attributes:
        weights: what is trained.
        fixed: floats that take part in the computation and are not trained.
        numbers: integers, and settings of operators; they stay on the CPU.
    """

    weights: dict[str, Tensor]
    fixed: dict[str, Tensor]
    numbers: dict[str, Tensor]


def _collect(calls: Mapping[ir.Node, Call], exposed: Iterable[ir.Value], fed: set[str]) -> _Tensors:
    """Find the constants that the nodes read, and what each is for.

    A tensor that serves two ends is trained only if both would have it trained: an exporter may
    have stored equal statistics and biases once.
    """
    readers: dict[ir.Value, list[tuple[ir.Node, int]]] = {value: [] for value in exposed}
    for node in calls:
        for index, value in enumerate(node.inputs):
            if value is not None:
                readers.setdefault(value, []).append((node, index))
    found = _Tensors({}, {}, {})
    problems = []
    for value, uses in readers.items():
        constant = value.is_initializer() or _is_constant_node(value.producer())
        if not constant or _name(value) in fed:
            continue
        array = _stored(value)
        if array is None or array.dtype.char not in _NUMPY_TYPES:
            kind = "no numbers" if array is None else f"element type {array.dtype}"
            problems.append(Problem(_name(value), f"{kind}, which torch cannot compute with here"))
            continue
        _bin_for(found, array, uses)[_name(value)] = _torch_tensor(array)
    if problems:
        raise BridgeError(problems)
    return found


def _bin_for(
    found: _Tensors, array: NDArray[Any], uses: Sequence[tuple[ir.Node, int]]
) -> dict[str, Tensor]:
    entries = [(OPERATORS[node.op_type], index) for node, index in uses]
    is_setting = [index in entry.settings for entry, index in entries]
    if not np.issubdtype(array.dtype, np.floating) or (entries and all(is_setting)):
        return found.numbers
    for (entry, index), setting in zip(entries, is_setting, strict=True):
        scalar = entry.keeps_scalars and math.prod(array.shape) == 1
        if setting or scalar or index in entry.statistics:
            return found.fixed
    return found.weights


def _stored(value: ir.Value) -> NDArray[Any] | None:
    """The array behind an initializer or a Constant node, None where that holds no numbers."""
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None:
        return None
    for name, attr in node.attributes.items():
        if name == "value":
            return attr.as_tensor().numpy()
        if name in ("value_float", "value_floats"):
            return np.asarray(attr.value, dtype=np.float32)
        if name in ("value_int", "value_ints"):
            return np.asarray(attr.value, dtype=np.int64)
    return None


def _store(value: ir.Value, array: NDArray[Any]) -> None:
    """Put an array where `_stored` reads it."""
    tensor = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=value.name)
    node = value.producer()
    if node is None:
        value.const_value = tensor
        return
    node.attributes.clear()
    node.attributes["value"] = ir.AttrTensor("value", tensor)
    if value.const_value is not None:
        value.const_value = tensor


def _torch_tensor(array: NDArray[Any]) -> Tensor:
    # A copy: training must not write into the model.
    return torch.from_numpy(np.array(array))


def _key(name: str) -> str:
    """A name that torch accepts for a parameter: no dots, and no attribute of a module."""
    return "onnx:" + name.replace("%", "%25").replace(".", "%2E")
