"""Thresholds instead of a sort: the same tokens and confidences as a plain reference that sorts."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from marking import slow

from dream_jax import decoding
from dream_jax.decoding import choosing, filters
from dream_jax.target import Platform, target_platform

ALGS = ["origin", "maskgit_plus", "topk_margin", "entropy"]
ROWS, VOCAB = 1000, 97  # of most tests: one shape, so that programs are compiled once
UNIFORM = (np.random.default_rng(1).permutation(ROWS) + np.float32(0.5)) / np.float32(ROWS)
FILTERS = [(None, None), (1.0, None), (0.9, None), (0.3, None), (None, 1), (None, 7), (0.8, 5), (0.5, 60), (1e-6, 3)]

choose = jax.jit(decoding.choose_tokens, static_argnames=["alg", "temperature", "top_p", "top_k"])


@functools.partial(jax.jit, static_argnames=["temperature", "top_p", "top_k"])
def choose_by_all(logits_RV, uniform_R, temperature, top_p, top_k):
    """All algorithms in one program: most of what they compute is the same."""
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "uniform_R": uniform_R}
    return {alg: decoding.choose_tokens(logits_RV, alg=alg, **options) for alg in ALGS}


def filtered(logits_RV, temperature, top_p, top_k):
    """The published filters on float64, with a sort; also how near any nucleus came to another size (its margin)."""
    z_RV = np.asarray(logits_RV, np.float32)
    if temperature > 0:
        z_RV = z_RV / np.float32(temperature)
    z_RV, margin_R = z_RV.astype(np.float64), np.full(len(z_RV), np.inf)
    if top_p is not None and top_p < 1:
        order_RV = np.argsort(-z_RV, axis=-1, kind="stable")
        sorted_RV = np.take_along_axis(z_RV, order_RV, axis=-1)
        odds_RV = np.exp(sorted_RV - sorted_RV[:, :1])
        above_RV = np.cumsum(odds_RV, axis=-1) / np.sum(odds_RV, axis=-1, keepdims=True)
        # Up to and including the token that crosses top_p: a token goes if those before it already crossed.
        gone_RV = np.pad(above_RV[:, :-1] > top_p, ((0, 0), (1, 0)))
        margin_R = np.min(np.where(odds_RV > 0, np.abs(above_RV - top_p), np.inf), axis=-1)
        removed_RV = np.zeros_like(gone_RV)
        np.put_along_axis(removed_RV, order_RV, gone_RV, axis=-1)
        z_RV = np.where(removed_RV, -np.inf, z_RV)
    if top_k is not None and top_k < z_RV.shape[1]:
        kth_R1 = -np.sort(-z_RV, axis=-1)[:, top_k - 1 : top_k]
        z_RV = np.where(z_RV < kth_R1, -np.inf, z_RV)
    odds_RV = np.exp(z_RV - z_RV.max(axis=-1, keepdims=True))
    return odds_RV / odds_RV.sum(axis=-1, keepdims=True), margin_R


def confidence(p_RV, token_R, alg):
    if alg == "entropy":
        return np.sum(p_RV * np.log(p_RV + 1e-10), axis=-1)
    if alg == "topk_margin":
        top = -np.sort(-p_RV, axis=-1)
        return top[:, 0] - top[:, 1]
    return p_RV[np.arange(len(p_RV)), token_R]


def check(logits_RV, uniform_R, temperature, top_p, top_k):
    """Compares with the reference, row by row."""
    p_RV, margin_R = filtered(logits_RV, temperature, top_p, top_k)
    clear_R = margin_R > 3e-6  # float32 sums: which token crosses top_p is a matter of rounding below this
    assert np.mean(clear_R) > 0.97
    rows = np.arange(len(logits_RV))
    for alg, (token_R, confidence_R) in choose_by_all(logits_RV, uniform_R, temperature, top_p, top_k).items():
        assert (token_R.dtype, confidence_R.dtype) == (jnp.int32, jnp.float32)
        token_R, confidence_R = np.asarray(token_R), np.asarray(confidence_R)
        if temperature == 0:
            np.testing.assert_array_equal(token_R, np.argmax(logits_RV, axis=-1))
        else:
            assert np.all(p_RV[rows, token_R][clear_R] > 0)
        wanted_R = confidence(p_RV, token_R, alg)
        np.testing.assert_allclose(confidence_R[clear_R], wanted_R[clear_R], rtol=1e-4, atol=2e-5)


def rows_of_logits(rows, vocab, seed=0):
    """Flat to peaked rows; some with values that occur many times; some with tokens that are forbidden."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, (rows, vocab)) * rng.choice([0.1, 1, 3, 10], (rows, 1))
    logits[1::5] = np.round(logits[1::5] * 2) / 2 + 0.0  # no -0.0: it has a test of its own
    logits[2::5][rng.random(logits[2::5].shape) < 0.5] = -np.inf
    logits[2::5, 3] = 0.25
    return logits.astype(np.float32)


