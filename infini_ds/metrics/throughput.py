"""Throughput of training: tokens per second, model FLOPs utilization, time spent waiting for data."""

import time

import torch

DATA_WAIT_WARNING = 0.1  # share of the time spent waiting for data from which on a run warns


class ThroughputMeter:
    """Measures what happens between `start` and `stop` of each step: validation and checkpoints are left out.

    Args:
        flops_per_token: floating-point operations of a token's forward and backward pass.
        peak_flops: floating-point operations that all devices can do in a second.
        world_size: number of ranks.
    """

    def __init__(self, flops_per_token: float, peak_flops: float, world_size: int):
        self._flops_per_token, self._peak_flops, self._world_size = flops_per_token, peak_flops, world_size
        self._warned = False
        self.reset()

    def reset(self) -> None:
        self._tokens, self._seconds, self._started = 0, 0.0, time.perf_counter()
        self._seconds_waited = [0.0] * self._world_size
        self._readings = 0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._seconds += time.perf_counter() - self._started

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def read(self, seconds_waited: list[float]) -> dict[str, float]:
        """Return the figures since the last reading, within a step. Waits for the device.

        Args:
            seconds_waited: that each rank has waited for data, since `reset`. The longest counts: the other ranks wait
                for that one.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds = self._seconds + now - self._started
        tokens_per_s = self._tokens / seconds
        waited = max(now - before for now, before in zip(seconds_waited, self._seconds_waited, strict=True))
        self._tokens, self._seconds, self._started, self._seconds_waited = 0, 0.0, now, seconds_waited
        self._readings += 1
        return {
            "speed/tokens_per_s": tokens_per_s,
            "speed/mfu": tokens_per_s * self._flops_per_token / self._peak_flops,
            "data/wait_share": waited / seconds,
        }

    def warns_of_data_wait(self, share: float) -> bool:
        """Whether to warn now: once a run, and not at the first reading, when workers start."""
        if self._warned or self._readings < 2 or share < DATA_WAIT_WARNING:
            return False
        self._warned = True
        return True
