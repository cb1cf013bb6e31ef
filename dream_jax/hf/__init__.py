"""Reads and writes checkpoints in the layout of Hugging Face: safetensors files with published names and shapes.

`table` maps published tensors to parameters, `source` opens and reads files, `load` turns them into jax arrays, and
`export` writes files. Code that comes with a checkpoint is never executed, and only `fetch` uses the network.
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
from dream_jax.hf.source import INDEX, SINGLE, SafetensorsSource, Tensor, fetch, is_hub_id, open_source
from dream_jax.hf.table import (
    RULES,
    ConversionRule,
    Destination,
    TensorLayout,
    check_names,
    destinations,
    parameter_shapes,
)

__all__ = [
    "INDEX",
    "MAX_SHARD_SIZE",
    "RULES",
    "SINGLE",
    "Buffers",
    "ConversionRule",
    "Destination",
    "Reading",
    "SafetensorsSource",
    "Tensor",
    "TensorLayout",
    "check_names",
    "destinations",
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
    "reading_threads",
    "start_reading",
]
