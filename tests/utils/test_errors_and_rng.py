"""Helpers for error sentences, and random states."""

import random

import numpy as np
import pytest
import torch

from infini_ds.utils.counts import short_count
from infini_ds.utils.errors import did_you_mean, first_line
from infini_ds.utils.rng import get_rng_states, seed_everything, set_rng_states


def test_short_counts_keep_a_digit():
    numbers = (0, 812, 999, 1000, 47_312, 99_990, 999_949, 999_950, 1_412_000, 1_315_575_808)
    shown = "0 812 999 1.0k 47.3k 100.0k 999.9k 1.0M 1.4M 1.3B"
    assert " ".join(map(short_count, numbers)) == shown


def test_did_you_mean():
    known = ["learning_rate", "eps", "beta1"]
    assert did_you_mean("learing_rate", known, prefix="optimizer.") == ": did you mean optimizer.learning_rate?"
    assert did_you_mean("momentum", known) == "; known are beta1, eps, learning_rate"
    assert did_you_mean("bta1", iter(known)) == ": did you mean beta1?"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("no such file.\n\nMore advice."), "no such file"),
        (ValueError(""), "ValueError"),
        (RuntimeError("\n  spaces"), "spaces"),
    ],
)
def test_first_line(error, line):
    assert first_line(error) == line


def draw() -> tuple:
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_random_states_are_restored():
    before = get_rng_states()
    try:
        seed_everything(7)
        states = get_rng_states()
        first = draw()
        assert draw() != first
        set_rng_states(states)
        assert draw() == first
        seed_everything(7)
        assert draw() == first
    finally:
        set_rng_states(before)
