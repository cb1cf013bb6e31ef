"""README and docs: commands parse, Python runs, links lead somewhere, figures are those of the data, the site builds."""

import argparse
import functools
import importlib.util
import io
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import tomllib
import types
import xml.etree.ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro

import dream_jax
from dream_jax.evaluation.probe import parse_expectation
from dream_jax.tokenizer import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
PAGES = [*READMES, *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [page for page in (ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md") if page.is_file()]


def module_at(path: Path) -> dict[str, Any]:
    """The names that a script of docs/ defines."""
    return runpy.run_path(str(path), run_name="docs_script")


TABLES = module_at(ROOT / "docs" / "write_tables.py")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """All fenced blocks of a page, in order."""
    fence = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    text = page.read_text(encoding="utf-8")
    for match in fence.finditer(text):
        yield Block(page, text.count("\n", 0, match.start()) + 1, match[2], textwrap.dedent(match[3]))


def commands(block: Block, variables: dict[str, str]) -> Iterator[list[str]]:
    """The command lines of a block of shell, as words; `variables` collects what NAME="..." says on the page.

    A command inside a quoted `--command=` (gcloud) counts like one of its own.
    """
    for line in block.text.replace("\\\n", " ").splitlines():
        said = re.fullmatch(r'([A-Z_]+)="(.*)"', line.strip())
        if said:
            variables[said[1]] = said[2]
            continue
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        quoted = [word.partition("=")[2] for word in words if word.startswith("--command=")]
        lines = [words] if not quoted else [shlex.split(inner) for inner in quoted]
        for words in lines:
            command: list[str] = []
            for word in [*words, "&&"]:
                if word != "&&":
                    command.append(word)
                elif command:
                    yield command
                    command = []


SHELL = [(page, block) for page in PAGES for block in blocks(page) if block.language in ("sh", "bash", "console")]
PYTHON = [block for page in PAGES for block in blocks(page) if block.language == "python"]
WITHOUT_CHECK = {"git", "cd", ".", "gcloud"}  # of other programs, with nothing of ours in them


def all_commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of the docs, with the block it stands in."""
    variables: dict[Path, dict[str, str]] = {}
    for page, block in SHELL:
        for command in commands(block, variables.setdefault(page, {})):
            yield block.name, command


COMMANDS = list(all_commands())
SCRIPTS = sorted({(name, *command) for name, command in COMMANDS if any(word.endswith(".py") for word in command)})


class Parsed(BaseException):
    """Raised in place of running a script, once its command line has been read."""


def read_command_line(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """Runs a script up to the point where its parser has read the arguments.

    Raises:
      SystemExit: the parser refuses them (2), or the script had nothing to parse and is done (0).
    """
    at = next(number for number, word in enumerate(command) if word.endswith(".py"))
    script, arguments = ROOT / command[at], command[at + 1 :]
    assert script.is_file(), f"{command[at]} is no file of the project"
    tyro_cli, parse_args = tyro.cli, argparse.ArgumentParser.parse_args

    def cli(target: Any, *args: Any, **options: Any) -> Any:
        # tyro calls a function with what it has read: this one stands for it and does nothing.
        tyro_cli(target if isinstance(target, type) else functools.wraps(target)(lambda **_: None), *args, **options)
        raise Parsed

    def parsed(self: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        parse_args(self, *args, **options)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", cli)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.chdir(ROOT)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Parsed:
        return
    pytest.fail(f"{command[at]} ended without reading its command line")


@pytest.mark.parametrize("where_and_command", SCRIPTS, ids=lambda words: " ".join(words)[:90])
def test_scripts_read_their_command_lines(
    where_and_command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where, *command = where_and_command
    try:
        read_command_line(monkeypatch, command)
    except SystemExit as end:
        printed = capsys.readouterr()
        assert not end.code, f"{where}: {shlex.join(command)}\n{printed.out}{printed.err}"


@pytest.mark.parametrize(
    "line",
    ["train.py --nope 1", "sample.py --top-p much --prompt x", "examples/infill.py --nope 1", "convert/hf_to_flax.py"],
)
def test_a_wrong_command_line_is_noticed(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        read_command_line(monkeypatch, ["python", *line.split()])
    assert refused.value.code == 2
    capsys.readouterr()


def test_other_commands_are_known() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for where, command in COMMANDS:
        said = f"{where}: {shlex.join(command)}"
        program, *rest = [word for word in command if not re.fullmatch(r"[A-Z_]+=.*", word)]
        if any(word.endswith(".py") for word in command) or program in WITHOUT_CHECK:
            continue
        if program == "make":
            assert set(rest) <= targets, said
        elif program == "pip":
            extras = re.findall(r"\.\[([\w,-]+)\]", " ".join(rest))
            named = {extra for found in extras for extra in found.split(",")}
            assert named <= project["optional-dependencies"].keys(), said
        elif program in ("python", "python3") and rest[0] == "-m":
            assert rest[1] in ("venv", "pip", "pytest") or importlib.util.find_spec(rest[1]), said
        else:
            assert program in ("python", ".ci/run", "bash", "pre-commit", "pytest"), f"{said}: not checked by any test"


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which runs/demo/model is a nano model, as after `make demo`, but untrained."""
    folder = tmp_path_factory.mktemp("demo")
    model = dream_jax.load("nano")
    (folder / "runs" / "demo").mkdir(parents=True)
    directory = folder / "runs" / "demo" / "model"
    dream_jax.save(model, directory)
    ByteTokenizer().save(directory)
    return folder


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_python_runs(block: Block, demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_folder)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    exec(compile(block.text, block.name, "exec"), {"__name__": "docs"})


def test_readme_fits_a_screen_or_three() -> None:
    for readme in READMES:
        lines = readme.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 200, f"{readme.name} has {len(lines)} lines"
        top = "\n".join(lines[:60])
        for needed in ("docs/img/canvas.svg", "| Status |" if readme.stem == "README" else "| 现状 |", "```python"):
            assert needed in top, f"{readme.name}: {needed} is not within the first 60 lines"


def test_the_two_readmes_say_the_same_commands() -> None:
    def said(page: Path) -> list[list[str]]:
        scripts = [command for where, command in COMMANDS if where.startswith(f"{page.name}:")]
        return [[re.sub(r"[^\x00-\x7f].*|.* .*", "TEXT", word) for word in command] for command in scripts]

    assert said(READMES[0]) == said(READMES[1])


@pytest.mark.parametrize("name", TABLES["FILES"])
def test_figures_are_those_of_the_data(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert TABLES["filled"](text) == text, f"{name} differs from bench/results: run python docs/write_tables.py"


@pytest.mark.parametrize("name", TABLES["TEMPLATES"])
def test_numbers_in_sentences_are_those_of_the_data(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert TABLES["rendered"](name) == text, f"{name} differs from its template and the data: run docs/write_tables.py"


# What may stand in a template with a decimal point: settings, thresholds, sizes, versions and examples of notation.
NO_RESULTS = {"0.01", "0.03", "0.1", "0.15", "0.25", "0.79", "0.86", "0.9", "0.99", "1.1", "2.5", "7.6", "2504.12216"}


@pytest.mark.parametrize("name", TABLES["TEMPLATES"])
def test_no_result_is_typed_into_a_template(name: str) -> None:
    text = TABLES["template_of"](name).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$|\{\{.*?\}\}|\{%.*?%\}|<!--.*?-->|`[^`]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    found = set(re.findall(r"\d+\.\d+", text)) - NO_RESULTS
    assert not found, f"docs/templates/{Path(name).name} says {sorted(found)}; write numbers with docs/page_numbers.py"


def test_tables_of_runs_that_are_made_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block diffusion and the refreshes: without their data the page says so; with it, seeds far apart are shown."""
    from mask_study import block_diffusion, runs

    names = TABLES["block_diffusion_study"].__globals__
    study = tmp_path / "docs" / "study"
    study.mkdir(parents=True)
    (study / "floors.csv").write_bytes((ROOT / "docs" / "study" / "floors.csv").read_bytes())
    monkeypatch.setitem(names, "ROOT", tmp_path)
    assert TABLES["block_diffusion_study"]().startswith("Not run")
    assert TABLES["refreshing"](chinese=True).startswith("未运行")
    records = [
        {"task": "countdown", "arm": arm, "seed": seed, "steps": 320, "test_rows": 256,
         "measured": {"nats an answer": 16 * nats, "nats a token": nats, "a token a pass": 0.25}}
        for arm, column in (("bidirectional", (0.20, 0.21, 0.22)), ("two streams, blocks of 4", (0.15, 0.16, 1.9)))
        for seed, nats in enumerate(column)
    ]  # fmt: skip
    runs.write_table(study / "block_diffusion.csv", block_diffusion.summary(records))
    first, second = TABLES["block_diffusion_study"]().splitlines()[2:]
    assert first.startswith(
        "| countdown | bidirectional | 320 | 3.36 [2.96, 3.76] | 1.76 | 0.210 [0.185, 0.235] |  | 25 ["
    )
    assert "| 0.737 (0.150 to 1.900) | +0.527 (-0.050 to +1.680) |" in second
    assert "| 0.737 (0.150 至 1.900) |" in TABLES["block_diffusion_study"](chinese=True)
    rows = [
        {"task": "sudoku", "variant": "causal", "seed": seed, "measure": "accuracy", "of": way, "passes": 0.0,
         "value": 0.5, "test_rows": 256}
        for way in ("no cache", "never")
        for seed in range(3)
    ]  # fmt: skip
    runs.write_table(study / "refreshing.csv", runs.summarise(rows))
    found = TABLES["refreshing"](chinese=True).splitlines()
    assert found[0] == "| 任务 | 注意力掩码 | 不用缓存 | 从不 |" and found[2].startswith(
        "| 数独 | 因果 | 50 [37, 63] |"
    )


def test_differences_are_counted_once_and_claimed_with_an_interval_only() -> None:
    """Bidirectional minus causal is causal minus bidirectional, and seeds that are far apart have no interval."""
    numbers = TABLES["_numbers"](False)
    counted = {key: int(numbers.comparisons(key).replace(",", "")) for key in numbers._counts}
    pairs = {
        (row["task"], row["measure"], row["of"], frozenset((row["variant"], row["minus"])))
        for row in numbers.differences
    }
    assert counted["all"] == len(pairs) and counted["all"] + counted["mirrored"] == len(numbers.differences)
    assert counted["with_interval"] + counted["seeds"] == counted["all"]
    assert counted["false_discovery"] < counted["exclude"] < counted["with_interval"]
    assert counted["chance"] == round(0.05 * counted["with_interval"])


def test_a_number_that_the_study_does_not_have_is_noticed() -> None:
    rendered, name = TABLES["rendered"], "docs/findings.md"
    assert rendered(name, 'It is {{ share("copy", "causal", mean=true) }}.\n') == "It is 100 %.\n"
    with pytest.raises(KeyError, match="the study has no accuracy 'confidence' of 'diagonal' on 'copy'"):
        rendered(name, '{{ share("copy", "diagonal") }}')
    with pytest.raises(Exception, match="'shares' is undefined"):
        rendered(name, '{{ shares("copy", "causal") }}')


@pytest.mark.skipif(importlib.util.find_spec("markdown") is None, reason="markdown is not installed: make docs")
@pytest.mark.parametrize("name", TABLES["SLIDES"])
def test_slides_are_made_from_their_text(name: str) -> None:
    source = (ROOT / TABLES["SLIDES"][name]).read_text(encoding="utf-8")
    text = (ROOT / name).read_text(encoding="utf-8")
    assert TABLES["slides"](source, (ROOT / name).parent) == text, f"{name}: run docs/write_tables.py"
    assert text.count("<section ") == 12 and not re.findall(r'(?:src|href)="(?!data:)', text)


def test_the_baseline_of_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three learned tokens of which one ends the row; two masked tokens, one of them an end."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    unigram = module_at(ROOT / "bench" / "gsm8k_scratch.py")["unigram"]
    rows, learned = np.array([[3, 0, 0, 2]]), np.array([[False, True, True, True]])
    grid = types.SimpleNamespace(masked_LRT=np.array([[[False, True, False, True]]]))
    nll, ends_known, share = unigram(rows, learned, grid, rows, 4, 2)
    assert nll == pytest.approx((math.log(3.04 / 2.01) + math.log(3.04 / 1.01)) / 2)
    assert ends_known == pytest.approx(math.log(2.03 / 2.01) / 2) and share == 0.5


@pytest.mark.slow
def test_what_test_rows_share_with_training_rows_is_counted_again() -> None:
    found = TABLES["_page_numbers"]().make_split()
    assert json.loads((ROOT / "docs" / "study" / "split.json").read_text(encoding="utf-8")) == found
    assert found["same_prompt"] == 0


def test_every_table_is_shown() -> None:
    shown = {
        match[2] for name in TABLES["FILES"] for match in TABLES["BLOCK"].finditer((ROOT / name).read_text("utf-8"))
    }
    assert shown == TABLES["BLOCKS"].keys()


def test_a_changed_figure_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    speed = TABLES["_h200_figures"]()["full_speed"]
    assert text.count(speed) == 1
    assert TABLES["filled"](text.replace(speed, "99,999")) == text


def test_pictures_are_those_of_the_script() -> None:
    drawn = module_at(ROOT / "docs" / "make_pictures.py")
    architecture = (ROOT / "docs" / "img" / "architecture.svg").read_text(encoding="utf-8")
    assert architecture == drawn["draw_architecture"](), "run python docs/make_pictures.py"
    for language, name in (("en", "cache.svg"), ("zh", "cache.zh.svg")):
        assert (ROOT / "docs" / "img" / name).read_text(encoding="utf-8") == drawn["draw_cache"](language), name
    canvas = xml.etree.ElementTree.parse(ROOT / "docs" / "img" / "canvas.svg").getroot()
    words = [element.text or "" for element in canvas.iter() if element.tag.endswith("text")]
    answer = "".join(words[-17:-1])  # sixteen cells of the last canvas, then the line below
    rows = [answer[start : start + 4] for start in range(0, 16, 4)]
    given = [row for row in drawn["PUZZLE"].split("\n") if row]
    assert all(sorted(line) == list("1234") for line in [*rows, *map("".join, zip(*rows, strict=True))])
    assert all(have in ("0", cell) for have, cell in zip("".join(given), answer, strict=True))


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(re.sub(r"`[^`]*`", "", text)):
        if re.match(r"https?://|mailto:|#", target):
            continue
        file, _, anchor = target.partition("#")
        reached = page.parent / file
        assert reached.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(reached), f"{page.name} links to {target}: no such heading"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert f": {page.name}\n" in navigation, f"docs/{page.name} is not in mkdocs.yml"


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: make docs")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stderr
    front = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "fine-tune-on-your-chats/" in front
    assert "fonts.googleapis.com" not in front and "cdn" not in front
    assert "masked_diffusion_loss" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")


def test_the_file_tree_of_the_readmes_is_that_of_the_project() -> None:
    for readme in READMES:
        (tree,) = [block for block in blocks(readme) if block.text.startswith("train.py")]
        inside = False
        for line in tree.text.splitlines():
            folder = ROOT / "dream_jax" if inside and line[0] in "├└" else ROOT
            inside = line.startswith("dream_jax/") or folder != ROOT
            names = re.split(r"\s{3,}", line.lstrip("├└─ "))[0].split()
            for name in names:
                found = [folder / name, folder / f"{name}.py"]
                assert any(path.exists() for path in found), (
                    f"{readme.name}: {line!r} names {name}, which does not exist"
                )
                assert not name.endswith("/") or (folder / name).is_dir(), f"{readme.name}: {name} is no folder"


PATH = re.compile(r"`((?:[\w-]+/)+[\w.-]*)`")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_files_that_are_named_exist(page: Path) -> None:
    ours = {path.name for path in ROOT.iterdir() if path.is_dir()} | {
        path.name for path in (ROOT / "dream_jax").iterdir() if path.is_dir()
    }
    for name in PATH.findall(page.read_text(encoding="utf-8")):
        if name.split("/")[0] in ours - {"runs", "build"} and "NAME" not in name:
            assert (ROOT / name).exists() or (ROOT / "dream_jax" / name).exists(), f"{page.name} names {name}"


def test_rows_of_data_are_what_the_code_reads() -> None:
    (chats,) = [block for block in blocks(ROOT / "docs" / "fine-tune-on-your-chats.md") if block.language == "json"]
    for line in chats.text.splitlines():
        assert json.loads(line).keys() in ({"messages"}, {"prompt", "response"})
    (row,) = [block for block in blocks(ROOT / "docs" / "evaluate.md") if block.language == "json"]
    assert parse_expectation(json.loads(row.text), "the row")("In Paris.").correct
