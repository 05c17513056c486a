"""The benchmark, on models of a few weights; docs/performance.md has the measurements that matter."""

import json

import pytest
from harness import call_script, run_script

from infini_ds.benchmarks.contenders import ModelShape
from infini_ds.benchmarks.measure import BenchmarkPlan, run_benchmark
from infini_ds.benchmarks.results import Measurement, OutOfMemory, TrainingSpeed, summarize

SMALL = [
    *("--width", "8", "--layers", "1", "--heads", "2", "--vocabulary", "20", "--segment-length", "16", "--steps", "1"),
]


def test_training_is_measured_side_by_side(tmp_path):
    """Also a contender that needs more memory than the machine has: full attention over 100,000 tokens."""
    options = ["--contenders", "infini:512", "gpt-neo", "--lengths", "64", "100000", "--rounds", "1", "--out", tmp_path]
    done = run_script("launch/benchmark.py", *SMALL, *options)
    lines = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    short, other, long, failed = lines
    assert [line["tokens"] for line in lines] == [64, 64, 100_000, 100_000]
    assert short["tokens_per_s"] > 0 and 0 < short["mfu"] < 1 and other["tokens_per_s"] > 0
    assert short["segments_per_block"] == 512 and "mfu" not in other
    assert long["peak_memory"] > 100_000 * 8 and failed["failed"] == "out of memory"
    assert "out of memory" in done.stdout and "ratio" in done.stdout
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_generation_is_measured_side_by_side(tmp_path):
    options = ["--generation", "--prompts", "2", "--lengths", "100", "--rounds", "1", "--out", tmp_path]
    table = call_script("launch/benchmark.py", *SMALL, *options).stdout
    lines = [json.loads(line) for line in (tmp_path / "generation.jsonl").read_text().splitlines()]
    assert [line["contender"] for line in lines] == ["infini:all", "gpt-neo"]
    assert all(line["seconds_per_token"] > 0 and line["reading_tokens_per_s"] > 0 for line in lines)
    assert all(line["cpu_seconds_per_token"] > 0 for line in lines)
    # Each row's memory and open segment of one layer in fp32, and the documents of 16 slots and of the memory.
    assert lines[0]["cache_bytes"] == 2 * (4 * (2 * (4 * 4 + 4) + 2 * 2 * 16 * 4) + 8 * (16 + 1))
    # Keys and values of all tokens but the last, which is not read.
    assert lines[1]["cache_bytes"] == 2 * 4 * 2 * 8 * (100 + 127)
    assert "2 prompts" in table and "gpt-neo" in table and "ms/token" in table


def test_a_profile_shows_where_the_time_goes(tmp_path):
    options = ["--contenders", "infini:2", "--lengths", "64", "--rounds", "1", "--profile", "--out", tmp_path]
    table = call_script("launch/benchmark.py", *SMALL, *options).stdout
    line = json.loads((tmp_path / "profile.jsonl").read_text())
    calls = {operator["name"]: operator["calls"] for operator in line["operators"]}
    assert calls["aten::addmm"] == 3 * 2 * 2  # out_proj and both of the MLP, in two blocks, each computed twice
    assert "infini:2, 64 tokens" in table and "aten::mm" in table and "others" in table


def test_ratios_are_of_the_same_round():
    """The machine was half as fast in the second round, and four times as fast in the third."""
    measurements = [
        Measurement(number, 64, contender, TrainingSpeed(rate * speed, 1, 1.0))
        for number, speed in enumerate((1.0, 0.5, 4.0))
        for contender, rate in (("infini:1", 300.0), ("gpt-neo", 100.0))
    ]
    first, other = summarize(measurements, "tokens_per_s")
    assert first.result.tokens_per_s == 300 and other.result.tokens_per_s == 100
    assert other.ratio == pytest.approx(1 / 3) and other.result.mfu is None


def test_a_case_without_memory_has_no_ratio():
    """Neither the one that failed, nor those that are compared with it."""
    results = [("infini:1", OutOfMemory()), ("gpt-neo", TrainingSpeed(1.0, 1, 1.0))]
    failed, other = summarize([Measurement(0, 64, name, result) for name, result in results], "tokens_per_s")
    assert isinstance(failed.result, OutOfMemory) and failed.ratio is None and other.ratio is None


def test_a_failing_worker_keeps_its_stack():
    """A mistake of the user is a sentence; any other error has the worker's output."""
    plan = BenchmarkPlan("training", ("infini:1",), (64,), ModelShape(9, 1, 2, 20, 16), steps=1, rounds=1)
    with pytest.raises(RuntimeError, match=r"infini:1 at 64 tokens failed with exit code 1:\n(.*\n)*Traceback"):
        list(run_benchmark(plan))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--contenders", "infinite:1"], ["--contenders infinite:1", "infini:auto", "gpt-neo"]),
        (["--contenders", "infini:0"], ["--contenders infini:0"]),
        (["--lengths", "0"], ["--lengths", "at least 1"]),
        (["--heads", "3"], ["--width 256", "--heads 3"]),
        (
            ["--generation", "--contenders", "infini-transformer-pytorch"],
            ["infini-transformer-pytorch", "gpt-neo only"],
        ),
        (["--generation", "--prompts", "0"], ["--prompts 0", "at least 1"]),
        (["--preset", "33k"], ["33k", "33m"]),
        (["--rule", "quadratic"], ["quadratic", "linear", "delta"]),
        (["--out", "/dev/null"], ["--out /dev/null", "cannot be written", "another folder"]),
    ],
)
def test_mistakes_get_a_sentence(options, words, tmp_path):
    done = call_script("launch/benchmark.py", "--out", tmp_path, *options, code=2)
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
