"""What the settings of a run stand for, checked before anything is written: data, tokenizer, step, held-out rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from dream_jax import distributed, lora, sharding
from dream_jax.data import Batches, TokenizedRows, longest_row, make_batches
from dream_jax.model import Dream, merge_params, split_params
from dream_jax.shapes import ParamTree, joined
from dream_jax.tokenizer import Template, Tokenizer
from dream_jax.train_step import TrainState, TrainStep, abstract_state
from dream_jax.trainer.build import (
    build_step,
    check_length,
    describe_model,
    open_tokenizer,
)
from dream_jax.trainer.folder import check_folder
from dream_jax.trainer.heldout import Grid, GridScore, lay_out_held_out, rows_at_once
from dream_jax.trainer.loggers import check_loggers
from dream_jax.trainer.samples import When, take_samples
from dream_jax.trainer.scoring import evaluate
from dream_jax.trainer.setting_groups import DeviceSettings
from dream_jax.trainer.settings import TrainSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """The settings, and what was made of them: nothing large, and nothing on the disk yet.

    Attributes:
      settings: of the run.
      mesh: all of its devices.
      model: shapes only.
      graphdef: the static part of the model.
      tokenizer: of the model.
      template: how the prompts of the rows become tokens; the trained model should be asked in the same way.
      max_length: tokens a row.
      batches: of the training rows, as this process reads them.
      held_out: None when nothing is to be evaluated.
      grid: the held-out rows at fixed noise levels; None when no row fits.
      optimizer: turns gradients into updates.
      step: compiled at its first call.
    """

    settings: TrainSettings
    mesh: Mesh
    model: Dream
    graphdef: nnx.GraphDef[Dream]
    tokenizer: Tokenizer
    template: Template
    max_length: int
    batches: Batches
    held_out: TokenizedRows | None
    grid: Grid | None
    optimizer: optax.GradientTransformation
    step: TrainStep

    def abstract_state(self) -> TrainState:
        """Shapes and shardings of what is trained and of the optimizer's state."""
        params = split_params(self.model)[1]
        trained = lora.split(params)[0] if self.settings.lora.adapts else params
        return abstract_state(trained, self.optimizer, self.mesh)

    def model_of(self, trained: ParamTree, frozen: ParamTree) -> Dream:
        """The model with these weights."""
        return merge_params(self.graphdef, joined(frozen, trained))

    def take_samples(self, model: Dream, when: When) -> None:
        """Answers a few held-out prompts, if the settings ask for it; see `samples`."""
        if self.held_out is not None and self.settings.evaluation.samples:
            take_samples(model, self.held_out, self.settings, self.max_length, self.mesh, when)

    def evaluate(self, model: Dream, score: GridScore | None) -> dict[str, Any]:
        """What `scoring.evaluate` finds on the held-out rows; empty without such rows."""
        if self.held_out is None:
            return {}
        return evaluate(model, self.held_out, self.settings, self.max_length, self.mesh, score)


def join_devices(devices: DeviceSettings) -> Mesh:
    """Joins the other processes of the run, if there are any, and lays the mesh over the devices of all.

    Raises:
      ValueError: as `distributed.join` and `sharding.make_mesh`.
    """
    distributed.join(
        num_devices=math.prod(sharding.parse_mesh_shape(devices.mesh)),
        coordinator=devices.coordinator,
        num_processes=devices.num_processes,
        process_id=devices.process_id,
        cluster=devices.cluster,
    )
    return sharding.make_mesh(devices.mesh)


def prepare(settings: TrainSettings, mesh: Mesh) -> PreparedRun:
    """Reads the data and makes the step. Whatever can be wrong with the settings shows here, before any weights are read.

    Raises:
      ValueError, OSError: settings, data or files that do not fit.
    """
    fsdp = dict(mesh.shape)["fsdp"]
    if fsdp % jax.process_count():
        raise ValueError(
            f"mesh {settings.devices.mesh} splits the batch {fsdp} ways, but there are {jax.process_count()} "
            "processes that read rows of their own: fsdp must be a multiple of their number"
        )
    check_loggers(settings.logs.log_to)
    source = settings.source("train")
    test_source = settings.source("test") if settings.evaluation.eval_rows else None
    check_folder(settings)
    model = describe_model(settings, mesh)
    tokenizer = open_tokenizer(settings, model)
    encoding, options = settings.rows.encode_options(), settings.batches.options()
    rows = TokenizedRows(source, tokenizer, encoding)
    held_out = None if test_source is None else TokenizedRows(test_source, tokenizer, encoding)
    max_length = settings.rows.max_length or longest_row(rows)
    check_length(model, max_length)
    built = build_step(settings, model, mesh)
    evaluated = (
        [] if held_out is None else [row for _, row in held_out.first(settings.evaluation.eval_rows, max_length)]
    )
    grid = None
    if evaluated:
        laid_out = lay_out_held_out(evaluated, max_length, tokenizer.pad_id, options)
        grid = Grid(laid_out, rows_at_once(settings, mesh, len(evaluated)), mesh)
    return PreparedRun(
        settings=settings,
        mesh=mesh,
        model=model,
        graphdef=built.graphdef,
        tokenizer=tokenizer,
        template="raw" if isinstance(source[0].prompt, str) else "chat",
        max_length=max_length,
        batches=make_batches(
            rows,
            batch_size=settings.batches.batch_size,
            max_length=max_length,
            seed=settings.run.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            options=options,
        ),
        held_out=held_out,
        grid=grid,
        optimizer=built.optimizer,
        step=built.step,
    )
