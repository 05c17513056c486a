"""The optimizer's parameter groups: what Muon trains, what decays, and what has a learning rate of its own."""

from typing import Any

from torch import nn

from infini_ds.config.model_config import CONVOLUTIONS
from infini_ds.config.recipe import OptimizerSection
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.model.memory_rule import get_memory_rule


def parameter_groups(model: InfiniGPTNeoForCausalLM, optimizer: OptimizerSection) -> list[dict[str, Any]]:
    """Return the groups "decay", "no_decay" and "gates", in this order, and with Muon "muon" before them.

    Matrices decay, the embeddings too, since the input embedding is the output layer's matrix. Biases, norms and
    convolutions do not decay. Gates do not decay either, and have their own learning rate. A memory rule names the
    group of its parameters. Muon trains the matrices of the layers; embeddings are not matrices to it, since a step
    changes few of their rows. A group may be empty, except that of Muon.
    """
    rate, gate_rate = optimizer.learning_rate, optimizer.gate_learning_rate
    muon = {"params": [], "lr": optimizer.muon_learning_rate, "weight_decay": optimizer.weight_decay}
    groups: dict[str, dict[str, Any]] = {"muon": muon} if optimizer.kind == "muon" else {}
    groups |= {
        "decay": {"params": [], "lr": rate, "weight_decay": optimizer.weight_decay},
        "no_decay": {"params": [], "lr": rate, "weight_decay": 0.0},
        "gates": {"params": [], "lr": gate_rate, "weight_decay": 0.0},
    }
    matrices = {id(module.weight) for module in model.transformer.h.modules() if isinstance(module, nn.Linear)}
    for name, parameter in model.named_parameters():
        if ".memory_parameters." in name:
            group: str = get_memory_rule(model.config.memory_rule).optimizer_group
        else:
            decays = parameter.dim() >= 2 and not any(f".{conv}." in name for conv in CONVOLUTIONS)
            group = "gates" if name.endswith(".beta") else "decay" if decays else "no_decay"
            if "muon" in groups and id(parameter) in matrices:
                group = "muon"
        groups[group]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items()]
