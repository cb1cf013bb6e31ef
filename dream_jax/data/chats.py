"""Reads the chat of a record: the only reader of messages and prompts, for training and for questions to a model.

A row has its chat as `messages`, or as columns: `prompt`, `question` or `instruction`, with what belongs to them, and the
answer in a column of its own. docs/data.md lists them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dream_jax.data.fields import FieldReader, check_texts, from_json_text, holds_messages, is_empty
from dream_jax.data.messages import CHAT_FIELDS, MessageReader
from dream_jax.data.records import text_field
from dream_jax.tokenizer import Message, turn_text

QUESTION_FIELDS = ("prompt", "question", "instruction")
"""The columns that hold the question of a row without `messages`; a row needs exactly one of them."""

ANSWER_FIELDS = ("response", "completion", "answer", "output", "answerKey")
"""The columns that hold the answer to the question; a training row needs exactly one of them."""

MESSAGE_LISTS = (*CHAT_FIELDS, "history", "prompt", "completion")
"""The fields that may be lists of messages."""

_SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
_CHOICE_FIELDS = ("choices", "options")
_TRAIN_REMEDY = "give the row in a form that has one (docs/data.md), or pass --ignore-field {name} to train without it"
_ASK_REMEDY = "give the row in a form that has one (docs/data.md), or remove the field"


@dataclass(frozen=True, kw_only=True)
class Chat:
    """The chat of one record.

    messages: the turns, at least one, each with `role` and `content`, and `tool_calls` if it has calls.
    tools: functions that the chat template announces, as JSON schemas.
    given: indices of the assistant's turns that must not be learned, because the row says so.
    unread: names of the fields of the record that nobody has read; those of messages begin with "messages.".
    text: the text of the question, if the prompt is nothing but one text in one column; otherwise None. A prompt without
    a chat template is this text.
    columns: whether the question is a text in a column, and not a list of messages. The instruction with which a model was
    trained comes before the first user turn of such a chat (`with_instruction`); a list of messages is taken as it is.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    given: tuple[int, ...] = ()
    unread: tuple[str, ...] = ()
    text: str | None = None
    columns: bool = False


def read_chat(found: Mapping[str, Any], where: str, *, known: Collection[str] = ()) -> Chat:
    """Returns the chat of a training row; its last message is the assistant's, and at least one stands before it.

    Args:
      found: the record.
      where: its location, with which error messages begin.
      known: names of fields that the caller reads itself.

    Raises:
      ValueError: a field is missing, empty or of a wrong type; a role is unknown; the last message is not from the
        assistant, or the only one; or a field that belongs to the prompt or to the answer has no place.
    """
    fields = FieldReader(found, where)
    reader = MessageReader(where)
    answered = fields.one_of(ANSWER_FIELDS)
    if not (fields.one_of(CHAT_FIELDS) or (fields.one_of(QUESTION_FIELDS) and answered)):
        raise ValueError(
            f"{where}: a chat record needs 'messages', or {_either(QUESTION_FIELDS)} with {_either(ANSWER_FIELDS)}, but "
            f"has the fields {sorted(fields.found)}"
        )
    text = _read_prompt(fields, reader)
    if answered is not None and reader.turns[-1]["role"] != "assistant":
        reader.add_answer(fields, answered)
    turns = reader.turns
    if turns[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: the last message is the {turns[-1]['role']}'s; "
            "it must be the assistant's, because it is the response that the model learns"
        )
    if len(turns) == 1:
        raise ValueError(f"{where}: the assistant's message is the only one; put at least one message before it")
    return _finished(fields, reader, text, known, learns=True)


