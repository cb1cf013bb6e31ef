"""Reads messages: their texts, calls of tools and results, and marks that say whether a turn is learned."""

import json
from collections.abc import Mapping
from typing import Any

from dream_jax.data.fields import FieldReader, check_texts, from_json_text, holds_messages, is_empty, shown_name
from dream_jax.data.records import text_field
from dream_jax.tokenizer import ROLES, Message

CHAT_FIELDS = ("messages", "conversations")
"""The fields that hold a chat as a list of messages; a row has at most one of them."""

# Fields that say whether the turn of a message is learned: 1 or true, 0 or false.
_MARKS = frozenset({"weight", "train", "trainable", "loss_mask", "loss", "loss_weight"})
_ROLE_NAMES = {"developer": "system", "function": "tool"}  # names that OpenAI has given to these roles
# The roles in messages of the form {"from": ..., "value": ...}, the form of ShareGPT.
_SENDERS = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    **{"tool": "tool", "observation": "tool", "function_response": "tool"},
}
_CALL_FIELDS = ("id", "type", "index", "function", "name", "arguments")

_MESSAGE_REMEDY = (
    "put what the model should see into 'content'; or leave the field out of the file (train.py: --ignore-field {name})"
)


def parse_messages(messages: object, where: str) -> list[Message]:
    """Returns the messages of a chat, at least one, each a dict with `role` and `content`.

    An assistant message with calls also has `tool_calls`, a list of {"name": str, "arguments": dict}.
    Raises: ValueError for a wrong type, an unknown role or an empty content.
    """
    reader = MessageReader(where)
    reader.add(messages, "messages")
    return reader.turns


