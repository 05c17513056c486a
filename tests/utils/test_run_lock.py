"""The lock on a run's folder."""

import subprocess
import sys

import pytest

from infini_ds.utils import run_lock
from infini_ds.utils.errors import UserError
from infini_ds.utils.run_lock import LockedError, acquire_run_lock

HOLD = """
import sys
from pathlib import Path
from infini_ds.utils.run_lock import acquire_run_lock
with acquire_run_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_one_job_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "TIMEOUT", 0.3)
    folder = tmp_path / "runs" / "one"
    job = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert job.stdout.readline() == "locked\n"
    with pytest.raises(LockedError, match=f"another job is training in {folder}"):
        acquire_run_lock(folder)
    job.communicate("")
    acquire_run_lock(folder).close()


def test_a_lock_ends_with_its_process_and_is_awaited(tmp_path):
    """The ranks of a killed job may live for some seconds."""
    job = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert job.stdout.readline() == "locked\n"
    end = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {job.pid}"])
    acquire_run_lock(tmp_path).close()
    assert end.wait() == 0 and job.wait() == -9


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"one cannot be written \(Not a directory\): choose another output folder"):
        acquire_run_lock(tmp_path / "file" / "one")
