"""Converts records with named fields to rows: one function for each schema.

Each function takes a record and `where`, the location of the record in its file ("FILE:LINE" or "FILE:row N"). If a
field is missing, empty or of a wrong type, it raises a ValueError whose message begins with `where`. Other fields
are ignored.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from dream_jax.data.options import AnswerFormat, ReadOptions
from dream_jax.data.records import text_field
from dream_jax.data.rows import Piece, Row
from dream_jax.tokenizer import ROLES, Message, turn_text

Parser = Callable[[Mapping[str, Any], str], Row | str]
"""A function (record, location) -> row. For a record that the `ReadOptions` exclude, it returns the reason (str)."""


def find_parser(found: Mapping[str, Any], where: str, options: ReadOptions) -> Parser:
    """Returns the parser for records that have the same fields as `found`: that of the first schema that matches.

    A schema matches if the record has all of its fields.
    Raises: ValueError if no schema matches; the message lists the schemas.
    """

    def parse_graded(found: Mapping[str, Any], where: str) -> Row | str:
        row = parse_s1k(found, where, options.answer_format)
        return (_wrong_grade(found, where) if options.only_correct else None) or row

    parsers: tuple[tuple[set[str], Parser], ...] = (
        ({"messages"}, parse_chat),
        ({"prompt", "response"}, parse_chat),
        ({"question", "deepseek_thinking_trajectory", "deepseek_attempt"}, parse_graded),
        ({"question", "thinking_trajectories", "attempt"}, parse_graded),
        ({"question", "answer"}, parse_gsm8k),
        ({"input", "output"}, parse_puzzle),
        ({"text"}, parse_document),  # last, because records of the other schemas may also have a field "text"
    )
    for fields, parser in parsers:
        if fields <= found.keys():
            return parser
    raise ValueError(
        f"{where}: fields {sorted(found)} match no known schema; a row needs one of these sets of fields: 'messages'; "
        "'prompt' and 'response'; 'question' and 'answer'; 'input' and 'output'; 'text' (a whole document); "
        "'question', 'thinking_trajectories' and 'attempt' (s1K); "
        "'question', 'deepseek_thinking_trajectory' and 'deepseek_attempt' (s1K-1.1)"
    )


def parse_document(found: Mapping[str, Any], where: str) -> Row:
    """Returns the row of `{"text": str}`: a document without a prompt, every token of which is learned."""
    return Row(prompt="", response=text_field(found, "text", where), document=True, meta={"where": where})


def parse_gsm8k(found: Mapping[str, Any], where: str) -> Row:
    """Returns the row of a GSM8K record `{"question": str, "answer": str}`.

    The prompt is one user turn with the question. The response is the answer, which ends with "#### NUMBER".
    """
    question = {"role": "user", "content": text_field(found, "question", where)}
    return Row(prompt=(question,), response=text_field(found, "answer", where), meta={"where": where})


def parse_puzzle(found: Mapping[str, Any], where: str) -> Row:
    """Returns the row of `{"input": str, "output": str}`, Dream's format of puzzles, which has no chat template."""
    return puzzle_row(text_field(found, "input", where), text_field(found, "output", where), {"where": where})


def puzzle_row(question: str, answer: str, meta: Mapping[str, Any]) -> Row:
    """Returns the row of a puzzle: the prompt is the question and a newline, without a template."""
    return Row(prompt=question + "\n", response=answer, meta=meta)


# --- s1K ---


def parse_s1k(found: Mapping[str, Any], where: str, answer_format: AnswerFormat = "s1") -> Row:
    """Returns the row of an s1K record: a question, and a response with a reasoning trace and an answer.

    s1K has `question`, `thinking_trajectories` (a list) and `attempt`; s1K-1.1 has `question`,
    `deepseek_thinking_trajectory`, `deepseek_attempt` and `deepseek_grade`. The prompt is one user turn with the
    question; `reasoning` joins the response. If present, `solution`, `source_type` and `deepseek_grade` are copied
    to `meta`.
    """
    if "deepseek_attempt" in found:
        trace = text_field(found, "deepseek_thinking_trajectory", where)
        answer = text_field(found, "deepseek_attempt", where)
    else:
        trace, answer = _joined_traces(found, where), text_field(found, "attempt", where)
    question = {"role": "user", "content": text_field(found, "question", where)}
    pieces = reasoning(trace, answer, answer_format)
    carried = {name: found[name] for name in ("solution", "source_type", "deepseek_grade") if name in found}
    return Row(
        prompt=(question,),
        response="".join(piece.text for piece in pieces),
        pieces=pieces,
        meta={"where": where, **carried},
    )


def reasoning(trace: str, answer: str, answer_format: AnswerFormat) -> tuple[Piece, ...]:
    """Returns the pieces of a response that consists of a trace and an answer, each without whitespace at its ends.

    s1: `<|im_start|>think\\n`, trace, `\\n<|im_start|>answer\\n`, answer, where `<|im_start|>` is the special token.
    d1: `<reasoning>`, trace, `</reasoning>\\n<answer>`, answer, `</answer>`.
    """
    trace, answer = trace.strip(), answer.strip()
    if answer_format == "s1":
        return (
            Piece("opening", "<|im_start|>think\n"),
            Piece("trace", trace),
            Piece("opening", "\n"),
            Piece("mark", "<|im_start|>answer\n"),
            Piece("text", answer),
        )
    return (
        Piece("opening", "<reasoning>"),
        Piece("trace", trace),
        Piece("opening", "</reasoning>\n"),
        Piece("mark", "<answer>"),
        Piece("text", answer),
        Piece("mark", "</answer>"),
    )


