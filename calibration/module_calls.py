"""What a torch module computes, call by call, and the same with some calls changed.

Every function of torch that runs on a tensor passes a torch function mode, whoever calls it: a
layer, `torch.nn.functional`, an operator of Python. A call is named by the path of the module that
makes it, the function, and its number among such calls, which stays the same from run to run
wherever a module is not left out at random. The module itself is not touched: its parameters,
buffers, hooks and modes are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

Key = tuple[str, str, int]
Pads = tuple[tuple[int, int], ...]  # (begin, end) of each spatial axis; negative crops

CONVS = frozenset({"conv1d", "conv2d", "conv3d"})
WEIGHTED = CONVS | {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"}
ADDS = frozenset({"add", "iadd", "radd"})
ACTIVATIONS = frozenset(
    {
        "relu", "relu6", "hardtanh", "clamp", "clip", "clamp_min", "silu", "hardswish", "sigmoid",
        "hardsigmoid", "tanh", "gelu", "mish", "elu", "selu", "celu", "leaky_relu", "prelu",
        "softplus", "softsign", "threshold",
    }
)  # fmt: skip
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True, eq=False)
class Event:
    """One call.

    Attributes:
        key: its name.
        kind: the function without underscores.
        arguments: positional arguments; tensors are those of the run that was recorded.
        options: arguments by name.
        sources: for each tensor that it reads, parameters and buffers aside, the call that made
            it, None for inputs.
        weight: of a weighted call, the parameter's name ("" where it is computed) and its value.
    """

    key: Key
    function: Callable[..., Any]
    kind: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    sources: tuple[Event | None, ...]
    weight: tuple[str, Tensor] | None = None

    @property
    def path(self) -> str:
        """The module that makes the call."""
        return self.key[0]


@dataclass
class Edit:
    """What becomes of one call.

    Attributes:
        skip: its first input goes on as it is.
        padding: of a convolution, instead of its own.
        pads: of an input, by its number.
        mix: makes its result of what it reads and what it gives; masks are put in so.
        after: what is applied to its result.
        saved: its result, or what replaces that, is wanted under this name.
        replaced_by: its result is what was saved under this name.
    """

    skip: bool = False
    padding: Pads | None = None
    pads: dict[int, Pads] = field(default_factory=dict)
    mix: Callable[[Tensor, Tensor], Tensor] | None = None
    after: Callable[[Tensor], Tensor] | None = None
    saved: str | None = None
    replaced_by: str | None = None


class _Calls(TorchFunctionMode):
    """Names every call; what is done with it is for the subclass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.paths = {id(each): path for path, each in module.named_modules()}
        self.stack: list[str] = [""]
        self.counts: dict[tuple[str, str], int] = {}

    def key(self, kind: str) -> Key:
        """The name of the call that is being made."""
        place = (self.stack[-1], kind)
        number = self.counts.get(place, 0)
        self.counts[place] = number + 1
        return (*place, number)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Pass a call on."""
        del types
        return self.call(func, _kind(func), args, dict(kwargs or {}))

    def call(
        self, func: Callable[..., Any], kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make a call."""
        raise NotImplementedError

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know which module is running."""

        def enter(each: nn.Module, _: Any) -> None:
            self.stack.append(self.paths.get(id(each), self.stack[-1]))

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            self.stack.pop()

        handles = [
            module_hooks.register_module_forward_pre_hook(enter),
            module_hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


def _kind(func: Callable[..., Any]) -> str:
    return str(getattr(func, "__name__", func)).strip("_")


# --- recording --------------------------------------------------------------------------------


class _Recorder(_Calls):
    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.events: list[Event] = []
        self._makers: dict[int, Event] = {}
        self._alive: list[Any] = []  # or a new tensor may have an old one's id
        self._names = {id(each): name for name, each in module.named_parameters()}
        self._own = {*self._names, *(id(each) for each in module.buffers())}

    def call(
        self, func: Callable[..., Any], kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        read = [tensor for tensor in _tensors((args, kwargs)) if id(tensor) not in self._own]
        sources = tuple(self._makers.get(id(tensor)) for tensor in read)
        result = func(*args, **kwargs)
        made = list(_tensors(result))
        if not made:
            return result
        weight = None
        if kind in WEIGHTED:
            value = args[1] if len(args) > 1 else kwargs["weight"]
            weight = (self._names.get(id(value), ""), value.detach())
        event = Event(self.key(kind), func, kind, args, kwargs, sources, weight)
        self.events.append(event)
        self._alive.append((args, kwargs, result))
        for tensor in made:
            self._makers[id(tensor)] = event
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def record(module: nn.Module, example: Sequence[Any]) -> list[Event]:
    """The calls that a module makes on an example, in evaluation mode, in order."""
    was_training = module.training
    module.eval()
    recorder = _Recorder(module)
    try:
        with torch.no_grad(), recorder.watching():
            module(*example)
    finally:
        module.train(was_training)
    return recorder.events


# --- changing ---------------------------------------------------------------------------------


class _Editor(_Calls):
    def __init__(self, module: nn.Module, edits: Mapping[Key, Edit]) -> None:
        super().__init__(module)
        self._edits = edits
        self._kinds = {key[1] for key in edits}
        self._saved: dict[str, Tensor] = {}

    def call(
        self, func: Callable[..., Any], kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        edit = self._edits.get(self.key(kind)) if kind in self._kinds else None
        if edit is None:
            return func(*args, **kwargs)
        source = args[0] if args else kwargs["input"]
        if edit.skip:
            result = source
        elif edit.mix is not None:
            result = edit.mix(source, out_of_place(func, args[1:], kwargs)(source))
        else:
            result = _changed(func, edit, args, kwargs)
        if edit.replaced_by is not None:
            result = self._saved[edit.replaced_by]
        if edit.after is not None:
            result = edit.after(result)
        if edit.saved is not None:
            self._saved[edit.saved] = result
        return result


def _changed(
    func: Callable[..., Any], edit: Edit, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    given = list(args)
    for number, pads in edit.pads.items():
        given[number] = pad(given[number], pads)
    if edit.padding is None:
        return func(*given, **kwargs)
    named = dict(zip(_CONV_ARGUMENTS, given, strict=False)) | kwargs
    if all(begin == end >= 0 for begin, end in edit.padding):
        named["padding"] = tuple(begin for begin, _ in edit.padding)
    else:
        named["input"], named["padding"] = pad(named["input"], edit.padding), 0
    source, weight = named.pop("input"), named.pop("weight")
    return func(source, weight, **named)


def out_of_place(
    func: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]
) -> Callable[[Tensor], Tensor]:
    """An activation as it is called, but that what it reads stays as it is."""
    settings = [False if item is True else item for item in arguments]
    named = {
        name: False if item is True else item for name, item in options.items() if name != "input"
    }
    writes = str(getattr(func, "__name__", "")).endswith("_")

    def run(tensor: Tensor) -> Tensor:
        result: Tensor = func(tensor.clone() if writes else tensor, *settings, **named)
        return result

    return run


def pad(tensor: Tensor, pads: Pads) -> Tensor:
    """Zeros around the spatial axes; negative amounts crop."""
    flat = [amount for begin, end in reversed(pads) for amount in (begin, end)]
    return F.pad(tensor, flat)


class Changed(nn.Module):
    """A module with some of its calls changed; what is trained are the module's own parameters.

    Attributes:
        module: as it was given.
        edits: by the names of calls.
    """

    def __init__(self, module: nn.Module, edits: Mapping[Key, Edit]) -> None:
        super().__init__()
        self.module = module
        self.edits = dict(edits)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Run the module so."""
        with _Editor(self.module, self.edits).watching():
            return self.module(*inputs, **options)
