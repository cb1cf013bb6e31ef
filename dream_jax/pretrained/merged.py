"""A base with its adapter added, read layer by layer: neither of the two models is ever whole in memory.

Knows what an adapter adds to a kernel. Knows nothing of where the sum is written.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from dream_jax import checkpoint, hf, lora
from dream_jax.config import DreamConfig
from dream_jax.pretrained.adapter import Adapter, adapter_params
from dream_jax.pretrained.quantised import unit_reader
from dream_jax.shapes import ParamTree

Named = dict[tuple[str, int | None], np.ndarray]
"""Parameters by dotted path and layer."""


class MergedUnits:
    """Reads the parts of a base with an adapter added, each once; made by `merged_units`."""

    def __init__(
        self,
        units: dict[str, checkpoint.WeightUnit],
        read: Callable[[checkpoint.WeightUnit], ParamTree],
        adapter: Adapter,
    ):
        self._units, self._read, self._adapter = units, read, adapter
        self._prints: list[lora.Print] = []
        stacked = hf.flat(adapter_params(adapter, None))
        self._added = {name: np.asarray(leaf, np.float32) for name, leaf in stacked.items()}

    def __call__(self, unit: checkpoint.WeightUnit) -> Named:
        """One part in the dtype of its shapes. The sum is formed in float32 and rounded once."""
        exact = self._read(self._units[unit.name])
        self._prints += lora.prints(exact, unit.layer)
        params = {name: np.asarray(leaf) for name, leaf in hf.flat(exact).items()}
        wanted = hf.flat(unit.shapes)
        found: Named = {}
        for name, leaf in params.items():
            if unit.layer is not None and name.removesuffix("kernel") + "lora_a" in self._added:
                leaf = leaf + self._correction(name.removesuffix("kernel"), unit.layer).reshape(leaf.shape)
            found[name, unit.layer] = leaf.astype(wanted[name].dtype)
        return found

    def _correction(self, name: str, layer: int) -> np.ndarray:
        config = self._adapter.config
        a_Ir = self._added[name + "lora_a"][layer].reshape(-1, config.rank)
        b_rO = self._added[name + "lora_b"][layer].reshape(config.rank, -1)
        return np.float32(config.alpha / config.rank) * (a_Ir @ b_rO)

    def check(self) -> None:
        """When all parts have been read: raises ValueError for a base that the adapter was not trained on."""
        self._adapter.check_identity(
            lora.digest(self._prints),
            "give the weights that it was trained on, or pass any_base=True (--any-base) if you mean these",
        )


@contextlib.contextmanager
def merged_units(directory: pathlib.Path, config: DreamConfig, adapter: Adapter) -> Iterator[MergedUnits]:
    """The parts of the base in a directory of either kind, with the adapter added.

    Raises:
      As `unit_reader`, for a directory that does not hold what its config.json says.
    """
    # In float32 whatever the base is stored in, so that the sum is rounded once.
    units = {unit.name: unit for unit in checkpoint.units(config, "float32")}
    with unit_reader(directory, config, None) as read:
        yield MergedUnits(units, read, adapter)
