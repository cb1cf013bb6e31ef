"""Predicts the memory, time and price of a training run, also for hardware that this machine does not have.

The same train step as in training is compiled ahead of time for the named hardware. It is compiled from shapes, so
neither weights nor an accelerator are needed. `hardware` finds devices to compile for, `compile` compiles, `hlo` counts
the collectives of the compiled program, `arithmetic` computes what the compiler does not report (and everything if no
compiler is installed), `cost` computes seconds and money, `planner` makes the plan from the settings of the trainer,
and `report` prints the plan.
"""

from dream_jax.plan.planner import make_plan, remedies
from dream_jax.plan.report import render
from dream_jax.plan.settings import PlanSettings, RunPlan

__all__ = ["PlanSettings", "RunPlan", "make_plan", "remedies", "render"]
