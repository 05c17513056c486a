"""The lock on a run's folder."""

import pytest
from harness import run_script

from infini_ds.utils.errors import UserError
from infini_ds.utils.run_lock import acquire_run_lock


@pytest.mark.parametrize("output", ["a-file", "/proc/nothing"])
def test_a_folder_that_cannot_be_written_gets_a_sentence(output, tmp_path):
    (tmp_path / "a-file").touch()
    with pytest.raises(UserError, match=r"cannot be written \(.*\): choose another output="):
        acquire_run_lock(tmp_path / output / "run")


def test_two_jobs_in_one_folder_are_refused(tmp_path):
    job = """
import sys
from pathlib import Path
from infini_ds.utils import run_lock
run_lock.TIMEOUT = 0.5
run_lock.acquire_run_lock(Path(sys.argv[1], "one"))
"""
    held = acquire_run_lock(tmp_path / "one")
    assert f"another job is training in {tmp_path}/one" in run_script("-c", job, tmp_path, code=1).stderr
    held.close()
    run_script("-c", job, tmp_path)
