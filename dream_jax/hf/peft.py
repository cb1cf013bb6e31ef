"""Reads and writes low-rank adapters in the layout of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

Every key of `adapter_config.json` is read, refused unless it is switched off, or known not to change what the adapter
computes; every tensor is used exactly once. PEFT multiplies B A of a projection by `lora_alpha / r`, or by `lora_alpha /
sqrt(r)` with `use_rslora`. In PEFT ranks, alphas and layers may differ between projections. An adapter of this project
has one rank and one alpha. So smaller ranks are filled up with zeros, and projections without an adapter get zeros (which
a training step does not change). If the scaling of a projection differs from that of the whole adapter, its B is
multiplied by the quotient of the two.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from dream_jax.bounds import MOST_RANK, POSITIVE, FloatRange, IntegerRange, check
from dream_jax.config import DreamConfig
from dream_jax.files import read_json, write_json
from dream_jax.hf import table
from dream_jax.hf.source import Tensor, open_file, read_metadata
from dream_jax.hf.table import ConversionRule, Shape

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"

# The key of the identity of the base weights (`lora.identity`) in the metadata of a safetensors file that we wrote.
_IDENTITY = "dream_jax.base_identity"

_REMEDY = "get the adapter again"

# Keys that do not change what a loaded adapter computes: descriptions, and settings of the initialisation, of a run or of
# a feature that another key (which is refused) switches on.
_HARMLESS = frozenset(
    {
        *("auto_mapping", "inference_mode", "peft_version", "revision", "task_type", "runtime_config"),
        *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
        *("ensure_weight_tying", "merge_weights"),
    }
)
# Keys of features that are not implemented, with the values that switch them off.
_SWITCHES: Mapping[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "enable_lora": (None,),
    "fan_in_fan_out": (False,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "lora_bias": (False,),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (None,),
}
_READ = frozenset(
    {
        *("peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"),
        *(
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "rank_pattern",
            "alpha_pattern",
        ),
    }
)
_LARGEST = 2**31 - 1  # for ranks and alphas
_SMALLEST = 1e-30  # for the scaling of an adapter, which is computed in float32

# Initialisations that leave the base weights as they are. The others subtract the first B A from the base.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")

_MODULES: Mapping[str, ConversionRule] = {
    rule.source_name(0).removeprefix("model.layers.0.").removesuffix(".weight"): rule
    for rule in table.RULES
    if rule.layered and rule.target.endswith(".kernel")
}
"""Name of a projection within its layer, such as "self_attn.q_proj" -> its row in the table of tensors."""
# Other modules for which PEFT can make an adapter.
_OTHER_MODULES = ("model.embed_tokens", "lm_head")

_TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.(0|[1-9][0-9]{0,5})\.([a-z_]+\.[a-z_]+)\.lora_(A|B)(?:\.[\w-]+)?\.weight"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The contents of `adapter_config.json` that are read.

    Attributes:
      rank, alpha, dropout: `r`, `lora_alpha` and `lora_dropout`.
      stabilised: `use_rslora`, whether the scaling is alpha / sqrt(rank) instead of alpha / rank.
      targets: `target_modules`: a tuple of names or ends of names, a regular expression that matches whole names, or
        "all-linear".
      excluded: `exclude_modules`, of the same form.
      layers: `layers_to_transform`; None for all layers.
      rank_pattern, alpha_pattern: regular expression -> rank or alpha of the modules whose names, or the ends of whose
        names after a dot, it matches.
      base_model: `base_model_name_or_path`, the model that the adapter was trained on.
    """

    rank: int
    alpha: float
    dropout: float
    stabilised: bool
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: frozenset[int] | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_model: str | None

    def targeted(self, module: str) -> bool:
        """Returns whether the adapter has weights for the module of this name ("model.layers.0.self_attn.q_proj")."""
        if _named(self.excluded, module):
            return False
        if self.targets == "all-linear":
            return module not in _OTHER_MODULES
        if self.layers is not None:
            found = re.fullmatch(r"model\.layers\.([0-9]+)\..*", module)
            if found is None or int(found[1]) not in self.layers:
                return False
        return _named(self.targets, module)

    def rank_of(self, module: str) -> int:
        """Returns the rank of the adapter of a module."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """Returns the number by which B A of a module is multiplied."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.stabilised else alpha / rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """An adapter in a PEFT directory, whose files have been checked but whose tensors have not been read.

    Attributes:
      directory: the directory.
      config: the contents of `adapter_config.json`.
      tensors: (name of the module, "A" or "B") -> location of its tensor, [rank, inputs] for A and [outputs, rank] for B.
      identity: the identity of the base weights, if the file is an export of this project; None if it is not known.
    """

    directory: pathlib.Path
    config: PeftConfig
    tensors: Mapping[tuple[str, Literal["A", "B"]], Tensor]
    identity: str | None

    @property
    def origin(self) -> str:
        """A text that says which base `adapter_config.json` names."""
        return _trained_on(self.config.base_model)

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules that have tensors, in the order of the file."""
        return tuple(dict.fromkeys(module for module, _ in self.tensors))

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(map(self.config.rank_of, self.modules))

    @property
    def scaling(self) -> float:
        """The number by which B A of the first module is multiplied."""
        return self.config.scaling_of(self.modules[0])

    @property
    def alpha(self) -> float:
        """The alpha for which `scaling` is alpha / `rank`."""
        exact = not self.config.stabilised and not self.config.rank_pattern and not self.config.alpha_pattern
        return self.config.alpha if exact else self.scaling * self.rank

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the projections that have an adapter in some layer, such as "q"."""
        rules = (_MODULES[_within_layer(module)[1]] for module in self.modules)
        return tuple(dict.fromkeys(rule.target.split(".")[-2] for rule in rules))

    def check(self, config: DreamConfig) -> None:
        """Checks that the tensors fit `adapter_config.json` and a model of this configuration.

        Raises:
          ValueError: a tensor is missing, is not used, or has another shape; or the adapter names a module for which
            there are no adapters here. The message has the names.
        """
        file, layers = self.directory / PEFT_CONFIG, config.num_hidden_layers
        every = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in _MODULES]
        for other in _OTHER_MODULES:
            if self.config.targeted(other):
                raise ValueError(
                    f"{file} has an adapter for {other}, but only the projections of the layers can have one "
                    f"({', '.join(name.split('.')[1] for name in _MODULES)}); merge the adapter with PEFT instead"
                )
        found, wanted = set(self.modules), {name for name in every if self.config.targeted(name)}
        shown = f"the model has {layers} layers of {config.hidden_size} hidden units; {self.origin}"
        if missing := wanted - found:
            raise ValueError(
                f"{self.directory / PEFT_WEIGHTS} has no tensors for {_list(missing)}, which {PEFT_CONFIG} names; {shown}"
            )
        if surplus := found - wanted:
            why = f"{PEFT_CONFIG} does not name" if surplus & set(every) else "the model does not have"
            raise ValueError(f"{self.directory / PEFT_WEIGHTS} has tensors for {_list(surplus)}, which {why}; {shown}")
        for (module, part), tensor in self.tensors.items():
            in_shape, out_shape = _shapes(_MODULES[_within_layer(module)[1]], config)
            rank = self.config.rank_of(module)
            right = (rank, math.prod(in_shape)) if part == "A" else (math.prod(out_shape), rank)
            if tensor.shape != right:
                raise ValueError(
                    f"{tensor.path}: {tensor.name} has shape {list(tensor.shape)}, but an adapter of rank {rank} for this "
                    f"model has {list(right)}; {shown}"
                )

    def read(self, config: DreamConfig) -> dict[str, np.ndarray]:
        """Reads the adapter for a model of this configuration.

        Returns:
          Dotted path, such as "layers.attn.q.lora_a" -> float32 array, [L, *in_shape, rank] for `lora_a` and
          [L, rank, *out_shape] for `lora_b`. Their scaling is `alpha` / `rank`.

        Raises:
          ValueError: as for `check`; or a value of a tensor is not a finite number.
          OSError: the file cannot be read.
        """
        self.check(config)
        layers, rank, params = config.num_hidden_layers, self.rank, dict[str, np.ndarray]()
        with open_file(self.directory / PEFT_WEIGHTS) as source:
            for (module, part), tensor in self.tensors.items():
                layer, name = _within_layer(module)
                rule = _MODULES[name]
                in_shape, out_shape = _shapes(rule, config)
                values = source.read(tensor.name).astype(np.float32)
                if not np.isfinite(values).all():
                    raise ValueError(f"{tensor.path}: {tensor.name} has values that are not finite numbers; {_REMEDY}")
                path = rule.target.removesuffix("kernel") + ("lora_a" if part == "A" else "lora_b")
                shape = (layers, *in_shape, rank) if part == "A" else (layers, rank, *out_shape)
                whole = params.setdefault(path, np.zeros(shape, np.float32))
                own = self.config.rank_of(module)
                if part == "A":
                    whole[layer][..., :own] = values.T.reshape(*in_shape, own)
                else:
                    quotient = np.float32(self.config.scaling_of(module) / self.scaling)
                    whole[layer][:own] = (values.T * quotient).reshape(own, *out_shape)
        return params


def read_peft(directory: str | os.PathLike[str]) -> PeftAdapter:
    """Opens the adapter in a PEFT directory, and checks all that can be checked without the model.

    Raises:
      FileNotFoundError: there is no `adapter_config.json` or no `adapter_model.safetensors`.
      ValueError: `adapter_config.json` is damaged, or has a key that is unknown, or a value that is not implemented or of a
        wrong type; the safetensors file is damaged, or has a tensor that is not one of a LoRA adapter; an A has no B. The
        message has the file, and the key or the tensor.
    """
    directory = pathlib.Path(directory)
    path = directory / PEFT_WEIGHTS
    config = _read_config(directory / PEFT_CONFIG)
    if not path.is_file():
        if (directory / PEFT_PICKLE).is_file():
            raise FileNotFoundError(
                f"{directory} has its weights in {PEFT_PICKLE}, a pickle, which is not opened because a pickle can execute "
                f"code. Where you trust it, PEFT converts it: PeftModel.from_pretrained(model, {str(directory)!r})"
                ".save_pretrained(NEW, safe_serialization=True)"
            )
        raise FileNotFoundError(f"{directory} has {PEFT_CONFIG} but no {PEFT_WEIGHTS}; {_REMEDY}")
    with open_file(path) as source:
        found = source.tensors
    tensors = dict[tuple[str, Literal["A", "B"]], Tensor]()
    for name, tensor in sorted(found.items()):
        match = _TENSOR.fullmatch(name)
        if match is None or match[2] not in _MODULES:
            raise ValueError(
                f"{path}: {name} is not a tensor of a LoRA adapter of a Dream model, such as "
                f"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight; {_trained_on(config.base_model)}"
            )
        key: tuple[str, Literal["A", "B"]] = (f"model.layers.{match[1]}.{match[2]}", "A" if match[3] == "A" else "B")
        if key in tensors:
            raise ValueError(f"{path}: {tensors[key].name} and {name} are weights of the same module; {_REMEDY}")
        tensors[key] = tensor
    alone = sorted({module for module, _ in tensors if {(module, "A"), (module, "B")} - tensors.keys()})
    if alone or not tensors:
        what = f"only one of lora_A and lora_B for {_list(alone)}" if alone else "no tensors"
        raise ValueError(f"{path} has {what}; {_REMEDY}")
    identity = read_metadata(path).get(_IDENTITY)
    adapter = PeftAdapter(directory=directory, config=config, tensors=tensors, identity=identity)
    for module in adapter.modules:
        for number in (config.scaling_of(module), config.scaling_of(module) / adapter.scaling):
            if not _SMALLEST < number < 1 / _SMALLEST:
                raise ValueError(
                    f"{directory / PEFT_CONFIG} multiplies the adapter of {module} by {config.scaling_of(module):g}, which "
                    "float32 cannot represent together with the other factors; check lora_alpha and alpha_pattern"
                )
    return adapter


def write_peft(
    directory: str | os.PathLike[str],
    params: Mapping[str, np.ndarray],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    base_model: str | None,
    identity: str | None,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into a directory, in the form that PEFT loads.

    Args:
      directory: an existing directory.
      params: dotted path -> float32 array, as `PeftAdapter.read` returns them.
      rank, alpha, dropout: the configuration of the adapter; B A is multiplied by alpha / rank.
      base_model: the name or path of the base model, for `base_model_name_or_path`; None for none.
      identity: the identity of the base weights, for `PeftAdapter.identity`; None for none.
    """
    tensors, names = dict[str, np.ndarray](), list[str]()
    for name, rule in _MODULES.items():
        path = rule.target.removesuffix("kernel")
        if path + "lora_a" not in params:
            continue
        names.append(name.split(".")[1])
        for layer, (a, b) in enumerate(zip(params[path + "lora_a"], params[path + "lora_b"], strict=True)):
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, rank).T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b.reshape(rank, -1).T)
    metadata = {"format": "pt"} | ({} if identity is None else {_IDENTITY: identity})
    save_file(tensors, pathlib.Path(directory) / PEFT_WEIGHTS, metadata=metadata)
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        # With a task type PEFT needs methods that the published model does not have.
        "task_type": None,
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropout,
        "target_modules": names,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "alpha_pattern": {},
        "rank_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }
    write_json(pathlib.Path(directory) / PEFT_CONFIG, fields)


