"""Marks parameters of a test that only `make test-all` uses."""

from typing import Any

import pytest


def slow(*values: Any, **options: Any) -> Any:
    """Returns one set of parameters, marked slow. The test needs other sets too, so that the default tests run it."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)
