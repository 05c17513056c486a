"""How tests run the project: scripts as a user starts them, training in this process, and several ranks."""

import contextlib
import io
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from forks import Fork

from infini_ds.config.recipe import load_recipe
from infini_ds.config.resolve import resolve
from infini_ds.distributed import environment as distributed_environment
from infini_ds.distributed.environment import DistEnv, detect_environment
from infini_ds.distributed.process_group import connect
from infini_ds.distributed.signals import GracefulShutdown
from infini_ds.training.setup import build_trainer
from infini_ds.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment without the variables of a launcher, with the project importable."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launcher and not name.startswith("SLURM")}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return kept | {"PATH": path, "PYTHONPATH": str(ROOT)} | variables


def run_script(*arguments, code: int = 0, limit: float = 240, program: str = sys.executable, stdin: str | None = None):
    """Run `python ARGUMENTS` in the project's root, and assert the exit code. Returns the finished process."""
    done = subprocess.run(
        [program, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=limit,
        input=stdin if stdin is not None else "",
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def call_script(script: str, *arguments, code: int = 0) -> SimpleNamespace:
    """Run a script as `run_script` does, but in this process, which saves seconds of imports; stdin is empty."""
    out, error, got = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, [script, *map(str, arguments)]
    shutdown = distributed_environment.shutdown
    distributed_environment.shutdown = lambda: None  # later tests need the process group
    listen = GracefulShutdown.listen
    GracefulShutdown.listen = lambda _: None  # it would block signals in this process, and in all that it starts
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        got = end.code or 0
    finally:
        sys.argv, distributed_environment.shutdown, GracefulShutdown.listen = argv, shutdown, listen
        torch.set_num_threads(1)
    assert got == code, f"exit code {got}\n{out.getvalue()}\n{error.getvalue()}"
    return SimpleNamespace(stdout=out.getvalue(), stderr=error.getvalue())


# A model that trains in seconds, on rows of 256 tokens in segments of 32.
SHAPE = [
    *("model.segment_length=32", "model.config.hidden_size=32", "model.config.num_layers=2"),
    *("model.config.num_heads=2", "model.config.window_size=16"),
]
STEPS = [
    *("batch.rows=4", "batch.micro_rows=2", "steps=20", "log_every=1", "validation.every=0", "checkpoint.every=8"),
    *("optimizer.learning_rate=0.005", "schedule.kind=cosine", "schedule.warmup_steps=4"),
    "stability.check_gradients=true",
]
TINY = SHAPE + STEPS


def join_ranks(environment: DistEnv) -> None:
    """Open the process group of this process, a single rank, which stays open for the tests that follow."""
    if not dist.is_initialized():
        connect(environment, timeout_minutes=30).__enter__()


def build(*overrides: str, config: str | None = None) -> Trainer | None:
    """Return the trainer of a recipe in this process, as launch/pretrain.py builds it; None if the run is complete."""
    environment = detect_environment()
    recipe = load_recipe(config, list(overrides))
    run = resolve(recipe, environment)
    join_ranks(environment)
    recipe.folder.mkdir(parents=True, exist_ok=True)
    return build_trainer(run)


def pretrain(shards: Path, output: Path, name: str, *overrides: str, shape: list[str] = SHAPE) -> None:
    """Train a tiny model in this process, as launch/pretrain.py does."""
    trainer = build(f"data.path={shards}", f"output={output}", f"name={name}", *shape, *STEPS, *overrides)
    assert trainer is not None, "the run is complete"
    trainer.fit()


def launcher(name: str) -> list[str]:
    """Return the command `deepspeed` or `torchrun`: its module where a space in the path breaks its first line."""
    script = Path(sys.executable).with_name(name)
    modules = {"deepspeed": "deepspeed.launcher.runner", "torchrun": "torch.distributed.run"}
    return [sys.executable, "-m", modules[name]] if " " in str(script) else [str(script)]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch_pretrain(shards: Path, output: Path, name: str, *overrides: str, ranks: int, code: int = 0):
    """Run launch/pretrain.py with the deepspeed launcher."""
    arguments = ["launch/pretrain.py", f"data.path={shards}", f"output={output}", f"name={name}", *TINY, *overrides]
    program, *module = launcher("deepspeed")
    options = ["--num_gpus", ranks, "--master_port", free_port(), "--log_level", "error"]
    return run_script(*module, *options, *arguments, program=program, code=code)


def start_ranks(
    ranks: int, *arguments: str, script: str = "launch/pretrain.py", cwd: Path = ROOT, **variables: str
) -> list[Fork]:
    """Start `script` as `ranks` processes without a launcher, each the leader of a process group."""
    shared = variables | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [Fork(script, *arguments, cwd=cwd, env=environment(**shared, **place)) for place in places]


def run_ranks(ranks: int, *arguments: str) -> str:
    """Run launch/pretrain.py as `ranks` processes to the end; returns the output of rank 0."""
    return finish_ranks(start_ranks(ranks, *arguments))[0]


def outputs_of_ranks(ranks: int, name: str) -> list[str]:
    """Run the script `name` of tests/support as `ranks` processes to the end; returns what each of them printed."""
    path = f"{ROOT}:{ROOT / 'tests' / 'support'}"
    return finish_ranks(start_ranks(ranks, script=f"tests/support/{name}.py", PYTHONPATH=path))


def finish_ranks(processes: list[Fork]) -> list[str]:
    """Wait until all processes have ended, and assert that none failed; returns what each of them printed."""
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs
