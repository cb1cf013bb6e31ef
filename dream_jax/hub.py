"""Asks the Hugging Face hub for models and data sets, but only for names that cannot be local paths.

Before each request a line on stderr says what is asked. If the hub (or a proxy) does not answer in time, the program ends
with an error and does not wait for ever. With `HF_HUB_OFFLINE=1` only the local cache of the hub is used, and with
`HF_DATASETS_OFFLINE=1` only for data sets.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
import sys
import threading
from collections.abc import Callable, Collection
from typing import Any, Literal, TypeVar

from dream_jax.paths import AnyPath, local_path

TIMEOUT_VARIABLE = "DREAM_JAX_HUB_TIMEOUT"
"""The environment variable with the number of seconds to wait for an answer of the hub."""
TIMEOUT_SECONDS = 30.0
"""The number of seconds without that variable."""

RepositoryKind = Literal["model", "dataset"]

_PATTERN = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\w[\w./-]*))?")
_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True)
class HubId:
    """The name of a repository on the hub.

    Attributes:
      name: organisation/name.
      revision: a branch, a tag or a commit; None for the newest commit of the main branch.
    """

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


# Repositories for which this process has asked the hub, and which the hub has. They are not asked for again.
_answered: set[tuple[HubId, RepositoryKind]] = set()


def parse_hub_id(text: str) -> HubId | None:
    """Returns the hub id in a text of the form organisation/name or organisation/name@revision; None for other texts."""
    found = _PATTERN.fullmatch(text)
    return None if found is None else HubId(found[1], found[2])


def hub_id_of(path: AnyPath) -> HubId | None:
    """Returns the hub id that a text such as "organisation/name" means; None if the text may be a local path.

    It may be a local path if the path exists. If only a folder with the name of the organisation exists, the user has
    probably mistyped a path in this folder, so the result is None too.

    Raises:
      ValueError: the path is an address (see `local_path`).
    """
    found = local_path(path)
    if found.exists() or found.is_symlink() or found.parent.exists():
        return None
    return parse_hub_id(os.fspath(path))


def why_not_asked(path: AnyPath) -> str:
    """Returns the end of an error message for a path that does not exist but has the form of a hub id; else ""."""
    parsed, parent = parse_hub_id(os.fspath(path)), pathlib.Path(path).parent
    if parsed is None or not parent.exists():
        return ""
    return (
        f". It could be the name of a repository on the Hugging Face hub, but the hub was not asked, because there is a "
        f"{'folder' if parent.is_dir() else 'file'} {parent} here; to download it, run the command in another folder"
    )


def pinned(name: str, revision: str | None) -> str:
    """Returns organisation/name@revision, the hub id `name` with a revision; `name` itself if `revision` is None.

    Raises:
      ValueError: `name` is not a hub id or has another revision already, or `revision` has a character that no name of a
        revision has.
    """
    if revision is None:
        return name
    parsed = hub_id_of(name)
    if parsed is None or parsed.revision not in (None, revision):
        raise ValueError(
            f"revision={revision} is for a hub id, organisation/name, without another revision, but the model is {name}; "
            "leave it out"
        )
    text = f"{parsed.name}@{revision}"
    if parse_hub_id(text) is None:
        raise ValueError(f"{revision=} is not the name of a branch, a tag or a commit")
    return text


def timeout() -> float:
    """Returns how many seconds to wait for an answer: `$DREAM_JAX_HUB_TIMEOUT`, or 30.

    Raises:
      ValueError: the variable is not a number above 0.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text) if text else TIMEOUT_SECONDS
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{TIMEOUT_VARIABLE}={text} is not a number of seconds above 0")
    return min(seconds, threading.TIMEOUT_MAX)


