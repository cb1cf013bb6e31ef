"""Times the sampler and the training step in plain PyTorch. In this process jax uses no device."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch_side

from dream_jax.config import PRESETS
from stages.results import NotAvailable, StageResult, require_accelerator

_NEEDED = ("torch", "transformers", "safetensors")


def run(options: Mapping[str, Any], result: StageResult) -> None:
    """Times the published loop, or a training step.

    Args:
      options: `work`, "sampler" or "train_step"; `model`; `rows`, the arguments of the function of this name in
        `torch_side`, without the configuration; each row also has a `name`.
      result: receives a row for each.

    Raises:
      NotAvailable: a library is not installed here.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise NotAvailable(f"not installed here: {', '.join(missing)}")
    import torch

    require_accelerator(options, "gpu" if torch.cuda.is_available() else "cpu")
    config = PRESETS[options["model"]].to_dict()
    for row in options["rows"]:
        arguments = {name: value for name, value in row.items() if name != "name"}
        result.doing(row["name"])
        result.add("rows", {"name": row["name"], **torch_side.WORK[options["work"]](config=config, **arguments)})
    result.write(doing=None)
