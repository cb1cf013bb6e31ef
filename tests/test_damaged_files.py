"""Damages every side file of a checkpoint, a tokenizer, an adapter, a run, an evaluation and a study in many ways.

Whatever reads the file either works or raises one line with the name of the file. The damages are drawn with a fixed seed.
"""

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from commands import run_script
from tiny_tokenizer import save_again, write_tokenizer

import dream_jax
from dream_jax import checkpoint, hf, lora, pretrained
from dream_jax.config import DreamConfig
from dream_jax.evaluation import compare as compare_evaluations
from dream_jax.evaluation import report as evaluation_report
from dream_jax.reports.comparison import compare
from dream_jax.reports.model_card import model_card
from dream_jax.reports.record import read_record
from dream_jax.reports.run_report import render_report
from dream_jax.row_file import RowFile
from dream_jax.tokenizer import ByteTokenizer, load_tokenizer, read_template, write_template
from dream_jax.trainer.folder import MetricsLog, check_folder
from dream_jax.trainer.recipes import read_recipe
from mask_study import Study, StudyPlan

DAMAGES = 12
"""Number of damages for each file."""
OTHERS = (None, True, -1, 5, 0.5, 1e300, 2**63, 10**30, "x", "\ud83d", "", [], [5], {}, {"a": 1}, [[["x"]]])
ROW = {"number": 1, "identity": "i", "correct": True, "found": "x", "reason": "r", "answer": "x"}
ROW |= {"tokens_to_end": 3, "room": 8}


