"""Runs code in forks of a process that has imported plain streaming: a fork takes milliseconds, an import seconds.

rows = run_in_fork("result = len(StreamingDataset(local=folder, batch_size=1))", folder=str(folder))
"""

import atexit
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60  # that a piece of code may take
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")

_server: subprocess.Popen[str] | None = None


def run_in_fork(code: str, **values: Any) -> Any:
    """Run `code`, in which `values`, `race` and the names of `streaming_compat.library` are defined.

    streaming is as it is published, unless the code imports the repairs.

    Returns:
        What the code assigns to `result`, of JSON's types.
    """
    global _server
    if _server is None:
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
        _server = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            text=True,
        )
    assert _server.stdin and _server.stdout
    print(json.dumps([textwrap.dedent(code), values]), file=_server.stdin, flush=True)
    answer = json.loads(_server.stdout.readline())
    assert "result" in answer, answer["error"]
    return answer["result"]


def race(
    function: Callable[[], Any], before: Callable[[], Any] = lambda: None, rounds: int = 40, until_error: bool = False
) -> list[str]:
    """Call `function` in 4 processes at the same time, `rounds` times, each after `before`; return all errors.

    With `until_error` the round with the first error is the last.
    """
    fork = multiprocessing.get_context("fork")
    barrier, errors, failed = fork.Barrier(4), fork.SimpleQueue(), fork.Event()

    def run() -> None:
        for _ in range(rounds):
            barrier.wait()
            if until_error and failed.is_set():
                break
            before()
            barrier.wait()
            try:
                function()
            except Exception as error:
                errors.put(f"{type(error).__name__}: {error}")
                failed.set()
        atexit._run_exitfuncs()  # a fork does not, and would leave its shared memory

    processes = [fork.Process(target=run) for _ in range(4)]
    for process in processes:
        process.start()
    found: list[str] = []
    while any(process.is_alive() for process in processes) or not errors.empty():
        if errors.empty():
            processes[0].join(0.01)
        else:
            found.append(errors.get())
    assert [process.exitcode for process in processes] == [0] * 4
    return found


def _serve() -> None:
    """Answer each line of standard input, the code and its values, by a line with the result or the error."""
    from infini_ds.streaming_compat import library

    for line in sys.stdin:
        code, values = json.loads(line)
        with tempfile.TemporaryFile("w+") as output:
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                os.setsid()
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os.write(write, _run(code, vars(library) | {"race": race} | values))
                os._exit(0)
            os.close(write)
            answer = os.read(read, 1 << 16) if select.select([read], [], [], SECONDS)[0] else b""
            os.close(read)
            os.killpg(child, signal.SIGKILL)  # threads and processes that hang
            os.waitpid(child, 0)
            if not answer:
                output.seek(0)
                answer = json.dumps({"error": f"no answer after {SECONDS} s:\n{output.read()}"}).encode()
        print(answer.decode(), flush=True)


def _run(code: str, names: dict[str, Any]) -> bytes:
    try:
        exec(code, names)
        answer = {"result": names["result"]}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    atexit._run_exitfuncs()  # streaming removes its shared memory
    return json.dumps(answer).encode()


if __name__ == "__main__":
    _serve()
