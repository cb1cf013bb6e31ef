import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dream_jax.batch import Batch
from dream_jax.data import (
    Batches,
    Row,
    RowList,
    RowSource,
    SudokuSource,
    TokenizedRows,
    encode_row,
    is_solution,
    lay_out,
    length_report,
    make_batches,
    open_source,
)
from dream_jax.data.schemas import parse_chat, parse_gsm8k, parse_puzzle
from dream_jax.data.sources import hold_out, parse_lines
from dream_jax.data.sudoku import solution_grids, solutions, split_grids
from dream_jax.tokenizer import ByteTokenizer, load_tokenizer

BYTES = ByteTokenizer()


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- sudoku ---


def solved(grid: list[int]) -> bool:
    """The rules, written apart from the module."""
    rows = [[4 * r + c for c in range(4)] for r in range(4)]
    columns = [[4 * r + c for r in range(4)] for c in range(4)]
    boxes = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    return all(sorted(grid[cell] for cell in unit) == [1, 2, 3, 4] for unit in rows + columns + boxes)


def count_solutions(cells: list[int]) -> int:
    """Backtracking, which knows nothing of the 288 grids."""
    if 0 not in cells:
        return int(solved(cells))
    at = cells.index(0)
    row, column = divmod(at, 4)
    peers = {
        cell
        for cell in range(16)
        if cell // 4 == row or cell % 4 == column or (cell // 8 == row // 2 and cell % 4 // 2 == column // 2)
    }
    free = {1, 2, 3, 4} - {cells[peer] for peer in peers}
    return sum(count_solutions([*cells[:at], digit, *cells[at + 1 :]]) for digit in free)


def puzzle_of(row: Row) -> str:
    assert isinstance(row.prompt, str) and row.prompt.endswith("\n")
    return row.prompt.removesuffix("\n")


def digits(text: str) -> list[int]:
    return [int(digit) for digit in text.replace("\n", "")]


def test_all_288_grids() -> None:
    grids = solution_grids()
    assert grids.shape == (288, 16) and grids.dtype == np.uint8
    assert all(solved(grid) for grid in grids.tolist())
    assert len({tuple(grid) for grid in grids.tolist()}) == 288
    assert count_solutions([0] * 16) == 288  # so none is missing


def test_splits_share_no_grid() -> None:
    train, test = split_grids("train"), split_grids("test")
    assert len(test) == 58 and sorted([*train, *test]) == list(range(288))
    assert not np.array_equal(test, split_grids("test", split_seed=1))
    # Fixed for ever: another division would let a model be tested on grids it was trained on.
    assert test[:8].tolist() == [12, 13, 29, 30, 31, 36, 37, 40]
    with pytest.raises(ValueError, match="each split needs at least one"):
        split_grids("test", test_share=0.0)
    with pytest.raises(ValueError, match="'train' or 'test'"):
        split_grids("valid")


@pytest.mark.parametrize("split", ["train", "test"])
def test_puzzles_have_one_solution_from_their_split(split: str) -> None:
    source = SudokuSource(split, seed=3, size=150)
    allowed = set(split_grids(split).tolist())
    for index in range(len(source)):
        row = source[index]
        cells, answer = digits(puzzle_of(row)), digits(row.response)
        assert count_solutions(cells) == 1
        assert all(given in (0, digit) for given, digit in zip(cells, answer, strict=True))
        assert is_solution(puzzle_of(row), row.response)
        assert row.meta["givens"] == 16 - cells.count(0)
        assert row.meta["grid"] in allowed and solution_grids()[row.meta["grid"]].tolist() == answer


def test_puzzles_cover_the_settings_evenly() -> None:
    source = SudokuSource("train", size=9000)
    rows = [source[index] for index in range(9000)]
    givens = np.bincount([row.meta["givens"] for row in rows], minlength=17)
    assert givens[:4].sum() == givens[13:].sum() == 0
    assert (abs(givens[4:13] - 1000) < 150).all()  # 5 standard deviations
    assert {row.meta["grid"] for row in rows} == set(split_grids("train").tolist())
    few = SudokuSource("test", min_givens=5, max_givens=5, size=50)
    assert {few[index].meta["givens"] for index in range(50)} == {5}


