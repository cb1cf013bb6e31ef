"""Measures how the attention mask changes a masked-diffusion model: trains the same small model under each mask.

This package has the tasks, the variants, the runs with their tables and figures, and statistics of the attention inside
a checkpoint. It trains and samples with dream_jax. Its public names are imported when they are first used, so that
`mask_study.adapting` can be imported where only jax, flax, optax, numpy, einops and jaxtyping are installed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mask_study.runs import Study, StudyPlan, differences, read_rows, summarise
    from mask_study.tasks import TASKS, StudyTask
    from mask_study.variants import VARIANTS, Variant

__all__ = ["TASKS", "VARIANTS", "Study", "StudyPlan", "StudyTask", "Variant", "differences", "read_rows", "summarise"]

_HOMES = {"TASKS": "tasks", "StudyTask": "tasks", "VARIANTS": "variants", "Variant": "variants"}


def __getattr__(name: str) -> Any:
    """Imports the module of a public name, and returns its value."""
    if name in __all__:
        return getattr(importlib.import_module(f"mask_study.{_HOMES.get(name, 'runs')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
