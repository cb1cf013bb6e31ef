"""What a run leaves for a person: report.md, its curves, samples, incidents; and two runs side by side."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import time

import pytest
from commands import run_script, start_script
from shared_run import FLAGS, settings

from dream_jax.reports.comparison import compare
from dream_jax.reports.curves import draw_curves
from dream_jax.reports.record import read_record, shown, table
from dream_jax.reports.run_report import render_report, write_report
from dream_jax.sharding import make_mesh
from dream_jax.trainer import Diverged, TrainSettings, segments, train
from dream_jax.trainer.console import RunConsole
from dream_jax.trainer.cost import begin_segment, run_cost
from dream_jax.trainer.incidents import FILE as INCIDENTS
from dream_jax.trainer.incidents import Incidents, read_incidents
from dream_jax.trainer.segments import RunSegment, RunSegments, read_segments


def losses(out):
    return [(row["step"], row["loss"]) for row in read_record(out).steps]


def train_and_report(chosen):
    """As train.py does."""
    train(chosen)
    write_report(read_record(chosen.run.out))


@pytest.fixture(scope="module")
def finished(nano_run):
    return nano_run


SAMPLES = {"prompts": ["a"], "expected": ["b"], "tokens": 1, "temperature": 0.0, "seed": 0}


def copied(finished, tmp_path, name="run"):
    return pathlib.Path(shutil.copytree(finished, tmp_path / name))


def test_the_report_says_what_the_files_say(finished):
    text = (finished / "report.md").read_text()
    summary = json.loads((finished / "summary.json").read_text())
    record = read_record(finished)
    for part in (
        "Model `nano`, data `sudoku`: 12 steps of 8 rows. Finished.",
        "| `weight` | inverse-time |",
        "| rows kept | 1000000 |",
        "| end-of-text among the supervised tokens | 5.0% |",
        f"| nll | {shown(summary['eval']['nll'])} |",
        f"Mean of the last 10 steps: loss {shown(record.last('loss'))}",
        "acts like 1/t^2",
    ):
        assert part in text
    assert f"| 12 | {shown(record.steps[-1]['loss'])} |" in text
    assert record.last("loss") == pytest.approx(sum(summary["last_losses"]) / 10)
    cost = summary["cost"]
    assert cost["chips"] == 1 and cost["rmb"] == pytest.approx(36.0 * cost["chip_hours"])
    assert f"{cost['rmb']:.2f} RMB" in text
    assert [one["kind"] for one in read_incidents(finished)] == ["warning"]


def test_samples_are_taken_before_and_after(finished):
    samples = json.loads((finished / "samples.json").read_text())
    assert len(samples["prompts"]) == len(samples["before"]) == len(samples["after"]) == 2
    # Same prompts, same seed: what differs was learned.
    assert samples["before"] != samples["after"]
    text = (finished / "report.md").read_text()
    for name in ("prompts", "expected", "after"):
        assert samples[name][0].strip() in text
    assert all(one.isprintable() or one in "\n\t" for one in text)  # whatever an untrained model writes


def test_curves_are_drawn(finished):
    assert draw_curves(read_record(finished)).read_bytes().startswith(b"\x89PNG")
    assert "![curves](curves.png)" in (finished / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.optimised
def test_a_stopped_run_comes_to_the_same_end_and_says_that_it_was_stopped(finished, tmp_path):
    """Stopped between two steps by SIGINT, then the same command: the same losses, bit for bit."""
    out = tmp_path / "stopped"
    arguments = [*FLAGS, "--out", out, "--log-every", 1]
    with start_script("train.py", *arguments) as process:
        for line in process.stdout:
            if line.startswith("step 1/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130, rest
    assert "the same command resumes from there" in rest
    assert not (out / "summary.json").exists()
    assert 1 <= len(losses(out)) < 12
    before = json.loads((out / "samples.json").read_text())
    assert "after" not in before
    # A report of what there is can be made at any time.
    assert "NOT finished" in render_report(read_record(out))
    with pytest.raises(FileExistsError, match="seed was 0, now 1"):
        train(settings(out, seed=1))
    again = run_script("train.py", *arguments)
    assert again.returncode == 0 and f"wrote {out / 'report.md'}" in again.stdout
    assert losses(out) == losses(finished)
    after = json.loads((out / "samples.json").read_text())
    assert {name: after[name] for name in before} == before and len(after["after"]) == 2
    kinds = [one["kind"] for one in read_incidents(out)]
    assert [kind for kind in kinds if kind != "warning"] == ["stopped", "resumed"]
    text = (out / "report.md").read_text()
    assert "stopped: 1" in text and "resumed: 1" in text and "the same command resumes from there" in text
    first, second = read_segments(out)
    assert first.ended and second.ended and first.seconds > 1
    summary = json.loads((out / "summary.json").read_text())
    assert first.seconds + second.seconds - 5 < summary["seconds"] <= first.seconds + second.seconds
    # The whole run was sampled with the same weights as one that was never stopped.
    assert before["before"] == json.loads((finished / "samples.json").read_text())["before"]


@pytest.mark.slow
def test_a_run_may_go_on_with_other_samples(finished, tmp_path):
    """Answers to fewer prompts, or longer ones, are not laid beside those of before."""
    out = copied(finished, tmp_path)
    (out / "summary.json").unlink()
    train_and_report(settings(out, samples=1))
    assert read_record(out).settings["samples"] == 1
    samples = json.loads((out / "samples.json").read_text())
    assert len(samples["prompts"]) == len(samples["after"]) == 1 and "before" not in samples
    text = (out / "report.md").read_text()
    assert "**before**\n\nnot taken" in text and "| `samples` | 1 |" in text


def test_only_one_thing_is_asked_for_at_once(tmp_path):
    places = [str(tmp_path / name) for name in ("a", "b")]
    for more, said in ((["--report", places[0]], "give one of them"), (["--plan"], "--plan is for a future run")):
        done = run_script("train.py", "--compare", *places, *more)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr


def test_a_refused_value_is_one_line_and_a_mistyped_flag_is_the_parsers():
    for flag, value, said in (("--seed", "-1", "seed=-1 must not be negative"), ("--mesh", "3y1", "mesh '3y1'")):
        done = run_script("train.py", flag, value)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr
        assert done.stderr.count("\n") == 1
    assert (
        run_script("train.py", "--steps", "many").returncode == run_script("train.py", "--stpes", "3").returncode == 2
    )


@pytest.mark.slow
def test_a_run_that_diverges_says_so(tmp_path):
    with pytest.raises(Diverged):
        train(settings(tmp_path / "run", learning_rate=1e30, clip_norm=0, save_every=1, eval_rows=0))
    assert read_incidents(tmp_path / "run")[-1]["kind"] == "diverged"
    assert "diverged: 1" in render_report(read_record(tmp_path / "run"))


@pytest.mark.slow
def test_overwriting_forgets_the_old_run(finished, tmp_path):
    out = copied(finished, tmp_path)
    train_and_report(settings(out, steps=2, eval_rows=0, overwrite=True, weight="cart"))
    assert not (out / "samples.json").exists() and not read_incidents(out)
    text = (out / "report.md").read_text()
    assert "None: the run has no held-out rows, samples" in text and "2 steps of 8 rows" in text
    assert "Nothing: no warning" in text and "the run has no held-out rows (`--eval-rows 0`)" in text


def test_incidents_survive_a_line_cut_short(tmp_path):
    incidents = Incidents(tmp_path)
    incidents.add("warning", "one")
    incidents.add("skipped", "two", 7)
    with (tmp_path / INCIDENTS).open("a") as file:
        file.write('{"time": "2026')
    found = [(one["kind"], one["step"]) for one in read_incidents(tmp_path)]
    assert found == [("warning", None), ("skipped", 7), ("unreadable", None)]
    incidents.add("resumed", "three")  # not on the line that was cut
    with (tmp_path / INCIDENTS).open("a") as file:
        file.write('[1]\n{"kind": "warning"}\n')
    lines = [f"line {number} of incidents.jsonl cannot be read" for number in (3, 5, 6)]
    assert [one["text"] for one in read_incidents(tmp_path)] == ["one", "two", lines[0], "three", *lines[1:]]
    with pytest.raises(ValueError, match="kind='oops' is not one of"):
        incidents.add("oops", "four")
    Incidents(None).add("warning", "nobody is told")


def test_an_evaluation_table_is_shown_when_there_is_one(finished, tmp_path):
    out = copied(finished, tmp_path)
    rows = "".join(f"{step},{3 - step / 100},0.5\n" for step in range(1, 41))
    (out / "eval.csv").write_text("step,nll,masked_accuracy\n" + rows + "41,2.5")  # the last was cut short
    text = render_report(read_record(out))
    assert "During the run, on held-out rows" in text
    assert "The best: nll 2.6 after step 40." in text
    rows = "".join(f"{step},{3 - step / 100},0.5,{'e2' if step > 30 else 'ab'}\n" for step in (10, 20, 30, 35, 40))
    (out / "eval.csv").write_text("step,nll,masked_accuracy,grid\n" + rows.replace("20,2.8", "20,1.0"))
    other = render_report(read_record(out))
    assert "The best: nll 2.6 after step 40." in other and "| 20 | 1 |" not in other
    assert "3 evaluations on other rows are in eval.csv, but not listed here." in other
    assert "| 1 | 2.99 | 0.5 |" in text and "| 40 | 2.6 | 0.5 |" in text and "| 41 |" not in text


def test_steps_that_changed_nothing_are_told(finished, tmp_path):
    out = copied(finished, tmp_path)
    head, *rows = (out / "metrics.csv").read_text().splitlines()
    marked = [f"{row},{int(number in (3, 7))}" for number, row in enumerate(rows, 1)]
    marked[6] = marked[6].replace(rows[6].split(",")[1], "nan", 1)
    (out / "metrics.csv").write_text("\n".join([f"{head.replace('skipped', 'before')},skipped", *marked]) + "\n")
    text = render_report(read_record(out))
    assert "not finite: 3, 7." in text and "| 7 | - |" in text


def test_two_runs_side_by_side(finished, tmp_path):
    other = copied(finished, tmp_path)
    changed = json.loads((other / "settings.json").read_text()) | {"learning_rate": 0.01, "out": "elsewhere"}
    (other / "settings.json").write_text(json.dumps(changed))
    summary = json.loads((other / "summary.json").read_text())
    summary["eval"]["nll"] += 0.25
    (other / "summary.json").write_text(json.dumps(summary))
    data = json.loads((other / "data.json").read_text())
    data["rows"]["digest"] = "another"
    (other / "data.json").write_text(json.dumps(data))
    text = compare(finished, other)
    assert "| `learning_rate` | - | 0.01 |" in text and "`out`" not in text
    assert "| +0.25 |" in text and "trained on different tokens" in text
    assert "None." in compare(finished, finished)
    # Scores on other rows or masks are no better and no worse.
    head, *rows = (other / "eval.csv").read_text().splitlines()
    grid = rows[0].rpartition(",")[2]
    assert head.endswith(",grid") and len(grid) == 12
    worse = rows[0].split(",")
    worse[1] = "0.0001"
    earlier = ",".join(worse).replace(grid, "another")
    (other / "eval.csv").write_text("\n".join([head, earlier, *rows]) + "\n")
    best = shown(read_record(finished).best()["nll"])
    assert f"| best held-out nll during the run | {best} | {best} | +0 |" in compare(finished, other)
    (other / "eval.csv").write_text("\n".join([head, *rows]).replace(grid, "another") + "\n")
    text = compare(finished, other)
    assert f"| best held-out nll during the run | {best} | {best} | the rows differ |" in text
    assert text.count("the rows differ") == 1  # the last evaluation of both was on the same rows still
    for name, count in (("grid", 5), ("answered", 6)):
        changed = json.loads((other / "summary.json").read_text())
        changed["eval"][name] = "another"
        (other / "summary.json").write_text(json.dumps(changed))
        assert compare(finished, other).count("the rows differ") == count
    changed["eval"] = {name: value for name, value in changed["eval"].items() if name not in ("grid", "answered")}
    (other / "summary.json").write_text(json.dumps(changed))
    assert compare(finished, other).count("the rows may differ") == 5
    (other / "summary.json").unlink()
    assert "| finished | yes | NO |" in compare(finished, other)
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        compare(finished, tmp_path)
    (other / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="summary.json is not valid JSON"):
        compare(finished, other)


def test_the_command_that_compares(finished, tmp_path):
    target = tmp_path / "side.md"
    code, text, _ = run_script("train.py", "--compare", finished, finished, "--compare-out", target)
    assert code == 0 and target.read_text() in text and "## Results" in text
    code, _, error = run_script("train.py", "--compare", finished, finished, "--compare-out", target)
    assert code == 1 and "exists; give another --compare-out" in error
    code, _, error = run_script("train.py", "--compare", finished, tmp_path / "none")
    assert code == 1 and "not the folder of a run" in error
    code, _, error = run_script("train.py", "--compare-out", target)
    assert code != 0 and "add --compare" in error


def test_the_command_that_writes_a_report_again(finished, tmp_path):
    out = copied(finished, tmp_path)
    before = (out / "report.md").read_text()
    (out / "report.md").unlink()
    (out / "summary.json").unlink()
    code, text, _ = run_script("train.py", "--report", out)
    assert code == 0 and f"wrote {out / 'report.md'}" in text
    assert "NOT finished: 12 steps are done." in (out / "report.md").read_text() and "NOT finished" not in before
    code, _, error = run_script("train.py", "--report", tmp_path)
    assert code == 1 and "not the folder of a run" in error


def test_cells_of_tables_cannot_break_them():
    assert table(("a|b", "c"), [("x\ny", None)]) == ["| a\\|b | c |", "| --- | --- |", "| x y | - |"]


def test_cost_of_a_run_by_hand(tmp_path):
    dollars = settings(tmp_path, price_per_chip_hour=2.0, currency="usd")
    segment = begin_segment(dollars.price, make_mesh("8x1"), time.monotonic())
    # However many devices a CPU is made to have, it is one chip.
    assert (segment.chips, segment.usd_per_chip_hour, segment.devices) == (1, 2.0, "8 x cpu")
    long = dataclasses.replace(segment, seconds=1800.0)
    cost = run_cost([long], dollars.price)
    assert (cost.chips, cost.chip_hours, cost.usd, cost.usd_per_chip_hour) == (1, 0.5, 1.0, 2.0)
    assert cost.rmb == pytest.approx(7.1)
    free = run_cost(
        [dataclasses.replace(long, usd_per_chip_hour=None)], settings(tmp_path, price_per_chip_hour=None).price
    )
    assert (free.usd_per_chip_hour, free.usd, free.rmb) == (None, None, None)
    # Half an hour on eight chips at 6 dollars, and half an hour on one at 2.
    more = dataclasses.replace(long, chips=8, usd_per_chip_hour=6.0)
    cost = run_cost([more, long])
    assert (cost.chips, cost.chip_hours, cost.usd) == (1, 4.5, 25.0)
    assert cost.usd_per_chip_hour == pytest.approx(25 / 4.5)
    # A price that is given late is that of the segments without one.
    unknown = dataclasses.replace(more, usd_per_chip_hour=None)
    assert run_cost([unknown, long], dollars.price).usd == 9.0 and run_cost([unknown, long]).usd is None
    # Each segment was paid at the rate of its time.
    later = dataclasses.replace(long, rmb_per_usd=7.3)
    assert run_cost([long, later]).rmb == pytest.approx(7.1 + 7.3)


PART = RunSegment(begun="now", seconds=0.0, devices="8 x chip", chips=8, usd_per_chip_hour=3.0, rmb_per_usd=7.0)


def test_the_time_of_a_segment_that_was_killed_counts(finished, tmp_path, monkeypatch):
    assert [segment.ended for segment in read_segments(finished)] == [True]
    monkeypatch.setattr(segments, "EVERY", 0.01)
    # What is on the disk while it runs is what a kill would leave.
    killed = RunSegments(tmp_path, PART, time.monotonic() - 100, print)
    with killed.kept():
        time.sleep(0.2)
        (left,) = read_segments(tmp_path)
        (tmp_path / "copy").mkdir()
        shutil.copy(tmp_path / "parts.json", tmp_path / "copy")
    assert not left.ended and left.seconds > 100.05
    (whole,) = read_segments(tmp_path)
    assert whole.ended and whole.seconds >= left.seconds
    with RunSegments(tmp_path / "copy", dataclasses.replace(PART, chips=1), time.monotonic() - 7, print).kept():
        pass
    first, last = read_segments(tmp_path / "copy")
    assert first.seconds == pytest.approx(100, abs=5) and not first.ended
    assert last.seconds == pytest.approx(7, abs=2) and last.ended
    out = copied(finished, tmp_path)
    shutil.copy(tmp_path / "copy" / "parts.json", out)
    text = render_report(read_record(out))
    seconds = f"{first.seconds + last.seconds:.0f}"
    assert f"| seconds, everything included | {seconds} in 2 segments, 1 of them killed |" in text
    assert "| devices | 8 x chip |" in text
    # Of a run without an end too: what it has cost so far.
    (out / "summary.json").unlink()
    shutil.copy(tmp_path / "copy" / "parts.json", out)
    (out / "parts.json").write_text((out / "parts.json").read_text().replace("true", "false"))
    text = render_report(read_record(out))
    assert "1 of them killed; the last one is still running or was killed |" in text
    cost = run_cost([first, last])
    assert f"| cost | {cost.rmb:.2f} RMB, {cost.usd:.2f} USD, at 3.00 USD per chip and hour |" in text


def test_a_price_that_is_given_late_is_in_every_report(finished, tmp_path):
    out = copied(finished, tmp_path)
    summary = json.loads((out / "summary.json").read_text())
    (out / "summary.json").unlink()
    free = dataclasses.asdict(dataclasses.replace(PART, usd_per_chip_hour=None, seconds=450.0))
    (out / "parts.json").write_text(json.dumps([free]))
    given = json.loads((out / "settings.json").read_text()) | {"price_per_chip_hour": 2.0, "currency": "usd"}
    (out / "settings.json").write_text(json.dumps(given))
    assert "2.00 USD, at 2.00 USD per chip and hour |" in render_report(read_record(out))
    # Of a run that did not keep its segments: what its summary says.
    (out / "parts.json").unlink()
    (out / "summary.json").write_text(json.dumps(summary))
    text = render_report(read_record(out))
    assert f"| seconds, everything included | {summary['seconds']:.0f} |" in text and "| devices | " in text


def test_a_run_does_not_end_for_the_file_of_its_segments(tmp_path, monkeypatch):
    """A disk that is full for a while, and a file that a loss of power left empty."""
    said = []
    (tmp_path / "parts.json").write_text("")
    kept = RunSegments(tmp_path, PART, time.monotonic(), said.append)
    assert not (tmp_path / "parts.json").exists() and (tmp_path / "parts.json.damaged").exists()
    assert "is damaged" in said.pop() and not said
    monkeypatch.setattr(segments, "EVERY", 0.01)
    with kept.kept():
        with monkeypatch.context() as full:
            full.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            time.sleep(0.1)
        before = read_segments(tmp_path)[0].seconds
        deadline = time.monotonic() + 20
        while read_segments(tmp_path)[0].seconds <= before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert read_segments(tmp_path)[0].seconds > before  # it goes on when it can
    assert said and all("No space left on device" in one for one in said)
    # What is said of it goes to the same disk.
    report = RunConsole(settings(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    report._incidents = Incidents(tmp_path / "run")
    with monkeypatch.context() as full:
        full.setattr(Incidents, "add", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        report.say("warning: the disk is full")
    assert not read_incidents(tmp_path / "run")
    report.say("and goes on")
    report.say("warning: more")
    assert [one["text"] for one in read_incidents(tmp_path / "run")] == ["the disk is full", "more"]
    none = RunSegments(None, PART, time.monotonic() - 5, said.append)
    assert none.now()[0].seconds == pytest.approx(5, abs=1)
    with none.kept():
        none.write(none.now())
    (tmp_path / "parts.json").write_text('[{"begun": 1}]')
    with pytest.raises(ValueError, match=r"parts.json: \[0\].begun: Expected `str`"):
        read_segments(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", {"seconds": 1.0, "devices": "cpu", "eval": {"rows": "many"}}, "eval: rows: Expected `int"),
        ("samples.json", SAMPLES | {"after": None}, "after: Expected `array`, got `null`"),
        ("samples.json", SAMPLES | {"before": []}, "does not have one answer for each of its 1 prompts"),
    ],
)
def test_damaged_entries_of_a_run_are_named(tmp_path, name, content, message):
    (tmp_path / "settings.json").write_text(json.dumps(TrainSettings().plain()))
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        read_record(tmp_path)
