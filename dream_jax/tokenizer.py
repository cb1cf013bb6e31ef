"""Converts text and chats to token ids and back: a byte tokenizer that needs no files, and the tokenizer of Dream.

`transformers` is imported only when the files of a Dream checkpoint are loaded. This module executes no remote code and
downloads nothing.
"""

import datetime
import hashlib
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

from dream_jax.chat_template import ChatTemplate
from dream_jax.paths import copy_companion, local_path
from dream_jax.side_files import DEEPEST, LARGEST, read_json, read_json_value

BYTE_TOKENIZER_FILE = "byte_tokenizer.json"
PROMPT_FORMAT_FILE = "prompt_format.json"

_GUARD = "\ue000"  # a private-use character; its runs mark texts of messages that look like special tokens
_ESCAPED_GUARD = r"\ue000"  # how a template that writes JSON in ASCII writes it

_LONG_TEXT = 2**16
"""Characters from which on a text is encoded in parts, which takes less memory."""
_ENCODED_TOGETHER = 2**20  # characters of parts whose ids are computed by one call
_LINE_BREAK = re.compile(r"(?<=\S)\n(?=[A-Za-z0-9])")
_CONTEXT = 64  # characters on each side of a line break with which it is checked
_CHECKED = 8  # line breaks that are checked before a text is taken as one part

Template = Literal["chat", "raw"]
"""How a prompt is turned into tokens: with the chat template, or as raw text."""

TOKENIZER_FILES = (
    BYTE_TOKENIZER_FILE,
    PROMPT_FORMAT_FILE,
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    # This file is copied but never executed. The tokenizer_config.json of published checkpoints names it, so the
    # published code cannot load an exported model without it.
    "tokenization_dream.py",
)
"""Names of the files that belong to a tokenizer. A directory has some of them. `save` copies them unchanged."""

_REMEDY = "copy the tokenizer files of the checkpoint again"
ROLES = ("system", "user", "assistant", "tool")
"""The roles of a chat message. Other roles raise ValueError, because the published template silently drops them."""

Message = Mapping[str, Any]
"""One message (turn) of a chat: {"role": one of ROLES, "content": str}.

An assistant message may also have "tool_calls": [{"name": str, "arguments": dict}, ...]; its content may then be empty.
Messages with the role "tool" contain the results of the tools.
"""

Tools = Sequence[Mapping[str, Any]]
"""The functions the assistant may call, as JSON schemas: [{"type": "function", "function": {"name", ...}}, ...]."""


class ChatToEncode(NamedTuple):
    """A chat to encode; the fields are the arguments of `Tokenizer.chat`."""

    messages: Sequence[Message]
    add_generation_prompt: bool = True
    tools: Tools = ()


class TextToEncode(NamedTuple):
    """A text to encode; the fields are the arguments of `Tokenizer.encode`."""

    text: str
    allow_special: bool = False


