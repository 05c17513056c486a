"""AdamW's parameter groups: which parameters decay, and which have a learning rate of their own."""

from typing import TypedDict

from torch import nn

from infini_ds.config.recipe import OptimizerRecipe


class ParameterGroup(TypedDict):
    name: str
    params: list[nn.Parameter]
    lr: float
    weight_decay: float


def parameter_groups(model: nn.Module, optimizer: OptimizerRecipe) -> list[ParameterGroup]:
    """Return the groups "decay", "no_decay" and "gates", in this order; a group may be empty.

    Matrices decay, the embeddings too, since the input embedding is the output layer's matrix. Biases and norms do not
    decay. Gates do not decay either, and have their own learning rate.
    """
    decay = ParameterGroup(name="decay", params=[], lr=optimizer.learning_rate, weight_decay=optimizer.weight_decay)
    no_decay = ParameterGroup(name="no_decay", params=[], lr=optimizer.learning_rate, weight_decay=0.0)
    gates = ParameterGroup(name="gates", params=[], lr=optimizer.gate_learning_rate, weight_decay=0.0)
    for name, parameter in model.named_parameters():
        group = gates if name.endswith(".beta") else decay if parameter.dim() >= 2 else no_decay
        group["params"].append(parameter)
    return [decay, no_decay, gates]
