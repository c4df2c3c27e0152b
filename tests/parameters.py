"""Parameters of tests that have many variants."""

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], step: int) -> list[Any]:
    """Return each value as a parameter; all but every `step`-th are for `make test-slow`."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=[pytest.mark.slow] * (number % step > 0)
        )
        for number, value in enumerate(values)
    ]
