"""Data from outside: pictures, arrays in a file, or whatever a Python callable yields.

A data set can be read any number of times, always in the same order, in batches of any size; no
more than a batch is in memory, but for arrays that come in one piece. It may know the labels of its
samples. Sources are a folder of pictures (with a way to prepare them), an `.npz` keyed by input
name, an `.npy` for the only input, and `package.module:callable`, whose call yields dicts of
arrays, each with one or more samples along the first axis.
Wherever `labels` is the name of no input, that key holds labels.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from graphfold.calibration.data_checks import explain_shapes
from graphfold.calibration.images import find_images, open_image, require_pillow
from graphfold.calibration.preprocess import NAMED, Preparation, Preprocess, read_preprocess
from graphfold.errors import DataError
from graphfold.specs import Arrays, InputSpec, describe_shape, fit_inputs

# Samples per feed where the model leaves the batch open.
BATCH = 8
LABELS = "labels"

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """Some samples: what the model is fed, and their labels where they are known."""

    feed: Arrays
    labels: NDArray[np.int64] | None = None

    @property
    def samples(self) -> int:
        """Number of samples along the first axis."""
        return next((len(array) for array in self.feed.values() if array.ndim), 1)


@dataclass(frozen=True)
class Dataset:
    """Samples for a model, in an order that is the same every time.

    Attributes:
        name: the source as the user gave it.
        inputs: what the model wants.
        samples: their number, None where only reading tells.
        labels: of all samples, None where they are unknown or only reading tells.
        limit: at most so many samples are read.
        preprocess: how pictures are prepared, None for arrays.
        item: any sample by its number, where it can be had without reading the others.
    """

    name: str
    inputs: tuple[InputSpec, ...]
    samples: int | None
    labels: NDArray[np.int64] | None
    limit: int | None
    preprocess: Preprocess | None
    _open: Callable[[], Iterator[Item]] = field(repr=False)
    item: Callable[[int], Item] | None = field(default=None, repr=False)

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the model insists on."""
        return _fixed_batch(self.inputs)

    def at(self, number: int) -> Arrays:
        """One sample of a data set that has `item`, without its label.

        Raises:
            DataError: it does not fit the model.
        """
        assert self.item is not None
        arrays = {name: np.asarray(value) for name, value in self.item(number).items()}
        return self._fitted(arrays, f"{self.name}, item {number}").feed

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """All samples in order.

        Args:
            size: samples per batch, where the model leaves that open; by default 8. The last
                batch may be smaller; a model of a fixed batch gets that, and a rest that does not
                fill it is left out.

        Raises:
            DataError: what is read does not fit the model.
        """
        fixed = _fixed_batch(self.inputs)
        return self._cut(fixed or size or BATCH, is_fixed=fixed is not None)

    def _cut(self, size: int, *, is_fixed: bool) -> Iterator[Batch]:
        waiting: list[Batch] = []
        is_empty = True
        for part in self._parts(size):
            waiting.append(part)
            if sum(each.samples for each in waiting) >= size:
                whole = _joined(waiting)
                yield _part(whole, 0, size)
                is_empty = False
                rest = _part(whole, size, whole.samples)
                waiting = [rest] if rest.samples else []
        if waiting and not is_fixed:
            yield _joined(waiting)
        elif is_empty:
            count = sum(each.samples for each in waiting)
            what = f"{count} samples do not fill the model's batch of {size}"
            raise DataError(what if count else "holds no samples", where=self.name)

    def _parts(self, size: int) -> Iterator[Batch]:
        """Pieces of at most `size` samples, as they come."""
        left = self.limit
        for number, item in enumerate(self._open()):
            where = self.name if number == 0 else f"{self.name}, item {number}"
            arrays = {name: np.asarray(value) for name, value in item.items()}
            length = self.length(arrays, where)
            end = length if left is None else min(left, length)
            for start in range(0, end, size):
                stop = min(start + size, end)
                piece = {name: _rows(array, start, stop) for name, array in arrays.items()}
                yield self._fitted(piece, where)
            if left is not None:
                left -= end
                if left == 0:
                    return

    def length(self, arrays: Arrays, where: str) -> int:
        """Number of samples in some arrays.

        Raises:
            DataError: their axes are in another order, or they are of unequal length.
        """
        explain_shapes(self.inputs, arrays, where)
        lengths = {name: len(array) for name, array in arrays.items() if array.ndim}
        if len(set(lengths.values())) > 1:
            sizes = ", ".join(f"{name}: {length}" for name, length in lengths.items())
            raise DataError(f"arrays of unequal length ({sizes})", where=where)
        return next(iter(lengths.values()), 1)

    def _fitted(self, arrays: Arrays, where: str) -> Batch:
        has_labels = LABELS not in {spec.name for spec in self.inputs} and LABELS in arrays
        free = [
            InputSpec(spec.name, spec.dtype, (None, *spec.shape[1:])) if spec.shape else spec
            for spec in self.inputs
        ]
        feed = fit_inputs(free, arrays, where=where)
        labels = to_labels(arrays[LABELS], where) if has_labels else None
        return Batch(feed, labels)

    @cached_property
    def digest(self) -> str:
        """sha256 of all arrays as the model gets them, labels included: reads everything once."""
        found = hashlib.sha256()
        for batch in self._parts(1 << 30):
            for name, array in sorted(batch.feed.items()):
                found.update(f"{name} {array.dtype} {array.shape[1:]}".encode())
                found.update(np.ascontiguousarray(array).data if array.size else b"")
            if batch.labels is not None:
                found.update(batch.labels.tobytes())
        return found.hexdigest()

    def describe(self) -> dict[str, Any]:
        """For the header of a report: name, digest, number of samples."""
        return {"data": self.name, "sha256": self.digest, "samples": self.samples}


