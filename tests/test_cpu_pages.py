"""bench/cpu_pages.py: its processes get the variable, or do not, and its results are those that it measured."""

import json
import subprocess

import pytest
from commands import ROOT, run_script


@pytest.fixture
def bench(monkeypatch):
    """The script as a module; imports are found beside it, as when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import cpu_pages

    return cpu_pages


def test_every_size_is_measured_in_turns_with_and_without_the_variable(bench, tmp_path, monkeypatch, capsys):
    asked, really = [], subprocess.run

    def run(command, **options):
        if "--child" not in command:  # such as of the module platform
            return really(command, **options)
        env = options["env"]
        asked.append((env.get(bench.VARIABLE), env.get("XLA_FLAGS"), command[command.index("--child") + 1]))
        seconds = {None: 3.0, bench.VALUE: 2.0}[env.get(bench.VARIABLE)]
        return subprocess.CompletedProcess(command, 0, stdout=f"{seconds}\n", stderr="")

    monkeypatch.setenv(bench.VARIABLE, "glibc.malloc.arena_max=1")  # must not reach the processes
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench.report, "versions", lambda names: dict.fromkeys(names, "1"))
    bench.main(bench.CpuPagesBenchSettings(repeats=2, out=tmp_path / "pages.json"))
    assert asked[:4] == [(None, None, "64x40"), (bench.VALUE, None, "64x40")] * 2
    assert len(asked) == 2 * 2 * 2 * len(bench.SHAPES) and asked[4] == (None, bench.ONE_THREAD, "64x40")
    found = json.loads((tmp_path / "pages.json").read_text())
    assert [row["ratio"] for row in found["results"]] == [1.5] * 6 and found["results"][1]["threads"] == 1
    assert found["results"][2]["with"] == [2.0, 2.0] and found["settings"] == {"repeats": 2, "steps": 20}


def test_a_process_that_fails_ends_the_measurement(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", (("no", "number"),))
    with pytest.raises(RuntimeError, match=r"--child noxnumber --steps 1 failed: .*invalid literal"):
        bench.main(bench.CpuPagesBenchSettings(repeats=1, steps=1, out=tmp_path / "pages.json"))
    assert not (tmp_path / "pages.json").exists()


@pytest.mark.slow
def test_a_step_is_timed():
    ended = run_script("bench/cpu_pages.py", "--child", "2x16", "--steps", "2")
    assert ended.returncode == 0 and 0 < float(ended.stdout) < 60, ended.stderr