def _shapes(rule: ConversionRule, config: DreamConfig) -> tuple[Shape, Shape]:
    """Returns the shapes of the inputs and of the outputs of a projection, without the layer axis."""
    shape = table.parameter_shapes(config)[rule.target][1:]
    inputs, outputs = rule.layout.groups
    return tuple(shape[axis] for axis in inputs), tuple(shape[axis] for axis in outputs)


def _within_layer(module: str) -> tuple[int, str]:
    """Splits "model.layers.3.self_attn.q_proj" into (3, "self_attn.q_proj")."""
    _, _, layer, name = module.split(".", 3)
    return int(layer), name


def _trained_on(base_model: str | None) -> str:
    """Returns what `adapter_config.json` says about the base, for messages."""
    if not base_model:
        return f"{PEFT_CONFIG} does not say which model the adapter was trained on"
    return f"{PEFT_CONFIG} says that the adapter was trained on {base_model!r:.200}"


def _list(names: Collection[str], limit: int = 3) -> str:
    shown = sorted(names)[:limit]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# ------------------------------------------------------------------------------------------------ adapter_config.json


def _read_config(path: pathlib.Path) -> PeftConfig:
    fields = read_json(path, _REMEDY)
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path} has peft_type={kind!r:.80}, but only LORA is implemented")
    for key, value in fields.items():
        if key in _SWITCHES:
            # A comparison by type too, because False == 0 and True == 1 in Python.
            if not any(type(value) is type(off) and value == off for off in _SWITCHES[key]):
                raise ValueError(
                    f"{path} has {key}={value!r:.80}, which is not implemented (only {_SWITCHES[key][0]!r}); merge "
                    "the adapter into its base with PEFT (merge_and_unload) and convert the result"
                )
        elif key not in _READ and key not in _HARMLESS:
            raise ValueError(
                f"{path} has the key {key} ({value!r:.80}), which is not known, so it may change what the adapter "
                "computes. If you know that it does not, remove it from the file"
            )
    start = fields.get("init_lora_weights", True)
    if not any(type(start) is type(plain) and start == plain for plain in _PLAIN_STARTS):
        raise ValueError(
            f"{path} has init_lora_weights={start!r:.80}, an initialisation that changes the base weights, so the adapter "
            "does not belong to the original ones. PEFT converts it: "
            "save_pretrained(NEW, path_initial_model_for_weight_conversion=START)"
        )
    field = functools.partial(_field, path, fields)
    rank, alpha = field("r", int, 8), field("lora_alpha", float, 8)
    dropout = field("lora_dropout", float, 0.0)
    if rank < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
        raise ValueError(
            f"{path} has r={rank}, lora_alpha={alpha}, lora_dropout={dropout}; r must be at least 1, lora_alpha positive, "
            "and lora_dropout in [0, 1)"
        )
    try:
        check("r", rank, IntegerRange(1, MOST_RANK))
        check("lora_alpha", alpha, POSITIVE)
        check("lora_dropout", dropout, FloatRange(0.0, 1.0, open_high=True))
    except ValueError as error:
        raise ValueError(f"{path} has {error}") from error
    targets = _modules(path, "target_modules", fields.get("target_modules"))
    if not targets:
        raise ValueError(f"{path} has no target_modules: it does not say which modules have an adapter; {_REMEDY}")
    layers = fields.get("layers_to_transform")
    numbers: list[Any] = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{path} has layers_to_transform={layers!r:.80}; it must be a list of numbers of layers")
    pattern = fields.get("layers_pattern") or "layers"
    if pattern != "layers" and pattern != ["layers"]:
        raise ValueError(f"{path} has layers_pattern={pattern!r:.80}, but the layers of a Dream model are in 'layers'")
    if numbers and isinstance(targets, str):
        raise ValueError(
            f"{path} has layers_to_transform beside target_modules={targets!r:.80}, which PEFT refuses too; list the "
            "names of the modules"
        )
    name = fields.get("base_model_name_or_path")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{path} has base_model_name_or_path={name!r:.80}; it must be a text")
    return PeftConfig(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        stabilised=field("use_rslora", bool, False),
        targets="all-linear" if isinstance(targets, str) and targets.lower() == "all-linear" else targets,
        excluded=_modules(path, "exclude_modules", fields.get("exclude_modules")),
        layers=frozenset(numbers) if numbers else None,
        rank_pattern=_patterns(path, "rank_pattern", fields.get("rank_pattern"), int),
        alpha_pattern=_patterns(path, "alpha_pattern", fields.get("alpha_pattern"), float),
        base_model=name,
    )


