"""Examples that consist of several rows of the model's batch, such as a document of several chunks.

    with example_rows([0, 0, 1, 2, 2, 2], examples=3):
        logits = model(input_ids=chunks)                # (6, T, V): six rows, three examples
    losses = ...                                        # (3,): one loss per example
    norms = clipper.backward(losses)                    # (3,)

The norm of an example is that of the sum of its rows' gradients, so it contains the products between its rows.

The contexts nest: inside that of persons with several documents, a function may open one for the chunks of each
document, and knows nothing of persons.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from memsave.ghost.rows import Rows


@dataclass(frozen=True)
class ExampleRows:
    """The example of each row of a batch."""

    of_row: tuple[int, ...]
    examples: int
    """B, the number of examples."""

    @property
    def rows(self) -> Rows:
        """The Rows of a tensor with one entry per row in dimension 0."""
        return Rows(0, None if self.of_row == tuple(range(self.examples)) else self.of_row)


_current: ContextVar[ExampleRows | None] = ContextVar("example_rows", default=None)


@contextmanager
def example_rows(of_row: Sequence[int], *, examples: int) -> Iterator[None]:
    """Context in which a clipped model takes a batch whose row r belongs to example `of_row[r]`.

    Args:
        of_row: R numbers below `examples`, one for each row of the model's inputs.
        examples: B, the number of examples, and of losses. An example may have no row; its gradient is zero.

    Inside another `example_rows`, which names the example of each of R' rows, `examples` is R': the rows belong to the
    examples of the outer context. A model without a GhostClipper is not affected. Raises ValueError for numbers out of
    range.
    """
    found = tuple(map(int, of_row))
    wrong = next((each for each in found if not 0 <= each < examples), None)
    if wrong is not None:
        raise ValueError(f"example_rows got the example {wrong}, but there are {examples}; give numbers below that")
    token = _current.set(_within(_current.get(), ExampleRows(found, examples)))
    try:
        yield
    finally:
        _current.reset(token)


def _within(outer: ExampleRows | None, inner: ExampleRows) -> ExampleRows:
    """The rows of `inner`, whose examples are the rows of `outer`, with the examples of `outer`."""
    if outer is None:
        return inner
    if inner.examples != len(outer.of_row):
        raise ValueError(
            f"example_rows got {inner.examples} examples inside another example_rows, which names the examples of "
            f"{len(outer.of_row)} rows; give as many"
        )
    return ExampleRows(tuple(outer.of_row[each] for each in inner.of_row), outer.examples)


def current_example_rows() -> ExampleRows | None:
    """The rows of the surrounding `example_rows`, or None."""
    return _current.get()
