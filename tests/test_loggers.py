"""Where a run's numbers go beside metrics.csv: the calls that each library gets, and what is said when it is not there."""

import csv
import importlib.machinery
import importlib.util
import sys
import types

import pytest

from dream_jax.trainer import TrainSettings, train
from dream_jax.trainer.loggers import RUN_ID, check_loggers, open_loggers


class Service:
    """Stands in for wandb or trackio: remembers what it was told."""

    def __init__(self):
        self.begun, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.begun.append(options)
        return self

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.finished += 1


def installed(monkeypatch, name):
    service = Service()
    module = types.ModuleType(name)
    module.init = service.init
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    return service


def missing(monkeypatch, *names):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest))


def settings(out, **changes):
    base = {"steps": 3, "batch_size": 4, "save_every": 2, "eval_rows": 0, "out": out}
    return TrainSettings.flat(**(base | changes))


def test_every_step_goes_to_every_logger(monkeypatch, tmp_path):
    wandb, trackio = installed(monkeypatch, "wandb"), installed(monkeypatch, "trackio")
    train(settings(tmp_path / "run", log_to=("wandb", "trackio", "tensorboard")))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for service in (wandb, trackio):
        assert [step for step, _ in service.logged] == [1, 2, 3] and service.finished == 1
        assert [numbers["loss"] for _, numbers in service.logged] == [float(row["loss"]) for row in rows]
        (options,) = service.begun
        assert options["project"] == "dream_jax" and options["resume"] == "allow"
        assert options["config"]["steps"] == 3
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    run_id = (tmp_path / "run" / RUN_ID).read_text().strip()
    assert wandb.begun[0]["id"] == run_id and trackio.begun[0]["name"] == f"run-{run_id}"


def test_a_run_that_goes_on_is_the_same_run_there(monkeypatch, tmp_path):
    wandb = installed(monkeypatch, "wandb")
    for done in (0, 2):
        for logger in open_loggers(("wandb",), tmp_path, {}, done):
            logger.close()
    first, second = (options["id"] for options in wandb.begun)
    assert first == second and wandb.finished == 2
    (tmp_path / RUN_ID).unlink()  # as --overwrite does
    open_loggers(("wandb",), tmp_path, {}, 0)
    assert wandb.begun[2]["id"] != first


def test_none_is_imported_unless_asked_for(monkeypatch, tmp_path):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would fail
    train(settings(tmp_path / "run", log_to=()))
    assert not (tmp_path / "run" / "tensorboard").exists() and (tmp_path / "run" / "metrics.csv").is_file()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named_before_anything_is_made(monkeypatch, tmp_path, name):
    missing(monkeypatch, name)
    with pytest.raises(ModuleNotFoundError, match=rf"--log-to {name} needs the package {name}: pip install {name}"):
        train(settings(tmp_path / "run", log_to=("tensorboard", name)))
    assert not (tmp_path / "run").exists()


def test_tensorboard_may_be_missing_where_it_is_not_asked_for(monkeypatch):
    missing(monkeypatch, "tensorboardX")
    check_loggers(())
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboardX"):
        check_loggers(("tensorboard",))


@pytest.mark.parametrize("done", [0, 2])
def test_tensorboard_forgets_what_came_after_the_last_checkpoint(tmp_path, done):
    """Also where there was none yet: the steps are taken again."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    (board,) = open_loggers(("tensorboard",), tmp_path, {}, done)
    board.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    events, content = [], file.read_bytes()
    while content:  # length, its checksum, the event, its checksum
        size = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    assert [one.step for one in events if one.session_log.status == SessionLog.START] == [done + 1]


def test_numbers_that_are_none_are_kept_from_tensorboard(tmp_path):
    (board,) = open_loggers(("tensorboard", "tensorboard"), tmp_path, {}, 0)
    board.write(1, {"loss": float("nan"), "nll": 1.0})  # a warning, and so an error, if it went through
    board.flush()
    board.close()


def test_a_damaged_id_is_named(monkeypatch, tmp_path):
    installed(monkeypatch, "wandb")
    (tmp_path / RUN_ID).write_bytes(b"\xff not an id")
    with pytest.raises(ValueError, match=r"logged_as\.txt holds .*, not 8 hexadecimal digits; restore it"):
        open_loggers(("wandb",), tmp_path, {}, 0)
