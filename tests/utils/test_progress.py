"""Progress and logging: on a terminal, in a pipe, and in a run's log file."""

import logging
import os
import pty
import re
import subprocess
import sys

import pytest

from infini_ds.utils import progress
from infini_ds.utils.errors import UserError
from infini_ds.utils.logging import log_to_file
from infini_ds.utils.progress import ProgressBar

logger = logging.getLogger("infini_ds.example")

WORK = """
import logging, sys
from pathlib import Path
from infini_ds.utils.logging import log_to_file, setup_logging
from infini_ds.utils.progress import ProgressBar

setup_logging(stderr=sys.argv[1] == "stderr")
with log_to_file(Path(sys.argv[2])), ProgressBar("training", 3, start=1) as bar:
    bar.advance({"loss": "3.25"})
    logging.getLogger("infini_ds.example").info("step 2: checkpoint saved")
    print("a result")
    bar.advance({"loss": "3.00"})
"""


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_in_a_pipe(clock, capsys):
    with ProgressBar("training", 40, start=20) as bar:
        for _ in range(20):
            clock[0] += 4.0
            bar.advance({"loss": f"{bar.done / 10:.1f}"} if bar.done % 2 else None)
    assert capsys.readouterr().out.splitlines() == [
        "training 22/40  loss 2.1  1:12 left",
        "training 26/40  loss 2.5  0:56 left",
        "training 30/40  loss 2.9  0:40 left",
        "training 34/40  loss 3.3  0:24 left",
        "training 38/40  loss 3.7  0:08 left",
        "training 40/40  loss 3.9  0:00 left",
    ]


def test_lines_of_an_unknown_total_have_a_speed_in_place_of_the_time_left(clock, capsys):
    with ProgressBar("preparing", unit="tokens") as bar:
        bar.phase("training the tokenizer")
        clock[0] += 100.0
        bar.phase("tokenizing")
        for documents in range(3):
            clock[0] += 8.0
            bar.advance({"documents": str(documents + 1)}, by=4000)
    assert capsys.readouterr().out.splitlines() == [
        "training the tokenizer",
        "tokenizing",
        "tokenizing 8,000 tokens  documents 2  500 tokens/s",
    ]


def test_after_a_rollback_the_time_left_is_that_of_the_steps_to_repeat(clock, capsys):
    with ProgressBar("training", 10) as bar:
        for _ in range(6):
            bar.advance()
        bar.rewind(2)
        clock[0] += 11.0
        bar.advance()
    assert capsys.readouterr().out.splitlines()[-1] == "training 3/10  1:17 left"


def test_a_hidden_one_counts_and_shows_nothing(capsys):
    with ProgressBar("training", 2, shown=False) as bar:
        bar.advance({"loss": "1"})
        bar.phase("validation")
        bar.advance(by=3)
    assert bar.done == 3 and capsys.readouterr().out == ""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_on_a_terminal_messages_stand_above_the_bar_and_the_log_file_has_all(tmp_path, stream):
    """What goes to a file although the other stream is a terminal stays in the file."""
    log, file = tmp_path / "train.log", tmp_path / "file"
    terminal, other = pty.openpty()
    with file.open("w") as opened:
        streams = {"stdout": opened, "stderr": opened} | {stream: other}
        variables = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
        done = subprocess.run([sys.executable, "-c", WORK, stream, str(log)], env=variables, **streams)
    os.close(other)
    shown = b""
    while chunk := _read(terminal):
        shown += chunk
    assert done.returncode == 0, shown
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r", "\n").split("\n")
    message = next(i for i, line in enumerate(lines) if line.strip() == "step 2: checkpoint saved")
    assert any("3/3" in line and "loss 3.00" in line and "━" in line for line in lines[message:]), lines
    assert sum("checkpoint saved" in line for line in lines) == 1
    if stream == "stderr":
        assert file.read_text() == "a result\n"
    else:
        assert any(line.strip() == "a result" for line in lines) and file.read_text() == ""
    kept = [line.split(": ", 1)[1] for line in log.read_text().splitlines()]
    assert kept == [
        "training 2/3  loss 3.25  0:00 left",
        "step 2: checkpoint saved",
        "training 3/3  loss 3.00  0:00 left",
    ]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # EIO: every writer has closed it
        return b""


@pytest.mark.parametrize(
    ("error", "last", "stacks"),
    [
        (UserError("steps=0: give 1 or more"), "steps=0: give 1 or more", 0),
        (ValueError("shapes"), "ValueError: shapes", 1),
    ],
)
def test_the_log_file_has_the_error_that_ended_the_run(tmp_path, capsys, error, last, stacks):
    with pytest.raises(type(error)), log_to_file(tmp_path / "train.log"):
        raise error
    log = (tmp_path / "train.log").read_text()
    assert log.rstrip().endswith(last) and "rank 0 ERROR" in log and log.count("Traceback") == stacks
    assert capsys.readouterr().out == ""  # run_main prints it


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_other_ranks_show_warnings_only(tmp_path, monkeypatch, capsys, variable):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(variable, "3")
    with log_to_file(tmp_path / "train.log"):
        logger.info("resuming")
        logger.warning("disk is nearly full")
    assert capsys.readouterr().out == "disk is nearly full\n"
    kept = (tmp_path / "train.log").read_text()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} rank 3 WARNING infini_ds.example: disk is nearly full\n", kept
    )