def test_every_one_solution_mask_is_reachable() -> None:
    """By brute force over one grid: the cells shown with 4 givens are exactly those with one solution."""
    grid = solution_grids()[0].tolist()
    expected = set()
    for shown in itertools.combinations(range(16), 4):
        cells = [digit if cell in shown else 0 for cell, digit in enumerate(grid)]
        if count_solutions(cells) == 1:
            expected.add(tuple(cells))
    source = SudokuSource("train", min_givens=4, max_givens=4, size=20000)
    side = 0 in split_grids("train")
    assert side, "grid 0 moved to the test split: take another grid for this test"
    found = {tuple(digits(puzzle_of(row))) for row in map(source.__getitem__, range(20000)) if row.meta["grid"] == 0}
    assert found == expected and len(expected) == 12


def test_sudoku_is_a_function_of_seed_and_index() -> None:
    source, again = SudokuSource("train", seed=7), SudokuSource("train", seed=7, size=1000)
    assert len(source) == 1_000_000
    assert [source[index] for index in (999, 0, 5)] == [again[index] for index in (999, 0, 5)]
    assert source[999_999] == source[np.int64(999_999)]
    other = SudokuSource("train", seed=8)
    assert sum(source[index] == other[index] for index in range(100)) < 3
    # The text itself, so that no change of the drawing goes unseen.
    assert SudokuSource("train")[5].prompt == "1000\n0014\n0200\n3040\n"
    assert SudokuSource("train")[5].response == "1423\n2314\n4231\n3142"


def test_test_puzzles_are_distinct_and_stable() -> None:
    source = SudokuSource("test")
    prompts = [source[index].prompt for index in range(len(source))]
    assert len(prompts) == len(set(prompts)) == 200
    larger = SudokuSource("test", size=3000)
    assert [larger[index].prompt for index in range(200)] == prompts
    assert len({larger[index].prompt for index in range(3000)}) == 3000
    assert SudokuSource("test", seed=1)[0].prompt != prompts[0]
    with pytest.raises(ValueError, match="more than the number of different test puzzles"):
        SudokuSource("test", min_givens=4, max_givens=4, size=10000)


def test_sudoku_refusals() -> None:
    for bad in ({"min_givens": 3}, {"max_givens": 16}, {"min_givens": 9, "max_givens": 8}):
        with pytest.raises(ValueError, match="min_givens <= max_givens"):
            SudokuSource("train", **bad)
    with pytest.raises(ValueError, match="at least 1"):
        SudokuSource("train", size=0)
    source = SudokuSource("train", size=10)
    for index in (10, -1):
        with pytest.raises(IndexError, match=f"row {index} "):
            source[index]


PUZZLE = "1000\n0014\n0200\n3040"
ANSWER = "1423\n2314\n4231\n3142"


def test_is_solution() -> None:
    assert is_solution(PUZZLE, ANSWER)
    assert is_solution(PUZZLE, f"\n {ANSWER}\n")
    assert is_solution(ANSWER, ANSWER)


BAD_ANSWERS = {
    "empty": "",
    "puzzle itself": PUZZLE,
    "a given changed": "2413\n1324\n4132\n3241",
    "rows only": "1234\n1234\n1234\n1234",
    "rows and columns, not boxes": "1234\n2341\n3412\n4123",
    "three lines": "1423\n2314\n4231",
    "five lines": ANSWER + "\n1423",
    "one line": ANSWER.replace("\n", ""),
    "spaces": ANSWER.replace("\n", " \n"),
    "blank line": ANSWER.replace("\n", "\n\n", 1),
    "words": ANSWER + " done",
    "other digits": ANSWER.replace("1", "\u0661"),
    "carriage returns": ANSWER.replace("\n", "\r\n"),
}


@pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_is_not_a_solution(answer: str) -> None:
    assert not is_solution(PUZZLE, answer)


def test_a_valid_grid_must_keep_the_givens() -> None:
    wrong = sum(is_solution(PUZZLE, grid_text(grid)) for grid in solution_grids())
    assert wrong == 1 and solutions(PUZZLE).tolist() == [digits(ANSWER)]
    assert len(solutions("0000\n" * 3 + "0000")) == 288
    assert len(solutions("1100\n" + "0000\n" * 2 + "0000")) == 0
    with pytest.raises(ValueError, match="not a 4x4 puzzle"):
        is_solution("1000", ANSWER)


