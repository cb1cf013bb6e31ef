"""Converts records with named fields to rows: one function for each kind of row.

Each function takes a record and `where`, the location of the record in its file ("FILE:LINE" or "FILE:row N"). If a
field is missing, empty or of a wrong type, it raises a ValueError whose message begins with `where`. A field that no
function reads is refused if its name belongs to a prompt or to an answer; otherwise its name is in `Row.unread`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

from dream_jax.data.answer_formats import instruction_of, reasoning, with_instruction
from dream_jax.data.chats import ANSWER_FIELDS, QUESTION_FIELDS, read_chat, read_prompt, settle
from dream_jax.data.fields import FieldReader
from dream_jax.data.messages import CHAT_FIELDS
from dream_jax.data.options import AnswerFormat, ReadOptions
from dream_jax.data.pairs import ANSWERS, parse_pair
from dream_jax.data.records import text_field
from dream_jax.data.rows import Row
from dream_jax.tokenizer import turn_text

Parser = Callable[[Mapping[str, Any], str], Row | str]
"""A function (record, location) -> row. For a record that is left out, it returns the reason (str)."""

RowKind = Literal["chat", "reasoning", "puzzle", "document", "pair"]
"""The kinds of rows: chats, as messages or as columns; s1K's questions with a reasoning trace; puzzles of `input` and
`output`, which have no chat template; documents; and pairs of a chosen and a rejected answer."""

# For each variant of s1K, the fields with the traces, the answer and the grade of the answer; the first one that a record
# has is read. s1K-1.1 has the answers of two models; s1.1 was trained on those of DeepSeek.
_S1K_FIELDS = (
    ("deepseek_thinking_trajectory", "deepseek_attempt", "deepseek_grade"),
    ("thinking_trajectories", "attempt", None),
    ("gemini_thinking_trajectory", "gemini_attempt", "gemini_grade"),
)

NOTHING_LEARNED = "no turn of the assistant is to be learned"


def kind_of(found: Mapping[str, Any]) -> RowKind | None:
    """Returns the kind of a record, which depends only on the names of its fields; None if it is of no known kind."""
    names = found.keys()
    # A single one of both answers beside another answer is a field too much of a chat, and is refused as such.
    if names >= {*ANSWERS} or (not names.isdisjoint(ANSWERS) and names.isdisjoint(ANSWER_FIELDS)):
        return "pair"
    traced = [set(fields[:2]) for fields in _S1K_FIELDS]
    if not names.isdisjoint(CHAT_FIELDS) or ("prompt" in names and not names.isdisjoint(ANSWER_FIELDS)):
        return "chat"
    if "question" in names and any(fields <= names for fields in traced):
        return "reasoning"
    if not (names.isdisjoint(QUESTION_FIELDS) or names.isdisjoint(ANSWER_FIELDS)):
        return "chat"
    if {"input", "output"} <= names:
        return "puzzle"
    return "document" if "text" in names else None


def check_kind(found: Mapping[str, Any], where: str) -> RowKind:
    """Returns the kind of a record. Raises ValueError, which lists the kinds, if it is of none."""
    kind = kind_of(found)
    if kind is None:
        raise ValueError(
            f"{where}: fields {sorted(found)} match no known schema; a row needs one of these sets of fields: 'messages'; "
            "'prompt' and 'response' (or 'completion'); 'question' and 'answer'; 'instruction' and 'output' (and 'input'); "
            "'input' and 'output'; 'text' (a whole document); 'question', 'thinking_trajectories' and 'attempt' (s1K); "
            "'question', 'deepseek_thinking_trajectory' and 'deepseek_attempt' (s1K-1.1); 'chosen' and 'rejected' (pairs)"
        )
    return kind


def parser_of(kind: RowKind, options: ReadOptions) -> Parser:
    """Returns the parser for the records of a kind."""
    parsers: dict[RowKind, Parser] = {
        "chat": parse_chat,
        "reasoning": functools.partial(_parse_graded, options),
        "puzzle": parse_puzzle,
        "document": parse_document,
        "pair": parse_pair,
    }
    return parsers[kind]


def _parse_graded(options: ReadOptions, found: Mapping[str, Any], where: str) -> Row | str:
    row = parse_s1k(found, where, options.answer_format)
    return (_wrong_grade(found, where) if options.only_correct else None) or row


def parse_document(found: Mapping[str, Any], where: str) -> Row:
    """Returns the row of `{"text": str}`: a document without a prompt, every token of which is learned."""
    fields = FieldReader(found, where)
    text = fields.text("text")
    return Row(prompt="", response=text, document=True, meta={"where": where}, unread=settle(fields, (), text))


def parse_gsm8k(found: Mapping[str, Any], where: str) -> Row | str:
    """Returns the row of a GSM8K record `{"question": str, "answer": str}`.

    The prompt is one user turn with the question. The response is the answer, which ends with "#### NUMBER".
    """
    for name in ("question", "answer"):
        text_field(found, name, where)
    return parse_chat(found, where)


def parse_puzzle(found: Mapping[str, Any], where: str) -> Row:
    """Returns the row of `{"input": str, "output": str}`, Dream's format of puzzles, which has no chat template."""
    fields = FieldReader(found, where)
    question, answer = fields.text("input"), fields.text("output")
    shown = ({"role": "user", "content": question},)
    return puzzle_row(question, answer, {"where": where}, settle(fields, shown, answer))