@pytest.fixture(scope="module")
def places(golden_dir: Path, nano_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one folder of each kind; the tests damage files of copies."""
    places = tmp_path_factory.mktemp("places")
    shutil.copytree(golden_dir / "tiny_a" / "hf", places / "hf")
    model = pretrained.load(places / "hf")
    pretrained.convert_from_hf(places / "hf", places / "converted")
    ByteTokenizer().save(places / "converted")
    write_template(places / "converted", "raw")
    dream_jax.export_hf(model, places / "sharded", max_shard_size=60_000)
    dream_jax.save_adapter(
        lora.attach(model, lora.LoraConfig(rank=1, alpha=1.0), jax.random.key(0)), places / "adapter"
    )
    write_tokenizer(places / "tokenizer")
    (places / "tokenizer" / "added_tokens.json").write_text('{"<|mask|>": 260}')
    (places / "tokenizer" / "special_tokens_map.json").write_text('{"mask_token": "<|mask|>"}')
    save_again(places / "tokenizer", places / "saved again")
    shutil.copytree(nano_run, places / "run", ignore=shutil.ignore_patterns("checkpoints", "model", "tensorboard"))
    (places / "evaluation").mkdir()
    (places / "evaluation" / "settings.json").write_text('{"task": "sudoku"}')
    rows = [ROW | {"seed": seed, "forwards": 7} for seed in range(2)]
    (places / "evaluation" / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (places / "evaluation" / "seconds.jsonl").write_text('{"rows": 2, "seconds": 1.5, "compiled": true}\n')
    (places / "study").mkdir()
    with open(Path(__file__).parent.parent / "docs" / "study" / "runs.jsonl", encoding="utf-8") as file:
        (places / "study" / "runs.jsonl").write_text("".join(next(file) for _ in range(2)))
    (places / "recipe.toml").write_text('about = "a"\nsource = "b"\n[settings]\nmodel = "nano"\nsteps = 3\n')
    return places


def read_run(run: Path) -> None:
    record = read_record(run)
    render_report(record)
    compare(run, run)
    model_card(run, name="m", dtype="float32", adapter=False)


def read_evaluation(folder: Path) -> None:
    compare_evaluations(folder, folder).to_markdown("a", "b")
    rows, seconds = RowFile(folder / "items.jsonl").rows, RowFile(folder / "seconds.jsonl").rows
    evaluation_report.check_rows(folder, "sudoku", rows, seconds)
    evaluation_report.summarize("sudoku", rows, seconds).to_json()


def read_tokenizer(folder: Path) -> None:
    load_tokenizer(folder).chat([{"role": "user", "content": "<|mask|>"}])


def read_study(folder: Path) -> None:
    list(Study(folder, StudyPlan(tasks=("addition",), variants=("bidirectional", "causal"))).rows())


def resume(run: Path) -> None:
    import shared_run

    check_folder(shared_run.settings(run, overwrite=True))
    if (run / "summary.json").exists():
        MetricsLog(shared_run.settings(run, log_to=()), done=3).close()


def describe_hf(folder: Path) -> None:
    config = DreamConfig.from_file(folder)
    with hf.open_source(folder) as source:
        source.check(config)


def unit_of(folder: Path) -> None:
    config = DreamConfig.from_file(folder)
    checkpoint.read_description(folder, config)
    checkpoint.read_unit(folder, checkpoint.units(config, "float32")[-1])


READERS: dict[str, Callable[[Path], Any]] = {
    "hf/config.json": describe_hf,
    "sharded/model.safetensors.index.json": describe_hf,
    "converted/config.json": pretrained.describe,
    "converted/dream_jax.json": lambda folder: (pretrained.describe(folder), unit_of(folder)),
    "converted/byte_tokenizer.json": load_tokenizer,
    "converted/prompt_format.json": read_template,
    "adapter/adapter.json": pretrained.describe_adapter,
    "tokenizer/tokenizer_config.json": read_tokenizer,
    "tokenizer/vocab.json": read_tokenizer,
    "tokenizer/added_tokens.json": read_tokenizer,
    "tokenizer/special_tokens_map.json": read_tokenizer,
    "tokenizer/merges.txt": read_tokenizer,
    "saved again/tokenizer.json": read_tokenizer,
    "saved again/tokenizer_config.json": read_tokenizer,
    "saved again/chat_template.jinja": read_tokenizer,
    "run/settings.json": lambda run: (resume(run), read_run(run)),
    "run/summary.json": read_run,
    "run/data.json": read_run,
    "run/samples.json": read_run,
    "run/parts.json": read_run,
    "run/incidents.jsonl": read_run,
    "run/metrics.csv": lambda run: (read_run(run), resume(run)),
    "run/eval.csv": lambda run: (read_run(run), resume(run)),
    "evaluation/settings.json": read_evaluation,
    "evaluation/items.jsonl": read_evaluation,
    "evaluation/seconds.jsonl": read_evaluation,
    "study/runs.jsonl": read_study,
    "recipe.toml": lambda folder: read_recipe(str(folder / "recipe.toml"), folder).train_settings(),
}


def damaged(content: bytes, rng: random.Random) -> Iterator[bytes]:
    """Yields damaged versions of a file: first of its bytes, then of single values in it."""
    start = rng.randrange(len(content))
    yield from (b"", b"[5]\n", b'{"a": ' * 100_000, b"\xef\xbb\xbf" + content, content[:start])
    yield content[:start] + rng.randbytes(9) + content[start + 9 :]
    while True:
        text = content.decode()
        lines = text.splitlines(keepends=True)
        number = rng.randrange(len(lines))
        try:
            whole = json.loads(text)
        except ValueError:
            try:
                value = json.loads(lines[number])
            except ValueError:  # a table or TOML: one word is replaced
                words = [place for place, letter in enumerate(text) if letter in ",=\n"]
                place = rng.choice(words) + 1
                yield (
                    text[:place] + rng.choice(["x", "", "9" * 5000, "1e999", ",,", "\0"]) + text[place + 3 :]
                ).encode()
                continue
            lines[number] = json.dumps(changed(value, rng)) + "\n"
            yield "".join(lines).encode()
            continue
        yield json.dumps(changed(whole, rng)).encode()


def changed(value: Any, rng: random.Random) -> Any:
    """Returns a JSON value in which one value, at any depth, is replaced, removed or added."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        inside = waiting.pop()
        keys = list(inside) if isinstance(inside, dict) else range(len(inside))
        # Of a long list or object, such as a vocabulary, a few entries are enough.
        for key in keys if len(keys) < 100 else rng.sample(list(keys), 5):
            places.append((inside, key))
            if isinstance(inside[key], dict | list):
                waiting.append(inside[key])
    if not places:
        return rng.choice(OTHERS)
    inside, key = rng.choice(places)
    if rng.random() < 0.2:
        del inside[key]
    else:
        inside[key] = rng.choice(OTHERS)
    return value


@pytest.mark.parametrize("name", READERS)
def test_damaged_file_is_named_or_works(name: str, places: Path, tmp_path: Path) -> None:
    source = (places / name).parent
    folder = tmp_path / "place"
    if source == places:
        folder.mkdir()
        shutil.copy(places / name, folder)
    else:
        shutil.copytree(source, folder)
    path, read = folder / Path(name).name, READERS[name]
    read(folder)
    versions = damaged(path.read_bytes(), random.Random(name))
    refused = 0
    for content in (next(versions) for _ in range(DAMAGES)):
        path.write_bytes(content)
        try:
            read(folder)
        except (ValueError, OSError) as error:
            refused += 1
            assert path.name in str(error), f"{content[:300]!r}: {error!r}"
            assert "\n" not in str(error) and len(str(error)) < 2000, f"{content[:300]!r}: {error!r}"
        except Exception as error:
            raise AssertionError(f"{content[-300:]!r}: {error!r}") from error
    assert refused or name == "run/incidents.jsonl"


@pytest.mark.parametrize("file", ["_METADATA", "_CHECKPOINT_METADATA", "_sharding", "norm.scale/.zarray"])
def test_damaged_metadata_of_orbax_is_named(file: str, places: Path, tmp_path: Path) -> None:
    """The size stays the same, so that the check of the sizes does not find the damage."""
    shutil.copytree(places / "converted", tmp_path / "converted")
    unit = tmp_path / "converted" / "weights" / "head"
    path = unit / file
    content, rng = path.read_bytes(), random.Random(file)
    found = {}
    for damage in (b"\0" * len(content), b"[" * len(content), b"{}".ljust(len(content)), *some_bytes(content, rng)):
        path.write_bytes(damage)
        try:
            unit_of(tmp_path / "converted")
        except ValueError as error:
            found[damage] = str(error)
            assert "weights/head" in str(error) and "convert the source again" in str(error)
    assert found or file == "_CHECKPOINT_METADATA"  # this file is not needed for reading


def some_bytes(content: bytes, rng: random.Random) -> Iterator[bytes]:
    for _ in range(3):
        start = rng.randrange(len(content) - 4)
        yield content[:start] + rng.randbytes(4) + content[start + 4 :]


# Commands


def last_line(*arguments: object) -> str:
    """Runs a command that must fail without a traceback, and returns its error."""
    done = run_script(*map(str, arguments))
    assert done.returncode == 1, done
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_commands_name_damaged_files(places: Path, tmp_path: Path) -> None:
    shutil.copytree(places, tmp_path, dirs_exist_ok=True)
    deep = "[" * 100_000
    (tmp_path / "hf" / "config.json").write_text(deep)
    assert "config.json has more than 100 lists" in last_line("convert/hf_to_flax.py", tmp_path / "hf", tmp_path / "o")
    fields = json.loads((places / "hf" / "config.json").read_text())
    for wrong in ([1], "x", 5):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(fields | {"auto_map": wrong}))
        error = last_line("convert/hf_to_flax.py", tmp_path / "hf", tmp_path / "o")
        assert "config.json: auto_map=" in error and "must be an object" in error
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert "neither rope_theta" in last_line("convert/qwen2_to_dream.py", tmp_path / "hf", tmp_path / "o")
    (tmp_path / "converted" / "prompt_format.json").write_text("{'template'")
    error = last_line("sample.py", "--model", tmp_path / "converted", "--prompt", "x", "--tokenizer", "bytes")
    assert "prompt_format.json" in error or "mask token" in error
    (tmp_path / "run" / "samples.json").write_text("[5]")
    assert "samples.json holds a list, not an object" in last_line("train.py", "--report", tmp_path / "run")
    (tmp_path / "deep.toml").write_text("a = " + deep)
    assert "deep.toml has more than 100 lists" in last_line("train.py", "--recipe", tmp_path / "deep.toml")
    (tmp_path / "evaluation" / "items.jsonl").write_text("[5]\n")
    both = ("--compare", tmp_path / "evaluation", places / "evaluation")
    assert "items.jsonl:1: a list, not an object" in last_line("evaluate.py", *both)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py", "convert/gsm8k_to_s1k.py"])
def test_arguments_that_are_not_utf8_are_refused(script: str) -> None:
    # Python keeps the byte 0xff of a command line as U+DCFF.
    error = last_line(script, "--prompt", "caf\udcff")
    assert "the byte 0xff, which is not UTF-8" in error
