"""Intervals, agreement, paired tests and the likelihood bound, against closed forms. No model."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from dream_jax.evaluation.likelihood import Bound, Passage, bounds, check_samples, draw_masks, total
from dream_jax.evaluation.statistics import agreement, mean_of, mean_score, paired


def column(right: int, problems: int) -> np.ndarray:
    return (np.arange(problems) < right).astype(float)[:, None]


@pytest.mark.parametrize(
    # Wilson's interval, from the roots of (p - x)^2 = z^2 x (1 - x) / n.
    ("right", "problems"),
    [(0, 10), (1, 10), (5, 10), (10, 10), (81, 100), (1000, 1319)],
)
def test_one_seed_gives_wilsons_interval(right, problems):
    found = mean_score(column(right, problems))
    p, z2 = right / problems, 1.959963984540054**2 / problems
    roots = np.roots([1 + z2, -(2 * p + z2), p * p])
    assert found.value == pytest.approx(p)
    assert (found.low, found.high) == pytest.approx((min(roots), max(roots)), abs=1e-9)


def test_seeds_that_repeat_each_other_say_nothing_new():
    scores = column(12, 40)
    one, five = mean_score(scores), mean_score(np.repeat(scores, 5, axis=1))
    assert (five.low, five.high) == pytest.approx((one.low, one.high))


def test_seeds_of_coins_count_in_full():
    """Problems that are all alike: each seed is a new trial."""
    scores = np.random.default_rng(0).random((500, 8)) < 0.3
    found = mean_score(scores)
    flat = mean_score(scores.reshape(-1, 1))
    assert found.high - found.low == pytest.approx(flat.high - flat.low, rel=0.1)


def test_the_interval_covers():
    """Problems of different difficulty, three seeds: 95 of 100 intervals hold the true mean."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        difficulty = generator.beta(0.8, 0.4, size=(100, 1))
        found = mean_score(generator.random((100, 3)) < difficulty)
        covered += found.low <= 0.8 / 1.2 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_agreement_counts_pairs_of_seeds():
    scores = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1]], float)
    by_hand = np.mean([[a == b for a, b in itertools.combinations(row, 2)] for row in scores])
    assert agreement(scores) == pytest.approx(by_hand)
    assert agreement(scores[:, :1]) == 1.0


@pytest.mark.parametrize(("gained", "lost", "same"), [(0, 0, 5), (1, 0, 9), (5, 0, 5), (8, 2, 90), (30, 12, 0)])
def test_one_seed_a_run_gives_the_exact_mcnemar_test(gained, lost, same):
    first = np.array([0] * gained + [1] * lost + [1] * same, float)[:, None]
    second = np.array([1] * gained + [0] * lost + [1] * same, float)[:, None]
    found = paired(first, second)
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(max(gained, lost), changed + 1)) / 2**changed
    assert found.p_value == pytest.approx(min(1.0, 2 * tail) if gained != lost else 1.0)
    if changed:
        assert found.p_value == pytest.approx(scipy.stats.binomtest(gained, changed).pvalue, abs=1e-9)
    assert (found.gained, found.lost) == (gained, lost)
    assert found.difference == pytest.approx((gained - lost) / (changed + same))
    low, high = found.interval
    assert low <= found.difference <= high and high > low  # a width, even when nothing changed


def test_several_seeds_give_the_exact_sign_flip_test():
    generator = np.random.default_rng(2)
    first, second = generator.integers(0, 2, (9, 2)).astype(float), generator.integers(0, 2, (9, 3)).astype(float)
    change = second.mean(axis=1) - first.mean(axis=1)
    sums = [abs(np.dot(signs, change)) for signs in itertools.product((-1, 1), repeat=9)]
    by_hand = np.mean([value >= abs(change.sum()) - 1e-9 for value in sums])
    assert paired(first, second).p_value == pytest.approx(by_hand)
    assert paired(second, first).difference == pytest.approx(-paired(first, second).difference)


def test_mean_of_any_values():
    found = mean_of(np.array([1.0, 2.0, 3.0]))
    assert (found.value, found.high - 2.0) == pytest.approx((2.0, 1.959964 / math.sqrt(3)))
    assert mean_of(np.array([4.0])) == mean_of(np.array([4.0, 4.0]))


