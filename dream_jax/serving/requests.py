"""What clients may send: the fields of each request, checked, and how a request becomes tasks for the engine."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pydantic
import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dream_jax import inference, masks
from dream_jax.chat_template import ChatTemplateError
from dream_jax.data import read_question, with_instruction
from dream_jax.decoding import Alg
from dream_jax.sampler import Count, EntropyBound, Factor, Preset, SamplerConfig, Threshold
from dream_jax.sampler.state import NUM_TOP
from dream_jax.serving.tasks import Gap, Task
from dream_jax.tokenizer import Template, Tokenizer

_LARGEST_SEED = _LARGEST_INT = 2**31 - 1
_MOST_STOPS = 16
_MOST_MEMBERS = 100_000  # maximum number of lists, objects and keys in a body; reading millions of them takes seconds
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # a string of JSON, which may lack its end
_MOST_FIELDS = 100  # maximum number of fields of an object; every wrong field makes pydantic add an error

Number = Annotated[float, Field(allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Count1 = Annotated[int, Field(ge=1, le=1_000_000)]
NumTop = Annotated[int, Field(ge=0, le=NUM_TOP)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Index = Annotated[int, Field(ge=0, le=_LARGEST_INT)]
# With fail_fast pydantic stops at the first mistake, so that a list of a million mistakes takes no more time.
TokenIds = Annotated[list[Index], Field(max_length=1_000_000, fail_fast=True)]


def _few_fields(data: Any) -> Any:
    """Returns the data unchanged. Raises PydanticCustomError if it is an object of more than `_MOST_FIELDS` fields."""
    if isinstance(data, dict) and len(data) > _MOST_FIELDS:
        message = "an object of {count} fields; send only fields that GET /docs lists"
        raise pydantic_core.PydanticCustomError("too_many_fields", message, {"count": len(data)})
    return data


class RequestError(ValueError):
    """A request that cannot be answered as it is.

    Attributes:
      param: the field that is wrong, such as "messages.0.content"; None if it is none in particular.
      status: the HTTP status.
      code: a short name of the error, or None.
    """

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class _Body(BaseModel):
    """A part of a request. Fields that are not listed are refused, and types are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _check_fields(cls, data: Any) -> Any:
        return _few_fields(data)


class CommitOptions(_Body):
    """The rule for the number of positions that a pass writes, and its parameter."""

    rule: Literal["count", "threshold", "factor", "entropy_bound"]
    value: Number | None = None

    def made(self) -> Count | Threshold | Factor | EntropyBound:
        """Returns the rule. Raises ValueError if its parameter is missing, superfluous or outside its range."""
        if self.rule == "count":
            if self.value is not None:
                raise ValueError("the rule count has no value; leave it out")
            return Count()
        if self.value is None:
            raise ValueError(f"the rule {self.rule} needs a value")
        if self.rule == "entropy_bound":
            return EntropyBound(self.value)
        return Threshold(self.value) if self.rule == "threshold" else Factor(self.value)


class ForcedText(_Body):
    """Tokens that are written before the first step: those of `text`, or the id `token`, from `position` on."""

    position: Index
    text: str | None = None
    token: Index | None = None


class DreamOptions(_Body):
    """The extensions of the API: settings of the sampler (see `SamplerConfig`), and the events of denoising."""

    preset: Preset | None = None
    steps: Count1 | None = None
    block_length: Count1 | None = None
    first_token_first: bool | None = None
    alg: Alg | None = None
    commit: CommitOptions | None = None
    alg_temp: Annotated[float, Field(ge=0.0, le=1e6, allow_inf_nan=False)] | None = None
    top_k: Count1 | None = None
    eps: Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)] | None = None
    guidance: Annotated[float, Field(ge=-100.0, le=100.0, allow_inf_nan=False)] | None = None
    end_penalty: Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)] | None = None
    forced_tokens: Annotated[list[ForcedText], Field(max_length=10_000, fail_fast=True)] | None = None
    denoise: bool = False
    runner_ups: NumTop = 0


