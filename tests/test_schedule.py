"""The schedule: how many tokens each step writes."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dream_jax import schedule


def published_timesteps(steps, eps):
    """float32 `linspace(1, eps, steps + 1)` as torch computes it: from the nearer end, product and sum rounded at once."""
    step = Fraction(float(np.float32(np.float32(np.float32(eps) - np.float32(1)) / np.float32(steps))))
    half, end = (steps + 1) // 2, Fraction(float(np.float32(eps)))
    exact = [1 + step * i if i < half else end - step * (steps - i) for i in range(steps + 1)]
    return [np.float32(float(t)) for t in exact]


def published_counts(masked, steps, eps):
    """The loop of the published sampler: n = int(masked * (1 - s / t)), and everything at the last step."""
    t, counts = published_timesteps(steps, eps), []
    for i in range(steps):
        share = np.float32(1) - np.float32(t[i + 1] / t[i])
        counts.append(int(np.float32(masked) * share) if i < steps - 1 else masked)
        masked -= counts[-1]
    return counts


def counts(masked, steps, eps=1e-3):
    """What the sampler writes at each step, looked up in the counts of every number that can be left."""
    fractions = jnp.asarray(schedule.write_fractions(steps, eps))
    table, found = np.asarray(schedule.write_counts(jnp.arange(masked + 1), fractions)), []
    for i in range(steps):
        found.append(int(table[masked, i]))
        masked -= found[-1]
    assert masked == 0
    return found


def test_as_many_steps_as_tokens():
    """Step 0 writes nothing, then one each, the last one two."""
    for length in (2, 8, 16, 48, 128):
        assert counts(length, length) == [0] + [1] * (length - 2) + [2]


@pytest.mark.parametrize(
    ("masked", "steps", "eps", "wanted"),
    [
        # 17 (1 - 0.8002) = 3.39; 14 (0.1998 / 0.8002) = 3.49; 11 / 3.006 = 3.66; 8 (0.1998 / 0.4006) = 3.99; the rest
        (17, 5, 1e-3, [3, 3, 3, 3, 5]),
        # 10 * 0.1665 = 1.66; 9 / 5.006 = 1.798; 8 / 4.006 = 1.997; 7 / 3.006 = 2.33; 5 / 2.006 = 2.49; the rest
        (10, 6, 1e-3, [1, 1, 1, 2, 2, 3]),
        # More steps than tokens: most write nothing.
        (2, 4, 1e-3, [0, 0, 0, 2]),
        (3, 8, 0.5, [0] * 7 + [3]),
        (9, 1, 1e-3, [9]),
        (0, 3, 1e-3, [0, 0, 0]),
    ],
)
def test_counts_worked_by_hand(masked, steps, eps, wanted):
    assert counts(masked, steps, eps) == wanted


@pytest.mark.parametrize(
    ("masked", "steps", "eps", "at", "wanted"),
    [
        (640, 500, 1e-3, 361, [2, 1]),
        (512, 1000, 1e-3, 489, [0, 1]),
        (1024, 2048, 1e-3, 1026, [0]),
        (96, 10, 0.1, 4, [9]),
        (128, 48, 0.1, 32, [2]),
    ],
)
def test_counts_recorded_from_torch(masked, steps, eps, at, wanted):
    """Where rounding the product on its own, before the sum, would move a token to another step."""
    assert counts(masked, steps, eps)[at : at + len(wanted)] == wanted


def test_timesteps_are_those_of_torch():
    torch = pytest.importorskip("torch", reason="optional parity test: pip install torch==2.13.0")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("without vector instructions torch's linspace rounds twice, and so does nothing that people run")
    for steps in (*range(1, 130), 500, 512, 1000, 2048):
        for eps in (1e-5, 1e-3, 0.1, 0.5):
            np.testing.assert_array_equal(schedule.timesteps(steps, eps), torch.linspace(1, eps, steps + 1).numpy())


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.05, 0.3])
@pytest.mark.parametrize("steps", [1, 2, 5, 64, 100, 512])
def test_counts_are_the_published_ones(steps, eps):
    np.testing.assert_array_equal(schedule.timesteps(steps, eps), np.array(published_timesteps(steps, eps), np.float32))
    for masked in (1, 2, 17, 100, 513):
        assert counts(masked, steps, eps) == published_counts(masked, steps, eps)


def test_rows_are_counted_on_their_own():
    fractions = jnp.asarray(schedule.write_fractions(5))
    together = jax.jit(schedule.write_counts)(jnp.array([12, 3, 0]), fractions)
    assert together.dtype == jnp.int32
    alone = [schedule.write_counts(jnp.array([masked]), fractions)[0] for masked in (12, 3, 0)]
    np.testing.assert_array_equal(together, np.stack(alone))
    assert together[0, 0] != together[1, 0]


@pytest.mark.parametrize("steps", [1, 2, 7, 512])
def test_timesteps_fall_from_one_to_eps(steps):
    t = schedule.timesteps(steps, 0.01)
    assert t.dtype == np.float32
    assert (t[0], t[-1], len(t)) == (1.0, np.float32(0.01), steps + 1)
    assert np.all(np.diff(t) < 0)
    np.testing.assert_allclose(t, np.linspace(1, 0.01, steps + 1), rtol=0, atol=2e-7)
    fractions = schedule.write_fractions(steps, 0.01)
    assert np.all((fractions > 0) & (fractions <= 1))
    assert fractions[-1] == 1
    with pytest.raises(ValueError, match="read-only"):
        fractions[0] = 0.5  # cached: shared by all callers


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_out_of_range_raise(steps):
    with pytest.raises(ValueError, match=f"steps={steps} must be at least 1"):
        schedule.timesteps(steps)


@pytest.mark.parametrize("eps", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_eps_out_of_range_raises(eps):
    with pytest.raises(ValueError, match=f"eps={eps} (is outside|must be a finite)"):
        schedule.write_fractions(4, eps)