class Tokenizer(Protocol):
    """The interface of a tokenizer. `ByteTokenizer` and `DreamTokenizer` implement it."""

    vocab_limit: int
    """The number of defined ids. Logits may have more columns; an id >= vocab_limit must never be generated."""

    mask_id: int
    """The id of `<|mask|>`, the token of a position that is not yet written."""

    eos_id: int
    """The id of the end-of-text token, which ends a response."""

    pad_id: int
    """The id of the padding after the end of a response; in Dream it is the eos id."""

    bos_id: int
    """The id of `<|beginoftext|>`."""

    im_start_id: int
    """The id of `<|im_start|>`, which begins a message."""

    im_end_id: int
    """The id of `<|im_end|>`, which ends a message."""

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Returns the ids of `text`; no other token is added.

        By default the name of a special token in the text, such as "<|mask|>", is encoded as plain text, so data cannot
        produce special tokens. With allow_special=True each such name becomes the id of its token.
        Raises: ValueError if the text has half of a surrogate pair, or a byte that is not UTF-8 (see `check_text`).
        """
        ...

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Returns the text of `ids`. Special tokens appear by name, or not at all with skip_special=True.

        Invalid UTF-8 becomes U+FFFD.
        Raises: ValueError for an id outside [0, vocab_limit); the message has the id.
        """
        ...

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, tools: Tools = ()) -> list[int]:
        """Returns the ids of `messages` in the chat template.

        With add_generation_prompt they end with the beginning of an assistant turn, for the model to continue. `tools`
        are listed in the system turn. Names of special tokens in contents, calls and tools are encoded as plain text.
        Raises: ValueError if there is no message, a role is unknown, a content is not a string, a text has half of a
        surrogate pair, or the chat template raises an error or takes too long.
        """
        ...

    def encode_all(self, requests: Sequence[ChatToEncode | TextToEncode]) -> list[list[int]]:
        """Returns the ids of several chats and texts, the same as `chat` and `encode` return, in less time.

        Raises: ValueError as these two, for one of the requests.
        """
        ...

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the files that `load_tokenizer` reads into `directory`, which is created if missing."""
        ...

    def fingerprint(self) -> str:
        """Returns a text that is another one if any text or chat may have other ids."""
        ...


class ByteTokenizer:
    """A tokenizer with 261 ids that needs no files: the bytes 0..255 of UTF-8, and five special tokens of Dream.

    The chat template is that of Dream (`<|im_start|>role\\ncontent<|im_end|>\\n`) without its default system turn,
    which would take 50 tokens, because every byte is a token.
    """

    vocab_limit = 261
    eos_id = 256
    pad_id = 256
    im_start_id = 257
    im_end_id = 258
    bos_id = 259
    mask_id = 260

    _specials: ClassVar = {
        "<|endoftext|>": 256,
        "<|im_start|>": 257,
        "<|im_end|>": 258,
        "<|beginoftext|>": 259,
        "<|mask|>": 260,
    }
    _special_text: ClassVar = {token_id: text for text, token_id in _specials.items()}
    _special_pattern = re.compile("(" + "|".join(map(re.escape, _specials)) + ")")

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Returns the ids of `text`, one per byte; see `Tokenizer.encode`."""
        check_text(text)
        if not allow_special:
            return list(text.encode("utf-8"))
        ids: list[int] = []
        for piece in self._special_pattern.split(text):
            special = self._specials.get(piece)
            ids.extend(piece.encode("utf-8") if special is None else [special])
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Returns the text of `ids`; see `Tokenizer.decode`."""
        text: list[str] = []
        run = bytearray()
        for token_id in map(int, ids):
            _check_id(token_id, self.vocab_limit)
            if token_id < 256:
                run.append(token_id)
                continue
            text.append(run.decode("utf-8", errors="replace"))
            run.clear()
            if not skip_special:
                text.append(self._special_text[token_id])
        text.append(run.decode("utf-8", errors="replace"))
        return "".join(text)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, tools: Tools = ()) -> list[int]:
        """Returns the ids of `messages`; see `Tokenizer.chat`. Tools raise ValueError: they need Dream's template."""
        _check_messages(messages)
        if tools or any(message["role"] == "tool" for message in messages):
            raise ValueError("the byte tokenizer does not support tools; use the tokenizer of a Dream checkpoint")
        ids: list[int] = []
        for message in messages:
            turn = self.encode(f"{message['role']}\n{turn_text(message)}")
            ids += [self.im_start_id, *turn, self.im_end_id, *b"\n"]
        if add_generation_prompt:
            ids += [self.im_start_id, *b"assistant\n"]
        return ids

    def encode_all(self, requests: Sequence[ChatToEncode | TextToEncode]) -> list[list[int]]:
        """Returns the ids of several chats and texts; see `Tokenizer.encode_all`."""
        return [self.chat(*one) if isinstance(one, ChatToEncode) else self.encode(*one) for one in requests]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `byte_tokenizer.json`; see `Tokenizer.save`."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._description(), indent=2) + "\n"
        (Path(directory) / BYTE_TOKENIZER_FILE).write_text(text, encoding="utf-8")

    def fingerprint(self) -> str:
        """Returns a text that is another one if any text or chat may have other ids."""
        return json.dumps(self._description())

    @classmethod
    def _description(cls) -> dict[str, object]:
        return {"kind": "bytes", "version": 1, "special_tokens": cls._specials}

    @classmethod
    def _from_file(cls, path: Path) -> "ByteTokenizer":
        found = read_json_value(path, "save the tokenizer again")
        if found != cls._description():
            raise ValueError(
                f"{path} contains {found!r:.200}, but this version reads only {cls._description()}; save the tokenizer "
                "again"
            )
        return cls()


