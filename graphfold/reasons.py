"""Why there is nothing to choose, or nothing to gain: the true reason, for people.

A convolution can be planned for where its weights are fixed in the file. Those that are quantized,
that callers may override, or that the model computes are named as such, with what to do about it.
"""

from __future__ import annotations

import re
from collections import Counter

import onnx_ir as ir

from graphfold.candidates import Candidates
from graphfold.errors import UsageError
from graphfold.graph import Graph, is_op

_QUANTIZED = ("QLinearConv", "ConvInteger")
_SHOWN_REASONS = 3
_NAME = re.compile(r"(?: (?:at|of))? '[^']*'|^'[^']*' ")


def nothing_to_plan(candidates: Candidates) -> UsageError:
    """The error for a graph without a single candidate."""
    found = unusable_convolutions(candidates)
    if not found:
        count = len(candidates.sites.convs)
        if count:
            return UsageError(
                f"none of the model's {count} convolutions can be planned for: "
                f"{what_ends_segments(candidates)}",
                hint="`graphfold inspect` tells what it holds",
            )
        return UsageError(
            "the model has no convolutions to plan for",
            hint="`graphfold inspect` tells what it holds",
        )
    (what, hint), count = found.most_common(1)[0]
    total = found.total() + len(candidates.sites.convs)
    share = f"all {total}" if count == total else f"{count} of {total}"
    return UsageError(f"nothing to plan for: of {share} convolutions {what}", hint=hint)


def unusable_convolutions(candidates: Candidates) -> Counter[tuple[str, str]]:
    """How many convolutions cannot be planned for, by reason and what to do about it."""
    graph = candidates.graph
    usable = {site.conv for site in candidates.sites.convs}
    nodes = [node for node in graph.ir if node not in usable and is_op(node, "Conv", *_QUANTIZED)]
    return Counter(_why_unusable(graph, node) for node in nodes)


def why_nothing_changes(candidates: Candidates) -> str:
    """Why no segment of a graph may become anything else."""
    unusable = unusable_convolutions(candidates).most_common()
    reasons = [f"of {count} convolutions {what}" for (what, _), count in unusable]
    return "; ".join(reasons) or what_ends_segments(candidates)


def why_nothing_goes(candidates: Candidates) -> str:
    """Why no channel and no block of a graph may go, with what to do about it if that is known."""
    unusable = unusable_convolutions(candidates).most_common()
    if not unusable:
        return what_ends_segments(candidates)
    return "; ".join(f"of {count} convolutions {what} ({do})" for (what, do), count in unusable)


def _why_unusable(graph: Graph, node: ir.Node) -> tuple[str, str]:
    quantized = (
        "the weights are quantized",
        "plan for the float model, fold it, and quantize what comes out",
    )
    if not is_op(node, "Conv"):
        return quantized
    weight = node.inputs[1]
    if weight is None or graph.is_constant(weight):
        return "the weights have no known kernel", "`graphfold inspect` tells what it holds"
    nodes, leaves = _upstream(weight)
    if any(is_op(each, "DequantizeLinear") for each in nodes):
        return quantized
    if any(graph.is_overridable(leaf) for leaf in leaves):
        return (
            "the weights are inputs of the model, which callers may override",
            "fix them: `python -m onnxruntime.tools.remove_initializer_from_input --input MODEL "
            "--output FIXED`, or export without keep_initializers_as_inputs",
        )
    return (
        "the weights are computed when the model runs",
        "export with constant weights (torch: model.eval())",
    )


def _upstream(value: ir.Value) -> tuple[set[ir.Node], set[ir.Value]]:
    """The nodes that a tensor is computed by, and the tensors they begin with."""
    nodes: set[ir.Node] = set()
    leaves: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        each = waiting.pop()
        producer = each.producer()
        if producer is None:
            leaves.add(each)
        elif producer not in nodes:
            nodes.add(producer)
            waiting += [source for source in producer.inputs if source is not None]
    return nodes, leaves


def what_ends_segments(candidates: Candidates) -> str:
    """What is in the way of more, the most frequent first; without names, so as to be counted."""
    counted = Counter(_NAME.sub("", each.reason) for each in candidates.excluded)
    shown = [f"{reason} ({count})" for reason, count in counted.most_common(_SHOWN_REASONS)]
    return f"segments end where {'; '.join(shown)}" if shown else "no segment holds two"
