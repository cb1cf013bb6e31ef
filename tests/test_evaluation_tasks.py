"""Files, prompts and folders of `evaluation`, without a model."""

import io
import json
import pathlib

import pytest
from rich.console import Console

from dream_jax.config import PRESETS
from dream_jax.evaluation import run
from dream_jax.evaluation.ledger import ITEMS, SECONDS, SETTINGS, Ledger, WorkUnit
from dream_jax.evaluation.likelihood import Bound
from dream_jax.evaluation.report import compare, summarize
from dream_jax.evaluation.run import Work, plan_work
from dream_jax.evaluation.scored_texts import read_choices, read_texts
from dream_jax.evaluation.settings import EvaluateSettings
from dream_jax.evaluation.tasks import TASKS, read_problems, split_examples
from dream_jax.model import abstract_model
from dream_jax.tokenizer import ByteTokenizer, load_tokenizer

SUDOKU = [  # Dream's format
    ("4000\n0124\n2031\n0000", "4213\n3124\n2431\n1342"),
    ("1230\n0410\n0000\n0001", "1234\n3412\n4123\n2341"),
    ("0200\n3000\n0003\n0040", "1234\n3412\n4123\n2341"),
    ("1000\n0402\n2003\n0000", "1234\n3412\n2143\n4321"),
    ("0034\n3400\n0003\n4300", "1234\n3412\n2143\n4321"),
    ("0230\n3002\n0003\n1000", "4231\n3142\n2413\n1324"),
    ("4201\n0140\n0400\n1004", "4231\n3142\n2413\n1324"),
    ("0000\n4321\n2100\n0012", "1234\n4321\n2143\n3412"),
    ("1004\n0020\n0140\n3000", "1234\n4321\n2143\n3412"),
    ("0213\n0004\n2000\n1340", "4213\n3124\n2431\n1342"),
]


def write(path: pathlib.Path, rows) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def sudoku_file(tmp_path):
    return write(tmp_path / "sudoku.jsonl", [{"input": puzzle, "output": solved} for puzzle, solved in SUDOKU])


def test_ten_puzzles_in_dreams_format(sudoku_file):
    """The first eight rows are the examples, the other two are asked."""
    task = TASKS["sudoku"]
    problems = read_problems(task, sudoku_file)
    assert [problem.number for problem in problems] == list(range(1, 11))
    examples, asked = split_examples(task, problems, sudoku_file, None, 8)
    assert [one.number for one in examples] == list(range(1, 9)) and [one.number for one in asked] == [9, 10]
    prompt = task.prompt(asked[0], examples, "raw")
    assert prompt.startswith(
        task.instruction + "\n\nInput:\n4000\n0124\n2031\n0000\nOutput:\n4213\n3124\n2431\n1342\n\nInput:"
    )
    assert prompt.endswith("\n\nInput:\n1004\n0020\n0140\n3000\nOutput:\n")
    assert prompt.count("Input:") == 9
    assert task.prompt(asked[0], [], "raw") == "1004\n0020\n0140\n3000\n"  # as train.py trains on it
    assert task.prompt(asked[0], examples, "raw", "Solve.").startswith("Solve.\n\nInput:")
    for problem in problems:
        assert problem.judge(problem.answer).correct


@pytest.mark.parametrize("task", ["countdown", "gsm8k"])
def test_a_prompt_and_its_answer_are_the_tokens_of_an_example(task, tmp_path, assets):
    """Where a raw prompt ends and the answer begins is a border between tokens of Dream's tokenizer."""
    tokenizer = load_tokenizer(assets / "dream-v0-instruct-7b")
    rows = {"countdown": GOOD["countdown"], "gsm8k": {"question": "How many?", "answer": "She has 3.\n#### 3"}}
    path = write(tmp_path / "rows.jsonl", [rows[task]])
    (problem,) = read_problems(TASKS[task], path)
    prompt = TASKS[task].prompt(problem, [problem], "raw")
    example = prompt.split("\n\n")[1]
    asked = prompt.split("\n\n")[2]
    answer = example.removeprefix(asked)
    assert answer.strip() == problem.answer
    assert tokenizer.encode(asked) + tokenizer.encode(answer) == tokenizer.encode(example)


def test_generated_puzzles_and_their_examples():
    task = TASKS["sudoku"]
    problems = read_problems(task, None)
    examples, asked = split_examples(task, problems, None, None, 8)
    assert len(asked) == len(problems) == 200
    assert not {one.answer for one in examples} & {one.answer for one in asked}


