"""Log-probabilities of sampled answers: those of the sampler itself, each token once, and the updates that use them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from marking import slow

from dream_jax import masks
from dream_jax.config import PRESETS
from dream_jax.model import Dream
from dream_jax.posttraining.policies import Policy, SampledRows, Views
from dream_jax.posttraining.token_logprobs import TokenDistribution, _scores, token_logprobs
from dream_jax.sampler import BlockCache, Factor, SamplerConfig, Threshold, generate
from dream_jax.sampler.propose import Writable

NEW = 7


@functools.cache
def tiny_model(mask: str = "bidirectional") -> Dream:
    """A model with two layers and large weights, whose distributions are far from uniform."""
    config = dataclasses.replace(PRESETS["nano"], num_hidden_layers=2, hidden_size=32, intermediate_size=48,
                                 num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3)  # fmt: skip
    model = Dream(config, rngs=nnx.Rngs(3))
    model.trained_mask = mask
    return model


def sampled(config: SamplerConfig, mask: str = "bidirectional", record: Any = "confidences") -> tuple[SampledRows, Any]:
    """Three answers to prompts of different lengths, and what the sampler recorded."""
    model = tiny_model(mask)
    tokens_BP = np.random.default_rng(0).integers(1, 90, (3, 5)).astype(np.int32)
    valid_BP = np.arange(5) >= np.array([[0], [2], [1]])
    out = generate(model, tokens_BP, config, jax.random.key(5), prompt_mask=valid_BP, record=record)
    step_RT = np.asarray(out.commit_step)
    drawn_RT = ~np.isnan(np.asarray(out.recorded.confidence_BT)) & (step_RT >= 0)
    valid_RT = np.pad(valid_BP, ((0, 0), (0, config.max_new_tokens)), constant_values=True)
    tokens_RT = np.where(valid_RT, np.asarray(out.tokens), model.config.pad_token_id)
    rows = SampledRows(
        tokens_RT=tokens_RT, valid_RT=valid_RT, step_RT=step_RT, drawn_RT=drawn_RT, answer_RT=step_RT >= 0
    )
    return rows, out.recorded


def scores(
    rows: SampledRows, views: Views, config: SamplerConfig, distribution: Any, mask: str = "bidirectional"
) -> Any:
    """The log-probability of each token [R, T], NaN where it is not scored."""
    model, row_X = tiny_model(mask), views.row_X
    valid_XT, length = rows.valid_RT[row_X], rows.tokens_RT.shape[1]
    answer_XT = np.broadcast_to(np.arange(length) >= length - config.max_new_tokens, valid_XT.shape)
    attends = masks.parse(mask).for_rows(jnp.asarray(valid_XT), jnp.asarray(answer_XT))
    position_XT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), valid_XT.shape)
    writable = Writable(config.vocab_limit, tuple(config.forbidden_tokens)).table(model.config.vocab_size)
    found_XT, _ = jax.jit(token_logprobs, static_argnames="distribution")(
        model,
        jnp.asarray(rows.tokens_RT[row_X]),
        jnp.asarray(views.masked_XT),
        jnp.asarray(valid_XT),
        attends & masks.KeyPadding(jnp.asarray(valid_XT)),
        position_XT,
        distribution=distribution,
        writable_V=None if writable is None else jnp.asarray(writable),
    )
    result = np.full(rows.tokens_RT.shape, np.nan)
    for row, found_T, scored_T in zip(row_X, np.asarray(found_XT), views.scored_XT, strict=True):
        assert np.all(np.isnan(result[row, scored_T])), "a token is scored twice"
        result[row, scored_T] = found_T[scored_T]
    return result


def options(alg: str) -> dict[str, Any]:
    return {"max_new_tokens": NEW, "steps": 5, "alg": alg, "vocab_limit": 280, "forbidden_tokens": (261,)}


@pytest.mark.parametrize(
    "alg",
    ["origin", "entropy", slow("maskgit_plus"), slow("topk_margin")],
)
def test_all_steps_give_the_product_that_the_sampler_reported_while_it_sampled(alg: Any) -> None:
    config = SamplerConfig(**options(alg), temperature=0.7)
    rows, recorded = sampled(config, record="logprobs")
    views = Policy(name="trajectory").views(rows, (0,))
    # The sampler reports probabilities at temperature 1, before the filters.
    found_RT = scores(rows, views, config, TokenDistribution())
    reported_RT = np.asarray(recorded.logprobs.logprob_BM)
    assert np.array_equal(~np.isnan(found_RT), rows.drawn_RT)
    assert rows.drawn_RT.sum() == 3 * NEW
    sums = [np.where(rows.drawn_RT, x_RT, 0.0).sum(axis=1) for x_RT in (found_RT, reported_RT)]
    np.testing.assert_allclose(sums[0], sums[1], atol=1e-5, rtol=0)
    assert len(np.unique(reported_RT[rows.drawn_RT])) > NEW


@pytest.mark.parametrize("alg", [slow("origin"), "maskgit_plus"])
def test_temperature_and_filters_belong_to_the_distribution(alg: Any) -> None:
    # For these two orders the confidence is the probability of the token in the distribution that it is drawn from.
    config = SamplerConfig(**options(alg), temperature=1.7, top_p=0.8, top_k=9)
    rows, recorded = sampled(config)
    found_RT = scores(rows, Policy().views(rows, (0,)), config, TokenDistribution.of(config))
    expected_RT = np.log(np.asarray(recorded.confidence_BT))
    np.testing.assert_allclose(found_RT[rows.drawn_RT], expected_RT[rows.drawn_RT], atol=1e-5, rtol=0)
    plain_RT = scores(rows, Policy().views(rows, (0,)), config, TokenDistribution())
    assert np.abs(plain_RT - found_RT)[rows.drawn_RT].max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "extra"),
    [
        ("bidirectional", {"block_length": 3, "commit": Threshold(0.3), "stop_at_end": True, "alg": "maskgit_plus"}),
        ("bidirectional", {"block_length": 4, "commit": Factor(1.0), "alg": "topk_margin"}),
        ("bidirectional", {"alg_temp": 0.5, "alg": "entropy"}),
        ("prefix", {"alg": "entropy"}),
        ("block-diffusion:3", {"block_length": 3, "cache": BlockCache(), "alg": "entropy", "stop_at_end": True}),
    ],
)
def test_the_product_holds_with_blocks_commit_rules_masks_and_random_orders(mask: str, extra: dict[str, Any]) -> None:
    config = SamplerConfig(**options("entropy") | extra, temperature=1.0)
    rows, recorded = sampled(config, mask, "logprobs")
    found_RT = scores(rows, Policy().views(rows, (0,)), config, TokenDistribution(), mask)
    reported_RT = np.asarray(recorded.logprobs.logprob_BM)
    np.testing.assert_allclose(found_RT[rows.drawn_RT], reported_RT[rows.drawn_RT], atol=1e-5, rtol=0)


def made_up_rows() -> SampledRows:
    """Two rows: the first has 2 prompt tokens and 6 written in 4 steps; the second ends early and was filled up."""
    step_RT = np.array([[-1, -1, 0, 3, 3, 1, 0, 7], [-1, -1, 0, 1, 2, 2, 2, 2]], np.int32)
    drawn_RT = step_RT >= 0
    drawn_RT[1, 5:] = False
    answer_RT = step_RT >= 0
    answer_RT[1, 5:] = False
    tokens_RT = np.arange(16, dtype=np.int32).reshape(2, 8)
    return SampledRows(tokens_RT=tokens_RT, valid_RT=np.ones((2, 8), bool), step_RT=step_RT, drawn_RT=drawn_RT,
                       answer_RT=answer_RT)  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "views"),
    [
        (Policy(), 7),
        (Policy(passes=2), 4),
        (Policy(passes=1), 2),
        (Policy(passes=100), 7),
        (Policy(name="coupled"), 4),
        (Policy(name="mean-field"), 2),
    ],
)
def test_every_policy_scores_each_token_of_an_answer_once_and_masked(policy: Policy, views: int) -> None:
    rows = made_up_rows()
    found = policy.views(rows, (0, 1))
    assert len(found.row_X) == views
    times_RT = np.zeros(rows.tokens_RT.shape, int)
    np.add.at(times_RT, found.row_X, found.scored_XT.astype(int))
    assert np.array_equal(times_RT, rows.drawn_RT.astype(int))
    assert not np.any(found.scored_XT & ~found.masked_XT)


def test_coupled_masks_are_complementary_and_depend_on_the_seed_and_the_row() -> None:
    rows = made_up_rows()
    rows = dataclasses.replace(rows, answer_RT=rows.step_RT >= 0)
    for seed in range(20):
        views = Policy(name="coupled").views(rows, (seed,))
        for row in range(2):
            masked_ZT = views.masked_XT[views.row_X == row]
            assert np.array_equal(masked_ZT.sum(axis=0), rows.step_RT[row] >= 0)
    first, again, other = (Policy(name="coupled").views(rows, (seed,)).masked_XT for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_step_sees_the_canvas_before_it_also_where_steps_share_a_pass() -> None:
    rows = made_up_rows()
    exact, shared = Policy().views(rows, (0,)), Policy(passes=2).views(rows, (0,))
    assert np.array_equal(exact.masked_XT[0], rows.step_RT[0] >= 0)
    assert exact.scored_XT[:4].sum(axis=1).tolist() == [2, 1, 2, 1]
    assert exact.masked_XT[:4].sum(axis=1).tolist() == [6, 4, 3, 1]
    # Steps 0 and 1, and steps 3 and 7, are scored on the canvas before the first of both.
    assert shared.masked_XT[:2].sum(axis=1).tolist() == [6, 3]
    assert shared.scored_XT[:2].sum(axis=1).tolist() == [3, 3]


def test_mean_field_masks_the_answer_and_a_share_of_the_prompt() -> None:
    rows = made_up_rows()
    nothing = Policy(name="mean-field", prompt_masking=0.0).views(rows, (0,))
    assert np.array_equal(nothing.masked_XT, rows.step_RT >= 0)
    everything = Policy(name="mean-field", prompt_masking=1.0).views(rows, (0,))
    assert everything.masked_XT.all()


def test_entropies_and_gradients_are_those_of_the_distribution() -> None:
    model, valid_BT = tiny_model(), jnp.ones((2, 6), bool)
    tokens_BT = jnp.asarray(np.random.default_rng(1).integers(1, 90, (2, 6)), jnp.int32)
    masked_BT = jnp.arange(6)[None] >= jnp.array([[3], [2]])
    position_BM = jnp.array([[3, 5], [2, 4]], jnp.int32)
    writable_V = np.arange(model.config.vocab_size) < 250

    def logits_of(model: Dream) -> jax.Array:
        logits_BTV = model(jnp.where(masked_BT, model.config.mask_token_id, tokens_BT))
        shifted_BTV = jnp.concatenate([logits_BTV[:, :1], logits_BTV[:, :-1]], axis=1)
        chosen_BMV = jnp.take_along_axis(shifted_BTV, position_BM[:, :, None], axis=1)
        return jax.nn.log_softmax(jnp.where(writable_V, chosen_BMV / 1.5, -jnp.inf), axis=-1)

    def plain(model: Dream) -> jax.Array:
        token_BM = jnp.take_along_axis(tokens_BT, position_BM, axis=1)
        return jnp.sum(jnp.take_along_axis(logits_of(model), token_BM[:, :, None], axis=-1))

    def ours(model: Dream) -> tuple[jax.Array, jax.Array]:
        found = token_logprobs(model, tokens_BT, masked_BT, valid_BT, masks.Bidirectional(), position_BM,
                               TokenDistribution(temperature=1.5), writable_V)  # fmt: skip
        return jnp.sum(found[0]), found[1]

    (value, entropy_BM), gradient = nnx.jit(nnx.value_and_grad(ours, has_aux=True))(model)
    expected, expected_gradient = nnx.jit(nnx.value_and_grad(plain))(model)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    log_p = np.asarray(nnx.jit(logits_of)(model))[:, :, :250]
    np.testing.assert_allclose(entropy_BM, -np.sum(np.exp(log_p) * log_p, axis=-1), rtol=1e-4)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_gradients_are_finite_where_filters_and_the_tokenizer_leave_tokens_out() -> None:
    logits_BCV = jnp.asarray(np.random.default_rng(2).normal(size=(1, 2, 8)) * 3, jnp.float32)
    writable_V = np.arange(8) != 5
    mass_CV = np.where(writable_V, np.exp(np.asarray(logits_BCV[0]) / 1.5), 0.0)
    order_CV = np.argsort(-mass_CV, axis=-1)
    # The most probable token, and one that the filter leaves out and that is added to the set.
    token_BC = jnp.asarray([[order_CV[0, 0], order_CV[1, 6]]], jnp.int32)
    distribution = TokenDistribution(temperature=1.5, top_k=3)

    def logprob(logits_BCV: jax.Array) -> jax.Array:
        return jnp.sum(_scores(logits_BCV, token_BC, distribution, writable_V)[0])

    value, gradient_BCV = jax.value_and_grad(logprob)(logits_BCV)
    expected, expected_CV = 0.0, np.zeros((2, 8))
    for row, token in enumerate(np.asarray(token_BC)[0]):
        kept = sorted({*order_CV[row, :3].tolist(), int(token)})
        p = mass_CV[row, kept] / mass_CV[row, kept].sum()
        expected += np.log(p[kept.index(token)])
        expected_CV[row, kept] = ((np.array(kept) == token) - p) / 1.5
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient_BCV[0], expected_CV, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "exact"}, "is not one of trajectory, coupled, mean-field"),
        ({"name": "coupled", "passes": 2}, "is for the policy trajectory"),
        ({"passes": 0}, "must be at least 1"),
        ({"prompt_masking": 1.5}, "outside"),
    ],
)
def test_a_policy_refuses_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(**values)


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {"temperature": 1.0, "guidance": 0.5, "steps": 1}])
def test_a_sampler_whose_draws_have_no_gradient_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"draws nothing|no gradient"):
        TokenDistribution.of(SamplerConfig(**values))
