"""The table that maps published tensor names to the parameters of this project, complete in both directions."""

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
class TensorLayout:
    """How a published tensor (the source) stores a parameter (the target).

    Neighbouring axes of the target are merged into the "flat" tensor of one or two axes, which may then be transposed.

    Attributes:
      groups: for each axis of the flat tensor, the axes of the target that are merged into it, in order.
      transposed: whether the source is the transpose of the flat tensor.
    """

    groups: tuple[tuple[int, ...], ...]
    transposed: bool

    def flat_shape(self, shape: Shape) -> Shape:
        """Returns the flat shape of a target with this shape. Raises ValueError for a wrong number of axes."""
        if len(shape) != sum(map(len, self.groups)):
            raise ValueError(f"shape {shape} has {len(shape)} axes, but this layout merges the axes {self.groups}")
        return tuple(int(np.prod([shape[axis] for axis in group])) for group in self.groups)

    def source_shape(self, shape: Shape) -> Shape:
        """Returns the shape of the source of a target with this shape."""
        flat = self.flat_shape(shape)
        return flat[::-1] if self.transposed else flat

    def forward(self, source: np.ndarray, shape: Shape) -> np.ndarray:
        """Returns the target of the given shape from its source; a view of it if numpy allows one."""
        return (source.T if self.transposed else source).reshape(shape)

    def inverse(self, target: np.ndarray) -> np.ndarray:
        """Returns the source from its target; a view of it if numpy allows one. The inverse of `forward`."""
        flat = target.reshape(self.flat_shape(target.shape))
        return flat.T if self.transposed else flat

    def source_slices(self, slices: Slices, shape: Shape) -> Slices:
        """Returns the region of the source that holds a region of the target.

        Args:
          slices: the region of the target, one slice per axis.
          shape: the shape of the whole target.

        Raises:
          ValueError: the region takes a part of an inner axis of a group (a part of each head), so it is no slice of the
            source.
        """
        flat = []
        for group in self.groups:
            start, stop = 0, 1
            for position, axis in enumerate(group):
                first, last, step = slices[axis].indices(shape[axis])
                if step != 1 or (position and (first, last) != (0, shape[axis])):
                    raise ValueError(f"region {slices} of shape {shape} cuts axis {axis} inside the group {group}")
                start, stop = (first, last) if not position else (start * shape[axis], stop * shape[axis])
            flat.append(slice(start, stop))
        return tuple(flat[::-1] if self.transposed else flat)


VECTOR = TensorLayout(groups=((0,),), transposed=False)  # [D]
TABLE = TensorLayout(groups=((0,), (1,)), transposed=False)  # [V, D]
LINEAR = TensorLayout(groups=((0,), (1,)), transposed=True)  # [in, out] <- [out, in]
TO_HEADS = TensorLayout(groups=((0,), (1, 2)), transposed=True)  # [D, N, H] <- [N * H, D]
HEADS = TensorLayout(groups=((0, 1),), transposed=False)  # [N, H] <- [N * H]
FROM_HEADS = TensorLayout(groups=((0, 1), (2,)), transposed=True)  # [N, H, D] <- [D, N * H]


@dataclasses.dataclass(frozen=True)
class ConversionRule:
    """One row of the table: published tensors whose names match `pattern` become the parameter `target`.

    Attributes:
      pattern: a regular expression that uses only escaped dots and `(\\d+)` for the layer, so that `source_name` can
        construct the name from it.
      target: the dotted path of the parameter.
      layout: how the tensor stores the parameter.
    """

    pattern: str
    target: str
    layout: TensorLayout

    @property
    def layered(self) -> bool:
        """Whether the target has an axis of layers, and one tensor per layer."""
        return r"(\d+)" in self.pattern

    def source_name(self, layer: int | None) -> str:
        """Returns the tensor name that `pattern` matches for this layer (None for a parameter outside the layers)."""
        if self.layered != (layer is not None):
            raise ValueError(f"{self.target} is {'' if self.layered else 'not '}stacked over layers, but {layer=}")
        return self.pattern.replace(r"(\d+)", str(layer)).replace("\\.", ".")


