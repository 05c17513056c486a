"""The checks for a GPU, in small on the CPU: each passes, and fails once the thing that it checks is broken."""

import inspect
from dataclasses import asdict, replace

import pytest
import torch
from harness import join_ranks

import infini_ds.benchmarks.gpu.model_checks as model_checks
import infini_ds.benchmarks.gpu.training_checks as training_checks
from infini_ds.benchmarks.contenders import ModelShape, check_contender
from infini_ds.benchmarks.gpu.comparison import CheckResult, Comparison, relative_difference
from infini_ds.benchmarks.gpu.sections import Case, all_sections, full_form, small_form
from infini_ds.benchmarks.worker import MEASURES, measure
from infini_ds.distributed.environment import detect_environment
from infini_ds.model import InfiniCache, InfiniGPTNeoForCausalLM, base_model
from infini_ds.model.linear_rule import LinearRule
from infini_ds.model.local_attention import document_mask
from infini_ds.model.presets import preset_config
from infini_ds.planning.flops import training_flops_per_token
from infini_ds.training.engine import Engine

CPU = torch.device("cpu")


def first_case(section: str, number: int = 0) -> Case:
    (found,) = [one for one in all_sections(small_form(), compiles=False) if one.name == section]
    return found.cases(())[number]


def run(case: Case) -> CheckResult:
    """Run a case in this process, whose ranks are joined: DeepSpeed's groups do not outlive their process group."""
    join_ranks(detect_environment())
    return CheckResult.from_json(measure(case.kind, case.arguments, CPU))


def break_memory_in_bf16(monkeypatch) -> None:
    """Sum the memory in bf16, segment by segment, if the model is in bf16."""
    write = LinearRule.write

    def rounded(self, state, k, v, write_mask, memory_document, parameters):
        if k.dtype != torch.bfloat16:
            return write(self, state, k, v, write_mask, memory_document, parameters)
        states = [state]
        for segment in range(k.shape[1]):
            part = slice(segment, segment + 1)
            _, after = write(self, states[-1], k[:, part], v[:, part], None, memory_document, parameters)
            states.append(type(after)(*(x.bfloat16().to(x.dtype) for x in after)))
        return type(state)(*(torch.stack(parts, dim=1) for parts in zip(*states[:-1], strict=True))), states[-1]

    monkeypatch.setattr(LinearRule, "write", rounded)


def break_steps_in_bf16(monkeypatch) -> None:
    """Skip every second optimizer step of a model in bf16."""
    step, count = Engine.step, [0]

    def skipping(self, skip=False):
        count[0] += 1
        step(self, skip or (self.module.dtype == torch.bfloat16 and count[0] % 2 == 0))

    monkeypatch.setattr(Engine, "step", skipping)


def break_cache(monkeypatch) -> None:
    """Forget what a segment writes to the memory when it closes."""
    advance = InfiniCache.advance

    def forgetting(self, states, *arguments, **named):
        before = [layer.memory for layer in self.layer_caches]
        advance(self, states, *arguments, **named)
        for layer, memory in zip(self.layer_caches, before, strict=True):
            layer.memory = memory

    monkeypatch.setattr(InfiniCache, "advance", forgetting)


