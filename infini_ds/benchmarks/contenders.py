"""The models that are measured against each other: of one width, depth and vocabulary, each as its authors use it.

A contender makes a function that computes forward and backward pass of (1, T) token ids.
"""

from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.planning.memory_estimate import Workload, ZeroSharding, largest_block
from infini_ds.utils.errors import UserError

OTHERS = ("gpt-neo", "infini-transformer-pytorch")


@dataclass(frozen=True)
class Shape:
    """What all contenders share; `segment_length` and `rule` are those of the memory."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    segment_length: int
    rule: str = "linear"
    precision: str = "fp32"
    compiled: bool = False

    def config(self) -> InfiniGPTNeoConfig:
        return InfiniGPTNeoConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_layers=self.layers,
            num_heads=self.heads,
            attention_types=[[["global"], self.layers]],
            segment_length=self.segment_length,
            memory_rule=self.rule,
            max_position_embeddings=max(2048, self.segment_length),
            resid_dropout=0.0,
            embed_dropout=0.0,
            attention_dropout=0.0,
        )


def check_name(name: str) -> None:
    """Raise a UserError unless `name` is one of the contenders."""
    kind, _, block = name.partition(":")
    if name in OTHERS or (kind == "infini" and (block in ("auto", "all") or (block.isdigit() and int(block)))):
        return
    raise UserError(f"--contenders {name}: there are infini:G, infini:auto, infini:all, {', '.join(OTHERS)}")


def build(name: str, shape: Shape, tokens: int, device: torch.device) -> tuple[nn.Module, Callable[[Tensor], None]]:
    """The model, and a function that takes ids (1, `tokens`) through forward and backward pass."""
    torch.manual_seed(0)
    kind, _, block = name.partition(":")
    make = {"infini": _infini, "gpt-neo": _gpt_neo, "infini-transformer-pytorch": _infini_transformer}[kind]
    model, loss = make(shape, tokens, block, device) if kind == "infini" else make(shape, tokens)
    model = model.to(device, torch.bfloat16 if shape.precision == "bf16" else torch.float32).train()
    return model, lambda ids: loss(model, ids).backward()


def _infini(shape: Shape, tokens: int, block: str, device: torch.device):
    """G segments a block: recomputed in the backward pass, but for "all", where all activations are kept."""
    config, segments = shape.config(), None
    if block == "auto":
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        work = Workload(config, 1, tokens, shape.precision, packed=False, checkpointing=True)
        segments = largest_block(work, ZeroSharding(ranks=1), free)
    elif block != "all":
        segments = int(block)
    model = InfiniGPTNeoForCausalLM(config)
    model.block_schedule = BlockSchedule(segments_per_block=segments)
    if block != "all":
        model.gradient_checkpointing_enable()
    if shape.compiled:
        model.compile_layers()
    return model, lambda model, ids: model(input_ids=ids, labels=ids).loss


def _gpt_neo(shape: Shape, tokens: int):
    """transformers' GPT-Neo, whose attention is its eager one: transformers has no SDPA for it."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    fields = shape.config().to_dict()
    config = GPTNeoConfig(**{key: fields[key] for key in GPTNeoConfig().to_dict() if key in fields})
    config.max_position_embeddings = max(2048, tokens)
    return GPTNeoForCausalLM(config), lambda model, ids: model(input_ids=ids, labels=ids, use_cache=False).loss


def _infini_transformer(shape: Shape, tokens: int):
    """The PyPI package, its memories never detached, so that its gradients are exact too."""
    try:
        from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper
    except ImportError as error:
        raise UserError(
            "--contenders infini-transformer-pytorch: the package is not installed; pip install "
            "infini-transformer-pytorch, or leave it out"
        ) from error
    model = InfiniTransformer(
        num_tokens=shape.vocabulary,
        dim=shape.width,
        depth=shape.layers,
        heads=shape.heads,
        dim_head=shape.width // shape.heads,
        use_mem_delta_rule=shape.rule in ("delta", "delta_paper"),
    )
    wrapper = InfiniTransformerWrapper(model, segment_length=shape.segment_length, detach_mems_every_num_segments=10**9)
    return wrapper, lambda model, ids: model(ids)
