"""What clients get: answers in the form of OpenAI's API, whole or in chunks, and the events of denoising."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterator, Sequence

from dream_jax.serving.requests import AnyRequest, ChatRequest, CompletionRequest, decoded
from dream_jax.serving.tasks import Finish, Gap, Task, TokenNote, Update
from dream_jax.serving.tool_calls import CallReader, Json
from dream_jax.tokenizer import Tokenizer

_NAMES = {"chat": ("chatcmpl", "chat.completion"), "text": ("cmpl", "text_completion"), "infill": ("infill", "infill")}


@dataclasses.dataclass
class _Choice:
    """One answer of a request, as far as it is known.

    Attributes:
      task: its task.
      echo: text of the prompt that precedes the answer; empty if it was not asked for.
      reader: takes the calls of tools out of the text; None if the request has no tools: then everything is text.
      text: the text of the answer so far, without the calls.
      calls: the calls so far, in OpenAI's form.
      news: the text and the calls that the last update added.
    """

    task: Task
    echo: str
    reader: CallReader | None
    text: str = ""
    calls: list[Json] = dataclasses.field(default_factory=list)
    news: tuple[str, list[Json]] = ("", [])
    tokens: list[TokenNote] = dataclasses.field(default_factory=list)
    passes: int = 0
    num_tokens: int = 0
    finish: Finish | None = None
    gap_texts: tuple[str, ...] = ()

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended, in OpenAI's words; None while it is being written."""
        return "tool_calls" if self.calls and self.finish is not None else self.finish


