"""Orbax: the converted directory that holds a model, and the checkpoints of a training run.

A converted directory has `config.json`, tokenizer files, `dream_jax.json` (what the weights are, and every
file of them with its size) and `weights/`: one small Orbax checkpoint for the embedding, one for each layer
and one for the rest, so that a model can be written and read piece by piece.

Knows Orbax. Knows nothing of Hugging Face, of models beyond their shapes, or of training beyond a tree of
arrays.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dream_jax import distributed, files, masks
from dream_jax.config import DreamConfig
from dream_jax.model import abstract_model, split_params
from dream_jax.shapes import ParamTree
from dream_jax.sharding import parameter_specs

DESCRIPTION = "dream_jax.json"
WEIGHTS = "weights"
FORMAT = 1
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of the model that is written and read at once.

    Attributes:
      name: its folder.
      layer: which layer it is, or None.
      shapes: its parameters as shapes and dtypes, a layer's without the layer axis; the keys lead with
        "layers" too.
      specs: their places on the mesh (empty without one).
    """

    name: str
    layer: int | None
    shapes: ParamTree
    specs: ParamTree

    @property
    def nbytes(self) -> int:
        """Size of its weights."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.shapes))


def units(config: DreamConfig, dtype: jax.typing.DTypeLike, mesh: Mesh | None = None) -> list[Unit]:
    """The parts of a model of this configuration: embedding, layers, the rest."""
    shapes = _shapes(config, jnp.dtype(dtype).name)
    specs = {} if mesh is None else parameter_specs(shapes, mesh)
    rest = [key for key in shapes if key not in ("embed", "layers")]
    outside = [("embed", ["embed"]), ("head", rest)]
    first, last = (Unit(name, None, _only(shapes, keys), specs and _only(specs, keys)) for name, keys in outside)
    layer_shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes["layers"])
    layer_specs = specs and _map_specs(lambda spec: PartitionSpec(*spec[1:]), specs["layers"])
    middle = [
        Unit(f"layer_{layer:03d}", layer, {"layers": layer_shapes}, specs and {"layers": layer_specs})
        for layer in range(config.num_hidden_layers)
    ]
    return [first, *middle, last]


@functools.lru_cache(maxsize=8)  # tracing takes a tenth of a second
def _shapes(config: DreamConfig, dtype: str) -> ParamTree:
    return split_params(abstract_model(config, param_dtype=dtype))[1]


def _only(tree: ParamTree, keys: Iterable[str]) -> ParamTree:
    return {key: tree[key] for key in keys}


def _map_specs(function: Callable[[PartitionSpec], Any], specs: ParamTree) -> ParamTree:
    return jax.tree.map(function, specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def unit_shardings(unit: Unit, mesh: Mesh) -> ParamTree:
    """Sharding of each parameter of a unit that was made for this mesh."""
    return _map_specs(lambda spec: NamedSharding(mesh, spec), unit.specs)


# By default Orbax cuts arrays that are the same on several devices and lets each write a piece: more files than
# shards, and a compilation for every shape.
_HANDLERS = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False)),
    (np.ndarray, ocp.type_handlers.NumpyHandler()),
    *((kind, ocp.type_handlers.ScalarHandler()) for kind in (int, float, np.number)),
)


def _checkpointer() -> ocp.Checkpointer:
    # Plain zarr, one file a shard: twice as fast to write as the OCDBT database. Weights do not compress.
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=_HANDLERS)
    )


# Orbax warns at every save without OCDBT that there is no OCDBT to merge, and prints the stack of an error in
# one of its threads besides raising it in ours.
_NOISE = ("Skipping merge of OCDBT", "_SignalingThread.run() raised an exception")


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    def keep(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in _NOISE)

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def write_unit(directory: pathlib.Path, unit: Unit, params: ParamTree) -> None:
    """Writes one unit of a converted directory, one file a shard; returns when it is on disk.

    Raises:
      ValueError: the parameters are not the unit's.
      OSError: the disk is full.
    """
    differences = _differences(unit.shapes, params)
    if differences:
        raise ValueError(f"{unit.name} cannot be written: {'; '.join(differences)}")
    path = directory.resolve() / WEIGHTS / unit.name
    try:
        with _checkpointer() as checkpointer, _without_noise():
            checkpointer.save(path, args=ocp.args.PyTreeSave(params))
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # tensorstore reports the system's errors as ValueError
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise OSError(errno.ENOSPC, f"the disk is full: {path} needs {unit.nbytes} bytes") from error
        raise


def write_description(
    directory: pathlib.Path, config: DreamConfig, dtype: jax.typing.DTypeLike, mask: str = "bidirectional"
) -> None:
    """Writes `dream_jax.json`, the last file of a converted directory: without it nothing loads.

    `mask` is the name of the one that the weights were trained under.
    """
    parameters = config.num_parameters
    description = {
        "format": FORMAT,
        "dtype": jnp.dtype(dtype).name,
        "parameters": parameters,
        "mask": mask,
        "files": written_files(directory),
    }
    text = json.dumps(description, indent=1) + "\n"
    (directory / DESCRIPTION).write_text(text, encoding="utf-8")


def written_files(directory: pathlib.Path) -> dict[str, int]:
    """Every file of weights in a directory with its size, by relative path; for `check_files`."""
    files = (path for path in (directory / WEIGHTS).rglob("*") if path.is_file())
    return dict(sorted((path.relative_to(directory).as_posix(), path.stat().st_size) for path in files))


def check_files(directory: pathlib.Path, files: Mapping[str, int], remedy: str) -> None:
    """Raises FileNotFoundError or ValueError when a file is missing or of another size than was written."""
    for name, size in files.items():
        file = directory / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {remedy}")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, but {size} were written; {remedy}")


def is_converted(directory: pathlib.Path) -> bool:
    """Whether a directory is a converted one."""
    return (directory / DESCRIPTION).is_file()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What `dream_jax.json` says: dtype of the weights, their number, and the files that hold them."""

    dtype: np.dtype
    parameters: int
    files: Mapping[str, int]


