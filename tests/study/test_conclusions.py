"""Which memories a study calls of no use."""

import pytest

from infini_ds.study.conclusions import conclude
from infini_ds.study.results import Measurement, RunInfo, RunResult, group_by_cell


def results(*gains: float) -> list[RunResult]:
    """Runs of one cell, a seed each, whose loss rises by so much with the memory off."""
    found = []
    for seed, gain in enumerate(gains):
        run = RunInfo(f"arm-seed{seed}", "arm", "arm", "", seed, 10, 128, 1024, "linear", "decayed")
        losses = (("on", 5.0), ("off", 5.0 + gain))
        rows = tuple(Measurement(10, 1000, "validation", setting, "loss", loss, "") for setting, loss in losses)
        found.append(RunResult(run, rows, {}))
    return found


@pytest.mark.parametrize(
    ("gains", "of_no_use"),
    [((0.5, 0.25), False), ((0.5, -0.25), True), ((0.5, 0.0), True), ((0.0, 0.0), False)],
    ids=["of use", "harmful in one seed", "nothing in one seed", "gates that stay closed on purpose"],
)
def test_a_memory_of_no_use_is_named(gains, of_no_use):
    sentences = conclude(group_by_cell(results(*gains)), 1024)
    assert any("nothing shows that this memory is of use" in sentence for sentence in sentences) == of_no_use
