"""The public API: the names of `memsave.__all__` are lazy, documented, and visible to type checkers."""

import ast
import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import memsave

ROOT = Path(__file__).parents[1]
PACKAGES = ("reversible", "ghost", "offload", "profiler", "privacy", "models", "config", "data")


def type_checking_names():
    """{public name: (module, name in that module)} of the imports under `if TYPE_CHECKING`."""
    tree = ast.parse(Path(memsave.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom) and node.module != "pathlib"]
    return {alias.asname or alias.name: (node.module, alias.name) for node in imports for alias in node.names}


@pytest.mark.parametrize("name", memsave.__all__)
def test_a_public_name_is_importable_and_documented(name):
    value = getattr(memsave, name)
    assert value.__doc__
    assert f"| `memsave.{name}(" in (ROOT / "docs" / "api.md").read_text()


def test_every_name_of_the_first_table_of_the_api_page_is_public():
    table = (ROOT / "docs" / "api.md").read_text().partition("Each package")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `memsave.")]
    names = [row.removeprefix("| `memsave.").partition("(")[0] for row in rows]
    assert sorted(names) == sorted(memsave.__all__)


def test_type_checkers_and_the_lazy_import_find_the_same_objects():
    assert type_checking_names() == memsave._SOURCES
    assert sorted([*memsave._SOURCES, "load"]) == memsave.__all__


@pytest.mark.parametrize("package", PACKAGES)
def test_a_public_package_is_on_the_api_page_and_its_names_exist(package):
    module = importlib.import_module(f"memsave.{package}")
    assert f"| `memsave.{package}` |" in (ROOT / "docs" / "api.md").read_text()
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_importing_memsave_does_not_import_torch():
    program = "import sys, memsave\nprint('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_dir_lists_the_public_names_before_their_first_use():
    program = "import memsave\nprint(set(memsave.__all__) <= set(dir(memsave)), 'largest' in vars(memsave))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_an_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="module 'memsave' has no attribute 'GhostCliper'"):
        memsave.GhostCliper  # noqa: B018


def test_the_wheel_contains_types_and_configuration(tmp_path):
    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"memsave/__init__.py", "memsave/py.typed", "memsave/conf/config.yaml"} <= set(names)
