"""Reads the imports of the project with `ast`, without importing it, and derives the order of its modules from them.

`python tests/module_layers.py` writes the table of the layers into every page of docs/ that has the marks for it.
"""

import ast
import functools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dream_jax"

# The layers from the bottom up. A module is a file of dream_jax or a folder of files; its rank is derived from the
# imports. A new module belongs to the lowest layer such that all modules that it imports are in this layer or below.
LAYERS: dict[str, tuple[str, ...]] = {
    "settings": ("bounds", "config", "shapes", "chips", "target", "side_files", "remat", "device_memory"),
    "basics": (
        "batch", "masks", "schedule", "decoding", "quantisation", "sharding", "distributed", "finite", "tokenizer",
        "files", "row_file", "chat_template", "paths", "hub", "player", "packed_noise",
        "float8", "xla_flags",
    ),
    "model": ("attention", "model", "layer_forms", "layouts"),
    "parts": ("objective", "block_diffusion", "optimizer", "lora", "hf", "checkpoint", "data", "judges"),
    "programs": ("inference", "train_step", "step_memory", "sampler", "pretrained", "flops"),
    "runs": ("trainer", "posttraining"),
    "services": ("serving", "evaluation", "plan", "reports"),
}  # fmt: skip
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}

ABOUT_LAYERS = {
    "settings": "frozen settings, ranges, axes, accelerators and their memory, remat policies, readers of small files",
    "basics": "building blocks: masks, noise levels, choice of tokens, quantisation, shardings, tokenizers, files, player",
    "model": "the transformer, and one attention function with its backends",
    "parts": "losses, AdamW and its moments, adapters, the Hugging Face layout, checkpoints, data, judges of answers",
    "programs": "the compiled train step and sampler, model directories, inference from prompts to answers",
    "runs": "the training loops: data, steps, logs, checkpoints, stopping and resuming",
    "services": "serving and evaluating models, planning the memory and time of runs, reports of runs",
    "applications": "scripts: a frozen dataclass of settings, calls of the package, printed results",
}

FACADE = "__init__"  # dream_jax/__init__.py has the public exports: it may import any module, but no module imports it


@dataclass(frozen=True)
class Import:
    """One imported dotted name, and the number of the line that imports it."""

    name: str
    line: int


@functools.cache
def _import_statements(text: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]


@dataclass(frozen=True)
class Sources:
    """The source texts of Python files, by dotted name; the name of an `__init__.py` is the name of its folder.

    Attributes:
      texts: text of each file.
      folders: dotted names of the files that are an `__init__.py`.
    """

    texts: Mapping[str, str]
    folders: frozenset[str] = field(default_factory=frozenset)

    def imports(self, name: str) -> Iterator[Import]:
        """Yields all imports of a file, also those in functions, by the longest dotted name that is in `texts`."""
        parents = name.split(".") if name in self.folders else name.split(".")[:-1]
        for node in _import_statements(self.texts[name]):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, node.lineno)
            elif isinstance(node, ast.ImportFrom):
                start = parents[: len(parents) - node.level + 1] if node.level else []
                base = ".".join([*start, *([node.module] if node.module else [])])
                for alias in node.names:
                    longer = f"{base}.{alias.name}"
                    yield Import(longer if longer in self.texts else base, node.lineno)

    def graph(self) -> dict[str, set[str]]:
        """Returns for each file the set of the other files in `texts` that it imports."""
        return {name: {one.name for one in self.imports(name)} & self.texts.keys() - {name} for name in self.texts}


def read_sources(paths: Iterable[Path], root: Path = ROOT) -> Sources:
    """Reads the files at these paths; their dotted names are relative to `root`."""
    texts, folders = {}, set()
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == FACADE:
            parts = parts[:-1]
            folders.add(".".join(parts))
        texts[".".join(parts)] = path.read_text(encoding="utf-8")
    return Sources(texts, frozenset(folders))


def package_sources() -> Sources:
    """Returns the sources of all files of dream_jax."""
    return read_sources(sorted((ROOT / PACKAGE).rglob("*.py")))


def application_sources() -> Sources:
    """Returns the sources of the scripts at the top level and of the folders beside the package, without tests."""
    folders = ("convert", "mask_study", "bench", "examples")
    nested = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return read_sources(sorted([*ROOT.glob("*.py"), *nested]))


def module_of(name: str) -> str:
    """Returns the module of a dotted name: `sampler` for `dream_jax.sampler.loop`, `FACADE` for `dream_jax`."""
    return name.split(".")[1] if "." in name else FACADE


def module_graph(sources: Sources) -> dict[str, set[str]]:
    """Returns for each module of dream_jax, except the facade, the set of the other modules that it imports."""
    graph: dict[str, set[str]] = {module_of(name): set() for name in sources.texts if name != PACKAGE}
    for name, imported in sources.graph().items():
        if name != PACKAGE:
            graph[module_of(name)] |= {module_of(one) for one in imported} - {module_of(name), FACADE}
    return graph


def ranks(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """Returns for each node the length of its longest chain of imports; 0 for a node that imports no other node.

    Raises:
      ValueError: some nodes import each other in a circle; the message names them.
    """
    found: dict[str, int] = {}

    def rank(node: str, chain: tuple[str, ...]) -> int:
        if node in chain:
            raise ValueError(f"imports in a circle: {' -> '.join([*chain[chain.index(node) :], node])}")
        if node not in found:
            below = [rank(other, (*chain, node)) for other in sorted(graph[node])]
            found[node] = 1 + max(below, default=-1)
        return found[node]

    for node in graph:
        rank(node, ())
    return found


def reachable(graph: Mapping[str, set[str]], start: Iterable[str]) -> set[str]:
    """Returns the start nodes and all nodes that they import, directly or indirectly."""
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += graph[node]
    return found


_MARK = re.compile(r"(<!-- module_layers\.py writes: layers -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def layer_table() -> str:
    """Returns the layers as a Markdown table, from the top down, in which each module has its derived rank."""
    derived = ranks(module_graph(package_sources()))
    lines = ["| layer | modules, each with its rank | what it is about |", "| --- | --- | --- |"]
    folders = ("convert", "mask_study", "bench", "examples")
    applications = sorted(path.name for path in ROOT.glob("*.py"))
    applications += [f"{name}/" for name in folders if any((ROOT / name).glob("*.py"))]
    lines.append(
        f"| applications | {', '.join(f'`{name}`' for name in applications)} | {ABOUT_LAYERS['applications']} |"
    )
    for layer, modules in reversed(LAYERS.items()):
        here = sorted((derived[module], module) for module in modules if module in derived)
        cells = ", ".join(
            f"`{module}{'/' if (ROOT / PACKAGE / module).is_dir() else ''}` {rank}" for rank, module in reversed(here)
        )
        lines.append(f"| {layer} | {cells} | {ABOUT_LAYERS[layer]} |")
    return "\n".join(["", *lines, "", ""])


def pages_with_table() -> list[Path]:
    """Returns the pages of docs/ that have the marks between which the table is written."""
    return [path for path in sorted((ROOT / "docs").glob("*.md")) if _MARK.search(path.read_text(encoding="utf-8"))]


def fill(text: str, table: str) -> str:
    """Returns the text of a page with the table between its marks."""
    return _MARK.sub(lambda found: found[1] + table + found[3], text)


if __name__ == "__main__":
    made = layer_table()
    for page in pages_with_table():
        page.write_text(fill(page.read_text(encoding="utf-8"), made), encoding="utf-8")
    sys.stdout.write(made)
