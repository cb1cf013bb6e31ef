"""All settings of a training run in one object, with the checks and warnings that concern more than one group."""

from __future__ import annotations

import dataclasses
import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dream_jax.data import ReadOptions, RowSource, TokenCache, TokenizedRows, find_cache, open_mixture
from dream_jax.optimizer import OptimizerConfig
from dream_jax.posttraining import (
    Objective,
    PreferenceSettings,
    Reference,
    RewardSettings,
    check_groups,
    make_objective,
)
from dream_jax.quantisation import KINDS
from dream_jax.tokenizer import Tokenizer
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
    """The settings of a run that trains a Dream model, from a checkpoint or from random weights.

    `TrainSettings.flat(**values)` makes settings from values by the names of their flags, `replaced` returns a copy in
    which some values are changed, and `values` and `plain` return all values by name.

    Raises:
      ValueError: a value of the optimizer is out of range, the layout of the batches does not suit the length policy,
        `products` has no effect because `base` is int8 or nf4, block diffusion is combined with `mask` or `anneal_steps`,
        or has more sizes than there are steps, or a setting belongs to another objective.
    """

    run: RunSettings = dataclasses.field(default_factory=RunSettings)
    network: NetworkSettings = dataclasses.field(default_factory=NetworkSettings)
    rows: RowSettings = dataclasses.field(default_factory=RowSettings)
    batches: BatchSettings = dataclasses.field(default_factory=BatchSettings)
    lora: AdapterSettings = dataclasses.field(default_factory=AdapterSettings)
    optimization: OptimizationSettings = dataclasses.field(default_factory=OptimizationSettings)
    loss: LossSettings = dataclasses.field(default_factory=LossSettings)
    preferences: PreferenceSettings = dataclasses.field(default_factory=PreferenceSettings)
    rewards: RewardSettings = dataclasses.field(default_factory=RewardSettings)
    evaluation: HeldOutSettings = dataclasses.field(default_factory=HeldOutSettings)
    logs: LogSettings = dataclasses.field(default_factory=LogSettings)
    price: PriceSettings = dataclasses.field(default_factory=PriceSettings)
    devices: DeviceSettings = dataclasses.field(default_factory=DeviceSettings)

    def __post_init__(self) -> None:
        self.optimizer_config()
        check_groups(self.run.objective, self.preferences, self.rewards)
        self._check_objective()
        self.batches.options().check_policy(self.rows.length_policy)
        products, base = self.network.products, self.lora.base
        if products != "compute" and base in KINDS:
            raise ValueError(
                f"--products {products} has no effect on a base in {base}, whose codes are multiplied in the dtype of the "
                "computation: leave it out, or give --base bfloat16"
            )

        if self.loss.block_diffusion is not None:
            given = [f"--mask {self.network.mask}"] if self.network.mask is not None else []
            given += [f"--anneal-steps {self.network.anneal_steps}"] if self.network.anneal_steps else []
            if given:
                raise ValueError(
                    f"--block-diffusion {self.loss.block_diffusion} brings a mask of its own: leave out "
                    f"{' and '.join(given)}"
                )
            if len(self.loss.block_sizes) > self.run.steps:
                raise ValueError(
                    f"--block-diffusion {self.loss.block_diffusion} has more sizes than there are steps: give a larger "
                    f"--steps than {self.run.steps}, or fewer sizes"
                )

    @classmethod
    def flat(cls, **values: Any) -> TrainSettings:
        """Makes settings from values by the names of flags, such as `TrainSettings.flat(model="nano", steps=100)`.

        Raises:
          TypeError: a name that is not a setting.
          ValueError: a value that is outside its range, or that contradicts another setting.
        """
        return cls().replaced(**values)

    def replaced(self, **values: Any) -> TrainSettings:
        """Returns a copy with these values, by the names of their flags. Raises as `flat`."""
        unknown = sorted(values.keys() - SETTING_TYPES.keys())
        if unknown:
            raise TypeError(f"unknown settings: {', '.join(unknown)}; `train.py --help` lists those that exist")
        changed = {}
        for group, names in _GROUPS.items():
            given = {name: values[name] for name in names if name in values}
            if given:
                changed[group] = dataclasses.replace(getattr(self, group), **given)
        return dataclasses.replace(self, **changed)

    def values(self) -> dict[str, Any]:
        """Returns every setting by the name of its flag."""
        return {name: getattr(getattr(self, group), name) for group, names in _GROUPS.items() for name in names}

    def plain(self) -> dict[str, Any]:
        """Returns `values` as `settings.json` stores them: paths as strings, tuples as lists, and the weight in force."""
        return {
            name: str(value) if isinstance(value, pathlib.Path) else list(value) if isinstance(value, tuple) else value
            for name, value in self.values().items()
        } | {"weight": self.loss.weight_in_force}

    def default_rate(self) -> float:
        """Returns the peak learning rate that is used if --learning-rate is not given.

        The rate of an adapter is ten times the rate of full fine-tuning, a ratio that Schulman et al. (LoRA Without
        Regret, 2025) measured over several models and ranks. Multiplied by alpha / rank (2 by default) it is 1e-4; for
        comparison, the QLoRA paper's rate of 2e-4 multiplied by its alpha / rank of 1/4 is 5e-5. For preferences the rates
        are a tenth of these: LLaDA 1.5 has 5e-7 for all weights.
        """
        factor = self.objective().rate_factor
        if self.network.starts_at_random:
            return factor * 2e-3
        return factor * (5e-5 if self.lora.adapts else 5e-6)

    def optimizer_config(self) -> OptimizerConfig:
        """Returns the configuration of the optimizer, with the default learning rate if none is given."""
        chosen = self.optimization
        return OptimizerConfig(
            learning_rate=self.default_rate() if chosen.learning_rate is None else chosen.learning_rate,
            total_steps=self.run.steps * self.objective().updates_per_step,
            warmup_share=chosen.warmup_share,
            kind=chosen.optimizer,
            moments=chosen.moments,
            moments_on_host=chosen.moments_on_host,
            b1=chosen.b1,
            b2=chosen.b2,
            weight_decay=chosen.weight_decay,
            clip_norm=chosen.clip_norm or None,
        )

    def objective(self) -> Objective:
        """Returns the objective of the run. Raises ValueError if its settings do not fit together."""
        preferences = self.preferences
        if preferences.reference == "auto" and self.run.objective == "vrpo":
            taken: Reference = "stored" if self.lora.lora_rank is None else "adapter"
            preferences = dataclasses.replace(preferences, reference=taken)
        return make_objective(self.run.objective, preferences, self.rewards)

    def _check_objective(self) -> None:
        """Raises ValueError if the objective does not fit together with other groups of settings."""
        name = self.run.objective
        self.objective().check_options(self.batches.options(), self.rows.encode_options())
        if self.preferences.reference == "adapter" and self.lora.lora_rank is None:
            why = (
                f"with --adapter {self.lora.adapter} switched off, the reference would be the model without it"
                if self.lora.adapts
                else "without an adapter there is nothing to switch off"
            )
            raise ValueError(
                f"--reference adapter: {why}; give --reference stored, or train a new adapter (--lora-rank)"
            )
        if name == "sft":
            return
        if self.loss != LossSettings():
            flags = ", ".join(
                f"--{one.name.replace('_', '-')}"
                for one in dataclasses.fields(self.loss)
                if getattr(self.loss, one.name) != one.default
            )
            raise ValueError(f"{flags} has no effect with --objective {name}, whose loss is another one: leave it out")
        if self.network.anneal_steps:
            raise ValueError(f"--anneal-steps is for --objective sft, not for {name}: leave it out")
        if self.run.final == "best":
            raise ValueError(
                f"--final best takes the weights with the lowest held-out nll, which --objective {name} does not lower: "
                "leave it out"
            )

    def source(self, split: str) -> RowSource:
        """Returns the rows of --data and --mix for the split "train" or "test".

        Raises:
          ValueError: a data set or its weight is not valid.
          FileNotFoundError: a file is missing.
          ConnectionError: a hub data set is neither cached nor reachable.
        """
        return open_mixture(*self._data_of(split))

    def token_cache(self, tokenizer: Tokenizer, say: Callable[[str], None] = lambda text: None) -> TokenCache:
        """Returns what opens the data of the run with this tokenizer; `say` prints a line about tokens on the disk."""
        # Other objectives learn from more than one answer, or score answers by values beside the text.
        choice = find_cache(self.rows.data_cache if self.run.objective == "sft" else "off")
        return TokenCache(choice, tokenizer, self.rows.encode_options(), say)

    def tokens(self, split: str, cache: TokenCache) -> TokenizedRows:
        """Returns the rows of `source` as tokens, from the disk if they are kept there. Raises as `source`; OSError."""
        return cache.open(*self._data_of(split))

    def _data_of(self, split: str) -> tuple[Sequence[str], Sequence[float] | None, str, int, ReadOptions]:
        rows = self.rows
        return (rows.data, *rows.mix), rows.mix_weights or None, split, self.run.seed, rows.read_options()

    def warnings(self) -> list[str]:
        """Returns warnings about settings that are allowed but probably a mistake; the list may be empty."""
        network, chosen, found = self.network, self.optimization, []
        if self.loss.weight == "inverse-time" and not self.loss.block_sizes:
            found.append(
                "--weight inverse-time gives each masked position the weight 1/t, so the positions of rows with few masked "
                "tokens count most; with one row per batch it acts like 1/t^2, as the loss is divided by the masked count"
            )
        rate = self.optimizer_config().learning_rate
        if self.lora.adapts:
            found += self._adapter_warnings(rate)
        elif not network.starts_at_random and rate > 1e-4 and self.run.recipe != "smol-to-dream":  # a small model
            found.append(f"learning rate {rate:g} is far above the 2e-6 to 5e-6 of the published recipe")
        if self.batches.pack and self.rows.max_length is None:
            found.append(
                "--pack without --max-length makes rows as long as the longest text, which few others fit beside: give "
                "--max-length, for example --max-length 2048"
            )
        if network.anneal_steps > self.run.steps:
            found.append(
                f"--anneal-steps {network.anneal_steps} is larger than --steps {self.run.steps}: the model is never "
                "trained with fully bidirectional attention"
            )
        if chosen.optimizer == "adafactor":
            found.append(
                "--optimizer adafactor is reported to be unstable for masked diffusion: watch the loss and the gradient "
                "norm, or use --optimizer adamw --moments int8, which needs 2.25 bytes per weight"
            )
        if chosen.moments_on_host:
            found.append(
                "--moments-on-host copies every moment to the devices and back in each step; a larger --batch-size "
                "makes this a smaller share of the time, and --moments bfloat16 halves the bytes"
            )
        if network.starts_at_random and network.model != "nano":
            found.append(
                f"preset {network.model!r} starts from random weights; give a directory to start from a checkpoint"
            )
        return found

    def _adapter_warnings(self, rate: float) -> list[str]:
        """Returns the warnings about an adapter that is trained with the peak learning rate `rate`."""
        network, found = self.network, []
        if network.starts_at_random:
            found.append(
                f"preset {network.model!r} has random weights, and an adapter alone cannot train them: leave out "
                "--lora-rank, or start from a checkpoint"
            )
        elif rate > 1e-3:
            found.append(f"learning rate {rate:g} is far above the 5e-5 to 2e-4 that adapters are usually trained with")
        if self.lora.lora_rank is not None:
            adapter = self.lora.new_adapter()
            if adapter.alpha / adapter.rank > 8:
                found.append(
                    f"alpha / rank is {adapter.alpha / adapter.rank:g}: the effective learning rate of the adapter is "
                    "--learning-rate times this number; usual values are 1 to 2"
                )
        if self.lora.base == "float32" and network.compute_dtype == "bfloat16":
            found.append(
                "--base float32 takes twice the memory of --base bfloat16 without a gain, because every layer rounds "
                "the weights to bfloat16 before it uses them"
            )
        if self.optimization.moments_on_host or self.optimization.moments != "float32":
            found.append(
                "the optimizer state of an adapter is small, so --moments and --moments-on-host save almost no memory"
            )
        return found


_TYPES = typing.get_type_hints(TrainSettings)
# For each group (a field of TrainSettings) the names of its settings.
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
        *("accumulation", "remat", "layers", "attention"),
        *("eval_every", "eval_rows", "eval_tokens", "samples", "sample_tokens", "rollout_rows", "rollout_samples"),
        *("log_every", "log_to", "price_per_chip_hour", "currency", "rmb_per_usd"),
        "data_cache",
        *("mesh", "cluster", "coordinator", "num_processes", "process_id"),
    }
)
"""Names of the settings that may have other values when a run is resumed: they change the training only by rounding."""
