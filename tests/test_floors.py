"""The floors of countdown: contexts are those of the masks, probabilities those of the task, and the numbers are known."""

import math
from pathlib import Path

import numpy as np
import pytest

from dream_jax import masks
from dream_jax.side_files import read_csv
from mask_study import TASKS, floors
from mask_study.floors import Context

ROOT = Path(__file__).parents[1]
TASK = TASKS["countdown"]


def seen(found):
    """The tokens of each context, as texts: `#` is always visible, `~` when it is not masked, `.` never."""
    width = len(found)
    sign = lambda one, token: "#" if one.known >> token & 1 else "~" if one.noised >> token & 1 else "."
    return [" ".join("".join(sign(one, token) for token in range(width)) for one in found)]


@pytest.mark.parametrize(
    ("mask", "options", "drawn"),
    [
        (masks.Bidirectional(), {}, ".~~~ ~.~~ ~~.~ ~~~."),
        (masks.Causal(), {}, ".... ~... ~~.. ~~~."),
        (masks.Causal(), {"shift": False}, ".... ~... ~~.. ~~~."),
        # With the shift the first token of a block is predicted from the block before.
        (masks.BlockCausal(2), {}, ".... ~... ~~.. ~~~."),
        (masks.BlockCausal(2), {"shift": False}, ".~.. ~... ~~.~ ~~~."),
        # One layer of this window shows one token to each side, many layers show all.
        (masks.SlidingWindow(1, 1), {}, ".~~~ ~.~~ ~~.~ ~~~."),
        (masks.TwoStream(1), {"block": 1}, ".... #... ##.. ###."),
        (masks.TwoStream(2), {"block": 2}, ".... ~... ##.. ##~."),
        (masks.TwoStream(2), {"block": 2, "shift": False}, ".~.. ~... ##.~ ##~."),
    ],
    ids=str,
)
def test_contexts(mask, options, drawn):
    assert seen(floors.contexts(mask, 2, 4, **options)) == [drawn]


def test_contexts_that_cannot_be():
    with pytest.raises(ValueError, match="token 0 is predicted from a state that sees its clean value"):
        floors.contexts(masks.Bidirectional(), 2, 4, block=2)
    with pytest.raises(ValueError, match="give a prompt"):
        floors.contexts(masks.Causal(), 0, 4)


def test_the_first_token_of_a_block_is_known_to_the_others():
    found = floors.first_tokens_known([Context(known=0, noised=0b1110), Context(known=0, noised=0b1101)], 4)
    assert [(one.known, one.noised) for one in found] == [(0, 0b1110), (0b0001, 0b1100)]


def test_answers_are_those_that_the_task_draws():
    examples = TASK.examples("test", 0, 400)
    found = [floors.answers(TASK, example.prompt) for example in examples]
    for example, probabilities in zip(examples, found, strict=True):
        assert math.fsum(probabilities.values()) == pytest.approx(1) and probabilities[example.answer] > 0
        assert all(TASK.is_right(example, answer) for answer in probabilities)
    # The mean of - log p over drawn answers is near the mean of their entropies.
    nats = [-math.log(one[example.answer]) for example, one in zip(examples, found, strict=True)]
    entropies = [-sum(p * math.log(p) for p in one.values()) for one in found]
    assert np.mean(nats) == pytest.approx(np.mean(entropies), abs=0.1)
    with pytest.raises(ValueError, match="no prompt '111>009:'"):
        floors.answers(TASK, "111>009:")


def test_nats_of_sets_are_sums_over_answers():
    examples = TASK.examples("test", 0, 12)
    generator = np.random.default_rng(0)
    for members, nats_S in floors.subset_nats(TASK, examples):
        for index in members:
            example = examples[index]
            for chosen in generator.integers(0, 2**16, 20):
                agrees = lambda other, answer=example.answer, chosen=int(chosen): all(
                    x == y for token, (x, y) in enumerate(zip(answer, other, strict=True)) if chosen >> token & 1
                )
                p = sum(p for answer, p in floors.answers(TASK, example.prompt).items() if agrees(answer))
                assert nats_S[chosen] == pytest.approx(-math.log(p), abs=1e-9)


def test_the_floors_of_countdown():
    found = {row["model"]: row for row in floors.floors(TASK)}
    exact = {name: row["nats_an_answer"] for name, row in found.items()}
    # Any order, one after the other or all together: the entropy of the answer. Two streams reach it if the first token of
    # a block is written first, because with the shift its prediction does not see the other tokens of the block.
    two = {name for name in found if name.startswith("two streams")}
    tight = {name for name in two if name.endswith(("blocks of 1", "first token first", "unshifted"))}
    assert len(tight) == 9 and len(two) == 13
    for name in ("bidirectional", *tight):
        assert exact[name] == pytest.approx(1.7624, abs=1e-4)
    assert exact["causal"] == pytest.approx(3.502, abs=1e-3)
    assert exact["block-causal:4, unshifted"] == pytest.approx(2.881, abs=1e-3)
    assert exact["block-causal:4"] == pytest.approx(3.321, abs=1e-3)
    assert exact["two streams, blocks of 4"] == pytest.approx(2.021, abs=1e-3)
    assert exact["two streams, blocks of 16"] == pytest.approx(2.275, abs=1e-3)
    eight = {name: row["on_eight_levels"] for name, row in found.items()}
    assert eight["causal"] == pytest.approx(3.49, abs=5e-3)
    assert eight["block-causal:4, unshifted"] == pytest.approx(2.87, abs=5e-3)
    grid = {name: row["nats_a_token_on_grid"] for name, row in found.items()}
    assert grid["bidirectional"] == pytest.approx(0.160, abs=5e-4)
    assert grid["causal"] == pytest.approx(0.266, abs=5e-4)
    assert grid["block-causal:4"] == pytest.approx(0.256, abs=5e-4)
    for row in read_csv(ROOT / "docs" / "study" / "floors.csv", ("model",), "python -m mask_study.floors"):
        made = found.pop(row["model"])
        for key, value in row.items():
            if key != "model":
                assert float(value) == pytest.approx(made[key], rel=1e-5, nan_ok=True)
    assert not found


def test_floors_of_variants():
    """0 where the prompt determines the answer, countdown's from the table, and none where a window hides the prompt."""
    rows = read_csv(ROOT / "docs" / "study" / "floors.csv", ("model",), "python -m mask_study.floors")
    assert floors.floor_of("sudoku", "causal", "all", rows) == 0.0
    assert floors.floor_of("countdown", "prefix", "all", rows) == floors.floor_of("countdown", "causal", "all", rows)
    parts = [f"{part / 4} <= t < {(part + 1) / 4}" for part in range(4)]
    found = [floors.floor_of("countdown", "bidirectional", part, rows) for part in parts]
    assert found == sorted(found) and found[0] < floors.floor_of("countdown", "bidirectional", "all", rows) < found[-1]
    for task, variant in (("sudoku", "window:4"), ("countdown", "uniform weight"), ("chess", "causal")):
        assert floors.floor_of(task, variant, "all", rows) is None
    assert floors.floor_of("countdown", "causal", "all", ()) is None
