"""Training on preferences: VRPO, which compares with a reference, and SimPO, which does not.

B is the likelihood bound of an answer in nats (`answer_bounds`), w the chosen answer of a pair, and l the rejected one.

- VRPO (LLaDA 1.5, arXiv 2505.19223): the loss is -log sigmoid(beta ((B(w) - B_ref(w)) - (B(l) - B_ref(l)))).
- SimPO (arXiv 2405.14734): the loss is -log sigmoid(beta (B(w) / |w| - B(l) / |l|) - target margin), where |w| is the
  number of tokens of w with its end token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dream_jax import float8, layer_forms, sharding
from dream_jax.batch import Batch, PairBatch
from dream_jax.data import (
    Batches,
    BatchOptions,
    EncodeOptions,
    PairRows,
    RowSource,
    TokenizedRows,
    check_pairs,
    make_pair_batches,
)
from dream_jax.model import Dream, merge_params
from dream_jax.objective import sums_by_time
from dream_jax.posttraining.answer_bounds import answer_bounds, draw_masks, flat_rows, pair_key, repeated_rows
from dream_jax.posttraining.base import BatchSizes, Driver, Objective, RunMaterials, StepMaterials
from dream_jax.posttraining.pair_driver import PairDriver, PairScorer, Which, pair_arrays
from dream_jax.posttraining.pair_metrics import METRICS, pair_margins, pair_sums
from dream_jax.posttraining.preference_settings import PreferenceSettings
from dream_jax.shapes import ParamTree, joined
from dream_jax.tokenizer import Tokenizer
from dream_jax.train_step import (
    NLL_BY_TIME,
    AnyStep,
    CompiledStep,
    Metrics,
    TrainState,
    dropout_keys,
    summed_gradients,
    updated_state,
)


def without_adapter(params: ParamTree) -> ParamTree:
    """Returns the parameters with every `lora_b` set to 0, which switches the adapter off exactly."""
    return {
        name: without_adapter(value)
        if isinstance(value, dict)
        else jax.tree.map(jnp.zeros_like, value)
        if name == "lora_b"
        else value
        for name, value in params.items()
    }


@dataclasses.dataclass(frozen=True)
class Preference(Objective):
    """The chosen answer of each pair becomes more likely than the rejected one.

    Attributes:
      kind: "vrpo" or "simpo".
      settings: the settings, whose `reference` is not "auto" for vrpo.
    """

    kind: Literal["vrpo", "simpo"]
    settings: PreferenceSettings

    metrics: ClassVar[tuple[str, ...]] = METRICS
    evaluated: ClassVar[tuple[str, ...]] = (*(f"pair_{name}" for name in METRICS), "pairs")
    rate_factor: ClassVar[float] = 0.1

    def __post_init__(self) -> None:
        if self.kind == "vrpo" and self.settings.target_margin is not None:
            raise ValueError(
                f"target_margin={self.settings.target_margin} is for --objective simpo and has no effect with vrpo: leave "
                "--target-margin out"
            )
        if self.kind == "simpo" and self.settings.reference != "auto":
            raise ValueError("--objective simpo has no reference: leave --reference out")

    @property
    def name(self) -> str:  # type: ignore[override]  # two objectives share this class
        """The value of --objective."""
        return self.kind

    @property
    def beta(self) -> float:
        """The factor on the margin in the loss."""
        return self.settings.beta or {"vrpo": 0.2, "simpo": 2.0}[self.kind]

    @property
    def target_margin(self) -> float:
        """The number that is subtracted from the margin times beta; 0 for vrpo."""
        if self.kind == "vrpo":
            return 0.0
        return 1.0 if self.settings.target_margin is None else self.settings.target_margin

    @property
    def switches_off(self) -> bool:
        """Whether the step computes the reference, with the adapter switched off."""
        return self.kind == "vrpo" and self.settings.reference == "adapter"

    @property
    def stores(self) -> bool:
        """Whether the bounds of the reference are computed before the first step."""
        return self.kind == "vrpo" and not self.switches_off

    @property
    def computed_rows(self) -> int:
        """Two answers, each with every draw."""
        return 2 * self.settings.pair_draws

    @property
    def forward_rows(self) -> int:
        """The same rows once more for the reference, if the step computes it."""
        return self.computed_rows if self.switches_off else 0

    def check_options(self, options: BatchOptions, encoding: EncodeOptions) -> None:
        """Raises ValueError for options of batches that have no meaning for pairs."""
        given = {
            "--pack": options.pack,
            "--cut-responses": options.cut_responses,
            "--tail-cut": options.tail_cut,
            "--width-step": options.width_step,
            "--learned-turns all": encoding.learned_turns == "all",
            f"--length-policy {encoding.length_policy}": encoding.length_policy in ("right", "split"),
        }
        for flag, value in given.items():
            if value:
                raise ValueError(
                    f"{flag} has no meaning for pairs of answers (--objective {self.kind}), whose likelihoods are "
                    "compared as a whole: leave it out"
                )

    def check_rows(self, source: RowSource) -> None:
        """Raises ValueError, with file and line, for a row without a rejected answer."""
        check_pairs(source, self.kind)

    def tokenize(self, source: RowSource, tokenizer: Tokenizer, options: EncodeOptions) -> TokenizedRows:
        """Returns the pairs as tokens."""
        return PairRows(source, tokenizer, options)

    def batches(self, rows: TokenizedRows, sizes: BatchSizes) -> Batches:
        """Returns the batches of pairs."""
        assert isinstance(rows, PairRows), "tokenize makes them"
        return make_pair_batches(
            rows,
            batch_size=sizes.batch_size,
            max_length=sizes.max_length,
            seed=sizes.seed,
            process_index=sizes.process_index,
            process_count=sizes.process_count,
            options=sizes.options,
            draws_of_pairs=self.stores,
        )

    def batch_shapes(self, batch: Batch[jax.ShapeDtypeStruct]) -> Batch[jax.ShapeDtypeStruct]:
        """Returns the shapes of a batch with two rows for each row of `batch`."""

        def twice(leaf: jax.ShapeDtypeStruct, dtype: Any = None) -> jax.ShapeDtypeStruct:
            shape = (2 * leaf.shape[0], *leaf.shape[1:])
            return jax.ShapeDtypeStruct(shape, dtype or leaf.dtype, sharding=leaf.sharding)

        return PairBatch(
            tokens_BT=twice(batch.tokens_BT),
            maskable_BT=twice(batch.maskable_BT),
            row_B=twice(batch.row_B),
            valid_BT=twice(batch.maskable_BT),
            draw_B=twice(batch.row_B),
            reference_B=twice(batch.row_B, jnp.float32) if self.stores else None,
        )

    def step(self, materials: StepMaterials) -> AnyStep:
        """Returns the step, which is compiled at its first call."""
        config, shards = materials.config, dict(materials.mesh.shape)["fsdp"]
        pairs = config.global_batch // config.accumulation
        if pairs % shards:
            raise ValueError(
                f"{config.global_batch} pairs in {config.accumulation} microbatches are {pairs} pairs each, which "
                f"fsdp={shards} does not divide; change the batch size, the accumulation or the mesh"
            )
        return CompiledStep(functools.partial(_pair_step, self, materials), materials.mesh, config.products)

    def driver(self, step: AnyStep, run: RunMaterials) -> Driver:
        """Returns the driver, which knows the bounds of the reference and scores held-out pairs."""
        scorer = PairScorer(
            kind=self.kind,
            draws=self.settings.pair_draws,
            stores=self.stores,
            bounds=functools.partial(self.bounds, run.materials),
            without_adapter=without_adapter if self.switches_off else None,
            about={"pair_draws": self.settings.pair_draws, "shared_draws": self.settings.shared_draws},
        )
        return PairDriver(step, run, scorer)

    def line(self, row: Mapping[str, float]) -> str:
        """Returns margin and accuracy of the order."""
        return f"margin {row['margin']:.3f}  order acc {row['order_accuracy']:.3f}"

    # ------------------------------------------------------------------------------------------------------- bounds

    def bounds(
        self,
        materials: StepMaterials,
        params: ParamTree,
        arrays: Mapping[str, jax.Array],
        draws: int,
        which: Which,
        key: jax.Array,
        dropout: jax.Array | None = None,
    ) -> tuple[Float[jax.Array, "P A"], dict[str, jax.Array]]:
        """Estimates the bounds of both answers of pairs under one model.

        Args:
          materials: the model and its settings.
          params: all parameters.
          arrays: `tokens`, `maskable` and `valid`, each [P, 2, T], and `draw` [P, 2].
          draws: number of noise levels.
          which: which noise is taken, if it differs between policy and reference.
          key: the key of the noise.
          dropout: keys [P 2 n] for the dropout of the adapter; None for no dropout.

        Returns:
          The mean bounds over the draws, float32 [P, 2], and arrays for metrics: `t`, `masked`, `nll` and `correct`.
        """
        config = materials.config
        model: Dream = merge_params(materials.graphdef, params)
        model = layer_forms.apart(model) if config.layers == "apart" else model
        t_PAn, masked_PAnT = draw_masks(
            key,
            arrays["draw"][:, 0],
            arrays["maskable"],
            draws,
            self.settings.shared_draws,
            of_reference=which == "reference",
        )
        valid_RT, maskable_RT = (repeated_rows(arrays[name], draws) for name in ("valid", "maskable"))
        mask = config.mask.for_rows(valid_RT, maskable_RT)
        # Stored bounds of the reference must have the products of the step, or the first margins would not be 0.
        with float8.products(config.products):
            bound_PAn, nll_RT, correct_RT = answer_bounds(
                model, arrays["tokens"], arrays["maskable"], masked_PAnT, arrays["valid"], mask, dropout
            )
        about = {"t": flat_rows(t_PAn), "masked": flat_rows(masked_PAnT), "nll": nll_RT, "correct": correct_RT}
        return jnp.mean(bound_PAn, axis=-1), about


def _pair_step(
    objective: Preference,
    materials: StepMaterials,
    state: TrainState,
    batch: Batch[jax.Array],
    frozen: ParamTree,
) -> tuple[TrainState, Metrics]:
    """Computes one step on a batch of pairs."""
    assert isinstance(batch, PairBatch)
    config, settings = materials.config, objective.settings
    pairs = config.global_batch
    key = pair_key(config.seed)

    def loss(params: ParamTree, arrays: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        size_PA = jnp.sum(arrays["maskable"], axis=-1, dtype=jnp.float32)
        row_R = repeated_rows(arrays["row"], settings.pair_draws) * settings.pair_draws
        row_R = row_R + jnp.arange(row_R.shape[0], dtype=row_R.dtype) % settings.pair_draws
        bound_PA, about = objective.bounds(
            materials,
            joined(frozen, params),
            arrays,
            settings.pair_draws,
            "policy",
            key,
            dropout_keys(config.seed, state.step, row_R),
        )
        reference_PA = arrays.get("reference")
        if objective.switches_off:
            with jax.named_scope("reference"):
                off = jax.lax.stop_gradient(joined(frozen, without_adapter(params)))
                reference_PA, _ = objective.bounds(materials, off, arrays, settings.pair_draws, "reference", key)
                reference_PA = jax.lax.stop_gradient(reference_PA)
        margin_P = pair_margins(objective.kind, bound_PA, reference_PA, size_PA)
        # The denominator is the number of pairs of the global batch, so that the losses of microbatches can be added.
        value = jnp.sum(-jax.nn.log_sigmoid(objective.beta * margin_P - objective.target_margin)) / pairs
        if settings.sft_weight:
            value = value + settings.sft_weight * jnp.sum(-bound_PA[:, 0] / size_PA[:, 0]) / pairs
        return value, {"loss": value, **_sums(materials.model, arrays, margin_P, bound_PA, reference_PA, about)}

    def gradient(params: ParamTree, arrays: dict[str, jax.Array]) -> tuple[ParamTree, Metrics]:
        with float8.products(config.products):
            return jax.grad(loss, has_aux=True)(params, arrays)

    arrays = {name: sharding.constrain(x, "batch", *[None] * (x.ndim - 1)) for name, x in pair_arrays(batch).items()}
    gradients, sums = summed_gradients(gradient, state.params, arrays, config.accumulation)
    after, updated = updated_state(
        gradients, sums["loss"], state, materials.optimizer, materials.schedule, materials.mesh
    )
    return after, {"loss": sums["loss"], **_metrics(sums, pairs), **updated}


def _sums(
    model: Dream,
    arrays: Mapping[str, jax.Array],
    margin_P: jax.Array,
    bound_PA: jax.Array,
    reference_PA: jax.Array | None,
    about: Mapping[str, jax.Array],
) -> Metrics:
    """Returns the sums over a microbatch from which `_metrics` computes the metrics of a step."""
    draws = about["masked"].shape[0] // bound_PA.size
    nll_by_time, masked_by_time = sums_by_time(about["nll"], about["masked"], about["t"])
    ends_RT = about["masked"] & (repeated_rows(arrays["tokens"], draws) == model.config.pad_token_id)
    found = {
        **pair_sums(margin_P, bound_PA, reference_PA),
        "nll": jnp.sum(about["nll"]),
        "correct": jnp.sum(about["correct"], dtype=jnp.float32),
        "masked": jnp.sum(about["masked"], dtype=jnp.float32),
        "nll_by_time": nll_by_time,
        "masked_by_time": masked_by_time,
        "ends": jnp.sum(ends_RT, dtype=jnp.float32),
        "ends_correct": jnp.sum(ends_RT & about["correct"], dtype=jnp.float32),
    }
    return jax.tree.map(jax.lax.stop_gradient, found)


def _metrics(sums: Metrics, pairs: int) -> Metrics:
    """Returns the metrics of a step, except the loss, from the sums over all its microbatches."""
    masked = jnp.maximum(sums["masked"], 1.0)
    return {
        **{name: sums[name] / pairs for name in METRICS},
        "nll": sums["nll"] / masked,
        "masked_accuracy": sums["correct"] / masked,
        "num_masked": masked,
        "eos_accuracy": sums["ends_correct"] / sums["ends"],
        **dict(zip(NLL_BY_TIME, sums["nll_by_time"] / sums["masked_by_time"], strict=True)),
    }
