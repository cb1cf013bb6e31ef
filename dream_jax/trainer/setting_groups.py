"""The settings of a run in groups: each setting with its default and its meaning, each group with its own checks.

The name of a field is the name of its flag, of its key in `settings.json` and of its key in a recipe, so no name is in two
groups. A group's docstring is its heading in `train.py --help`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any, Literal, get_args

from dream_jax import masks, sharding
from dream_jax.attention import Backend
from dream_jax.config import PRESETS
from dream_jax.data import AnswerFormat, BatchOptions, EncodeOptions, LearnedTurns, LengthPolicy, ReadOptions
from dream_jax.lora import LoraConfig, parse_targets
from dream_jax.model import Remat
from dream_jax.objective import CartWeight, InverseTimeWeight, LinearWeight, LossWeight, UniformWeight
from dream_jax.optimizer import Moments, OptimizerKind
from dream_jax.quantisation import KINDS
from dream_jax.trainer.loggers import LoggerName

Currency = Literal["rmb", "usd"]


def _check_at_least(group: Any, least: int, *names: str) -> None:
    for name in names:
        if getattr(group, name) < least:
            limit = "must not be negative" if least == 0 else f"must be at least {least}"
            raise ValueError(f"{name}={getattr(group, name)} {limit}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The run: its folder, its length and what it saves."""

    recipe: str | None = None
    """settings to begin with: a name (--recipe alone lists them) or a TOML file; any other flag overrides it"""
    out: pathlib.Path = pathlib.Path("runs/train")
    """the run's folder; an unfinished run in it is resumed"""
    overwrite: bool = False
    """throw away a finished run, or one with other settings, that is in the folder; an unfinished run is resumed"""
    steps: int = 1500
    """optimizer steps"""
    seed: int = 0
    """of random weights, data order, times and masks"""
    save_every: int = 500
    """steps between checkpoints"""
    keep: int = 3
    """newest checkpoints kept; the best by evaluation is kept as well"""
    final: Literal["last", "best"] = "last"
    """which state the run hands over at the end: the last, or the best by evaluation"""
    max_skipped: int = 5
    """a step whose loss or gradient is not finite is skipped; after so many in a row the run ends and keeps the batches"""

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "steps", "save_every", "keep", "max_skipped")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} is outside 0..2**31-1")
        if "://" in str(self.out) or re.match(r"\w{2,}:/", str(self.out)):
            raise ValueError(f"out={self.out} is an address; runs are written to a local (or mounted) folder")
        # Expanded here, so that every segment of a run means the same folder.
        object.__setattr__(self, "out", self.out.expanduser())


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """The model that the run begins with, and how it computes."""

    model: str = "nano"
    """a Hugging Face or converted directory, a hub id, or a preset (nano, small, dream-0.5b, dream-7b: random weights)"""
    tokenizer: str | None = None
    """directory with tokenizer files, or "bytes"; by default the model's own, and bytes for nano"""
    mask: str | None = None
    """who may attend to whom: bidirectional, causal, prefix (a bidirectional prompt, a causal answer), block-causal:SIZE,
    window:REACH or window:LEFT:RIGHT, in tokens; by default as the model was trained before, bidirectional at first. It
    is saved with the weights"""
    anneal_steps: int = 0
    """first steps under attention that grows from causal to bidirectional: for a start from an autoregressive model"""
    remat: Remat = "none"
    """what the backward pass recomputes, to save memory"""
    attention: Backend = "auto"
    """auto: the fastest that can serve; xla runs everywhere"""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPU and TPU, float32 on a CPU and for nano. Master weights are always float32"""

    def __post_init__(self) -> None:
        _check_at_least(self, 0, "anneal_steps")
        if self.attention not in get_args(Backend):
            raise ValueError(f"attention={self.attention!r} is not one of {get_args(Backend)}")
        if self.mask is not None and not isinstance(masks.parse(self.mask), masks.Bidirectional) and self.anneal_steps:
            raise ValueError(f"--anneal-steps leads to bidirectional attention, not to --mask {self.mask}; choose one")

    @property
    def starts_at_random(self) -> bool:
        """Whether the model is a preset; a directory of that name is preferred, as in `load`."""
        return self.model in PRESETS and not pathlib.Path(self.model).is_dir()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSettings:
    """The data, and how its rows become tokens."""

    data: str = "sudoku"
    """sudoku, gsm8k, s1k, a .jsonl, .json or .parquet file (of chats, prompts with responses, or documents: rows with a
    text), a directory with train and test files or saved by datasets, or a hub id, organisation/name: it is downloaded"""
    mix: tuple[str, ...] = ()
    """further data to mix in"""
    mix_weights: tuple[float, ...] = ()
    """how often --data and each of --mix is drawn from, in proportion; by default by their numbers of rows"""
    answer_format: AnswerFormat = "s1"
    """how a reasoning trace and an answer become one response (s1K): with s1's think and answer turns, or in d1's tags"""
    only_correct: bool = False
    """of s1K-1.1 keep only rows with deepseek_grade "Yes\""""
    skip_bad_rows: bool = False
    """leave out rows that cannot be read, and list them; by default the first ends the run"""
    held_out: float = 0.05
    """share of the prompts of data without a test split that is kept for evaluation; 0 trains on all, with --eval-rows 0"""
    max_length: int | None = None
    """tokens a row, padded on the right; for longer rows see --length-policy. By default the longest row, up to 2048"""
    length_policy: LengthPolicy = "filter"
    """for rows longer than --max-length: drop them, cut their right end (answer and end token first), cut the middle out
    (the end of the trace), or train on answers only, without any trace"""
    learned_turns: LearnedTurns = "last"
    """of a chat, learn the last assistant turn or all of them"""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} leaves no room for a prompt and an answer")
        if self.mix_weights and len(self.mix_weights) != 1 + len(self.mix):
            raise ValueError(
                f"mix_weights={self.mix_weights} must have a number for --data and one for each of mix={self.mix}"
            )
        self.read_options()
        self.encode_options()

    def read_options(self) -> ReadOptions:
        """How files become rows."""
        return ReadOptions(
            answer_format=self.answer_format,
            only_correct=self.only_correct,
            skip_bad=self.skip_bad_rows,
            held_out=self.held_out,
        )

    def encode_options(self) -> EncodeOptions:
        """How rows become tokens."""
        return EncodeOptions(length_policy=self.length_policy, learned_turns=self.learned_turns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How rows are laid out in batches."""

    batch_size: int = 32
    """rows a step, over all devices and processes"""
    accumulation: int = 1
    """microbatches that each batch is computed in, to save memory; changes no result, up to rounding"""
    eos_tail: int | None = None
    """most end-of-text tokens after each answer, attended and learned; by default they fill the row"""
    cut_responses: bool = False
    """give all responses of a batch the length of one of them, drawn anew in each step; prompts are padded on the left"""
    tail_cut: float = 0.0
    """probability that a batch loses a random tail of its responses"""
    width_step: int | None = None
    """pad each batch to a multiple of this rather than to --max-length, with rows of like length together; each width that
    occurs is compiled once"""

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "batch_size", "accumulation")
        self.options()

    def options(self) -> BatchOptions:
        """The same as the data pipeline takes it."""
        return BatchOptions(
            eos_tail=self.eos_tail,
            cut_responses=self.cut_responses,
            tail_cut=self.tail_cut,
            width_step=self.width_step,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """A low-rank adapter on frozen weights; without --lora-rank or --adapter all weights are trained."""

    lora_rank: int | None = None
    """train a low-rank adapter of this rank (16 to 64, say) on frozen weights, and not the weights themselves"""
    lora_alpha: float | None = None
    """the adapter is multiplied by alpha / rank; by default alpha is twice the rank"""
    lora_dropout: float | None = None
    """share of its inputs that the adapter does not see in a step; 0 by default, or as in --adapter"""
    lora_targets: str | None = None
    """projections that have one: all (the default), or some of q,k,v,o,gate,up,down with commas between"""
    adapter: str | None = None
    """directory of an adapter to train further; it says rank, alpha and targets"""
    base: Literal["auto", "float32", "bfloat16", "int8", "nf4"] = "auto"
    """how the frozen weights under an adapter are stored; auto: as they are computed with"""
    merge: bool = False
    """at the end also write OUT/model, the weights with the adapter added"""

    def __post_init__(self) -> None:
        given = [name for name in ("lora_alpha", "lora_targets") if getattr(self, name) is not None]
        if self.adapter is not None:
            if self.lora_rank is not None or given:
                raise ValueError(f"--adapter {self.adapter} says rank, alpha and targets itself; leave --lora-* out")
            if self.lora_dropout is not None and not 0.0 <= self.lora_dropout < 1.0:
                raise ValueError(f"lora_dropout={self.lora_dropout} is outside [0, 1)")
        elif self.lora_rank is not None:
            self.new_adapter()
        else:
            given += ["lora_dropout"] if self.lora_dropout is not None else []
            given += ["base"] if self.base != "auto" else []
            given += ["merge"] if self.merge else []
            if given:
                flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
                raise ValueError(f"{flags} speak(s) of an adapter: give --lora-rank or --adapter as well")
        if self.merge and self.base in KINDS:
            raise ValueError(
                f"--merge cannot add an adapter to a base of {self.base} codes; train without it, then load the float "
                "weights with the adapter: dream_jax.save(dream_jax.merge_adapter(dream_jax.load(MODEL, adapter=DIR)), OUT)"
            )

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained, on weights that stay as they are."""
        return self.lora_rank is not None or self.adapter is not None

    def new_adapter(self) -> LoraConfig:
        """The adapter that --lora-rank begins with. Raises ValueError without --lora-rank."""
        if self.lora_rank is None:
            raise ValueError("without --lora-rank there is no new adapter")
        return LoraConfig(
            rank=self.lora_rank,
            alpha=2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha,
            dropout=self.lora_dropout or 0.0,
            targets=parse_targets("all" if self.lora_targets is None else self.lora_targets),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizationSettings:
    """The optimizer and its learning rate."""

    learning_rate: float | None = None
    """peak; by default 2e-3 for random weights, 5e-6, of the published recipe, for a checkpoint, and 5e-5 for an adapter"""
    warmup_share: float = 0.1
    """of the steps, before the cosine decay to zero"""
    weight_decay: float = 0.01
    """of matrices; norms and biases have none"""
    optimizer: OptimizerKind = "adamw"
    """adamw, or adafactor: almost no state, and no first moment"""
    moments: Moments = "float32"
    """how AdamW's two moments are stored: 8, 4 or 2.25 bytes a weight"""
    moments_on_host: bool = False
    """keep them in the host's memory and move them to the devices and back in every step"""
    b1: float = 0.9
    """Adam's first-moment decay"""
    b2: float = 0.95
    """Adam's second-moment decay"""
    clip_norm: float = 1.0
    """largest global gradient norm; 0 switches clipping off"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The loss."""

    weight: Literal["cart", "inverse-time", "linear", "uniform"] = "cart"
    """of the loss at each masked position"""
    cart_p: float = 0.1
    """reach of the cart weight: larger looks less far"""
    focal: bool = False
    """focal term (alpha 0.25, gamma 2): easy positions count less"""

    def __post_init__(self) -> None:
        self.loss_weight()

    def loss_weight(self) -> LossWeight:
        """The weight that the settings name."""
        if self.weight == "cart":
            return CartWeight(self.cart_p)
        return {"inverse-time": InverseTimeWeight(), "linear": LinearWeight(), "uniform": UniformWeight()}[self.weight]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutSettings:
    """Evaluation on held-out rows."""

    eval_every: int = 500
    """steps between evaluations: likelihood of --eval-rows held-out rows on a fixed grid of noise levels, in eval.csv; also
    after the last step. The best state so far is saved"""
    eval_rows: int = 200
    """held-out rows to evaluate on, and to answer by sampling at the end; 0 for none"""
    eval_tokens: int = 512
    """longest answer that is sampled then; rows with longer ones only count in the likelihood"""
    samples: int = 3
    """held-out prompts to answer before the first step and after the last, for report.md; needs --eval-rows"""
    sample_tokens: int = 128
    """longest of these answers; no longer than those of the rows themselves need"""

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "eval_every", "sample_tokens")
        _check_at_least(self, 0, "eval_rows", "eval_tokens", "samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSettings:
    """Where the numbers of each step go, beside metrics.csv."""

    log_every: int = 50
    """steps between lines where the output is no terminal"""
    log_to: tuple[LoggerName, ...] = ("tensorboard",)
    """loggers that get each step's numbers too; wandb and trackio must be installed"""

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "log_every")
        unknown = [name for name in self.log_to if name not in get_args(LoggerName)]
        if unknown:
            raise ValueError(f"log_to={self.log_to} names {unknown}; known are {', '.join(get_args(LoggerName))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriceSettings:
    """What the hardware costs, for the report and for a plan."""

    price_per_chip_hour: float | None = None
    """in --currency; by default the chip's list price"""
    currency: Currency = "rmb"
    """of --price-per-chip-hour"""
    rmb_per_usd: float = 7.1
    """exchange rate"""

    def __post_init__(self) -> None:
        if self.price_per_chip_hour is not None and not self.price_per_chip_hour >= 0:
            raise ValueError(f"{self.price_per_chip_hour=} must not be negative")
        if not self.rmb_per_usd > 0:
            raise ValueError(f"{self.rmb_per_usd=} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """The devices, and the other processes of the run."""

    mesh: str = "1x1"
    """devices, fsdp x tensor (x sequence), such as 8x1 or 2x1x4; on a CPU that has too few, they are made"""
    cluster: Literal["auto", "slurm", "tpu", "off"] = "auto"
    """where the other processes of the run are found without --coordinator. auto: on a TPU slice, and under Slurm with
    several tasks; off: this process runs alone"""
    coordinator: str | None = None
    """host:port of process 0, to join several processes into one run; with --num-processes and --process-id"""
    num_processes: int = 1
    """how many processes the run has"""
    process_id: int = 0
    """which of them this is"""

    def __post_init__(self) -> None:
        sharding.parse_mesh_shape(self.mesh)
        _check_at_least(self, 1, "num_processes")
        if (self.num_processes > 1 or self.process_id) and self.coordinator is None:
            raise ValueError(
                f"num_processes={self.num_processes} and process_id={self.process_id} need --coordinator host:port"
            )
