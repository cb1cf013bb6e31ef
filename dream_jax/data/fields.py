"""Keeps track of which fields of a record have been read, so that the user is told about every field that is not used.

A record is an object of a file, or one message in it. Every field is either read, or counted by its name, or refused. A
field is refused if its name stands for a part of the prompt or of the answer (for example "context"), but rows of this
kind do not use it. A field that is null or empty counts as missing.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from dream_jax.data.records import parse_json, text_field

MOST_NESTING = 64
"""The number of levels that lists and objects in a field may have."""

# Names of fields that stand for a part of the prompt, and names of fields that stand for the answer or for what is learned
# of it. They are compared in lower case, without "_", "-" and spaces.
_GIVEN = (
    *("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "history", "chathistory"),
    *("system", "systemprompt", "systemmessage", "developer", "persona", "instruction", "instructions"),
    *("prompt", "prompts", "question", "questions", "query", "problem", "input", "inputs", "prefix", "suffix"),
    *("context", "contexts", "passage", "paragraph", "document", "documents", "article", "evidence", "knowledge"),
    *("background", "premise", "hypothesis", "story", "schema", "hint", "hints", "examples", "demonstrations"),
    *("choices", "options", "endings", "tools", "functions", "chattemplatekwargs", "image", "images", "audio"),
    *("audios", "video", "videos"),
)
_LEARNED = (
    *("answer", "answers", "answerkey", "response", "responses", "completion", "completions", "output", "outputs"),
    *("target", "targets", "solution", "chosen", "rejected", "text", "reasoning", "reasoningcontent", "thinking"),
    *("thinkingblocks", "thinkingtrajectories", "functioncall", "toolcalls", "refusal"),
    *("weight", "weights", "sampleweight", "lossweight", "lossscale", "lossmask", "train", "trainable", "traindetail"),
    *("training", "istrain", "istrainable", "trainonturn", "learn", "learned", "masked", "supervised"),
)


class FieldReader:
    """The fields of one record, and which of them have been read.

    A field that is null counts as missing.

    Args:
      found: the record.
      where: the location of the record, such as "FILE:LINE"; error messages begin with it.

    Attributes:
      record: all fields of the record.
      found: the fields that are not null.
      where: as the argument.
    """

    def __init__(self, found: Mapping[str, Any], where: str):
        self.record = found
        self.found = {name: value for name, value in found.items() if value is not None}
        self.where = where
        self._left = dict(self.found)

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def take(self, name: str) -> Any:
        """Returns the value of a field, or None if it is missing, and counts it as read."""
        self._left.pop(name, None)
        return self.found.get(name)

    def text(self, name: str) -> str:
        """Returns the text of a field. Raises ValueError as `text_field`."""
        self._left.pop(name, None)
        return text_field(self.found, name, self.where)

    def optional_text(self, name: str) -> str:
        """Returns the text of a field, "" if it is missing or blank. Raises ValueError if the value is not a text."""
        return "" if is_empty(self.take(name)) else self.text(name)

    def first(self, names: Sequence[str]) -> str | None:
        """Returns the first of these names whose field is in the record and not empty; None if there is none."""
        return next((name for name in names if name in self and not is_empty(self.found[name])), None)

    def one_of(self, names: Sequence[str]) -> str | None:
        """Returns `first(names)`. If it is None, returns the first of these names whose field is empty."""
        return self.first(names) or next((name for name in names if name in self), None)

    def unread(self) -> dict[str, Any]:
        """Returns the fields that nothing has read and that are not empty."""
        return {name: value for name, value in self._left.items() if not is_empty(value)}

    def settle(
        self, shown: Sequence[str], learned: str | None, remedy: str, known: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Returns the names of the fields that have not been read, if all of them may be left out.

        A field may be left out if its name stands neither for a part of the prompt nor for the answer, or if it only
        repeats what has been read. It repeats a part of the prompt if its text is equal to one of the texts in `shown`. It
        repeats the answer if its text is contained in the answer, or contains the answer.

        Args:
          shown: the texts that have been read, including the answer.
          learned: the text of the answer; None for a row without an answer, in which only the prompt is checked.
          remedy: what the user can do; {name} in it is replaced by the name of the field.
          known: names of fields that the caller reads itself.

        Raises:
          ValueError: the name of an unread field stands for a part of the prompt or for the answer, and the field does
            not repeat what has been read.
        """
        unread = self.unread()
        if not unread:
            return ()
        left_out = []
        for name, value in unread.items():
            if name in known:
                continue
            others = sorted(self.found.keys() - {name})
            plain = name.casefold().replace("_", "").replace("-", "").replace(" ", "")
            text = value.strip() if isinstance(value, str) else None
            if plain in _GIVEN and text not in [one.strip() for one in shown]:
                raise ValueError(
                    f"{self.where}: the field {name!r} belongs to the prompt, but a record with the fields {others} has "
                    f"no place for it; {remedy.format(name=name)}"
                )
            if learned is None or plain not in _LEARNED:
                repeats = True
            else:
                answer = learned.strip()
                repeats = text is not None and bool(answer) and (text in answer or answer in text)
            if not repeats:
                raise ValueError(
                    f"{self.where}: the field {name!r} says what is learned, but a record with the fields {others} has "
                    f"no place for it; {remedy.format(name=name)}"
                )
            left_out.append(shown_name(name))
        return tuple(left_out)


