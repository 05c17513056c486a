"""Checkpoints: damage is found and passed over, the right ones are kept, any number of ranks goes on from them."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from harness import TINY, call_script, pretrain, run_ranks
from hypothesis import given
from hypothesis import strategies as st

from infini_ds.checkpoint import manager as checkpoints
from infini_ds.checkpoint.manager import remove, steps_to_keep
from infini_ds.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    TrainState,
    complete_checkpoints,
    find_damage,
    read_manifest,
)
from infini_ds.config.recipe import CheckpointSection, load_recipe
from infini_ds.config.training_data import find_sources
from infini_ds.conversion.locate import load_model, locate
from infini_ds.data.streams import TrainingStream
from infini_ds.distributed.environment import detect_environment
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.training.setup import set_up
from infini_ds.training.trainer import train
from infini_ds.utils.errors import UserError

VALIDATION = "validation.every=10"  # as the runs of the fixture have it


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def copy_of(run: Path, folder: Path) -> Path:
    """The run with its metrics up to its checkpoints of steps 16 and 20."""
    shutil.copytree(run, folder / run.name)
    assert [checkpoint.name for checkpoint in complete_checkpoints(run)] == ["step-000016", "step-000020"]
    return folder / run.name


def test_damage_of_any_kind_is_found(runs, tmp_path):
    """A flipped bit in each file of a checkpoint of two ranks, a truncated file, a missing one."""
    checkpoint = copy_of(runs / "two", tmp_path) / "checkpoints" / "step-000020"
    assert find_damage(checkpoint) == []
    files = sorted(file for file in checkpoint.iterdir() if file.name != MANIFEST)
    names = {"config.json", "mp_rank_00_model_states.pt", "random-states-0.pt", "random-states-1.pt"}
    names |= {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)}
    assert {file.name for file in files} == names == set(read_manifest(checkpoint).files)
    draw = random.Random(0)
    for file in files:
        whole = file.read_bytes()
        bit = draw.randrange(8 * len(whole))
        flip(file, bit)
        assert find_damage(checkpoint) == [f"{file} has another content than was written (sha256)"]
        flip(file, bit)
        file.write_bytes(whole[: len(whole) // 2])
        assert (
            find_damage(checkpoint)
            == [f"{file} has {len(whole) // 2:,} bytes and was written with {len(whole):,}"]
            == find_damage(checkpoint, read=False)
        )
        file.unlink()
        assert find_damage(checkpoint) == [f"{file} is missing"]
        file.write_bytes(whole)
    assert find_damage(checkpoint) == []


def test_damage_of_the_mark_is_found(runs, tmp_path):
    checkpoint = copy_of(runs / "two", tmp_path) / "checkpoints" / "step-000020"
    draw = random.Random(0)
    for byte in range(0, len((checkpoint / MANIFEST).read_bytes()), 3):
        bit = 8 * byte + draw.randrange(8)
        flip(checkpoint / MANIFEST, bit)
        assert f"{checkpoint / MANIFEST} is not as it was written" in find_damage(checkpoint)[0], byte
        flip(checkpoint / MANIFEST, bit)
    (checkpoint / MANIFEST).write_text(json.dumps({"step": 20, "tokens": 1, "world_size": 2, "torch": "2.13"}))
    assert len(find_damage(checkpoint)) == 1  # a mark without sums


def test_a_damaged_checkpoint_falls_back_to_the_one_before(runs, shards, tmp_path, capsys):
    run = copy_of(runs / "one", tmp_path)
    states = run / "checkpoints" / "step-000020" / "mp_rank_00_model_states.pt"
    flip(states, 80_000)
    with pytest.raises(UserError, match=rf"step-000020 is damaged: {states} has another content .* list {run}"):
        load_model(locate(run))
    pretrain(shards, tmp_path, "one", VALIDATION)
    output = capsys.readouterr().out
    assert f"step-000020 is passed over, it is damaged: {states} has another content" in output
    assert "going on from" in output and "step-000016" in output
    assert losses(run) == losses(runs / "one")
    for checkpoint in complete_checkpoints(run):
        assert find_damage(checkpoint) == []  # that of step 20 has been written anew
        (checkpoint / "random-states-0.pt").unlink()
    with pytest.raises(UserError, match=r"all checkpoints of .* are damaged, .*random-states-0.pt is missing"):
        pretrain(shards, tmp_path, "one", VALIDATION)


def test_other_numbers_of_ranks_go_on_with_the_same_losses(runs, shards, tmp_path):
    """2 -> 1 -> 4 -> 1 ranks. Of four, two hold nothing of the gates, which are four numbers, but padding."""
    run, expected = copy_of(runs / "two", tmp_path), losses(runs / "two")
    flip(run / "checkpoints" / "step-000020" / "zero_pp_rank_1_mp_rank_00_optim_states.pt", 80_000)
    pretrain(shards, tmp_path, "two", VALIDATION, "checkpoint.every=1", "checkpoint.keep_last=4")
    assert losses(run)[16:] == pytest.approx(expected[16:], abs=1e-5)
    assert [read_manifest(checkpoint).world_size for checkpoint in complete_checkpoints(run)] == [1, 1, 1, 1]

    for checkpoint in complete_checkpoints(run)[1:]:  # back to step 17
        shutil.rmtree(checkpoint)
    where = [f"data.path={shards}", f"output={tmp_path}", "name=two"]
    output = run_ranks(4, *where, *TINY, VALIDATION, "checkpoint.every=1", "checkpoint.keep_last=9")
    assert "step-000017: " in output
    assert losses(run)[16:] == pytest.approx(expected[16:], abs=1e-5)
    assert [read_manifest(checkpoint).world_size for checkpoint in complete_checkpoints(run)] == [1, 4, 4, 4]

    shutil.rmtree(run / "checkpoints" / "step-000020")
    pretrain(shards, tmp_path, "two", VALIDATION)
    assert losses(run) == pytest.approx(expected, abs=1e-5)
    last, whole = (read_metrics(folder)[-2] for folder in (run, runs / "two"))
    for figure in ("train/tokens", "train/learning_rate", "train/gate_learning_rate", "train/skipped_steps"):
        assert last[figure] == whole[figure], figure
    a, b = (load_model(locate(folder)).state_dict() for folder in (run, runs / "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
    assert not list(run.rglob("*universal*"))  # nothing of the conversions is left


def test_a_conversion_without_room_says_so(runs, shards, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", full], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        shutil.copytree(runs / "two", full / "two", ignore=shutil.ignore_patterns("step-000020", "events*"))
        with pytest.raises(UserError, match=r"step-000016 could not be converted for 1 ranks, with .* MiB free \(.*:"):
            pretrain(shards, full, "two", VALIDATION)
        assert [folder.name for folder in (full / "two" / "checkpoints").glob("step-*")] == ["step-000016"]
    finally:
        subprocess.run(["umount", "--lazy", full], check=True)


def test_a_running_process_can_go_back(runs, shards, tmp_path):
    """Load an earlier checkpoint into an engine that has trained: what follows is the same to the last bit."""
    where = [f"data.path={shards}", f"output={tmp_path}", "name=back"]
    recipe = load_recipe(None, [*where, *TINY, "checkpoint.keep_last=9"])
    training = set_up(recipe, detect_environment())
    train(training)
    assert losses(recipe.folder) == losses(runs / "one")
    state, data_state = checkpoints.load(training.engine, recipe.folder / "checkpoints" / "step-000008")
    assert (state.step, state.tokens) == (8, 8 * 4 * 256)
    training.state = state
    training.stream = TrainingStream(find_sources(str(shards), [], ""), training.shape.rank_rows, recipe.data.seed, 0)
    training.stream.load_state_dict(data_state)
    train(training)
    assert losses(recipe.folder) == losses(runs / "one")
    a, b = (load_model(locate(folder)).state_dict() for folder in (recipe.folder, runs / "one"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_last_the_round_and_the_best_are_kept(shards, tmp_path):
    """A learning rate that rises too high makes an early one the best."""
    keep = ["checkpoint.every=2", "checkpoint.keep_last=2", "checkpoint.keep_every=10", "checkpoint.keep_best=true"]
    rising = ["schedule.warmup_steps=24", "optimizer.learning_rate=1", "steps=24"]
    pretrain(shards, tmp_path, "kept", *keep, *rising, "validation.every=2", "validation.rows=4")
    validated = {line["step"]: line["validation/loss"] for line in read_metrics(tmp_path / "kept")[1:]
                 if "validation/loss" in line}  # fmt: skip
    best = min(validated, key=validated.get)
    assert best not in (10, 20, 22, 24)
    good = complete_checkpoints(tmp_path / "kept")
    assert [read_manifest(checkpoint).state.step for checkpoint in good] == sorted([best, 10, 20, 22, 24])
    assert {read_manifest(checkpoint).validation_loss for checkpoint in good} <= set(validated.values())
    assert len(list((tmp_path / "kept" / "checkpoints").glob("step-*"))) == 5


@given(
    marks=st.dictionaries(st.integers(1, 50), st.none() | st.floats(0, 9), min_size=1),
    keep_last=st.integers(1, 4),
    keep_every=st.integers(0, 6),
)
def test_what_is_kept(marks, keep_last, keep_every):
    steps = sorted(marks)
    written = [CheckpointManifest(TrainState(step, 0, step, marks[step]), 1, "", "", {}) for step in steps]
    kept = steps_to_keep(written, CheckpointSection(keep_last=keep_last, keep_every=keep_every, keep_best=True))
    assert set(steps[-keep_last:]) <= kept <= set(steps)
    judged = [loss for loss in marks.values() if loss is not None]
    assert not judged or min(judged) in [marks[step] for step in kept]
    others = kept - set(steps[-keep_last:]) - {step for step in steps if keep_every and step % keep_every == 0}
    assert len(others) <= 1


def test_a_removal_that_is_killed_leaves_nothing_that_looks_whole(tmp_path):
    folder = tmp_path / "checkpoints" / "step-000008"
    folder.mkdir(parents=True)
    for number in range(3000):
        (folder / f"{number}.pt").touch()
    (folder / MANIFEST).touch()
    removal = multiprocessing.get_context("fork").Process(target=remove, args=(folder,))
    removal.start()
    while len(os.listdir(folder)) == 3001:
        time.sleep(0)
    os.kill(removal.pid, signal.SIGKILL)
    removal.join()
    assert folder.exists() and not complete_checkpoints(tmp_path)


def test_the_script_lists_inspects_and_verifies(runs, tmp_path):
    run = copy_of(runs / "two", tmp_path)
    listed = call_script("launch/checkpoint.py", "list", run).stdout.splitlines()
    assert listed[1].split()[:2] == ["step-000016", f"{16 * 4 * 256:,}"] and listed[1].split()[-1] == "finished"
    loss = [line["validation/loss"] for line in read_metrics(run) if "validation/loss" in line][-1]
    assert f"{loss:.4f}" in listed[2]
    assert "whole" in call_script("launch/checkpoint.py", "verify", run).stdout

    last = run / "checkpoints" / "step-000020"
    inspected = call_script("launch/checkpoint.py", "inspect", last).stdout
    assert "by 2 ranks" in inspected and read_manifest(last).files["config.json"].sha256 in inspected

    (last.parent / "step-000024").mkdir()
    flip(last / "config.json", 9)
    verified = call_script("launch/checkpoint.py", "verify", run, code=1).stdout.splitlines()
    assert verified[0].endswith("step-000016: whole")
    assert verified[1] == f"{last}: {last / 'config.json'} has another content than was written (sha256)"
    assert "step-000024: unfinished" in verified[2]
    call_script("launch/checkpoint.py", "verify", last, code=1)
    call_script("launch/checkpoint.py", "verify", last.with_name("step-000016"))
    for path, words in (
        (tmp_path, "neither a checkpoint"),
        (tmp_path / "nowhere", "there is no such folder"),
        (run, f"is a run: give one of its checkpoints, such as {last.with_name('step-000020')}"),
        (
            last.with_name("step-000024"),
            f"is not finished (no checkpoint.json), and no run goes on from it: give another one of {run}",
        ),
    ):
        assert words in call_script("launch/checkpoint.py", "inspect", path, code=2).stderr
    for mark in run.rglob("checkpoint.json"):
        mark.unlink()
    assert call_script("launch/checkpoint.py", "list", run).stdout.count("unfinished") == 3
