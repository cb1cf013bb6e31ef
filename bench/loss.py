"""Compares memory and time of the masked cross entropy with those of a loss that stores all logits.

    python bench/loss.py [--tokens 2048] [--width 512] [--vocab 152064] [--mesh 4x2] [--out FILE]

Both compute the loss and its gradients for hidden states [B, T, D] and an output projection [D, V] in float32. "all logits"
is the straightforward program: logits [B, T, V], their log-sum-exp, and weights that are zero at positions without a mask.
Temporary memory per device is that of the compiler's `memory_analysis`; times are medians of alternating calls; gradients
are compared by largest difference / largest value. Needs the extra `bench`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import report
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from dream_jax import objective, sharding

Arrays = tuple[jax.Array, ...]
MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossBenchSettings:
    """Sizes of the arrays that the comparison uses."""

    batch: int = 1
    """rows of the batch"""
    tokens: int = 2048
    """tokens of a row"""
    width: int = 512
    """D, width of the hidden states"""
    vocab: int = 152_064
    """V, size of the vocabulary"""
    masked: float = 0.5
    """share of positions that are masked"""
    mesh: str = "1x1"
    """mesh of the devices, as for train.py --mesh"""
    repeats: int = 5
    """number of timed calls of each; 0 measures memory only"""
    out: pathlib.Path = report.RESULTS / "loss.json"
    """result file; its results for other meshes are not changed"""


def ours(hidden_BTD: jax.Array, kernel_DV: jax.Array, *rest: jax.Array) -> jax.Array:
    """Returns the loss of training, computed from the hidden states."""
    groups = sharding.token_shards(*hidden_BTD.shape[:2])
    return objective._masked_cross_entropy(None, groups, groups[1] > 1, hidden_BTD, kernel_DV, *rest)[0]


def all_logits(
    hidden_BTD: jax.Array, kernel_DV: jax.Array, tokens_BT: jax.Array, masked_BT: jax.Array, weight_BT: jax.Array
) -> jax.Array:
    """Returns the same loss, computed from the logits of all positions."""
    shifted_BTD = jnp.concatenate([hidden_BTD[:, :1], hidden_BTD[:, :-1]], axis=1)
    logits_BTV = sharding.constrain(jnp.einsum("BTD,DV->BTV", shifted_BTD, kernel_DV), "batch", "tokens", "vocab")
    target_BT = jnp.take_along_axis(logits_BTV, tokens_BT[..., None], axis=-1)[..., 0]
    nll_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT
    return jnp.sum(jnp.where(masked_BT, weight_BT * nll_BT, 0.0))


def arguments(settings: LossBenchSettings, mesh: jax.sharding.Mesh) -> Arrays:
    """Returns random hidden states, projection, tokens, masked positions and weights, with the shardings of training."""
    rng = np.random.default_rng(0)
    shape = (settings.batch, settings.tokens)
    batch = NamedSharding(mesh, sharding.partition_spec(("batch", "tokens"), shape, dict(mesh.shape)))
    kernel_shape = (settings.width, settings.vocab)
    kernel = NamedSharding(mesh, sharding.partition_spec(("embed", "vocab"), kernel_shape, dict(mesh.shape)))
    masked = rng.random(shape) < settings.masked
    arrays = (
        (rng.normal(size=(*shape, settings.width)).astype(np.float32), batch),
        (rng.normal(size=kernel_shape, scale=0.02).astype(np.float32), kernel),
        (rng.integers(0, settings.vocab, shape).astype(np.int32), batch),
        (masked, batch),
        (np.where(masked, rng.random(shape), 0.0).astype(np.float32), batch),
    )
    return tuple(jax.device_put(array, array_sharding) for array, array_sharding in arrays)


def compiled(function: Callable[..., jax.Array], arrays: Arrays, mesh: jax.sharding.Mesh) -> Any:
    """Returns the compiled loss with both gradients; each gradient has the sharding of its argument."""
    shardings = (arrays[0].sharding, arrays[1].sharding)
    replicated = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(jax.value_and_grad(function, argnums=(0, 1)), out_shardings=(replicated, shardings))
    return program.lower(*arrays).compile()


def measure(settings: LossBenchSettings) -> dict[str, Any]:
    """Returns temporary memory (MiB) and times (seconds) of both, and the differences of their results."""
    mesh = sharding.make_mesh(settings.mesh)
    with jax.set_mesh(mesh):
        arrays = arguments(settings, mesh)
        programs = {"ours": compiled(ours, arrays, mesh), "all logits": compiled(all_logits, arrays, mesh)}
        memory = {name: one.memory_analysis().temp_size_in_bytes / MIB for name, one in programs.items()}
        found: dict[str, Any] = {
            "temporaries_mib": memory,
            "share_of_all_logits": memory["ours"] / memory["all logits"],
        }
        if not settings.repeats:
            return found
        results = {name: jax.device_get(one(*arrays)) for name, one in programs.items()}
        difference = jax.tree.map(
            lambda one, other: float(np.max(np.abs(one - other)) / np.max(np.abs(other))),
            results["ours"],
            results["all logits"],
        )
        found["relative_difference"] = dict(
            zip(("loss", "hidden gradient", "kernel gradient"), jax.tree.leaves(difference), strict=True)
        )
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(settings.repeats):
            for name, one in programs.items():
                begun = time.perf_counter()
                jax.block_until_ready(one(*arrays))
                seconds[name].append(time.perf_counter() - begun)
        found["seconds"] = {name: report.summarize(times) for name, times in seconds.items()}
        found["times_as_fast"] = statistics.median(seconds["all logits"]) / statistics.median(seconds["ours"])
    return found


def main(settings: LossBenchSettings) -> None:
    """Measures, prints, and adds the result to the file."""
    sharding.make_mesh(settings.mesh)  # must run before the backend starts, so that a CPU provides the devices
    other_work = report.OtherWork()
    found = measure(settings)
    result = {
        "date": report.now(),
        "hardware": {**report.hardware(), "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"},
        "versions": report.versions(["jax", "jaxlib", "numpy"]),
        "settings": {name: value for name, value in dataclasses.asdict(settings).items() if name != "out"},
        **found,
        "other_work": other_work.share(),
    }
    for name, value in found.items():
        print(f"{name}: {value}")
    report.add_json(settings.out, settings.mesh, result)


if __name__ == "__main__":
    main(tyro.cli(LossBenchSettings, description=__doc__))
