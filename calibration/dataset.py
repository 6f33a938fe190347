"""Inputs from outside: arrays in a file, or whatever a Python callable yields.

Reads `.npz` (keyed by input name), `.npy` (for the only input) and `package.module:callable`,
whose call yields dicts of arrays. Arrays that hold more samples than the model takes at once are
cut along their first axis.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphfold.errors import DataError
from graphfold.specs import Arrays, InputSpec

# Samples per feed where the model leaves the batch open.
_BATCH = 8
_LABELS = "labels"


def read_inputs(
    source: str, inputs: Sequence[InputSpec], *, limit: int | None = None
) -> Iterator[Arrays]:
    """Feeds for a model, one after the other.

    Args:
        source: path of an .npz or .npy, or `package.module:callable`.
        inputs: what the model wants.
        limit: stop after this many feeds.

    Raises:
        DataError: no such file, not readable, or not fitting the model.
    """
    return itertools.islice(_feeds(source, inputs), limit)


def _feeds(source: str, inputs: Sequence[InputSpec]) -> Iterator[Arrays]:
    path = Path(source)
    if path.suffix in (".npz", ".npy") or path.exists():
        arrays = _read_file(path, inputs)
        yield from _cut(arrays, inputs, source)
    elif ":" in source:
        for item in _call(source):
            yield from _cut(item, inputs, source)
    else:
        raise DataError(
            "no such file", where=source, hint="an .npz, an .npy or package.module:callable"
        )


def _read_file(path: Path, inputs: Sequence[InputSpec]) -> Arrays:
    if path.suffix not in (".npz", ".npy") or path.is_dir():
        what = "a folder" if path.is_dir() else "neither .npz nor .npy"
        raise DataError(f"is {what}", where=str(path), hint="this version reads .npz and .npy")
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {_only_input(inputs, path): found}
        with found:
            return {name: found[name] for name in found.files}
    except DataError:
        raise
    except OSError as error:
        raise DataError(error.strerror or str(error), where=str(path)) from None
    except Exception as error:  # noqa: BLE001 - numpy and zipfile raise many types on bad files
        raise DataError(f"cannot be read: {error}", where=str(path)) from None


def _only_input(inputs: Sequence[InputSpec], path: Path) -> str:
    if len(inputs) != 1:
        raise DataError(
            f"one array, but the model has {len(inputs)} inputs",
            where=str(path),
            hint=f"an .npz with {', '.join(spec.name for spec in inputs)}",
        )
    return inputs[0].name


def _call(source: str) -> Iterator[Mapping[str, Any]]:
    """What `package.module:callable` yields; its errors name it."""
    module_name, _, name = source.rpartition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # like `python -m`: modules in the current folder are found
    try:
        function = importlib.import_module(module_name)
        for part in name.split("."):
            function = getattr(function, part)
        items: Iterable[Any] = function()  # type: ignore[operator]
        for item in items:
            if not isinstance(item, Mapping):
                raise DataError(f"yields {type(item).__name__}, not dicts", where=source)
            yield item
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{type(error).__name__}: {error}", where=source) from error


def _cut(item: Mapping[str, Any], inputs: Sequence[InputSpec], where: str) -> Iterator[Arrays]:
    """Feeds from arrays that may hold many samples along their first axis.

    An array of more samples than the model takes is cut into batches of the model's size (8
    where that is open); a rest that does not fill a fixed batch is left out.
    """
    arrays = {name: np.asarray(value) for name, value in item.items() if name != _LABELS}
    if _LABELS in {spec.name for spec in inputs} and _LABELS in item:
        arrays[_LABELS] = np.asarray(item[_LABELS])
    by_name = {spec.name: spec for spec in inputs}
    cut = {
        name: array
        for name, array in arrays.items()
        if name in by_name and _is_stack(array, by_name[name])
    }
    if not cut:
        yield arrays
        return
    lengths = {len(array) for array in cut.values()}
    if len(lengths) != 1:
        sizes = ", ".join(f"{name}: {len(array)}" for name, array in cut.items())
        raise DataError(f"arrays of unequal length ({sizes})", where=where)
    length = lengths.pop()
    sizes_fixed = [size for name in cut if isinstance(size := by_name[name].shape[0], int)]
    step = sizes_fixed[0] if sizes_fixed else _BATCH
    stop = length - length % step if sizes_fixed else length
    if stop == 0:
        raise DataError(f"{length} samples do not fill the model's batch of {step}", where=where)
    for start in range(0, stop, step):
        yield {
            name: _part(array, start, step) if name in cut else array
            for name, array in arrays.items()
        }


def _part(array: NDArray[Any], start: int, step: int) -> NDArray[Any]:
    return array[start : start + step]


def _is_stack(array: NDArray[Any], spec: InputSpec) -> bool:
    """Whether the array holds more samples than one feed."""
    if array.ndim == 0 or array.ndim != len(spec.shape):
        return False
    batch = spec.shape[0]
    return len(array) != batch if isinstance(batch, int) else len(array) > _BATCH
