"""Puts the files of the player together to pages: each is one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from dream_jax.files import write_file
from dream_jax.paths import AnyPath, local_path

_INCLUDE = re.compile(r"\{\{([\w.]+)\}\}")
_RECORD = re.compile(r'<script type="application/json" id="record">(.*?)</script>', re.DOTALL)
_SCRIPT = re.compile(r"<script(?![^>]*application/json)[^>]*>(.*?)</script>", re.DOTALL)


def chat_page() -> str:
    """Returns the page with which the server is used from a browser."""
    return _assembled("chat.html", {})


def replay_page(record: Mapping[str, Any]) -> str:
    """Returns a page that plays one answer without a network.

    Args:
      record: what the player needs, see `record.answer_record`. Its texts may contain anything: they are data of the
        page, from which no markup and no script can arise.

    Raises:
      ValueError: a number of the record is not finite.
    """
    # ASCII: half of a surrogate pair cannot be written in UTF-8, and some readers take U+2028 for the end of a line.
    text = json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    # Only "<" could end the script element in which the text stands, or begin a comment there.
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    page = _assembled("replay.html", {"policy": "", "record": ""})
    return _assembled("replay.html", {"policy": _policy(page), "record": text})


def record_of(page: str) -> Any:
    """Returns the record in a page that `replay_page` made. Raises ValueError if it has none."""
    found = _RECORD.search(page)
    if found is None:
        raise ValueError("the page has no record of an answer; was it written by sample.py --replay?")
    return json.loads(found[1])


def check_replay_file(path: AnyPath) -> pathlib.Path:
    """Returns the path of a replay file that can be written, whose folder is made if it is missing.

    To be called before the answer is computed, so that no answer is lost.

    Raises:
      FileExistsError: there is a file at this path, which must not be replaced.
      ValueError: the path is an address.
      OSError: the folder cannot be made or written.
    """
    target = local_path(path)
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{path} is there already; remove it, or give another name for the replay file")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.touch(exist_ok=False)  # raises now if the folder cannot be written
    target.unlink()
    return target


def write_replay(path: AnyPath, record: Mapping[str, Any]) -> None:
    """Writes the page of `replay_page` to a file that must not be there yet.

    Raises:
      FileExistsError, ValueError, OSError: as `check_replay_file`; or the disk is full.
    """
    write_file(check_replay_file(path), replay_page(record))


def _assembled(name: str, texts: Mapping[str, str]) -> str:
    """Returns a file of this folder in which each {{NAME}} is replaced by a text, or by the file with this name."""
    folder = importlib.resources.files("dream_jax.player")

    def text_of(found: re.Match[str]) -> str:
        return texts[found[1]] if found[1] in texts else (folder / found[1]).read_text(encoding="utf-8")

    return _INCLUDE.sub(text_of, (folder / name).read_text(encoding="utf-8"))


def script_hashes(page: str) -> str:
    """Returns the hashes of the scripts in a page, as a Content-Security-Policy lists scripts that may run."""
    sums = (hashlib.sha256(script.encode()).digest() for script in _SCRIPT.findall(page))
    return " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in sums) or "'none'"


def _policy(page: str) -> str:
    """Returns a Content-Security-Policy under which the scripts of a page run, and nothing can be loaded or sent."""
    # data: is for the empty icon; without one, a browser asks the server of the page for an icon.
    scripts = script_hashes(page)
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {scripts}; base-uri 'none'"