def grid_text(grid: np.ndarray) -> str:
    return "\n".join("".join(map(str, row)) for row in grid.reshape(4, 4).tolist())


# --- files ---

TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a", "extra": 1},
]


def test_chat_rows(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "c.jsonl", {"messages": TURNS}, {"prompt": "p\u2028", "response": "r", "id": 3})
    rows = parse_lines(file, parse_chat)
    assert len(rows) == 2
    assert rows[0].prompt == tuple(TURNS[:2]) and rows[0].response == "a"
    assert rows[1].prompt == ({"role": "user", "content": "p\u2028"},) and rows[1].response == "r"
    assert rows[1].meta == {"where": f"{file}:2"}
    with pytest.raises(IndexError, match="row 2 "):
        rows[2]


def test_chat_file_may_have_a_mark_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "\xc3\xa9", "response": "r"}\r\n\r\n  \n')
    assert parse_lines(file, parse_chat)[0].prompt == ({"role": "user", "content": "é"},)


BAD_LINES = {
    "not json": ("{'messages': 1}", "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "list": ("[1]", "a list, but each line"),
    "no schema": ('{"text": "x"}', r"fields \['text'\]"),
    "half a schema": ('{"prompt": "x"}', r"fields \['prompt'\]"),
    "empty response": ('{"prompt": "x", "response": " "}', "'response' is empty"),
    "empty prompt": ('{"prompt": "", "response": "x"}', "'prompt' is empty"),
    "wrong type": ('{"prompt": "x", "response": 3}', "'response' must be a string, not int 3"),
    "surrogate": ('{"prompt": "x", "response": "\\ud800"}', "half of a surrogate pair"),
    "no messages": ('{"messages": []}', "must be a list with at least one message"),
    "messages text": ('{"messages": "x"}', "must be a list"),
    "message text": ('{"messages": ["x"]}', "message 0: must be an object"),
    "role": ('{"messages": [{"role": "critic", "content": "x"}]}', "role 'critic' must be one of"),
    "no content": ('{"messages": [{"role": "user"}]}', "message 0: no field 'content'"),
    "null content": ('{"messages": [{"role": "user", "content": null}]}', "'content' must be a string"),
    "user last": ('{"messages": [{"role": "user", "content": "x"}]}', "last message is the user's"),
    "alone": ('{"messages": [{"role": "assistant", "content": "x"}]}', "message is the only one"),
    "latin": (b'{"prompt": "\xe9", "response": "x"}', "not UTF-8"),
    "binary": (bytes(range(255, 0, -1)), "not UTF-8"),
}


@pytest.mark.parametrize(("line", "complaint"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_chat_lines(tmp_path: Path, line: str | bytes, complaint: str) -> None:
    file = tmp_path / "bad.jsonl"
    raw = line.encode() if isinstance(line, str) else line
    file.write_bytes(b'{"prompt": "p", "response": "r"}\n' + raw + b"\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2: .*{complaint}"):
        parse_lines(file, parse_chat)


def test_files_without_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        parse_lines(tmp_path / "empty.jsonl", parse_chat)
    with pytest.raises(FileNotFoundError, match="no file"):
        parse_lines(tmp_path / "none.jsonl", parse_chat)


def test_gsm8k_and_puzzle_rows(tmp_path: Path) -> None:
    row = parse_lines(write_lines(tmp_path / "g.jsonl", {"question": "q", "answer": "#### 1"}), parse_gsm8k)[0]
    assert row.prompt == ({"role": "user", "content": "q"},) and row.response == "#### 1"
    row = parse_lines(write_lines(tmp_path / "p.jsonl", {"input": PUZZLE, "output": ANSWER}), parse_puzzle)[0]
    assert row.prompt == PUZZLE + "\n" and row.response == ANSWER
    with pytest.raises(ValueError, match=r"g\.jsonl:1: no field 'input'"):
        parse_lines(tmp_path / "g.jsonl", parse_puzzle)
    with pytest.raises(ValueError, match=r"p\.jsonl:1: no field 'question'"):
        parse_lines(tmp_path / "p.jsonl", parse_gsm8k)


# --- open_source ---


def test_open_sudoku() -> None:
    assert open_source("sudoku", "train", seed=2)[9] == SudokuSource("train", seed=2, min_givens=6)[9]
    assert open_source("sudoku", "test", seed=2)[9] == SudokuSource("test", seed=2, min_givens=6)[9]


def test_open_gsm8k(assets: Path) -> None:  # the fixture skips where DREAM_JAX_ASSETS is not set
    train, test = open_source("gsm8k", "train"), open_source("gsm8k", "test")
    assert (len(train), len(test)) == (7473, 1319)
    assert train[0].response.endswith("#### 72")


def test_gsm8k_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAM_JAX_ASSETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="set DREAM_JAX_ASSETS"):
        open_source("gsm8k")
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    write_lines(tmp_path / "data" / "gsm8k" / "test.jsonl", {"question": "q", "answer": "a"})
    assert len(open_source("gsm8k", "test")) == 1
    monkeypatch.delenv("DREAM_JAX_ASSETS")
    with pytest.raises(FileNotFoundError, match="set DREAM_JAX_ASSETS"):
        open_source("gsm8k")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS[1:]},
        {"prompt": "q", "response": "a"},
        {"question": "q", "answer": "a"},
        {"input": "q", "output": "a"},
    ],
)
def test_open_detects_the_schema(tmp_path: Path, row: dict) -> None:
    file = write_lines(tmp_path / "rows.jsonl", row, row)
    for source in (open_source(file), open_source(str(file))):
        assert len(source) == 2 and source[1].response == "a"
        assert source[0].prompt == ("q\n" if "input" in row else ({"role": "user", "content": "q"},))


