"""Inputs of a model: what it declares, random values it can run, given values that fit it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graphfold.errors import DataError, ModelError, UsageError

if TYPE_CHECKING:
    from graphfold.model import Model

Arrays = dict[str, NDArray[Any]]
Shapes = dict[str, tuple[int, ...]]

UNKNOWN_BATCH = 2
UNKNOWN_SIZES = (224, 64, 32)
SECOND_SIZES = {224: 160, 64: 96, 32: 64}
SECOND_BATCH = 1


_LARGEST_INPUTS = 1 << 27


@dataclass(frozen=True)
class InputSpec:
    """One input of a model as onnxruntime declares it; unknown sizes are None or a name.

    No sizes at all mean a single number or an unknown rank: onnxruntime does not tell them apart.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    @property
    def is_fixed(self) -> bool:
        """Whether every size is known."""
        return all(isinstance(size, int) for size in self.shape)


_NUMPY_NAMES = {
    "float": "float32",
    "double": "float64",
    **{
        name: name
        for name in (
            *("float16", "bfloat16", "int8", "int16", "int32", "int64"),
            *("uint8", "uint16", "uint32", "uint64", "bool"),
        )
    },
    "string": "object",
}


def numpy_dtype(spec: InputSpec) -> np.dtype[Any]:
    """The numpy type of an input.

    Raises:
        ModelError: the input is no tensor, or of a type without a numpy equivalent.
    """
    name = _NUMPY_NAMES.get(spec.dtype.removeprefix("tensor(").removesuffix(")"))
    if name is None:
        raise ModelError(
            f"input {spec.name!r} is of type {spec.dtype}: no inputs can be made for it"
        )
    if name == "bfloat16":
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return found
    return np.dtype(name)


def check_input_shapes(
    specs: Sequence[InputSpec], given: Mapping[str, Sequence[int]] | None
) -> Shapes:
    """Shapes by input name from what the user gave; the name "" stands for the only input.

    Raises:
        UsageError: unknown name, wrong rank, or against a size that the model fixes.
    """
    by_name = {spec.name: spec for spec in specs}
    found: Shapes = {}
    for name, shape in (given or {}).items():
        if name == "" and len(specs) == 1:
            spec = specs[0]
        elif name in by_name:
            spec = by_name[name]
        else:
            raise _unknown_input(name, list(by_name))
        _check_shape(spec, shape)
        found[spec.name] = tuple(int(size) for size in shape)
    return found


def _unknown_input(name: str, known: Sequence[str]) -> UsageError:
    if name == "":
        what = "an input shape without a name, but the model has several inputs"
    else:
        what = f"an input shape for {name!r}, which is no input of the model"
    return UsageError(what, hint=f"inputs: {', '.join(known)}")


def _check_shape(spec: InputSpec, shape: Sequence[int]) -> None:
    wanted = f"input {spec.name!r} is {describe_shape(spec.shape)}"
    if any(size < 1 for size in shape):
        raise UsageError(f"input shape {list(shape)}: sizes start at 1", hint=wanted)
    if not spec.shape:
        return
    if len(shape) != len(spec.shape):
        raise UsageError(f"input shape {list(shape)} has {len(shape)} axes", hint=wanted)
    for size, fixed in zip(shape, spec.shape, strict=True):
        if isinstance(fixed, int) and fixed != size:
            raise UsageError(f"input shape {list(shape)} does not fit the model", hint=wanted)


def describe_shape(shape: Sequence[int | str | None]) -> str:
    """A shape as people write it: `[N, 3, ?, ?]`."""
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def candidate_shapes(
    specs: Sequence[InputSpec], given: Shapes, batch: int = UNKNOWN_BATCH
) -> Iterator[tuple[int, Shapes]]:
    """Full shapes to try, in order, each with the size that unknown axes got (0: none was).

    Unknown first axes are taken as `batch`, all others as 224, then 64, then 32; axes of one
    name get one size.
    """
    if all(spec.is_fixed or spec.name in given for spec in specs):
        yield 0, fill_shapes(specs, given, batch, 0)
        return
    for size in UNKNOWN_SIZES:
        yield size, fill_shapes(specs, given, batch, size)


def fill_shapes(specs: Sequence[InputSpec], given: Shapes, batch: int, size: int) -> Shapes:
    """Shapes of all inputs: as given, else as declared with unknown axes filled in."""
    names: dict[str, int] = {}
    for spec in specs:
        for declared, actual in zip(spec.shape, given.get(spec.name, ()), strict=False):
            if isinstance(declared, str):
                names.setdefault(declared, actual)
    filled: Shapes = {}
    for spec in specs:
        sizes: list[int] = []
        for axis, declared in enumerate(spec.shape):
            guess = batch if axis == 0 else size
            if isinstance(declared, int):
                sizes.append(declared)
            elif declared is None:
                sizes.append(guess)
            else:
                sizes.append(names.setdefault(declared, guess))
        filled[spec.name] = given.get(spec.name, tuple(sizes))
    return filled


