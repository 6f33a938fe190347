"""What passes ask of a graph: producers, consumers, constants, shapes, safe replacement.

Thin functions and one small class on onnx-ir's use-def links; nothing here scans the whole graph
more than once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold import constants, spill, tensors
from graphfold.shapes import TensorShape, declared_shape, infer_shapes

if TYPE_CHECKING:
    from graphfold.model import Model

# Operators whose result has a type of its own, whatever they read.
_INDEX_MAKERS = ("Shape", "Size", "NonZero", "ArgMax", "ArgMin")
_COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf")

DEFAULT_DOMAINS = ("", "ai.onnx")
# From this IR version on, an initializer that is also a graph input is a default value.
_OPTIONAL_INPUTS_IR_VERSION = 4


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether `node` is one of these operators of the default ONNX domain."""
    return node is not None and node.domain in DEFAULT_DOMAINS and node.op_type in op_types


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The attribute's Python value, or `default` where the node does not carry it.

    A reference attribute (inside a function body) has no value: `default` is returned and
    callers that must know use `has_reference_attributes`.
    """
    # The dictionary itself: through the mapping's own `get` this takes three times as long.
    found = node.attributes.data.get(name)
    if found is None or found.is_ref():
        return default
    return found.value


def has_reference_attributes(node: ir.Node) -> bool:
    """Whether some attribute's value is only known where the enclosing function is called."""
    return any(attr.is_ref() for attr in node.attributes.data.values())