def puzzle_row(question: str, answer: str, meta: Mapping[str, Any], unread: tuple[str, ...] = ()) -> Row:
    """Returns the row of a puzzle: the prompt is the question and a newline, without a template."""
    return Row(prompt=question + "\n", response=answer, meta=meta, unread=unread)


# --- s1K ---


def parse_s1k(found: Mapping[str, Any], where: str, answer_format: AnswerFormat = "s1") -> Row:
    """Returns the row of an s1K record: a question, and a response with a reasoning trace and an answer.

    s1K has `question`, `thinking_trajectories` (a list) and `attempt`; s1K-1.1 has `question`,
    `deepseek_thinking_trajectory`, `deepseek_attempt` and `deepseek_grade`, and the same of Gemini, which are read if
    those of DeepSeek are missing. The prompt is one user turn with the question (and what else `read_prompt` reads, such
    as `system`); the instruction of the format, if it has one, comes before the question. `reasoning` joins the response.
    If present, `solution`, `source_type` and `deepseek_grade` are copied to `meta`.
    """
    fields = FieldReader(found, where)
    traces_field, answer_field, _ = _s1k_fields(found)
    if traces_field == "thinking_trajectories":
        fields.take(traces_field)
        traces, answer = _texts(found, traces_field, where), fields.text(answer_field)
    else:
        traces, answer = [fields.text(traces_field)], fields.text(answer_field)
    text_field(found, "question", where)
    prompt, instruction = read_prompt(fields), instruction_of(answer_format)
    pieces = reasoning(traces, answer, answer_format)
    carried = {name: fields.take(name) for name in ("solution", "source_type", "deepseek_grade") if name in fields}
    return Row(
        prompt=with_instruction(prompt, instruction),
        response="".join(piece.text for piece in pieces),
        pieces=pieces,
        instruction=instruction,
        meta={"where": where, **carried},
        unread=settle(fields, prompt, "\n".join([*traces, answer])),
    )


def _s1k_fields(found: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """Returns the entry of `_S1K_FIELDS` for a record; Gemini's is taken only if there is nothing of DeepSeek."""
    deepseek, plain, gemini = _S1K_FIELDS
    names = {name for name, value in found.items() if value is not None}
    if deepseek[1] in names or (any(name.startswith("deepseek_") for name in names) and names.isdisjoint(plain[:2])):
        return deepseek
    return gemini if gemini[1] in names and plain[1] not in names else plain


def _wrong_grade(found: Mapping[str, Any], where: str) -> str | None:
    """Returns why the row is left out ("deepseek_grade is 'No'"), or None if the grade is "yes" in any case.

    Raises: ValueError if the record has no grade.
    """
    name = _s1k_fields(found)[2] or "deepseek_grade"
    if name not in found:
        raise ValueError(
            f"{where}: no field {name!r}; the record has the fields {sorted(found)}. "
            "Use s1K-1.1, which has grades, or leave out --only-correct"
        )
    grade = text_field(found, name, where).strip()
    return None if grade.casefold() == "yes" else f"{name} is {grade!r}"


def _texts(found: Mapping[str, Any], name: str, where: str) -> list[str]:
    """Returns the texts of a field that is a list. Raises ValueError if there are none, or an item is no text."""
    if name not in found:
        raise ValueError(f"{where}: no field {name!r}; the record has the fields {sorted(found)}")
    traces = found[name]
    if not isinstance(traces, list) or not traces:
        raise ValueError(f"{where}: {name!r} must be a list with at least one text, not {traces!r:.60}")
    trace_by_field = {f"{name}[{index}]": trace for index, trace in enumerate(traces)}
    return [text_field(trace_by_field, field, where) for field in trace_by_field]


# --- Chats ---


def parse_chat(found: Mapping[str, Any], where: str) -> Row | str:
    """Returns the row of a chat, which `read_chat` reads from messages or from columns such as `prompt` and `response`.

    The response is the text of the last turn of the assistant, and all earlier messages are the prompt. Turns that the row
    marks as not to be learned are only given; a chat that ends with them ends earlier, at its last turn to be learned. If
    there is none, `NOTHING_LEARNED` is returned.
    Raises: ValueError as `read_chat`.
    """
    chat = read_chat(found, where)
    turns = chat.messages
    learned = [
        index
        for index, turn in enumerate(turns)
        if index > 0 and turn["role"] == "assistant" and index not in chat.given
    ]
    if not learned:
        return NOTHING_LEARNED
    end = learned[-1]
    return Row(
        prompt=turns[:end],
        response=turn_text(turns[end]),
        tools=chat.tools,
        given_turns=tuple(index for index in chat.given if index < end),
        meta={"where": where},
        unread=chat.unread,
        ends_early=end < len(turns) - 1,
    )
