"""Compiles the functions of the sampler with the options of XLA that the matrix products of the model need."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dream_jax import lora
from dream_jax.model import Dream
from dream_jax.quantisation import COMPILER_OPTIONS, fusing
from dream_jax.target import current_target


class ModelProgram:
    """A function that jax compiles with options of XLA that depend on the model, its first argument.

    Apart from these options, it behaves as the result of `jax.jit(function, **options)`. With them, the function is traced
    inside `quantisation.fusing`.

    Attributes:
      plain: the result of `jax.jit` without options.
      fused: the result of `jax.jit` with `quantisation.COMPILER_OPTIONS`.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        self.plain: Any = jax.jit(function, **options)
        self.fused: Any = jax.jit(function, compiler_options=dict(COMPILER_OPTIONS), **options)
        functools.update_wrapper(self, function)

    def __call__(self, model: Dream, *args: Any, **kwargs: Any) -> Any:
        """Calls the compiled function."""
        if not needs_options(model):
            return self.plain(model, *args, **kwargs)
        with fusing():
            return self.fused(model, *args, **kwargs)

    def lower(self, model: Dream, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Lowers the function without running it, as `jax.jit(...).lower` does; the arguments may be shapes."""
        lowered: jax.stages.Lowered
        if not needs_options(model):
            lowered = self.plain.lower(model, *args, **kwargs)
            return lowered
        with fusing():
            lowered = self.fused.lower(model, *args, **kwargs)
        return lowered

    def clear_cache(self) -> None:
        """Removes all compiled programs from the caches."""
        self.plain.clear_cache()
        self.fused.clear_cache()

    def _cache_size(self) -> int:
        """Returns the number of programs in the caches, as the method of `jax.jit` with this name does."""
        return int(self.plain._cache_size() + self.fused._cache_size())


def needs_options(model: Dream) -> bool:
    """Returns whether a program of this model is compiled with `quantisation.COMPILER_OPTIONS`.

    This is so if the target is a GPU and the base is int8, unless XLA has no such option, or the user has switched it off
    in XLA_FLAGS. Without the option the results are the same up to rounding, but the dequantised kernels are written to
    memory. The options are also left out while jax traces a larger program, because jax accepts them only for a whole
    program.
    """
    return (
        current_target().platform == "gpu"
        and lora.base_of(model) == "int8"
        and not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(model))
        and not any(_is_switched_off(name) for name in COMPILER_OPTIONS)
        and _has_options()
    )


def _is_switched_off(name: str) -> bool:
    """Returns whether the user has switched off an option of XLA in the environment variable XLA_FLAGS."""
    flags = os.environ.get("XLA_FLAGS", "").lower().split()
    return any(f"--{name}={off}" in flags for off in ("false", "0"))


@functools.cache
def _has_options() -> bool:
    """Returns whether this release of XLA has the options, which are experimental and may be gone in a later one."""
    try:
        jax.jit(lambda: jnp.int32(0), compiler_options=dict(COMPILER_OPTIONS)).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
