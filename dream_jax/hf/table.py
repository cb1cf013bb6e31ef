"""The one table between published tensor names and this project's parameters, total in both directions.

Knows names, shapes and layouts. Knows nothing of files, dtypes, devices or values.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Mapping

import jax
import numpy as np

from dream_jax.config import DreamConfig
from dream_jax.model import abstract_model, split_params

Shape = tuple[int, ...]
Slices = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How one parameter lies in the source: neighbouring axes merged, then perhaps transposed.

    Attributes:
      groups: the target's axes that make up each axis of the flat (one or two dimensional) tensor, in order.
      transposed: whether the source is the flat tensor's transpose.
    """

    groups: tuple[tuple[int, ...], ...]
    transposed: bool

    def flat_shape(self, shape: Shape) -> Shape:
        """Shape of the target with its groups merged."""
        if len(shape) != sum(map(len, self.groups)):
            raise ValueError(f"shape {shape} does not have the axes {self.groups}")
        return tuple(int(np.prod([shape[axis] for axis in group])) for group in self.groups)

    def source_shape(self, shape: Shape) -> Shape:
        """Shape of the source tensor of a target with this shape."""
        flat = self.flat_shape(shape)
        return flat[::-1] if self.transposed else flat

    def forward(self, source: np.ndarray, shape: Shape) -> np.ndarray:
        """Source tensor -> target of the given shape (a view where numpy can)."""
        return (source.T if self.transposed else source).reshape(shape)

    def inverse(self, target: np.ndarray) -> np.ndarray:
        """Target -> source tensor (a view where numpy can)."""
        flat = target.reshape(self.flat_shape(target.shape))
        return flat.T if self.transposed else flat

    def source_slices(self, slices: Slices, shape: Shape) -> Slices:
        """The part of the source that a part of the target comes from.

        Raises:
          ValueError: the part cuts the inner axis of a merged group (a head), so it is no slice of the
            source.
        """
        flat = []
        for group in self.groups:
            start, stop = 0, 1
            for position, axis in enumerate(group):
                first, last, step = slices[axis].indices(shape[axis])
                if step != 1 or (position and (first, last) != (0, shape[axis])):
                    raise ValueError(f"part {slices} of shape {shape} cuts axis {axis} inside the group {group}")
                start, stop = (first, last) if not position else (start * shape[axis], stop * shape[axis])
            flat.append(slice(start, stop))
        return tuple(flat[::-1] if self.transposed else flat)


