"""The architecture study of attention masks: `python study.py [--quick] --out runs/study`.

Trains the nano model under each mask, on tasks that are easiest to write in different orders. Measures likelihood, the
accuracy in each order of writing and in few passes, and whether keys and values can be cached. A study that was stopped
can be resumed. Several processes, on one machine or on several that share the folder, can work on it together. With
--inspect PATH it trains nothing and computes statistics of the attention inside a checkpoint instead.
"""

import dataclasses
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

QUICK_TASKS, QUICK_SEEDS = ("addition",), 2
MOST_PROCESSES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySettings:
    """The settings of a study: what is trained and measured, and the folder of the results."""

    out: pathlib.Path = pathlib.Path("runs/study")
    """folder of the runs, tables and figures; runs that are already in it are not made again"""
    quick: bool = False
    """one task, only the variants that differ in the mask, two seeds: 15 minutes on two cores"""
    tasks: tuple[str, ...] = ()
    """names of tasks; by default all: addition, copy, reversal, sudoku, scattered sudoku, countdown"""
    variants: tuple[str, ...] = ()
    """names of variants (masks and ablations); by default all"""
    seeds: int = 3
    """number of models that are trained for each task and variant"""
    costs: bool = False
    """also measure the time of training steps and of sampling under each mask and write costs.csv; the machine should
    be idle otherwise"""
    length: float = 1.0
    """factor on the number of training steps of each task, above 0"""
    test_rows: int = 256
    """number of test examples that each model answers, 1 to 1024"""
    processes: int = os.cpu_count() or 1
    """number of processes that train at once, one core each; 0: only write tables and figures of finished runs"""
    fill: tuple[pathlib.Path, ...] = ()
    """Markdown files whose marked tables are replaced by tables of the finished runs"""
    pack: bool = False
    """move the files of all finished runs into one file, OUT/runs.jsonl, with one line per run"""
    inspect: str | None = None
    """a checkpoint or preset whose attention is measured, instead of training; --out gets the table and the figure"""
    data: str = "sudoku"
    """source of the test rows for --inspect, as in train.py --data"""
    rows: int = 32
    """number of test rows that --inspect reads"""
    max_length: int = 512
    """maximum length of a row for --inspect, in tokens; longer rows are left out"""
    seed: int = 0
    """seed of --inspect, which decides which positions are masked, 0 to 2**31 - 1"""

    def __post_init__(self) -> None:
        from dream_jax.bounds import MOST_ROWS, MOST_TOKENS, POSITIVE, SEED, IntegerRange, check_numbers

        check_numbers(  # StudyPlan has further limits
            self,
            seeds=IntegerRange(1),
            length=POSITIVE,
            test_rows=IntegerRange(1),
            processes=IntegerRange(0, MOST_PROCESSES),
            rows=IntegerRange(1, MOST_ROWS),
            max_length=IntegerRange(2, MOST_TOKENS),
            seed=SEED,
        )


def hardware() -> dict[str, Any]:
    """Returns the processor, the versions and the date, for the file hardware.json."""
    import jax

    model = ""
    if pathlib.Path("/proc/cpuinfo").is_file():
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    found = {"processor": model or platform.machine(), "cores": os.cpu_count(), "jax": jax.__version__}
    return found | {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def spread(settings: StudySettings, console: Console) -> None:
    """Starts the workers and waits for them; if one fails, ends the others and raises RuntimeError."""
    # Each worker is bound to one core before jax counts the cores, as a second core does not help a small model.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    workers = []
    for number in range(settings.processes):
        environment = os.environ | {"DREAM_JAX_STUDY_WORKER": "1"}
        if cores:
            environment["DREAM_JAX_STUDY_CORE"] = str(cores[number % len(cores)])
        workers.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    try:
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() not in (None, 0) for worker in workers):
                break
            time.sleep(0.5)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        codes = [worker.wait() for worker in workers]
    if any(codes):
        raise RuntimeError(
            f"workers ended with the exit codes {codes}; finished runs are kept; start the same command again to resume"
        )
    console.print("all runs are finished")


