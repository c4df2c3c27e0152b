"""Two trained adapters, and a terminal of a width."""

import shutil

import pytest

from lora_tuner import Library

from ..evaluation.test_gain_matrix import train_in


@pytest.fixture(scope="session")
def trained(gpt2, tmp_path_factory):
    return train_in(tmp_path_factory.mktemp("trained"), gpt2, ["noir", "verse"])


@pytest.fixture
def two(trained, tmp_path, monkeypatch):
    """Two adapters of one base, noir and verse, with a cache for this test."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    return [Library().get("noir"), Library().get("verse")]


@pytest.fixture
def columns(monkeypatch):
    return lambda width: monkeypatch.setenv("COLUMNS", str(width))