@pytest.mark.parametrize("scores", [np.zeros((0, 1)), np.zeros(3), np.full((2, 2), 1.5), np.full((2, 2), -1.0)])
def test_scores_that_are_none(scores):
    with pytest.raises(ValueError, match="scores"):
        mean_score(scores)


@pytest.mark.parametrize(
    ("right", "problems", "interval"),
    [  # as they were computed before scipy took part
        (5, 10, (0.23659309051256396, 0.763406909487436)),
        (81, 100, (0.7222115462093562, 0.8748524849023126)),
    ],
)
def test_intervals_are_scipys_and_as_before(right, problems, interval):
    found = mean_score(column(right, problems))
    exact = scipy.stats.binomtest(right, problems).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert (found.low, found.high) == pytest.approx(interval, abs=1e-9)


def test_several_seeds_give_the_numbers_that_they_gave():
    """From the hand-written statistics that scipy took the place of."""
    first, second = np.arange(60).reshape(20, 3) % 5 < 2, np.arange(40).reshape(20, 2) % 7 < 4
    score, change = mean_score(first), paired(first, second)
    assert (score.low, score.high) == pytest.approx((0.28569490534882547, 0.5263394650795924), abs=1e-9)
    assert change.interval == pytest.approx((-0.0403192985662133, 0.40395566220257695), abs=1e-9)
    assert (change.p_value, change.gained, change.lost) == (pytest.approx(0.08443450927734375, abs=1e-9), 12, 7)


@pytest.mark.parametrize(("degrees", "table"), [(5, 2.5706), (8, 2.3060), (16, 2.1199), (64, 1.9977), (1000, 1.9623)])
def test_the_interval_of_a_bound_is_students(degrees, table):
    low, high = Bound(nats=3.0, variance=4.0, freedom=degrees).interval
    assert (low + high) / 2 == pytest.approx(3.0)
    assert (high - low) / 4 == pytest.approx(table, rel=3e-5)


# A distribution with a closed form: words of N letters A or B. One of two sets of coins is drawn, and with it each letter
# by the coin of its position. Letters depend on each other through the set alone, so that the chance of any of them given
# any others is known.
COINS = np.array([[0.1, 0.3, 0.7, 0.4, 0.9, 0.2, 0.6], [0.8, 0.6, 0.1, 0.5, 0.3, 0.7, 0.9]]).T


def letter_chances(tokens: np.ndarray) -> np.ndarray:
    """Of each letter of tokens [..., N] under each set of coins: [..., N, 2]."""
    chances = COINS[: tokens.shape[-1]]
    return np.where(tokens[..., None] == 1, chances, 1 - chances)


def coin_nll(rows):
    """The exact cross entropy of each masked letter given the letters that are seen, summed."""
    found = np.zeros(len(rows))
    for length in {len(tokens) for tokens, _ in rows}:
        which = [index for index, (tokens, _) in enumerate(rows) if len(tokens) == length]
        chances = letter_chances(np.stack([rows[index][0] for index in which]))
        masked = np.stack([rows[index][1] for index in which])
        posterior = np.prod(np.where(masked[..., None], 1.0, chances), axis=1)
        posterior /= posterior.sum(axis=1, keepdims=True)
        letters = np.einsum("rnc,rc->rn", chances, posterior)
        found[which] = -np.sum(np.log(letters), axis=1, where=masked)
    return found


def truth(tokens: np.ndarray, places: np.ndarray | slice = slice(None)) -> float:
    return -math.log(np.prod(letter_chances(tokens)[places], axis=0).mean())


def word(letters: str) -> Passage:
    tokens = np.array([int(letter) for letter in letters])
    return Passage(tokens=tokens, scored=np.ones(len(tokens), bool))


def test_the_bound_of_a_known_distribution_is_its_likelihood():
    """All sets of masked letters, weighted as the module says: exactly -log p."""
    tokens = np.array([1, 0, 1, 1])
    mean = 0.0
    for count in range(1, 5):
        sets = [np.isin(np.arange(4), chosen) for chosen in itertools.combinations(range(4), count)]
        mean += np.mean(4 / count * coin_nll([(tokens, masked) for masked in sets])) / 4
    assert mean == pytest.approx(truth(tokens))


