"""dream_jax: Dream-7B, a diffusion language model, in JAX: convert, fine-tune, sample, take it back.

The names below are the stable public face; everything else may move between releases.
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
    UniformWeight,
    masked_diffusion_loss,
)
from dream_jax.sampler import Sample, SamplerConfig, generate

if TYPE_CHECKING:
    from dream_jax.pretrained import export_hf, load, merge_adapter, save, save_adapter

try:
    __version__ = importlib.metadata.version("dream-jax")
except importlib.metadata.PackageNotFoundError:  # run from a source tree on a bare machine
    __version__ = "0+unknown"

__all__ = [
    "PRESETS",
    "CartWeight",
    "Dream",
    "DreamConfig",
    "Focal",
    "InverseTimeWeight",
    "LinearWeight",
    "Sample",
    "SamplerConfig",
    "UniformWeight",
    "export_hf",
    "generate",
    "load",
    "masked_diffusion_loss",
    "merge_adapter",
    "save",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    # On first use: they need Orbax and safetensors, which the compute rooms do without.
    if name in ("load", "save", "export_hf", "save_adapter", "merge_adapter"):
        from dream_jax import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
