"""The architecture: allowed imports, no import cycles, no checks of kinds outside of tasks, a light import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import memsave

PACKAGE = Path(memsave.__file__).parent
MECHANISMS = ("reversible", "ghost", "offload", "profiler")
LEAVES = {"_version", "arguments", "files", "host_bytes", "processes", "progress", "random_state", "tf32"}
"""Modules that import nothing else of memsave."""
CORE = {"models", "data", "privacy", "config", "own_code", "process_group", *MECHANISMS, *LEAVES}
ALLOWED = {  # imports run downwards
    "reversible": {"reversible", "random_state"},
    "ghost": {"ghost", "processes", "tf32"},
    "offload": {"offload", "host_bytes"},
    "profiler": {"profiler", "files", "host_bytes"},
    "models": {"models", "reversible", "tf32", "ghost", "processes"},
    "config": {"config", "profiler"},
    "data": {"data", "config", *LEAVES},
    "privacy": {"privacy", "ghost", "processes"},
    "training": {"training", *CORE},
    "tasks": {"tasks", "training", *CORE},
    "planning": {"planning", "tasks", "training", *CORE},
}
HEAVY = (
    "torch._dynamo",
    "monai",
    "nibabel",
    "scipy",
    "matplotlib",
    "transformers",
    "peft",
    "opacus",
    "sacrebleu",
    "rouge_score",
)


def imports(path):
    """(module, whether the import runs when the file is imported) of each absolute import."""
    tree = ast.parse(path.read_text())
    later = (ast.FunctionDef, ast.If)  # inside a function, or under `if TYPE_CHECKING`
    top = set(ast.walk(tree)) - {n for f in ast.walk(tree) if isinstance(f, later) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports within memsave are absolute"
            yield node.module, node in top


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_downwards(package):
    for path in (PACKAGE / package).rglob("*.py"):
        for module, _ in imports(path):
            parts = module.split(".")
            if parts[0] == "memsave" and len(parts) > 1:
                assert parts[1] in ALLOWED[package], f"{path.name} imports {module}"


def modules():
    """(dotted name, path) of each module of the package."""
    for path in PACKAGE.rglob("*.py"):
        parts = ["memsave", *path.relative_to(PACKAGE).with_suffix("").parts]
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported_modules(path, names):
    """The modules that a file imports, also within functions, except imports only for type checkers."""
    tree = ast.parse(path.read_text())
    checks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))
    skipped = {node for check in checks for each in check.body for node in ast.walk(each)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in skipped:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in names else node.module
        elif isinstance(node, ast.Import) and node not in skipped:
            yield from (alias.name for alias in node.names)


def cycles(graph):
    """Yield a path from a module to itself, if there is one."""
    for start in graph:
        reached, paths = set(), [[start]]
        while paths:
            path = paths.pop()
            for after in graph[path[-1]] - reached:
                if after == start:
                    yield [*path, start]
                    return
                reached.add(after)
                paths.append([*path, after])


def test_there_is_no_import_cycle():
    paths = dict(modules())
    graph = {
        name: {each for each in imported_modules(path, paths) if each in paths and each != name}
        for name, path in paths.items()
    }
    assert graph["memsave.run"]  # the graph is not empty
    assert next(cycles(graph), None) is None


def test_nothing_imports_the_integrations():
    for name, path in modules():
        if not name.startswith("memsave.integrations"):
            assert not [each for each, _ in imports(path) if each.startswith("memsave.integrations")], name


def test_a_cycle_is_found():
    assert next(cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == ["b", "c", "b"]


KINDS = (
    r"config\.task\b",
    r"\.kind\s*(==|!=|in\b)",
    r"isinstance\([^)]*(Data|Model|GPT2|SmolLM2|Segmentation|Generation|Classification|Dialog)\b",
    r"from memsave\.tasks\.(segmentation|language)",
    r"from memsave\.data\.(volumes|text)",
)
CHECK_KINDS = {  # commands of one task
    "predict.py": "segments with a trained U-Net",
    "generate.py": "writes with a trained language model",
    "data/check.py": "the command that checks volumes",
}


@pytest.mark.parametrize("pattern", KINDS)
def test_no_code_outside_of_tasks_checks_the_kind_of_a_task_or_data_set(pattern):
    found = []
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        if relative.parts[0] in ("tasks", "config", "data") or str(relative) in CHECK_KINDS:
            continue
        lines = enumerate(path.read_text().splitlines(), 1)
        found += [f"{relative}:{number}: {line}" for number, line in lines if re.search(pattern, line)]
    assert not found


@pytest.mark.parametrize("package", MECHANISMS)
def test_the_mechanisms_import_only_torch(package):
    for path in (PACKAGE / package).rglob("*.py"):
        for module, top in imports(path):
            root = module.split(".")[0]
            allowed = root in ("torch", "memsave") or root in sys.stdlib_module_names
            assert allowed or not top, f"{path.name} imports {module} at its top"


def test_importing_memsave_loads_nothing_heavy():
    program = (
        "import sys, memsave, memsave.reversible, memsave.ghost, memsave.profiler, memsave.models, memsave.privacy\n"
        "import memsave.offload\n"
        "import memsave.data.volumes.reader\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
