"""What an attention mask does to a masked-diffusion model: the same small model under each, measured.

Knows tasks, variants, runs and figures, and how to look inside a checkpoint. Decides nothing about training or sampling
that the rooms below do not offer.
"""

from mask_study.runs import Plan, Study, differences, read_rows, summarise
from mask_study.tasks import TASKS, Task
from mask_study.variants import VARIANTS, Variant

__all__ = ["TASKS", "VARIANTS", "Plan", "Study", "Task", "Variant", "differences", "read_rows", "summarise"]
