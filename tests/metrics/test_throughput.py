"""The throughput meter: what lies between two steps does not count, and the slowest rank's wait does."""

import pytest

from infini_ds.metrics import throughput
from infini_ds.metrics.throughput import ThroughputMeter


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: `clock.now`."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(throughput.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_time_between_steps_does_not_count(clock):
    meter = ThroughputMeter(flops_per_token=6.0, peak_flops=600.0, world_size=2)
    for _ in range(2):
        meter.start()
        clock.now += 2  # a step
        meter.count(100)
        meter.stop()
        clock.now += 50  # a validation
    meter.start()
    clock.now += 1
    meter.count(100)
    figures = meter.read([0.5, 1.0])
    assert figures == {"speed/tokens_per_s": 60.0, "speed/mfu": 0.6, "data/wait_share": 0.2}
    clock.now += 1  # what comes after the reading counts for the next one
    meter.stop()
    clock.now += 50
    meter.start()
    clock.now += 1
    meter.count(100)
    assert meter.read([0.9, 1.2]) == {
        "speed/tokens_per_s": 50.0,
        "speed/mfu": 0.5,
        "data/wait_share": pytest.approx(0.4 / 2),
    }


def test_a_long_wait_for_data_is_warned_of_once_and_not_at_first(clock):
    meter = ThroughputMeter(1.0, 1.0, world_size=1)
    warned = []
    for _ in range(4):
        clock.now += 1
        meter.read([0.0])
        warned.append(meter.warns_of_data_wait(0.5))
    assert warned == [False, True, False, False]
    assert not ThroughputMeter(1.0, 1.0, 1).warns_of_data_wait(0.05)