class StreamOptions(_Body):
    """What a stream contains beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Sampling(_Body):
    """The fields that all requests for answers have."""

    model: str
    temperature: Temperature | None = None
    top_p: TopP | None = None
    n: Count1 | None = None
    seed: Annotated[int, Field(ge=0, le=_LARGEST_SEED)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    dream: DreamOptions | None = None

    @property
    def options(self) -> DreamOptions:
        """The extensions, or their defaults."""
        return DreamOptions() if self.dream is None else self.dream

    @property
    def streams(self) -> bool:
        """Whether the answer is sent in chunks."""
        return bool(self.stream)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class _OpenAI(_Sampling):
    """Fields of OpenAI's API that this server accepts only where they change nothing, so that clients may send them."""

    stop: StopText | Annotated[list[StopText], Field(max_length=_MOST_STOPS)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0.0, le=0.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0.0, le=0.0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0), BeforeValidator(_few_fields)] | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(_few_fields)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ResponseFormat(_Body):
    """The form of an answer: only plain text."""

    type: Literal["text"]


class ChatRequest(_OpenAI):
    """The body of POST /v1/chat/completions; `data.read_question` reads the messages and the tools."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_tokens: Count1 | None = None
    max_completion_tokens: Count1 | None = None
    logprobs: bool | None = None
    top_logprobs: NumTop | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=1000, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None


class CompletionRequest(_OpenAI):
    """The body of POST /v1/completions. With `suffix`, the new tokens stand between the prompt and the suffix."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=1000, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=1000, fail_fast=True)]
    )
    suffix: str | None = None
    max_tokens: Count1 | None = None
    logprobs: NumTop | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None


class ExactGap(_Body):
    """A gap of exactly `length` tokens."""

    length: Count1


class OpenGap(_Body):
    """A gap of at most `up_to` tokens, which the model may end with end-of-text tokens."""

    up_to: Count1


class InfillRequest(_Sampling):
    """The body of POST /v1/infill: texts and gaps, in their order."""

    parts: Annotated[list[str | ExactGap | OpenGap], Field(min_length=1, max_length=1000, fail_fast=True)]


AnyRequest = ChatRequest | CompletionRequest | InfillRequest
_Request = TypeVar("_Request", bound=_Body)

_UNSUPPORTED = {
    "functions": 'an earlier form of "tools"; send it under this name',
    "function_call": 'an earlier form of "tools"; leave it out',
    "audio": "only text is supported; leave it out",
    "reasoning_effort": "this model has no reasoning levels; leave it out",
}


def parse(kind: type[_Request], body: bytes) -> _Request:
    """Returns the request that a body contains.

    Raises:
      RequestError: the body is no JSON, or a field is missing, unknown or wrong; the message names it. Or the body has
        more than `_MOST_MEMBERS` lists, objects and keys.
    """
    # Strings are removed only if the count with them is too large, because that takes a few hundredths of a second for
    # a body of 4 MiB.
    if _members(body) > _MOST_MEMBERS and _members(_STRING.sub(b"", body)) > _MOST_MEMBERS:
        raise RequestError(f"the body has more than {_MOST_MEMBERS} lists, objects and keys; send fewer", status=413)
    try:
        return kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise _explained(error, kind, body) from None


def _members(body: bytes) -> int:
    """Returns the number of lists, objects and keys of a text of JSON; signs inside of strings are counted, too."""
    return sum(map(body.count, (b"[", b"{", b":")))


