"""Imports point down only, and what must be light stays light."""

import ast
import re
from pathlib import Path

import pytest

import lora_tuner

PACKAGE = Path(lora_tuner.__file__).parent
ROWS = [
    {"cli"},
    {"cli_adapters", "cli_combine", "cli_serve"},
    {"options"},
    {"server.serve"},
    {"server.api", "server.playground"},
    {"server.page"},
    {"server.panels"},
    {"server.metrics", "server.form"},
    {"server.guard", "server.desk"},
    {"server.schema", "server.worker"},
    {"ladder"},
    {"training", "combine", "export", "share", "generation", "doctor"},
    {"trainer", "cost", "proof"},
    {"job", "stream", "checkpoints"},
    {"batch"},
    {"evaluation", "report", "terminal", "decoder", "stock", "row"},
    {"bank"},
    {"updates", "methods"},
    {"lora", "library", "portable"},
    {"data", "base_model", "store"},
    {"fast", "lowbit", "drawing", "sharding"},
    {"distributed", "tokens", "hub", "files", "manifest", "tables"},
    {"config", "chat"},
    {"errors"},
]
LEVEL = {module: level for level, row in enumerate(ROWS) for module in row}


def imported(path):
    """The package's modules that a file imports when it runs; those under TYPE_CHECKING are for type checkers alone."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    inside = path.parent != PACKAGE
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in skipped:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from [f"{path.parent.name}.{name}" if inside and node.level == 1 else name for name in names]


def file_of(module):
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def test_every_module_has_a_row():
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    assert {name for name in found if not name.endswith("__init__")} == set(LEVEL)


@pytest.mark.parametrize("module", sorted(LEVEL))
def test_imports_point_down(module):
    for other in imported(file_of(module)):
        if other in LEVEL:
            assert LEVEL[other] > LEVEL[module], f"{module} imports {other}"


def test_the_core_neither_prints_nor_exits_nor_knows_typer():
    for module in set(LEVEL) - {"cli", "cli_adapters", "cli_combine", "cli_serve", "options", "terminal"}:
        for node in ast.walk(ast.parse(file_of(module).read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("print", "sys.exit", "exit"), module
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not re.match(r"(import|from) (typer|rich|click)", ast.unparse(node)), module


def test_the_public_names_are_sorted_complete_and_importable():
    assert list(lora_tuner.__all__) == sorted(lora_tuner.__all__) == sorted(lora_tuner._HOMES)
    for name in lora_tuner.__all__:
        assert getattr(lora_tuner, name).__module__ == f"lora_tuner.{lora_tuner._HOMES[name]}"