def test_chat_prompts_are_turns(tmp_path):
    rows = [{"question": f"What is {n} + 1?", "answer": f"<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(3)]
    task = TASKS["gsm8k"]
    examples, asked = split_examples(
        task, read_problems(task, path := write(tmp_path / "g.jsonl", rows)), path, None, 1
    )
    turns = task.prompt(asked[0], examples, "chat")
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[0]["content"] == f"{task.instruction}\n\nWhat is 0 + 1?"
    assert turns[1]["content"] == "1\n#### 1"  # without the calculator's note
    assert turns[2]["content"] == "What is 1 + 1?"
    assert task.prompt(asked[0], [], "raw").endswith("\n\nQuestion: What is 1 + 1?\nAnswer:")


def test_examples_without_shots_are_refused(sudoku_file):
    with pytest.raises(ValueError, match="--examples .* has no effect with 0 shots"):
        split_examples(TASKS["sudoku"], read_problems(TASKS["sudoku"], sudoku_file), sudoku_file, sudoku_file, 0)


def test_an_instruction_without_a_place_is_refused():
    settings = EvaluateSettings(model="nano", task="sudoku", instruction="Be kind.", shots=0)
    with pytest.raises(ValueError, match="--instruction has no place in raw prompts of the task sudoku"):
        plan_work(settings, "raw", abstract_model(PRESETS["nano"]), ByteTokenizer())


def test_examples_of_a_file_of_their_own(sudoku_file, tmp_path):
    task = TASKS["sudoku"]
    problems = read_problems(task, sudoku_file)
    rows = [{"input": "0000\n0000\n2143\n3412", "output": "4321\n1234\n2143\n3412"}]
    other = write(tmp_path / "other.jsonl", rows)
    examples, asked = split_examples(task, problems, sudoku_file, other, 1)
    assert len(examples) == 1 and len(asked) == 10
    with pytest.raises(ValueError, match="but 2 examples are needed"):
        split_examples(task, problems, sudoku_file, other, 2)
    with pytest.raises(ValueError, match=r"sudoku\.jsonl:1: this example is also one of the problems"):
        split_examples(task, problems, sudoku_file, sudoku_file, 1)
    with pytest.raises(ValueError, match="no problem is left"):
        split_examples(task, problems, sudoku_file, None, 10)


GOOD = {
    "sudoku": {"input": SUDOKU[0][0], "output": SUDOKU[0][1]},
    "countdown": {"input": "86,28,13,31,96", "output": "86+28=114,31-13=18,114-18=96"},
    "gsm8k": {"question": "How many?", "answer": "#### 3"},
    "chat": {"question": "Capital of France?", "contains": "Paris"},
    "choice": {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1},
    "likelihood": {"text": "a", "before": "b", "after": "c"},
}


def read(task, path):
    if task == "choice":
        return read_choices(path)
    return read_texts(path) if task == "likelihood" else read_problems(TASKS[task], path)


@pytest.mark.parametrize("task", GOOD)
@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b'{"half": "wri', r":2: not JSON"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", r":2: not UTF-8"),
        ('{"question": "é"}'.encode("latin-1"), r":2: not UTF-8"),
        (b"[1, 2]", r":2: a list"),
        (b'"text"', r":2: a str"),
        (b'{"qestion": "x"}', r":2: (unknown field\(s\) \['qestion'\]|no field|a question needs .*\['qestion'\])"),
        (b"{}", r":2: (no field|a question needs|'choices' must)"),
    ],
)
def test_bad_lines_are_named(tmp_path, task, second, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD[task]).encode() + b"\n" + second)
    with pytest.raises(ValueError, match=r"rows\.jsonl" + message):
        read(task, path)


