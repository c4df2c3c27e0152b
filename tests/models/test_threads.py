"""The number of threads, and the warning of a machine too busy for several."""

import pytest
import torch

from lora_tuner import Generator, ModelOptions
from lora_tuner.errors import ConfigError
from lora_tuner.models import threads
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

# `data` and `export` load a base too, and have no --threads.
ADVICE = "and stay in use, as their number changes rounding. One is faster: --threads 1, or OMP_NUM_THREADS=1."


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def measured(monkeypatch, together, running, alone=0.01):
    """Replace the time of some products by one for each number of threads."""
    times = {1: (alone, alone), 2: (together, together * running * 2)}
    monkeypatch.setattr(threads, "_time_products", times.__getitem__)


@pytest.mark.parametrize(
    ("together", "running", "expected"),
    [
        (0.006, 0.99, None),  # quiet
        (0.013, 0.4, None),  # busy, but two threads are hardly slower
        (0.03, 0.99, None),  # quiet, and such products are too small for two
        (0.03, 0.4, f"This machine is busy: 2 threads are 3.0 times as slow as one, {ADVICE}"),
        (0.35, 0.2, f"This machine is busy: 2 threads are 35 times as slow as one, {ADVICE}"),
    ],
)
def test_only_slow_threads_are_named(monkeypatch, together, running, expected):
    measured(monkeypatch, together, running)
    assert threads.busy_warning() == expected
    assert torch.get_num_threads() == 2


def test_one_thread_is_not_measured(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(threads, "_time_products", None)
    assert threads.busy_warning() is None


def test_real_measurement_keeps_threads(monkeypatch):
    monkeypatch.setattr(threads, "ROUNDS", 1)
    slowdown, running = threads._measure(2)
    assert slowdown > 0
    assert running >= 0
    assert torch.get_num_threads() == 2


def test_base_loads_with_warning(gpt2, monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))  # no other test has said it there
    measured(monkeypatch, 0.03, 0.4)
    notices = []
    load_base(find_base(str(gpt2)), ModelOptions(device="cpu", notify=notices.append))
    assert [notice.text for notice in notices] == [threads.busy_warning()]
    load_base(find_base(str(gpt2)), ModelOptions(device="cpu", notify=notices.append))
    assert len(notices) == 1  # within the hour
    monkeypatch.setattr(threads, "SAID_AGAIN", 0)
    load_base(find_base(str(gpt2)), ModelOptions(device="cpu", notify=notices.append))
    load_base(find_base(str(gpt2)), ModelOptions(device="cpu", threads=1, notify=notices.append))
    assert len(notices) == 2


def test_python_options_set_threads(gpt2):
    Generator(options=ModelOptions(base=str(gpt2), device="cpu", threads=1))
    assert torch.get_num_threads() == 1
    for count, shown in ((0, "0"), (1_000_000, "1,000,000")):
        with pytest.raises(ConfigError, match=rf"^threads is {shown}: give a number from 1 to 1,024\.$"):
            Generator(options=ModelOptions(base=str(gpt2), threads=count))
