"""The training loop: data, steps, logs, checkpoints, stopping and going on.

A run lives in one folder: `settings.json`, `metrics.csv` (a row a step), TensorBoard events, `checkpoints/`, `tokenizer/`,
and at the end `model/` (a converted directory) and `summary.json`. The same command on the same folder goes on where the
run stopped; a finished run is never touched without being told to.

Knows files, clocks and signals. What a step computes is `train_step`'s; what a row is, `data`'s.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from tensorboardX import SummaryWriter

from dream_jax import pretrained, sharding
from dream_jax.checkpoint import RunCheckpoints
from dream_jax.config import PRESETS
from dream_jax.data import Source, encode_row, make_batches, open_source
from dream_jax.model import Dream, Remat, merge_params, parameter_count, split_params
from dream_jax.objective import (
    CartWeight,
    Focal,
    InverseTimeWeight,
    LinearWeight,
    LossWeight,
    UniformWeight,
    masked_diffusion_loss,
)
from dream_jax.sampler import SamplerConfig, generate
from dream_jax.tokenizer import Tokenizer, load_tokenizer
from dream_jax.train_step import (
    OptimizerConfig,
    StepConfig,
    TrainState,
    abstract_state,
    init_state,
    make_train_step,
    put_batch,
)

METRICS = ("loss", "nll", "masked_accuracy", "learning_rate", "grad_norm", "num_masked")

# Dense bfloat16 peak of one chip, FLOP/s, from the makers' data sheets; by the start of jax's device_kind.
PEAK_FLOPS: Mapping[str, float] = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Masked-diffusion fine-tuning, or training from scratch, of a Dream model."""

    mesh: str = "1x1"
    """devices, fsdp x tensor, such as 8x1; on a CPU that has too few, they are made"""
    model: str = "nano"
    """a Hugging Face or converted directory, a hub id, or a preset (nano, small, dream-0.5b, dream-7b: random weights)"""
    tokenizer: str | None = None
    """directory with tokenizer files, or "bytes"; by default the model's own, and bytes for nano"""
    data: str = "sudoku"
    """sudoku, gsm8k, a .jsonl file, or a directory with train.jsonl and test.jsonl"""
    out: pathlib.Path = pathlib.Path("runs/train")
    """the run's folder; an unfinished run in it goes on"""
    overwrite: bool = False
    """throw away the run that is in the folder"""
    steps: int = 600
    """optimizer steps"""
    batch_size: int = 64
    """rows a step, over all devices and processes"""
    accumulation: int = 1
    """parts that each batch is computed in, to save memory; changes no result, up to rounding"""
    max_length: int | None = None
    """tokens a row, padded on the right; longer rows are dropped and counted. By default the longest row, up to 2048"""
    learning_rate: float | None = None
    """peak; by default 1.5e-3 for random weights and 5e-6, of the published recipe, for a checkpoint"""
    warmup_share: float = 0.1
    """of the steps, before the cosine decay to zero"""
    weight_decay: float = 0.01
    """of matrices; norms and biases have none"""
    b1: float = 0.9
    """Adam's first-moment decay"""
    b2: float = 0.95
    """Adam's second-moment decay"""
    clip_norm: float = 1.0
    """largest global gradient norm; 0 switches clipping off"""
    weight: Literal["cart", "inverse-time", "linear", "uniform"] = "cart"
    """of the loss at each masked position"""
    cart_p: float = 0.1
    """reach of the cart weight: larger looks less far"""
    focal: bool = False
    """focal term (alpha 0.25, gamma 2): easy positions count less"""
    remat: Remat = "none"
    """what the backward pass recomputes, to save memory"""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPU and TPU, float32 on a CPU and for nano. Master weights are always float32"""
    seed: int = 0
    """of random weights, data order, times and masks"""
    save_every: int = 200
    """steps between checkpoints"""
    keep: int = 3
    """checkpoints kept"""
    log_every: int = 20
    """steps between lines where the output is no terminal"""
    eval_rows: int = 200
    """held-out rows to answer by sampling at the end; 0 for none"""
    coordinator: str | None = None
    """host:port of process 0, to join several processes into one run"""
    num_processes: int = 1
    """how many processes the run has"""
    process_id: int = 0
    """which of them this is"""

    def __post_init__(self) -> None:
        sharding.parse_mesh_shape(self.mesh)
        for name in (
            "steps",
            "batch_size",
            "accumulation",
            "save_every",
            "keep",
            "log_every",
            "num_processes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.eval_rows < 0:
            raise ValueError(f"eval_rows={self.eval_rows} must not be negative")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} is outside 0..2**31-1")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} leaves no room for a prompt and an answer")
        if self.num_processes > 1 and self.coordinator is None:
            raise ValueError(f"num_processes={self.num_processes} needs --coordinator host:port")
        self.loss_weight()
        self.optimizer()

    def loss_weight(self) -> LossWeight:
        """The weight that the settings name."""
        if self.weight == "cart":
            return CartWeight(self.cart_p)
        return {"inverse-time": InverseTimeWeight(), "linear": LinearWeight(), "uniform": UniformWeight()}[self.weight]

    def optimizer(self) -> OptimizerConfig:
        """The optimizer that the settings describe."""
        rate = self.learning_rate
        return OptimizerConfig(
            learning_rate=(1.5e-3 if self.starts_at_random else 5e-6) if rate is None else rate,
            total_steps=self.steps,
            warmup_share=self.warmup_share,
            b1=self.b1,
            b2=self.b2,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm or None,
        )

    @property
    def starts_at_random(self) -> bool:
        """Whether the model is a preset; a directory of that name is preferred, as in `load`."""
        return self.model in PRESETS and not pathlib.Path(self.model).is_dir()

    def warnings(self) -> list[str]:
        """What a careful colleague would say about these settings."""
        found = []
        if self.weight == "inverse-time":
            found.append(
                "--weight inverse-time with the masked-count denominator acts like 1/t^2: steps with a small t dominate"
            )
        if not self.starts_at_random and self.optimizer().learning_rate > 1e-4:
            found.append(
                f"learning rate {self.optimizer().learning_rate:g} is far above the 2e-6 to 5e-6 of the published recipe"
            )
        if self.starts_at_random and self.model != "nano":
            found.append(
                f"preset {self.model!r} starts from random weights; name a directory to start from a checkpoint"
            )
        return found


# Settings that may change between the parts of one run: they change what is computed by rounding at most.
_FREE = {
    "mesh",
    "out",
    "overwrite",
    "save_every",
    "keep",
    "log_every",
    "coordinator",
    "num_processes",
    "process_id",
}
_FREE |= {"accumulation", "remat", "eval_rows"}


class Stopped(Exception):
    """The run was asked to stop and has saved itself."""


def train(settings: TrainSettings) -> dict[str, Any]:
    """Runs, or goes on with, the run that the settings describe.

    Returns:
      What is written to `summary.json`.

    Raises:
      ValueError, OSError: settings, data or files that do not fit; nothing is changed then.
      Stopped: after SIGINT or SIGTERM; everything up to that step is saved.
    """
    if settings.coordinator is not None:
        sharding.join_processes(settings.coordinator, settings.num_processes, settings.process_id, settings.mesh)
    begun = time.monotonic()
    mesh = sharding.make_mesh(settings.mesh)
    report = _Report(settings)
    report.settings(mesh)
    if dict(mesh.shape)["fsdp"] % jax.process_count():
        raise ValueError(
            f"mesh {settings.mesh} splits the batch {dict(mesh.shape)['fsdp']} ways, but there are {jax.process_count()} "
            "processes that read rows of their own: fsdp must be a multiple of their number"
        )
    source = open_source(settings.data, "train", settings.seed)
    held_out = open_source(settings.data, "test", settings.seed) if settings.eval_rows else None
    _check_folder(settings)
    model = pretrained.load(
        settings.model,
        mesh=mesh,
        seed=settings.seed,
        compute_dtype=_compute_dtype(settings),
        remat=settings.remat,
    )
    tokenizer = _tokenizer(settings, model)
    max_length = settings.max_length or _longest(source, tokenizer)
    _check_tokenizer(model, tokenizer, max_length)

    optimizer_config = settings.optimizer()
    optimizer = optimizer_config.make()
    graphdef, params = split_params(model)
    step_config = StepConfig(
        global_batch=settings.batch_size,
        accumulation=settings.accumulation,
        weight=settings.loss_weight(),
        focal=Focal() if settings.focal else None,
        seed=settings.seed,
    )
    step = make_train_step(graphdef, optimizer, optimizer_config.schedule(), step_config, mesh)
    batches = make_batches(
        source,
        tokenizer,
        batch_size=settings.batch_size,
        max_length=max_length,
        seed=settings.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    going_on = _claim_folder(settings)
    with batches, RunCheckpoints(settings.out / "checkpoints", keep=settings.keep) as checkpoints:
        done = checkpoints.latest_step() if going_on else None
        if done is None:
            state, meta, done = init_state(params, optimizer, mesh, donate=True), dict[str, Any](seconds=0.0), 0
        else:
            state, meta = checkpoints.restore(abstract_state(params, optimizer, mesh))
            batches.set_state(meta["data"])
        tokenizer_dir = _save_tokenizer(settings, tokenizer, model.tokenizer_dir)
        del model, params  # the state holds what is trained
        report.start(state, done, batches.report, max_length, mesh)
        log = _MetricsLog(settings.out, done) if report.leads else None
        earlier = float(meta["seconds"])
        stop = _StopSignal()
        with stop, report.live(), contextlib.closing(log) if log else contextlib.nullcontext():
            flops = _FlopCounter(split_params(merge_params(graphdef, state.params))[1], graphdef, max_length)
            clock = time.monotonic()
            for number in range(done + 1, settings.steps + 1):
                state, metrics = step(state, put_batch(next(batches), mesh))
                row = {name: float(value) for name, value in metrics.items()}
                now = time.monotonic()
                row["tokens_per_second"] = settings.batch_size * max_length / (now - clock)
                mfu = flops.mfu(settings.batch_size * max_length, row["num_masked"], now - clock, mesh)
                clock = now
                if log:
                    log.write(number, row)
                report.step(number, row, mfu)
                stopping = stop.requested()
                if number % settings.save_every == 0 or number == settings.steps or stopping:
                    seconds = earlier + time.monotonic() - begun
                    checkpoints.save(number, state, {"data": batches.get_state(), "seconds": seconds})
                    if log:
                        log.flush()
                if stopping:
                    checkpoints.wait()
                    raise Stopped(
                        f"stopped and saved after step {number} of {settings.steps}; the same command goes on from there"
                    )
        checkpoints.wait()
        trained = merge_params(graphdef, state.params)
        trained.tokenizer_dir = str(tokenizer_dir)
        pretrained.save(trained, settings.out / "model", overwrite=True)
        report.say(f"saved the model to {settings.out / 'model'}")
        evaluation = evaluate(trained, tokenizer, held_out, settings, max_length, mesh) if held_out else {}
        for name, value in evaluation.items():
            report.say(
                f"held-out {name.replace('_', ' ')}: {value:g}" if isinstance(value, float) else f"{name}: {value}"
            )
        summary = {
            "settings": _plain(settings),
            "parameters": parameter_count(state.params),
            "bytes_per_device": sharding.bytes_per_device(state),
            "data": dataclasses.asdict(batches.report),
            "last_losses": _last_losses(settings.out) if report.leads else [],
            "eval": evaluation,
            "seconds": earlier + time.monotonic() - begun,
            "devices": f"{mesh.devices.size} x {jax.devices()[0].device_kind}",
            "jax": jax.__version__,
        }
        if report.leads:
            _write_json(settings.out / "summary.json", summary)
        report.say(
            f"wrote {settings.out}: metrics.csv, summary.json, checkpoints/, model/ in {summary['seconds']:.0f} s"
        )
        return summary


def evaluate(
    model: Dream, tokenizer: Tokenizer, held_out: Source, settings: TrainSettings, max_length: int, mesh: Mesh
) -> dict[str, Any]:
    """Answers held-out rows by sampling (temperature 0, entropy order, a token a step), and measures their likelihood.

    Returns:
      `exact_accuracy` (share of answers equal to the row's, surrounding space aside), `rows`, `forwards` (of one batch
      of answers), and `nll`: nats per masked token on a fixed grid of noise levels with fixed masks.
    """
    rows = [held_out[index] for index in range(min(settings.eval_rows, len(held_out)))]
    encoded = [(row, one) for row in rows if (one := encode_row(row, tokenizer, max_length)) is not None]
    if not encoded:
        return {"rows": 0, "too_long": len(rows)}
    room = max(one.length - one.prompt_length for _, one in encoded)
    config = SamplerConfig(
        max_new_tokens=room,
        steps=room,
        alg="entropy",
        vocab_limit=tokenizer.vocab_limit,
        forbidden_tokens=(tokenizer.mask_id,),
    )
    correct, forwards, width = 0, 0, max(one.prompt_length for _, one in encoded)
    size = max(settings.batch_size, 1)
    for start in range(0, len(encoded), size):
        part = encoded[start : start + size]
        prompts = np.full((size, width), tokenizer.pad_id, np.int32)
        mask = np.zeros((size, width), bool)
        mask[len(part) :, -1] = True  # rows that only fill the batch
        for line, (_, one) in enumerate(part):
            prompts[line, width - one.prompt_length :] = one.tokens[: one.prompt_length]
            mask[line, width - one.prompt_length :] = True
        out = generate(model, prompts, config, prompt_mask=mask)
        forwards = max(forwards, int(out.forwards))
        answers = np.asarray(out.tokens)[:, width:]
        correct += sum(
            answer_text(tokenizer, answers[line]).strip() == row.response.strip() for line, (row, _) in enumerate(part)
        )
    tokens = np.stack([one.tokens for _, one in encoded])
    maskable = np.stack([one.maskable for _, one in encoded])
    return {
        "exact_accuracy": correct / len(encoded),
        "rows": len(encoded),
        "too_long": len(rows) - len(encoded),
        "forwards": forwards,
        "nll": _grid_nll(model, tokens, maskable, size, mesh),
    }


def answer_text(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """The text of an answer: up to the first end-of-text token, special tokens left out."""
    ids = [int(token) for token in tokens]
    if tokenizer.eos_id in ids:
        ids = ids[: ids.index(tokenizer.eos_id)]
    return tokenizer.decode(ids, skip_special=True)


def _grid_nll(model: Dream, tokens: np.ndarray, maskable: np.ndarray, size: int, mesh: Mesh) -> float:
    """Mean cross entropy at masked positions over t = 1/16, 3/16, ..., 15/16, each with masks of its own."""

    @jax.jit
    def sums(model: Dream, tokens: jax.Array, masked: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, aux = masked_diffusion_loss(model, tokens, masked, t, UniformWeight())
        return jnp.sum(aux["token_nll"]), aux["num_masked"]

    size = min(size, len(tokens))
    # Rows that only fill the last batch: nothing of them is masked, so nothing of them counts.
    filling = ((0, -len(tokens) % size), (0, 0))
    tokens, maskable = np.pad(tokens, filling), np.pad(maskable, filling)
    total, count = 0.0, 0.0
    generator = np.random.default_rng(0)  # the same masks for every model
    for level in (np.arange(8) + 0.5) / 8:
        masked = maskable & (generator.random(maskable.shape) < level)
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            t = np.full(size, level, np.float32)
            with jax.set_mesh(mesh):
                nll, number = sums(model, tokens[part], masked[part], t)
            total, count = total + float(nll), count + float(number)
    return total / max(count, 1.0)


def _compute_dtype(settings: TrainSettings) -> str:
    if settings.compute_dtype != "auto":
        return settings.compute_dtype
    return "float32" if settings.model == "nano" or jax.default_backend() == "cpu" else "bfloat16"


def _tokenizer(settings: TrainSettings, model: Dream) -> Tokenizer:
    if settings.tokenizer is not None:
        return load_tokenizer(settings.tokenizer)
    if model.tokenizer_dir is not None:
        return load_tokenizer(model.tokenizer_dir)
    if settings.model == "nano":
        return load_tokenizer("bytes")
    raise ValueError(f"model {settings.model!r} has no tokenizer of its own; pass --tokenizer with a directory of one")


def _check_tokenizer(model: Dream, tokenizer: Tokenizer, max_length: int) -> None:
    config = model.config
    pairs = (
        ("mask_token_id", config.mask_token_id, tokenizer.mask_id),
        ("pad_token_id", config.pad_token_id, tokenizer.pad_id),
    )
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise ValueError(
                f"the model has {name}={ours}, but the tokenizer has {theirs}: they do not belong together"
            )
    if tokenizer.vocab_limit > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_limit} tokens, but the model only {config.vocab_size}")
    if max_length > config.max_position_embeddings:
        raise ValueError(f"max_length={max_length} is more than the model's {config.max_position_embeddings=}")


def _longest(source: Source, tokenizer: Tokenizer) -> int:
    """Tokens of the longest row, up to 2048; a source of uniform length is measured on its first row."""
    from dream_jax.data import length_report

    return min(length_report(source, tokenizer, 2048, limit=1 if source.uniform_length else None).longest, 2048)


def _save_tokenizer(settings: TrainSettings, tokenizer: Tokenizer, source: str | None) -> pathlib.Path:
    """Keeps what must travel with the weights beside them: the original may be gone when the run ends."""
    folder = settings.out / "tokenizer"
    if jax.process_index() == 0:
        folder.mkdir(exist_ok=True)
        tokenizer.save(folder)
        beside = pathlib.Path(source) if source else folder
        for path in (beside / "config.json", beside / "generation_config.json", *beside.glob("*.py")):
            if path.is_file() and beside != folder:
                shutil.copyfile(path, folder / path.name)
    _together("tokenizer")
    return folder


def _together(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"dream_jax.trainer.{what}")


# What a run makes in its folder, and all that --overwrite removes.
_MADE = ("settings.json", "metrics.csv", "summary.json", "tensorboard", "checkpoints", "tokenizer", "model")


def _check_folder(settings: TrainSettings) -> bool:
    """Whether the run's folder holds the run to go on with. Changes nothing.

    Raises:
      FileExistsError: it holds something else: a finished run, a run with other settings, or no run at all.
      ValueError: what the run reads lies in the folder that it would overwrite.
    """
    if not settings.out.exists() or not any(settings.out.iterdir()):
        return False
    known = settings.out / "settings.json"
    before = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else None
    if not isinstance(before, dict) or not {"mesh", "model", "data", "steps"} <= before.keys():
        raise FileExistsError(f"{settings.out} is not empty and holds no run; give another --out")
    if not settings.overwrite:
        _check_same_run(settings, before)
        return True
    out = settings.out.resolve()
    for name in ("model", "data", "tokenizer"):
        given = getattr(settings, name)
        read = pathlib.Path(given or "").expanduser().resolve()
        if given and read.exists() and out in (read, *read.parents):
            raise ValueError(
                f"--{name} {given} lies in {settings.out}, which --overwrite would remove; give another --out"
            )
    return False


def _claim_folder(settings: TrainSettings) -> bool:
    """Makes the run's folder, or finds in it the run to go on with (true). Raises as `_check_folder`."""
    going_on = _check_folder(settings)
    _together("looked")
    if jax.process_index() == 0 and not going_on:
        settings.out.mkdir(parents=True, exist_ok=True)
        for name in _MADE:
            path = settings.out / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        _write_json(settings.out / "settings.json", _plain(settings))
    _together("claimed")
    return going_on


