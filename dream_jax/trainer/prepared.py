"""Makes and checks everything that a run needs besides weights (data, tokenizer, step) before any file is written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from dream_jax import distributed, lora, sharding
from dream_jax.data import Batches, TokenizedRows, first_prompted, longest_row
from dream_jax.model import Dream, merge_params, split_params
from dream_jax.posttraining import BatchSizes, Driver, RunMaterials
from dream_jax.shapes import ParamTree, joined
from dream_jax.tokenizer import Template, Tokenizer
from dream_jax.train_step import AnyStep, TrainState, abstract_state
from dream_jax.trainer import weights
from dream_jax.trainer.build import (
    Build,
    build_step,
    check_length,
    describe_model,
    open_tokenizer,
)
from dream_jax.trainer.folder import begun_remat, check_answer_format, check_folder, holds_checkpoint
from dream_jax.trainer.heldout import Grid, GridScore, lay_out_held_out, rows_at_once
from dream_jax.trainer.loggers import check_loggers
from dream_jax.trainer.remat_choice import RematChoice, choose_for_run
from dream_jax.trainer.samples import When, take_samples
from dream_jax.trainer.scoring import evaluate
from dream_jax.trainer.setting_groups import DeviceSettings
from dream_jax.trainer.settings import TrainSettings
from dream_jax.trainer.space import check_space


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run before its first step: the settings and the objects made from them, without weights.

    Attributes:
      settings: the settings of the run.
      mesh: the mesh of all devices of the run.
      built: the objective, its compiled step, and the model and optimizer that it was made from.
      tokenizer: the tokenizer of the model.
      template: how prompts are converted to tokens ("raw" or "chat"); it is saved, because sampling must use the same.
      instruction: the text before each question, "" for none; it is saved with the template.
      max_length: length of the rows in tokens.
      rows: the rows of training, as text and as tokens.
      sizes: how the batches are laid out.
      batches: an iterator over the training batches; each has the rows that this process reads.
      held_out: the held-out rows; None without evaluation.
      grid: the held-out rows with masks at fixed noise levels; None without evaluation, or if no row fits `max_length`.
      remat: the choice of the policy in `model.remat`, with its reason; None if the settings name the policy.
    """

    settings: TrainSettings
    mesh: Mesh
    built: Build
    tokenizer: Tokenizer
    template: Template
    instruction: str
    max_length: int
    rows: TokenizedRows
    sizes: BatchSizes
    batches: Batches
    held_out: TokenizedRows | None
    grid: Grid | None
    remat: RematChoice | None

    @property
    def model(self) -> Dream:
        """The model with shapes instead of weights."""
        return self.built.model

    @property
    def graphdef(self) -> nnx.GraphDef[Dream]:
        """The model without its parameters, for `merge_params`."""
        return self.built.graphdef

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The transformation from gradients to updates."""
        return self.built.optimizer

    @property
    def step(self) -> AnyStep:
        """The training step, which is compiled at its first call."""
        return self.built.step

    def driver(self, say: Callable[[str], None]) -> Driver:
        """Returns what takes the steps of the run; `say` prints a line, and keeps warnings as incidents."""
        run = RunMaterials(
            materials=self.built.materials,
            mesh=self.mesh,
            tokenizer=self.tokenizer,
            template=self.template,
            instruction=self.instruction,
            rows=self.rows,
            held_out=self.held_out,
            held_out_rows=self.settings.evaluation.eval_rows,
            sizes=self.sizes,
            folder=self.settings.run.out,
            first_params=self._first_params,
            say=say,
        )
        return self.built.objective.driver(self.built.step, run)

    def _first_params(self) -> ParamTree:
        """Reads the weights to train as they were before the first step. Raises as `weights.read`."""
        params, _ = weights.read(self.settings, self.mesh, self.model.compute_dtype.name, begins=True)
        assert params is not None, "a run that begins reads them"
        return params

    def abstract_state(self) -> TrainState:
        """Returns shapes and shardings of the trained parameters and of the optimizer state."""
        params = split_params(self.model)[1]
        trained = lora.split(params)[0] if self.settings.lora.adapts else params
        return abstract_state(trained, self.optimizer, self.mesh)

    def check_space(self) -> str:
        """Returns a line about the space on the disk that the run needs. All processes must call this.

        Raises:
          OSError: the first checkpoint does not fit.
        """
        resumes = holds_checkpoint(self.settings)
        if jax.process_index():
            return ""
        state_bytes = _nbytes(self.abstract_state())
        params, lora_settings = split_params(self.model)[1], self.settings.lora
        export_bytes = _nbytes(lora.split(params)[0]) if lora_settings.adapts else 0
        if lora_settings.merge or not lora_settings.adapts:
            export_bytes += self.model.config.num_parameters * self.model.embed.embedding.dtype.itemsize
        return check_space(self.settings, state_bytes, export_bytes, evaluates=self.grid is not None, resumes=resumes)

    def model_of(self, trained: ParamTree, frozen: ParamTree) -> Dream:
        """Returns the model with these weights; `frozen` is empty without an adapter."""
        return merge_params(self.graphdef, joined(frozen, trained))

    def take_samples(self, model: Dream, when: When) -> None:
        """Answers a few held-out prompts, unless the settings disable it; see `samples.take_samples`."""
        if self.held_out is not None and self.settings.evaluation.samples:
            take_samples(model, self.held_out, self.settings, self.max_length, self.mesh, when)

    def evaluate(self, model: Dream, score: GridScore | None) -> dict[str, Any]:
        """Returns what `scoring.evaluate` returns for the held-out rows; an empty dict without such rows."""
        if self.held_out is None:
            return {}
        return evaluate(model, self.held_out, self.settings, self.max_length, self.mesh, score)


def _nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def join_devices(devices: DeviceSettings) -> None:
    """Connects this process to the other processes of the run, if any. Raises ValueError as `distributed.join`."""
    distributed.join(
        num_devices=math.prod(sharding.parse_mesh_shape(devices.mesh)),
        coordinator=devices.coordinator,
        num_processes=devices.num_processes,
        process_id=devices.process_id,
        cluster=devices.cluster,
    )


def prepare(settings: TrainSettings, mesh: Mesh, say: Callable[[str], None] = lambda text: None) -> PreparedRun:
    """Opens the data and makes the step, so that errors in the settings are raised before any weights are read.

    Args:
      settings: the settings of the run.
      mesh: the mesh of all devices of the run.
      say: prints a line about the tokens of the data, if they are kept on the disk.

    Raises:
      ValueError, OSError: settings, data or files are wrong or do not fit together.
      ModuleNotFoundError: the package of a logger is not installed.
    """
    fsdp = dict(mesh.shape)["fsdp"]
    if fsdp % jax.process_count():
        raise ValueError(
            f"mesh {settings.devices.mesh} divides the batch among fsdp={fsdp} devices, but {jax.process_count()} "
            "processes read rows: fsdp must be a multiple of the number of processes"
        )
    check_loggers(settings.logs.log_to)
    objective = settings.objective()
    resumes = check_folder(settings)
    model = describe_model(settings, mesh)
    tokenizer = open_tokenizer(settings, model)
    cache = settings.token_cache(tokenizer, say)
    source = settings.tokens("train", cache).source
    held_out = settings.tokens("test", cache) if settings.evaluation.eval_rows else None
    for one in (source, None if held_out is None else held_out.source):
        if one is not None:
            objective.check_rows(one)
    if resumes:
        check_answer_format(settings, source)
    first = first_prompted(source)
    rows = objective.tokenize(source, tokenizer, settings.rows.encode_options())
    options = settings.batches.options()
    max_length = settings.rows.max_length or longest_row(rows)
    check_length(model, max_length)
    # With remat "auto" this step is not used, but settings that do not fit together are refused before rows are measured.
    built, choice = build_step(settings, model, mesh), None
    sizes = BatchSizes(
        batch_size=settings.batches.batch_size,
        max_length=max_length,
        seed=settings.run.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        options=options,
    )
    batches = objective.batches(rows, sizes)
    if settings.network.remat == "auto":
        begun = begun_remat(settings.run.out) if resumes else None
        built, choice = choose_for_run(settings, mesh, max_length, begun, batches.most_texts)
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
        built=built,
        tokenizer=tokenizer,
        template="raw" if isinstance(first.prompt, str) else "chat",
        instruction=first.instruction,
        max_length=max_length,
        rows=rows,
        sizes=sizes,
        batches=batches,
        held_out=held_out,
        grid=grid,
        remat=choice,
    )