def _field(path: pathlib.Path, fields: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """Returns a number or a truth value of `adapter_config.json`; raises ValueError for a value of another type."""
    value = fields.get(key, default)
    kinds = (int, float) if kind is float else (kind,)
    if type(value) not in kinds:
        raise ValueError(f"{path} has {key}={value!r:.80}; it must be of the type {kind.__name__}")
    if type(value) is not bool and not abs(value) <= _LARGEST:
        raise ValueError(f"{path} has {key}={value!r:.40}; it must be a number up to {_LARGEST}")
    return kind(value)


def _modules(path: pathlib.Path, key: str, value: object) -> str | tuple[str, ...]:
    """Returns `target_modules` or `exclude_modules`: names, or a regular expression that can be matched quickly."""
    if value is None:
        return ()
    if isinstance(value, str):
        if value.lower() != "all-linear":
            _check_pattern(path, key, value)
        return value
    if not isinstance(value, list) or len(value) > 10_000 or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{path} has {key}={value!r:.80}; it must be a text or a list of at most 10000 names")
    return tuple(value)


def _patterns(path: pathlib.Path, key: str, value: object, kind: type) -> Mapping[str, Any]:
    """Returns `rank_pattern` or `alpha_pattern`: regular expression -> positive number."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > 1000:
        raise ValueError(f"{path} has {key}={value!r:.80}; it must be an object with at most 1000 keys")
    found, ways = {}, 0
    for pattern in value:
        _check_pattern(path, key, pattern)
        ways += _ways(_PART.findall(pattern))
        if ways > _MOST_WAYS:
            raise ValueError(
                f"{path} has {key} with regular expressions that are too complicated together; list the names"
            )
        found[pattern] = _field(path, value, pattern, kind, None)
        if not 0 < found[pattern] < math.inf:
            raise ValueError(f"{path} has {key} {pattern!r:.80}: {found[pattern]}; it must be positive")
        check(
            f"{path} has {key} {pattern!r:.80}", found[pattern], IntegerRange(1, MOST_RANK) if kind is int else POSITIVE
        )
    return found


def _check_pattern(path: pathlib.Path, key: str, pattern: str) -> None:
    """Raises ValueError, with the file and the key, if `_compiled` does not accept a regular expression."""
    try:
        _compiled(pattern)
    except ValueError as error:
        raise ValueError(f"{path}: {key}: {error}") from error


def _named(modules: str | Sequence[str], module: str) -> bool:
    """Returns whether a module is one of `modules`: its name or the end of its name, or a pattern of the whole name."""
    if isinstance(modules, str):
        return _compiled(modules).fullmatch(module) is not None
    return module in modules or module.endswith(tuple(f".{name}" for name in modules))


def _by_pattern(values: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the name of a module, or the end of the name after a dot."""
    starts = [0, *(index + 1 for index, letter in enumerate(module) if letter == ".")]
    for pattern, value in values.items():
        # With a start, "^" still matches at the beginning of the whole name only.
        if any(_compiled(pattern).fullmatch(module, start) for start in starts):
            return value
    return default


# Parts of a regular expression: an escape, a set of characters, the beginning of a group, a quantifier, or another
# character.
_PART = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?:P<\w*>|<?[=!:])|[*+?]|\{[0-9,]+\}|.", re.DOTALL)
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")  # with this flag, spaces may stand before a quantifier
_LONGEST_NAME = 40  # characters of the name of a module, about
_MOST_WAYS = 500_000  # ways in which an expression may match a name; that many take hundredths of a second


