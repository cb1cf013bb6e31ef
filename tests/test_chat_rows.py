"""The one reader of chats: every field of a row is read, refused or counted, and every kind of file gives the same rows."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from generated_chats import FORMS, KINDS, as_question, training_rows, write

from dream_jax.data import (
    EncodeOptions,
    ReadOptions,
    Row,
    TokenizedRows,
    length_report,
    open_mixture,
    open_source,
    parse_messages,
    read_chat,
    read_question,
    token_row,
)
from dream_jax.data.schemas import NOTHING_LEARNED, check_kind, parse_chat, parser_of
from dream_jax.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from dream_jax.trainer import TrainSettings

BYTES = ByteTokenizer()
ALL = ReadOptions(held_out=0.0)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def open_rows(path: Path, options: ReadOptions = ALL) -> list[Row]:
    source = open_source(path, options=options)
    return [source[index] for index in range(len(source))]


def chat_row(found: dict[str, Any]) -> Row:
    row = parse_chat(found, "f:1")
    assert isinstance(row, Row)
    return row


# --- forms of rows ---

CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"city": "Paris", "day": null}'}}
PARSED = {"name": "look", "arguments": {"city": "Paris", "day": None}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"enum": ["a", None], "default": None}}}

FORMS_READ: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "alpaca": ({"instruction": "Reverse.", "input": "abc", "output": "cba"}, [user("Reverse.\nabc")], "cba"),
    "alpaca without input": ({"instruction": "Go.", "input": "", "output": "o"}, [user("Go.")], "o"),
    "alpaca, null input": ({"instruction": "Go.", "input": None, "output": "o"}, [user("Go.")], "o"),
    "alpaca, only input": ({"instruction": "", "input": "abc", "output": "o"}, [user("abc")], "o"),
    "dolly": ({"instruction": "Who?", "context": "Ada.", "response": "Ada"}, [user("Ada.\n\nWho?")], "Ada"),
    "system column": ({"system": "s", "prompt": "p", "response": "r"}, [system("s"), user("p")], "r"),
    "system_prompt": ({"system_prompt": "s", "question": "q", "answer": "a"}, [system("s"), user("q")], "a"),
    "empty system column": ({"system": "", "prompt": "p", "response": "r"}, [user("p")], "r"),
    "system beside messages": ({"system": "s", "messages": [user("u"), assistant("a")]}, [system("s"), user("u")], "a"),
    "the same system twice": (
        {"system": "s", "messages": [system("s"), user("u"), assistant("a")]},
        [system("s"), user("u")],
        "a",
    ),
    "context": ({"context": "c", "question": "q", "answer": "a"}, [user("c\n\nq")], "a"),
    "choices": ({"question": "q", "choices": ["x", "y"], "answer": "B"}, [user("q\nA. x\nB. y")], "B"),
    "options by letter": ({"question": "q", "options": {"A": "x"}, "answer": "A"}, [user("q\nA. x")], "A"),
    "choices with labels": (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        [user("q\n1. x\n2. y")],
        "2",
    ),
    "history of pairs": (
        {"history": [["h", "i"]], "prompt": "p", "response": "r"},
        [user("h"), assistant("i"), user("p")],
        "r",
    ),
    "history of messages": (
        {"history": [user("h"), assistant("i")], "instruction": "p", "output": "r"},
        [user("h"), assistant("i"), user("p")],
        "r",
    ),
    "no history": ({"history": [], "prompt": "p", "response": "r"}, [user("p")], "r"),
    "prompt and completion": ({"prompt": "p", "completion": "c"}, [user("p")], "c"),
    "both as messages": ({"prompt": [user("p")], "completion": [assistant("c")]}, [user("p")], "c"),
    "messages, answer apart": ({"messages": [user("u")], "response": "r"}, [user("u")], "r"),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], "system": "s"},
        [system("s"), user("u")],
        "a",
    ),
    "parts": (
        {"messages": [user([{"type": "text", "text": "2+"}, {"type": "text", "text": "2"}]), assistant("4")]},  # type: ignore[arg-type]
        [user("2+2")],
        "4",
    ),
    "empty system": ({"messages": [system(""), user("u"), assistant("a")]}, [system(""), user("u")], "a"),
    "developer": (
        {"messages": [{"role": "developer", "content": "s"}, user("u"), assistant("a")]},
        [system("s"), user("u")],
        "a",
    ),
    "nothing from a tool": (
        {"messages": [user("u"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": ""}, assistant("a")]},
        [user("u"), assistant("", tool_calls=[PARSED]), {"role": "tool", "content": ""}],
        "a",
    ),
    "function_call": (
        {
            "messages": [
                user("u"),
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
                {"role": "function", "name": "look", "content": "18 C"},
                assistant("a"),
            ]
        },
        [user("u"), assistant("", tool_calls=[PARSED]), {"role": "tool", "content": "18 C"}],
        "a",
    ),
}


@pytest.mark.parametrize(("found", "prompt", "response"), FORMS_READ.values(), ids=FORMS_READ.keys())
def test_forms_of_rows(tmp_path: Path, found: dict, prompt: list, response: str) -> None:
    row = chat_row(found)
    assert list(row.prompt) == prompt and row.response == response
    assert list(read_question(as_question(found), "f:1").messages) == prompt
    # The form of a file does not depend on the row that comes first.
    plain = {"prompt": "x", "response": "y"}
    for rows in ([found, plain], [plain, found]):
        read = open_rows(write("jsonl", tmp_path, rows))
        assert [one.response for one in read if one.response != "y"] == [response]


def test_tools_as_list_or_text() -> None:
    turns = [user("u"), assistant("a")]
    text = json.dumps([TOOL])
    for tools in ([TOOL], text, [json.dumps(TOOL)]):
        assert chat_row({"tools": tools, "messages": turns}).tools == (TOOL,)
    assert chat_row({"functions": [TOOL["function"]], "messages": turns}).tools == (TOOL,)
    for nothing in ([], "", "[]", "null", None):
        assert chat_row({"tools": nothing, "messages": turns}).tools == ()
    for bad in ("[1]", "{", {"a": 1}, [3], '"x"'):
        with pytest.raises(ValueError, match="^f:1: .*'tools'"):
            chat_row({"tools": bad, "messages": turns})


def test_results_are_in_the_order_of_their_calls() -> None:
    """The chat template shows no ids, so a result belongs to the call of its position."""
    calls = [CALL | {"id": "one"}, CALL | {"id": "two"}]
    results = [{"role": "tool", "content": name, "tool_call_id": name} for name in ("two", "one")]
    turns = parse_messages([user("u"), assistant("", tool_calls=calls), *results], "f:1")
    assert [turn["content"] for turn in turns] == ["u", "", "one", "two"]


# --- refused or counted ---

TURNS = [user("u"), assistant("a")]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "context of a chat": ({"messages": TURNS, "context": "c"}, "'context' belongs to the prompt"),
    "history of a chat": ({"messages": TURNS, "history": [["a", "b"]]}, "'history' belongs to the prompt"),
    "two questions": ({"prompt": "p", "question": "q", "response": "r"}, "'question' belongs to the prompt"),
    "spelt otherwise": ({"System": "s", "prompt": "p", "response": "r"}, "'System' belongs to the prompt"),
    "input of a prompt": ({"input": "i", "prompt": "p", "response": "r"}, "'input' belongs to the prompt"),
    "images": ({"images": ["x.png"], "prompt": "p", "response": "r"}, "'images' belongs to the prompt"),
    "two answers": ({"prompt": "p", "response": "r", "completion": "s"}, "'completion' says what is learned"),
    "rejected": ({"prompt": "p", "response": "r", "rejected": "s"}, "'rejected' says what is learned"),
    "weight of a row": ({"prompt": "p", "response": "r", "weight": 0}, "'weight' says what is learned"),
    "reasoning": (
        {"messages": [user("u"), assistant("a", reasoning_content="hm")]},
        "message 1: the field 'reasoning_content'",
    ),
    "thinking": ({"messages": [user("u"), assistant("a", thinking="hm")]}, "message 1: the field 'thinking'"),
    "tools of a message": ({"messages": [user("u") | {"tools": [1]}, assistant("a")]}, "message 0: the field 'tools'"),
    "two systems": ({"system": "s", "messages": [system("t"), *TURNS]}, "'system' and the system message .* differ"),
    "image part": ({"messages": [user([{"type": "image_url"}]), assistant("a")]}, "'image_url'; only parts"),  # type: ignore[arg-type]
    "system of a puzzle": ({"input": "i", "output": "o", "system": "s"}, "'system' belongs to the prompt"),
    "prompt of a document": ({"text": "t", "prompt": "p"}, "'prompt' belongs to the prompt"),
    "calls of a user": (
        {"messages": [user("u") | {"tool_calls": [CALL]}, assistant("a")]},
        "only the assistant can call",
    ),
    "calls twice": (
        {"messages": [user("u"), assistant("", tool_calls=[CALL], function_call=CALL["function"])]},
        "two forms of one thing",
    ),
    "choices": ({"question": "q", "choices": [1], "answer": "a"}, r"'choices\[0\]' must be a string"),
    "history": ({"history": [["a"]], "prompt": "p", "response": "r"}, "'history' must be a list"),
    "surrogate in a tool": ({"tools": [{"name": "\ud800"}], "messages": TURNS}, "'tools' has half of a surrogate pair"),
    "surrogate in a message": ({"messages": [user("\udfff"), assistant("a")]}, "message 0: 'content' has half of a"),
    "surrogate in an argument": (
        {"messages": [user("u"), assistant("", tool_calls=[{"name": "f", "arguments": {"a": ["\ud800"]}}])]},
        "'arguments' has half of a surrogate pair",
    ),
    "arguments in depth": (
        {"messages": [user("u"), assistant("", tool_calls=[{"name": "f", "arguments": '{"a":' + "[" * 100_000}])]},
        "the arguments of a tool call are not JSON",
    ),
    "tools in depth": ({"tools": json.loads("[" * 90 + "]" * 90), "messages": TURNS}, "list of objects"),
    "a schema in depth": (
        {"tools": [{"a": json.loads("[" * 90 + "]" * 90)}], "messages": TURNS},
        "more than 64 levels",
    ),
    "several answers": ({"question": "q", "answer": ["a", "b"]}, r"'answer' must be a string, not list \['a', 'b'\]"),
    "a sender": ({"conversations": [{"from": "critic", "value": "u"}]}, "'from' 'critic' must be one of human"),
    "no such mark": ({"messages": [user("u"), assistant("a", weight=0.5)]}, "'weight' must be 0 or 1"),
    "marks that differ": ({"messages": [user("u"), assistant("a", weight=0, train=True)]}, "contradict each other"),
    "a name that is no JSON": (
        {"messages": [user("u"), assistant("", tool_calls=[{"name": 'f"', "arguments": {}}])]},
        "message 1: the name .* of a tool call has a quotation mark",
    ),
    "two names of a call": (
        {"messages": [user("u"), assistant("", tool_calls=[CALL | {"name": "g"}])]},
        r"message 1: a tool call has \['name'\] beside 'function'",
    ),
    "two texts": (
        {"conversations": [{"from": "human", "value": "u", "content": "v"}, {"from": "gpt", "value": "a"}]},
        "message 0: both 'value' and 'content' are the text of a message",
    ),
    "no number in an argument": (
        {"messages": [user("u"), assistant("", tool_calls=[{"name": "f", "arguments": {"a": [float("nan")]}}])]},
        "'arguments' has the number nan, which JSON cannot represent",
    ),
    "no number in a tool": ({"tools": [{"a": float("inf")}], "messages": TURNS}, "'tools' has the number inf"),
    "another mark": ({"messages": [user("u"), assistant("a", training=False)]}, "message 1: the field 'training'"),
    "a user to learn": ({"messages": [user("u") | {"train": True}, assistant("a")]}, "only turns of the assistant"),
}


@pytest.mark.parametrize(("found", "complaint"), REFUSED.values(), ids=REFUSED.keys())
def test_fields_that_have_no_place_are_refused(tmp_path: Path, found: dict, complaint: str) -> None:
    file = write("jsonl", tmp_path, [found, found])
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: .*{complaint}"):
        open_source(file, options=ALL)


def test_a_name_twice_in_one_object_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "p", "response": "r", "prompt": "q"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*'prompt' occurs twice"):
        open_source(file)


def test_rows_after_the_end_of_a_list_are_refused(tmp_path: Path) -> None:
    one = json.dumps([{"prompt": "p", "response": "r"}], indent=1)
    file = tmp_path / "rows.json"
    file.write_text(f"{one}\n\n")
    assert len(open_rows(file)) == 1
    file.write_text(f"{one}\n{one}\n")
    with pytest.raises(ValueError, match=r"rows\.json:7: after the end of the list comes '\["):
        open_rows(file)


def test_a_row_in_great_depth_is_refused(tmp_path: Path) -> None:
    """Python could read 900 levels, but not print them in an error message."""
    deep = json.loads("[" * 900 + "]" * 900)
    for kind in ("jsonl", "json"):
        with pytest.raises(ValueError, match=rf"rows\.{kind}:\d+: not JSON \(nested too deeply"):
            open_source(write(kind, tmp_path, [{"prompt": "p", "response": "r", "system": deep}]))
    many = [{"a": [[]] * 200}] * 60  # many brackets, but not in depth
    assert open_rows(write("jsonl", tmp_path, [{"prompt": "p", "response": "r", "notes": many}]))[0].unread == (
        "notes",
    )


def test_rows_of_two_kinds_are_refused_in_either_order(tmp_path: Path) -> None:
    chat, puzzle = {"instruction": "i", "input": "", "output": "o"}, {"input": "i", "output": "o"}
    for rows in ([chat, puzzle], [puzzle, chat]):
        with pytest.raises(ValueError, match=r"rows\.jsonl:2: .* make a (puzzle|chat) row, but .*:1 is of the kind"):
            open_source(write("jsonl", tmp_path, rows))
    skip = ReadOptions(skip_bad=True, held_out=0.0)
    for rows in ([puzzle, chat, chat], [chat, puzzle, chat]):
        source = open_source(write("jsonl", tmp_path, rows), options=skip)
        assert (
            len(source) == 2
            and len(source.intake.bad) == 1
            and "most rows are of the kind chat" in source.intake.bad[0]
        )


def test_other_fields_are_counted_and_printed(tmp_path: Path) -> None:
    first = {"id": 1, "score": 0.5, "prompt": "p", "response": "so r", "answer": "r", "text": "p so r", "tags": []}
    second = {"messages": [user("u") | {"name": "ada"}, assistant("a", logprob=-1.0)], "prompt": "u", "id": 2}
    file = write("jsonl", tmp_path, [first, second])
    source = open_source(file, options=ALL)
    counts = {"id": 2, "score": 1, "answer": 1, "text": 1, "prompt": 1, "messages.name": 1, "messages.logprob": 1}
    assert source.intake.unread == counts
    lines = length_report(TokenizedRows(source, BYTES), 200).lines()
    assert any(
        line.startswith("fields of the files that are not read: answer (1 rows), id (2 rows), messages.")
        for line in lines
    )
    odd = {"prompt": "p", "response": "r", "\ud800": 1, "\x1b[2J": 1} | {f"f{number}": 1 for number in range(60)}
    source = open_source(write("jsonl", tmp_path, [odd]), options=ALL)
    (line,) = [one for one in length_report(TokenizedRows(source, BYTES), 200).lines() if "not read" in one]
    assert line.isprintable() and r"'\x1b[2J' (1 rows)" in line and line.endswith(" and 22 others")
    file = write("jsonl", tmp_path, [first, second])
    mixed = open_mixture([str(file), str(file)], options=ALL)
    assert mixed.intake.unread == {name: 2 * count for name, count in counts.items()}


def test_ignored_fields_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"messages": [user("u"), assistant("a", reasoning_content="hm")], "context": "c"},
        {"messages": TURNS},
    ]
    file = str(write("jsonl", tmp_path, rows))
    settings = TrainSettings.flat(data=file, ignore_field=("context", "reasoning_content"), held_out=0.0, eval_rows=0)
    source = settings.source("train")
    assert source[0].prompt == source[1].prompt and source.intake.ignored == {"context": 1, "reasoning_content": 1}
    report = length_report(TokenizedRows(source, BYTES), 200)
    assert (
        "fields of the files that are left out on request (--ignore-field): context (1 rows), reasoning_content (1 rows)"
        in report.lines()
    )
    assert report.plain()["ignored"] == {"context": 1, "reasoning_content": 1}
    assert settings.plain()["ignore_field"] == ["context", "reasoning_content"]
    with pytest.raises(ValueError, match=r"no row has the field\(s\) \['contxt'\] of --ignore-field"):
        TrainSettings.flat(data=file, ignore_field=("context", "reasoning_content", "contxt")).source("train")


# --- questions ---


def test_questions() -> None:
    asked = read_question({"prompt": "p", "response": "r", "note": 1}, "f:1")
    assert asked.messages == (user("p"),) and asked.text == "p" and asked.unread == ("note", "response")
    assert read_question({"prompt": "p", "solution": "s", "weight": 2}, "f:1").unread == ("solution", "weight")
    assert read_question({"prompt": "p", "system": "s"}, "f:1").text is None
    assert read_question({"prompt": "p", "tools": [TOOL]}, "f:1").text is None
    assert read_question({"messages": [user("u")], "contains": "x"}, "f:1", known=("contains",)).unread == ()
    for found, complaint in (
        ({"messages": TURNS}, "the last message is the assistant's"),
        ({"messages": [system("s")]}, "the last message is the system's"),
        ({"contains": "x"}, r"a question needs 'messages' or 'prompt', .*\['contains'\]"),
        ({"messages": [user("u")], "context": "c"}, "'context' belongs to the prompt.*remove the field"),
    ):
        with pytest.raises(ValueError, match=f"^f:1: .*{complaint}") as refused:
            read_question(found, "f:1")
        assert "--ignore-field" not in str(refused.value)


# --- marks of turns ---


def learned_text(row: Row, turns: str) -> list[str]:
    tokens = token_row(row, BYTES, EncodeOptions(learned_turns=turns))  # type: ignore[arg-type]
    ids, learned = tokens.tokens, tokens.maskable
    edges = [0, *(np.flatnonzero(np.diff(learned.astype(int))) + 1), len(ids)]
    runs = itertools.pairwise(edges)
    return [BYTES.decode(ids[start:stop].tolist()) for start, stop in runs if learned[start]]


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"trainable": False}, {"loss_mask": 0}, {"weight": 0.0}]
)
def test_marked_turns_are_given(mark: dict[str, Any]) -> None:
    turns = [user("17 * 3?"), assistant("41", **mark), user("No."), assistant("51"), user("Sure?"), assistant("Yes.")]
    row = chat_row({"messages": turns})
    assert learned_text(row, "all") == ["51", "Yes.<|endoftext|>"] and learned_text(row, "last") == [
        "Yes.<|endoftext|>"
    ]
    assert (
        token_row(row, BYTES).tokens.tolist()
        == token_row(row, BYTES, EncodeOptions(learned_turns="all")).tokens.tolist()
    )
    early = chat_row({"messages": [*turns[:-1], turns[-1] | mark]})
    assert early.ends_early and learned_text(early, "last") == ["51<|endoftext|>"]
    assert parse_chat({"messages": turns[:2]}, "f:1") == NOTHING_LEARNED


def test_rows_without_anything_to_learn_are_counted(tmp_path: Path) -> None:
    rows = [{"messages": [user("u"), assistant("a", weight=weight)]} for weight in (0, 1)]
    source = open_source(write("jsonl", tmp_path, rows), options=ALL)
    assert len(source) == 1 and source.intake.filtered == {NOTHING_LEARNED: 1}
    with pytest.raises(ValueError, match=f"no row is left; .*{NOTHING_LEARNED}"):
        open_source(write("jsonl", tmp_path, rows[:1]), options=ALL)


def test_the_answers_in_a_prompt_are_given() -> None:
    prompt = [user("u"), assistant("a"), user("v")]
    row = chat_row({"prompt": prompt, "completion": [assistant("b")]})
    assert learned_text(row, "all") == ["b<|endoftext|>"]


# --- kinds of files ---


def test_nulls_are_padding_in_columns_only(tmp_path: Path) -> None:
    def row(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        tool = {"name": name, "parameters": {"properties": {key: {"enum": ["a", None]} for key in arguments}}}
        calls = [{"name": name, "arguments": {"what": [arguments]}}]
        return {"tools": [tool], "messages": [user("u"), assistant("", tool_calls=calls)]}

    rows = [row("move", {"x": 1, "y": 2}), row("drill", {"beam": 3})]
    expected = [(one.prompt, one.response, one.tools) for one in open_rows(write("jsonl", tmp_path, rows))]
    for kind in KINDS:
        found = open_rows(write(kind, tmp_path, rows))
        assert [(one.prompt, one.response, one.tools) for one in found] == expected, kind
    # A null that an author has written stays, in an object of a JSON file and in JSON text of every file.
    given = {"city": "Paris", "unit": None}
    for kind, arguments in (("jsonl", given), *((kind, json.dumps(given)) for kind in KINDS)):
        calls = [{"name": "f", "arguments": arguments}]
        path = write(kind, tmp_path, [{"messages": [user("u"), assistant("", tool_calls=calls)]}])
        assert '"arguments": {"city": "Paris", "unit": null}' in open_rows(path)[0].response, kind


def test_columns_of_the_type_json_keep_their_nulls(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": {"city": "Paris", "unit": None}}
    features = datasets.Features({"messages": datasets.List(datasets.Json()), "id": datasets.Value("string")})
    table = {"messages": [[user("u"), assistant("", tool_calls=[call])]], "id": [None]}
    saved = datasets.Dataset.from_dict(table, features=features)
    saved.save_to_disk(tmp_path / "saved")
    saved.to_parquet(tmp_path / "rows.parquet")
    for name in ("saved", "rows.parquet"):
        (row,) = open_rows(tmp_path / name)
        assert '"unit": null' in row.response and row.unread == ()


def test_a_map_is_an_object(tmp_path: Path) -> None:
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    arguments = pyarrow.array([[("city", "Paris"), ("unit", None)]], kind)
    calls = pyarrow.StructArray.from_arrays([pyarrow.array(["f"]), arguments], ["name", "arguments"])
    listed = pyarrow.ListArray.from_arrays([0, 0, 1], calls)
    messages = pyarrow.StructArray.from_arrays(
        [pyarrow.array(["user", "assistant"]), pyarrow.array(["u", ""]), listed], ["role", "content", "tool_calls"]
    )
    table = pyarrow.table({"messages": pyarrow.ListArray.from_arrays([0, 2], messages)})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert '{"city": "Paris", "unit": null}' in open_rows(tmp_path / "rows.parquet")[0].response


def test_bad_values_of_columns_are_named(tmp_path: Path) -> None:
    """Names twice in a map, text that is not UTF-8, text that is not JSON in a column of JSON, and the year 73 million."""
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    tools = pyarrow.array([[("name", "f"), ("name", "g")]], kind)
    not_text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")]
    )
    not_json = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(["{"]))
    for column, complaint in (
        (tools, "row 1: the name 'name' occurs twice"),
        (not_text, "a text after row 0 is not UTF-8"),
        (not_json, "row 1: not JSON"),
        (pyarrow.array([2**61], pyarrow.timestamp("ms")), "a value after row 0 cannot be read"),
    ):
        table = pyarrow.table({"prompt": ["p"], "response": ["r"], "tools": column})
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        with pytest.raises(ValueError, match=rf"rows\.parquet:? ?{complaint}"):
            open_rows(tmp_path / "rows.parquet")


def test_a_column_twice_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table([["p"], ["q"], ["r"]], names=["prompt", "prompt", "response"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet: the columns \['prompt'\] occur twice"):
        open_rows(tmp_path / "rows.parquet")


@pytest.fixture(scope="module")
def dream(assets: Path) -> Tokenizer:
    return load_tokenizer(assets / "dream-v0-instruct-7b")


def check_all_readers(folder: Path, rows: list[dict[str, Any]], tokenizer: Tokenizer) -> None:
    """Every kind of file gives the same tokens, and the question of a row is the prompt that is trained on."""
    learned = EncodeOptions(learned_turns="all")
    first = None
    for kind in KINDS:
        found = [one for one in open_rows(write(kind, folder, rows))]
        tokens = [token_row(one, tokenizer, learned) for one in found]
        plain = [(one.tokens.tolist(), one.pieces) for one in tokens]
        first = first or plain
        assert plain == first, kind
    for row in rows:
        trained = parser_of(check_kind(row, "f:1"), ALL)(row, "f:1")
        if isinstance(trained, Row) and not trained.ends_early:
            asked = read_question(as_question(row), "f:1")
            assert asked.messages == trained.prompt and asked.tools == trained.tools
            if not trained.pieces:
                assert read_chat(row, "f:1").messages[:-1] == asked.messages


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_every_file_and_every_reader_gives_the_same_tokens(tmp_path: Path, form: str, seed: int) -> None:
    check_all_readers(tmp_path, training_rows(form, seed), BYTES)


@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
@pytest.mark.parametrize("seed", range(4))
def test_the_same_with_tools(tmp_path: Path, dream: Tokenizer, form: str, seed: int) -> None:
    check_all_readers(tmp_path, training_rows(form, seed, tools=True), dream)


STRANGE: tuple[Any, ...] = (
    *(
        None,
        "",
        " ",
        "x",
        "\ud800",
        "[",
        "{}",
        "[]",
        "null",
        0,
        -1,
        10**400,
        1.5,
        float("nan"),
        True,
        False,
        [],
        {},
        [None],
    ),
    *([1], [[]], [["a", "b"]], [{}], {"a": None}, {"text": 1}, ["x", {"type": "text"}], [{"role": "user"}], b"x"),
    json.loads("[" * 200 + "]" * 200),
)


def mutated(value: Any, draw: random.Random) -> Any:
    """A value in which one thing is another, is missing, or has another name."""
    if draw.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return draw.choice(STRANGE)
    if isinstance(value, list):
        index = draw.randrange(len(value))
        return [*value[:index], *([] if draw.random() < 0.2 else [mutated(value[index], draw)]), *value[index + 1 :]]
    name = draw.choice(list(value))
    rest = {key: inside for key, inside in value.items() if key != name}
    if draw.random() < 0.2:
        return rest
    if draw.random() < 0.2:
        return {**rest, draw.choice(("context", "system", "choices", "weight", "Prompt", "\ud800", "x")): value[name]}
    return {**value, name: mutated(value[name], draw)}


def test_a_mutated_row_is_read_or_refused_with_its_location() -> None:
    draw = random.Random(0)
    seen = Counter[str]()
    for number in range(700):
        found = draw.choice(training_rows(draw.choice(FORMS), number % 7, tools=number % 2 == 0))
        for _ in range(draw.randint(1, 2)):
            found = mutated(found, draw)
            if not isinstance(found, dict):
                found = {"messages": found}
        for read in (parse_row, read_question):
            try:
                read(found, "f:1")
                seen["read"] += 1
            except ValueError as refused:
                assert str(refused).startswith("f:1: "), refused
                seen["refused"] += 1
    assert min(seen.values()) > 200


def parse_row(found: dict[str, Any], where: str) -> Row | str:
    """A training row, whose tokens are made too, unless it needs tools, which the byte tokenizer does not know."""
    row = parser_of(check_kind(found, where), ReadOptions())(found, where)
    if isinstance(row, Row):
        turns = row.prompt if isinstance(row.prompt, tuple) else ()
        if not row.tools and all(turn["role"] != "tool" for turn in turns):
            token_row(row, BYTES, EncodeOptions(learned_turns="all"))
    return row


# --- splits and configurations ---


def split_rows(name: str) -> list[dict[str, Any]]:
    return [{"messages": [user(f"{name} {number}"), assistant(name)]} for number in range(9)]


def responses(path: Path | str, side: str, **options: Any) -> set[str]:
    source = open_source(path, side, options=ReadOptions(**options))
    return {source[index].response for index in range(len(source))}


def test_splits_of_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(split_rows(name)) for name in ("train_sft", "test_sft", "train_gen")}
    )
    made.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    for name, one in made.items():
        one.to_parquet(tmp_path / "files" / f"{name}-00000-of-00001.parquet")
    asked = []

    def load_dataset(*names: str | None, revision: str | None) -> datasets.DatasetDict:
        asked.append(names)
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for path in (tmp_path / "saved", tmp_path / "files", "somebody/chats"):
        with pytest.raises((ValueError, FileNotFoundError), match=r"(?s)train.*--data-split"):
            open_source(path)
        for side in ("train", "test"):  # without --eval-split, a share of the training split is held out
            assert responses(path, side, split="train_sft") == {"train_sft"}
        assert 5 < len(open_source(path, options=ReadOptions(split="train_sft"))) < 9
        both = {"split": "train_sft", "test_split": "test_sft"}
        assert [responses(path, side, **both) for side in ("train", "test")] == [{"train_sft"}, {"test_sft"}]
        assert len(open_source(path, options=ReadOptions(**both))) == 9
        with pytest.raises((ValueError, FileNotFoundError), match="tarin"):
            open_source(path, options=ReadOptions(split="tarin"))
    open_source("somebody/chats", options=ReadOptions(split="train_sft", config="main"))
    assert asked[-1] == ("somebody/chats", "main") and asked[0] == ("somebody/chats", None)


def test_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            write("jsonl", tmp_path / name, split_rows(name), split)
    assert responses(tmp_path, "test", config="socratic") == {"socratic"}
    with pytest.raises(
        ValueError, match=r"no folder 'other' for --data-config; its folders are \['main', 'socratic'\]"
    ):
        open_source(tmp_path, options=ReadOptions(config="other"))
    with pytest.raises(ValueError, match="nothing to choose from with --data-config main"):
        open_source(tmp_path / "main" / "train.jsonl", options=ReadOptions(config="main"))
    with pytest.raises(ValueError, match="sudoku has nothing to choose from with --data-split train_sft"):
        open_source("sudoku", options=ReadOptions(split="train_sft"))

    def load_dataset(*names: str | None, revision: str | None) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"pick one among .*'socratic'\]; choose a configuration with --data-config"):
        open_source("somebody/chats")


def test_names_of_splits_are_settings_of_the_first_data_only(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write("jsonl", tmp_path / "a", split_rows("sft"), "train_sft")
    other = write("jsonl", tmp_path, split_rows("other"), "other")
    chosen = {
        "data": str(tmp_path / "a"),
        "mix": (str(other),),
        "data_split": "train_sft",
        "held_out": 0.0,
        "eval_rows": 0,
    }
    assert len(TrainSettings.flat(**chosen).source("train")) == 18
    with pytest.raises(ValueError, match=r"split='../x' \(--data-split\) is not a name"):
        TrainSettings.flat(data_split="../x")
    with pytest.raises(ValueError, match="is the split that is trained on"):
        TrainSettings.flat(data_split="a", eval_split="a")


# --- characters ---


def test_private_use_characters_stay_as_they_are(dream: Tokenizer) -> None:
    every = "".join(map(chr, range(0xE000, 0xF900)))
    for text in (every, "\ue000<|im_start|>\ue000", "\ue000" * 5 + "<|mask|>"):
        ids = dream.chat([user(text), assistant(text), user("v")])
        assert dream.decode(ids).count(text) == 2
        assert ids.count(dream.im_start_id) == 5 and dream.mask_id not in ids
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        dream.chat([user("\ud800")])
