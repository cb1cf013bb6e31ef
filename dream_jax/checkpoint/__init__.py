"""Reads and writes what Orbax stores: the converted directory of a model, and the checkpoints of a training run.

A converted directory holds `config.json`, the files of the tokenizer, `dream_jax.json` (a description of the weights
with the sizes of their files) and `weights/`. In `weights/` there is one small Orbax checkpoint for the embedding, one
for each layer and one for the rest, so that a model can be written and read in units that are much smaller than the
model. The modules `weights`, `description` and `params` read and write it; the module `runs` has the checkpoints of a
training run.
"""

from dream_jax.checkpoint.description import (
    DESCRIPTION,
    WeightsDescription,
    check_files,
    is_converted,
    read_description,
    read_mask,
    write_description,
    written_files,
)
from dream_jax.checkpoint.params import load_params, save_params, set_layer
from dream_jax.checkpoint.runs import RunCheckpoints, remove_unfinished
from dream_jax.checkpoint.weights import WEIGHTS, WeightUnit, read_unit, unit_shardings, units, write_unit

__all__ = [
    "DESCRIPTION",
    "WEIGHTS",
    "RunCheckpoints",
    "WeightUnit",
    "WeightsDescription",
    "check_files",
    "is_converted",
    "load_params",
    "read_description",
    "read_mask",
    "read_unit",
    "remove_unfinished",
    "save_params",
    "set_layer",
    "unit_shardings",
    "units",
    "write_description",
    "write_unit",
    "written_files",
]
