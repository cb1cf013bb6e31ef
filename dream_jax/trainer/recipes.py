"""Recipes: TOML files with the settings of a whole run, their source, and plans for some hardware.

about = "one line"
source = "paper, repository or reasoning"
like = "dream-7b"            # preset with the sizes of the model, for plans without the files of the model
required = ["data"]          # settings that the command line must give
[settings]                   # settings of a run, by the names of their flags
[[planned]]                  # one per hardware: other settings, hours, price, memory; written by bench/recipes.py
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dream_jax.bounds import FloatRange, check_numbers
from dream_jax.config import PRESETS
from dream_jax.paths import local_path
from dream_jax.side_files import read_toml
from dream_jax.trainer.settings import SETTING_TYPES, TrainSettings

SUFFIX = ".toml"
# Width of the table of recipes, in characters.
_WIDTH = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """The planned time, price and memory of a run on one kind of hardware.

    Attributes:
      topology: name of the hardware, as for `--topology`.
      settings: the settings that differ from the recipe's on this hardware.
      hours: the hours of all steps, as a pair: first if computation, memory and communication overlap fully, then if
        they do not overlap.
      rmb: price in RMB for these two times; None if the hardware has no list price.
      peak_gib: peak memory of one device in GiB.
      fits: whether a device has this much memory.
      how: "compiled" if the compiler reported the memory, "arithmetic" if it is an estimate.
    """

    topology: str
    settings: Mapping[str, Any]
    hours: tuple[float, float]
    rmb: tuple[float, float] | None = None
    peak_gib: float
    fits: bool
    how: Literal["compiled", "arithmetic"]

    def __post_init__(self) -> None:
        check_numbers(self, hours=FloatRange(0.0), rmb=FloatRange(0.0), peak_gib=FloatRange(0.0))

    def flags(self) -> str:
        """Returns the settings as flags for the command line."""
        return " ".join(_flag(name, value) for name, value in self.settings.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The contents of one recipe file, with checked names and types.

    Attributes:
      name: name of the file without its suffix.
      file: path of the file.
      about: one line about the run.
      source: the paper, repository or reasoning from which the settings are taken.
      like: name of a preset with the sizes of the model, or None.
      required: names of the settings that the command line must give.
      settings: the settings of the run, by the names of their flags.
      planned: the plans of the file, in its order.
    """

    name: str
    file: pathlib.Path
    about: str
    source: str
    like: str | None = None
    required: tuple[str, ...] = ()
    settings: Mapping[str, Any]
    planned: tuple[Planned, ...] = ()

    def train_settings(self, **changes: Any) -> TrainSettings:
        """Returns the settings of a run with this recipe, with `changes` by the names of their flags.

        Raises:
          ValueError: a value is out of range; the message begins with the path of the file.
        """
        given = {"out": pathlib.Path("runs") / self.name, **self.settings}
        try:
            return TrainSettings.flat(**given | {"recipe": str(self.name)} | changes)
        except ValueError as error:
            raise ValueError(f"{self.file}: {error}") from error

    def check_given(self, given: Collection[str]) -> None:
        """Raises ValueError if a setting in `required` is not among the names `given` on the command line."""
        missing = [name for name in self.required if name not in given]
        if missing:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise ValueError(f"recipe {self.name} needs {flags}: {self.about}")


def read_recipe(name_or_file: str, folder: pathlib.Path) -> Recipe:
    """Reads a recipe, given by its name in the folder or by the path of a TOML file.

    Raises:
      FileNotFoundError: there is no such recipe; the message names the existing ones and the most similar one.
      ValueError: the file is not TOML, has an unknown key or a value of the wrong type, or a key is missing; the
        message names file, key and the most similar name.
    """
    file = local_path(name_or_file, "recipe")
    if file.suffix != SUFFIX:
        file = folder / f"{name_or_file}{SUFFIX}"
    if not file.is_file():
        known = names(folder)
        near = _nearest(name_or_file, known)
        raise FileNotFoundError(
            f"no recipe {name_or_file!r}{near}: give a {SUFFIX} file, or one of {', '.join(known) or f'none in {folder}'}"
        )
    found = read_toml(file, "correct it, or give another recipe")
    try:
        # `to_builtins` leaves out the settings that are not set in the file.
        typed = msgspec.to_builtins(msgspec.convert(found, _FILE))
    except msgspec.ValidationError as error:
        raise ValueError(f"{file}: {_explained(str(error), found)}") from error
    typed["settings"] = _in_order(typed["settings"], found)
    planned = zip(typed["planned"], found.get("planned", ()), strict=True)
    try:
        typed["planned"] = tuple(
            Planned(**one | {"settings": _in_order(one["settings"], written)}) for one, written in planned
        )
    except ValueError as error:
        raise ValueError(f"{file}: planned: {error}") from error
    return Recipe(name=file.stem, file=file, **typed)


def names(folder: pathlib.Path) -> list[str]:
    """Returns the names of the recipes in a folder, sorted."""
    return sorted(path.stem for path in folder.glob(f"*{SUFFIX}"))


