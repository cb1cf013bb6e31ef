"""dream_jax: Dream-7B, a diffusion language model, in JAX: convert, fine-tune, sample and export it.

The names below are stable; everything else may move between releases.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

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
except importlib.metadata.PackageNotFoundError:  # run from a source tree on a bare machine
    __version__ = "0+unknown"

__all__ = [
    "PRESETS",
    "Answer",
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
    "export_hf",
    "generate",
    "load",
    "masked_diffusion_loss",
    "merge_adapter",
    "save",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: these functions need Orbax and safetensors, which a machine that only computes may lack.
    if name in ("load", "save", "export_hf", "save_adapter", "merge_adapter"):
        from dream_jax import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
