"""The benchmark of ranks that share a row, on models of a few weights, and the bytes that it counts."""

import json
import subprocess
import sys

import pytest
from harness import ROOT, call_script, environment, run_script

from infini_ds.benchmarks.contenders import ModelShape
from infini_ds.benchmarks.ranks import RankCase, RankMeasurement, RankSpeed, medians, run_ranks

SMALL = [
    *("--width", "8", "--layers", "2", "--heads", "2", "--vocabulary", "20", "--segment-length", "16", "--steps", "1"),
]
SHAPE = ModelShape(width=8, layers=2, heads=2, vocabulary=20, segment_length=16)


def test_steps_are_measured_and_bytes_are_those_of_the_formula(tmp_path):
    """Two blocks of 2 ranks x 4 segments in a row of 256 tokens. The sum of the loss is 4 bytes, there and back."""
    options = ["--ranks", "1", "2", "--contenders", "infini:4", "--lengths", "256", "--rounds", "1", "--out", tmp_path]
    shown = run_script("launch/benchmark.py", *SMALL, *options).stdout
    alone, shared = (json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text().splitlines())
    assert (alone["ranks"], alone["blocks"], alone["exchanged_bytes"]) == (1, 4, 0)
    assert (shared["ranks"], shared["blocks"]) == (2, 2)
    given = 2 * (4 * 4 + 4) * 4  # two heads of size 4
    assert shared["formula_bytes"] == 2 * 2 * 3 * given  # layers, blocks; forward, again, backward
    assert shared["exchanged_bytes"] == shared["formula_bytes"] + 2 * 4
    assert shared["exchanges"] == 2 * 2 * 3 + 2
    assert min(alone["seconds"], shared["seconds"], shared["cpu_seconds"], shared["gradient_bytes"]) > 0
    assert "sent for the row" in shown and (tmp_path / "ranks.png").stat().st_size > 10_000


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_bytes_do_not_grow_with_the_row(rule):
    """At a fixed number of blocks: all segments in one, and activations kept."""
    shape = ModelShape(**{**vars(SHAPE), "memory_rule": rule})
    short, long = run_ranks([RankCase(4096, 2, None), RankCase(65_536, 2, None)], shape, steps=1, rounds=1)
    assert short.result.exchanged_bytes == long.result.exchanged_bytes == long.result.formula_bytes + 2 * 4
    assert short.result.blocks == long.result.blocks == 1


COUNT = """
import sys, torch, torch.distributed as dist
from infini_ds.benchmarks.collective_bytes import CollectiveBytes

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=3)
for name, call in {
    "all_gather": lambda: dist.all_gather([torch.empty(6) for _ in range(3)], torch.ones(6)),
    "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(torch.empty(18), torch.ones(6)),
    "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.empty(6), torch.ones(18)),
    "all_reduce": lambda: dist.all_reduce(torch.ones(6, dtype=torch.float64)),
    "barrier": dist.barrier,
}.items():
    with CollectiveBytes() as counted:
        call()
    print(name, counted.sent, counted.calls)
try:
    with CollectiveBytes():
        dist.broadcast(torch.ones(6), 0)
except NotImplementedError as error:
    print(error)
dist.barrier()
"""


def test_bytes_of_each_collective(tmp_path):
    """In a ring of three: what is sent twice, what is sent for a part, and what nobody has counted yet."""
    command = [sys.executable, "-W", "ignore", "-c", COUNT]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            env=environment(PYTHONPATH=str(ROOT)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    for process in ranks:
        lines = process.communicate(timeout=240)[0].splitlines()
        assert lines[:5] == [
            "all_gather 48 1",
            "all_gather_into_tensor 48 1",
            "reduce_scatter 48 1",
            "all_reduce 64 1",
            "barrier 0 1",
        ]
        assert lines[5].startswith("c10d::broadcast_ is not counted")


def test_medians_are_of_each_case():
    case, other = RankCase(64, 1, 4), RankCase(64, 2, 4)
    speeds = [RankSpeed(seconds, seconds, 2, 0, 0, 0, 0, 10) for seconds in (1.0, 5.0, 2.0)]
    rounds = [RankMeasurement(x, speed, number) for number, speed in enumerate(speeds) for x in (case, other)]
    assert [(one.case, one.result.seconds) for one in medians(rounds)] == [(case, 2.0), (other, 2.0)]


def test_a_rank_that_fails_is_named():
    shape = ModelShape(**{**vars(SHAPE), "width": 9})
    with pytest.raises(RuntimeError, match=r"rank 0 of RankCase\(.*\) failed with exit code 1:\n.*Traceback"):
        list(run_ranks([RankCase(64, 1, 4)], shape, steps=1, rounds=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ranks", "0"], ["--ranks", "at least 1"]),
        (["--ranks", "2", "--contenders", "gpt-neo"], ["--contenders gpt-neo", "--ranks", "infini:all"]),
        (["--ranks", "2", "--contenders", "infini:auto"], ["--contenders infini:auto", "--ranks"]),
        (["--ranks", "2", "--compile"], ["--compile", "--ranks"]),
    ],
)
def test_mistakes_get_a_sentence(options, words, tmp_path):
    done = call_script("launch/benchmark.py", *options, "--out", tmp_path, code=2)
    assert all(word in done.stderr for word in words), done.stderr
