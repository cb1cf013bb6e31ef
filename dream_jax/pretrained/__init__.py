"""Models and adapters in and out of directories.

`models` loads, saves and exports whole models, `conversion` turns one layout into the other, `directories` says what such a
directory is, `quantised` reads a model into a base of few bits, `adapter` keeps what was trained beside a base, `merged`
adds the two as they are read, and `autoregressive` makes a Dream to be of a Qwen2. Nothing here knows names and layouts
(`hf`), Orbax (`checkpoint`) or how a directory is made whole or not at all (`files`).
"""

from dream_jax.lora import merge as merge_adapter
from dream_jax.pretrained.adapter import (
    ADAPTER,
    Adapter,
    adapter_params,
    describe_adapter,
    put_on,
    save_adapter,
)
from dream_jax.pretrained.autoregressive import MaskRow, adapt_qwen2, dream_config
from dream_jax.pretrained.conversion import Conversion, convert_from_hf, convert_to_hf
from dream_jax.pretrained.directories import DTYPES, DtypeName, fingerprint
from dream_jax.pretrained.models import describe, export_hf, load, save

__all__ = [
    "ADAPTER",
    "DTYPES",
    "Adapter",
    "Conversion",
    "DtypeName",
    "MaskRow",
    "adapt_qwen2",
    "adapter_params",
    "convert_from_hf",
    "convert_to_hf",
    "describe",
    "describe_adapter",
    "dream_config",
    "export_hf",
    "fingerprint",
    "load",
    "merge_adapter",
    "put_on",
    "save",
    "save_adapter",
]
