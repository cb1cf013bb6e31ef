"""Rows of a chosen and a rejected answer: TRL's forms, rows that are refused with file and line, and batches of pairs."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from commands import run_script

from dream_jax.data import PairRows, check_no_pairs, check_pairs, make_pair_batches, open_source
from dream_jax.data.options import BatchOptions, EncodeOptions, ReadOptions
from dream_jax.data.pairs import parse_pair
from dream_jax.data.rows import RowList
from dream_jax.tokenizer import ByteTokenizer

USER = {"role": "user", "content": "What is 1+1?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "What is 1+1?"}, (USER,)),
        ({"question": "What is 1+1?", "system": "Be brief."}, (SYSTEM, USER)),
        ({"messages": [SYSTEM, USER]}, (SYSTEM, USER)),
        ({"prompt": [USER]}, (USER,)),
        ({"input": "1+1="}, "1+1=\n"),
    ],
)
def test_texts_and_messages_with_a_prompt(record: dict[str, Any], prompt: Any) -> None:
    for listed in (False, True):
        if listed and "input" in record:
            continue
        answers = {name: [said(text)] if listed else text for name, text in (("chosen", "2"), ("rejected", "3"))}
        row = parse_pair({**record, **answers, "score_chosen": 9.0}, "f:1")
        assert (row.prompt, row.response, row.rejected) == (prompt, "2", "3")
        assert row.unread == ("score_chosen",)


def test_the_beginning_that_both_answers_share_is_the_prompt() -> None:
    row = parse_pair({"chosen": [SYSTEM, USER, said("2")], "rejected": [SYSTEM, USER, said("3")]}, "f:1")
    assert row.prompt == (SYSTEM, USER) and (row.response, row.rejected) == ("2", "3")
    # As in ultrafeedback_binarized: the prompt and the chosen chat stand there once more.
    more = {"prompt": USER["content"], "messages": [USER, said("2")]}
    row = parse_pair({**more, "chosen": [USER, said("2")], "rejected": [USER, said("3")]}, "f:1")
    assert row.prompt == (USER,) and row.response == "2"
    # A word is not divided between prompt and answer.
    row = parse_pair({"chosen": "The sky is blue", "rejected": "The sky is black"}, "f:1")
    assert (row.prompt, row.response, row.rejected) == ("The sky is ", "blue", "black")


@pytest.mark.parametrize(
    ("record", "said_what"),
    [
        ({"prompt": "x", "chosen": "a"}, "f:7: no field 'rejected'"),
        ({"prompt": "x", "rejected": "a"}, "f:7: no field 'chosen'"),
        ({"prompt": "x", "chosen": "a", "rejected": None}, "f:7: no field 'rejected'"),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "f:7: .* are the same answer"),
        ({"chosen": "a", "rejected": "a"}, "f:7: .* are the same answer"),
        ({"prompt": "x", "chosen": " ", "rejected": "a"}, "f:7: 'chosen' is empty"),
        ({"prompt": "x", "chosen": "a", "rejected": 3}, "f:7: 'rejected' must be a string"),
        ({"prompt": "x", "chosen": [said("a")], "rejected": "b"}, "f:7: one of 'chosen' and 'rejected' is a list"),
        ({"prompt": "x", "chosen": [said("a")], "rejected": []}, "f:7: one of"),
        ({"chosen": "apples", "rejected": "pears"}, "f:7: the answers share no beginning"),
        ({"chosen": [said("a")], "rejected": [said("b")]}, "f:7: the answers share no message"),
        ({"chosen": [USER], "rejected": [USER, said("b")]}, "f:7: the last message of 'chosen' is the user's"),
        (
            {"chosen": [USER, said("a"), USER, said("b")], "rejected": [USER, said("c")]},
            "f:7: .* differ from message 1 on, but 'chosen' has 4 messages",
        ),
        ({"prompt": "other", "chosen": [USER, said("a")], "rejected": [USER, said("b")]}, "f:7: .*'prompt'"),
        (
            {"messages": [SYSTEM], "chosen": [USER, said("a")], "rejected": [USER, said("b")]},
            "f:7: 'messages' is neither the beginning of 'chosen' nor all of it",
        ),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "response": "c"}, "f:7: .*'response'"),
    ],
)
def test_bad_pairs_are_refused(record: dict[str, Any], said_what: str) -> None:
    with pytest.raises(ValueError, match=said_what):
        parse_pair(record, "f:7")


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_bad_pairs_of_a_file_are_counted_like_other_rows(tmp_path: pathlib.Path) -> None:
    rows = [{"input": str(number), "chosen": "a", "rejected": "b"} for number in range(4)]
    bad = [*rows, {"input": "x", "chosen": "a"}, {"input": "x", "chosen": "a", "rejected": "a"}]
    path = write(tmp_path / "pairs.jsonl", bad)
    with pytest.raises(ValueError, match=r"pairs.jsonl:5: no field 'rejected'"):
        open_source(path)
    source = open_source(path, options=ReadOptions(skip_bad=True, held_out=0.0))
    assert len(source) == 4 and [text.partition(": ")[0][-1] for text in source.intake.bad] == ["5", "6"]
    check_pairs(source, "vrpo")
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: a pair of answers, which --objective sft cannot learn"):
        check_no_pairs(source, "sft")
    with pytest.raises(ValueError, match=r"no rejected answer, but --objective vrpo learns from pairs"):
        check_pairs(open_source("sudoku"), "vrpo")


def rows_of(pairs: list[tuple[str, str, str]]) -> PairRows:
    records = [{"input": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]
    found = [parse_pair(record, f"f:{number}") for number, record in enumerate(records, 1)]
    return PairRows(RowList(found), ByteTokenizer(), EncodeOptions())


def test_batches_have_both_answers_of_a_pair_side_by_side() -> None:
    rows = rows_of([(str(number), "a" * (1 + number % 3), "b" * (1 + number % 4)) for number in range(8)])
    rows = PairRows(RowList([*(rows.source[one] for one in range(8)), rows_of([("p", "a", "b" * 40)]).source[0]]),
                    ByteTokenizer(), EncodeOptions())  # fmt: skip
    options = {"batch_size": 3, "max_length": 10, "seed": 1}
    with make_pair_batches(rows, **options) as batches:
        assert (batches.report.kept, batches.report.dropped) == (
            8,
            1,
        )  # the answer that is too long takes the pair along
        first, second = next(batches), next(batches)
        state = batches.get_state()
        third = next(batches)
        assert batches.outlook(8).epochs == 3.0
    for batch, start in ((first, 0), (second, 3)):
        np.testing.assert_array_equal(batch.draw_B, np.repeat(np.arange(start, start + 3), 2))
        np.testing.assert_array_equal(batch.row_B, np.arange(6))
        for row, letter in enumerate("ababab"):
            end = batch.tokens_BT[row, -1]
            text = bytes(batch.tokens_BT[row][batch.maskable_BT[row]][:-1].tolist()).decode()
            assert end == ByteTokenizer().eos_id and set(text) == {letter}
            assert batch.valid_BT[row].sum() == 2 + len(text) + 1  # the prompt with its line break, the answer, its end
        np.testing.assert_array_equal(batch.tokens_BT[::2][:, -1], batch.tokens_BT[1::2][:, -1])
    with make_pair_batches(rows, **options) as batches:
        batches.set_state(json.loads(json.dumps(state)))
        np.testing.assert_array_equal(next(batches).tokens_BT, third.tokens_BT)
    # Two processes have the rows of one, and noise that belongs to the pair is the same in every epoch.
    halves = []
    for process in range(2):
        sizes = {"batch_size": 4, "max_length": 10, "seed": 1, "options": BatchOptions(eos_tail=2)}
        with make_pair_batches(rows, **sizes, process_index=process, process_count=2, draws_of_pairs=True) as batches:
            halves.append([next(batches) for _ in range(4)])
    for one, other in zip(*halves, strict=True):
        np.testing.assert_array_equal(np.sort(np.concatenate([one.row_B, other.row_B])), np.arange(8))
    epochs = [sorted({*np.concatenate([one.draw_B for half in halves for one in half[at : at + 2]])}) for at in (0, 2)]
    assert epochs[0] == epochs[1] == list(range(8))


@pytest.mark.slow
def test_pairs_of_judged_answers(tmp_path: pathlib.Path) -> None:
    puzzle, wrong = {"input": "1,2,3", "output": "1+2=3"}, "1+2=4"
    file, folder = tmp_path / "train.jsonl", tmp_path / "samples"
    write(file, [puzzle, {"input": "2,3,6", "output": "2*3=6"}])
    asked = ("--task", "countdown", "--file", file, "--seeds", 2, "--max-new-tokens", 8, "--temperature", 1)
    done = run_script("evaluate.py", "--model", "nano", "--out", folder, *asked)
    assert done.returncode == 0, done.stderr
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    for row in items:  # a random model solves nothing, so its answers are replaced
        right = row["seed"] == 0 and row["number"] == 1
        row |= {"correct": right, "answer": puzzle["output"] if right else wrong, "tokens_to_end": 5 if right else 7}
        row["reason"] = "solved" if right else "the steps do not reach the target"
    write(folder / "items.jsonl", items)
    out = tmp_path / "pairs.jsonl"
    done = run_script("convert/pairs.py", folder, out, "--file", file, "--rules", "best-worst", "long-right")
    assert done.returncode == 0, done.stderr
    assert "mixed: 1" in done.stdout and "all wrong: 1" in done.stdout and "wrote 1 pairs" in done.stdout
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["input"], one["chosen"], one["rejected"]) for one in made] == [("1,2,3", "1+2=3", wrong)]
    assert parse_pair(made[0], "f:1").unread == ("rule", "chosen_tokens", "rejected_tokens", "rejected_because")
    about = json.loads((tmp_path / "pairs.statistics.json").read_text())
    assert about["rules"]["best-worst"]["tokens_chosen"] == 5 and about["rejected_because"] == {
        "the steps do not reach the target": 1
    }
    for arguments, message in (
        ((folder, out, "--file", file), "exists; remove it"),
        ((folder, tmp_path / "b.jsonl", "--file", out), "does not hold the problems"),
        ((folder, tmp_path / "b.jsonl", "--file", file, "--rules", "short-right"), "no pair can be made"),
    ):
        done = run_script("convert/pairs.py", *arguments)
        assert done.returncode == 1 and message in done.stderr


def test_rules_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "convert"))
    from pairs import JudgedAnswer, make_pairs

    def answers(*found: tuple[str, int, bool]) -> list[Any]:
        return [JudgedAnswer(text, tokens, right, "", True) for text, tokens, right in found]

    some = answers(
        ("w1", 4, False), ("r1", 9, True), ("r2", 3, True), ("w2", 2, False), ("r1", 9, True), ("r3", 5, True)
    )
    found = {rule: [(a.text, b.text) for a, b, _ in make_pairs(some, rule, 5)]
             for rule in ("best-worst", "short-right", "long-right")}  # fmt: skip
    assert found["short-right"] == [("r2", "r1")] and found["long-right"] == [("r1", "w2")]
    assert len(found["best-worst"]) == 2 and {a for a, _ in found["best-worst"]} <= {"r1", "r2", "r3"}
    endless = [one._replace(ended=False) for one in some]
    assert not [pair for rule in found for pair in make_pairs(endless, rule, 5)]