def _explained(error: pydantic.ValidationError, kind: type[_Body], body: bytes) -> RequestError:
    """Returns the first mistake in a body as an error with the name of the field, its value and the remedy."""
    errors = error.errors(include_url=False, include_context=False)
    if errors[0]["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON in UTF-8: {errors[0]['msg']}; send one JSON object")
    data = pydantic_core.from_json(body)
    # Of the alternatives of a union, the one that was followed furthest is likely to be what was meant.
    first = max(
        (one for one in errors if _field(one, data)[:1] == _field(errors[0], data)[:1]),
        key=lambda one: (len(_field(one, data)), not one["type"].endswith("_type")),
    )
    field = _field(first, data)
    param = ".".join(map(_cut, field)) or None
    name = _cut(field[-1]) if field else ""
    where = f"{param}: " if param else ""
    if first["type"] == "extra_forbidden":
        if name in _UNSUPPORTED:
            return RequestError(f"{where}{_UNSUPPORTED[name]}", param, code="unsupported_parameter")
        if len(field) == 1 and name in DreamOptions.model_fields:
            return RequestError(f'{where}an extension; put it under "dream"', param, code="unknown_parameter")
        near = difflib.get_close_matches(name, [*kind.model_fields, *DreamOptions.model_fields], 1)
        hint = f"did you mean {near[0]!r}?" if near else "leave it out"
        return RequestError(f"{where}unknown field; {hint}", param, code="unknown_parameter")
    if first["type"] == "missing":
        return RequestError(f"{where}this field is required; add it", param, code="missing_required_parameter")
    return RequestError(f"{where}{first['msg']}, got {_shown(first['input'])}", param, code="invalid_value")