def _check_same_run(settings: TrainSettings, before: Mapping[str, Any]) -> None:
    if (settings.out / "summary.json").is_file():
        raise FileExistsError(
            f"{settings.out} holds a finished run; pass --overwrite to throw it away, or another --out"
        )
    now = _plain(settings)
    changed = [
        f"{name} was {before.get(name)!r}, now {value!r}"
        for name, value in now.items()
        if name not in _FREE and before.get(name) != value
    ]
    if changed:
        raise FileExistsError(
            f"{settings.out} holds a run with other settings ({'; '.join(changed)}); "
            "repeat its settings to go on, pass --overwrite to throw it away, or give another --out"
        )


def _plain(settings: TrainSettings) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, pathlib.Path) else value
        for name, value in dataclasses.asdict(settings).items()
    }


def _write_json(path: pathlib.Path, content: Any) -> None:
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


class _MetricsLog:
    """`metrics.csv` and TensorBoard. Rows after the step that the run goes on from are dropped first."""

    fields = ("step", *METRICS, "tokens_per_second")

    def __init__(self, folder: pathlib.Path, done: int):
        path = folder / "metrics.csv"
        rows = []
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row["step"].isdigit() and int(row["step"]) <= done]
        temporary = path.with_name(".metrics.csv.incomplete")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.fields, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(path)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, self.fields, extrasaction="ignore")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        # repr of a float32 read as float64 is exact, so that runs can be compared to the last bit.
        self._writer.writerow({"step": step, **row})
        self._file.flush()  # a row a step, also for a run that is killed
        for name, value in row.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        self._file.flush()
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _last_losses(folder: pathlib.Path, number: int = 10) -> list[float]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)][-number:]


