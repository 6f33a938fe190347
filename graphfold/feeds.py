"""Random inputs that a model really runs: unknown sizes are tried, never guessed silently."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphfold import specs
from graphfold.comparison import is_float
from graphfold.runtime import OutOfMemoryError, RunError, Session
from graphfold.specs import Arrays, Shapes


def first_that_runs(
    session: Session, given: Shapes, seed: int, *, batch: int = specs.UNKNOWN_BATCH
) -> tuple[Arrays, Arrays, int]:
    """Outputs, feed and guessed size of the first candidate that the model runs.

    Raises:
        RunError: it runs at none; the message lists what was tried.
    """
    tried: list[str] = []
    last = ""
    fallback: tuple[Arrays, Arrays, int] | None = None
    for size, shapes in specs.candidate_shapes(session.inputs, given, batch):
        for filling in specs.fillings(session.inputs, size):
            rng = np.random.default_rng(seed)
            try:
                feed = _random_inputs(session, shapes, filling, rng)
                outputs = session.run(feed)
            except RunError as error:
                last = error.what
                continue
            if says_something(outputs):
                return outputs, feed, size
            fallback = fallback or (outputs, feed, size)
        tried.append(", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()))
    if fallback is not None:
        return fallback
    raise RunError(f"the input model runs at none of the sizes tried ({'; '.join(tried)}): {last}")


def _random_inputs(
    session: Session, shapes: Shapes, filling: specs.Filling, rng: np.random.Generator
) -> Arrays:
    """Random inputs, unless they alone would fill the memory."""
    try:
        return specs.random_inputs(session.inputs, shapes, filling, rng)
    except MemoryError as error:
        raise OutOfMemoryError(str(error)) from None


def says_something(outputs: Arrays) -> bool:
    """Whether comparing these proves anything: not all empty, not all NaN or infinite."""
    return any(
        array.size and (not is_float(array) or np.isfinite(as_float(array)).any())
        for array in outputs.values()
    )


def second_feed(
    session: Session, given: Shapes, size: int, seed: int, first: Arrays
) -> Arrays | None:
    """Other values, at another size and batch where sizes are free and the model runs it."""
    rng = np.random.default_rng([seed, 1])
    filling = specs.fillings(session.inputs, size)[-1]
    same = {name: array.shape for name, array in first.items()}
    attempts = [same]
    if size:
        other = specs.fill_shapes(
            session.inputs, given, specs.SECOND_BATCH, specs.SECOND_SIZES[size]
        )
        attempts.insert(0, other)
    for shapes in attempts:
        try:
            feed = _random_inputs(session, shapes, filling, rng)
            if says_something(session.run(feed)):
                return feed
        except RunError:
            continue
    return None


def describe_feed(feed: Arrays) -> str:
    """Input names and shapes as one line."""
    return ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())


def as_float(array: NDArray[Any]) -> NDArray[np.float64]:
    """As float64, which also numpy's functions on half types understand."""
    return np.asarray(array, dtype=np.float64)
