"""onnxruntime at arm's length: sessions, extra outputs, and inputs that a model can run.

A model is serialised once (`Runnable`) and opened as often as needed, with or without the
runtime's own optimizations and with any inner tensor as an additional output. Everything that
onnxruntime raises becomes a `RunError` with one line of text.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from graphfold.errors import DataError, ModelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    import onnx

    from graphfold.model import Model

Arrays = dict[str, NDArray[Any]]
Shapes = dict[str, tuple[int, ...]]

UNKNOWN_BATCH = 2
UNKNOWN_SIZES = (224, 64, 32)
SECOND_SIZES = {224: 160, 64: 96, 32: 64}
SECOND_BATCH = 1

# Protobuf refuses 2 GiB; node attributes and names need some room beside the weights.
_LARGEST_IN_MEMORY = 2**31 - 2**26
_CAST_SUFFIX = "/graphfold.as_float32"
_SILENT = 4


class RunError(ModelError):
    """onnxruntime cannot load or run a model."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a model as onnxruntime declares it; unknown sizes are None or a name."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    @property
    def is_fixed(self) -> bool:
        """Whether every size is known."""
        return all(isinstance(size, int) for size in self.shape)


class Runnable:
    """A model serialised for onnxruntime: in memory, or as files where it is over 2 GB.

    Use as a context manager: the files lie in a temporary folder that goes with it.
    """

    def __init__(self, model: Model | Path | bytes) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._variants = itertools.count()
        self._path: Path | None = None
        self.proto: onnx.ModelProto | None = None
        if isinstance(model, Path):
            self._path = model
        elif isinstance(model, bytes):
            self.proto = _parse(model)
        elif weight_bytes(model) > _LARGEST_IN_MEMORY:
            self._write(model)
        else:
            from graphfold.model import to_proto

            self.proto = to_proto(model)

    def _write(self, model: Model) -> None:
        import onnx

        from graphfold.model import save

        self._folder = tempfile.TemporaryDirectory(prefix="graphfold-")
        path = Path(self._folder.name) / "model.onnx"
        save(model, path, external_data="always")
        self.proto = onnx.load(path, load_external_data=False)

    def source(self, proto: onnx.ModelProto | None) -> str | bytes:
        """What `InferenceSession` is given for `proto`, a variant of this model."""
        if proto is None:
            return str(self._path)
        data: bytes = proto.SerializeToString()
        if self._folder is None:
            return data
        path = Path(self._folder.name) / f"variant{next(self._variants)}.onnx"
        path.write_bytes(data)
        return str(path)

    def close(self) -> None:
        """Remove the temporary files, if there are any."""
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Session:
    """One onnxruntime session; drop it before opening the next one to bound memory.

    Args:
        runnable: the model.
        optimize: onnxruntime's own graph optimizations: all of them, or none.
        extra_outputs: names of inner tensors to return as well; unknown ones are ignored.
        threads: intra-op threads, 0 for onnxruntime's default.
        provider: execution provider.
        profile: prefix of the file that onnxruntime's profiler writes, None for no profile.
    """

    def __init__(
        self,
        runnable: Runnable,
        *,
        optimize: bool,
        extra_outputs: Sequence[str] = (),
        threads: int = 0,
        provider: str = "CPUExecutionProvider",
        profile: str | None = None,
    ) -> None:
        options = _options(optimize=optimize, threads=threads, profile=profile)
        proto = runnable.proto
        if proto is not None and extra_outputs:
            proto = with_outputs(proto, extra_outputs)
        self._session = _open(runnable, proto, options, provider)
        if proto is not None and (unreadable := self._unreadable_outputs()):
            self._session = None  # frees the first one before its replacement is opened
            proto = _with_casts(proto, unreadable)
            self._session = _open(runnable, proto, options, provider)
        self.inputs = tuple(_spec(item) for item in self._session.get_inputs())
        self._outputs = [item.name for item in self._session.get_outputs()]

    def _unreadable_outputs(self) -> list[str]:
        """Outputs of types that numpy has no name for, so onnxruntime cannot hand them out."""
        types = ("tensor(bfloat16)", "tensor(float8")
        return [o.name for o in self._session.get_outputs() if o.type.startswith(types)]

    @property
    def outputs(self) -> list[str]:
        """Names of what `run` returns."""
        return [name.removesuffix(_CAST_SUFFIX) for name in self._outputs]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Outputs by name; sequences and maps come as `name[0]`, `name[1]`, ...

        Raises:
            RunError: onnxruntime refused.
        """
        values = {name: _to_runtime(array) for name, array in feeds.items()}
        try:
            results = self._session.run(self._outputs, values)
        except Exception as error:  # noqa: BLE001 - onnxruntime raises many types
            raise RunError(f"onnxruntime cannot run it: {one_line(error)}") from None
        found: Arrays = {}
        for name, result in zip(self.outputs, results, strict=True):
            found.update(_flatten(name, result))
        return found

    def end_profiling(self) -> Path:
        """Close the profile and return the file it was written to."""
        return Path(self._session.end_profiling())


def _options(*, optimize: bool, threads: int, profile: str | None) -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(_SILENT)
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return options


def _open(runnable: Runnable, proto: onnx.ModelProto | None, options: Any, provider: str) -> Any:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise UsageError(
            f"onnxruntime has no provider {provider!r}", hint=f"available: {', '.join(available)}"
        )
    try:
        return onnxruntime.InferenceSession(
            runnable.source(proto), sess_options=options, providers=[provider]
        )
    except Exception as error:  # noqa: BLE001 - onnxruntime raises many types
        raise RunError(f"onnxruntime cannot load it: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """An onnxruntime message without status prefix, source location and line breaks."""
    text = " ".join(str(error).split())
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return text if len(text) <= 300 else text[:297] + "..."


def weight_bytes(model: Model) -> int:
    """Bytes of all initializers of the main graph."""
    values = model.ir.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def _parse(data: bytes) -> onnx.ModelProto:
    import onnx

    return onnx.load_from_string(data)


def with_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of `proto` that also returns those of `names` that its main graph computes."""
    import onnx

    present = {output.name for output in proto.graph.output}
    made = {name for node in proto.graph.node for name in node.output if name}
    missing = [name for name in dict.fromkeys(names) if name in made and name not in present]
    if not missing:
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in missing)
    return copy


