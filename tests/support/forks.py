"""Scripts in processes that are forked from one that has imported everything, which saves seconds at each start."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from multiprocessing import resource_tracker
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["infini_ds.training.trainer", "infini_ds.training.engine"])


class Fork:
    """`python SCRIPT ARGUMENTS` in a process group of its own, so that os.killpg reaches its workers too.

    Has those parts of subprocess.Popen that the tests use.
    """

    def __init__(self, script: str, *arguments: str, cwd: Path, env: dict[str, str]):
        self._output = tempfile.NamedTemporaryFile("r")  # noqa: SIM115, it stays open
        given = ([script, *map(str, arguments)], cwd, env, self._output.name)
        self._process = SERVER.Process(target=_run, args=given)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def output(self) -> str:
        """What it has written so far."""
        return Path(self._output.name).read_text()

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait until it ends, and return what it wrote to stdout and stderr together."""
        self._process.join(timeout)
        assert self.returncode is not None, f"it has not ended after {timeout} s:\n{self._output.read()}"
        self._output.seek(0)
        return self._output.read(), None


def _run(argv: list[str], cwd: Path, env: dict[str, str], output: str) -> None:
    os.setsid()
    with open(output, "w") as opened:
        os.dup2(opened.fileno(), 1)
        os.dup2(opened.fileno(), 2)
    # A resource tracker of its own, as any process has. The tests' tracker would remove, when they end, the shared
    # memory that a killed process has left.
    resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
