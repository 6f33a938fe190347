"""onnxruntime at arm's length: sessions, extra outputs, and inputs that a model can run.

A model is serialised once (`Runnable`) and opened as often as needed, with or without the
runtime's own optimizations and with any inner tensor as an additional output. Everything that
onnxruntime raises becomes a `RunError` with one line of text.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from graphfold import guard
from graphfold.errors import ModelError, UsageError
from graphfold.specs import Arrays, InputSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    import onnx

    from graphfold.model import Model

# Protobuf refuses 2 GiB; node attributes and names need some room beside the weights.
LARGEST_IN_MEMORY = 2**31 - 2**26
_CAST_SUFFIX = "/graphfold.as_float32"
_SILENT = 4


class RunError(ModelError):
    """onnxruntime cannot load or run a model."""


class OutOfMemoryError(RunError):
    """onnxruntime was not given the memory that it asked for."""


def _is_lack_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or any(
        phrase in text for phrase in ("allocate memory", "bad_alloc", "bad allocation")
    )


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
        elif weight_bytes(model) > LARGEST_IN_MEMORY:
            self._write(model)
        else:
            from graphfold.model import to_proto

            self.proto = to_proto(model)

    def _write(self, model: Model) -> None:
        import onnx

        from graphfold.model import save

        self._folder = tempfile.TemporaryDirectory(prefix=guard.temporary_prefix())
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
            kind = OutOfMemoryError if _is_lack_of_memory(error) else RunError
            raise kind(f"onnxruntime cannot run it: {one_line(error)}") from None
        found: Arrays = {}
        for name, result in zip(self.outputs, results, strict=True):
            found.update(_flatten(name, result))
        return found

    def prepared(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], object]:
        """A call without arguments that runs the model once: nothing else is in its way."""
        values = {name: _to_runtime(array) for name, array in feeds.items()}
        session, outputs = self._session, self._outputs

        def run() -> object:
            return session.run(outputs, values)

        return run

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
        kind = OutOfMemoryError if _is_lack_of_memory(error) else RunError
        raise kind(f"onnxruntime cannot load it: {one_line(error)}") from None


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
