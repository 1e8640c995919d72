"""Who imports whom: no arrow upwards, no circle, and imports inside functions only with a reason."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from programs import ROOT

# Rooms from the ground floor up, and the rooms that each may import. A file at the top level is a room of its own, and
# so is a program in the room that it belongs to.
ALLOWED: dict[str, set[str]] = {
    "utils": set(),
    "pickles": {"utils"},
    "files": {"pickles", "utils"},
    "image_folders": {"files", "utils"},
    "pixels": {"utils"},
    "workers": {"utils"},
    "datasets": {"image_folders", "pixels", "workers", "utils"},
    "logs": {"files", "utils"},
    "models": {"files", "utils"},
    "wpac": {"models", "files", "utils"},
    "piad": {"models", "files", "utils"},
    "supernet": {"wpac", "piad", "models", "datasets", "image_folders", "pixels", "files", "utils"},
    "training": {"piad", "files", "utils"},
    "engine": {"training", "piad", "datasets", "logs", "files", "utils"},
    "fidelity": {"engine", "models", "utils"},
    "arguments": {"supernet", "models", "datasets", "utils"},
    "size_arguments": {"supernet", "models"},
    "export_arguments": {"arguments", "size_arguments", "supernet", "files", "utils"},
    "main_arguments": {"arguments", "size_arguments", "piad"},
    "main_training": {"engine", "training", "fidelity", "supernet", "piad", "models", "utils"},
}
PROGRAMS_OF_ROOMS = ("supernet.profile", "supernet.retable")
ALLOWED["report"] = {*ALLOWED} - {"training", "main_training", "logs"}
ALLOWED |= {program: {*ALLOWED} for program in ("main", "reparam", "export")}
ALLOWED |= {program: {"supernet", "arguments", "models", "piad", "files", "utils"} for program in PROGRAMS_OF_ROOMS}
ALLOWED["benchmarks"] = {*ALLOWED}
ALLOWED["studies"] = {*ALLOWED}
FILES = [
    path for path in sorted(ROOT.rglob("*.py")) if not {".venv", "tests", "output"} & {*path.relative_to(ROOT).parts}
]


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> list[tuple[str, ast.AST, bool]]:
    """(module of this project, the statement, whether it stands inside a function) for each import of a file."""
    tree, found = ast.parse(path.read_text()), []
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"{package}.{node.module or ''}".strip(".") if node.level else node.module
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
        found += [(name, node, id(node) in inside) for name in names]
    return found


def room_of(module: str) -> str:
    return module if module in PROGRAMS_OF_ROOMS else module.split(".")[0]


def ours(path: Path) -> list[str]:
    return [name for name, _, _ in imports_of(path) if room_of(name) in ALLOWED]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_a_file_imports_only_what_lies_below_it(path: Path):
    room = room_of(module_of(path))
    assert room in ALLOWED, f"{path.name} is in no room: add it to ALLOWED"
    wrong = {name for name in ours(path) if room_of(name) not in ALLOWED[room] | {room}}
    assert wrong == set()


def test_no_file_imports_itself_through_others():
    arrows = {module: {name for name in ours(path) if name in MODULES} - {module} for module, path in MODULES.items()}
    while ground := [module for module, above in arrows.items() if not above & arrows.keys()]:
        for module in ground:
            del arrows[module]
    assert arrows == {}, "these import one another in a circle"


def test_imports_inside_functions_have_a_reason():
    """An optional or slow package, with a comment that says so; type-only imports stand at the top."""
    for path in FILES:
        lines = path.read_text().splitlines()
        for name, node, inside in imports_of(path):
            if inside and path.parts[-2] != "studies":
                assert "# here, because" in lines[node.lineno - 1], f"{path.name}:{node.lineno} imports {name}"


def test_the_file_that_is_copied_into_folders_needs_nothing_of_ours():
    assert ours(ROOT / "models" / "subnetwork.py") == []
