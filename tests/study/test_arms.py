"""Arms side by side: which cells are compared, and what stands in their table and figure."""

import pytest

from infini_ds.study.arms import arms_table, best_of_arms, by_distance, by_segment, plot_arms, quarter, swapped_loss
from infini_ds.study.results import Measurement, RunInfo, RunResult, group_by_cell


def result(
    arm: str, seed: int, loss: float, learning_rate: str = "0.02", start_from: str = "", swapped: float = 1.0
) -> RunResult:
    """A run over rows of 8 segments whose loss falls by 0.1 a segment, to `loss` in the last one.

    swapped: how much more it is with the memory of another document.
    """
    cell = f"{arm}-{learning_rate}"
    run = RunInfo(f"{cell}-seed{seed}", cell, arm, start_from, seed, 10, 128, 1024, "linear", "decayed")
    rows = [
        ("validation", "loss", "on", loss),
        ("position", "loss", "on", loss),
        ("position", "loss", "other", loss + swapped),
    ]
    rows += [("position", f"loss/segment_{s}", "on", loss + 0.1 * (8 - s)) for s in range(1, 9)]
    rows += [("natural_recall", f"loss/{name}", "on", loss + i) for i, name in enumerate(("new", "remembered"))]
    rows += [
        ("natural_recall", f"loss/{name}_segments", "on", loss + i) for i, name in enumerate(("0", "1", "2", "3-4"))
    ]
    rows += [("natural_recall", "gain/new", "off", 0.5)]
    return RunResult(
        run, tuple(Measurement(10, 1000, task, setting, metric, value, "") for task, metric, setting, value in rows), {}
    )


RESULTS = [
    result("local", 0, 5.0),
    result("local", 1, 5.2),
    result("local", 0, 4.0, learning_rate="0.04"),  # of a sweep: lower, but of a single seed
    result("memory", 0, 4.6),
    result("memory", 1, 4.8),
    result("memory", 0, 4.9, learning_rate="0.04"),
    result("memory", 1, 4.9, learning_rate="0.04"),
    result("tuned", 0, 3.0, start_from="local-0.02-seed0"),
]


def test_the_best_cell_of_each_arm_is_compared():
    cells = group_by_cell(RESULTS)
    assert [cell.name for cell in best_of_arms(cells, 1024)] == ["local-0.02", "memory-0.02"]
    assert best_of_arms(cells, 512) == []


def test_an_arm_that_never_reads_its_memory_has_no_loss_with_another_one():
    closed, used = result("local", 0, 5.0, swapped=0.0), result("memory", 0, 4.6)
    assert swapped_loss(closed) is None and swapped_loss(used) == 5.6


def test_losses_by_segment_and_by_distance():
    one = RESULTS[0]
    assert by_segment(one) == {str(s): pytest.approx(5.0 + 0.1 * (8 - s)) for s in range(1, 9)}
    assert by_distance(one) == {"new": 5.0, "0": 5.0, "1": 6.0, "2": 7.0, "3-4": 8.0}
    assert quarter(one, 0) == pytest.approx(5.65) and quarter(one, 3) == pytest.approx(5.05)
    bare = RunResult(one.run, one.measurements[:1], {})
    assert by_segment(bare) == by_distance(bare) == {} and quarter(bare, 3) is None


def test_the_table_and_the_figure(tmp_path):
    best = best_of_arms(group_by_cell(RESULTS), 1024)
    table = arms_table(best)
    # mean and deviation over seeds of: the loss, both quarters, new and repeated bigrams, and the swapped memory
    for value in ("5.1000 ± 0.1414", "5.7500", "5.1500", "6.1000", "4.7000 ± 0.1414", "5.7000 ± 0.1414"):
        assert value in table
    file = plot_arms(best, tmp_path / "arms.png")
    assert file is not None and file.stat().st_size > 10_000
    plain = RunResult(best[0].run, best[0].results[0].measurements[:2], {})
    assert plot_arms(group_by_cell([plain, *best[1].results]), tmp_path / "none.png") is None
    first, second = best[0].results
    unfinished = RunResult(second.run, second.measurements[:2], {})  # exported, and not evaluated yet
    assert plot_arms(group_by_cell([first, unfinished, *best[1].results]), tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