class DreamTokenizer:
    """The tokenizer of a Dream checkpoint, read with the Qwen2 tokenizer of transformers.

    If tokenizer_config.json names the class PreTrainedTokenizerFast, tokenizer.json is used as it is: this is the tokenizer
    of a Llama-type checkpoint that has become a Dream one.

    `directory` contains the published files: vocab.json and merges.txt (or tokenizer.json), tokenizer_config.json and
    others. The chat template is read from them; it adds "You are a helpful assistant." if there is no system message.
    Tokens that the files list as added but not as special (`<tool_call>`, `<|fim_prefix|>`, ...) are ordinary text.
    Raises: FileNotFoundError for missing files; ValueError if the files cannot be read, their ids have a gap, or a
    token that this project needs is not defined.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self._directory = Path(directory)
        names = {name for name in TOKENIZER_FILES if (self._directory / name).is_file()}
        if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
            raise FileNotFoundError(
                f"{self._directory} has neither tokenizer.json nor vocab.json with merges.txt; copy the "
                "tokenizer files of the checkpoint there"
            )
        self._check_files(names)
        # Without torch, transformers warns at import that "models won't be available"; only its tokenizer is used.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

        # There are only these two classes, so that "auto_map" (remote code) in the files is never used. The class of Qwen2
        # cuts every text as Qwen2 does; the other one cuts it as tokenizer.json says.
        kind: Any = PreTrainedTokenizerFast if self._reads_whole_file(names) else Qwen2Tokenizer
        try:
            self._stock = kind.from_pretrained(self._directory, local_files_only=True)
        except Exception as error:  # The Rust library raises plain Exception for a damaged file.
            for name in ("tokenizer.json", "vocab.json"):  # not checked before, because reading them takes long
                if name in names:
                    read_json(self._directory / name, _REMEDY)
            raise ValueError(
                f"the tokenizer files in {self._directory} ({', '.join(sorted(names))}) cannot be read: {error!r:.500}; "
                f"{_REMEDY}"
            ) from error
        # The Rust tokenizer gives the same ids as its Python wrapper. The wrapper sets options on it at every call,
        # which is not safe in the threads of the data pipeline, so it is called directly and not modified after the
        # next line.
        self._backend = self._stock.backend_tokenizer
        self._templates: dict[bool, ChatTemplate] = {}
        self._backend.encode_special_tokens = True  # Despite its name, this encodes special tokens as plain text.

        added = self._stock.added_tokens_decoder
        self._specials = {token.content: token_id for token_id, token in added.items() if token.special}
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.vocab_limit: int = self._backend.get_vocab_size(with_added_tokens=True)
        largest = max(self._backend.get_vocab(with_added_tokens=True).values())
        if largest != self.vocab_limit - 1:
            raise ValueError(
                f"{self._directory} defines {self.vocab_limit} ids, the largest {largest}, so ids are missing; "
                "copy the tokenizer files of the checkpoint again"
            )
        self.mask_id = self._named("mask_token")
        self.eos_id = self._named("eos_token")
        self.pad_id = self._named("pad_token")
        self.bos_id = self._named("bos_token")
        self.im_start_id = self._special("<|im_start|>")
        self.im_end_id = self._special("<|im_end|>")

    def _check_files(self, names: Iterable[str]) -> None:
        """Raises ValueError, which names the file, for a file that is too large, and for a small one that is damaged."""
        for name in names:
            path = self._directory / name
            if path.stat().st_size > LARGEST:
                raise ValueError(f"{path} has more than {LARGEST:,} bytes, the most that it may have; {_REMEDY}")
        for name in ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
            if name in names:
                read_json(self._directory / name, _REMEDY)

    def _reads_whole_file(self, names: Iterable[str]) -> bool:
        """Returns whether tokenizer.json is that of another family, as convert/ar_to_dream.py writes it for Llama."""
        if "tokenizer.json" not in names or "tokenizer_config.json" not in names:
            return False
        settings = read_json(self._directory / "tokenizer_config.json", _REMEDY)
        return settings.get("tokenizer_class") == "PreTrainedTokenizerFast"

    def _template(self, tools: bool) -> ChatTemplate:
        """Returns the chat template, of which the files may have another one for chats with tools."""
        found = self._templates.get(tools)
        if found is None:
            own = self._directory / "chat_template.jinja"
            file = own if own.is_file() else self._directory / "tokenizer_config.json"
            if self._stock.chat_template is None:
                raise ValueError(
                    f"{self._directory} has no chat template; add the checkpoint's tokenizer_config.json or "
                    "chat_template.jinja"
                )
            try:
                text = self._stock.get_chat_template(tools=[{}] if tools else None)
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
            if not isinstance(text, str):
                raise ValueError(f"{file}: the chat template is {text!r:.80}, not a text; {_REMEDY}")
            found = self._templates[tools] = ChatTemplate(file, text, self._stock.special_tokens_map)
        return found

    def _named(self, role: str) -> int:
        """Returns the id of the special token with a role in the files, such as "mask_token"."""
        text = self._stock.special_tokens_map.get(role)
        if text is None:
            raise ValueError(
                f"{self._directory} defines no {role}; use the tokenizer_config.json of a Dream checkpoint"
            )
        return self._special(str(text))

    def _special(self, text: str) -> int:
        if text not in self._specials:
            raise ValueError(
                f"{self._directory} does not define {text} as a special token; are these the files of a "
                "Dream checkpoint?"
            )
        return self._specials[text]

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Returns the ids of `text`; see `Tokenizer.encode`."""
        check_text(text)
        if not allow_special:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        return self._encode_pieces(self._special_pattern.split(text))

    def _encode_pieces(self, pieces: Iterable[str]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            special = self._specials.get(piece)
            ids.extend(self.encode(piece) if special is None else [special])
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Returns the text of `ids`; see `Tokenizer.decode`."""
        checked = [_check_id(int(token_id), self.vocab_limit) for token_id in ids]
        return str(self._backend.decode(checked, skip_special_tokens=skip_special))

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, tools: Tools = ()) -> list[int]:
        """Returns the ids of `messages`; see `Tokenizer.chat`. Files without a chat template also raise ValueError."""
        template, guarded, guarded_tools, guard = self._guarded(messages, tools)
        text = template.render(guarded, guarded_tools, add_generation_prompt)
        return self._encode_pieces(self._without_guard(text, guard))

    def encode_all(self, requests: Sequence[ChatToEncode | TextToEncode]) -> list[list[int]]:
        """Returns the ids of several chats and texts; see `Tokenizer.encode_all`."""
        chats: dict[ChatTemplate, list[tuple[int, Any, Any, str, bool]]] = defaultdict(list)
        pieces: list[Sequence[str]] = [()] * len(requests)
        for number, one in enumerate(requests):
            if isinstance(one, ChatToEncode):
                template, messages, tools, guard = self._guarded(one.messages, one.tools)
                chats[template].append((number, messages, tools, guard, one.add_generation_prompt))
            else:
                check_text(one.text)
                pieces[number] = self._special_pattern.split(one.text) if one.allow_special else self._parts(one.text)
        for template, group in chats.items():
            texts = template.render_all([(messages, tools, adds) for _, messages, tools, _, adds in group])
            for (number, _, _, guard, _), text in zip(group, texts, strict=True):
                pieces[number] = list(self._without_guard(text, guard))
        # The name of a special token is a token in the text of a template and in a text that allows it, else plain text.
        specials = [isinstance(one, ChatToEncode) or one.allow_special for one in requests]
        plain = {
            piece
            for split, special in zip(pieces, specials, strict=True)
            for piece in split
            if piece and not (special and piece in self._specials)
        }
        for piece in plain:
            check_text(piece)
        ids: dict[str, list[int]] = {"": []}
        groups = list(_groups(plain))
        if len(groups) > 1:  # a long text, whose parts several threads encode
            with ThreadPoolExecutor(min(os.cpu_count() or 1, len(groups))) as threads:
                for some in threads.map(self._ids_of, groups):
                    ids |= some
        elif groups:
            ids |= self._ids_of(groups[0])
        found = list[list[int]]()
        for split, special in zip(pieces, specials, strict=True):
            tokens = list[int]()
            for piece in split:
                tokens += (self._specials[piece],) if special and piece in self._specials else ids[piece]
            found.append(tokens)
        return found

    def _ids_of(self, texts: list[str]) -> dict[str, list[int]]:
        """Returns text -> its ids, where no text is a special token."""
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return {text: found.ids for text, found in zip(texts, encoded, strict=True)}

    def _parts(self, text: str) -> list[str]:
        """Returns parts of a long text whose ids, one after the other, are the ids of the text; of others the text alone.

        Texts are divided after single line breaks between a character that is no space and a letter or digit, where the
        published tokenizers never have a token across. Each break is checked by its ids with and without a division.
        """
        parts, start = list[str](), 0
        while len(text) - start > _LONG_TEXT:
            breaks = (found.end() for found in _LINE_BREAK.finditer(text, start + _LONG_TEXT // 2))
            end = next((end for end in itertools.islice(breaks, _CHECKED) if self._divides(text, start, end)), None)
            if end is None:
                break
            parts.append(text[start:end])
            start = end
        return [*parts, text[start:]]

    def _divides(self, text: str, start: int, end: int) -> bool:
        """Returns whether the ids around the index `end` of a text are those of the text before it and of that after it."""
        before, after = text[max(start, end - _CONTEXT) : end], text[end : end + _CONTEXT]
        return self.encode(before + after) == self.encode(before) + self.encode(after)

    def _guarded(self, messages: Sequence[Message], tools: Tools) -> tuple[ChatTemplate, Any, Any, str]:
        """Returns the chat template, and messages and tools in which no text is the name of a special token.

        The last element is the guard, which `_without_guard` needs.
        """
        _check_messages(messages)
        template = self._template(bool(tools))
        # A text that no message contains is inserted into the name of every special token in the messages. After the
        # template is applied, only the special tokens of the template itself match; then the text is removed. The text is
        # a run of one character, with more of it than all messages have together, also as JSON writes it in ASCII.
        texts = "\n".join(_texts_of([messages, tools]))
        guard = _GUARD * (1 + sum(text.count(_GUARD) + text.count(_ESCAPED_GUARD) for text in (template.text, texts)))
        if not self._special_pattern.search(texts):  # as in nearly all chats
            return template, messages, tools, guard

        def guarded(value: Any) -> Any:
            if isinstance(value, str):
                return self._special_pattern.sub(lambda found: found[0][0] + guard + found[0][1:], value)
            if isinstance(value, Mapping):
                return {guarded(name): guarded(inside) for name, inside in value.items()}
            return [guarded(inside) for inside in value] if isinstance(value, list | tuple) else value

        return template, guarded(messages), guarded(tools), guard

    def _without_guard(self, text: str, guard: str) -> Iterator[str]:
        """Yields the names of the special tokens of a rendered chat, and the texts between them without the guard."""
        escaped = _ESCAPED_GUARD * len(guard)
        for piece in self._special_pattern.split(text):
            yield piece if piece in self._specials else piece.replace(guard, "").replace(escaped, "")

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Copies the original files unchanged; see `Tokenizer.save`.

        Raises: ValueError if one of the files is a link that leads out of its directory, so that it must not be copied.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        if target.resolve() == self._directory.resolve():
            return
        for name in TOKENIZER_FILES:
            if (self._directory / name).is_file():
                copy_companion(self._directory / name, target / name)

    def fingerprint(self) -> str:
        """Returns a text that is another one if any text or chat may have other ids; see `Tokenizer.fingerprint`.

        It is made of the content of the files, the chat templates, which may be from further files, the versions of the
        libraries, and, if a template asks for the time, the day.
        """
        import jinja2
        import tokenizers
        import transformers

        versions = [f"{library.__name__} {library.__version__}" for library in (jinja2, tokenizers, transformers)]
        found = hashlib.sha256(", ".join(versions).encode())
        for name in TOKENIZER_FILES:
            path = self._directory / name
            if name in (PROMPT_FORMAT_FILE, "tokenization_dream.py") or not path.is_file():
                continue
            content = path.read_bytes()
            found.update(f"{name} {len(content)}\n".encode() + content)
        templates = json.dumps(self._stock.chat_template, sort_keys=True)
        found.update(templates.encode())
        if "strftime_now" in templates:
            found.update(datetime.date.today().isoformat().encode())
        return found.hexdigest()


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yields consecutive texts, at most `_ENCODED_TOGETHER` characters but at least one text at a time."""
    some, size = list[str](), 0
    for text in texts:
        if some and size + len(text) > _ENCODED_TOGETHER:
            yield some
            some, size = [], 0
        some.append(text)
        size += len(text)
    if some:
        yield some


def _texts_of(value: Any) -> list[str]:
    """Returns every text in lists and mappings, names too. Raises ValueError if they lie too deep inside one another."""
    found = list[str]()
    waiting: list[tuple[int, Sequence[Any]]] = [(0, [value])]
    while waiting:
        depth, inside = waiting.pop()
        for one in inside:
            if isinstance(one, str):
                found.append(one)
            elif depth > DEEPEST:
                raise ValueError(f"a message or a tool has more than {DEEPEST} lists or objects inside one another")
            elif isinstance(one, (dict, Mapping)):  # a dict is recognised in less time
                waiting.append((depth + 1, [*one, *one.values()]))
            elif isinstance(one, (list, tuple)):
                waiting.append((depth + 1, one))
    return found


def turn_text(message: Message) -> str:
    """Returns the text of a message in the published template, between its header and its `<|im_end|>`.

    It is the content and, for the assistant, then the tool calls. Each call is three lines: `<tool_call>`,
    `{"name": ..., "arguments": ...}` and `</tool_call>`.
    """
    calls = [
        f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {json.dumps(call["arguments"], ensure_ascii=False)}}}\n'
        "</tool_call>"
        for call in message.get("tool_calls") or ()
    ]
    return "\n".join([*([message["content"]] if message["content"] else []), *calls])


