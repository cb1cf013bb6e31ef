"""bench/long_tasks.py: the settings it compares, the work it computes, and what it stores and chooses."""

import importlib
import json
import types

import numpy as np
import pytest
from commands import ROOT, run_script

from dream_jax.chips import CHIPS
from dream_jax.config import PRESETS
from dream_jax.data.long_tasks import LONG_TASKS
from dream_jax.flops import pass_work
from dream_jax.sampler import PassKind, SamplerConfig, Threshold, WindowCache
from dream_jax.tokenizer import ByteTokenizer

FULL, WINDOW = PassKind("full", 448, 448, 2), PassKind("window", 33, 448, 16)
DREAM = PRESETS["dream-7b"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("long_tasks")


@pytest.fixture
def work(bench):
    return importlib.import_module("long_task_work")


def test_all_settings_differ_and_todays_presets_are_among_them(bench):
    found = bench.sampler_settings(256)
    assert len(set(map(repr, found.values()))) == len(found) > 20
    assert found["exact"] == SamplerConfig.preset("exact", max_new_tokens=256)
    cached = {"max_new_tokens": 256, "alg": "maskgit_plus", "block_length": 32, "stop_at_end": True}
    balanced = WindowCache(left=32, right=32, refresh_passes=4)
    assert found["balanced of 0.2"] == SamplerConfig(**cached, commit=Threshold(0.998), cache=balanced)
    assert found["fast of 0.2"] == SamplerConfig(**cached, commit=Threshold(0.9), cache=WindowCache())
    assert {
        "Fast-dLLM prefix",
        "Fast-dLLM dual",
        "interval 4, 0.9",
        "no cache, 0.998",
        "suffix 96, 0.9 falling",
    } <= found.keys()


def counted(work, needed, made, answers=16, predicted=0):
    return work.CountedPasses.read(
        {
            "answers": answers,
            "predicted": predicted,
            "kinds": [[*kind, needed[kind], made[kind]] for kind in needed],
        }
    )


def test_the_work_of_exact_sampling(work):
    """256 passes for each answer become 512 over 1024 tokens, with twice as many masks in each."""
    kind = PassKind("full", 448, 448, 16)
    passes = counted(work, {kind: 16 * 256}, {kind: 256}, predicted=16 * 256 * 128)
    config = SamplerConfig(max_new_tokens=256)
    h200 = CHIPS["h200"]
    for batch in (1, 16):
        one = pass_work(DREAM, batch=batch, queries=1024, keys=1024, unembedded=256)
        wanted = {"flops": one.flops, "bytes": one.nbytes, "seconds": one.seconds(h200)}
        found = work.work_7b(config, passes, 192, batch=batch)
        assert found == pytest.approx({name: 512 / batch * value for name, value in wanted.items()})
    assert passes.passes == 256 and passes.computed_tokens == 256 * 448


@pytest.mark.parametrize(
    ("cache", "fulls"),
    [
        (WindowCache(), 16.0),
        (WindowCache(refresh_blocks=None), 1 + 7 * 15 / 7),
        (WindowCache(refresh_blocks=None, refresh_passes=4), 16.0),
    ],
    ids=["every block", "not at blocks", "interval"],
)
def test_the_work_of_cached_sampling(work, cache, fulls):
    """8 full passes and 40 windows for each answer, and 60 windows of the batch, because its rows differ."""
    passes = counted(work, {FULL: 8 * 16, WINDOW: 40 * 16}, {FULL: 70, WINDOW: 60}, predicted=48 * 16 * 20)
    config = SamplerConfig(max_new_tokens=256, alg="entropy", block_length=32, cache=cache)
    full = pass_work(DREAM, batch=1, queries=1024, keys=1024, unembedded=20)
    window = {b: pass_work(DREAM, batch=b, queries=33, keys=1024, unembedded=20) for b in (1, 16)}
    assert work.work_7b(config, passes, 192, batch=1)["flops"] == pytest.approx(
        fulls * full.flops + 80 * window[1].flops
    )
    assert work.work_7b(config, passes, 192, batch=16)["bytes"] == pytest.approx(
        fulls * full.nbytes + 120 / 16 * window[16].nbytes
    )


def test_only_one_full_pass_of_an_answer_is_the_first(work):
    """With a suffix window full passes have several lengths; those that come by drift grow with the blocks, 7 to 15."""
    kinds = [PassKind("full", width, width, 2) for width in (320, 352)] + [PassKind("renewal", 161, 448, 2)]
    needed = dict(zip(kinds, (1 * 16, 16 // 2, 13 * 8), strict=True))
    passes = counted(work, needed, dict(zip(kinds, (8, 4, 60), strict=True)))
    cache = WindowCache(renew_left=32, refresh_drift=0.1, suffix=96)
    config = SamplerConfig(max_new_tokens=256, alg="entropy", block_length=32, cache=cache)
    shapes = [(768, 768), (832, 832), (161, 1024)]
    one, other, renewal = (
        pass_work(DREAM, batch=1, queries=queries, keys=keys, unembedded=0) for queries, keys in shapes
    )
    wanted = one.flops + 15 / 7 * (0.5 * other.flops + 6.5 * renewal.flops)
    assert work.work_7b(config, passes, 192, batch=1)["flops"] == pytest.approx(wanted)
    renewal = pass_work(DREAM, batch=2, queries=161, keys=1024, unembedded=0)
    wanted = one.flops + 15 / 7 * (0.5 * other.flops + 60 / 16 * renewal.flops)
    assert work.work_7b(config, passes, 192, batch=16)["flops"] == pytest.approx(wanted)


def test_a_full_pass_without_the_masks_to_come_is_as_short_for_dream(work):
    short = PassKind("full", 192 + 64, 192 + 64, 2)
    passes = counted(work, {short: 16}, {short: 8})
    config = SamplerConfig(max_new_tokens=256, alg="entropy", block_length=32, cache=WindowCache())
    wanted = pass_work(DREAM, batch=1, queries=512 + 128, keys=512 + 128, unembedded=0)
    assert work.work_7b(config, passes, 192, batch=1)["flops"] == pytest.approx(2 * wanted.flops)


def answering(asked, wrong, calls):
    """Returns a function in place of `generate` that answers with the solutions, except to the problems in `wrong`."""
    words = ByteTokenizer()

    def generate(model, prompts, config):
        first = next(n for n, row in enumerate(asked.prompts) if np.array_equal(row, prompts[0]))
        calls.append(first)
        rows = []
        for number in range(first, first + len(prompts)):
            text = LONG_TASKS["chain-short"].make.solve(asked.problems[number])
            text = text[:-1] + "x" if number in wrong else text
            rows.append([*asked.prompts[number], *words.encode(text), *[words.eos_id] * (64 - len(text))])
        counts = types.SimpleNamespace(
            kinds=(FULL, WINDOW),
            by_row=np.full((len(prompts), 2), (2, 5)),
            by_program=np.array([2, 6]),
            predicted=np.full(len(prompts), 40),
        )
        return types.SimpleNamespace(
            tokens=np.array(rows), commit_step=np.zeros((len(rows), len(rows[0]))), counts=counts
        )

    return generate


def test_answers_are_judged_stored_and_resumed(bench, tmp_path, monkeypatch):
    asked, calls = bench.AskedProblems.of("chain-short", 64), []
    monkeypatch.setattr(bench, "generate", answering(asked, {3, 40}, calls))
    config, path = bench.sampler_settings(64)["fast of 0.2"], tmp_path / "fast.json"
    few = bench.answers_of(path, None, asked._replace(problems=asked.problems[:32]), config)
    assert few["right"] == [number != 3 for number in range(32)] and calls == [0, 16]
    all_of_them = bench.answers_of(path, None, asked, config)
    assert calls == [0, 16, 32, 48] and all_of_them["right"] == [number not in (3, 40) for number in range(64)]
    assert all_of_them["batches"][0] == {
        "answers": 16,
        "predicted": 640,
        "kinds": [["full", 448, 448, 2, 32, 2], ["window", 33, 448, 16, 80, 6]],
    }
    again = bench.answers_of(path, None, asked._replace(problems=asked.problems[:32]), config)
    assert again["right"] == few["right"] and again["batches"] == few["batches"] and len(calls) == 4
    with pytest.raises(ValueError, match="answers of other settings"):
        bench.answers_of(path, None, asked, bench.sampler_settings(64)["exact"])
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"right": stored["right"][:-1]}))
    with pytest.raises(ValueError, match="63 answers and 4 batches"):
        bench.answers_of(path, None, asked, config)
    path.write_text(json.dumps({"settings": 3}))
    with pytest.raises(ValueError, match="remove the file"):
        bench.answers_of(path, None, asked, config)


def test_presets_are_chosen_on_one_half_and_reported_on_the_other(bench):
    """The cheapest setting within the limits is taken by the first half, although the second half shows its errors."""
    settings = bench.LongTaskSettings(tasks=("chain",), problems=2048)
    first = np.arange(2048) // 16 % 2 == 0
    full = {
        "exact": 300,
        "fast of 0.2": 8,
        "balanced of 0.2": 8,
        "full once, 0.9": 1,
        "full once, 0.998": 1,
        "drift 1, 0.9": 4,
    }
    wrong = {
        "exact": np.zeros(2048, bool),
        "balanced of 0.2": np.zeros(2048, bool),
        "fast of 0.2": np.zeros(2048, bool),
        "full once, 0.9": np.arange(2048) % 10 == 0,  # 10 points
        "full once, 0.998": first & (np.arange(2048) % 30 == 0),  # 3 points on the first half
        "drift 1, 0.9": ~first & (np.arange(2048) % 50 == 0),
    }
    answers = {
        name: {
            "settings": name,
            "right": (~wrong[name]).tolist(),
            "batches": [{"answers": 16, "predicted": 0, "kinds": [[*FULL, 16 * count, 16 * count]]}] * 128,
        }
        for name, count in full.items()
    }
    found = bench.summary(settings, {("chain", 0): answers, ("chain", 1): answers})
    assert found["solved by exact sampling"] == {"chain": 1.0}
    assert {name: one["name"] for name, one in found["presets"].items()} == dict.fromkeys(
        ("balanced", "fast"), "drift 1, 0.9"
    )
    fast = found["presets"]["fast"]
    assert fast["difference"] == pytest.approx(-2.0, abs=0.2) and fast["interval"][0] < -2 < fast["interval"][1]
    assert fast["problems"] == 1024 and fast["share"]["B=1"] == pytest.approx((1 + 3 * 15 / 7) / 16, abs=1e-3)
    rows = {row["name"]: row for row in found["settings"]}
    assert rows["full once, 0.9"]["chain"]["accuracy"] == pytest.approx(0.9, abs=0.001)
    assert rows["exact"]["passes"] == 300 and rows["exact"]["computed_tokens"] == 300 * 448
    json.dumps(found)


def test_refusals_and_the_list(bench):
    finished = run_script("bench/long_tasks.py", "--problems", 40)
    assert finished.returncode != 0 and "multiple of 32" in finished.stderr
    with pytest.raises(ValueError, match="'fastest' of --samplers is not one of: exact; balanced of 0.2;"):
        bench.LongTaskSettings(samplers=("fastest",))
    with pytest.raises(ValueError, match="task 'sudoku' is not one of"):
        bench.LongTaskSettings(tasks=("sudoku",))
    finished = run_script("bench/long_tasks.py", "--list")
    assert finished.returncode == 0 and len(finished.stdout.splitlines()) > 20


@pytest.mark.slow
def test_the_command_runs_and_resumes(tmp_path):
    arguments = ("--quick", "--tasks", "chain", "--out", tmp_path / "out", "--results", tmp_path / "results.json")
    finished = run_script("bench/long_tasks.py", *arguments, "--samplers", "full once, 0.9")
    assert finished.returncode == 0, finished.stderr
    assert "train longer" in finished.stdout
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in found["settings"]] == ["exact", "full once, 0.9"]
    assert 62 < found["settings"][0]["passes"] <= 64  # one token a pass; the schedule may write two in one of them
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    finished = run_script("bench/long_tasks.py", *arguments, "--samplers", "full once, 0.9")
    assert finished.returncode == 0 and "training" not in finished.stdout
    assert times == {path: path.stat().st_mtime_ns for path in times}
    finished = run_script("bench/long_tasks.py", *arguments, "--rate", "1e-4")
    assert finished.returncode != 0 and "rate was 0.001, now 0.0001" in finished.stderr
