"""Supervised fine-tuning: the loss of masked diffusion, or of block diffusion, on the responses of the rows."""

from __future__ import annotations

from typing import ClassVar

from dream_jax.posttraining.base import Objective, StepMaterials
from dream_jax.train_step import AnyStep, make_train_step


class Supervised(Objective):
    """The model learns to write the response of each row after its prompt."""

    name: ClassVar[str] = "sft"

    def step(self, materials: StepMaterials) -> AnyStep:
        """Returns the step of `train_step.make_train_step`."""
        return make_train_step(
            materials.graphdef, materials.optimizer, materials.schedule, materials.config, materials.mesh
        )
