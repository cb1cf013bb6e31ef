"""What a training run is: all groups of settings together, with the checks and warnings that need several of them."""

from __future__ import annotations

import dataclasses
import pathlib
import typing
from collections.abc import Mapping
from typing import Any

from dream_jax.data import RowSource, open_mixture
from dream_jax.optimizer import OptimizerConfig
from dream_jax.trainer.setting_groups import (
    AdapterSettings,
    BatchSettings,
    DeviceSettings,
    HeldOutSettings,
    LogSettings,
    LossSettings,
    NetworkSettings,
    OptimizationSettings,
    PriceSettings,
    RowSettings,
    RunSettings,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Masked-diffusion fine-tuning, or training from scratch, of a Dream model.

    `flat` makes one from the names of flags, `replaced` changes some of them, and `values` and `plain` give them all back.
    """

    run: RunSettings = dataclasses.field(default_factory=RunSettings)
    network: NetworkSettings = dataclasses.field(default_factory=NetworkSettings)
    rows: RowSettings = dataclasses.field(default_factory=RowSettings)
    batches: BatchSettings = dataclasses.field(default_factory=BatchSettings)
    lora: AdapterSettings = dataclasses.field(default_factory=AdapterSettings)
    optimization: OptimizationSettings = dataclasses.field(default_factory=OptimizationSettings)
    loss: LossSettings = dataclasses.field(default_factory=LossSettings)
    evaluation: HeldOutSettings = dataclasses.field(default_factory=HeldOutSettings)
    logs: LogSettings = dataclasses.field(default_factory=LogSettings)
    price: PriceSettings = dataclasses.field(default_factory=PriceSettings)
    devices: DeviceSettings = dataclasses.field(default_factory=DeviceSettings)

    def __post_init__(self) -> None:
        self.optimizer_config()

    @classmethod
    def flat(cls, **values: Any) -> TrainSettings:
        """Settings from values by the names of their flags, such as `TrainSettings.flat(model="nano", steps=100)`.

        Raises:
          TypeError: a name that is no setting.
          ValueError: a value that cannot be.
        """
        return cls().replaced(**values)

    def replaced(self, **values: Any) -> TrainSettings:
        """A copy with other values, by the names of their flags. Raises as `flat`."""
        unknown = sorted(values.keys() - SETTING_TYPES.keys())
        if unknown:
            raise TypeError(f"{', '.join(unknown)}: no such settings of a run; `train.py --help` lists them")
        changed = {}
        for group, names in _GROUPS.items():
            given = {name: values[name] for name in names if name in values}
            if given:
                changed[group] = dataclasses.replace(getattr(self, group), **given)
        return dataclasses.replace(self, **changed)

    def values(self) -> dict[str, Any]:
        """Every setting by the name of its flag."""
        return {name: getattr(getattr(self, group), name) for group, names in _GROUPS.items() for name in names}

    def plain(self) -> dict[str, Any]:
        """Every setting as JSON can hold it, as in `settings.json`."""
        return {
            name: str(value) if isinstance(value, pathlib.Path) else list(value) if isinstance(value, tuple) else value
            for name, value in self.values().items()
        }

    def default_rate(self) -> float:
        """Peak learning rate where none is given.

        For an adapter ten times that of all weights: the ratio that Schulman et al. (LoRA Without Regret, 2025) measure
        over models and ranks. Times alpha / rank it is 1e-4 by default; the QLoRA paper's 2e-4 at alpha / rank = 1/4
        makes 5e-5.
        """
        if self.network.starts_at_random:
            return 2e-3
        return 5e-5 if self.lora.adapts else 5e-6

    def optimizer_config(self) -> OptimizerConfig:
        """The optimizer that the settings describe."""
        chosen = self.optimization
        return OptimizerConfig(
            learning_rate=self.default_rate() if chosen.learning_rate is None else chosen.learning_rate,
            total_steps=self.run.steps,
            warmup_share=chosen.warmup_share,
            kind=chosen.optimizer,
            moments=chosen.moments,
            moments_on_host=chosen.moments_on_host,
            b1=chosen.b1,
            b2=chosen.b2,
            weight_decay=chosen.weight_decay,
            clip_norm=chosen.clip_norm or None,
        )

    def source(self, split: str) -> RowSource:
        """The rows of a split of all data. Raises as `dream_jax.data.open_mixture`."""
        rows = self.rows
        names = (rows.data, *rows.mix)
        return open_mixture(names, rows.mix_weights or None, split, self.run.seed, rows.read_options())

    def warnings(self) -> list[str]:
        """What a careful colleague would say about these settings."""
        network, chosen, found = self.network, self.optimization, []
        if self.loss.weight == "inverse-time":
            found.append(
                "--weight inverse-time with the masked-count denominator acts like 1/t^2: steps with a small t dominate"
            )
        rate = self.optimizer_config().learning_rate
        if self.lora.adapts:
            found += self._adapter_warnings(rate)
        elif not network.starts_at_random and rate > 1e-4:
            found.append(f"learning rate {rate:g} is far above the 2e-6 to 5e-6 of the published recipe")
        if network.anneal_steps > self.run.steps:
            found.append(
                f"--anneal-steps {network.anneal_steps} is more than all steps: the model never sees all tokens"
            )
        if chosen.optimizer == "adafactor":
            found.append(
                "--optimizer adafactor is reported to be unstable for masked diffusion: watch the loss and the gradient "
                "norm, or take --moments int8, which needs 2.25 bytes a weight more"
            )
        if chosen.moments_on_host:
            found.append(
                "--moments-on-host moves every moment over the bus twice a step; more rows a step make up for it, and "
                "--moments bfloat16 makes them smaller"
            )
        if network.starts_at_random and network.model != "nano":
            found.append(
                f"preset {network.model!r} starts from random weights; name a directory to start from a checkpoint"
            )
        return found

    def _adapter_warnings(self, rate: float) -> list[str]:
        network, found = self.network, []
        if network.starts_at_random:
            found.append(
                f"preset {network.model!r} is random, and an adapter cannot make a model of it: train all weights first"
            )
        elif rate > 1e-3:
            found.append(f"learning rate {rate:g} is far above the 5e-5 to 2e-4 that adapters are usually trained with")
        if self.lora.lora_rank is not None:
            adapter = self.lora.new_adapter()
            if adapter.alpha / adapter.rank > 8:
                found.append(
                    f"alpha / rank is {adapter.alpha / adapter.rank:g}: the adapter moves that much faster than its "
                    "learning rate says; 1 to 2 is usual"
                )
        if self.lora.base == "float32" and network.compute_dtype == "bfloat16":
            found.append("--base float32 takes twice the memory of bfloat16, which every layer rounds it to anyway")
        if self.optimization.moments_on_host or self.optimization.moments != "float32":
            found.append(
                "the optimizer's state of an adapter is small: --moments and --moments-on-host save next to nothing"
            )
        return found


_TYPES = typing.get_type_hints(TrainSettings)
_GROUPS: Mapping[str, tuple[str, ...]] = {
    group: tuple(field.name for field in dataclasses.fields(kind)) for group, kind in _TYPES.items()
}
SETTING_TYPES: Mapping[str, Any] = {
    name: hint for kind in _TYPES.values() for name, hint in typing.get_type_hints(kind).items()
}
"""The type of every setting, by the name of its flag."""

FREE = frozenset(
    {
        *("recipe", "out", "overwrite", "save_every", "keep", "final", "max_skipped", "merge"),
        *("accumulation", "remat", "attention"),
        *("eval_every", "eval_rows", "eval_tokens", "samples", "sample_tokens"),
        *("log_every", "log_to", "price_per_chip_hour", "currency", "rmb_per_usd"),
        *("mesh", "cluster", "coordinator", "num_processes", "process_id"),
    }
)
"""Settings that may change when a run is resumed: they change what is computed by rounding at most."""
