"""The architecture as a test: who may import whom, and what `import memsave` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import memsave

PACKAGE = Path(memsave.__file__).parent
MECHANISMS = ("reversible", "ghost", "profiler")
LEAVES = {"arguments", "files", "processes", "progress"}  # modules that import nothing of memsave
CORE = {"models", "data", "privacy", "config", *MECHANISMS, *LEAVES}
ALLOWED = {  # imports run downwards
    "reversible": {"reversible"},
    "ghost": {"ghost", "processes"},
    "profiler": {"profiler", "files"},
    "models": {"models", "reversible", "ghost"},
    "data": {"data", *LEAVES},
    "privacy": {"privacy", "ghost", "processes"},
    "config": {"config", "profiler"},
    "training": {"training", *CORE},
    "tasks": {"tasks", "training", *CORE},
    "planning": {"planning", "experiment", "tasks", "training", *CORE},
}
HEAVY = ("monai", "nibabel", "scipy", "matplotlib", "transformers", "opacus", "sacrebleu", "rouge_score")


def imports(path):
    """(module, whether it is imported when the file is) of each absolute import."""
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


@pytest.mark.parametrize("module", sorted(LEAVES))
def test_leaf_modules_import_nothing_of_memsave(module):
    assert not [name for name, _ in imports(PACKAGE / f"{module}.py") if name.split(".")[0] == "memsave"]


@pytest.mark.parametrize("package", MECHANISMS)
def test_the_mechanisms_import_torch_alone(package):
    for path in (PACKAGE / package).rglob("*.py"):
        for module, top in imports(path):
            root = module.split(".")[0]
            allowed = root in ("torch", "memsave") or root in sys.stdlib_module_names
            assert allowed or not top, f"{path.name} imports {module} at its top"


def test_importing_memsave_loads_nothing_heavy():
    program = (
        "import sys, memsave, memsave.reversible, memsave.ghost, memsave.profiler, memsave.models, memsave.privacy\n"
        "import memsave.data.volumes.reader\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
