"""Recipes: each file is what it says, its plan holds, and a slip of the pen is named with its file, key and neighbour."""

import json
import pathlib
import runpy
import sys

import pytest

from dream_jax.config import PRESETS
from dream_jax.data import sources
from dream_jax.plan import PlanSettings, make_plan
from dream_jax.trainer import TrainSettings
from dream_jax.trainer.recipes import listing, names, read_recipe

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "recipes"
NAMES = names(FOLDER)


def written(folder, text, name="mine"):
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def recipe_text(settings, **top):
    lines = [f"{name} = {json.dumps(value)}" for name, value in ({"about": "a", "source": "b"} | top).items()]
    return "\n".join([*lines, "[settings]", settings, ""])


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_makes_a_run(name, monkeypatch):
    """Its settings hold together, nothing is fetched for them, and it says where it comes from."""
    monkeypatch.setattr(sources.records, "hub_splits", lambda *_: pytest.fail("a recipe was read from the hub"))
    recipe = read_recipe(name, FOLDER)
    settings = recipe.train_settings()
    assert settings.run.out == pathlib.Path("runs") / name and settings.run.recipe == name
    assert len(recipe.about) > 30 and len(recipe.source) > 60
    assert settings.optimizer_config().learning_rate == recipe.settings["learning_rate"]  # none is left to a default
    assert recipe.like in PRESETS or settings.network.starts_at_random
    warned = [line for line in settings.warnings() if "starts from random weights" not in line]
    assert warned == [] or name == "ar-start"  # which has no model before it is given one
    for required in recipe.required:
        assert required not in recipe.settings


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_says_what_it_takes(name):
    """On one H100, one H200 and a v6e-8; what arithmetic says today is what the file says, or near what was compiled."""
    recipe = read_recipe(name, FOLDER)
    assert [one.topology for one in recipe.planned] == ["h100:1", "h200:1", "v6e:2x4"]
    for one in recipe.planned:
        assert one.fits, f"{name} does not fit {one.topology}"
        settings = recipe.train_settings(model=recipe.like or recipe.settings["model"], **one.settings)
        plan = make_plan(settings, PlanSettings(plan=True, topology=one.topology, compile=False))
        near = 0.005 if one.how == "arithmetic" else 0.25
        assert one.hours == pytest.approx(plan.price.hours, rel=near)
        assert one.rmb == pytest.approx(plan.price.rmb, rel=near)
        assert one.peak_gib == pytest.approx(plan.memory.peak / 2**30, rel=0.005 if one.how == "arithmetic" else 0.15)


def test_a_smaller_batch_sees_as_many_rows():
    """Where hardware changes the batch, the number of steps follows."""
    for name in NAMES:
        recipe = read_recipe(name, FOLDER)
        settings = recipe.train_settings().values()
        rows = settings["steps"] * settings["batch_size"]
        for one in recipe.planned:
            changed = settings | dict(one.settings)
            assert changed["steps"] * changed["batch_size"] == pytest.approx(rows, rel=0.01), (name, one.topology)


def test_the_recipes_that_were_promised():
    lengths = (2048, 4096, 8192)
    promised = {f"s1k-{kind}-{length}" for kind in ("full", "lora") for length in lengths}
    promised |= {"block-lora-4096", "block-full-4096", "block-ar-2048", "block-nano", "gsm8k-rewards", "smol-to-dream"}
    promised |= {"dream-vrpo", "dream-vrpo-lora"}
    assert promised | {"dream-sft", "d1-sft", "gsm8k-0.5b", "pretrain", "ar-start"} == set(NAMES)
    for length in lengths:
        assert read_recipe(f"s1k-full-{length}", FOLDER).train_settings().rows.max_length == length
        assert read_recipe(f"s1k-lora-{length}", FOLDER).train_settings().lora.lora_rank == 32