def _with_casts(proto: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    outputs = [onnx.ValueInfoProto(name=item.name) for item in copy.graph.output]
    for item in outputs:
        if item.name in names:
            cast = onnx.helper.make_node(
                "Cast", [item.name], [item.name + _CAST_SUFFIX], to=onnx.TensorProto.FLOAT
            )
            copy.graph.node.append(cast)
            item.name += _CAST_SUFFIX
    del copy.graph.output[:]
    copy.graph.output.extend(outputs)
    return copy


def _spec(item: Any) -> InputSpec:
    shape = tuple(None if isinstance(size, int) and size <= 0 else size for size in item.shape)
    return InputSpec(item.name, item.type, shape)


def _to_runtime(array: NDArray[Any]) -> Any:
    if array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        import onnx
        import onnxruntime

        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)
    return array


def _flatten(name: str, result: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    if isinstance(result, list):
        for index, item in enumerate(result):
            yield from _flatten(f"{name}[{index}]", item)
    elif isinstance(result, dict):
        yield name, np.asarray([result[key] for key in sorted(result)])
    elif result is not None:
        yield name, np.asarray(result)


# Inputs -----------------------------------------------------------------------------------------

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
        RunError: the input is no tensor, or of a type without a numpy equivalent.
    """
    name = _NUMPY_NAMES.get(spec.dtype.removeprefix("tensor(").removesuffix(")"))
    if name is None:
        raise RunError(f"input {spec.name!r} is of type {spec.dtype}: no inputs can be made for it")
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
    if len(shape) != len(spec.shape):
        raise UsageError(f"input shape {list(shape)} has {len(shape)} axes", hint=wanted)
    if any(size < 1 for size in shape):
        raise UsageError(f"input shape {list(shape)}: sizes start at 1", hint=wanted)
    for size, fixed in zip(shape, spec.shape, strict=True):
        if isinstance(fixed, int) and fixed != size:
            raise UsageError(f"input shape {list(shape)} does not fit the model", hint=wanted)


def describe_shape(shape: Sequence[int | str | None]) -> str:
    """A shape as people write it: `[N, 3, ?, ?]`."""
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def candidate_shapes(specs: Sequence[InputSpec], given: Shapes) -> Iterator[tuple[int, Shapes]]:
    """Full shapes to try, in order, each with the size that unknown axes got (0: none was).

    Unknown first axes are taken as batch 2, all others as 224, then 64, then 32; axes of one
    name get one size.
    """
    if all(spec.is_fixed or spec.name in given for spec in specs):
        yield 0, fill_shapes(specs, given, UNKNOWN_BATCH, 0)
        return
    for size in UNKNOWN_SIZES:
        yield size, fill_shapes(specs, given, UNKNOWN_BATCH, size)


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
    """Values for all inputs: see `Filling` for ranges; 8-bit integers take their full range."""
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
    if not fits:
        raise DataError(
            f"array for input {spec.name!r} is {describe_shape(array.shape)}, "
            f"the model wants {describe_shape(spec.shape)}",
            where=where,
        )
    return array
