"""dream_jax converts, fine-tunes, samples and exports Dream-7B, a diffusion language model, in JAX.

The names in `__all__` are the stable interface. Everything else may change between releases.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

from dream_jax.block_diffusion import block_diffusion_loss
from dream_jax.config import PRESETS, DreamConfig
from dream_jax.model import Dream
from dream_jax.objective import (
    CartWeight,
    Focal,
    InverseTimeWeight,
    LinearWeight,
    LossWeight,
    UniformWeight,
    masked_diffusion_loss,
)
from dream_jax.sampler import (
    Answer,
    BlockCache,
    Count,
    EntropyBound,
    Factor,
    FastDLLMCache,
    Moment,
    NoCache,
    Sample,
    SamplerConfig,
    Stream,
    Threshold,
    WindowCache,
    generate,
)

if TYPE_CHECKING:
    from dream_jax.pretrained import export_hf, load, merge_adapter, save, save_adapter

try:
    __version__ = importlib.metadata.version("dream-jax")
except importlib.metadata.PackageNotFoundError:  # dream_jax is not installed, but imported from its source tree
    __version__ = "0+unknown"

__all__ = [
    "PRESETS",
    "Answer",
    "BlockCache",
    "CartWeight",
    "Count",
    "Dream",
    "DreamConfig",
    "EntropyBound",
    "Factor",
    "FastDLLMCache",
    "Focal",
    "InverseTimeWeight",
    "LinearWeight",
    "LossWeight",
    "Moment",
    "NoCache",
    "Sample",
    "SamplerConfig",
    "Stream",
    "Threshold",
    "UniformWeight",
    "WindowCache",
    "block_diffusion_loss",
    "export_hf",
    "generate",
    "load",
    "masked_diffusion_loss",
    "merge_adapter",
    "save",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    # These functions are imported on first use, because they need Orbax and safetensors. A machine that does not read
    # or write models may not have these packages.
    if name in ("load", "save", "export_hf", "save_adapter", "merge_adapter"):
        from dream_jax import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
