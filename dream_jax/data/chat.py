"""Chat rows: `{"messages": [{"role", "content"}, ...]}` or `{"prompt", "response"}`, one JSON object a line.

Knows no template: that is the tokenizer's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dream_jax.data.jsonl import read_json_lines, text_field
from dream_jax.data.rows import Row, RowList
from dream_jax.tokenizer import ROLES


def read_chat(path: Path) -> RowList:
    """All rows of a chat file, in order; both schemas may occur. Raises: see `parse_chat`."""
    return RowList([parse_chat(found, where) for where, found in read_json_lines(path)])


def parse_chat(found: Mapping[str, Any], where: str) -> Row:
    """One row: of `messages`, the last turn (the assistant's) is the response and all before it the prompt.

    Fields beside these are ignored.
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
        return Row(prompt=tuple(turns[:-1]), response=turns[-1]["content"], meta=meta)
    if "prompt" in found and "response" in found:
        prompt = {"role": "user", "content": text_field(found, "prompt", where)}
        return Row(prompt=(prompt,), response=text_field(found, "response", where), meta=meta)
    raise ValueError(f"{where}: fields {sorted(found)}; a chat row has 'messages', or 'prompt' and 'response'")


def parse_messages(messages: object, where: str) -> list[dict[str, str]]:
    """The turns of a chat, at least one. Raises: as `parse_chat`, for a wrong type, role or content."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' must be a list with at least one message, not {messages!r:.60}")
    turns = []
    for index, message in enumerate(messages):
        place = f"{where}: message {index}"
        if not isinstance(message, dict):
            raise ValueError(f"{place}: must be an object with 'role' and 'content', not {message!r:.60}")
        role = text_field(message, "role", place)
        if role not in ROLES:
            raise ValueError(f"{place}: role {role!r} must be one of {', '.join(ROLES)}")
        turns.append({"role": role, "content": text_field(message, "content", place)})
    return turns