def read_question(found: Mapping[str, Any], where: str, *, known: Collection[str] = ()) -> Chat:
    """Returns the chat of a row that a model is to answer; its messages are the prompt of the same row in training.

    An answer in a column of its own is left out, and is among `unread`. Arguments are those of `read_chat`.

    Raises:
      ValueError: as `read_chat`; also if the last message is the assistant's or a system message.
    """
    fields = FieldReader(found, where)
    reader = MessageReader(where)
    if not fields.one_of((*CHAT_FIELDS, *QUESTION_FIELDS)):
        raise ValueError(
            f"{where}: a question needs 'messages' or {_either(QUESTION_FIELDS)}, but the row has the fields "
            f"{sorted(fields.found)}"
        )
    name = fields.one_of(QUESTION_FIELDS)
    columns = not fields.one_of(CHAT_FIELDS) and name is not None and not holds_messages(fields.found[name])
    text = _read_prompt(fields, reader)
    if reader.turns[-1]["role"] not in ("user", "tool"):
        raise ValueError(
            f"{where}: the last message is the {reader.turns[-1]['role']}'s, so there is nothing to answer; "
            "remove it, or add a message of the user"
        )
    answers = [name for name in ANSWER_FIELDS if name not in known and not is_empty(fields.take(name))]
    chat = _finished(fields, reader, text, known, learns=False)
    return replace(chat, unread=(*chat.unread, *answers), columns=columns)


def read_prompt(fields: FieldReader) -> tuple[Message, ...]:
    """Returns the prompt that the columns of a record make, without an answer. Raises ValueError as `read_question`."""
    reader = MessageReader(fields.where)
    _read_prompt(fields, reader)
    return tuple(reader.turns)


def settle(fields: FieldReader, prompt: Sequence[Message], learned: str) -> tuple[str, ...]:
    """Returns the names of the fields of a training row that nobody has read. Raises ValueError as `read_chat`."""
    shown = [learned, *(turn["content"] for turn in prompt)]
    return fields.settle(shown, learned, _TRAIN_REMEDY)


def _finished(
    fields: FieldReader, reader: MessageReader, text: str | None, known: Collection[str], *, learns: bool
) -> Chat:
    """Returns the chat of messages that have been read; all fields that nobody has read are refused or named."""
    remedy = _TRAIN_REMEDY if learns else _ASK_REMEDY
    turns = reader.turns
    tools = read_tools(fields)
    answers = [turn_text(turn) for turn in turns if turn["role"] == "assistant"]
    shown = [*(turn["content"] for turn in turns), *answers]
    unread = fields.settle(shown, "\n".join(answers) if learns else None, remedy, known)
    return Chat(
        messages=tuple(turns),
        tools=tools,
        given=tuple(sorted(set(reader.given))),
        unread=(*unread, *sorted(reader.unread)),
        text=text if len(turns) - len(answers) == 1 and not tools else None,
    )


def _read_prompt(fields: FieldReader, reader: MessageReader) -> str | None:
    """Adds the turns before the answer to the reader; returns the text of the question if it is one column alone."""
    where, text = fields.where, None
    system = fields.first(_SYSTEM_FIELDS)
    listed = fields.one_of(CHAT_FIELDS)
    if listed:
        reader.add(fields.take(listed), listed)
    else:
        _add_history(fields, reader)
        name = fields.one_of(QUESTION_FIELDS)
        if name is None:
            raise ValueError(f"{where}: no field {_either(QUESTION_FIELDS)}; the record has {sorted(fields.found)}")
        if holds_messages(fields.found[name]):
            reader.add(fields.take(name), name)
            reader.given += [index for index, turn in enumerate(reader.turns) if turn["role"] == "assistant"]
            if reader.turns[-1]["role"] == "assistant":
                raise ValueError(f"{where}: the last message of {name!r} is the assistant's; put it into the answer")
        else:
            text = _add_question(fields, reader, name)
    if system:
        content = fields.text(system)
        own = [turn["content"] for turn in reader.turns if turn["role"] == "system"]
        if own and content not in own:
            raise ValueError(f"{where}: {system!r} and the system message of the chat differ; remove one of them")
        if not own:
            reader.begin_with({"role": "system", "content": content})
    return text


