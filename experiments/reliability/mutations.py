"""Mutants of a source file: copies with one small change, which a test should notice.

Messages of errors, docstrings and annotations are not changed.
"""

import ast
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    ast.Break: ast.Continue, ast.Continue: ast.Break,
}  # fmt: skip

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    line: int
    before: str
    after: str
    source: str
    """The whole changed file."""
    lines: frozenset[int]
    """The lines of the changed statement, of a compound one those of its header; of a constant those of its uses. Empty
    for other statements that run while the file is imported."""

    @property
    def name(self) -> str:
        """The file, what is changed and to what, without the line, which later changes would move."""
        return f"{self.path}: {self.before} -> {self.after}"


def places(text: str) -> list[tuple[int, int]]:
    """(number of a node, number of a change of it) of all mutants of a source."""
    nodes = enumerate(_nodes(ast.parse(text)))
    return [(number, each) for number, (node, _) in nodes for each, _ in enumerate(_changes(node))]


def make(path: str, text: str, place: tuple[int, int]) -> Mutant:
    """The mutant of a place."""
    tree = ast.parse(text)
    node, parents = next(itertools.islice(_nodes(tree), place[0], None))
    change = next(itertools.islice(_changes(node), place[1], None))
    line = getattr(node, "lineno", 0)
    statement = next((each for each in (node, *reversed(parents)) if isinstance(each, ast.stmt)), node)
    before, lines = _short(statement), _lines_to_test(tree, statement, parents)
    change(node, parents)
    ast.fix_missing_locations(tree)
    after = _short(statement)
    gone = "deleted" if not isinstance(node, (ast.Break, ast.Continue)) else _short(SWAPPED[type(node)]())
    return Mutant(path, line, before, after if after != before else gone, ast.unparse(tree), lines)


def _lines_to_test(tree: ast.AST, statement: Any, parents: tuple[ast.AST, ...]) -> frozenset[int]:
    """The lines that a test of a changed statement executes."""
    if any(isinstance(each, FUNCTIONS) for each in parents):
        return frozenset(_lines(statement))
    names = {each.id for each in getattr(statement, "targets", []) if isinstance(each, ast.Name)}
    found: set[int] = set()
    for node, above in _nodes(tree):
        if isinstance(node, ast.Name) and node.id in names and any(isinstance(each, FUNCTIONS) for each in above):
            found.update(_lines([each for each in (*above, node) if isinstance(each, ast.stmt)][-1]))
    return frozenset(found)


def _lines(statement: Any) -> range:
    body = getattr(statement, "body", None)
    start = min([statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", []))])
    end = max(start, body[0].lineno - 1) if isinstance(body, list) else statement.end_lineno
    return range(start, end + 1)


def _short(node: ast.AST) -> str:
    """The first line of a statement."""
    return ast.unparse(node).splitlines()[0]


def _nodes(tree: ast.AST, parents: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    """(node, its parents) of all nodes that may change."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST) and not isinstance(each, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
                yield each, (*parents, tree)
                if not isinstance(each, ast.Raise) and "TYPE_CHECKING" not in _test_of(each):
                    yield from _nodes(each, (*parents, tree))


def _test_of(node: ast.AST) -> str:
    return ast.unparse(node.test) if isinstance(node, ast.If) else ""


Change = Callable[[Any, Any], None]


def _changes(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        yield lambda node, _: node.ops.__setitem__(0, SWAPPED[type(node.ops[0])]())
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in SWAPPED:
        yield lambda node, _: setattr(node, "op", SWAPPED[type(node.op)]())
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield lambda node, _: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        other = not node.value if isinstance(node.value, bool) else node.value + 1
        yield lambda node, _: setattr(node, "value", other)
    if isinstance(node, ast.Call):
        for number in range(len(node.keywords)):
            yield lambda node, _, number=number: node.keywords.pop(number)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield lambda node, parents: _replace(node, node.operand, parents[-1])
    if isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield lambda node, _: setattr(node, "value", ast.Constant(None))
    if isinstance(node, (ast.Raise, ast.AugAssign, ast.Delete)) or _is_call(node):
        yield lambda node, parents: _replace(node, ast.Pass(), parents[-1])
    if isinstance(node, (ast.Break, ast.Continue)):
        yield lambda node, parents: _replace(node, SWAPPED[type(node)](), parents[-1])


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def _replace(node: ast.AST, other: ast.AST, parent: ast.AST) -> None:
    for name, value in ast.iter_fields(parent):
        if value is node:
            setattr(parent, name, other)
        elif isinstance(value, list) and any(each is node for each in value):
            value[:] = [other if each is node else each for each in value]
