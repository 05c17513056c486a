"""`make pretrain` in a folder with a space and a letter outside of ASCII: training, export, report; and again."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
import torch
from harness import ROOT, STEPS, environment

from infini_ds.config.recipe import load_recipe


@pytest.fixture
def clone(tmp_path) -> Path:
    """A copy of the project with an environment of its own, as `make` creates it, but with borrowed packages."""
    folder = tmp_path / "new user" / "infini ds é"
    for name in ("infini_ds", "data_prep", "launch", "ds_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    venv.create(folder / ".venv", symlinks=True)
    packages = next((folder / ".venv" / "lib").glob("python*/site-packages"))
    (packages / "borrowed.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{folder}\n")
    return folder


def quickstart(clone: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    """Run launch/quickstart.py as `make` does, where no environment is active."""
    own = Path(sys.executable).parent
    path = ":".join(folder for folder in os.environ["PATH"].split(":") if Path(folder) != own)
    variables = environment(PATH=path, OMP_NUM_THREADS="1")
    del variables["PYTHONPATH"]
    command = [".venv/bin/python", "launch/quickstart.py", *arguments]
    done = subprocess.run(command, cwd=clone, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.timeout(900)  # ten scripts, whose imports take long on a busy machine
def test_quickstart_from_shards_to_report_and_again(clone, shards, tmp_path):
    choices = [f"data.path={shards}", "output=my runs", "name=quick", "model.config.hidden_size=32", *STEPS]
    choices += ["stability.check_gradients=false"]  # which Muon does not allow
    command = ["--config", "launch/recipes/tiny-cpu.yaml", *choices, "steps=6", "batch.rows=4"]
    first = quickstart(clone, *command).stdout
    ranks = max(n for n in (1, 2, 4) if n <= len(os.sched_getaffinity(0)))
    option = f" --num_gpus {ranks}" if ranks > 1 else ""
    go_on = f"{option} launch/pretrain.py --config 'my runs/quick'/recipe.yaml steps=12"
    for words in (go_on, "=== training", "=== export", "validation loss", "with the memory off", "--- try next"):
        assert words in first, words
    activate, *_, launcher = first.partition("--- try next\n")[2].partition(" launch/pretrain.py")[0].splitlines()
    # From a shell without the environment, and with a path that has a space.
    help_of_launcher = ["bash", "-ec", f"{activate}\n{launcher} --help"]
    assert subprocess.run(help_of_launcher, cwd=clone, capture_output=True, text=True).stdout.startswith("usage: ")
    assert "text to shards" not in first and "=== text" not in first  # the data is not the default's
    for name in ("report.md", "loss_by_position.png", "export/model.safetensors", "checkpoints/step-000006"):
        assert (clone / "my runs" / "quick" / name).exists(), name

    again = quickstart(clone, *command).stdout
    assert "nothing to do" in again and "validation loss" in again

    failed = quickstart(clone, *command, "batch.rows=8", code=2)
    assert "batch.rows=8" in failed.stderr and "fix what it reports above" in failed.stderr
    assert "=== export" not in failed.stdout and "Traceback" not in failed.stderr


@pytest.fixture
def script() -> ModuleType:
    """launch/quickstart.py as a module."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "launch" / "quickstart.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("cores", "gib", "gpus", "batch", "expected"),
    [
        (1, 9, 0, "batch.rows=4", 1),
        (2, 9, 0, "batch.rows=4", 2),
        (3, 9, 0, "batch.rows=4", 2),  # three ranks cannot divide four rows
        (64, 99, 0, "batch.rows=4", 4),
        (64, 99, 0, "batch.rows=3", 3),
        (4, 2.5, 0, "batch.rows=4", 2),  # two ranks fit into the memory
        (4, 0.5, 0, "batch.rows=4", 1),
        (4, 9, 0, "batch.tokens=4096", 1),  # rows are known once the data are
        (4, 9, 8, "batch.rows=4", 8),
    ],
)
def test_a_rank_for_each_core_that_divides_the_rows(cores, gib, gpus, batch, expected, script, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(gib * 2**30)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert script.ranks(load_recipe(None, [batch])) == expected


def test_the_default_data_are_prepared_and_the_model_continues_python(script, monkeypatch):
    steps: dict[str, list[str]] = {}
    monkeypatch.setattr(script, "run_step", lambda title, arguments, graceful=False: steps.update({title: arguments}))
    monkeypatch.setattr(os, "chdir", lambda _: None)
    monkeypatch.setattr(
        sys, "argv", ["quickstart.py", "--config", str(ROOT / "launch/recipes/tiny-cpu.yaml"), "name=x"]
    )
    script.main()
    assert list(steps) == ["text to shards", "training", "export to Hugging Face format", "report", "text"]
    assert "stdlib-modules" in steps["text to shards"]
    assert steps["text"][:2] == ["launch/generate.py", "runs/x/export"]
    assert [steps["text"][i + 1] for i, word in enumerate(steps["text"]) if word == "--prompt"] == list(script.PROMPTS)
