"""What every objective of a training run supplies, and what it receives from the trainer."""

from __future__ import annotations

import abc
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from dream_jax import sharding
from dream_jax.batch import Batch
from dream_jax.data import Batches, BatchOptions, EncodeOptions, RowSource, TokenizedRows, check_no_pairs, make_batches
from dream_jax.model import Dream
from dream_jax.shapes import ParamTree
from dream_jax.tokenizer import Template, Tokenizer
from dream_jax.train_step import AnyStep, StepConfig, TrainState, put_batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """How the batches of a run are laid out.

    Attributes:
      batch_size: number of rows (or prompts, or pairs) of a batch, over all devices and processes.
      max_length: number of tokens of a row.
      seed: decides the order of the rows and the random choices in the layout.
      process_index, process_count: which of the processes reads these batches, and the number of processes.
      options: the options of the layout.
    """

    batch_size: int
    max_length: int
    seed: int
    process_index: int
    process_count: int
    options: BatchOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMaterials:
    """What a step is made from. There are no weights, and the devices of the mesh need not be present.

    Attributes:
      model: the model with shapes instead of weights.
      graphdef: the model without its parameters, for `merge_params`.
      adapts: whether an adapter is trained and all other weights are frozen.
      optimizer: the transformation from gradients to updates.
      schedule: the learning rate by number of updates, for the metric `learning_rate`.
      config: batch size, accumulation, seed, mask and products of the step.
      mesh: the mesh of the run.
    """

    model: Dream
    graphdef: nnx.GraphDef[Dream]
    adapts: bool
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    config: StepConfig
    mesh: sharding.AnyMesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunMaterials:
    """What the driver of a run may need besides the step.

    Attributes:
      materials: what the step was made from.
      mesh: the mesh of the run, with its devices.
      tokenizer: the tokenizer of the model.
      template: how prompts are converted to tokens.
      instruction: the text before each question; "" for none.
      rows: the rows of training, as text and as tokens.
      held_out: the held-out rows; None without evaluation.
      held_out_rows: number of held-out rows to score.
      sizes: how the batches are laid out.
      folder: the folder of the run, for files of the objective's own. It may not be there yet when the driver is made.
      first_params: reads the weights to train as they were before the first step, also in a resumed run.
      say: prints a line; the text after "warning: " is kept as an incident of the run.
    """

    materials: StepMaterials
    mesh: Mesh
    tokenizer: Tokenizer
    template: Template
    instruction: str
    rows: TokenizedRows
    held_out: TokenizedRows | None
    held_out_rows: int
    sizes: BatchSizes
    folder: pathlib.Path
    first_params: Callable[[], ParamTree]
    say: Callable[[str], None]


class Driver:
    """Takes the steps of a run, one for each call; subclasses do more than to call the compiled step."""

    def __init__(self, step: AnyStep, mesh: Mesh):
        self._step, self._mesh = step, mesh

    def begin(self, state: TrainState, frozen: ParamTree) -> None:
        """Is called once before the first step of each start of the command, when the folder and the weights are there.

        `state` is the state before the next step, and `frozen` are the parameters that are not trained. In a resumed run
        `set_state` was called before. Here a driver may compute what it needs for all steps.
        """

    def __call__(
        self, state: TrainState, batch: Batch[np.ndarray], frozen: ParamTree
    ) -> tuple[TrainState, Mapping[str, jax.Array | float]]:
        """Takes one step.

        Args:
          state: the state before the step; it is donated.
          batch: the rows of the global batch that this process reads.
          frozen: the parameters that are not trained; empty without an adapter.

        Returns:
          The new state and the metrics of the step, scalars by name.
        """
        return self._step(state, put_batch(batch, self._mesh), frozen)

    def evaluate(self, params: ParamTree, frozen: ParamTree) -> dict[str, float]:
        """Returns scores of these weights on held-out rows, by the names in `Objective.evaluated`."""
        return {}

    def get_state(self) -> dict[str, Any]:
        """Returns what must be in a checkpoint for the next call to be repeated bit for bit, as JSON can represent it."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a result of `get_state`, which is empty for a checkpoint without one."""


class Objective(abc.ABC):
    """What a run learns from its rows. The package's docstring says what each method is for.

    Attributes:
      name: the value of --objective.
      metrics: names of the columns of `metrics.csv` that only this objective has.
      evaluated: names of the columns of `eval.csv` that only this objective has.
      rate_factor: the default learning rate is that of `sft` times this number.
      has_mfu: whether the operations of a step follow from the shape of its batch, so that its MFU can be shown.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = ()
    evaluated: ClassVar[tuple[str, ...]] = ()
    rate_factor: ClassVar[float] = 1.0
    has_mfu: ClassVar[bool] = True

    @property
    def computed_rows(self) -> int:
        """Number of rows that a step computes forward and backward for each row of the settings' batch size."""
        return 1

    @property
    def microbatches(self) -> int:
        """Number of microbatches that a step computes one after the other for each microbatch of the settings."""
        return 1

    @property
    def updates_per_step(self) -> int:
        """Number of updates of the optimizer in a step of the loop."""
        return 1

    @property
    def forward_rows(self) -> int:
        """Number of rows that a step computes only forward, for each row of the settings' batch size."""
        return 0

    def check_options(  # noqa: B027 - most objectives read all options
        self, options: BatchOptions, encoding: EncodeOptions
    ) -> None:
        """Raises ValueError for options of batches or rows that have no meaning for this objective."""

    def check_rows(self, source: RowSource) -> None:
        """Raises ValueError, with file and line, for rows that this objective cannot learn from."""
        check_no_pairs(source, self.name)

    def tokenize(self, source: RowSource, tokenizer: Tokenizer, options: EncodeOptions) -> TokenizedRows:
        """Returns the rows of training as tokens."""
        return TokenizedRows(source, tokenizer, options)

    def batches(self, rows: TokenizedRows, sizes: BatchSizes) -> Batches:
        """Returns the endless iterator over the batches of this process.

        Raises:
          ValueError: as `make_batches`.
        """
        return make_batches(
            rows,
            batch_size=sizes.batch_size,
            max_length=sizes.max_length,
            seed=sizes.seed,
            process_index=sizes.process_index,
            process_count=sizes.process_count,
            options=sizes.options,
        )

    def batch_shapes(self, batch: Batch[jax.ShapeDtypeStruct]) -> Batch[jax.ShapeDtypeStruct]:
        """Returns the shapes of a batch of this objective, from those of a batch of `sft` with the same settings."""
        return batch

    @abc.abstractmethod
    def step(self, materials: StepMaterials) -> AnyStep:
        """Returns the step, which is compiled at its first call.

        Raises:
          ValueError: the settings do not fit together, or the mesh cannot divide the batch.
        """

    def driver(self, step: AnyStep, run: RunMaterials) -> Driver:
        """Returns the driver of a run that takes this step."""
        return Driver(step, run.mesh)

    def line(self, row: Mapping[str, float]) -> str:
        """Returns the metrics of a step that the terminal shows beside the loss, as text."""
        return f"masked acc {row['masked_accuracy']:.3f}"
