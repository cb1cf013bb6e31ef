"""Times one training step, in a process that does nothing else."""

from __future__ import annotations

import dataclasses
import gc
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import train_step

from dream_jax.device_memory import shortage
from stages.results import StageResult, require_accelerator


def run(options: Mapping[str, Any], result: StageResult) -> None:
    """Times the step.

    Args:
      options: `settings`, the fields of `train_step.TrainStepBenchSettings`; `profile`, whether one step is traced;
        `otherwise`, rematerialisation policies to try in this order if the memory is too small for that of the settings.
      result: receives what `train_step.measure` returns, and the policy.

    Raises:
      RuntimeError: the memory is too small with each of the policies.
    """
    require_accelerator(options, jax.default_backend())
    settings = train_step.TrainStepBenchSettings(**options["settings"])
    policies = [settings.remat, *options.get("otherwise", ())]
    for remat in policies:
        result.write(remat=remat)
        found = _measured(dataclasses.replace(settings, remat=remat), bool(options.get("profile")), result)
        if found is None:
            break
        # Errors of jax refer to the arrays of the step that did not fit, which the next policy needs.
        jax.clear_caches()
        gc.collect()
        result.add("refused", {"remat": remat, "reason": found})
    else:
        raise RuntimeError(f"the memory is too small for a step with each of {', '.join(policies)}")
    result.write(doing=None)


def _measured(settings: train_step.TrainStepBenchSettings, profile: bool, result: StageResult) -> str | None:
    """Measures a step; returns None, or the error if the memory of the device is too small for it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            train_step.measure(settings, pathlib.Path(folder) if profile else None, result.doing, result.write)
        except jax.errors.JaxRuntimeError as error:
            if shortage(error) is None:
                raise
            return str(error).splitlines()[0][:300]
    return None
