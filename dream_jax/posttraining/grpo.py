"""The objective `grpo`: answers are sampled during the run, rewarded, and made more or less probable (GRPO).

A step of the run is one rollout and `updates` updates of the weights on its answers. So every checkpoint lies between two
rollouts, and a resumed run samples the same answers again, bit for bit: their random numbers follow from (seed, step,
answer).

The loss is that of GRPO (Shao et al. 2024, arXiv 2402.03300) with a ratio for each token: the mean over tokens of
-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_weight k, where r is the ratio of the probabilities of a token under
the present weights and under those that sampled it, A the advantage of its answer, and k = exp(d) - d - 1 with d the
difference of the log-probabilities under the reference and the present weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dream_jax import layer_forms, lora, masks, sharding
from dream_jax.batch import Batch
from dream_jax.data import Batches, BatchOptions, EncodeOptions, Mixture, RowSource, TokenizedRows
from dream_jax.inference import answer as answer_prompts
from dream_jax.model import merge_params
from dream_jax.objective import CartWeight
from dream_jax.optimizer import updates_done
from dream_jax.posttraining.advantages import Advantages, advantages, shuffled
from dream_jax.posttraining.base import BatchSizes, Driver, Objective, RunMaterials, StepMaterials
from dream_jax.posttraining.policies import SampledRows, Views
from dream_jax.posttraining.prompts import PromptBatch, PromptBatches
from dream_jax.posttraining.reward_settings import RewardSettings
from dream_jax.posttraining.rewards import RewardError, SampledAnswer
from dream_jax.posttraining.rollout_file import RolloutFile
from dream_jax.posttraining.rollouts import Rollout, sample_rollout, sampled_answers
from dream_jax.posttraining.token_logprobs import TokenDistribution, token_logprobs
from dream_jax.sampler import bucket_length
from dream_jax.shapes import ParamTree, joined
from dream_jax.train_step import NLL_BY_TIME, AnyStep, CompiledStep, Metrics, TrainState, updated_state

LOGPROBS = "token_logprobs"
"""The entry of the metrics of an update with the log-probabilities of the scored tokens, which no table has."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("tokens_BT", "maskable_BT", "row_B", "valid_BT", "length_BM", "text_BM"),
        *("answer_BT", "position_BM", "weight_BM", "advantage_B", "old_BM", "reference_BM"),
        *("limit", "count", "first", "last"),
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewBatch(Batch[Any]):
    """The views of a rollout, divided into Z microbatches: arrays have a first axis [Z], the last four are scalars.

    `maskable_BT` is true where the model sees a mask token, and `row_B` is the index of the answer of each view.

    Attributes:
      answer_BT: bool, true at the positions after the prompt, for masks that depend on it.
      position_BM: int32, the positions of the tokens to score.
      weight_BM: float32, the weight of each of them in the loss; 0 at entries that only fill up the array.
      advantage_B: float32, the advantage of the answer.
      old_BM: float32, the log-probabilities under the weights that sampled the answers; ignored in the first update.
      reference_BM: float32, the log-probabilities under the reference. Both are replicated, as programs return them, so
        that one compiled program makes all updates.
      limit: int32 scalar: token ids at or above it are never written.
      count: int32 scalar, the number of microbatches that have views.
      first: bool scalar, whether this is the first update of the rollout.
      last: int32 scalar, 1 if this is the last update of the rollout, otherwise 0.
    """

    answer_BT: Any
    position_BM: Any
    weight_BM: Any
    advantage_B: Any
    old_BM: Any
    reference_BM: Any
    limit: Any
    count: Any
    first: Any
    last: Any


_SCALARS = ("limit", "count", "first", "last")


