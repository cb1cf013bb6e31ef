"""The settings of training on preferences."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """Training on pairs of a chosen and a rejected answer."""
