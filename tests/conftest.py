"""Sets up every test session: eight CPU devices, strict dtype promotion, checked shapes, no network."""

import gc
import importlib.util
import itertools
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

# These variables must be set before jax is imported. To test on an accelerator: JAX_PLATFORMS=cuda make test.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that tries to download fails at once, with a clear message

# Tests spend most of their time in the XLA compiler. Here it optimises less, and compiled programs are cached on the
# disk for the other workers, for the processes that tests start and for the next session (docs/testing.md). The older
# emitters of fused loops compile in half the time of those through MLIR, and one thread is enough for each program.
# DREAM_JAX_XLA=default (make test-optimised) compiles with the default options, as for users.
TESTS = Path(__file__).parent
PROGRAMS = TESTS.parent / ".pytest_cache" / "programs"
if os.environ.get("DREAM_JAX_XLA", "fast") == "fast":
    _fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    _fast += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{_fast} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
# No test writes to the caches of the user.
os.environ["DREAM_JAX_CACHE"] = str(TESTS.parent / ".pytest_cache" / "tokens")
sys.path.insert(0, str(TESTS / "startup"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS / "startup"), os.environ.get("PYTHONPATH"))))

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# An operation that mixes types, such as int32 + float32, is an error, because a silent promotion may double the memory.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# In these modules, whose annotations have shapes, the annotations are checked at every call (under jit, at every
# trace). The hook must be installed before dream_jax is imported. It uses beartype, because typeguard 4 (a dependency
# of tyro) fails at shapes such as "B T" in postponed annotations.
SHAPED = ["masks", "schedule", "decoding", "sharding", "attention", "model", "objective", "hf", "lora"]
SHAPED += ["optimizer", "train_step", "sampler", "quantisation", "float8"]
CHECKED = importlib.util.find_spec("beartype") is not None
if CHECKED:
    install_import_hook([f"dream_jax.{module}" for module in SHAPED], "beartype.beartype")

from dream_jax.distributed import provide_cpu_devices  # noqa: E402 - after the hook

provide_cpu_devices(8)  # jax fixes the number of devices when the first one is used


def pytest_report_header() -> str:
    """Returns the line at the top of every report, which says whether shapes are checked."""
    return f"shapes: {'checked at every call' if CHECKED else 'NOT checked, beartype is not installed'}"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Removes the cached programs if they take more than 4 GB: many are of code that has changed since."""
    if "PYTEST_XDIST_WORKER" not in os.environ and PROGRAMS.is_dir():
        size = sum(entry.stat().st_size for entry in os.scandir(PROGRAMS))
        if size > 4e9:
            shutil.rmtree(PROGRAMS)


# Test files that take minutes, the longest first. If a worker started one of them last, the other workers would wait.
LONG = ("interruptions", "sampler", "serve_cli", "trainer", "optimizer", "train_step", "mask_study")
LONG += ("attention_backends", "serve_load", "objective", "examples", "decoding", "lora", "layer_forms", "adapters")
LONG += ("sampler_blocks", "mask_family", "packing", "serving_engine", "evaluation_run", "sample_cli")
LONG += ("skipped_steps", "sampler_control", "accelerator", "int8_sampling", "checkpoint", "export", "serving_api")
LONG += ("model", "trained_mask", "sampler_steps", "sampler_stream", "numbers", "convert_cli", "browser_chat")
LONG += ("run_report", "plan", "full_disk", "autoregressive", "outputs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the files in `LONG` to the beginning; the other files keep their order."""
    rank = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))  # a stable sort: tests keep their order in a file
    gc.collect()
    gc.freeze()  # modules and tests exist to the end, so that the collector need not look at them again


# Linux allows 65530 memory maps per process (vm.max_map_count), and a compiled program has five to several hundred. A
# worker that never dropped a program would crash in the compiler, in an arbitrary test.
MOST_MAPS = 40_000


def forget_programs() -> None:
    """Drops the compiled programs from the memory of this process; they remain in the cache on the disk."""
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file() -> Iterator[None]:
    """Drops the compiled programs after each test file, because other files use hardly any of them."""
    yield
    forget_programs()


_tests_done = itertools.count(1)


@pytest.fixture(autouse=True)
def enough_maps() -> Iterator[None]:
    """Drops the compiled programs also within a file if the process has more than `MOST_MAPS` memory maps."""
    yield
    maps = Path("/proc/self/maps")
    if next(_tests_done) % 20 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        forget_programs()


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """Switches off the cache of compiled programs, for tests that measure the time of compilation."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switches off the checks of shapes in annotations, so that only the checks of the project raise, as for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def nano_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the nano model (tests/shared_run.py); tests must not change it."""
    import shared_run

    return shared_run.make_once(shared_run.session_folder(tmp_path_factory))


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of tiny checkpoints in the published layout, with the numbers that the published code computes."""
    return TESTS / "golden"


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder DREAM_JAX_ASSETS, with published model files and data sets; without it, the test is skipped."""
    named = os.environ.get("DREAM_JAX_ASSETS")
    if not named:
        pytest.skip("DREAM_JAX_ASSETS does not name the folder with the published files")
    path = Path(named)
    if not path.is_dir():  # the test fails, because a typing error must not skip tests without notice
        pytest.fail(f"DREAM_JAX_ASSETS={named} is not a folder")
    return path