VECTOR = Layout(groups=((0,),), transposed=False)  # [D]
TABLE = Layout(groups=((0,), (1,)), transposed=False)  # [V, D]
LINEAR = Layout(groups=((0,), (1,)), transposed=True)  # [in, out] <- [out, in]
TO_HEADS = Layout(groups=((0,), (1, 2)), transposed=True)  # [D, N, H] <- [N * H, D]
HEADS = Layout(groups=((0, 1),), transposed=False)  # [N, H] <- [N * H]
FROM_HEADS = Layout(groups=((0, 1), (2,)), transposed=True)  # [N, H, D] <- [D, N * H]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row: the source names that match `pattern` go to the parameter `target`, laid out as `layout` says.

    The only pattern syntax used is an escaped dot and `(\\d+)` for the layer, so that the name can be built
    back.
    """

    pattern: str
    target: str
    layout: Layout

    @property
    def layered(self) -> bool:
        """Whether the target is stacked over layers."""
        return r"(\d+)" in self.pattern

    def source_name(self, layer: int | None) -> str:
        """The name that `pattern` matches for this layer (None for parameters outside the layers)."""
        if self.layered != (layer is not None):
            raise ValueError(f"{self.target} is {'' if self.layered else 'not '}layered, but {layer=}")
        return self.pattern.replace(r"(\d+)", str(layer)).replace("\\.", ".")


RULES = (
    Rule(r"model\.embed_tokens\.weight", "embed.embedding", TABLE),
    Rule(r"model\.layers\.(\d+)\.input_layernorm\.weight", "layers.attn_norm.scale", VECTOR),
    Rule(r"model\.layers\.(\d+)\.self_attn\.q_proj\.weight", "layers.attn.q.kernel", TO_HEADS),
    Rule(r"model\.layers\.(\d+)\.self_attn\.q_proj\.bias", "layers.attn.q.bias", HEADS),
    Rule(r"model\.layers\.(\d+)\.self_attn\.k_proj\.weight", "layers.attn.k.kernel", TO_HEADS),
    Rule(r"model\.layers\.(\d+)\.self_attn\.k_proj\.bias", "layers.attn.k.bias", HEADS),
    Rule(r"model\.layers\.(\d+)\.self_attn\.v_proj\.weight", "layers.attn.v.kernel", TO_HEADS),
    Rule(r"model\.layers\.(\d+)\.self_attn\.v_proj\.bias", "layers.attn.v.bias", HEADS),
    Rule(r"model\.layers\.(\d+)\.self_attn\.o_proj\.weight", "layers.attn.o.kernel", FROM_HEADS),
    Rule(r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", "layers.mlp_norm.scale", VECTOR),
    Rule(r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight", "layers.mlp.gate.kernel", LINEAR),
    Rule(r"model\.layers\.(\d+)\.mlp\.up_proj\.weight", "layers.mlp.up.kernel", LINEAR),
    Rule(r"model\.layers\.(\d+)\.mlp\.down_proj\.weight", "layers.mlp.down.kernel", LINEAR),
    Rule(r"model\.norm\.weight", "norm.scale", VECTOR),
    Rule(r"lm_head\.weight", "lm_head.kernel", LINEAR),
)

TIED_NAMES = ("model.embed_tokens.weight", "lm_head.weight")
"""With tied embeddings a checkpoint may still hold the second; it must then equal the first."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one source tensor goes: a parameter, or one layer of a stacked parameter.

    Attributes:
      rule: its row in the table.
      layer: index on the stacked parameter's first axis, or None.
      shape: shape of the parameter, the layer axis aside.
    """

    rule: Rule
    layer: int | None
    shape: Shape

    @property
    def source_shape(self) -> Shape:
        """Shape that the source tensor must have."""
        return self.rule.layout.source_shape(self.shape)


@functools.lru_cache(maxsize=8)
def parameter_shapes(config: DreamConfig) -> Mapping[str, Shape]:
    """Shape of every parameter of the model, stacked over layers, by dotted path."""
    shapes = split_params(abstract_model(config))[1]
    return {
        ".".join(str(part.key) for part in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }


@functools.lru_cache(maxsize=8)
def places(config: DreamConfig) -> Mapping[str, Place]:
    """Every source tensor of a checkpoint with this configuration, by name and in the order of the model.

    Raises:
      ValueError: the table and the model's parameters are not one to one; the message names what is left
        over.
    """
    shapes = parameter_shapes(config)
    rules = [rule for rule in RULES if rule.target in shapes]
    if sorted(rule.target for rule in rules) != sorted(shapes):
        raise ValueError(f"parameters without exactly one row in hf.RULES: {_odd(rules, shapes)}")
    outside = [rule for rule in rules if not rule.layered]
    layered = [rule for rule in rules if rule.layered]
    first, last = outside[:1], outside[1:]
    table: dict[str, Place] = {}
    for layer, group in [
        (None, first),
        *((layer, layered) for layer in range(config.num_hidden_layers)),
        (None, last),
    ]:
        for rule in group:
            shape = shapes[rule.target][1:] if rule.layered else shapes[rule.target]
            table[rule.source_name(layer)] = Place(rule, layer, shape)
    return table


def _odd(rules: Iterable[Rule], shapes: Collection[str]) -> list[str]:
    targets = [rule.target for rule in rules]
    return [name for name in shapes if targets.count(name) != 1]


def check_names(names: Collection[str], config: DreamConfig) -> None:
    """Checks that a checkpoint holds exactly the tensors that the configuration asks for.

    With tied embeddings an `lm_head.weight` may be there.

    Raises:
      ValueError: tensors are missing or left over; the message names them.
    """
    wanted = places(config)
    extra = set(names) - set(wanted) - (set(TIED_NAMES) if config.tie_word_embeddings else set())
    missing = set(wanted) - set(names)
    problems = []
    if missing:
        problems.append(f"lacks {_list(missing)}")
    if extra:
        unknown = {name for name in extra if not any(re.fullmatch(rule.pattern, name) for rule in RULES)}
        known = extra - unknown
        if unknown:
            problems.append(f"holds tensors that no rule names: {_list(unknown)}")
        if known:
            problems.append(f"holds tensors that config.json leaves no room for: {_list(known)}")
    if problems:
        raise ValueError("the checkpoint " + "; it ".join(problems))


def _list(names: Collection[str], limit: int = 20) -> str:
    shown = sorted(names)[:limit]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
