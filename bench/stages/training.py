"""Times a training step: one of the presets, in a process that does nothing else."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import train_step

from stages.results import StageResult, require_accelerator


def run(options: Mapping[str, Any], result: StageResult) -> None:
    """Times the step.

    Args:
      options: `settings`, the fields of `train_step.TrainStepBenchSettings`; `profile`, whether one step is traced.
      result: receives what `train_step.measure` returns.
    """
    require_accelerator(options, jax.default_backend())
    settings = train_step.TrainStepBenchSettings(**options["settings"])
    with tempfile.TemporaryDirectory() as folder:
        trace = pathlib.Path(folder) if options.get("profile") else None
        train_step.measure(settings, trace, result.doing, result.write)
    result.write(doing=None)
