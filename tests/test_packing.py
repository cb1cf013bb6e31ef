"""Rows of several texts: each text is learned as in a row of its own, and none is lost, doubled or left to chance."""

import dataclasses
import functools
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marking import slow

from dream_jax import masks, objective, sharding
from dream_jax.batch import Batch
from dream_jax.config import PRESETS
from dream_jax.data import (
    MOST_TEXTS,
    BatchOptions,
    Mixture,
    Row,
    RowList,
    TokenizedRows,
    make_batches,
    open_source,
    packing,
)
from dream_jax.device_memory import Shortage
from dream_jax.masks import Packed
from dream_jax.model import abstract_model, merge_params, split_params
from dream_jax.objective import (
    CartWeight,
    Focal,
    InverseTimeWeight,
    LinearWeight,
    LossWeight,
    UniformWeight,
    draw_noise,
    masked_diffusion_loss,
)
from dream_jax.packed_noise import draw_packed_noise
from dream_jax.plan import PlanSettings, make_plan
from dream_jax.reports.record import read_record
from dream_jax.reports.run_report import write_report
from dream_jax.tokenizer import ByteTokenizer, load_tokenizer
from dream_jax.train_step import (
    NLL_BY_TIME,
    OptimizerConfig,
    StepConfig,
    init_state,
    make_train_step,
    noise_key,
    put_batch,
)
from dream_jax.trainer import TrainSettings, remat_choice, train
from dream_jax.trainer.prepared import prepare

BYTES = ByteTokenizer()
PAD = BYTES.pad_id
ASSETS = os.environ.get("DREAM_JAX_ASSETS")


def uneven(count: int = 60) -> RowList:
    """Row n: a prompt that is its number and up to two letters, a response of 3 n % 10 + 1 letters."""
    return RowList(
        [Row(prompt=chr(1 + n) + "p" * (n % 3), response="abcdefghij"[: 3 * n % 10 + 1]) for n in range(count)]
    )


def packed_batches(source: Any, **changes: Any) -> Any:
    options = BatchOptions(pack=True, **{"eos_tail": 1, **changes.pop("options", {})})
    settings: dict[str, Any] = {"batch_size": 4, "max_length": 32, "seed": 0, "num_threads": 0, "options": options}
    return make_batches(TokenizedRows(source, BYTES), **(settings | changes))


def take(source: Any, steps: int, **changes: Any) -> list[Batch[np.ndarray]]:
    with packed_batches(source, **changes) as batches:
        return [next(batches) for _ in range(steps)]


