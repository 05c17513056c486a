"""The distributed environment as each launcher sets it, and which processes are launchers."""

import os
import sys

import psutil
import pytest

from infini_ds.distributed.environment import DistEnv, detect_environment
from infini_ds.distributed.signal_relay import run_graceful
from infini_ds.distributed.signals import is_launcher
from infini_ds.utils.errors import UserError

NAMES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
)
SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
ADDRESS = {"MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}


@pytest.fixture
def launched_with(monkeypatch):
    """Sets what a launcher sets, and nothing that another one would; all variables are restored after the test."""

    def set_variables(variables: dict[str, str]) -> None:
        for name in NAMES:
            monkeypatch.setenv(name, "")  # so that a variable that is set later is removed again
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, DistEnv(0, 0, 1, 1)),
        (ADDRESS | {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, DistEnv(3, 1, 4, 2)),
        (ADDRESS | {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, DistEnv(3, 1, 4, 2)),
        (ADDRESS | SLURM, DistEnv(5, 1, 8, 4)),
        ({"SLURM_PROCID": "0"}, DistEnv(0, 0, 1, 1)),  # in a job script, outside of srun
    ],
    ids=["python", "deepspeed", "torchrun", "srun", "job script"],
)
def test_ranks_are_read_from_each_launcher(variables, expected, launched_with):
    launched_with(variables)
    assert detect_environment() == expected
    assert os.environ["LOCAL_SIZE"] == os.environ["LOCAL_WORLD_SIZE"] == str(expected.local_world_size)
    assert os.environ["MASTER_ADDR"] == variables.get("MASTER_ADDR", "127.0.0.1") and os.environ["MASTER_PORT"]
    assert detect_environment() == expected  # what it has set does not change the result


def test_srun_without_an_address_is_a_sentence(launched_with):
    launched_with(SLURM)
    with pytest.raises(UserError, match="MASTER_ADDR is not set: in the job script, export"):
        detect_environment()


@pytest.mark.parametrize(
    ("command", "launches"),
    [
        ("/venv/bin/python3.11 /venv/bin/deepspeed --num_gpus 2 launch/pretrain.py", True),
        ("python -u -m deepspeed.launcher.launch --world_info=e30= launch/pretrain.py", True),
        ("python -m deepspeed.launcher.runner --num_gpus 2 launch/pretrain.py", True),
        ("python /venv/bin/torchrun --nproc-per-node 2 launch/pretrain.py", True),
        ("python -m torch.distributed.run --nproc-per-node 2 launch/pretrain.py", True),
        ("python launch/graceful.py deepspeed", True),
        ("python /home/me/infini_ds/launch/quickstart.py", True),
        ("python launch/study.py launch/studies/small.yaml", True),
        ("python /home/me/deepspeed/scheduler.py", False),
        ("bash -c deepspeed", False),
        ("python launch/pretrain.py", False),
        ("", False),
    ],
)
def test_launchers_are_recognised(command, launches):
    assert is_launcher(command.split(" ") if command else []) == launches


def test_the_command_line_of_a_path_with_a_space_is_recognised(tmp_path):
    script = tmp_path / "new user" / "quickstart.py"
    script.parent.mkdir()
    script.write_text("import time; time.sleep(60)")
    with psutil.Popen([sys.executable, script]) as process:
        try:
            assert is_launcher(process.cmdline())
        finally:
            process.kill()


def test_the_exit_code_is_that_of_a_shell():
    assert run_graceful([sys.executable, "-c", "raise SystemExit(75)"]) == 75
    assert run_graceful([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 128 + 9
    with pytest.raises(FileNotFoundError):
        run_graceful(["deepsped"])
