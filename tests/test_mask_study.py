"""The study of masks: its tasks and judges, what differs between variants, and that its numbers mean what they say."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run_script

from dream_jax import masks
from dream_jax.sampler import SamplerConfig, generate
from mask_study import (
    TASKS,
    VARIANTS,
    Study,
    StudyPlan,
    Variant,
    costs,
    differences,
    figures,
    inspection,
    read_rows,
    summarise,
    tables,
    tasks,
    training,
)
from mask_study.caching import cached_against_computed
from mask_study.measures import write_in_order
from mask_study.tasks import END, Example
from mask_study.variants import MASKS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("task", TASKS.values(), ids=str)
def test_tasks_answer_themselves(task):
    train, test = task.examples("train", 3, 300), task.examples("test", 0, 200)
    for example in train + test:
        assert len(example.prompt) == task.prompt_width and len(example.answer) == task.answer_width
        assert task.is_right(example, example.answer)
    assert task.prompt_width % 4 == task.answer_width % 4 == 0
    assert not {one.prompt for one in train} & {one.prompt for one in test}
    assert train == task.examples("train", 3, 300) and train != task.examples("train", 4, 300)
    assert test == task.examples("test", 9, 200)  # the same for every seed
    words = training.tokenizer()
    tokens = training.rows_of(train, words)
    assert tokens.shape == (300, task.prompt_width + task.answer_width)
    assert training.decode(tokens[0], words) == "".join(train[0])


@pytest.mark.parametrize(
    ("task", "prompt", "answer", "right"),
    [
        ("addition", "345+678=", "1023", True),
        ("addition", "345+678=", "1024", False),
        ("addition", "345+678=", "0123", False),
        ("addition", "345+678=", "102$", False),
        ("copy", "abcdefghijk>", "abcdefghijk$", True),
        ("copy", "abcdefghijk>", "abcdefghijka", False),
        ("copy", "abcdefghijk>", "abcdefghij$$", False),
        ("reversal", "abcdefghijk<", "kjihgfedcba$", True),
        ("reversal", "abcdefghijk<", "abcdefghijk$", False),
        ("countdown", "352>006:", "3+5=8,8-2=6$$$$$", True),
        ("countdown", "352>006:", "5-2=3,3+3=6$$$$$", True),  # another way
        ("countdown", "352>006:", "3+5=8,8-2=6$x9$$", True),  # what follows the end counts for nothing
        ("countdown", "352>006:", "3+5=8,8-2=7$$$$$", False),  # wrong result
        ("countdown", "352>007:", "3+5=8,8-2=6$$$$$", False),  # wrong target
        ("countdown", "352>006:", "3+5=9,9-3=6$$$$$", False),  # a number that is not there
        ("countdown", "352>006:", "3+3=6,6+0=6$$$$$", False),  # a number twice
        ("countdown", "352>006:", "8-2=6$$$$$$$$$$$", False),  # one step
        ("countdown", "352>006:", "3+5=08,08-2=6$$$", False),  # a leading zero
        ("countdown", "352>006:", "3+5=8,8-2=6,6$$$", False),
        ("countdown", "352>008:", "3+5=8,2+6=8$$$$$", False),
        ("countdown", "352>006:", "hello$$$$$$$$$$$", False),
    ],
)
def test_judges(task, prompt, answer, right):
    known = {"addition": "1023", "copy": "abcdefghijk$", "reversal": "kjihgfedcba$", "countdown": "3+5=8,8-2=6$$$$$"}
    assert TASKS[task].is_right(Example(prompt, known[task]), answer) == right


def test_variants_begin_alike():
    models = [VARIANTS[name].model(seed=4) for name in ("bidirectional", "causal", "bidirectional, unshifted")]
    leaves = [jax.tree.leaves(model) for model in models]
    for other in leaves[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(leaves[0], other, strict=True))
    with pytest.raises(ValueError, match="triangular"):
        Variant(name="x", mask="triangular")
    with pytest.raises(ValueError, match="heavy"):
        Variant(name="x", weight="heavy")


def test_in_place_predicts_from_its_own_state():
    shifted, in_place = VARIANTS["bidirectional"].model(0), VARIANTS["bidirectional, unshifted"].model(0)
    tokens = np.random.default_rng(0).integers(0, 200, (2, 12)).astype(np.int32)
    # What a sampler takes for position i, the logits at i - 1, are those of the plain model at i.
    np.testing.assert_array_equal(in_place(tokens)[:, :-1], shifted(tokens)[:, 1:])


def test_hidden_pads_are_neither_seen_nor_learned():
    task, words = TASKS["countdown"], training.tokenizer()
    tokens = training.rows_of([Example("352>006:", "3+5=8,8-2=6$$$$$")], words)
    maskable, valid = training.learned(tokens, task, VARIANTS["pads hidden"], words)
    assert valid[0].tolist() == [True] * 20 + [False] * 4  # prompt, answer and its first end
    assert maskable[0].tolist() == [False] * 8 + [True] * 12 + [False] * 4
    maskable, valid = training.learned(tokens, task, VARIANTS["bidirectional"], words)
    assert valid.all() and maskable[0].tolist() == [False] * 8 + [True] * 16


@pytest.mark.slow
def test_training_learns_and_repeats():
    run = lambda mask: training.train(TASKS["addition"], VARIANTS[mask], 0, 12, batch=16)
    causal, bidirectional = run("causal"), run("bidirectional")
    for found in (causal, bidirectional):
        assert found.nll[-1] < found.nll[0] and math.isfinite(found.nll[-1])
    assert run("causal").nll == causal.nll
    # The same rows and noise: under another mask only the model differs.
    assert causal.nll != bidirectional.nll and causal.nll[0] == pytest.approx(bidirectional.nll[0], rel=0.05)
    assert causal.model.trained_mask == "causal"


@pytest.fixture(scope="module")
def models():
    """Random weights, larger than those that training begins with, so that tokens differ."""
    found = {mask: VARIANTS[mask].model(1) for mask in MASKS}
    for model in found.values():
        model.lm_head.kernel[...] = 10 * model.lm_head.kernel[...]
    return found


@pytest.mark.slow
def test_left_to_right_is_the_samplers(models):
    words, task = training.tokenizer(), TASKS["countdown"]
    prompts = training.rows_of([Example(one.prompt, "") for one in task.examples("test", 0, 8)], words)
    forward = np.broadcast_to(np.arange(16), (8, 16))
    for model in models.values():
        config = SamplerConfig(
            max_new_tokens=16, alg="entropy", steps=16, block_length=1, vocab_limit=words.vocab_limit,
            forbidden_tokens=(words.mask_id,),
        )  # fmt: skip
        expected = generate(model, prompts, config).tokens
        np.testing.assert_array_equal(write_in_order(model, prompts, forward, words), expected)
    with pytest.raises(ValueError, match="each of 16 positions"):
        write_in_order(model, prompts, forward * 0, words)


@pytest.mark.slow
def test_keys_may_be_kept_where_nothing_later_is_seen(models):
    """Equal logits under the masks that look ahead no further than their block, and an error that is seen elsewhere."""
    task = TASKS["countdown"]
    rows = training.rows_of(task.examples("test", 0, 16), training.tokenizer())
    found = {mask: cached_against_computed(one, rows, task.prompt_width) for mask, one in models.items()}
    for mask in ("causal", "prefix", "block-causal:4"):
        assert found[mask].largest < 2e-5 and found[mask].agreement == 1.0 and found[mask].divergence < 1e-6
    for mask in ("bidirectional", "window:4"):
        assert found[mask].largest > 1e-3
    assert found["causal"].computed == pytest.approx(8 / 24)
    with pytest.raises(ValueError, match="multiples of block=4"):
        cached_against_computed(models["causal"], rows, 6)
    with pytest.raises(ValueError, match="its own hidden state"):
        cached_against_computed(VARIANTS["bidirectional, unshifted"].model(0), rows, 8)


def test_summary_intervals():
    base = {"task": "copy", "variant": "causal", "of": "random", "passes": 4.0, "test_rows": 256}
    rows = [base | {"seed": seed, "measure": "nll", "value": value} for seed, value in enumerate((1.0, 2.0, 3.0))]
    rows += [base | {"seed": seed, "measure": "accuracy", "value": 1.0} for seed in range(3)]
    nll, accuracy = summarise(rows)
    assert nll["mean"] == 2.0 and nll["high"] - 2.0 == pytest.approx(4.302652729749 / math.sqrt(3))
    assert accuracy["high"] == 1.0 and accuracy["low"] == pytest.approx(256 / (256 + 1.96**2), rel=1e-3)
    (single,) = summarise(rows[:1])
    assert math.isnan(single["low"]) and single["seeds"] == 1


def test_plan_refuses():
    for options, told in (
        ({"tasks": ("chess",)}, "chess"),
        ({"variants": ("diagonal",)}, "diagonal"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"length": 0.0}, "length=0.0 is outside"),
        ({"test_rows": 5000}, "5000"),
    ):
        with pytest.raises(ValueError, match=told):
            StudyPlan(**{"tasks": ("copy",), "variants": ("causal",)} | options)


@pytest.mark.slow
def test_command_resumes_where_it_was_stopped(tmp_path):
    """Two runs by two processes; one is taken away and made again, the same; the other is not touched."""
    command = [
        sys.executable,
        "study.py",
        "--out",
        str(tmp_path),
        "--tasks",
        "addition",
        "--variants",
        "causal",
        "prefix",
    ]
    command += ["--seeds", "1", "--length", "0.02", "--test-rows", "8", "--processes", "2"]
    environment = os.environ | {"COLUMNS": "200"}

    def run(*more):
        done = subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    code, told = run()
    assert code == 0, told
    files = sorted((tmp_path / "runs").glob("*.json"))
    assert [file.name for file in files] == ["addition-causal-seed-0.json", "addition-prefix-seed-0.json"]
    first, kept = json.loads(files[0].read_text()), files[1].stat().st_mtime_ns
    files[0].unlink()
    code, told = run("--processes", "1")
    assert code == 0 and "1 of them to make" in told, told
    again = json.loads(files[0].read_text())
    assert again["measured"] == first["measured"] and again["training_nll"] == first["training_nll"]
    assert files[1].stat().st_mtime_ns == kept
    rows = read_rows(tmp_path / "results.csv")
    assert {row["variant"] for row in rows} == {"causal", "prefix"}
    accuracies = {row["of"] for row in rows if row["measure"] == "accuracy"}
    assert {"random", "confidence", "left to right", "right to left", "in 1 passes", "all above 0.9"} <= accuracies
    refused = run_script(*command[1:], "--length", "0.04")  # the last one counts
    assert refused.returncode == 1 and "give another --out" in " ".join(refused.stderr.split()), refused


# Looking inside


def looked_at(model, rows, masked):
    values = inspection.attention_statistics(model, rows, masked)
    return {name: values[..., number] for number, name in enumerate(inspection.STATISTICS)}


def some_rows(rows=2, length=12, prompt=4, pads=0):
    tokens = np.random.default_rng(1).integers(0, 200, (rows, length)).astype(np.int32)
    position = np.broadcast_to(np.arange(length), tokens.shape)
    return inspection.InspectedRows(tokens, position < prompt, position < length - pads)


def test_even_attention():
    """Queries of zero attend evenly: every statistic is then known."""
    model = VARIANTS["bidirectional"].model(0)
    model.layers.attn.q.kernel[...] = jnp.zeros_like(model.layers.attn.q.kernel[...])
    rows = some_rows()
    masked = rows.tokens_BT.astype(bool) & (np.arange(12) >= 8)
    found = looked_at(model, rows, masked)
    np.testing.assert_allclose(found["entropy"], math.log(12), rtol=1e-5)
    np.testing.assert_allclose(found["entropy share"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(found["prompt"], 4 / 12, rtol=1e-5)
    np.testing.assert_allclose(found["masked"], 4 / 12, rtol=1e-5)
    np.testing.assert_allclose(found["first"], 1 / 12, rtol=1e-5)
    np.testing.assert_allclose(found["itself"], 1 / 12, rtol=1e-5)
    queries = np.arange(8, 12)
    ahead = np.arange(12)[None] - queries[:, None]
    np.testing.assert_allclose(found["distance"][:, :, 1], np.abs(ahead).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["offset"][:, :, 1], ahead.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["right"][:, :, 1], (ahead > 0).mean(), rtol=1e-5)


def test_causal_never_looks_right_and_pads_are_not_seen():
    rows = some_rows(pads=3)
    masked = rows.valid_BT & (np.arange(12) >= 6)
    causal = looked_at(VARIANTS["causal"].model(0), rows, masked)
    assert np.all(causal["right"] == 0.0) and np.all(causal["offset"] <= 0.0)
    # Other tokens in the padding change nothing.
    other = inspection.InspectedRows(np.where(rows.valid_BT, rows.tokens_BT, 7), *rows[1:])
    model = VARIANTS["bidirectional"].model(0)
    for name, value in looked_at(model, rows, masked).items():
        np.testing.assert_array_equal(value, looked_at(model, other, masked)[name])


def test_hidden_states_are_the_models(monkeypatch):
    """In chunks of queries too, and against probabilities formed all at once."""
    monkeypatch.setattr(inspection, "_CHUNK", 5)
    inspection._statistics.clear_cache()
    model, rows = VARIANTS["block-causal:4"].model(2), some_rows()
    masked = np.arange(12) >= rows.tokens_BT[:, :1] % 4 + 5
    _, counts, hidden = inspection._statistics(model, *rows, masked)
    assert counts.tolist() == [8, masked.sum(), 16 - masked.sum()]
    noisy = np.where(masked, model.config.mask_token_id, rows.tokens_BT)
    positions = jnp.broadcast_to(jnp.arange(12), noisy.shape)
    np.testing.assert_allclose(hidden, model.hidden(jnp.asarray(noisy), masks.BlockCausal(4), positions), atol=1e-5)
    chunked = looked_at(model, rows, masked)
    monkeypatch.undo()
    inspection._statistics.clear_cache()
    for name, value in looked_at(model, rows, masked).items():
        np.testing.assert_allclose(chunked[name], value, rtol=1e-4, atol=1e-6)


def test_block_diffusion_reads_clean_blocks():
    """Queries of zero attend evenly, so a masked token attends 1/n to each of the n tokens of its block and before it."""
    model, rows = VARIANTS["bidirectional"].model(0), some_rows()
    model.trained_mask = "block-diffusion:4"  # blocks: the prompt 0..3, then 4..7 and 8..11
    model.layers.attn.q.kernel[...] = jnp.zeros_like(model.layers.attn.q.kernel[...])
    masked = np.broadcast_to(np.arange(12) >= 6, rows.tokens_BT.shape)  # half of the first block, all of the second
    found = looked_at(model, rows, masked)
    # Two queries see 4 + 4 tokens, 2 of them masked. Four see 8 clean tokens and the 4 masked ones of their block.
    np.testing.assert_allclose(found["masked"][:, :, 1], (2 * 2 / 8 + 4 * 4 / 12) / 6, rtol=1e-5)
    np.testing.assert_allclose(found["prompt"][:, :, 1], (2 * 4 / 8 + 4 * 4 / 12) / 6, rtol=1e-5)
    model, masked = VARIANTS["bidirectional"].model(1), np.array(masked)
    model.trained_mask = "block-diffusion:4"
    _, counts, hidden = inspection._statistics(model, *rows, masked)
    assert counts.tolist() == [8, 12, 4]
    noisy, positions = np.where(masked, model.config.mask_token_id, rows.tokens_BT), np.arange(12)[None].repeat(2, 0)
    mask = masks.BlockDiffusion(4).for_rows(rows.valid_BT, ~rows.prompt_BT)
    of_model = model.hidden_two_streams(*map(jnp.asarray, (noisy, rows.tokens_BT)), mask, jnp.asarray(positions))
    # The model returns shifted states; those of tokens inside a block come from the noised stream.
    np.testing.assert_allclose(hidden[:, 8:11], of_model[:, 9:12], atol=1e-5)


def test_too_long_rows_are_refused():
    model = VARIANTS["bidirectional"].model(0)
    rows = some_rows(length=2052)
    with pytest.raises(ValueError, match="2052"):
        inspection.attention_statistics(model, rows, np.zeros(rows.tokens_BT.shape, bool))


def test_inspect_command(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    command = ("study.py", "--inspect", "nano", "--rows", "4", "--out", tmp_path)
    done = run_script(*command)
    assert done.returncode == 0 and "random weights" in done.stdout, done.stdout + done.stderr
    lines = (tmp_path / "attention.csv").read_text().splitlines()
    assert lines[0].startswith("t,layer,head,queries,entropy") and len(lines) > 4 * 4 * 8 * 2
    done = run_script(*command)
    assert done.returncode == 1 and "give another --out" in done.stderr


def test_scattered_cells_share_nothing():
    """Blocks of four cells have one of each row, column and box; the puzzles are the others'."""
    plain, scattered = (TASKS[name].examples("test", 0, 20) for name in ("sudoku", "scattered sudoku"))
    cells = tasks._SCATTERED
    for block in range(0, 16, 4):
        here = cells[block : block + 4]
        for unit in (lambda cell: cell // 4, lambda cell: cell % 4, lambda cell: cell // 8 * 2 + cell % 4 // 2):
            assert {unit(cell) for cell in here} == {0, 1, 2, 3}
    for one, other in zip(plain, scattered, strict=True):
        for text, moved in zip(one, other, strict=True):
            assert [text[cell] for cell in cells] == list(moved) and sorted(cells) == list(range(16))


def test_differences_are_taken_seed_by_seed():
    """Two variants that go up and down together differ by little, however far their seeds are apart."""
    shared = {"task": "t", "measure": "nll", "of": "all", "test_rows": 9, "passes": 0}
    values = {"bidirectional": (1.0, 5.0, 3.0), "causal": (1.1, 5.2, 3.3), "prefix": (2.0,)}
    rows = [
        shared | {"variant": name, "seed": seed, "value": value}
        for name, column in values.items()
        for seed, value in enumerate(column)
    ]
    (back, found) = differences(
        [*rows, shared | {"measure": "kept keys", "variant": "causal", "seed": 0, "value": 1.0}]
    )
    assert (back["variant"], back["minus"], back["mean"]) == ("bidirectional", "causal", -found["mean"])
    assert (found["variant"], found["minus"], found["seeds"]) == ("causal", "bidirectional", 3) and found[
        "mean"
    ] == pytest.approx(0.2)
    # Student's t of two degrees of freedom.
    assert found["high"] - found["mean"] == pytest.approx(4.302652729749 * 0.1 / math.sqrt(3))
    assert found["mean"] - found["low"] == pytest.approx(found["high"] - found["mean"])


def test_end_mark_is_no_letter_of_a_task():
    for task in TASKS.values():
        assert not any(END in one.prompt for one in task.examples("test", 0, 100))


@pytest.mark.slow
def test_costs(monkeypatch):
    monkeypatch.setattr(costs, "TOKENS", 16)
    monkeypatch.setattr(costs, "NEW", 4)
    monkeypatch.setattr(costs, "BLOCK", 2)
    monkeypatch.setattr(costs, "_REPEATS", 1)
    (window,) = costs.costs(["window:4"])
    assert window["pairs"] == pytest.approx((16 * 9 - 20) / 256)
    assert (
        min(window["step_temp_mib"], *(window[f"{kind}_seconds"] for kind in ("step", "sample", "sample_cached"))) > 0
    )


@pytest.mark.parametrize("name", ["study.md", "study.zh.md"])
def test_tables_of_the_report_are_those_of_its_data(name):
    folder, path = ROOT / "docs" / "study", ROOT / "docs" / name
    rows = (read_rows(folder / f"{table}.csv") for table in ("summary", "costs", "differences", "floors"))
    assert tables.fill(path, *rows) == path.read_text(encoding="utf-8")


def test_seeds_that_are_far_apart_are_shown_and_never_as_nats_below_zero():
    """Three seeds, of which one has not learned the task: Student's interval would hold negative nats."""
    base = {"task": "copy", "variant": "causal", "of": "all", "passes": 0.0, "test_rows": 256}
    rows = [base | {"seed": seed, "measure": "nll", "value": value} for seed, value in enumerate((0.01, 0.02, 1.2))]
    rows += [base | {"seed": seed, "measure": "accuracy", "value": v} for seed, v in enumerate((1.0, 0.99, 0.0))]
    rows += [row | {"variant": "bidirectional", "value": 0.5} for row in rows]
    nll, accuracy = summarise(rows[:6])
    assert nll["interval"] == accuracy["interval"] == "seeds" and nll["low"] == 0.0
    assert tables.of_seeds(nll, 2) == "0.41 (0.01 to 1.20)" and tables.of_seeds(accuracy, 0, 100.0) == "66 (0 to 100)"
    different = next(row for row in differences(rows) if row["variant"] == "causal" and row["measure"] == "nll")
    assert different["interval"] == "seeds" and not tables.excludes_zero(different | {"low": 0.1})
    assert tables.of_seeds(different, 2, sign="+") == "-0.09 (-0.49 to +0.70)"
    assert (
        tables.of_seeds({"mean": -0.001, "low": -0.2, "high": 0.1, "interval": "t"}, 1, sign="+") == "+0.0 [-0.2, +0.1]"
    )


def test_intervals_of_sudoku_are_over_solutions():
    shared = {"variant": "causal", "measure": "accuracy", "of": "all", "passes": 1.0, "test_rows": 256}
    found = {}
    for task in ("copy", "sudoku"):
        rows = [shared | {"task": task, "seed": seed, "value": 0.5} for seed in range(3)]
        (found[task],) = summarise(rows)
    half = {task: (row["high"] - row["low"]) / 2 for task, row in found.items()}
    assert TASKS["sudoku"].independent(256) == 57
    assert half["copy"] == pytest.approx(0.5 * 1.96 / math.sqrt(256), rel=0.02)
    assert half["sudoku"] == pytest.approx(0.5 * 1.96 / math.sqrt(57), rel=0.05)


def test_tables_of_a_chinese_page_are_chinese(tmp_path):
    path = tmp_path / "report.zh.md"
    path.write_text("<!-- study.py writes: accuracy -->\n<!-- end -->\n", encoding="utf-8")
    row = {"task": "sudoku", "variant": "window:4", "measure": "accuracy", "of": "confidence", "mean": 0.25}
    row |= {"low": 0.0, "high": 1.0, "least": 0.125, "most": 0.5, "interval": "seeds"}
    assert "| 数独 | 窗口:4 |  | 25 (12 至 50) |" in tables.fill(path, [row], [], [])


def test_whiskers_are_measured():
    rows = read_rows(ROOT / "docs" / "study" / "summary.csv")
    for row in rows:
        below, above = figures._errors([row])
        assert row["mean"] - below[0] == pytest.approx(row["least"], abs=1e-5)
        assert row["mean"] + above[0] == pytest.approx(row["most"], abs=1e-5)


def test_figures_have_whole_positions_and_say_what_was_not_measured():
    rows = read_rows(ROOT / "docs" / "study" / "summary.csv")
    some = [row for row in rows if row["task"] == "countdown"]
    (axes,) = figures._written_at(some, figures._Words(False)).axes
    assert all(tick == round(tick) for tick in axes.get_xticks())
    drawn = figures._ablations(some, figures._Words(False))
    said = [text.get_text() for axes in drawn.axes for text in axes.texts]
    assert said == ["not measured: pads hidden"]  # its nats, in the last panel


@pytest.mark.slow
def test_figures_say_what_was_not_run_and_draw_floors(tmp_path):
    folder = ROOT / "docs" / "study"
    rows = read_rows(folder / "summary.csv")
    few = [row for row in rows if row["measure"] == "nll" and row["task"] in ("countdown", "scattered sudoku")]
    curves = [("countdown", "causal", 0, [2.0, 1.0])]
    paths = figures.draw_all(few, tmp_path, curves, read_rows(folder / "floors.csv"))
    assert [path.name for path in paths] == [
        "likelihood.png", "likelihood.zh.svg", "learning.png", "learning.zh.svg",
    ]  # fmt: skip
    drawn = (tmp_path / "likelihood.zh.svg").read_text(encoding="utf-8")
    assert "未运行：因果、前缀、窗口:4" in drawn and drawn.count("stroke-dasharray: 3.7,1.6") == 4


def test_committed_tables_are_made_from_the_committed_runs(tmp_path):
    """Every number of the report has its runs: the three tables follow from `runs.jsonl`, to the last digit."""
    folder = ROOT / "docs" / "study"
    shutil.copy(folder / "runs.jsonl", tmp_path)
    study = Study(tmp_path, StudyPlan(tasks=tuple(TASKS), variants=tuple(VARIANTS)))
    assert study.missing() == [] and len(study.plan.runs()) == 111
    for path in study.write_tables():
        assert path.read_text() == (folder / path.name).read_text(), path.name
    with pytest.raises(FileExistsError, match="give another --out"):
        Study(tmp_path, StudyPlan(tasks=("copy",), variants=("causal",), test_rows=8))


def test_files_of_runs_are_packed_into_one_table(tmp_path):
    lines = (ROOT / "docs" / "study" / "runs.jsonl").read_text().splitlines()[:3]
    plan = StudyPlan(tasks=tuple(TASKS), variants=tuple(VARIANTS))
    with pytest.raises(ValueError, match="has no run to put"):
        Study(tmp_path, plan).pack()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs.jsonl").write_text(lines[2].replace('"seconds": ', '"seconds": 9') + "\n" + lines[0] + "\n")
    for number, line in enumerate(lines[1:]):
        (tmp_path / "runs" / f"{number}.json").write_text(line)
    assert Study(tmp_path, plan).pack() == tmp_path / "runs.jsonl"
    # The run that was in both has the numbers of its file; the lines are sorted by task, variant and seed.
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == lines
    assert not list((tmp_path / "runs").iterdir())
    assert len(Study(tmp_path, plan).missing()) == len(plan.runs()) - 3


def test_marks_without_a_table_are_refused(tmp_path):
    path = tmp_path / "report.md"
    path.write_text("<!-- study.py writes: weather -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="weather"):
        tables.fill(path, [], [], [])
