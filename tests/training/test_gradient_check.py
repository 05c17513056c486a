"""The gradient check: finds a wrong gradient on one of two ranks, and repeats dropout in its recompute."""

import pytest
import torch
from faults import Fault
from harness import SHAPE, STEPS, pretrain, start_ranks

from infini_ds.training import gradient_check
from infini_ds.utils.errors import UserError


def test_a_wrong_gradient_on_one_of_two_ranks_ends_the_run(shards, tmp_path):
    torch.save(Fault("gradient", rank=1), tmp_path / "fault.pt")
    arguments = [str(tmp_path / "fault.pt"), f"data.path={shards}", f"output={tmp_path}", "name=wrong", *SHAPE, *STEPS]
    ranks = start_ranks(2, *arguments, script="tests/support/faults.py")
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert ranks[0].returncode == 2, outputs
    sentence = "DeepSpeed's gradient for transformer.h.1.ln_1.weight differs from an unsharded recompute by 0.0"
    assert sentence in outputs[0] and "(1 of " in outputs[0]


@pytest.mark.parametrize("blocks", [[], ["model.segments_per_block=2", "model.gradient_checkpointing=true"]])
def test_dropout_falls_the_same_in_the_recompute(blocks, shards, tmp_path, monkeypatch):
    dropout = [f"model.config.{place}_dropout=0.2" for place in ("attention", "embed", "resid")]
    pretrain(shards, tmp_path, "dropout", "steps=4", *dropout, *blocks)
    monkeypatch.setattr(gradient_check, "set_rng_states", lambda states: None)
    with pytest.raises(UserError, match=r"differs from an unsharded recompute by .* \(32 of 32 parameters do\)"):
        pretrain(shards, tmp_path, "other", "steps=4", *dropout, *blocks)