RULES = (
    ConversionRule(r"model\.embed_tokens\.weight", "embed.embedding", TABLE),
    ConversionRule(r"model\.layers\.(\d+)\.input_layernorm\.weight", "layers.attn_norm.scale", VECTOR),
    ConversionRule(r"model\.layers\.(\d+)\.self_attn\.q_proj\.weight", "layers.attn.q.kernel", TO_HEADS),
    ConversionRule(r"model\.layers\.(\d+)\.self_attn\.q_proj\.bias", "layers.attn.q.bias", HEADS),
    ConversionRule(r"model\.layers\.(\d+)\.self_attn\.k_proj\.weight", "layers.attn.k.kernel", TO_HEADS),
    ConversionRule(r"model\.layers\.(\d+)\.self_attn\.k_proj\.bias", "layers.attn.k.bias", HEADS),
    ConversionRule(r"model\.layers\.(\d+)\.self_attn\.v_proj\.weight", "layers.attn.v.kernel", TO_HEADS),
    ConversionRule(r"model\.layers\.(\d+)\.self_attn\.v_proj\.bias", "layers.attn.v.bias", HEADS),
    ConversionRule(r"model\.layers\.(\d+)\.self_attn\.o_proj\.weight", "layers.attn.o.kernel", FROM_HEADS),
    ConversionRule(r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", "layers.mlp_norm.scale", VECTOR),
    ConversionRule(r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight", "layers.mlp.gate.kernel", LINEAR),
    ConversionRule(r"model\.layers\.(\d+)\.mlp\.up_proj\.weight", "layers.mlp.up.kernel", LINEAR),
    ConversionRule(r"model\.layers\.(\d+)\.mlp\.down_proj\.weight", "layers.mlp.down.kernel", LINEAR),
    ConversionRule(r"model\.norm\.weight", "norm.scale", VECTOR),
    ConversionRule(r"lm_head\.weight", "lm_head.kernel", LINEAR),
)

TIED_NAMES = ("model.embed_tokens.weight", "lm_head.weight")
"""With tied embeddings a checkpoint may also contain the second tensor, which must then be equal to the first."""


@dataclasses.dataclass(frozen=True)
class Destination:
    """The parameter that one source tensor becomes, or the layer of a stacked parameter.

    Attributes:
      rule: the row of the table for this tensor.
      layer: index on the first axis of the stacked parameter; None for a parameter outside the layers.
      shape: shape of the parameter without the layer axis.
    """

    rule: ConversionRule
    layer: int | None
    shape: Shape

    @property
    def source_shape(self) -> Shape:
        """The shape that the source tensor must have."""
        return self.rule.layout.source_shape(self.shape)


@functools.lru_cache(maxsize=8)
def parameter_shapes(config: DreamConfig) -> Mapping[str, Shape]:
    """Returns dotted path -> shape for every parameter of the model; those of the layers are stacked on a first axis L."""
    shapes = split_params(abstract_model(config))[1]
    return {
        ".".join(str(part.key) for part in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }


@functools.lru_cache(maxsize=8)
def destinations(config: DreamConfig) -> Mapping[str, Destination]:
    """Returns name -> destination for every tensor of a checkpoint of this configuration, in the order of the model.

    Raises:
      ValueError: a parameter of the model does not have exactly one row in the table; the message names it.
    """
    shapes = parameter_shapes(config)
    rules = [rule for rule in RULES if rule.target in shapes]
    if sorted(rule.target for rule in rules) != sorted(shapes):
        raise ValueError(f"parameters without exactly one row in hf.RULES: {_odd(rules, shapes)}")
    outside = [rule for rule in rules if not rule.layered]
    layered = [rule for rule in rules if rule.layered]
    first, last = outside[:1], outside[1:]
    table: dict[str, Destination] = {}
    for layer, group in [
        (None, first),
        *((layer, layered) for layer in range(config.num_hidden_layers)),
        (None, last),
    ]:
        for rule in group:
            shape = shapes[rule.target][1:] if rule.layered else shapes[rule.target]
            table[rule.source_name(layer)] = Destination(rule, layer, shape)
    return table


def _odd(rules: Iterable[ConversionRule], shapes: Collection[str]) -> list[str]:
    targets = [rule.target for rule in rules]
    return [name for name in shapes if targets.count(name) != 1]


def check_names(names: Collection[str], config: DreamConfig) -> None:
    """Checks that a checkpoint has exactly the tensors of the configuration.

    With tied embeddings it may also have an `lm_head.weight`.

    Raises:
      ValueError: the configuration has another number of layers, or tensors are missing or not expected; the message
        names them.
    """
    layers = {int(match[1]) for name in names if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))}
    if layers and max(layers) + 1 != config.num_hidden_layers:
        raise ValueError(
            f"config.json has num_hidden_layers={config.num_hidden_layers}, but the checkpoint holds {len(layers)} layers, "
            f"the last of which is layer {max(layers)} (counted from 0)"
        )
    wanted = destinations(config)
    extra = set(names) - set(wanted) - (set(TIED_NAMES) if config.tie_word_embeddings else set())
    missing = set(wanted) - set(names)
    problems = []
    if missing:
        problems.append(f"lacks {_list(missing)}")
    if extra:
        unknown = {name for name in extra if not any(re.fullmatch(rule.pattern, name) for rule in RULES)}
        known = extra - unknown
        if unknown:
            problems.append(f"holds tensors of unknown names: {_list(unknown)}")
        if known:
            problems.append(f"holds tensors that a model of its config.json does not have: {_list(known)}")
    if problems:
        raise ValueError("the checkpoint " + "; it ".join(problems))


def _list(names: Collection[str], limit: int = 20) -> str:
    shown = sorted(names)[:limit]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