@dataclass(frozen=True)
class Filling:
    """How random values are drawn.

    Attributes:
        uniform: floats from [0, 1) in place of a standard normal distribution.
        largest_id: integers of two or more axes (token ids, indices) are in [0, largest_id].
        length: integers of at most one axis (sizes, lengths, counts) have this value.
    """

    uniform: bool = False
    largest_id: int = 9
    length: int = 1


def random_inputs(
    specs: Sequence[InputSpec], shapes: Shapes, filling: Filling, rng: np.random.Generator
) -> Arrays:
    """Values for all inputs: see `Filling` for ranges; 8-bit integers take their full range.

    Raises:
        MemoryError: the inputs alone would fill it.
    """
    # numpy makes no array of absurd sizes either where one of them is zero.
    count = sum(math.prod(max(size, 1) for size in shapes[spec.name]) for spec in specs)
    if count > _LARGEST_INPUTS:
        raise MemoryError(f"its inputs have {count} values")
    return {
        spec.name: _random_array(numpy_dtype(spec), shapes[spec.name], filling, rng)
        for spec in specs
    }


def _random_array(
    dtype: np.dtype[Any], shape: tuple[int, ...], filling: Filling, rng: np.random.Generator
) -> NDArray[Any]:
    if dtype.kind == "O":
        return np.full(shape, "a", dtype=object)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "iu":
        if dtype.itemsize == 1:
            info = np.iinfo(dtype)
            return rng.integers(info.min, info.max + 1, shape).astype(dtype)
        if len(shape) < 2:
            return np.full(shape, filling.length, dtype=dtype)
        return rng.integers(0, filling.largest_id + 1, shape).astype(dtype)
    values = rng.random(shape) if filling.uniform else rng.standard_normal(shape)
    return np.asarray(values).astype(dtype)


def fillings(specs: Sequence[InputSpec], size: int) -> list[Filling]:
    """Ways to fill the inputs, in the order in which they are tried."""
    has_integers = any(numpy_dtype(spec).kind in "iu" for spec in specs)
    if not has_integers:
        return [Filling(), Filling(uniform=True)]
    return [
        Filling(largest_id=9, length=size or UNKNOWN_SIZES[1]),
        Filling(largest_id=1, length=1),
        Filling(largest_id=0, length=1, uniform=True),
    ]


def fit_inputs(
    specs: Sequence[InputSpec], feeds: Mapping[str, NDArray[Any]], *, where: str = "inputs"
) -> Arrays:
    """Arrays for exactly the model's inputs, cast where nothing is lost by it.

    The key `labels` is dropped unless the model has an input of that name.

    Raises:
        DataError: missing or unknown names, shapes or types that do not fit.
    """
    known = {spec.name: spec for spec in specs}
    unknown = [name for name in feeds if name not in known and name != "labels"]
    missing = [name for name in known if name not in feeds]
    if missing or unknown:
        parts = [f"no array for input {name!r}" for name in missing]
        parts += [f"{name!r} is no input of the model" for name in unknown]
        raise DataError("; ".join(parts), where=where, hint=f"inputs: {', '.join(known)}")
    return {name: _fit_array(spec, feeds[name], where) for name, spec in known.items()}


def _fit_array(spec: InputSpec, value: NDArray[Any], where: str) -> NDArray[Any]:
    array = np.asarray(value)
    dtype = numpy_dtype(spec)
    if array.dtype != dtype:
        if dtype.kind in "iub" and array.dtype.kind not in "iub":
            raise DataError(
                f"array for input {spec.name!r} is {array.dtype}, the model wants {dtype}",
                where=where,
            )
        array = array.astype(dtype)
    fits = len(array.shape) == len(spec.shape) and all(
        not isinstance(fixed, int) or fixed == size
        for size, fixed in zip(array.shape, spec.shape, strict=True)
    )
    if spec.shape and not fits:
        raise DataError(
            f"array for input {spec.name!r} is {describe_shape(array.shape)}, "
            f"the model wants {describe_shape(spec.shape)}",
            where=where,
        )
    return array


def model_inputs(model: Model) -> tuple[InputSpec, ...]:
    """The inputs that must be fed, as the model file declares them."""
    return tuple(
        InputSpec(
            value.name or "",
            _runtime_type(value.dtype.name if value.dtype is not None else "?"),
            tuple(
                size if not isinstance(size, int) or size > 0 else None
                for size in (_plain_size(dim) for dim in value.shape or ())
            ),
        )
        for value in model.ir.graph.inputs
        if not value.is_initializer()
    )


def _plain_size(dim: Any) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def _runtime_type(name: str) -> str:
    return f"tensor({name.lower()})"
