"""Checks of the model on a device: each computes the same in two ways and compares.

Run by `infini_ds.benchmarks.worker`, one in a process. Shapes: B rows, H heads, S slots, T tokens, D head size.
"""

import importlib.util
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

from infini_ds.benchmarks.contenders import ModelShape
from infini_ds.benchmarks.gpu.comparison import CheckResult, Comparison, relative_difference
from infini_ds.model import BlockSchedule, InfiniCache, InfiniGPTNeoForCausalLM
from infini_ds.model.local_attention import document_mask, local_attention
from infini_ds.planning.step_trace import DTYPES
from infini_ds.training.model_builder import set_matmul_precision
from infini_ds.utils.errors import UserError

# The largest relative difference of what is the same but for rounding. bf16 has 8 bits: one rounding is 0.4%.
ROUNDING = {"fp32": 1e-4, "bf16": 5e-2}
GRADIENT_ROUNDING = {"fp32": 1e-3, "bf16": 1e-1}
NO_FLEX_GRADIENT = "flex attention, backward: PyTorch has it for GPUs only"


class Result(NamedTuple):
    """What a computation gives: the loss, the gradient of each parameter, and all layers' memory at its end."""

    loss: float
    gradients: dict[str, Tensor]
    memory: list[Tensor]


def random_model(shape: ModelShape, device: torch.device, attention: str = "sdpa") -> InfiniGPTNeoForCausalLM:
    """Return a model whose weights are random but large enough that attention and memory decide its logits."""
    torch.manual_seed(0)
    set_matmul_precision(shape.precision, device)
    config = shape.config()
    config._attn_implementation = attention
    config.initializer_range = 0.5 / shape.width**0.5
    model: InfiniGPTNeoForCausalLM = InfiniGPTNeoForCausalLM(config)
    return cast(torch.nn.Module, model).to(device, DTYPES[shape.precision])  # type: ignore[return-value]


