"""The contenders of a benchmark: models of one shape, each set up as its authors use it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.planning.memory_estimate import Workload, ZeroSharding, largest_block
from infini_ds.planning.step_trace import DTYPES
from infini_ds.utils.errors import UserError, first_line

BASELINES = ("gpt-neo", "infini-transformer-pytorch")
DELTA_RULES = ("delta", "delta_paper")  # of this project, that the package's delta rule is compared with

GENERATING = ("infini:all", "gpt-neo")  # those that transformers' `generate()` runs
LossFunction = Callable[[Any, Tensor], Tensor]  # (model, ids (1, T)) -> loss


@dataclass(frozen=True)
class ModelShape:
    """What all contenders have in common. `segment_length` and `memory_rule` concern those with a memory."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    segment_length: int
    memory_rule: str = "linear"
    precision: str = "fp32"
    compiled: bool = False
    window: int | None = None  # of every second layer, as GPT-Neo's presets have it; None: no layer has one

    def config(self) -> InfiniGPTNeoConfig:
        """Return the configuration of the Infini-GPT-Neo. Raises ValueError if a value is invalid."""
        kinds = ["global", "global" if self.window is None else "local"]
        return InfiniGPTNeoConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_layers=self.layers,
            num_heads=self.heads,
            attention_types=[[kinds, self.layers // 2], [["global"], self.layers % 2]],
            window_size=self.window or 256,
            segment_length=self.segment_length,
            memory_rule=self.memory_rule,
            max_position_embeddings=max(2048, self.segment_length),
            resid_dropout=0.0,
            embed_dropout=0.0,
            attention_dropout=0.0,
        )


def is_infini(contender: str) -> bool:
    return contender.startswith("infini:")


def check_contender(name: str) -> None:
    """Raise a UserError unless `name` is a contender."""
    base, _, choice = name.partition(":")
    is_block = choice in ("auto", "all") or (choice.isdigit() and int(choice) > 0)
    if name in BASELINES or (base == "gpt-neo" and choice) or (is_infini(name) and is_block):
        return
    raise UserError(
        f"--contenders {name} is not a contender: use infini:G with G segments in a block, infini:auto, infini:all, "
        f"{' or '.join(BASELINES)}; gpt-neo:ATTENTION names one of transformers' attention implementations"
    )


def build_contender(
    name: str, shape: ModelShape, tokens: int, device: torch.device
) -> tuple[nn.Module, Callable[[Tensor], None]]:
    """Build a contender with random weights, on the device itself: a CPU takes long to draw those of a large model.

    Returns:
        the model, and a function that runs its forward and backward pass on ids of shape (1, `tokens`).
    """
    torch.manual_seed(0)
    model: nn.Module
    loss: LossFunction
    if is_infini(name):
        model, loss = _build_infini(shape, tokens, name.partition(":")[2], device)
    elif name.startswith("gpt-neo"):
        model, loss = _build_gpt_neo(name, shape, tokens, device)
    else:
        model, loss = _build_infini_transformer(shape, device)
    model = model.to(device, DTYPES[shape.precision]).train()
    return model, lambda ids: loss(model, ids).backward()


def _build_infini(
    shape: ModelShape, tokens: int, block: str, device: torch.device
) -> tuple[InfiniGPTNeoForCausalLM, LossFunction]:
    """Build this project's model with `block` segments in a block: a number, "auto", or "all".

    Blocks are recomputed in the backward pass; "all" keeps all activations instead.
    """
    config, segments = shape.config(), None
    if block == "auto":
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        workload = Workload(config, 1, tokens, shape.precision, packed=False, checkpointing=True)
        segments = largest_block(workload, ZeroSharding(ranks=1), free)
    elif block != "all":
        segments = int(block)
    with device:
        model = InfiniGPTNeoForCausalLM(config)
    model.block_schedule = BlockSchedule(segments_per_block=segments)
    if block != "all":
        model.gradient_checkpointing_enable()
    if shape.compiled:
        model.compile_layers()
    return model, lambda model, ids: model(input_ids=ids, labels=ids).loss


def _build_gpt_neo(name: str, shape: ModelShape, tokens: int, device: torch.device) -> tuple[nn.Module, LossFunction]:
    """Build transformers' GPT-Neo, with the attention implementation that `name` ends in, or with eager attention."""
    from transformers import AutoModelForCausalLM, GPTNeoConfig

    fields = shape.config().to_dict()
    config = GPTNeoConfig(**{key: fields[key] for key in GPTNeoConfig().to_dict() if key in fields})
    config.max_position_embeddings = max(2048, tokens)
    attention, dtype = name.partition(":")[2] or "eager", DTYPES[shape.precision]
    try:
        with device:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    except (ImportError, ValueError) as error:  # this version of transformers lacks it, or its package is missing
        reason = first_line(error).partition(". ")[0]
        raise UserError(f"--contenders {name}: {reason}; leave it out") from error
    return model, lambda model, ids: model(input_ids=ids, labels=ids, use_cache=False).loss


def _build_infini_transformer(shape: ModelShape, device: torch.device) -> tuple[nn.Module, LossFunction]:
    """Build the PyPI package's model. Its memories are never detached, so its gradients are exact as well."""
    try:
        from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper
    except ImportError as error:
        raise UserError(
            "--contenders infini-transformer-pytorch: the package is not installed; pip install "
            "infini-transformer-pytorch, or leave it out"
        ) from error
    if shape.memory_rule not in ("linear", *DELTA_RULES):
        raise UserError(
            f"--rule {shape.memory_rule}: infini-transformer-pytorch has the linear and the delta rule only; leave it "
            "out of --contenders"
        )
    with device:
        model = InfiniTransformer(
            num_tokens=shape.vocabulary,
            dim=shape.width,
            depth=shape.layers,
            heads=shape.heads,
            dim_head=shape.width // shape.heads,
            use_mem_delta_rule=shape.memory_rule in DELTA_RULES,
        )
    wrapper = InfiniTransformerWrapper(model, segment_length=shape.segment_length, detach_mems_every_num_segments=10**9)
    return wrapper, lambda model, ids: model(ids)
