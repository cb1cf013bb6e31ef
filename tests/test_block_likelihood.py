"""Likelihood and held-out score under block diffusion: the sum over blocks after a clean past, never that of one stream."""

import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest
from commands import run_script
from flax import nnx

import dream_jax
from dream_jax import masks, sharding
from dream_jax.batch import Batch
from dream_jax.evaluation.likelihood import Passage, block_bounds, block_nll, model_bounds, model_nll
from dream_jax.objective import UniformWeight, masked_diffusion_loss
from dream_jax.tokenizer import ByteTokenizer
from dream_jax.trainer.heldout import LEVELS, Grid

# Three coins of different kinds; each word has one coin, so that its letters depend on one another.
HEADS = np.array([0.1, 0.5, 0.9])


def posterior(letters):
    """The probability that the next letter is 1, after some letters."""
    chances = np.prod([np.where(letter == 1, HEADS, 1 - HEADS) for letter in letters], axis=0) * np.ones(3)
    return float(np.sum(chances * HEADS) / np.sum(chances))


def truth(tokens):
    return -math.log(np.mean(np.prod([np.where(letter == 1, HEADS, 1 - HEADS) for letter in tokens], axis=0)))


def coin_nll(size):
    """The exact cross entropies of masked letters, which see earlier blocks and the unmasked letters of their block.

    The first letter of a block sees only earlier blocks, as with the right shift.
    """

    def nll(rows):
        found = []
        for passage, masked in rows:
            out = np.zeros(len(masked))
            for place in np.flatnonzero(masked):
                start = place - place % size
                block = [other for other in range(start, min(start + size, len(masked))) if not masked[other]]
                seen = [*range(start), *([] if place == start else block)]
                one = posterior(passage.tokens[seen])
                out[place] = -math.log(one if passage.tokens[place] == 1 else 1 - one)
            found.append(out)
        return found

    return nll


def word(letters):
    tokens = np.array([int(letter) for letter in letters])
    return Passage(tokens=tokens, scored=np.ones(len(tokens), bool))


def test_the_bound_of_a_known_distribution_is_its_likelihood():
    words = [word(letters) for letters in ("1101111", "0000", "1", "110")]
    for size in (1, 3, 4, 16):
        found = block_bounds(words, 600, coin_nll(size), [(0, number) for number in range(4)], size=size)
        for one, bound in zip(words, found, strict=True):
            assert abs(bound.nats - truth(one.tokens)) <= 4 * bound.variance**0.5 + 1e-9
            assert size > 1 or bound.variance == 0
        # All sets of letters of this word are alike, so that nothing is random.
        assert found[1].variance < 1e-20
    # The draws of a block depend on the passage's seed alone, not on what is scored beside it.
    assert block_bounds(words[:1], 10, coin_nll(3), [(0, 0)], size=3) == block_bounds(
        words, 10, coin_nll(3), [(0, number) for number in range(4)], size=3
    )[:1]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """One layer with random weights, larger than those that training begins with."""
    config = dataclasses.replace(dream_jax.PRESETS["nano"], num_hidden_layers=1)
    made = jax.jit(lambda: dream_jax.Dream(config, rngs=nnx.Rngs(0)))()
    made.lm_head.kernel[...] = 10 * made.lm_head.kernel[...]
    return made


def under(model, name):
    model.trained_mask = name
    return model


def passages():
    """Two rows of different lengths, with prompts of different lengths."""
    generator = np.random.default_rng(3)
    rows = []
    for length, prompt in ((13, 4), (11, 3)):
        rows.append(Passage(tokens=generator.integers(0, 200, length), scored=np.arange(length) >= prompt))
    return rows


def single_row(model, passage, masked, first, end):
    """The cross entropies of one block, computed in one stream: [clean past | noised block | what it cannot see]."""
    tokens, block = passage.tokens[None].astype(np.int32), masked[None].copy()
    block[:, :first] = block[:, end:] = False
    mask = masks.parse(model.trained_mask).for_rows(np.ones(tokens.shape, bool), passage.scored[None])
    _, aux = masked_diffusion_loss(model, tokens, block, np.float32([0.5]), UniformWeight(), mask=mask)
    return np.asarray(aux["token_nll"])[0, first:end]