def listing(folder: pathlib.Path) -> str:
    """Returns all recipes of a folder with their descriptions and plans, as a text table at most 100 columns wide."""
    recipes = [read_recipe(name, folder) for name in names(folder)]
    if not recipes:
        return f"no recipes in {folder}"
    widths = {"hardware": 8, "hours": 12, "RMB": 12, "GiB": 4, "flags to add there": 22}
    table = Table(box=box.SIMPLE, caption="GiB: memory of a device, as compiled (*) or by arithmetic", show_lines=True)
    table.add_column("recipe")
    table.add_column("  ".join(f"{title:{width}}" for title, width in widths.items()), width=sum(widths.values()) + 8)
    for recipe in recipes:
        planned = Table.grid(padding=(0, 2))
        for width in widths.values():
            planned.add_column(width=width)
        for one in recipe.planned:
            price = "-" if one.rmb is None else f"{one.rmb[0]:.0f} to {one.rmb[1]:.0f}"
            memory = f"{one.peak_gib:.0f}{'*' * (one.how == 'compiled')}"
            flags = one.flags() if one.fits else f"DOES NOT FIT {one.flags()}"
            planned.add_row(one.topology, " to ".join(map(_hours, one.hours)), price, memory, Text(flags))
        table.add_row(Text(f"{recipe.name}\n{recipe.about}"), planned)
    console = Console(width=_WIDTH, color_system=None, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines())


def _hours(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


# ------------------------------------------------------------------------------------------------------------- reading

_NOT_HERE = ("recipe", "out", "overwrite", "coordinator", "num_processes", "process_id")
"""Settings that a recipe cannot have, because they say where a run takes place and not what it computes."""
_ALLOWED = tuple(name for name in SETTING_TYPES if name not in _NOT_HERE)


def _typed(kind: type[Any], left_out: Collection[str] = (), **types: Any) -> type[msgspec.Struct]:
    """Makes a msgspec struct from a dataclass: unknown keys are errors, and `types` replaces declared types."""
    hints = typing.get_type_hints(kind) | types
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(kind):
        if field.name == "settings":
            fields.append((field.name, _SETTINGS, msgspec.field(default_factory=_SETTINGS)))
        elif field.name not in left_out:
            default = msgspec.NODEFAULT if field.default is dataclasses.MISSING else field.default
            fields.append((field.name, hints[field.name], default))
    return msgspec.defstruct(kind.__name__, fields, kw_only=True, forbid_unknown_fields=True)


_SETTINGS = msgspec.defstruct(
    "Settings",
    [(name, SETTING_TYPES[name] | msgspec.UnsetType, msgspec.UNSET) for name in _ALLOWED],
    forbid_unknown_fields=True,
)
_PLANNED: Any = _typed(Planned)
_FILE = _typed(
    Recipe,
    left_out=("name", "file"),
    like=Literal[tuple(PRESETS)] | None,
    required=tuple[Literal[_ALLOWED], ...],  # type: ignore[valid-type]  # known at run time only
    planned=tuple[_PLANNED, ...],
)


def _in_order(settings: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings in the order of the file, whose contents are `written`."""
    return {name: settings[name] for name in written.get("settings", ())}


def _explained(complaint: str, found: Any) -> str:
    """Rewrites a message of msgspec about the contents `found`: first the key, then its value, then a similar name."""
    message, _, path = complaint.partition(" - at `$")
    steps = re.findall(r"\w+", path)
    for step in steps:
        found = found[int(step) if isinstance(found, list) else step]
    where, keys = path.strip(".`"), [step for step in steps if not step.isdigit()]
    unknown = re.search(r"unknown field `(.*)`", message)
    if unknown is not None:
        name = f"{unknown[1]:.80}"
        if name in _NOT_HERE:
            return f"{name} does not belong in a recipe: give it on the command line"
        known = _ALLOWED if keys[-1:] == ["settings"] else (_PLANNED if keys else _FILE).__struct_fields__
        return f"{where or 'the file'}: {name} is not known{_nearest(name, known)}"
    if message.startswith("Invalid enum value"):
        choices = {"like": tuple(PRESETS), "required": _ALLOWED}.get(keys[-1]) or _choices(SETTING_TYPES.get(keys[-1]))
        return f"{where} = {found!r} is none of {', '.join(choices)}{_nearest(str(found), choices)}"
    return (
        f"{where} = {found!r}: {message}" if keys and "missing" not in message else f"{where or 'the file'}: {message}"
    )


def _choices(hint: Any) -> tuple[str, ...]:
    """Returns all values of the Literal types in a type, also of nested ones such as in `tuple[Literal[...], ...]`."""
    if typing.get_origin(hint) is Literal:
        return tuple(map(str, typing.get_args(hint)))
    return tuple(choice for one in typing.get_args(hint) for choice in _choices(one))


def _nearest(name: str, known: Collection[str]) -> str:
    """Returns " (did you mean ...?)" with the most similar known name; an empty string if none is similar."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _flag(name: str, value: Any) -> str:
    """Returns a setting as a flag for the command line, such as "--batch-size 8" or "--no-focal"."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    values = value if isinstance(value, tuple) else (value,)
    return f"--{flag} {' '.join(map(str, values))}"