def require_compiler(device: torch.device) -> None:
    """Raise a UserError if nothing can be compiled for a GPU, as with a torch that came without triton."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("torch.compile on a GPU needs the package triton, which PyTorch's CUDA builds bring along")


def random_ids(shape: ModelShape, rows: int, tokens: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.vocabulary, (rows, tokens), generator=generator).to(device)


def random_documents(rows: int, tokens: int, mean_length: int, device: torch.device) -> Tensor:
    """Return the document of each token (B, T): ids that rise at random places."""
    starts = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(2)) < 1 / mean_length
    return starts.long().cumsum(1).to(device)


def _documents(shape: ModelShape, tokens: int, device: torch.device) -> Tensor:
    """Return documents of some segments each, so that most tokens read what their own document wrote."""
    return random_documents(1, tokens, max(tokens // 4, 2 * shape.segment_length), device)


def check_compiled(shape: ModelShape, tokens: int, block: int, device: torch.device) -> CheckResult:
    """Compare compiled layers with eager ones: loss and gradients of packed rows, in blocks that are recomputed."""
    require_compiler(device)
    counters.clear()
    results: list[Result] = []
    ids, documents = random_ids(shape, 1, tokens, device), _documents(shape, tokens, device)
    for compiled in (True, False):
        model = _in_blocks(random_model(shape, device), block)
        if compiled:
            model.compile_layers()
        results.append(_run(model, ids, documents))
        del model
    graphs = counters["stats"]["unique_graphs"]
    return CheckResult(
        (Comparison("compiled graphs", graphs, at_least=1), *_compare(results, shape.precision)),
        {"graph breaks": sum(counters["graph_break"].values())},
    )


def check_flex_model(shape: ModelShape, tokens: int, block: int, device: torch.device) -> CheckResult:
    """Compare flex attention with masks in the model: loss, and on GPUs gradients, of packed rows."""
    require_compiler(device)
    results: list[Result] = []
    backward = device.type == "cuda"
    ids, documents = random_ids(shape, 1, tokens, device), _documents(shape, tokens, device)
    for attention in ("flex_attention", "sdpa"):
        model = _in_blocks(random_model(shape, device, attention), block)
        results.append(_run(model, ids, documents, backward))
        del model
    return CheckResult(_compare(results, shape.precision), {}, () if backward else (NO_FLEX_GRADIENT,))


def check_flex_kernel(
    heads: int, head_size: int, slots: int, window: int | None, precision: str, device: torch.device
) -> CheckResult:
    """Compare flex attention with a mask in fp32: its output, and on GPUs its gradients."""
    require_compiler(device)
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(2, heads, slots, head_size, generator=generator) for _ in range(4))
    scale = head_size**-0.25  # of q and k, so that scores have a variance of 1
    inputs = [x.to(device, DTYPES[precision]) for x in (q * scale, k * scale, v)]
    documents = random_documents(2, slots, slots // 3, device)
    slot = torch.arange(slots, device=device)
    distance = slot[:, None] - slot
    mask = (distance >= 0) & (distance < (window or slots)) & (documents[:, :, None] == documents[:, None, :])
    wanted = [x.float().requires_grad_() for x in inputs]
    expected = local_attention(wanted[0], wanted[1], wanted[2], mask[:, None])
    backward = device.type == "cuda"
    given = [x.requires_grad_(backward) for x in inputs]
    output = local_attention(given[0], given[1], given[2], document_mask(documents, window))
    error = relative_difference([output], [expected])
    comparisons = [Comparison("output", error, ROUNDING[precision])]
    if backward:
        weight = weight.to(device)
        (expected * weight).sum().backward()
        (output.float() * weight).sum().backward()
        for name, one, other in zip("qkv", given, wanted, strict=True):
            assert one.grad is not None and other.grad is not None
            error = relative_difference([one.grad], [other.grad])
            comparisons.append(Comparison(f"gradient of {name}", error, GRADIENT_ROUNDING[precision]))
    return CheckResult(tuple(comparisons), {}, () if backward else (NO_FLEX_GRADIENT,))


@torch.inference_mode()
def check_generation(shape: ModelShape, tokens: int, new_tokens: int, device: torch.device) -> CheckResult:
    """Compare the cache with complete recomputation: logits after prompts of different lengths, token by token.

    In fp32 also the tokens that greedy generation chooses.
    """
    model, ids = random_model(shape, device).eval(), random_ids(shape, 2, tokens + new_tokens, device)
    padding = tokens // 3
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    wanted = model(ids, attention_mask=mask, use_cache=False).logits[:, tokens - 1 : -1].float()
    cache = InfiniCache(model.config, 2, model.dtype, device)
    read = tokens // 2  # a prompt in two parts, the second of which continues the cache
    model(ids[:, :read], attention_mask=mask[:, :read], past_key_values=cache, logits_to_keep=1)
    steps = [slice(read, tokens), *(slice(t, t + 1) for t in range(tokens, tokens + new_tokens - 1))]
    found = [
        model(ids[:, step], attention_mask=mask[:, : step.stop], past_key_values=cache, logits_to_keep=1).logits
        for step in steps
    ]
    error = relative_difference([torch.cat(found, dim=1).float()], [wanted])
    comparisons = [Comparison("logits", error, ROUNDING[shape.precision])]
    if shape.precision == "fp32":
        prompt = {"attention_mask": mask[:, :tokens], "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        cached = model.generate(ids[:, :tokens], max_new_tokens=new_tokens, **prompt)[:, tokens:]
        sequence, valid = ids[:, :tokens], mask[:, :tokens]
        for _ in range(new_tokens):
            logits = model(sequence, attention_mask=valid, use_cache=False, logits_to_keep=1).logits
            sequence = torch.cat([sequence, logits.argmax(-1)], dim=1)
            valid = torch.cat([valid, torch.ones_like(valid[:, :1])], dim=1)
        differ = int((cached != sequence[:, tokens:]).sum())
        comparisons.append(Comparison("tokens that differ", differ, at_most=0))
    return CheckResult(tuple(comparisons), {"cache, bytes": float(cache.nbytes())})


def check_rounding(shape: ModelShape, tokens: int, block: int, device: torch.device) -> CheckResult:
    """Compare a model in bf16 with the same one in fp32: loss and gradients of one row."""
    results: list[Result] = []
    ids = random_ids(shape, 1, tokens, device)
    for precision in ("bf16", "fp32"):
        model = _in_blocks(random_model(replace(shape, precision=precision), device), block)
        results.append(_run(model, ids))
        del model
    return CheckResult(_compare(results, "bf16"), {"loss in fp32": results[1].loss})


def _in_blocks(model: InfiniGPTNeoForCausalLM, block: int) -> InfiniGPTNeoForCausalLM:
    model.train()
    model.block_schedule = BlockSchedule(segments_per_block=block)
    model.gradient_checkpointing_enable()
    return model


def _run(model: InfiniGPTNeoForCausalLM, ids: Tensor, documents: Tensor | None = None, backward: bool = True) -> Result:
    with torch.set_grad_enabled(backward):
        output = model(input_ids=ids, labels=ids, document_ids=documents)
    if backward:
        output.loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return Result(float(output.loss.detach()), gradients, [x.detach().cpu() for x in tree_leaves(output.memory)])


def _compare(results: list[Result], precision: str) -> tuple[Comparison, ...]:
    """Compare the first result with the second, which is right."""
    found, wanted = results
    difference = abs(found.loss / wanted.loss - 1)
    error = relative_difference(found.memory, wanted.memory)
    comparisons = [
        Comparison("loss", difference, ROUNDING[precision] / 10),
        Comparison("memory after the row", error, ROUNDING[precision] / 2),
    ]
    gates = [name for name in wanted.gradients if name.endswith(".beta")]
    for title, names in (("gradients", list(wanted.gradients)), ("gradients of gates", gates)):
        if names:
            error = relative_difference(*([one.gradients[name] for name in names] for one in results))
            comparisons.append(Comparison(title, error, GRADIENT_ROUNDING[precision]))
    return tuple(comparisons)
