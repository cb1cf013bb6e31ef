"""Knows which fields of a record have been read, so that none is left out without a word.

A record is an object of a file, or one message in it. Every field is either read, or counted by its name, or refused: a
field whose name is known to stand for a part of the prompt or of the answer is refused if its kind of row has no place
for it. A field that is null or empty says nothing, and counts as missing.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from dream_jax.data.records import parse_json, text_field

MOST_NESTING = 64
"""The number of levels that lists and objects in a field may have."""

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

    A field that is null counts as missing. `record` has it nevertheless, and `found` has not.

    Args:
      found: the record.
      where: its location, with which error messages begin.
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
        """Returns the text of a field, "" if it is missing or blank. Raises ValueError if it is no text."""
        return "" if is_empty(self.take(name)) else self.text(name)

    def first(self, names: Sequence[str]) -> str | None:
        """Returns the first of these names of which the record has a field that is not empty, or None."""
        return next((name for name in names if name in self and not is_empty(self.found[name])), None)

    def one_of(self, names: Sequence[str]) -> str | None:
        """Returns `first(names)`, or else the first of these names of which there is an empty field, or None."""
        return self.first(names) or next((name for name in names if name in self), None)

    def unread(self) -> dict[str, Any]:
        """Returns the fields that nothing has read and that are not empty."""
        return {name: value for name, value in self._left.items() if not is_empty(value)}

    def settle(
        self, shown: Sequence[str], learned: str | None, remedy: str, known: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Returns the names of the fields that nobody has read and that may be left out.

        A field that only repeats what has been read may be left out: if its name stands for a part of the prompt, its text
        must be one of the texts of the row; if it stands for an answer, its text must be in the answer, or contain it.

        Args:
          shown: the texts that have been read, the answer among them.
          learned: the text of the answer; None for a question, of which no field can say what is learned.
          remedy: what the user can do; {name} in it is replaced by the name of the field.
          known: names of fields that the caller reads itself.

        Raises:
          ValueError: the name of an unread field stands for a part of the prompt or of the answer.
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
                    f"{self.where}: the field {name!r} belongs to the prompt, but beside the fields {others} it has no "
                    f"place; {remedy.format(name=name)}"
                )
            if learned is None or plain not in _LEARNED:
                repeats = True
            else:
                answer = learned.strip()
                repeats = text is not None and bool(answer) and (text in answer or answer in text)
            if not repeats:
                raise ValueError(
                    f"{self.where}: the field {name!r} says what is learned, but beside the fields {others} it has no "
                    f"place; {remedy.format(name=name)}"
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
      names: names of fields that are left out of the record, and of the objects in its lists.
      lists: names of the fields of the record that are such lists.
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
    """Returns what a text of JSON stands for: a list, an object or null. Any other value is returned as it is.

    Raises: ValueError, beginning with `where` and `subject` ("'tools' are"), for a text that begins like JSON and is not.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", "null")):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise ValueError(f"{where}: {subject} not JSON ({error}): {value!r:.60}") from error


def check_texts(value: object, name: str, where: str) -> None:
    """Raises ValueError if a value has a text that is no text, a number that JSON lacks, or too many levels.

    Too many are more than `MOST_NESTING`.
    Every text in lists and objects is checked, the names of fields too. `where` and `name` begin the message.
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