def texts_of(batch: Batch[Any]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(index in the global batch, tokens, maskable) of each text; also checks what lies behind the last text."""
    found = []
    for row, (lengths, numbers) in enumerate(zip(batch.length_BM, batch.text_BM, strict=True)):
        start = 0
        for length, number in zip(lengths.tolist(), numbers.tolist(), strict=True):
            assert (length > 0) == (number >= 0)
            if length:
                part = slice(start, start + length)
                found.append((number, batch.tokens_BT[row, part], batch.maskable_BT[row, part]))
            start += length
        assert not batch.maskable_BT[row, start:].any() and (batch.tokens_BT[row, start:] == PAD).all()
    return found


def firsts(batch: Batch[Any]) -> list[int]:
    """The numbers of the rows of `uneven` in a batch, in order."""
    return [int(tokens[0]) - 1 for _, tokens, _ in texts_of(batch)]


# --- data


def test_best_fit_holds_everything_once_and_wastes_little() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 1024).tolist()
    rows = packing.best_fit(lengths, 1024, 64)
    assert sorted(index for row in rows for index in row) == list(range(1024))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 1024
    assert sum(lengths) / (1024 * len(rows)) > 0.98
    assert max(map(len, packing.best_fit([1] * 50, 100, 8))) == 8


def test_a_text_keeps_its_tokens_and_its_own_tail() -> None:
    for batch in take(uneven(), 6):
        assert batch.tokens_BT.shape == (4, 32) and batch.valid_BT is None
        found = texts_of(batch)
        assert [number for number, _, _ in found] == list(range(len(found)))
        assert len(found) > 4
        for _, tokens, maskable in found:
            n = int(tokens[0]) - 1
            response = list(b"abcdefghij"[: 3 * n % 10 + 1])
            assert tokens.tolist() == [n + 1, *b"p" * (n % 3), *response, PAD, PAD]
            assert maskable.tolist() == [False] * (n % 3 + 1) + [True] * (len(response) + 2)


@pytest.mark.parametrize("window", [1024, 16])
def test_no_text_is_lost_or_doubled_in_an_epoch(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(packing, "WINDOW", window)
    batches = take(uneven(), 30)
    read = [n for batch in batches for n in firsts(batch)]
    epochs = [read[start : start + 60] for start in range(0, len(read) - 59, 60)]
    assert len(epochs) >= 2 and all(sorted(epoch) == list(range(60)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    other_seed = [n for batch in take(uneven(), 3, seed=1) for n in firsts(batch)]
    assert other_seed != read[: len(other_seed)]


@pytest.mark.parametrize("changes", [{}, {"options": {"width_step": 8}}], ids=["", "width_step"])
def test_processes_and_a_resumed_run_read_the_same(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    monkeypatch.setattr(packing, "WINDOW", 16)
    whole = take(uneven(), 12, **changes)
    for process in range(2):
        with packed_batches(uneven(), process_index=process, process_count=2, num_threads=1, **changes) as batches:
            for _ in range(5):
                next(batches)
            state = json.loads(json.dumps(batches.get_state()))
        with packed_batches(uneven(), process_index=process, process_count=2, **changes) as batches:
            batches.set_state(state)
            assert batches.get_state() == state
            assert batches.outlook(3).batches == 3  # of the first batches, which come before the saved position
            for expected in whole[5:]:
                found = next(batches)
                for name, array in vars(found).items():
                    wanted = getattr(expected, name)
                    assert (array is None) == (wanted is None)
                    assert array is None or np.array_equal(array, wanted[process::2]), name
    with (
        packed_batches(uneven(), options={"eos_tail": 2}) as other,
        pytest.raises(ValueError, match="layout was Batch"),
    ):
        other.set_state(state)


def test_a_mixture_is_packed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW", 32)
    mixture = Mixture([uneven(20), uneven(60)], [3.0, 1.0])
    counts = Counter(n for batch in take(mixture, 5) for n in firsts(batch))
    assert sum(counts[n] for n in range(20)) > 2 * sum(counts[n] for n in range(20, 60)) > 0


def test_statistics_are_those_of_the_batches() -> None:
    with packed_batches(uneven()) as batches:
        found = batches.outlook(5)
        taken = [next(batches) for _ in range(5)]
    texts = [one for batch in taken for one in texts_of(batch)]
    tokens = sum(len(one) - 1 for _, one, _ in texts)  # of the two end-of-text tokens, the first ends the text
    assert found.batches == 5 and found.widths == {"32": 5} and found.whole_share == 1
    np.testing.assert_allclose(found.texts_per_row, len(texts) / 20)
    np.testing.assert_allclose(found.epochs, len(texts) / 60)
    np.testing.assert_allclose(found.padding_share, 1 - tokens / (20 * 32))
    np.testing.assert_allclose(found.hidden_share, 1 - sum(len(one) for _, one, _ in texts) / (20 * 32))
    np.testing.assert_allclose(found.packed_share, 20 * 32 / (len(texts) * 32))
    assert found.supervised == sum(int(maskable.sum()) for _, _, maskable in texts)
    filled = sum(len(one) for _, one, _ in texts) / 640
    assert found.lines()[1].startswith(
        f"packed: {len(texts) / 20:.2f} texts a row on average; {filled:.1%} of all positions belong to a text, "
        f"{tokens / 640:.1%} without the end-of-text after its end token"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pack=True .--pack. needs eos_tail.*--eos-tail 16"),
        ({"eos_tail": 1, "cut_responses": True}, "cut_responses .--cut-responses. gives all responses"),
        ({"eos_tail": 1, "tail_cut": 0.5}, r"tail_cut=0.5 \(--tail-cut\)"),
    ],
)
def test_options_that_contradict_packing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchOptions(pack=True, **options)
    with pytest.raises(ValueError, match=message):
        TrainSettings.flat(pack=True, **options)


def test_rows_of_one_text_are_warned_of() -> None:
    assert "--pack without --max-length" in "".join(TrainSettings.flat(pack=True, eos_tail=1).warnings())
    assert "--pack" not in "".join(TrainSettings.flat(pack=True, eos_tail=1, max_length=99).warnings())


def saved_share(source: Any, tokenizer: Any, eos_tail: int) -> float:
    """The share of positions that packing saves of rows of 1024 tokens."""
    options = BatchOptions(eos_tail=eos_tail, pack=True)
    with make_batches(
        TokenizedRows(source, tokenizer), batch_size=16, max_length=1024, seed=0, options=options, num_threads=0
    ) as batches:
        found = batches.outlook(40)
    assert 1 - found.hidden_share > 0.95  # nearly all positions belong to a text
    return 1 - found.packed_share


def test_chats_need_40_percent_fewer_positions() -> None:
    """Lengths as those of GSM8K's chats: about 230 tokens, seldom more than 500."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 0.35, 600), 60, 900).astype(int).tolist()
    rows = [Row(prompt="q" * (one // 2), response="a" * (one - one // 2)) for one in lengths]
    assert saved_share(RowList(rows), BYTES, 64) > 0.4


@pytest.mark.slow
@pytest.mark.skipif(ASSETS is None, reason="needs Dream's tokenizer and GSM8K, given by DREAM_JAX_ASSETS")
def test_gsm8k_needs_40_percent_fewer_positions() -> None:
    assert ASSETS is not None
    source = open_source(str(Path(ASSETS) / "data" / "gsm8k"), "train")
    tokenizer = load_tokenizer(str(Path(ASSETS) / "dream-v0-instruct-7b"))
    assert saved_share(RowList([source[n] for n in range(600)]), tokenizer, 64) > 0.4


# --- masks

LENGTHS = np.array([[8, 12, 0], [12, 8, 0], [8, 8, 8], [12, 12, 0]], np.int32)
TOKENS = 26


@pytest.mark.parametrize("name", ["bidirectional", "causal", "prefix", "block-causal:3", "window:2:1"])
def test_a_mask_counts_from_the_start_of_each_text(name: str) -> None:
    packed, mask = Packed(LENGTHS), masks.parse(name)
    answer = np.random.default_rng(0).random((4, TOKENS)) < 0.3
    found = np.broadcast_to(
        (mask.for_texts(packed.positions(TOKENS), answer) & packed).dense(TOKENS, TOKENS), (4, 26, 26)
    )
    wanted = np.zeros((4, TOKENS, TOKENS), bool)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in [*lengths.tolist(), TOKENS - int(lengths.sum())]:
            part = slice(start, start + length)
            alone = mask.for_rows(np.ones((1, length), bool), answer[row : row + 1, part])
            wanted[row, part, part] = np.asarray(alone.dense(length, length))
            start += length
    inside = np.asarray(packed.valid(TOKENS))
    np.testing.assert_array_equal(found[inside], wanted[inside])
    assert found.any(axis=-1).all()  # padding attends to something too
    window = (mask.for_texts(packed.positions(TOKENS), answer) & packed).at(np.array([[3, 9, 20]] * 4))
    np.testing.assert_array_equal(window.dense(3, TOKENS), found[:, [3, 9, 20]])


def test_two_streams_are_not_packed() -> None:
    with pytest.raises(ValueError, match="TwoStream needs rows that hold one text twice"):
        masks.TwoStream(4).for_texts(np.zeros((1, 4), int), np.zeros((1, 4), bool))


# --- noise and loss

SMALL = dataclasses.replace(PRESETS["nano"], num_hidden_layers=2, hidden_size=64, intermediate_size=96)
GRAPHDEF, SHAPES = split_params(abstract_model(SMALL))


@functools.cache
def parameters() -> Any:
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: rng.normal(path[-1].key == "scale", 0.2, leaf.shape).astype(np.float32), SHAPES
    )


def made_batch(rows: int = 4) -> Batch[np.ndarray]:
    """Rows of LENGTHS; the first three tokens of each text are its prompt."""
    rng = np.random.default_rng(1)
    lengths = np.concatenate([LENGTHS] * (rows // 4))
    tokens = rng.integers(0, 256, (rows, TOKENS)).astype(np.int32)
    packed = Packed(lengths)
    maskable = np.asarray((packed.positions(TOKENS) > 2) & packed.valid(TOKENS))
    tokens = np.where(np.asarray(packed.valid(TOKENS)), tokens, PAD).astype(np.int32)
    text = np.where(lengths > 0, np.cumsum(lengths.ravel() > 0).reshape(lengths.shape) - 1, -1).astype(np.int32)
    row_B = np.arange(rows, dtype=np.int32)
    return Batch(tokens_BT=tokens, maskable_BT=maskable, row_B=row_B, length_BM=lengths, text_BM=text)


def in_rows_of_their_own(batch: Batch[np.ndarray], width: int = TOKENS) -> Batch[np.ndarray]:
    """The same texts, one a row, as `lay_out` puts them: on the right, behind positions that are hidden."""
    texts = sorted(texts_of(batch), key=lambda text: text[0])
    shape = len(texts), width
    tokens, maskable, valid = np.full(shape, PAD, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
    for row, (_, ids, may) in enumerate(texts):
        tokens[row, width - len(ids) :], maskable[row, width - len(ids) :] = ids, may
        valid[row, width - len(ids) :] = True
    return Batch(tokens_BT=tokens, maskable_BT=maskable, row_B=np.arange(len(texts), dtype=np.int32), valid_BT=valid)


def test_noise_of_a_text_is_that_of_a_row_of_its_own() -> None:
    batch, key = made_batch(), noise_key(3, 5)
    single = in_rows_of_their_own(batch)
    packed = Packed(batch.length_BM)
    t_BM, masked_BT = jax.jit(draw_packed_noise)(key, packed, batch.text_BM, batch.maskable_BT)
    t_B, masked_KT = draw_noise(key, single.row_B, single.maskable_BT, len(single.row_B))
    np.testing.assert_array_equal(np.asarray(t_BM)[batch.length_BM > 0], t_B)
    again = dataclasses.replace(batch, maskable_BT=np.asarray(masked_BT))
    for number, _, masked in texts_of(again):
        np.testing.assert_array_equal(masked, np.asarray(masked_KT)[number, TOKENS - len(masked) :])
    assert np.asarray(masked_BT).any()


WEIGHTS = (CartWeight(0.1), InverseTimeWeight(), LinearWeight(), UniformWeight())


def cart(masked: np.ndarray, p: float) -> np.ndarray:
    """The definition of CART's weights of one text."""
    apart = np.abs(np.subtract.outer(np.arange(len(masked)), np.arange(len(masked))))
    return np.where(apart > 0, 0.5 * p * (1 - p) ** (apart - 1.0), 0) @ ~masked


@pytest.mark.parametrize(
    ("weight", "wanted"),
    [
        (CartWeight(0.1), lambda masked, t: cart(masked, 0.1)),
        (CartWeight(0.7), lambda masked, t: cart(masked, 0.7)),
        (InverseTimeWeight(), lambda masked, t: 1 / t),
        (LinearWeight(), lambda masked, t: 1 - t),
        (UniformWeight(), lambda masked, t: 1.0),
    ],
    ids=["cart:0.1", "cart:0.7", "inverse", "linear", "uniform"],
)
def test_weights_end_at_the_text(weight: LossWeight, wanted: Any) -> None:
    packed, rng = Packed(LENGTHS), np.random.default_rng(0)
    masked, t_BM = rng.random((4, TOKENS)) < 0.5, rng.random(LENGTHS.shape).astype(np.float32)

    @jax.jit
    def weights(masked: Any, t_BM: Any) -> jax.Array:
        t_BT = packed.spread(t_BM, jnp.zeros((1, 1), jnp.float32), TOKENS)
        return weight(masked, t_BT, packed.starts(TOKENS))

    found = np.asarray(weights(masked, t_BM))
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths.tolist()):
            part = slice(start, start + length)
            np.testing.assert_allclose(
                found[row, part], wanted(masked[row, part], t_BM[row, number]), rtol=1e-5, atol=1e-6
            )
            start += length


@dataclasses.dataclass(frozen=True)
class EveryWeight(LossWeight):
    """The sum of all weights, so that one compiled program tests all of them."""

    def __call__(self, masked_BT: Any, t: Any, start_BT: Any = None) -> jax.Array:
        return sum((weight(masked_BT, t, start_BT) for weight in WEIGHTS), start=jnp.zeros(masked_BT.shape))


@pytest.mark.parametrize("focal", [slow(None), Focal()], ids=["", "focal"])
def test_loss_and_gradients_are_those_of_each_text_alone(focal: Focal | None) -> None:
    """The texts of one length are the rows of a batch without any padding; the first tokens may be masked too."""
    batch, rng = made_batch(), np.random.default_rng(0)
    masked_BT = (rng.random(batch.tokens_BT.shape) < 0.5) & np.asarray(Packed(batch.length_BM).valid(TOKENS))
    t_BM = rng.random(batch.length_BM.shape).astype(np.float32)
    total = np.float32(masked_BT.sum())

    def loss(params: Any, *arrays: Any, **options: Any) -> jax.Array:
        model = merge_params(GRAPHDEF, params)
        return masked_diffusion_loss(model, *arrays, focal=focal, normalizer=jnp.asarray(total), **options)[0]

    differentiated = jax.jit(jax.value_and_grad(loss), static_argnums=4)
    found, gradients = differentiated(
        parameters(), batch.tokens_BT, masked_BT, t_BM, EveryWeight(), Packed(batch.length_BM)
    )
    texts = texts_of(dataclasses.replace(batch, maskable_BT=masked_BT))
    t_of = t_BM[batch.length_BM > 0]
    wanted, wanted_gradients = 0.0, jax.tree.map(np.zeros_like, parameters())
    for length in {len(ids) for _, ids, _ in texts}:
        same = [text for text in texts if len(text[1]) == length]
        tokens, masked = np.stack([ids for _, ids, _ in same]), np.stack([may for _, _, may in same])
        t = t_of[[number for number, _, _ in same]]
        part, part_gradients = differentiated(parameters(), tokens, masked, t, EveryWeight())
        wanted += float(part)
        wanted_gradients = jax.tree.map(np.add, wanted_gradients, part_gradients)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1.0, float(np.abs(other).max())))


def test_loss_refuses_noise_of_other_texts() -> None:
    model = merge_params(GRAPHDEF, parameters())
    batch = made_batch()
    with pytest.raises(Exception, match="expected one noise level per row"):
        masked_diffusion_loss(
            model, batch.tokens_BT, batch.maskable_BT, np.ones((4, 2), np.float32), attention_mask=Packed(LENGTHS)
        )
    with pytest.raises(ValueError, match="pass masks.Packed as attention_mask"):
        masked_diffusion_loss(
            model, batch.tokens_BT, batch.maskable_BT, np.ones(4, np.float32), mask=masks.Causal() & Packed(LENGTHS)
        )
    with pytest.raises(ValueError, match="has lengths for 2 rows, but the tokens have 4 rows"):
        masked_diffusion_loss(
            model, batch.tokens_BT, batch.maskable_BT, np.ones(4, np.float32), attention_mask=Packed(LENGTHS[:2])
        )


def test_positions_restart_at_each_text() -> None:
    wanted = [*range(8), *range(12), *range(6)]
    for mask in (Packed(LENGTHS), masks.Causal() & Packed(LENGTHS)):
        assert mask.positions(TOKENS)[0].tolist() == wanted
    assert masks.Causal().positions(4).tolist() == [[0, 1, 2, 3]]


STEPS = 3
CONFIG = {"weight": InverseTimeWeight(), "seed": 7}


@functools.cache
def run(mesh_shape: str, packed: bool, accumulation: int = 1, mask: str = "bidirectional") -> tuple[Any, Any]:
    """The metrics of each step, and the parameters after the last."""
    batch = made_batch(8)
    if not packed:
        batch = in_rows_of_their_own(batch)
    optimizer = OptimizerConfig(learning_rate=1e-3, total_steps=STEPS)
    config = StepConfig(
        global_batch=len(batch.row_B),
        accumulation=accumulation,
        mask=masks.parse(mask),
        **CONFIG,  # type: ignore[arg-type]
    )
    mesh = sharding.make_mesh(mesh_shape)
    step = make_train_step(GRAPHDEF, optimizer.make(), optimizer.schedule(), config, mesh)
    state, found = init_state(parameters(), optimizer.make(), mesh), []
    for _ in range(STEPS):
        state, metrics = step(state, put_batch(batch, mesh))
        found.append({name: float(value) for name, value in metrics.items()})
    return found, jax.tree.map(np.asarray, state.params)


def assert_same_run(found: Any, wanted: Any) -> None:
    for one, other in zip(found[0], wanted[0], strict=True):
        assert one["num_masked"] == other["num_masked"]
        for name in ("loss", "nll", "masked_accuracy", "eos_accuracy", "grad_norm", *NLL_BY_TIME):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, err_msg=name)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "accumulation"), [("1x1", 1), ("4x2", 1), ("2x2x2", 2)])
