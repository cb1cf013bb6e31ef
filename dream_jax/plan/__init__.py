"""What a run would take, before any of it is paid for: memory, time, price, on hardware that need not be here.

The real train step is compiled ahead of time for the hardware that is named, from shapes: no weights, no accelerator.
`hardware` finds devices to compile for, `compile` compiles, `hlo` counts collectives in what comes out, `arithmetic` says
what no compiler does (and all of it where none is installed), `cost` turns that into seconds and money, `planner` puts it
together from the trainer's settings, `report` says it.
"""

from dream_jax.plan.planner import make_plan
from dream_jax.plan.report import render
from dream_jax.plan.settings import PlanSettings, RunPlan

__all__ = ["PlanSettings", "RunPlan", "make_plan", "render"]