def test_a_file_of_ones_own(tmp_path):
    path = written(
        tmp_path, recipe_text('steps = 7\nlearning_rate = 1\nmix = ["a", "b"]\nfocal = true\nremat = "full"')
    )
    settings = read_recipe(str(path), FOLDER).train_settings(batch_size=4)
    assert (settings.run.steps, settings.rows.mix, settings.loss.focal) == (7, ("a", "b"), True)
    rate = settings.optimization.learning_rate
    assert settings.batches.batch_size == 4 and rate == 1.0 and isinstance(rate, float)
    assert read_recipe("mine", tmp_path).settings == read_recipe(str(path), FOLDER).settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (recipe_text("step = 7"), r"mine.toml: settings: step is not known \(did you mean 'steps'\?\)"),
        (recipe_text('steps = "7"'), r"mine.toml: settings.steps = '7': Expected `int`, got `str`"),
        (recipe_text("steps = true"), r"steps = True: Expected `int`, got `bool`"),
        (recipe_text("steps = 7.5"), r"steps = 7.5: Expected `int`, got `float`"),
        (recipe_text("focal = 1"), r"focal = 1: Expected `bool`, got `int`"),
        (recipe_text('mix = "gsm8k"'), r"mix = 'gsm8k': Expected `array`, got `str`"),
        (recipe_text("mix = [1]"), r"mix\[0\] = 1: Expected `str`, got `int`"),
        (
            recipe_text('remat = "ful"'),
            r"remat = 'ful' is none of auto, none, products, .*, full, offload \(did you mean 'full'\?\)",
        ),
        (recipe_text('log_to = ["wandbb"]'), r"log_to\[0\] = 'wandbb' is none of .* \(did you mean 'wandb'\?\)"),
        (recipe_text("steps = 0"), r"mine.toml: steps=0 must be at least 1"),
        (recipe_text('out = "x"'), r"out does not belong in a recipe"),
        (recipe_text("", abuot="x"), r"abuot is not known \(did you mean 'about'\?\)"),
        ('source = "b"', r"mine.toml: the file: Object missing required field `about`"),
        (recipe_text("", like="dream-7"), r"like = 'dream-7' is none of .* \(did you mean 'dream-7b'\?\)"),
        (recipe_text("", required=["dta"]), r"required\[0\] = 'dta' is none of .* \(did you mean 'data'\?\)"),
        (recipe_text("") + "[[planned]]\ntopology = 'h100:1'", r"planned\[0\]: Object missing required field `hours`"),
        (
            recipe_text("") + "[[planned]]\ntopologie = 1",
            r"planned\[0\]: topologie is not known \(did you mean 'topology'",
        ),
        ("about = ", r"mine.toml: not TOML \(Invalid value \(at"),
        ("about = 'a'\nsource = 'b'\nsettings = 3", r"settings = 3: Expected `object`, got `int`"),
    ],
)
def test_a_slip_is_named(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        read_recipe(str(path), FOLDER).train_settings()


def test_an_unknown_recipe_lists_the_others(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"no recipe 's1k-lora-4069' \(did you mean 's1k-lora-4096'\?\).*ar-start, block-ar-2048",
    ):
        read_recipe("s1k-lora-4069", FOLDER)
    with pytest.raises(FileNotFoundError, match="none in"):
        read_recipe("x", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no recipe 'gone.toml'"):
        read_recipe("gone.toml", FOLDER)


# --- as users meet them


def train_py(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return done.value.code, *capsys.readouterr()


def test_recipe_alone_lists_them(monkeypatch, capsys):
    for arguments in (("--recipe",), ("--recipe=",), ("--recipe", "--steps", "3")):
        code, text, _ = train_py(monkeypatch, capsys, *arguments)
        assert code == 0 and text == listing(FOLDER) + "\n"
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    for name in NAMES:
        assert {name, *read_recipe(name, FOLDER).about.split()} <= set(words.split())
    (row,) = [line for line in text.splitlines() if "v6e:2x4   0.02 to 0.04  3 to 7        16    --mesh 8x1" in line]
    assert "--accumulation 1" in text[text.index(row) :]
    code, _, error = train_py(monkeypatch, capsys, "--recipe", "pretrain", "--recipe=ar-start")
    assert code == 1 and "error: --recipe is given twice" in error
    code, _, error = train_py(monkeypatch, capsys, "--recipe", "s1k")
    assert code == 1 and "error: no recipe 's1k'" in error


@pytest.mark.slow
def test_flags_override_and_the_run_says_where_settings_come_from(monkeypatch, capsys, tmp_path):
    path = written(tmp_path, recipe_text("steps = 2\nbatch_size = 8\neval_rows = 0\nseed = 5"))
    out = tmp_path / "run"
    code, text, error = train_py(monkeypatch, capsys, "--recipe", path, "--seed", "7", "--out", out)
    assert code == 0, error
    for line in ("steps: 2  (recipe mine)", "seed: 7  (given)", "mesh: 1x1  (default)", f"recipe: {path}  (given)"):
        assert line in text
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["steps"], settings["batch_size"], settings["seed"]) == (2, 8, 7)
    assert settings["recipe"] == str(path)


def test_what_a_recipe_leaves_to_the_user_is_asked_for(monkeypatch, capsys, tmp_path):
    code, _, error = train_py(monkeypatch, capsys, "--recipe", "pretrain", "--out", tmp_path / "run")
    assert code == 1 and "error: recipe pretrain needs --data: pre-training on whole documents" in error
    code, _, error = train_py(monkeypatch, capsys, "--recipe", "ar-start", "--out", tmp_path / "run")
    assert code == 1 and "error: recipe ar-start needs --model and --data: " in error
    # What is given is given, also where it is the default.
    code, _, error = train_py(monkeypatch, capsys, "--recipe", "ar-start", "--data=sudoku", "--out", tmp_path / "run")
    assert code == 1 and "error: recipe ar-start needs --model: " in error
    assert not (tmp_path / "run").exists()


def test_a_recipe_is_planned_without_its_files(monkeypatch, capsys):
    arguments = ["--recipe", "s1k-lora-4096", "--plan", "--no-compile", "--topology", "h100:1"]
    code, text, _ = train_py(monkeypatch, capsys, *arguments)
    assert code == 0 and "model dream-7b" in text and "YES: it fits" in text
    code, text, _ = train_py(monkeypatch, capsys, *arguments, "--lora-rank", "64")
    assert "161,480,704 parameters trained" in text
    # A recipe that leaves the model to the user is planned at the size that it is made for, not at the default's.
    arguments = ["--recipe", "ar-start", "--plan", "--no-compile", "--topology", "h100:8", "--mesh", "8x1"]
    code, text, _ = train_py(monkeypatch, capsys, *arguments)
    assert "model dream-7b" in text
    code, text, _ = train_py(monkeypatch, capsys, *arguments, "--model", "nano")
    assert "model nano" in text


def test_every_setting_has_a_type_that_recipes_can_hold(tmp_path):
    """A setting whose type the reader does not know would make a recipe of its default fail."""
    defaults = TrainSettings()
    skipped = ("recipe", "out", "overwrite", "coordinator", "num_processes", "process_id")
    lines = []
    for name, value in defaults.plain().items():
        if name not in skipped and value is not None:
            lines.append(f"{name} = {json.dumps(value)}")
    settings = read_recipe(str(written(tmp_path, recipe_text("\n".join(lines)))), FOLDER).train_settings(recipe=None)
    assert settings.replaced(out=defaults.run.out, weight="auto") == defaults  # plain() has the weight in force
