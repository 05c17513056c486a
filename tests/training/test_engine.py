"""The engine: micro-batches, gradients, skipped steps with each of DeepSpeed's optimizers, schedule, save and load."""

import json
from pathlib import Path

import pytest
import torch
from harness import ROOT, join_ranks
from reference import random_ids, tiny_model
from torch.utils.cpp_extension import get_default_build_root

from infini_ds.config.batch_shape import BatchShape
from infini_ds.config.deepspeed_config import deepspeed_config
from infini_ds.config.recipe import load_recipe
from infini_ds.distributed.environment import detect_environment
from infini_ds.training.engine import Engine
from infini_ds.utils.errors import UserError
from infini_ds.utils.paths import can_compile_cpp

CHOICES = ["batch.rows=2", "steps=10", "schedule.warmup_steps=4", "optimizer.learning_rate=0.01"]


def make_engine(*choices: str, json_file=ROOT / "ds_configs" / "zero2_cpu.json", micro_rows=1, precision="fp32"):
    join_ranks(detect_environment())
    recipe = load_recipe(None, [*CHOICES, *choices])
    config = deepspeed_config(json_file, recipe, BatchShape(2, 1, micro_rows), precision)
    return Engine(tiny_model(dtype=torch.float32).train(), recipe, config)


def losses(engine: Engine, seed: int) -> list[torch.Tensor]:
    """The losses of two rows, each with its graph."""
    return [engine(input_ids=ids[None], labels=ids[None]).loss for ids in random_ids(2, 12, seed)]


def take_step(engine: Engine, seed: int, skip: bool = False, scale: float = 1.0) -> None:
    for loss in losses(engine, seed):
        engine.backward(loss * scale)
    engine.step(skip)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in engine.module.named_parameters()}


def unequal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


def test_gradients_of_micro_batches_are_averaged():
    engine = make_engine("optimizer.gradient_clipping=0")
    before = weights(engine)
    for loss in losses(engine, 0):
        engine.backward(loss)
    assert not unequal(before, weights(engine))  # the weights change in `step` alone
    copy = tiny_model(dtype=torch.float32).train()
    ids = random_ids(2, 12, 0)
    copy(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in engine.module.named_parameters():
        expected = dict(copy.named_parameters())[name].grad
        assert torch.allclose(engine.full_gradient(parameter), expected, rtol=1e-4, atol=1e-6), name
    norm = torch.stack([parameter.grad.norm() for parameter in copy.parameters()]).norm()
    engine.step()
    assert engine.gradient_norm() == pytest.approx(norm.item(), rel=1e-4)
    assert engine.step_was_applied and engine.skipped_steps == 0
    assert unequal(before, weights(engine))


def test_a_finite_loss_keeps_its_gradient_to_the_bit():
    """`backward` multiplies the loss by a factor that is 1, or NaN for a non-finite loss."""
    engine = make_engine(micro_rows=2)
    ids = random_ids(2, 12, 0)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    ours = {name: engine.full_gradient(parameter).clone() for name, parameter in engine.module.named_parameters()}
    plain = make_engine(micro_rows=2)
    plain._engine.backward(plain(input_ids=ids, labels=ids).loss)
    assert not unequal(
        ours, {name: plain.full_gradient(parameter) for name, parameter in plain.module.named_parameters()}
    )


JSONS = {
    "fp32": ("fp32", {}),
    "bf16": ("bf16", {}),
    "fp32-stage1": ("fp32", {"zero_optimization": {"stage": 1}}),
    "bf16-stage1": ("bf16", {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}),
    "offload": ("fp32", {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                         "zero_force_ds_cpu_optimizer": False}),
}  # fmt: skip


def cpu_optimizer_is_compiled() -> bool:
    """DeepSpeed compiles it at the first use, which takes a minute or two."""
    return can_compile_cpp() and any(Path(get_default_build_root()).rglob("cpu_adam.so"))


@pytest.mark.parametrize(
    ("kind", "scale"),
    [*((kind, 1.0) for kind in JSONS), ("fp32", torch.inf), ("bf16", torch.nan), ("offload", torch.nan)],
)
def test_a_skipped_step_changes_nothing(kind, scale, tmp_path):
    """Neither weights, nor moments, nor the schedule: the steps after it are those of an engine that never saw it."""
    precision, own = JSONS[kind]
    if kind == "offload" and not cpu_optimizer_is_compiled():
        pytest.skip("DeepSpeed's CPU optimizer has not been compiled on this machine")
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 2}} | own))
    engines = [make_engine(json_file=tmp_path / "own.json", precision=precision) for _ in range(2)]
    for engine, skips in zip(engines, (True, False), strict=True):
        take_step(engine, seed=1)
        if skips:
            before, rates = weights(engine), engine.learning_rates()
            take_step(engine, seed=2, skip=scale == 1, scale=scale)
            assert not engine.step_was_applied and engine.skipped_steps == 1
            assert not unequal(before, weights(engine)) and engine.learning_rates() == rates
        take_step(engine, seed=3)
        assert engine.step_was_applied
    assert not unequal(weights(engines[0]), weights(engines[1]))


def test_learning_rates_have_names_and_follow_the_schedule():
    engine = make_engine("optimizer.gate_learning_rate=0.1", "schedule.kind=constant")
    seen = []
    for seed in range(5):
        seen.append(engine.learning_rates())
        take_step(engine, seed)
    assert [rates["decay"] for rates in seen] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert all(rates["no_decay"] == rates["decay"] and rates["gates"] == 0.1 for rates in seen)


def test_a_loaded_engine_continues_to_the_bit_with_the_schedule_of_its_recipe(tmp_path):
    engine = make_engine()
    for seed in range(2):
        take_step(engine, seed)
    engine.save(tmp_path / "step-2", {"data": 7})
    expected = engine.learning_rates()
    take_step(engine, 2)

    same = make_engine()
    assert same.load(tmp_path / "step-2")["data"] == 7
    assert same.learning_rates() == expected
    take_step(same, 2)
    assert not unequal(weights(engine), weights(same))

    other = make_engine("schedule.warmup_steps=2", "schedule.kind=constant")
    other.load(tmp_path / "step-2")
    assert other.learning_rates()["decay"] == 0.01


def test_a_value_of_the_json_that_deepspeed_refuses_gets_a_sentence(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 2, "overlap_comm": "perhaps"}}')
    with pytest.raises(UserError, match=r'deepspeed=.*ds.json: overlap_comm="perhaps" is refused by DeepSpeed \(Input'):
        make_engine(f"deepspeed={file}", json_file=file)
