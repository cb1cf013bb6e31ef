"""Takes the steps of a run on preferences: it knows the bounds of the reference, and scores held-out pairs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import numpy as np

from dream_jax import distributed, sharding
from dream_jax.batch import Batch, PairBatch
from dream_jax.data import PairRows, TokenPair, first_numbers, kept_pairs, lay_out_pairs
from dream_jax.files import replacing
from dream_jax.posttraining.answer_bounds import pair_key
from dream_jax.posttraining.base import Driver, RunMaterials
from dream_jax.posttraining.pair_metrics import pair_margins, pair_sums
from dream_jax.shapes import ParamTree, joined
from dream_jax.train_step import AnyStep, TrainState

FILE = "reference.npz"
"""The file in the folder of a run with the bounds of the reference."""
HELD_OUT_DRAWS = 8
"""The smallest number of noise levels with which held-out pairs are scored; they are the same at every evaluation."""

Which = Literal["policy", "reference"]
"""The model whose noise is taken, where policy and reference have different noise."""


class Bounds(Protocol):
    """The function that estimates bounds, `preferences.Preference.bounds` for one run."""

    def __call__(
        self, params: ParamTree, arrays: Mapping[str, Any], draws: int, which: Which, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Returns the bounds, float32 [P, 2], and more that is not used here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairScorer:
    """What the driver needs of an objective.

    Attributes:
      kind: "vrpo" or "simpo".
      draws: number of noise levels of a bound in a step.
      stores: whether the bounds of the reference are computed before the first step.
      bounds: estimates bounds.
      without_adapter: switches the adapter off in parameters; None if that is not the reference.
      about: settings on which stored bounds depend.
    """

    kind: Literal["vrpo", "simpo"]
    draws: int
    stores: bool
    bounds: Bounds
    without_adapter: Callable[[ParamTree], ParamTree] | None
    about: Mapping[str, Any]


def pair_arrays(batch: PairBatch[Any]) -> dict[str, Any]:
    """Returns the arrays of a batch by name, [P, 2, ...]: `tokens`, `maskable`, `valid`, `draw`, `row`, `reference`."""
    found = {
        "tokens": batch.tokens_BT,
        "maskable": batch.maskable_BT,
        "valid": batch.valid_BT,
        "draw": batch.draw_B,
        "row": batch.row_B,
        "reference": batch.reference_B,
    }
    return {name: x.reshape(-1, 2, *x.shape[1:]) for name, x in found.items() if x is not None}


def _digest(batch: PairBatch[np.ndarray] | None) -> str:
    """Returns a digest of the tokens of held-out pairs and of what is masked in them; "" without such pairs."""
    if batch is None:
        return ""
    found = hashlib.blake2b(batch.tokens_BT.tobytes(), digest_size=8)
    found.update(batch.maskable_BT.tobytes())
    return found.hexdigest()


class PairDriver(Driver):
    """Gives each batch the bounds of the reference, and scores held-out pairs."""

    def __init__(self, step: AnyStep, run: RunMaterials, scorer: PairScorer):
        super().__init__(step, run.mesh)
        self._run, self._scorer = run, scorer
        self._bounds_of: dict[int, np.ndarray] = {}  # pair -> its two bounds under the reference
        self._held_out: PairBatch[np.ndarray] | None = None
        self._held_out_reference: np.ndarray | None = None
        shards = dict(run.mesh.shape)["fsdp"]
        rows = max(1, run.sizes.batch_size // run.materials.config.accumulation)
        self._chunk = -(-rows // shards) * shards
        self._jitted: dict[tuple[int, Which], Any] = {}

    def begin(self, state: TrainState, frozen: ParamTree) -> None:
        """Reads the held-out pairs and, under a stored reference, computes its bounds or reads them from the file."""
        run, scorer = self._run, self._scorer
        if run.held_out is not None:
            rows = PairRows(run.held_out.source, run.tokenizer, run.held_out.options)
            numbers = first_numbers(rows.source, run.held_out_rows)
            fitting = [
                number for number in numbers if not isinstance(rows.fit(rows[number], run.sizes.max_length), str)
            ]
            if fitting:
                self._held_out = self._laid_out([rows.fitted(one, run.sizes.max_length) for one in fitting], fitting)
        if scorer.stores:
            self._read_or_store(state, frozen)
        elif scorer.without_adapter is not None and self._held_out is not None:
            off = joined(frozen, scorer.without_adapter(state.params))
            self._held_out_reference = self._score(off, self._held_out, held_out=True, which="reference")

    def __call__(
        self, state: TrainState, batch: Batch[np.ndarray], frozen: ParamTree
    ) -> tuple[TrainState, Mapping[str, jax.Array | float]]:
        """Takes one step."""
        if self._scorer.stores:
            assert isinstance(batch, PairBatch)
            pairs = batch.draw_B.reshape(-1, 2)[:, 0].tolist()
            reference_B = np.concatenate([self._bounds_of[pair] for pair in pairs])
            batch = dataclasses.replace(batch, reference_B=reference_B)
        return super().__call__(state, batch, frozen)

    def evaluate(self, params: ParamTree, frozen: ParamTree) -> dict[str, float]:
        """Returns the means of `pair_metrics.METRICS` over the held-out pairs, and `pairs`, their number."""
        held_out = self._held_out
        if held_out is None:
            return {"pairs": 0.0}
        bound_PA = self._score(joined(frozen, params), held_out, held_out=True)
        size_PA = held_out.maskable_BT.sum(1).reshape(-1, 2).astype(np.float32)
        margin_P = pair_margins(self._scorer.kind, bound_PA, self._held_out_reference, size_PA)
        sums = pair_sums(margin_P, bound_PA, self._held_out_reference)
        count = len(size_PA)
        return {f"pair_{name}": float(value) / count for name, value in sums.items()} | {"pairs": float(count)}

    # ---------------------------------------------------------------------------------------------------- reference

    def _read_or_store(self, state: TrainState, frozen: ParamTree) -> None:
        """Reads the bounds of the reference from the file, or before the first step computes and writes them.

        Raises:
          ValueError: the run has taken steps, and there is no file, or it is damaged or of other pairs or settings.
        """
        run, path = self._run, self._run.folder / FILE
        assert isinstance(run.rows, PairRows)
        kept = kept_pairs(run.rows, run.sizes.max_length)
        identity = {
            "pairs": kept.digest,
            "max_length": run.sizes.max_length,
            "layout": str(run.sizes.options),
            "seed": run.materials.config.seed,
            **self._scorer.about,
        }
        if int(state.step):
            remedy = "restore it from a copy, or begin a new run with another --out"
            try:
                with np.load(path, allow_pickle=False) as file:
                    found, numbers_P, bound_PA = json.loads(str(file["identity"])), file["pairs"], file["bounds"]
                    held_out_PA, held_out_digest = file["held_out"], str(file["held_out_digest"])
            except (OSError, ValueError, KeyError, EOFError) as error:
                raise ValueError(f"{path}, the bounds of the reference, cannot be read ({error}); {remedy}") from error
            if found != identity:
                raise ValueError(f"{path} has bounds of other pairs or settings ({found}, now {identity}); {remedy}")
        else:
            numbers_P = np.asarray(kept.numbers)
            run.say(f"bounds of the reference: computing those of {len(numbers_P):,} pairs, for {path.name}")
            weights = joined(frozen, state.params)
            bound_PA = np.zeros((len(numbers_P), 2), np.float32)
            for start in range(0, len(numbers_P), self._chunk):
                chunk = numbers_P[start : start + self._chunk].tolist()
                laid = self._laid_out([run.rows.fitted(one, run.sizes.max_length) for one in chunk], chunk)
                bound_PA[start : start + len(chunk)] = self._score(weights, laid, which="reference")
            held_out, held_out_digest = self._held_out, _digest(self._held_out)
            held_out_PA = np.zeros((0, 2), np.float32)
            if held_out is not None:
                held_out_PA = self._score(weights, held_out, held_out=True, which="reference")
            if jax.process_index() == 0:
                with replacing(path) as temporary, temporary.open("wb") as file:
                    np.savez(
                        file,
                        identity=json.dumps(identity),
                        pairs=numbers_P,
                        bounds=bound_PA,
                        held_out=held_out_PA,
                        held_out_digest=_digest(held_out),
                    )
            distributed.barrier("preferences.reference")
        self._bounds_of = dict(zip(numbers_P.tolist(), bound_PA, strict=True))
        self._held_out_reference = held_out_PA
        held_out_pairs = 0 if self._held_out is None else len(self._held_out.row_B) // 2
        if held_out_pairs != len(held_out_PA):  # --eval-rows is another number than at the beginning
            raise ValueError(
                f"{path} has the bounds of {len(held_out_PA)} held-out pairs, but the settings name {held_out_pairs}: give "
                "the --eval-rows with which the run began"
            )
        if held_out_digest != _digest(self._held_out):
            raise ValueError(
                f"{path} has the bounds of other held-out pairs: evaluate on those with which the run began"
            )

    # ------------------------------------------------------------------------------------------------------- scores

    def _laid_out(self, pairs: Sequence[TokenPair], numbers: Sequence[int]) -> PairBatch[np.ndarray]:
        sizes, pad_id = self._run.sizes, self._run.tokenizer.pad_id
        return lay_out_pairs(pairs, sizes.max_length, pad_id, sizes.options, np.arange(len(pairs)), np.array(numbers))

    def _score(
        self, params: ParamTree, batch: PairBatch[np.ndarray], *, held_out: bool = False, which: Which = "policy"
    ) -> np.ndarray:
        """Returns the bounds of both answers of each pair, float32 [P, 2]; every process has all pairs."""
        draws = max(self._scorer.draws, HELD_OUT_DRAWS) if held_out else self._scorer.draws
        if (draws, which) not in self._jitted:

            def bounds(params: ParamTree, arrays: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
                return self._scorer.bounds(params, arrays, draws, which, key)[0]

            replicated = sharding.replicated(self._mesh)
            self._jitted[draws, which] = jax.jit(bounds, out_shardings=replicated)
        key = pair_key(self._run.materials.config.seed, held_out=held_out)
        arrays, found = pair_arrays(batch), []
        for start in range(0, len(batch.row_B) // 2, self._chunk):
            # The last chunk is filled up with copies of its first pair, so that all chunks have one size.
            index = np.arange(start, start + self._chunk)
            chunk = {name: x[np.where(index < len(x), index, start)] for name, x in arrays.items()}
            with jax.set_mesh(self._mesh):
                scored = np.asarray(self._jitted[draws, which](params, chunk, key))
            found.append(scored[: len(batch.row_B) // 2 - start])
        return np.concatenate(found)
