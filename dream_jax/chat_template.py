"""Renders the chat template of a checkpoint, a Jinja program of unknown origin, in a process of its own.

A template can raise an error, run for ever, or ask for more memory than the machine has, and a check of its text cannot
find this out. A process with limits of its own can always be ended, even in the middle of a long operation; a thread
cannot. The process renders all templates of this program, one after the other. Beside the standard library it imports
only Jinja, whose sandbox gives a template no access to Python. The process cannot write files.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS = 5.0
"""CPU time in seconds that a template may take for one chat. The published one takes less than a millisecond."""
MEMORY_BYTES = 2 * 2**30
"""Memory in bytes that the process may take."""
# A template may write _FREE_CHARACTERS characters, plus _GROWTH for each byte of the request (template and chat as JSON).
_FREE_CHARACTERS, _GROWTH = 2**20, 8

# Keys under which a message may have its reasoning. The first one that it has is used.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplateError(ValueError):
    """A chat template cannot render a chat; `reason` is the message without the file of the template."""

    def __init__(self, file: Path, reason: str):
        super().__init__(f"{file}: {reason}")
        self.reason = reason


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
      file: the file that the template is from; error messages begin with it.
      text: the template.
      names: texts that the template can use by name, such as {"eos_token": "<|endoftext|>"}.
    """

    def __init__(self, file: Path, text: str, names: Mapping[str, str]):
        self.text = text
        self._file, self._names = file, dict(names)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """Returns the text of a chat.

        Args:
          messages: the messages, each a dict with `role` and `content`. A key whose value is None counts as missing, as
            in transformers.
          tools: JSON schemas of the functions that the model may call; without any, the template sees None.
          add_generation_prompt: whether the text ends with the beginning of a turn of the assistant.

        Raises:
          ChatTemplateError: the template raises an error, takes longer than `SECONDS`, needs more memory than
            `MEMORY_BYTES`, or writes too long a text.
          ValueError: a message has a value that JSON cannot represent.
          OSError: the process that renders templates cannot be started.
        """
        return self.render_all([(messages, tools, add_generation_prompt)])[0]

    def render_all(
        self, chats: Sequence[tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]], bool]]
    ) -> list[str]:
        """Returns the texts of several chats, each with its own limits of time and length.

        Args:
          chats: for each chat `messages`, `tools` and `add_generation_prompt`, as `render` has them.

        Raises:
          ChatTemplateError, ValueError, OSError: as `render`, for the first chat that cannot be rendered.
        """
        try:
            given = [
                json.dumps(
                    {
                        "messages": [_message(message) for message in messages],
                        "tools": list(tools) or None,
                        "documents": None,
                        "add_generation_prompt": add_generation_prompt,
                    }
                )
                for messages, tools, add_generation_prompt in chats
            ]
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"a chat must consist of texts, numbers, lists and objects, as JSON has them: {error}"
            ) from error
        common = json.dumps({"template": self.text, "variables": self._names})
        sizes = [len(common) + len(chat) for chat in given]
        request = f'{common[:-1]}, "sizes": {json.dumps(sizes)}, "chats": [{", ".join(given)}]}}'
        found = list[str]()
        for answer in _RENDERER.ask(request.encode(), len(given)):
            if "error" in answer:
                reason = f"the chat template {answer['error']}; use the template of the checkpoint"
                raise ChatTemplateError(self._file, reason)
            found.append(str(answer["text"]))
        return found


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message without keys whose value is None.

    Its reasoning, if it has any, is under `reasoning_content` and `thinking`: each template reads one of these keys.
    """
    found = {name: value for name, value in message.items() if value is not None}
    reasoning = next((found[name] for name in _REASONING if name in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


class _Renderer:
    """Starts the process when it is first needed, and starts it again after it has ended."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forgets the process without ending it. The child of a fork calls this, because the parent uses the process."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def ask(self, request: bytes, count: int) -> list[dict[str, Any]]:
        """Returns the answers to a request with `count` chats: each {"text": ...}; the last may be {"error": ...}.

        After an error there are no further answers. Raises OSError if no process can be started.
        """
        if not count:
            return []
        answers = list[dict[str, Any]]()
        with self._lock:
            process = self._process or self._start()
            self._process = None  # so that an interruption leaves no process whose answer belongs to another request
            try:
                for line in _exchange(process, request, count):
                    if line.endswith(b"\n"):
                        answers.append(json.loads(line))
                        if "error" in answers[-1]:
                            break
            except BaseException:  # Ctrl-C (KeyboardInterrupt) must end the process too
                _end(process)
                raise
            if len(answers) == count and "text" in answers[-1]:
                self._process = process
                return answers
            _end(process)  # also after an error: the process could keep the memory that the template has taken
        if answers and "error" in answers[-1]:
            return answers
        if process.returncode == -signal.SIGPROF:
            return [*answers, {"error": f"did not end within {SECONDS:g} seconds"}]
        return [*answers, {"error": f"ended the process that renders it (exit status {process.returncode})"}]

    def _start(self) -> subprocess.Popen[bytes]:
        kept = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "TZ")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        # The new process must find Jinja where this process finds it. With -P it does not find the modules in the folder of
        # this file.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        return subprocess.Popen(
            [sys.executable, "-P", __file__, str(SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )


def _exchange(process: subprocess.Popen[bytes], request: bytes, count: int) -> Iterator[bytes]:
    """Sends a line to the process and yields at most `count` lines that it answers.

    The last one has no newline if the process has ended. The process writes after it has read the whole request.
    """
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(request + b"\n")
        process.stdin.flush()
    for _ in range(count):
        line = process.stdout.readline()
        yield line
        if not line.endswith(b"\n"):
            return


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    # If the process ended before it read its request, the pipe still holds the rest of the request, and closing the pipe
    # tries to write it once more.
    with contextlib.suppress(BrokenPipeError), process:  # waits for its end and closes its pipes
        pass


_RENDERER = _Renderer()
os.register_at_fork(after_in_child=_RENDERER.forget)
atexit.register(_RENDERER.close)


# ------------------------------------------------------------------------------------------ in the process that renders


def _serve(seconds: float) -> None:
    """Answers the requests on stdin, one per line, on stdout, until stdin ends. Each may take `seconds` of CPU time."""
    # A terminal or a scheduler sends these two signals to all processes of a job. This process ignores them, because the
    # program that asks may still need it to finish its own work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for limit, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # some systems lack a limit; the others still hold
            resource.setrlimit(limit, (most, most))
    for line in sys.stdin.buffer:
        # When the time is over, the kernel ends this process with SIGPROF, whatever the process does. This timer counts
        # CPU time, so that a good template does not fail on a busy machine. Each chat has its own time.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        request = json.loads(line)
        for chat, size in zip(request["chats"], request["sizes"], strict=True):
            signal.setitimer(signal.ITIMER_PROF, seconds)
            answer = _answer(request["template"], request["variables"] | chat, size)
            content = json.dumps(answer).encode()
            signal.setitimer(signal.ITIMER_PROF, 0)
            sys.stdout.buffer.write(content + b"\n")
            if "error" in answer:
                break
        sys.stdout.buffer.flush()


def _answer(text: str, variables: dict[str, Any], size: int) -> dict[str, str]:
    """Returns {"text": the text of the chat}, or {"error": the end of the sentence "the chat template ..."}.

    `size` is the number of bytes of the template and the chat in the request.
    """
    try:
        template = _compiled(text)
        longest = _FREE_CHARACTERS + _GROWTH * size
        pieces, length = [], 0
        for piece in template.generate(variables):
            pieces.append(piece)
            length += len(piece)
            if length > longest:
                return {"error": f"writes more than {longest:,} characters"}
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"error": f"needs more than {MEMORY_BYTES / 2**30:g} GiB of memory"}
    except Exception as error:  # A template can raise an error of any type.
        number = getattr(error, "lineno", None)
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == "<template>":
                number = frame.lineno
        where = "" if number is None else f" in line {number}"
        return {"error": f"raises an error{where}: {type(error).__name__}: {error!s:.500}"}


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> Any:
    """Returns the compiled template. The environment is that of transformers, for which templates are written."""
    import jinja2.ext
    import jinja2.sandbox
    import jinja2.utils

    class Namespace(jinja2.utils.Namespace):
        """Jinja's `namespace`, but without attributes whose names begin with "_", such as Python's own ones."""

        def __init__(*args: Any, **names: Any) -> None:
            self, *rest = args
            given = dict(*rest, **names)
            for name in given:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, given)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have the private attribute {name!r}")

    class Generation(jinja2.ext.Extension):
        """The tag {% generation %} ... {% endgeneration %} around what the assistant writes; it changes nothing here."""

        tags = {"generation"}  # noqa: RUF012 - declared so by Jinja

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "dict": lambda *args, **names: dict(*args, **names),
        "namespace": Namespace,
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return environment.from_string(text)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
