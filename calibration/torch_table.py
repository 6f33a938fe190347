"""The table of ONNX operators that run in torch: one small function for each, registered by name.

A function takes the `Call`, which carries what the node says (attributes, opset), and the node's
inputs as tensors, None for those left out; it returns the output, or a tuple of outputs. To add an
operator, decorate one function with `operator`; nothing else needs to know of it.

Integers and shapes live on the CPU, whatever device the network is on, so that reading a shape
never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, ...]
Run = Callable[..., Result]
Refusal = Callable[["Call"], str | None]


@dataclass
class State:
    """What changes between two runs of the same module.

    Attributes:
        batch_statistics: BatchNormalization normalises by the batch.
        depthwise_share: part of a batch that gradients of depthwise weights are taken of.
    """

    batch_statistics: bool = False
    depthwise_share: float = 1.0


@dataclass(frozen=True)
class Call:
    """One node as its operator's function sees it.

    Attributes:
        op_type: the operator.
        opset: version of the default operator set.
        attributes: by name; tensors are torch tensors, repeated values tuples.
        present: for each input, whether the node gives it.
        outputs: names of the outputs, "" for those left out.
        state: shared by all calls of a module.
    """

    op_type: str
    opset: int
    attributes: Mapping[str, Any] = field(default_factory=dict)
    present: tuple[bool, ...] = ()
    outputs: tuple[str, ...] = ()
    state: State = field(default_factory=State)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute's value."""
        return self.attributes.get(name, default)

    def ints(self, name: str, given: Tensor | None = None) -> list[int] | None:
        """Integers that older opsets have as an attribute and newer ones as an input."""
        if given is not None:
            return [int(item) for item in given.reshape(-1).tolist()]
        found = self.attributes.get(name)
        return None if found is None else [int(item) for item in found]

    @property
    def extra_outputs(self) -> bool:
        """Whether anything but the first output is asked for."""
        return any(self.outputs[1:])


@dataclass(frozen=True)
class Operator:
    """How one operator runs, and what its constant inputs are.

    Attributes:
        run: the function.
        settings: inputs that are read as plain numbers, such as bounds, sizes and pads.
        statistics: inputs that are measured, not trained.
        keeps_scalars: constants of one element belong to the formula and are not trained.
        refuses: says why a node's attributes are not supported.
    """

    run: Run
    settings: frozenset[int] = frozenset()
    statistics: frozenset[int] = frozenset()
    keeps_scalars: bool = False
    refuses: Refusal | None = None


OPERATORS: dict[str, Operator] = {}


def operator(
    *names: str,
    settings: Sequence[int] = (),
    statistics: Sequence[int] = (),
    keeps_scalars: bool = False,
    refuses: Refusal | None = None,
) -> Callable[[Run], Run]:
    """Register the decorated function for these operators of the default domain."""

    def register(run: Run) -> Run:
        entry = Operator(run, frozenset(settings), frozenset(statistics), keeps_scalars, refuses)
        OPERATORS.update(dict.fromkeys(names, entry))
        return run

    return register


def together(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors on one device: where the first one is that does not lie on the CPU."""
    away = next((item.device for item in tensors if item.device.type != "cpu"), None)
    return tensors if away is None else [item.to(away) for item in tensors]


def index_tensor(indices: Any, like: Tensor) -> Tensor:
    """Indices as an int64 tensor on the device of `like`."""
    return torch.as_tensor(indices, dtype=torch.int64).to(like.device)
