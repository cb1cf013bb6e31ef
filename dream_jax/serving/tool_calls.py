"""Reads the calls of tools in the text of an answer, while the text is still being written."""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

import pydantic_core

from dream_jax.tokenizer import check_texts

Json = dict[str, Any]

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"


class CallReader:
    """Takes the calls of tools out of a text that arrives in pieces.

    A call is written as in the chat template: `<tool_call>`, a JSON object with `name` and `arguments`, `</tool_call>`.
    Anything that only resembles a call stays text. White space before a call is left out, and so is white space around
    calls at the beginning and at the end of the text. The result does not depend on how the text is cut into pieces.
    """

    def __init__(self) -> None:
        self._held = ""  # what may still become a call, or white space that is left out before one
        self._has_text = self._has_calls = False

    def read(self, text: str, last: bool) -> tuple[str, list[Json]]:
        """Reads one more piece; returns the text that is certainly not part of a call, and the complete calls.

        Each part of the text and each call is returned once. Calls have OpenAI's form, see `_read_call`.

        Args:
          text: the piece, which follows the earlier ones.
          last: whether this is the last piece.
        """
        self._held += text
        found, calls = "", list[Json]()
        begin = 0  # where the search for the next opening mark begins
        while (opening := self._held.find(_OPENING, begin)) >= 0:
            read = _read_call(self._held, opening + len(_OPENING))
            if isinstance(read, str):
                if read == "unfinished" and not last:
                    break
                begin = opening + 1
                continue
            call, end = read
            found += self._taken(opening, before_call=True)
            self._held, begin = self._held[end - opening :], 0
            self._has_calls = True
            calls.append(call)
        if last:
            found += self._taken(len(self._held), before_call=self._has_calls)
        else:
            certain = opening if opening >= 0 else len(self._held) - _beginning_of(_OPENING, self._held)
            found += self._taken(len(self._held[:certain].rstrip()), before_call=False)
        return found, calls

    def _taken(self, size: int, *, before_call: bool) -> str:
        """Takes the first `size` characters out of the held text; returns them, without white space beside calls."""
        text, self._held = self._held[:size], self._held[size:]
        if before_call:
            text = text.rstrip()
        if self._has_calls and not self._has_text:
            text = text.lstrip()
        self._has_text = self._has_text or bool(text)
        return text


def _read_call(text: str, begin: int) -> tuple[Json, int] | str:
    """Returns the call whose opening mark ends at `begin`, and the index after its closing mark.

    If there is no call, the result is "unfinished" if more text may complete a call, and "none" otherwise. A call is a
    dict with `id`, `type` and `function`, whose `arguments` are JSON text, as in OpenAI's responses.
    """
    start = _after_space(text, begin)
    if not text.startswith("{", start):
        return "unfinished" if start == len(text) else "none"
    try:
        found, end = _DECODER.raw_decode(text, start)
    except ValueError:
        # The text may be the beginning of a JSON object that more text completes.
        return "unfinished" if _is_json(text[start:], partial=True) else "none"
    except RecursionError:  # Python raises this for thousands of nested brackets
        return "none"
    closing = _after_space(text, end)
    if not text.startswith(_CLOSING, closing):
        return "unfinished" if _CLOSING.startswith(text[closing:]) else "none"
    name, arguments = found.get("name"), found.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict) or not _is_json(text[start:end], partial=False):
        return "none"
    try:
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False, allow_nan=False)}
        check_texts(function.values())
    except ValueError:
        return "none"
    call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
    return call, closing + len(_CLOSING)


def _is_json(text: str, *, partial: bool) -> bool:
    """Returns whether a text is JSON, or with `partial` also whether it is the beginning of JSON."""
    try:
        pydantic_core.from_json(text, allow_partial="trailing-strings" if partial else False)
    except ValueError:
        return False
    return True


def _after_space(text: str, begin: int) -> int:
    found = _SPACE.match(text, begin)
    assert found is not None
    return found.end()


def _beginning_of(mark: str, text: str) -> int:
    """Returns how many characters at the end of the text may be the beginning of a mark."""
    return next(size for size in range(min(len(mark) - 1, len(text)), -1, -1) if text.endswith(mark[:size]))


def _refuse_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_number)
_SPACE = re.compile(r"\s*")
