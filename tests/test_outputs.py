"""What the commands write: nothing of the user's is deleted or doubled, and damaged directories are named."""

import json
import pathlib
import random
import shutil

import jax
import pytest
from commands import run_script
from flax import nnx

import dream_jax
from dream_jax import files, lora, paths, pretrained
from dream_jax.evaluation import report
from dream_jax.lora import LoraConfig
from dream_jax.pretrained.directories import check_sums
from dream_jax.row_file import RowFile
from dream_jax.tokenizer import ByteTokenizer, DreamTokenizer
from dream_jax.trainer import TrainSettings
from dream_jax.trainer.folder import check_folder, claimed_folder


@pytest.fixture
def source(golden_dir, tmp_path):
    """A Hugging Face directory of a tiny model with a byte tokenizer."""
    folder = tmp_path / "source"
    shutil.copytree(golden_dir / "tiny_a" / "hf", folder)
    ByteTokenizer().save(folder)
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --overwrite


def test_the_parent_of_a_source_is_not_replaced(source, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("thesis")
    before = contents(tmp_path)
    for target in (tmp_path, source / "..", source, source / "." / ".." / "source"):
        ended = run_script("convert/hf_to_flax.py", source, target, "--overwrite")
        assert ended.returncode == 1 and ended.stderr.startswith("error: "), ended
        assert "is the source itself" in ended.stderr or "contains" in ended.stderr or "notes.txt" in ended.stderr
    assert contents(tmp_path) == before


def test_an_adapter_and_a_tokenizer_are_read_too(source, tmp_path):
    converted, adapter = tmp_path / "made" / "converted", tmp_path / "made" / "adapter"
    pretrained.convert_from_hf(source, converted)
    model = adapted(pretrained.load(converted))
    dream_jax.save_adapter(model, adapter)
    (tmp_path / "made" / "config.json").write_text("{}")
    before = contents(tmp_path)
    for target in (adapter, tmp_path / "made", converted):
        with pytest.raises((ValueError, FileExistsError)):
            pretrained.convert_to_hf(converted, target, adapter=adapter, overwrite=True)
    assert contents(tmp_path) == before


def adapted(model):
    return lora.attach(model, LoraConfig(rank=2, alpha=2.0), jax.random.key(0))


def test_notes_in_a_model_are_kept_by_every_writer(source, tmp_path):
    converted, exported, adapter = tmp_path / "converted", tmp_path / "exported", tmp_path / "adapter"
    pretrained.convert_from_hf(source, converted)
    pretrained.convert_to_hf(converted, exported)
    model = pretrained.load(converted)
    tuned = adapted(model)
    dream_jax.save_adapter(tuned, adapter)
    writers = {
        converted: (
            lambda: pretrained.convert_from_hf(source, converted, overwrite=True),
            lambda: dream_jax.save(model, converted, overwrite=True),
        ),
        exported: (
            lambda: pretrained.convert_to_hf(converted, exported, overwrite=True),
            lambda: dream_jax.export_hf(model, exported, overwrite=True),
        ),
        adapter: (lambda: dream_jax.save_adapter(tuned, adapter, overwrite=True),),
    }
    for folder, write in writers.items():
        for one in write:
            one()  # nothing strange is there
            (folder / "my notes.txt").write_text("mine")
            with pytest.raises(FileExistsError, match=r"holds my notes\.txt, not written by this program"):
                one()
            assert (folder / "my notes.txt").read_text() == "mine"
            (folder / "my notes.txt").unlink()


def test_models_of_earlier_versions_are_replaced(source, tmp_path):
    converted = tmp_path / "converted"
    pretrained.convert_from_hf(source, converted)
    (converted / files.CHECKSUMS).unlink()
    for name in ("weights/notes.txt", "train.py"):
        (converted / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"holds {name},"):
            pretrained.convert_from_hf(source, converted, overwrite=True)
        (converted / name).unlink()
    pretrained.convert_from_hf(source, converted, overwrite=True)


def plain(out, **changes):
    return TrainSettings.flat(**{"out": out, "steps": 12, "batch_size": 8, "eval_rows": 4, "samples": 2} | changes)


def test_a_run_with_notes_in_its_folders_is_kept(source, tmp_path):
    out = tmp_path / "run"
    with claimed_folder(plain(out)):
        pretrained.convert_from_hf(source, out / "model")
        (out / "checkpoints" / "5" / "state").mkdir(parents=True)
        (out / "checkpoints" / "5" / "state" / "x").write_text("")
        files.write_checksums(out / "checkpoints" / "5")
        (out / "checkpoints" / "5" / "_CHECKPOINT_METADATA").write_text("")
        (out / "metrics.csv").write_text("")
        (out / "notes.txt").write_text("beside the files of the run: it stays")
    again = plain(out, steps=3, overwrite=True)
    assert check_folder(again) is False
    (out / "checkpoints" / "6.damaged" / "state").mkdir(parents=True)  # a checkpoint without its checksums
    (out / "checkpoints" / "6.damaged" / "state" / "x").write_text("")
    assert check_folder(again) is False
    inside = ("notes.txt", "5/notes.txt", "6.damaged/notes.txt", "2026-thesis/notes.txt")
    for name in ("model/notes.txt", "tensorboard/notes.txt", *(f"checkpoints/{one}" for one in inside)):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"holds {name}, not written by a run"):
            check_folder(again)
        (out / name).unlink()
    (out / "checkpoints").rename(tmp_path / "on another disk")
    (out / "checkpoints").symlink_to(tmp_path / "on another disk")
    with pytest.raises(FileExistsError, match="holds checkpoints, a link, which --overwrite would remove"):
        check_folder(again)
    (out / "checkpoints").unlink()
    (tmp_path / "on another disk").rename(out / "checkpoints")
    for change in ({"model": str(out / "model")}, {"data": str(out)}, {"data": str(out / "notes.txt")}):
        with pytest.raises(ValueError, match="contains|is the source"):
            check_folder(plain(out, overwrite=True, steps=3, **change))
    with claimed_folder(again):
        assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "settings.json", "tensorboard"][:2]


