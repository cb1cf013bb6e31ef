"""Loading and saving models and adapters in directories.

`models` loads, saves and exports whole models; `conversion` converts between the two layouts, also with an adapter added;
`directories` finds and identifies directories; `by_layer` reads a model layer by layer, to hold its layers apart or to
quantise it to 8 or 4 bits; `adapter` saves and loads adapters, also in the layout of PEFT; `autoregressive` makes a Dream
checkpoint, from which training starts, from a Qwen2 checkpoint, `llama` from a Llama-type one, and `gguf_file` reads files
of llama.cpp.
"""

from dream_jax.lora import merge as merge_adapter
from dream_jax.pretrained.adapter import (
    ADAPTER,
    Adapter,
    adapter_params,
    describe_adapter,
    export_peft,
    put_on,
    save_adapter,
)
from dream_jax.pretrained.autoregressive import MaskRow, adapt_qwen2, dream_config
from dream_jax.pretrained.conversion import Conversion, convert_from_hf, convert_to_hf
from dream_jax.pretrained.directories import DTYPES, DtypeName, fingerprint
from dream_jax.pretrained.gguf_file import SMOLLM2
from dream_jax.pretrained.llama import adapt_autoregressive, adapt_llama, llama_config
from dream_jax.pretrained.models import describe, export_hf, load, save

__all__ = [
    "ADAPTER",
    "DTYPES",
    "SMOLLM2",
    "Adapter",
    "Conversion",
    "DtypeName",
    "MaskRow",
    "adapt_autoregressive",
    "adapt_llama",
    "adapt_qwen2",
    "adapter_params",
    "convert_from_hf",
    "convert_to_hf",
    "describe",
    "describe_adapter",
    "dream_config",
    "export_hf",
    "export_peft",
    "fingerprint",
    "llama_config",
    "load",
    "merge_adapter",
    "put_on",
    "save",
    "save_adapter",
]
