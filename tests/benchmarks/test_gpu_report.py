"""The report on a GPU, in small on the CPU: time limits, failures, exit code, JSON and tables."""

import json
import os
import subprocess
import time

import pytest
import torch
from harness import ROOT, call_script, environment, join_ranks, run_script
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

from infini_ds.benchmarks import worker
from infini_ds.benchmarks.gpu.comparison import CheckResult, Comparison
from infini_ds.benchmarks.gpu.machine import Machine, describe_machine
from infini_ds.benchmarks.gpu.report import BEGIN, END, Report, summary
from infini_ds.benchmarks.gpu.runner import is_failure, run_case, run_sections
from infini_ds.benchmarks.gpu.sections import Case, Outcome, Section, all_sections, best_setting, small_form
from infini_ds.benchmarks.process import OUT_OF_MEMORY, last_line, run_worker
from infini_ds.benchmarks.profile_groups import OTHERS, shares
from infini_ds.benchmarks.results import Operator, Profile, TrainingSpeed
from infini_ds.benchmarks.worker import is_out_of_memory, measure, own_times
from infini_ds.distributed.environment import detect_environment
from infini_ds.utils.documents import insert_between
from infini_ds.utils.errors import UserError

CPU = torch.device("cpu")
PASSED = {"comparisons": [{"name": "loss", "value": 0.1, "at_most": 1.0, "at_least": None}], "figures": {}}
PASSED |= {"unavailable": []}
FAILED = PASSED | {"comparisons": [{"name": "loss", "value": float("nan"), "at_most": 1.0, "at_least": None}]}
SPEED = {"tokens_per_s": 100.0, "peak_memory": 2**30, "matrix_flops": 1e12, "mfu": 0.5}


def here(kind, arguments, seconds):
    """Run a case in this process, in which a start takes no seconds of imports."""
    return measure(kind, arguments, CPU)


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_small_form_from_end_to_end(monkeypatch):
    """All sections but compilation, which takes minutes on a CPU: every check passes, and every table has its rows."""
    monkeypatch.setattr(worker, "_limit_memory", lambda device: None)  # it would stay for the tests that follow
    join_ranks(detect_environment())
    sections = [section for section in all_sections(small_form(), compiles=False) if section.name != "compiled"]
    outcomes = list(run_sections(sections, 3600, here))
    assert {one.section for one in outcomes} == {section.name for section in sections}
    assert not [one for one in outcomes if is_failure(one, sections)]
    impossible = {one.case.label for one in outcomes if one.state == "not possible"}
    assert (
        {"gpt-neo:sdpa", "gpt-neo:flash_attention_2"}
        <= impossible
        <= {*("gpt-neo:sdpa", "gpt-neo:flash_attention_2", "infini-transformer-pytorch")}
    )
    assert all(one.state in ("passed", "measured") for one in outcomes if one.case.label not in impossible)
    report = Report(describe_machine(CPU), "small", "2026-01-01T00:00:00", 60.0, sections, outcomes)
    text = report.markdown()
    for words in ("### Flex attention against masks", "| small | 256 | infini:4 |", "matrix products", "threads, "):
        assert words in text, text
    assert "flex attention, backward: PyTorch has it for GPUs only" in text and "**FAILED**" not in text
    assert "--contenders" not in text  # an option of another command
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    by_section = {one["section"]: one for one in content["outcomes"]}
    assert by_section["memory"]["result"]["comparisons"][0]["passed"] is True
    assert by_section["profile"]["result"]["operators"][0]["seconds"] > 0
    best = best_setting(outcomes, "small")
    assert best is not None and best.case.arguments["tokens"] == 256
    profiled = next(one for one in outcomes if one.section == "profile")
    assert profiled.case.arguments == best.case.arguments


def case(kind="losses", **arguments):
    return Case("125m", "infini:auto", kind, {"tokens": 64} | arguments)


def section(name, *cases, seconds=10.0, is_check=True):
    return Section(name, name.title(), seconds, lambda outcomes: list(cases), is_check)


def test_nothing_that_a_case_does_ends_the_others():
    raised = {
        "a": RuntimeError("failed with exit code 1:\nTraceback\nValueError: wrong"),
        "b": UserError("the package is not installed"),
        "c": TimeoutError("not done after 3 s"),
        "d": MemoryError("unexpected"),
    }
    contents = {"e": OUT_OF_MEMORY, "f": FAILED, "g": PASSED}

    def run(kind, arguments, seconds):
        if arguments["name"] in raised:
            raise raised[arguments["name"]]
        return contents[arguments["name"]]

    checks = section("checks", *(case(name=name) for name in "abcdefg"))
    speeds = section("speeds", *(case("training", name=name) for name in "ace"), is_check=False)
    outcomes = list(run_sections([checks, speeds], 100, run))
    states = ["error", "not possible", "out of time", "error", "out of memory", "failed", "passed"]
    assert [one.state for one in outcomes] == [*states, "error", "out of time", "out of memory"]
    # A check that did not end is a failure; a measurement without time or memory is a result.
    failures = [is_failure(one, [checks, speeds]) for one in outcomes]
    assert failures == [True, False, True, True, True, True, False, True, False, False]
    assert summary(outcomes[0]) == "ValueError: wrong" and summary(outcomes[5]) == "loss nan, at most 1"
    text = Report(describe_machine(CPU), "small", "", 1.0, [checks, speeds], outcomes).markdown()
    assert "**FAILED**" in text and "- checks: 125m infini:auto: error: ValueError: wrong" in text