def read_description(directory: pathlib.Path, config: DreamConfig) -> Description:
    """Reads and checks `dream_jax.json` against the configuration and the files that are there.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: another format, another configuration's weights, or a file of another size than was written.
    """
    path, fields = directory / DESCRIPTION, _description_fields(directory)
    missing = [key for key in ("dtype", "parameters", "files") if key not in fields]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; convert the source again")
    description = Description(dtype=jnp.dtype(fields["dtype"]), parameters=fields["parameters"], files=fields["files"])
    expected = config.num_parameters
    if description.parameters != expected:
        raise ValueError(f"{path} describes {description.parameters} parameters, but config.json makes {expected}")
    check_files(directory, description.files, "convert the source again")
    return description


def _description_fields(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / DESCRIPTION
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        found = fields.get("format") if isinstance(fields, dict) else fields
        raise ValueError(
            f"{path} has format {found!r}, but this version reads format {FORMAT}; convert the source again"
        )
    return fields


def read_mask(directory: pathlib.Path) -> str:
    """The name of the mask that a converted directory's weights were trained under; bidirectional where it says nothing.

    Raises:
      ValueError: another format, or no name of a mask.
    """
    name = str(_description_fields(directory).get("mask", "bidirectional"))
    try:
        masks.parse(name)
    except ValueError as error:
        raise ValueError(f"{directory / DESCRIPTION}: {error}") from error
    return name


def read_unit(directory: pathlib.Path, unit: Unit, mesh: Mesh | None = None) -> ParamTree:
    """One unit's parameters in the dtype of its shapes: numpy arrays, or sharded jax arrays on the mesh.

    Raises:
      ValueError: the folder holds other parameters.
    """
    path = directory.resolve() / WEIGHTS / unit.name
    target = unit.shapes
    if mesh is not None:
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            unit.shapes,
            unit_shardings(unit, mesh),
        )
    args = ocp.checkpoint_utils.construct_restore_args(target)
    with _checkpointer() as checkpointer:
        stored = checkpointer.metadata(path).item_metadata.tree
        differences = _differences(stored, target, dtypes=False)
        if differences:
            raise ValueError(f"{path} does not fit config.json: {'; '.join(differences)}")
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(target, restore_args=args))


def load_params(
    directory: str | pathlib.Path, config: DreamConfig, dtype: jax.typing.DTypeLike, mesh: Mesh | None = None
) -> ParamTree:
    """Reads a converted directory into stacked parameters, on any mesh and in any dtype.

    Needs the memory of the result and of one unit.

    Raises:
      FileNotFoundError, ValueError: as `read_description`.
    """
    directory = pathlib.Path(directory)
    read_description(directory, config)
    first, *layers, last = units(config, dtype, mesh)
    stacked_shapes = _shapes(config, jnp.dtype(dtype).name)["layers"]
    params: ParamTree = {}
    for unit in (first, last):  # the largest units first, while there is still room
        params |= jax.tree.map(jnp.asarray, read_unit(directory, unit, mesh))
        jax.block_until_ready(params)
    params["layers"] = _zeros(stacked_shapes, layers[0], mesh)
    for unit in layers:
        layer = read_unit(directory, unit, mesh)["layers"]
        params["layers"] = set_layer(params["layers"], layer, unit.layer)
        jax.block_until_ready(params)  # else the layers to come pile up in memory
    return params


