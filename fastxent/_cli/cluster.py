"""Evaluates blocks on a Dask cluster: a task opens the files where it runs, and returns the sums over its block.

The sums are added up in the order of the blocks, so that the result is the same to the bit as without a cluster.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from distributed import Client, progress
from distributed.scheduler import KilledWorker

from fastxent._cli.files import FileArray, Index, InputError
from fastxent._cli.totals import Totals

TIMEOUT = 10  # seconds that a scheduler has for an answer


def each_on_cluster(
    address: str, x: FileArray, t: FileArray, options: dict[str, Any], work: Iterable[tuple[Index, Index]]
) -> Iterator[Totals]:
    """Yield the totals of each block. Without a terminal on stderr no progress is shown."""
    task = partial(_totals, x.opener(), t.opener(), options | {"n_threads": 1})  # Dask runs as many tasks as there are cores
    try:
        with Client(address, timeout=TIMEOUT) as client:
            futures = client.map(task, list(work), pure=False)
            if sys.stderr.isatty():
                with contextlib.redirect_stdout(sys.stderr):
                    progress(futures, notebook=False)
            for future in futures:
                yield future.result()
    except InputError:
        raise
    except (OSError, ValueError, ImportError, KilledWorker) as error:
        raise InputError(f"the Dask cluster at {address} fails: {type(error).__name__}: {error}") from error


def _totals(
    open_x: Callable[[], FileArray], open_t: Callable[[], FileArray], options: dict[str, Any], index: tuple[Index, Index]
) -> Totals:
    return Totals.of_block(open_x().block(index[0]), open_t().block(index[1]), options)