def test_time_that_a_section_leaves_over_is_for_the_next_ones(monkeypatch):
    clock, limits = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def run(kind, arguments, seconds):
        limits.append(seconds)
        took = min(seconds, arguments["takes"])
        clock[0] += took
        if took < arguments["takes"]:
            raise TimeoutError(f"not done after {took:.0f} s")
        return PASSED

    short, hanging = section("short", case(takes=10.0), seconds=40), section("long", *[case(takes=1e9)] * 4, seconds=60)
    outcomes = list(run_sections([short, hanging], 200, run))  # 80 and 120 s
    # Of 190 s left, a case that hangs gets half, or 0.6 of the section's own 120 if that is more.
    assert limits == [48.0, 95.0, 72.0, 23.0] and clock[0] == 200
    assert [one.state for one in outcomes] == ["passed", *["out of time"] * 4]
    assert outcomes[-1].message == "the section's time is over" and outcomes[1].message == "not done after 95 s"


def test_a_worker_out_of_time_ends_with_all_that_it_started():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="not done after 0 s"):
        run_worker("machine", {}, seconds=0.2, hide_gpus=True)
    assert time.monotonic() - started < 20
    commands = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout
    assert "infini_ds.benchmarks.worker" not in commands


def test_what_libraries_print_at_the_end_is_skipped():
    errors = "warning\nerror: a step needs 3.0 GiB\n[rank0]:[W1125] Warning: destroy_process_group() was not called\n"
    assert last_line(errors, "error: ") == "error: a step needs 3.0 GiB"
    assert last_line('{"old": 1}\nNCCL version 2.29.7\n{"found": 1}\n\nbye\n', "{") == '{"found": 1}'


def test_an_error_of_a_real_worker_has_its_stack():
    run = run_case("losses", Case("", "wrong", "rounding", {"tokens": 8}), 120, run_worker)
    assert run.state == "error" and "Traceback" in run.message and summary(run).startswith("TypeError")


def test_memory_that_ran_out_is_told_from_other_errors():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    ) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def event(key, device_type, microseconds, annotation=False):
    found = FunctionEventAvg()
    found.key, found.device_type, found.count, found.is_user_annotation = key, device_type, 2, annotation
    found.self_device_time_total, found.self_cpu_time_total = microseconds, 5
    return found


def test_a_kernel_is_counted_once():
    """The profiler also gives its time to the operator that launched it, and to an annotation that spans it."""
    kernel, cpu = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", DeviceType.CPU
    events = [
        event("aten::mm", cpu, 300),
        event(kernel, DeviceType.CUDA, 300),
        event("Memcpy DtoD (Device -> Device)", DeviceType.CUDA, 700),
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, 1000, annotation=True),
    ]
    operators = own_times(events, torch.device("cuda"))
    assert [one.name for one in operators] == ["Memcpy DtoD (Device -> Device)", kernel]
    assert operators[1] == Operator(kernel, pytest.approx(300e-6), 2)
    assert [one.name for one in own_times(events[:1], CPU)] == ["aten::mm"]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_nn_n_tilesize128x128x32_stage3", "matrix products"),
        ("nvjet_hsh_192x192_64x3_2x1_v_bz_coopB_NNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128>", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, cutlass>", "attention"),
        ("fmha_cutlassB_bf16_aligned_128x64_k128_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("triton_per_fused_native_layer_norm_3", "compiled kernels"),
        ("void at::native::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor<float, 4>>", "optimizer"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, c10::BFloat16, float>", "softmax"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "element by element"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16>", "norms"),
        ("aten::addmm", "matrix products"),
        ("aten::copy_", "copies"),
        ("detach", OTHERS),
    ],
)
def test_kernels_have_their_group(name, group):
    (found,) = shares(Profile((Operator(name, 1.0, 1),)))
    assert found.startswith(group)


def test_shares_add_up_to_one():
    profile = Profile((Operator("aten::mm", 3.0, 1), Operator("aten::bmm", 1.0, 1), Operator("detach", 4.0, 9)))
    assert shares(profile) == {"matrix products": 0.5, OTHERS: 0.5}


