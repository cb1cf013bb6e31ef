"""Runs the scripts of the repository, in the process of the test or in a new process."""

import contextlib
import io
import os
import pathlib
import runpy
import subprocess
import sys
import typing
import unittest.mock

ROOT = pathlib.Path(__file__).parent.parent


class Finished(typing.NamedTuple):
    """The exit status of a script, and all that it wrote to stdout and stderr."""

    returncode: int
    stdout: str
    stderr: str


def run_script(script: str, *arguments: object) -> Finished:
    """Runs `python script arguments` in this process, which saves the seconds that a new process needs for imports.

    Afterwards the environment variables are as before, because those that a script sets for jax end with its process.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(unittest.mock.patch.dict(os.environ))
        stack.enter_context(unittest.mock.patch.object(sys, "argv", [script, *map(str, arguments)]))
        # Python puts the folder of a script first on sys.path, so that the script can import its neighbours.
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
    """Starts `python script arguments` in the folder of the repository.

    stdout is a pipe, to which stderr is written too; `options` are those of `subprocess.Popen`, and override this.
    """
    defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, script, *map(str, arguments)], cwd=ROOT, text=True, **defaults | options)
