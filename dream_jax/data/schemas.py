"""What the fields of a record mean: one function for each kind of row, from named fields to a `Row`.

A function takes a record and where it was found ("FILE:LINE"), and raises a ValueError that begins with that for a field
that is missing, of a wrong type or empty. Fields that it does not read are ignored.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from dream_jax.data.options import AnswerFormat, ReadOptions
from dream_jax.data.records import text_field
from dream_jax.data.rows import Piece, Row
from dream_jax.tokenizer import ROLES, Message, turn_text

Parser = Callable[[Mapping[str, Any], str], Row | str]
"""From a record and where it was found to a row, or to the reason why the options leave it out."""


def find_parser(found: Mapping[str, Any], where: str, options: ReadOptions) -> Parser:
    """What parses records with such fields. Raises ValueError for fields of no known schema."""

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
        ({"text"}, parse_document),  # last: rows of the other kinds may carry a text as well
    )
    for fields, parser in parsers:
        if fields <= found.keys():
            return parser
    raise ValueError(
        f"{where}: fields {sorted(found)} are no known schema; a row has 'messages', "
        "'prompt' and 'response', 'question' and 'answer', 'input' and 'output', 'text' (a whole document), "
        "or 'question' and either "
        "'thinking_trajectories' and 'attempt' (s1K) or 'deepseek_thinking_trajectory' and 'deepseek_attempt' (s1K-1.1)"
    )


def parse_document(found: Mapping[str, Any], where: str) -> Row:
    """`{"text"}`, a whole document, every token of which is learned, as in pre-training."""
    return Row(prompt="", response=text_field(found, "text", where), document=True, meta={"where": where})


def parse_gsm8k(found: Mapping[str, Any], where: str) -> Row:
    """`{"question", "answer"}`: the question is a user turn, the answer, which ends with "#### NUMBER", the response."""
    question = {"role": "user", "content": text_field(found, "question", where)}
    return Row(prompt=(question,), response=text_field(found, "answer", where), meta={"where": where})


def parse_puzzle(found: Mapping[str, Any], where: str) -> Row:
    """`{"input", "output"}`, Dream's format of sudoku and countdown, used without a chat template."""
    return puzzle_row(text_field(found, "input", where), text_field(found, "output", where), {"where": where})


def puzzle_row(question: str, answer: str, meta: Mapping[str, Any]) -> Row:
    """The row of one puzzle: the raw prompt is the question and a newline, the response is the answer."""
    return Row(prompt=question + "\n", response=answer, meta=meta)


# --- s1K ---


def parse_s1k(found: Mapping[str, Any], where: str, answer_format: AnswerFormat = "s1") -> Row:
    """A hard question, a user turn, whose response is a reasoning trace and an answer.

    s1K has `question`, `thinking_trajectories` (a list) and `attempt`; s1K-1.1 has `question`,
    `deepseek_thinking_trajectory`, `deepseek_attempt` and `deepseek_grade`.
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
    """A trace and an answer as one response; space around either is dropped.

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
    """The grade of an answer that was not judged correct, or None."""
    if "deepseek_grade" not in found:
        raise ValueError(
            f"{where}: no field 'deepseek_grade', which s1K-1.1 has; it has {sorted(found)}. "
            "Take s1K-1.1, or do not ask for correct answers only"
        )
    grade = text_field(found, "deepseek_grade", where).strip()
    return None if grade.casefold() == "yes" else f"deepseek_grade is {grade!r}"


def _joined_traces(found: Mapping[str, Any], where: str) -> str:
    name = "thinking_trajectories"
    if name not in found:
        raise ValueError(f"{where}: no field {name!r}; it has {sorted(found)}")
    traces = found[name]
    if not isinstance(traces, list) or not traces:
        raise ValueError(f"{where}: {name!r} must be a list with at least one text, not {traces!r:.60}")
    texts = {f"{name}[{index}]": trace for index, trace in enumerate(traces)}
    return "\n".join(text_field(texts, text, where) for text in texts)


# --- Chats ---


def parse_chat(found: Mapping[str, Any], where: str) -> Row:
    """`{"messages": [{"role", "content"}, ...]}`, with `tools` where there are any, or `{"prompt", "response"}`.

    The last message, the assistant's, is the response, and all before it are the prompt. `tools` is a list of functions as
    JSON schemas. An assistant turn may have `tool_calls` ({"name", "arguments"}, also inside "function", arguments as an
    object or as its JSON text), and the role `tool` answers them.
    Raises: also ValueError for an unknown role, a last message that is not the assistant's, or one that is alone.
    """
    meta = {"where": where}
    if "messages" in found:
        turns = parse_messages(found["messages"], where)
        if turns[-1]["role"] != "assistant":
            raise ValueError(
                f"{where}: the last message is the {turns[-1]['role']}'s; "
                "it must be the assistant's, the response to learn"
            )
        if len(turns) == 1:
            raise ValueError(f"{where}: the assistant's message is alone; at least one message must come before it")
        tools = _parse_tools(found.get("tools"), where)
        return Row(prompt=tuple(turns[:-1]), response=turn_text(turns[-1]), tools=tools, meta=meta)
    if "prompt" in found and "response" in found:
        prompt = {"role": "user", "content": text_field(found, "prompt", where)}
        return Row(prompt=(prompt,), response=text_field(found, "response", where), meta=meta)
    raise ValueError(f"{where}: fields {sorted(found)}; a chat row has 'messages', or 'prompt' and 'response'")


def parse_messages(messages: object, where: str) -> list[Message]:
    """The turns of a chat, at least one. Raises ValueError for a wrong type, role or content."""
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
        # A file with columns has every argument in every row, null where it was not given.
        arguments = {name: value for name, value in arguments.items() if value is not None}
        parsed.append({"name": text_field(call, "name", at), "arguments": arguments})
    return parsed


def _parse_tools(tools: object, where: str) -> tuple[Mapping[str, Any], ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: 'tools' must be a list of objects, not {tools!r:.60}")
    return tuple(tools)