@pytest.mark.parametrize(("top_p", "top_k"), FILTERS)
@pytest.mark.parametrize("temperature", [slow(0.0), 0.7])
def test_tokens_and_confidences(temperature, top_p, top_k):
    check(rows_of_logits(ROWS, VOCAB), UNIFORM, temperature, top_p, top_k)


@pytest.mark.slow
@pytest.mark.parametrize(("top_p", "top_k"), [slow(0.9, None), (0.8, 5)])
def test_a_hundred_thousand_rows(monkeypatch, top_p, top_k):
    """Random, peaked, tied, flat: as the sort."""
    rows, vocab = 100_000, 64
    logits = rows_of_logits(rows, vocab, seed=4)
    logits[3::50] = np.round(logits[3::50])
    logits[4::100] = 0.25
    uniform = np.random.default_rng(3).random(rows, np.float32)
    monkeypatch.setattr(choosing, "_GROUP_ROWS", {"cpu": 5000})
    choose_by_all.clear_cache()
    check(logits, uniform, 0.7, top_p, top_k)
    choose_by_all.clear_cache()


@pytest.mark.slow
@pytest.mark.parametrize("probes", [2, 15])
@pytest.mark.parametrize(("top_p", "top_k"), FILTERS[2:])
def test_several_thresholds_a_pass(monkeypatch, probes, top_p, top_k):
    """As accelerators do it, and all rows at once; the last group of rows is a short one elsewhere, here there is none."""
    monkeypatch.setattr(filters, "_PROBES", {"cpu": probes})
    monkeypatch.setattr(choosing, "_GROUP_ROWS", {})
    choose_by_all.clear_cache()
    check(rows_of_logits(ROWS, VOCAB), UNIFORM, 0.7, top_p, top_k)
    choose_by_all.clear_cache()


def passes_of(mass_RV, top_p, top_k, monkeypatch):
    """What `keep_likely` keeps, and over how many thresholds it went."""
    passes = []

    def counting(condition, body, start):
        while condition(start):
            passes.append(0)
            start = body(start)
        return start

    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, "while_loop", counting)
        kept = filters.keep_likely(jnp.asarray(mass_RV, jnp.float32), top_p, top_k)
    return np.asarray(kept) > 0, len(passes)


@pytest.mark.slow
@pytest.mark.parametrize(("probes", "most"), [(1, 14), (15, 8)])
@pytest.mark.parametrize("top_p", [0.5, 0.95])
@pytest.mark.parametrize("spread", [0.5, 2.0, 8.0])
def test_few_thresholds_are_tried(monkeypatch, spread, top_p, probes, most):
    """Guesses close in on the edge from both sides: halving the bits takes up to 27 passes for these rows."""
    monkeypatch.setattr(filters, "_PROBES", {"cpu": probes})
    for seed in range(3):
        logits = np.random.default_rng(seed).normal(size=20_000).astype(np.float32) * np.float32(spread)
        mass = np.exp(logits - logits.max())
        kept, passes = passes_of(mass[None], top_p, None, monkeypatch)
        order = np.argsort(-mass, kind="stable")
        above = np.cumsum(mass[order].astype(np.float64)) - mass[order]
        wanted = np.zeros(20_000, bool)
        wanted[order[above <= top_p * mass.astype(np.float64).sum()]] = True
        np.testing.assert_array_equal(kept[0], wanted)
        assert passes <= most


