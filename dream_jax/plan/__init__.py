"""What a run would take, before any of it is paid for: memory, time, price, on hardware that need not be here.

The real train step is compiled ahead of time for the hardware that is named, from shapes: no weights, no accelerator.
`hardware` finds devices to compile for, `compile` compiles, `hlo` counts collectives in the compiled program, `arithmetic`
computes what no compiler reports (and everything where no compiler is installed), `cost` turns this into seconds and money,
`planner` makes the plan from the trainer's settings, and `report` prints it.
"""

from dream_jax.plan.planner import make_plan
from dream_jax.plan.report import render
from dream_jax.plan.settings import PlanSettings, RunPlan

__all__ = ["PlanSettings", "RunPlan", "make_plan", "render"]
