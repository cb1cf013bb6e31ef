"""The options of XLA with which the training step is compiled, in one table, each with the reason for it.

They are compiler options of this one program and are not put into XLA_FLAGS: XLA ends the process if XLA_FLAGS has a name
that it does not know, and its names differ between releases. A flag that the user has set in XLA_FLAGS is not changed.

All names are known to the XLA of jax 0.10.2 and of jax 0.11.2. `CHOSEN` has the flags whose benefit was seen in a compiled
program or in a measurement. `CANDIDATES` has flags that are faster according to others and were not measured here;
`bench/accelerator.py` compares some of them, each in a process of its own with `in_environment`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from dream_jax.float8 import Products


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaFlag:
    """One option of XLA.

    Attributes:
      name: the name of the option, without the leading hyphens.
      value: the value, of the type that XLA expects.
      reason: what the option is expected to do, and why it is in its table; a text for people.
    """

    name: str
    value: bool | int | str
    reason: str


CHOSEN: Mapping[Products, tuple[XlaFlag, ...]] = {
    "fp8": (
        XlaFlag(
            name="xla_gpu_enable_triton_gemm",
            value=False,
            reason="XLA runs its pass for Triton kernels before its pass for fp8 products of cuBLASLt, and makes a "
            "bfloat16 product of the matrices that were rounded to fp8. The program that was compiled for an H200 had no "
            "fp8 product with Triton kernels, and only fp8 products without them.",
        ),
    ),
}
"""The flags for a GPU, by the kind of products. Products that are not in the table have no flags."""


CANDIDATES: Mapping[str, tuple[XlaFlag, ...]] = {
    "no-rematerialization": (
        XlaFlag(
            name="xla_disable_hlo_passes",
            value="rematerialization",
            reason="XLA itself recomputes results if it expects too little memory; the policies of train.py --remat make a "
            "better choice.",
        ),
    ),
    "no-triton-products": (
        XlaFlag(
            name="xla_gpu_enable_triton_gemm",
            value=False,
            reason="cuBLAS computes all products; this compiles faster and is seldom slower for large matrices.",
        ),
    ),
    "cublaslt": (
        XlaFlag(
            name="xla_gpu_enable_cublaslt",
            value=True,
            reason="cuBLASLt adds the biases of q, k and v in the kernel of the product.",
        ),
    ),
    "no-command-buffers": (
        XlaFlag(
            name="xla_gpu_enable_command_buffer",
            value="",
            reason="Command buffers save the launches of small kernels; a training step has few of them.",
        ),
    ),
    "latency-hiding": (
        XlaFlag(
            name="xla_gpu_enable_latency_hiding_scheduler",
            value=True,
            reason="Collectives run at the same time as products; this has no effect on one GPU.",
        ),
        XlaFlag(name="xla_gpu_all_gather_combine_threshold_bytes", value=2**30, reason="Joins all-gathers."),
        XlaFlag(name="xla_gpu_all_reduce_combine_threshold_bytes", value=2**30, reason="Joins all-reduces."),
        XlaFlag(name="xla_gpu_reduce_scatter_combine_threshold_bytes", value=2**27, reason="Joins reduce-scatters."),
        XlaFlag(
            name="xla_gpu_enable_pipelined_all_gather",
            value=True,
            reason="The weights of the next layer are gathered while a layer is computed; this needs stacked layers.",
        ),
    ),
}
"""Sets of flags to measure on GPUs, by name."""


def compiler_options(
    platform: str, products: Products, environment: Mapping[str, str] | None = None
) -> dict[str, bool | int | str]:
    """Returns the compiler options of the training step, for `jax.jit`; flags in XLA_FLAGS are left out.

    Args:
      platform: the name of the platform in jax: "cpu", "gpu" or "tpu".
      products: how the layers multiply, see `float8.products`.
      environment: the environment variables; by default those of this process.
    """
    if platform != "gpu":
        return {}
    given = _names((os.environ if environment is None else environment).get("XLA_FLAGS", ""))
    return {flag.name: flag.value for flag in CHOSEN.get(products, ()) if flag.name not in given}


def in_environment(candidate: str, environment: Mapping[str, str]) -> str:
    """Returns XLA_FLAGS for a process that measures one of `CANDIDATES`; what `environment` has set already stays."""
    before = environment.get("XLA_FLAGS", "")
    given = _names(before)
    added = [f"--{flag.name}={flag.value}".lower() for flag in CANDIDATES[candidate] if flag.name not in given]
    return " ".join([before, *added]).strip()


def _names(flags: str) -> set[str]:
    return {word.removeprefix("--").partition("=")[0] for word in flags.split()}
