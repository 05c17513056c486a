"""Training with rows divided over ranks: the losses, checkpoints and decisions of ranks that read complete rows."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from faults import Fault
from forks import Fork
from harness import TINY, build, pretrain, run_ranks, run_script, start_ranks

from infini_ds.checkpoint.manifest import complete_checkpoints, read_manifest
from infini_ds.checkpoint.skip_records import read_rollbacks, read_skipped_steps
from infini_ds.metrics.metric_writers import read_metrics

# Of the 8 segments of a row, 3 a rank: with 2 ranks the second block has one segment a rank.
DIVIDED = ["model.segments_per_block=3", "model.gradient_checkpointing=true"]


def series(run: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(run) if name in line]


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def assert_same_training(run: Path, reference: Path) -> None:
    for name in ("train/loss", "train/gradient_norm", "train/tokens", "validation/loss", "validation/loss_memory_off"):
        found, expected = series(run, name), series(reference, name)
        assert len(expected) >= 2 and largest_difference(found, expected) < 1e-4, name


def send_after_steps(processes: list[Fork], run: Path, steps: int, signals: list[int]) -> list[str]:
    """Send each process a signal (0: none) once so many steps are recorded; return what the processes wrote."""
    deadline = time.monotonic() + 180
    try:
        while len(series(run, "train/loss") if run.exists() else []) < steps:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.01)
        for process, number in zip(processes, signals, strict=True):
            os.kill(process.pid, number)
        return [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_times_two_ranks_of_zero2_give_the_losses_of_one(runs, shards, tmp_path):
    arguments = [f"data.path={shards}", f"output={tmp_path}", "name=divided", *TINY, "batch.micro_rows=1"]
    output = run_ranks(4, *arguments, *DIVIDED, "parallel.sequence=2", "validation.every=10")
    assert "4 ranks (2 on each row) x 2 micro-batches x 1 rows" in output and "replication" not in output
    assert_same_training(tmp_path / "divided", runs / "one")
    assert read_manifest(complete_checkpoints(tmp_path / "divided")[-1]).sequence == 2


def test_killed_and_resumed_with_other_ranks_on_a_row_equals_never_stopped(runs, shards, tmp_path, capsys):
    """Two ranks on each row, killed after the checkpoint of step 8; two ranks on rows of their own, stopped by a signal
    to one of them; then this process alone.
    """
    arguments = [f"data.path={shards}", f"output={tmp_path}", "name=resumed", *TINY, "validation.every=10"]
    run = tmp_path / "resumed"
    divided = start_ranks(2, *arguments, *DIVIDED, "parallel.sequence=2")
    send_after_steps(divided, run, 9, [signal.SIGKILL] * 2)
    assert [read_manifest(folder).state.step for folder in complete_checkpoints(run)] == [8]
    apart = start_ranks(2, *arguments, "batch.micro_rows=1")
    outputs = send_after_steps(apart, run, 12, [0, signal.SIGTERM])
    assert "resumed from" in outputs[0] and "stopped by SIGTERM at step" in outputs[0], outputs
    pretrain(shards, tmp_path, "resumed", "validation.every=10")
    assert "resumed from" in capsys.readouterr().out
    assert_same_training(run, runs / "one")


def test_traffic_does_not_depend_on_the_length_of_rows(shards, corpus, tmp_path):
    """With as many blocks, rows of 65,536 tokens take the bytes of rows of 4,096: those of the formula."""
    layers, heads, D, S, ranks, blocks = 2, 2, 16, 64, 2, 4
    memory = heads * (D * D + D) * 4  # of a row: M and z of each head, in fp32
    exchange = 4 * 8  # the loss and other figures of a rank, once a step
    for tokens in (4096, 65_536):
        folder, out = tmp_path / f"shards-{tokens}", tmp_path / f"{tokens}"
        options = ["--tokenizer", shards / "tokenizer", "--sequence-length", tokens, "--validation-fraction", "0.2"]
        run_script("-m", "data_prep", "--source", f"text:{corpus}", "--out", folder, "--workers", "1", *options)
        out.mkdir()
        shape = [f"model.segment_length={S}", "model.config.hidden_size=32", f"model.config.num_layers={layers}"]
        shape += [f"model.config.num_heads={heads}", f"model.segments_per_block={tokens // (S * ranks * blocks)}"]
        choices = ["batch.rows=1", "steps=1", "log_every=1", "validation.every=0", "schedule.warmup_steps=0"]
        division = [f"parallel.sequence={ranks}", "model.gradient_checkpointing=true"]
        arguments = [f"data.path={folder}", f"output={out}", "name=counted", *shape, *choices, *division]
        processes = start_ranks(ranks, str(out), *arguments, script="tests/support/count_collectives.py")
        outputs = [process.communicate(timeout=240)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * ranks, outputs
        for rank in range(ranks):
            counted = json.loads((out / f"collectives-{rank}.json").read_text())
            # Forward, again in the recomputation, and backward; and the loss, there and back.
            assert counted["bytes"] == [3 * layers * blocks * memory + 2 * 4 + exchange]
            assert counted["ours"][0].count("reduce_scatter_single") == layers * blocks + 1


@pytest.fixture(scope="module")
def batches(shards, tmp_path_factory) -> dict:
    """The global batches that the tests' recipe sees, by step."""
    trainer = build(f"data.path={shards}", f"output={tmp_path_factory.mktemp('unused')}", *TINY)
    return dict(zip(range(1, 21), trainer.stream, strict=False))


def test_ranks_of_a_row_skip_and_roll_back_together(shards, batches, tmp_path):
    """A row of step 6 and one of step 7 are NaN in the segments of the first rank alone. Rollback to step 4, and
    without these batches from then on, as one rank does.
    """
    bad = torch.cat([batches[6].input_ids[:1], batches[7].input_ids[3:]])
    torch.save(Fault("embedding", bad), tmp_path / "fault.pt")
    choices = [*TINY, "checkpoint.every=4", "stability.max_consecutive_skips=2", f"data.path={shards}"]
    for ranks, name in ((1, "one"), (2, "divided")):
        arguments = [*choices, f"output={tmp_path}", f"name={name}", f"parallel.sequence={ranks}"]
        processes = start_ranks(ranks, str(tmp_path / "fault.pt"), *arguments, script="tests/support/faults.py")
        outputs = [process.communicate(timeout=240)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * ranks, outputs
    one, divided = tmp_path / "one", tmp_path / "divided"
    assert read_rollbacks(divided) == read_rollbacks(one) != []
    skipped, expected = read_skipped_steps(divided), read_skipped_steps(one)
    assert [(step.step, step.rows) for step in skipped] == [(step.step, step.rows) for step in expected]
    assert [step.ranks for step in skipped] == [[0, 1]] * 2  # both have the loss of the row
    assert series(divided, "train/loss") == pytest.approx(series(one, "train/loss"), abs=1e-4, nan_ok=True)