def read_dataset(
    source: str,
    inputs: Sequence[InputSpec],
    preprocess: str | Preprocess | None = None,
    limit: int | None = None,
) -> Dataset:
    """A data set for a model; little is read before its batches are.

    Args:
        source: a folder of pictures, an .npz or .npy, or `package.module:callable`. A callable is
            called once for every reading, and must yield the same each time.
        inputs: what the model wants.
        preprocess: for pictures: a name of `graphfold.calibration.preprocess.NAMED`, a JSON file,
            or what one says.
        limit: at most so many samples.

    Raises:
        DataError: no such source, not readable, or not fitting the model.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} samples", where=source, hint="at least 1")
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, source, tuple(inputs), preprocess, limit)
    if preprocess is not None:
        raise DataError(
            "--preprocess is for folders of pictures",
            where=source,
            hint="arrays are fed as they are",
        )
    if path.suffix in (".npz", ".npy") or path.exists():
        return _from_file(path, source, tuple(inputs), limit)
    if ":" in source:
        return Dataset(source, tuple(inputs), None, None, limit, None, _repeatable(source))
    raise DataError(
        "no such file",
        where=source,
        hint="a folder of pictures, an .npz, an .npy or package.module:callable",
    )


def _repeatable(source: str) -> Callable[[], Iterator[Item]]:
    """What a callable yields, each time it is called; another beginning than before is an error."""
    begun: set[str] = set()

    def items() -> Iterator[Item]:
        for number, item in enumerate(_call(source)):
            if number == 0:
                found = hashlib.sha256()
                for name, value in sorted(item.items()):
                    found.update(name.encode() + np.asarray(value).tobytes())
                begun.add(found.hexdigest())
                if len(begun) > 1:
                    raise DataError(
                        "yields other values than when it was called before",
                        where=source,
                        hint="data are read several times: give its random numbers a seed",
                    )
            yield item

    return items


def _from_folder(
    path: Path,
    source: str,
    inputs: tuple[InputSpec, ...],
    preprocess: str | Preprocess | None,
    limit: int | None,
) -> Dataset:
    found = find_images(path)
    require_pillow()
    if preprocess is None:
        raise DataError(
            "how are the folder's pictures to be prepared?",
            where=source,
            hint=f"--preprocess with one of {', '.join(NAMED)}, or a JSON file",
        )
    chosen = read_preprocess(preprocess) if isinstance(preprocess, str) else preprocess
    spec = _image_input(inputs, source)
    prepare = Preparation(chosen, spec, source)
    labels = found.labels

    def item(number: int) -> Item:
        made: dict[str, Any] = {spec.name: prepare(open_image(found.files[number]))}
        if labels is not None:
            made[LABELS] = np.array([labels[number]])
        return made

    def items() -> Iterator[Item]:
        return map(item, range(len(found.files)))

    samples = len(found.files) if limit is None else min(limit, len(found.files))
    known = None if labels is None else np.array(labels[:samples], dtype=np.int64)
    return Dataset(source, inputs, samples, known, limit, chosen, items, item)


def _image_input(inputs: tuple[InputSpec, ...], source: str) -> InputSpec:
    if len(inputs) != 1:
        names = ", ".join(spec.name for spec in inputs)
        raise DataError(
            f"pictures for one input, but the model has {len(inputs)} ({names})",
            where=source,
            hint="give an .npz keyed by input name, or a callable",
        )
    return inputs[0]


def _from_file(
    path: Path, source: str, inputs: tuple[InputSpec, ...], limit: int | None
) -> Dataset:
    arrays = _read_file(path, inputs)
    has_labels = LABELS in arrays and LABELS not in {spec.name for spec in inputs}
    labels = to_labels(arrays[LABELS], source) if has_labels else None
    found = Dataset(source, inputs, None, labels, limit, None, lambda: iter([arrays]))
    length = found.length(arrays, source)
    samples = length if limit is None else min(limit, length)
    return replace(found, samples=samples, labels=None if labels is None else labels[:samples])


def to_labels(value: Any, where: str) -> NDArray[np.int64]:
    """Numbers of classes, one per sample.

    Raises:
        DataError: something else.
    """
    labels = np.atleast_1d(np.asarray(value))
    is_whole = labels.dtype.kind in "iu" or (
        labels.dtype.kind == "f" and np.array_equal(labels, np.round(labels))
    )
    if not is_whole or labels.ndim != 1:
        raise DataError(
            f"labels are {labels.dtype} of shape {describe_shape(labels.shape)}",
            where=where,
            hint="one whole number per sample: its class",
        )
    return labels.astype(np.int64)


def _fixed_batch(inputs: Sequence[InputSpec]) -> int | None:
    sizes = [spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)]
    return sizes[0] if sizes and isinstance(sizes[0], int) else None


def _joined(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    feed = {
        name: np.concatenate([batch.feed[name] for batch in batches]) for name in batches[0].feed
    }
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return Batch(feed, np.concatenate(labels) if len(labels) == len(batches) else None)


def _rows(array: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
    return array[start:stop] if array.ndim else array


def _part(batch: Batch, start: int, stop: int) -> Batch:
    feed = {name: _rows(array, start, stop) for name, array in batch.feed.items()}
    return Batch(feed, None if batch.labels is None else batch.labels[start:stop])


def read_inputs(
    source: str,
    inputs: Sequence[InputSpec],
    *,
    preprocess: str | Preprocess | None = None,
    limit: int | None = None,
) -> Iterator[Arrays]:
    """Feeds for a model, one after the other, as they come.

    Unlike a data set's batches, what a callable yields is not joined, and inputs need not have a
    batch axis.

    Args:
        source: as for `read_dataset`.
        inputs: what the model wants.
        preprocess: for pictures.
        limit: stop after this many feeds.

    Raises:
        DataError: no such file, not readable, or not fitting the model.
    """
    return itertools.islice(_feeds(source, inputs, preprocess), limit)


def _feeds(
    source: str, inputs: Sequence[InputSpec], preprocess: str | Preprocess | None
) -> Iterator[Arrays]:
    path = Path(source)
    if path.suffix in (".npz", ".npy") and path.is_file() and preprocess is None:
        yield from _cut(_read_file(path, inputs), inputs, source)
    elif ":" in source and not path.exists() and preprocess is None:
        for item in _call(source):
            yield from _cut(item, inputs, source)
    else:
        for batch in read_dataset(source, inputs, preprocess).batches():
            yield batch.feed


def _read_file(path: Path, inputs: Sequence[InputSpec]) -> Arrays:
    if path.suffix not in (".npz", ".npy") or path.is_dir():
        what = "a folder" if path.is_dir() else "neither .npz nor .npy"
        hint = "a folder of pictures, an .npz or an .npy"
        raise DataError(f"is {what}", where=str(path), hint=hint)
    mode: Literal["r"] | None = "r" if path.suffix == ".npy" else None  # larger than the memory
    try:
        found = np.load(path, allow_pickle=False, mmap_mode=mode)
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
    explain_shapes(inputs, item, where)
    arrays = {name: np.asarray(value) for name, value in item.items() if name != LABELS}
    if LABELS in {spec.name for spec in inputs} and LABELS in item:
        arrays[LABELS] = np.asarray(item[LABELS])
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
    step = sizes_fixed[0] if sizes_fixed else BATCH
    stop = length - length % step if sizes_fixed else length
    if stop == 0:
        raise DataError(f"{length} samples do not fill the model's batch of {step}", where=where)
    for start in range(0, stop, step):
        yield {
            name: _slice(array, start, step) if name in cut else array
            for name, array in arrays.items()
        }


def _slice(array: NDArray[Any], start: int, step: int) -> NDArray[Any]:
    return array[start : start + step]


def _is_stack(array: NDArray[Any], spec: InputSpec) -> bool:
    """Whether the array holds more samples than one feed."""
    if array.ndim == 0 or array.ndim != len(spec.shape):
        return False
    batch = spec.shape[0]
    return len(array) != batch if isinstance(batch, int) else len(array) > BATCH