def _cut(name: int | str) -> str:
    """Returns the name of a field for a message, at most 80 characters; the client may have sent a very long name."""
    text = str(name)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _shown(value: Any, depth: int = 2) -> str:
    """Returns a value from a client as text for a message; long and deeply nested values are shortened first."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    if isinstance(value, list | dict) and value:
        if depth == 0:
            return "..."
        first = [_shown(one, depth - 1) for one in itertools.islice(value, 3)]
        if isinstance(value, dict):
            values = (_shown(one, depth - 1) for one in itertools.islice(value.values(), 3))
            first = [f"{name}: {one}" for name, one in zip(first, values, strict=True)]
        inside = ", ".join([*first, "..."] if len(value) > 3 else first)
        return _cut(f"{{{inside}}}" if isinstance(value, dict) else f"[{inside}]")
    return _cut(repr(value[:81] if isinstance(value, str) else value))


def _field(error: pydantic_core.ErrorDetails, data: Any) -> tuple[int | str, ...]:
    """Returns the path of the wrong field in the data, as names and indices, without pydantic's names of union members."""
    found: list[int | str] = []
    location = error["loc"]
    for number, name in enumerate(location):
        missing = error["type"] == "missing" and number == len(location) - 1
        if isinstance(data, dict) and isinstance(name, str) and (name in data or missing):
            found.append(name)
            data = data.get(name)
        elif isinstance(data, list) and isinstance(name, int) and name < len(data):
            found.append(name)
            data = data[name]
    return tuple(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for.

    Attributes:
      longest: maximum number of tokens of prompt and answer together.
      default_tokens: number of new tokens if the request does not say it.
      most_choices: maximum number of answers to one request.
    """

    longest: int
    default_tokens: int
    most_choices: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskMaker:
    """Makes the tasks of a request.

    Attributes:
      tokenizer: the tokenizer of the model.
      template: the template that the prompts of the training had.
      preset: the preset of requests that name none.
      limits: what a request may ask for.
      instruction: the text before the first message of the user in each chat, as `inference.PreparedModel.instruction`.
      trained_mask: name of the mask under which the model was trained.
    """

    tokenizer: Tokenizer
    template: Template
    preset: Preset
    limits: Limits
    instruction: str = ""
    trained_mask: str = "bidirectional"

    def tasks(self, request: AnyRequest) -> list[Task]:
        """Returns one task for each answer: the answers to the first prompt, then those to the next one.

        Raises:
          RequestError: the request asks for something that is not possible.
        """
        seed = secrets.randbelow(_LARGEST_SEED + 1) if request.seed is None else request.seed
        options = request.options
        if options.denoise and not request.streams:
            raise RequestError("dream.denoise: events are sent in a stream; set stream to true", "dream.denoise")
        if options.runner_ups and not options.denoise:
            raise RequestError(
                "dream.runner_ups: the runner-ups are a part of the events; set dream.denoise to true",
                "dream.runner_ups",
            )
        if request.stream_options is not None and not request.streams:
            raise RequestError("stream_options: only for a stream; set stream to true", "stream_options")
        if isinstance(request, ChatRequest):
            drafts = [self._chat(request)]
        elif isinstance(request, CompletionRequest):
            drafts = self._completions(request)
        else:
            drafts = [self._infill(request)]
        choices = 1 if request.n is None else request.n
        if choices * len(drafts) > self.limits.most_choices:
            raise RequestError(
                f"n: {len(drafts)} prompts with {choices} answers each are more than {self.limits.most_choices} "
                "answers; send several requests",
                "n",
            )
        return [dataclasses.replace(draft, seed=seed, sample=sample) for draft in drafts for sample in range(choices)]

    def _chat(self, request: ChatRequest) -> Task:
        if request.max_tokens is not None and request.max_completion_tokens is not None:
            raise RequestError("max_tokens: give either max_tokens or max_completion_tokens", "max_tokens")
        if request.top_logprobs and not request.logprobs:
            raise RequestError("top_logprobs: needs logprobs to be true", "top_logprobs")
        prompt = self._chat_prompt(request)
        asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        return self._continued(request, prompt, asked, logprobs=bool(request.logprobs))

    def _chat_prompt(self, request: ChatRequest) -> list[int]:
        """Returns the tokens with which `sample.py` asks: the reader of messages and tools is that of the training."""
        try:
            chat = read_question({"messages": request.messages, "tools": request.tools}, "request")
        except ValueError as error:
            raise _chat_error(str(error)) from error
        if chat.unread:
            raise RequestError(
                f"messages: unknown fields that nothing reads: {', '.join(chat.unread)[:200]}; leave them out",
                "messages",
                code="unknown_parameter",
            )
        if chat.tools and request.tool_choice == "none":
            raise RequestError(
                "tool_choice: a model that knows tools cannot be kept from calling them; leave out the tools instead",
                "tool_choice",
            )
        if chat.tools and request.parallel_tool_calls is False:
            raise RequestError(
                "parallel_tool_calls: the number of calls in an answer cannot be limited; leave it out",
                "parallel_tool_calls",
            )
        messages = with_instruction(chat.messages, self.instruction)
        try:
            return inference.encode_prompt(messages, "chat", self.tokenizer, tools=chat.tools)
        except ValueError as error:
            param = "tools" if chat.tools else "messages"
            # A client learns nothing about the folders of the server.
            reason = error.reason if isinstance(error, ChatTemplateError) else str(error)
            raise RequestError(_shortened(f"{param}: {reason}"), param) from error

    def _completions(self, request: CompletionRequest) -> list[Task]:
        prompts: Sequence[str | list[int]]
        if isinstance(request.prompt, str):
            prompts = [request.prompt]
        elif request.prompt and isinstance(request.prompt[0], str | list):
            prompts = request.prompt
        else:
            prompts = [request.prompt]  # type: ignore[list-item]
        if request.echo and request.logprobs is not None:
            raise RequestError("echo: logprobs of the prompt do not exist; leave echo or logprobs out", "echo")
        drafts = []
        for prompt in prompts:
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            if not isinstance(prompt, str):
                for token in ids:
                    if token >= self.tokenizer.vocab_limit or token == self.tokenizer.mask_id:
                        raise RequestError(
                            f"prompt: the token {token} is the mask token or not below {self.tokenizer.vocab_limit}; "
                            "use /v1/infill to fill gaps",
                            "prompt",
                        )
            if request.suffix is None:
                drafts.append(self._continued(request, ids, request.max_tokens, logprobs=request.logprobs is not None))
            else:
                drafts.append(self._between(request, ids, self.tokenizer.encode(request.suffix)))
        return drafts

    def _continued(
        self, request: ChatRequest | CompletionRequest, prompt: list[int], asked: int | None, *, logprobs: bool
    ) -> Task:
        """Returns a task that writes new tokens after a prompt."""
        tokens = self._new_tokens(len(prompt), asked)
        config = self._config(request, tokens, tokens, forced=self._forced(request.options, tokens))
        return self._task(request, prompt, config, (Gap(start=len(prompt), length=tokens),), request.stops, logprobs)

    def _between(self, request: CompletionRequest, prompt: list[int], suffix: list[int]) -> Task:
        """Returns a task that writes new tokens between a prompt and a suffix."""
        if request.options.forced_tokens:
            raise RequestError(
                "dream.forced_tokens: not with a suffix; use /v1/infill, where texts stand between gaps",
                "dream.forced_tokens",
            )
        if suffix:
            self._check_sees_after("suffix")
        tokens = self._new_tokens(len(prompt) + len(suffix), request.max_tokens)
        ids = [*prompt, *[self.tokenizer.mask_id] * tokens, *suffix]
        gap = Gap(start=len(prompt), length=tokens)
        config = self._config(request, 0, tokens)
        return self._task(request, ids, config, (gap,), request.stops, request.logprobs is not None)

    def _infill(self, request: InfillRequest) -> Task:
        if request.options.forced_tokens:
            raise RequestError("dream.forced_tokens: put texts between the gaps instead", "dream.forced_tokens")
        ids: list[int] = []
        pieces: list[str | Gap] = []
        num_masks = 0
        for part in request.parts:
            if isinstance(part, str):
                if part and num_masks:
                    self._check_sees_after("parts")
                ids += self.tokenizer.encode(part)
                pieces.append(part)
                continue
            size = part.length if isinstance(part, ExactGap) else part.up_to
            self._check_length(len(ids) + size, "parts")
            pieces.append(Gap(start=len(ids), length=size))
            ids += [self.tokenizer.mask_id] * size
            num_masks += size
        if num_masks == 0:
            raise RequestError('parts: there is no gap; add one, such as {"length": 5}', "parts")
        self._check_length(len(ids), "parts")
        # Only a gap of "up to" a length may end early. An end-of-text token must not fill later gaps, as it does after
        # an answer.
        fixed = not any(isinstance(part, OpenGap) for part in request.parts)
        changes: dict[str, Any] = {"stop_at_end": False} if len(pieces) > 1 else {}
        if fixed and request.options.end_penalty is not None:
            raise RequestError(
                'dream.end_penalty: gaps of a given length are never ended early; use "up_to" gaps, or leave it out',
                "dream.end_penalty",
            )
        config = self._config(request, 0, num_masks, **changes)
        if fixed:
            forbidden = (*config.forbidden_tokens, *inference.end_ids(self.tokenizer))
            config = dataclasses.replace(config, forbidden_tokens=forbidden)
        return self._task(request, ids, config, tuple(pieces), (), False)

    def _check_sees_after(self, param: str) -> None:
        """Raises RequestError for a given text after new tokens, if the model does not see it while it writes them."""
        if isinstance(masks.parse(self.trained_mask), masks.BlockDiffusion):
            raise RequestError(
                f"{param}: this model has the mask {self.trained_mask}, under which a block does not see what follows it, "
                "so a text after new tokens would be ignored; leave it out",
                param,
            )

    def _task(
        self,
        request: AnyRequest,
        prompt: list[int],
        config: SamplerConfig,
        pieces: tuple[str | Gap, ...],
        stop: tuple[str, ...],
        logprobs: bool,
    ) -> Task:
        return Task(
            prompt=tuple(prompt),
            config=config,
            seed=0,
            sample=0,
            pieces=pieces,
            stop=stop,
            records_logprobs=logprobs or request.options.runner_ups > 0,
            has_logprobs=logprobs,
            streams=request.streams,
            tells_tokens=request.options.denoise,
        )

    def _new_tokens(self, given: int, asked: int | None) -> int:
        """Returns the number of new tokens; without a wish the default, or fewer if the prompt leaves fewer."""
        if asked is None:
            asked = max(1, min(self.limits.default_tokens, self.limits.longest - given))
        if given + asked > self.limits.longest:
            raise RequestError(
                f"max_tokens: the prompt has {given} tokens, and {asked} new ones make {given + asked}, more than the "
                f"{self.limits.longest} of this server; ask for fewer, or shorten the prompt",
                "max_tokens",
                code="context_length_exceeded",
            )
        return asked

    def _check_length(self, length: int, param: str) -> None:
        if length > self.limits.longest:
            raise RequestError(
                f"{param}: the texts and gaps have more than the {self.limits.longest} tokens of this server; shorten "
                "them",
                param,
                code="context_length_exceeded",
            )

    def _forced(self, options: DreamOptions, tokens: int) -> tuple[tuple[int, int], ...]:
        """Returns the pairs (offset, token) of the forced tokens."""
        forced: dict[int, int] = {}
        for number, one in enumerate(options.forced_tokens or ()):
            param = f"dream.forced_tokens.{number}"
            if (one.text is None) == (one.token is None):
                raise RequestError(f"{param}: give either text or token", param)
            ids = self.tokenizer.encode(one.text) if one.text is not None else [one.token or 0]
            for offset, token in enumerate(ids, one.position):
                if offset >= tokens or offset in forced:
                    raise RequestError(
                        f"{param}: position {offset} is forced twice, or not below the {tokens} new tokens; move it",
                        param,
                    )
                if token >= self.tokenizer.vocab_limit or token == self.tokenizer.mask_id:
                    raise RequestError(
                        f"{param}: the token {token} is the mask token or not below {self.tokenizer.vocab_limit}", param
                    )
                forced[offset] = token
        if len(forced) == tokens:
            raise RequestError(
                "dream.forced_tokens: every new token is forced; leave some to the model", "dream.forced_tokens"
            )
        return tuple(sorted(forced.items()))

    def _config(
        self,
        request: AnyRequest,
        new_tokens: int,
        masks: int,
        *,
        forced: tuple[tuple[int, int], ...] = (),
        **changes: Any,
    ) -> SamplerConfig:
        """Returns the settings of the sampler: those of `sample.py` with flags of the same names.

        Args:
          request: the request.
          new_tokens: number of tokens after the prompt.
          masks: number of positions to write, in the prompt and after it.
          forced: the forced tokens.
          **changes: fields of SamplerConfig that replace those of the preset.
        """
        options = request.options
        preset = self.preset if options.preset is None else options.preset
        steps = options.steps
        if steps is not None and steps > masks:
            raise RequestError(f"dream.steps: {steps} steps are more than the {masks} tokens to write", "dream.steps")
        if preset != "exact" and options.commit is not None and options.commit.rule == "count":
            raise RequestError(
                f"dream.commit: the rule count needs a number of steps, which the preset {preset!r} does not have; use the "
                "preset 'exact', with a block_length if wanted",
                "dream.commit",
            )
        try:
            return inference.make_sampler(
                self.tokenizer,
                new_tokens,
                preset,
                trained_mask=self.trained_mask,
                steps=steps,
                alg=options.alg,
                temperature=request.temperature,
                top_p=None if request.top_p == 1.0 else request.top_p,
                top_k=options.top_k,
                alg_temp=options.alg_temp,
                eps=options.eps,
                guidance=options.guidance,
                end_penalty=options.end_penalty,
                block_length=options.block_length,
                first_token_first=options.first_token_first,
                commit=None if options.commit is None else options.commit.made(),
                forced_tokens=forced or None,
                **changes,
            )
        except ValueError as error:
            raise RequestError(f"dream: {error}", "dream") from error


def _chat_error(message: str) -> RequestError:
    """Returns an error of the reader of chats as one that names the field: "messages.2", "tools" or "messages"."""
    numbered = re.match(r"request: message (\d+)\b", message)
    param = "messages" if numbered is None else f"messages.{numbered[1]}"
    if re.match(r"request: (field )?'tools'", message):
        param = "tools"
    return RequestError(_shortened(message), param)


def _shortened(message: str) -> str:
    """Returns a message whose middle is left out if it repeats a long text of the client."""
    return message if len(message) <= 350 else f"{message[:170]} ... {message[-170:]}"


def decoded(tokens: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> str:
    """Returns the text of token ids; special tokens appear by name."""
    return tokenizer.decode([int(token) for token in tokens])