@pytest.mark.parametrize("task", GOOD)
def test_files_that_are_none(tmp_path, task):
    with pytest.raises(FileNotFoundError, match="missing.jsonl"):
        read(task, tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: no rows"):
        read(task, tmp_path / "empty.jsonl")
    write(tmp_path / "wide.jsonl", [GOOD[task]]).write_bytes(json.dumps(GOOD[task]).encode("utf-16"))
    with pytest.raises(ValueError, match=r"wide\.jsonl:1: not UTF-8"):
        read(task, tmp_path / "wide.jsonl")
    assert len(read(task, write(tmp_path / "good.jsonl", [GOOD[task], GOOD[task]]))) == 2


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("sudoku", {"input": "1234"}, "not a 4x4 puzzle"),
        ("sudoku", {"input": "1100\n0000\n0000\n0000"}, "no solution"),
        ("sudoku", {"output": "1234\n3412\n2143\n4321"}, "the given digit in row 1, column 1 was changed"),
        ("countdown", {"input": "1,2"}, "no countdown problem"),
        ("countdown", {"output": "86+28=114"}, "no solution of 'input'"),
        ("gsm8k", {"answer": "three"}, "#### NUMBER"),
        ("chat", {"messages": []}, "either 'question' or 'messages'"),
        ("chat", {"contains": ""}, "'contains' must be"),
        ("chat", {"note": "x"}, "unknown field"),
        ("choice", {"choices": ["a"]}, "at least two"),
        ("choice", {"choices": ["a", "a"]}, "the same"),
        ("choice", {"choices": ["a", 1]}, "must be a string"),
        ("choice", {"answer": 2}, "0..1"),
        ("choice", {"answer": True}, "0..1"),
        ("choice", {"answer": "4"}, "0..1"),
        ("likelihood", {"text": ""}, "'text' is empty"),
        ("likelihood", {"before": 3}, "must be a string"),
    ],
)
def test_bad_values_are_named(tmp_path, task, change, message):
    path = write(tmp_path / "rows.jsonl", [GOOD[task], GOOD[task] | change])
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{message}"):
        read(task, path)


def test_messages_of_a_probe(tmp_path):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "2+2?"},
    ]
    (problem,) = read("chat", write(tmp_path / "p.jsonl", [{"messages": turns, "contains": "4"}]))
    assert TASKS["chat"].prompt(problem, [], "chat") == tuple(turns)
    with pytest.raises(ValueError, match=r"q\.jsonl:1: the last message is the assistant's"):
        read("chat", write(tmp_path / "q.jsonl", [{"messages": turns[:2], "contains": "4"}]))


def test_a_prompt_that_the_tokenizer_refuses_is_named(tmp_path):
    path = write(tmp_path / "p.jsonl", [GOOD["chat"], GOOD["chat"] | {"tools": [{"name": "f"}]}])
    settings = EvaluateSettings(task="chat", file=path)
    model = abstract_model(PRESETS["nano"])
    with pytest.raises(ValueError, match=r"p\.jsonl:2: the byte tokenizer does not support tools"):
        plan_work(settings, "chat", model, ByteTokenizer())


def test_passages_score_what_they_should(tmp_path):
    tokenizer = ByteTokenizer()
    (choice,) = read("choice", write(tmp_path / "c.jsonl", [GOOD["choice"]]))
    for index, passage in enumerate(choice.passages(tokenizer, "raw")):
        assert tokenizer.decode(passage.tokens) == f"Question: 2 + 2?\nAnswer: {'34'[index]}"
        assert tokenizer.decode(passage.tokens[passage.scored]) == f" {'34'[index]}"
    assert tokenizer.decode(choice.passages(tokenizer, "chat")[1].tokens).endswith("assistant\n4")
    texts = read("likelihood", write(tmp_path / "t.jsonl", [GOOD["likelihood"], {"text": "né"}]))
    assert tokenizer.decode(texts[0].passages(tokenizer, "raw")[0].tokens) == "bac"
    assert texts[0].passages(tokenizer, "raw")[0].scored.tolist() == [False, True, False]
    assert texts[1].passages(tokenizer, "raw")[0].tokens.tolist() == [tokenizer.bos_id, *"né".encode()]
    bound = Bound(nats=1.0, variance=0.0, freedom=0.0)
    assert texts[1].row(texts[1].passages(tokenizer, "raw"), [bound])["bytes"] == 3


PLAN = [WorkUnit(seed=seed, problems=(0,), names=((seed, 1), (seed, 2), (seed, 3))) for seed in range(4)]


def fill(folder, plan=PLAN, recipe=None, **options) -> Ledger:
    ledger = Ledger(folder, {"a": 1} if recipe is None else recipe, plan, **options)
    for unit in plan[ledger.done :]:
        rows = [{"seed": seed, "number": number, "answer": "é\u2028\n" * number} for seed, number in unit.names]
        ledger.append(rows, {"rows": len(rows), "seconds": 0.5, "compiled": False})
    return ledger