def test_steps_are_those_of_one_text_a_row(mesh: str, accumulation: int) -> None:
    assert_same_run(run(mesh, True, accumulation), run("1x1", False))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # while a batch is split, a mask's arrays have an axis more
def test_steps_under_a_mask_are_those_of_one_text_a_row() -> None:
    assert_same_run(run("4x2", True, 2, "prefix"), run("1x1", False, 1, "prefix"))


# --- runs


def chats(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "response": str(2 * n) * (1 + n % 4)} for n in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_a_run_is_resumed_bit_by_bit_and_on_another_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW", 32)
    base = {"model": "nano", "data": str(chats(tmp_path)), "max_length": 128, "eos_tail": 2, "pack": True}
    base |= {"batch_size": 4, "steps": 8, "save_every": 4, "eval_every": 4, "eval_rows": 4, "log_to": ()}
    base |= {"samples": 0, "eval_tokens": 0}
    whole, parts, other = (tmp_path / name for name in ("whole", "parts", "other"))
    train(TrainSettings.flat(out=whole, **base))
    monkeypatch.setattr("dream_jax.trainer.steps.StopSignal.requested", stop_after(4))
    with pytest.raises(Exception, match="stopped and saved after step 4"):
        train(TrainSettings.flat(out=parts, **base))
    shutil.copytree(parts, other)
    monkeypatch.undo()
    monkeypatch.setattr(packing, "WINDOW", 32)
    train(TrainSettings.flat(out=parts, **base))
    train(TrainSettings.flat(out=other, **base | {"mesh": "2x2x2", "accumulation": 2}))

    def rows(out: Path, name: str) -> list[str]:
        return [line.rpartition(",")[0] for line in (out / name).read_text().splitlines()]

    assert rows(parts, "metrics.csv") == rows(whole, "metrics.csv")
    assert rows(parts, "eval.csv") == rows(whole, "eval.csv")
    losses = [[float(line.split(",")[1]) for line in rows(out, "metrics.csv")[1:]] for out in (whole, other)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    data = json.loads((whole / "data.json").read_text())["batches"]
    assert data["texts_per_row"] > 2 and data["packed_share"] < 0.5
    write_report(read_record(whole))
    assert f"| texts in a row, on average | {data['texts_per_row']:.2f} |" in (whole / "report.md").read_text()


def test_a_plan_counts_the_texts_of_a_row(tmp_path: Path) -> None:
    settings = {"model": "nano", "data": str(chats(tmp_path)), "max_length": 128, "eos_tail": 2, "pack": True}
    chosen = TrainSettings.flat(batch_size=4, steps=50, **settings)
    plan = make_plan(chosen, PlanSettings(plan=True, topology="h100:1", compile=False, read_data=True))
    rows = TokenizedRows(chosen.source("train"), BYTES)
    with make_batches(rows, batch_size=4, max_length=128, seed=0, options=chosen.batches.options()) as batches:
        found = batches.outlook(50)
    assert plan.rows.epochs == found.epochs > 50 * 4 * 2 / len(rows)
    maskable = found.supervised / sum(int(width) * 4 * count for width, count in found.widths.items())
    assert plan.rows.masked_share == pytest.approx(maskable / 2) and 0.1 < plan.rows.masked_share < 0.5


def test_remat_auto_compiles_packed_rows_as_the_run_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the run would compile its step a second time."""
    settings = {"model": "nano", "data": str(chats(tmp_path)), "max_length": 128, "eos_tail": 2, "pack": True}
    tried: list[Any] = []

    def compile_step(step: Any) -> Shortage:
        tried.append(step.batch)
        return Shortage(asked=None, has=None, words="")

    monkeypatch.setattr(remat_choice, "compile_step", compile_step)
    monkeypatch.setattr(remat_choice, "memory_of_device", lambda devices: 2**36)
    monkeypatch.setattr(remat_choice.sharding, "platform_of", lambda mesh: "gpu")
    chosen = TrainSettings.flat(out=tmp_path / "run", batch_size=4, steps=2, eval_rows=0, **settings)
    run = prepare(chosen, sharding.make_mesh("1x1"))
    with run.batches:
        batch = next(run.batches)
    assert batch.length_BM is not None and batch.length_BM.shape[1] == run.batches.most_texts < MOST_TEXTS
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), [batch, *tried])
    assert shapes[1:] and all(shape == shapes[0] for shape in shapes[1:])


def stop_after(steps: int) -> Any:
    asked = Counter[str]()

    def requested(_: Any) -> bool:
        asked["times"] += 1
        return asked["times"] % steps == 0

    return requested


def test_sums_by_noise_level_may_be_by_token() -> None:
    nll = np.arange(8, dtype=np.float32).reshape(2, 4)
    masked = np.ones((2, 4), bool)
    by_row = objective.sums_by_time(nll, masked, np.array([0.1, 0.9], np.float32))
    by_token = objective.sums_by_time(nll, masked, np.repeat(np.array([[0.1], [0.9]], np.float32), 4, axis=1))
    np.testing.assert_array_equal(by_row, by_token)