def test_blocks_of_one_token_give_the_autoregressive_likelihood(model):
    """Against plain autoregressive cross entropies: the prompt is seen by all, and the answer is causal."""
    rows = passages()
    found = model_bounds(under(model, "block-diffusion:1"), ByteTokenizer(), 4)(rows, 10, [(0,), (1,)])
    for passage, bound in zip(rows, found, strict=True):
        tokens, scored = passage.tokens[None].astype(np.int32), passage.scored[None]
        mask = masks.Prefix().for_rows(np.ones(tokens.shape, bool), scored)
        logits = np.asarray(model(tokens, mask), np.float64)[0]
        log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        places = np.flatnonzero(passage.scored)
        expected = -sum(log_p[place - 1, passage.tokens[place]] for place in places)
        assert bound.nats == pytest.approx(expected, rel=1e-5) and bound.variance == 0
        assert bound.interval == (bound.nats, bound.nats)


@pytest.mark.slow
def test_the_bound_of_blocks_is_that_of_single_rows(model):
    """Each token as in a row of its own; and all sets of masked tokens of a block, weighted as the module says."""
    rows, size = passages()[:1], 4
    nll = block_nll(under(model, f"block-diffusion:{size}"), ByteTokenizer(), 4)
    generator = np.random.default_rng(0)
    drawn = [(one, one.scored & (generator.random(len(one.tokens)) < 0.6)) for one in rows]
    starts = [range(int(np.argmax(one.scored)), len(one.tokens), size) for one in rows]
    for (one, masked), found, blocks in zip(drawn, nll(drawn), starts, strict=True):
        for first in blocks:
            end = min(first + size, len(one.tokens))
            np.testing.assert_allclose(found[first:end], single_row(model, one, masked, first, end), atol=1e-4)
    passage, expected, all_sets = rows[0], 0.0, []
    for first in starts[0]:
        rest = range(first + 1, min(first + size, len(passage.tokens)))
        for count in range(1, len(rest) + 1):
            chosen = list(itertools.combinations(rest, count))
            all_sets += [(one, len(rest) / count / len(chosen) / len(rest)) for one in chosen]
    width = np.arange(len(passage.tokens))
    values = nll([(passage, np.isin(width, one)) for one, _ in all_sets])
    expected += sum(weight * value.sum() for (_, weight), value in zip(all_sets, values, strict=True))
    expected += nll([(passage, np.isin(width, starts[0]))])[0].sum()
    (bound,) = model_bounds(model, ByteTokenizer(), 64)([passage], 512, [(0,)])
    assert bound.variance > 0 and abs(bound.nats - expected) < 4 * bound.variance**0.5
    assert bound.variance**0.5 < 0.01 * expected


def test_what_has_no_such_likelihood_is_refused(model):
    rows, tokenizer = passages(), ByteTokenizer()
    under(model, "block-diffusion:4")
    with pytest.raises(ValueError, match="'block-diffusion:4' needs two streams.*call model_bounds"):
        model_nll(model, tokenizer, 2)
    infilling = Passage(tokens=rows[0].tokens, scored=np.arange(13) == 6)
    with pytest.raises(
        ValueError, match="6 tokens after the first scored token are not scored.*leave out the text after"
    ):
        model_bounds(model, tokenizer, 2)([infilling], 10, [(0,)])
    # The first token would be predicted from its own position, which sees the rest of the block: that is no bound.
    with pytest.raises(ValueError, match="put the beginning-of-text token before the passage"):
        model_bounds(model, tokenizer, 2)([word("110")], 10, [(0,)])
    with pytest.raises(ValueError, match="samples=7 must be"):
        model_bounds(model, tokenizer, 2)(rows, 7, [(0,), (1,)])
    with pytest.raises(ValueError, match="under the mask 'causal', not by block diffusion"):
        block_nll(under(model, "causal"), tokenizer, 2)