def ask(hub_id: HubId, kind: RepositoryKind) -> bool:
    """Asks the hub whether it has a repository, within a deadline for the whole answer.

    Args:
      hub_id: the repository.
      kind: whether it is a model or a data set.

    Returns:
      True if the hub has it. False if only the local cache can be used, because the hub cannot be reached or
      `HF_HUB_OFFLINE` (for data sets also `HF_DATASETS_OFFLINE`) is set.

    Raises:
      ConnectionError: the hub has no such repository or revision, or does not show it to this user; or there is no answer
        within `timeout`.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    only_data = os.environ.get("HF_DATASETS_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
    if constants.HF_HUB_OFFLINE or (kind == "dataset" and only_data):
        return False
    if (hub_id, kind) in _answered:
        return True
    seconds = timeout()
    what = "model" if kind == "model" else "data set"
    print(f"asking the Hugging Face hub, {constants.ENDPOINT}, for the {what} {hub_id}", file=sys.stderr, flush=True)
    _limit_silence(huggingface_hub.get_session(), seconds)
    api = huggingface_hub.HfApi()
    try:
        within(seconds, lambda: api.repo_info(hub_id.name, repo_type=kind, revision=hub_id.revision, timeout=seconds))
    except TimeoutError as error:
        raise ConnectionError(
            f"there is no local path {hub_id}, and the Hugging Face hub did not answer within {seconds:g} s; check the "
            f"network and the proxy, set {TIMEOUT_VARIABLE} to wait longer, or HF_HUB_OFFLINE=1 to use only its cache"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        missing = "revision" if isinstance(error, RevisionNotFoundError) else what
        raise ConnectionError(
            f"there is no local path {hub_id}, and the Hugging Face hub has no such {missing}, or does not show it without "
            "a token; check the name, or log in with `hf auth login`"
        ) from error
    except (HTTPError, OSError) as error:
        print(f"the Hugging Face hub cannot be reached ({_first_line(error)})", file=sys.stderr, flush=True)
        return False
    _answered.add((hub_id, kind))
    return True


def download(hub_id: HubId, patterns: Collection[str]) -> pathlib.Path:
    """Downloads files of a model into the cache of the hub, and returns the directory with them in the cache.

    Args:
      hub_id: the repository.
      patterns: names of the files to download, or patterns such as "*.safetensors".

    Raises:
      ConnectionError: the files are not in the cache, and the hub cannot be reached or refuses them; or the cache cannot
        be written.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    reachable = ask(hub_id, "model")
    try:
        return pathlib.Path(
            snapshot_download(
                hub_id.name,
                revision=hub_id.revision,
                allow_patterns=list(patterns),
                local_files_only=not reachable,
            )
        )
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: hf_xet, which transfers large files, raises it
        # The library's own message advises an argument that no command of this program has.
        absent = isinstance(error, LocalEntryNotFoundError)
        reason = (
            "the cache of this machine does not have it, and the hub was not reached" if absent else _first_line(error)
        )
        raise ConnectionError(
            f"there is no local directory {hub_id}, and it could not be downloaded from the Hugging Face hub: "
            f"{reason}; download it on another machine and pass its directory"
        ) from error


def _limit_silence(session: Any, seconds: float) -> None:
    """Sets a timeout of `seconds` for every request of the session that has none.

    The timeout limits the time to connect and the time between two pieces of an answer, not the time of the whole answer.
    """

    def limit(request: Any) -> None:
        given = request.extensions.get("timeout") or {}
        parts = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {part: given.get(part) or seconds for part in parts}

    limit.__name__ = "dream_jax_limit"
    hooks = session.event_hooks
    others = [hook for hook in hooks.get("request", []) if getattr(hook, "__name__", "") != limit.__name__]
    session.event_hooks = {**hooks, "request": [*others, limit]}


def within(seconds: float, function: Callable[[], _Value]) -> _Value:
    """Returns what a function returns. Raises its errors, and TimeoutError if it takes longer.

    A timeout of the connection alone is not enough: it does not count the time to find the address of a name, and starts
    again with each byte. The thread of a function that takes longer goes on, but does not keep the process alive.
    """
    results: list[_Value] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:  # raised again below, in the calling thread
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        if "timeout" in type(errors[0]).__name__.lower():  # the classes of timeouts depend on the library for HTTP
            raise TimeoutError(str(errors[0])) from errors[0]
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
