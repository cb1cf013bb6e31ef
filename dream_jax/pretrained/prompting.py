"""What belongs to a model beside its weights: its tokenizer, and how its prompts are written.

Knows tokenizers and what directories note of prompts. Reads no weights.
"""

from __future__ import annotations

from dream_jax.model import Dream
from dream_jax.tokenizer import ByteTokenizer, Template, Tokenizer, load_tokenizer, read_template


def find_tokenizer(named: str | None, name: str, model: Dream) -> Tokenizer:
    """The tokenizer that is named, or the model's own.

    Args:
      named: directory with tokenizer files, or "bytes"; None for the model's own.
      name: of the model, as it was asked for.
      model: may be abstract.

    Raises:
      ValueError: there is none, or it is another model's.
      OSError: its files cannot be read.
    """
    directory = named or model.tokenizer_dir or ("bytes" if name == "nano" else None)
    if directory is None:
        raise ValueError(f"{name} has no tokenizer files; pass --tokenizer with a directory of some")
    tokenizer = load_tokenizer(directory)
    if tokenizer.mask_id != model.config.mask_token_id:
        raise ValueError(
            f"the tokenizer's mask token is {tokenizer.mask_id}, the model's {model.config.mask_token_id}: "
            "they do not belong together"
        )
    return tokenizer


def find_template(adapter: str | None, model: Dream, tokenizer: Tokenizer) -> Template:
    """How prompts are written: as the adapter notes, else as the model does, else by the kind of tokenizer.

    Raises:
      ValueError: a note that cannot be read.
    """
    return noted_template(adapter, model) or default_template(tokenizer)


def noted_template(adapter: str | None, model: Dream) -> Template | None:
    """What was trained here says how its prompts were written; None where nothing does. Raises as `find_template`."""
    for directory in (adapter, model.tokenizer_dir):
        noted = None if directory is None else read_template(directory)
        if noted is not None:
            return noted
    return None


def default_template(tokenizer: Tokenizer) -> Template:
    """Byte-level models are trained on bare text, others on chats."""
    return "raw" if isinstance(tokenizer, ByteTokenizer) else "chat"
