"""Commands without a recipe: which one they take, and its data."""

import subprocess
from dataclasses import replace
from pathlib import Path
from threading import Timer

import pytest
import torch
from harness import ROOT, call_script, start_ranks

from data_prep.manifest import NAME as MANIFEST_NAME
from infini_ds.config import default_recipe as defaults
from infini_ds.config.recipe import load_recipe
from infini_ds.distributed.environment import DistEnv
from infini_ds.utils.errors import UserError

RANK_0, RANK_1 = DistEnv(0, 0, 2, 2), DistEnv(1, 1, 2, 2)


@pytest.fixture
def empty(tmp_path, monkeypatch) -> Path:
    """A current folder without data or runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("gpus", "name"), [(0, "tiny-cpu"), (4, "tiny-gpu")])
def test_the_default_fits_the_hardware(gpus, name, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.chdir(ROOT)
    assert defaults.default_recipe() == Path(f"launch/recipes/{name}.yaml")
    recipe = defaults.load_recipe_or_default(None, ["steps=12"])
    assert (recipe.name, recipe.steps) == (name, 12)
    monkeypatch.chdir(tmp_path)
    assert defaults.default_recipe() == ROOT / "launch" / "recipes" / f"{name}.yaml"


def test_a_recipe_of_a_file_or_with_a_batch_is_taken_as_it_is(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("batch: {rows: 3}\n")
    for config, overrides in ((str(file), []), (None, ["batch.rows=3"]), (None, ["batch.tokens=3"])):
        assert defaults.load_recipe_or_default(config, overrides) == load_recipe(config, overrides)
        assert not defaults.needs_default(config, overrides)


def test_plan_and_doctor_with_nothing(empty):
    """Before the data are prepared; they have the shapes that they will have."""
    done = call_script("launch/plan.py")
    assert f"no --config: taking {ROOT}/launch/recipes/tiny-cpu.yaml" in done.stdout and "it fits." in done.stdout
    assert "988,432" in done.stdout and "rows of 1,024 tokens" in done.stdout
    done = call_script("launch/doctor.py")
    assert (
        "data/stdlib-modules is not prepared yet: the run prepares it first" in done.stdout
        and "problem" not in done.stdout
    )


def test_rank_zero_prepares_once_and_the_others_wait(empty, monkeypatch):
    recipe = load_recipe(ROOT / "launch/recipes/tiny-cpu.yaml")
    manifest = empty / "data" / "stdlib-modules" / MANIFEST_NAME
    commands = []

    def prepare(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
        commands.append(command)
        assert "RANK" not in env and "PATH" in env
        manifest.parent.mkdir(parents=True)
        manifest.touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(subprocess, "run", prepare)
    monkeypatch.setattr(defaults, "SECONDS_BETWEEN_LOOKS", 0.01)
    with pytest.raises(
        UserError, match=r"data/stdlib-modules, which rank 0 prepares, has not appeared .* `python -m data_prep"
    ):
        defaults.prepare_default_data(recipe.model_copy(update={"timeout_minutes": 0.001}), RANK_1)
    assert not commands
    Timer(0.3, defaults.prepare_default_data, (recipe, RANK_0)).start()
    defaults.prepare_default_data(recipe, RANK_1)
    defaults.prepare_default_data(recipe, RANK_0)
    assert len(commands) == 1 and manifest.exists()
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": "data/books"})})
    defaults.prepare_default_data(other, replace(RANK_0, rank=0))
    assert len(commands) == 1  # data of the user's are prepared by the user


def test_a_failed_preparation_is_a_sentence(empty, monkeypatch):
    monkeypatch.setattr(defaults.DefaultData, "prepare", ["-c", "import sys; sys.exit(3)"])
    with pytest.raises(UserError, match="preparing data/stdlib-modules ended with exit code 3"):
        defaults.prepare_default_data(load_recipe(ROOT / "launch/recipes/tiny-cpu.yaml"), RANK_0)


def test_two_ranks_train_the_default_recipe_from_nothing(empty):
    """With less text than the default's, which takes half a minute to prepare, and one step."""
    script = empty / "pretrain.py"
    script.write_text(
        "import runpy\n"
        "from infini_ds.config import default_recipe as defaults\n"
        "small = '--source recall:passkey,documents=40 --validation-fraction 0.2 --sequence-length 256'.split()\n"
        "defaults.DefaultData.prepare = ['-m', 'data_prep', *small, '--out', 'data/stdlib-modules']\n"
        f"runpy.run_path({str(ROOT / 'launch' / 'pretrain.py')!r}, run_name='__main__')\n"
    )
    shape = ["model.config.hidden_size=32", "steps=1", "validation.rows=1", "batch.micro_rows=1"]
    ranks = start_ranks(2, *shape, script=str(script), cwd=empty)
    try:
        first, second = (rank.communicate(timeout=120)[0] for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], first + second
    assert "tiny-cpu.yaml" in first and "data/stdlib-modules is not prepared yet: preparing it" in first
    assert "step 1: checkpoint in runs/tiny-cpu/checkpoints/step-000001" in first
    assert (empty / "data" / "stdlib-modules" / MANIFEST_NAME).exists() and "preparing" not in second