@pytest.mark.slow
@pytest.mark.parametrize("probes", [1, 15])
@pytest.mark.parametrize(("top_p", "top_k"), [(0.5, None), (0.9995, None), (1e-6, None), (None, 30), (None, 400)])
def test_rows_that_mislead_a_guess(monkeypatch, probes, top_p, top_k):
    """Two heights, steps of many equals, masses down to the least float: the search ends all the same, and rightly."""
    monkeypatch.setattr(filters, "_PROBES", {"cpu": probes})
    rng = np.random.default_rng(0)
    rows = [
        np.r_[1.0, np.full(999, 1e-30)],
        np.r_[np.ones(500), np.full(500, 0.5)],
        np.r_[1.0, np.round(rng.random(999), 1)],
        np.r_[1.0, 2.0 ** -rng.integers(0, 126, 999).astype(np.float64)],
        np.r_[1.0, np.full(999, np.float32(1) - np.float32(2**-24))],
        np.r_[1.0, np.zeros(999)],
    ]
    for mass in rows:
        mass = mass.astype(np.float32)
        kept, passes = passes_of(mass[None], top_p, top_k, monkeypatch)
        wide = mass.astype(np.float64)
        order = np.argsort(-mass, kind="stable")
        wanted = np.zeros(1000, bool)
        if top_k is None:
            above = np.cumsum(wide[order]) - wide[order]
            wanted[order[above <= np.float32(top_p) * wide.sum() * (1 + 1e-7)]] = True
        else:
            wanted = mass >= mass[order[top_k - 1]]
        np.testing.assert_array_equal(kept[0], wanted & (mass > 0))
        assert passes <= 14 + 31


# The last two: a nucleus of about 100,000 tokens; about 1000 ties at the edge of the top 2000.
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.2, 0.95, None), (0.0, 0.9, 50), (1.0, 0.9, None), (1.0, None, 2000)]
)
def test_whole_vocabulary(temperature, top_p, top_k):
    logits = rows_of_logits(5, 152_064, seed=2)
    uniform = np.array([0.0, 0.3, 0.6, 0.9, np.float32(1) - np.float32(2**-24)], np.float32)
    p_RV, _ = filtered(logits, temperature, top_p, top_k)
    token_R, confidence_R = choose(
        logits, alg="entropy", temperature=temperature, top_p=top_p, top_k=top_k, uniform_R=uniform
    )
    if temperature == 0:
        np.testing.assert_array_equal(token_R, np.argmax(logits, axis=-1))
    else:
        assert np.all(p_RV[np.arange(5), token_R] > 0)
    np.testing.assert_allclose(confidence_R, confidence(p_RV, token_R, "entropy"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, None, None), (0.7, 0.9, None), (1.3, None, 40)])
def test_uniform_numbers_cover_the_distribution(temperature, top_p, top_k):
    """Evenly spaced numbers give each token its share, to within one: an exact inverse of the distribution."""
    count = 500
    uniform = (np.arange(count) + np.float32(0.5)) / np.float32(count)
    for row in rows_of_logits(4, 1000, seed=9):
        p_RV, _ = filtered(row[None], temperature, top_p, top_k)
        token, _ = choose(
            np.tile(row, (count, 1)), alg="origin", temperature=temperature, top_p=top_p, top_k=top_k, uniform_R=uniform
        )
        found = np.bincount(token, minlength=1000)
        assert np.all(np.abs(found - count * p_RV[0]) <= 1.01)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("top_p", "top_k"), FILTERS)
def test_rows_with_one_certain_token(temperature, top_p, top_k):
    certain = np.arange(ROWS) * 7 % VOCAB
    logits = np.full((ROWS, VOCAB), -np.inf, np.float32)
    logits[np.arange(ROWS), certain] = np.resize([0.0, -1e30, 1e30, 3.0, -5.0], ROWS)
    for alg, (token, sure) in choose_by_all(logits, UNIFORM, temperature, top_p, top_k).items():
        np.testing.assert_array_equal(token, certain)
        np.testing.assert_allclose(sure, 0.0 if alg == "entropy" else 1.0, atol=1e-6)


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"), [(None, None, 97), (0.3, None, 30), (None, 7, 97), (0.8, 5, 78), (1e-6, 3, 1)]
)
def test_flat_rows(top_p, top_k, kept):
    """All tokens equal: a sort keeps those of lowest id, as many as fit (and the one that crosses); top_k keeps ties."""
    for alg, (token, sure) in choose_by_all(np.zeros((ROWS, VOCAB), np.float32), UNIFORM, 0.7, top_p, top_k).items():
        assert sorted({*np.asarray(token).tolist()}) == list(range(kept))
        wanted = {"entropy": -np.log(kept), "topk_margin": 0.0 if kept > 1 else 1.0}.get(alg, 1 / kept)
        np.testing.assert_allclose(sure, wanted, atol=1e-5)


