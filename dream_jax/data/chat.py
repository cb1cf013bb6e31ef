"""Chat rows: `{"messages": [{"role", "content"}, ...]}`, with `tools` where there are any, or `{"prompt", "response"}`.

Knows no template: that is the tokenizer's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dream_jax.data.jsonl import read_json_lines, text_field
from dream_jax.data.rows import Row, RowList
from dream_jax.tokenizer import ROLES, Message, turn_text


def read_chat(path: Path) -> RowList:
    """All rows of a chat file, in order; both schemas may occur. Raises: see `parse_chat`."""
    return RowList([parse_chat(found, where) for where, found in read_json_lines(path)])


def parse_chat(found: Mapping[str, Any], where: str) -> Row:
    """One row: of `messages`, the last turn (the assistant's) is the response and all before it the prompt.

    `tools` is a list of functions as JSON schemas; an assistant turn may have
    `tool_calls` ({"name", "arguments"}, also inside "function", arguments as an object or as its JSON text), and the
    role `tool` answers them. Fields beside these are ignored.
    Raises: ValueError, opening with `where` ("FILE:LINE"), for neither schema, a wrong type, an empty text,
    an unknown role, a last message that is not the assistant's or is alone.
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
    """The turns of a chat, at least one. Raises: as `parse_chat`, for a wrong type, role or content."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' must be a list with at least one message, not {messages!r:.60}")
    turns: list[Message] = []
    for index, message in enumerate(messages):
        place = f"{where}: message {index}"
        if not isinstance(message, dict):
            raise ValueError(f"{place}: must be an object with 'role' and 'content', not {message!r:.60}")
        role = text_field(message, "role", place)
        if role not in ROLES:
            raise ValueError(f"{place}: role {role!r} must be one of {', '.join(ROLES)}")
        turn: dict[str, Any] = {"role": role}
        if role == "assistant" and message.get("tool_calls"):
            turn["content"] = text_field(message, "content", place) if message.get("content") else ""
            turn["tool_calls"] = _parse_calls(message["tool_calls"], place)
        else:
            turn["content"] = text_field(message, "content", place)
        turns.append(turn)
    return turns


def _parse_calls(calls: object, place: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ValueError(f"{place}: 'tool_calls' must be a list, not {calls!r:.60}")
    parsed = []
    for call in calls:
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            call = call["function"]
        if not isinstance(call, dict) or "arguments" not in call:
            raise ValueError(f"{place}: a tool call must have 'name' and 'arguments', not {call!r:.60}")
        arguments = call["arguments"]
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise ValueError(f"{place}: the arguments of a tool call are not JSON ({error})") from error
        if not isinstance(arguments, dict):
            raise ValueError(f"{place}: the arguments of a tool call must be an object, not {arguments!r:.60}")
        # A file with columns has every argument in every row, null where it was not given.
        arguments = {name: value for name, value in arguments.items() if value is not None}
        parsed.append({"name": text_field(call, "name", place), "arguments": arguments})
    return parsed


def _parse_tools(tools: object, where: str) -> tuple[Mapping[str, Any], ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: 'tools' must be a list of objects, not {tools!r:.60}")
    return tuple(tools)
