"""Which model a plan or a table belongs to."""

from __future__ import annotations

from graphfold.model import Model, digest
from graphfold.plan import ModelReference


def model_reference(model: Model) -> ModelReference:
    """Name and digest of the model's file; of a model in memory its digest alone.

    Raises:
        ModelError: the file cannot be read.
    """
    if model.path is None:
        return ModelReference(name=None, sha256=digest(model))
    return ModelReference(name=model.path.name, sha256=digest(model.path))
