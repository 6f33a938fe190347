"""Large models stay out of memory: computed weights go to disk, mapped ones are let go after use.

A model of several gigabytes lies in files that are mapped, a page at a time. What passes compute
would be as large again, so from `SPILL_BYTES` of weights on each new tensor is written to a
temporary file as soon as it is computed, and from there to the result without being held. Pages of
mapped files that were read are given back, for they count as this process's memory too.
"""

from __future__ import annotations

import mmap
import tempfile
from contextlib import suppress
from pathlib import Path

import onnx_ir as ir

from graphfold.tensors import graph_tensors, payload_bytes

SPILL_BYTES = 1 << 28
_LARGE_TENSOR_BYTES = 1 << 16
_KEY = "graphfold.spill"


class Spill:
    """A temporary folder of tensors; it goes with the last of them."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="graphfold-")
        self._count = 0

    def keep(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """The same tensor on disk; where there is no room, the tensor itself."""
        path = Path(self._folder.name) / str(self._count)
        self._count += 1
        try:
            path.write_bytes(tensor.tobytes())
        except OSError:
            path.unlink(missing_ok=True)
            return tensor
        kept = ir.ExternalTensor(
            path.name,
            0,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            base_dir=self._folder.name,
        )
        kept.meta[_KEY] = self
        return kept


def spill_for(graph: ir.Graph) -> Spill | None:
    """Where new tensors of a graph go; None where its weights are small enough for memory."""
    total = 0
    for tensor in graph_tensors(graph):
        total += payload_bytes(tensor) if tensor.dtype != ir.DataType.STRING else 0
        if total > SPILL_BYTES:
            return Spill()
    return None


def is_large(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor is worth a file of its own."""
    return tensor.nbytes > _LARGE_TENSOR_BYTES


def let_go(tensor: ir.TensorProtocol | None) -> None:
    """Give back the memory of a mapped tensor; what refers to it reads it again when asked."""
    if isinstance(tensor, ir.ExternalTensor) and isinstance(tensor.raw, mmap.mmap):
        with suppress(AttributeError, OSError):  # not every system can
            tensor.raw.madvise(mmap.MADV_DONTNEED)
