"""Writes the files of a tiny tokenizer of the kind that Dream has, in the layouts of transformers 4 and 5."""

import json
import pathlib
from typing import Any

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DREAMS = ("<|beginoftext|>", "<|mask|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: pathlib.Path, *, dream: bool = True, template: Any = TEMPLATE) -> pathlib.Path:
    """Writes vocab.json, merges.txt and tokenizer_config.json, and returns the folder: one token for each byte.

    With `dream` the ids 259 and 260 are the two tokens that Dream added to the tokenizer of Qwen2.5.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir(parents=True, exist_ok=True)
    vocab = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    names = SPECIALS + (DREAMS if dream else ())
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config: dict[str, Any] = {
        "added_tokens_decoder": {str(256 + number): {"content": name, **plain} for number, name in enumerate(names)},
        "additional_special_tokens": list(names),
        "chat_template": template,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    if dream:
        config |= {"bos_token": "<|beginoftext|>", "mask_token": "<|mask|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def save_again(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Writes the tokenizer as the installed transformers does, all tokens in tokenizer.json, and returns the folder."""
    from transformers import Qwen2Tokenizer

    Qwen2Tokenizer.from_pretrained(source, local_files_only=True).save_pretrained(target)
    return target