def _ways(parts: Sequence[str]) -> int:
    """Returns at least the number of ways in which a regular expression of these parts can match a name.

    Each repetition has as many ways as the name has characters, each "?" has two, and each group has its alternatives.
    """
    ways, alternatives = 1, [1]
    for part in parts:
        if part.startswith("("):
            alternatives.append(1)
        elif part == "|":
            alternatives[-1] += 1
        elif part == ")" and len(alternatives) > 1:
            ways *= alternatives.pop()
        elif part == "?":
            ways *= 2
        elif part in ("*", "+") or (part[0] == "{" and len(part) > 1):
            ways *= _LONGEST_NAME
    return ways * math.prod(alternatives)


@functools.lru_cache(maxsize=16384)
def _compiled(pattern: str) -> re.Pattern[str]:
    """Returns a regular expression that matches a short name quickly.

    Raises ValueError for a pattern that is not valid, that repeats a group, or that can match in many ways, because such a
    pattern from a file could take hours.
    """
    parts = _PART.findall(pattern)
    repeats = [index for index, part in enumerate(parts) if part in ("*", "+") or (part[0] == "{" and len(part) > 1)]
    groups = any(index and parts[index - 1] in (")", "?") for index in repeats)
    if len(pattern) > 2000 or groups or _VERBOSE.search(pattern) or _ways(parts) > _MOST_WAYS:
        raise ValueError(
            f"the regular expression {pattern!r:.80} is too complicated to be matched here; list the names of the modules "
            "instead"
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r:.80} is not a regular expression: {error}") from error