class MessageReader:
    """Reads messages one after another.

    Attributes:
      where: the location of the record; error messages begin with it.
      turns: the messages that have been read, in order.
      given: indices into `turns` of the assistant's turns that are marked as not to be learned.
      unread: names of the fields that nothing has read, such as "messages.id".
    """

    def __init__(self, where: str):
        self.where = where
        self.turns = list[Message]()
        self.given = list[int]()
        self.unread = set[str]()

    def add(self, messages: object, name: str) -> None:
        """Adds the messages of a field. Raises ValueError if it is not a list of messages, or is empty."""
        where = self.where
        messages = from_json_text(messages, f"{name!r} are", where)
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"{where}: {name!r} must be a list with at least one message, not {messages!r:.60}")
        calls, ids = dict[int, list[str]](), dict[int, str]()
        for index, message in enumerate(messages):
            at = f"{where}: message {index}" if name in CHAT_FIELDS else f"{where}: {name!r}, message {index}"
            if not isinstance(message, dict):
                raise ValueError(f"{at}: must be an object with 'role' and 'content', not {message!r:.60}")
            self._add(FieldReader(message, at), calls, ids)
        self._sort_results(calls, ids)

    def begin_with(self, turn: Message) -> None:
        """Puts a turn before all others."""
        self.turns.insert(0, turn)
        self.given = [index + 1 for index in self.given]

    def add_answer(self, fields: FieldReader, name: str) -> None:
        """Adds the answer in the field `name`, which holds a text or a list of messages."""
        if holds_messages(fields.found[name]):
            self.add(fields.take(name), name)
        else:
            self.turns.append({"role": "assistant", "content": fields.text(name)})

    def _add(self, fields: FieldReader, calls: dict[int, list[str]], ids: dict[int, str]) -> None:
        at, index = fields.where, len(self.turns)
        if "role" not in fields and "from" in fields:
            fields = self._from_sender(fields)
        role = fields.text("role")
        role = _ROLE_NAMES.get(role, role)
        if role not in ROLES:
            raise ValueError(f"{at}: role {role!r} must be one of {', '.join(ROLES)}")
        turn: dict[str, Any] = {"role": role, "content": self._content(fields)}
        found_calls = self._calls(fields)
        if found_calls:
            if role != "assistant":
                raise ValueError(f"{at}: only the assistant can call tools, but the role is {role!r}")
            turn["tool_calls"] = [call for call, _ in found_calls]
            calls[index] = [call_id for _, call_id in found_calls]
        elif role in ("user", "assistant") or (role == "system" and "content" not in fields):
            # A turn without calls must have a text, except that an empty system message replaces the default one, and
            # that a tool may return nothing.
            text_field(turn if "content" in fields else fields.record, "content", at)
        if _is_marked(fields, role) and role == "assistant":
            self.given.append(index)
        call_id = fields.take("tool_call_id")
        if role == "tool" and isinstance(call_id, str):
            ids[index] = call_id
        shown = [turn["content"]]
        left_out = fields.settle(shown, turn["content"] if role == "assistant" else "", _MESSAGE_REMEDY)
        self.unread.update(f"messages.{name}" for name in left_out)
        self.turns.append(turn)

    def _from_sender(self, fields: FieldReader) -> FieldReader:
        """Returns a message {"from", "value"} as one with `role` and `content`."""
        sender = fields.text("from")
        if sender not in _SENDERS:
            raise ValueError(f"{fields.where}: 'from' {sender!r} must be one of {', '.join(_SENDERS)}")
        rest = {name: value for name, value in fields.record.items() if name not in ("from", "value")}
        if "content" in fields and "value" in fields and fields.found["content"] != fields.found["value"]:
            raise ValueError(
                f"{fields.where}: both 'value' and 'content' are the text of a message, but they differ; remove one"
            )
        return FieldReader({"role": _SENDERS[sender], "content": fields.found.get("value"), **rest}, fields.where)

    def _content(self, fields: FieldReader) -> str:
        """Returns the text of a message, "" if it is missing; texts in parts are put together."""
        at, content = fields.where, fields.take("content")
        if content is None:
            return ""
        if isinstance(content, str):
            check_texts(content, "content", at)
            return content
        if not isinstance(content, list):
            raise ValueError(f"{at}: 'content' must be a string or a list of parts, not {content!r:.60}")
        texts = []
        for part in content:
            if isinstance(part, dict):
                if part.get("type") not in ("text", "input_text", "output_text") or "text" not in part:
                    raise ValueError(
                        f"{at}: a part of 'content' has the type {part.get('type')!r}; only parts of the type 'text' "
                        f"can be read, not {part!r:.60}"
                    )
                self.unread.update(
                    f"messages.content.{shown_name(name)}"
                    for name, value in part.items()
                    if name not in ("type", "text") and not is_empty(value)
                )
                part = part["text"]
            if not isinstance(part, str):
                raise ValueError(f"{at}: 'content' must be a string or a list of parts, not {content!r:.60}")
            texts.append(part)
        check_texts(texts, "content", at)
        return "".join(texts)

    def _calls(self, fields: FieldReader) -> list[tuple[dict[str, Any], str]]:
        """Returns each tool call of a message, {"name": str, "arguments": dict}, and its id; "" if it has no id."""
        at = fields.where
        if "tool_calls" not in fields and "function_call" not in fields:
            return []
        calls, single = fields.take("tool_calls"), fields.take("function_call")
        if not is_empty(calls) and not is_empty(single):
            raise ValueError(f"{at}: 'tool_calls' and 'function_call' are two forms of one thing; remove one of them")
        calls = [single] if is_empty(calls) and not is_empty(single) else calls
        if is_empty(calls):
            return []
        calls = from_json_text(calls, "'tool_calls' are", at)
        if not isinstance(calls, list):
            raise ValueError(f"{at}: 'tool_calls' must be a list, not {calls!r:.60}")
        parsed = []
        for call in calls:
            inside = call["function"] if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
            if not isinstance(inside, dict) or inside.get("arguments") is None:
                raise ValueError(f"{at}: a tool call must have 'name' and 'arguments', not {call!r:.60}")
            twice = [name for name in ("name", "arguments") if call.get(name) not in (None, inside.get(name))]
            if twice:
                raise ValueError(
                    f"{at}: a tool call has {twice} beside 'function', with other values than inside 'function'; remove "
                    "the wrong ones"
                )
            arguments = from_json_text(inside["arguments"], "the arguments of a tool call are", at)
            if not isinstance(arguments, dict):
                raise ValueError(f"{at}: the arguments of a tool call must be an object, not {arguments!r:.60}")
            check_texts(arguments, "arguments", at)
            self.unread.update(
                f"messages.tool_calls.{shown_name(name)}"
                for name, value in {**call, **inside}.items()
                if name not in _CALL_FIELDS and not is_empty(value)
            )
            call_id, name = call.get("id"), text_field(inside, "name", at)
            if json.dumps(name, ensure_ascii=False) != f'"{name}"':
                raise ValueError(
                    f"{at}: the name {name!r:.60} of a tool call has a quotation mark, a backslash or a control character, "
                    "so the chat template would write a call that is not JSON; give the name of a function"
                )
            parsed.append(({"name": name, "arguments": arguments}, call_id if isinstance(call_id, str) else ""))
        return parsed

    def _sort_results(self, calls: Mapping[int, list[str]], ids: Mapping[int, str]) -> None:
        """Puts the results of one turn's calls in the order of the calls, because the chat template shows no ids."""
        for index, wanted in calls.items():
            results = list(range(index + 1, index + 1 + len(wanted)))
            if (
                all(wanted)
                and len(set(wanted)) == len(wanted)
                and sorted(ids.get(one, "") for one in results) == sorted(wanted)
            ):
                by_id = {ids[one]: self.turns[one] for one in results}
                self.turns[results[0] : results[-1] + 1] = [by_id[call_id] for call_id in wanted]


def _is_marked(fields: FieldReader, role: str) -> bool:
    """Returns whether a message is marked as not to be learned, with 0 or false in one of several fields.

    Raises: ValueError for a mark that is not 0, 1, false or true, for two marks that differ, and for a message that is
      marked as to be learned although its role is not "assistant".
    """
    at = fields.where
    if fields.found.keys().isdisjoint(_MARKS):
        return False
    marks = {name: fields.take(name) for name in fields.found if name in _MARKS}
    for name, mark in marks.items():
        if not isinstance(mark, int | float) or mark not in (0, 1):
            raise ValueError(
                f"{at}: {name!r} must be 0 or 1 (false or true), because a turn is learned or not, but it is {mark!r}"
            )
        if mark and role != "assistant":
            raise ValueError(
                f"{at}: {name!r} is {mark!r}, but only turns of the assistant can be learned; "
                f"remove the field from turns of the {role}"
            )
    if len(set(map(bool, marks.values()))) > 1:
        raise ValueError(f"{at}: {', '.join(marks)} contradict each other: {list(marks.values())}; keep one of them")
    return any(not mark for mark in marks.values())
