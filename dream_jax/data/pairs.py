"""Reads pairs of a chosen and a rejected answer to one prompt.

The forms are those of TRL's preference data: texts or messages, with a prompt of its own or with the beginning that both
answers share as the prompt. docs/data.md lists them.
"""

from collections.abc import Mapping
from typing import Any

from dream_jax.data.chats import QUESTION_FIELDS, read_prompt, read_tools, settle
from dream_jax.data.fields import FieldReader, holds_messages
from dream_jax.data.messages import CHAT_FIELDS, MessageReader
from dream_jax.data.rows import Mixture, Row, RowSource
from dream_jax.tokenizer import Message, turn_text

ANSWERS = ("chosen", "rejected")
"""The fields with the two answers of a pair, the better one first."""

_FORMS = (
    "a pair needs 'chosen' and 'rejected', both texts or both lists of messages, and a prompt: 'prompt' or 'messages' (a "
    "chat), 'input' (a puzzle, which has no chat template), or the beginning that both answers share"
)


def parse_pair(found: Mapping[str, Any], where: str) -> Row:
    """Returns the row of a pair: its `response` is the chosen answer, and `rejected` the other one.

    Raises:
      ValueError: an answer is missing, empty or of a wrong type, the answers are equal or do not belong to one prompt,
        there is no prompt, or a field that belongs to the prompt or to the answers has no use. The message begins with
        `where`.
    """
    fields = FieldReader(found, where)
    for name in ANSWERS:
        if name not in fields:
            raise ValueError(f"{where}: no field {name!r}; the record has the fields {sorted(fields.found)}. {_FORMS}")
    listed = [holds_messages(fields.found[name]) for name in ANSWERS]
    if listed[0] != listed[1]:
        raise ValueError(
            f"{where}: one of 'chosen' and 'rejected' is a list of messages and the other is not. {_FORMS}"
        )
    prompt: str | tuple[Message, ...]
    if listed[0]:
        prompt, answers = _of_messages(fields)
    else:
        prompt, answers = _of_texts(fields)
    for name, answer in zip(ANSWERS, answers, strict=True):
        if not answer.strip():
            raise ValueError(f"{where}: {name!r} is empty")
    chosen, rejected = answers
    if chosen == rejected:
        raise ValueError(
            f"{where}: 'chosen' and 'rejected' are the same answer, so the pair says nothing: {chosen!r:.60}"
        )
    tools = read_tools(fields)
    shown = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    return Row(
        prompt=prompt,
        response=chosen,
        rejected=rejected,
        tools=tools,
        meta={"where": where},
        unread=settle(fields, shown, f"{chosen}\n{rejected}"),
    )


def _of_messages(fields: FieldReader) -> tuple[tuple[Message, ...], tuple[str, str]]:
    """Returns the prompt and both answers of a record whose answers are lists of messages."""
    where, readers = fields.where, []
    for name in ANSWERS:
        reader = MessageReader(where)
        reader.add(fields.take(name), name)
        if reader.turns[-1]["role"] != "assistant":
            raise ValueError(
                f"{where}: the last message of {name!r} is the {reader.turns[-1]['role']}'s, not an answer"
            )
        readers.append(reader)
    chosen, rejected = (reader.turns for reader in readers)
    most = min(len(chosen), len(rejected)) - 1
    count = next((index for index in range(most) if chosen[index] != rejected[index]), most)
    shared = tuple(chosen[:count])
    for name, turns in zip(ANSWERS, (chosen, rejected), strict=True):
        if len(turns) != count + 1:
            raise ValueError(
                f"{where}: 'chosen' and 'rejected' differ from message {count} on, but {name!r} has {len(turns)} messages; "
                "only the last message, which is the answer, may differ"
            )
    answers = (turn_text(chosen[-1]), turn_text(rejected[-1]))
    columns = fields.one_of((*CHAT_FIELDS, *QUESTION_FIELDS))
    if not shared:
        if columns is None:
            raise ValueError(f"{where}: the answers share no message, and there is no field with the prompt. {_FORMS}")
        return read_prompt(fields), answers
    if columns is not None and holds_messages(fields.found[columns]):
        # The whole chat may stand there once more, with the chosen answer or without an answer.
        reader = MessageReader(where)
        reader.add(fields.take(columns), columns)
        if tuple(reader.turns) not in (shared, tuple(chosen)):
            raise ValueError(
                f"{where}: {columns!r} is neither the beginning of 'chosen' nor all of it; remove one of them"
            )
    return shared, answers  # a text in a column is compared with the messages by `settle`


def _of_texts(fields: FieldReader) -> tuple[str | tuple[Message, ...], tuple[str, str]]:
    """Returns the prompt and both answers of a record whose answers are texts."""
    chosen, rejected = (fields.text(name) for name in ANSWERS)
    if fields.one_of((*CHAT_FIELDS, *QUESTION_FIELDS)) is not None:
        return read_prompt(fields), (chosen, rejected)
    if "input" in fields:
        return fields.text("input") + "\n", (chosen, rejected)
    if chosen == rejected:
        return "", (chosen, rejected)  # refused by the caller
    most = min(len(chosen), len(rejected))
    count = next((index for index in range(most) if chosen[index] != rejected[index]), most)
    # The prompt ends with a space or a line break, so that no word is divided between prompt and answer.
    while count and not chosen[count - 1].isspace():
        count -= 1
    if not chosen[:count].strip():
        raise ValueError(
            f"{fields.where}: the answers share no beginning, and there is no field with the prompt. {_FORMS}"
        )
    return chosen[:count], (chosen[count:], rejected[count:])


def check_pairs(source: RowSource, objective: str) -> None:
    """Raises ValueError, with file and line, if a row has no rejected answer.

    All rows of a file are of one kind, so only the first row of each part of a mixture is read.
    """
    for part in source.parts if isinstance(source, Mixture) else (source,):
        row = part[0]
        if row.rejected is None:
            where = row.meta.get("where", "the first row")
            raise ValueError(f"{where}: no rejected answer, but --objective {objective} learns from pairs. {_FORMS}")


def check_no_pairs(source: RowSource, objective: str) -> None:
    """Raises ValueError, with file and line, if rows are pairs. Of each part of a mixture the first row is read."""
    for part in source.parts if isinstance(source, Mixture) else (source,):
        row = part[0]
        if row.rejected is not None:
            raise ValueError(
                f"{row.meta.get('where', 'the first row')}: a pair of answers, which --objective {objective} cannot learn "
                "from: give --objective vrpo or simpo, or rows with one answer"
            )