def shown_name(name: str) -> str:
    """Returns the name of a field; one that cannot be printed, or would change the terminal, is returned with escapes."""
    return name if name.isprintable() else ascii(name)


def holds_messages(value: object) -> bool:
    """Returns whether a value is a list with objects in it, so that it is meant as messages and not as a text."""
    return isinstance(value, list) and any(isinstance(one, dict) for one in value)


def is_empty(value: object) -> bool:
    """Returns whether a value says nothing: null, a blank text, or an empty list or object."""
    return value is None or value == [] or value == {} or (isinstance(value, str) and not value.strip())


def without_fields(
    found: Mapping[str, Any], names: Collection[str], lists: Collection[str]
) -> tuple[dict[str, Any], set[str]]:
    """Returns a record without some of its fields, and which of them it had.

    Args:
      found: the record.
      names: names of the fields to leave out, in the record and in the objects of its lists.
      lists: names of the fields of the record that may hold lists of objects, such as "messages".
    """
    had = {name for name in names if found.get(name) is not None}
    kept = {name: value for name, value in found.items() if name not in names}
    for field in lists if names else ():
        if isinstance(kept.get(field), list):
            objects = [one for one in kept[field] if isinstance(one, dict)]
            had |= {name for one in objects for name in names if one.get(name) is not None}
            kept[field] = [
                {name: value for name, value in one.items() if name not in names} if isinstance(one, dict) else one
                for one in kept[field]
            ]
    return kept, had


def from_json_text(value: Any, subject: str, where: str) -> Any:
    """Returns the list, the object or the null that a text of JSON stands for. Any other value is returned unchanged.

    Raises: ValueError for a text that begins like JSON but is not JSON. The message is "WHERE: SUBJECT not JSON", so
      `subject` ends with a verb: "'tools' are".
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", "null")):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise ValueError(f"{where}: {subject} not JSON ({error}): {value!r:.60}") from error


def check_texts(value: object, name: str, where: str) -> None:
    """Raises ValueError for a string that UTF-8 cannot encode, and for a value that JSON cannot represent.

    Everything in lists and objects is checked, the names of fields too. More than `MOST_NESTING` levels of lists and
    objects are also refused. The message begins with `where` and `name`.
    """
    for text in [value] if isinstance(value, str) else _texts(value, MOST_NESTING, name, where):
        if text.isascii():
            continue
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: {name!r} has half of a surrogate pair ({error}), which is not text; repair the row"
            ) from error


def _texts(value: object, levels: int, name: str, where: str) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        if not levels:
            raise ValueError(f"{where}: {name!r} is nested more than {MOST_NESTING} levels deep; give a flatter value")
        inside = [*value, *value.values()] if isinstance(value, Mapping) else value
        for one in inside:
            yield from _texts(one, levels - 1, name, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {name!r} has the number {value}, which JSON cannot represent; give another value")
    elif not isinstance(value, int | float | None):
        raise ValueError(f"{where}: {name!r} has a {type(value).__name__}, which JSON cannot represent; give a text")
