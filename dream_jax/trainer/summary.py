"""The contents of `data.json`, written when a run begins, and of `summary.json`, written when it is finished."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from dream_jax import sharding
from dream_jax.checkpoint import RunCheckpoints
from dream_jax.files import read_json
from dream_jax.hub import parse_hub_id
from dream_jax.model import Dream, parameter_count
from dream_jax.paths import local_path
from dream_jax.train_step import TrainState
from dream_jax.trainer.cost import run_cost
from dream_jax.trainer.folder import FORMATS, REMAT, last_losses
from dream_jax.trainer.prepared import PreparedRun
from dream_jax.trainer.segments import RunSegment
from dream_jax.trainer.settings import TrainSettings
from dream_jax.trainer.weights import Frozen


def data_facts(run: PreparedRun) -> dict[str, Any]:
    """Returns the contents of `data.json`.

    These are facts about rows and batches, the origins of model and data, the version of the answer formats, and the
    rematerialisation policy.
    """
    return {
        "rows": run.batches.report.plain(),
        "batches": dataclasses.asdict(run.batches.outlook(run.settings.run.steps)),
        "sources": _sources(run.settings),
        FORMATS: 2,
        REMAT: run.model.remat,
    }


def _sources(settings: TrainSettings) -> dict[str, str]:
    """Returns for the model and each data set, by name, whether it is "local", "hub" or "built in".

    A resumed run keeps the answers from its first start, because local files may have been deleted since then.
    """
    try:
        before = read_json(settings.run.out / "data.json").get("sources")
    except (OSError, ValueError):
        before = None  # the run is new, or the file is damaged and will be replaced
    if isinstance(before, dict):
        return before
    found = {}
    for name in (settings.network.model, settings.rows.data, *settings.rows.mix):
        local = local_path(name).exists()
        found[name] = "local" if local else "hub" if parse_hub_id(name) is not None else "built in"
    return found


def summarize(
    run: PreparedRun,
    state: TrainState,
    frozen: Frozen,
    trained: Dream,
    evaluation: dict[str, Any],
    checkpoints: RunCheckpoints,
    segments: Sequence[RunSegment],
) -> dict[str, Any]:
    """Returns the contents of `summary.json`: settings and results of the run.

    Among them are the numbers of all and of trained parameters, the bytes of parameters and optimizer state on each
    device, the last losses, `eval` (the final evaluation), `best` (step and nll of the best evaluation, or None),
    `step` (after which the weights were exported), and `seconds` and `cost` (see `Cost`) over all segments.

    Args:
      run: the run, whose settings and data are included.
      state: the state whose weights are exported.
      frozen: the weights that were not trained.
      trained: the exported model.
      evaluation: the result of `scoring.evaluate` for this model; empty without evaluation.
      checkpoints: the checkpoints of the run.
      segments: all segments of the run, the present one last.
    """
    settings, best = run.settings, checkpoints.best_step()
    return {
        "settings": settings.plain(),
        "parameters": run.model.config.num_parameters,
        "trained_parameters": parameter_count(state.params),
        "base_identity": frozen.identity,
        "learning_rate": settings.optimizer_config().learning_rate,
        "mask": trained.trained_mask,
        REMAT: run.model.remat,
        "bytes_per_device": sharding.bytes_per_device((state, frozen.params)),
        "data": run.batches.report.plain(),
        "last_losses": last_losses(settings.run.out) if jax.process_index() == 0 else [],
        "eval": evaluation,
        "best": None if best is None else {"step": best, "nll": checkpoints.score(best)},
        "step": int(state.step),
        "seconds": sum(segment.seconds for segment in segments),
        "cost": dataclasses.asdict(run_cost(segments, settings.price)),
        "devices": f"{run.mesh.devices.size} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