class _StopSignal:
    """While active, the first SIGINT or SIGTERM asks the run to stop after its step; a second SIGINT interrupts it."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> _StopSignal:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        # Not through the console: a signal may arrive while it is writing.
        os.write(2, b"\nstopping after this step and saving; press Ctrl-C again to stop at once\n")

    def requested(self) -> bool:
        """Whether any process was asked: all of them stop at the same step."""
        if jax.process_count() == 1:
            return self._asked
        return bool(np.any(multihost_utils.process_allgather(np.array(self._asked))))


class _FlopCounter:
    """FLOPs of a step, and their share of the devices' peak."""

    def __init__(self, params: Mapping[str, Any], graphdef: Any, length: int):
        config = merge_params(graphdef, dict(params)).config
        self._head = 6 * config.hidden_size * config.vocab_size  # only at masked positions
        matrices = parameter_count(params["layers"]) * 6
        attention = 12 * config.num_hidden_layers * config.hidden_size * length  # bidirectional: counted in full
        self._token = matrices + attention

    def mfu(self, tokens: int, masked: float, seconds: float, mesh: Mesh) -> float | None:
        kind = mesh.devices.flat[0].device_kind
        peak = next((value for name, value in PEAK_FLOPS.items() if kind.startswith(name)), None)
        if peak is None:
            return None
        return (self._token * tokens + self._head * masked) / seconds / (peak * mesh.devices.size)


