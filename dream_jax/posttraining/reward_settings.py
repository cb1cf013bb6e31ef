"""The settings of training on rewards."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Training on rewards of answers that the model samples during the run."""
