"""The architecture of a Dream model: its sizes, the reader of the published `config.json`, and presets."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from dream_jax.bounds import POSITIVE, FloatRange, IntegerRange, check_numbers
from dream_jax.side_files import read_json

# Limits of sizes, far above those of any known model, so that a wrong number is refused before it takes memory.
_MOST_SIZE, _MOST_LAYERS = 2**24, 2**12

# Keys that config.json must have. They have no defaults here, because libraries change their defaults between releases.
_REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rope_theta",
    "rms_norm_eps",
    "tie_word_embeddings",
    "mask_token_id",
    "pad_token_id",
)

# Keys of config.json that change the architecture of the Qwen2 family, with the values that are implemented here.
_SWITCHES: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("Dream",),
    "architectures": (["DreamModel"], None),
    "hidden_act": ("silu",),
    "attention_dropout": (0.0, 0),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
}

# Keys of config.json that do not change what the model computes from its weights. sliding_window and max_window_layers
# have an effect only if use_sliding_window is true, which _SWITCHES refuses.
_IGNORED_KEYS = frozenset(
    {
        "_name_or_path",
        "_attn_implementation_autoset",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "max_window_layers",
        "sliding_window",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DreamConfig:
    """The architecture of a Dream checkpoint. The fields have the names and meanings of the published `config.json`.

    `initializer_range` is the standard deviation of random initial weights.

    Raises:
      ValueError: a field has a wrong type or range, or sizes contradict each other; the message has the values.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    mask_token_id: int
    pad_token_id: int
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        size = IntegerRange(1, _MOST_SIZE)
        check_numbers(
            self,
            vocab_size=size,
            hidden_size=size,
            intermediate_size=size,
            num_hidden_layers=IntegerRange(1, _MOST_LAYERS),
            num_attention_heads=size,
            num_key_value_heads=size,
            # float32 represents all integers up to 2**24, so up to there each position has other rotary angles.
            max_position_embeddings=IntegerRange(1, 2**24),
            rope_theta=POSITIVE,
            rms_norm_eps=POSITIVE,
            initializer_range=FloatRange(0.0, 1e3, open_low=True),
            mask_token_id=IntegerRange(0),
            pad_token_id=IntegerRange(0),
        )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.hidden_size=} must be a multiple of {self.num_attention_heads=}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads=} must be a multiple of {self.num_key_value_heads=}")
        if self.head_dim % 2:
            raise ValueError(f"{self.head_dim=} must be even: rotary embedding rotates pairs of channels")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"{self.tie_word_embeddings=} must be true or false")
        for name in ("mask_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value >= self.vocab_size:
                raise ValueError(f"{name}={value} is outside the vocabulary, 0..{self.vocab_size - 1}")
        if self.mask_token_id == self.pad_token_id:
            raise ValueError(
                f"{self.mask_token_id=} is also the padding token, so the sampler would replace padding; use two ids"
            )

    @property
    def head_dim(self) -> int:
        """The width of one attention head, H."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        """The number of weights, computed from the sizes (7,615,616,512 for Dream-7B)."""
        width, head = self.hidden_size, self.head_dim
        query, key_value = self.num_attention_heads * head, self.num_key_value_heads * head
        attention = width * query + query + 2 * (width * key_value + key_value) + query * width
        layer = attention + 3 * width * self.intermediate_size + 2 * width
        embeddings = self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + width

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, ignore: Iterable[str] = ()) -> DreamConfig:
        """Reads the dictionary of a published `config.json`, key by key.

        Args:
          fields: the dictionary. Architectural keys have no defaults: all must be there. `rope_parameters` of
            transformers 5 may stand for `rope_theta` (see `with_rope_theta`).
          ignore: further keys that are known not to change what the model computes; they are not checked.

        Raises:
          ValueError: a key is missing or unknown, or has a value that this implementation does not support.
        """
        if fields.get("model_type") == "qwen2":
            raise ValueError(
                "config.json has model_type='qwen2', an autoregressive Qwen2 model and not a Dream model; convert it "
                "with convert/qwen2_to_dream.py SRC DST"
            )
        if fields.get("model_type") == "llama":
            raise ValueError(
                "config.json has model_type='llama', an autoregressive Llama model and not a Dream model; convert it "
                "with convert/ar_to_dream.py --from SRC DST"
            )
        ignore = frozenset(ignore)
        if "rope_parameters" not in ignore:
            fields = with_rope_theta(fields)
        missing = [key for key in _REQUIRED_KEYS if key not in fields]
        if missing:
            raise ValueError(
                f"config.json lacks {missing}, which have no defaults; add them from the source of the checkpoint"
            )
        ignored = _IGNORED_KEYS | ignore
        for key, value in fields.items():
            if key in _SWITCHES:
                if value not in _SWITCHES[key] and key not in ignore:
                    wanted = " or ".join(repr(known) for known in _SWITCHES[key])
                    raise ValueError(f"config.json has {key}={value!r}, but only {wanted} is implemented")
            elif key not in _REQUIRED_KEYS and key not in ignored and key != "head_dim":
                raise ValueError(
                    f"config.json has the unknown key {key}={value!r}, which may change what the model computes; "
                    "if it does not, convert the checkpoint with convert/hf_to_flax.py --ignore-config-key "
                    f"{key} (for a Qwen2 checkpoint convert/qwen2_to_dream.py --ignore-config-key {key}), or in Python "
                    f'pass ignore_config_keys=("{key}",) to dream_jax.load'
                )
        if not isinstance(fields.get("auto_map") or {}, Mapping):
            raise ValueError(
                f"config.json has auto_map={fields['auto_map']!r:.80}, which must be an object: correct it or remove it"
            )
        if "model_type" not in fields:
            raise ValueError("config.json lacks 'model_type'; expected 'Dream'")
        for name in ("rope_theta", "rms_norm_eps"):
            if isinstance(fields[name], str):
                raise ValueError(f"config.json has {name}={fields[name]!r}, a string; it must be a number")
        config = cls(
            **{key: fields[key] for key in _REQUIRED_KEYS},
            initializer_range=fields.get("initializer_range", 0.02),
        )
        if fields.get("head_dim") not in (None, config.head_dim):
            raise ValueError(
                f"config.json has head_dim={fields['head_dim']!r}, but only hidden_size / num_attention_heads = "
                f"{config.head_dim} is implemented"
            )
        return config

    @classmethod
    def from_file(cls, path: str | pathlib.Path, *, ignore: Iterable[str] = ()) -> DreamConfig:
        """Reads the file `path`, or `config.json` in the directory `path`.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is not valid JSON, or `from_dict` does not accept its content.
        """
        path = pathlib.Path(path)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; a checkpoint directory must hold a config.json")
        fields = read_json(path, "restore it from the source of the checkpoint")
        try:
            return cls.from_dict(fields, ignore=ignore)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Returns the dictionary of a published `config.json`, for which `from_dict(config.to_dict()) == config`."""
        return {
            "architectures": ["DreamModel"],
            "attention_dropout": 0.0,
            # In the published model, the padding token is also the end-of-text token (`<|endoftext|>`), and the
            # published config.json has it as "bos" and "eos" too.
            "bos_token_id": self.pad_token_id,
            "eos_token_id": self.pad_token_id,
            "hidden_act": "silu",
            "max_window_layers": self.num_hidden_layers,
            "model_type": "Dream",
            "rope_scaling": None,
            "sliding_window": None,
            "use_cache": False,
            "use_mrope": False,
            "use_sliding_window": False,
            **dataclasses.asdict(self),
        }


def with_rope_theta(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the dictionary of a `config.json` with `rope_theta` at its top level, and without `rope_parameters`.

    transformers 4 writes the base of the rotary embedding as `rope_theta`, and transformers 5 as
    `{"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}`. If `fields` has neither, the result has no
    `rope_theta`.

    Raises:
      ValueError: `rope_parameters` is not an object, has another type than "default" or an unknown key, or gives another
        `rope_theta` than the top level.
    """
    plain = {key: value for key, value in fields.items() if key != "rope_parameters"}
    found = fields.get("rope_parameters")
    if found is None:
        return plain
    if not isinstance(found, Mapping):
        raise ValueError(f"config.json has rope_parameters={found!r:.80}, which must be an object")
    for key in ("rope_type", "type"):
        if found.get(key, "default") != "default":
            raise ValueError(
                f"config.json has rope_parameters with {key}={found[key]!r:.80}, but only 'default' is implemented: a "
                "rotary embedding without scaling"
            )
    unknown = sorted(found.keys() - {"rope_type", "type", "rope_theta"})
    if unknown:
        raise ValueError(
            f"config.json has rope_parameters with {unknown[0]}={found[unknown[0]]!r:.80}, but only rope_theta and "
            "rope_type 'default' are implemented"
        )
    theta = found.get("rope_theta")
    if theta is None:
        return plain
    if plain.get("rope_theta") not in (None, theta):
        raise ValueError(
            f"config.json has rope_theta={plain['rope_theta']!r:.80} and rope_parameters with rope_theta={theta!r:.80}; "
            "keep the one that the model was trained with"
        )
    return plain | {"rope_theta": theta}


# Ids of the special tokens in the vocabulary of Qwen2.5, with the mask token that Dream added.
_QWEN_SPECIAL = {"mask_token_id": 151666, "pad_token_id": 151643}

PRESETS: Mapping[str, DreamConfig] = {
    # For a laptop. Its tokens are bytes (ids of tokenizer.ByteTokenizer), and it learns 4x4 sudoku in minutes on two CPU
    # cores. It has 8 heads and a vocabulary size divisible by 8, so that every mesh of 8 devices can shard it.
    "nano": DreamConfig(
        vocab_size=264,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        mask_token_id=260,
        pad_token_id=256,
        initializer_range=0.05,  # chosen for the width 128; the published 0.02 is for the width 3584
    ),
    # For benchmarks: the vocabulary of Dream-7B, with layers so small that a CPU can run them.
    "small": DreamConfig(
        vocab_size=152_064,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=131_072,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        **_QWEN_SPECIAL,
    ),
    # The sizes of Qwen2.5-0.5B.
    "dream-0.5b": DreamConfig(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=131_072,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        **_QWEN_SPECIAL,
    ),
    # The sizes of SmolLM2-135M, with the rows that convert/ar_to_dream.py adds for the mask token.
    "smollm2-135m": DreamConfig(
        vocab_size=49_216,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=1e5,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        mask_token_id=49_152,
        pad_token_id=0,
    ),
    # The sizes of Dream-v0-{Base,Instruct}-7B, which are those of Qwen2.5-7B.
    "dream-7b": DreamConfig(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=131_072,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        **_QWEN_SPECIAL,
    ),
}