def table(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints accuracy by order of writing, and likelihood, for each task and variant."""
    from mask_study.measures import ORDERS
    from mask_study.tables import of_seeds

    shown = Table("task", "variant", *ORDERS, "nats/token", "seeds", title="share of right answers by order of writing")
    shown.columns[0].no_wrap = shown.columns[1].no_wrap = True  # Only numbers may be broken over lines.
    found = {(row["task"], row["variant"], row["measure"], row["of"]): row for row in rows}

    def cell(task: str, variant: str, name: str, of: str) -> str:
        row = found.get((task, variant, name, of))
        return "" if row is None else of_seeds(row, 3)

    for task, variant in dict.fromkeys((row["task"], row["variant"]) for row in rows):
        orders = (cell(task, variant, "accuracy", order) for order in ORDERS)
        seeds = next(row["seeds"] for row in rows if (row["task"], row["variant"]) == (task, variant))
        shown.add_row(task, variant, *orders, cell(task, variant, "nll", "all"), str(int(seeds)))
    console.print(shown)


def study(settings: StudySettings, console: Console) -> None:
    """Makes the missing runs and then the tables and figures; in a worker process only the runs."""
    from dream_jax.files import write_file, write_json
    from dream_jax.paths import check_local, check_replaceable, claimed, is_json_object
    from mask_study import TASKS, VARIANTS, Study, StudyPlan, differences, read_rows, summarise
    from mask_study.figures import draw_all
    from mask_study.variants import MASKS

    check_local(settings)
    for path in settings.fill:
        if not path.is_file():  # said now, and not after hours of training
            raise FileNotFoundError(f"--fill {path}: there is no such file")
    tasks = settings.tasks or (QUICK_TASKS if settings.quick else tuple(TASKS))
    variants = settings.variants or (MASKS if settings.quick else tuple(VARIANTS))
    seeds = QUICK_SEEDS if settings.quick else settings.seeds
    plan = StudyPlan(tasks=tasks, variants=variants, seeds=seeds, length=settings.length, test_rows=settings.test_rows)
    made = Study(settings.out, plan)
    if "DREAM_JAX_STUDY_WORKER" in os.environ:
        import jax

        # Most compiled programs are the same for all seeds and workers; compiling again would take a tenth of a run.
        jax.config.update("jax_compilation_cache_dir", str(settings.out.resolve() / "compiled"))
        begun = time.monotonic()
        made.work(
            lambda run, seconds: console.print(
                f"{run.task}, {run.variant}, seed {run.seed}: trained in {seconds:.0f} s; "
                f"{len(made.missing())} runs to go, {time.monotonic() - begun:.0f} s so far"
            )
        )
        return
    missing = len(made.missing())
    console.print(f"{len(plan.runs())} runs, {missing} of them to make, in {settings.out}")
    settings.out.mkdir(parents=True, exist_ok=True)
    if missing and settings.processes:
        with claimed(settings.out, shared=True):  # other studies may train in the folder too, but none may pack it
            spread(settings, console)
    if settings.pack:  # after the workers have ended: they write the files that are packed
        with claimed(settings.out, "wait until it has ended, then pack"):
            console.print("packed into", str(made.pack()))
    if settings.costs:
        from mask_study.costs import costs
        from mask_study.runs import write_table

        console.print("wrote", str(write_table(settings.out / "costs.csv", list(costs(MASKS)))))
    rows = list(made.rows())
    if not rows:
        raise ValueError(f"{settings.out} has no finished run yet; set --processes to at least 1")
    paths = [*made.write_tables()]
    about = settings.out / "hardware.json"
    check_replaceable(about, "a description of hardware", is_json_object("processor", "cores"))
    if (missing and settings.processes) or not about.exists():  # Tables may be made on another machine.
        write_json(about, hardware())
    paths.append(about)
    summary = summarise(rows)
    # What was measured or computed apart from the runs; the folder may have none of it.
    costs_path, floors_path = settings.out / "costs.csv", settings.out / "floors.csv"
    timed, lowest = (read_rows(path) if path.is_file() else [] for path in (costs_path, floors_path))
    curves = [(run.task, run.variant, run.seed, nll) for run, nll in made.curves()]
    paths += draw_all(summary, settings.out, curves, lowest)
    for path in settings.fill:
        from mask_study.tables import fill

        write_file(path, fill(path, summary, timed, differences(rows), lowest))
        paths.append(path)
    table(summary, console)
    console.print("wrote", *map(str, paths))


def look(settings: StudySettings, console: Console) -> None:
    """Writes and prints statistics of the attention of one checkpoint."""
    from dream_jax.config import PRESETS
    from dream_jax.paths import check_local
    from dream_jax.pretrained import load
    from dream_jax.tokenizer import load_tokenizer
    from mask_study.inspection import STATISTICS, draw, inspect, read_rows
    from mask_study.runs import write_table

    assert settings.inspect is not None
    check_local(settings, "inspect", "data")
    table_path, figure_path = settings.out / "attention.csv", settings.out / "attention.png"
    for path in (table_path, figure_path):
        if path.exists():
            raise FileExistsError(f"{path} exists; give another --out")
    model = load(settings.inspect, layers="stacked")
    if model.tokenizer_dir is None and settings.inspect != "nano":
        raise ValueError(f"{settings.inspect} has no tokenizer, so text rows cannot be read; use another checkpoint")
    words = load_tokenizer("bytes" if model.tokenizer_dir is None else model.tokenizer_dir)
    longest = min(settings.max_length, model.config.max_position_embeddings)
    rows = read_rows(settings.data, words, settings.rows, longest)
    kind = "random weights" if settings.inspect in PRESETS else f"trained under the mask {model.trained_mask!r}"
    console.print(f"{settings.inspect} ({kind}), {len(rows.tokens_BT)} rows of {rows.tokens_BT.shape[1]} tokens")
    lines = list(inspect(model, rows, settings.seed))
    settings.out.mkdir(parents=True, exist_ok=True)
    paths = [write_table(table_path, lines), draw(lines, figure_path)]
    shown = Table("layer", *STATISTICS, title="masked queries at t = 0.5, mean of the heads")
    for layer in sorted({line["layer"] for line in lines}):
        here = [one for one in lines if (one["layer"], one["queries"], one["t"]) == (layer, "masked", 0.5)]
        means = (sum(one[name] for one in here) / len(here) for name in STATISTICS)
        shown.add_row(str(layer), *(f"{mean:.2f}" for mean in means))
    console.print(shown)
    console.print("wrote", *map(str, paths))


def main() -> int:
    """Runs the command line and returns the exit code."""
    core = os.environ.get("DREAM_JAX_STUDY_CORE")
    if core is not None:
        os.sched_setaffinity(0, {int(core)})  # before the first import of numpy and jax, which count the cores
    console = Console(markup=False, emoji=False)
    settings = tyro.cli(StudySettings, description=__doc__)
    try:
        from dream_jax.device_memory import take_memory
        from dream_jax.tokenizer import check_texts

        check_texts(sys.argv[1:])
        if settings.processes == 1 or settings.inspect is not None:
            take_memory()  # several processes share a GPU, so each takes what jax takes by default
        study(settings, console) if settings.inspect is None else look(settings, console)
    except KeyboardInterrupt:
        print("interrupted; start the same command again to resume", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
