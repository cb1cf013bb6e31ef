"""Reads and writes checkpoints in the layout of Hugging Face: safetensors files with published names and shapes.

`table` maps published tensors to parameters, `source` opens and reads files, `load` turns them into jax arrays, and
`export` writes files; `peft` reads and writes adapters in the layout of PEFT. Code that comes with a checkpoint is never
executed, and only `fetch` uses the network.
"""

from dream_jax.hf.export import MAX_SHARD_SIZE, SHARD_SIZE, export, export_from
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
from dream_jax.hf.peft import (
    PEFT_CONFIG,
    PEFT_PICKLE,
    PEFT_WEIGHTS,
    PeftAdapter,
    PeftConfig,
    read_peft,
    write_peft,
)
from dream_jax.hf.source import INDEX, SINGLE, SafetensorsSource, Tensor, open_source
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
    "PEFT_CONFIG",
    "PEFT_PICKLE",
    "PEFT_WEIGHTS",
    "RULES",
    "SHARD_SIZE",
    "SINGLE",
    "Buffers",
    "ConversionRule",
    "Destination",
    "PeftAdapter",
    "PeftConfig",
    "Reading",
    "SafetensorsSource",
    "Tensor",
    "TensorLayout",
    "check_names",
    "destinations",
    "export",
    "export_from",
    "flat",
    "flat_shardings",
    "load_params",
    "nested",
    "open_source",
    "parameter_shapes",
    "read_peft",
    "reading_threads",
    "start_reading",
    "write_peft",
]