def test_open_directory(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", {"prompt": "p", "response": "train"})
    assert open_source(tmp_path)[0].response == "train"
    with pytest.raises(FileNotFoundError, match=r"no test\.jsonl"):
        open_source(tmp_path, "test")
    write_lines(tmp_path / "test.jsonl", {"prompt": "p", "response": "test"})
    assert open_source(tmp_path, "test")[0].response == "test"


def test_open_refusals(tmp_path: Path) -> None:
    for name in ("sudokus", str(tmp_path / "nothing"), f"{tmp_path.name}/x/y"):
        with pytest.raises(ValueError, match=r"neither a known name.*Supported: \"sudoku\", \"gsm8k\", \"s1k\""):
            open_source(name)
    for suffix in (".jsonl", ".json", ".parquet"):
        with pytest.raises(FileNotFoundError, match="no file"):
            open_source(tmp_path / f"rows{suffix}")
    with pytest.raises(ValueError, match="must be 'train' or 'test'"):
        open_source("sudoku", "valid")
    file = write_lines(tmp_path / "s1k.jsonl", {"question": "q", "solution": "s"})
    with pytest.raises(ValueError, match=r"s1k\.jsonl:1: fields \['question', 'solution'\] match no known schema"):
        open_source(file)


def responses(source: RowSource) -> list[str]:
    return [source[index].response for index in range(len(source))]


def test_hold_out_is_disjoint_by_prompt_and_about_5_percent(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n % 1000}", "response": f"r{n}"} for n in range(2000)]
    file = write_lines(tmp_path / "rows.jsonl", *rows)
    train, test = open_source(file, "train"), open_source(file, "test", seed=5)
    assert sorted(responses(train) + responses(test)) == sorted(row["response"] for row in rows)
    assert 50 < len(test) < 160
    prompts = [{str(source[index].prompt) for index in range(len(source))} for source in (train, test)]
    assert not prompts[0] & prompts[1]
    # Order and company change nothing: a row keeps its side.
    half = write_lines(tmp_path / "half.jsonl", *reversed(rows[:1000]))
    assert {r for r in responses(test) if int(r[1:]) < 1000} == set(responses(open_source(half, "test")))


def test_hold_out_of_small_files() -> None:
    def rows(*prompts: str) -> RowList:
        return RowList([Row(prompt=prompt, response="r") for prompt in prompts])

    for count in range(2, 8):
        source = rows(*map(str, range(count)))
        assert len(hold_out(source, "test", "f")) >= 1 and len(hold_out(source, "train", "f")) >= 1
    assert len(hold_out(rows("a", "a"), "train", "f")) == 2
    with pytest.raises(ValueError, match=r"f has only one prompt.*train\.jsonl and test\.jsonl"):
        hold_out(rows("a", "a"), "test", "f")


# --- encoding ---


def test_encode_raw_row() -> None:
    encoded = encode_row(Row(prompt="ab", response="é"), BYTES, 8)
    assert encoded is not None
    assert encoded.tokens.tolist() == [97, 98, 0xC3, 0xA9, 256]
    assert (encoded.prompt_length, encoded.length, encoded.text_length, encoded.whole) == (2, 5, 2, True)
    batch = lay_out([encoded], [6], 8, BYTES.pad_id)
    assert batch.tokens_BT.tolist() == [[97, 98, 0xC3, 0xA9, 256, 256, 256, 256]]
    assert batch.maskable_BT.tolist() == [[False] * 2 + [True] * 6]
    assert batch.tokens_BT.dtype == np.int32 and batch.maskable_BT.dtype == np.bool_


def test_encode_fits_exactly_or_not_at_all() -> None:
    row = Row(prompt="ab", response="cd")
    exact = encode_row(row, BYTES, 5)
    assert exact is not None and exact.tokens.tolist() == [97, 98, 99, 100, 256]
    assert encode_row(row, BYTES, 4) is None


def test_encode_chat_row() -> None:
    messages = ({"role": "user", "content": "q"},)
    encoded = encode_row(Row(prompt=messages, response="<|mask|>"), BYTES, 64)
    assert encoded is not None
    prompt = BYTES.chat(messages)
    assert encoded.prompt_length == len(prompt) and encoded.tokens[: len(prompt)].tolist() == prompt
    assert encoded.tokens[len(prompt) :].tolist() == [*b"<|mask|>", 256]


def test_encode_refuses_an_empty_prompt() -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        encode_row(Row(prompt="", response="x"), BYTES, 8)


def test_encode_with_the_real_tokenizer(assets: Path) -> None:
    dream = load_tokenizer(assets / "dream-v0-instruct-7b")
    encoded = encode_row(open_source("gsm8k")[0], dream, 512)
    assert encoded is not None
    text = dream.decode(encoded.tokens)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nNatalia")
    assert text.endswith("#### 72<|endoftext|>") and "<|im_start|>assistant\nNatalia sold 48/2" in text
    batch = lay_out([encoded], [512 - encoded.prompt_length], 512, dream.pad_id)
    assert batch.maskable_BT.sum() == 512 - encoded.prompt_length
    assert (batch.tokens_BT[0, encoded.length :] == 151643).all()
    # The source promises one length; with this tokenizer too, every digit and newline is one token.
    source = SudokuSource("train", size=300)
    rows = [encode_row(source[index], dream, 64) for index in range(300)]
    assert {row.length for row in rows if row is not None} == {40} and None not in rows


def ragged(count: int = 50) -> RowList:
    """Row n has n % 10 + 3 tokens and says its number in its first."""
    return RowList([Row(prompt=chr(n + 1), response="x" * (n % 10 + 1)) for n in range(count)])


def test_length_report() -> None:
    report = length_report(TokenizedRows(ragged(), BYTES), 8)
    assert (report.total, report.measured, report.kept, report.dropped) == (50, 50, 30, 20)
    assert (report.shortest, report.longest, report.mean) == (3, 12, 7.5)
    assert str(report) == (
        "30 rows kept, 20 dropped (50 in all) at max_length 8; tokens: shortest 3, mean 7.5, longest 12"
    )
    part = length_report(TokenizedRows(ragged(), BYTES), 8, limit=10)
    assert (part.total, part.measured, part.kept + part.dropped) == (50, 10, 10)
    assert "of 10 measured (50 in all)" in str(part)
    assert length_report(TokenizedRows(ragged(), BYTES), 8, limit=99) == report


def test_length_report_of_a_uniform_source_measures_one() -> None:
    report = length_report(TokenizedRows(SudokuSource("train"), BYTES), 40)
    assert (report.total, report.measured, report.kept, report.dropped) == (1_000_000, 1, 1_000_000, 0)
    assert report.shortest == report.longest == 40


def test_length_report_refusals() -> None:
    with pytest.raises(ValueError, match=r"no row fits into max_length=2.*shortest has 3.*longest 12"):
        length_report(TokenizedRows(ragged(), BYTES), 2)
    with pytest.raises(ValueError, match="no row fits"):
        length_report(TokenizedRows(SudokuSource("train"), BYTES), 39)
    with pytest.raises(ValueError, match="no rows"):
        length_report(TokenizedRows(RowList([]), BYTES), 8)
    with pytest.raises(ValueError, match="limit=0"):
        length_report(TokenizedRows(ragged(), BYTES), 8, limit=0)


# --- batches ---


def batches_of(source: RowSource, **changes: Any) -> Batches:
    settings: dict[str, Any] = {"batch_size": 8, "max_length": 8, "seed": 0, **changes}
    return make_batches(TokenizedRows(source, BYTES), **settings)


def take(source: RowSource, steps: int, **changes: Any) -> list[Batch[np.ndarray]]:
    with batches_of(source, **changes) as batches:
        return [next(batches) for _ in range(steps)]


def first_tokens(batches: list[Batch[np.ndarray]]) -> list[int]:
    return np.concatenate([batch.tokens_BT[:, 0] for batch in batches]).tolist()


def assert_same(left: list[Batch[np.ndarray]], right: list[Batch[np.ndarray]]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for name, array in vars(one).items():
            np.testing.assert_array_equal(array, getattr(other, name))


def test_batch_contents() -> None:
    source = ragged(10)
    (batch,) = take(source, 1)
    assert batch.valid_BT is None
    assert {name: (array.shape, str(array.dtype)) for name, array in vars(batch).items() if array is not None} == {
        "tokens_BT": ((8, 8), "int32"),
        "maskable_BT": ((8, 8), "bool"),
        "row_B": ((8,), "int32"),
    }
    assert batch.row_B.tolist() == list(range(8))
    for tokens, maskable in zip(batch.tokens_BT, batch.maskable_BT, strict=True):
        encoded = encode_row(source[int(tokens[0]) - 1], BYTES, 8)
        assert encoded is not None
        assert tokens.tolist() == [*encoded.tokens, *[BYTES.pad_id] * (8 - encoded.length)]
        assert maskable.tolist() == [False] + [True] * 7


def test_each_epoch_is_another_permutation_of_what_fits() -> None:
    stream = first_tokens(take(ragged(), 15, batch_size=6))  # 90 rows: three epochs of 30
    epochs = [stream[start : start + 30] for start in (0, 30, 60)]
    fitting = [n + 1 for n in range(50) if n % 10 + 3 <= 8]
    assert all(sorted(epoch) == fitting for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and fitting not in epochs


@pytest.mark.parametrize("process_count", [2, 4])
def test_global_batches_do_not_depend_on_the_process_count(process_count: int) -> None:
    # 30 of 50 rows fit and 30 is no multiple of 8: batches straddle epochs, in every process alike.
    whole = take(ragged(), 12)
    parts = [take(ragged(), 12, process_index=p, process_count=process_count) for p in range(process_count)]
    for step, batch in enumerate(whole):
        locals_ = [part[step] for part in parts]
        rows = np.concatenate([local.row_B for local in locals_])
        assert sorted(rows.tolist()) == list(range(8))
        order = np.argsort(rows)
        for name in ("tokens_BT", "maskable_BT"):
            together = np.concatenate([getattr(local, name) for local in locals_])[order]
            np.testing.assert_array_equal(together, getattr(batch, name))
    for p, part in enumerate(parts):
        assert part[0].row_B.tolist() == [j * process_count + p for j in range(8 // process_count)]


def test_seed_decides_the_order() -> None:
    assert_same(take(ragged(), 9, seed=4), take(ragged(), 9, seed=4))
    assert first_tokens(take(ragged(), 9, seed=4)) != first_tokens(take(ragged(), 9, seed=5))
    sudoku = SudokuSource("train")
    assert_same(take(sudoku, 3, max_length=48), take(sudoku, 3, max_length=48))


@pytest.mark.parametrize("threads", [{"num_threads": 0}, {"num_threads": 3}, {"prefetch": 0}, {"prefetch": 9}])
def test_threads_change_nothing(threads: dict[str, int]) -> None:
    assert_same(take(ragged(), 9), take(ragged(), 9, **threads))


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_resume_is_exact(steps: int) -> None:
    with batches_of(ragged()) as batches:
        for _ in range(steps):
            next(batches)
        state = json.loads(json.dumps(batches.get_state()))
        expected = [next(batches) for _ in range(6)]
        batches.set_state(state)  # back, in the same iterator
        assert_same([next(batches) for _ in range(6)], expected)
    with batches_of(ragged()) as fresh:
        fresh.set_state(state)
        assert_same([next(fresh) for _ in range(6)], expected)
        assert fresh.get_state() != state


def test_resume_on_another_number_of_processes() -> None:
    with batches_of(ragged(), process_count=2, process_index=1) as one:
        for _ in range(5):
            next(one)
        state = one.get_state()
    with batches_of(ragged()) as other:
        other.set_state(state)
        assert_same([next(other)], take(ragged(), 6)[5:])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"batch_size": 4}, "batch_size was 8, now 4"),
        ({"max_length": 9}, "rows was"),
    ],
)
def test_resume_refuses_another_stream(change: dict[str, int], complaint: str) -> None:
    with batches_of(ragged()) as batches:
        state = batches.get_state()
    with batches_of(ragged(), **change) as other, pytest.raises(ValueError, match=complaint):
        other.set_state(state)


def test_one_row_and_a_batch_larger_than_the_source() -> None:
    batches = take(RowList([Row(prompt="a", response="b")]), 2, batch_size=3)
    assert first_tokens(batches) == [97] * 6


def test_batches_report_and_refusals() -> None:
    with batches_of(ragged()) as batches:
        assert (batches.report.kept, batches.report.dropped) == (30, 20)
    for bad in ({"batch_size": 0}, {"batch_size": 9, "process_count": 2}, {"process_count": 0}):
        with pytest.raises(ValueError, match="positive multiple of process_count"):
            batches_of(ragged(), **bad)
    for index in (-1, 2):
        with pytest.raises(ValueError, match="process_index"):
            batches_of(ragged(), process_count=2, process_index=index)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="seed"):
            batches_of(ragged(), seed=seed)
    with pytest.raises(ValueError, match="must not be negative"):
        batches_of(ragged(), num_threads=-1)
    with pytest.raises(ValueError, match="no row fits"):
        batches_of(ragged(), max_length=2)


