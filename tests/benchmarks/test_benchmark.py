"""The benchmark measures for real, in small; its figures themselves are in docs/performance.md."""

import json

import pytest
from harness import call_script, run_script

from infini_ds.benchmarks.contenders import Shape
from infini_ds.benchmarks.measure import Plan, run, summarize

SMALL = [
    "--width",
    "8",
    "--layers",
    "1",
    "--heads",
    "2",
    "--vocabulary",
    "20",
    "--segment-length",
    "16",
    "--steps",
    "1",
]


def test_training_is_measured_side_by_side(tmp_path):
    """Also a contender that the machine's memory is not enough for: 100,000 tokens of full attention."""
    options = ["--contenders", "infini:512", "gpt-neo", "--lengths", "64", "100000", "--rounds", "1", "--out", tmp_path]
    done = run_script("launch/benchmark.py", *SMALL, *options)
    figures = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    short, other, long, failed = figures
    assert [f["tokens"] for f in figures] == [64, 64, 100_000, 100_000]
    assert short["tokens_per_s"] > 0 and 0 < short["mfu"] < 1 and other["tokens_per_s"] > 0
    assert long["peak_memory"] > 100_000 * 8 and failed["failed"] == "out of memory"
    assert "out of memory" in done.stdout and "ratio" in done.stdout
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_generation_is_measured(tmp_path):
    plan = Plan("generation", ("infini:4",), (100,), Shape(8, 1, 2, 20, 16), steps=1, rounds=1)
    (figure,) = run(plan)
    assert figure["seconds_per_token"] > 0 and figure["reading_tokens_per_s"] > 0
    # Memory and open segment of one layer in fp32, and the documents of 16 slots and of the memory.
    assert figure["cache_bytes"] == 4 * (2 * (4 * 4 + 4) + 2 * 2 * 16 * 4) + 8 * (16 + 1)
    assert summarize(plan, [figure], "seconds_per_token")[100, "infini:4"]["ratio"] == 1


def test_a_profile_says_where_the_time_goes(tmp_path):
    options = ["--contenders", "infini:2", "--lengths", "64", "--rounds", "1", "--profile", "--out", tmp_path]
    table = call_script("launch/benchmark.py", *SMALL, *options).stdout
    figure = json.loads((tmp_path / "profile.jsonl").read_text())
    calls = {name: count for name, _, count in figure["operators"]}
    assert calls["aten::addmm"] == 3 * 2 * 2  # out_proj and both of the MLP, in two blocks, each computed twice
    assert "infini:2, 64 tokens" in table and "aten::mm" in table and "others" in table


def test_ratios_are_of_the_same_round():
    """The machine was half as fast in the second round, and four times as fast in the third."""
    plan = Plan("training", ("infini:1", "gpt-neo"), (64,), Shape(8, 1, 2, 20, 16), steps=1, rounds=3)
    figures = []
    for number, speed in enumerate((1.0, 0.5, 4.0)):
        for contender, rate in (("infini:1", 300.0), ("gpt-neo", 100.0)):
            figures.append({"round": number, "tokens": 64, "contender": contender, "tokens_per_s": rate * speed})
    cases = summarize(plan, figures, "tokens_per_s")
    assert cases[64, "infini:1"]["tokens_per_s"] == 300 and cases[64, "gpt-neo"]["tokens_per_s"] == 100
    assert cases[64, "gpt-neo"]["ratio"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--contenders", "infinite:1"], ["--contenders infinite:1", "infini:auto", "gpt-neo"]),
        (["--contenders", "infini:0"], ["--contenders infini:0"]),
        (["--lengths", "0"], ["--lengths", "at least 1"]),
        (["--heads", "3"], ["--width 256", "--heads 3"]),
        (["--generation"], ["--contenders gpt-neo", "--generation"]),
        (["--preset", "33k"], ["33k", "33m"]),
    ],
)
def test_mistakes_get_a_sentence(options, words, tmp_path):
    done = call_script("launch/benchmark.py", *options, "--out", tmp_path, code=2)
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
