"""What an attention mask does to a masked-diffusion model: the same small model under each, measured.

Responsible for the tasks, the variants, the runs and their tables and figures, and for looking at the attention inside a
checkpoint. Training and sampling are those of dream_jax.
"""

from mask_study.runs import Study, StudyPlan, differences, read_rows, summarise
from mask_study.tasks import TASKS, StudyTask
from mask_study.variants import VARIANTS, Variant

__all__ = ["TASKS", "VARIANTS", "Study", "StudyPlan", "StudyTask", "Variant", "differences", "read_rows", "summarise"]
