"""The loader: batches depend on seed and position alone, are loaded ahead but not far, and threads end."""

import threading
import time

import pytest

from memsave.data import DataError
from memsave.data.loader import Index, load_ahead, numbered, shuffled


def first(batches, count):
    return [next(batches) for _ in range(count)]


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("memsave-data")]


def test_every_epoch_has_every_example_once_in_another_order():
    items = [index for batch in first(shuffled(5, batch_size=2, seed=0), 10) for index in batch]
    assert [index.draw for index in items] == list(range(20))
    epochs = [tuple(index.example for index in items[start : start + 5]) for start in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len(set(epochs)) > 1


@pytest.mark.parametrize("start", [0, 1, 7])
def test_a_run_may_start_at_any_batch(start):
    whole = first(shuffled(5, batch_size=3, seed=4), 12)
    assert first(shuffled(5, batch_size=3, seed=4, start=start), 5) == whole[start : start + 5]
    assert first(shuffled(5, batch_size=3, seed=5), 12) != whole


def test_batches_of_another_sampler_get_draw_numbers_that_never_repeat():
    batches = list(numbered([[2, 0], [], [2]], size=3, start=4))
    assert batches == [[Index(2, 14), Index(0, 12)], [], [Index(2, 20)]]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order_for_any_number_of_threads(workers):
    def load(batch):
        time.sleep(0.001 * (5 - batch[0]))
        return batch

    assert list(load_ahead(load, [[number] for number in range(5)], workers=workers)) == [[n] for n in range(5)]
    assert not loader_threads()


@pytest.mark.parametrize("workers", [1, 2])
def test_threads_load_ahead_but_no_further_than_their_number(workers):
    requested = []
    batches = load_ahead(requested.append, ([number] for number in range(20)), workers=workers)
    next(batches)
    deadline = time.monotonic() + 10
    while len(requested) < workers + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # enough for many more batches
    assert sorted(requested) == [[number] for number in range(workers + 1)]
    batches.close()


def test_threads_end_when_the_generator_is_closed():
    batches = load_ahead(lambda batch: batch, ([number] for number in range(20)), workers=2)
    next(batches)
    assert loader_threads()
    batches.close()
    assert not loader_threads()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_loading_arrives_as_it_is_when_its_batch_is_due(workers):
    def load(batch):
        if batch == [1]:
            raise DataError("case 1 is damaged")
        return batch

    batches = load_ahead(load, [[0], [1], [2]], workers=workers)
    assert next(batches) == [0]
    with pytest.raises(DataError, match="case 1 is damaged"):
        next(batches)
    assert not loader_threads()
