"""Muon, DeepSpeed's, for the matrices of the layers: its steps, skipped steps, checkpoints, and other ranks."""

import json
import shutil

import pytest
import torch
from harness import ROOT, SHAPE, STEPS, join_ranks, pretrain, run_ranks
from reference import random_ids, tiny_model
from torch import Tensor

from infini_ds.checkpoint.manifest import complete_checkpoints, read_manifest
from infini_ds.config.batch_shape import BatchShape
from infini_ds.config.deepspeed_config import deepspeed_config
from infini_ds.config.recipe import OptimizerSection, load_recipe
from infini_ds.distributed.environment import detect_environment
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.training.engine import Engine
from infini_ds.training.optimizer_groups import parameter_groups
from infini_ds.utils.errors import UserError

MUON = [
    *("optimizer.kind=muon", "optimizer.muon_learning_rate=0.02", "optimizer.gradient_clipping=0"),
    "stability.check_gradients=false",
]
CHOICES = ["batch.rows=2", "steps=10", "schedule.kind=constant", "schedule.warmup_steps=4", *MUON]


def make_engine(*choices: str, json_file=ROOT / "ds_configs" / "zero2_cpu.json", precision="fp32") -> Engine:
    join_ranks(detect_environment())
    recipe = load_recipe(None, [*CHOICES, *choices])
    config = deepspeed_config(json_file, recipe, BatchShape(2, 1, 1), precision)
    return Engine(tiny_model(dtype=torch.float32).train(), recipe, config)


def take_step(engine: Engine, seed: int, skip: bool = False, scale: float = 1.0) -> None:
    for ids in random_ids(2, 12, seed):
        engine.backward(engine(input_ids=ids[None], labels=ids[None]).loss * scale)
    engine.step(skip)


def weights(engine: Engine) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in engine.module.named_parameters()}


