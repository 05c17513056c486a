"""The doctor: each fault is produced for real, found, and repaired where that is safe."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import ROOT, TINY, call_script, environment, free_port

from infini_ds.config.batch_shape import BatchShape
from infini_ds.config.recipe import load_recipe, load_run_recipe
from infini_ds.config.training_data import find_sources
from infini_ds.distributed.environment import DistEnv
from infini_ds.planning import doctor
from infini_ds.planning.doctor import check_node, check_shm_space, check_versions


@pytest.fixture
def data(shards, tmp_path) -> Path:
    """A copy, expanded, to damage."""
    copy = shutil.copytree(shards, tmp_path / "data")
    source = find_sources(str(copy), [], "")[0]
    import zstandard

    for split in ("train", "validation"):
        for packed in (source.folder / split).glob("*.zstd"):
            packed.with_suffix("").write_bytes(zstandard.decompress(packed.read_bytes()))
    return copy


def findings(data, tmp_path, *overrides: str, fix: bool = False) -> list[tuple[str, str, str]]:
    recipe = load_recipe(None, [f"data.path={data}", f"output={tmp_path / 'runs'}", *TINY, *overrides])
    return [(one.check, one.state, one.sentence) for one in check_node(recipe, DistEnv(0, 0, 1, 1), fix)]


def those(found, *states: str) -> list[tuple[str, str]]:
    """Return the findings in these states, without shared memory, where other runs may leave something at any time."""
    return [(check, sentence) for check, state, sentence in found if state in states and check != "shared memory"]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_sound_node_has_no_problem_and_the_script_prints_that(data, tmp_path):
    assert those(findings(data, tmp_path), "warning", "problem") == []
    done = call_script("launch/doctor.py", f"data.path={data}", f"output={tmp_path}", *TINY)
    lines = done.stdout.splitlines()
    assert all(line.split()[0] in ("ok", "warning") for line in lines), lines
    assert any(line.startswith("ok      shards        2 shards in ") for line in lines), lines
    assert not any("\x1b[" in line for line in lines)


def test_ranks_that_share_rows_are_those_of_the_run(data, tmp_path):
    """Started alone, the doctor checks the recipe for the ranks that it is told."""
    arguments = [f"data.path={data}", f"output={tmp_path}", *TINY, "parallel.sequence=2"]
    shown = call_script("launch/doctor.py", *arguments, code=1).stdout
    assert (
        "problem recipe        parallel.sequence=2 does not divide the number of ranks, 1: give one of 1, or" in shown
    )
    assert "problem" not in call_script("launch/doctor.py", *arguments, "--ranks", "2").stdout


def test_damaged_shards_are_found_and_removed_where_they_can_be_restored(data, tmp_path):
    expanded = data / "train" / "shard.00000.mds"
    flip(expanded)
    assert those(findings(data, tmp_path), "warning") == [
        ("shards", f"{expanded} is damaged: a run restores it from {expanded}.zstd, and --fix removes it")
    ]
    assert not those(findings(data, tmp_path, fix=True), "warning", "problem") and not expanded.exists()
    assert those(findings(data, tmp_path), "warning", "problem") == []

    packed = data / "validation" / "shard.00000.mds.zstd"
    flip(packed)
    packed.with_suffix("").unlink()
    (only,) = those(findings(data, tmp_path, fix=True), "warning", "problem")
    assert only[1].startswith(f"{packed} is damaged: copy it again") and packed.exists()
    packed.unlink()
    done = call_script("launch/doctor.py", f"data.path={data}", f"output={tmp_path}", *TINY, code=1)
    assert "shard.00000.mds is missing: copy it again" in done.stdout


def test_cache_limit_leftovers_and_missing_data(data, tmp_path):
    ((check, sentence),) = those(findings(data, tmp_path, "data.cache_limit=1GB"), "problem")
    assert check == "recipe" and "the only copy: name it file://" in sentence
    remote = f"file://{data}"
    assert not those(findings(remote, tmp_path, f"data.cache={tmp_path / 'cache'}", "data.cache_limit=1GB"), "problem")

    left = data / "train" / "shard.00000.mds.unfinished-host-1"
    fresh = data / "train" / "shard.00000.mds.unfinished-host-2"
    for file in (left, fresh):
        file.write_bytes(b"half")
    os.utime(left, (time.time() - 7200,) * 2)
    ((check, sentence),) = those(findings(data, tmp_path), "warning")
    assert check == "leftovers" and sentence.startswith("1 unfinished files") and left.name in sentence
    findings(data, tmp_path, fix=True)
    assert not left.exists() and fresh.exists()  # the other may have a writer

    ((check, sentence),) = those(findings("/nowhere", tmp_path), "problem")
    assert check == "recipe" and "/nowhere" in sentence


def test_what_training_refuses_to_resume_is_a_problem(runs, shards):
    """With the checks of training itself, on a run that it trained."""
    recipe = load_run_recipe(runs / "one")

    def found(**changes) -> list[tuple[str, str]]:
        changed = recipe.model_copy(update={"output": str(runs), "name": "one"} | changes)
        return [
            (one.state, one.sentence)
            for one in check_node(changed, DistEnv(0, 0, 1, 1), fix=False)
            if one.check == "resume"
        ]

    assert [state for state, _ in found()] == ["ok"]
    ((state, sentence),) = found(seed=recipe.seed + 1)
    assert state == "problem" and sentence.startswith(f"seed={recipe.seed + 1}, but the run in ")
    ((state, sentence),) = found(resume=False)
    assert state == "problem" and sentence.startswith("resume=false, but ")


def test_a_step_that_does_not_fit_is_a_warning_and_a_problem_for_automatic_blocks(data, tmp_path):
    rows = ["batch.rows=40000000", "batch.micro_rows=40000000"]
    ((check, sentence),) = those(findings(data, tmp_path, *rows), "warning")
    assert check == "memory" and "GiB that a rank may take" in sentence and "batch.micro_rows=40000000" in sentence
    rows += ["model.segments_per_block=auto", "model.gradient_checkpointing=true"]
    ((check, sentence),) = those(findings(data, tmp_path, *rows), "problem")
    assert check == "memory" and "in blocks of 1 segments" in sentence


def test_space(data, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        ((check, sentence),) = those(
            findings(data, tmp_path, f"output={small}", "model.config.num_layers=8"), "problem"
        )
        assert check == "run" and f"{small} has 0 MiB free" in sentence and "output=" in sentence
        sources = find_sources(str(data), [], "")
        found = check_shm_space(sources, BatchShape(64, 1, 1), workers=4, ranks=1, folder=small)
        assert found.state == "problem" and "--shm-size" in found.sentence
        found = check_shm_space(sources, BatchShape(4, 1, 1), workers=0, ranks=1, folder=small)
        assert found.state == "ok"
        packed = shutil.copytree(data, small / "data", ignore=shutil.ignore_patterns("*.mds"))
        (small / "filler").write_bytes(b"\0" * (shutil.disk_usage(small).free - 8192))
        found = those(findings(packed, tmp_path), "problem")
        assert [check for check, _ in found] == ["data"] and "read it through data.cache" in found[0][1]
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def test_shared_memory_of_the_dead_is_removed(data):
    """As a run leaves it whose processes were all killed, with a prefix so high that no run takes it."""
    files = [doctor.SHM / "987654_locals", doctor.SHM / "987654_barrier", Path("/tmp/987654_cache_filelock")]
    for file in files:
        file.write_bytes(b"\0\0\0\0")
    try:
        (found,) = (one for one in doctor.check_shared_memory(False) if one.state == "warning")
        assert "dead runs of" in found.sentence and "--fix removes them" in found.sentence
        list(doctor.check_shared_memory(True))
        assert not any(file.exists() for file in files)
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def test_bad_versions_are_named():
    installed = {"deepspeed": "0.18.9", "mosaicml-streaming": "0.13.0", "torch": "2.5.1+cu121", "transformers": "5.1.0"}
    sentences = [finding.sentence for finding in check_versions(installed.get)]
    assert sentences[0].startswith("deepspeed 0.18.9 (==0.18.9): it modifies a view in place")
    assert sentences[1].startswith("deepspeed 0.18.9 (<0.19.4): ZeRO-2 in bf16")
    assert sentences[2].startswith("torch 2.5.1+cu121") and len(sentences) == 3


def test_ranks_that_find_each_other_and_ranks_that_are_missing(tmp_path):
    done = call_script("launch/doctor.py", "--only-ranks", "--ranks", "2")
    assert done.stdout.startswith("ok      ranks         2 ranks on ") and "by gloo" in done.stdout, done.stdout
    places = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "launch/doctor.py", "--only-ranks", "--seconds", "3"]
    alone = [
        subprocess.Popen(
            command,
            env=environment(**places, RANK=rank, LOCAL_RANK=rank, MASTER_PORT=free_port()),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank in ("0", "1")
    ]
    first, second = (process.communicate(timeout=240)[0] for process in alone)
    assert [process.returncode for process in alone] == [1, 1]
    assert "problem ranks         rank 1 of 2 did not reach 127.0.0.1" in first and "Traceback" not in first
    assert "cannot be reached from" in second and "Traceback" not in second