def break_flex_masks(monkeypatch) -> None:
    """Let a token see the document before its own."""
    for module in (base_model, model_checks):
        monkeypatch.setattr(module, "document_mask", lambda documents, window: document_mask(documents // 2, window))


def break_compilation(monkeypatch) -> None:
    """Compile a layer to something else: without the gates' gradients."""

    def compile_layers(self):
        torch._dynamo.utils.counters["stats"]["unique_graphs"] = 1
        for layer in self.transformer.h:
            layer.attention.beta.requires_grad_(False)
            layer.attention.beta.grad = torch.zeros_like(layer.attention.beta)

    monkeypatch.setattr(InfiniGPTNeoForCausalLM, "compile_layers", compile_layers)


def break_plan(monkeypatch) -> None:
    """Forget the optimizer's state in the plan."""
    estimate = training_checks.estimate_memory

    def without_optimizer(work, sharding):
        found = estimate(work, sharding)
        moments = {name: getattr(found, name) | {"optimizer": 0} for name in ("computing", "reducing", "step")}
        return replace(found, **moments)

    monkeypatch.setattr(training_checks, "estimate_memory", without_optimizer)


BROKEN = {
    "losses, many segments": (first_case("losses", 2), break_memory_in_bf16, "memory after the row"),
    "losses, training": (first_case("losses", 3), break_steps_in_bf16, "largest difference of a step's loss"),
    "cache": (first_case("cache"), break_cache, "logits"),
    "cache, bf16": (first_case("cache", 1), break_cache, "logits"),
    "flex, a kernel": (first_case("flex"), break_flex_masks, "output"),
    "flex, the model": (first_case("flex", 2), break_flex_masks, "loss"),
    "memory": (first_case("memory"), break_plan, "peak over the plan"),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", BROKEN)
def test_a_check_passes_and_fails_once_its_subject_is_broken(name, monkeypatch):
    case, break_it, compared = BROKEN[name]
    result = run(case)
    assert result.comparisons and not result.failed, result
    break_it(monkeypatch)
    assert compared in [one.name for one in run(case).failed]


def test_compiled_layers_that_compute_something_else_fail(monkeypatch):
    """`test_compiled_layers_give_the_same` compiles for real, which takes a minute."""
    break_compilation(monkeypatch)
    assert "gradients of gates" in [one.name for one in run(first_case("compiled")).failed]


def test_layers_that_were_not_compiled_fail(monkeypatch):
    monkeypatch.setattr(InfiniGPTNeoForCausalLM, "compile_layers", lambda self: None)
    assert [one.name for one in run(first_case("compiled")).failed] == ["compiled graphs"]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_a_device_lacks_is_said():
    """PyTorch has the backward pass of flex attention for GPUs alone."""
    result = run(first_case("flex"))
    assert [one.name for one in result.comparisons] == ["output"]
    assert result.unavailable == (model_checks.NO_FLEX_GRADIENT,)


def test_nan_fails_whatever_the_bounds():
    for bounds in ({"at_most": 1.0}, {"at_least": 0.0}, {"at_most": 1.0, "at_least": 0.0}):
        assert not Comparison("loss", float("nan"), **bounds).passed
        assert Comparison("loss", 0.5, **bounds).passed
    assert not Comparison("loss", 2.0, at_most=1.0).passed and not Comparison("loss", 0.5, at_least=1.0).passed


def test_relative_difference():
    wanted = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert relative_difference([torch.tensor([3.0, 0.3]), torch.tensor([[4.4]])], wanted) == pytest.approx(0.1)
    zeros = [torch.zeros(2)]
    assert not relative_difference(zeros, zeros) <= 1 and not relative_difference([torch.ones(2)], zeros) <= 1


def test_a_case_has_what_its_worker_needs():
    """Full size too: the arguments of every case are those of its function, and its shape is one of a model."""
    for form in (full_form(), small_form()):
        for compiles in (True, False):
            for section in all_sections(form, compiles):
                for case in section.cases(()):
                    inspect.signature(MEASURES[case.kind]).bind(**case.arguments, device=CPU)
                    if "shape" in case.arguments:
                        shape = ModelShape(**case.arguments["shape"])
                        shape.config()
                        assert asdict(shape) == case.arguments["shape"]
                    if "contender" in case.arguments:
                        check_contender(case.arguments["contender"])


def test_shapes_of_presets_are_those_of_the_presets():
    """Layers with a window too, of which the memory plan and FLOPs know."""
    for name, shape in full_form().sizes.items():
        config, wanted = shape.config(), preset_config(name, segment_length=2048)
        assert config.attention_layers == wanted.attention_layers and config.window_size == wanted.window_size
        assert training_flops_per_token(config) == training_flops_per_token(wanted)
