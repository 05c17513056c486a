"""AdamW's parameter groups: which parameters decay, and which have a learning rate of their own."""

from typing import Any

from infini_ds.config.recipe import OptimizerSection
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.model.memory_rule import get_memory_rule


def parameter_groups(model: InfiniGPTNeoForCausalLM, optimizer: OptimizerSection) -> list[dict[str, Any]]:
    """Return the groups "decay", "no_decay" and "gates", in this order; a group may be empty.

    Matrices decay, the embeddings too, since the input embedding is the output layer's matrix. Biases, norms and short
    convolutions do not decay. Gates do not decay either, and have their own learning rate. A memory rule names the
    group of its parameters.
    """
    rate, gate_rate = optimizer.learning_rate, optimizer.gate_learning_rate
    groups: dict[str, dict[str, Any]] = {
        "decay": {"params": [], "lr": rate, "weight_decay": optimizer.weight_decay},
        "no_decay": {"params": [], "lr": rate, "weight_decay": 0.0},
        "gates": {"params": [], "lr": gate_rate, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if ".memory_parameters." in name:
            group: str = get_memory_rule(model.config.memory_rule).optimizer_group
        else:
            decays = parameter.dim() >= 2 and ".short_conv." not in name
            group = "gates" if name.endswith(".beta") else "decay" if decays else "no_decay"
        groups[group]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items()]