# Links, tokenizers, addresses


def test_a_damaged_config_beside_a_tokenizer_is_named_before_the_weights_are_written(source, tmp_path):
    model = pretrained.load(source)
    for content in ('{"auto_map": ["a"]}', '{"auto_map": "a"}', "{"):
        (source / "config.json").write_text(content)
        with pytest.raises(ValueError, match=f"{source / 'config.json'}.*(must be an object|not valid JSON)"):
            dream_jax.save(model, tmp_path / "out", tokenizer_dir=source)
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_a_checkpoint_is_not_copied(source, tmp_path):
    (tmp_path / "secret.txt").write_text("SECRET=example")
    converted = tmp_path / "converted"
    pretrained.convert_from_hf(source, converted)
    for folder, script in ((source, "hf_to_flax"), (converted, "flax_to_hf")):
        for name in ("vocab.json", "generation_config.json", "modeling_x.py"):
            kept = (folder / name).read_bytes() if (folder / name).is_file() else None
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(tmp_path / "secret.txt")
            ended = run_script(f"convert/{script}.py", folder, tmp_path / "out")
            assert ended.returncode == 1 and f"{folder / name} is a link to" in ended.stderr
            assert not (tmp_path / "out").exists()
            (folder / name).unlink()
            if kept is not None:
                (folder / name).write_bytes(kept)
    model = pretrained.load(converted)
    (converted / "merges.txt").symlink_to(tmp_path / "secret.txt")
    for write in (dream_jax.save, dream_jax.export_hf):
        with pytest.raises(ValueError, match="is a link to"):
            write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_of_a_linked_file_is_not_saved(assets, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for path in (assets / "dream-v0-instruct-7b").iterdir():
        (folder / path.name).symlink_to(path)
    with pytest.raises(ValueError, match="is a link to"):
        DreamTokenizer(folder).save(tmp_path / "copy")


def test_a_tokenizer_that_is_not_there_is_an_error(source, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "nothere", "does not exist"), (tmp_path / "empty", "has no tokenizer files")):
        ended = run_script("convert/qwen2_to_dream.py", source, tmp_path / "out", "--tokenizer", path)
        assert ended.returncode == 1 and message in ended.stderr
    model = pretrained.load(source)
    for write in (dream_jax.save, dream_jax.export_hf):
        with pytest.raises(FileNotFoundError, match="nothere, the directory of the tokenizer, does not exist"):
            write(model, tmp_path / "out", tokenizer_dir=tmp_path / "nothere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "source"]


COMMANDS = [
    ("sample.py", "--model", "nano", "--prompts", "p.jsonl", "--out", "ADDRESS"),
    ("sample.py", "--model", "nano", "--prompts", "ADDRESS", "--out", "o.jsonl"),
    ("sample.py", "--model", "ADDRESS", "--prompt", "x"),
    ("sample.py", "--model", "nano", "--adapter", "ADDRESS", "--prompt", "x"),
    ("sample.py", "--model", "nano", "--tokenizer", "ADDRESS", "--prompt", "x"),
    ("evaluate.py", "--model", "nano", "--out", "ADDRESS"),
    ("evaluate.py", "--model", "nano", "--task", "chat", "--file", "ADDRESS"),
    ("evaluate.py", "--compare", "ADDRESS", "ADDRESS"),
    ("train.py", "--out", "ADDRESS"),
    ("train.py", "--data", "ADDRESS"),
    ("train.py", "--mix", "ADDRESS"),
    ("train.py", "--model", "ADDRESS"),
    ("train.py", "--plan", "--no-compile", "--topology", "h200:1", "--plan-out", "ADDRESS"),
    ("train.py", "--report", "ADDRESS"),
    ("train.py", "--compare", "ADDRESS", "ADDRESS"),
    ("study.py", "--out", "ADDRESS"),
    ("study.py", "--inspect", "ADDRESS"),
    ("convert/hf_to_flax.py", "source", "ADDRESS"),
    ("convert/hf_to_flax.py", "ADDRESS", "out"),
    ("convert/flax_to_hf.py", "source", "ADDRESS"),
    ("convert/flax_to_hf.py", "source", "out", "--adapter", "ADDRESS"),
    ("convert/qwen2_to_dream.py", "source", "ADDRESS"),
    ("convert/qwen2_to_dream.py", "source", "out", "--tokenizer", "ADDRESS"),
    ("convert/ar_to_dream.py", "--from", "source", "ADDRESS"),
    ("convert/ar_to_dream.py", "--from", "ADDRESS", "out"),
    ("convert/ar_to_dream.py", "--from", "source", "out", "--tokenizer", "ADDRESS"),
    ("convert/gsm8k_to_s1k.py", "ADDRESS", "out"),
    ("convert/gsm8k_to_s1k.py", "source", "ADDRESS"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_takes_an_address(source, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    script, *arguments = (word.replace("ADDRESS", "gs://bucket/x") for word in command)
    ended = run_script(script, *arguments)
    said = " ".join((ended.stdout + ended.stderr).replace("│", " ").split())
    assert ended.returncode in (1, 2) and "is an address" in said, ended
    assert "Traceback" not in said
    assert contents(tmp_path) == before and not (tmp_path / "gs:").exists()


def test_python_takes_no_address(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = pretrained.load(source)
    tuned = adapted(model)
    for write, one in (
        (dream_jax.save, model),
        (dream_jax.export_hf, model),
        (dream_jax.save_adapter, tuned),
    ):
        for address in ("gs://bucket/x", "s3://bucket/x", pathlib.Path("gs://bucket/x")):
            with pytest.raises(ValueError, match="is an address"):
                write(one, address)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Single files


def test_a_plan_replaces_a_plan_only(tmp_path):
    path = tmp_path / "thesis.json"
    command = ("train.py", "--plan", "--no-compile", "--model", "nano", "--topology", "h200:1", "--steps", 3)
    command += ("--max-length", 64, "--batch-size", 8, "--plan-out", path)
    for content, kind in (("mine\n", "text that begins with 'mine'"), ('{"a": 1}', "a JSON object with the keys a")):
        path.write_text(content)
        ended = run_script(*command)
        assert ended.returncode == 1 and f"is not a plan, but {kind}" in ended.stderr
        assert path.read_text() == content
    path.unlink()
    for _ in range(2):
        assert run_script(*command).returncode == 0
    ended = run_script(*command[:-1], tmp_path)
    assert ended.returncode == 1 and "is a directory; give the name of a file" in ended.stderr


def test_a_report_replaces_a_report_only(nano_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(nano_run, out)
    assert run_script("train.py", "--report", out).returncode == 0
    for name in ("report.md", "curves.png"):
        kept = (out / name).read_bytes()
        (out / name).write_text("mine")
        ended = run_script("train.py", "--report", out)
        assert ended.returncode == 1 and f"{name} exists and is not" in ended.stderr
        assert (out / name).read_text() == "mine"
        (out / name).write_bytes(kept)


# Files of answers


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    (folder / "tokenizer").mkdir()
    ByteTokenizer().save(folder / "tokenizer")
    model = dream_jax.Dream(dream_jax.PRESETS["nano"], rngs=nnx.Rngs(1))
    dream_jax.save(model, folder / "model", tokenizer_dir=folder / "tokenizer")
    return folder / "model"


def ask(nano, folder, out):
    (folder / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    flags = ("--prompts", folder / "p.jsonl", "--max-new-tokens", 2, "--template", "raw")
    return run_script("sample.py", "--model", nano, *flags, "--out", out)


def test_a_file_of_answers_is_written_once(nano, tmp_path):
    out = tmp_path / "o.jsonl"
    out.touch()
    with paths.claimed(out):
        ended = ask(nano, tmp_path, out)
    assert ended.returncode == 1 and "is writing" in ended.stderr and out.read_bytes() == b""
    assert ask(nano, tmp_path, out).returncode == 0
    whole = out.read_bytes()
    assert len(whole.splitlines()) == 2 and ask(nano, tmp_path, out).returncode == 0 and out.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl", "o.jsonl.settings.json", "p.jsonl"]

    out.write_bytes(whole + whole)
    ended = ask(nano, tmp_path, out)
    assert ended.returncode == 1
    assert f"{out}:3: the row has the same name as the row in line 1, (1, 0); remove one" in ended.stderr
    assert out.read_bytes() == whole + whole


def test_other_files_are_no_files_of_answers(nano, tmp_path):
    ended = ask(nano, tmp_path, tmp_path)
    assert ended.returncode == 1 and f"{tmp_path} is a directory; give the name of a file in it" in ended.stderr
    (tmp_path / "notes.settings.json").write_text("mine")
    ended = ask(nano, tmp_path, tmp_path / "notes")
    assert ended.returncode == 1 and "notes.settings.json exists and is not a file of settings" in ended.stderr
    assert (tmp_path / "notes.settings.json").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "p.jsonl")
    ended = ask(nano, tmp_path, tmp_path / "link")
    assert ended.returncode == 1 and "is the source itself" in ended.stderr


def test_rows_with_one_name(tmp_path):
    path = tmp_path / "rows"
    path.write_text('{"a": 1}\n{"a": [2]}\n{"a": [2]}\n')
    assert len(RowFile(path).rows) == 3
    with pytest.raises(ValueError, match=r"rows:3: the row has the same name as the row in line 2, \[2\]"):
        RowFile(path, name=lambda row: row["a"])


EVALUATE = ("evaluate.py", "--model", "nano", "--limit", 1, "--max-new-tokens", 2, "--steps", 1, "--out")


def test_a_folder_of_results_is_written_once(tmp_path):
    out = tmp_path / "results"
    out.mkdir()
    with paths.claimed(out):
        ended = run_script(*EVALUATE, out)
    assert ended.returncode == 1 and "is writing" in ended.stderr and list(out.iterdir()) == []
    for more in ((), ("--figure",), ("--overwrite",)):
        assert run_script(*EVALUATE, out, *more).returncode == 0
    names = ["figure.png", "items.jsonl", "report.md", "seconds.jsonl", "settings.json", "summary.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    row = (out / "items.jsonl").read_text()
    (out / "items.jsonl").write_text(row + row)
    ended = run_script(*EVALUATE, out)
    assert ended.returncode == 1 and "items.jsonl:2: the row has the same name as the row in line 1" in ended.stderr
    with pytest.raises(ValueError, match=r"items\.jsonl:2: the row has the same name"):
        report.compare(out, out)


@pytest.mark.parametrize("name", ["settings.json", "items.jsonl", "summary.json", "report.md", "figure.png"])
@pytest.mark.parametrize("more", [(), ("--overwrite", "--figure")])
def test_results_replace_results_only(tmp_path, name, more):
    """The folder of a training run has some of the names too."""
    (tmp_path / name).write_text('{"steps": 3}')
    ended = run_script(*EVALUATE, tmp_path, *more)
    assert ended.returncode == 1 and f"{name} exists and is not" in ended.stderr, ended
    assert contents(tmp_path) == {pathlib.Path(name): b'{"steps": 3}'}


def test_a_study_replaces_tables_of_studies_only(tmp_path):
    from mask_study.runs import PACKED, _read_packed, write_table

    path = tmp_path / "results.csv"
    for _ in range(2):
        write_table(path, [{"task": "copy", "seed": 1}])
    path.write_text("name,mark\n")
    with pytest.raises(FileExistsError, match="is not a table of a study, but text that begins with 'name,mark'"):
        write_table(path, [{"task": "copy", "seed": 1}])
    record = {"task": "copy", "variant": {"name": "causal"}, "seed": 0, "training_nll": [1.0], "measured": []}
    record |= {"settings": {"steps": 1, "batch": 1, "test_rows": 1}}
    (tmp_path / PACKED).write_text(2 * (json.dumps(record) + "\n"))
    with pytest.raises(ValueError, match=r"runs\.jsonl:2: the same run as in line 1; remove one"):
        _read_packed(tmp_path / PACKED)


# Checksums


def damages(content, rng):
    """A byte that differs, an end that is missing, other bytes of the same number, and no bytes."""
    flipped = bytearray(content)
    flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return {
        "flipped": bytes(flipped),
        "cut": content[:-2],  # two bytes, because the last one may be the end of the last line
        "garbage": rng.randbytes(len(content)),
        "empty": b"",
    }


def test_damage_of_every_file_is_named(source, tmp_path):
    made = {"converted": tmp_path / "converted", "exported": tmp_path / "exported"}
    pretrained.convert_from_hf(source, made["converted"])
    pretrained.convert_to_hf(made["converted"], made["exported"])
    rng = random.Random(0)
    for folder in made.values():
        seen = set()
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
            content, weights = path.read_bytes(), "weights" in path.parts or path.suffix == ".safetensors"
            for kind, changed in damages(content, rng).items():
                if weights and kind != "flipped" and path.name in seen:
                    continue  # there are many files of weights with the same name
                path.write_bytes(changed)
                with pytest.raises((ValueError, OSError), match=path.name):
                    # As `load` does: first all small files, then the weights.
                    check_sums(folder, weights=True) if weights else pretrained.describe(folder)
                    raise AssertionError((path, kind))
            seen.add(path.name)
            path.write_bytes(content)
        largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        content = largest.read_bytes()
        largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=largest.name):
            pretrained.load(folder)
        largest.write_bytes(content)
        pretrained.load(folder)


# Orbax leaves the futures of a failed restore alone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_without_checksums_is_no_traceback(source, tmp_path):
    """A directory of an earlier version, in which only files of the same size can be damaged without being noticed."""
    folder = tmp_path / "converted"
    pretrained.convert_from_hf(source, folder)
    (folder / files.CHECKSUMS).unlink()
    path = folder / "weights" / "layer_001" / "_METADATA"
    content = path.read_bytes()
    for changed in (
        b"\0" * len(content),
        b"[" + b" " * (len(content) - 2) + b"]",
        b"{" + b" " * (len(content) - 2) + b"}",
    ):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"weights.layer_001 (is damaged|does not fit)"):
            pretrained.load(folder)


def test_a_damaged_adapter_is_named(source, tmp_path):
    adapter = tmp_path / "adapter"
    model = pretrained.load(source)
    dream_jax.save_adapter(adapted(model), adapter)
    rng = random.Random(0)
    for path in sorted(path for path in adapter.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for changed in damages(content, rng).values():
            path.write_bytes(changed)
            with pytest.raises((ValueError, OSError), match=path.name):
                # As `load` does with an adapter.
                pretrained.describe_adapter(adapter)
                check_sums(adapter, weights=True)
        path.write_bytes(content)
    pretrained.load(source, adapter=adapter)


def test_a_model_card_may_be_edited(source, tmp_path):
    exported = tmp_path / "exported"
    pretrained.convert_from_hf(source, tmp_path / "converted")
    assert run_script("convert/flax_to_hf.py", tmp_path / "converted", exported).returncode == 0
    assert "README.md" in files.read_checksums(exported)["files"]
    (exported / "README.md").write_text("my card")
    pretrained.load(exported)


def test_who_changes_a_file_removes_the_checksums(source, tmp_path):
    converted = tmp_path / "converted"
    pretrained.convert_from_hf(source, converted)
    fields = json.loads((converted / "config.json").read_text())
    (converted / "config.json").write_text(json.dumps(fields | {"rope_theta": 1.0}))
    with pytest.raises(ValueError, match=r"config\.json has .*; make the directory again.* remove .*checksums\.json"):
        pretrained.describe(converted)
    (converted / files.CHECKSUMS).unlink()
    assert pretrained.load(converted).config.rope_theta == 1.0


def test_damage_is_noticed_before_a_conversion_writes(source, tmp_path):
    converted = tmp_path / "converted"
    pretrained.convert_from_hf(source, converted)
    largest = max((path for path in converted.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[7] ^= 1
    largest.write_bytes(content)
    with pytest.raises(ValueError, match="has CRC-32"):
        pretrained.convert_to_hf(converted, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