def test_a_broken_promise_of_one_length_is_an_error() -> None:
    class Liar(RowList):
        uniform_length = True

    source = Liar([Row(prompt="a", response="x" * (1 if n == 0 else 50)) for n in range(20)])
    with batches_of(source) as batches, pytest.raises(ValueError, match="set its uniform_length to False"):
        next(batches)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


def test_close_ends_the_threads() -> None:
    with batches_of(ragged(), num_threads=2) as batches:
        next(batches)
        assert reading_threads()
    batches.close()
    for thread in reading_threads():
        thread.join(timeout=10)
    assert not reading_threads()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


@pytest.mark.slow
def test_sudoku_batches_are_fast_enough_and_an_open_iterator_does_not_hold_up_the_exit() -> None:
    """CPU time a row, from drawing to batch: about 40 microseconds; the limit is for a busy machine.

    In a process of its own: no conftest, so no checked annotations, and its own exit.
    """
    code = """
import time
from dream_jax.data import SudokuSource, TokenizedRows, make_batches
from dream_jax.tokenizer import ByteTokenizer
times = []
rows, settings = TokenizedRows(SudokuSource("train"), ByteTokenizer()), {"batch_size": 128, "max_length": 48, "seed": 0}
with make_batches(rows, num_threads=0, **settings) as batches:
    for _ in range(30):
        start = time.thread_time()
        next(batches)
        times.append(time.thread_time() - start)
open_batches = make_batches(rows, **settings)
next(open_batches)
print(min(times) / 128 * 1e6)
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == "" and float(done.stdout) < 200
