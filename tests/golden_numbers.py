"""Tiny checkpoints in the published layout with the numbers that the published code gives on them, for tests."""

import functools
import json
from pathlib import Path

import numpy as np

from dream_jax.model import Dream
from dream_jax.pretrained import load

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = ("tiny_a", "tiny_b")
LOSSES = ("original", "linear", "uniform", "cart:0.1", "cart:0.3", "cart:0.8")


@functools.cache
def model(name: str, form: str = "stacked") -> Dream:
    """Returns the model, with its layers in the form of the files, or as sampling on a GPU has them ("apart")."""
    return load(GOLDEN / name / "hf", layers=form, joined=form == "apart")


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name / "golden.npz") as stored:
        # int32, as everywhere on the device.
        return {key: stored[key].astype(np.int32) if stored[key].dtype == np.int64 else stored[key] for key in stored}


@functools.cache
def facts(name: str) -> dict:
    return json.loads((GOLDEN / name / "golden.json").read_text())
