"""What a script prints of an error, on one rank and on two."""

import time
from pathlib import Path

import pytest
from harness import start_ranks

from infini_ds.distributed.entry_point import seconds_for_rank_zero

SCRIPT = """
import logging, os, sys
from pathlib import Path
import numpy, torch.distributed
from infini_ds.distributed.entry_point import run_main
from infini_ds.utils.errors import UserError
from infini_ds.utils.logging import log_to_file

def main():
    kind, failing = sys.argv[1:]
    if failing == "1":
        torch.distributed.init_process_group("gloo")
    if os.environ["RANK"] in failing:
        if kind == "UserError":
            raise UserError("steps=0: give steps=1 or more")
        if kind == "full":  # the log, of which the run is independent, and a file that it needs
            logger = logging.getLogger("infini_ds.script")
            with log_to_file(Path("/dev/full")), open("/dev/full", "w") as file:
                logger.info("step 1")
                file.write("metrics")
                file.flush()
        numpy.zeros(3) + numpy.zeros(4)
    torch.distributed.barrier()

run_main(main)
"""
SENTENCE = "error: steps=0: give steps=1 or more\n"
SHAPES = "ValueError: operands could not be broadcast together with shapes (3,) (4,)"


@pytest.fixture
def script(tmp_path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def test_one_rank(script, monkeypatch):
    def run(kind: str) -> tuple[int, str]:
        (rank,) = start_ranks(1, kind, "0", script=str(script))
        output, _ = rank.communicate(timeout=120)
        return rank.returncode, output

    assert run("UserError") == (2, SENTENCE)
    code, output = run("full")
    assert code == 2 and output == (
        "step 1\nerror: the disk is full ([Errno 28] No space left on device): free some space, then give the same "
        "command again\n"
    )
    code, output = run("ValueError")
    assert code == 1 and SHAPES in output and "in main" in output and "error on rank" not in output
    monkeypatch.setenv("INFINI_DS_TRACEBACK", "1")
    code, output = run("UserError")
    assert code == 2 and output.startswith("Traceback") and "in main" in output and output.endswith(SENTENCE)


def test_two_ranks(script, monkeypatch):
    """Each case is a pair of ranks; all pairs run at once, since they wait more than they compute."""
    cases = {case: start_ranks(2, *case, script=str(script)) for case in (("UserError", "01"), ("ValueError", "01"))}
    cases["one fails"] = start_ranks(2, "ValueError", "1", script=str(script))  # rank 0 waits for it in a barrier
    monkeypatch.setenv("INFINI_DS_TRACEBACK", "1")
    cases["stack"] = start_ranks(2, "UserError", "01", script=str(script))
    outputs = {case: [rank.communicate(timeout=120)[0] for rank in ranks] for case, ranks in cases.items()}
    codes = {case: [rank.returncode for rank in ranks] for case, ranks in cases.items()}
    assert codes == {("UserError", "01"): [2, 2], ("ValueError", "01"): [1, 1], "one fails": [1, 1], "stack": [2, 2]}

    assert outputs["UserError", "01"] == [SENTENCE, SENTENCE.replace("error", "error on rank 1")]
    first, _ = outputs["stack"]
    assert first.startswith("Traceback") and "in main" in first and first.endswith(SENTENCE)
    for rank, output in enumerate(outputs["ValueError", "01"]):
        assert output.startswith(f"error on rank {rank}:\nTraceback") and SHAPES in output and "in main" in output
    first, second = outputs["one fails"]
    assert SHAPES in second and "in main" in second
    assert first.startswith("error on rank 0: lost contact with rank 1 (") and first.count("\n") == 1, first


def test_rank_zero_has_as_long_as_the_start_took():
    """Where ranks take long to start, as on a busy machine, they also differ by more."""
    now = time.time()
    assert 17 <= seconds_for_rank_zero(now - 12) < 30
    assert seconds_for_rank_zero(now - 3600) == 30  # an error after an hour
    assert seconds_for_rank_zero(now + 3600) == 5  # the clock was set back
