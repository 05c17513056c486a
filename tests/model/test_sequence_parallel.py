"""Rows divided over 2 and 4 gloo processes: losses, memory and gradients are those of one process.

What the processes do: `tests/support/divided_rows.py`.
"""

import json
from dataclasses import asdict, astuple
from itertools import product

import pytest
from divided_rows import CHECKS, LENGTHS, Case
from harness import ROOT, start_ranks

RULES = ("linear", "softmax", "delta", "delta_paper", "gated_delta", "gated_decay")
ROWS = ("plain", "packed", "padded", "both")
SCHEDULES = list(product((1, 3, None), ("no", "blocks", "all")))
# Every rule with every length and kind of row; each of these with one of the nine schedules in turn.
CASES = [
    Case(rule, length, rows, *SCHEDULES[number % 9])
    for number, (rule, length, rows) in enumerate(product(RULES, LENGTHS, ROWS))
]
CASES += [Case(rule, "long", "both", segments, "blocks", "float32") for rule in RULES for segments in (1, None)]
CASES += [Case("delta", "long", "both", 1, recompute, truncate=2) for recompute in ("no", "blocks")]
CASES += [Case(rule, "long", "both", 1, fields=(("position_embedding", "rotary"),)) for rule in RULES]
CASES += [Case("linear", "long", rows, 1, fields=(("short_conv", 3), ("embed_conv", 6))) for rows in ROWS]
CASES += [Case("linear", "long", "both", *SCHEDULES[number], fields=(("embed_conv", 3),)) for number in (1, 5, 6)]


@pytest.fixture(scope="module", params=[2, 4], ids=lambda ranks: f"{ranks} ranks")
def found(request, tmp_path_factory) -> list[dict]:
    """What each rank found."""
    out, ranks = tmp_path_factory.mktemp("ranks"), request.param
    cases = out / "cases.json"
    cases.write_text(json.dumps([asdict(case) for case in CASES]))
    script, path = str(ROOT / "tests" / "support" / "divided_rows.py"), f"{ROOT}:{ROOT / 'tests' / 'support'}"
    processes = start_ranks(ranks, str(out), str(cases), script=script, PYTHONPATH=path)
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(map(str, astuple(case))) for case in CASES])
def test_divided_rows_give_what_complete_rows_give(found, number):
    case = CASES[number]
    # In fp32 the order of sums differs; a gradient of delta_paper is amplified from segment to segment.
    tolerance = {"float64": 1e-10, "float32": 2e-3 if case.rule == "delta_paper" else 2e-5}[case.dtype]
    for of_rank in found:
        assert max(of_rank["cases"][number].values()) < tolerance, of_rank["cases"][number]


@pytest.mark.parametrize("name", CHECKS)
def test_divided_rows(found, name):
    errors = [of_rank["checks"][name] for of_rank in found]
    assert not any(errors), "\n".join(errors)
