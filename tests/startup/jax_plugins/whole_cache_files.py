"""Makes the folder of compiled programs safe for several processes, even if some of them are killed.

jax writes a program directly into its file, so another process may read an incomplete program, and a kill may leave one
behind. This module writes the program to a temporary file, which it then renames. Before jax compiles anything, it
imports every module of the namespace package `jax_plugins` and calls its `initialize`: in the workers of pytest, and in
the processes that tests start (tests/conftest.py puts this folder on PYTHONPATH).
"""

import os
import threading


def initialize() -> None:
    """Replaces the method of jax's file cache that writes a program."""
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