class GroupRelative(Objective):
    """The model learns to write answers with higher rewards than other answers of its own to the same prompt."""

    name: ClassVar[str] = "grpo"
    metrics: ClassVar[tuple[str, ...]] = (
        *("reward", "reward_deviation", "signal", "answer_tokens", "ended"),
        *("entropy", "kl", "clipped", "ratio_error", "views", "rollout_share"),
    )
    evaluated: ClassVar[tuple[str, ...]] = ("reward", "reward_se", "answer_tokens")
    has_mfu: ClassVar[bool] = False

    def __init__(self, settings: RewardSettings):
        """Stores the settings; the rewards are made when rows or answers are judged."""
        self.settings = settings

    @property
    def computed_rows(self) -> int:
        """Number of rows that a step computes forward and backward for each prompt, at most."""
        return self.settings.group_size * self.settings.make_policy().most_views(self.settings.most_steps)

    @property
    def microbatches(self) -> int:
        """Number of microbatches for each microbatch of the settings: one for each view of its answers, at most."""
        return self.settings.make_policy().most_views(self.settings.most_steps)

    @property
    def updates_per_step(self) -> int:
        """Number of updates of the optimizer in a step."""
        return self.settings.updates

    def check_options(self, options: BatchOptions, encoding: EncodeOptions) -> None:
        """Raises ValueError if earlier turns of a chat shall be learned, which are only read here."""
        if encoding.learned_turns == "all":
            raise ValueError(
                "--learned-turns all has no effect with --objective grpo, which trains sampled answers to the last turn: "
                "leave it out"
            )

    def check_rows(self, source: RowSource) -> None:
        """Raises ValueError, with file and line, for rows that are documents or that a reward cannot judge."""
        rewards = self.settings.make_rewards()
        for number, row in _rows_to_check(source):
            where = _where(row.meta, number)
            if row.document:
                raise ValueError(f"{where}: the row is a document without a prompt, so there is nothing to answer")
            rewards.check(row, where)

    def batches(self, rows: TokenizedRows, sizes: BatchSizes) -> Batches:
        """Returns the endless iterator over batches of prompts.

        Raises:
          ValueError: as `PromptBatches`; or the options of the layout are for responses, which are sampled here.
        """
        if sizes.options != BatchOptions():
            raise ValueError(
                "--eos-tail, --cut-responses, --tail-cut, --width-step and --pack lay out responses, but with --objective "
                "grpo these are sampled: leave them out"
            )
        return PromptBatches(rows, sizes)

    def batch_shapes(self, batch: Batch[jax.ShapeDtypeStruct]) -> Batch[jax.ShapeDtypeStruct]:
        """Returns the shapes of a batch with a row for each answer, which `UpdateStep.lower` turns into views."""

        def repeated(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = (leaf.shape[0] * self.settings.group_size, *leaf.shape[1:])
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

        return jax.tree.map(repeated, batch)

    def step(self, materials: StepMaterials) -> AnyStep:
        """Returns one update of the weights on the views of a rollout.

        Raises:
          ValueError: the mesh does not divide the answers of a microbatch, or a setting has no meaning here.
        """
        rows = _microbatch_rows(self.settings, materials.config.global_batch, materials.config.accumulation)
        shards = dict(materials.mesh.shape)["fsdp"]
        if rows % shards:
            raise ValueError(
                f"a microbatch has {rows} answers (batch size times group size, divided by the accumulation), which "
                f"fsdp={shards} does not divide; change one of them or the mesh"
            )
        config = materials.config
        if config.anneal_steps or config.products != "compute":
            raise ValueError("--anneal-steps and --products have no meaning with --objective grpo: leave them out")
        weighted = config.weight != CartWeight(0.1) and not config.block_sizes
        if weighted or config.focal is not None or config.complementary:
            raise ValueError(
                "--weight, --cart-p, --focal and --complementary have no effect with --objective grpo: leave them out"
            )
        adapter = lora.config_of(materials.model)
        if adapter is not None and adapter.dropout:
            raise ValueError(
                f"the adapter has dropout {adapter.dropout:g}, but answers are sampled without it: give --lora-dropout 0"
            )
        if isinstance(masks.parse(materials.model.trained_mask), masks.BlockDiffusion) and (
            self.settings.policy != "trajectory"
        ):
            raise ValueError(
                f"--policy {self.settings.policy} masks tokens of all blocks at once, which a model of block diffusion has "
                "not learned; give --policy trajectory"
            )
        return UpdateStep(materials, self.settings)

    def driver(self, step: AnyStep, run: RunMaterials) -> Driver:
        """Returns the driver that samples answers, judges them and calls the step."""
        return RolloutDriver(step, run, self.settings)

    def line(self, row: Mapping[str, float]) -> str:
        """Returns the metrics that the terminal shows beside the loss."""
        return f"reward {row['reward']:.3f}  signal {row['signal']:.2f}  tokens {row['answer_tokens']:.0f}"


def _rows_to_check(source: RowSource) -> list[tuple[int, Any]]:
    """Returns the rows of a source with their indices; of a source of generated rows only the first."""
    if isinstance(source, Mixture):
        return [pair for one in source.parts for pair in _rows_to_check(one)]
    return [(number, source[number]) for number in range(1 if source.uniform_length else len(source))]


def _where(meta: Mapping[str, Any], number: int) -> str:
    return str(meta.get("where", f"row {number + 1}"))


def _microbatch_rows(settings: RewardSettings, batch_size: int, accumulation: int) -> int:
    """Returns the number of views of a microbatch. Raises ValueError if accumulation does not divide the answers."""
    rows = batch_size * settings.group_size
    if rows % accumulation:
        raise ValueError(
            f"{accumulation=} must divide the {rows} answers of a step (batch size {batch_size} times group size "
            f"{settings.group_size})"
        )
    return rows // accumulation


def _view_shapes(
    settings: RewardSettings, mesh: sharding.AnyMesh, batch_size: int, length: int, accumulation: int
) -> ViewBatch:
    """Returns shapes and shardings of the views of a rollout with `length` tokens of prompt and answer."""
    rows = _microbatch_rows(settings, batch_size, accumulation)
    most, scored = _most_microbatches(settings, accumulation), _most_scored(settings)
    rows_sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def shaped(*axes: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((most, rows, *axes), dtype, sharding=rows_sharding)

    def scalar(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), dtype, sharding=sharding.replicated(mesh))

    whole = jax.ShapeDtypeStruct((most, rows, scored), jnp.float32, sharding=sharding.replicated(mesh))
    return ViewBatch(
        tokens_BT=shaped(length, dtype=jnp.int32),
        maskable_BT=shaped(length, dtype=jnp.bool_),
        row_B=shaped(dtype=jnp.int32),
        valid_BT=shaped(length, dtype=jnp.bool_),
        answer_BT=shaped(length, dtype=jnp.bool_),
        position_BM=shaped(scored, dtype=jnp.int32),
        weight_BM=shaped(scored, dtype=jnp.float32),
        advantage_B=shaped(dtype=jnp.float32),
        old_BM=whole,
        reference_BM=whole,
        limit=scalar(jnp.int32),
        count=scalar(jnp.int32),
        first=scalar(jnp.bool_),
        last=scalar(jnp.int32),
    )


def _most_microbatches(settings: RewardSettings, accumulation: int) -> int:
    return accumulation * settings.make_policy().most_views(settings.most_steps)


def _most_scored(settings: RewardSettings) -> int:
    """Returns about how many tokens of a view are scored, for plans; a run counts them in each rollout."""
    views = settings.make_policy().most_views(settings.most_steps)
    tokens = settings.rollout_tokens
    return bucket_length(-(-tokens // views) if settings.policy == "trajectory" else tokens)


# --- One update ---


class UpdateStep(CompiledStep):
    """One update of the weights on the views of a rollout, as one compiled program."""

    def __init__(self, materials: StepMaterials, settings: RewardSettings):
        """Makes the step, which is compiled at its first call."""
        super().__init__(functools.partial(_update, materials, settings), materials.mesh, materials.config.products)
        self._materials, self._settings = materials, settings

    def lower(self, state: TrainState, batch: Batch[Any], frozen: ParamTree | None = None) -> Any:
        """Lowers the update; a batch of `GroupRelative.batch_shapes` stands for the views of its answers, for plans."""
        if not isinstance(batch, ViewBatch):
            answers, length = batch.tokens_BT.shape
            prompts, accumulation = answers // self._settings.group_size, self._materials.config.accumulation
            batch = _view_shapes(self._settings, self.mesh, prompts, length, accumulation)
        return super().lower(state, batch, frozen)


def _update(
    materials: StepMaterials, settings: RewardSettings, state: TrainState, batch: Batch[jax.Array], frozen: ParamTree
) -> tuple[TrainState, Metrics]:
    """Computes one update. The metrics also have the log-probabilities [Z, B, M] of the scored tokens, as `LOGPROBS`."""
    assert isinstance(batch, ViewBatch)

    def loss(params: ParamTree, views: ViewBatch) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
        logprob_BM, entropy_BM = _scores(materials, settings, joined(frozen, params), views)
        used_BM = views.weight_BM > 0
        # Where nothing is scored, the difference is 0, so that no NaN or infinity reaches the gradient.
        old_BM = jnp.where(batch.first, jax.lax.stop_gradient(logprob_BM), views.old_BM)
        ratio_BM = jnp.exp(jnp.where(used_BM, logprob_BM - old_BM, 0.0))
        advantage_B1 = views.advantage_B[:, None]
        clipped_BM = jnp.clip(ratio_BM, 1.0 - settings.clip_low, 1.0 + settings.clip_high)
        value_BM = -jnp.minimum(ratio_BM * advantage_B1, clipped_BM * advantage_B1)
        kl_BM = jnp.zeros_like(ratio_BM)
        if settings.kl_weight:
            away_BM = jnp.where(used_BM, views.reference_BM - logprob_BM, 0.0)
            kl_BM = jnp.exp(away_BM) - away_BM - 1.0
        total = jnp.sum(views.weight_BM * (value_BM + settings.kl_weight * kl_BM))
        is_clipped_BM = jnp.where(
            advantage_B1 > 0, ratio_BM > 1.0 + settings.clip_high, ratio_BM < 1.0 - settings.clip_low
        ) & (advantage_B1 != 0)
        mean = lambda x_BM: jnp.sum(jnp.where(used_BM, x_BM, 0.0))
        sums = {
            "loss": total,
            "tokens": mean(jnp.ones_like(ratio_BM)),
            "nll": -mean(logprob_BM),
            "entropy": mean(entropy_BM),
            "kl": mean(kl_BM),
            "clipped": mean(is_clipped_BM.astype(jnp.float32)),
        }
        error = jnp.max(jnp.where(used_BM, jnp.abs(ratio_BM - 1.0), 0.0))
        return total, (sums | {"ratio_error": error}, logprob_BM)

    gradient = jax.grad(loss, has_aux=True)
    shapes = jax.eval_shape(gradient, state.params, _microbatch(batch, jnp.int32(0)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    logprobs = jnp.zeros(batch.old_BM.shape, jnp.float32)

    def add(number: jax.Array, carry: tuple[ParamTree, Metrics, jax.Array]) -> tuple[ParamTree, Metrics, jax.Array]:
        gradients, sums, logprobs = carry
        more, (values, logprob_BM) = gradient(state.params, _microbatch(batch, number))
        summed = {
            name: jnp.maximum(sums[name], value) if name == "ratio_error" else sums[name] + value
            for name, value in values.items()
        }
        logprobs = jax.lax.dynamic_update_index_in_dim(logprobs, logprob_BM, number, 0)
        return jax.tree.map(jnp.add, gradients, more), summed, logprobs

    gradients, sums, logprobs = jax.lax.fori_loop(0, batch.count, add, (zeros[0], zeros[1][0], logprobs))
    after, updated = updated_state(
        gradients, sums["loss"], state, materials.optimizer, materials.schedule, materials.mesh
    )
    after = dataclasses.replace(after, step=state.step + batch.last)
    tokens = jnp.maximum(sums["tokens"], 1.0)
    means = {name: sums[name] / tokens for name in ("nll", "entropy", "kl", "clipped")}
    return after, {
        "loss": sums["loss"],
        "num_masked": sums["tokens"],
        "ratio_error": sums["ratio_error"],
        **means,
        **updated,
        LOGPROBS: logprobs,
    }


def _microbatch(batch: ViewBatch, number: jax.Array) -> ViewBatch:
    """Returns one microbatch of the views; the scalars stay."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    cut = {
        name: value
        if name in _SCALARS or value is None
        else jax.lax.dynamic_index_in_dim(value, number, 0, keepdims=False)
        for name, value in values.items()
    }
    return ViewBatch(**cut)


def _scores(
    materials: StepMaterials, settings: RewardSettings, params: ParamTree, views: ViewBatch
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities and entropies [B, M] of the scored tokens of one microbatch."""
    model = merge_params(materials.graphdef, params)
    model = layer_forms.apart(model) if materials.config.layers == "apart" else model
    assert views.valid_BT is not None, "`view_batch` marks the valid tokens"
    mask = masks.parse(materials.model.trained_mask).for_rows(views.valid_BT, views.answer_BT)
    token_V = jnp.arange(model.config.vocab_size, dtype=jnp.int32)
    return token_logprobs(
        model,
        sharding.constrain(views.tokens_BT, "batch", None),
        views.maskable_BT,
        views.valid_BT,
        mask & masks.KeyPadding(views.valid_BT),
        views.position_BM,
        TokenDistribution(
            temperature=settings.rollout_temperature,
            top_p=None if settings.rollout_top_p == 1.0 else settings.rollout_top_p,
        ),
        # The sampler writes no id from `limit` on, and never the mask token (`inference.make_sampler`).
        (token_V < views.limit) & (token_V != model.config.mask_token_id),
    )


# --- The rollouts of a run ---


class RolloutDriver(Driver):
    """Samples answers to the prompts of a batch, rewards them, and updates the weights on them."""

    def __init__(self, step: AnyStep, run: RunMaterials, settings: RewardSettings):
        """Makes the rewards and the sampler.

        Raises:
          ValueError: a prompt of the training rows and an answer do not fit the model together, or the settings of the
            sampler do not fit the model.
        """
        super().__init__(step, run.mesh)
        self._run, self._settings = run, settings
        self._rewards, self._policy = settings.make_rewards(), settings.make_policy()
        materials = run.materials
        self._graphdef, self._accumulation = materials.graphdef, materials.config.accumulation
        self._sampler = settings.make_sampler(run.tokenizer, materials.model.trained_mask)
        self._greedy = settings.make_sampler(run.tokenizer, materials.model.trained_mask, greedy=True)
        TokenDistribution.of(self._sampler)
        self._reference: ParamTree | None = None
        self._score = jax.jit(
            functools.partial(_score_all, materials, settings), out_shardings=sharding.replicated(run.mesh)
        )
        self._file = RolloutFile(run.folder)

    def begin(self, state: TrainState, frozen: ParamTree) -> None:
        """Removes later rollouts from the file, and copies the weights of the reference if they are needed."""
        if jax.process_index() == 0:
            self._file.cut(int(state.step))
        if self._settings.kl_weight:
            self._reference = self._run.first_params()

    def __call__(
        self, state: TrainState, batch: Batch[np.ndarray], frozen: ParamTree
    ) -> tuple[TrainState, Mapping[str, jax.Array | float]]:
        """Makes one rollout, and all updates on its answers."""
        assert isinstance(batch, PromptBatch)
        begun = time.monotonic()
        number = int(state.step)
        rollout = self._sample(state.params, frozen, batch, number)
        values_RF, total_PG, texts = self._judge(rollout, batch, number)
        found = advantages(total_PG, self._settings.advantage)
        sampled = time.monotonic()
        if jax.process_index() == 0 and (number % self._settings.rollout_samples == 0):
            self._file.add(number + 1, texts, values_RF, self._settings.group_size)
        metrics = rollout_metrics(rollout, total_PG, found, self._settings.rollout_tokens)
        state, updated = self._update(state, frozen, rollout.rows, found, number)
        # `float` waits for the devices, so that the times of rollout and updates are not mixed.
        metrics |= {name: float(value) for name, value in updated.items()}
        seconds = time.monotonic() - begun
        return state, metrics | {"rollout_share": (sampled - begun) / seconds}

    def evaluate(self, params: ParamTree, frozen: ParamTree) -> dict[str, float]:
        """Returns the mean reward of answers to held-out rows at temperature 0, its standard error, and their length."""
        run = self._run
        if run.held_out is None:
            return {}
        found = run.held_out.first(run.held_out_rows, run.sizes.max_length)
        found = [(row, one) for row, one in found if not row.document]
        if not found:
            return {}
        model = merge_params(self._graphdef, joined(frozen, params))
        shards = dict(run.mesh.shape)["fsdp"]
        size = -(-min(len(found), self._rows_at_once()) // shards) * shards
        rewards, lengths = [], []
        for start in range(0, len(found), size):
            chunk = found[start : start + size]
            prompts = [one.tokens[: one.prompt_length] for _, one in chunk]
            names = [(0, index) for index in range(len(chunk))]  # not used: at temperature 0 nothing is random
            answers = answer_prompts(model, run.tokenizer, prompts, names, self._greedy, size)
            where = [_where(row.meta, start + index) for index, (row, _) in enumerate(chunk)]
            seen = sampled_answers(answers, [row for row, _ in chunk], where, self._settings.rollout_tokens)
            rewards += [self._rewards.total(values_F) for values_F in self._values(seen)]
            lengths += [one.length for one in seen]
        count = len(rewards)
        error = float(np.std(rewards, ddof=1) / math.sqrt(count)) if count > 1 else math.nan
        return {"reward": float(np.mean(rewards)), "reward_se": error, "answer_tokens": float(np.mean(lengths))}

    def _rows_at_once(self) -> int:
        """Returns the number of answers that are sampled together, a multiple of the size of the mesh axis fsdp."""
        shards = dict(self._mesh.shape)["fsdp"]
        rows = self._run.sizes.batch_size * self._settings.group_size
        return -(-min(rows, self._settings.rollout_rows or rows) // shards) * shards

    def _sample(self, params: ParamTree, frozen: ParamTree, batch: PromptBatch[np.ndarray], number: int) -> Rollout:
        assert batch.valid_BT is not None
        model = merge_params(self._graphdef, joined(frozen, params))
        return sample_rollout(
            model,
            self._run.tokenizer,
            batch.tokens_BT,
            batch.valid_BT,
            self._sampler,
            group_size=self._settings.group_size,
            seed=self._run.sizes.seed,
            number=number,
            rows_at_once=self._rows_at_once(),
        )

    def _judge(
        self, rollout: Rollout, batch: PromptBatch[np.ndarray], number: int
    ) -> tuple[np.ndarray, np.ndarray, list[SampledAnswer]]:
        """Returns the values [R, F] of F rewards, their sums [P, G], and the answers. Raises RewardError."""
        source, size = self._run.rows.source, self._settings.group_size
        indices = np.repeat(batch.source_B, size).tolist()
        rows = {index: source[index] for index in set(indices)}
        where = [_where(rows[index].meta, index) for index in indices]
        seen = sampled_answers(
            rollout.answers, [rows[index] for index in indices], where, self._settings.rollout_tokens
        )
        values_RF = self._values(seen)
        total_PG = (values_RF @ np.array(self._rewards.weights)).reshape(-1, size)
        if self._settings.shuffle_rewards:
            total_PG = shuffled(total_PG, np.random.default_rng([self._run.sizes.seed, number]))
        return values_RF, total_PG, list(seen)

    def _values(self, seen: Sequence[SampledAnswer]) -> np.ndarray:
        """Returns the values [R, F] of F rewards of R answers. Of several processes only process 0 judges them.

        A reward of the user need not be the same in every process. If judging fails there, process 0 raises its error and
        the others RewardError, because they would otherwise wait for process 0 without end.
        """
        if jax.process_count() == 1:
            return np.array([self._rewards(one) for one in seen], np.float64)
        values_RF = np.zeros((len(seen), len(self._rewards.weights)), np.float32)
        failure: BaseException | None = None
        if jax.process_index() == 0:
            try:
                values_RF[:] = [self._rewards(one) for one in seen]
            except BaseException as error:  # A function of the user can also end the program.
                failure = error
        values_RF, failed = multihost_utils.broadcast_one_to_all((values_RF, np.bool_(failure is not None)))
        if failure is not None:
            raise failure
        if failed:
            raise RewardError("judging failed in process 0; see the error message of that process")
        return np.asarray(values_RF, np.float64)

    def _update(
        self, state: TrainState, frozen: ParamTree, rows: SampledRows, found: Advantages, number: int
    ) -> tuple[TrainState, dict[str, Any]]:
        """Makes all updates on the answers, and returns the new state and the metrics of the last update.

        `ratio_error` is that of the first update, and `skipped` is 1 if any update was skipped.
        """
        settings, run = self._settings, self._run
        used_P = np.ones(len(found.signal_P), bool) if settings.equal_groups else found.signal_P
        views = self._policy.views(rows, (run.sizes.seed, number))
        used_R = np.repeat(used_P, settings.group_size)
        keep_X = used_R[views.row_X]
        views = Views(row_X=views.row_X[keep_X], masked_XT=views.masked_XT[keep_X], scored_XT=views.scored_XT[keep_X])
        if not len(views.row_X):
            # No group has a signal, so there is nothing to learn from: weights, moments and schedule stay.
            after = dataclasses.replace(state, step=jax.jit(lambda step: step + 1)(state.step))
            done = updates_done(state.opt_state)
            rate = run.materials.schedule(state.step if done is None else done)
            return after, _NOTHING | {"learning_rate": rate, "views": 0.0}
        batch = view_batch(
            rows,
            views,
            found.advantage_PG.reshape(-1),
            settings,
            microbatch_rows=_microbatch_rows(settings, run.sizes.batch_size, self._accumulation),
            most=_most_microbatches(settings, self._accumulation),
            limit=run.tokenizer.vocab_limit,
            mesh=self._mesh,
        )
        with jax.set_mesh(self._mesh):
            if self._reference is not None:
                scores = self._score(joined(frozen, self._reference), batch)
                batch = dataclasses.replace(batch, reference_BM=scores)
        metrics: dict[str, Any] = {}
        skipped, error = 0.0, 0.0
        for update in range(settings.updates):
            flags = _flags(update == 0, update == settings.updates - 1, self._mesh)
            state, metrics = self._step(state, dataclasses.replace(batch, **flags), frozen)
            logprobs = metrics.pop(LOGPROBS)
            if update == 0:
                batch = dataclasses.replace(batch, old_BM=logprobs)
                error = float(metrics["ratio_error"])
            skipped = max(skipped, float(metrics["skipped"]))
        return state, metrics | {"skipped": skipped, "ratio_error": error, "views": float(len(views.row_X))}


_NOTHING = {
    **dict.fromkeys(("nll", "entropy", "kl", "clipped"), math.nan),
    **dict.fromkeys(("loss", "num_masked", "ratio_error", "grad_norm", "skipped"), 0.0),
}


def _flags(first: bool, last: bool, mesh: Mesh) -> dict[str, jax.Array]:
    put = lambda value: jax.device_put(value, sharding.replicated(mesh))
    return {"first": put(np.bool_(first)), "last": put(np.int32(last))}


def rollout_metrics(rollout: Rollout, total_PG: np.ndarray, found: Advantages, limit: int) -> dict[str, float]:
    """Returns the metrics of a rollout.

    They are `reward` (the mean), `reward_deviation` (the mean over groups of the standard deviation inside a group),
    `signal` (the share of groups whose rewards differ), `answer_tokens` (the mean length before the end), `ended` (the
    share of answers with an end token), and NaN for the columns of `metrics.csv` that have no meaning here.
    """
    lengths = [limit if one.tokens_to_end is None else one.tokens_to_end for one in rollout.answers]
    return {
        **dict.fromkeys(("masked_accuracy", "eos_accuracy", *NLL_BY_TIME), math.nan),
        "reward": float(total_PG.mean()),
        "reward_deviation": float(total_PG.std(axis=1).mean()),
        "signal": float(found.signal_P.mean()),
        "answer_tokens": float(np.mean(lengths)),
        "ended": float(np.mean([one.tokens_to_end is not None for one in rollout.answers])),
    }


def view_batch(
    rows: SampledRows,
    views: Views,
    advantage_R: np.ndarray,
    settings: RewardSettings,
    *,
    microbatch_rows: int,
    most: int,
    limit: int,
    mesh: Mesh,
) -> ViewBatch:
    """Divides views into microbatches, and puts them on the devices of the mesh.

    Args:
      rows, views: the answers, and their views (at least one).
      advantage_R: the advantage of each answer.
      settings: decide how tokens and answers are averaged.
      microbatch_rows: number of views of a microbatch.
      most: number of microbatches for which the arrays have entries, at least as many as are needed.
      limit: token ids at or above it are never written.
      mesh: the mesh; its axis fsdp divides `microbatch_rows`.
    """
    number = len(views.row_X)
    scored_X = views.scored_XT.sum(axis=1)
    width = bucket_length(int(scored_X.max()))
    # The scored positions come first, in ascending order; the entries after them have the weight 0.
    position_XM = np.argsort(~views.scored_XT, axis=1, kind="stable")[:, :width].astype(np.int32)
    used_XM = np.arange(position_XM.shape[1]) < scored_X[:, None]
    if position_XM.shape[1] < width:
        padding = ((0, 0), (0, width - position_XM.shape[1]))
        position_XM, used_XM = np.pad(position_XM, padding), np.pad(used_XM, padding)
    tokens_R = np.bincount(views.row_X, weights=scored_X, minlength=len(rows.tokens_RT))
    answers = np.count_nonzero(tokens_R)
    if settings.average == "answers":
        weight_R = np.where(tokens_R > 0, 1.0 / (np.maximum(tokens_R, 1) * answers), 0.0)
    else:
        weight_R = np.full(len(tokens_R), 1.0 / tokens_R.sum())
    weight_XM = np.where(used_XM, weight_R[views.row_X][:, None], 0.0).astype(np.float32)
    length = rows.tokens_RT.shape[1]
    new_RT = np.broadcast_to(np.arange(length) >= length - settings.rollout_tokens, rows.tokens_RT.shape)
    sharded = NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def put(x_X: np.ndarray, *, repeats: bool = True) -> jax.Array:
        """Puts an array [X, ...] on the devices as [Z, B, ...], filled up with copies of its first row, or with zeros."""
        filled = np.zeros((most * microbatch_rows, *x_X.shape[1:]), x_X.dtype)
        filled[:number] = x_X
        if repeats:
            filled[number:] = x_X[0]
        filled = filled.reshape(most, microbatch_rows, *x_X.shape[1:])
        return jax.make_array_from_callback(filled.shape, sharded, filled.__getitem__)

    row_X = views.row_X
    shape = (most, microbatch_rows, width)
    nothing = jax.device_put(np.zeros(shape, np.float32), sharding.replicated(mesh))
    # A view that only fills up a microbatch is a copy, because it must have valid tokens, or its attention would have no
    # key. Its weights are 0.
    return ViewBatch(
        tokens_BT=put(rows.tokens_RT[row_X]),
        maskable_BT=put(views.masked_XT),
        row_B=put(row_X.astype(np.int32)),
        valid_BT=put(rows.valid_RT[row_X]),
        answer_BT=put(new_RT[row_X]),
        position_BM=put(position_XM),
        weight_BM=put(weight_XM, repeats=False),
        advantage_B=put(advantage_R[row_X].astype(np.float32)),
        old_BM=nothing,
        reference_BM=nothing,
        limit=jax.device_put(np.int32(limit), sharding.replicated(mesh)),
        count=jax.device_put(np.int32(-(-number // microbatch_rows)), sharding.replicated(mesh)),
        **_flags(True, True, mesh),
    )


def _score_all(materials: StepMaterials, settings: RewardSettings, params: ParamTree, batch: ViewBatch) -> jax.Array:
    """Returns the log-probabilities [Z, B, M] of the scored tokens of all microbatches under some weights."""

    def add(number: jax.Array, scores: jax.Array) -> jax.Array:
        found, _ = _scores(materials, settings, params, _microbatch(batch, number))
        return jax.lax.dynamic_update_index_in_dim(scores, found, number, 0)

    return jax.lax.fori_loop(0, batch.count, add, jnp.zeros(batch.old_BM.shape, jnp.float32))