def _wrong_grade(found: Mapping[str, Any], where: str) -> str | None:
    """Returns why the row is left out ("deepseek_grade is 'No'"), or None if the grade is "yes" in any case.

    Raises: ValueError if the record has no grade.
    """
    if "deepseek_grade" not in found:
        raise ValueError(
            f"{where}: no field 'deepseek_grade'; the record has the fields {sorted(found)}. "
            "Use s1K-1.1, which has grades, or leave out --only-correct"
        )
    grade = text_field(found, "deepseek_grade", where).strip()
    return None if grade.casefold() == "yes" else f"deepseek_grade is {grade!r}"


def _joined_traces(found: Mapping[str, Any], where: str) -> str:
    """Returns the texts of `thinking_trajectories`, joined by newlines. Raises ValueError if there are none."""
    name = "thinking_trajectories"
    if name not in found:
        raise ValueError(f"{where}: no field {name!r}; the record has the fields {sorted(found)}")
    traces = found[name]
    if not isinstance(traces, list) or not traces:
        raise ValueError(f"{where}: {name!r} must be a list with at least one text, not {traces!r:.60}")
    trace_by_field = {f"{name}[{index}]": trace for index, trace in enumerate(traces)}
    return "\n".join(text_field(trace_by_field, field, where) for field in trace_by_field)


# --- Chats ---


def parse_chat(found: Mapping[str, Any], where: str) -> Row:
    """Returns the row of `{"messages": [{"role", "content"}, ...], "tools": [...]}` or of `{"prompt", "response"}`.

    The last message must be from the assistant; its text is the response. All earlier messages are the prompt. `tools`,
    if present, is a list of functions as JSON schemas. An assistant message may have `tool_calls`, a list of {"name",
    "arguments"} or of {"function": {"name", "arguments"}}; "arguments" is an object or a string of JSON. Messages with
    the role `tool` contain the results of these calls.
    Raises: ValueError for a missing, empty or mistyped field, an unknown role, a last message that is not from the
    assistant, or a chat with one message only.
    """
    meta = {"where": where}
    if "messages" in found:
        turns = parse_messages(found["messages"], where)
        if turns[-1]["role"] != "assistant":
            raise ValueError(
                f"{where}: the last message is the {turns[-1]['role']}'s; "
                "it must be the assistant's, because it is the response that the model learns"
            )
        if len(turns) == 1:
            raise ValueError(f"{where}: the assistant's message is the only one; put at least one message before it")
        tools = _parse_tools(found.get("tools"), where)
        return Row(prompt=tuple(turns[:-1]), response=turn_text(turns[-1]), tools=tools, meta=meta)
    if "prompt" in found and "response" in found:
        prompt = {"role": "user", "content": text_field(found, "prompt", where)}
        return Row(prompt=(prompt,), response=text_field(found, "response", where), meta=meta)
    raise ValueError(
        f"{where}: a chat record needs 'messages', or 'prompt' and 'response', but has the fields {sorted(found)}"
    )


def parse_messages(messages: object, where: str) -> list[Message]:
    """Returns the messages of a chat, at least one, each a dict with `role` and `content`.

    An assistant message with calls also has `tool_calls`, a list of {"name": str, "arguments": dict}.
    Raises: ValueError for a wrong type, an unknown role or an empty content.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' must be a list with at least one message, not {messages!r:.60}")
    turns: list[Message] = []
    for index, message in enumerate(messages):
        at = f"{where}: message {index}"
        if not isinstance(message, dict):
            raise ValueError(f"{at}: must be an object with 'role' and 'content', not {message!r:.60}")
        role = text_field(message, "role", at)
        if role not in ROLES:
            raise ValueError(f"{at}: role {role!r} must be one of {', '.join(ROLES)}")
        turn: dict[str, Any] = {"role": role}
        if role == "assistant" and message.get("tool_calls"):
            turn["content"] = text_field(message, "content", at) if message.get("content") else ""
            turn["tool_calls"] = _parse_calls(message["tool_calls"], at)
        else:
            turn["content"] = text_field(message, "content", at)
        turns.append(turn)
    return turns


def _parse_calls(calls: object, at: str) -> list[dict[str, Any]]:
    """Returns the tool calls as {"name": str, "arguments": dict}; arguments that are null are left out."""
    if not isinstance(calls, list):
        raise ValueError(f"{at}: 'tool_calls' must be a list, not {calls!r:.60}")
    parsed = []
    for call in calls:
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            call = call["function"]
        if not isinstance(call, dict) or "arguments" not in call:
            raise ValueError(f"{at}: a tool call must have 'name' and 'arguments', not {call!r:.60}")
        arguments = call["arguments"]
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise ValueError(f"{at}: the arguments of a tool call are not JSON ({error})") from error
        if not isinstance(arguments, dict):
            raise ValueError(f"{at}: the arguments of a tool call must be an object, not {arguments!r:.60}")
        # A parquet file stores every argument in every row; its value is null if the call did not give it.
        arguments = {name: value for name, value in arguments.items() if value is not None}
        parsed.append({"name": text_field(call, "name", at), "arguments": arguments})
    return parsed


def _parse_tools(tools: object, where: str) -> tuple[Mapping[str, Any], ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: 'tools' must be a list of objects, not {tools!r:.60}")
    return tuple(tools)