def consumers(value: ir.Value) -> list[ir.Node]:
    """Nodes that read `value`, each once, in order of first use."""
    return list(dict.fromkeys(usage.node for usage in value.uses()))


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value` and nothing else does, graph outputs included."""
    if value.is_graph_output():
        return None
    readers = consumers(value)
    return readers[0] if len(readers) == 1 else None


class Graph:
    """One graph of a model, the main one by default, with constants, shapes and names at hand.

    Args:
        model: the loaded model; passes edit its graph in place.
        shapes: inferred shapes by tensor name, see `infer_shapes`.
        body: a subgraph or a function's body instead of the main graph.
        opsets: operator sets that the body's nodes belong to.
        names: of all tensors that new ones must differ from; the graph's own by default.
        in_function: the body is a function's or lies in one: it has no initializers.
    """

    def __init__(
        self,
        model: Model,
        shapes: dict[str, TensorShape] | None = None,
        *,
        body: ir.Graph | None = None,
        opsets: Mapping[str, int] | None = None,
        names: set[str] | None = None,
        in_function: bool = False,
    ) -> None:
        self.model = model
        self.ir = model.ir.graph if body is None else body
        self.opsets = model.ir.opset_imports if opsets is None else opsets
        self.in_function = in_function
        self.shapes = infer_shapes(model) if shapes is None else shapes
        self.names = _all_names(self.ir) if names is None else names
        self._constants: dict[ir.Value, NDArray[Any] | None] = {}
        self._is_constant: dict[ir.Value, bool] = {}
        self._dtypes: dict[ir.Value, ir.DataType | None] = {}
        self._moved: dict[ir.Value, ir.Value] = {}
        self._spill: spill.Spill | None = None
        self._spill_known = False
        # Set where something became constant that shapes may depend on.
        self.shapes_may_grow = False
        # Grows whenever more became known of shapes.
        self.shapes_version = 0

    @property
    def opset(self) -> int:
        """Version of the default ONNX operator set that the graph's nodes belong to."""
        return self.opsets.get("", self.opsets.get("ai.onnx", 1))

    @property
    def is_main(self) -> bool:
        """Whether this is the model's main graph."""
        return self.ir is self.model.ir.graph

    @property
    def holds_initializers(self) -> bool:
        """Whether constants can be added as initializers without becoming inputs."""
        ir_version = self.model.ir.ir_version or 0
        return ir_version >= _OPTIONAL_INPUTS_IR_VERSION and not self.in_function

    def refine_shapes(self) -> bool:
        """Infer shapes again, after constants became known, and add what was not known yet.

        Bodies wait for the main graph's turn: there is one inference for the whole model.

        Returns:
            Whether a tensor of the graph has a shape that is better known than before.
        """
        if not self.is_main:
            return False
        learned = False
        for name, found in infer_shapes(self.model).items():
            known = self.shapes.get(name)
            if known is None:
                better = found
            elif len(known) == len(found):
                better = tuple(
                    other if isinstance(other, int) and not isinstance(size, int) else size
                    for size, other in zip(known, found, strict=True)
                )
            else:
                continue
            learned |= better != known
            self.shapes[name] = better
        self.shapes_version += learned
        return learned

    def has_open_shapes(self) -> bool:
        """Whether the shape of some node's result is not known in full."""
        return any(
            not all(isinstance(size, int) for size in self.shape(value) or (None,))
            for node in self.ir
            for value in node.outputs
            if value.uses()
        )

    def nodes(self) -> list[ir.Node]:
        """The nodes in execution order, as a list that stays valid while the graph is edited."""
        return list(self.ir)

    def shape(self, value: ir.Value | None) -> TensorShape | None:
        """Shape of a tensor; None where its rank is unknown."""
        if value is None:
            return None
        if value.name is not None and value.name in self.shapes:
            return self.shapes[value.name]
        return declared_shape(value)

    def sizes(self, value: ir.Value | None) -> tuple[int | None, ...] | None:
        """Spatial sizes of an [N, C, ...] tensor, None for each that is not fixed."""
        shape = self.shape(value)
        if shape is None or len(shape) < 2:
            return None
        return tuple(dim if isinstance(dim, int) else None for dim in shape[2:])

    def channels(self, value: ir.Value | None) -> int | None:
        """Number of channels (axis 1) where it is fixed."""
        shape = self.shape(value)
        if shape is None or len(shape) < 2 or not isinstance(shape[1], int):
            return None
        return shape[1]

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Element type of a tensor, from its type, its constant, or what made it."""
        trail: list[ir.Value] = []
        found = None
        source: ir.Value | None = value
        while source is not None and source not in self._dtypes:
            trail.append(source)
            found = self._own_dtype(source)
            if found is not None:
                break
            producer = source.producer()
            source = producer.inputs[0] if producer is not None and producer.inputs else None
        if source is not None and source in self._dtypes:
            found = self._dtypes[source]
        self._dtypes.update(dict.fromkeys(trail, found))
        return found

    def _own_dtype(self, value: ir.Value) -> ir.DataType | None:
        # A declaration may contradict what it declares.
        if value.const_value is not None:
            return value.const_value.dtype
        if value.dtype not in (None, ir.DataType.UNDEFINED):
            return value.dtype
        producer = value.producer()
        if producer is not None and is_op(producer, "Cast"):
            return ir.DataType(attribute(producer, "to"))
        if producer is not None and is_op(producer, *_INDEX_MAKERS):
            return ir.DataType.INT64
        if producer is not None and is_op(producer, *_COMPARISONS):
            return ir.DataType.BOOL
        if producer is not None and is_op(producer, "ConstantOfShape"):
            # Its input is a shape, and says nothing of the type.
            filling = producer.attributes.get("value")
            return ir.DataType.FLOAT if filling is None else filling.as_tensor().dtype
        if is_op(producer, "Constant"):
            constant = self.constant(value)
            return None if constant is None else ir.DataType.from_numpy(constant.dtype)
        return None

    def is_overridable(self, value: ir.Value) -> bool:
        """An initializer that callers may replace at run time: also a graph input, IR >= 4."""
        ir_version = self.model.ir.ir_version or 0
        optional = ir_version >= _OPTIONAL_INPUTS_IR_VERSION or not self.is_main
        return optional and value.is_graph_input() and value.is_initializer()

    def constant(self, value: ir.Value | None) -> NDArray[Any] | None:
        """The tensor's value where it is fixed in the model, else None.

        Initializers that callers may override are not constants.
        """
        if value is None:
            return None
        if value not in self._constants:
            self._constants[value] = self._constant(value)
        return self._constants[value]

    def is_constant(self, value: ir.Value | None) -> bool:
        """Like `constant(value) is not None`, without reading large tensors' data."""
        if value is None:
            return False
        if value not in self._is_constant:
            self._is_constant[value] = self._find_out_constant(value)
        return self._is_constant[value]

    def _find_out_constant(self, value: ir.Value) -> bool:
        if value.is_initializer():
            tensor = value.const_value
            if tensor is None or self.is_overridable(value):
                return False
            return not tensors.is_sparse(tensor) or tensor.size <= constants.LARGEST_FILL
        producer = value.producer()
        if producer is None or has_reference_attributes(producer):
            return False
        if is_op(producer, "Constant"):
            return True
        if not is_op(producer, *constants.TRANSPARENT):
            return False
        sources = [source for source in producer.inputs if source is not None]
        if not all(self.is_constant(source) for source in sources):
            return False
        if is_op(producer, "ConstantOfShape"):
            return constants.can_be_filled(self.constant(sources[0]) if sources else None)
        return True

    def _constant(self, value: ir.Value) -> NDArray[Any] | None:
        if not self.is_constant(value):
            return None
        if value.is_initializer() and value.const_value is not None:
            return value.const_value.numpy()
        producer = value.producer()
        assert producer is not None
        if is_op(producer, "Constant"):
            return constants.node_value(producer)
        inputs = [None if source is None else self.constant(source) for source in producer.inputs]
        return constants.evaluate(producer, inputs)

    def constant_tensor(self, value: ir.Value) -> ir.TensorProtocol | None:
        """The tensor behind a constant as it is stored, else computed; None for what is none."""
        if not self.is_constant(value):
            return None
        if value.const_value is not None:
            return value.const_value
        array = self.constant(value)
        return None if array is None else ir.tensor(array, name=value.name)

    def current(self, value: ir.Value) -> ir.Value:
        """The tensor that stands for `value` after what was replaced and bypassed since."""
        while value in self._moved:
            value = self._moved[value]
        return value

    def fresh_name(self, base: str) -> str:
        """A new tensor name `<base>/graphfold.N` that nothing in the model uses."""
        number = 0
        while f"{base}/graphfold.{number}" in self.names:
            number += 1
        name = f"{base}/graphfold.{number}"
        self.names.add(name)
        return name

    def add_initializer(self, base: str, data: NDArray[Any]) -> ir.Value:
        """Register `data` as a new initializer named after tensor `base`.

        Before IR version 4 every initializer had to be a graph input; a Constant node keeps the
        interface as it is. Functions have no initializers at all.
        """
        name = self.fresh_name(base)
        dtype = ir.DataType.from_numpy(data.dtype)
        plain = ir.Tensor(np.ascontiguousarray(data).reshape(data.shape), dtype, name=name)
        tensor = self._stored(plain)
        self.shapes[name] = tuple(int(size) for size in data.shape)
        if not self.holds_initializers:
            return self._add_constant_node(name, tensor)
        value = ir.Value(name=name, shape=ir.Shape(data.shape), const_value=tensor)
        value.type = ir.TensorType(tensor.dtype)
        self.ir.register_initializer(value)
        return value

    def _stored(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """The tensor, or its copy on disk where the model is too large for memory."""
        if not spill.is_large(tensor):
            return tensor
        if not self._spill_known:
            self._spill, self._spill_known = spill.spill_for(self.model.ir.graph), True
        return tensor if self._spill is None else self._spill.keep(tensor)

    def _add_constant_node(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)])
        first = next(iter(self.ir), None)
        if first is None:
            self.ir.append(node)
        else:
            self.ir.insert_before(first, node)
        node.outputs[0].name = name
        return node.outputs[0]

    def rename(self, value: ir.Value, name: str) -> None:
        """Give a tensor another name and keep its shape known."""
        if value.name is not None and value.name in self.shapes:
            self.shapes[name] = self.shapes.pop(value.name)
        value.name = name
        self.names.add(name)

    def bypass(self, output: ir.Value, source: ir.Value, *, shared: bool = False) -> ir.Value:
        """Let every reader of `output` read `source` instead; interface names survive.

        Where `output` is a graph output, its name moves to `source`, or an Identity carries it
        when `source` is itself part of the interface or, unless `shared`, read elsewhere.

        Returns:
            the tensor that now stands for `output`.
        """
        producer = output.producer()
        if not output.is_graph_output():
            output.replace_all_uses_with(source)
            self._moved[output] = source
            return source
        assert producer is not None
        kept = not shared and len(consumers(source)) > 1
        if source.producer() is None or source.is_graph_output() or kept:
            return self._bypass_with_identity(output, source, producer)
        name = output.name
        assert name is not None
        self._move_output_fields(output, source)
        output.name = None
        output.replace_all_uses_with(source, replace_graph_outputs=True)
        self.rename(source, name)
        self._moved[output] = source
        return source

    def _bypass_with_identity(
        self, output: ir.Value, source: ir.Value, producer: ir.Node
    ) -> ir.Value:
        for usage in list(output.uses()):
            usage.node.replace_input_with(usage.idx, source)
        identity = ir.Node("", "Identity", [source])
        self.ir.insert_before(producer, identity)
        self.take_over(output, identity.outputs[0])
        return identity.outputs[0]

    def take_over(self, old: ir.Value, new: ir.Value) -> None:
        """Put `new` in the place of `old` everywhere: name, type, shape, uses, graph outputs."""
        name = old.name
        self._move_output_fields(old, new)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = None
        new.name = name
        self._moved[old] = new

    @staticmethod
    def _move_output_fields(old: ir.Value, new: ir.Value) -> None:
        new.type = old.type
        new.shape = old.shape
        new.doc_string = old.doc_string
        new.metadata_props.update(old.metadata_props)
        new.meta.update(old.meta)

    def remove_dead(self, candidates: Iterable[ir.Node]) -> list[ir.Node]:
        """Remove those of `candidates`, and what only fed them, that nothing reads any more.

        Initializers that lose their last reader go too, unless they are graph inputs or
        outputs, or training information may name them. Nodes and initializers that were unused
        before are left alone.
        """
        removed: list[ir.Node] = []
        queue = list(candidates)
        while queue:
            node = queue.pop()
            if node.graph is None or any(
                output.uses() or output.is_graph_output() for output in node.outputs
            ):
                continue
            inputs = [value for value in node.inputs if value is not None]
            self.ir.remove(node, safe=True)
            removed.append(node)
            for value in inputs:
                self._drop_if_unused(value, queue)
        return removed

    def _drop_if_unused(self, value: ir.Value, queue: list[ir.Node]) -> None:
        if value.uses() or value.is_graph_output():
            return
        producer = value.producer()
        if producer is not None:
            queue.append(producer)
        elif (
            value.is_initializer()
            and not value.is_graph_input()
            and not self.model.has_training_info
        ):
            assert value.name is not None
            self.ir.initializers.pop(value.name, None)
            self._constants.pop(value, None)
            spill.let_go(value.const_value)

    def drop_if_unused(self, value: ir.Value) -> None:
        """Remove a tensor that nothing reads any more, with what only it needed."""
        queue: list[ir.Node] = []
        self._drop_if_unused(value, queue)
        self.remove_dead(queue)

    def values(self) -> dict[str, ir.Value]:
        """All named tensors of the graph: inputs, initializers and node outputs."""
        found: dict[str, ir.Value] = {}
        for value in (*self.ir.inputs, *self.ir.initializers.values()):
            if value.name:
                found[value.name] = value
        for node in self.ir:
            for value in node.outputs:
                if value.name:
                    found[value.name] = value
        return found


def _all_names(graph: ir.Graph) -> set[str]:
    names: set[str] = set()
    for value in (*graph.inputs, *graph.initializers.values()):
        names.add(value.name or "")
    for node in ir.traversal.RecursiveGraphIterator(graph):
        names.update(value.name or "" for value in node.outputs)
    for subgraph in graph.subgraphs():
        names.update(value.name or "" for value in subgraph.inputs)
        names.update(subgraph.initializers)
    return names


def node_label(node: ir.Node) -> str:
    """How messages and provenance call a node: its name, else its first output tensor."""
    if node.name:
        return node.name
    return next((value.name for value in node.outputs if value.name), node.op_type)


def nodes_between(entry: ir.Value, output: ir.Value) -> set[ir.Node]:
    """Everything that `output` is computed from, walking backwards and stopping at `entry`."""
    region: set[ir.Node] = set()
    stack = [output]
    while stack:
        value = stack.pop()
        producer = value.producer()
        if value is entry or producer is None or producer in region:
            continue
        region.add(producer)
        stack.extend(source for source in producer.inputs if source is not None)
    return region


def topological_between(
    entry: ir.Value, output: ir.Value, order: dict[ir.Node, int]
) -> Sequence[ir.Node]:
    """`nodes_between` in execution order; other entries are found by the caller."""
    return sorted(nodes_between(entry, output), key=order.__getitem__)
