"""launch/slurm/pretrain.sbatch on a real Slurm of two nodes: `make test-slurm`. Reports what happens to each job.

The nodes may be two daemons on one machine: each task gets a /dev/shm of its own, which needs root.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from harness import ROOT, SHAPE, environment

from infini_ds.metrics.metric_writers import read_metrics

pytestmark = pytest.mark.timeout(900)
OPTIONS = [
    *("batch.rows=8", "batch.micro_rows=2", "log_every=1", "validation.every=0", "checkpoint.every=100000"),
    *("schedule.kind=constant", "schedule.warmup_steps=4", "optimizer.learning_rate=0.005"),
]
# `environment` leaves out what Slurm sets in a job.
CLUSTER = {"SLURM_CONF": os.environ["SLURM_CONF"]} if "SLURM_CONF" in os.environ else {}
ENVIRONMENT = environment(
    OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", INSIDE="tests/slurm/own_shared_memory", **CLUSTER
)
FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
# Lines of the logs with these words are not shown.
ORDINARY = ("training ", "each gate can move", " parameters, ", "got SIGCONT", "forcing job", "step aborted")
STARTED = time.monotonic()


def report(text: str) -> None:
    print(f"{time.monotonic() - STARTED:6.1f} s  {text}", flush=True)


def slurm(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module", autouse=True)
def cluster():
    if not shutil.which("sinfo") or subprocess.run(["sinfo", "-h"], capture_output=True).returncode:
        pytest.fail("sinfo reaches no Slurm: start one, and set SLURM_CONF")
    report(slurm("sinfo", "--version") + ": " + slurm("sinfo", "-h", "-N", "-o", "%N %T %cCPU").replace("\n", ", "))


class Job:
    def __init__(self, shards: Path, output: Path, name: str, *overrides: str, options: list[str] = (), **variables):
        self.run, self.folder = output / name, output
        size = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none", "--time=20"]
        log = f"--output={output}/{name}-%j.log"
        where = [f"data.path={shards}", f"output={output}", f"name={name}"]
        command = ["sbatch", "--parsable", *size, log, *options, "launch/slurm/pretrain.sbatch"]
        command += [*where, *SHAPE, *OPTIONS, *overrides]
        done = subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT | variables, capture_output=True, text=True, check=True
        )
        self.id, self.released = done.stdout.strip(), "0"  # number of the last restart that was hurried
        given = " ".join([*(f"{k}={v}" for k, v in variables.items()), "sbatch", *options, *overrides])
        report(f"{name}: {self.shorten(given)} -> job {self.id}")

    def shorten(self, text: str) -> str:
        return text.replace(f"{self.run}/", "RUN/").replace(f"{self.folder}/", "OUTPUT/")

    def losses(self) -> list[float]:
        return [line["train/loss"] for line in read_metrics(self.run) if "train/loss" in line]

    def field(self, name: str) -> str:
        words = slurm("scontrol", "show", "job", self.id).split()
        return next(word for word in words if word.startswith(name + "=")).split("=", 1)[1]

    def wait_for(self, condition, limit: float = 400.0) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            restarts, state = self.field("Restarts"), self.field("JobState")
            assert time.monotonic() < deadline and (state not in FINAL_STATES or condition()), self.logs()
            if state == "PENDING" and self.field("Reason") == "BeginTime" and restarts != self.released:
                self.released = restarts
                report(f"job {self.id} is pending after restart {restarts}; it may start in 5 s")
                # Nodes refuse a job that they have just ended, which is why Slurm itself waits two minutes.
                time.sleep(5)
                slurm("scontrol", "update", f"JobId={self.id}", "StartTime=now")
            time.sleep(0.5)

    def wait_for_steps(self, steps: int) -> None:
        begun = len(self.losses())
        self.wait_for(lambda: len(self.losses()) >= begun + steps)

    def final_state(self) -> str:
        """Wait until the job has ended, and return its state."""
        self.wait_for(lambda: self.field("JobState") in FINAL_STATES)
        state = self.field("JobState")
        report(f"job {self.id}: {state}, {len(self.losses())} steps, restarts {self.field('Restarts')}")
        return state

    def logs(self) -> str:
        files = [*self.folder.glob(f"*-{self.id}.log"), *ROOT.glob(f"slurm-*-{self.id}-*.log")]
        return "\n".join(file.read_text() for file in files)

    def show(self) -> None:
        """Print the logs without the lines that every run logs."""
        for line in self.logs().splitlines():
            if line.strip() and not any(words in line for words in ORDINARY):
                print(f"          | {self.shorten(line)}", flush=True)

    def clear(self) -> None:
        """Cancel the job and remove its logs from the project's root, also those of an array's tasks."""
        subprocess.run(["scancel", self.id], env=ENVIRONMENT, capture_output=True)
        for word in slurm("scontrol", "show", "job", self.id).split():
            if word.startswith("JobId="):
                for file in ROOT.glob(f"slurm-*-{word.removeprefix('JobId=')}-node*.log"):
                    file.unlink()


@pytest.fixture
def submit(shards, tmp_path):
    jobs = []

    def begin(name: str, *overrides: str, **options) -> Job:
        jobs.append(Job(shards, tmp_path, name, *overrides, **options))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.clear()


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> list[float]:
    output = tmp_path_factory.mktemp("undisturbed")
    job = Job(shards, output, "undisturbed", "steps=40")
    assert job.final_state() == "COMPLETED", job.logs()
    assert (ROOT / f"slurm-infini-{job.id}-node1.log").exists()  # one log for each node
    job.clear()
    return job.losses()


@pytest.mark.parametrize("per", ["task", "node"])
def test_a_preempted_job_is_requeued_and_resumes_with_the_same_losses(per, submit, undisturbed):
    job = submit(f"per-{per}", "steps=40", PER=per)
    job.wait_for_steps(5)
    report(f"scancel --signal=USR1 {job.id}, as --signal does before the time limit, at step {len(job.losses())}")
    slurm("scancel", "--signal=USR1", job.id)
    job.wait_for(lambda: job.field("Restarts") == "1")
    job.wait_for_steps(5)
    report(f"scontrol requeue {job.id}, as a preemption does, at step {len(job.losses())}")
    slurm("scontrol", "requeue", job.id)
    assert job.final_state() == "COMPLETED", job.logs()
    job.show()
    assert job.field("Restarts") == "2"
    assert "stopped by SIGUSR1 at step" in job.logs() and "stopped by SIGTERM at step" in job.logs()
    assert "Traceback" not in job.logs()
    difference = max(abs(a - b) for a, b in zip(job.losses(), undisturbed, strict=True))
    report(
        f"{len(undisturbed)} losses, largest difference to the undisturbed run {difference}; last {undisturbed[-1]:.4f}"
    )
    assert difference == 0


def test_ranks_of_two_nodes_share_their_rows(submit, undisturbed):
    """Each row is divided over both nodes. The losses are those of two data ranks, up to rounding."""
    job = submit("shared", "steps=40", "parallel.sequence=2")
    job.wait_for_steps(5)
    report(f"scancel --signal=USR1 {job.id} at step {len(job.losses())}")
    slurm("scancel", "--signal=USR1", job.id)
    assert job.final_state() == "COMPLETED", job.logs()
    job.show()
    assert "stopped by SIGUSR1 at step" in job.logs() and "Traceback" not in job.logs()
    differences = [abs(a / b - 1) for a, b in zip(job.losses(), undisturbed, strict=True)]
    report(f"{len(differences)} losses, largest relative difference to two data ranks {max(differences):.1e}")
    assert max(differences) < 1e-3


def test_the_time_limit_requeues_and_scancel_does_not(submit):
    job = submit("limit", "steps=100000", options=["--time=2", "--signal=USR1@60"])
    # Where a start takes a minute, the first signal comes before the first step.
    job.wait_for(lambda: "stopped by SIGUSR1 at step" in job.logs())
    job.wait_for_steps(3)
    report(f"scancel {job.id}")
    slurm("scancel", job.id)
    assert job.final_state() == "CANCELLED"
    time.sleep(5)
    assert job.field("JobState") == "CANCELLED"
    job.show()
    assert "stopped by SIGUSR1 at step" in job.logs() and "resumed from" in job.logs()


def test_a_rank_that_dies_ends_the_job(submit):
    job = submit("dies", "steps=100000")
    job.wait_for_steps(5)
    rank = next(p for p in psutil.process_iter(["environ", "cmdline"]) if _is_rank(p, job.id, "1"))
    report(f"SIGKILL to rank 1, process {rank.pid}")
    rank.kill()
    killed = time.monotonic()
    assert job.final_state() == "FAILED"
    report(f"{time.monotonic() - killed:.0f} s after the kill")
    job.show()
    assert "error on rank 0: lost contact with rank 1" in job.logs()


def _is_rank(process: psutil.Process, job: str, rank: str) -> bool:
    variables, command = process.info["environ"] or {}, process.info["cmdline"] or []
    ours = variables.get("SLURM_JOB_ID") == job and variables.get("SLURM_PROCID") == rank
    return ours and "python" in command[0] and "launch/pretrain.py" in command


def test_a_grid_is_an_array_job(submit, tmp_path):
    (tmp_path / "grid.txt").write_text("name=a seed=1\nname=b seed=2\n")
    grid = {"options": ["--array=1-3", "--nodes=1"], "GRID": str(tmp_path / "grid.txt")}
    job = submit("grid", "steps=4", **grid)
    while slurm("squeue", "-h", "-j", job.id):
        time.sleep(1)
    logs = "".join(file.read_text() for file in tmp_path.glob("grid-*.log"))
    runs = [run.parent.name for run in sorted(tmp_path.glob("*/checkpoints"))]
    report(f"array of 3 with a grid of 2 lines: runs {runs}; {job.shorten(logs.strip())}")
    assert (tmp_path / "a/checkpoints/step-000004").exists() and (tmp_path / "b/checkpoints/step-000004").exists()
    assert "grid.txt has no line 3: give sbatch --array=1-2" in logs


@pytest.mark.parametrize(
    ("overrides", "options", "variables", "words"),
    [
        (["batch.rows=3"], [], {}, "batch.rows=3 cannot be divided over 2 ranks"),
        (["steps=4"], [], {"PER": "rank"}, "PER=rank: give task or node"),
        (["steps=4"], [], {"GRID": "grid.txt"}, "GRID is for array jobs: give sbatch --array=1-N"),
        (["steps=4"], [], {"PYTHON": "/nowhere/python"}, "/nowhere/python"),
        (["data.path=/nowhere"], [], {}, "/nowhere"),
    ],
)
def test_mistakes_are_sentences(overrides, options, variables, words, submit):
    job = submit("wrong", *overrides, options=options, **variables)
    assert job.final_state() == "FAILED"
    job.show()
    assert words in job.logs()