def test_a_batch_whose_canvas_grows_does_not_count_as_speed(tmp_path, monkeypatch):
    """The third batch of this shape compiles a program for a longer canvas."""
    programs = iter([0, 1, 1, 1, 2, 2, 2])  # before and after each batch; after the first one it is not asked
    monkeypatch.setattr(run, "num_programs", lambda: next(programs))

    def compute(model, unit):
        return [{"seed": seed, "number": number} for seed, number in unit.names]

    work = Work(numbers=[1, 2, 3], batches=[(0, 1, 2)], shapes=[8], compute=compute, recipe={}, note="")
    ledger = Ledger(tmp_path, {}, PLAN)
    run._compute(work, PLAN, ledger, abstract_model(PRESETS["nano"]), Console(file=io.StringIO()))
    assert [one["compiled"] for one in ledger.seconds] == [True, False, True, False]


def test_a_ledger_cut_anywhere_resumes_to_the_same_file(tmp_path):
    fill(tmp_path / "whole")
    whole, times = (tmp_path / "whole" / ITEMS).read_bytes(), (tmp_path / "whole" / SECONDS).read_bytes()
    assert len(whole.splitlines()) == 12
    folder = tmp_path / "cut"
    for size in range(0, len(whole) + 1, 31):
        fill(folder, overwrite=True)
        (folder / ITEMS).write_bytes(whole[:size])
        # What comes after is on the disk at most as far as what comes before it.
        units = whole[:size].count(b"\n") // 3
        (folder / SECONDS).write_bytes(times[: len(times) // 4 * units + size % 5])
        assert Ledger(folder, {"a": 1}, PLAN).done == units
        fill(folder)
        assert (folder / ITEMS).read_bytes() == whole
        assert (folder / SECONDS).read_bytes() == times


def test_a_ledger_takes_more_seeds(tmp_path):
    assert fill(tmp_path, PLAN[:2]).done == 2
    assert Ledger(tmp_path, {"a": 1}, PLAN).done == 2
    fill(tmp_path)
    with pytest.raises(ValueError, match=r"items\.jsonl:7: the folder has more rows"):
        Ledger(tmp_path, {"a": 1}, PLAN[:2])


def test_a_ledger_refuses_another_run(tmp_path):
    fill(tmp_path)
    with pytest.raises(ValueError, match="a was 1, now 2; b was None, now 3"):
        Ledger(tmp_path, {"a": 2, "b": 3}, PLAN)
    assert Ledger(tmp_path, {"a": 2}, PLAN, overwrite=True).done == 0
    other = [WorkUnit(seed=0, problems=(0,), names=((0, 5),))]
    fill(tmp_path, overwrite=True)
    with pytest.raises(
        ValueError, match=r"items\.jsonl:1: \(seed, number\) is \(0, 1\), but this run expects \(0, 5\)"
    ):
        Ledger(tmp_path, {"a": 1}, other)
    (tmp_path / ITEMS).write_bytes(b"\x00\x00\n")
    with pytest.raises(ValueError, match=r"items\.jsonl:1: not a row of JSON"):
        Ledger(tmp_path, {"a": 1}, PLAN)
    (tmp_path / ITEMS).write_bytes(b"[]\n")
    with pytest.raises(ValueError, match=r"items\.jsonl:1: a list"):
        Ledger(tmp_path, {"a": 1}, PLAN)
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is not valid JSON"):
        Ledger(tmp_path, {"a": 1}, PLAN)
    (tmp_path / SETTINGS).unlink()
    with pytest.raises(ValueError, match=r"settings\.json, the file of their settings, is missing"):
        Ledger(tmp_path, {"a": 1}, PLAN)


def test_a_ledger_takes_the_rows_of_its_plan_only(tmp_path):
    ledger = Ledger(tmp_path, {}, PLAN)
    with pytest.raises(ValueError, match="should make rows"):
        ledger.append([{"seed": 0, "number": 2}], {})


def row(seed, number, correct, answer="x", end: int | None = 3):
    found = {"seed": seed, "number": number, "identity": f"id{number}", "correct": correct, "found": answer}
    return found | {"answer": answer, "tokens_to_end": end, "room": 8, "forwards": 7}


def test_a_summary_by_hand():
    rows = [row(0, 1, True), row(0, 2, False, "  ", 0), row(1, 1, True), row(1, 2, True, "y", None)]
    seconds = [{"rows": 2, "seconds": 9.0, "compiled": True}, {"rows": 2, "seconds": 2.0, "compiled": False}]
    summary = summarize("sudoku", rows, seconds)
    found = summary.numbers
    assert found["accuracy"].value == 0.75 and found["accuracy_of_each_seed"] == [0.5, 1.0]
    assert found["agreement_between_seeds"] == 0.5 and found["same_text_under_all_seeds"] == 0.5
    assert found["empty_answers"] == 0.25 and found["no_end_token"] == 0.25
    assert found["tokens_to_end"].value == 2 and found["forwards"] == 7
    assert found["useful_tokens_per_second"] == (3 + 8) / 2.0
    assert found["useful_tokens_per_second_with_compilation"] == (3 + 0 + 3 + 8) / 11.0
    assert json.loads(summary.to_json())["accuracy"]["value"] == 0.75
    assert "| accuracy | 0.75 (95 %: " in summary.to_markdown("m")
    with pytest.raises(ValueError, match="not finished"):
        summarize("sudoku", rows[:3], seconds)


def folder_of(path, rows, task="sudoku"):
    path.mkdir()
    write(path / ITEMS, rows)
    (path / SETTINGS).write_text(json.dumps({"task": task}))
    return path


def test_two_runs_are_compared_problem_by_problem(tmp_path):
    first = folder_of(tmp_path / "a", [row(0, n, n < 5) for n in range(10)])
    second = folder_of(tmp_path / "b", [row(0, n, n < 8, "z") for n in (*range(9, -1, -1), 77)])
    found = compare(first, second)
    assert (found.problems, found.only_first, found.only_second) == (10, 0, 1)
    assert found.test is not None and (found.test.gained, found.test.lost) == (3, 0)
    assert found.difference.value == pytest.approx(0.3) and found.test.p_value == pytest.approx(0.25)
    assert sorted(number for number, _, _ in found.changes) == [5, 6, 7]
    text = found.to_markdown("a", "b")
    assert "- 5: wrong 'x' -> right 'z'" in text and "p = 0.25" in text

    with pytest.raises(ValueError, match="no problem in common"):
        compare(first, folder_of(tmp_path / "c", [row(0, 99, True)]))
    with pytest.raises(ValueError, match="compare runs of one task"):
        compare(first, folder_of(tmp_path / "d", [row(0, 1, True)], "gsm8k"))
    with pytest.raises(ValueError, match="not finished"):
        compare(first, folder_of(tmp_path / "e", [row(0, 1, True), row(0, 2, True), row(1, 1, True)]))
    with pytest.raises(ValueError, match=r"items\.jsonl:1: the row lacks"):
        compare(first, folder_of(tmp_path / "f", [{"seed": 0}]))
    with pytest.raises(FileNotFoundError, match="not the folder of an evaluation"):
        compare(first, tmp_path / "nowhere")


def test_likelihoods_are_compared_in_nats(tmp_path):
    def nats(shift):
        return [{"seed": 0, "number": n, "identity": f"i{n}", "nats": n + shift} for n in range(5)]

    first, second = (
        folder_of(tmp_path / "a", nats(0), "likelihood"),
        folder_of(tmp_path / "b", nats(-0.5), "likelihood"),
    )
    found = compare(first, second)
    assert found.test is None and found.difference.value == -0.5 and "nats a text" in found.to_markdown("a", "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds=0"),
        ({"limit": 0}, "limit=0"),
        ({"shots": -1}, "shots=-1"),
        ({"samples": 7}, "samples=7"),
        ({"task": "gsm8k"}, "--file"),
        ({"any_base": True}, "--adapter"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluateSettings(**options)


def test_published_settings_give_way_to_ones_own():
    tokenizer = ByteTokenizer()
    instruct = EvaluateSettings(published="instruct").sampler_config(tokenizer, 64)
    assert (instruct.alg, instruct.temperature, instruct.top_p, instruct.steps) == ("entropy", 0.1, 0.9, None)
    own = EvaluateSettings(published="instruct", temperature=0.5, steps=16).sampler_config(tokenizer, 64)
    assert (own.temperature, own.top_p, own.steps) == (0.5, 0.9, 16)
    plain = EvaluateSettings().sampler_config(tokenizer, 24)
    assert (plain.alg, plain.temperature, plain.top_p) == ("entropy", 0.0, None)
    fast = EvaluateSettings(published="instruct", sampler="fast").sampler_config(tokenizer, 64)
    assert (fast.alg, fast.temperature, fast.block_length) == ("maskgit_plus", 0.1, 32)
    with pytest.raises(ValueError, match="steps=8 has no effect"):
        EvaluateSettings(sampler="fast", steps=8).sampler_config(tokenizer, 64)
    assert plain.forbidden_tokens == (tokenizer.mask_id,) and plain.vocab_limit == tokenizer.vocab_limit