def _add_question(fields: FieldReader, reader: MessageReader, name: str) -> str | None:
    """Adds the user's turn from columns of text: the context, the question, its input and its choices.

    Returns the text of the question if the turn is nothing else and stands alone, otherwise None.
    """
    context = fields.optional_text("context")
    below = fields.optional_text("input") if name == "instruction" else ""
    question = fields.optional_text(name) if below else fields.text(name)
    lines = "\n".join(line for line in (question, below, _choices(fields)) if line)
    whole = f"{context}\n\n{lines}" if context else lines
    reader.turns.append({"role": "user", "content": whole})
    return question if whole == question and len(reader.turns) == 1 else None


def _add_history(fields: FieldReader, reader: MessageReader) -> None:
    """Adds the earlier turns of the column `history`: messages, or pairs of a question and its answer."""
    history = fields.take("history")
    if is_empty(history):
        return
    where = fields.where
    history = from_json_text(history, "'history' is", where)
    if isinstance(history, list) and all(isinstance(one, dict) for one in history):
        reader.add(history, "history")
        return
    if not isinstance(history, list) or not all(isinstance(one, list) and len(one) == 2 for one in history):
        raise ValueError(
            f"{where}: 'history' must be a list of messages, or of pairs of a question and its answer, not "
            f"{history!r:.60}"
        )
    for number, (asked, answered) in enumerate(history):
        pair = {f"history[{number}][0]": asked, f"history[{number}][1]": answered}
        for role, field in zip(("user", "assistant"), pair, strict=True):
            reader.turns.append({"role": role, "content": text_field(pair, field, where)})


def _choices(fields: FieldReader) -> str:
    """Returns the choices of a question as lines "A. text"; "" without choices."""
    where, name = fields.where, fields.first(_CHOICE_FIELDS)
    if name is None:
        return ""
    value = fields.take(name)
    if isinstance(value, str):
        return fields.text(name)
    check_texts(value, name, where)
    labels: object = None
    texts: object = value
    if isinstance(value, dict) and value.keys() == {"text", "label"}:
        labels, texts = value["label"], value["text"]
    elif isinstance(value, dict):
        labels, texts = list(value), list(value.values())
    elif isinstance(value, list) and all(isinstance(one, dict) and one.keys() == {"text", "label"} for one in value):
        labels, texts = [one["label"] for one in value], [one["text"] for one in value]
    if labels is None and isinstance(texts, list):
        labels = [chr(ord("A") + index) for index in range(min(len(texts), 26))]
    if (
        not isinstance(texts, list)
        or not isinstance(labels, list)
        or len(texts) != len(labels)
        or not all(isinstance(label, str | int) for label in labels)
    ):
        raise ValueError(
            f"{where}: {name!r} must be a list of 1 to 26 texts, or of texts with labels, not {value!r:.60}"
        )
    by_field = {f"{name}[{index}]": text for index, text in enumerate(texts)}
    written = [text_field(by_field, field, where) for field in by_field]
    return "\n".join(f"{label}. {text}" for label, text in zip(labels, written, strict=True))


def read_tools(fields: FieldReader) -> tuple[Mapping[str, Any], ...]:
    """Returns the functions of the field `tools`, a list or its JSON text, or of OpenAI's earlier field `functions`."""
    where, name = fields.where, fields.first(("tools", "functions"))
    if name is None:
        return ()
    value = fields.take(name)
    tools = from_json_text(value, f"{name!r} are", where)
    if isinstance(tools, list):
        tools = [from_json_text(tool, f"{name!r} are", where) for tool in tools]
    if is_empty(tools):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: {name!r} must be a list of objects, or its JSON text, not {value!r:.60}")
    check_texts(tools, name, where)
    return tuple(tools if name == "tools" else [{"type": "function", "function": tool} for tool in tools])


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
