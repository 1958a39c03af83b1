"""Shared items and their errors: every process gets all results in order, and the error of any process."""

import pytest
from torch import distributed

from memsave import generate
from memsave.data import DataError
from memsave.processes import gather_shares, map_in_rounds, map_shares, process_rank, received, share
from memsave.progress import Progress
from tests.support.processes import run_processes

COUNTS = (0, 1, 2, 3, 7)


class Unpicklable(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def caught(function, *args):
    """(class, message, notes) of an error."""
    try:
        return function(*args)
    except Exception as error:
        return type(error), str(error), len(getattr(error, "__notes__", []))


def square(number):
    return number * number


def fails_at(*numbers, error=DataError):
    def function(number):
        if number in numbers:
            raise error(f"item {number}") if error is DataError else error(number, "x")
        return number

    return function


def kept(function, items):
    """(the results before the first error, the error)."""
    found = []

    def collect():
        found.extend(map_in_rounds(function, items))

    return found, caught(collect)


def every_share():
    found = {}
    for count in COUNTS:
        items = list(range(count))
        found["shares", count] = gather_shares(share(items))
        found["mapped", count] = map_shares(square, items)
        found["rounds", count] = list(map_in_rounds(square, items))
    found["one fails"] = caught(map_shares, fails_at(1), range(5))
    found["two fail"] = caught(map_shares, fails_at(1, 2), range(5))
    found["unpicklable"] = caught(map_shares, fails_at(1, error=Unpicklable), range(5))
    found["kept"] = [kept(fails_at(number), range(5)) for number in range(5)]
    found["first kept"] = kept(fails_at(2, 1), range(5))
    found["received"] = list(received(["value of", process_rank()]))
    found["after errors"] = map_shares(square, range(5))
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_every_process_has_all_results_and_errors(count):
    ranks = run_processes(count, every_share)
    for rank, found in enumerate(ranks):
        for number in COUNTS:
            assert found["shares", number] == list(range(number))
            assert found["mapped", number] == found["rounds", number] == [n * n for n in range(number)]
        assert found["one fails"] == (DataError, "item 1", int(rank != 1))
        own = 2 if rank == 2 or (count == 2 and rank == 0) else 1
        assert found["two fail"][:2] == (DataError, f"item {own}")
        kind = Unpicklable if rank == 1 else RuntimeError
        assert found["unpicklable"][0] is kind and "1 and x" in found["unpicklable"][1]
        for number, (before, error) in enumerate(found["kept"]):
            assert before == list(range(number))
            assert error[:2] == (DataError, f"item {number}")
        assert found["first kept"][0] == [0] and found["first kept"][1][:2] == (DataError, "item 1")
        assert found["received"] == ([["value of", each] for each in range(count)] if rank == 0 else [])
        assert found["after errors"] == [0, 1, 4, 9, 16]


def test_one_process_keeps_what_it_had_before_an_error():
    assert kept(fails_at(2), range(5)) == ([0, 1], (DataError, "item 2", 0))
    assert list(received("value")) == ["value"]


def is_quiet():
    return Progress().console.quiet


def test_only_the_first_process_shows_progress():
    assert run_processes(2, is_quiet) == [False, True]
    assert not is_quiet()


def lose_the_other():
    if process_rank() == 1:
        distributed.destroy_process_group()
        return
    map_shares(square, range(3))


def test_a_process_that_ended_is_reported_to_the_others(monkeypatch, capsys):
    with pytest.raises(AssertionError, match=r"(?s)rank 0:.*RuntimeError: \[.*gloo"):
        run_processes(2, lose_the_other)

    def lost(*_, **__):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    monkeypatch.setattr(generate, "generate_file", lost)
    assert generate.main(["model=x", "input=y", "output=z"]) == 1
    assert capsys.readouterr().err == "memsave: another process of this command has ended (killed, or out of memory)\n"
