"""Recipes: the settings of whole runs under a name, in TOML files, with where they come from and what they would take.

about = "one line"
source = "paper, repository or reasoning"
like = "dream-7b"            # a preset of the model's sizes, to plan with where its files are not here
required = ["data"]          # settings that the command line must give
[settings]                   # settings of a run, by the names of their flags
[[planned]]                  # per hardware: what changes there, hours, price, memory; written by bench/recipes.py
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

from dream_jax.config import PRESETS
from dream_jax.trainer.settings import SETTING_TYPES, TrainSettings

SUFFIX = ".toml"
_WIDTH = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """What the run would take on some hardware.

    Attributes:
      topology: as in `--topology`.
      settings: those that differ from the recipe's there.
      hours, rmb: of all steps, if everything overlaps and if nothing does; no price where none is listed.
      peak_gib: memory of a device at the worst moment.
      fits: whether it has as much.
      how: by whom this is known.
    """

    topology: str
    settings: Mapping[str, Any]
    hours: tuple[float, float]
    rmb: tuple[float, float] | None = None
    peak_gib: float
    fits: bool
    how: Literal["compiled", "arithmetic"]

    def flags(self) -> str:
        """The settings as the command line takes them."""
        return " ".join(_flag(name, value) for name, value in self.settings.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One file, checked.

    Attributes:
      name: of the file, without its suffix.
      file: its path.
      about, source: see the module.
      like: a preset, or None.
      required: settings that a run must be given besides.
      settings: by the names of their flags.
      planned: in the order of the file.
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
        """The settings of a run by this recipe. Raises ValueError, opening with the file, for a value out of range."""
        given = {"out": pathlib.Path("runs") / self.name, **self.settings}
        try:
            return TrainSettings.flat(**given | {"recipe": str(self.name)} | changes)
        except ValueError as error:
            raise ValueError(f"{self.file}: {error}") from error

    def check_given(self, given: Collection[str]) -> None:
        """Raises ValueError when a setting that the recipe leaves to the user is not among those that were given."""
        missing = [name for name in self.required if name not in given]
        if missing:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise ValueError(f"recipe {self.name} needs {flags}: {self.about}")


def read_recipe(name_or_file: str, folder: pathlib.Path) -> Recipe:
    """A recipe of the folder by its name, or any file.

    Raises:
      FileNotFoundError: neither, with the names that there are and the nearest.
      ValueError: no TOML, an unknown or missing key, or a value of another type: with file, key and the nearest name.
    """
    file = pathlib.Path(name_or_file).expanduser()
    if file.suffix != SUFFIX:
        file = folder / f"{name_or_file}{SUFFIX}"
    if not file.is_file():
        known = names(folder)
        near = _nearest(name_or_file, known)
        raise FileNotFoundError(
            f"no recipe {name_or_file!r}{near}: give a {SUFFIX} file, or one of {', '.join(known) or f'none in {folder}'}"
        )
    try:
        found = msgspec.toml.decode(file.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not TOML ({error})") from error
    try:
        # Unset settings are left out.
        typed = msgspec.to_builtins(msgspec.convert(found, _FILE))
    except msgspec.ValidationError as error:
        raise ValueError(f"{file}: {_explained(str(error), found)}") from error
    typed["settings"] = _in_order(typed["settings"], found)
    planned = zip(typed["planned"], found.get("planned", ()), strict=True)
    typed["planned"] = tuple(
        Planned(**one | {"settings": _in_order(one["settings"], written)}) for one, written in planned
    )
    return Recipe(name=file.stem, file=file, **typed)


def names(folder: pathlib.Path) -> list[str]:
    """The recipes of a folder."""
    return sorted(path.stem for path in folder.glob(f"*{SUFFIX}"))


def listing(folder: pathlib.Path) -> str:
    """All recipes of a folder with what they are and what they would take, as a table that fits 100 columns."""
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
    console = Console(width=_WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines())


def _hours(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


# ------------------------------------------------------------------------------------------------------------- reading

_NOT_HERE = ("recipe", "out", "overwrite", "coordinator", "num_processes", "process_id")
"""Settings that say where a run happens, not what it is."""
_ALLOWED = tuple(name for name in SETTING_TYPES if name not in _NOT_HERE)


def _typed(kind: type[Any], left_out: Collection[str] = (), **types: Any) -> type[msgspec.Struct]:
    """A dataclass as msgspec checks it: no other keys, and these types in place of the declared ones."""
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
    """The settings in the order of the file."""
    return {name: settings[name] for name in written.get("settings", ())}


def _explained(complaint: str, found: Any) -> str:
    """msgspec's complaint with the key first, the value that stands there, and the nearest of what may stand there."""
    message, _, path = complaint.partition(" - at `$")
    steps = re.findall(r"\w+", path)
    for step in steps:
        found = found[int(step) if isinstance(found, list) else step]
    where, keys = path.strip(".`"), [step for step in steps if not step.isdigit()]
    unknown = re.search(r"unknown field `(.*)`", message)
    if unknown is not None:
        name = unknown[1]
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
    """All texts that a type allows, however deep its Literal lies."""
    if typing.get_origin(hint) is Literal:
        return tuple(map(str, typing.get_args(hint)))
    return tuple(choice for one in typing.get_args(hint) for choice in _choices(one))


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    values = value if isinstance(value, tuple) else (value,)
    return f"--{flag} {' '.join(map(str, values))}"