@pytest.mark.slow
def test_the_held_out_grid_has_a_clean_past(model):
    rows, width, size = passages(), 13, 4
    tokens_RT, maskable_RT, valid_RT = (np.zeros((2, width), kind) for kind in (np.int32, bool, bool))
    for number, one in enumerate(rows):
        tokens_RT[number, -len(one.tokens) :], valid_RT[number, -len(one.tokens) :] = one.tokens, True
        maskable_RT[number, -len(one.tokens) :] = one.scored
    batch = Batch(tokens_BT=tokens_RT, maskable_BT=maskable_RT, row_B=np.arange(2, dtype=np.int32), valid_BT=valid_RT)
    grid = Grid(batch, 2, sharding.make_mesh("1x1"))
    score = grid.score(under(model, f"block-diffusion:{size}"))
    drawn = [(one, masked[number, -len(one.tokens) :]) for masked in grid.masked_LRT for number, one in enumerate(rows)]
    found = block_nll(model, ByteTokenizer(), 2)(drawn)
    assert len(grid.masked_LRT) == len(LEVELS) and score.num_masked == grid.masked_LRT.sum()
    assert score.nll == pytest.approx(sum(map(np.sum, found)) / score.num_masked, rel=1e-5)
    low, high = (sum(map(np.sum, found[part])) for part in (slice(0, 4), slice(12, 16)))
    counts = grid.masked_LRT.sum((1, 2))
    assert score.nll_by_time[0] == pytest.approx(low / counts[:2].sum(), rel=1e-5)
    assert score.nll_by_time[3] == pytest.approx(high / counts[6:].sum(), rel=1e-5)


@pytest.mark.slow
def test_evaluate_command(model, tmp_path):
    """Texts and choices of a saved model: the numbers of `model_bounds`, for blocks of one token without an interval."""
    tokenizer = ByteTokenizer()
    tokenizer.save(tmp_path)
    texts = [{"text": "12 and 7", "before": "3+4"}, {"text": "hello"}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (tmp_path / "infill.jsonl").write_text(json.dumps({"text": "a", "before": "b", "after": "c"}) + "\n")
    choice = {"question": "2 + 2?", "choices": ["three", "4"], "answer": 1}
    (tmp_path / "choices.jsonl").write_text(json.dumps(choice) + "\n")
    for size in (1, 3):
        dream_jax.save(under(model, f"block-diffusion:{size}"), tmp_path / f"model{size}", tokenizer_dir=tmp_path)

    def evaluate(task, file, size):
        out = tmp_path / f"{task}{size}{file}"
        command = ("evaluate.py", "--model", tmp_path / f"model{size}", "--task", task, "--file", tmp_path / file)
        ran = run_script(*map(str, command), "--samples", "10", "--batch-size", "4", "--out", str(out))
        return ran, [
            json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()
        ] if not ran.returncode else []

    for size in (1, 3):
        ran, rows = evaluate("likelihood", "texts.jsonl", size)
        assert ran.returncode == 0, ran.stderr
        under(model, f"block-diffusion:{size}")
        for number, (row, text) in enumerate(zip(rows, texts, strict=True), 1):
            before = tokenizer.encode(text.get("before", "")) or [tokenizer.bos_id]
            tokens = np.array([*before, *tokenizer.encode(text["text"])])
            passage = Passage(tokens=tokens, scored=np.arange(len(tokens)) >= len(before))
            (bound,) = model_bounds(model, tokenizer, 4)([passage], 10, [(0, number)])
            assert row["nats"] == pytest.approx(bound.nats, rel=1e-5)
            assert (row["variance"] == 0) == (size == 1)
        ran, rows = evaluate("choice", "choices.jsonl", size)
        assert ran.returncode == 0 and (rows[0]["standard_errors"] == [0, 0]) == (size == 1)
    ran, _ = evaluate("likelihood", "infill.jsonl", 3)
    assert ran.returncode == 1 and "infilling: leave out the text after it" in ran.stderr
