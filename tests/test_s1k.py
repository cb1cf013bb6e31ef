"""s1K: both schemas out of every kind of file, answer formats, length policies and bad rows, by hand on ten rows."""

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dream_jax.data import (
    EncodeOptions,
    ReadOptions,
    Row,
    TokenizedRows,
    TokenRow,
    encode_row,
    length_report,
    make_batches,
    open_source,
    token_row,
)
from dream_jax.data.encode import ALL_PROMPT, NO_ROOM, TOO_LONG
from dream_jax.data.schemas import parse_s1k
from dream_jax.data.sources import read_rows
from dream_jax.tokenizer import ByteTokenizer, load_tokenizer

ROOT = Path(__file__).parent.parent
BYTES = ByteTokenizer()
LENGTH = 100

# With bytes as tokens: <|im_start|> "user\nq" <|im_end|> "\n" <|im_start|> "assistant\n" is 20, <|im_start|> "think\n"
# 7, "\n" 1, <|im_start|> "answer\n" 8, the answer 2 and the end token 1.
PROMPT, FIXED = 20, 39
FULL = [FIXED + 10 * (n + 1) for n in range(10)]  # 49, 59, ... 139: six of ten fit into 100


def s1k_row(n: int) -> dict[str, Any]:
    return {
        "question": "q",
        "solution": f"s{n}",
        "attempt": f"a{n}",
        "thinking_trajectories": ["t" * (10 * (n + 1))],
        "cot_type": "math",
        "source_type": "made",
        "metadata": "{}",
        "cot": None,
    }


def s1k_1_1_row(n: int) -> dict[str, Any]:
    return {
        "question": "q",
        "solution": f"s{n}",
        "cot_type": "math",
        "source_type": "made",
        "metadata": "{}",
        "gemini_thinking_trajectory": "not this",
        "gemini_attempt": "nor this",
        "deepseek_thinking_trajectory": "t" * (10 * (n + 1)),
        "deepseek_attempt": f"a{n}",
        "gemini_grade": "Yes",
        "deepseek_grade": "No" if n % 5 == 4 else "Yes",
        "deepseek_grade_reason": "because",
    }


