"""Compares trees of arrays with each other, and with the metadata that Orbax stores."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def tree_differences(expected: Any, found: Any, *, dtypes: bool = True) -> list[str]:
    """Returns the differences between two trees of arrays, shapes or Orbax metadata, one line per parameter.

    After 20 lines a last one says how many were omitted. `dtypes` says whether different dtypes are a difference.
    """
    wanted, present = _leaves(expected), _leaves(found)
    lines = [f"{name} is missing" for name in wanted if name not in present]
    lines += [f"{name} is not expected" for name in present if name not in wanted]
    for name in wanted.keys() & present.keys():
        ours, theirs = wanted[name], present[name]
        if tuple(ours.shape) != tuple(theirs.shape):
            lines.append(f"{name} has shape {list(theirs.shape)}, expected {list(ours.shape)}")
        elif dtypes and ours.dtype != theirs.dtype:
            lines.append(f"{name} has dtype {theirs.dtype}, expected {ours.dtype}")
    return sorted(lines)[:20] + ([f"and {len(lines) - 20} more"] if len(lines) > 20 else [])


def _leaves(tree: Any) -> dict[str, Any]:
    return {
        ".".join(map(_key, path)): leaf if hasattr(leaf, "shape") else np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    }


def _key(entry: Any) -> str:
    # Orbax stores a named tuple as a dict, so the name of a field must give the same string as the key of a dict.
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise TypeError(f"unknown kind of tree entry: {entry!r}")
