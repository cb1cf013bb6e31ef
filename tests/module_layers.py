"""Reads the imports of the project with `ast`, and derives from them which module may come before which.

Nothing of the project is imported. `python tests/module_layers.py` writes the table of the layers into every page of
docs/ that has a place for it.
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

# From the bottom up. A module is a file of dream_jax or a folder of files; its rank is not written here, but derived from
# the imports. A new module goes into the lowest layer that has everything it imports in or below it.
LAYERS: dict[str, tuple[str, ...]] = {
    "settings": ("config", "shapes", "chips", "target"),
    "basics": (
        "batch", "masks", "schedule", "decoding", "quantisation", "sharding", "distributed", "tokenizer", "files",
        "row_file",
    ),
    "model": ("attention", "model"),
    "parts": ("objective", "optimizer", "lora", "hf", "checkpoint", "data"),
    "programs": ("inference", "train_step", "sampler", "pretrained", "flops"),
    "runs": ("trainer", "posttraining"),
    "services": ("serving", "evaluation", "plan", "reports"),
}  # fmt: skip
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}

ABOUT_LAYERS = {
    "settings": "frozen settings, the axis alphabet, tables of accelerators",
    "basics": "one idea each: masks, noise levels, choosing tokens, codes of weights, shardings, tokenizers, files",
    "model": "the transformer, and one attention function with its backends",
    "parts": "losses, AdamW and its moments, adapters, Hugging Face's layout, checkpoints, text to arrays",
    "programs": "the compiled train step and sampler, directories of models, from prompts to answers",
    "runs": "the loops: data, steps, logs, checkpoints, stopping and resuming",
    "services": "how good a model is, what a run would take, what a run was",
    "applications": "a frozen dataclass of settings, wiring, printing",
}

FACADE = "__init__"  # dream_jax/__init__.py: the public exports. It may import any module, and no module imports it.


@dataclass(frozen=True)
class Import:
    """One imported dotted name, and the line where it stands."""

    name: str
    line: int


@functools.cache
def _import_statements(text: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]


@dataclass(frozen=True)
class Sources:
    """Source texts by dotted name; a folder's `__init__.py` has the folder's name."""

    texts: Mapping[str, str]
    folders: frozenset[str] = field(default_factory=frozenset)

    def imports(self, name: str) -> Iterator[Import]:
        """Every module that a file imports, inside functions too, as the longest dotted name that is a file here."""
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
        """The imports among these files, as edges from a file to those it imports."""
        return {name: {one.name for one in self.imports(name)} & self.texts.keys() - {name} for name in self.texts}


def read_sources(paths: Iterable[Path], root: Path = ROOT) -> Sources:
    """The files at these paths, named relative to `root`."""
    texts, folders = {}, set()
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == FACADE:
            parts = parts[:-1]
            folders.add(".".join(parts))
        texts[".".join(parts)] = path.read_text(encoding="utf-8")
    return Sources(texts, frozenset(folders))


def package_sources() -> Sources:
    """All of dream_jax."""
    return read_sources(sorted((ROOT / PACKAGE).rglob("*.py")))


def application_sources() -> Sources:
    """The scripts at the top level and the folders beside the package, tests left out."""
    folders = ("convert", "mask_study", "bench", "examples")
    nested = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return read_sources(sorted([*ROOT.glob("*.py"), *nested]))


def module_of(name: str) -> str:
    """`dream_jax.sampler.loop` -> `sampler`; the package itself is the facade."""
    return name.split(".")[1] if "." in name else FACADE


def module_graph(sources: Sources) -> dict[str, set[str]]:
    """The imports among modules of dream_jax, the facade left out."""
    graph: dict[str, set[str]] = {module_of(name): set() for name in sources.texts if name != PACKAGE}
    for name, imported in sources.graph().items():
        if name != PACKAGE:
            graph[module_of(name)] |= {module_of(one) for one in imported} - {module_of(name), FACADE}
    return graph


def ranks(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """For each node the length of the longest chain of imports below it: 0 for one that imports none of the others.

    Raises:
      ValueError: there is a circle; the message names it.
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
    """The start nodes and everything that they import, directly or not."""
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
    """The layers as a Markdown table, from the top down, each module with its derived rank."""
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
    """Pages of docs/ that have a marked place for the table."""
    return [path for path in sorted((ROOT / "docs").glob("*.md")) if _MARK.search(path.read_text(encoding="utf-8"))]


def fill(text: str, table: str) -> str:
    """The page's text with the table between its marks."""
    return _MARK.sub(lambda found: found[1] + table + found[3], text)


if __name__ == "__main__":
    made = layer_table()
    for page in pages_with_table():
        page.write_text(fill(page.read_text(encoding="utf-8"), made), encoding="utf-8")
    sys.stdout.write(made)