SCHEMAS = {"s1k": s1k_row, "s1k-1.1": s1k_1_1_row}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(params=SCHEMAS)
def ten(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_lines(tmp_path / "ten.jsonl", [SCHEMAS[request.param](n) for n in range(10)])


def rows_of(source: Any) -> list[Row]:
    return [source[index] for index in range(len(source))]


# --- schemas and formats ---


def test_both_schemas_give_the_same_row(ten: Path) -> None:
    row = read_rows(ten)[3]
    assert row.prompt == ({"role": "user", "content": "q"},)
    assert row.response == "<|im_start|>think\n" + "t" * 40 + "\n<|im_start|>answer\nAnswer: a3"
    assert row.meta["where"] == f"{ten}:4" and row.meta["solution"] == "s3"
    d1 = read_rows(ten, ReadOptions(answer_format="d1"))[3]
    assert d1.response == "<reasoning>" + "t" * 40 + "</reasoning>\n<answer>a3</answer>"


def whole_text(record: Mapping[str, Any], answer_format: Any) -> str:
    """A row of s1K as the model reads it, special tokens by name."""
    row = parse_s1k(record, "here:1", answer_format)
    return BYTES.decode(token_row(row, BYTES).tokens)


PUBLISHED = {
    "question": "What is 2+2?",
    "thinking_trajectories": ["Two and two\nmake four.\n", "Or count."],
    "attempt": " Adding gives \\boxed{4}.\n",
}
USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
# What the published code of s1 and d1 makes of this row, within the chat template of the byte tokenizer.
GOLDEN = {
    "s1": (
        f"{USER}What is 2+2?{ASSISTANT}<|im_start|>think\nTwo and two\nmake four.\n\nOr count.\n<|im_start|>answer\n"
        "Answer:  Adding gives \\boxed{4}.<|endoftext|>"
    ),
    "d1": (
        f"{USER}\nRespond in the following format:\n<reasoning>\nYour reasoning here\n</reasoning>\n"
        "<answer>\n...\n</answer>\n"
        f"\n\nWhat is 2+2?{ASSISTANT}<reasoning>Two and two\nmake four.\n</reasoning>\n"
        "<answer> Adding gives \\boxed{4}.\n</answer><|endoftext|>"
    ),
    "s1-0.1": (
        f"{USER}What is 2+2?{ASSISTANT}<|im_start|>think\nTwo and two\nmake four.\n\nOr count.\n<|im_start|>answer\n"
        "Adding gives \\boxed{4}.<|endoftext|>"
    ),
    "d1-0.1": (
        f"{USER}What is 2+2?{ASSISTANT}<reasoning>Two and two\nmake four.\n\nOr count.</reasoning>\n"
        "<answer>Adding gives \\boxed{4}.</answer><|endoftext|>"
    ),
}


@pytest.mark.parametrize("answer_format", GOLDEN)
def test_the_whole_text_of_a_row(answer_format: str) -> None:
    assert whole_text(PUBLISHED, answer_format) == GOLDEN[answer_format]


def test_an_answer_that_says_answer_gets_no_second_one() -> None:
    for attempt in ("Answer: 4", "So.\n**Final Answer:** 4"):
        text = whole_text(PUBLISHED | {"attempt": attempt}, "s1")
        assert text.endswith(f"<|im_start|>answer\n{attempt}<|endoftext|>")
    assert "answer\nAnswer: ANSWER: 4<" in whole_text(PUBLISHED | {"attempt": "ANSWER: 4"}, "s1")


def test_geminis_traces_are_read_where_deepseeks_are_missing(tmp_path: Path) -> None:
    record = {name: value for name, value in s1k_1_1_row(0).items() if not name.startswith("deepseek")}
    file = write_lines(tmp_path / "g.jsonl", [record, record | {"gemini_grade": "No"}])
    rows = read_rows(file, ReadOptions(only_correct=True))
    assert len(rows) == 1 and rows.intake.filtered == {"gemini_grade is 'No'": 1}
    assert rows[0].response == "<|im_start|>think\nnot this\n<|im_start|>answer\nAnswer: nor this"


def test_the_division_does_not_depend_on_the_format(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "many.jsonl", [s1k_row(0) | {"question": f"q{n}"} for n in range(40)])
    divided = {
        tuple(row.meta["where"] for row in rows_of(open_source(file, "test", options=ReadOptions(answer_format=name))))
        for name in ("s1", "d1", "d1-0.1")
    }
    assert len(divided) == 1


def test_the_format_writes_special_tokens_and_the_text_cannot() -> None:
    made = s1k_row(0) | {"thinking_trajectories": [" one<|im_start|> \n", "two"], "attempt": "<|mask|>\n"}
    row = one_row(made)
    found = token_row(row, BYTES)
    special = [int(token) for token in found.tokens[PROMPT:] if token > 255]
    assert special == [BYTES.im_start_id, BYTES.im_start_id, BYTES.eos_id]
    text = BYTES.decode(found.tokens[PROMPT:])
    assert text == "<|im_start|>think\none<|im_start|> \n\ntwo\n<|im_start|>answer\n<|mask|><|endoftext|>"


def one_row(row: Mapping[str, Any]) -> Row:
    return parse_s1k(row, "here:1", "s1-0.1")


def test_only_correct_keeps_graded_rows_and_needs_grades(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "g.jsonl", [s1k_1_1_row(n) for n in range(10)])
    rows = read_rows(file, ReadOptions(only_correct=True))
    assert len(rows) == 8 and rows.intake.filtered == {"deepseek_grade is 'No'": 2} and not rows.intake.bad
    assert [row.meta["solution"] for row in rows_of(rows)] == [f"s{n}" for n in range(10) if n not in (4, 9)]
    report = length_report(TokenizedRows(rows, BYTES), 200)
    assert "left out by a filter: 2 rows, deepseek_grade is 'No'" in report.lines()
    plain = write_lines(tmp_path / "p.jsonl", [s1k_row(0)])
    with pytest.raises(ValueError, match=r"p\.jsonl:1: no field 'deepseek_grade'"):
        read_rows(plain, ReadOptions(only_correct=True))


# --- files ---


def save_as(kind: str, folder: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as one kind of file or directory; the path to give."""
    table = pyarrow.Table.from_pylist(rows)
    match kind:
        case "jsonl":
            return write_lines(folder / "rows.jsonl", rows)
        case "json list":
            (folder / "rows.json").write_text(json.dumps(rows, indent=1))
            return folder / "rows.json"
        case "json lines":
            return write_lines(folder / "rows.json", rows)
        case "parquet":
            pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=4)
            return folder / "rows.parquet"
        case "shards":
            (folder / "data").mkdir()
            for number, part in enumerate((table.slice(0, 5), table.slice(5))):
                pyarrow.parquet.write_table(part, folder / "data" / f"train-{number:05}-of-00002.parquet")
            return folder
        case "dataset":
            datasets.Dataset(table).save_to_disk(folder / "saved")
            return folder / "saved"
        case "dataset with splits":
            datasets.DatasetDict(train=datasets.Dataset(table)).save_to_disk(folder / "saved")
            return folder / "saved"
    raise AssertionError(kind)


KINDS = ["jsonl", "json list", "json lines", "parquet", "shards", "dataset", "dataset with splits"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str, schema: str) -> None:
    made = [SCHEMAS[schema](n) | {"question": f"q{n}"} for n in range(10)]
    path = save_as(kind, tmp_path, made)
    sides = {split: rows_of(open_source(path, split)) for split in ("train", "test")}
    assert len(sides["train"]) == 9 and len(sides["test"]) == 1
    found = {row.prompt[0]["content"]: row.response for side in sides.values() for row in side}
    expected = write_lines(tmp_path / "expected.jsonl", made)
    assert found == {row.prompt[0]["content"]: row.response for row in rows_of(read_rows(expected))}


def test_positions_in_files_without_lines(tmp_path: Path) -> None:
    rows = [s1k_row(0), s1k_row(1) | {"attempt": " "}]
    for kind, found_at in (
        ("json list", r"rows\.json:14: 'attempt' is empty"),  # [, {, seven lines, three of the list, }, and then {
        ("parquet", r"rows\.parquet:row 2: 'attempt' is empty"),
        ("dataset", r"saved, train:row 2: 'attempt' is empty"),
    ):
        (tmp_path / kind).mkdir()
        with pytest.raises(ValueError, match=found_at):
            open_source(save_as(kind, tmp_path / kind, rows))


def test_the_share_held_out(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [s1k_row(0) | {"question": f"q{n}"} for n in range(200)])
    sizes = {}
    for share in (0.0, 0.05, 0.5):
        options = ReadOptions(held_out=share)
        sizes[share] = len(open_source(file, "train", options=options))
    assert sizes[0.0] == 200 > sizes[0.05] > 180 and 70 < sizes[0.5] < 130
    with pytest.raises(ValueError, match=r"used for training only \(held_out=0\)"):
        open_source(file, "test", options=ReadOptions(held_out=0))
    with pytest.raises(ValueError, match=r"held_out=1.0 is outside \[0, 1\)"):
        ReadOptions(held_out=1.0)


def test_a_test_split_that_is_there_is_taken(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = [s1k_row(n) | {"question": f"{split}{n}"} for n in range(4)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{split}-00000-of-00001.parquet")
    for split in ("train", "test"):
        assert [row.prompt[0]["content"] for row in rows_of(open_source(tmp_path, split))] == [
            f"{split}{n}" for n in range(4)
        ]
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="only one can be the train split"):
        open_source(tmp_path)


def test_the_name_s1k_reads_the_assets_and_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("tried to download"))
    monkeypatch.delenv("DREAM_JAX_ASSETS", raising=False)
    with pytest.raises(FileNotFoundError, match=r"s1k needs its files: set DREAM_JAX_ASSETS.*name a hub data set"):
        open_source("s1k")
    monkeypatch.setenv("DREAM_JAX_ASSETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"data/s1k\.parquet"):
        open_source("s1k")
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "s1k.jsonl", [s1k_row(n) | {"question": str(n)} for n in range(10)])
    assert len(open_source("s1k")) == 9


def test_a_hub_id_is_downloaded_only_when_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, revision: str | None = None) -> datasets.DatasetDict:
        asked.append(name)
        table = pyarrow.Table.from_pylist([s1k_1_1_row(n) | {"question": str(n)} for n in range(10)])
        return datasets.DatasetDict(train=datasets.Dataset(table))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(open_source("somebody/s1K-1.1")) == 9 and asked == ["somebody/s1K-1.1"]
    for slip in ("tests/no-such-data", "somebody", "a/b/c"):  # tests/ is a folder here
        with pytest.raises(ValueError, match="neither a known name nor an existing path"):
            open_source(slip)
    assert len(asked) == 1


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionError, match="no data set of this name could be loaded.*give the path"):
        open_source("somebody/surely-not-there")


# --- bad rows ---

BAD = {
    "no question": ({"attempt": "a", "thinking_trajectories": ["t"]}, "no field 'question'"),
    "empty question": (s1k_row(0) | {"question": "  "}, "'question' is empty"),
    "no traces": (s1k_row(0) | {"thinking_trajectories": []}, "must be a list with at least one text"),
    "trace is text": (s1k_row(0) | {"thinking_trajectories": "t"}, "must be a list with at least one text, not 't'"),
    "trace is null": (s1k_row(0) | {"thinking_trajectories": [None]}, r"'thinking_trajectories\[0\]' must be a string"),
    "attempt is null": (s1k_row(0) | {"attempt": None}, "no field 'attempt'"),
    "no deepseek trace": (
        {key: value for key, value in s1k_1_1_row(0).items() if key != "deepseek_thinking_trajectory"},
        "no field 'deepseek_thinking_trajectory'",
    ),
    "surrogate": (s1k_row(0) | {"attempt": "\ud800"}, "half of a surrogate pair"),
    "a number": (3, "a int, but each line must be one JSON object"),
    "a list": ([s1k_row(0)], "a list, but each line must be one JSON object"),
}


@pytest.mark.parametrize(("bad", "complaint"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_fatal_or_listed(tmp_path: Path, bad: object, complaint: str) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [s1k_row(0), bad, s1k_row(2)])
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{complaint}"):
        read_rows(file)
    rows = read_rows(file, ReadOptions(skip_bad=True))
    assert [row.meta["solution"] for row in rows_of(rows)] == ["s0", "s2"]
    (note,) = rows.intake.bad
    assert note.startswith(f"{file}:2: ")
    assert f"bad row skipped: {note}" in length_report(TokenizedRows(rows, BYTES), 200).lines()


def test_broken_files(tmp_path: Path) -> None:
    skip = ReadOptions(skip_bad=True)
    file = tmp_path / "lines.jsonl"
    file.write_bytes(
        b"\xff\xfe\n{'a'\n" + json.dumps(s1k_row(0)).encode() + b"\n" + json.dumps(s1k_row(1)).encode()[:-9]
    )
    rows = read_rows(file, skip)
    assert len(rows) == 1
    assert [note.split(": ")[0] for note in rows.intake.bad] == [f"{file}:{line}" for line in (1, 2, 4)]
    write_lines(file, [{"x": 1}, {"y": 1}])
    with pytest.raises(ValueError, match=r"no row is left; 2 rows are bad.*lines\.jsonl:1: fields \['x'\]"):
        read_rows(file, skip)
    # What follows a break cannot be read, so these are fatal whatever is asked.
    file = tmp_path / "list.json"
    for text, complaint in (
        (json.dumps([s1k_row(0)])[:-1], r"list\.json:1: neither ',' nor '\]'"),
        (json.dumps([s1k_row(0)])[:-20], r"list\.json:1: not JSON"),
        ('[\n{"a": 1}\n{"b": 1}]', r"list\.json:2: neither"),
        ("[]", "no rows; the list is empty"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=complaint):
            read_rows(file, skip)
    file = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([s1k_row(0)]), file)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"table\.parquet: cannot be read as parquet"):
        read_rows(file, skip)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([s1k_row(0)]).slice(1), file)
    with pytest.raises(ValueError, match=r"table\.parquet: no rows"):
        read_rows(file, skip)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a saved dataset"):
        open_source(tmp_path / "saved")


# --- length policies, by hand ---


# Formats without "Answer: " and without an instruction, so that the lengths are easy to count.
SHORT, SHORT_D1 = ReadOptions(answer_format="s1-0.1"), ReadOptions(answer_format="d1-0.1")


def report_of(file: Path, policy: str, reading: ReadOptions = SHORT) -> Any:
    options = EncodeOptions(length_policy=policy)
    return length_report(TokenizedRows(read_rows(file, reading), BYTES, options), LENGTH)


def test_filter(ten: Path) -> None:
    report = report_of(ten, "filter")
    assert (report.kept, report.dropped, report.cut, report.whole) == (6, 4, 0, 6)
    assert report.reasons == {TOO_LONG: 4}
    assert (report.shortest, report.longest, report.mean) == (49, 139, 94.0) and FULL[-1] == 139
    assert report.histogram == {"32 to 63": 2, "64 to 127": 6, "128 to 255": 2}  # 49 59 | 69 ... 119 | 129 139


def test_right_loses_the_long_answers_and_middle_keeps_them_all(ten: Path) -> None:
    right, middle = report_of(ten, "right"), report_of(ten, "middle")
    assert (right.kept, right.dropped, right.cut, right.whole) == (10, 0, 4, 6)
    assert (middle.kept, middle.dropped, middle.cut, middle.whole) == (10, 0, 4, 10)
    assert "answers kept whole, with their end token: 6 of 10 (60.0%)" in right.lines()
    for n, row in enumerate(rows_of(read_rows(ten, SHORT))):
        texts = {}
        for policy in ("right", "middle"):
            encoded = encode_row(row, BYTES, LENGTH, EncodeOptions(length_policy=policy))
            assert encoded is not None and encoded.length == min(FULL[n], LENGTH)
            assert encoded.prompt_length == PROMPT
            assert encoded.maskable.tolist() == [False] * PROMPT + [True] * (encoded.length - PROMPT)
            texts[policy] = BYTES.decode(encoded.tokens[PROMPT:])
        ending = f"\n<|im_start|>answer\na{n}<|endoftext|>"
        trace = "t" * min(10 * (n + 1), LENGTH - FIXED)
        assert texts["middle"] == f"<|im_start|>think\n{trace}{ending}"
        if n < 6:
            assert texts["right"] == texts["middle"]
        else:  # 80 positions: the marker takes 7, and of row 6's trace (70) all is left, but nothing of its answer
            assert "<|endoftext|>" not in texts["right"] and f"a{n}" not in texts["right"]
            assert texts["right"].startswith("<|im_start|>think\n" + "t" * 70)


def test_answer_only(ten: Path) -> None:
    report = report_of(ten, "answer_only")
    assert (report.kept, report.dropped, report.cut, report.whole) == (10, 0, 0, 10)
    assert report.shortest == report.longest == 31  # no marker, trace and newline of the thinking: 39 - 8
    encoded = encode_row(read_rows(ten, SHORT)[9], BYTES, LENGTH, EncodeOptions(length_policy="answer_only"))
    assert encoded is not None
    assert BYTES.decode(encoded.tokens[PROMPT:31]) == "<|im_start|>answer\na9<|endoftext|>"


def test_policies_of_the_d1_format(ten: Path) -> None:
    # 20 + 11 + 13 + 8 + 2 + 9 + 1 = 64 beside the trace: 74, 84, 94, 104, ...
    reports = {policy: report_of(ten, policy, SHORT_D1) for policy in ("filter", "right", "middle")}
    assert {policy: (one.kept, one.cut, one.whole) for policy, one in reports.items()} == {
        "filter": (3, 0, 3),
        "right": (10, 7, 3),
        "middle": (10, 7, 10),
    }
    row = read_rows(ten, SHORT_D1)[9]
    encoded = encode_row(row, BYTES, LENGTH, EncodeOptions(length_policy="middle"))
    assert encoded is not None
    text = BYTES.decode(encoded.tokens[PROMPT:])
    assert text == "<reasoning>" + "t" * 36 + "</reasoning>\n<answer>a9</answer><|endoftext|>"


def fitted(row: Row, policy: Any) -> TokenRow | str:
    return token_row(row, BYTES, EncodeOptions(length_policy=policy)).fit(LENGTH, policy)


def test_what_no_policy_can_fit() -> None:
    long_answer, plain = one_row(s1k_row(0) | {"attempt": "a" * 70}), Row(prompt="p" * 99, response="r")
    long_prompt = Row(prompt="p" * 100, response="r")
    reasons = {
        (name, policy): fitted(row, policy)
        for name, row in (("answer", long_answer), ("plain", plain), ("prompt", long_prompt))
        for policy in ("filter", "right", "middle", "answer_only")
    }
    assert {key: found for key, found in reasons.items() if isinstance(found, str)} == {
        ("answer", "filter"): TOO_LONG,
        ("answer", "middle"): NO_ROOM,
        ("plain", "filter"): TOO_LONG,
        ("plain", "middle"): TOO_LONG,
        ("plain", "answer_only"): NO_ROOM,
        ("prompt", "filter"): TOO_LONG,
        ("prompt", "right"): ALL_PROMPT,
        ("prompt", "middle"): TOO_LONG,
        ("prompt", "answer_only"): NO_ROOM,
    }  # the others fit: "answer" right, which loses its end; "answer" without its trace; one token of "plain"
    # 107 tokens do not fit, though the trace is only 10 long: with none of it the row is exactly 100 - 3.
    exact = one_row(s1k_row(0) | {"attempt": "a" * 63})
    found = fitted(exact, "middle")
    assert not isinstance(found, str) and found.length == 100 and found.whole
    assert BYTES.decode(found.tokens[PROMPT:]).startswith("<|im_start|>think\n\n<|im_start|>answer\naaa")


def test_a_report_of_nothing_and_settings_that_cannot_be(ten: Path) -> None:
    with pytest.raises(ValueError, match=r"no row fits into max_length=30: .* shortest has 49 tokens, the longest 139"):
        length_report(TokenizedRows(read_rows(ten, SHORT), BYTES), 30)
    with pytest.raises(ValueError, match="length_policy='left' is not one of filter, right, middle, answer_only"):
        EncodeOptions(length_policy="left")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="answer_format='s2' is not one of s1, d1"):
        ReadOptions(answer_format="s2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not make up the response"):
        Row(prompt="p", response="other", pieces=read_rows(ten, SHORT)[0].pieces)


# --- GSM8K in this dress, with the real tokenizer ---


def conversion_script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the script defines; as when it is run, it finds the modules beside it."""
    monkeypatch.syspath_prepend(ROOT / "convert")
    return runpy.run_path(str(ROOT / "convert" / "gsm8k_to_s1k.py"))


@pytest.mark.parametrize("schema", SCHEMAS)
def test_gsm8k_arranged_as_s1k(tmp_path: Path, assets: Path, schema: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = conversion_script(monkeypatch)
    arranged = tmp_path / "arranged.jsonl"
    source = assets / "data" / "gsm8k"
    script["main"](script["ArrangeSettings"](src=source, dst=arranged, schema=schema, rows=300))
    dream = load_tokenizer(assets / "dream-v0-instruct-7b")
    rows = read_rows(arranged, ReadOptions(only_correct=schema == "s1k-1.1"))
    first = rows[0]
    assert first.response.startswith("<|im_start|>think\nNatalia sold 48/2")
    assert first.response.endswith("\n<|im_start|>answer\nAnswer: The answer is \\boxed{72}.")
    kept = {}
    for policy in ("filter", "right", "middle", "answer_only"):
        options = EncodeOptions(length_policy=policy)
        tokenized = TokenizedRows(rows, dream, options)
        report = length_report(tokenized, 160)
        kept[policy] = (report.kept, report.whole)
        assert report.total == 300 and report.kept + report.dropped == 300
        with make_batches(tokenized, batch_size=8, max_length=160, seed=0, num_threads=0) as batches:
            batch = next(batches)
        print(f"\n--- {policy}: {report}\n{dream.decode(batch.tokens_BT[0])}")
        for tokens in batch.tokens_BT:
            text = dream.decode(tokens)
            assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
            assert policy == "right" or (
                "<|im_start|>answer\nAnswer: The answer is \\boxed{" in text and "<|endoftext|>" in text
            )
    # The same 160 tokens: `middle` keeps every answer of the rows it keeps, `right` loses those of the long rows.
    assert kept["filter"][0] == kept["filter"][1] == kept["right"][1] < kept["middle"][0] == kept["middle"][1]
    assert kept["middle"][0] <= kept["answer_only"][0] == kept["answer_only"][1] <= kept["right"][0] == 300
    with pytest.raises(FileExistsError, match="exists; remove it"):
        script["main"](script["ArrangeSettings"](src=source, dst=arranged))


def test_arranging_needs_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    arranged = conversion_script(monkeypatch)["arranged"]
    assert arranged("q", "two\nlines\n#### 1,000", "s1k")["thinking_trajectories"] == ["two\nlines"]
    with pytest.raises(ValueError, match="does not end with a line '#### NUMBER'"):
        arranged("q", "no result", "s1k")