def check_text(text: str) -> None:
    """Raises ValueError if a text is not valid Unicode: it cannot be written in UTF-8, so no tokenizer can encode it.

    Such texts come from JSON with half of a surrogate pair (`"\\ud83d"`), and from a command line with bytes that are not
    UTF-8, each of which Python keeps as one of the characters U+DC80 to U+DCFF.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = (
            f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8"
            if 0xDC80 <= code <= 0xDCFF
            else "half of a surrogate pair"
        )
        raise ValueError(
            f"the text {text[max(0, error.start - 20) : error.start + 20]!r} has U+{code:04X} at character {error.start}: "
            f"{what}; write the text as valid Unicode"
        ) from error


def check_texts(texts: Iterable[str]) -> None:
    """Raises ValueError for the first of several texts, such as the arguments of a command, that `check_text` refuses."""
    for text in texts:
        check_text(text)


def load_tokenizer(path_or_name: str | os.PathLike[str]) -> ByteTokenizer | DreamTokenizer:
    """Returns the byte tokenizer for the name "bytes", or the tokenizer in the directory `path_or_name`.

    Raises: FileNotFoundError if there is no such directory or no tokenizer in it; ValueError if it has two tokenizers,
    or files that cannot be used, or if the path is an address.
    """
    if path_or_name == "bytes":
        return ByteTokenizer()
    path = local_path(path_or_name, "tokenizer")
    remedy = (
        'give "bytes" or a directory with byte_tokenizer.json, tokenizer.json, or vocab.json and merges.txt; '
        "nothing is downloaded"
    )
    if not path.is_dir():
        raise FileNotFoundError(f"no directory {path}: {remedy}")
    has_bytes = (path / BYTE_TOKENIZER_FILE).is_file()
    has_dream = any((path / name).is_file() for name in ("vocab.json", "tokenizer.json"))
    if has_bytes and has_dream:
        raise ValueError(
            f"{path} holds two tokenizers, {BYTE_TOKENIZER_FILE} and vocab.json or tokenizer.json; remove one of them"
        )
    if has_bytes:
        return ByteTokenizer._from_file(path / BYTE_TOKENIZER_FILE)
    if has_dream:
        return DreamTokenizer(path)
    raise FileNotFoundError(f"no tokenizer in {path}: {remedy}")


def write_template(directory: str | os.PathLike[str], template: Template, instruction: str = "") -> None:
    """Writes to `directory` which template and which instruction the prompts of the training had.

    `read_template` and `read_instruction` read them. The instruction is the text before each question; "" for none.
    """
    text = json.dumps({"template": template} | ({"instruction": instruction} if instruction else {})) + "\n"
    (Path(directory) / PROMPT_FORMAT_FILE).write_text(text, encoding="utf-8")


def read_template(directory: str | os.PathLike[str]) -> Template | None:
    """Returns the template that `write_template` wrote, or None. Raises ValueError for other contents."""
    return _read_format(directory)[0]


def read_instruction(directory: str | os.PathLike[str]) -> str:
    """Returns the instruction that `write_template` wrote, "" for none. Raises ValueError for other contents."""
    return _read_format(directory)[1]


def _read_format(directory: str | os.PathLike[str]) -> tuple[Template | None, str]:
    path = Path(directory) / PROMPT_FORMAT_FILE
    if not path.is_file():
        return None, ""
    remedy = "correct it, or remove it and give --template"
    found = read_json_value(path, remedy)
    instruction = found.pop("instruction", "") if isinstance(found, dict) else ""
    if isinstance(instruction, str):
        for template in get_args(Template):
            if found == {"template": template}:
                return template, instruction
    raise ValueError(
        f"{path} contains {found!r:.200}; it must contain {{'template': 'chat'}} or {{'template': 'raw'}}, and may have a "
        f"text 'instruction': {remedy}"
    )


def _check_id(token_id: int, vocab_limit: int) -> int:
    if not 0 <= token_id < vocab_limit:
        raise ValueError(
            f"id {token_id} is not defined by this tokenizer, whose ids are 0..{vocab_limit - 1}; exclude such "
            "ids when sampling (vocab_limit)"
        )
    return token_id


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise ValueError('a chat needs at least one message, such as {"role": "user", "content": "..."}')
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {index} has role {role!r}; it must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {index} has content {content!r}; it must be a string")
