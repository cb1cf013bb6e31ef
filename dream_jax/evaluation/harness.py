"""The adapter to lm-evaluation-harness (the extra `eval`): answers its requests to generate and for log-likelihoods.

    python -m dream_jax.evaluation.harness run --model dream_jax \
        --model_args pretrained=weights/dream-7b,preset=instruct --tasks mine --include_path tasks --apply_chat_template

This command takes the arguments of `python -m lm_eval`. Released versions of lm_eval find no model outside their
package; the command registers the model `dream_jax` and then calls lm_eval. In Python, importing this module registers
the model; no other module of the package imports this one.

A log-likelihood is minus the Monte Carlo bound of `likelihood`; for one token it is exact.
"""

from __future__ import annotations

import collections
import hashlib
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import lm_eval.utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from dream_jax import device_memory
from dream_jax.attention import Backend
from dream_jax.bounds import MOST_ROWS, MOST_TOKENS, SEED, IntegerRange, check
from dream_jax.data import parse_messages, with_instruction
from dream_jax.decoding import Alg
from dream_jax.evaluation import likelihood
from dream_jax.evaluation.scored_texts import passage
from dream_jax.evaluation.settings import Published, published_sampler
from dream_jax.inference import BaseFlag, DtypeFlag, ModelSettings, RowName, answer, batches, make_sampler, prepare
from dream_jax.layer_forms import LayersChoice
from dream_jax.sampler import Preset, SamplerConfig
from dream_jax.tokenizer import turn_text

_log = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 256

# Number of log-likelihood requests that are computed together: one with a single scored token has only one row.
_GROUP = 256

# Options of the sampler that a task may set, in addition to `until` and the length.
_SAMPLER_OPTIONS = ("temperature", "top_p", "top_k")
_IGNORED = {"do_sample", "until", "max_gen_toks", "max_new_tokens", "max_tokens"}


