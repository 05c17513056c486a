"""Build the model of a recipe."""

from pathlib import Path

import torch

from infini_ds.config.model_config import CONVOLUTIONS
from infini_ds.config.recipe import Recipe
from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.utils.paths import check_can_compile_cpp
from infini_ds.utils.pretrained import load_pretrained, read_config


def build_model(recipe: Recipe, config: InfiniGPTNeoConfig, schedule: BlockSchedule) -> InfiniGPTNeoForCausalLM:
    """Return the model with its initial weights, the same on every rank: from the recipe's seed, or from a folder.

    Raises:
        UserError: the folder's weights are damaged or incomplete.
    """
    torch.manual_seed(recipe.seed)
    if recipe.model.start_from is not None:
        model = _pretrained(Path(recipe.model.start_from), config)
    else:
        model = InfiniGPTNeoForCausalLM(config)
    model.block_schedule = schedule
    if recipe.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if recipe.model.compile:
        if not torch.cuda.is_available():  # GPUs have kernels in Triton
            check_can_compile_cpp("model.compile=true")
        model.compile_layers()
    return model


def set_matmul_precision(precision: str, device: torch.device) -> None:
    """Let a GPU use TF32 while it trains in bf16. Only the memory's products are left in fp32, and TF32 keeps more
    digits of their bf16 factors than bf16 has.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "bf16" else "highest")


def _pretrained(folder: Path, config: InfiniGPTNeoConfig) -> InfiniGPTNeoForCausalLM:
    """Return the model of model.start_from. A rule that the recipe changes starts with parameters of its own, and
    a convolution that it adds starts as the identity.
    """
    name = f"model.start_from={folder}"
    given = read_config(folder, name)
    new = []
    if given.get("memory_rule", config.memory_rule) != config.memory_rule:
        new.append(r"\.memory_parameters\.")
    for key in CONVOLUTIONS:
        if getattr(config, key) and not given.get(key):
            new.append(rf"\.{key}\.")
    may_lack = "|".join(new) or None
    model: InfiniGPTNeoForCausalLM = load_pretrained(InfiniGPTNeoForCausalLM, folder, name, config, may_lack)
    return model
