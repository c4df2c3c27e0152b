"""A server with two adapters, for all tests of the routes."""

import shutil

import pytest

from .. import api_server
from ..api_server import TEMPLATE, greedy, write_adapter


@pytest.fixture(scope="module")
def base(gpt2, tmp_path_factory):
    """The tiny GPT-2, with a chat template."""
    folder = tmp_path_factory.mktemp("served") / "talker"
    shutil.copytree(gpt2, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def adapters_dir(base, tmp_path_factory):
    """A library with two adapters."""
    adapters_dir = tmp_path_factory.mktemp("adapters_dir")
    for seed, name in enumerate(("a", "b")):
        write_adapter(adapters_dir, name, base, seed)
    return adapters_dir


@pytest.fixture(scope="module")
def served(base, adapters_dir):
    with api_server.serving(base, adapters_dir) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    return served.client()


@pytest.fixture(scope="module")
def expected_texts(base, adapters_dir):
    """Return the greedy output of a generator of its own, by model."""
    return {name or "talker": greedy(base, adapters_dir, name).text for name in (None, "a", "b")}


@pytest.fixture
def start_server(base, tmp_path):
    """Return a function that starts a server with its own settings and library."""
    adapters_dir = tmp_path / "adapters"
    for seed, name in enumerate(("a", "b")):
        write_adapter(adapters_dir, name, base, seed)

    def start(**settings):
        return api_server.serving(base, adapters_dir, **settings)

    start.adapters_dir = adapters_dir
    return start
