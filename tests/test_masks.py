"""Masks are values: each one looks like its drawing, and travels through jit."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dream_jax import masks

# What each docstring says it draws.
DRAWN = [
    masks.Bidirectional(),
    masks.KeyPadding(np.array([[False, True, True]])),
    masks.KeyLengths(np.array([2])),
    masks.Segments(np.array([[1, 1, 2]]), np.array([[1, 1, 2]])),
    masks.Causal(),
    masks.Annealed(np.array([[False, False, False], [True, True, True], [False, False, True]])),
]


def named(mask):
    return type(mask).__name__


def test_every_mask_is_drawn():
    kinds = {kind for _, kind in inspect.getmembers(masks, inspect.isclass) if issubclass(kind, masks.Mask)}
    assert kinds - {masks.Mask} == {type(mask) for mask in DRAWN}


@pytest.mark.parametrize("mask", DRAWN, ids=named)
def test_mask_looks_like_its_drawing(mask):
    drawing = re.findall(r"^ *([#.]+)$", inspect.getdoc(type(mask)), re.MULTILINE)
    assert len(drawing) == 3
    assert mask.draw(3, 3) == "\n".join(drawing)


@pytest.mark.parametrize("mask", DRAWN, ids=named)
def test_mask_is_a_pytree(mask):
    leaves, structure = jax.tree.flatten(mask)
    assert type(jax.tree.unflatten(structure, leaves)) is type(mask)
    dense = jax.jit(lambda mask: mask.dense(3, 3))(mask)
    assert dense.dtype == bool
    np.testing.assert_array_equal(dense, mask.dense(3, 3))
    assert mask.dense(3, 3).shape[-1] == 3


def test_bidirectional_is_all_true_for_any_shape():
    assert np.all(masks.Bidirectional().dense(4, 7))
    assert masks.Bidirectional().draw(2, 5) == "#####\n#####"


def test_key_padding_hides_keys_of_its_row_only():
    valid = np.array([[1, 1, 0, 1], [0, 0, 1, 1]], bool)
    dense = np.broadcast_to(masks.KeyPadding(valid).dense(3, 4), (2, 3, 4))
    for row in range(2):
        for query in range(3):
            np.testing.assert_array_equal(dense[row, query], valid[row])
    assert masks.KeyPadding(valid).draw(2, 4, row=1) == "..##\n..##"


def test_key_lengths_hide_what_lies_past_the_end():
    lengths = np.array([0, 2, 4, 9])
    dense = np.broadcast_to(masks.KeyLengths(lengths).dense(3, 4), (4, 3, 4))
    for row, query, key in np.ndindex(4, 3, 4):
        assert dense[row, query, key] == (key < lengths[row])
    np.testing.assert_array_equal(
        masks.KeyLengths(lengths).dense(3, 4), masks.KeyPadding(np.arange(4) < lengths[:, None]).dense(3, 4)
    )
    # A narrow dtype does not count keys in it.
    np.testing.assert_array_equal(masks.KeyLengths(np.array([100], np.int8)).dense(1, 300)[0, 0], np.arange(300) < 100)


def test_segments_see_themselves():
    query, key = np.array([[1, 1, 2, 0], [3, 1, 1, 3]]), np.array([[1, 2, 2, 0], [3, 3, 1, 0]])
    dense = masks.Segments(query, key).dense(4, 4)
    assert dense.shape == (2, 4, 4)
    for row, i, j in np.ndindex(2, 4, 4):
        assert dense[row, i, j] == (query[row, i] == key[row, j])
    # Ids for queries and keys need not be equally many.
    assert masks.Segments(query[:, :2], key).draw(2, 4) == "#...\n#..."


@pytest.mark.parametrize(
    ("mask", "queries", "keys", "message"),
    [
        (masks.KeyPadding(jnp.ones((1, 3), bool)), 3, 4, "3 keys was given to 4 keys"),
        (
            masks.Segments(jnp.ones((1, 3), int), jnp.ones((1, 3), int)),
            3,
            4,
            "3 queries and 3 keys were given to",
        ),
        (masks.Segments(jnp.ones((1, 3), int), jnp.ones((1, 3), int)), 2, 3, "2 queries and 3 keys$"),
    ],
)
def test_mask_of_another_length_raises(mask, queries, keys, message):
    with pytest.raises((ValueError, TypeCheckError), match=message):
        mask.dense(queries, keys)


def test_causal_needs_its_own_keys():
    with pytest.raises(ValueError, match="2 queries and 3 keys"):
        masks.Causal().dense(2, 3)


def test_annealing_goes_from_causal_to_bidirectional():
    causal = np.asarray(masks.Causal().dense(64, 64))
    for share in (0.0, 0.25, 1.0):
        drawn = masks.anneal(jax.random.key(0), share, 64)
        dense = np.asarray(masks.Annealed(drawn).dense(64, 64))
        assert dense[causal].all()
        assert dense[~causal].mean() == pytest.approx(share, abs=0.03)
    with pytest.raises(ValueError, match="drawn for"):
        masks.Annealed(drawn).dense(32, 32)


def test_annealed_hides_padding():
    valid = np.array([[False, True, True], [True, True, True]])
    mask = masks.Annealed(np.ones((3, 3), bool), valid)
    assert mask.draw(3, 3, row=0) == "\n".join([".##"] * 3)
    assert mask.draw(3, 3, row=1) == "\n".join(["###"] * 3)
