"""`make pretrain` in a folder with a space and a letter outside of ASCII: training, export, report; and again."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from harness import ROOT, STEPS, environment


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
    command = ["--config", "launch/recipes/tiny-cpu.yaml", *choices, "steps=6", "batch.rows=4"]
    first = quickstart(clone, *command).stdout
    for words in ("=== training", "=== export", "validation loss", "with the memory off", "--- try next"):
        assert words in first, words
    assert "text to shards" not in first  # the data is not the default's
    for name in ("report.md", "loss_by_position.png", "export/model.safetensors", "checkpoints/step-000006"):
        assert (clone / "my runs" / "quick" / name).exists(), name

    again = quickstart(clone, *command).stdout
    assert "nothing to do" in again and "validation loss" in again

    failed = quickstart(clone, *command, "batch.rows=8", code=2)
    assert "batch.rows=8" in failed.stderr and "fix what it reports above" in failed.stderr
    assert "=== export" not in failed.stdout and "Traceback" not in failed.stderr