def test_the_best_setting_is_the_fastest_on_the_longest_rows():
    def measured(label, tokens, speed, model="1.3b"):
        found = Case(model, label, "training", {"tokens": tokens})
        return Outcome("training", found, "measured", 1.0, TrainingSpeed(speed, 1, 1.0))

    outcomes = [measured("infini:all", 64, 900.0), measured("infini:auto", 256, 100.0), measured("gpt-neo", 256, 999.0)]
    outcomes += [measured("infini:auto compiled", 256, 200.0), measured("infini:all", 256, 950.0, model="125m")]
    best = best_setting(outcomes, "1.3b")
    assert best is not None and best.case.label == "infini:auto compiled"
    assert best_setting(outcomes, "350m") is None


GPU = Machine("NVIDIA H100 80GB HBM3", 8, 80 * 2**30, "13.0", "9.0", 989e12, {"bf16": 7e14}, {"torch": "2.13.0"})


def test_the_report_names_the_card():
    text = Report(GPU, "full", "2026-01-01T00:00:00", 540.0, [], []).markdown()
    assert text.startswith(
        "8 x NVIDIA H100 80GB HBM3, one of which was used, 80.0 GiB; CUDA 13.0, compute capability 9.0"
    )
    assert "700 TFLOP/s in bf16 (published: 989 in bf16)" in text and "9.0 minutes" in text


def test_numbers_that_are_not_finite_are_null_in_json():
    checks = section("checks", case())
    found = CheckResult((Comparison("loss", float("nan"), at_most=1.0),), {"x": float("inf")})
    outcomes = [Outcome("checks", case(), "failed", 1.0, found)]
    content = json.loads(json.dumps(Report(GPU, "full", "", 1.0, [checks], outcomes).to_json(), allow_nan=False))
    result = content["outcomes"][0]["result"]
    assert result["comparisons"][0] == {
        "name": "loss",
        "value": None,
        "at_most": 1.0,
        "at_least": None,
        "passed": False,
    }
    assert result["figures"] == {"x": None}


def test_tables_go_between_the_markers_of_the_document():
    document = (ROOT / "docs" / "performance.md").read_text()
    changed = insert_between(document, BEGIN, END, "| new |\n")
    assert f"{BEGIN}\n| new |\n{END}" in changed and insert_between(changed, BEGIN, END, "| new |\n") == changed
    assert changed.partition(BEGIN)[0] == document.partition(BEGIN)[0]


BREAK_THE_CACHE = """
import sys
if "infini_ds.benchmarks.worker" in sys.orig_argv:
    from infini_ds.model import InfiniCache
    advance = InfiniCache.advance
    def forgetting(self, states, *arguments, **named):
        before = [layer.memory for layer in self.layer_caches]
        advance(self, states, *arguments, **named)
        for layer, memory in zip(self.layer_caches, before):
            layer.memory = memory
    InfiniCache.advance = forgetting
"""


@pytest.mark.timeout(600)  # each of four processes imports torch and transformers
def test_the_command_fails_if_a_check_fails(tmp_path):
    """Real processes, whose model is broken by a file that Python runs at their start."""
    (tmp_path / "sitecustomize.py").write_text(BREAK_THE_CACHE)
    out = tmp_path / "out"
    done = subprocess.run(
        [*("python", "launch/gpu.py", "--device", "cpu", "--sections", "cache", "--minutes", "20"), "--out", out],
        cwd=ROOT,
        env=environment(PYTHONPATH=f"{tmp_path}:{ROOT}"),
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED: 3 of 3 cases, in cache" in done.stdout and "logits" in done.stdout
    content = json.loads((out / "gpu.json").read_text())
    assert [one["state"] for one in content["outcomes"]] == ["failed"] * 3
    assert content["machine"]["packages"]["torch"] == torch.__version__
    assert "**FAILED**" in (out / "gpu.md").read_text()


@pytest.mark.timeout(600)
def test_the_command_passes_and_writes_a_document(tmp_path):
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    options = ["--device", "cpu", "--sections", "profile", "--minutes", "20", "--out", tmp_path / "out"]
    done = run_script("launch/gpu.py", *options, "--write", document, limit=580)
    assert "measured" in done.stdout and "0 checks passed, 0 cases could not run" in done.stdout
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| matrix products |" in text
    assert "old" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--device cuda", "--device cpu"]),
        (["--device", "cpu", "--sections", "loses"], ["--sections loses", "losses"]),
        (["--device", "cpu", "--minutes", "nan"], ["--minutes nan", "above 0"]),
        (["--device", "cpu", "--write", "README.md"], ["--write", "does not have the lines"]),
        (["--device", "cpu", "--write", "missing.md"], ["--write missing.md", "cannot be read"]),
        (["--device", "cpu", "--out", "README.md"], ["--out README.md", "cannot be written", "another folder"]),
    ],
)
def test_mistakes_get_a_sentence(options, words):
    done = call_script("launch/gpu.py", *options, code=2)
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
