"""The scripts at the top of the repository, run within the test's process or in one of their own."""

import contextlib
import io
import pathlib
import runpy
import subprocess
import sys
import typing
import unittest.mock

ROOT = pathlib.Path(__file__).parent.parent


class Finished(typing.NamedTuple):
    """What a script has said, and its exit status."""

    returncode: int
    stdout: str
    stderr: str


def run_script(script: str, *arguments: object) -> Finished:
    """Runs `script` as `python script arguments` would, in this process: a new one takes seconds to import everything."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(unittest.mock.patch.object(sys, "argv", [script, *map(str, arguments)]))
        # As Python does for a script, whose neighbours may be imported.
        stack.enter_context(unittest.mock.patch.object(sys, "path", [str((ROOT / script).parent), *sys.path]))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code: object = 0
        except SystemExit as ended:
            code = ended.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
    return Finished(code if isinstance(code, int) else 1, out.getvalue(), err.getvalue())


def start_script(script: str, *arguments: object, **options: typing.Any) -> subprocess.Popen[str]:
    """Starts `python script arguments` in the repository's folder; unless told otherwise stderr comes with stdout."""
    defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, script, *map(str, arguments)], cwd=ROOT, text=True, **defaults | options)