class Reply:
    """The answers to one request.

    Args:
      request: the request.
      tasks: its tasks; the index of a task is the index of its choice.
      tokenizer: the tokenizer of the model.
      model: the name of the model.
    """

    def __init__(self, request: AnyRequest, tasks: Sequence[Task], tokenizer: Tokenizer, model: str):
        self._tokenizer = tokenizer
        self._kind = (
            "chat"
            if isinstance(request, ChatRequest)
            else "text"
            if isinstance(request, CompletionRequest)
            else "infill"
        )
        self._num_top = 0
        if isinstance(request, ChatRequest):
            self._num_top = request.top_logprobs or 0
        elif isinstance(request, CompletionRequest):
            self._num_top = request.logprobs or 0
        self._runner_ups = request.options.runner_ups
        self._includes_usage = request.includes_usage
        reads_calls = isinstance(request, ChatRequest) and bool(request.tools)
        echoes = isinstance(request, CompletionRequest) and bool(request.echo)
        self._choices = [
            _Choice(task, self._echo(request, task) if echoes else "", CallReader() if reads_calls else None)
            for task in tasks
        ]
        prefix, self._object = _NAMES[self._kind]
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def _echo(self, request: AnyRequest, task: Task) -> str:
        if isinstance(request, CompletionRequest) and isinstance(request.prompt, str):
            return request.prompt
        return decoded(task.prompt[: task.gaps[0].start], self._tokenizer)

    @property
    def finished(self) -> bool:
        """Whether all answers have ended."""
        return all(choice.finish is not None for choice in self._choices)

    def add(self, index: int, update: Update) -> None:
        """Notes what has changed in an answer."""
        choice = self._choices[index]
        choice.news = update.text, []
        if choice.reader is not None:
            choice.news = choice.reader.read(update.text, last=update.finish is not None)
        choice.text += choice.news[0]
        choice.calls += choice.news[1]
        choice.tokens += update.tokens
        choice.passes, choice.num_tokens = update.passes, update.num_tokens
        choice.finish, choice.gap_texts = update.finish, update.gap_texts

    def whole(self) -> Json:
        """Returns the body of an answer that is not streamed."""
        choices: list[Json] = []
        for index, choice in enumerate(self._choices):
            text, logprobs = choice.echo + choice.text, self._logprobs(choice.tokens, choice)
            found: Json = {"index": index}
            if self._kind == "chat":
                found["message"] = {"role": "assistant", "content": text, "refusal": None}
                if choice.calls:
                    found["message"] |= {"content": text or None, "tool_calls": choice.calls}
            else:
                found["text"] = text
            if self._kind == "infill":
                found["gaps"] = list(choice.gap_texts)
            choices.append(found | {"finish_reason": choice.finish_reason, "logprobs": logprobs})
        dream = {"seed": self._choices[0].task.seed, "forwards": [choice.passes for choice in self._choices]}
        return {**self._head, "object": self._object, "choices": choices, "usage": self._usage(), "dream": dream}

    def opening(self) -> Iterator[Json]:
        """Yields the chunks with which a stream begins."""
        for index, choice in enumerate(self._choices):
            if self._kind == "chat":
                yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})
            if choice.echo:
                yield self._chunk(index, {"text": choice.echo})
            if choice.task.tells_tokens:
                yield self._event(index, self._canvas(choice.task))

    def chunks(self, index: int, update: Update) -> Iterator[Json]:
        """Yields the chunks for an update, which was added before."""
        choice = self._choices[index]
        if update.written:
            written = [self._token_event(choice.task, note) for note in update.written]
            yield self._event(index, {"event": "written", "forwards": update.passes, "tokens": written})
        logprobs = self._logprobs(update.tokens, choice)
        text, calls = choice.news
        if text or update.tokens:
            content: Json = {"delta": {"content": text}} if self._kind == "chat" else {"text": text}
            yield self._chunk(index, content | {"logprobs": logprobs})
        for number, call in enumerate(calls, len(choice.calls) - len(calls)):
            yield self._chunk(index, {"delta": {"tool_calls": [{"index": number} | call]}})
        if update.finish is not None:
            ending: Json = {"delta": {}} if self._kind == "chat" else {"text": ""}
            if self._kind == "infill":
                ending["gaps"] = list(update.gap_texts)
            dream = {"index": index, "seed": choice.task.seed, "forwards": update.passes}
            yield self._chunk(index, ending | {"finish_reason": choice.finish_reason}) | {"dream": dream}

    def closing(self) -> Iterator[Json]:
        """Yields the chunks with which a stream ends."""
        if self._includes_usage:
            yield self._envelope() | {"choices": [], "usage": self._usage()}

    def _envelope(self) -> Json:
        kind = self._object if self._kind == "text" else f"{self._object}.chunk"
        return {**self._head, "object": kind}

    def _chunk(self, index: int, content: Json) -> Json:
        choice = {"index": index, "finish_reason": None, "logprobs": None} | content
        return self._envelope() | {"choices": [choice]}

    def _event(self, index: int, event: Json) -> Json:
        return self._envelope() | {"choices": [], "dream": {"index": index} | event}

    def _canvas(self, task: Task) -> Json:
        event: Json = {"event": "canvas", "length": sum(gap.length for gap in task.gaps), "seed": task.seed}
        event["forced"] = [
            {"position": position, "token": token, "text": self._tokenizer.decode([token])}
            for position, token in task.config.forced_tokens
        ]
        event["stop_at_end"] = task.config.stop_at_end
        if self._kind == "infill":
            event["gaps"] = [{"gap": number, "length": gap.length} for number, gap in enumerate(task.gaps)]
        return event

    def _token_event(self, task: Task, note: TokenNote) -> Json:
        number, gap = _gap_of(task.gaps, note.position)
        event: Json = {"gap": number} if self._kind == "infill" else {}
        event |= {"position": note.position - gap.start, "token": note.token, "text": note.text, "step": note.step}
        event["confidence"] = note.confidence
        if self._runner_ups:
            event["logprob"] = note.logprob
            others = [one for one in note.top if one[0] != note.token][: self._runner_ups]
            event["runner_ups"] = [{"token": token, "text": text, "logprob": value} for token, text, value in others]
        return event

    def _logprobs(self, notes: Sequence[TokenNote], choice: _Choice) -> Json | None:
        if not choice.task.has_logprobs:
            return None
        if self._kind == "chat":
            return {"content": [self._chat_logprob(note) for note in notes], "refusal": None}
        ids = [note.token for note in choice.tokens]
        first = len(ids) - len(notes)
        return {
            "tokens": [note.text for note in notes],
            "token_logprobs": [note.logprob for note in notes],
            "top_logprobs": [{text: value for _, text, value in reversed(note.top[: self._num_top])} for note in notes],
            "text_offset": [
                len(choice.echo) + len(decoded(ids[:count], self._tokenizer)) for count in range(first, len(ids))
            ],
        }

    def _chat_logprob(self, note: TokenNote) -> Json:
        top = [{"token": text, "bytes": _bytes(text), "logprob": value} for _, text, value in note.top[: self._num_top]]
        return {"token": note.text, "bytes": _bytes(note.text), "logprob": note.logprob, "top_logprobs": top}

    def _usage(self) -> Json:
        # The answers to one prompt share it; a new prompt begins with the sample 0.
        given = sum(choice.task.num_given for choice in self._choices if choice.task.sample == 0)
        made = sum(choice.num_tokens for choice in self._choices)
        return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


def _gap_of(gaps: Sequence[Gap], position: int) -> tuple[int, Gap]:
    """Returns the number of the gap that has a position, and the gap."""
    return next((number, gap) for number, gap in enumerate(gaps) if gap.start <= position < gap.end)


def _bytes(text: str) -> list[int] | None:
    """Returns the bytes of the text of a token; None if it is a part of a character."""
    return None if "\ufffd" in text else list(text.encode())
