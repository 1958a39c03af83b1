"""Plugins of pytest: which test executes which lines, and the tests of a mutant in the order in which to run them."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SHARED = "shared"
"""The name of what the imports and fixtures of a test file execute, which concerns all its tests."""


class Trace:
    """Writes {test: {"seconds", "lines": {source: lines}}} of a passing run to a file."""

    def __init__(self, sources: list[str], report: str):
        self.report = report
        self.lines: dict[str, set[int]] = {source: set() for source in sources}
        self.tests: dict[str, Any] = {SHARED: {"seconds": 0.0, "lines": {}}}
        self.started = 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Iterator[None]:
        """Trace what the imports of a test file execute."""
        with self._tracing(self.tests[SHARED]["lines"]):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        """Trace the fixtures."""
        self.started = time.monotonic()
        with self._tracing(self.tests[SHARED]["lines"]):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Trace the test itself."""
        found: dict[str, list[int]] = {}
        try:
            with self._tracing(found):
                return (yield)
        finally:
            self.tests[item.nodeid] = {"seconds": time.monotonic() - self.started, "lines": found}

    def pytest_sessionfinish(self) -> None:
        """Write the report."""
        Path(self.report).write_text(json.dumps(self.tests))

    @contextmanager
    def _tracing(self, found: dict[str, list[int]]) -> Iterator[None]:
        """Inside, executed lines are recorded; they are added to `found` at the end."""
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(None)
            self._move(found)

    def _move(self, found: dict[str, list[int]]) -> None:
        for source, lines in self.lines.items():
            if lines:
                found[source] = sorted(lines.union(found.get(source, ())))
                lines.clear()

    def _enter(self, frame: Any, event: str, arg: Any) -> Any:
        lines = self.lines.get(frame.f_code.co_filename)
        if lines is None:
            return None
        lines.add(frame.f_lineno)

        def line(frame: Any, event: str, arg: Any) -> Any:
            lines.add(frame.f_lineno)
            return line

        return line


class Select:
    """Runs these tests alone, in their order."""

    def __init__(self, tests: list[str]):
        self.order = {name: number for number, name in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Drop the other tests."""
        items[:] = sorted(
            (each for each in items if each.nodeid in self.order), key=lambda each: self.order[each.nodeid]
        )