def unequal(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


def orthogonal(matrix: Tensor) -> Tensor:
    """Five steps of Newton-Schulz, as published (https://kellerjordan.github.io/posts/muon/), in fp64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.double() / (matrix.double().norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_steps_equal_muon_and_adamw_written_out():
    """Four steps of two micro-batches: Nesterov momentum, Newton-Schulz, decay; AdamW for all other parameters."""
    engine, model = make_engine("optimizer.learning_rate=0.01"), tiny_model(dtype=torch.float32).train()
    choice = OptimizerSection(kind="muon", learning_rate=0.01)
    muon, *others = parameter_groups(model, choice)
    adamw = torch.optim.AdamW(others, betas=(choice.beta1, choice.beta2), eps=choice.eps)
    rates = [group["lr"] for group in others]
    momenta = [torch.zeros_like(matrix) for matrix in muon["params"]]
    for step in range(4):
        take_step(engine, seed=step)
        ids = random_ids(2, 12, step)
        model(input_ids=ids, labels=ids).loss.backward()
        factor = (step + 1) / 4  # the warm-up, which the gates are without
        for group, rate in zip(adamw.param_groups, rates, strict=True):
            group["lr"] = rate * (1 if group["name"] == "gates" else factor)
        adamw.step()
        with torch.no_grad():
            for matrix, momentum in zip(muon["params"], momenta, strict=True):
                momentum.lerp_(matrix.grad, 1 - 0.95)
                update = orthogonal(matrix.grad.lerp(momentum, 0.95))
                update *= max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.mul_(1 - 0.02 * factor * choice.weight_decay).sub_(0.02 * factor * update)
        model.zero_grad()
        assert engine.learning_rates()["muon"] == pytest.approx(0.02 * min(1, factor + 0.25))
    before = dict(tiny_model(dtype=torch.float32).named_parameters())
    for name, parameter in engine.module.named_parameters():
        assert torch.allclose(parameter, dict(model.named_parameters())[name], atol=2e-4), name
        assert not torch.allclose(parameter, before[name], atol=2e-3), name


@pytest.mark.parametrize(
    ("precision", "scale"), [("fp32", 1.0), ("bf16", 1.0), ("fp32", torch.inf), ("bf16", torch.nan)]
)
def test_a_skipped_step_changes_nothing(precision, scale):
    """Neither weights nor momentum: the steps after it are those of an engine that never saw it."""
    engines = [make_engine(json_file=ROOT / "ds_configs" / "zero2.json", precision=precision) for _ in range(2)]
    for engine, skips in zip(engines, (True, False), strict=True):
        take_step(engine, seed=1)
        if skips:
            before = weights(engine)
            take_step(engine, seed=2, skip=scale == 1, scale=scale)
            assert not engine.step_was_applied and engine.skipped_steps == 1
            assert not unequal(before, weights(engine))
        take_step(engine, seed=3)
        assert engine.step_was_applied
    assert not unequal(weights(engines[0]), weights(engines[1]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loaded_engine_continues_to_the_bit(precision, tmp_path):
    """A new one, and one that has already trained, as in a rollback; saving changes nothing."""
    engine = make_engine(precision=precision)
    for seed in range(2):
        take_step(engine, seed)
    engine.save(tmp_path / "step-2", {"data": 7})
    take_step(engine, 2)
    expected = weights(engine)
    other = make_engine(precision=precision)
    take_step(other, 5)
    for loading in (make_engine(precision=precision), other):
        assert loading.load(tmp_path / "step-2")["data"] == 7
        take_step(loading, 2)
        assert not unequal(expected, weights(loading))


def test_its_state_takes_what_the_plan_counts():
    """12 bytes a parameter, as AdamW: fp32 weights, the momentum, and a copy of it until the step is known to count."""
    engine = make_engine()
    take_step(engine, 0)
    zero = engine._engine.optimizer
    (shard,) = zero.optimizer.param_groups[0]["params"]
    kept = [shard, zero.optimizer.state[shard]["momentum_buffer"], zero._muon_pending_momentum[0][0]]
    matrices = sum(
        parameter.numel() for parameter in parameter_groups(engine.module, OptimizerSection(kind="muon"))[0]["params"]
    )
    assert set(zero.optimizer.state[shard]) == {"momentum_buffer"}
    assert sum(tensor.nbytes for tensor in kept) == pytest.approx(12 * matrices, rel=0.01)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (
            ["optimizer.gradient_clipping=1"],
            "optimizer.kind=muon with optimizer.gradient_clipping=1.0: DeepSpeed would",
        ),
        (
            ["stability.check_gradients=true"],
            "optimizer.kind=muon with stability.check_gradients=true: DeepSpeed keeps",
        ),
    ],
)
def test_keys_that_exclude_each_other_get_a_sentence(choices, words):
    with pytest.raises(UserError, match=words):
        load_recipe(None, [*CHOICES, *choices])


@pytest.mark.parametrize("zero", [{"stage": 1}, {"stage": 2, "offload_optimizer": {"device": "cpu"}}])
def test_other_ways_of_zero_get_a_sentence(zero, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(UserError, match="this project runs Muon with ZeRO stage 2 and without offload_optimizer"):
        make_engine(json_file=tmp_path / "own.json")


def losses(run) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def test_ranks_give_the_losses_of_one_and_resume_as_any_number(shards, tmp_path):
    """1 rank to the end; 2 ranks; resumed from the middle as 2, as 1 and as 4, whose shards cut through matrices."""
    steps = [*MUON, "steps=8", "checkpoint.every=4", "batch.micro_rows=1"]
    pretrain(shards, tmp_path, "one", *steps)
    expected = losses(tmp_path / "one")
    where = [f"data.path={shards}", f"output={tmp_path}", "name=two", *SHAPE, *STEPS, *steps]
    run_ranks(2, *where)
    two = losses(tmp_path / "two")
    assert two == pytest.approx(expected, abs=1e-4)
    run = tmp_path / "two"

    def back_to_the_middle() -> None:
        shutil.rmtree(run / "checkpoints" / "step-000008")
        assert [read_manifest(checkpoint).world_size for checkpoint in complete_checkpoints(run)] == [2]

    back_to_the_middle()
    assert "resumed from" in run_ranks(2, *where)
    assert losses(run) == two  # to the bit
    back_to_the_middle()
    assert "resumed from" in run_ranks(4, *where)
    assert losses(run) == pytest.approx(two, abs=1e-4)
    back_to_the_middle()
    pretrain(shards, tmp_path, "two", *steps)
    assert losses(run) == pytest.approx(two, abs=1e-4)


def test_rows_divided_over_ranks_give_the_losses_of_one(shards, tmp_path):
    steps = [*MUON, "steps=4", "checkpoint.every=4", "batch.micro_rows=1"]
    pretrain(shards, tmp_path, "one", *steps)
    where = [f"data.path={shards}", f"output={tmp_path}", "name=divided", *SHAPE, *STEPS, *steps]
    run_ranks(2, *where, "parallel.sequence=2")
    assert losses(tmp_path / "divided") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
