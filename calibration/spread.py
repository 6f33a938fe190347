"""Independent pieces of work over processes of this machine, or of a Dask cluster, by joblib.

Results come as they are ready, in any order, so that each can be written down at once.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from graphfold.errors import GraphfoldError, UsageError

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")

_DASK = "dask://"
_CONNECT_SECONDS = 10
_WATCH_SECONDS = 1.0


def check_executor(executor: str | None) -> None:
    """Refuse what no work can be spread by, before any work.

    Raises:
        UsageError: an unknown executor, or a package that it needs is missing.
    """
    if executor is not None and not (
        executor.startswith(_DASK) and executor.removeprefix(_DASK).rpartition(":")[2].isdigit()
    ):
        raise UsageError(
            f"--executor {executor!r} is not known", hint="dask://host:port of a Dask scheduler"
        )
    needed = {"joblib": "torch"} | ({} if executor is None else {"distributed": "scale"})
    for name, extra in needed.items():
        if find_spec(name) is None:
            raise UsageError(f"{name} is not installed", hint=f"pip install 'graphfold[{extra}]'")


def spread(
    call: Callable[[Shared, Item], Result],
    shared: Shared,
    items: Sequence[Item],
    *,
    jobs: int,
    executor: str | None = None,
) -> Iterator[Result]:
    """Call a function for every item, and give the results as they come.

    Args:
        call: of a module that workers can import, too.
        shared: its first argument; large arrays in it are sent once.
        items: its second arguments.
        jobs: processes of this machine; with 1 all happens in this one. No matter with an executor.
        executor: `dask://host:port`, the scheduler of a cluster whose workers have this package.

    Raises:
        UsageError: the cluster cannot be reached. GraphfoldError: a worker died.
    """
    from joblib import Parallel, delayed

    with _backend(shared, executor) as backend, _told_of_the_dead():
        local = backend is None and jobs > 1
        function = delayed(_watched if local else _plainly)
        options: dict[str, Any] = {
            "n_jobs": jobs,
            "backend": backend,
            "return_as": "generator_unordered",
            "pre_dispatch": "all" if backend else "2*n_jobs",
            "batch_size": 1,
        }
        try:
            with Parallel(**options) as parallel:
                results = parallel(function(call, shared, item, os.getpid()) for item in items)
                try:
                    yield from results
                finally:
                    results.close()
        finally:
            if local:
                _end_processes()


def _end_processes() -> None:
    """Joblib keeps its processes for later calls, and commands leave without a word to them."""
    from joblib.externals.loky import get_reusable_executor

    executor: Any = get_reusable_executor(reuse=True)
    # What is left is reported as leaked, and joblib forgets only folders that were made.
    for folder in executor._temp_folder_manager._cached_temp_folders.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    executor.terminate(kill_workers=True)
    gc.collect()


def _plainly(call: Callable[..., Result], shared: Any, item: Any, _: int) -> Result:
    return call(shared, item)


def _watched(call: Callable[..., Result], shared: Any, item: Any, caller: int) -> Result:
    """In a process of this machine, which ends with the calling one even where that is killed."""
    global _watches
    if not _watches:
        _watches = True
        threading.Thread(target=_end_without, args=(caller,), daemon=True).start()
    return call(shared, item)


_watches = False


def _end_without(caller: int) -> None:
    while os.getppid() == caller:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


@contextmanager
def _backend(shared: Any, executor: str | None) -> Iterator[Any]:
    """What joblib runs on: None for processes of its own."""
    if executor is None:
        yield None
        return
    import distributed
    from joblib._dask import DaskDistributedBackend

    address = executor.removeprefix(_DASK)
    connect: Any = distributed.Client
    try:
        client = connect(f"tcp://{address}", timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no Dask scheduler answers at {address}", hint="start one with `dask scheduler`"
        ) from error
    try:
        yield DaskDistributedBackend(client=client, scatter=[shared])
    finally:
        client.close()


@contextmanager
def _told_of_the_dead() -> Iterator[None]:
    from concurrent.futures.process import BrokenProcessPool

    try:
        yield
    except BrokenProcessPool as error:
        raise GraphfoldError(
            "a worker process ended, perhaps for lack of memory", hint="take fewer --jobs"
        ) from error
    except TimeoutError as error:
        raise UsageError(
            "the Dask cluster has no workers", hint="start some with `dask worker ADDRESS`"
        ) from error
    except Exception as error:
        if type(error).__name__ != "KilledWorker":
            raise
        raise GraphfoldError(
            "workers of the Dask cluster ended, perhaps for lack of memory",
            hint="give them more memory, or take a smaller --subset",
        ) from error
