"""Checkpoints: damaged ones are found and skipped, the right ones are kept, any number of ranks resumes from them."""

import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from harness import TINY, build, call_script, pretrain, run_ranks
from hypothesis import given
from hypothesis import strategies as st

from infini_ds.checkpoint.manager import remove, steps_to_keep
from infini_ds.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    TrainState,
    complete_checkpoints,
    find_damage,
    read_manifest,
    write_manifest,
)
from infini_ds.config.recipe import CheckpointSection
from infini_ds.conversion.locate import load_model, locate
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.utils.errors import UserError

VALIDATION = "validation.every=10"  # as the runs of the fixture have it


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def copy_of(run: Path, folder: Path) -> Path:
    """Copy a run with its checkpoints of steps 16 and 20."""
    shutil.copytree(run, folder / run.name)
    assert [checkpoint.name for checkpoint in complete_checkpoints(run)] == ["step-000016", "step-000020"]
    return folder / run.name


def test_a_checkpoint_holds_no_script_of_deepspeed(runs):
    """Its zero_to_fp32.py fails when it is called as its header says; launch/convert.py reads these checkpoints."""
    for checkpoint in complete_checkpoints(runs / "two"):
        assert not [*checkpoint.glob("*.py"), *checkpoint.parent.glob("*.py")]
        assert not [name for name in read_manifest(checkpoint).files if name.endswith(".py")]


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
        content = file.read_bytes()
        bit = draw.randrange(8 * len(content))
        flip(file, bit)
        assert find_damage(checkpoint) == [f"{file} does not match its checksum (SHA-256)"]
        flip(file, bit)
        file.write_bytes(content[: len(content) // 2])
        assert (
            find_damage(checkpoint)
            == [f"{file} has {len(content) // 2:,} bytes instead of {len(content):,}"]
            == find_damage(checkpoint, read=False)
        )
        file.unlink()
        assert find_damage(checkpoint) == [f"{file} is missing"]
        file.write_bytes(content)
    assert find_damage(checkpoint) == []


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(runs, shards, tmp_path, capsys):
    run = copy_of(runs / "one", tmp_path)
    states = run / "checkpoints" / "step-000020" / "mp_rank_00_model_states.pt"
    flip(states, 80_000)
    with pytest.raises(UserError, match=f"step-000020 is damaged: {states} does not match its checksum"):
        load_model(locate(run))
    pretrain(shards, tmp_path, "one", VALIDATION)
    output = capsys.readouterr().out
    assert f"step-000020: it is damaged: {states} does not match its checksum" in output
    assert f"{run / 'checkpoints' / 'step-000016'}: {16 * 4 * 256:,} tokens seen" in output
    assert losses(run) == losses(runs / "one")
    for checkpoint in complete_checkpoints(run):
        assert find_damage(checkpoint) == []  # that of step 20 has been written again
        (checkpoint / "random-states-0.pt").unlink()
    with pytest.raises(UserError, match=r"all checkpoints of .* are damaged, .*random-states-0.pt is missing"):
        pretrain(shards, tmp_path, "one", VALIDATION)


def test_other_numbers_of_ranks_resume_with_the_same_losses(runs, shards, tmp_path):
    """2 -> 1 -> 4 -> 1 ranks. Of four, two hold only padding of the gates, which are four numbers."""
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
    last, undisturbed = (read_metrics(folder)[-2] for folder in (run, runs / "two"))
    for figure in ("train/tokens", "train/learning_rate", "train/gate_learning_rate", "train/skipped_steps"):
        assert last[figure] == undisturbed[figure], figure
    a, b = (load_model(locate(folder)).state_dict() for folder in (run, runs / "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
    assert not list(run.rglob("*universal*"))  # nothing of the conversions is left


def test_another_arrangement_of_the_same_ranks_resumes_without_conversion(runs, shards, tmp_path):
    """ZeRO shards across all ranks, so each loads its own shard; the random states belong to the other arrangement."""
    run, expected = copy_of(runs / "two", tmp_path), losses(runs / "two")
    shutil.rmtree(run / "checkpoints" / "step-000020")
    checkpoint = run / "checkpoints" / "step-000016"
    write_manifest(checkpoint, replace(read_manifest(checkpoint), sequence=2))
    where = [f"data.path={shards}", f"output={tmp_path}", "name=two"]
    output = run_ranks(2, *where, *TINY, VALIDATION, "batch.micro_rows=1")
    assert "step-000016: " in output
    assert losses(run) == pytest.approx(expected, abs=1e-5)
    assert [read_manifest(checkpoint).sequence for checkpoint in complete_checkpoints(run)] == [2, 1]


def test_a_conversion_on_a_full_disk_is_a_sentence(runs, shards, tmp_path):
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


def test_a_running_process_can_roll_back(runs, shards, tmp_path):
    """Load an earlier checkpoint into an engine that has trained: what follows is the same to the last bit."""
    trainer = build(f"data.path={shards}", f"output={tmp_path}", "name=back", *TINY, "checkpoint.keep_last=9")
    trainer.fit()
    recipe = trainer.recipe
    assert losses(recipe.folder) == losses(runs / "one")
    trainer.restore(recipe.folder / "checkpoints" / "step-000008", rows_to_skip=())
    assert (trainer.state.step, trainer.state.tokens) == (8, 8 * 4 * 256)
    trainer.fit()
    assert losses(recipe.folder) == losses(runs / "one")
    a, b = (load_model(locate(folder)).state_dict() for folder in (recipe.folder, runs / "one"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_last_the_periodic_and_the_best_are_kept(shards, tmp_path):
    """A learning rate that rises too high makes an early one the best."""
    keep = ["checkpoint.every=2", "checkpoint.keep_last=2", "checkpoint.keep_every=10", "checkpoint.keep_best=true"]
    rising = ["schedule.warmup_steps=24", "optimizer.learning_rate=1", "steps=24"]
    pretrain(shards, tmp_path, "kept", *keep, *rising, "validation.every=2", "validation.rows=4")
    validated = {
        line["step"]: line["validation/loss"]
        for line in read_metrics(tmp_path / "kept")[1:]
        if "validation/loss" in line
    }
    best = min(validated, key=validated.get)
    assert best not in (10, 20, 22, 24)
    complete = complete_checkpoints(tmp_path / "kept")
    assert [read_manifest(checkpoint).state.step for checkpoint in complete] == sorted([best, 10, 20, 22, 24])
    assert {read_manifest(checkpoint).validation_loss for checkpoint in complete} <= set(validated.values())
    assert len(list((tmp_path / "kept" / "checkpoints").glob("step-*"))) == 5


@given(
    validated=st.dictionaries(st.integers(1, 50), st.none() | st.floats(0, 9), min_size=1),
    skipping=st.sets(st.integers(1, 50)),
    keep_last=st.integers(1, 4),
    keep_every=st.integers(0, 6),
)
def test_which_steps_are_kept(validated, skipping, keep_last, keep_every):
    steps = sorted(validated)
    states = [TrainState(step, 0, step, validated[step], consecutive_skips=step in skipping) for step in steps]
    manifests = [CheckpointManifest(state, 1, "", "", {}) for state in states]
    kept = steps_to_keep(manifests, CheckpointSection(keep_last=keep_last, keep_every=keep_every, keep_best=True))
    expected = set(steps[-keep_last:]) | {step for step in steps if keep_every and step % keep_every == 0}
    expected |= set([step for step in steps if step not in skipping][-1:])
    assert expected <= kept <= set(steps) and len(kept - expected) <= 1
    losses = [loss for loss in validated.values() if loss is not None]
    assert not losses or min(losses) in [validated[step] for step in kept]


def test_a_removal_that_is_killed_leaves_nothing_that_looks_valid(tmp_path):
    folder = tmp_path / "checkpoints" / "step-000008"
    folder.mkdir(parents=True)
    for number in range(3000):
        (folder / f"{number}.pt").touch()
    (folder / MANIFEST).touch()
    removal = get_context("fork").Process(target=remove, args=(folder,))
    removal.start()
    while len(os.listdir(folder)) == 3001:
        time.sleep(0)
    os.kill(removal.pid, signal.SIGKILL)
    removal.join()
    assert folder.exists() and not complete_checkpoints(tmp_path)


def test_the_script_lists_inspects_and_verifies(runs, tmp_path):
    run = copy_of(runs / "two", tmp_path)
    listed = call_script("launch/checkpoint.py", "list", run).stdout.splitlines()
    assert listed[1].split()[:2] == ["step-000016", f"{16 * 4 * 256:,}"] and listed[1].split()[-1] == "complete"
    loss = [line["validation/loss"] for line in read_metrics(run) if "validation/loss" in line][-1]
    assert f"{loss:.4f}" in listed[2]
    assert "intact" in call_script("launch/checkpoint.py", "verify", run).stdout

    last = run / "checkpoints" / "step-000020"
    inspected = call_script("launch/checkpoint.py", "inspect", last).stdout
    assert "2 ranks, 2 data x 1 sequence" in inspected and read_manifest(last).files["config.json"].sha256 in inspected

    (last.parent / "step-000024").mkdir()
    flip(last / "config.json", 9)
    verified = call_script("launch/checkpoint.py", "verify", run, code=1).stdout.splitlines()
    assert verified[0].endswith("step-000016: intact")
    assert verified[1] == f"{last}: {last / 'config.json'} does not match its checksum (SHA-256)"
    assert "step-000024: incomplete" in verified[2]
    call_script("launch/checkpoint.py", "verify", last, code=1)
    call_script("launch/checkpoint.py", "verify", last.with_name("step-000016"))
    for path, words in (
        (tmp_path, "neither a checkpoint"),
        (tmp_path / "nowhere", "no such folder"),
        (run, f"is a run: give one of its checkpoints, such as {last.with_name('step-000020')}"),
        (
            last.with_name("step-000024"),
            f"is incomplete (no checkpoint.json), and no run resumes from it: give another one of {run}",
        ),
    ):
        assert words in call_script("launch/checkpoint.py", "inspect", path, code=2).stderr
    for manifest in run.rglob("checkpoint.json"):
        manifest.unlink()
    assert call_script("launch/checkpoint.py", "list", run).stdout.count("incomplete") == 3
