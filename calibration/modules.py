"""Plans for torch modules: the user's own network and loop, with what the plan means inside.

`export` gives the ONNX model that a plan is made for. `apply_plan` gives a module that computes the
plan's reference network with the parameters of the one that was given: activations and convolutions
removed, padding where the plan says, free activations added. It trains in any loop. `fold` exports
what it has become and merges it.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphfold.calibration import bridge  # noqa: F401 - says what to install without torch
from graphfold.calibration.capture import run_part
from graphfold.calibration.module_calls import (
    Changed,
    Edit,
    Event,
    Key,
    Pads,
    out_of_place,
    record,
)
from graphfold.calibration.module_match import Match, match, operand, pads_of
from graphfold.errors import PlanError, Problem, UsageError, VerificationError
from graphfold.free import with_free_activations
from graphfold.graph import Graph, is_op, node_label
from graphfold.importers import expand_short_forms
from graphfold.linear import zero_padding
from graphfold.model import load, to_proto
from graphfold.optimizer import Result, optimize_model
from graphfold.plan import LikeActivation, Plan, PlanSource, read_plan
from graphfold.reference import build_reference
from graphfold.resolve import ResolvedPlan, resolve_plan
from graphfold.rewrite import select_passes
from graphfold.sites import find_sites

import torch  # isort: skip
from torch import Tensor, nn  # isort: skip
from torch.nn import functional as F  # isort: skip # noqa: N812 - the usual name

if TYPE_CHECKING:
    from graphfold.model import Model

_TOLERANCE = 1e-4  # of the scale: the module that a plan was applied to against its reference
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": F.relu,
    "Relu6": F.relu6,
    "HardSwish": F.hardswish,
    "SiLU": F.silu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "GELU": F.gelu,
    "Mish": F.mish,
}

Export = Callable[[nn.Module, tuple[Any, ...]], "Model"]


def export(module: nn.Module, example: Any) -> Model:
    """The ONNX model of a module, as plans for it name things.

    Normalisations stay what they are, initializers have the parameters' names, the batch is open.
    Names are the same each time.

    Args:
        module: exported in evaluation mode; it comes back as it was.
        example: an input, or a tuple of them.
    """
    inputs = _tuple(example)
    names = [f"input{number}" if number else "input" for number in range(len(inputs))]
    was_training = module.training
    module.eval()
    buffer = io.BytesIO()
    try:
        # The exporter that is used here keeps names and normalisations, takes less than a second
        # where the newer one takes ten, and writes to a buffer although it is not declared to.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter tells of its own successor
            torch.onnx.export(
                module,
                inputs,
                buffer,  # type: ignore[arg-type]
                dynamo=False,
                do_constant_folding=False,
                training=torch.onnx.TrainingMode.PRESERVE,
                input_names=names,
                output_names=["output"],
                dynamic_axes={name: {0: "N"} for name in (*names, "output")},
            )
    finally:
        module.train(was_training)
    return load(buffer.getvalue())


@dataclass(frozen=True)
class Applied:
    """A module that computes what a plan means.

    Attributes:
        module: to train; its parameters are those of the module that was given.
        plan: as it was applied, with its free activations.
        original: the model that the given module was exported as.
    """

    module: Changed
    plan: Plan
    original: Model
    _example: tuple[Any, ...]
    _export: Export

    def fold(self, **options: Any) -> Result:
        """Merge what the module has become.

        Args:
            options: of `graphfold.optimizer.optimize_model`.

        Raises:
            VerificationError: the folded network differs from the module.
        """
        model = self._export(self.module.module, self._example)
        result = optimize_model(model, self.plan, **options)
        _check_same(self.module, self._example, result.folded, "the folded network")
        return result


def apply_plan(
    module: nn.Module,
    plan: PlanSource,
    example: Any,
    *,
    free_activations: bool = True,
    export: Export = export,
) -> Applied:
    """Make a module of what a plan means on a module.

    Args:
        module: with its present weights; its calls are changed while the new module runs, it is
            not.
        plan: for the model that `export` gives.
        example: an input, or a tuple of them, as the module takes them.
        free_activations: add the module's own activation behind merged segments that end without
            one, see `graphfold.free`.
        export: gives the ONNX model of a module and an example, with the same names each time.

    Raises:
        PlanError: the plan does not fit, or names what is not found in the module; all of it.
        VerificationError: the module computes something else than the plan's reference network.
    """
    inputs = _tuple(example)
    model = export(module, inputs)
    graph = Graph(model)
    stated = read_plan(plan).model_copy(update={"model": None})
    if stated.is_fitted or stated.quantize is not None:
        raise UsageError(
            "fitted segments and quantization are made of an ONNX file, not of a module",
            hint="graphfold finetune takes such a plan",
        )
    if free_activations:
        stated, _ = with_free_activations(graph, stated)
    edits = _Edits(model, graph, record(module, inputs), stated).make()
    found = Applied(Changed(module, edits), stated, model, inputs, export)
    reference = build_reference(model, stated, select_passes())
    _check_same(found.module, inputs, reference.model, "the plan's reference network")
    return found


@dataclass(frozen=True)
class ModuleSites:
    """The activation sites of a module's exported model, found in the module.

    Attributes:
        model: as `export` gives it.
        activations: the call that each site is, by the site's name.
        missing: sites that are no single call of the module.
    """

    model: Model
    activations: dict[str, Key]
    missing: tuple[str, ...]


def module_sites(module: nn.Module, example: Any, *, export: Export = export) -> ModuleSites:
    """Find a module's activation sites, to put something of one's own there.

    `module_calls.Changed` with an `Edit` for each call runs the module so.

    Args:
        module: in any mode.
        example: an input, or a tuple of them.
        export: gives the ONNX model of a module and an example.
    """
    inputs = _tuple(example)
    model = export(module, inputs)
    graph = Graph(model)
    sites = find_sites(graph)
    found = match(graph, sites, record(module, inputs)).activations
    return ModuleSites(
        model,
        {site.name: event.key for site, event in found.items()},
        tuple(site.name for site in sites.activations if site not in found),
    )


def _tuple(example: Any) -> tuple[Any, ...]:
    return tuple(example) if isinstance(example, (tuple, list)) else (example,)


def _check_same(module: nn.Module, example: Sequence[Any], model: Model, what: str) -> None:
    """Compare a module with an ONNX model on the example.

    Raises:
        VerificationError: they differ.
    """
    was_training = module.training
    module.eval()
    with torch.no_grad():
        given = module(*example)
    module.train(was_training)
    if isinstance(given, Mapping):
        given = list(given.values())
    own = [given] if isinstance(given, Tensor) else list(given)
    names = [item.name or "" for item in model.ir.graph.inputs if not item.is_initializer()]
    feed = {name: item.cpu().numpy() for name, item in zip(names, example, strict=True)}
    outputs = run_part(to_proto(model), 0)(feed)
    for name, mine in zip(outputs, own, strict=True):
        theirs = outputs[name]
        difference = float(np.abs(mine.cpu().numpy() - theirs).max())
        scale = float(np.abs(theirs).max())
        if not difference <= _TOLERANCE * scale:
            raise VerificationError(
                f"the module's {name} differs from {what} by {difference / scale:.1e} of its scale",
                hint="a module whose calls change from run to run cannot be planned for",
            )


# --- from the plan to the calls ---------------------------------------------------------------


class _Edits:
    """What a plan changes in a module's calls."""

    def __init__(self, model: Model, graph: Graph, events: Sequence[Event], plan: Plan) -> None:
        self._model, self._graph, self._plan = model, graph, plan
        self._sites = find_sites(graph)
        self._match: Match = match(graph, self._sites, events)
        self._events = events
        self._edits: dict[Key, Edit] = {}
        self._problems: list[Problem] = []

    def make(self) -> dict[Key, Edit]:
        """The edits.

        Raises:
            PlanError: what the plan changes is not found in the module.
        """
        resolved = resolve_plan(self._graph, self._plan)
        for node in self._match.unmatched:
            # A constant that is multiplied with may be no layer's.
            if not is_op(node, "MatMul"):
                self._missing(node.outputs[0].name, f"the {node.op_type}")
        self._remove(resolved)
        self._move_padding()
        self._drop(resolved)
        self._add(resolved)
        if self._problems:
            raise PlanError(list(dict.fromkeys(self._problems)))
        return self._edits

    def _edit(self, event: Event) -> Edit:
        return self._edits.setdefault(event.key, Edit())

    def _missing(self, name: str | None, what: str) -> None:
        hint = "it is found by its weights, by those around it, or by the exporter's scopes"
        self._problems.append(Problem(name or "?", f"{what} is not found in the module", hint))

    def _remove(self, resolved: ResolvedPlan) -> None:
        segments = [each for each in resolved.segments if each.spec.family != "identity"]
        removed = [*resolved.activations, *(s for each in segments for s in each.activations)]
        for site in removed:
            event = self._match.activations.get(site)
            if event is None:
                self._missing(site.name, f"the activation ({site.kind})")
            else:
                self._edit(event).skip = True
        for conv in [*resolved.convs, *(c for each in segments for c in each.convs)]:
            pair = self._match.weighted.get(conv.conv)
            if pair is None or any(is_op(node, "Pad") for node in conv.nodes):
                self._missing(conv.name, "the convolution")
                continue
            for event in (pair.event, pair.norm):
                if event is not None:
                    self._edit(event).skip = True

    def _move_padding(self) -> None:
        """What the reference network pads and crops otherwise than the model."""
        plain = _without_free(self._graph, self._plan)
        reference = build_reference(self._model, plain, select_passes()).graph
        present = {node.outputs[0].name: node for node in reference.ir if node.outputs}
        known = self._graph.values()
        for node in self._graph.ir:
            after = present.get(node.outputs[0].name) if node.outputs else None
            if after is None:
                continue
            if is_op(node, "Conv", "AveragePool"):
                rank = len(node.attributes["kernel_shape"].as_ints())
                if pads_of(node, rank) != pads_of(after, rank):
                    self._pad_window(node, pads_of(after, rank))
            for index, value in enumerate(after.inputs):
                producer = None if value is None else value.producer()
                if is_op(producer, "Pad") and value is not None and value.name not in known:
                    assert producer is not None
                    self._pad_operand(node, index, _amounts(reference, producer))

    def _pad_window(self, node: ir.Node, pads: Pads) -> None:
        pair = self._match.weighted.get(node)
        if pair is None:
            self._missing(node.outputs[0].name, "what is padded")
        else:
            self._edit(pair.event).padding = pads

    def _pad_operand(self, node: ir.Node, index: int, pads: Pads) -> None:
        event = self._match.adds.get(node)
        number = None if event is None else operand(self._graph, self._match, node, index)
        if event is None or number is None:
            self._missing(node_label(node), "the addition that is padded")
        else:
            self._edit(event).pads[number] = pads

    def _drop(self, resolved: ResolvedPlan) -> None:
        """Segments of which nothing stays: their result is what they read."""
        for segment in resolved.segments:
            if segment.spec.family != "identity":
                continue
            ends = [self._maker(value) for value in (segment.input, segment.output)]
            if ends[0] is None or ends[1] is None:
                self._missing(segment.path, "an end of the segment")
                continue
            self._edit(ends[0]).saved = segment.input.name
            self._edit(ends[1]).replaced_by = segment.input.name

    def _add(self, resolved: ResolvedPlan) -> None:
        for added in resolved.added:
            event = self._maker(added.value)
            if event is None:
                self._missing(added.value.name, "what the free activation follows")
                continue
            function = self._function(added.path, added.activation)
            if function is not None:
                self._edit(event).after = function

    def _function(
        self, path: str, activation: str | LikeActivation
    ) -> Callable[[Tensor], Tensor] | None:
        if isinstance(activation, str):
            return _FUNCTIONS[activation]
        sites = {site.name: site for site in self._sites.activations}
        event = self._match.activations.get(sites[activation.like])
        if event is None:
            self._missing(activation.like, "the activation")
            return None
        if any(isinstance(item, Tensor) for item in event.arguments[1:]):
            what = f"the activation {activation.like!r} has parameters of its own"
            self._problems.append(Problem(path, what, "name a function, such as Relu"))
            return None
        return out_of_place(event.function, event.arguments[1:], event.options)

    def _maker(self, value: ir.Value) -> Event | None:
        """The call whose result a tensor of the graph is."""
        node = value.producer()
        site = next((s for s in self._sites.activations if s.output is value), None)
        if site is not None:
            return self._match.activations.get(site)
        if node in self._match.adds and node is not None:
            return self._match.adds[node]
        if is_op(node, "BatchNormalization") and node is not None and node.inputs[0] is not None:
            pair = self._match.weighted.get(node.inputs[0].producer())  # type: ignore[arg-type]
            return None if pair is None else pair.norm
        pair = self._match.weighted.get(node) if node is not None else None
        if pair is None:
            return None
        return pair.norm if pair.is_folded and pair.norm is not None else pair.event


def _without_free(graph: Graph, plan: Plan) -> Plan:
    """A plan without its free activations, written out."""
    written = expand_short_forms(graph, find_sites(graph), plan).plan
    segments = [segment.model_copy(update={"activation": None}) for segment in written.segments]
    return written.model_copy(update={"segments": segments, "add_activations": []})


def _amounts(graph: Graph, node: ir.Node) -> Pads:
    rank = len(graph.constant(node.inputs[1]) if len(node.inputs) > 1 else ()) // 2  # type: ignore[arg-type]
    return tuple(zero_padding(node, graph, rank))
