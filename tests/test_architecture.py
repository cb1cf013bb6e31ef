"""Which module imports which: layers, circles, homes of libraries; and that no file names a folder of one machine.

`module_layers` reads the imports and derives the ranks; nothing of the project is imported. An import inside a function
counts like any other.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import module_layers
import pytest
from module_layers import FACADE, LAYER_OF, LAYERS, PACKAGE, ROOT, Sources, module_of

PACKAGE_SOURCES = module_layers.package_sources()
APPLICATION_SOURCES = module_layers.application_sources()
ORDER = {layer: number for number, layer in enumerate(LAYERS)}

# Libraries with one home. Applications obey as well; tests and bench compare with the published code and do not.
HOMES = {
    "safetensors": {"hf"},
    "transformers": {"tokenizer"},
    "datasets": {"data"},
    "grain": {"data"},
    "gguf": {"pretrained"},
    "fastapi": {"serving"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "prometheus_client": {"serving"},
    "torch": set[str](),
}

# What the compiled programs need must run on a bare accelerator image: these modules and all that they import.
COMPILED = {
    "attention", "decoding", "flops", "lora", "masks", "model", "objective", "optimizer", "quantisation", "sampler",
    "schedule", "sharding", "train_step",
}  # fmt: skip
LEAN_LIBRARIES = {"jax", "flax", "optax", "numpy", "einops", "jaxtyping"}
WITHOUT_JAX = {"data": {"jax", "jaxlib", "flax", "optax"}, "tokenizer": {"jax", "jaxlib", "flax", "optax"}}

# Pairs within a layer, or from a layer to one below it, that DESIGN.md rules out by name.
FORBIDDEN = {("objective", "data"), ("objective", "tokenizer"), ("model", "tokenizer")}


def library_complaint(where: str, home: str, name: str) -> Iterator[str]:
    """What is wrong with an import from outside the project in a module, or in an application, called `home`."""
    top = name.partition(".")[0]
    if home not in HOMES.get(top, {home}):
        yield f"{where}, whose only home is {sorted(HOMES[top]) or 'tests/ and bench/'}"
    if top in WITHOUT_JAX.get(home, ()):
        yield f"{where}: {home} works without jax"


def package_complaints(sources: Sources) -> list[str]:
    """What is wrong with the imports of files of dream_jax."""
    found = []
    applications = {name.partition(".")[0] for name in APPLICATION_SOURCES.texts}
    needed_when_compiled = module_layers.reachable(
        sources.graph(), (name for name in sources.texts if module_of(name) in COMPILED)
    )
    for name in sources.texts:
        module = module_of(name)
        for imported in sources.imports(name):
            where = f"{name}, line {imported.line}: imports {imported.name}"
            top = imported.name.partition(".")[0]
            if top == PACKAGE:
                target = module_of(imported.name)
                if target == FACADE:
                    found.append(f"{where}: dream_jax/__init__.py is for users; import the module itself")
                elif module not in (FACADE, target) and ORDER[LAYER_OF[target]] > ORDER[LAYER_OF[module]]:
                    found.append(f"{where}, which is up: {LAYER_OF[module]} -> {LAYER_OF[target]}")
                elif (module, target) in FORBIDDEN:
                    found.append(f"{where}: {module} must not know {target}")
            elif top in applications:
                found.append(f"{where}: nothing importable lives in an application")
            else:
                found += library_complaint(where, module, imported.name)
                if name in needed_when_compiled and top not in sys.stdlib_module_names | LEAN_LIBRARIES:
                    found.append(f"{where}: compiled programs need only {sorted(LEAN_LIBRARIES)}")
    return found


def application_complaints(sources: Sources) -> list[str]:
    """What is wrong with the imports of scripts and of the folders beside the package."""
    found = []
    own = {name.partition(".")[0] for name in APPLICATION_SOURCES.texts}
    for name in sources.texts:
        application = name.partition(".")[0]
        for imported in sources.imports(name):
            where = f"{name}, line {imported.line}: imports {imported.name}"
            top = imported.name.partition(".")[0]
            # bench/adapt.py makes the runs of one study on an accelerator.
            allowed = {("study", "mask_study"), ("bench", "mask_study")}
            if top in own and top != application and (application, top) not in allowed:
                found.append(f"{where}: nothing importable lives in another application")
            elif top not in own | {PACKAGE} and application != "bench":
                found += library_complaint(where, application, imported.name)
    return found


def test_each_module_is_in_one_layer() -> None:
    modules = {module_of(name) for name in PACKAGE_SOURCES.texts} - {FACADE}
    assert {"config", "model"} <= modules
    unknown = modules - set(LAYER_OF)
    assert not unknown, f"{sorted(unknown)}: put each into the lowest fitting layer of LAYERS in module_layers.py"
    assert sum(map(len, LAYERS.values())) == len(LAYER_OF)
    assert LAYERS.keys() | {"applications"} == module_layers.ABOUT_LAYERS.keys()


def test_module_is_a_file_or_a_folder_not_both() -> None:
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders & {path.stem for path in (ROOT / PACKAGE).glob("*.py")} == set()


def test_package_imports_go_down_the_layers() -> None:
    assert package_complaints(PACKAGE_SOURCES) == []


def test_applications_import_the_package_only() -> None:
    assert {"train", "sample", "evaluate", "study", "convert.hf_to_flax"} <= APPLICATION_SOURCES.texts.keys()
    assert application_complaints(APPLICATION_SOURCES) == []


def test_no_circle_between_modules() -> None:
    derived = module_layers.ranks(module_layers.module_graph(PACKAGE_SOURCES))
    assert derived["shapes"] == 0 < derived["model"] < derived["trainer"]


def test_no_circle_between_files() -> None:
    """Nor within a folder: a file of a folder imports its siblings, never the folder's own `__init__`."""
    module_layers.ranks(PACKAGE_SOURCES.graph())
    module_layers.ranks(APPLICATION_SOURCES.graph())


