"""Preferences: the loss and its gradient against plain float64, the noise of pairs, and runs on pairs."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from dream_jax import lora, sharding
from dream_jax.batch import PairBatch
from dream_jax.config import PRESETS
from dream_jax.lora import LoraConfig
from dream_jax.model import Dream, merge_params, split_params
from dream_jax.optimizer import OptimizerConfig
from dream_jax.posttraining.answer_bounds import draw_masks, pair_key
from dream_jax.posttraining.base import StepMaterials
from dream_jax.posttraining.pair_driver import pair_arrays
from dream_jax.posttraining.preference_settings import PreferenceSettings
from dream_jax.posttraining.preferences import Preference
from dream_jax.shapes import joined
from dream_jax.train_step import StepConfig, init_state, put_batch
from dream_jax.trainer import TrainSettings, train
from dream_jax.trainer.folder import read_table

TOKENS, DRAWS, PAIRS = 12, 2, 2


def batch(pairs: int = PAIRS, stored: bool = False) -> PairBatch[np.ndarray]:
    """Returns pairs of random tokens, with prompts of 3 tokens and padding before some of them."""
    generator = np.random.default_rng(0)
    rows = 2 * pairs
    tokens_BT = generator.integers(0, 255, (rows, TOKENS)).astype(np.int32)
    starts = generator.integers(0, 4, rows)
    column_T = np.arange(TOKENS)
    return PairBatch(
        tokens_BT=tokens_BT,
        maskable_BT=column_T >= (starts + 3)[:, None],
        valid_BT=column_T >= starts[:, None],
        row_B=np.arange(rows, dtype=np.int32),
        draw_B=np.repeat(np.arange(pairs, dtype=np.int32) + 5, 2),
        reference_B=generator.normal(-40, 2, rows).astype(np.float32) if stored else None,
    )


def materials(
    model: Dream, mesh: Any, *, accumulation: int = 1, pairs: int = PAIRS, rate: float = 1.0
) -> StepMaterials:
    return StepMaterials(
        model=jax.eval_shape(lambda: model),
        graphdef=split_params(model)[0],
        adapts=lora.config_of(model) is not None,
        optimizer=optax.sgd(rate),  # at the rate 1 the difference of two states is the gradient
        schedule=OptimizerConfig(learning_rate=1.0, total_steps=10).schedule(),
        config=StepConfig(global_batch=pairs, accumulation=accumulation),
        mesh=mesh,
    )


def adapted() -> Dream:
    model = Dream(PRESETS["nano"], rngs=nnx.Rngs(0))
    return lora.attach(model, LoraConfig(rank=2, alpha=4.0), jax.random.key(1))


def plain_margins(objective: Preference, model: Dream, off: Dream | None, rows: PairBatch[np.ndarray]) -> np.ndarray:
    """Returns the margins, float64 [P], from the logits of each draw; without `off` the reference is that of the batch."""
    maskable = rows.maskable_BT.reshape(-1, 2, TOKENS)
    size, draws, shared = maskable.sum(-1), objective.settings.pair_draws, objective.settings.shared_draws
    stored = np.zeros(size.shape) if rows.reference_B is None else rows.reference_B.reshape(-1, 2)

    def bound(one: Dream, *, of_reference: bool) -> np.ndarray:
        drawn = draw_masks(pair_key(0), rows.draw_B[::2], maskable, draws, shared, of_reference=of_reference)
        masked = np.asarray(drawn[1]).reshape(-1, draws, TOKENS)
        tokens, valid = (np.repeat(x[:, None], draws, 1).reshape(-1, TOKENS) for x in (rows.tokens_BT, rows.valid_BT))
        noisy = np.where(masked.reshape(-1, TOKENS), one.config.mask_token_id, tokens)
        logits = np.asarray(nnx.jit(Dream.__call__)(one, noisy, valid), np.float64)
        logits = np.concatenate([logits[:, :1], logits[:, :-1]], 1)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        log_p = np.take_along_axis(log_p, tokens[..., None], -1)[..., 0].reshape(masked.shape)
        each = np.where(masked, log_p, 0.0).sum(-1) / masked.sum(-1)
        return each.mean(-1).reshape(size.shape) * size

    value = bound(model, of_reference=False)
    if objective.kind == "simpo":
        value = value / size
    else:
        value = value - (stored if off is None else bound(off, of_reference=True))
    return value[:, 0] - value[:, 1]


def loss_of(objective: Preference, margins: np.ndarray) -> float:
    return float(np.mean(np.log1p(np.exp(-(objective.beta * margins - objective.target_margin)))))


def test_at_the_reference_the_loss_is_log_2_and_the_gradient_that_of_the_formula() -> None:
    mesh, rows = sharding.make_mesh("1x1"), batch()
    objective = Preference("vrpo", PreferenceSettings(pair_draws=DRAWS, reference="adapter", beta=0.7))
    model = adapted()
    adapter, base = lora.split(split_params(model)[1])
    made = materials(model, mesh)
    step = objective.step(made)
    before = jax.tree.map(np.asarray, adapter)
    state, metrics = step(init_state(adapter, made.optimizer, mesh), put_batch(rows, mesh), base)
    assert abs(float(metrics["loss"]) - np.log(2)) < 1e-6
    assert float(metrics["margin"]) == 0 and float(metrics["order_accuracy"]) == 0.5 and float(metrics["kl"]) == 0

    graphdef = split_params(model)[0]
    gradient = jax.tree.map(lambda old, new: np.asarray(old - new), before, jax.tree.map(np.asarray, state.params))
    flat, tree = jax.tree.flatten(before)
    generator = np.random.default_rng(1)
    direction = [generator.normal(size=leaf.shape).astype(np.float32) for leaf in flat]

    def loss(size: float) -> float:
        moved = jax.tree.unflatten(tree, [leaf + size * one for leaf, one in zip(flat, direction, strict=True)])
        off = merge_params(graphdef, joined(base, before))  # a new adapter is the identity
        return loss_of(objective, plain_margins(objective, merge_params(graphdef, joined(base, moved)), off, rows))

    # The formula, differentiated along a direction: a central difference of the plain float64 loss.
    wanted = (loss(2e-3) - loss(-2e-3)) / 4e-3
    found = sum(float(np.vdot(one, leaf)) for one, leaf in zip(direction, jax.tree.leaves(gradient), strict=True))
    assert abs(loss(0.0) - np.log(2)) < 1e-6
    np.testing.assert_allclose(found, wanted, rtol=2e-3)


@pytest.mark.parametrize("kind", ["vrpo", "simpo"])
def test_the_loss_away_from_the_reference_is_that_of_plain_float64(kind: Any) -> None:
    mesh, rows = sharding.make_mesh("1x1"), batch(stored=kind == "vrpo")
    reference: Any = "stored" if kind == "vrpo" else "auto"
    settings = PreferenceSettings(pair_draws=DRAWS, reference=reference, shared_draws="models", sft_weight=0.5)
    objective = Preference(kind, settings)
    model = Dream(PRESETS["nano"], rngs=nnx.Rngs(0))
    made = materials(model, mesh)
    margins = plain_margins(objective, model, None, rows)
    _, metrics = objective.step(made)(init_state(split_params(model)[1], made.optimizer, mesh), put_batch(rows, mesh))
    np.testing.assert_allclose(metrics["margin"], np.mean(margins), rtol=1e-5)
    np.testing.assert_allclose(metrics["order_accuracy"], np.mean(margins > 0))
    # Under sft_weight the loss has the bound of the chosen answers per token as well.
    without = Preference(kind, PreferenceSettings(pair_draws=DRAWS, reference=reference, shared_draws="models"))
    _, bare = without.step(made)(init_state(split_params(model)[1], made.optimizer, mesh), put_batch(rows, mesh))
    np.testing.assert_allclose(bare["loss"], loss_of(objective, margins), rtol=1e-5)
    assert float(metrics["loss"]) > float(bare["loss"]) + 0.5
    assert np.isnan(float(metrics["kl"])) == (kind == "simpo")


def test_bounds_have_the_products_of_the_step() -> None:
    model, rows = Dream(PRESETS["nano"], rngs=nnx.Rngs(0)), batch()
    made = materials(model, sharding.make_mesh("1x1"))
    objective = Preference("vrpo", PreferenceSettings(pair_draws=1, reference="stored"))
    found = []
    for products in ("compute", "fp8-emulated"):
        one = dataclasses.replace(made, config=dataclasses.replace(made.config, products=products))
        bounds = jax.jit(lambda params, one=one: objective.bounds(
            one, params, pair_arrays(rows), 1, "reference", pair_key(0))[0])  # fmt: skip
        found.append(np.asarray(bounds(split_params(model)[1])))
    assert 1e-4 < np.abs(found[0] - found[1]).max() < 0.1 * np.abs(found[0]).max()


@pytest.mark.parametrize("shared", ["all", "models", "none"])
def test_noise_of_pairs(shared: Any) -> None:
    rows = batch(pairs=40)
    maskable = rows.maskable_BT.reshape(-1, 2, TOKENS)
    draws = 4
    one = [
        jax.tree.map(
            np.asarray, draw_masks(pair_key(0), rows.draw_B[::2], maskable, draws, shared, of_reference=reference)
        )
        for reference in (False, True)
    ]
    t, masked = one[0]
    assert (np.floor(t * draws) == np.arange(draws)).all()  # one noise level in each of n equal ranges
    assert (masked <= maskable[:, :, None]).all()
    np.testing.assert_array_equal(masked.sum(-1), np.floor(t * maskable.sum(-1)[..., None]) + 1)
    assert (one[0][1] == one[1][1]).all() == (shared != "none")
    assert (t[:, 0] == t[:, 1]).all() == (shared == "all")
    # The noise of a pair depends on no other pair.
    alone = draw_masks(pair_key(0), rows.draw_B[6:8:2], maskable[3:4], draws, shared)
    np.testing.assert_array_equal(alone[1][0], masked[3])
    if shared == "all":  # equal answers have equal masks
        same = np.stack([maskable[:, 0], maskable[:, 0]], 1)
        both = np.asarray(draw_masks(pair_key(0), rows.draw_B[::2], same, draws, shared)[1])
        np.testing.assert_array_equal(both[:, 0], both[:, 1])


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "accumulation"), [("4x2", 1), ("2x2", 2), ("1x1", 4)])
def test_meshes_and_accumulation_change_nothing(mesh: str, accumulation: int) -> None:
    rows = batch(pairs=8)
    objective = Preference("vrpo", PreferenceSettings(pair_draws=2, reference="adapter"))
    losses = []
    for shape, number in (("1x1", 1), (mesh, accumulation)):
        devices = sharding.make_mesh(shape)
        model = adapted()
        adapter, base = lora.split(split_params(model)[1])
        adapter = jax.tree.map(lambda leaf: leaf + 0.01, adapter)  # away from the reference
        base = jax.device_put(base, sharding.parameter_shardings(base, devices))
        made = materials(model, devices, accumulation=number, pairs=8, rate=0.01)
        state, step = init_state(adapter, made.optimizer, devices), objective.step(made)
        found = []
        for _ in range(2):
            state, metrics = step(state, put_batch(rows, devices), base)
            found.append({name: float(value) for name, value in metrics.items()})
        losses.append(found)
    for first, second in zip(*losses, strict=True):
        assert first.keys() == second.keys() and first["margin"] != 0
        for name, value in first.items():
            np.testing.assert_allclose(second[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(second["loss"], first["loss"], atol=1e-5)


PUZZLES = [
    {"input": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b + 1} or so"} for a in range(6) for b in range(6)
]
RUN = {"objective": "vrpo", "steps": 4, "batch_size": 4, "save_every": 2, "eval_every": 2, "eval_rows": 4, "samples": 0}
RUN |= {"pair_draws": 2, "log_to": (), "learning_rate": 1e-3}


def pairs_file(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PUZZLES))
    return path


def test_a_run_on_pairs_learns_their_order(tmp_path: pathlib.Path) -> None:
    settings = TrainSettings.flat(out=tmp_path / "run", data=str(pairs_file(tmp_path)), **RUN)
    summary = train(settings)
    steps = read_table(tmp_path / "run" / "metrics.csv", ("margin", "order_accuracy", "kl"))
    assert abs(float(steps[0]["loss"]) - np.log(2)) < 1e-6  # the bounds were stored with the same weights and masks
    assert float(steps[-1]["loss"]) < float(steps[0]["loss"]) and float(steps[-1]["margin"]) > 0
    scores = read_table(tmp_path / "run" / "eval.csv", ("pair_margin", "pair_order_accuracy", "pair_kl", "pairs"))
    assert float(scores[-1]["pair_order_accuracy"]) > 0.5 and float(scores[-1]["pairs"]) > 0
    assert summary["learning_rate"] == 1e-3 and summary["settings"]["objective"] == "vrpo"
    with np.load(tmp_path / "run" / "reference.npz") as file:
        assert file["bounds"].shape == (len(file["pairs"]), 2)


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: pathlib.Path) -> None:
    data = str(pairs_file(tmp_path))
    for flags in ({}, {"lora_rank": 2, "model": "nano"}):
        folders = [tmp_path / f"{len(flags)}-{name}" for name in ("whole", "again")]
        train(TrainSettings.flat(out=folders[0], data=data, **RUN, **flags))
        shutil.copytree(folders[0], folders[1])
        (folders[1] / "summary.json").unlink()
        shutil.rmtree(folders[1] / "checkpoints" / "4")
        train(TrainSettings.flat(out=folders[1], data=data, **RUN, **flags))
        whole, again = (read_table(folder / "metrics.csv") for folder in folders)
        for row in (*whole, *again):
            del row["tokens_per_second"]
        assert whole == again


def test_settings_that_do_not_fit_are_refused() -> None:
    refused = {
        "--beta has no effect with --objective sft": {"beta": 1.0},
        "has no meaning for pairs": {"objective": "vrpo", "pack": True, "eos_tail": 1},
        "--learned-turns all has no meaning": {"objective": "simpo", "learned_turns": "all"},
        "--length-policy right has no meaning": {"objective": "vrpo", "length_policy": "right"},
        "there is nothing to switch off": {"objective": "vrpo", "reference": "adapter"},
        "the reference would be the model without it": {"objective": "vrpo", "reference": "adapter", "adapter": "x"},
        "--focal has no effect": {"objective": "vrpo", "focal": True},
        "target_margin=2.0 is for --objective simpo": {"objective": "vrpo", "target_margin": 2.0},
        "simpo has no reference": {"objective": "simpo", "reference": "stored"},
        "--anneal-steps is for": {"objective": "vrpo", "anneal_steps": 2},
        "--final best takes": {"objective": "vrpo", "final": "best"},
    }
    for message, values in refused.items():
        with pytest.raises(ValueError, match=message):
            TrainSettings.flat(**values)
    assert TrainSettings.flat(objective="vrpo").default_rate() == pytest.approx(2e-4)
