"""Generates training rows of every form in which a chat can be written, for tests that compare their readers.

A list of rows has one style, because a column of a parquet file has one type: content as text or in parts, arguments as
objects or as JSON text. Objects have their names in one order, because a column of objects has one order.
"""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

FORMS = ("messages", "prompt", "question", "instruction", "prompt and completion", "reasoning")
KINDS = ("jsonl", "json", "parquet", "saved")
"""The kinds of files that `write` writes."""

_TEXTS = (
    "2+2?",
    "Où est-ce?\n",
    " spaced ",
    "<|im_end|>\n<|im_start|>system",
    "\ue000\ue001",
    "😀",
    "null",
    '{"a": null}',
)


def training_rows(form: str, seed: int, count: int = 6, tools: bool = False) -> list[dict[str, Any]]:
    """Returns rows of one form, which differ in all that the form allows. The first has every field at every depth.

    tools: whether turns of the assistant call tools, which the byte tokenizer does not support.
    """
    draw = random.Random(f"{form} {seed} {tools}")
    style = {"parts": draw.random() < 0.5, "as_text": draw.random() < 0.5, "tools": tools}
    return [_row(form, draw, style, full=index == 0) for index in range(count)]


def as_question(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a training row without the answer that it ends with: what a model is asked."""
    answers = ("response", "answer", "output", "completion", "attempt", "thinking_trajectories", "solution")
    kept = {name: value for name, value in row.items() if name not in answers}
    for name in ("messages", "conversations"):
        if name in kept and kept[name][-1].get("role", kept[name][-1].get("from")) in ("assistant", "gpt"):
            kept[name] = kept[name][:-1]
    return kept


def write(kind: str, folder: Path, rows: Sequence[dict[str, Any]], name: str = "rows") -> Path:
    """Writes rows as one kind of file or directory, and returns its path."""
    path = folder / (name if kind == "saved" else f"{name}.{kind}")
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(list(rows), indent=1), encoding="utf-8")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif kind == "saved":
        datasets.Dataset(pyarrow.Table.from_pylist(list(rows))).save_to_disk(path)
    else:
        raise AssertionError(kind)
    return path


def _row(form: str, draw: random.Random, style: dict[str, bool], full: bool) -> dict[str, Any]:
    def maybe(name: str, value: Any, share: float = 0.5) -> dict[str, Any]:
        return {name: value} if full or draw.random() < share else {}

    def text() -> str:
        return draw.choice(_TEXTS)

    if form == "messages":
        messages = list(_messages(draw, style, full))
        return {**maybe("tools", _tools(draw, style, full)), "messages": messages, **maybe("id", draw.randrange(99))}
    extras = maybe("system", draw.choice(("", "Be brief.")))
    if form == "prompt and completion":
        turns = list(_messages(draw, style, full))
        for turn in turns:
            turn.pop("weight", None)
        return {"prompt": turns[:-1], "completion": turns[-1:]}
    extras |= maybe("history", [[text(), text()] for _ in range(1 if full else draw.randrange(3))])
    extras |= maybe("context", draw.choice(("", "CREATE TABLE t (a INT)")))
    if form == "reasoning":
        answer = {"thinking_trajectories": [text(), text()], "attempt": text()}
        return {**extras, **maybe("solution", "4"), "question": text(), **answer}
    if form == "question":
        extras |= maybe("choices", [text() for _ in range(draw.randint(1, 4))])
        return {**extras, "question": text(), "answer": text()}
    if form == "instruction":
        return {**extras, "instruction": text(), **maybe("input", draw.choice(("", "abc"))), "output": text()}
    return {**extras, "prompt": text(), "response": text(), **maybe("score", draw.random())}


def _messages(draw: random.Random, style: dict[str, bool], full: bool) -> Iterable[dict[str, Any]]:
    def content(text: str) -> Any:
        return [{"type": "text", "text": text}] if style["parts"] else text

    if draw.random() < 0.5:
        yield {"role": "system", "content": content(draw.choice(("", "Be brief.")))}
    for turn in range(2 if full else draw.randint(1, 3)):
        yield {"role": "user", "content": content(draw.choice(_TEXTS)), **({"name": "ada"} if full else {})}
        if style["tools"] and (full or draw.random() < 0.5):
            call = {"name": "look", "arguments": _arguments(draw, style, full)}
            calls = [{"id": f"c{turn}", "type": "function", "function": call}]
            yield {"role": "assistant", "content": draw.choice((None, content("I look."))), "tool_calls": calls}
            yield {"role": "tool", "content": content(draw.choice(("", "18 C"))), "tool_call_id": f"c{turn}"}
        weight = {"weight": draw.choice((0, 1))} if full or draw.random() < 0.4 else {}
        yield {"role": "assistant", "content": content(draw.choice(_TEXTS)), **weight}
    if draw.random() < 0.3:
        yield {"role": "user", "content": content("Once more.")}
        yield {"role": "assistant", "content": content("No."), "weight": 1}


def _arguments(draw: random.Random, style: dict[str, bool], full: bool) -> Any:
    values = {"city": "Paris", "days": [1, 2], "unit": {"name": "C", "digits": 1}, "wide": True}
    if not full:
        values = {name: value for name, value in values.items() if draw.random() < 0.5}
        if "unit" in values and draw.random() < 0.5:
            values["unit"] = {"digits": 2}
    return json.dumps(values | {"since": None}) if style["as_text"] else values


def _tools(draw: random.Random, style: dict[str, bool], full: bool) -> Any:
    if not style["tools"]:
        return []
    properties: dict[str, Any] = {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "wide": {"type": "boolean"}}
    if not full:
        properties = {name: value for name, value in properties.items() if draw.random() < 0.6}
    function = {"name": "look", "parameters": {"type": "object", "properties": properties}}
    tools = [{"type": "function", "function": function}]
    if style["as_text"]:
        properties["unit"] = {"enum": ["C", None], "default": None}
        return json.dumps(tools)
    return tools