def test_model_receives_a_mask_and_chooses_none() -> None:
    """The model's file names no mask but those that say which tokens are padding."""
    tree = ast.parse(PACKAGE_SOURCES.texts["dream_jax.model"])
    from_module = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "masks"
    }
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dream_jax.masks")
        for alias in node.names
    }
    derived = {"two_streams", "starts_of_blocks", "starts_of_texts"}  # functions of the mask that the model receives
    assert from_module | imported <= {"Mask", "Bidirectional", "KeyPadding"} | derived


def test_training_loop_imports_few_modules() -> None:
    """The loop puts prepared things together; reports are made by train.py, after `train()` has returned."""
    imported = PACKAGE_SOURCES.graph()["dream_jax.trainer.loop"]
    assert len(imported) <= 12, sorted(imported)
    needed = module_layers.reachable(PACKAGE_SOURCES.graph(), ["dream_jax.trainer.loop"])
    assert not any(module_of(name) in ("reports", "evaluation", "plan") for name in needed)


def test_pages_have_the_table_of_the_layers() -> None:
    table = module_layers.layer_table()
    assert module_layers.pages_with_table()
    for page in module_layers.pages_with_table():
        text = page.read_text(encoding="utf-8")
        assert module_layers.fill(text, table) == text, f"{page.name} is old: run python tests/module_layers.py"