def test_the_interval_holds_the_likelihood_and_shrinks():
    words = [word(letters) for letters in ("1011010", "0000000", "1111110", "0100100")]
    widths = {}
    for samples in (10, 64, 256, 1024):  # with 10 there are fewer strata than letters
        covered, spans = 0, []
        for trial in range(40):
            seeds = [(trial, number) for number in range(len(words))]
            for one, bound in zip(words, bounds(words, samples, coin_nll, seeds), strict=True):
                low, high = bound.interval
                covered += low <= truth(one.tokens) <= high
                spans.append(high - low)
        # Two draws in each of five strata say little; from 64 samples on the interval is what it says.
        assert covered / 160 > (0.91 if samples >= 64 else 0.8)
        widths[samples] = np.mean(spans)
    for fewer in (64, 256):  # four times the samples: half the width
        assert widths[fewer] / widths[4 * fewer] == pytest.approx(2, rel=0.1)


def test_an_infilling_is_conditioned_on_both_sides():
    """p(middle | before, after) = p(whole) / p(before, after), and the average of many samples comes to it."""
    tokens = np.array([1, 1, 0, 1, 1, 1])
    scored = np.array([False, False, True, True, False, False])
    (bound,) = bounds([Passage(tokens=tokens, scored=scored)], 4000, coin_nll, [(0,)])
    expected = truth(tokens) - truth(tokens, ~scored)
    low, high = bound.interval
    assert low <= expected <= high
    assert high - low < 0.04 * expected


def test_one_token_is_exact():
    (bound,) = bounds([word("1")], 32, coin_nll, [(0,)])
    assert bound.interval == (bound.nats, bound.nats)
    assert bound.nats == pytest.approx(-math.log((0.1 + 0.8) / 2))


def test_a_file_is_the_sum_of_its_texts():
    parts = bounds([word("1010101"), word("0010")], 64, coin_nll, [(0, 1), (0, 2)])
    whole = total(parts)
    assert whole.nats == pytest.approx(sum(part.nats for part in parts))
    assert whole.variance == pytest.approx(sum(part.variance for part in parts))
    assert whole.freedom > max(part.freedom for part in parts) / 2
    exact = Bound(nats=1.0, variance=0.0, freedom=0.0)
    assert total([exact, exact]).interval == (2.0, 2.0)


def test_masks_are_stratified_and_repeat_themselves():
    scored = np.arange(40) >= 8
    draws = draw_masks(scored, 64, (3, 1))
    assert not draws.masks[:, ~scored].any()
    # Two samples for each number of the 32 tokens.
    np.testing.assert_array_equal(draws.masks.sum(axis=1), np.repeat(np.arange(1, 33), 2))
    np.testing.assert_array_equal(draws.stratum, np.repeat(np.arange(32), 2))
    np.testing.assert_array_equal(draws.masks, draw_masks(scored, 64, (3, 1)).masks)
    assert (draws.masks != draw_masks(scored, 64, (3, 2)).masks).any()
    assert (draws.masks[0::2] != draws.masks[1::2]).any(axis=1)[:-1].all()  # draws of a stratum differ
    chosen = sum(draw_masks(scored, 64, (seed,)).masks[:32].sum(axis=0) for seed in range(60))[scored]
    assert chosen.std() / chosen.mean() < 0.1  # no position is favoured


def test_few_samples_of_a_long_text():
    """Sixteen strata over 32 tokens: two numbers each, both drawn from."""
    counts = np.array([draw_masks(np.ones(32, bool), 32, (seed,)).masks.sum(axis=1) for seed in range(200)])
    for stratum in range(16):
        share = np.mean(counts[:, 2 * stratum : 2 * stratum + 2] == 2 * stratum + 1)
        assert share == pytest.approx(0.5, abs=0.1)
        assert set(np.unique(counts[:, 2 * stratum : 2 * stratum + 2])) == {2 * stratum + 1, 2 * stratum + 2}


def test_more_samples_than_a_short_text_needs():
    draws = draw_masks(np.ones(3, bool), 32, (0,))
    np.testing.assert_array_equal(np.bincount(draws.stratum), [11, 11, 10])
    np.testing.assert_array_equal(draws.masks.sum(axis=1), draws.stratum + 1)


@pytest.mark.parametrize("samples", [0, 8, 11, -2])
def test_samples_make_pairs(samples):
    with pytest.raises(ValueError, match=f"samples={samples}"):
        check_samples(samples)


def test_a_text_without_tokens():
    with pytest.raises(ValueError, match="nothing is scored"):
        Passage(tokens=np.array([1, 2]), scored=np.zeros(2, bool))
