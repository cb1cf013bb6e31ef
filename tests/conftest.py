"""What every test runs under: eight CPU devices, strict dtype promotion, checked shapes, no network."""

import gc
import importlib.util
import itertools
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

# Before jax is imported. A test session on an accelerator says so: JAX_PLATFORMS=cuda make test.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download fails at once, with a clear message

# Tests spend most of their time in XLA's compiler: it optimises less here, and what it has compiled is kept, for the other
# workers, for the processes that tests start and for the next run (docs/testing.md).
# DREAM_JAX_XLA=default (make test-optimised) compiles as users do.
TESTS = Path(__file__).parent
PROGRAMS = TESTS.parent / ".pytest_cache" / "programs"
if os.environ.get("DREAM_JAX_XLA", "fast") == "fast":
    _fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{_fast} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
sys.path.insert(0, str(TESTS / "startup"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS / "startup"), os.environ.get("PYTHONPATH"))))

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# int32 + float32 and the like are errors: a silent promotion doubles the memory of what it touches.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Before dream_jax is imported: in these modules, whose annotations have shapes, they are checked at every call (under jit,
# at every trace). By beartype: typeguard 4, which tyro asks for, fails at the "B T" of a postponed annotation.
SHAPED = ["masks", "schedule", "decoding", "sharding", "attention", "model", "objective", "hf", "lora"]
SHAPED += ["optimizer", "train_step", "sampler", "quantisation"]
CHECKED = importlib.util.find_spec("beartype") is not None
if CHECKED:
    install_import_hook([f"dream_jax.{module}" for module in SHAPED], "beartype.beartype")

from dream_jax.distributed import provide_cpu_devices  # noqa: E402 - after the hook

provide_cpu_devices(8)  # before the first device is asked for, which fixes their number


def pytest_report_header() -> str:
    """One line at the top of every report."""
    return f"shapes: {'checked at every call' if CHECKED else 'NOT checked, beartype is not installed'}"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Old programs go when they take too much of the disk: those of code that has changed since are never read again."""
    if "PYTEST_XDIST_WORKER" not in os.environ and PROGRAMS.is_dir():
        size = sum(entry.stat().st_size for entry in os.scandir(PROGRAMS))
        if size > 4e9:
            shutil.rmtree(PROGRAMS)


# Files that take minutes, the longest first: begun last they would hold up the end of a run by several workers.
LONG = ("sampler", "interruptions", "trainer", "sampler_blocks", "mask_family", "adapters", "run_report", "optimizer")
LONG += ("train_step", "lora", "mask_study", "docs", "examples", "evaluation_run", "inference", "sampler_stream")
LONG += ("sampler_control", "export", "sample_cli", "attention_backends", "trained_mask", "skipped_steps", "objective")
LONG += ("model", "checkpoint", "autoregressive", "hf", "plan", "evaluation_harness", "convert_cli")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, the others as they come."""
    rank = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))  # stable: within a file nothing moves


# Linux allows a process 65530 memory maps (vm.max_map_count), and a compiled program holds five to several hundred.
# A worker that kept all of its programs would crash in the compiler, in whichever test came then.
MOST_MAPS = 40_000


def forget_programs() -> None:
    """Drops the compiled programs of this process; the cache on the disk keeps them."""
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file() -> Iterator[None]:
    """Drops the programs of a file at its end: hardly one of them serves another file."""
    yield
    forget_programs()


_tests_done = itertools.count(1)


@pytest.fixture(autouse=True)
def enough_maps() -> Iterator[None]:
    """Drops them amid a file too, should there be very many."""
    yield
    maps = Path("/proc/self/maps")
    if next(_tests_done) % 20 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        forget_programs()


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """For tests of how long compiling takes: nothing is read from the cache, nor written to it."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As users run: only the project's own checks refuse, not those of the annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def nano_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the nano model (tests/shared_run.py): to be read, or copied."""
    import shared_run

    return shared_run.make_once(shared_run.session_folder(tmp_path_factory))


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Tiny checkpoints in the published layout, and the numbers the published code gives on them."""
    return TESTS / "golden"


@pytest.fixture(scope="session")
def assets() -> Path:
    """Files of the published model and of data sets that are not part of the project."""
    named = os.environ.get("DREAM_JAX_ASSETS")
    if not named:
        pytest.skip("DREAM_JAX_ASSETS does not name the folder with the published files")
    path = Path(named)
    if not path.is_dir():  # a typo must not silently skip tests
        pytest.fail(f"DREAM_JAX_ASSETS={named} is not a folder")
    return path
