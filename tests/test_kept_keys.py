"""When keys and values may be kept: what the graph of a mask says is what the model does, in each layer and position."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marking import slow

from dream_jax import masks
from dream_jax.config import PRESETS
from dream_jax.model import abstract_model, merge_params, split_params
from mask_study import refreshing
from mask_study.caching import exact_to_keep, reached

LAYERS, PROMPT, TOTAL = 4, 4, 16
CONFIG = dataclasses.replace(PRESETS["nano"], num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=64)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given(masks.Mask):
    """A mask that is an array, so that one compiled program serves all masks."""

    allowed_TT: jax.Array

    def allowed(self, position_bT, num_keys):
        return self.allowed_TT[None]


@functools.cache
def keys_of():
    """The function from tokens [T] and a mask [T, T] to keys and values [L, T, ...]."""
    graphdef, shapes = split_params(abstract_model(CONFIG))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.15, leaf.shape), jnp.float32)

    model = merge_params(graphdef, jax.tree_util.tree_map_with_path(draw, shapes))

    @jax.jit
    def run(tokens_T, allowed_TT):
        _, cache = model.hidden_and_kv_cache(tokens_T[None], Given(allowed_TT), jnp.arange(TOTAL)[None])
        return jnp.concatenate([cache.k, cache.v], axis=-1)[:, 0]

    return run


def dense(name):
    answer = np.arange(TOTAL)[None] >= PROMPT
    mask = masks.parse(name).for_rows(np.ones((1, TOTAL), bool), answer)
    return np.broadcast_to(np.asarray(mask.dense(TOTAL, TOTAL)), (1, TOTAL, TOTAL))[0]


NAMES = [
    "bidirectional",
    "causal",
    "prefix",
    "block-causal:4",
    "block-causal:3",
    "block-diffusion:4",
    "window:1",
    "window:2:0",
]


@pytest.mark.parametrize("name", [*NAMES, slow("window:3"), slow("block-causal:8"), slow("random")])
def test_keys_change_where_a_path_of_the_mask_leads(name):
    """Layer l changes at a position if and only if a path of at most l edges leads there from a written token."""
    rng = np.random.default_rng(1)
    allowed = dense(name) if name != "random" else (rng.random((TOTAL, TOTAL)) < 0.12) | np.eye(TOTAL, dtype=bool)
    for written in (np.arange(TOTAL) == 9, (np.arange(TOTAL) >= 8) & (np.arange(TOTAL) < 12), np.arange(TOTAL) >= 12):
        tokens = rng.integers(0, 200, TOTAL).astype(np.int32)
        later = np.where(written, (tokens + 17) % 200, tokens).astype(np.int32)
        before, after = (np.asarray(keys_of()(one, allowed)) for one in (tokens, later))
        moved = np.abs(after - before).reshape(LAYERS, TOTAL, -1).max(-1)
        wanted = reached(allowed, written, LAYERS)
        assert moved[wanted].min() > 1e-5 and moved[~wanted].max(initial=0.0) < 2e-6, (name, moved)


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("causal", True),
        ("prefix", True),
        ("block-causal:4", True),
        ("block-diffusion:4", True),
        ("block-causal:2", True),
        ("window:4:0", True),
        ("block-causal:8", False),  # the mask's block goes on beyond the sampler's
        ("block-causal:3", False),
        ("window:1", False),
        ("bidirectional", False),
    ],
)
def test_what_is_before_a_block_may_be_kept(name, exact):
    """The prompt is kept while all blocks after it are written: the same list as in test_mask_family."""
    at = np.arange(TOTAL)
    assert exact_to_keep(dense(name), at >= PROMPT, at < PROMPT, LAYERS) is exact


def test_what_no_path_is_long_enough_for_may_be_kept():
    """A window of one token and four layers reaches three tokens back: all before that is exact although a path exists."""
    at = np.arange(TOTAL)
    found = [exact_to_keep(dense("window:1"), at >= 8, at < kept, LAYERS) for kept in (5, 6)]
    assert found == [True, False]
    assert exact_to_keep(dense("bidirectional"), at >= 8, at < 8, 1)  # the keys of a single layer see no other token


@pytest.mark.slow
def test_refreshing_goes_on_where_it_was_stopped(tmp_path, capsys):
    settings = refreshing.RefreshSettings(
        tasks=("sudoku",), masks=("causal",), seeds=1, length=0.004, test_rows=4, out=tmp_path
    )
    refreshing.main(settings)
    (file,) = (tmp_path / "runs").glob("*.json")
    assert file.name == "sudoku-causal-seed-0.json" and "sudoku" in capsys.readouterr().out
    record = json.loads(file.read_text())
    assert set(record["accuracy"]) == set(refreshing.REFRESHES) and record["steps"] == 2
    assert len(set(record["accuracy"].values())) == 1  # under a causal mask the cache is exact
    written = file.stat().st_mtime_ns
    refreshing.main(settings)
    assert file.stat().st_mtime_ns == written
    lines = (tmp_path / refreshing.SUMMARY).read_text().splitlines()
    assert len(lines) == 6 and lines[1].startswith("sudoku,causal,accuracy,no cache")
    with pytest.raises(FileExistsError, match="has 2 steps and 4 test rows, not 4 and 4; give another --out"):
        refreshing.main(dataclasses.replace(settings, length=0.007))


def test_a_short_or_damaged_run_is_not_stored(tmp_path, monkeypatch):
    """What is stored stands in the study, so it has the steps and rows of the settings, and the form of a run."""
    monkeypatch.setattr(refreshing, "STORED", tmp_path / "stored")
    path = tmp_path / "runs" / "sudoku-causal-seed-0.json"
    path.parent.mkdir()
    run = {"task": "sudoku", "variant": "causal", "seed": 0, "steps": 12, "test_rows": 16, "accuracy": {"never": 0.5}}
    settings = refreshing.RefreshSettings(store=True, out=tmp_path)
    damaged = [{}, [run], run | {"task": "chess"}, run | {"accuracy": [0.5]}]
    for content, words in [
        (run, "12 steps and 16 test rows, not 600 and 256"),
        *((one, "remove the file") for one in damaged),
    ]:
        path.write_text(json.dumps(content))
        with pytest.raises((ValueError, FileExistsError), match=words):
            refreshing.main(settings)
    assert not (tmp_path / "stored").exists()


def test_refreshing_refuses_tasks_of_one_block(tmp_path):
    with pytest.raises(ValueError, match="task 'addition' is not one of: copy; reversal"):
        refreshing.RefreshSettings(tasks=("addition",))
    with pytest.raises(ValueError, match="has no finished run"):
        refreshing.main(refreshing.RefreshSettings(store=True, out=tmp_path))
