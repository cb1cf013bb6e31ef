"""Makes the folder of compiled programs safe to share between processes, also between processes that are killed.

jax writes a program straight into its file, so a reader, or a kill, may find half of one. Here a program is written beside
it and then renamed. jax imports every module of the namespace package `jax_plugins` and calls its `initialize` before it
compiles anything: in the workers of pytest, and in the processes that tests start (tests/conftest.py puts this folder on
PYTHONPATH).
"""

import os
import threading


def initialize() -> None:
    """Replaces how jax's file cache writes."""
    from jax._src import lru_cache

    def put(self: lru_cache.LRUCache, key: str, value: bytes) -> None:
        path = os.path.join(os.fspath(self.path), f"{key}-cache")
        if os.path.exists(path):
            return
        beside = f"{path}.{os.getpid()}.{threading.get_ident()}"
        with open(beside, "wb") as file:
            file.write(value)
        os.replace(beside, path)

    lru_cache.LRUCache.put = put
