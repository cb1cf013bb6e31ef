"""The order of the rooms: imports go down the ranks, libraries have homes, no machine's paths are tracked.

Reads the sources with `ast` and imports nothing of the project. An import inside a function counts like any.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dream_jax"

# The map in README.md says the same in words. A room is a module of dream_jax, or a folder of them.
RANKS = {
    "config": 0,
    "shapes": 0,
    "chips": 0,
    "target": 0,
    "masks": 1,
    "schedule": 1,
    "decoding": 1,
    "quantisation": 1,
    "sharding": 1,
    "tokenizer": 1,
    "atomic": 1,
    "checksums": 1,
    "attention": 2,
    "model": 3,
    "objective": 4,
    "hf": 4,
    "checkpoint": 4,
    "lora": 4,
    "optimizer": 4,
    "data": 4,
    "pretrained": 5,
    "flops": 5,
    "train_step": 5,
    "sampler": 5,
    "trainer": 6,
    "plan": 7,
    "reports": 7,
    "evaluation": 7,
}
FACADE = "__init__"  # the public face: imports any room, and no room imports it
SCRIPTS = {"train", "sample", "evaluate", "study", "mask_study", "convert", "bench"}

# Libraries with one home. Scripts obey as well; tests/ and bench/ compare with the published code and do not.
HOMES = {
    "safetensors": {"hf"},
    "transformers": {"tokenizer"},
    "datasets": {"data"},
    "grain": {"data"},
    "torch": set[str](),
}

# Ranks 0 to 5 must run on a bare accelerator image; these four meet the outside world and may use more.
LEAN_RANK = 5
WORLDLY = {"hf", "checkpoint", "data", "tokenizer"}
LEAN_LIBRARIES = {"jax", "flax", "optax", "numpy", "einops", "jaxtyping"}
WITHOUT_JAX = {"data": {"jax", "jaxlib", "flax", "optax"}, "tokenizer": {"jax", "jaxlib", "flax", "optax"}}


@dataclass(frozen=True)
class Import:
    """One imported dotted name and where it stands."""

    module: str
    line: int


def imports_of(source: str, package: str = PACKAGE) -> Iterator[Import]:
    """Every module that `source` imports, relative imports resolved against `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            dotted = ".".join([*base, *([node.module] if node.module else [])])
            if dotted == PACKAGE:  # `from dream_jax import masks` means the room, not the facade
                for alias in node.names:
                    yield Import(f"{dotted}.{alias.name}", node.lineno)
            else:
                yield Import(dotted, node.lineno)


def violations(source: str, room: str, package: str = PACKAGE) -> list[str]:
    """What is wrong with the imports of one file of `room` (a room's name, FACADE, or a script's name)."""
    found = []
    for imported in imports_of(source, package):
        top, _, rest = imported.module.partition(".")
        where = f"{room}, line {imported.line}: imports {imported.module}"
        if top == PACKAGE:
            if room in SCRIPTS:
                continue
            target = rest.partition(".")[0]
            if target == room and package != PACKAGE:
                continue  # inside a folder the modules know each other
            if target not in RANKS:
                found.append(f"{where}, which is not a room; a room imports from rooms, the facade is for users")
            elif room != FACADE and RANKS[target] >= RANKS[room]:
                found.append(f"{where}, but has rank {RANKS[room]} to its {RANKS[target]}: imports go down only")
        elif top in SCRIPTS:
            found.append(f"{where}: nothing importable lives in a script")
        elif room not in HOMES.get(top, {room}):
            found.append(f"{where}, whose only home is {sorted(HOMES[top]) or 'tests/ and bench/'}")
        elif top in WITHOUT_JAX.get(room, ()):
            found.append(f"{where}: {room} works without jax")
        elif is_lean(room) and top not in sys.stdlib_module_names | LEAN_LIBRARIES:
            found.append(f"{where}: this rank knows only {sorted(LEAN_LIBRARIES)} and the standard library")
    return found


def is_lean(room: str) -> bool:
    return room in RANKS and RANKS[room] <= LEAN_RANK and room not in WORLDLY


def room_and_package(path: Path) -> tuple[str, str]:
    """The room a file of the package belongs to, and the package its relative imports start from."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return parts[0], ".".join([PACKAGE, *parts[:-1]])


PACKAGE_FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
SCRIPT_FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "convert").rglob("*.py")])


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=short)
def test_package_file_imports_downwards_only(path: Path) -> None:
    room, package = room_and_package(path)
    assert room in RANKS or room == FACADE, (
        f"{short(path)} has no rank: add {room!r} to RANKS in {short(Path(__file__))} and to README.md"
    )
    assert violations(path.read_text(encoding="utf-8"), room, package) == []


@pytest.mark.parametrize("path", SCRIPT_FILES, ids=short)
def test_script_imports_no_script_and_no_foreign_library(path: Path) -> None:
    room = path.relative_to(ROOT).with_suffix("").parts[0]
    assert room in SCRIPTS, f"{short(path)} is not a known script: add {room!r} to SCRIPTS in {short(Path(__file__))}"
    assert violations(path.read_text(encoding="utf-8"), room) == []


def test_package_is_found() -> None:
    assert {"config", "model"} <= {room_and_package(path)[0] for path in PACKAGE_FILES}


def test_room_is_a_module_or_a_folder_not_both() -> None:
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if path.is_dir() and path.name != "__pycache__"}
    modules = {path.stem for path in (ROOT / PACKAGE).glob("*.py")}
    assert folders & modules == set()


@pytest.mark.parametrize(
    ("room", "source", "complaint"),
    [
        ("masks", "from dream_jax.model import Dream", "imports go down only"),  # up
        ("masks", "from dream_jax import schedule", "imports go down only"),  # sideways
        ("model", "import dream_jax.model", "imports go down only"),  # itself, when it is no folder
        (
            "masks",
            "def f():\n    import dream_jax.model as m",
            "imports go down only",
        ),  # hidden in a function
        ("masks", "from .model import Dream", "imports go down only"),  # relative
        ("masks", "from . import model", "imports go down only"),
        ("sampler", "from dream_jax import generate", "not a room"),  # the facade
        ("sampler", "import dream_jax", "not a room"),
        ("trainer", "import train", "nothing importable"),
        ("trainer", "from convert.hf_to_flax import main", "nothing importable"),
        ("train", "import sample", "nothing importable"),
        ("model", "from safetensors import numpy", "only home is ['hf']"),
        ("trainer", "import grain.python as grain", "only home is ['data']"),
        ("trainer", "import datasets", "only home is ['data']"),
        ("evaluation", "import transformers", "only home is ['tokenizer']"),
        ("train", "import transformers", "only home is ['tokenizer']"),
        ("hf", "import torch", "only home is tests/ and bench/"),
        ("data", "import jax.numpy as jnp", "works without jax"),
        ("sampler", "import rich", "standard library"),
        ("lora", "import yaml", "standard library"),
    ],
)
def test_checker_sees_a_violation(room: str, source: str, complaint: str) -> None:
    (message,) = violations(source, room)
    assert complaint in message


@pytest.mark.parametrize(
    ("room", "package", "source"),
    [
        (
            "sampler",
            PACKAGE,
            "from dream_jax import masks, model\nfrom .config import DreamConfig\nimport math, jax, numpy",
        ),
        (
            "data",
            "dream_jax.data",
            "import grain, datasets\nfrom dream_jax.data.rows import Row\nfrom . import jsonl",
        ),
        ("data", "dream_jax.data", "from ..tokenizer import Tokenizer"),
        ("hf", PACKAGE, "import safetensors.numpy"),
        ("tokenizer", PACKAGE, "def f():\n    from transformers import Qwen2Tokenizer"),
        ("trainer", PACKAGE, "import rich, tensorboardX\nfrom dream_jax import data"),
        (FACADE, PACKAGE, "from dream_jax.trainer import Trainer\nfrom dream_jax.sampler import generate"),
        ("train", PACKAGE, "import dream_jax, tyro\nfrom dream_jax import trainer"),
    ],
)
def test_checker_lets_good_imports_pass(room: str, package: str, source: str) -> None:
    assert violations(source, room, package) == []


# One machine's folders, and addresses of package files. (Written so that this file does not match.)
PLACES = re.compile(r"(?:^|[^\w.$}~/])/(?:home|root|Users|work|tmp)/[\w.]", re.MULTILINE)
PACKAGE_ADDRESS = re.compile(r"https?:/{2}[^\s\"'<>)]+\.(?:whl|tgz|deb|tar\.gz|tar\.bz2|zip)\b")


def project_files() -> list[Path]:
    """Tracked files and those about to be; git's ignore rules leave out what the tools create."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout, so nothing says which files belong to the project: {error}")
    paths = (ROOT / name for name in listed.split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_place_on_one_machine() -> None:
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # golden arrays and weights
        for pattern in (PLACES, PACKAGE_ADDRESS):
            found += [f"{short(path)}: {match.group()!r}" for match in pattern.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("path = '/" + "home/someone/dream'", True),
        ("/" + "root/.cache", True),
        ("cd /" + "tmp/x", True),
        ("jax @ https:" + "//example.org/jax-1-py3-none-any.whl", True),
        ("runs/demo and $HOME/root/x, https://example.org/docs", False),
    ],
)
def test_place_patterns(text: str, wrong: bool) -> None:
    assert bool(PLACES.search(text) or PACKAGE_ADDRESS.search(text)) is wrong
