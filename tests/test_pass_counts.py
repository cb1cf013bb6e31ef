"""What a sample says about the work of its rows: the kinds of passes, and how many of each."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest
from golden_numbers import model
from marking import slow

from dream_jax import masks
from dream_jax.model import Dream
from dream_jax.sampler import (
    BlockCache,
    PassKind,
    SamplerConfig,
    Stream,
    Threshold,
    WindowCache,
    generate,
    growth,
    loop,
)

ONE_A_PASS = SamplerConfig(max_new_tokens=12, alg="maskgit_plus", block_length=4, commit=Threshold(1.0))
CASES = {
    # 12 passes over a canvas of 20 tokens (the prompt is padded to 8).
    "none": (ONE_A_PASS, {PassKind("full", 20, 20, 2): 12}),
    "window": (
        dataclasses.replace(ONE_A_PASS, cache=WindowCache(left=2, right=1, refresh_blocks=2)),
        {PassKind("full", 20, 20, 2): 2, PassKind("window", 7, 20, 2): 10},
    ),
    "guided": (
        dataclasses.replace(ONE_A_PASS, cache=WindowCache(), guidance=1.0),
        {PassKind("full", 20, 20, 4): 3, PassKind("window", 5, 20, 4): 9},
    ),
    "block": (
        dataclasses.replace(ONE_A_PASS, cache=BlockCache(), mask=masks.BlockDiffusion(4)),
        {PassKind("first", 12, 12, 2): 1, PassKind("two blocks", 8, 20, 2): 2, PassKind("block", 4, 20, 2): 9},
    ),
}  # fmt: skip


@pytest.fixture
def computed(monkeypatch):
    """Counts the forward passes that programs make from now on, by the number of tokens: [rows, tokens] of each pass."""
    counts = collections.Counter()

    def counting(method):
        def call(dream, tokens, *arguments):
            jax.debug.callback(functools.partial(counts.update, [tokens.shape]))
            return method(dream, tokens, *arguments)

        return call

    for name in ("hidden", "hidden_and_kv_cache", "hidden_window"):
        monkeypatch.setattr(Dream, name, counting(getattr(Dream, name)))
    loop.denoise.clear_cache()
    yield counts
    loop.denoise.clear_cache()


@pytest.mark.parametrize("name", ["window", slow("none"), slow("guided"), slow("block")])
def test_kinds_are_what_the_model_computes(name, computed):
    config, wanted = CASES[name]
    prompts = np.random.default_rng(0).integers(0, 100, (2, 6)).astype(np.int32)
    out = generate(model("tiny_a"), prompts, config)
    jax.effects_barrier()
    assert out.counts.of_row(0) == out.counts.of_row(1) == wanted  # one token a pass: the rows are in step
    assert dict(zip(out.counts.kinds, np.asarray(out.counts.by_program).tolist(), strict=True)) == wanted
    assert computed == {(kind.rows, kind.queries): count for kind, count in wanted.items()}
    assert out.counts.predicted.tolist() == [3 * (4 + 3 + 2 + 1)] * 2
    assert int(out.forwards) == sum(wanted.values()) == int(out.passes[0])


def by_queries(counts):
    found = collections.Counter()
    for kind, count in counts.items():
        found[kind.name, kind.queries] += count
    return found


@pytest.mark.slow
def test_a_stream_counts_each_row(monkeypatch):
    """Rows that come and go, and a canvas that grows: each answer has the counts of the prompt alone."""
    monkeypatch.setattr(growth, "FIRST_EXTENT", 4)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [3]]
    for name in ("window", "block"):
        config = CASES[name][0]
        config = dataclasses.replace(config, commit=Threshold(0.02))
        stream = Stream(model("tiny_a"), prompts, config, batch_size=2)
        for answer in stream:
            alone = generate(model("tiny_a"), np.array([prompts[answer.prompt]]), config)
            # A row may begin on a canvas that has grown for others; it then attends to more keys, which are hidden.
            assert by_queries(answer.counts) == by_queries(alone.counts.of_row(0))
            assert sum(answer.counts.values()) == answer.passes == int(alone.passes[0])
            assert answer.predicted == int(alone.counts.predicted[0])
        assert stream.made.total() == stream.forwards
        assert len({kind.keys for kind in stream.made}) == (1 if name == "window" else 3)
