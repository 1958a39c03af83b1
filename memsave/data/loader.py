"""One loader behind every sampler: batches of indices are loaded ahead of training by threads.

    shuffled      every example once an epoch, in a new order each time
    numbered      batches that somebody else draws, such as the Poisson batches of a private run
    load_ahead    the loader

An index is (example, draw). What an item holds depends on the seed of the data, its example and its draw alone, and not
on the number of threads, the memory mode or the batches before it; a resumed run starts at its step instead of
replaying.

Workers are threads. Loading is done by zlib and torch, which release the interpreter lock. Threads share one cache,
need no shared memory (64 MiB in a container by default), do not fork a process that uses CUDA or OpenMP, and pass a
DataError on as it is.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np


class Index(NamedTuple):
    """One item of a batch."""

    example: int
    """Number of the training example."""
    draw: int
    """Number of the draw, which is different for each item. For n examples, draw // n is the occasion: the step of a
    private run, otherwise the epoch. An example looks different on another occasion, where it is augmented."""


def shuffled(size: int, *, batch_size: int, seed: int, start: int = 0) -> Iterator[list[Index]]:
    """Endless batches from batch number `start` on; the last batch of an epoch continues with the next epoch.

    Item i of a run is example permutation_e[i mod size] of epoch e = i // size, and has draw number i. The permutation
    of an epoch depends on (seed, e) alone.
    """
    epoch, order, item = -1, np.empty(0, dtype=int), start * batch_size
    while True:
        batch = []
        for draw in range(item, item + batch_size):
            if draw // size != epoch:
                epoch = draw // size
                order = np.random.default_rng([seed, epoch]).permutation(size)
            batch.append(Index(int(order[draw % size]), draw))
        yield batch
        item += batch_size


def numbered(batches: Iterable[Sequence[int]], *, size: int, start: int = 0) -> Iterator[list[Index]]:
    """Batches of example numbers with draw numbers: in batch number s, example e has draw s * size + e."""
    for step, examples in enumerate(batches, start):
        yield [Index(example, step * size + example) for example in examples]


def load_ahead(
    load: Callable[[Sequence[Index]], Any], batches: Iterable[Sequence[Index]], *, workers: int
) -> Generator[Any]:
    """`load(indices)` for each batch of indices, in order.

    `workers` threads load up to `workers` batches ahead of the one in use; with 0 the caller's thread loads. Indices
    are drawn in the caller's thread. The threads end when the generator is exhausted, closed or dropped. Errors of
    `load` are raised when the batch is due.
    """
    if workers == 0:
        yield from map(load, batches)
        return
    loading: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="memsave-data") as pool:
        try:
            for batch in batches:
                loading.append(pool.submit(load, batch))
                if len(loading) > workers:
                    yield loading.popleft().result()
            while loading:
                yield loading.popleft().result()
        finally:
            for future in loading:
                future.cancel()
