"""Tokens in a store on the disk: the same batches as from memory, whole or not at all, and never of other data."""

import json
from pathlib import Path

import batch_digests
import pytest
from batch_digests import SETTINGS, SHORT, digests, open_rows

RECORDED = json.loads(batch_digests.RECORDED.read_text())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of `batch_digests`, and the folder "cache" of their stores."""
    folder = tmp_path_factory.mktemp("digests")
    batch_digests.write_data(folder)
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_batches_from_a_store_are_those_from_memory_and_those_of_earlier_versions(name: str, written: Path) -> None:
    setting = SETTINGS[name]
    kept, stored = (open_rows(setting, written, cache) for cache in ("off", str(written / "cache")))
    recorded = RECORDED[name][str(SHORT)]
    assert digests(setting, kept, SHORT)[SHORT] == recorded
    assert digests(setting, stored, SHORT, processes=4, resume_at=SHORT // 2)[SHORT] == recorded
