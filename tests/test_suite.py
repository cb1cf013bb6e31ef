"""What the whole suite rests on: tests/conftest.py and what it sets up."""

import conftest
import faults
import jax
from jax._src import lru_cache


def test_compiled_programs_are_written_whole(tmp_path):
    """jax's own cache writes straight into the file, and a killed process leaves half a program there."""
    assert jax.devices()
    assert lru_cache.LRUCache.put.__module__ == "jax_plugins.whole_cache_files"
    cache = lru_cache.LRUCache(str(tmp_path), max_size=-1)
    cache.put("key", b"program")
    assert cache.get("key") == b"program"
    assert [path.name for path in tmp_path.iterdir()] == ["key-cache"]


def test_every_deliberate_fault_can_be_made():
    """Their texts stand exactly once in the files; `python tests/faults.py` then shows that the default tests notice."""
    assert not faults.wrong_places(faults.ROOT)
    assert len(faults.FAULTS) >= 20


def test_faults_are_listed():
    page = (faults.ROOT / "docs" / "testing.md").read_text()
    assert faults.table() in page, "put what `python tests/faults.py --table` prints into docs/testing.md"


def test_long_files_are_files():
    """The order in which workers take the files, longest first, names no file that is gone."""
    missing = {name for name in conftest.LONG if not (conftest.TESTS / f"test_{name}.py").is_file()}
    assert not missing