# The checker itself


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("dream_jax.masks.base", "from dream_jax.model import Dream", "which is up: basics -> model"),
        ("dream_jax.masks.base", "def f():\n    import dream_jax.model as m", "which is up"),
        ("dream_jax.masks.base", "from ..model import Dream", "which is up"),
        ("dream_jax.schedule", "from . import model", "which is up"),
        ("dream_jax.trainer.loop", "from dream_jax import reports", "which is up: runs -> services"),
        ("dream_jax.objective", "from dream_jax.data import sources", "must not know data"),
        ("dream_jax.sampler", "from dream_jax import generate", "for users"),
        ("dream_jax.sampler", "import dream_jax", "for users"),
        ("dream_jax.trainer.loop", "import train", "nothing importable"),
        ("dream_jax.trainer.loop", "from convert.hf_to_flax import main", "nothing importable"),
        ("dream_jax.evaluation", "import mask_study.tasks", "nothing importable"),
        ("train", "import sample", "nothing importable"),
        ("dream_jax.checkpoint", "from safetensors import numpy", "only home is ['hf']"),
        ("dream_jax.trainer.loop", "import grain.python as grain", "only home is ['data']"),
        ("dream_jax.trainer.loop", "import datasets", "only home is ['data']"),
        ("dream_jax.evaluation", "import transformers", "only home is ['tokenizer']"),
        ("dream_jax.evaluation", "import uvicorn", "only home is ['serving']"),
        ("train", "import transformers", "only home is ['tokenizer']"),
        ("study", "import torch", "only home is tests/ and bench/"),
        ("dream_jax.hf", "import torch", "only home is tests/ and bench/"),
        ("dream_jax.data.rows", "import jax.numpy as jnp", "works without jax"),
        ("dream_jax.sampler", "import rich", "compiled programs need only"),
        ("dream_jax.lora", "import yaml", "compiled programs need only"),
        ("dream_jax.shapes", "import yaml", "compiled programs need only"),
    ],
)
def test_checker_sees_a_violation(name: str, source: str, complaint: str) -> None:
    # The model imports the axis names: what those import, the compiled programs need.
    more = {"dream_jax.model": "from dream_jax import shapes"} if name == "dream_jax.shapes" else {}
    sources = {**dict.fromkeys(PACKAGE_SOURCES.texts, ""), **more, name: source}
    check = package_complaints if name.startswith(PACKAGE) else application_complaints
    if check is application_complaints:
        sources = {name: source}
    (message,) = check(Sources(sources, PACKAGE_SOURCES.folders))
    assert complaint in message


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "dream_jax.sampler.loop",
            "from dream_jax import masks, model\nfrom ..config import DreamConfig\nimport math, jax, numpy",
        ),
        ("dream_jax.data.sources", "import grain, datasets\nfrom dream_jax.data.rows import Row\nfrom . import jsonl"),
        ("dream_jax.data.rows", "from ..tokenizer import Tokenizer"),
        ("dream_jax.hf.source", "import safetensors.numpy"),
        ("dream_jax.tokenizer", "def f():\n    from transformers import Qwen2Tokenizer"),
        ("dream_jax.trainer.loop", "import rich, tensorboardX\nfrom dream_jax import data"),
        ("dream_jax", "from dream_jax.trainer import Trainer\nfrom dream_jax.sampler import generate"),
        ("train", "import dream_jax, tyro\nfrom dream_jax import trainer"),
        ("study", "from mask_study.tasks import TASKS"),
        ("bench.compare_pytorch", "import torch\nfrom bench import report"),
    ],
)
def test_checker_lets_good_imports_pass(name: str, source: str) -> None:
    if name.startswith(PACKAGE):
        sources = {**dict.fromkeys(PACKAGE_SOURCES.texts, ""), name: source}
        assert package_complaints(Sources(sources, PACKAGE_SOURCES.folders)) == []
    else:
        assert application_complaints(Sources({name: source})) == []


def test_ranks_are_chains_of_imports() -> None:
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set[str](), "d": set[str]()}
    assert module_layers.ranks(graph) == {"a": 2, "b": 1, "c": 0, "d": 0}
    assert module_layers.reachable(graph, ["b"]) == {"b", "c"}
    with pytest.raises(ValueError, match="a -> b -> c -> a"):
        module_layers.ranks(graph | {"c": {"a"}})


def test_circle_inside_a_folder_is_seen() -> None:
    texts = {
        "dream_jax.masks": "from dream_jax.masks.base import Mask",
        "dream_jax.masks.base": "",
        "dream_jax.masks.order": "from dream_jax import masks",
    }
    module_layers.ranks(Sources(texts, frozenset({"dream_jax.masks"})).graph())
    texts["dream_jax.masks.base"] = "from . import order"
    with pytest.raises(ValueError, match="in a circle"):
        module_layers.ranks(Sources(texts, frozenset({"dream_jax.masks"})).graph())


# One machine's folders, and addresses of package files. (Written so that this file does not match.)
MACHINE_PATHS = re.compile(r"(?:^|[^\w.$}~/])/(?:home|root|Users|work|tmp)/[\w.]", re.MULTILINE)
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


def test_no_file_names_a_folder_of_one_machine() -> None:
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # golden arrays and weights
        for pattern in (MACHINE_PATHS, PACKAGE_ADDRESS):
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
def test_patterns_of_machine_paths(text: str, wrong: bool) -> None:
    assert bool(MACHINE_PATHS.search(text) or PACKAGE_ADDRESS.search(text)) is wrong
