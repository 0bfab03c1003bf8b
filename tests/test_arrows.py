"""Imports point one way: bounds -> layers -> models -> what uses them -> cli. Read from the source, not imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"lipcert": ROOT / "lipcert", "lipcert.bounds": ROOT / "bounds", "lipcert.attacks": ROOT / "attacks"}

# What a part may import of ours, besides itself. Parts not named here may import everything but the last three.
ALLOWED = {
    "bounds": set(),
    "attacks": set(),
    "errors": set(),
    "numerics": set(),
    "checker": set(),
    "registry": {"errors"},
    "files": {"errors"},
    "data": {"errors", "registry"},
    "losses": {"errors", "registry"},
    "layers": {"bounds", "errors"},
    "models": {"bounds", "layers", "errors", "registry"},
    "report": {"errors", "files", ""},
}
LAST = {"cli", "report", "__main__"}
PROOFS_USE = {"torch", "numpy", "scipy"}


def sources() -> list[tuple[str, Path]]:
    found = []
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found.append((".".join([package, *(part for part in parts if part != "__init__")]), path))
    return found


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports at run time; what only type checkers read doesn't count."""
    for node in run_time_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 1 and path.parent.name == "checker":  # a folder that runs alone: tests/test_checker.py
                yield f"lipcert.checker.{node.module}"
                continue
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module or ""
            if node.module == "lipcert":
                yield from (f"lipcert.{alias.name}" for alias in node.names)


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from run_time_nodes(node)


def part(module: str) -> str:
    """Return the part of lipcert that a module belongs to: "lipcert.data.digits" -> "data", "lipcert" -> ""."""
    return module.partition("lipcert")[2].lstrip(".").partition(".")[0]


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_one_way(module: str, path: Path) -> None:
    own = part(module)
    for name in imports(path):
        if name.partition(".")[0] != "lipcert":
            continue
        used = part(name)
        if own == "" or used == own:
            continue
        if own in ALLOWED:
            version = used == "" and own not in ("bounds", "attacks", "checker")  # `import lipcert`
            assert version or used in ALLOWED[own], f"{module} imports {name}"
        elif own not in LAST:
            assert used not in LAST, f"{module} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "bounds").rglob("*.py")), ids=lambda path: path.name)
def test_proofs_use_three_libraries(path: Path) -> None:
    import sys

    others = {name.partition(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    assert others <= PROOFS_USE | {"lipcert"}


def test_the_check_sees_an_import(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    inner = "    from lipcert.cli import main\n    from lipcert import data\n"
    file.write_text(f"if TYPE_CHECKING:\n    import a\ndef f():\n{inner}")
    assert list(imports(file)) == ["lipcert.cli", "lipcert", "lipcert.data"]
    assert [part(name) for name in imports(file)] == ["cli", "", "data"]