@pytest.mark.slow
def test_ties_at_the_edge_of_the_nucleus():
    """0.4, then four of 0.15: at 0.6 two of the four fit after the first; those of lowest id stay."""
    p = np.array([0.15, 0.15, 0.4, 0.15, 0.15])
    uniform = (np.arange(200) + np.float32(0.5)) / np.float32(200)
    logits = np.tile(np.log(p), (200, 1)).astype(np.float32)
    for top_p, kept in [(0.3, [2]), (0.5, [0, 2]), (0.6, [0, 1, 2]), (0.75, [0, 1, 2, 3]), (0.9, [0, 1, 2, 3, 4])]:
        token, _ = choose(logits, alg="entropy", temperature=1.0, top_p=top_p, top_k=None, uniform_R=uniform)
        assert sorted({*np.asarray(token).tolist()}) == kept, top_p


def test_negative_zero_is_zero():
    logits = np.array([[-0.0, 0.0, -5.0]], np.float32)
    for order in (logits, logits[:, [1, 0, 2]]):
        for top_p, top_k, kept in [(None, 1, 2), (0.6, None, 2), (0.4, None, 1)]:
            token, sure = choose(order, alg="maskgit_plus", temperature=0.0, top_p=top_p, top_k=top_k, uniform_R=None)
            np.testing.assert_allclose((int(token[0]), float(sure[0])), (0, 1 / kept), rtol=0.01)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.5, None, None), (1.0, 0.9, None), (2.0, None, 6), (1.0, 0.7, 9)]
)
def test_samples_follow_the_filtered_distribution(temperature, top_p, top_k):
    logits = np.random.default_rng(5).normal(0, 1.5, 20).astype(np.float32)
    uniform = jax.random.uniform(jax.random.key(11), (20_000,))
    many = np.tile(logits, (20_000, 1))
    token, _ = choose(many, alg="entropy", temperature=temperature, top_p=top_p, top_k=top_k, uniform_R=uniform)
    found = np.bincount(token, minlength=20)
    p, margin = filtered(logits[None], temperature, top_p, top_k)
    assert margin[0] > 1e-4
    p = p[0]
    assert not np.any(found[p == 0])  # a token that was filtered out is never drawn
    wanted = p[p > 0] * found.sum()
    statistic, freedom = np.sum((found[p > 0] - wanted) ** 2 / wanted), np.sum(p > 0) - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 4  # beyond the 0.9999 quantile of chi-square


@pytest.mark.slow
@given(
    row=st.lists(
        st.sampled_from([-np.inf, -30.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 30.0]), min_size=12, max_size=12
    ).filter(lambda row: max(row) > -np.inf),
    temperature=st.sampled_from([0.0, 0.7]),
    filters=st.sampled_from(FILTERS),
)
@settings(max_examples=60, deadline=None)
def test_any_row(row, temperature, filters):
    """Whatever the row, every number draws an allowed token with the reference's confidence."""
    logits = np.full((ROWS, VOCAB), -np.inf, np.float32)
    logits[:, 3:96:8] = row
    if filtered(logits[:1], temperature, *filters)[1][0] > 1e-5:
        check(logits, UNIFORM, temperature, *filters)