class _Report:
    """What a person sees: settings, a live line on a terminal, a line now and then elsewhere."""

    def __init__(self, settings: TrainSettings):
        self._settings = settings
        self.leads = jax.process_index() == 0
        self._console = Console(highlight=False, soft_wrap=True, quiet=not self.leads)
        self._progress: Progress | None = None

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def settings(self, mesh: Mesh) -> None:
        for field in dataclasses.fields(self._settings):
            value = getattr(self._settings, field.name)
            origin = "default" if value == field.default else "given"
            self.say(f"{field.name:>16}: {value}  ({origin})")
        kind = mesh.devices.flat[0].device_kind
        self.say(
            f"{'devices':>16}: {mesh.devices.size} x {kind}, {jax.process_count()} process(es), jax {jax.__version__}"
        )
        for warning in self._settings.warnings():
            self.say(f"warning: {warning}")

    def start(self, state: TrainState, done: int, data: Any, max_length: int, mesh: Mesh) -> None:
        self.say(f"data: {data}")
        rate = self._settings.optimizer().learning_rate
        self.say(
            f"peak learning rate {rate:g}, {max_length} tokens a row, {parameter_count(state.params):,} parameters"
        )
        for name, tree in (("parameters", state.params), ("optimizer state", state.opt_state)):
            sizes = sharding.bytes_per_device(tree)
            whole = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
            self.say(f"{name}: {whole:,} bytes, {max(sizes.values()):,} on each of {len(sizes)} device(s)")
        if done:
            self.say(f"going on after step {done}")
        self._done, self._begun, self._done_then = done, time.monotonic(), done

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        if not (self.leads and self._console.is_terminal):
            yield
            return
        columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
        with Progress(*columns, console=self._console) as self._progress:
            self._task = self._progress.add_task("compiling", total=self._settings.steps, completed=self._done)
            yield

    def step(self, number: int, row: Mapping[str, float], mfu: float | None) -> None:
        # The first step compiles; the rate is taken from the second on.
        if number == self._done_then + 1:
            self._begun, self._done = time.monotonic(), number
        steps = number - self._done
        left = (self._settings.steps - number) * (time.monotonic() - self._begun) / steps if steps else math.nan
        last = number in (self._done_then + 1, self._settings.steps)
        if self._progress is None and not last and number % self._settings.log_every:
            return
        text = (
            f"step {number}/{self._settings.steps}  loss {row['loss']:.4f}  masked acc {row['masked_accuracy']:.3f}  "
            f"lr {row['learning_rate']:.2e}  grad {row['grad_norm']:.2f}  {row['tokens_per_second']:,.0f} tok/s  "
            f"{'' if mfu is None else f'MFU {mfu:.1%}  '}ETA {'-' if math.isnan(left) else _clock(left)}"
        )
        if self._progress is None:
            self.say(text)
            sys.stdout.flush()
        else:
            self._progress.update(self._task, completed=number, description=text)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
