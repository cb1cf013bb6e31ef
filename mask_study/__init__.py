"""Measures how the attention mask changes a masked-diffusion model: trains the same small model under each mask.

This package has the tasks, the variants, the runs with their tables and figures, and statistics of the attention inside
a checkpoint. It trains and samples with dream_jax.
"""

from mask_study.runs import Study, StudyPlan, differences, read_rows, summarise
from mask_study.tasks import TASKS, StudyTask
from mask_study.variants import VARIANTS, Variant

__all__ = ["TASKS", "VARIANTS", "Study", "StudyPlan", "StudyTask", "Variant", "differences", "read_rows", "summarise"]
