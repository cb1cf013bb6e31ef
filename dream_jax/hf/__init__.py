"""The Hugging Face side: published names and layouts, safetensors in, safetensors out.

`table` holds the one table of names and layouts, `source` opens and reads files, `load` makes jax arrays of
them and `export` goes back. Nothing here executes code that comes with a checkpoint, and only `fetch` touches
a network.
"""

from dream_jax.hf.export import MAX_SHARD_SIZE, export, export_from
from dream_jax.hf.load import (
    Buffers,
    Reading,
    flat,
    flat_shardings,
    load_params,
    nested,
    reading_threads,
    start_reading,
)
from dream_jax.hf.source import INDEX, SINGLE, Source, Tensor, fetch, is_hub_id, open_source
from dream_jax.hf.table import RULES, Layout, Place, Rule, check_names, parameter_shapes, places

__all__ = [
    "INDEX",
    "MAX_SHARD_SIZE",
    "RULES",
    "SINGLE",
    "Buffers",
    "Layout",
    "Place",
    "Reading",
    "Rule",
    "Source",
    "Tensor",
    "check_names",
    "export",
    "export_from",
    "fetch",
    "flat",
    "flat_shardings",
    "is_hub_id",
    "load_params",
    "nested",
    "open_source",
    "parameter_shapes",
    "places",
    "reading_threads",
    "start_reading",
]
