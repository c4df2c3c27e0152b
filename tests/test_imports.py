"""Rooms import downwards only, no modules import each other in a circle, and the core stays quiet."""

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lora_tuner

PACKAGE = Path(lora_tuner.__file__).parent
LEVELS = [  # from the top; rooms of one level do not import each other
    {"cli"},
    {"server"},
    {"training", "convert", "analysis"},
    {"evaluation"},
    {"inference"},
    {"models"},
    {"adapters", "data"},
    {"foundations"},
]
FOUNDATIONS = {"config", "errors", "text", "atomic_io", "hub", "distributed", "settings_files"}
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def room_of(module):
    first = module.partition(".")[0]
    return "foundations" if first in FOUNDATIONS else first


@cache
def nodes_of(module):
    return list(ast.walk(ast.parse(MODULES[module].read_text())))


def imports_of(module):
    """The modules of the package that a module imports, also inside functions and for type checkers."""
    package = module.split(".")[:-1]
    for node in nodes_of(module):
        if isinstance(node, ast.ImportFrom) and node.level:
            parent = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            names = {f"{parent}.{alias.name}".strip(".") for alias in node.names} | {parent}
            yield from names & MODULES.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    for imported in imports_of(module):
        ours, theirs = room_of(module), room_of(imported)
        assert ours == theirs or LEVEL[ours] < LEVEL[theirs], f"{module} imports {imported}"


def test_imports_have_no_cycle():
    TopologicalSorter({module: set(imports_of(module)) - {module} for module in MODULES}).prepare()


# A run shows its progress by default, from Python too.
MAY_PRINT = {module for module in MODULES if room_of(module) == "cli"} | {"training.progress"}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - MAY_PRINT))
def test_core_never_prints_or_exits(module):
    for node in nodes_of(module):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("print", "sys.exit", "exit")
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not re.match(r"(import|from) (typer|rich|click)", ast.unparse(node))


def test_public_names_are_sorted_and_importable():
    assert list(lora_tuner.__all__) == sorted(lora_tuner.__all__) == sorted(lora_tuner._HOMES)
    for name in lora_tuner.__all__:
        assert getattr(lora_tuner, name).__module__ == f"lora_tuner.{lora_tuner._HOMES[name]}"
