"""Commands in processes of their own, on tiny models."""

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from . import workspaces
from .process import Command, CommandResult
from .runs import outcome


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if sys.platform != "linux":
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs /proc and fork"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, gpt2: Path) -> Path:
    """Make a workspace, which tests copy and damage."""
    return workspaces.make(tmp_path_factory.mktemp("world"), gpt2)


@pytest.fixture(scope="session")
def expected(
    world: Path, gpt2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[workspaces.State, list[str]]]:
    """Return the state after an undisturbed command of COMMANDS, and its file operations."""

    @cache
    def run_once(name: str) -> tuple[workspaces.State, list[str]]:
        words = workspaces.arguments(name, world, gpt2)
        return workspaces.becomes(words, world, tmp_path_factory.mktemp("expected") / "world")

    return run_once


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Command]:
    """Start a command in the folder of the test, with a cache of its own."""

    def make(*arguments: str | Path, **more: Any) -> Command:
        return Command(*arguments, **({"cwd": tmp_path, "cache": tmp_path / ".cache"} | more))

    return make


@pytest.fixture
def run(start: Callable[..., Command]) -> Callable[..., CommandResult]:
    """Run a command to its end."""
    return lambda *arguments, **more: start(*arguments, **more).end()


@pytest.fixture
def arguments(gpt2: Path, reviews_csv: Path) -> list[str]:
    """Return the arguments of a run of a few seconds; further options may follow."""
    shutil.copytree(gpt2, "base")
    small = {
        "base": "base",
        "dataset": reviews_csv.name,
        "max_length": 64,
        "batch_size": 2,
        "rank": 4,
        "learning_rate": 0.01,
    }
    Path("small.yaml").write_text(json.dumps(small | {"eval_rows": 8, "device": "cpu"}))
    return ["train", "--config", "small.yaml"]


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Results shared by all tests."""
    return {"place": tmp_path_factory.mktemp("kept")}


@pytest.fixture
def whole(kept: dict[Any, Any], run: Callable[..., CommandResult], arguments: list[str]) -> Callable[..., Any]:
    """Return the outcome of an undisturbed run."""

    def of(*how: str, before: Callable[[], None] | None = None) -> Any:
        if how not in kept:
            assert run(*arguments, *how, "--name", "whole", before=before).status == 0
            kept[how] = outcome(Path("adapters/whole"))
            shutil.rmtree("adapters/whole")
        return kept[how]

    return of
