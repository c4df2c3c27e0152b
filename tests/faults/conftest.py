"""Commands in processes of their own, on tiny models."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import worlds
from .process import Command, Ended


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if sys.platform != "linux":
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="it looks into /proc and forks"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, gpt2: Path) -> Path:
    """What tests copy, to spoil the copy."""
    return worlds.make(tmp_path_factory.mktemp("world"), gpt2)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Command]:
    """A command that runs, in the folder of the test, with a cache of its own."""

    def make(*arguments: str | Path, **more: Any) -> Command:
        return Command(*arguments, **({"cwd": tmp_path, "cache": tmp_path / ".cache"} | more))

    return make


@pytest.fixture
def run(start: Callable[..., Command]) -> Callable[..., Ended]:
    """A command that has ended."""
    return lambda *arguments, **more: start(*arguments, **more).end()
