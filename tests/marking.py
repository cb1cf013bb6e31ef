"""Parameters of a test that only `make test-all` runs."""

from typing import Any

import pytest


def slow(*values: Any, **options: Any) -> Any:
    """One set of a test's parameters, marked slow: others of the same test protect most of what it does."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)
