"""Data flows one way, and so do imports."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = ("configs", "shards", "pipeline", "train", "eval", "launch")
MODULES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of the modules a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield str(node.module)


def test_these_six_packages_and_no_other_are_installed() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(declared) == sorted(ORDER) == sorted(p.parent.name for p in ROOT.glob("*/__init__.py"))
    assert {package_of(path) for path in MODULES} == set(ORDER)


def test_nothing_imports_upward() -> None:
    upward = [
        (str(path.relative_to(ROOT)), name)
        for path in MODULES
        for name in imported(path)
        if name.split(".")[0] in ORDER[ORDER.index(package_of(path)) + 1 :]
    ]
    assert not upward


def test_the_builtin_eval_is_never_hidden() -> None:
    hiding = [path for path in MODULES for node in ast.walk(ast.parse(path.read_text())) if binds_eval(node)]
    assert not hiding, "import from eval.MODULE instead"


def test_a_configuration_is_read_without_torch_or_dali() -> None:
    light = {
        name.split(".")[0] for path in MODULES if package_of(path) == "configs" for name in imported(path)
    }
    assert light <= {"configs", "pydantic", "pydantic_core", "yaml", *sys.stdlib_module_names}


def package_of(path: Path) -> str:
    """The import package that a module belongs to."""
    return path.relative_to(ROOT).parts[0]


def binds_eval(node: ast.AST) -> bool:
    """Whether an import statement gives the name `eval` to something."""
    names = node.names if isinstance(node, ast.Import | ast.ImportFrom) else []
    return any((alias.asname or alias.name.split(".")[0]) == "eval" for alias in names)