@pytest.mark.optimised
def test_a_row_does_not_feel_the_others():
    """Rows that take many passes beside rows that take few: each as if it were alone, to the last bit."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(21, 400)).astype(np.float32) * rng.choice([0.1, 20.0], (21, 1)).astype(np.float32)
    uniform = rng.random(21).astype(np.float32)
    one = jax.jit(
        lambda logits, uniform: decoding.choose_tokens(
            logits, alg="entropy", temperature=0.7, top_p=0.9, top_k=None, uniform_R=uniform
        )
    )
    together = one(logits, uniform)
    alone = [one(logits[row : row + 1], uniform[row : row + 1]) for row in range(21)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.optimised
def test_a_row_does_not_feel_how_many_there_are():
    """Of the whole vocabulary, where float32 sums depend on their order: one to three rows, or the same among seven."""
    rng = np.random.default_rng(0)
    spread = np.array([[0.3], [0.6], [1.0], [1.5], [2.0], [3.0], [2.5]])
    logits = (rng.normal(size=(7, 152_064)) * spread).astype(np.float32)
    logits[1::2] = logits[1::2].astype(jnp.bfloat16)  # many equals
    uniform = rng.random(7).astype(np.float32)
    # Numbers that are not known to the compiler, as in the sampler.
    numbers = jnp.float32(1.0), jnp.float32(0.95)
    chosen = jax.jit(
        lambda logits, uniform, temperature, top_p: decoding.choose_tokens(
            logits, alg="entropy", temperature=temperature, top_p=top_p, top_k=None, uniform_R=uniform
        )
    )
    one = lambda logits, uniform: chosen(logits, uniform, *numbers)
    token, confidence = one(logits, uniform)
    for rows in (1, 2, 3):
        for begin in range(8 - rows):
            some = slice(begin, begin + rows)
            some_token, some_confidence = one(logits[some], uniform[some])
            np.testing.assert_array_equal(some_token, token[some])
            np.testing.assert_array_equal(some_confidence, confidence[some])


def test_sampling_without_numbers_raises():
    with pytest.raises((ValueError, TypeCheckError), match="needs random numbers"):
        decoding.choose_tokens(
            jnp.zeros((1, 3)), alg="entropy", temperature=1.0, top_p=None, top_k=None, uniform_R=None
        )


# commit


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_commit_writes_the_most_confident(data):
    shape = (3, 9)
    values = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0])
    confidence = np.array(data.draw(st.lists(st.lists(values, min_size=9, max_size=9), min_size=3, max_size=3)))
    flags = st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=3, max_size=3)
    candidate = np.array(data.draw(flags))
    count = np.array(data.draw(st.lists(st.integers(0, 9), min_size=3, max_size=3)))
    chosen = np.asarray(
        commit(jnp.asarray(confidence, jnp.float32), jnp.asarray(candidate), jnp.asarray(count, jnp.int32))
    )
    assert chosen.shape == shape
    for row in range(3):
        # Surest first, of equals the first one: Python's sort is stable.
        order = sorted(np.flatnonzero(candidate[row]), key=lambda index, row=row: -confidence[row, index])
        assert set(np.flatnonzero(chosen[row])) == set(order[: count[row]])


@jax.jit
def commit(confidence_BM, candidate_BM, count_B):
    return decoding.commit(decoding.most_confident_first(confidence_BM, candidate_BM), candidate_BM, count_B)


def test_commit_takes_the_first_of_equals():
    confidence = jnp.array([[1.0, 2.0, 2.0, 2.0, 0.0]])
    everywhere = jnp.ones((1, 5), bool)
    np.testing.assert_array_equal(commit(confidence, everywhere, jnp.array([2])), [[0, 1, 1, 0, 0]])
    np.testing.assert_array_equal(commit(confidence, everywhere.at[0, 1].set(False), jnp.array([3])), [[1, 0, 1, 1, 0]])
    np.testing.assert_array_equal(commit(confidence, everywhere, jnp.array([0])), [[0] * 5])
    np.testing.assert_array_equal(commit(confidence, everywhere, jnp.array([9])), [[1] * 5])


def test_commit_writes_candidates_of_no_confidence_too():
    """Else a position whose confidence overflows (a tiny alg_temp, say) would stay masked for ever."""
    confidence = jnp.array([[-jnp.inf, 0.0, -jnp.inf]])
    candidate = jnp.array([[False, True, True]])
    np.testing.assert_array_equal(commit(confidence, candidate, jnp.array([2])), [[0, 1, 1]])


def test_a_gpu_stores_probabilities_only_for_thresholds() -> None:
    """Without a threshold it computes them for each use; tokens and confidences are the same."""
    logits_RV = jnp.asarray(np.random.default_rng(0).normal(size=(4, 1000)) * 4, jnp.float32)
    uniform_R = jnp.asarray([0.1, 0.4, 0.6, 0.9], jnp.float32)

    def lowered(platform: Platform, temperature: float) -> tuple[str, list[np.ndarray]]:
        chosen = functools.partial(
            decoding.choose_tokens, alg="entropy", temperature=temperature, top_p=None, top_k=None, uniform_R=uniform_R
        )
        with target_platform(platform):
            program = jax.jit(lambda logits_RV: chosen(logits_RV)).lower(logits_RV)
        return program.as_text(), [np.asarray(x) for x in program.compile()(logits_RV)]

    (on_gpu, found), (on_cpu, expected) = lowered("gpu", 0.0), lowered("cpu", 0.0)
    stored = "stablehlo.optimization_barrier %[a-z0-9_]+ : tensor<4x1000xf32>"
    assert not re.search(stored, on_gpu) and re.search(stored, on_cpu)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)
    assert re.search(stored, lowered("gpu", 0.5)[0])