def _zeros(shapes: ParamTree, layer: Unit, mesh: Mesh | None) -> ParamTree:
    shardings = None
    if mesh is not None:
        shardings = _map_specs(lambda spec: NamedSharding(mesh, PartitionSpec(None, *spec)), layer.specs["layers"])
    make = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.jit(make, out_shardings=shardings)()


@functools.partial(jax.jit, donate_argnums=0)
def set_layer(stacked: ParamTree, layer: ParamTree, index: int) -> ParamTree:
    """Stacked parameters with one layer put in, bit for bit; the stacked ones are donated."""

    def bits(x: jax.Array) -> jax.Array:
        # As floats, XLA's CPU backend goes through float32 and rewrites the payload of every bfloat16 NaN.
        return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")

    def set_one(whole: jax.Array, part: jax.Array) -> jax.Array:
        updated = jax.lax.dynamic_update_index_in_dim(bits(whole), bits(part), index, 0)
        return jax.lax.bitcast_convert_type(updated, whole.dtype)

    return jax.tree.map(set_one, stacked, layer)


def save_params(
    directory: pathlib.Path,
    params: ParamTree,
    config: DreamConfig,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Writes parameters held in memory into a converted directory, shard by shard where they lie.

    Raises:
      ValueError: they are not the parameters of the configuration, or have several dtypes.
      OSError: the disk is full.
    """
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})
    if len(dtypes) > 1:
        raise ValueError(f"the parameters have several dtypes, {' and '.join(dtypes)}; cast them to one before saving")
    expected = _shapes(config, dtypes[0])
    differences = _differences(expected, params)
    if differences:
        raise ValueError(f"these parameters are not those of the configuration: {'; '.join(differences)}")
    for unit in units(config, dtypes[0]):
        part = _only(params, unit.shapes)
        if unit.layer is not None:
            part = jax.tree.map(lambda leaf, layer=unit.layer: leaf[layer], part)
        write_unit(directory, unit, part)
        progress(unit.nbytes)


def _differences(expected: Any, found: Any, *, dtypes: bool = True) -> list[str]:
    """What differs between two trees of arrays, shapes or Orbax metadata, one line a parameter."""
    wanted, present = _leaves(expected), _leaves(found)
    lines = [f"{name} is missing" for name in wanted if name not in present]
    lines += [f"{name} is left over" for name in present if name not in wanted]
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
    # A named tuple is stored as a dictionary of its fields, so the kind of the entry does not count.
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise TypeError(f"unknown kind of tree entry: {entry!r}")


# Orbax's notes about a checkpoint, of which a restore reads nothing: it adds the time after the checksums.
_WRITTEN_LAST = ("_CHECKPOINT_METADATA",)


class RunCheckpoints:
    """The checkpoints of one training run, written in the background; a context manager.

    A step's checkpoint appears under its final name only when it is whole, with the checksums of its files in it. The
    oldest go when there are more than `keep`, except the one with the lowest score.

    Attributes:
      directory: where they lie, each in a folder named for its step.
      damaged: what the last `restore` passed over, by step.
    """

    def __init__(self, directory: str | pathlib.Path, keep: int = 3, measure: str = ""):
        """`measure` names what scores are of: steps that were scored by another measure have no score here."""
        if keep < 1:
            raise ValueError(f"{keep=} must be at least 1")
        self.directory = pathlib.Path(directory).resolve()
        self.damaged: dict[int, str] = {}
        self._scores: dict[int, float | None] = {}
        scores = self._scores  # what follows must not hold on to this object, whose threads end with it

        class SummedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
            """Where a step is written until it is whole; checksums are the last thing before it gets its name."""

            async def finalize(self) -> None:
                step = self.get_final().name
                if step.isdigit():
                    folder = pathlib.Path(self.get())
                    score = scores.get(int(step))
                    more = {"score": score, "measure": measure}
                    await asyncio.to_thread(files.write_checksums, folder, leave_out=_WRITTEN_LAST, **more)
                await super().finalize()

        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_LastAndBest(keep, scores),
                enable_async_checkpointing=True,
                temporary_path_class=SummedPath,
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=_HANDLERS),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )
        for step in self.steps():
            written = files.read_checksums(self.directory / str(step))
            score = None if written is None or written.get("measure") != measure else written.get("score")
            self._scores[step] = score if isinstance(score, float) else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(self, step: int, state: Any, meta: Mapping[str, Any], score: float | None = None) -> None:
        """Starts to write a step; the arrays may be donated as soon as this returns.

        Waits for a step that is still being written, and raises what went wrong with it.

        Args:
          step: number of the step, not yet saved.
          state: tree of jax arrays.
          meta: what else is needed to go on, as JSON can hold it (the position in the data, say).
          score: of the state, the lower the better; the step with the lowest is kept. None or NaN: it has none.

        Raises:
          ValueError: the step was saved before.
          TypeError: `meta` is not JSON.
        """
        json.dumps(meta)
        if step in self.steps():
            raise ValueError(f"{self.directory} already holds step {step}")
        self._scores[step] = None if score is None or math.isnan(score) else float(score)
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(dict(meta)))
        # force: by default Orbax skips, without a word, a step that is not newer than the last.
        self._manager.save(step, args=args, force=True)

    def steps(self) -> list[int]:
        """The steps that can be restored, in order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step that can be restored, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the lowest score, of several the first; None when no step has one."""
        return _best(self._scores, self.steps())

    def score(self, step: int) -> float | None:
        """What a step was saved with."""
        return self._scores.get(step)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a step onto any mesh, after its files have been compared with their checksums.

        Args:
          abstract_state: tree of arrays or `jax.ShapeDtypeStruct`s whose shardings say where each array goes;
            their dtypes are the result's.
          step: which; by default the newest that is undamaged. Newer ones are renamed, `7` to `7.damaged`, and reported
            as errors to the log and in `damaged`.

        Returns:
          The state and the meta that were saved.

        Raises:
          FileNotFoundError: there is no such step.
          ValueError: what is stored is damaged, or has other arrays or shapes; the message names them.
        """
        self.wait()
        steps = self.steps()
        if not steps:
            raise FileNotFoundError(f"{self.directory} holds no checkpoint")
        if step is not None and step not in steps:
            raise FileNotFoundError(f"{self.directory} holds no checkpoint of step {step}, only of {steps}")
        chosen = self._undamaged(steps[::-1] if step is None else [step])
        stored = self._manager.item_metadata(chosen)["state"].tree
        differences = _differences(abstract_state, stored, dtypes=False)
        if differences:
            raise ValueError(
                f"the checkpoint {self.directory / str(chosen)} is of another state: {'; '.join(differences)}"
            )
        args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        restored = self._manager.restore(
            chosen,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(abstract_state, restore_args=args), meta=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], restored["meta"]

    def _undamaged(self, candidates: Sequence[int]) -> int:
        """The first of the steps that is as it was written; those before it are put aside."""
        self.damaged = {}
        for step in candidates:
            problem = self._damage(step)
            if problem is None:
                break
            self.damaged[step] = problem
            _log.error("the checkpoint of step %d in %s is damaged: %s", step, self.directory, problem)
        else:
            listed = "; ".join(f"step {step}: {problem}" for step, problem in self.damaged.items())
            if len(candidates) < len(self.steps()):
                raise ValueError(
                    f"{self.directory} holds other checkpoints, but not this one as it was written ({listed})"
                )
            raise ValueError(
                f"no checkpoint in {self.directory} is as it was written ({listed}); put a copy back, or begin another run"
            )
        for bad in self.damaged:
            _log.error("going on from step %d instead; step %d is now %s", step, bad, self._aside(bad).name)
            if jax.process_index() == 0:
                if self._aside(bad).exists():
                    shutil.rmtree(self._aside(bad))
                (self.directory / str(bad)).rename(self._aside(bad))
            self._scores.pop(bad, None)
        if self.damaged:
            distributed.barrier("checkpoint.aside")
            self._manager.reload()
        return step

    def _aside(self, step: int) -> pathlib.Path:
        return self.directory / f"{step}.damaged"

    def _damage(self, step: int) -> str | None:
        """What is wrong with a step; each process reads a share of its files, and all agree."""
        problem = files.find_damage(self.directory / str(step), jax.process_index(), jax.process_count())
        found = distributed.which_say(problem is not None)
        return f"process {found[0]} says what is wrong with it" if found and problem is None else problem

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the threads."""
        self._manager.close()


def _best(scores: Mapping[int, float | None], steps: Iterable[int]) -> int | None:
    scored = [(score, step) for step in steps if (score := scores.get(step)) is not None]
    return min(scored)[1] if scored else None


@dataclasses.dataclass(frozen=True)
class _LastAndBest:
    """Orbax's question which checkpoints stay; `scores` goes on being filled."""

    keep: int
    scores: Mapping[int, float | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        steps = sorted(one.step for one in checkpoints)
        staying = {*steps[-self.keep :], _best(self.scores, steps)}
        return [one.step in staying for one in checkpoints]