@register_model("dream_jax")
class DreamHarness(TemplateLM):
    """A Dream model behind the interface of the harness.

    Args (`--model_args name=value,...`):
      pretrained: a model directory, a hub id, or the name of a model preset.
      preset: "base", "instruct" or "planning": the sampler settings of this published evaluation of Dream.
      sampler: "exact", "balanced" or "fast", as in `evaluate.py`.
      adapter: directory of a LoRA adapter, which is added to the weights.
      any_base, base, mask: as in `evaluate.py`.
      instruction: text before the first user turn of every chat; by default that of the training, if the model or the
        adapter notes one.
      alg, temperature, top_p, top_k, alg_temp, steps, first_token_first: sampler settings, as in `evaluate.py`. They
        override the preset, and the preset overrides the options of a task, because most tasks state temperature 0.
      max_new_tokens: maximum number of tokens of an answer; overrides the number of a task.
      max_length: maximum number of tokens of prompt and answer together; longer prompts lose their beginning. The
        default is 2048, the length of Dream's training, or the maximum of the model if that is less.
      samples: number of Monte Carlo samples for each log-likelihood; even, at least 10.
      greedy: whether to compute `is_greedy`, that is, whether greedy decoding gives the continuation; some metrics need
        it. Without it `is_greedy` is always False.
      batch_size, seed, mesh, dtype, layers, attention, tokenizer: as in `evaluate.py`.
      max_batch_size: not supported; must be None.
      device: ignored. The harness always passes it, but `mesh` sets how many of jax's devices are used.

    Raises: ValueError for an argument outside its range; the errors of `dream_jax.load`.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        preset: Published | None = None,
        sampler: Preset = "exact",
        adapter: str | None = None,
        any_base: bool = False,
        base: BaseFlag = "auto",
        mask: str | None = None,
        instruction: str | None = None,
        alg: Alg | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        alg_temp: float | None = None,
        steps: int | None = None,
        first_token_first: bool | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        samples: int = 128,
        greedy: bool = False,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 0,
        mesh: str = "1x1",
        dtype: DtypeFlag = "auto",
        layers: LayersChoice = "auto",
        attention: Backend = "auto",
        tokenizer: str | None = None,
    ):
        super().__init__()
        if preset is not None and preset not in get_args(Published):
            raise ValueError(f"{preset=} is not one of {get_args(Published)}")
        if isinstance(batch_size, str):
            if not re.fullmatch("[0-9]{1,10}", batch_size):
                raise ValueError(f"{batch_size=} must be a positive integer; batch_size=auto is not supported")
            batch_size = int(batch_size)
        check("batch_size", batch_size, IntegerRange(1, MOST_ROWS))
        check("seed", seed, SEED)
        for name, value in (("max_new_tokens", max_new_tokens), ("max_length", max_length)):
            if value is not None:
                check(name, value, IntegerRange(1, MOST_TOKENS))
        if max_batch_size is not None:
            raise ValueError(f"{max_batch_size=} belongs to batch_size=auto, which is not supported: leave it out")
        likelihood.check_samples(samples)
        device_memory.take_memory()
        prepared = prepare(
            ModelSettings(
                model=pretrained,
                adapter=adapter,
                any_base=any_base,
                base=base,
                mask=mask,
                mesh=mesh,
                dtype=dtype,
                layers=layers,
                attention=attention,
                tokenizer=tokenizer,
            )
        )
        if prepared.note is not None:
            _log.warning(prepared.note)
        self._tokenizer = prepared.tokenizer
        self._instruction = prepared.instruction if instruction is None else instruction
        self.batch_size, self._samples, self._seed = batch_size, samples, seed
        self._max_new_tokens, self._greedy = max_new_tokens, greedy
        sampler_options = {
            "steps": steps,
            "alg": alg,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "alg_temp": alg_temp,
            "first_token_first": first_token_first,
        }
        self._given = {name: value for name, value in sampler_options.items() if value is not None}
        self._preset, self._published = sampler, preset
        self._trained_mask = prepared.model.trained_mask
        self._config({}, 1)  # raises for invalid settings before the weights are read, which takes long
        self._model = prepared.load()
        longest = self._model.config.max_position_embeddings
        self._max_length = min(2048, longest) if max_length is None else max_length
        if not 1 < self._max_length <= longest:
            raise ValueError(f"{max_length=} is outside 2..{longest}, the range of the model")
        self._name = pretrained
        self._bounds = likelihood.model_bounds(self._model, self._tokenizer, self.batch_size)
        self._chats: dict[str, list[int]] = {}
        self._warned: set[str] = set()

    # Tokens and text.

    @property
    def eot_token_id(self) -> int:
        """The id of the end-of-text token, as the harness asks for it."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id of the beginning-of-text token, which is the context of a text that has no other."""
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests that have this tokenizer's chat template."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the text that the harness records about the chat template, or None if no template is used.

        `chat_template` only switches the template on: the template is always that of the tokenizer.
        """
        return f"the chat template of {self._name}" if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Returns a chat as text and stores its token ids for `tok_encode`, so no message can forge control tokens.

        The ids are those that training makes of these messages, with the instruction of the training, if it had one.
        Without `add_generation_prompt` the model continues the last message, which must be the assistant's.

        Raises: ValueError if the messages are not a chat, or if it is not the model's turn; or if another chat has the same
          text, which a message with names of special tokens can imitate.
        """
        where = "chat_history"
        turns = parse_messages(chat_history, where)
        started: list[int] = []
        if add_generation_prompt == (turns[-1]["role"] == "assistant"):
            wanted = "must not be the assistant's: a new turn begins after it"
            if not add_generation_prompt:
                wanted = "must be the assistant's: the model continues it"
            raise ValueError(f"{where}: the last message is the {turns[-1]['role']}'s, but it {wanted}")
        if not add_generation_prompt:
            # Training encodes the text of a turn apart from what stands before it.
            started = self._tokenizer.encode(turn_text(turns.pop()))
        if not turns:
            raise ValueError(f"{where}: the assistant's message is the only one; put at least one message before it")
        ids = [*self._tokenizer.chat(with_instruction(turns, self._instruction)), *started]
        text = self._tokenizer.decode(ids)
        if self._chats.setdefault(text, ids) != ids:
            raise ValueError(
                f"{where}: another chat has the same text, {text!r:.200}, but other tokens, because a message contains "
                "names of special tokens; the harness knows chats by their texts only: remove one of the two"
            )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the token ids of a text or of a chat that `apply_chat_template` has made; ignores other arguments."""
        if string in self._chats:
            return self._chats[string]
        return self._tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # A chat ends in control tokens, so its tokens and those of the continuation can be encoded separately.
        if context in self._chats:
            return self._chats[context], self._tokenizer.encode(continuation)
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return pair

    # Requests.

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the answer to each request, up to its end or to the first of the stop texts (`until`) of the request.

        A stop may be the name of a special token, such as "<|im_start|>".
        """
        groups: dict[SamplerConfig, list[int]] = collections.defaultdict(list)
        for index, request in enumerate(requests):
            groups[self._request_config(request.args[1])].append(index)
        names = self._names(request.args[0] for request in requests)
        found = [""] * len(requests)
        for config, group in groups.items():
            prompts = [self._fit(self.tok_encode(requests[index].args[0]), config.max_new_tokens) for index in group]
            for batch in batches([len(ids) for ids in prompts], self.batch_size):
                asked, named = [prompts[number] for number in batch], [names[group[number]] for number in batch]
                answered = answer(self._model, self._tokenizer, asked, named, config, self.batch_size)
                for number, one in zip(batch, answered, strict=True):
                    request = requests[group[number]]
                    found[group[number]] = one.until(_stops(request.args[1]))
                    self.cache_hook.add_partial("generate_until", request.args, found[group[number]])
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        if not self._greedy:
            self._warn(
                "is_greedy is not computed and is always False; metrics that use it need greedy=True in --model_args"
            )
        names = self._names(repr((context, continuation)) for _, context, continuation in requests)
        found: list[tuple[float, bool]] = []
        for start in range(0, len(requests), _GROUP):
            group = requests[start : start + _GROUP]
            fitted = [(self._fit(context, len(continuation)), continuation) for _, context, continuation in group]
            passages = [passage(context, continuation, []) for context, continuation in fitted]
            bounds = self._bounds(passages, self._samples, names[start : start + _GROUP])
            for (texts, _, _), bound, pair in zip(group, bounds, fitted, strict=True):
                found.append((-bound.nats, self._greedy and self._is_greedy(*pair)))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text, in nats.

        A text is scored in windows. Each window has the tokens before it as context, as many as fit into `max_length`.
        """
        found = []
        for request in requests:
            (text,) = request.args
            windows = lm_eval.utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length - 1,
                context_len=1,
            )
            pairs = [lm_eval.utils.make_disjoint_window(window) for window in windows]
            scored = self._loglikelihood_tokens([(None, context, continuation) for context, continuation in pairs])
            found.append(sum(value for value, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def _is_greedy(self, context: list[int], continuation: list[int]) -> bool:
        config = make_sampler(self._tokenizer, len(continuation), trained_mask=self._trained_mask)
        (one,) = answer(self._model, self._tokenizer, [context], [(0, 0)], config, 1)
        return one.tokens == tuple(continuation)

    def _request_config(self, options: dict[str, Any]) -> SamplerConfig:
        """Returns the sampler of a request with these generation options; warns once about options that it ignores."""
        unknown = sorted(set(options) - _IGNORED - set(_SAMPLER_OPTIONS))
        if unknown:
            self._warn(f"generation options {unknown} are not supported and are ignored")
        asked = {name: options[name] for name in _SAMPLER_OPTIONS if options.get(name) is not None}
        if options.get("do_sample") is False:
            asked["temperature"] = 0.0
        lengths = [
            (name, options[name]) for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in options
        ]
        name, length = (lengths or [("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)])[0]
        if isinstance(length, str) and re.fullmatch("[0-9]{1,10}", length):
            length = int(length)
        if isinstance(length, float) and length.is_integer():  # tasks are YAML, where 1e3 is a float
            length = int(length)
        check(name, length, IntegerRange(0, MOST_TOKENS))
        return self._config(asked, self._max_new_tokens or length)

    def _config(self, asked: dict[str, Any], max_new_tokens: int) -> SamplerConfig:
        return published_sampler(
            self._preset,
            self._published,
            self._given,
            self._tokenizer,
            max_new_tokens,
            asked,
            trained_mask=self._trained_mask,
        )

    def _fit(self, ids: list[int], new_tokens: int) -> list[int]:
        """Returns the end of a prompt, as many tokens as fit before `new_tokens` further ones, and at least one."""
        if new_tokens >= self._max_length:
            raise ValueError(f"{new_tokens} tokens after a prompt do not fit max_length={self._max_length}; raise it")
        if len(ids) + new_tokens > self._max_length:
            self._warn(f"prompts longer than max_length={self._max_length} lose their beginning")
            ids = ids[len(ids) + new_tokens - self._max_length :]
        return ids or [self.prefix_token_id]

    def _names(self, texts: Iterable[str]) -> list[RowName]:
        """Returns the (seed, number) that name each request; the random draws of the request depend on them.

        The number depends only on the text and on how often it occurred before, so that other requests do not
        change it.
        """
        counted: collections.Counter[str] = collections.Counter()
        names: list[RowName] = []
        for text in texts:
            digest = hashlib.blake2b(f"{counted[text]}/{text}".encode(), digest_size=4).digest()
            names.append((self._seed, int.from_bytes(digest, "big") >> 1))
            counted[text] += 1
        return names

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _log.warning(message)


def _stops(options: dict[str, Any]) -> list[str]:
    """Returns the stop texts of a request. Raises ValueError if they are neither a text nor a list of texts."""
    stops = options.get("until")
    found = [stops] if isinstance(stops, str) else stops or []
    if not isinstance(found, list | tuple) or not all(isinstance(stop, str) for stop in found):
        raise ValueError(f"until={stops!r:.80} must be a text or a list of texts")
    return list(found)


def main() -> None:
    """Runs the command line of lm_eval; importing this module has registered the model `dream_jax`."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        hint = "; an option --name of evaluate.py is name=VALUE in --model_args" if " --" in str(error) else ""
        sys.exit(f"error: {error}{hint}")


if __name__ == "__main__":
    main()
